//! What is owed is paid, and then it is owed no longer: an operation that finds nothing to do flushes only for others who
//! have not flushed yet.
#![allow(missing_docs, reason = "tests")]

mod common;

use common::*;
use memslot::{SlotFlags, SlotId};
use memslot_mmu::DirtyMode;
use memslot_mmu::format::Format;

for_every_format! {
    nothing_is_owed_after_a_harvest
    a_harvest_of_pages_that_cannot_be_written_owes_nothing
    what_is_protected_already_owes_nothing
    a_slot_that_becomes_read_only_owes_nothing_for_pages_that_cannot_be_written
}

const NONE: SlotFlags = SlotFlags::empty();
const LOG: SlotFlags = SlotFlags::LOG_DIRTY_PAGES;

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
