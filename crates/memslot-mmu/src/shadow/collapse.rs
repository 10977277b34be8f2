//! Collapsing: where a guest's large page was mapped in small pieces because its slot was logged, it is mapped by one entry again.
//!
//! A guest's large page (or its memory, without paging) is mapped in pieces by *direct* pages. When logging stops, a direct page all of whose
//! leaves are pieces of one large page of the host is given up; the next fault asks the host and makes the large page where the
//! tables led to it. The host is not asked here: it may be waiting for an invalidation. So it is the fault that decides; what is
//! given up in vain costs a few faults.

use core::convert::Infallible;

use memslot::{AddressSpaceId, GfnRange, Slot};

use super::guest::Mode;
use super::page::ShadowPage;
use super::pass::Visit;
use super::shared::{Locked, Shared};
use super::stats::Counter;
use super::{ShadowHost, spte};
use crate::level::{ENTRIES, Level};
use crate::sync::Ordering;

/// So many pages are given up before others get the lock.
const STEP: usize = 16;

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// Whether all that a direct page maps could be one large page, as far as is known without the host.
    fn could_be_large(&self, page: &'g ShadowPage, large: Level) -> bool {
        let (role, gfns) = (&page.key.role, page.direct_gfns());
        // Without paging, no entry is larger than 2 MiB.
        if role.reading.mode == Mode::Off && large > Level::M2 {
            return false;
        }
        let is_tracked = || {
            let size = usize::from(large.get()) - 2;
            self.shared.block(size, page.key.gfn).load(Ordering::SeqCst) > 0
        };
        let allows = |slot: &Slot| slot.gfns().contains_range(&gfns) && !self.shared.is_logged(slot);
        if is_tracked() || !self.state.slots.slot_at(role.address_space, page.key.gfn).is_some_and(allows) {
            return false;
        }
        let level = page.level();
        self.worked(ENTRIES);
        let mut first: Option<u64> = None;
        for index in 0..ENTRIES {
            let entry = self.load(page, index);
            if !spte::is_present(entry) {
                continue;
            }
            let start = spte::pfn(entry).get().wrapping_sub(index as u64 * level.pages());
            if !spte::is_leaf(entry, level) || first.is_some_and(|first| first != start) {
                return false;
            }
            first = Some(start);
        }
        first.is_some_and(|first| large.is_aligned(first))
    }
}

impl<H: ShadowHost> Shared<H> {
    /// Collapses what can be, of these frames, which are the slot's. What that owes is left pending.
    pub(super) fn collapse(&self, space: AddressSpaceId, gfns: GfnRange, slot: &Slot) {
        for (level, large) in [(Level::K4, Level::M2), (Level::M2, Level::G1)] {
            if large > self.config.largest {
                return;
            }
            let mut given_up = 0;
            let between = |_: &mut usize| Ok::<_, Infallible>(());
            let Ok(()) = self.visit_all(&mut given_up, between, |given_up, locked, page| {
                let is_meant = page.is_direct()
                    && page.level() == level
                    && page.roots.load(Ordering::SeqCst) == 0
                    && page.direct_gfns().overlaps(&gfns)
                    && page.maps(space, slot.id());
                if !is_meant || !locked.could_be_large(page, large) {
                    return Visit::Done;
                }
                locked.count(Counter::Collapsed);
                locked.zap_page(page);
                // One flush, when all is done.
                locked.must_flush = false;
                *given_up += 1;
                if *given_up % STEP == 0 { Visit::DoneForNow } else { Visit::Done }
            });
        }
    }
}
