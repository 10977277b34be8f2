//! Which pages map something of a slot, so that a slot's change looks at these and at no others.
//!
//! Every page has the [set](SlotSet) of the slots that its leaves are of; a slot is put in before the leaf is, and taken out when the
//! slot is gone. There are two ways to all the entries that map a slot: through the pages that have it, or through the lists of
//! its frames in the reverse map. The first costs a look at 512 entries for each such page, the second one at each frame of which there is a
//! list; the cheaper one is taken. A slot of 1 TiB of which a guest has mapped little is deleted in no time, and so is a small one in
//! a guest with many pages.
//!
//! # Slots that take the place of others
//!
//! Where slots are split or merged, leaves stay and get a slot with another id. Before such a change is published it is known here which
//! frames get which id ([`Renamed`]), and from then on, until it has settled, **a leaf of these frames is noted under both ids**: its
//! slot is in the set whichever version of the slots comes to stay. Pages that were there before are looked through once, and those with the
//! old id get the new one, in `prepare`, where memory may run out: a page that has an id too many is looked at in vain, nothing worse.
//! When the change has settled, the ids that no slot has any more are taken out.

use alloc::vec::Vec;
use core::convert::Infallible;

use memslot::{AddressSpaceId, Gfn, GfnRange, OutOfMemory, Slot, SlotId};

use super::ShadowHost;
use super::page::ShadowPage;
use super::pass::Visit;
use super::reserve::Reserve;
use super::shared::{Locked, Shared};
use super::slot_set::SlotSetCache;
use super::zap::Task;
use crate::level::ENTRIES;
use crate::rmap::Under;

/// Frames whose slot has one id before a change and another one after it.
#[derive(Clone, Copy)]
pub(super) struct Renamed {
    pub(super) space: AddressSpaceId,
    pub(super) gfns: GfnRange,
    pub(super) old: SlotId,
    pub(super) new: SlotId,
}

impl ShadowPage {
    /// Whether it may map something of the slot.
    pub(super) fn maps(&self, space: AddressSpaceId, id: SlotId) -> bool {
        self.key.role.address_space == space && self.slots.lock().contains(id)
    }

    /// What it maps of these frames may be another slot's soon.
    fn rename(&self, renamed: &Renamed, nodes: &mut SlotSetCache) -> Result<(), OutOfMemory> {
        if self.maps(renamed.space, renamed.old)
            && (!self.is_direct() || self.direct_gfns().overlaps(&renamed.gfns))
        {
            self.slots.lock().insert(renamed.new, nodes)?;
        }
        Ok(())
    }
}

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// The page is about to map a page of the slot that begins there.
    pub(super) fn note_slot(
        &self,
        reserve: &mut Reserve,
        page: &'g ShadowPage,
        slot: &Slot,
        gfn: Gfn,
    ) -> Result<(), OutOfMemory> {
        let mut slots = page.slots.lock();
        slots.insert(slot.id(), &mut reserve.nodes)?;
        let is_here =
            |renamed: &&Renamed| renamed.space == slot.address_space() && renamed.gfns.contains(gfn);
        if let Some(renamed) = self.state.renamed.iter().find(is_here) {
            // One of them is the one above.
            slots.insert(renamed.old, &mut reserve.nodes)?;
            slots.insert(renamed.new, &mut reserve.nodes)?;
        }
        Ok(())
    }

    /// Does it to all entries of a page that are about the slot.
    fn work_on_page(&mut self, task: Task, slot: &Slot, page: &'g ShadowPage) {
        self.worked(ENTRIES);
        for index in 0..ENTRIES {
            if let Some(Under::Gfn { gfn, level }) = self.filed_for(page, index) {
                if slot.gfns().contains(gfn) {
                    self.work_on_entry(task, (gfn, level), page.reference(index));
                }
            }
        }
    }
}

/// Nothing to do, and nothing that could fail.
fn nothing<C>(_: &mut C) -> Result<(), Infallible> {
    Ok(())
}

/// So many ids were looked for in a page. Whether others are to get the lock.
fn pause(looked: &mut usize, ids: usize) -> Visit {
    const STEP: usize = 1 << 12;
    *looked += ids;
    if *looked < STEP {
        return Visit::Done;
    }
    *looked = 0;
    Visit::DoneForNow
}

impl<H: ShadowHost> Shared<H> {
    /// Frames are about to get slots with other ids.
    pub(super) fn begin_renaming(
        &self,
        mut renamed: Vec<Renamed>,
        nodes: &mut SlotSetCache,
    ) -> Result<(), OutOfMemory> {
        if renamed.is_empty() {
            return Ok(());
        }
        self.with(|locked| core::mem::swap(&mut locked.state.renamed, &mut renamed));
        let mut looked = 0;
        let more = |nodes: &mut SlotSetCache| nodes.top_up(SlotSetCache::CAPACITY);
        let result = self.visit_all(nodes, more, |nodes, locked, page| {
            let renamed = &locked.state.renamed;
            if renamed.iter().try_for_each(|renamed| page.rename(renamed, nodes)).is_err() {
                // There is room for more next time; what was put in stays, so it ends.
                return Visit::Again;
            }
            pause(&mut looked, renamed.len())
        });
        if result.is_err() {
            self.end_renaming();
        }
        result
    }

    /// The change has settled, or was taken back.
    pub(super) fn end_renaming(&self) {
        drop(self.with(|locked| core::mem::take(&mut locked.state.renamed)));
    }

    /// No slot has these ids any more.
    pub(super) fn forget_slots(&self, gone: &(impl Iterator<Item = (AddressSpaceId, SlotId)> + Clone)) {
        let count = gone.clone().count();
        if count == 0 {
            return;
        }
        let Ok(()) = self.visit_all(&mut 0, nothing, |looked, locked, page| {
            let space = page.key.role.address_space;
            let mut slots = page.slots.lock();
            for (_, id) in gone.clone().filter(|(other, _)| *other == space) {
                slots.remove(id, &mut locked.state.nodes);
            }
            pause(looked, count)
        });
    }

    /// Whether going through the pages that have the slot is cheaper than going through its frames.
    fn has_few_pages(&self, slot: &Slot) -> bool {
        let (space, id) = (slot.address_space(), slot.id());
        let most = slot.pages() / ENTRIES as u64;
        if most == 0 || self.with(|locked| locked.state.pages) as u64 <= most {
            return most > 0;
        }
        let (mut count, mut is_over) = (0, false);
        let until_over = |over: &mut bool| if *over { Err(()) } else { Ok(()) };
        let result = self.visit_all(&mut is_over, until_over, |over, _, page| {
            count += u64::from(page.maps(space, id));
            *over = count > most;
            if *over { Visit::DoneForNow } else { Visit::Done }
        });
        result.is_ok()
    }

    /// Does it to all entries that map something of a slot. What that owes is left pending.
    pub(super) fn work_on_slot(&self, task: Task, slot: &Slot) {
        let (space, id) = (slot.address_space(), slot.id());
        if !self.has_few_pages(slot) {
            return self.work_on(task, space, slot.gfns());
        }
        /// So many entries are looked at before others get the lock.
        const STEP: usize = 16 * ENTRIES;
        self.with(|locked| locked.state.changes.add(space, slot.gfns()));
        let mut entries = 0;
        let Ok(()) = self.visit_all(&mut entries, nothing, |entries, locked, page| {
            if !page.maps(space, id) {
                return Visit::Done;
            }
            locked.work_on_page(task, slot, page);
            *entries += ENTRIES;
            if *entries % STEP == 0 { Visit::DoneForNow } else { Visit::Done }
        });
    }
}
