//! Flushes that are owed: whoever finds that something is not mapped any more, but not flushed yet either, pays for who
//! took it away.
#![allow(missing_docs, reason = "tests")]

mod common;

use common::*;
use memslot::{Gfn, Gpa, SlotId};
use memslot_mmu::format::Format;
use memslot_mmu::{DirtyMode, Fault, Level};

for_every_format! {
    what_a_fault_emptied_is_flushed_by_who_finds_it
    an_operation_that_finds_nothing_pays_for_who_has_not_flushed
    a_forgotten_flush_is_done_by_the_next
    a_harvest_that_ends_early_owes_its_flush
    an_invalidation_beside_a_delete_waits_for_its_flush
}

fn what_a_fault_emptied_is_flushed_by_who_finds_it<F: Format>(dirty: DirtyMode) {
    for part in [false, true] {
        let mut guest = Guest::<F>::new(dirty);
        guest.create(0, 0, 1024, HVA, NONE);
        guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
        assert_eq!(guest.read(5), Fault::Mapped(Level::M2));
        // So that the table is not empty.
        assert_eq!(guest.read(600), Fault::Mapped(Level::M2));
        guest.host.touch(&guest.mmu, 5);
        guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), false)).unwrap();
        let (mmu, host) = (guest.mmu.clone(), guest.host.clone());
        let race = move || {
            assert_eq!(mmu.walker().unwrap().translate(Gpa::new(0x5000)), None);
            let gfns = if part { range(7, 1) } else { range(0, 512) };
            for _ in 0..2 {
                let flush = mmu.zap(gfns);
                // The second time there is nothing left, unless it was about a part only.
                assert!(flush.gfns().is_some() || !part);
                flush.discharge();
                assert_eq!(host.stale(&mmu, gfns), []);
            }
        };
        let host = guest.host.clone();
        guest.host.in_the_next_fault(move || host.in_the_next_fault(race));
        assert_eq!(guest.write(5), Fault::Mapped(Level::M2));
    }
}

fn an_operation_that_finds_nothing_pays_for_who_has_not_flushed<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2048, HVA, NONE);
    for gfn in [3, 1030] {
        let _ = guest.write(gfn);
        guest.host.touch(&guest.mmu, gfn);
    }
    let mmu = guest.mmu.clone();
    let first = mmu.zap(range(0, 1024));
    // Another one finds the page unmapped; its caller may free the memory when it has discharged.
    let second = mmu.zap(range(3, 1));
    assert!(second.gfns().is_some_and(|gfns| gfns.contains(Gfn::new(3))));
    second.discharge();
    assert_eq!(guest.host.stale(&guest.mmu, range(3, 1)), []);
    // Elsewhere nothing is owed.
    assert_eq!(mmu.zap(range(5000, 5)).gfns(), None);
    first.discharge();
    assert_eq!(mmu.zap(range(0, 1024)).gfns(), None, "all is paid");
    // The dirty log pays, too.
    let third = mmu.write_protect(range(1024, 512));
    assert!(third.gfns().is_some());
    let mut rearm = mmu.dirty_rearm().unwrap();
    guest.host.take_flushes();
    memslot::dirty::Rearm::rearm(&mut rearm, RAM, range(1030, 1)).unwrap();
    memslot::dirty::Rearm::flush(&mut rearm).unwrap();
    assert_eq!(guest.host.take_flushes().len(), 1);
    assert_eq!(guest.host.stale(&guest.mmu, range(1030, 1)), []);
    third.discharge();
}

fn a_forgotten_flush_is_done_by_the_next<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.host.user.set_run(0);
    guest.create(0, 0, 2048, HVA, NONE);
    // The last one stays, and the tables above it.
    for gfn in [3, 600, 1500] {
        assert_eq!(guest.write(gfn), Fault::Mapped(Level::K4));
        guest.host.touch(&guest.mmu, gfn);
    }
    let tables = guest.host.user.tables();
    let mmu = guest.mmu.clone();
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(mmu.zap(range(0, 512)))));
    assert_eq!(dropped.is_err(), cfg!(debug_assertions), "it is a mistake, and tests hear of it");
    mmu.reclaim();
    assert_eq!(guest.host.user.tables(), tables, "nothing is freed without a flush");
    assert_eq!(mmu.stats().forgotten_flushes, 1);
    mmu.zap(range(600, 1)).discharge();
    assert_eq!(guest.host.take_flushes().len(), 1, "one for both");
    assert_eq!(guest.host.stale(&guest.mmu, range(0, 2048)), []);
    mmu.reclaim();
    assert!(guest.host.user.tables() < tables);
}

fn a_harvest_that_ends_early_owes_its_flush<F: Format>(dirty: DirtyMode) {
    use memslot::dirty::Rearm;
    for who in 0..3 {
        let mut guest = Guest::<F>::new(dirty);
        guest.create(0, 0, 64, HVA, LOG);
        for gfn in [3, 9] {
            assert_eq!(guest.write(gfn), Fault::Mapped(Level::K4));
            assert!(guest.processor_writes(gfn));
            guest.host.touch(&guest.mmu, gfn);
        }
        let mut rearm = guest.mmu.dirty_rearm().unwrap();
        rearm.rearm(RAM, range(3, 1)).unwrap();
        // Another backend fails now, say, so this one is not asked to flush. The next harvest, an operation, or the end
        // of this one pays.
        match who {
            0 => {
                let mut other = guest.mmu.dirty_rearm().unwrap();
                other.rearm(RAM, range(3, 1)).unwrap();
                other.flush().unwrap();
            }
            1 => guest.mmu.zap(range(3, 1)).discharge(),
            _ => drop(rearm),
        }
        assert_eq!(guest.host.take_flushes().len(), 1, "{who}");
        assert_eq!(guest.host.stale(&guest.mmu, range(3, 1)), []);
    }
}

fn an_invalidation_beside_a_delete_waits_for_its_flush<F: Format>(dirty: DirtyMode) {
    for large in [false, true] {
        let mut guest = Guest::<F>::new(dirty);
        guest.host.user.set_run(if large { 9 } else { 0 });
        guest.create(0, 0, 1024, HVA, NONE);
        let _ = guest.write(5);
        guest.host.touch(&guest.mmu, 5);
        let (mmu, host) = (guest.mmu.clone(), guest.host.clone());
        let (was_run, run) = std::sync::mpsc::channel();
        guest.host.before_the_next_flush(move || {
            // The slot is gone, and its entries, too; but not for the processor. Who moves the memory now must not miss that.
            let invalidation = mmu.invalidate_hva(hvas(HVA, 1 << 20)).unwrap();
            assert_eq!(host.stale(&mmu, range(0, 1024)), []);
            invalidation.end();
            was_run.send(()).unwrap();
        });
        guest.table.delete(RAM, SlotId::new(0)).unwrap();
        run.try_recv().expect("the delete has flushed");
        // Afterwards nobody is asked for this any more.
        guest.host.take_flushes();
        guest.mmu.invalidate_hva(hvas(HVA, 1 << 20)).unwrap().end();
        assert_eq!(guest.host.take_flushes(), []);
    }
}
