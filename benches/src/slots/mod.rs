//! The slot engine beside vm-memory, iset and the real kernel.

mod kernel;
mod lookup;
mod memory;
mod readers;
mod update;
mod vm_memory_peer;

use crate::Effort;
use crate::report::Report;

/// The sizes that have targets.
const SIZES: [usize; 4] = [8, 509, 4096, 32764];
const MILLION: usize = 1 << 20;

pub(crate) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let mut sizes = match effort {
        Effort::Smoke => vec![8, 509],
        _ => SIZES.to_vec(),
    };
    if effort != Effort::Smoke {
        sizes.push(MILLION);
    }
    lookup::run(&sizes, effort, report)?;
    update::run(&sizes, effort, report)?;
    kernel::run(&sizes, effort, report)?;
    readers::run(&sizes, effort, report)?;
    memory::run(&sizes, report)
}

/// A row's target by size.
fn target(at: usize, targets: [f64; 4]) -> Option<f64> {
    SIZES.iter().position(|&size| size == at).map(|i| targets[i])
}

/// A table that allows `n` slots, with these slots in it.
fn table_of(pieces: &[crate::layout::Piece]) -> anyhow::Result<memslot::SlotTable> {
    let mut table = empty_table(pieces.len())?;
    for piece in crate::layout::creation_order(pieces) {
        table.create(piece.spec())?;
    }
    Ok(table)
}

fn empty_table(n: usize) -> anyhow::Result<memslot::SlotTable> {
    let slots = u32::try_from(n.max(32764) + 1)?;
    Ok(memslot::SlotTable::new(memslot::Limits { slots, ..Default::default() })?)
}
