//! `cargo xtask setup`: what the tests use from the system.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::run::say;
use crate::{linux, tools};

/// Debian's packages that tests use, with the program by which each is recognised and what it is for.
const PACKAGES: &[(&str, &str, &str)] = &[
    ("qemu-system-x86", "qemu-system-x86_64", "a real VMM to record, and the machine that `linux` runs in"),
    ("strace", "strace", "the other way to record, in the same tests"),
];

/// Install the Debian packages that some tests use, download a kernel for `linux`, and list the optional tools.
///
/// The ordinary tests need cargo and nothing else: those that use a package or a tool say `skipped` without it. Packages are
/// installed where apt-get is there and may be used (as root); elsewhere their names are shown. The tools in the list
/// widen the tests as well; installing them is left to you.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only show what is missing
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let installed = packages(args) & kernel(args);
    say("\nOptional:");
    let optional = [
        (tools::has_kvm(), "/dev/kvm", "tests and benchmarks against the real kernel"),
        (
            tools::has_nextest(),
            "cargo-nextest",
            "runs the tests in parallel (cargo install --locked cargo-nextest)",
        ),
        (tools::has_nightly(), "nightly", "sanitizers in `deep` (rustup toolchain install nightly)"),
        (
            tools::has_miri(),
            "miri",
            "undefined behaviour in `deep` (rustup +nightly component add miri rust-src)",
        ),
        (
            tools::has_fuzz(),
            "cargo-fuzz",
            "inputs nobody would write, in `deep` (cargo install cargo-fuzz; a nightly toolchain)",
        ),
        (tools::has_program("mdbook"), "mdbook", "the guide as a book (cargo install --locked mdbook)"),
        (
            tools::has_program("mmdebstrap"),
            "mmdebstrap",
            "the oldest compiler and arm64, in `deep` (apt-get install mmdebstrap)",
        ),
        (
            tools::has_mutants(),
            "cargo-mutants",
            "holes in the tests, in `deep` (cargo install --locked cargo-mutants)",
        ),
    ];
    for (present, name, purpose) in optional {
        let state = if present { "present" } else { "missing" };
        say(&format!("  {state}  {name:<14} {purpose}"));
    }
    Ok(installed)
}

/// Installs what is missing without being asked; false if that was tried and failed.
pub(crate) fn install() -> bool {
    packages(&Args { dry_run: false })
}

/// Downloads the kernel that `cargo xtask linux` boots, as a package, which is unpacked below the target directory.
fn kernel(args: &Args) -> bool {
    let found = linux::kernel::find();
    let state = if found.is_some() { "present" } else { "missing" };
    say(&format!("  {state}  a kernel package  what `cargo xtask linux` boots; unpacked, not installed"));
    if found.is_some() || args.dry_run || !tools::has_program("apt-get") {
        return true;
    }
    linux::kernel::download().inspect_err(|error| say(&format!("not downloaded: {error:#}"))).is_ok()
}

/// Installs the packages that are missing, or says which they are. False if it was tried and failed.
fn packages(args: &Args) -> bool {
    say("Debian packages:");
    let mut missing = Vec::new();
    for (package, program, purpose) in PACKAGES {
        let present = tools::has_program(program);
        let state = if present { "present" } else { "missing" };
        say(&format!("  {state}  {package:<16} {purpose}"));
        if !present {
            missing.push(*package);
        }
    }
    if missing.is_empty() {
        return true;
    }
    let install = format!("apt-get install --yes --no-install-recommends {}", missing.join(" "));
    if args.dry_run || !tools::is_root() || !tools::has_program("apt-get") {
        say(&format!("\nNot installed; on Debian: sudo {install}"));
        return true;
    }
    // The package lists may be old, or not there at all; whether the installation succeeds is what counts.
    _ = apt_get(&["update", "--quiet"]);
    let arguments: Vec<&str> = install.split(' ').skip(1).collect();
    let done = apt_get(&arguments);
    say(if done { "\nInstalled." } else { "\nNot installed: apt-get failed, see above." });
    done
}

fn apt_get(arguments: &[&str]) -> bool {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
