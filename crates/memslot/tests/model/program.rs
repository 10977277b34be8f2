//! Random operations: mostly sensible ones, near each other, with every edge now and then.

use memslot::{AddressSpaceId, Backing, Gfn, Hva, PageSize, SlotFlags, SlotId, SlotSpec};
use memslot_testing::Random;

use crate::naive::{Known, Model, Op, range};

const FLAGS: [SlotFlags; 4] =
    [SlotFlags::empty(), SlotFlags::LOG_DIRTY_PAGES, SlotFlags::READONLY, SlotFlags::all()];

fn id(random: &mut Random, ids: u64) -> u32 {
    let id = match random.below(40) {
        0 => random.below(5_000_000),
        1 => random.pick(&[3_999_999, 4_000_000, u64::from(u32::MAX), 1 << 28]),
        _ => random.below(ids),
    };
    u32::try_from(id).unwrap()
}

/// A first frame; `near` is a slot that exists, whose neighbour it may become.
fn base(random: &mut Random, page: PageSize, near: Option<&Known>, ids: u64) -> u64 {
    let gfns = 1 << (64 - page.shift());
    match (random.below(32), near) {
        (0, _) => gfns - random.below(30),
        (1, _) => random.below(gfns),
        (2, _) => random.below(1 << 33),
        (3, _) => (random.next() >> random.below(64)).min(gfns),
        (4..8, Some(near)) => near.start() + near.pages(),
        (8, Some(near)) => near.start() + random.below(40),
        (9..11, _) => 0,
        _ => random.below(ids * 12),
    }
}

fn pages(random: &mut Random) -> u64 {
    match random.below(40) {
        0 => (1 << 31) - random.below(3),
        1 => random.below(1 << 28),
        2 => 0,
        3..6 => random.below(200),
        _ => 1 + random.below(12),
    }
}

fn backing(random: &mut Random, page: PageSize, near: Option<&Known>, ids: u64) -> Backing {
    let page = page.bytes();
    let follows = near.and_then(|near| near.spec.backing.advanced(near.pages() * page));
    if let Some(follows) = follows.filter(|_| random.once_in(4)) {
        return follows;
    }
    let hva = Hva::new(match random.below(14) {
        0 => 0u64.wrapping_sub((1 + random.below(50)) * page),
        1 => 0x5555_0000_0000 + random.below(1 << 30) * page,
        2 => (random.next() >> random.below(64)) & !(page - 1),
        3 => 0x7f00_0000_0000 + 1 + random.below(page - 1),
        // Few addresses: many aliases.
        4..6 => 0x7f00_0000_0000 + random.below(4) * page,
        _ => 0x7f00_0000_0000 + random.below(ids * 12) * page,
    });
    match random.below(10) {
        0 => Backing::Device { token: random.next() >> random.below(4) },
        1 => Backing::GuestMemfd { hva, file: 7, offset: random.below(99) * page + random.below(30) / 29 },
        _ => Backing::Host { hva },
    }
}

/// A random operation on a map of about `ids` slots.
pub fn random_op(random: &mut Random, model: &Model, ids: u64) -> Op {
    let page = model.limits.page_size;
    let space = u8::try_from(random.below(8) / 7).unwrap();
    let id = id(random, ids);
    let found = model.slots.range((space, id)..).next();
    let ((s, i), slot) = found.map_or(((space, id), None), |(&key, slot)| (key, Some(slot)));
    let base = base(random, page, slot, ids);
    match random.below(16) {
        0..6 => Op::Create(SlotSpec {
            address_space: AddressSpaceId::new(if random.once_in(50) { 9 } else { space }),
            id: SlotId::new(id),
            gfns: range(base, pages(random)).unwrap(),
            backing: backing(random, page, slot, ids),
            flags: random.pick(&FLAGS),
        }),
        6..9 => Op::Delete(s, if random.once_in(20) { id } else { i }),
        9 => Op::Move(s, i, if random.once_in(30) { u64::MAX - random.below(9) } else { base }),
        10 => Op::Flags(s, i, random.pick(&FLAGS)),
        11 => Op::ReadOnly(s, i, random.once_in(2)),
        12 => Op::Resize(s, i, pages(random)),
        13 | 14 => {
            let at = slot.map_or(base, |slot| slot.start() + random.below(slot.pages() + 1));
            Op::Split(s, i, at, id)
        }
        _ => {
            let end = slot.map_or(Gfn::new(0), |slot| slot.spec.gfns.end());
            let next =
                model.slots.range((s, 0)..=(s, u32::MAX)).find(|(_, next)| next.spec.gfns.start() == end);
            Op::Merge(s, i, next.map_or(id, |(key, _)| key.1))
        }
    }
}
