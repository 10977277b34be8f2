//! What a change costs the writer: a slot unplugged and plugged again, the regions made and published.

use std::sync::Arc;

use memslot::SlotId;
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::amount;
use super::host::{Sides, region};
use crate::Effort;
use crate::layout::{Random, SPACE};
use crate::measure::{time, versus};
use crate::report::Report;

pub(crate) fn run(n: usize, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("unplug + plug") || n == 1 {
        return Ok(());
    }
    let (rounds, count) = amount(effort);
    let count = count / 256;
    let Sides { pieces, mut table, ours, peer } = Sides::new(n)?;
    let mut random = Random::new(4711);
    let order: Vec<_> = (0..count).map(|_| pieces[random.below(n)]).collect();
    let mut failed = Ok(());
    let mut fail = |result: anyhow::Result<()>| {
        if result.is_err() {
            failed = result;
        }
    };
    let replug = |table: &mut memslot::SlotTable, piece: &crate::layout::Piece| -> anyhow::Result<()> {
        table.delete(SPACE, SlotId::new(piece.id))?;
        table.create(piece.spec())?;
        Ok(())
    };
    let theirs = |piece: &crate::layout::Piece| -> anyhow::Result<()> {
        let (map, _) = peer.memory().remove_region(GuestAddress(piece.gpa), piece.size)?;
        peer.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.replace(map);
        let map = peer.memory().insert_region(Arc::new(region(piece)?))?;
        peer.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.replace(map);
        Ok(())
    };
    let fail = std::cell::RefCell::new(&mut fail);
    let times = versus(
        rounds,
        || time(count, || order.iter().for_each(|piece| (fail.borrow_mut())(replug(&mut table, piece)))),
        || time(count, || order.iter().for_each(|piece| (fail.borrow_mut())(theirs(piece)))),
    );
    drop(ours);
    failed?;
    report.times("unplug + plug one slot", n, "GuestMemoryAtomic", times, None);
    Ok(())
}
