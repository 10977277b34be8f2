//! Which optional tools and devices this machine has. Nothing here is required.

use std::fs::OpenOptions;
use std::process::{Command, Stdio};

/// Whether `cargo` accepts these arguments; nothing is printed.
fn cargo_accepts(arguments: &[&str]) -> bool {
    Command::new("cargo")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

pub(crate) fn has_nextest() -> bool {
    cargo_accepts(&["nextest", "--version"])
}

pub(crate) fn has_nightly() -> bool {
    cargo_accepts(&["+nightly", "--version"])
}

pub(crate) fn has_miri() -> bool {
    cargo_accepts(&["+nightly", "miri", "--version"])
}

pub(crate) fn has_fuzz() -> bool {
    cargo_accepts(&["+nightly", "fuzz", "--version"])
}

pub(crate) fn has_mutants() -> bool {
    cargo_accepts(&["mutants", "--version"])
}

/// Whether a program is in one of the folders of `PATH`.
pub(crate) fn has_program(name: &str) -> bool {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).any(|folder| folder.join(name).is_file())
}

/// Whether this is root, who may install packages.
pub(crate) fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|id| id.stdout.trim_ascii() == b"0")
}

/// Whether `/dev/kvm` opens for reading and writing, which is what the oracle tests need.
pub(crate) fn has_kvm() -> bool {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}
