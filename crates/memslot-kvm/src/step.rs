//! One change of one of the kernel's slots, before it is an ioctl.

use memslot::{AddressSpaceId, GfnRange};

use crate::kvm_slot::KvmSlot;

/// A range of frames of an address space.
pub(crate) type Place = (AddressSpaceId, GfnRange);

/// One ioctl.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    Delete(KvmSlot),
    Move { from: KvmSlot, to: KvmSlot },
    Flags { from: KvmSlot, to: KvmSlot },
    Create(KvmSlot),
}

impl Step {
    /// The step that takes this one back.
    pub(crate) const fn reversed(self) -> Self {
        match self {
            Self::Delete(slot) => Self::Create(slot),
            Self::Create(slot) => Self::Delete(slot),
            Self::Move { from, to } => Self::Move { from: to, to: from },
            Self::Flags { from, to } => Self::Flags { from: to, to: from },
        }
    }

    /// The frames that it is about.
    pub(crate) fn places(&self) -> impl Iterator<Item = Place> {
        let (one, other) = match self {
            Self::Delete(slot) | Self::Create(slot) => (slot, None),
            Self::Move { from, to } | Self::Flags { from, to } => (from, Some(to)),
        };
        std::iter::once(one).chain(other).map(|slot| (slot.address_space, slot.gfns))
    }

    /// The slot whose dirty bitmap goes with this step. (Where a slot stays and just its flag goes, nobody wants its bits.)
    pub(crate) fn drops_bitmap(&self) -> Option<&KvmSlot> {
        let slot = match self {
            Self::Delete(slot) => slot,
            Self::Move { from, to } if !to.logs() => from,
            _ => return None,
        };
        slot.logs().then_some(slot)
    }

    /// The slot that it is about, as it is before or, for one that is created, after it.
    pub(crate) const fn slot(&self) -> &KvmSlot {
        match self {
            Self::Delete(slot) | Self::Create(slot) => slot,
            Self::Move { from, .. } | Self::Flags { from, .. } => from,
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Delete(slot) => write!(f, "delete {slot}"),
            Self::Create(slot) => write!(f, "create {slot}"),
            Self::Move { from, to } => write!(f, "move {from} to gfn {}", to.gfns.start()),
            Self::Flags { from, to } => write!(f, "set flags {:?} on {from}", to.flags),
        }
    }
}
