//! What the kernel has: its slots, as this crate has programmed them.

use std::collections::BTreeMap;

use memslot::{AddressSpaceId, Gfn, GfnRange, SlotId};

use crate::ids::SlotIds;
use crate::kvm_slot::KvmSlot;
use crate::step::Step;

/// The kernel's slots of one address space. The tree has ids only, so that its nodes are small: the kernel leaves
/// little in the caches.
#[derive(Debug)]
struct Space {
    by_id: Vec<Option<KvmSlot>>,
    ids: SlotIds,
    by_gfn: BTreeMap<Gfn, u16>,
    /// What the tree has not heard of yet, in order.
    untold: Vec<Start>,
}

/// Which slot starts at a frame, before and after a change.
#[derive(Clone, Copy, Debug)]
struct Start {
    gfn: Gfn,
    was: Option<u16>,
    is: Option<u16>,
}

/// So many changes the tree may lag behind. Most changes do not look at it, and to tell it of many at once costs less than
/// of each after the kernel has emptied the caches; all the more as a slot that went often comes back.
const UNTOLD: usize = 256;

impl Space {
    fn slot(&self, id: u16) -> Option<&KvmSlot> {
        self.by_id.get(usize::from(id))?.as_ref()
    }

    fn starts(&mut self, gfn: Gfn, was: Option<u16>, is: Option<u16>) {
        if self.untold.len() >= UNTOLD {
            self.tell();
        }
        self.untold.push(Start { gfn, was, is });
    }

    fn tell(&mut self) {
        // Stable: those of one frame stay in order.
        self.untold.sort_by_key(|start| start.gfn);
        for starts in self.untold.chunk_by(|a, b| a.gfn == b.gfn) {
            let (first, last) = (starts[0], starts[starts.len() - 1]);
            match last.is {
                _ if first.was == last.is => None,
                Some(id) => self.by_gfn.insert(last.gfn, id),
                None => self.by_gfn.remove(&last.gfn),
            };
        }
        self.untold.clear();
    }
}

/// The kernel's slots.
#[derive(Debug)]
pub(crate) struct Programmed {
    spaces: Vec<Space>,
}

impl Programmed {
    pub(crate) fn new(address_spaces: u8, ids: &SlotIds) -> Self {
        let space = |_| Space {
            by_id: Vec::new(),
            ids: ids.clone(),
            by_gfn: BTreeMap::new(),
            untold: Vec::with_capacity(UNTOLD),
        };
        Self { spaces: (0..address_spaces).map(space).collect() }
    }

    fn space(&self, space: AddressSpaceId) -> Option<&Space> {
        self.spaces.get(usize::from(space.get()))
    }

    /// The slots in order of their frames.
    pub(crate) fn in_order(&mut self) -> InOrder<'_> {
        self.spaces.iter_mut().for_each(Space::tell);
        InOrder { spaces: &self.spaces }
    }

    /// How many slots there are.
    pub(crate) fn len(&self) -> usize {
        self.spaces.iter().map(|space| space.by_id.iter().flatten().count()).sum()
    }

    /// The slot with this id.
    pub(crate) fn with_id(&self, space: AddressSpaceId, id: u16) -> Option<&KvmSlot> {
        self.space(space)?.slot(id)
    }

    /// The slot with exactly these frames, of a slot of the table's with this id: mostly they have the same.
    pub(crate) fn exactly(&mut self, space: AddressSpaceId, gfns: GfnRange, id: SlotId) -> Option<&KvmSlot> {
        let space = self.spaces.get_mut(usize::from(space.get()))?;
        let likely = space.ids.range().start.checked_add(id.get()).and_then(|id| u16::try_from(id).ok());
        let is_it = |id: &u16| space.slot(*id).is_some_and(|slot| slot.gfns == gfns);
        let id = match likely.filter(is_it) {
            Some(id) => id,
            None => {
                space.tell();
                *space.by_gfn.get(&gfns.start())?
            }
        };
        space.slot(id).filter(|slot| slot.gfns == gfns)
    }

    /// Where ids of an address space come from.
    pub(crate) fn ids(&mut self, space: AddressSpaceId) -> Option<&mut SlotIds> {
        self.spaces.get_mut(usize::from(space.get())).map(|space| &mut space.ids)
    }

    /// Gives an id back, unless a slot has it.
    pub(crate) fn settle_id(&mut self, space: AddressSpaceId, id: u16) {
        let is_used = self.with_id(space, id).is_some();
        if let Some(ids) = self.ids(space) {
            if is_used {
                ids.take(id.into());
            } else {
                ids.free(id.into());
            }
        }
    }

    /// Does what the kernel does with this step.
    pub(crate) fn apply(&mut self, step: &Step) {
        let slot = step.slot();
        let Some(space) = self.spaces.get_mut(usize::from(slot.address_space.get())) else { return };
        let id = usize::from(slot.id);
        if id >= space.by_id.len() {
            space.by_id.resize(id + 1, None);
        }
        let (old, new) = match step {
            Step::Create(slot) => (None, Some(slot)),
            Step::Delete(slot) => (Some(slot), None),
            Step::Flags { to: slot, .. } => {
                space.by_id[id] = Some(*slot);
                return;
            }
            Step::Move { from, to } => (Some(from), Some(to)),
        };
        space.by_id[id] = new.copied();
        old.into_iter().for_each(|old| space.starts(old.gfns.start(), Some(old.id), None));
        new.into_iter().for_each(|new| space.starts(new.gfns.start(), None, Some(new.id)));
    }
}

/// The kernel's slots in order of their frames.
#[derive(Clone, Copy)]
pub(crate) struct InOrder<'p> {
    spaces: &'p [Space],
}

impl<'p> InOrder<'p> {
    /// All slots, in order of address space and gfn.
    pub(crate) fn all(self) -> impl Iterator<Item = &'p KvmSlot> {
        self.spaces.iter().flat_map(|space| space.by_gfn.values().filter_map(|&id| space.slot(id)))
    }

    /// The slots that cover a frame of `gfns`, in order.
    pub(crate) fn in_range(self, space: AddressSpaceId, gfns: GfnRange) -> impl Iterator<Item = &'p KvmSlot> {
        let space = self.spaces.get(usize::from(space.get())).filter(|_| !gfns.is_empty());
        space.into_iter().flat_map(move |space| {
            // A slot that starts before the range may reach into it.
            let mut found = space.by_gfn.range(..gfns.end()).rev();
            let mut first = gfns.end();
            // Backwards to the first one: mostly there is none, or just one.
            while let Some(slot) = found.next().and_then(|(_, &id)| space.slot(id)) {
                if slot.gfns.end() <= gfns.start() {
                    break;
                }
                first = slot.gfns.start();
            }
            let slots = (first < gfns.end()).then(|| space.by_gfn.range(first..gfns.end()));
            slots.into_iter().flatten().filter_map(|(_, &id)| space.slot(id))
        })
    }
}
