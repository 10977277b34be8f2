//! What the tests of the program share.

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use serde_json::Value;

/// The repository's recorded traces.
pub(crate) fn traces() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/traces")
}

/// One of them.
pub(crate) fn trace(name: &str) -> PathBuf {
    traces().join(name)
}

/// The program, with nothing in its environment that changes how it draws.
pub(crate) fn memslot() -> Command {
    let mut command = Command::cargo_bin("memslot").expect("the program is built");
    command.env_remove("COLUMNS").env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
    command
}

/// Runs it; exit status, standard output, standard error.
pub(crate) fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("not killed"), text(stdout), text(stderr))
}

/// `memslot replay --json` of a file.
pub(crate) fn report(path: &Path) -> Value {
    let (_, out, error) = run(memslot().args(["replay", "--json"]).arg(path));
    serde_json::from_str(&out).unwrap_or_else(|_| panic!("{}: no JSON: {out}{error}", path.display()))
}

/// A JSON line that sets a region of VM 5.
pub(crate) fn set(slot: u32, flags: u32, gpa: u64, size: u64, hva: u64, errno: u32) -> String {
    let ret = if errno == 0 { 0 } else { -1 };
    format!(
        "{{\"op\":\"set\",\"fd\":5,\"slot\":{slot},\"flags\":{flags},\"gpa\":\"{gpa:#x}\",\"size\":\"{size:#x}\",\
         \"hva\":\"{hva:#x}\",\"ret\":{ret},\"errno\":{errno}}}\n"
    )
}
