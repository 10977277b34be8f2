//! `memslot-bench`: memslot beside its peers, in one process, as ratios. `cargo xtask bench` runs it.

mod dirty;
mod kvm;
mod layout;
mod measure;
#[cfg(target_arch = "x86_64")]
mod mmu;
mod report;
mod rmap;
mod slots;
mod vm_memory;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Measures memslot beside its peers in one process. Every row is printed, good or bad.
#[derive(Parser)]
#[command(version, about)]
struct Options {
    #[command(subcommand)]
    family: Family,
    /// More rounds, and the slow sizes for every row.
    #[arg(long, global = true)]
    long: bool,
    /// A few rounds at small sizes: shows that the benchmark runs, not how fast anything is.
    #[arg(long, global = true, conflicts_with = "long")]
    smoke: bool,
    /// Also writes the rows as JSON to this file.
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only the rows whose name contains this.
    #[arg(long, global = true, value_name = "TEXT")]
    only: Option<String>,
}

#[derive(Subcommand)]
enum Family {
    /// The slot engine: lookups, updates, transactions, memory.
    Slots,
    /// The dirty engine: marking, harvesting, memory.
    Dirty,
    /// Slots of the real kernel, changed through a table and by the bare ioctl.
    Kvm,
    /// vm-memory's traits: accesses, guards, descriptor chains.
    VmMemory,
    /// Second-stage page tables: faults, mapping and unmapping.
    #[cfg(target_arch = "x86_64")]
    Mmu,
    /// The reverse map: adding, removing, walking, beside a writer too.
    Rmap,
}

/// How much to measure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Shows that it runs.
    Smoke,
    /// Under a minute.
    Normal,
    /// As long as it takes.
    Long,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let effort = match (options.smoke, options.long) {
        (true, _) => Effort::Smoke,
        (_, true) => Effort::Long,
        _ => Effort::Normal,
    };
    let mut report = report::Report::new(options.only);
    match options.family {
        Family::Slots => slots::run(effort, &mut report)?,
        Family::Dirty => dirty::run(effort, &mut report)?,
        Family::Kvm => kvm::run(effort, &mut report)?,
        Family::VmMemory => vm_memory::run(effort, &mut report)?,
        #[cfg(target_arch = "x86_64")]
        Family::Mmu => mmu::run(effort, &mut report)?,
        Family::Rmap => rmap::run(effort, &mut report)?,
    }
    report.finish(options.json.as_deref())
}
