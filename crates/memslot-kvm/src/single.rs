//! The plan for a change of one slot that one slot of the kernel's stands for: one ioctl.
//!
//! Most changes are such, and their plan needs no look at the frames: as long as the kernel is in step, its slots cover
//! exactly those frames that have memory in the version before. So where a slot is created there is nothing, and where one
//! with the same frames is deleted, moved or logged, there is nothing else. Whatever is not so simple is
//! [planned](crate::plan) frame by frame, and comes to the same where both can do it (a test compares them).

use memslot::{Backing, Slot, SlotChange, SlotFlags};

use crate::kvm_slot::KvmSlot;
use crate::options::Options;
use crate::plan::{Plan, cut, take};
use crate::programmed::Programmed;
use crate::step::Step;

/// Adds the step to an empty plan, if there is one that does it all. The kernel is in step with the version before.
pub(crate) fn single(
    programmed: &mut Programmed,
    change: &SlotChange,
    options: &Options,
    plan: &mut Plan,
) -> bool {
    let step = match (&change.old, &change.new) {
        (None, Some(new)) => create(programmed, new, options),
        (Some(old), None) => exactly(programmed, old).map(Step::Delete),
        (Some(old), Some(new)) => {
            exactly(programmed, old).and_then(|from| change_of(from, old, new, options))
        }
        (None, None) => None,
    };
    let Some(step) = step else { return false };
    match &step {
        Step::Move { from, to } => plan.leaves_gap = from.gfns.overlaps(&to.gfns),
        Step::Delete(slot) => {
            if let Some(ids) = programmed.ids(slot.address_space) {
                ids.free(slot.id.into());
            }
        }
        Step::Create(_) | Step::Flags { .. } => {}
    }
    plan.ids_are_ahead = true;
    plan.ends_log = step.drops_bitmap().is_some();
    plan.steps.push(step);
    true
}

fn is_one(slot: &Slot, options: &Options) -> bool {
    let gfns = slot.gfns();
    matches!(slot.backing(), Backing::Host { .. }) && cut(gfns.start(), gfns.end(), options) == gfns
}

fn create(programmed: &mut Programmed, new: &Slot, options: &Options) -> Option<Step> {
    let id = programmed.ids(new.address_space()).filter(|_| is_one(new, options)).and_then(take)?;
    Some(Step::Create(KvmSlot {
        address_space: new.address_space(),
        id,
        gfns: new.gfns(),
        backing: new.backing(),
        flags: new.flags(),
        page_size: new.page_size(),
    }))
}

/// The slot of the kernel's that is all of this slot, and only of it.
fn exactly(programmed: &mut Programmed, old: &Slot) -> Option<KvmSlot> {
    programmed.exactly(old.address_space(), old.gfns(), old.id()).copied()
}

fn change_of(from: KvmSlot, old: &Slot, new: &Slot, options: &Options) -> Option<Step> {
    let to = KvmSlot { gfns: new.gfns(), flags: new.flags(), ..from };
    let only_log = (from.flags ^ to.flags).difference(SlotFlags::LOG_DIRTY_PAGES).is_empty();
    let same = old.backing() == new.backing() && from.gfns.len() == to.gfns.len() && only_log;
    match same && is_one(new, options) {
        true if from.gfns != to.gfns => Some(Step::Move { from, to }),
        true if from.flags != to.flags => Some(Step::Flags { from, to }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use memslot::{
        AddressSpaceId, Gfn, GfnRange, Hva, Limits, Listener, ListenerError, PieceKind, SlotId, SlotSpec,
        SlotTable, Update,
    };

    use super::*;
    use crate::ids::SlotIds;
    use crate::plan::plan;

    /// Plans every change both ways, and follows.
    struct Both {
        programmed: Programmed,
        options: Options,
        general: Plan,
        single: Plan,
        alike: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    }

    impl Listener for Both {
        fn name(&self) -> &str {
            "both"
        }

        fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
            let Self { programmed, options, general, single, alike } = self;
            let mut places = Vec::new();
            places.extend(update.pieces.iter().filter_map(|piece| match piece.kind {
                PieceKind::Changed { old, new } if old.flags() == new.flags() => None,
                _ => Some((piece.address_space, piece.gfns)),
            }));
            if let [change] = update.slots {
                single.clear();
                if super::single(programmed, change, options, single) {
                    single.settle_ids(programmed);
                    general.clear();
                    plan(programmed, (update.before, update.after), &mut places, options, general)?;
                    assert_eq!(single.steps, general.steps);
                    assert_eq!(single.leaves_gap, general.leaves_gap);
                    assert_eq!(single.ends_log, general.ends_log);
                    alike.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    general.settle_ids(programmed);
                }
            }
            general.clear();
            plan(programmed, (update.before, update.after), &mut places, options, general)?;
            general.steps.iter().for_each(|step| programmed.apply(step));
            general.is_done();
            Ok(())
        }

        fn undo(&mut self, _: &Update<'_>) {}
    }

    #[test]
    fn the_same_as_frame_by_frame() {
        const SPACE: AddressSpaceId = AddressSpaceId::NORMAL;
        let alike = std::sync::Arc::default();
        for (mut random, max_pages) in
            memslot_testing::programs(39).zip([None, NonZeroU64::new(8)].into_iter().cycle())
        {
            let mut below = |n| random.below(n);
            let mut table = SlotTable::new(Limits { address_spaces: 1, ..Limits::default() }).unwrap();
            let both = Both {
                programmed: Programmed::new(1, &SlotIds::new(3..500)),
                options: Options { max_pages, ids: None },
                general: Plan::default(),
                single: Plan::default(),
                alike: std::sync::Arc::clone(&alike),
            };
            table.add_listener(Box::new(both)).unwrap();
            for _ in 0..300 {
                let id = SlotId::new(u32::try_from(below(16)).unwrap());
                let flags = SlotFlags::from_bits_truncate(u32::try_from(below(4)).unwrap());
                let (start, pages) = (below(200), 1 + below(10));
                let _ = match (table.view().slot(SPACE, id).copied(), below(6)) {
                    (None, _) => table.create(SlotSpec {
                        address_space: SPACE,
                        id,
                        gfns: GfnRange::with_len(Gfn::new(start), pages).unwrap(),
                        backing: Backing::Host { hva: Hva::new(0x7000_0000_0000 + (start << 12)) },
                        flags,
                    }),
                    (_, 0) => table.delete(SPACE, id),
                    (_, 1) => table.move_to(SPACE, id, Gfn::new(start)),
                    (_, 2) => table.transaction(|tx| tx.resize(SPACE, id, pages)),
                    (Some(slot), 3) => table.transaction(|tx| {
                        let high = SlotId::new(u32::try_from(16 + start).unwrap());
                        tx.split(SPACE, id, Gfn::new(slot.base_gfn().get() + slot.pages() / 2), high)
                    }),
                    _ => table.set_flags(SPACE, id, flags),
                };
            }
        }
        let alike = alike.load(std::sync::atomic::Ordering::Relaxed);
        assert!(alike > 3000, "{alike}");
    }
}
