//! Slots change, and the tables follow: exactly the frames concerned, with one flush.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use memslot::{Gfn, Gpa, Listener, ListenerError, SlotId, Update};
use memslot_mmu::format::{Access, Format};
use memslot_mmu::{Config, DirtyMode, Fault, Level};

for_every_format! {
    delete_zaps_the_slot_and_nothing_else
    move_zaps_the_old_place_and_keeps_dirty_pages
    a_transaction_of_many_changes_is_one_flush
    growing_splitting_and_merging_keep_mappings
    shrinking_zaps_what_went
    read_only_keeps_mappings_without_writing
    logging_starts_and_stops
    logging_starts_for_whole_tables
    logging_with_all_pages_dirty_at_first_arms_nothing
    a_failing_listener_takes_everything_back
    an_empty_tebibyte_is_zapped_at_once
    faults_follow_the_newest_slots
}

fn delete_zaps_the_slot_and_nothing_else<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    // Three neighbours in one table.
    guest.create(0, 100, 50, HVA + (100 << 12), NONE);
    guest.create(1, 150, 50, HVA + (150 << 12), NONE);
    guest.create(2, 200, 50, HVA + (200 << 12), NONE);
    for gfn in 100..250 {
        assert_eq!(guest.write(gfn), Fault::Mapped(Level::K4));
    }
    let tables = guest.mmu.stats().tables;
    guest.table.delete(RAM, SlotId::new(1)).unwrap();
    assert_eq!(guest.host.take_flushes(), [range(150, 50)], "one flush, of its frames");
    let left: Vec<_> = guest.leaves().into_keys().collect();
    assert_eq!(left, (100..150).chain(200..250).collect::<Vec<_>>());
    assert_eq!(guest.read(160), Fault::Mmio);
    assert_eq!(guest.mmu.stats().tables, tables);
    // The table goes with the last page in it.
    guest.table.delete(RAM, SlotId::new(0)).unwrap();
    guest.table.delete(RAM, SlotId::new(2)).unwrap();
    drop(guest.vcpu);
    guest.mmu.reclaim();
    assert_eq!((guest.host.user.tables(), guest.host.take_flushes().len()), (1, 2));
    // A slot that nobody used owes nothing.
    guest.table.create(spec(3, 0, 1 << 20, HVA, NONE)).unwrap();
    guest.table.delete(RAM, SlotId::new(3)).unwrap();
    assert_eq!(guest.host.take_flushes(), []);
}

fn move_zaps_the_old_place_and_keeps_dirty_pages<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 1024, HVA, LOG);
    for gfn in [3, 600, 601] {
        assert_eq!(guest.write(gfn), Fault::Mapped(Level::K4));
        assert!(guest.processor_writes(gfn));
    }
    assert_eq!(guest.read(4), Fault::Mapped(Level::K4));
    assert_eq!(guest.harvest(), [3, 600, 601]);
    if dirty == DirtyMode::WriteProtect {
        assert_eq!(guest.write(601), Fault::Mapped(Level::K4));
    }
    assert!(guest.processor_writes(601));
    guest.host.take_flushes();
    guest.table.move_to(RAM, SlotId::new(0), Gfn::new(5000)).unwrap();
    assert_eq!(guest.host.take_flushes().len(), 1);
    assert!(guest.leaves().is_empty());
    assert_eq!(guest.harvest(), [5601], "written and not harvested before the move");
    assert_eq!(guest.read(3), Fault::Mmio);
    assert_eq!(guest.read(5003), Fault::Mapped(Level::K4));
    // Onto itself, by a few frames.
    assert_eq!(guest.write(5100), Fault::Mapped(Level::K4));
    assert!(guest.processor_writes(5100));
    guest.table.move_to(RAM, SlotId::new(0), Gfn::new(5010)).unwrap();
    assert!(guest.leaves().is_empty());
    assert_eq!(guest.harvest(), [5110]);
}

fn a_transaction_of_many_changes_is_one_flush<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    for id in 0..8 {
        guest.create(id, u64::from(id) * 1024, 1024, HVA + (u64::from(id) << 22), NONE);
        let _ = guest.write(u64::from(id) * 1024 + 5);
    }
    guest
        .table
        .transaction(|tx| {
            tx.delete(RAM, SlotId::new(1))?;
            tx.move_to(RAM, SlotId::new(2), Gfn::new(1 << 20))?;
            tx.set_read_only(RAM, SlotId::new(5), true)?;
            tx.set_flags(RAM, SlotId::new(6), LOG)
        })
        .unwrap();
    assert_eq!(guest.host.take_flushes().len(), 1);
    let bases: Vec<_> = guest.leaves().iter().map(|(gfn, leaf)| (gfn / 1024, leaf.write)).collect();
    let logged = (6, false);
    assert_eq!(bases, [(0, true), (3, true), (4, true), (5, false), logged, (7, true)]);
}

fn growing_splitting_and_merging_keep_mappings<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2048, HVA, NONE);
    for gfn in [0, 512, 1024, 1536] {
        assert_eq!(guest.write(gfn), Fault::Mapped(Level::M2));
    }
    let before = guest.leaves();
    guest.table.transaction(|tx| tx.resize(RAM, SlotId::new(0), 4096)).unwrap();
    assert_eq!((guest.leaves(), guest.host.take_flushes()), (before.clone(), vec![]), "grown");
    // Along a border of large pages.
    guest.table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(1024), SlotId::new(1))).unwrap();
    assert_eq!((guest.leaves(), guest.host.take_flushes()), (before.clone(), vec![]), "split");
    guest.table.transaction(|tx| tx.merge(RAM, SlotId::new(0), SlotId::new(1))).unwrap();
    assert_eq!((guest.leaves(), guest.host.take_flushes()), (before.clone(), vec![]), "merged");
    // Through one: it goes, as a page must not be in two slots; the others stay.
    guest.table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(600), SlotId::new(1))).unwrap();
    let mut expected = before;
    expected.remove(&512);
    assert_eq!(guest.leaves(), expected);
    assert_eq!(guest.host.take_flushes(), [range(512, 512)]);
    assert_eq!(guest.write(601), Fault::Mapped(Level::K4));
}

fn shrinking_zaps_what_went<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2048, HVA, NONE);
    for gfn in [0, 512, 1024, 1536] {
        assert_eq!(guest.write(gfn), Fault::Mapped(Level::M2));
    }
    guest.table.transaction(|tx| tx.resize(RAM, SlotId::new(0), 1100)).unwrap();
    assert_eq!(guest.leaves().into_keys().collect::<Vec<_>>(), [0, 512]);
    assert_eq!(guest.host.take_flushes().len(), 1);
    assert_eq!(guest.write(1099), Fault::Mapped(Level::K4));
    assert_eq!(guest.write(1100), Fault::Mmio);
}

fn read_only_keeps_mappings_without_writing<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 1024, HVA, NONE);
    guest.create(1, 1024, 1, HVA + (1024 << 12), NONE);
    assert_eq!(guest.write(0), Fault::Mapped(Level::M2));
    assert_eq!(guest.write(1024), Fault::Mapped(Level::K4));
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
    assert_eq!(guest.host.take_flushes(), [range(0, 512)]);
    let leaves = guest.leaves();
    assert!(!leaves[&0].write && leaves[&1024].write);
    assert_eq!(guest.read(0), Fault::AlreadyMapped);
    assert_eq!(guest.write(0), Fault::Mmio);
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), false)).unwrap();
    assert_eq!(guest.leaves(), leaves, "it stays as it is");
    assert_eq!(guest.write(0), Fault::Mapped(Level::M2));
    assert!(guest.leaves()[&0].write);
}

fn logging_starts_and_stops<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::with(Config { largest: Level::M2, dirty, ..Config::default() });
    guest.create(0, 0, 2048, HVA, NONE);
    for gfn in [0, 512, 1024] {
        assert_eq!(guest.write(gfn), Fault::Mapped(Level::M2));
    }
    guest.host.user.set_run(0);
    assert_eq!(guest.write(1600), Fault::Mapped(Level::K4));
    guest.host.user.set_run(20);
    guest.table.set_flags(RAM, SlotId::new(0), LOG).unwrap();
    assert_eq!(guest.host.take_flushes().len(), 1);
    assert_eq!(guest.leaves().len(), 4, "all stay mapped");
    assert_eq!(guest.harvest(), [], "what was written before is not of interest");
    assert!(!guest.processor_writes(5));
    assert_eq!(guest.write(5), Fault::Mapped(Level::K4));
    assert_eq!(guest.write(1030), Fault::Mapped(Level::K4));
    let rest = guest.processor_writes(1600) || guest.write(1600) == Fault::Mapped(Level::K4);
    assert!(rest);
    // Two were split by faults, one by hand.
    assert_eq!(guest.mmu.split(range(512, 1), Level::K4), Ok(1));
    assert_eq!(guest.leaves().len(), 3 * 512 + 1);
    assert_eq!(guest.harvest(), [5, 1030, 1600]);
    guest.table.set_flags(RAM, SlotId::new(0), NONE).unwrap();
    // Those that were split are large again, and writable; the one with holes waits for its next fault.
    let leaves = guest.leaves();
    assert_eq!(leaves.keys().collect::<Vec<_>>(), [&0, &512, &1024]);
    assert!(leaves.values().all(|leaf| leaf.write && leaf.pages == 512));
    assert_eq!(guest.write(1600), Fault::Mapped(Level::M2));
    // A new walker has no tables in its cache.
    guest.vcpu = guest.mmu.walker().unwrap();
    guest.mmu.reclaim();
    assert_eq!(guest.host.user.tables(), usize::from(F::LEVELS) - 1, "no table of small pages is left");
    assert_eq!(guest.harvest(), []);
}

fn logging_starts_for_whole_tables<F: Format>(dirty: DirtyMode) {
    let gib = 1 << 18;
    // Large pages alone, small ones alone, and both.
    for small in [&[] as &[u64], &[0, 1, 2], &[5, 511]] {
        let mut guest = Guest::<F>::with(Config { largest: Level::M2, dirty, ..Config::default() });
        let pages = if small == [0, 1, 2] { 3 * 512 } else { gib };
        guest.create(0, 0, pages, HVA, NONE);
        for &table in small {
            guest.host.user.set_run(0);
            let _ = guest.vcpu.prefault(range(table * 512, 512), usize::MAX).unwrap();
        }
        guest.host.user.set_run(20);
        let _ = guest.vcpu.prefault(range(0, pages), usize::MAX).unwrap();
        let before = guest.leaves();
        for gfn in before.keys().take(3) {
            guest.host.touch(&guest.mmu, *gfn);
        }
        guest.table.set_flags(RAM, SlotId::new(0), LOG).unwrap();
        // Small pages that nobody wrote have no dirty bit to clear.
        let has_large = before.values().any(|leaf| leaf.pages > 1);
        let changes = has_large || dirty == DirtyMode::WriteProtect;
        assert_eq!(guest.host.take_flushes().len(), usize::from(changes));
        assert_eq!(guest.host.stale(&guest.mmu, range(0, pages)), []);
        let after = guest.leaves();
        assert!(
            after.iter().all(|(gfn, leaf)| before[gfn].pfn == leaf.pfn && before[gfn].pages == leaf.pages)
        );
        assert_eq!(after.len(), before.len(), "all stay mapped");
        let by_dirty_bit = |pages| dirty == DirtyMode::Hardware && pages == 1;
        assert!(after.values().all(|leaf| leaf.write == by_dirty_bit(leaf.pages)));
        assert_eq!(guest.harvest(), []);
        for gfn in [3, 600, 1400] {
            if !guest.processor_writes(gfn) {
                assert_eq!(guest.write(gfn), Fault::Mapped(Level::K4));
            }
        }
        assert_eq!(guest.harvest(), [3, 600, 1400]);
    }
}

fn logging_with_all_pages_dirty_at_first_arms_nothing<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.log.set_initially_set(true);
    guest.create(0, 0, 512, HVA, NONE);
    assert_eq!(guest.write(7), Fault::Mapped(Level::M2));
    guest.host.take_flushes();
    guest.table.set_flags(RAM, SlotId::new(0), LOG).unwrap();
    assert_eq!(guest.host.take_flushes(), [], "nothing was taken away");
    assert!(guest.leaves()[&0].write);
    assert_eq!(guest.harvest().len(), 512);
    assert!(!guest.processor_writes(7), "armed with the first harvest");
    assert_eq!(guest.write(7), Fault::Mapped(Level::K4));
    assert!(guest.harvest().contains(&7));
}

type Meanwhile = Box<dyn FnMut() + Send>;

/// Fails to commit, after others have had their turn.
struct Fails(Arc<Mutex<Option<Meanwhile>>>);

impl Listener for Fails {
    fn name(&self) -> &str {
        "fails"
    }
    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        match self.0.lock().unwrap().take() {
            Some(mut meanwhile) => {
                meanwhile();
                Err("no".into())
            }
            None => Ok(()),
        }
    }
    fn undo(&mut self, _: &Update<'_>) {}
}

fn a_failing_listener_takes_everything_back<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    let fails = Arc::new(Mutex::new(None));
    guest.table.add_listener(Box::new(Fails(fails.clone()))).unwrap();
    guest.create(0, 0, 512, HVA, NONE);
    guest.create(1, 512, 512, HVA + (512 << 12), LOG);
    assert_eq!(guest.write(0), Fault::Mapped(Level::M2));
    assert_eq!(guest.write(512), Fault::Mapped(Level::K4));
    // A processor writes while the change is there.
    let mmu = guest.mmu.clone();
    let fail_after = |gfn: u64, is_mapped: bool| {
        let mut walker = mmu.walker().unwrap();
        let work = move || {
            let fault = walker.fault(Gpa::new(gfn << 12), Access::WRITE).unwrap();
            assert_eq!(matches!(fault, Fault::Mapped(_)), is_mapped, "{fault:?}");
        };
        *fails.lock().unwrap() = Some(Box::new(work));
    };
    fail_after(2050, true);
    guest.table.create(spec(2, 2048, 16, HVA + (2048 << 12), NONE)).unwrap_err();
    assert_eq!(guest.leaf_at(2050), None);
    assert_eq!(guest.read(2050), Fault::Mmio);
    fail_after(0, false);
    guest.table.delete(RAM, SlotId::new(0)).unwrap_err();
    assert_eq!(guest.write(0), Fault::Mapped(Level::M2), "zapped, and there again");
    // What was written while it was not logged counts as dirty; what is written now is noticed again.
    fail_after(600, true);
    guest.table.set_flags(RAM, SlotId::new(1), NONE).unwrap_err();
    assert!(guest.harvest().contains(&600));
    assert!(dirty == DirtyMode::Hardware || !guest.processor_writes(600));
    let _ = guest.write(600);
    assert!(guest.processor_writes(600));
    assert_eq!(guest.harvest(), [600]);
    fail_after(0, false);
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap_err();
    assert!(matches!(guest.write(0), Fault::Mapped(_)));
    fail_after(0x1_0000, true);
    guest.table.move_to(RAM, SlotId::new(1), Gfn::new(0x1_0000)).unwrap_err();
    assert_eq!(guest.write(0x1_0000), Fault::Mmio);
    guest.table.delete(RAM, SlotId::new(0)).unwrap();
    assert_eq!(guest.read(0), Fault::Mmio);
}

fn an_empty_tebibyte_is_zapped_at_once<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    let pages = 1 << 28;
    guest.create(0, 0x12345, pages, HVA + (0x12345 << 12), NONE);
    let mut zap = guest.mmu.begin(memslot_mmu::Work::Zap, range(0x12345, pages));
    assert!(!zap.step(20), "a few entries at the top");
    assert_eq!(zap.finish().gfns(), None);
    // One page in it: what it takes is its path.
    assert_eq!(guest.fault(0x12345, Access::WRITE), Fault::Mapped(Level::K4));
    let mut zap = guest.mmu.begin(memslot_mmu::Work::Zap, range(0x12345, pages));
    assert!(!zap.step(20 + 4 * 512));
    zap.finish().discharge();
    assert!(guest.leaves().is_empty());
}

fn faults_follow_the_newest_slots<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    for round in 0..100u64 {
        guest.create(7, 64, 16, HVA + (round << 16), NONE);
        assert_eq!(guest.write(70), Fault::Mapped(Level::K4));
        assert_eq!(guest.leaf_at(70).unwrap().1.pfn, ((HVA + (round << 16)) >> 12) + 6);
        assert_eq!(guest.write(80), Fault::Mmio);
        guest.table.delete(RAM, SlotId::new(7)).unwrap();
        assert_eq!(guest.write(70), Fault::Mmio);
    }
}
