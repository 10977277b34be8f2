//! Bugs that KVM's page tables have had, each as a test that fails where the same mistake is made here.
//!
//! Numbers are the rows of the project's list of past bugs. Races are played in one thread: the host runs the
//! other side in the middle of a fault, after the slot was looked up and before anything is installed; more of them are
//! in `races.rs`. Of the rows on page tables these are elsewhere or not here:
//!
//! | row | bug | where |
//! |---|---|---|
//! | 29-31, 34, 37, 38, 40, 46 | shadow pages | `shadow/past_bugs.rs` |
//! | 42, 43 | the reverse map | `rmap/past_bugs.rs` |
//! | 45 | stale translations of a processor that does not run | the contract of `TlbFlush`, the hypervisor's |
//! | 48 | guest_memfd | an invalidation by frames; the file is the host's |
//! | 52 | a lock that prefers writers | nobody waits for an invalidation |
#![allow(missing_docs, reason = "tests")]

mod common;

use common::*;
use memslot::{Gfn, GfnRange, Gpa, SlotId};
use memslot_mmu::format::{Access, Format};
use memslot_mmu::{Config, DirtyMode, Fault, Level, Work};

for_every_format! {
    row_10_a_fault_that_raced_with_a_delete_installs_nothing
    row_10_nor_where_a_whole_path_was_missing
    row_11_nothing_is_mapped_again_by_an_invalidation_of_a_deleted_slot
    row_12_slots_change_between_start_and_end_of_an_invalidation
    row_13_an_invalidation_ends_once
    row_16_memory_that_appears_is_not_hidden_by_old_mmio
    row_18_errors_leave_nothing_behind
    row_24_a_page_is_marked_when_write_access_is_granted
    row_26_a_large_page_never_becomes_writable_in_a_logged_slot
    rows_32_33_large_pages_stay_inside_unaligned_slots
    row_35_faults_never_free
    row_36_a_forced_yield_at_every_step_changes_nothing
    row_39_memory_that_is_invalidated_is_mapped_nowhere
    row_41_taking_write_access_for_good_reaches_protected_pages
    row_44_work_under_the_lock_is_bounded
    row_47_a_prefault_beside_a_delete
    row_49_a_stream_of_invalidations_starves_nobody
    row_51_zapping_everything_ends
}

fn row_10_a_fault_that_raced_with_a_delete_installs_nothing<F: Format>(dirty: DirtyMode) {
    for change in 0..3 {
        let mut guest = Guest::<F>::new(dirty);
        guest.create(0, 0, 64, HVA, NONE);
        // Its table exists.
        assert_eq!(guest.write(1), Fault::Mapped(Level::K4));
        let (mut guest, table) = shared_table(guest);
        guest.host.in_the_next_fault(move || {
            let mut table = table.lock().unwrap();
            match change {
                0 => table.delete(RAM, SlotId::new(0)).unwrap(),
                1 => table.move_to(RAM, SlotId::new(0), Gfn::new(4096)).unwrap(),
                _ => table
                    .transaction(|tx| {
                        tx.delete(RAM, SlotId::new(0))?;
                        tx.create(spec(1, 0, 64, HVA + (1 << 30), NONE))
                    })
                    .unwrap(),
            };
        });
        let fault = guest.write(5);
        if change == 2 {
            assert_eq!(fault, Fault::Mapped(Level::K4));
            assert_eq!(guest.leaf_at(5).unwrap().1.pfn, ((HVA + (1 << 30)) >> 12) + 5, "the new memory");
        } else {
            assert_eq!(fault, Fault::Mmio);
            assert_eq!(guest.leaves(), [].into());
        }
    }
}

fn row_10_nor_where_a_whole_path_was_missing<F: Format>(dirty: DirtyMode) {
    for run in [0, 9, 63] {
        let mut guest = Guest::<F>::new(dirty);
        guest.host.user.set_run(run);
        guest.create(0, 0, 1 << 18, HVA, NONE);
        let (mut guest, table) = shared_table(guest);
        let other = table.clone();
        guest.host.in_the_next_fault(move || {
            table.lock().unwrap().delete(RAM, SlotId::new(0)).unwrap();
        });
        assert_eq!(guest.write(5), Fault::Mmio);
        assert_eq!(guest.leaves(), [].into());
        // The tables of the path that was not linked are as good as new.
        other.lock().unwrap().create(spec(1, 1 << 20, 7, HVA, NONE)).unwrap();
        assert_eq!(
            guest.vcpu.fault(Gpa::new(((1 << 20) + 3) << 12), Access::READ).unwrap(),
            Fault::Mapped(Level::K4)
        );
        assert_eq!(read_tables(&guest.mmu).into_keys().collect::<Vec<_>>(), [(1 << 20) + 3]);
    }
}

fn row_11_nothing_is_mapped_again_by_an_invalidation_of_a_deleted_slot<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 64, HVA, NONE);
    assert_eq!(guest.write(3), Fault::Mapped(Level::K4));
    guest.table.delete(RAM, SlotId::new(0)).unwrap();
    guest.mmu.invalidate_hva(hvas(HVA, 1 << 20)).unwrap().end();
    assert_eq!(guest.leaves(), [].into());
    assert_eq!(guest.read(3), Fault::Mmio);
}

fn row_12_slots_change_between_start_and_end_of_an_invalidation<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    let mmu = guest.mmu.clone();
    let invalidation = mmu.invalidate_hva(hvas(HVA, 16 << 12)).unwrap();
    // A slot that appears meanwhile is covered; the table did not wait.
    guest.create(0, 0, 32, HVA, NONE);
    assert_eq!(guest.write(15), Fault::Retry);
    assert_eq!(guest.write(16), Fault::Mapped(Level::K4));
    guest.table.move_to(RAM, SlotId::new(0), Gfn::new(100)).unwrap();
    assert_eq!(guest.write(115), Fault::Retry);
    guest.table.delete(RAM, SlotId::new(0)).unwrap();
    assert_eq!(mmu.invalidations(), 1);
    invalidation.end();
    assert_eq!(mmu.invalidations(), 0);
    guest.create(0, 0, 32, HVA, NONE);
    assert_eq!(guest.write(15), Fault::Mapped(Level::K4));
}

fn row_13_an_invalidation_ends_once<F: Format>(dirty: DirtyMode) {
    let guest = Guest::<F>::new(dirty);
    let a = guest.mmu.invalidate_hva(hvas(HVA, 4096)).unwrap();
    let b = guest.mmu.invalidate_gfns(range(3, 4)).unwrap();
    let c = guest.mmu.invalidate_hva(hvas(HVA, 4096)).unwrap();
    assert_eq!(guest.mmu.invalidations(), 3);
    // Ending takes the value: twice, or without a start, does not compile.
    a.end();
    drop(b);
    assert_eq!(guest.mmu.invalidations(), 1);
    c.end();
    assert_eq!(guest.mmu.invalidations(), 0);
}

fn row_16_memory_that_appears_is_not_hidden_by_old_mmio<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    for round in 0..10 {
        assert_eq!(guest.read(7), Fault::Mmio);
        guest.create(0, 0, 16, HVA, NONE);
        assert_eq!(guest.read(7), Fault::Mapped(Level::K4), "{round}");
        guest.table.delete(RAM, SlotId::new(0)).unwrap();
    }
}

fn row_18_errors_leave_nothing_behind<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 16, HVA, NONE);
    guest.host.set_mmio(HVA + 0x1000);
    guest.host.set_read_only(HVA + 0x2000, true);
    assert_eq!(guest.read(1), Fault::Mmio);
    assert_eq!(guest.write(2), Fault::WriteProtected);
    assert_eq!((guest.leaves(), guest.mmu.stats().tables), ([].into(), 1));
}

fn row_24_a_page_is_marked_when_write_access_is_granted<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 64, HVA, LOG);
    // A harvest in the middle of the fault takes nothing that is written later.
    let (log, mmu) = (guest.log.clone(), guest.mmu.clone());
    guest.host.in_the_next_fault(move || {
        let consumer = log.consumer().unwrap();
        let mut rearm = mmu.dirty_rearm().unwrap();
        assert_eq!(rearm.harvest(&consumer).unwrap().pages(), 0);
    });
    assert_eq!(guest.write(9), Fault::Mapped(Level::K4));
    assert_eq!(guest.harvest(), [9]);
}

fn row_26_a_large_page_never_becomes_writable_in_a_logged_slot<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 512, HVA, NONE);
    assert_eq!(guest.read(0), Fault::Mapped(Level::M2));
    guest.table.set_flags(RAM, SlotId::new(0), LOG).unwrap();
    assert!(!guest.leaf_at(0).unwrap().1.write);
    for gfn in [17, 18, 511] {
        assert_eq!(guest.write(gfn), Fault::Mapped(Level::K4));
    }
    assert_eq!(guest.harvest(), [17, 18, 511]);
}

fn rows_32_33_large_pages_stay_inside_unaligned_slots<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::with(Config { largest: Level::M2, dirty, ..Config::default() });
    // Unaligned at both ends, neighbours on both sides, contiguous in the host.
    guest.create(0, 0, 300, HVA, NONE);
    guest.create(1, 300, 1500, HVA + (300 << 12), NONE);
    guest.create(2, 1800, 3000, HVA + (1800 << 12), NONE);
    for gfn in [0, 299, 300, 511, 512, 1535, 1536, 1799, 1800, 2047, 2048] {
        assert!(matches!(guest.write(gfn), Fault::Mapped(_) | Fault::AlreadyMapped));
    }
    check_pages_are_in_slots(&guest);
    guest.table.set_flags(RAM, SlotId::new(1), LOG).unwrap();
    for gfn in [300, 512, 1024, 1799] {
        let _ = guest.write(gfn);
    }
    guest.table.set_flags(RAM, SlotId::new(1), NONE).unwrap();
    check_pages_are_in_slots(&guest);
    let large: Vec<_> =
        guest.leaves().into_iter().filter(|(_, leaf)| leaf.pages > 1).map(|(gfn, _)| gfn).collect();
    assert_eq!(large, [512, 1024, 2048], "and come back where they fit");
}

fn check_pages_are_in_slots<F: Format>(guest: &Guest<F>) {
    for (gfn, leaf) in guest.leaves() {
        let slot = guest.table.view().slot_at(RAM, Gfn::new(gfn)).expect("mapped without a slot");
        assert!(slot.gfns().contains_range(&range(gfn, leaf.pages)), "{gfn:#x} +{} in {slot}", leaf.pages);
    }
}

fn row_35_faults_never_free<F: Format>(dirty: DirtyMode) {
    // At the limit a fault fails; nothing that is mapped goes for its sake.
    let mut guest = Guest::<F>::with(Config { tables: usize::from(F::LEVELS), dirty, ..Config::default() });
    guest.host.user.set_run(0);
    guest.create(0, 0, 4096, HVA, NONE);
    assert_eq!(guest.write(0), Fault::Mapped(Level::K4));
    let leaves = guest.leaves();
    assert!(guest.vcpu.fault(Gpa::new(600 << 12), Access::WRITE).is_err());
    assert_eq!((guest.leaves(), guest.host.take_flushes()), (leaves, vec![]));
}

fn row_36_a_forced_yield_at_every_step_changes_nothing<F: Format>(dirty: DirtyMode) {
    let works: &[Work] = match F::DIRTY {
        0 => &[Work::Zap, Work::WriteProtect, Work::Collapse],
        _ => &[Work::Zap, Work::WriteProtect, Work::Collapse, Work::ClearDirty],
    };
    for &work in works {
        for gfns in
            [range(0, 4096), range(5, 1500), range(700, 1), range(512, 1024), range(0, 1 << 30), range(9, 0)]
        {
            let run = |budget: usize| {
                let mut guest = Guest::<F>::with(Config { largest: Level::M2, dirty, ..Config::default() });
                guest.create(0, 0, 4096, HVA, NONE);
                guest.host.user.set_run(0);
                let _ = guest.vcpu.prefault(range(0, 512), usize::MAX).unwrap();
                let _ = guest.vcpu.prefault(range(600, 400), usize::MAX).unwrap();
                guest.host.user.set_run(20);
                for gfn in [1024, 1600, 2100, 3000] {
                    let _ = guest.write(gfn);
                }
                let mut operation = guest.mmu.begin(work, gfns);
                let mut steps = 1;
                while operation.step(budget) {
                    steps += 1;
                    let rest = operation.rest();
                    assert!(!rest.is_empty() && gfns.contains_range(&rest), "forward, and inside");
                }
                let flush = operation.finish();
                let owed: Option<GfnRange> = flush.gfns();
                flush.discharge();
                (guest.leaves(), owed, guest.host.take_flushes(), steps)
            };
            let (at_once, in_steps) = (run(usize::MAX), run(1));
            assert_eq!(at_once.3, 1);
            assert_eq!(
                (&at_once.0, at_once.1, &at_once.2),
                (&in_steps.0, in_steps.1, &in_steps.2),
                "{work:?} {gfns}"
            );
            assert!(in_steps.2.len() <= 1, "one flush");
        }
    }
}

fn row_39_memory_that_is_invalidated_is_mapped_nowhere<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    // Two aliases and a stranger.
    guest.create(0, 0xa0, 32, HVA, NONE);
    guest.create(1, 0x1_0000, 32, HVA, NONE);
    guest.create(2, 0x2_0000, 32, HVA + (1 << 20), NONE);
    for base in [0xa0, 0x1_0000, 0x2_0000] {
        for gfn in base..base + 32 {
            assert_eq!(guest.write(gfn), Fault::Mapped(Level::K4));
            guest.host.touch(&guest.mmu, gfn);
        }
    }
    let mmu = guest.mmu.clone();
    // Half a page, and more: whole pages count.
    let invalidation = mmu.invalidate_hva(hvas(HVA + 0x2800, 0x1000)).unwrap();
    assert_eq!(guest.host.take_flushes().len(), 1, "one for both");
    let missing: Vec<_> = [0xa0, 0x1_0000, 0x2_0000]
        .into_iter()
        .flat_map(|base| base..base + 32)
        .filter(|&gfn| guest.leaf_at(gfn).is_none())
        .collect();
    assert_eq!(missing, [0xa2, 0xa3, 0x1_0002, 0x1_0003]);
    assert_eq!(guest.host.stale(&guest.mmu, range(0, 1 << 20)), []);
    guest.host.move_page(HVA + 0x2000, 0x1234);
    invalidation.end();
    assert_eq!(guest.read(0xa2), Fault::Mapped(Level::K4));
    assert_eq!(guest.leaf_at(0xa2).unwrap().1.pfn, 0x1234);
}

fn row_41_taking_write_access_for_good_reaches_protected_pages<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 64, HVA, LOG);
    assert_eq!(guest.write(3), Fault::Mapped(Level::K4));
    // Protected for the dirty log already: nothing to take, and yet it must not come back by itself.
    guest.harvest();
    guest.mmu.write_protect(range(0, 64)).discharge();
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
    assert_eq!(guest.write(3), Fault::Mmio);
    assert!(!guest.leaf_at(3).unwrap().1.write);
}

fn row_44_work_under_the_lock_is_bounded<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.host.user.set_run(0);
    guest.create(0, 1, 1 << 15, HVA, NONE);
    let _ = guest.vcpu.prefault(range(1, 1 << 15), usize::MAX).unwrap();
    let mmu = guest.mmu.clone();
    let mut operation = mmu.begin(Work::WriteProtect, range(1, 1 << 15));
    let mut steps = 0;
    while operation.step(100) {
        steps += 1;
        // Others have their turn between any two steps.
        assert_eq!(guest.read(5), Fault::AlreadyMapped);
        mmu.zap(range(1 << 15, 1)).discharge();
    }
    // Entry by entry, or a few copies of tables at a time.
    assert!(steps >= 8, "{steps}");
    operation.finish().discharge();
    let writable = guest.leaves().values().filter(|leaf| leaf.write).count();
    assert_eq!(writable, 0);
}

fn row_47_a_prefault_beside_a_delete<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2000, HVA + 0x1000, NONE);
    let (mut guest, table) = shared_table(guest);
    guest.host.in_the_next_fault(move || {
        table.lock().unwrap().delete(RAM, SlotId::new(0)).unwrap();
    });
    let done = guest.vcpu.prefault(range(0, 2000), usize::MAX).unwrap();
    assert_eq!((done.rest, done.last), (range(0, 2000), Fault::Mmio));
    assert_eq!(guest.leaves(), [].into());
}

fn row_49_a_stream_of_invalidations_starves_nobody<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    let mmu = guest.mmu.clone();
    let elsewhere = HVA + (1 << 35);
    // There is always one under way: each ends after the next began.
    let mut under_way = mmu.invalidate_hva(hvas(elsewhere, 4096)).unwrap();
    for round in 0..200u64 {
        guest.create(0, 0, 64, HVA, NONE);
        assert_eq!(guest.write(round % 64), Fault::Mapped(Level::K4), "an unrelated fault does not retry");
        let next = mmu.invalidate_hva(hvas(elsewhere + (round << 12), 4096)).unwrap();
        assert_eq!(guest.write((round + 1) % 64), Fault::Mapped(Level::K4));
        std::mem::replace(&mut under_way, next).end();
        guest.table.delete(RAM, SlotId::new(0)).unwrap();
    }
}

fn row_51_zapping_everything_ends<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 1 << 16, HVA + 0x1000, NONE);
    let mut zap = guest.mmu.begin(Work::Zap, range(0, 1 << 16));
    let mut steps = 0;
    loop {
        // Faults bring pages back behind and before the operation, all the time.
        for gfn in 0..64 {
            let _ = guest.vcpu.fault(Gpa::new((gfn << 10) << 12), Access::WRITE).unwrap();
        }
        steps += 1;
        if !zap.step(8) {
            break;
        }
    }
    assert!(steps < 1 << 16);
    zap.finish().discharge();
}
