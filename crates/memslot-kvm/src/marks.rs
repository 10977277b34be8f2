//! From what the kernel says of its slots to marks in the log of the table.

use memslot::dirty::DirtyLog;
use memslot::{GfnRange, HvaRange, SlotFlags, View};

use crate::kvm_slot::KvmSlot;

/// Where dirty pages of the kernel's slots are marked.
pub(crate) struct Marks<'m> {
    pub(crate) log: &'m DirtyLog,
    /// While a change is taken back: the version that the log has, or will have, and the kernel has not yet. Pages count where
    /// that version has their memory.
    pub(crate) back_to: Option<&'m View>,
}

impl Marks<'_> {
    /// Frames of a slot are dirty.
    pub(crate) fn add(&self, slot: &KvmSlot, gfns: GfnRange) {
        let space = slot.address_space;
        let Some(before) = self.back_to else { return self.log.mark_range(space, gfns) };
        let hva = slot.backing_at(gfns.start()).and_then(|backing| backing.hva());
        let bytes = slot.page_size.bytes_of(gfns.len());
        let Some(hvas) = hva.zip(bytes).and_then(|(hva, bytes)| HvaRange::with_len(hva, bytes)) else {
            return;
        };
        for hit in before.slots_at_hva(space, hvas) {
            if hit.slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) {
                self.log.mark_range(space, hit.gfns);
            }
        }
    }

    /// The pages of a slot whose bits are set are dirty. Returns how many there are; `None` if bits are set that are of no
    /// page.
    pub(crate) fn merge(&self, slot: &KvmSlot, words: &[u64]) -> Option<u64> {
        if self.back_to.is_none() {
            return self.log.merge(slot.address_space, slot.gfns, words).ok();
        }
        let mut pages = 0;
        for (first, word) in (0..).step_by(64).zip(words) {
            let mut word = u64::from_le(*word);
            while word != 0 {
                let gfn = slot.gfns.start().checked_add(first + u64::from(word.trailing_zeros()))?;
                self.add(slot, GfnRange::with_len(gfn, 1).filter(|page| slot.gfns.overlaps(page))?);
                word &= word - 1;
                pages += 1;
            }
        }
        Some(pages)
    }
}
