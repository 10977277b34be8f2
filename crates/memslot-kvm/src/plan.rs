//! Which ioctls bring the kernel's slots in step with a version of the table.
//!
//! The plan is made from what the kernel *has* and what the new version *wants*, frame by frame, and only for the
//! frames that a change touches. It does not compare slots with slots: see the
//! [crate documentation](crate#the-kernels-slots-are-an-implementation-detail).
//!
//! 1. A slot of the kernel's that touches the frames is **kept** if the new version still wants the same memory
//!    behind all of its frames, with the same flags. If all of them want `LOG_DIRTY_PAGES` toggled, its flags change.
//! 2. Otherwise it **goes**.
//! 3. Frames that are wanted and that no kept slot covers get **new** ones.
//! 4. A slot that goes and a new one with the same memory are **one move**, unless the new place overlaps another slot
//!    that goes: then the order of moves would matter, and there is not always one (two slots that swap). Of aliases that
//!    move, each goes where the table moves its own slot: its dirty bits go with it. Therefore a slot that is logged is not moved
//!    where some of its frames keep their memory and their log, as another slot's: their bits stay with them.
//!
//! Slots of the kernel's get smaller this way and never larger. When ids run out, the plan is made once more, and those that
//! could be one with a neighbour go and come again as one.
//!
//! # The order
//!
//! What the kernel is likely to refuse comes before anything is taken away, so that a change that fails shows the guest no
//! gap, not even for the moment until it is undone:
//!
//! 1. creates where no slot of the kernel's is, as far as ids are free without those of the slots that go;
//! 2. logs turned on, then moves (to where nothing is either);
//! 3. deletes;
//! 4. creates where something was (there the vCPUs stand still), and those that need an id that was just given back;
//! 5. logs turned off: the kernel forgets their bits, so nothing of this change may fail after them.
//!
//! So nothing ever overlaps, either.

use memslot::{AddressSpaceId, Backing, Gfn, GfnRange, Hva, MAX_PAGES_PER_SLOT, Slot, SlotFlags, View};

use crate::error::KvmError;
use crate::ids::SlotIds;
use crate::kvm_slot::KvmSlot;
use crate::options::Options;
use crate::programmed::{InOrder, Programmed};
use crate::step::{Place, Step};

/// The ioctls for one change.
#[derive(Default, Debug)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// Frames that have memory before and after are without in between.
    pub(crate) leaves_gap: bool,
    /// A dirty bitmap of the kernel's goes.
    pub(crate) ends_log: bool,
    /// So the vCPUs have to stand still.
    pub(crate) needs_pause: bool,
    /// Ids are taken and given back as if the plan had been carried out already.
    pub(crate) ids_are_ahead: bool,
    going: Vec<KvmSlot>,
    coming: Vec<KvmSlot>,
    flags: Vec<Step>,
    moves: Vec<Step>,
}

/// Sorts ranges and joins those that touch, so that a slot is not cut where two of them meet.
pub(crate) fn join(places: &mut Vec<Place>) {
    places.sort_unstable_by_key(|&(space, gfns)| (space, gfns.start()));
    places.dedup_by(|next, last| {
        let touches = next.0 == last.0 && next.1.start() <= last.1.end();
        if touches {
            let end = last.1.end().max(next.1.end());
            last.1 = GfnRange::new(last.1.start(), end).unwrap_or(last.1);
        }
        touches
    });
}

/// Makes the plan for the frames of `places`. Ids of new slots are taken; [`Plan::settle_ids`] gives back what was not
/// used, before the next plan is made. The plan is empty at first, and its memory is used again.
pub(crate) fn plan(
    programmed: &mut Programmed,
    (before, after): (&View, &View),
    places: &mut Vec<Place>,
    options: &Options,
    plan: &mut Plan,
) -> Result<(), KvmError> {
    join(places);
    let result = fill(programmed, (before, after), places, options, plan, false);
    if matches!(result, Err(KvmError::NoSlots { .. })) {
        plan.clear();
        if fill(programmed, (before, after), places, options, plan, true).is_ok() {
            return Ok(());
        }
    }
    result
}

/// Slots that could be one with a neighbour: what the splits and flags of the past have left behind.
fn parted(programmed: InOrder<'_>, after: &View, options: &Options) -> Vec<KvmSlot> {
    let mut found: Vec<KvmSlot> = Vec::new();
    let mut last: Option<&KvmSlot> = None;
    for slot in programmed.all() {
        if let Some(low) = last.filter(|low| belong_together(low, slot, after, options)) {
            if found.last() != Some(low) {
                found.push(*low);
            }
            found.push(*slot);
        }
        last = Some(slot);
    }
    found
}

fn belong_together(low: &KvmSlot, high: &KvmSlot, after: &View, options: &Options) -> bool {
    let border = high.gfns.start();
    let in_table = |slot: &KvmSlot| after.slot_at(slot.address_space, slot.gfns.start()).map(Slot::id);
    low.address_space == high.address_space
        && low.gfns.end() == border
        && low.backing_at(border) == Some(high.backing)
        && options.max_pages.is_none_or(|most| border.get() % most != 0)
        && in_table(low).is_some_and(|id| in_table(high) == Some(id))
}

/// With `gather`, slots that could be one are made one: ids are short.
fn fill(
    programmed: &mut Programmed,
    (before, after): (&View, &View),
    places: &mut Vec<Place>,
    options: &Options,
    plan: &mut Plan,
    gather: bool,
) -> Result<(), KvmError> {
    let Plan { steps, going, coming, flags, moves, .. } = plan;
    for &(space, gfns) in &*places {
        for slot in programmed.in_order().in_range(space, gfns) {
            match wanted_flags(after, slot) {
                Some(wanted) if wanted == slot.flags => {}
                Some(wanted) => {
                    flags.push(Step::Flags { from: *slot, to: KvmSlot { flags: wanted, ..*slot } });
                }
                // It may reach into the next range.
                None if going.last() != Some(slot) => going.push(*slot),
                None => {}
            }
        }
    }
    flags.dedup();
    if gather {
        going.extend(parted(programmed.in_order(), after, options));
        going.sort_unstable_by_key(key);
        going.dedup();
        flags.retain(|step| going.binary_search_by_key(&key(step.slot()), key).is_err());
    }
    if !going.is_empty() {
        places.extend(going.iter().map(|slot| (slot.address_space, slot.gfns)));
        join(places);
    }
    for &(space, gfns) in &*places {
        bare(programmed.in_order(), going, after, space, gfns, options, coming)?;
    }
    let moved = find_moves(moves, going, coming, (before, after));
    let is_free = |slot: &KvmSlot| first_overlapping(going, slot).is_none();
    // The kernel takes a slot that moves out before it puts it in again.
    let moves_over_itself =
        |step: &Step| matches!(step, Step::Move { from, to } if from.gfns.overlaps(&to.gfns));
    plan.leaves_gap = !coming.iter().all(is_free) || moves.iter().any(moves_over_itself);
    check_ids(programmed, going, &moved, coming)?;
    plan.ids_are_ahead = true;
    coming.retain(|slot| {
        let shares = |going: &KvmSlot| shares_memfd(going, slot);
        let may_be_first = is_free(slot) && (is_host(slot) || !going.iter().any(shares));
        let id = programmed.ids(slot.address_space).filter(|_| may_be_first).and_then(take);
        steps.extend(id.map(|id| Step::Create(KvmSlot { id, ..*slot })));
        id.is_none()
    });
    let is_log_on = |step: &&Step| matches!(step, Step::Flags { to, .. } if to.logs());
    steps.extend(flags.iter().filter(is_log_on));
    steps.append(moves);
    for (slot, _) in going.iter().zip(&moved).filter(|(_, moved)| !**moved) {
        if let Some(ids) = programmed.ids(slot.address_space) {
            ids.free(slot.id.into());
        }
        steps.push(Step::Delete(*slot));
    }
    for slot in &*coming {
        let id = programmed.ids(slot.address_space).and_then(take);
        steps.extend(id.map(|id| Step::Create(KvmSlot { id, ..*slot })));
    }
    steps.extend(flags.iter().filter(|step| !is_log_on(step)));
    plan.ends_log = steps.iter().any(|step| step.drops_bitmap().is_some());
    Ok(())
}

/// The lowest free id.
pub(crate) fn take(ids: &mut SlotIds) -> Option<u16> {
    ids.allocate().and_then(|id| u16::try_from(id).ok())
}

/// Whether there are enough ids in each address space.
fn check_ids(
    programmed: &mut Programmed,
    going: &[KvmSlot],
    moved: &[bool],
    coming: &[KvmSlot],
) -> Result<(), KvmError> {
    // They are in order of address spaces.
    for new in coming.chunk_by(|a, b| a.address_space == b.address_space) {
        let space = new[0].address_space;
        let goes = |(slot, moved): &(&KvmSlot, &bool)| slot.address_space == space && !**moved;
        let freed = going.iter().zip(moved).filter(goes).count();
        let free = programmed.ids(space).map_or(0, |ids| ids.available());
        let available = free.saturating_add(u32::try_from(freed).unwrap_or(u32::MAX));
        let needed = new.len();
        if needed > usize::try_from(available).unwrap_or(usize::MAX) {
            return Err(KvmError::NoSlots { address_space: space.get(), needed, available });
        }
    }
    Ok(())
}

impl Plan {
    /// Forgets all but its memory. Ids are [settled](Self::settle_ids).
    pub(crate) fn clear(&mut self) {
        let Self { steps, leaves_gap, ends_log, needs_pause, ids_are_ahead, going, coming, flags, moves } =
            self;
        (*leaves_gap, *ends_log, *needs_pause, *ids_are_ahead) = (false, false, false, false);
        [going, coming].into_iter().for_each(Vec::clear);
        [steps, flags, moves].into_iter().for_each(Vec::clear);
    }

    /// The kernel has what was planned, so its ids are as they should be.
    pub(crate) fn is_done(&mut self) {
        self.ids_are_ahead = false;
    }

    /// The kernel has what it had before.
    pub(crate) fn is_taken_back(&mut self) {
        self.ids_are_ahead = true;
    }

    /// Makes the ids that the plan is about free or taken, as the kernel has them now.
    pub(crate) fn settle_ids(&mut self, programmed: &mut Programmed) {
        if std::mem::take(&mut self.ids_are_ahead) {
            for step in &self.steps {
                programmed.settle_id(step.slot().address_space, step.slot().id);
            }
        }
    }
}

/// The flags that the version wants for all frames of a slot of the kernel's, if it can stay: the same memory
/// behind all of them, and at most the log is another.
fn wanted_flags(after: &View, slot: &KvmSlot) -> Option<SlotFlags> {
    let mut at = slot.gfns.start();
    let mut flags = None;
    for piece in after.slots_in(slot.address_space, slot.gfns) {
        let skipped = piece.gfns.start().offset_from(piece.slot.base_gfn())?;
        let backing = piece.slot.backing().advanced(slot.page_size.bytes_of(skipped)?)?;
        let alike = flags.replace(piece.slot.flags()).is_none_or(|flags| flags == piece.slot.flags());
        if piece.gfns.start() != at || Some(backing) != slot.backing_at(at) || !alike {
            return None;
        }
        at = piece.gfns.end();
    }
    let only_log =
        |flags: &SlotFlags| (*flags ^ slot.flags).difference(SlotFlags::LOG_DIRTY_PAGES).is_empty();
    flags.filter(only_log).filter(|_| at == slot.gfns.end())
}

/// The slots (still without ids) for those frames that are wanted and that no slot covers which stays.
fn bare(
    programmed: InOrder<'_>,
    going: &[KvmSlot],
    after: &View,
    space: AddressSpaceId,
    gfns: GfnRange,
    options: &Options,
    coming: &mut Vec<KvmSlot>,
) -> Result<(), KvmError> {
    for piece in after.slots_in(space, gfns) {
        let slot = piece.slot;
        if matches!(slot.backing(), Backing::Device { .. }) {
            continue;
        }
        if matches!(slot.backing(), Backing::GuestMemfd { .. }) && !slot.flags().is_empty() {
            return Err(KvmError::GuestMemfdFlags { slot: slot.id().get() });
        }
        let stays = |slot: &&KvmSlot| going.binary_search_by_key(&key(slot), key).is_err();
        let mut from = piece.gfns.start();
        let mut kept = programmed.in_range(space, piece.gfns).filter(stays);
        loop {
            let kept = kept.next();
            let end = kept.map_or(piece.gfns.end(), |kept| kept.gfns.start());
            while from < end {
                let part = cut(from, end, options);
                let skipped = part.start().offset_from(slot.base_gfn());
                let bytes = skipped.and_then(|pages| slot.page_size().bytes_of(pages));
                let Some(backing) = bytes.and_then(|bytes| slot.backing().advanced(bytes)) else { break };
                coming.push(KvmSlot {
                    address_space: space,
                    id: 0,
                    gfns: part,
                    backing,
                    flags: slot.flags(),
                    page_size: slot.page_size(),
                });
                from = part.end();
            }
            match kept {
                Some(kept) => from = kept.gfns.end(),
                None => break,
            }
        }
    }
    Ok(())
}

/// The first slot's worth of a range: up to the next multiple of the largest size.
pub(crate) fn cut(from: Gfn, end: Gfn, options: &Options) -> GfnRange {
    let border = match options.max_pages {
        // Slots of the table have no more pages than the kernel's may have, so only this cuts them.
        Some(most) => (from.get() / most + 1).saturating_mul(most.get()),
        None => from.get().saturating_add(MAX_PAGES_PER_SLOT),
    };
    GfnRange::new(from, end.min(Gfn::new(border))).unwrap_or_default()
}

const fn key(slot: &KvmSlot) -> (AddressSpaceId, Gfn) {
    (slot.address_space, slot.gfns.start())
}

/// The first of the slots (sorted, disjoint) that overlaps another one.
fn first_overlapping(slots: &[KvmSlot], other: &KvmSlot) -> Option<usize> {
    let at = slots.partition_point(|slot| {
        (slot.address_space, slot.gfns.end()) <= (other.address_space, other.gfns.start())
    });
    let found = slots.get(at)?;
    (found.address_space == other.address_space && found.gfns.overlaps(&other.gfns)).then_some(at)
}

const fn is_host(slot: &KvmSlot) -> bool {
    matches!(slot.backing, Backing::Host { .. })
}

/// Whether both have a page of a guest_memfd: the kernel lets no two slots have that, wherever they are.
fn shares_memfd(one: &KvmSlot, other: &KvmSlot) -> bool {
    let range = |slot: &KvmSlot| match slot.backing {
        Backing::GuestMemfd { file, offset, .. } => {
            Some((file, offset, offset.saturating_add(slot.page_size.bytes_of(slot.gfns.len())?)))
        }
        _ => None,
    };
    range(other).zip(range(one)).is_some_and(|((file, start, end), (other_file, other_start, other_end))| {
        file == other_file && start < other_end && other_start < end
    })
}

/// Makes moves of slots that go and slots that come with the same memory; the latter are then no longer among those
/// that come. Returns which ones are moved of those that go.
fn find_moves(
    moves: &mut Vec<Step>,
    going: &[KvmSlot],
    coming: &mut Vec<KvmSlot>,
    (before, after): (&View, &View),
) -> Vec<bool> {
    let mut moved = vec![false; going.len()];
    let memory = |slot: &KvmSlot| match slot.backing {
        Backing::Host { hva } => Some((
            slot.address_space,
            hva,
            slot.gfns.len(),
            slot.flags & SlotFlags::READONLY == SlotFlags::empty(),
        )),
        _ => None,
    };
    let by_memory = |(at, slot)| {
        let memory = memory(slot).filter(|_| !keeps_bits(slot, after))?;
        Some((memory, new_place(slot, before, after), at))
    };
    let mut by_memory: Vec<_> = going.iter().enumerate().filter_map(by_memory).collect();
    by_memory.sort_unstable();
    coming.retain(|to| {
        let Some(memory) = memory(to) else { return true };
        // Aliases have the same memory. The one that the table moves here, or else one whose slot is no more.
        let with_place = |place| {
            let first = by_memory.partition_point(|&(here, at, _)| (here, at) < (memory, place));
            let same =
                by_memory[first..].iter().take_while(move |&&(here, at, _)| (here, at) == (memory, place));
            same.map(|&(.., at)| at)
        };
        let mut found = with_place(Some(to.gfns.start())).chain(with_place(None));
        let Some(at) = found.find(|&at| !moved[at]) else { return true };
        let overlapping = first_overlapping(going, to);
        let only_itself = overlapping.is_none_or(|found| {
            found == at
                && going.get(at + 1).is_none_or(|next| {
                    next.address_space != to.address_space || !next.gfns.overlaps(&to.gfns)
                })
        });
        if only_itself {
            moved[at] = true;
            moves.push(Step::Move { from: going[at], to: KvmSlot { id: going[at].id, ..*to } });
        }
        !only_itself
    });
    moved
}

/// Whether the new version has the memory of some of the slot's frames where it was, and logs it, as another slot's: the
/// kernel would take their dirty bits along with a move.
fn keeps_bits(slot: &KvmSlot, after: &View) -> bool {
    let stays = |piece: memslot::SlotPiece<'_>| {
        let first = piece.gfns.start();
        let bytes =
            first.offset_from(piece.slot.base_gfn()).and_then(|skipped| slot.page_size.bytes_of(skipped));
        let backing = bytes.and_then(|bytes| piece.slot.backing().advanced(bytes));
        piece.slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) && backing == slot.backing_at(first)
    };
    slot.logs() && after.slots_in(slot.address_space, slot.gfns).any(stays)
}

/// Where the table's slot behind a slot of the kernel's has the memory of its first frame now. `None` where that slot is
/// gone, or has other memory.
fn new_place(slot: &KvmSlot, before: &View, after: &View) -> Option<Gfn> {
    let old = before.slot_at(slot.address_space, slot.gfns.start())?;
    let new = after.slot(slot.address_space, old.id());
    let new = new.filter(|new| new.generation() == old.generation())?;
    let bytes = slot.backing.hva()?.get().checked_sub(new.hva().map(Hva::get)?)?;
    let pages = bytes >> slot.page_size.shift();
    (pages < new.pages()).then(|| new.base_gfn().checked_add(pages)).flatten()
}
