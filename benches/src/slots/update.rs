//! Updates: create and delete with all three indexes and the publication, and many of them in one transaction.

use memslot::{Limits, SlotId, SlotTable};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use super::vm_memory_peer::{collection, region};
use super::{MILLION, table_of, target};
use crate::Effort;
use crate::layout::{Piece, Random, SPACE, creation_order, layout};
use crate::measure::{median, time, versus};
use crate::report::Report;

pub(crate) fn run(sizes: &[usize], effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    for &n in sizes {
        if report.wants("create + publish") || report.wants("delete + publish") {
            single(n, effort, report)?;
        }
    }
    if report.wants("transaction") && effort != Effort::Smoke {
        for &n in &sizes[1..] {
            transaction(n, true, effort, report)?;
            transaction(n, false, effort, report)?;
        }
    }
    Ok(())
}

/// Some slots, spread over the whole map.
fn sample(pieces: &[Piece], count: usize) -> Vec<Piece> {
    let mut sample = pieces.to_vec();
    Random::new(4711).shuffle(&mut sample);
    sample.truncate(count);
    sample
}

fn single(n: usize, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let pieces = layout(n);
    let mut table = table_of(&pieces)?;
    let peer = GuestMemoryAtomic::new(collection(&pieces)?);
    // The peer's cost grows with n: a few of its operations are enough.
    let (rounds, theirs) = match (effort, n) {
        (Effort::Smoke, _) => (2, 4),
        (_, MILLION) => (1, 2),
        (_, 32764) => (5, 8),
        (_, 4096) => (9, 16),
        _ => (15, 8.min(n)),
    };
    let ours = if n < 64 { n } else { 64 };
    let batch = sample(&pieces, ours);
    let mut deletes = (Vec::new(), Vec::new());
    let mut creates = (Vec::new(), Vec::new());
    let mut error = Ok(());
    for round in 0..=rounds {
        let mut once = |work: &mut dyn FnMut(&Piece) -> anyhow::Result<()>, batch: &[Piece]| {
            time(batch.len(), || {
                for piece in batch {
                    if let Err(failed) = work(piece) {
                        error = Err(failed);
                    }
                }
            })
        };
        let repeat = if effort == Effort::Smoke { 1 } else { 20 };
        for _ in 0..repeat {
            let deleted =
                once(&mut |piece| Ok(table.delete(SPACE, SlotId::new(piece.id)).map(drop)?), &batch);
            let created = once(&mut |piece| Ok(table.create(piece.spec()).map(drop)?), &batch);
            if round > 0 {
                deletes.0.push(deleted);
                creates.0.push(created);
            }
        }
        let batch = &batch[..theirs];
        let deleted = once(
            &mut |piece| {
                let (map, _) = peer.memory().remove_region(GuestAddress(piece.gpa), piece.size)?;
                peer.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.replace(map);
                Ok(())
            },
            batch,
        );
        let created = once(
            &mut |piece| {
                let map = peer.memory().insert_region(region(piece))?;
                peer.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.replace(map);
                Ok(())
            },
            batch,
        );
        if round > 0 {
            deletes.1.push(deleted);
            creates.1.push(created);
        }
    }
    error?;
    let targets = target(n, [0.5, 8.0, 80.0, 500.0]);
    let times = (median(&mut creates.0), median(&mut creates.1));
    report.times("create + publish", n, "vm-memory insert + replace", times, targets);
    let times = (median(&mut deletes.0), median(&mut deletes.1));
    report.times("delete + publish", n, "vm-memory remove + replace", times, targets);
    Ok(())
}

/// 1000 slots beside `n` others: in one transaction, and one by one. Once as memory is plugged, with ids and
/// addresses in a row, and once scattered over the whole map.
fn transaction(n: usize, in_a_row: bool, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    const MANY: usize = 1000;
    let pieces = layout(n + MANY);
    let (order, many) = if in_a_row {
        (creation_order(&pieces[..n]), pieces[n..].to_vec())
    } else {
        let mut order = creation_order(&pieces);
        let many = order.split_off(n);
        (order, many)
    };
    let limits = Limits { slots: u32::try_from(n + MANY)?, ..Default::default() };
    let (mut singly, mut at_once) = (SlotTable::new(limits)?, SlotTable::new(limits)?);
    for piece in &order {
        singly.create(piece.spec())?;
        at_once.create(piece.spec())?;
    }
    let mut error = Ok(());
    let rounds = if effort == Effort::Long { 31 } else { 9 };
    let times = versus(
        rounds,
        || {
            let elapsed = time(MANY, || {
                let result =
                    at_once.transaction(|tx| many.iter().try_for_each(|piece| tx.create(piece.spec())));
                if let Err(failed) = result {
                    error = Err(failed);
                }
            });
            let undone =
                at_once.transaction(|tx| many.iter().try_for_each(|p| tx.delete(SPACE, SlotId::new(p.id))));
            undone.map_or(f64::NAN, |_| elapsed)
        },
        || {
            let elapsed = time(MANY, || {
                for piece in &many {
                    let _ = singly.create(piece.spec());
                }
            });
            for piece in &many {
                let _ = singly.delete(SPACE, SlotId::new(piece.id));
            }
            elapsed
        },
    );
    error?;
    anyhow::ensure!(singly.view().len(SPACE) == n && at_once.view().len(SPACE) == n, "all of it was undone");
    let target = (n == 32764).then_some(3.0);
    let name = if in_a_row { "transaction of 1000 in a row" } else { "transaction of 1000 scattered" };
    report.times(name, n, "1000 single creates", times, target);
    Ok(())
}
