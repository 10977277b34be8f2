//! Which pages map something of a slot, so that a slot's change looks at these and at no others.
//!
//! Every page has the [set](SlotSet) of the slots that its leaves are of; a slot is put in before the leaf is, and taken out when all of
//! the slot is zapped. There are two ways to all the entries that map a slot: through the pages that have it, or through the lists of
//! its frames in the reverse map. The first costs a look at 512 entries for each such page, the second one at each frame of which there is a
//! list; the cheaper one is taken. A slot of 1 TiB of which a guest has mapped little is deleted in no time, and so is a small one in
//! a guest with many pages.

use memslot::{AddressSpaceId, OutOfMemory, Slot, SlotId};

use super::ShadowHost;
use super::page::ShadowPage;
use super::reserve::Reserve;
use super::shared::{Locked, Shared};
use super::zap::Task;
use crate::level::ENTRIES;
use crate::rmap::Under;
use crate::sync::Ordering;

/// So many pages are looked through before others get the lock.
const STEP: usize = 64;

impl ShadowPage {
    /// Whether it may map something of the slot.
    fn maps(&self, space: AddressSpaceId, id: SlotId) -> bool {
        self.key.role.address_space == space && self.slots.lock().contains(id)
    }
}

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// The page is about to map something of the slot.
    pub(super) fn note_slot(
        &self,
        reserve: &mut Reserve,
        page: &'g ShadowPage,
        slot: &Slot,
    ) -> Result<(), OutOfMemory> {
        page.slots.lock().insert(slot.id(), &mut reserve.nodes).map(drop)
    }

    /// Nothing of the slot is mapped any more.
    fn forget_slot(&mut self, space: AddressSpaceId, id: SlotId) {
        for page in self.pages().filter(|page| page.key.role.address_space == space) {
            page.slots.lock().remove(id, &mut self.state.nodes);
        }
    }

    /// Whether going through the pages that have the slot is cheaper than going through its frames.
    fn has_few_pages(&self, slot: &Slot) -> bool {
        let (space, id) = (slot.address_space(), slot.id());
        let pages = self.pages().filter(|page| page.maps(space, id)).count();
        (pages * ENTRIES) as u64 <= slot.pages()
    }

    /// Does it to the entries of some pages that have the slot and were not visited yet. Returns whether there are more.
    fn visit_pages(&mut self, task: Task, slot: &Slot, visit: u64) -> bool {
        let (space, id) = (slot.address_space(), slot.id());
        let mut budget = STEP;
        for page in self.pages() {
            if page.visited.load(Ordering::Relaxed) == visit || !page.maps(space, id) {
                continue;
            }
            if budget == 0 {
                return true;
            }
            budget -= 1;
            page.visited.store(visit, Ordering::Relaxed);
            for index in 0..ENTRIES {
                if let Some(Under::Gfn { gfn, level }) = self.filed_for(page, index) {
                    if slot.gfns().contains(gfn) {
                        self.work_on_entry(task, space, (gfn, level), page.reference(index));
                    }
                }
            }
        }
        false
    }
}

impl<H: ShadowHost> Shared<H> {
    /// Does it to all entries that map something of a slot. What that owes is left pending.
    pub(super) fn work_on_slot(&self, task: Task, slot: &Slot) {
        let (space, id) = (slot.address_space(), slot.id());
        let visit = self.with(|locked| {
            locked.state.visits = locked.state.visits.wrapping_add(1).max(1);
            locked.has_few_pages(slot).then_some(locked.state.visits)
        });
        match visit {
            Some(visit) => {
                self.with(|locked| locked.state.changes.add(space, slot.gfns()));
                while self.with(|locked| locked.visit_pages(task, slot, visit)) {}
            }
            None => self.work_on(task, space, slot.gfns()),
        }
        if task.zaps() {
            self.with(|locked| locked.forget_slot(space, id));
        }
    }
}
