//! The slots as faults look at them: a version of the table, with the reverse map of each slot.
//!
//! The reverse maps of an address space's slots have their lists in common ([`SpaceRmap`]), in all versions. So an entry that is filed
//! through one version is found through every other that has a slot there, and nothing becomes of it when slots are split, merged or
//! resized. A fault may file through the current version only, with the lock held.

use alloc::vec::Vec;

use memslot::{AddressSpaceId, Gfn, GfnRange, OutOfMemory, Slot, Snapshot, View};

use super::spte::SpteRef;
use crate::counted::Counted;
use crate::level::Level;
use crate::rmap::{Rmap, RmapError, SlotRmap, SpaceRmap};

/// How many address spaces a table of slots can have.
const SPACES: usize = 4;

/// A version of the slots. Never changes: a change of the slots puts another one in its place.
pub(super) struct Slots {
    pub(super) view: Snapshot,
    /// The lists of each address space, the same in all versions.
    spaces: [SpaceRmap<SpteRef>; SPACES],
    /// The reverse maps of the slots of each address space, in order of their first frame.
    rmaps: [Vec<Counted<SlotRmap<SpteRef>>>; SPACES],
}

impl Slots {
    /// The reverse maps for the slots of `view`; those of `before` whose frames are the same are used again, also where the
    /// slot has another id now. `snapshot` is what [`Slots::view`] is for the time being.
    pub(super) fn new(
        rmap: &Rmap<SpteRef>,
        view: &View,
        snapshot: Snapshot,
        before: Option<&Self>,
    ) -> Result<Self, OutOfMemory> {
        let out_of_memory = |_: RmapError| OutOfMemory;
        let spaces = match before {
            Some(before) => before.spaces.clone(),
            None => {
                let space = || rmap.space().map_err(out_of_memory);
                [space()?, space()?, space()?, space()?]
            }
        };
        let mut rmaps = [const { Vec::new() }; SPACES];
        for space in view.address_spaces() {
            let number = usize::from(space.get());
            let (Some(list), Some(lists)) = (rmaps.get_mut(number), spaces.get(number)) else { continue };
            list.try_reserve_exact(view.len(space)).map_err(|_| OutOfMemory)?;
            for slot in view.slots(space) {
                let kept = before
                    .and_then(|before| before.rmap_at(space, slot.base_gfn()))
                    .filter(|kept| kept.gfns() == slot.gfns());
                let new = match kept {
                    Some(kept) => kept.clone(),
                    None => Counted::new(lists.slot(slot.gfns(), Level::G1).map_err(out_of_memory)?)?,
                };
                list.push(new);
            }
            list.sort_unstable_by_key(|rmap| rmap.gfns().start());
        }
        Ok(Self { view: snapshot, spaces, rmaps })
    }

    /// The reverse map of the slot that has this frame.
    pub(super) fn rmap_at(&self, space: AddressSpaceId, gfn: Gfn) -> Option<&Counted<SlotRmap<SpteRef>>> {
        let list = self.rmaps.get(usize::from(space.get()))?;
        let after = list.partition_point(|rmap| rmap.gfns().start() <= gfn);
        list.get(after.checked_sub(1)?).filter(|rmap| rmap.gfns().contains(gfn))
    }

    /// The reverse maps of the slots that have any of these frames.
    pub(super) fn rmaps_in(
        &self,
        space: AddressSpaceId,
        gfns: GfnRange,
    ) -> impl Iterator<Item = &SlotRmap<SpteRef>> {
        let list = self.rmaps.get(usize::from(space.get())).map_or(&[][..], |list| &list[..]);
        let first = list.partition_point(|rmap| rmap.gfns().end() <= gfns.start());
        list[first..].iter().take_while(move |rmap| rmap.gfns().start() < gfns.end()).map(|rmap| &**rmap)
    }

    /// The address spaces that there are.
    pub(super) fn spaces(&self) -> impl Iterator<Item = AddressSpaceId> + use<> {
        self.view.address_spaces()
    }

    /// The slot that has this frame.
    pub(super) fn slot_at(&self, space: AddressSpaceId, gfn: Gfn) -> Option<&Slot> {
        self.view.slot_at(space, gfn)
    }
}

/// What has become untrue lately: a fault asks the host without the lock, and then whether its findings still hold.
///
/// Changes are numbered; the last few are kept with the frames they are about. So only what is about the same frames makes a fault
/// start again, and a stream of changes elsewhere does not.
pub(super) struct Changes {
    number: u64,
    last: [(AddressSpaceId, GfnRange); Self::KEPT],
}

impl Changes {
    const KEPT: usize = if cfg!(loom) { 2 } else { 64 };

    pub(super) fn starting_at(number: u64) -> Self {
        Self { number, last: [(AddressSpaceId::NORMAL, GfnRange::default()); Self::KEPT] }
    }

    /// The number of the last change.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    fn place(number: u64) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "a remainder")]
        let place = (number % Self::KEPT as u64) as usize;
        place
    }

    pub(super) fn add(&mut self, space: AddressSpaceId, gfns: GfnRange) {
        self.number = self.number.wrapping_add(1);
        self.last[Self::place(self.number)] = (space, gfns);
    }

    /// Whether something about these frames may have changed after the change with this number.
    pub(super) fn since(&self, number: u64, space: AddressSpaceId, gfns: GfnRange) -> bool {
        let count = self.number.wrapping_sub(number);
        count > Self::KEPT as u64
            || (0..count).any(|back| {
                let (other, changed) = self.last[Self::place(self.number.wrapping_sub(back))];
                other == space && changed.overlaps(&gfns)
            })
    }
}
