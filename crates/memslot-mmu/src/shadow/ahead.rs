//! Entries ahead of their fault, when the guest flushes.
//!
//! A guest that puts an entry into a table and then flushes is about to use it, more often than not: Linux patches its code through a
//! table of its own, where it maps a page for each single write, between two loads of CR3. The flush compares the table anyway, so it
//! finds the entry, and the fault that would follow can be saved. (Xen makes all of a table's entries anew when it brings the table in sync.)
//!
//! * Of a table with more than a [`GROUP`] of such entries none is made: it was filled, not edited, and faults bring in a group each.
//! * Only what the guest's entry says was accessed, as with the neighbours of a fault: a processor may use such an entry before it is needed, and
//!   the guest must not wonder about the accessed bit.
//! * What is found is a hint, kept as the entry and the guest's entry for it. As in a fault, the host is asked for the frames without the lock,
//!   and everything is looked at again before an entry is made.

use super::ShadowHost;
use super::fault::{GROUP, Neighbour, ask_for_neighbour};
use super::guest::Entry;
use super::page::ShadowPage;
use super::reserve::Reserve;
use super::role::Key;
use super::shared::{Locked, Shared};
use super::slots::Slots;
use super::spte::{self, SpteRef};
use crate::counted::Counted;
use crate::level::Level;

/// Entries of the guest's that a comparison has found, and that nothing is made of yet.
#[derive(Default)]
pub(super) struct Hints {
    all: [Option<(SpteRef, u64)>; GROUP],
    count: usize,
}

impl Hints {
    /// What may be one of them.
    #[inline]
    pub(super) const fn is_one(gpte: u64) -> bool {
        const BOTH: u64 = spte::PRESENT | spte::ACCESSED;
        gpte & BOTH == BOTH
    }

    /// Notes those of one table, unless they are too many.
    pub(super) fn note(&mut self, page: &ShadowPage, found: &[(usize, u64)]) {
        for &(index, gpte) in found {
            let Some(place) = self.all.get_mut(self.count) else { return };
            *place = Some((page.reference(index), gpte));
            self.count += 1;
        }
    }
}

/// What is to be made.
struct Ahead {
    all: [Option<(SpteRef, Key, Neighbour)>; GROUP],
    slots: Counted<Slots>,
    /// The last change when this was found.
    change: u64,
}

/// Makes what the last comparisons have found. It need not succeed.
pub(super) fn make<H: ShadowHost>(shared: &Shared<H>, reserve: &mut Reserve) {
    let Some(mut ahead) = shared.with(|locked| locked.ahead()) else { return };
    if reserve.top_up(shared).is_err() {
        return;
    }
    for (_, _, neighbour) in ahead.all.iter_mut().flatten() {
        ask_for_neighbour(shared, &ahead.slots, neighbour);
    }
    shared.with(|locked| locked.make_ahead(reserve, &ahead));
}

impl<H: ShadowHost> Locked<'_, H> {
    /// Whether a comparison has found something since it was asked for last.
    pub(super) fn has_hints(&self) -> bool {
        self.state.hints.count > 0
    }

    /// What was found, as far as there is memory.
    fn ahead(&mut self) -> Option<Ahead> {
        let hints = core::mem::take(&mut self.state.hints);
        if self.is_invalidating() {
            return None;
        }
        let all = hints.all.map(|hint| {
            let (entry, gpte) = hint?;
            let page =
                self.page(entry.table()).filter(|page| page.level() == Level::K4 && !page.is_direct())?;
            let Entry::Page(frames) = page.paging.entry(Level::K4, gpte) else { return None };
            let (gfn, space) = (frames.start(), page.key.role.address_space);
            let slot = self.slot_at(space, gfn)?;
            let neighbour = Neighbour { index: entry.index(), gpte, gfn, slot, frame: None };
            Some((entry, page.key, neighbour))
        });
        Some(Ahead { all, slots: self.state.slots.clone(), change: self.state.changes.number() })
    }

    fn make_ahead(&mut self, reserve: &mut Reserve, ahead: &Ahead) {
        for (entry, key, neighbour) in ahead.all.iter().flatten() {
            // Another one may have come into its place.
            let page = self.page(entry.table()).filter(|page| page.key == *key && !page.is_zapped());
            if let Some(page) = page {
                self.install_neighbour(reserve, page, neighbour, ahead.change);
            }
        }
    }

    /// What is left over from another flush, nobody has asked for.
    pub(super) fn forget_hints(&mut self) {
        if self.has_hints() {
            self.state.hints = Hints::default();
        }
    }

    /// Whether anything is being taken away at the moment.
    pub(super) fn is_invalidating(&self) -> bool {
        self.shared.invalidations.count() > 0 || !self.state.closed.is_empty()
    }
}
