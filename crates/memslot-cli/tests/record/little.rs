//! The little VMM: its account of every call, against the trace.

use std::collections::HashMap;
use std::collections::HashSet;
use std::path::Path;

use crate::common::{Built, built, has_kvm, lines, record, replay, run};
use serde_json::Value;

/// The calls of each thread in their order, without what the account does not have.
fn by_thread(calls: impl IntoIterator<Item = Value>) -> HashMap<(Value, Value), Vec<Value>> {
    const NOT_KEPT: [&str; 2] = ["check_ext", "create_vcpu"];
    let mut threads: HashMap<_, Vec<_>> = HashMap::new();
    for mut call in calls {
        if NOT_KEPT.iter().any(|op| call["op"] == *op) {
            continue;
        }
        let fields = call.as_object_mut().expect("an object");
        for ours in ["t_ns", "dur_ns", "vm", "nr_memslots", "readonly_mem", "address_spaces"] {
            fields.remove(ours);
        }
        if fields["op"] == "create_vm" {
            fields.remove("guest_memfd");
        }
        let thread = (fields["pid"].clone(), fields["tid"].clone());
        threads.entry(thread).or_default().push(call);
    }
    threads
}

/// Records some parts of the little VMM's work; the trace has exactly its account.
fn record_parts(trace: &Path, parts: &[&str]) -> Vec<Value> {
    let Built { little_vmm, .. } = built();
    let (status, out, error) = run(record(trace).arg(little_vmm).args(parts));
    assert_eq!(status, 0, "{error}");
    let account = out.lines().map(|line| serde_json::from_str(line).expect("its account is JSON"));
    let (expected, recorded) = (by_thread(account), by_thread(lines(trace)));
    assert!(!expected.is_empty());
    for (thread, expected) in &expected {
        let recorded = recorded.get(thread).unwrap_or_else(|| panic!("nothing of thread {thread:?}"));
        for (expected, recorded) in expected.iter().zip(recorded) {
            assert_eq!(expected, recorded, "thread {thread:?}");
        }
        assert_eq!(expected.len(), recorded.len(), "thread {thread:?}");
    }
    assert_eq!(expected.len(), recorded.len(), "threads");
    lines(trace)
}

fn vms(lines: &[Value]) -> HashSet<u64> {
    lines.iter().filter_map(|line| line["vm"].as_u64()).collect()
}

#[test]
fn every_call_is_there_with_its_arguments_and_replays() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("all.jsonl");
    let lines = record_parts(&trace, &[]);
    let report = replay(&trace);
    let count = |op: &str| lines.iter().filter(|line| line["op"] == op).count();
    assert_eq!(report["ioctls"]["KVM_SET_USER_MEMORY_REGION"], count("set") + count("req_46"));
    assert_eq!(report["ioctls"]["KVM_CREATE_VM"], vms(&lines).len());
    for line in &lines {
        assert!(line["t_ns"].is_u64() && line["dur_ns"].is_u64(), "{line}");
    }
    // What cannot be judged is what was meant to fail for the caller's own reasons.
    for unjudged in report["not_judged"].as_array().expect("a list") {
        assert!(["EIO", "EFAULT", "EBADF"].iter().any(|errno| unjudged["recorded"] == *errno), "{unjudged}");
    }
}

#[test]
fn a_vm_has_one_number_under_all_its_descriptors() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("copies.jsonl");
    let lines = record_parts(&trace, &["copies"]);
    let of = |op: &str| -> Vec<u64> {
        lines.iter().filter(|line| line["op"] == op).map(|line| line["vm"].as_u64().expect("a VM")).collect()
    };
    assert_eq!(of("create_vm"), [1, 2]);
    assert_eq!(of("set"), [1, 1, 1, 2]);
    replay(&trace);
}

#[test]
fn forks_and_execs_are_followed() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("exec.jsonl");
    let Built { little_vmm, .. } = built();
    // A shell that starts one VMM, and becomes another, which starts itself anew.
    let script = "\"$0\" slots; exec \"$0\" exec fork";
    let (status, _, error) = run(record(&trace).args(["sh", "-c", script]).arg(little_vmm));
    assert_eq!(status, 0, "{error}");
    let lines = lines(&trace);
    let processes: HashSet<i64> = lines.iter().filter_map(|line| line["pid"].as_i64()).collect();
    assert_eq!((processes.len(), vms(&lines).len()), (3, 8));
    assert!(error.contains("on 8 VMs in 3 processes"), "{error}");
    let report = replay(&trace);
    assert_eq!(report["vms"].as_array().map(Vec::len), Some(8));
    let name = |vm: &Value| (vm["pid"].clone(), vm["fd"].clone());
    let names: HashSet<_> = report["vms"].as_array().expect("VMs").iter().map(name).collect();
    assert!(names.len() > 3, "{names:?}");
}

/// The program finds the library next to itself, and gives it a name that the loader understands.
#[test]
fn from_a_folder_with_an_awkward_name() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let awkward = folder.path().join("a b:c$ORIGIN");
    std::fs::create_dir(&awkward).expect("a folder");
    let Built { little_vmm, library } = built();
    let program = awkward.join("memslot");
    std::fs::copy(assert_cmd::cargo::cargo_bin!("memslot"), &program).expect("a copy");
    let run_it = || {
        let mut command = std::process::Command::new(&program);
        command.env_remove("MEMSLOT_PRELOAD").current_dir(&awkward);
        run(command.args(["record", "-o", "t.jsonl", "--force"]).arg(little_vmm).arg("slots"))
    };
    let (status, out, error) = run_it();
    assert_eq!((status, out.as_str()), (125, ""));
    assert!(error.contains("cargo build -p memslot-preload"), "{error}");
    std::fs::copy(library, awkward.join("libmemslot_preload.so")).expect("a copy");
    let (status, _, error) = run_it();
    assert_eq!(status, 0, "{error}");
    assert_eq!(vms(&lines(&awkward.join("t.jsonl"))), HashSet::from([1]));
}
