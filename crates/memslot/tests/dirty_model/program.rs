//! Random steps.

use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, SlotFlags, SlotId, SlotSpec, Transaction, TransactionError,
};
use proptest::prelude::*;

pub(crate) const SPACES: u8 = 2;
const SLOTS: u32 = 5;
/// Where things happen: at 0, across two chunks of 32768 pages, across two directories, and far up.
const REGIONS: [u64; 4] = [0, 32768 - 150, (1 << 24) - 150, (1 << 40) - 150];

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Create(SlotSpec),
    Delete(AddressSpaceId, SlotId),
    Move(AddressSpaceId, SlotId, Gfn),
    Flags(AddressSpaceId, SlotId, SlotFlags),
    ReadOnly(AddressSpaceId, SlotId, bool),
    Resize(AddressSpaceId, SlotId, u64),
    Split(AddressSpaceId, SlotId, Gfn, SlotId),
    Merge(AddressSpaceId, SlotId, SlotId),
}

impl Operation {
    /// Whether memory that was logged may be there without logging afterwards.
    pub(crate) fn may_stop_logging(&self) -> bool {
        match self {
            Self::Create(spec) => !spec.flags.contains(SlotFlags::LOG_DIRTY_PAGES),
            Self::Flags(..) => true,
            _ => false,
        }
    }

    pub(crate) fn apply(&self, tx: &mut Transaction<'_>) -> Result<(), TransactionError> {
        match *self {
            Self::Create(spec) => tx.create(spec),
            Self::Delete(space, id) => tx.delete(space, id),
            Self::Move(space, id, to) => tx.move_to(space, id, to),
            Self::Flags(space, id, flags) => tx.set_flags(space, id, flags),
            Self::ReadOnly(space, id, on) => tx.set_read_only(space, id, on),
            Self::Resize(space, id, pages) => tx.resize(space, id, pages),
            Self::Split(space, id, at, new) => tx.split(space, id, at, new),
            Self::Merge(space, low, high) => tx.merge(space, low, high),
        }
    }
}

/// The listener that refuses a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refuser {
    /// One in front of the log, when the change is published and the log has not followed.
    First,
    /// One behind the log, before the change is published.
    Prepare,
    /// One behind the log, when the log has followed.
    Last,
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// `late` is marked when the change is published, before the log has heard of it.
    Change {
        operations: Vec<Operation>,
        refuse: Option<Refuser>,
        late: Option<(u8, u64)>,
    },
    Mark {
        space: u8,
        first: u64,
        pages: u64,
    },
    MarkBytes {
        space: u8,
        gpa: u64,
        bytes: u64,
    },
    Merge {
        space: u8,
        first: u64,
        words: Vec<u64>,
    },
    /// With `touch`, the first page that is re-armed is written again before the flush.
    Harvest {
        consumer: usize,
        range: Option<(u8, u64, u64)>,
        commit: bool,
        fail_at: Option<usize>,
        touch: bool,
    },
    Clear {
        consumer: usize,
        space: u8,
        first: u64,
        mask: Vec<u64>,
        cut: u64,
        fail_at: Option<usize>,
    },
    NewConsumer,
    DropConsumer {
        consumer: usize,
    },
    InitiallySet(bool),
}

fn gfn() -> impl Strategy<Value = u64> {
    (prop_oneof![4 => Just(0usize), 4 => Just(1), 1 => Just(2), 1 => Just(3)], 0u64..400)
        .prop_map(|(region, at)| REGIONS[region] + at)
}

/// Now and then a slot, or a range, that has chunks as a whole.
const LARGE: (u64, u64) = (5 * 32768 - 77, 2 * 32768 + 200);

fn space() -> impl Strategy<Value = AddressSpaceId> {
    prop_oneof![4 => Just(0), 1 => Just(1)].prop_map(AddressSpaceId::new)
}

fn id() -> impl Strategy<Value = SlotId> {
    (0..SLOTS).prop_map(SlotId::new)
}

fn flags() -> impl Strategy<Value = SlotFlags> {
    prop_oneof![6 => Just(1u32), 1 => Just(0), 1 => Just(3)].prop_map(SlotFlags::from_bits_truncate)
}

fn operation() -> impl Strategy<Value = Operation> {
    // Mostly memory of its own for each gfn, so that neighbours can be merged; sometimes an alias.
    let spec = (space(), id(), gfn(), 1u64..200, flags(), prop_oneof![5 => Just(0u64), 1 => 0u64..100]);
    let spec = spec.prop_map(|(address_space, id, base, pages, flags, alias)| SlotSpec {
        address_space,
        id,
        gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
        backing: Backing::Host { hva: Hva::new((1 << 60) + ((base - alias.min(base)) << 12)) },
        flags,
    });
    prop_oneof![
        20 => spec.prop_map(Operation::Create),
        1 => (id(), flags()).prop_map(|(id, flags)| Operation::Create(SlotSpec {
            address_space: AddressSpaceId::NORMAL,
            id,
            gfns: GfnRange::with_len(Gfn::new(LARGE.0), LARGE.1).unwrap(),
            backing: Backing::Host { hva: Hva::new((1 << 60) + (LARGE.0 << 12)) },
            flags,
        })),
        10 => (space(), id()).prop_map(|(space, id)| Operation::Delete(space, id)),
        15 => (space(), id(), gfn()).prop_map(|(space, id, to)| Operation::Move(space, id, Gfn::new(to))),
        10 => (space(), id(), flags()).prop_map(|(space, id, flags)| Operation::Flags(space, id, flags)),
        5 => (space(), id(), any::<bool>()).prop_map(|(space, id, on)| Operation::ReadOnly(space, id, on)),
        10 => (space(), id(), 1u64..250).prop_map(|(space, id, pages)| Operation::Resize(space, id, pages)),
        10 => (space(), id(), gfn(), id()).prop_map(|(space, id, at, new)| Operation::Split(space, id, Gfn::new(at), new)),
        10 => (space(), id(), id()).prop_map(|(space, low, high)| Operation::Merge(space, low, high)),
    ]
}

fn word() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), (0u32..64).prop_map(|bit| 1 << bit)]
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let plain_space = || space().prop_map(AddressSpaceId::get);
    let operations = prop_oneof![
        4 => proptest::collection::vec(operation(), 1),
        1 => proptest::collection::vec(operation(), 2..5),
    ];
    let refuse = prop_oneof![
        12 => Just(None),
        1 => Just(Some(Refuser::First)),
        1 => Just(Some(Refuser::Prepare)),
        2 => Just(Some(Refuser::Last)),
    ];
    let range = proptest::option::of((plain_space(), gfn(), 0u64..500));
    let fail_at = || prop_oneof![6 => Just(None), 1 => (0usize..4).prop_map(Some)];
    prop_oneof![
        8 => (operations, refuse, proptest::option::weighted(0.3, (plain_space(), gfn())))
            .prop_map(|(operations, refuse, late)| Step::Change { operations, refuse, late }),
        1 => (0u64..200, 0u64..1000).prop_map(|(from, less)| Step::Mark {
            space: 0,
            first: LARGE.0 + from,
            pages: LARGE.1 - less,
        }),
        8 => (plain_space(), gfn(), prop_oneof![Just(1u64), 2u64..300])
            .prop_map(|(space, first, pages)| Step::Mark { space, first, pages }),
        1 => (plain_space(), gfn(), proptest::collection::vec(word(), 1..4))
            .prop_map(|(space, first, words)| Step::Merge { space, first, words }),
        1 => (plain_space(), gfn(), 0u64..4096, prop_oneof![0u64..20, 4000u64..4200, 0u64..300_000])
            .prop_map(|(space, gfn, at, bytes)| Step::MarkBytes { space, gpa: gfn << 12 | at, bytes }),
        4 => (any::<usize>(), range, any::<bool>(), fail_at(), any::<bool>()).prop_map(
            |(consumer, range, commit, fail_at, touch)| Step::Harvest { consumer, range, commit, fail_at, touch }
        ),
        3 => (any::<usize>(), plain_space(), gfn(), proptest::collection::vec(word(), 1..4), 0u64..64, fail_at())
            .prop_map(|(consumer, space, first, mask, cut, fail_at)| {
                Step::Clear { consumer, space, first, mask, cut, fail_at }
            }),
        1 => Just(Step::NewConsumer),
        1 => any::<usize>().prop_map(|consumer| Step::DropConsumer { consumer }),
        1 => any::<bool>().prop_map(Step::InitiallySet),
    ]
}
