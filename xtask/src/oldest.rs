//! The oldest compiler that the libraries promise to build with, and another architecture.
//!
//! Debian 13 has that compiler, Rust 1.85, as a package, and its standard library for arm64 besides. The packages are
//! unpacked below the target directory (nothing is installed, and being root is not needed), and the compiler runs there with
//! its own dynamic loader and libraries, so that this system may be older or newer than Debian 13.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::run::Report;
use crate::step::{Step, target_directory};
use crate::tools;

/// Debian's release with the compiler that `rust-version` names.
const SUITE: &str = "trixie";
const MIRROR: &str = "http://deb.debian.org/debian";
/// What users build into theirs. Programs, tests and benches may need a newer compiler.
const LIBRARIES: [&str; 6] =
    ["memslot", "memslot-backing", "memslot-kvm", "memslot-mmu", "memslot-vm-memory", "memslot-preload"];
/// The half that runs without an operating system.
const NO_STD: [&str; 2] = ["memslot", "memslot-mmu"];

/// Checks the libraries with the oldest compiler, for x86-64 and arm64.
pub(crate) fn run(report: &mut Report) {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return report.skip("oldest", "the packages that are unpacked are for x86-64 Linux");
    }
    if !tools::has_program("mmdebstrap") {
        return report.skip("oldest", "mmdebstrap is not installed, which unpacks Debian's packages");
    }
    let root = target_directory().join("oldest");
    let packages = root.join("packages");
    let rustc = match compiler(&root) {
        Ok(rustc) => rustc.display().to_string(),
        Err(error) => {
            return report.skip("oldest", &format!("{} cannot be written: {error}", root.display()));
        }
    };
    if !packages.join("usr/bin/rustc").is_file() {
        _ = fs::remove_dir_all(&packages);
        let step = Step::program("unpack Rust 1.85", "mmdebstrap", ["--variant=extract", "--quiet"])
            .arg("--architectures=amd64,arm64")
            .arg("--include=rustc,libstd-rust-dev,libstd-rust-dev:arm64")
            .arg(SUITE)
            .arg(packages.display().to_string())
            .arg(MIRROR);
        report.run(&step);
        if !packages.join("usr/bin/rustc").is_file() {
            return;
        }
    }
    for target in ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"] {
        for (what, packages, flags) in
            [("std", &LIBRARIES[..], &[][..]), ("no_std", &NO_STD, &["--no-default-features"])]
        {
            let architecture = target.split('-').next().unwrap_or(target);
            let name = format!("oldest, {architecture}, {what}");
            let packages = packages.iter().flat_map(|package| ["-p", package]);
            let arguments = ["check", "--quiet", "--lib", "--target", target];
            let step = Step::cargo(&name, arguments.into_iter().chain(packages).chain(flags.iter().copied()))
                .env("RUSTC", rustc.clone())
                .own_target("oldest/build");
            report.run(&step);
        }
    }
}

/// A script that runs the unpacked compiler.
fn compiler(root: &std::path::Path) -> std::io::Result<PathBuf> {
    let script = root.join("rustc");
    fs::create_dir_all(root)?;
    let text = "#!/bin/sh\n\
        # Runs the compiler in `packages` with its own dynamic loader and libraries.\n\
        root=$(dirname \"$0\")/packages/usr\n\
        exec \"$root/lib64/ld-linux-x86-64.so.2\" --library-path \"$root/lib/x86_64-linux-gnu\" \
        \"$root/bin/rustc\" --sysroot \"$root\" \"$@\"\n";
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script)
}
