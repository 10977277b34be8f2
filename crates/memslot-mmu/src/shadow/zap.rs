//! Taking away what is mapped: ranges of frames, memory of the host, everything.
//!
//! Each works in steps, between which others get the lock; what is taken away in all of them is flushed once, at the end.

use memslot::{AddressSpaceId, Gfn, GfnRange, HvaRange, OutOfMemory};

use super::shared::{Locked, Shared, everything};
use super::spte::SpteRef;
use super::{Shadow, ShadowHost};
use crate::flush::Flush;
use crate::format::Format;
use crate::host::Host;
use crate::invalidate::{Covered, ends, range};
use crate::level::{ENTRIES, Level};
use crate::rmap::LEVELS;
use crate::sync::Ordering;

/// At most so many entries, and places without any, are looked at before others get the lock.
const STEP: usize = 1 << 10;

/// At most so many shadow pages.
const PAGES: usize = 8;

/// What is done with the entries that map some frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Task {
    /// They go. (What was writable is marked since then: there is nothing to be said to the dirty log.)
    Zap,
    /// They lose these bits.
    Take(u64),
}

impl<H: ShadowHost> Locked<'_, H> {
    /// Does it to the entries of one level from `at` on, with a budget. Returns where it has stopped.
    fn work_on(&mut self, task: Task, space: AddressSpaceId, level: Level, gfns: GfnRange, at: u64) -> u64 {
        let slots = self.state.slots.clone();
        let (_, end) = ends(gfns);
        let before = self.work.get();
        let step = self.shared.config.hold.clamp(1, STEP);
        let left = |locked: &Self| step.saturating_sub(locked.work.get() - before);
        for rmap in slots.rmaps_in(space, range(at, end)) {
            let mut places = left(self);
            let mut lists = rmap.lists_within(level, range(at, end), places);
            while let Some((gfn, list)) = lists.next() {
                self.worked(places - lists.left());
                places = lists.left();
                if task.zaps() {
                    while let Some(entry) = self.state.writer.entries(list).next() {
                        if !self.work_on_entry(task, (gfn, level), entry) {
                            break;
                        }
                        if left(self) == 0 {
                            return gfn.get().max(at);
                        }
                    }
                } else {
                    // No list is longer than a step.
                    let mut taken = 0;
                    for entry in self.state.writer.entries(list) {
                        taken |= self.take_bits(entry, task.bits());
                    }
                    if taken != 0 {
                        self.owe(range(gfn.get(), gfn.get() + level.pages()));
                    }
                }
                if left(self) == 0 {
                    break;
                }
            }
            self.worked(places - lists.left());
            if let Some(rest) = lists.rest() {
                return rest.get().max(at);
            }
        }
        end
    }

    /// Does it to one entry, which maps this page of guest memory. Returns whether it was there.
    pub(super) fn work_on_entry(&mut self, task: Task, (gfn, level): (Gfn, Level), entry: SpteRef) -> bool {
        let Some(page) = self.page(entry.table()) else { return false };
        if !task.zaps() {
            if self.take_bits(entry, task.bits()) != 0 {
                self.owe(range(gfn.get(), gfn.get() + level.pages()));
            }
            return true;
        }
        let was_present = self.drop_entry(page, entry.index());
        debug_assert!(was_present, "an entry is filed and not present");
        was_present
    }
}

impl<H: ShadowHost> Locked<'_, H> {
    /// Zaps large pages that reach over what is becoming the border of a slot, before this frame. Returns whether there are more than the
    /// budget allows.
    pub(super) fn cut(&mut self, space: AddressSpaceId, border: Gfn, mut budget: usize) -> bool {
        let slots = self.state.slots.clone();
        for level in LEVELS.into_iter().filter(|level| !level.is_aligned(border.get())) {
            let rmap = slots.rmap_at(space, border);
            let Some(list) = rmap.and_then(|rmap| rmap.list(level, border)) else { continue };
            let first = Gfn::new(level.align_down(border.get()));
            while let Some(entry) = self.state.writer.entries(list).next() {
                if budget == 0 {
                    return true;
                }
                budget -= 1;
                if !self.work_on_entry(Task::Zap, (first, level), entry) {
                    break;
                }
            }
        }
        false
    }
}

impl Task {
    pub(super) fn zaps(self) -> bool {
        !matches!(self, Self::Take(_))
    }

    fn bits(self) -> u64 {
        if let Self::Take(bits) = self { bits } else { 0 }
    }
}

impl<H: ShadowHost> Shared<H> {
    /// Does it to all entries that map any of these frames. What that owes is left pending.
    pub(super) fn work_on(&self, task: Task, space: AddressSpaceId, gfns: GfnRange) {
        let (start, end) = ends(gfns);
        self.with(|locked| locked.state.changes.add(space, gfns));
        for level in LEVELS {
            let mut at = start;
            while at < end {
                at = self.with_in_turn(|locked| locked.work_on(task, space, level, gfns, at));
            }
        }
    }

    /// Zaps the large pages that reach over a border, but for those that are made meanwhile.
    pub(super) fn cut(&self, space: AddressSpaceId, border: Gfn) {
        while self.with_in_turn(|locked| locked.cut(space, border, STEP)) {}
    }

    /// What is pending about these frames is flushed.
    pub(super) fn flush(&self, gfns: GfnRange) {
        self.with(|locked| locked.flush_later(gfns));
    }
}

impl<H: ShadowHost> Shadow<H> {
    /// Nothing maps these frames of the address space any more, and no processor has a translation to them, when this returns. One
    /// flush.
    pub fn zap_gfn_range(&self, space: AddressSpaceId, gfns: GfnRange) {
        self.shared.work_on(Task::Zap, space, gfns);
        self.shared.flush(gfns);
    }

    /// As [`zap_gfn_range`](Self::zap_gfn_range), for a guest that has nested tables as well, whose frames were zapped before: what that
    /// owes is paid with it, in one flush if both have the same context.
    ///
    /// ```
    /// # use memslot::*;
    /// # use memslot_mmu::{format::Npt, shadow::{Shadow, ShadowHost}, Host, Mmu};
    /// fn zap<H: ShadowHost, G: Host>(shadow: &Shadow<H>, mmu: &Mmu<Npt, G>, gfns: GfnRange) {
    ///     shadow.zap_gfn_range_with(AddressSpaceId::NORMAL, gfns, mmu.zap(gfns));
    /// }
    /// ```
    pub fn zap_gfn_range_with<F: Format, G: Host>(
        &self,
        space: AddressSpaceId,
        gfns: GfnRange,
        mut nested: Flush<'_, F, G>,
    ) {
        self.shared.work_on(Task::Zap, space, gfns);
        self.shared.with(|locked| {
            locked.flush_later(gfns);
            if locked.must_flush && nested.context() == locked.shared.config.context {
                if let (Some(_), Some(pending)) = (nested.gfns(), locked.state.pending) {
                    nested.widen(pending);
                    nested.discharge();
                    (locked.must_flush, locked.state.pending) = (false, None);
                    return;
                }
            }
            nested.discharge();
        });
    }

    /// Gives up all shadow pages: they are obsolete at once, and taken apart in bounded steps. Virtual processors find their roots
    /// [stale](super::ShadowVcpu::is_stale). One flush or a few.
    pub fn zap_all(&self) {
        self.shared.with(|locked| _ = locked.shared.generation.fetch_add(1, Ordering::SeqCst));
        self.zap_obsolete();
    }

    /// Takes apart what is obsolete, in bounded steps.
    pub(super) fn zap_obsolete(&self) {
        let pages = (self.shared.config.hold / ENTRIES).clamp(1, PAGES);
        while self.shared.with_in_turn(|locked| locked.zap_obsolete(pages)) {}
    }

    /// Begins to invalidate host memory: when this returns, no processor has a translation to it (flushed already),
    /// and until the result is dropped no fault makes one. In all address spaces; aliases are all found.
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing was invalidated.
    pub fn invalidate_hva(&self, hvas: HvaRange) -> Result<ShadowInvalidation<'_, H>, OutOfMemory> {
        let number = self.shared.invalidations.begin(Covered::Hva(hvas))?;
        let invalidation = ShadowInvalidation { shadow: self, number };
        // Taken after the invalidation is listed: a slot that this version lacks is published later, and whoever
        // faults there sees the list.
        let slots = self.shared.with(|locked| locked.state.slots.clone());
        for space in slots.spaces() {
            for hit in slots.view.slots_at_hva(space, hvas) {
                self.shared.work_on(Task::Zap, space, hit.gfns);
            }
        }
        // The first that finds something pending about its frames flushes all.
        for space in slots.spaces() {
            for hit in slots.view.slots_at_hva(space, hvas) {
                self.shared.flush(hit.gfns);
            }
        }
        // What has just lost its slot is found through none, and may be used until it is flushed.
        self.shared.with(|locked| {
            if locked.state.has_left {
                locked.flush_later(everything());
            }
        });
        Ok(invalidation)
    }

    /// How many invalidations are under way.
    #[must_use]
    pub fn invalidations(&self) -> usize {
        self.shared.invalidations.count()
    }
}

/// An invalidation under way: nothing maps what it covers, and nothing will until it is dropped.
#[must_use = "faults retry for as long as this exists: keep it until the memory has changed"]
pub struct ShadowInvalidation<'m, H: ShadowHost> {
    shadow: &'m Shadow<H>,
    number: u64,
}

impl<H: ShadowHost> ShadowInvalidation<'_, H> {
    /// The memory has changed: faults find it as it is now. The same as dropping it.
    pub fn end(self) {}
}

impl<H: ShadowHost> Drop for ShadowInvalidation<'_, H> {
    fn drop(&mut self) {
        self.shadow.shared.invalidations.end(self.number);
    }
}
