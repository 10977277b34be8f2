//! Bad input gets one clear message with file and line, and status 2; a reader that goes away is no error.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{memslot, run, set, trace};

/// Replays a file with this content, expecting one line of complaint.
fn complaint(content: impl AsRef<[u8]>) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vmm.trace");
    std::fs::write(&path, content).expect("written");
    refused(&path)
}

fn refused(path: &Path) -> String {
    for command in ["replay", "map"] {
        let (status, out, error) = run(memslot().arg(command).arg(path));
        assert_eq!((status, out.as_str(), error.lines().count()), (2, "", 1), "{error}");
        assert!(error.starts_with(&format!("error: {}: ", path.display())), "{error}");
    }
    run(memslot().args(["replay", "--json"]).arg(path)).2
}

#[test]
fn lines_that_cannot_be_read() {
    let good = set(0, 0, 0, 4096, 0x7000_0000, 0);
    for (line, words) in [
        (&good[..good.len() / 2], "line 2: the JSON object is cut short"),
        ("{\"op\":\"launch\",\"fd\":5,\"ret\":0}\n", "line 2: unknown op \"launch\""),
        (
            &good.replace("\"slot\":0", "\"slot\":4294967296"),
            "line 2: number out of range: `slot` is 4294967296",
        ),
        (&good.replace("\"0x1000\"", "1e99"), "line 2: number out of range"),
        ("Segmentation fault\n", "line 2: not a JSON object"),
    ] {
        let message = complaint(format!("{good}{line}"));
        assert!(message.contains(words), "{message}");
    }
    let strace = std::fs::read(trace("qemu-ovmf.strace")).expect("a trace");
    let message = complaint(&strace[..2010]);
    assert!(
        message.contains("line 20: the ioctl is cut short: `ioctl(12, KVM_SET_USER_MEMORY_REGION"),
        "{message}"
    );
    let message = complaint(&strace[..2500]);
    assert!(message.contains("line 24: the last line of the file is cut short"), "{message}");
}

#[test]
fn files_that_are_no_traces() {
    assert!(complaint("").contains("is empty"));
    assert!(complaint("\n\n").contains("is empty"));
    assert!(complaint([0x7f, b'E', b'L', b'F', 2, 1, 0, 0]).contains("is a binary file (an ELF executable)"));
    assert!(complaint([0x1f, 0x8b, 8, 0]).contains("unpack it first"));
    assert!(
        complaint("Dear Sir or Madam,\n")
            .contains("line 1: neither a JSON object nor a line that strace prints")
    );
}

#[test]
fn files_that_cannot_be_opened() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(refused(folder.path()).contains("is a directory, not a trace"));
    assert!(refused(&folder.path().join("absent")).contains("no such file"));
}

#[cfg(unix)]
#[test]
fn a_file_without_permission() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("secret");
    std::fs::write(&path, set(0, 0, 0, 4096, 0, 0)).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).expect("chmod");
    if std::fs::File::open(&path).is_ok() {
        eprintln!("skipped: this user may read everything");
        return;
    }
    assert!(refused(&path).contains("no permission to read it"));
}

#[test]
fn one_bad_file_does_not_hide_the_good_ones() {
    let (status, out, error) = run(memslot().args(["replay", "absent"]).arg(trace("kvmtool-256.jsonl")));
    assert_eq!((status, error.as_str()), (2, "error: absent: no such file\n"));
    assert!(out.contains("agrees with KVM: 1 of 1 answers"), "{out}");
}

#[test]
fn unknown_but_harmless_ioctls_are_counted() {
    let text = "1 ioctl(11, KVM_CREATE_VM, 0) = 12\n\
                1 ioctl(12, _IOC(_IOC_WRITE, 0xae, 0xfe, 0x10), 0x7ffc0) = 0\n\
                1 ioctl(12, KVM_SOMETHING_NEW, 0x7ffc0) = 0\n\
                1 ioctl(1, TCGETS, {}) = 0\n\
                1 +++ exited with 0 +++\n";
    let (status, out, error) = run(memslot().args(["replay", "-"]).write_stdin(text));
    assert_eq!((status, error.as_str()), (0, ""));
    for words in [
        "KVM request 0xfe",
        "KVM_SOMETHING_NEW",
        "1 \u{d7} other system call",
        "1 \u{d7} signal or exit line",
    ] {
        assert!(out.contains(words), "{words} is not in\n{out}");
    }
}

#[test]
fn wrong_command_lines() {
    for args in
        [&["replay"][..], &["frob"], &["replay", "--at", "0", "x"], &["replay", "--at", "5", "x", "y"], &[]]
    {
        let (status, out, error) = run(memslot().args(args));
        assert_eq!((status, out.as_str()), (2, ""), "{args:?}");
        assert!(error.contains("Usage: ") || error.contains("try '--help'"), "{error}");
    }
}

#[test]
fn help_teaches_and_the_version_is_there() {
    let (status, out, _) = run(memslot().arg("--help"));
    assert_eq!(status, 0);
    for words in ["Exit status:", "strace -f", "memslot map --at 120", "replay", "map"] {
        assert!(out.contains(words), "{words} is not in\n{out}");
    }
    let (status, out, _) = run(memslot().arg("--version"));
    assert_eq!((status, out.as_str()), (0, concat!("memslot ", env!("CARGO_PKG_VERSION"), "\n")));
}

/// `memslot … | head -1`, with more output than a pipe holds.
#[test]
fn a_closed_pipe_is_no_panic() {
    for arguments in [&["replay"][..], &["replay", "--json"], &["map"]] {
        let mut child = Command::new(assert_cmd::cargo::cargo_bin!("memslot"))
            .args(arguments)
            .args(std::iter::repeat_n(trace("qemu-hotplug256.jsonl"), 8))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it runs");
        let mut first = [0; 1];
        child.stdout.take().expect("a pipe").read_exact(&mut first).expect("one byte");
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert_eq!(output.status.code(), Some(0));
    }
}
