//! What is refused before anything is started, with which status, and what to do instead.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{built, has_kvm, memslot, record, replay, run, skipped};

fn executable(path: &Path, content: &[u8]) -> PathBuf {
    std::fs::write(path, content).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    path.to_owned()
}

/// The smallest program that Linux starts, for this machine (as the library has it) or another: a header and one
/// segment, and no interpreter.
fn static_elf(machine: Option<u16>) -> Vec<u8> {
    let library = std::fs::read(&built().library).expect("the library");
    let mut elf = library[..64].to_vec();
    elf[16..18].copy_from_slice(&2_u16.to_ne_bytes());
    if let Some(machine) = machine {
        elf[18..20].copy_from_slice(&machine.to_ne_bytes());
    }
    elf[32..40].copy_from_slice(&64_u64.to_ne_bytes());
    elf[40..48].fill(0);
    for (at, value) in [(52, 64_u16), (54, 56), (56, 1), (58, 64), (60, 0), (62, 0)] {
        elf[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }
    let mut segment = [0_u8; 56];
    segment[..4].copy_from_slice(&1_u32.to_ne_bytes());
    elf.extend(segment);
    elf
}

/// Tries to record it. Nothing may be left behind.
fn refused(program: &Path) -> (i32, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("vmm.jsonl");
    let (status, out, error) = run(record(&trace).arg(program).args(["--kernel", "my kernel"]));
    assert!(out.is_empty() && !trace.exists(), "{out}");
    (status, error)
}

#[test]
fn static_programs_are_shown_the_way_to_strace() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = executable(&folder.path().join("vmm"), &static_elf(None));
    let script = executable(&folder.path().join("start.sh"), format!("#!{}\n", program.display()).as_bytes());
    for command in [&program, &script] {
        let (status, error) = refused(command);
        assert_eq!(status, 126, "{error}");
        assert!(error.contains("is a static program, which loads no libraries"), "{error}");
        let strace = format!("vmm.strace {} --kernel 'my kernel'\n", command.display());
        assert!(error.contains("  strace -f -v -ttt -T -e trace=ioctl -o /"), "{error}");
        assert!(error.contains(&strace) && error.contains("  memslot replay /"), "{error}");
    }
}

/// The command line that a refusal shows, run as it stands but for the program: what strace writes replays.
#[test]
fn the_way_that_is_shown_works() {
    if !has_kvm() {
        return;
    }
    if !Command::new("strace")
        .args(["-o", "/dev/null", "true"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return skipped("no strace that works (cargo xtask setup installs it)");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let program = executable(&folder.path().join("vmm"), &static_elf(None));
    let trace = folder.path().join("little.jsonl");
    let (status, _, error) = run(record(&trace).arg(&program).arg("slots"));
    assert_eq!(status, 126);
    let strace = error.lines().find(|line| line.starts_with("  strace")).expect("the way");
    std::fs::copy(&built().little_vmm, &program).expect("a copy");
    let output = Command::new("sh").args(["-c", strace]).output().expect("sh runs");
    assert!(output.status.success(), "{strace}: {}", String::from_utf8_lossy(&output.stderr));
    let report = replay(&trace.with_extension("strace"));
    assert_eq!(report["compared"], 12);
}

#[test]
fn programs_that_the_loader_would_not_load_it_into() {
    let folder = tempfile::tempdir().expect("a folder");
    let other = executable(&folder.path().join("other"), &static_elf(Some(20)));
    let (status, error) = refused(&other);
    assert!(status == 126 && error.contains("for another machine"), "{error}");

    let privileged = folder.path().join("privileged");
    std::fs::copy(&built().little_vmm, &privileged).expect("a copy");
    // As root: another user's; otherwise there is none that could be made.
    if std::os::unix::fs::chown(&privileged, Some(12345), None).is_err() {
        return skipped("only root can make a program that runs as another user");
    }
    std::fs::set_permissions(&privileged, std::fs::Permissions::from_mode(0o4755)).expect("chmod");
    let (status, error) = refused(&privileged);
    assert!(status == 126 && error.contains("set-user-ID"), "{error}");
    std::fs::set_permissions(&privileged, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    assert!(!refused(&privileged).1.contains("set-user-ID"));
}

#[test]
fn commands_that_cannot_be_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let plain = folder.path().join("plain");
    std::fs::write(&plain, "x").expect("written");
    let text = executable(&folder.path().join("text"), b"Dear Sir,\n");
    let lost = executable(&folder.path().join("lost.sh"), b"#!/nowhere/sh\n");
    for (command, expected, words) in [
        (Path::new("no-such-command"), 127, "no-such-command: no such command"),
        (Path::new("./no-such-command"), 127, "./no-such-command: no such file"),
        (&plain, 126, "is not executable"),
        (&text, 126, "is neither an ELF program nor a script"),
        (&lost, 126, "/nowhere/sh: is missing"),
        (Path::new("/"), 126, "is no program"),
    ] {
        let (status, error) = refused(command);
        assert_eq!(status, expected, "{}: {error}", command.display());
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn outputs_that_cannot_be_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("there.jsonl");
    std::fs::write(&trace, "precious").expect("written");
    let (status, _, error) = run(record(&trace).arg("true"));
    assert!(status == 125 && error.contains("exists already; --force overwrites it"), "{error}");
    assert_eq!(std::fs::read_to_string(&trace).expect("still there"), "precious");
    for (output, words) in [("/nowhere/t.jsonl", "no such folder"), ("/", "/: ")] {
        let (status, _, error) = run(record(Path::new(output)).arg("true"));
        assert!(status == 125 && error.contains(words), "{error}");
    }
    let force = |output: &Path| {
        let library = &built().library;
        run(memslot().args(["record", "--force", "--library"]).arg(library).arg("-o").arg(output).arg("true"))
    };
    let (status, _, error) = force(Path::new("/dev/null"));
    assert!(status == 125 && error.contains("is no ordinary file"), "{error}");
    assert_eq!(force(&trace).0, 0);
}

#[test]
fn libraries_that_are_none() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = folder.path().join("library.so");
    std::fs::write(&text, "no library").expect("written");
    for (library, words) in [(text.as_path(), "is no library"), (Path::new("/nowhere.so"), "no such library")]
    {
        let output = folder.path().join("t.jsonl");
        let (status, _, error) =
            run(memslot().args(["record", "--library"]).arg(library).arg("-o").arg(output).arg("true"));
        assert!(status == 125 && error.contains(words), "{error}");
    }
}

#[test]
fn help_teaches() {
    let (status, out, _) = run(memslot().args(["record", "--help"]));
    assert_eq!(status, 0);
    for words in ["memslot record --output boot.jsonl -- qemu", "Exit status:", "127", "strace", "--force"] {
        assert!(out.contains(words), "{words} is not in\n{out}");
    }
    let (status, _, error) = run(memslot().args(["record", "true"]));
    assert!(status == 2 && error.contains("--output"), "{error}");
}
