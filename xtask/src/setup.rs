//! `cargo xtask setup`: what the tests need from the system.

use anyhow::Result;

use crate::run::say;
use crate::tools;

/// Install what the tests need from the system, which is nothing so far, and list the optional tools.
///
/// The ordinary tests need cargo and nothing else. The list shows what widens them; installing that is left to you.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args) -> Result<bool> {
    say("Nothing to install: the tests need cargo and the crates it fetches.\n\nOptional:");
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
    Ok(true)
}
