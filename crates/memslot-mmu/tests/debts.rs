//! Flushes that are owed: whoever finds that something is not mapped any more, but not flushed yet either, pays for who
//! took it away; and what is paid is owed no longer.
//!
//! Faults owe no flush. One that asks for more than a page allows empties the entry and asks the host anew; processors may
//! have the old translation until somebody flushes, so whoever changes these frames next must find out.
#![allow(missing_docs, reason = "tests")]

mod common;

use common::*;
use memslot::{Gfn, Gpa, SlotFlags, SlotId};
use memslot_mmu::format::{Access, Format};
use memslot_mmu::{DirtyMode, Fault, Level, Work};

for_every_format! {
    what_a_fault_emptied_is_flushed_by_who_finds_it
    an_operation_that_finds_nothing_pays_for_who_has_not_flushed
    a_forgotten_flush_is_done_by_the_next
    a_harvest_that_ends_early_owes_its_flush
    an_invalidation_beside_a_delete_waits_for_its_flush
    nothing_is_owed_after_a_harvest
    a_harvest_of_pages_that_cannot_be_written_owes_nothing
    what_is_protected_already_owes_nothing
    a_slot_that_becomes_read_only_owes_nothing_for_pages_that_cannot_be_written
    small_pages_in_place_of_a_large_one_that_a_fault_emptied
    a_path_that_was_not_linked_leaves_its_tables_as_they_were
    a_page_that_was_written_and_emptied_is_harvested
    a_page_that_was_written_and_emptied_is_protected_for_good
    a_page_that_was_written_and_mapped_anew_is_harvested
    an_operation_that_ends_early_pays_for_what_it_has_passed
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

/// Where nothing is mapped, and whatever a harvest owes is owed: it says all frames.
fn is_paid<F: Format>(guest: &Guest<F>) -> bool {
    let nothing = guest.mmu.zap(range(1 << 20, 8));
    let is_paid = nothing.gfns().is_none();
    nothing.discharge();
    is_paid
}

fn nothing_is_owed_after_a_harvest<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2048, HVA, LOG);
    // Single pages, whole tables (which are copied), both, and nothing.
    let whole = 512..1536;
    for written in [vec![3], whole.clone().collect(), [3].into_iter().chain(whole).collect(), vec![]] {
        for &gfn in &written {
            let _ = guest.write(gfn);
            assert!(guest.processor_writes(gfn));
        }
        assert!(is_paid(&guest));
        guest.host.touch_all(&guest.mmu);
        assert_eq!(guest.harvest(), written);
        assert_eq!(guest.host.take_flushes().len(), usize::from(!written.is_empty()));
        assert_eq!(guest.host.stale(&guest.mmu, range(0, 2048)), []);
        assert!(is_paid(&guest), "the harvest has flushed {} pages", written.len());
        assert!(guest.host.take_flushes().is_empty());
    }
}

fn a_harvest_of_pages_that_cannot_be_written_owes_nothing<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 64, HVA, LOG);
    // One is mapped, and nobody writes it through the tables; the other is not mapped.
    let _ = guest.read(3);
    guest.log.mark_range(RAM, range(3, 2));
    assert_eq!(guest.harvest(), [3, 4]);
    assert!(guest.host.take_flushes().is_empty());
}

fn what_is_protected_already_owes_nothing<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.host.user.set_run(0);
    guest.create(0, 0, 1024, HVA, NONE);
    for gfn in 0..600 {
        let _ = guest.write(gfn);
    }
    let mmu = guest.mmu.clone();
    // A table as a whole, which is copied, and a part of one.
    for gfns in [range(0, 512), range(520, 30)] {
        let first = mmu.write_protect(gfns);
        assert!(first.gfns().is_some());
        first.discharge();
        assert_eq!(mmu.write_protect(gfns).gfns(), None);
    }
}

fn a_slot_that_becomes_read_only_owes_nothing_for_pages_that_cannot_be_written<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 64, HVA, NONE);
    let _ = guest.write(3);
    let mmu = guest.mmu.clone();
    mmu.write_protect(range(0, 64)).discharge();
    guest.host.take_flushes();
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
    assert!(guest.host.take_flushes().is_empty());
    // Nor does what was empty before.
    assert_eq!(mmu.zap(range(5, 1)).gfns(), None);
    assert!(!guest.processor_writes(3));
}

/// A large page that was mapped when its slot was read-only, and that a processor uses.
fn with_a_read_only_page<F: Format>(dirty: DirtyMode, level: Level) -> Guest<F> {
    let mut guest = Guest::<F>::new(dirty);
    guest.host.user.set_run(if level == Level::G1 { 18 } else { 9 });
    guest.create(0, 0, 2 * level.pages(), HVA, NONE);
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
    assert_eq!(guest.read(5), Fault::Mapped(level));
    guest.host.touch(&guest.mmu, 5);
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), false)).unwrap();
    assert_eq!(guest.host.stale(&guest.mmu, range(0, level.pages())), []);
    guest
}

fn small_pages_in_place_of_a_large_one_that_a_fault_emptied<F: Format>(dirty: DirtyMode) {
    for level in [Level::M2, Level::G1] {
        for run in [0, 9] {
            for other in [4, 6, 511, 512, level.pages() - 1] {
                let mut guest = with_a_read_only_page::<F>(dirty, level);
                guest.host.user.set_run(run);
                let Fault::Mapped(now) = guest.write(5) else { panic!("not mapped") };
                if now == level || other >= level.pages() {
                    continue;
                }
                // The memory behind a page beside it is given away.
                let flush = guest.mmu.zap(range(other, 1));
                flush.discharge();
                assert_eq!(guest.host.stale(&guest.mmu, range(other, 1)), [], "{level:?} {now:?} {other}");
            }
        }
    }
}

fn a_path_that_was_not_linked_leaves_its_tables_as_they_were<F: Format>(dirty: DirtyMode) {
    let mut guest = with_a_read_only_page::<F>(dirty, Level::M2);
    guest.host.user.set_run(0);
    guest.warm_up();
    let mmu = guest.mmu.clone();
    let host = guest.host.clone();
    guest.host.in_the_next_fault(move || {
        // The entry is emptied by now, and the fault asks again: somebody else is quicker.
        host.in_the_next_fault(move || {
            assert_eq!(
                mmu.walker().unwrap().fault(Gpa::new(0x6000), Access::READ).unwrap(),
                Fault::Mapped(Level::K4)
            );
        });
    });
    assert_eq!(guest.write(5), Fault::Mapped(Level::K4));
    guest.mmu.zap(range(0, 512)).discharge();
    // The tables that were not linked are elsewhere now, where nobody has an old translation.
    assert_eq!(guest.write(517), Fault::Mapped(Level::K4));
    assert_eq!(guest.mmu.zap(range(518, 1)).gfns(), None);
}

/// A page that a processor has written, until a fault wants to execute it, and the host is not ready to say more.
fn with_a_written_page<F: Format>(dirty: DirtyMode, flags: SlotFlags) -> Guest<F> {
    let mut guest = Guest::<F>::new(dirty);
    let page = HVA + 0x5000;
    guest.create(0, 0, 64, HVA, flags);
    guest.host.set_no_execute(page, true);
    let _ = guest.read(6);
    assert_eq!(guest.read(5), Fault::Mapped(Level::K4));
    let _ = guest.write(5);
    assert!(guest.processor_writes(5));
    guest.host.touch(&guest.mmu, 5);
    guest.host.set_no_execute(page, false);
    let host = guest.host.clone();
    guest.host.in_the_next_fault(move || host.set_retry(page, true));
    assert_eq!(guest.fault(5, Access::EXECUTE), Fault::Retry);
    assert_eq!(guest.leaf_at(5), None);
    guest
}

fn a_page_that_was_written_and_emptied_is_harvested<F: Format>(dirty: DirtyMode) {
    // Few pages, and all of a table.
    for all in [false, true] {
        let mut guest = with_a_written_page::<F>(dirty, LOG);
        if all {
            let _ = guest.vcpu.prefault(range(6, 58), usize::MAX).unwrap();
            (6..64).for_each(|gfn| _ = guest.write(gfn));
        }
        assert!(guest.harvest().contains(&5));
        assert_eq!(guest.host.stale(&guest.mmu, range(5, 1)), [], "the next write is noticed");
    }
    // By an operation, with and without tables for copies.
    let guest = with_a_written_page::<F>(dirty, NONE);
    guest.host.take_flushes();
    guest.mmu.write_protect(range(5, 1)).discharge();
    assert_eq!(guest.host.take_flushes().len(), 1);
}

fn a_page_that_was_written_and_emptied_is_protected_for_good<F: Format>(dirty: DirtyMode) {
    let mut guest = with_a_written_page::<F>(dirty, NONE);
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
    assert_eq!(guest.host.stale(&guest.mmu, range(5, 1)), []);
}

fn a_page_that_was_written_and_mapped_anew_is_harvested<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 64, HVA, LOG);
    guest.host.set_no_execute(HVA + 0x5000, true);
    let _ = guest.read(5);
    let _ = guest.write(5);
    assert!(guest.processor_writes(5));
    guest.host.touch(&guest.mmu, 5);
    // The host allows more now: the page is mapped anew, and the processor goes on writing as before.
    guest.host.set_no_execute(HVA + 0x5000, false);
    assert_eq!(guest.fault(5, Access::EXECUTE), Fault::Mapped(Level::K4));
    guest.host.take_flushes();
    assert_eq!(guest.harvest(), [5]);
    assert_eq!(guest.host.take_flushes().len(), 1, "the next write is noticed");
    assert_eq!(guest.host.stale(&guest.mmu, range(5, 1)), []);
}

fn an_operation_that_ends_early_pays_for_what_it_has_passed<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2048, HVA, NONE);
    for gfn in [3, 1030] {
        let _ = guest.write(gfn);
        guest.host.touch(&guest.mmu, gfn);
    }
    let mmu = guest.mmu.clone();
    let first = mmu.zap(range(0, 1024));
    let mut second = mmu.begin(Work::Zap, range(3, 2045));
    assert!(second.step(1) && second.rest().start() > Gfn::new(3));
    let passed = range(3, second.rest().start().get() - 3);
    second.finish().discharge();
    assert_eq!(guest.host.stale(&guest.mmu, passed), []);
    first.discharge();
    // Nothing was done, and nothing is owed.
    let third = mmu.zap(range(1024, 1024));
    assert_eq!(mmu.begin(Work::Zap, range(1024, 1024)).finish().gfns(), None);
    third.discharge();
}
