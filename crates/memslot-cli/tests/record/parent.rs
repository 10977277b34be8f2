//! Between the user and the VMM: status, signals, output, and what is said where a recording ends early.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Built, built, has_kvm, lines, record, replay, run, skipped};

#[test]
fn the_status_is_the_commands() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("none.jsonl");
    for (script, expected) in [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -TERM $$", 143)] {
        let (status, out, error) = run(record(&trace).args(["sh", "-c", script]));
        assert_eq!((status, out.as_str()), (expected, ""), "{script}: {error}");
        assert!(error.contains("nothing was recorded") && error.contains("strace -f"), "{error}");
        assert!(!trace.exists(), "an empty trace is no trace");
    }
}

#[test]
fn standard_input_and_output_are_the_commands() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut child = record(&folder.path().join("none.jsonl"))
        .args(["sh", "-c", "read line; echo \"got $line\"; echo more >&2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), b"this\n").expect("written");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.stdout, b"got this\n");
    assert!(output.stderr.starts_with(b"more\n"));
}

/// `kill` reaches the VMM, record finishes, and what came before is there.
#[test]
fn a_signal_reaches_the_vmm_and_the_trace_is_kept() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("killed.jsonl");
    let Built { little_vmm, .. } = built();
    for (signal, expected) in [("TERM", 143), ("INT", 130), ("USR1", 138)] {
        _ = std::fs::remove_file(&trace);
        let mut child = record(&trace)
            .arg(little_vmm)
            .args(["slots", "wait"])
            // Not in a terminal's foreground, where Ctrl-C would have reached the VMM by itself.
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it runs");
        let began = Instant::now();
        while !std::fs::read_to_string(&trace).is_ok_and(|text| text.lines().count() >= 13) {
            assert!(began.elapsed() < Duration::from_secs(20), "no trace");
            std::thread::sleep(Duration::from_millis(20));
        }
        let kill = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status();
        assert!(kill.expect("kill runs").success());
        assert_eq!(child.wait().expect("it ends").code(), Some(expected), "{signal}");
        let mut said = String::new();
        for line in BufReader::new(child.stderr.take().expect("a pipe")).lines() {
            said += &line.expect("UTF-8");
        }
        assert!(said.contains("replay it with: memslot replay"), "{said}");
        replay(&trace);
    }
}

/// A VMM that makes itself a daemon is recorded to its end, and the status is that of the command.
#[test]
fn what_the_command_leaves_behind_is_waited_for() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("daemon.jsonl");
    let Built { little_vmm, .. } = built();
    let script = "(sleep 0.5; setsid \"$0\" slots >/dev/null) & exit 5";
    let (status, _, error) = run(record(&trace).args(["sh", "-c", script]).arg(little_vmm));
    assert_eq!(status, 5, "{error}");
    assert!(error.contains("left processes running"), "{error}");
    assert_eq!(lines(&trace).iter().filter(|line| line["op"] == "set").count(), 12);
}

/// A recording that runs into a limit ends with whole lines and says so; the VMM goes on.
fn stops_early(trace: &Path, command: &mut Command, why: &str) {
    let (status, out, error) = run(command);
    assert_eq!(status, 0, "the VMM was disturbed: {error}");
    assert_eq!(out.lines().count(), 401, "the VMM's own account is whole");
    assert!(error.contains("the recording stopped before its end") && error.contains(why), "{error}");
    let recorded = lines(trace).len();
    assert!((1..400).contains(&recorded), "{recorded}");
    assert!(error.contains(&format!("after {recorded} lines")), "{error}");
    replay(trace);
}

#[test]
fn a_limit_on_the_size_of_files() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("limited.jsonl");
    let Built { little_vmm, .. } = built();
    let script = "ulimit -f 16; exec \"$0\" many";
    stops_early(&trace, record(&trace).args(["sh", "-c", script]).arg(little_vmm), "ulimit -f");
}

#[test]
fn a_full_disk() {
    if !has_kvm() {
        return;
    }
    let may_mount = Command::new("unshare").args(["--mount", "true"]).output();
    if !may_mount.is_ok_and(|output| output.status.success()) {
        return skipped("no right to mount a small disk");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (disk, kept) = (folder.path().join("disk"), folder.path().join("kept.jsonl"));
    std::fs::create_dir(&disk).expect("a folder");
    let Built { little_vmm, .. } = built();
    let recording = record(&disk.join("full.jsonl"));
    let script = "mount -t tmpfs -o size=16k none \"$1\" && shift && \"$@\"; status=$?; cp disk/full.jsonl kept.jsonl; exit $status";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(&disk).current_dir(folder.path());
    command.arg(recording.get_program()).args(recording.get_args()).arg(little_vmm).arg("many");
    command.env_remove("LD_PRELOAD").env_remove("MEMSLOT_PRELOAD");
    stops_early(&kept, &mut command, "No space left on device");
}
