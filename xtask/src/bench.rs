//! `cargo xtask bench`: both sides measured in one process, shown as ratios.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::run::Report;
use crate::step::Step;

pub(crate) const FAMILIES: [&str; 6] = ["slots", "dirty", "kvm", "vm-memory", "mmu", "rmap"];

/// Measure a family of benchmarks against its peers and print the ratios.
///
/// Runs the program of `benches/` in release mode. It prints a row `bench · at · ours · peer · ratio · target` for each
/// measure; a ratio above 1 means that the peer takes longer. Both sides run in one process, in turns, because numbers
/// from different runs cannot be compared. A peer this machine lacks (/dev/kvm) is named, not invented.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The family to measure
    #[arg(value_parser = FAMILIES)]
    family: String,
    /// More rounds, for numbers to quote
    #[arg(long, conflicts_with = "smoke")]
    long: bool,
    /// As few rounds as show that everything runs; the numbers mean nothing
    #[arg(long)]
    smoke: bool,
    /// Also write the rows to FILE as a JSON array
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further arguments for the benchmark program
    #[arg(last = true, value_name = "EXTRA")]
    extra: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut report = Report::new()?;
    report.run(&step(args)?);
    Ok(report.finish())
}

fn step(args: &Args) -> Result<Step> {
    let name = format!("bench {}", args.family);
    let mut step = Step::cargo(&name, ["run", "--quiet", "--release", "-p", "memslot-bench", "--"])
        .arg(args.family.as_str());
    if args.long {
        step = step.arg("--long");
    }
    if args.smoke {
        step = step.arg("--smoke");
    }
    if let Some(file) = &args.json {
        // The step runs at the workspace's root, the file is meant where the caller stands.
        let file = std::path::absolute(file).with_context(|| format!("no such place: {}", file.display()))?;
        step = step.arg("--json").arg(file.display().to_string());
    }
    Ok(args.extra.iter().fold(step, |step, argument| step.arg(argument.as_str())))
}
