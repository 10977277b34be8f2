//! What is owed is paid, and then it is owed no longer: an operation that finds nothing to do flushes only for others who
//! have not flushed yet.
#![allow(missing_docs, reason = "tests")]

mod common;

use common::*;
use memslot::SlotFlags;
use memslot_mmu::DirtyMode;
use memslot_mmu::format::Format;

for_every_format! {
    nothing_is_owed_after_a_harvest
}

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
