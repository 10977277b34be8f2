//! `memslot replay`: real VMMs' traces agree with the engine, and what does not agree is found.

use crate::common::{memslot, report, run, set, trace, traces};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const HVA: u64 = 0x7f00_0000_0000;

#[test]
fn every_recorded_trace_replays_without_disagreement() {
    let mut seen = 0;
    for file in std::fs::read_dir(traces()).expect("data/traces") {
        let path = file.expect("an entry").path();
        let ours = |kind: &str| path.extension().is_some_and(|extension| extension == kind);
        if !ours("jsonl") && !ours("strace") {
            continue;
        }
        let (status, out, error) = run(memslot().arg("replay").arg(&path));
        assert_eq!((status, error.as_str()), (0, ""), "{}: {out}", path.display());
        assert!(out.contains(", 0 disagreements\n"), "{out}");
        let report = report(&path);
        assert_eq!(report["disagreements"], Value::Array(vec![]));
        assert_eq!(report["not_judged"], Value::Array(vec![]));
        let sets = report["ioctls"]["KVM_SET_USER_MEMORY_REGION"].as_u64().expect("a number");
        let dirty = ["get", "clear", "enable_cap", "reset_rings"].map(|call| &report["dirty_log"][call]);
        let dirty: u64 = dirty.iter().map(|calls| calls.as_u64().expect("a number")).sum();
        assert_eq!(report["compared"], sets + dirty, "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 10, "only {seen} traces");
}

/// The figures under which the traces were recorded: creates, deletes, changes of flags, most slots alive.
#[test]
fn changes_are_counted_as_they_were_recorded() {
    for (name, create, delete, flags, most) in [
        ("qemu-boot.jsonl", 23, 14, 0, 9),
        ("qemu-hotplug256.jsonl", 326, 138, 0, 253),
        ("qemu-hotunplug.jsonl", 22, 19, 0, 8),
        ("qemu-hotplug-seabios.strace", 28, 14, 0, 14),
        ("qemu-migrate.jsonl", 16, 13, 3, 7),
        ("firecracker.strace", 2, 0, 0, 2),
        ("kvmtool-256.jsonl", 1, 0, 0, 1),
    ] {
        let report = report(&trace(name));
        let vm = &report["vms"][0];
        let changes = &vm["changes"];
        assert_eq!(report["vms"].as_array().map(Vec::len), Some(1), "{name}");
        assert_eq!(
            (&changes["create"], &changes["delete"], &changes["flags"], &vm["most_slots"]["slots"]),
            (&create.into(), &delete.into(), &flags.into(), &most.into()),
            "{name}"
        );
        assert_eq!((&changes["move"], &changes["refused"]), (&0.into(), &0.into()), "{name}");
    }
    let migrate = report(&trace("qemu-migrate.jsonl"));
    assert_eq!(migrate["ioctls"]["KVM_GET_DIRTY_LOG"], 84);
    assert_eq!(migrate["ioctls"]["KVM_CLEAR_DIRTY_LOG"], 500);
    assert_eq!(migrate["dirty_log_calls"], 584);
    assert_eq!(migrate["dirty_log"]["bits"], 211_273);
    assert_eq!(migrate["disagreements"].as_array().map(Vec::len), Some(0));
}

/// A bit that was dirty and not cleared cannot be missing from the next bitmap.
#[test]
fn a_bitmap_that_lacks_a_dirty_page_is_a_disagreement() {
    let text = std::fs::read_to_string(trace("qemu-migrate.jsonl")).expect("the trace");
    // The first GET of slot 2 reports all pages, as they are initially set.
    let whole = "\"npages\":130880,\"runs\":[[0,130880]],\"set\":130880";
    assert!(text.contains(whole));
    let lacking = text.replacen(whole, "\"npages\":130880,\"runs\":[[0,7],[8,130872]],\"set\":130879", 1);
    let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(lacking));
    assert_eq!(status, 1);
    assert!(out.contains("page 7 is missing: dirty before, and not cleared since"), "{out}");
    // A bitmap of other than the slot's pages.
    let short = text.replacen(whole, "\"npages\":130879,\"runs\":[[0,130879]],\"set\":130879", 1);
    let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(short));
    assert!(status == 1 && out.contains("is of 130879 pages, and the slot has 130880"), "{out}");
}

#[test]
fn the_dirty_log_and_a_migration() {
    let path = trace("qemu-migrate.jsonl");
    let (status, out, _) = run(memslot().arg("dirty").arg(&path));
    assert_eq!(status, 0);
    assert!(out.contains("702 lines, 84 GET, 500 CLEAR, 211273 dirty bits"), "{out}");
    assert!(out.contains("converges: 2 rounds"), "{out}");
    let slow = ["dirty", "--bandwidth", "10MiB/s", "--downtime", "50ms", "--json"];
    let (status, out, _) = run(memslot().args(slow).arg(&path));
    let report: Value = serde_json::from_str(&out).expect("JSON");
    let vm = &report["vms"][0];
    assert_eq!((status, &vm["migration"]["converges"]), (0, &false.into()));
    assert_eq!(vm["slots"].as_array().map(Vec::len), Some(3));
    // A link of the bandwidth that is named is enough.
    let needed = vm["migration"]["bandwidth_needed"].as_f64().expect("a number");
    let enough = format!("{}B/s", (needed * 1.01).ceil());
    let (_, out, _) = run(memslot().args(["dirty", "--downtime", "50ms", "--bandwidth", &enough]).arg(&path));
    assert!(out.contains("converges: "), "{out}");
}

#[test]
fn a_trace_without_bitmaps_says_so() {
    let (status, out, _) = run(memslot().arg("dirty").arg(trace("firecracker.strace")));
    assert!(status == 0 && out.contains("only pointers for the bitmaps"), "{out}");
    let (status, out, _) = run(memslot().arg("dirty").arg(trace("kvmtool-256.jsonl")));
    assert!(status == 0 && out.contains("no KVM_GET_DIRTY_LOG is in this trace"), "{out}");
    let (status, _, error) =
        run(memslot().args(["dirty", "--bandwidth", "fast"]).arg(trace("kvmtool-256.jsonl")));
    assert!(status == 2 && error.contains("write it as 1GiB/s"), "{error}");
}

#[test]
fn the_map_and_its_holes() {
    let (_, out, _) = run(memslot().arg("replay").arg(trace("qemu-boot.jsonl")));
    for row in [
        "  0x000000000  0x0000a0000     640 KiB      0  0x7f3f1be00000  RAM          -",
        "  0x0000a0000  0x0000c0000     128 KiB      \u{b7}  hole",
        "  0x0fd000000  0x0fe000000      16 MiB      3  0x7f3f42200000  RAM, logged  LOG_DIRTY_PAGES",
        "  0x0fffc0000  0x100000000     256 KiB      1  0x7f3f43600000  ROM          READONLY",
        "  at most 9 slots alive at once, first at line 124",
    ] {
        assert!(out.lines().any(|line| line == row), "{row}\nis not in\n{out}");
    }
}

#[test]
fn at_stops_after_the_line() {
    let (status, out, _) =
        run(memslot().args(["replay", "--at", "21", "--json"]).arg(trace("qemu-ovmf.strace")));
    let report: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((status, &report["at"], &report["lines"]), (0, &21.into(), &21.into()));
    let slots: Vec<_> =
        report["vms"][0]["slots"].as_array().expect("slots").iter().map(|s| &s["gpa"]).collect();
    assert_eq!(slots, ["0x0", "0xffe00000", "0xffe20000"]);
    let (status, _, error) = run(memslot().args(["replay", "--at", "900"]).arg(trace("qemu-ovmf.strace")));
    assert_eq!(status, 2);
    assert!(error.contains("qemu-ovmf.strace: has 35 lines; --at 900 is beyond its end"), "{error}");
}

#[test]
fn standard_input_and_formats_by_content() {
    for name in ["qemu-boot.jsonl", "firecracker.strace"] {
        let bytes = std::fs::read(trace(name)).expect("a trace");
        let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(bytes.clone()));
        assert_eq!(status, 0);
        assert!(out.starts_with("<stdin>: "), "{out}");
        let folder = tempfile::tempdir().expect("a folder");
        let unnamed = folder.path().join("recording");
        std::fs::write(&unnamed, bytes).expect("written");
        assert_eq!(report(&unnamed)["vms"], report(&trace(name))["vms"]);
    }
}

#[test]
fn a_refusal_the_kernel_did_not_give_is_a_disagreement() {
    let text = set(0, 0, 0, MIB, HVA, 0) + &set(1, 0, MIB / 2, MIB, HVA + MIB, 0);
    let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(text));
    assert_eq!(status, 1);
    assert!(out.contains("disagreement <stdin>:2: KVM_SET_USER_MEMORY_REGION {slot=1, "), "{out}");
    assert!(
        out.contains("recorded 0, came EEXIST: ") && out.contains("overlap slot 0 [0x0, +1 MiB)"),
        "{out}"
    );
    assert!(out.contains("1 of 2 answers differ"), "{out}");
}

#[test]
fn a_change_the_kernel_refused_is_a_disagreement_and_is_taken_back() {
    let first = set(0, 0, 0, MIB, HVA, 0);
    for (refused, word) in [
        (set(1, 0, MIB, MIB, HVA + MIB, 22), "create slot 1 [0x100000, +1 MiB)"),
        (set(0, 0, 0, 0, 0, 22), "delete slot 0 [0x0, +1 MiB)"),
        (set(0, 0, 4 * MIB, MIB, HVA, 17), "move slot 0 [0x0, +1 MiB) to 0x400000"),
        (set(0, 1, 0, MIB, HVA, 22), "change the flags of slot 0 [0x0, +1 MiB) from - to LOG_DIRTY_PAGES"),
    ] {
        let text = format!("{first}{refused}{}", set(2, 0, 2 * MIB, MIB, HVA + 2 * MIB, 0));
        let (status, out, _) = run(memslot().args(["replay", "--json", "-"]).write_stdin(text));
        let report: Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(status, 1);
        assert_eq!((&report["compared"], &report["agreed"]), (&3.into(), &2.into()));
        let found = &report["disagreements"][0];
        assert_eq!((&found["line"], &found["came"]), (&2.into(), &"0".into()));
        assert!(found["why"].as_str().is_some_and(|why| why.contains(word)), "{found}");
        let slots = report["vms"][0]["slots"].as_array().expect("slots");
        let map: Vec<_> = slots.iter().map(|slot| (&slot["slot"], &slot["gpa"], &slot["flags"])).collect();
        assert_eq!(
            map,
            [(&0.into(), &"0x0".into(), &"-".into()), (&2.into(), &"0x200000".into(), &"-".into())]
        );
    }
}

#[test]
fn the_same_refusal_agrees_and_another_does_not() {
    let overlap = |errno| set(0, 0, 0, MIB, HVA, 0) + &set(1, 0, 0, MIB, HVA + MIB, errno);
    let (status, ..) = run(memslot().args(["replay", "-"]).write_stdin(overlap(17)));
    assert_eq!(status, 0);
    let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(overlap(22)));
    assert_eq!(status, 1);
    assert!(out.contains("recorded EINVAL, came EEXIST"), "{out}");
}

#[test]
fn what_the_engine_cannot_know_is_not_judged() {
    let text = set(0, 0, 0, MIB, HVA, 12)
        + &set(1, 0, 0, MIB, HVA, 4)
        + "{\"op\":\"req_49\",\"fd\":5,\"ret\":-1,\"errno\":14}\n"
        + &set(2, 0, 0, MIB, HVA, 0);
    let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(text));
    assert_eq!(status, 0, "{out}");
    assert!(out.contains("3 answers cannot be judged"), "{out}");
    assert!(out.contains("= ENOMEM: it depends on the host's free memory"), "{out}");
    assert!(out.contains("agrees with KVM: 1 of 1 answers"), "{out}");
}

#[test]
fn several_vms_are_kept_apart() {
    let vm = |fd| format!("{{\"op\":\"create_vm\",\"fd\":3,\"ret\":{fd},\"errno\":0}}\n");
    let same = set(0, 0, 0, MIB, HVA, 0);
    let text = vm(5) + &same + &vm(6) + &same.replace("\"fd\":5", "\"fd\":6") + &vm(5) + &same;
    let (status, out, _) = run(memslot().args(["replay", "--json", "-"]).write_stdin(text));
    let report: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(status, 0, "{out}");
    let vms = report["vms"].as_array().expect("vms");
    let seen: Vec<_> =
        vms.iter().map(|vm| (&vm["fd"], &vm["opened_at_line"], &vm["changes"]["create"])).collect();
    let one = &1.into();
    assert_eq!(seen, [(&5.into(), one, one), (&6.into(), &3.into(), one), (&5.into(), &5.into(), one)]);
}

#[test]
fn the_recorded_kernels_limits_are_the_ones_replayed_with() {
    let ask =
        |cap, ret| format!("{{\"op\":\"check_ext\",\"fd\":3,\"cap\":{cap},\"ret\":{ret},\"errno\":0}}\n");
    let smm = 0x1_0000;
    for (asked, call) in [
        (ask(10, 32), set(32, 0, 0, MIB, HVA, 22)),
        (ask(118, 0), set(smm, 0, 0, MIB, HVA, 22)),
        (ask(81, 0), set(0, 2, 0, MIB, HVA, 22)),
    ] {
        let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(asked + &call));
        assert_eq!(status, 0, "{out}");
        let accepted = call.replace("-1,\"errno\":22", "0,\"errno\":0");
        let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(accepted));
        assert_eq!(status, 0, "{out}");
    }
}

#[test]
fn warnings_say_what_is_odd_and_only_once() {
    let mut text = set(0, 0, 0, 4 * MIB, HVA, 0);
    text += &set(1, 0, 4 * MIB, 4 * MIB, HVA + 4 * MIB, 0);
    text += &set(2, 0, 16 * MIB, 4 * MIB, HVA + 0x4000_1000, 0);
    for _ in 0..3 {
        text += &set(3, 2, 0xfff0_0000, MIB, HVA, 0);
        text += &set(3, 0, 0xfff0_0000, 0, HVA, 0);
    }
    let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(text));
    assert_eq!(status, 0, "{out}");
    for line in [
        "  4 warnings",
        "  - huge pages impossible: slot 2 [0x1000000, +4 MiB) at hva 0x7f0040001000: gpa and hva differ by 0x1000 \
         modulo 2 MiB (line 3)",
        "  - alias: slots 0 and 3 share 1 MiB of host memory at 0x7f0000000000: gpa 0x0 is also gpa 0xfff00000 \
         (line 4, 3 times, no longer there)",
        "  - mergeable: slots 0, 1 are neighbours in gpa and hva with the same flags: one slot [0x0, +8 MiB) would do",
        "  - churn: [0xfff00000, +1 MiB) deleted and created again 2 times (lines 4 to 8)",
    ] {
        assert!(out.lines().any(|there| there == line), "{line}\nis not in\n{out}");
    }
}

#[test]
fn several_files_make_one_json_array() {
    let files = ["kvmtool-256.jsonl", "firecracker.strace"].map(trace);
    let (status, out, _) = run(memslot().args(["replay", "--json"]).args(&files));
    let report: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((status, report.as_array().map(Vec::len)), (0, Some(2)));
    assert_eq!((&report[0]["format"], &report[1]["format"]), (&"jsonl".into(), &"strace".into()));
}

#[test]
fn a_refusal_may_be_the_lack_of_a_feature_nobody_asked_about() {
    let ask = |cap| format!("{{\"op\":\"check_ext\",\"fd\":3,\"cap\":{cap},\"ret\":2,\"errno\":0}}\n");
    for (cap, call) in [(118, set(0x1_0000, 0, 0, MIB, HVA, 22)), (81, set(0, 2, 0, MIB, HVA, 22))] {
        let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(call.clone()));
        assert_eq!(status, 0, "{out}");
        assert!(out.contains("1 answer cannot be judged") && out.contains("the trace does not say"), "{out}");
        let (status, ..) = run(memslot().args(["replay", "-"]).write_stdin(ask(cap) + &call));
        assert_eq!(status, 1);
    }
}

#[test]
fn guest_memfd_slots() {
    let set2 = |slot: u32, gpa: u64, size: u64, offset: u64, errno: u32| {
        let line = set(slot, 4, gpa, size, HVA + gpa, errno).replace("\"set\"", "\"set2\"");
        line.replace("\"slot\"", &format!("\"guest_memfd\":7,\"guest_memfd_offset\":{offset},\"slot\""))
    };
    let text = set2(0, 0, MIB, 0, 0) + &set2(1, MIB, MIB, MIB, 0) + &set2(2, 2 * MIB, MIB, 0, 22);
    let gone = text.clone() + &set(0, 0, 0, 0, 0, 0) + &set2(2, 2 * MIB, MIB, 0, 0);
    for (text, slots) in [(text, [0, 1]), (gone, [1, 2])] {
        let (status, out, _) = run(memslot().args(["replay", "--json", "-"]).write_stdin(text));
        let report: Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(status, 0, "{out}");
        let map = report["vms"][0]["slots"].as_array().expect("slots");
        assert_eq!(map.iter().map(|slot| &slot["slot"]).collect::<Vec<_>>(), slots);
        assert!(map.iter().all(|slot| slot["kind"] == "guest_memfd" && slot["guest_memfd"]["file"] == 7));
    }
}

/// Two processes, each with a VM under the same descriptor, as `record` writes them.
#[test]
fn vms_of_several_processes_are_kept_apart() {
    let line = |pid: u32, vm: u32, rest: &str| format!("{{\"pid\":{pid},\"vm\":{vm},\"fd\":5,{rest}}}\n");
    let region = "\"flags\":0,\"gpa\":0,\"size\":4096,\"hva\":4096";
    let created = "\"op\":\"create_vm\",\"nr_memslots\":8,\"ret\":5,\"errno\":0";
    let text = [
        line(70, 1, created),
        line(71, 2, created),
        line(70, 1, &format!("\"op\":\"set\",\"slot\":1,{region},\"ret\":0")),
        line(71, 2, &format!("\"op\":\"set\",\"slot\":2,{region},\"ret\":0")),
        // The kernel has eight slots, as it said when the VM was created.
        line(71, 2, &format!("\"op\":\"set\",\"slot\":8,{region},\"ret\":-1,\"errno\":22")),
        // A child may not use its parent's VM.
        line(71, 1, &format!("\"op\":\"set\",\"slot\":1,{region},\"ret\":-1,\"errno\":5")),
    ]
    .concat();
    let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(text.clone()));
    assert_eq!(status, 0, "{out}");
    for words in ["VM fd 5 of process 70", "VM fd 5 of process 71", "3 of 3 answers, 0 disagreements"] {
        assert!(out.contains(words), "{words} is not in\n{out}");
    }
    let (_, json, _) = run(memslot().args(["replay", "--json", "-"]).write_stdin(text));
    let report: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((&report["vms"][0]["pid"], &report["vms"][1]["pid"]), (&70.into(), &71.into()));
}

/// A bitmap that is not in the trace may have cleared anything: what was dirty before is not expected afterwards.
#[test]
fn after_a_bitmap_that_was_not_recorded_nothing_is_expected() {
    let logged =
        "{\"op\":\"set\",\"fd\":5,\"slot\":0,\"flags\":1,\"gpa\":0,\"size\":286720,\"hva\":4096,\"ret\":0}\n";
    let manual = "{\"op\":\"enable_cap\",\"fd\":5,\"cap\":168,\"arg0\":3,\"ret\":0}\n";
    let get = |rest: &str| format!("{{\"op\":\"get_dirty\",\"fd\":5,\"slot\":0,{rest}\"ret\":0}}\n");
    let clear = "{\"op\":\"clear_dirty\",\"fd\":5,\"slot\":0,\"first\":0,\"num\":70,\"ret\":0}\n";
    let (none, one) = (get("\"npages\":70,\"runs\":[],"), get("\"npages\":70,\"runs\":[[7,1]],"));
    let whole = get("\"npages\":70,\"runs\":[[0,70]],");
    for (text, expected) in [
        (format!("{logged}{one}{none}"), 0),
        (format!("{logged}{}{none}", get("")), 0),
        // Under manual protection a GET clears nothing, seen or not.
        (format!("{manual}{logged}{whole}{}{none}", get("")), 1),
        (format!("{manual}{logged}{whole}{clear}{none}"), 0),
        (format!("{manual}{logged}{}{one}", get("")), 1),
    ] {
        let (status, out, _) = run(memslot().args(["replay", "-"]).write_stdin(text.clone()));
        assert_eq!(status, expected, "{text}{out}");
    }
}
