//! `cargo xtask ci`: what must hold before a change is merged.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::run::Report;
use crate::step::{Step, workspace_root};
use crate::{bench, tools};

/// Run everything that CI runs: format, clippy, documentation, tests, the replay of every trace, a bench smoke run.
///
/// `.ci/run` calls this command and nothing else, so what CI says can be had at home. The tests are the README's
/// command, `cargo xtask test`; the replays are the README's command on each file of data/traces, and fail if the
/// engine disagrees with what the kernel answered when the trace was recorded.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args) -> Result<bool> {
    let traces = traces()?;
    let mut report = Report::new()?;
    report.run(&Step::cargo("format", ["fmt", "--all", "--check"]));
    report.run(&Step::cargo(
        "clippy",
        ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"],
    ));
    let bare_metal =
        ["--features", "bare-metal", "--profile", "bare-metal", "--bins", "--", "-D", "warnings"];
    let clippy = ["clippy", "--quiet", "-p", "memslot-hypervisor"].iter().chain(&bare_metal).copied();
    report.run(&Step::cargo("clippy bare metal", clippy));
    report.run(
        &Step::cargo("documentation", ["doc", "--quiet", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    );
    report.run(&Step::cargo("tests", ["xtask", "test"]).xtask());
    report.run(&Step::cargo("release build", ["build", "--quiet", "--release"]));
    for trace in &traces {
        let name = trace.file_name().unwrap_or_default().to_string_lossy();
        report.run(
            &Step::cargo(&format!("replay {name}"), ["run", "--quiet", "--release", "--", "replay"])
                .arg(trace.display().to_string())
                .quiet(),
        );
    }
    let dirty = ["run", "--quiet", "--release", "--", "dirty", "data/traces/qemu-migrate.jsonl"];
    report.run(&Step::cargo("dirty report", dirty).quiet());
    for family in bench::FAMILIES {
        report.run(&Step::cargo(&format!("bench {family}"), ["xtask", "bench", family, "--smoke"]).xtask());
    }
    if tools::has_program("mdbook") {
        report.run(&Step::program("guide", "mdbook", ["build", "docs"]));
    } else {
        report.skip("guide", "mdbook is not installed; the guide's examples are among the tests");
    }
    Ok(report.finish())
}

/// Every file of `data/traces`, by name, as a path from the workspace's root.
fn traces() -> Result<Vec<PathBuf>> {
    let folder = PathBuf::from("data/traces");
    let mut traces = Vec::new();
    for entry in fs::read_dir(workspace_root().join(&folder)).context("cannot read data/traces")? {
        traces.push(folder.join(entry.context("cannot read data/traces")?.file_name()));
    }
    ensure!(!traces.is_empty(), "data/traces holds no trace");
    traces.sort();
    Ok(traces)
}
