//! What several test programs share.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test program uses a part of it")]

use memslot::*;
use memslot_testing::Random;

pub const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
pub const PAGE: u64 = 4096;
/// Where the model of the kernel has memory.
pub const MODEL_HVA: u64 = 0x7000_0000_0000;

pub fn gfns(start: u64, len: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(start), len).unwrap()
}

pub fn spec(id: u32, start: u64, pages: u64, hva: u64, flags: SlotFlags) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: gfns(start, pages),
        backing: Backing::Host { hva: Hva::new(hva) },
        flags,
    }
}

/// One random operation: slots of a few pages among `frames` frames, host memory of as many pages from `hva` on,
/// with neighbours in guest and host often, so that there is something to merge and to split.
pub fn random_op(
    tx: &mut Transaction<'_>,
    random: &mut Random,
    ids: u64,
    frames: u64,
    hva: u64,
) -> Result<(), TransactionError> {
    const FLAGS: [SlotFlags; 4] =
        [SlotFlags::empty(), SlotFlags::LOG_DIRTY_PAGES, SlotFlags::READONLY, SlotFlags::all()];
    let id = u32::try_from(random.below(ids)).unwrap();
    let known = tx.slot(RAM, SlotId::new(id)).copied();
    let Some(slot) = known else {
        let pages = 1 + random.below(12);
        let start = random.below(frames - pages);
        // Mostly where the frame is, so that neighbours are neighbours in the host, too.
        let at = if random.once_in(3) { random.below(frames - pages) } else { start };
        let mut flags = random.pick(&FLAGS);
        let mut new = spec(id, start, pages, hva + at * PAGE, flags);
        match random.below(16) {
            0 => new.backing = Backing::Device { token: at << 12 },
            // A file that the model of the kernel has, and the real one has not.
            1 if hva == MODEL_HVA => {
                flags = SlotFlags::empty();
                new.backing =
                    Backing::GuestMemfd { hva: Hva::new(hva + at * PAGE), file: 3, offset: at * PAGE };
            }
            _ => {}
        }
        return tx.create(SlotSpec { flags, ..new });
    };
    let is_memfd = matches!(slot.backing(), Backing::GuestMemfd { .. });
    let new_id = SlotId::new(u32::try_from(random.below(ids)).unwrap());
    match random.below(10) {
        0 | 1 => tx.delete(RAM, slot.id()),
        2 => tx.move_to(RAM, slot.id(), Gfn::new(random.below(frames - slot.pages()))),
        3 | 4 if !is_memfd => tx.set_flags(RAM, slot.id(), random.pick(&FLAGS)),
        5 => tx.resize(RAM, slot.id(), 1 + random.below(12)),
        6 | 7 if slot.pages() > 1 && tx.slot(RAM, new_id).is_none() => {
            let at = slot.base_gfn().get() + 1 + random.below(slot.pages() - 1);
            tx.split(RAM, slot.id(), Gfn::new(at), new_id)
        }
        8 | 9 => {
            let high = (0..ids).map(|id| SlotId::new(u32::try_from(id).unwrap())).find(|&id| {
                tx.slot(RAM, id).is_some_and(|high| {
                    high.base_gfn() == slot.gfns().end()
                        && high.flags() == slot.flags()
                        && slot.backing().advanced(slot.pages() * PAGE) == Some(high.backing())
                })
            });
            high.map_or(Ok(()), |high| tx.merge(RAM, slot.id(), high))
        }
        _ => Ok(()),
    }
}
