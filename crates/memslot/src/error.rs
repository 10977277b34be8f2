//! What can go wrong with a change of the table.

use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;

use crate::addr::{Gfn, GfnRange};
use crate::slot::{AddressSpaceId, Backing, Slot, SlotId};

/// There was no memory; nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("out of memory; nothing was changed")]
pub struct OutOfMemory;

/// A [`Limits`](crate::Limits) that no table can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LimitsError {
    /// The number of address spaces is not in `1..=MAX_ADDRESS_SPACES`.
    #[error("a table has 1 to {max} address spaces, not {asked}")]
    AddressSpaces {
        /// What was asked for.
        asked: u8,
        /// [`MAX_ADDRESS_SPACES`](crate::MAX_ADDRESS_SPACES).
        max: usize,
    },
    /// The number of slots of an address space is beyond `MAX_SLOTS`.
    #[error("an address space has at most {max} slots, not {asked}")]
    Slots {
        /// What was asked for.
        asked: u32,
        /// [`MAX_SLOTS`](crate::MAX_SLOTS).
        max: u32,
    },
    /// The number of pages of a slot is not in `1..=MAX_PAGES_PER_SLOT`.
    #[error("a slot has 1 to {max} pages, not {asked}")]
    PagesPerSlot {
        /// What was asked for.
        asked: u64,
        /// [`MAX_PAGES_PER_SLOT`](crate::MAX_PAGES_PER_SLOT).
        max: u64,
    },
    /// No memory for an empty table.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// Why a transaction did not come to be. Nothing has changed.
#[derive(Debug)]
pub struct TransactionError {
    /// Which operation of the transaction, counted from 0, where it was one.
    pub operation: Option<usize>,
    /// What was wrong.
    pub reason: Reason,
}

impl TransactionError {
    pub(crate) const fn at(operation: usize, reason: Reason) -> Self {
        Self { operation: Some(operation), reason }
    }
}

impl From<Reason> for TransactionError {
    fn from(reason: Reason) -> Self {
        Self { operation: None, reason }
    }
}

impl From<OutOfMemory> for TransactionError {
    fn from(_: OutOfMemory) -> Self {
        Reason::OutOfMemory.into()
    }
}

impl fmt::Display for TransactionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operation {
            Some(operation) => write!(f, "operation {operation}: {}", self.reason),
            None => self.reason.fmt(f),
        }
    }
}

impl core::error::Error for TransactionError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match &self.reason {
            Reason::Listener { error, .. } => Some(&**error),
            _ => None,
        }
    }
}

/// What is wrong with an operation. Slots and ranges are those concerned, as they would have been.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// No memory for a node, a version or a list.
    #[error("out of memory; nothing was changed")]
    OutOfMemory,
    /// The table has no such address space.
    #[error("address space {asked} does not exist: the table has {spaces}")]
    NoSuchAddressSpace {
        /// The address space asked for.
        asked: AddressSpaceId,
        /// How many there are.
        spaces: u8,
    },
    /// The id is not below the table's limit.
    #[error("slot id {id} is not below the limit of {limit}")]
    IdTooHigh {
        /// The id asked for.
        id: SlotId,
        /// [`Limits::slots`](crate::Limits::slots).
        limit: u32,
    },
    /// A slot with this id exists.
    #[error("slot id {} is in use: {by}", by.id())]
    IdInUse {
        /// The slot that has it.
        by: Slot,
    },
    /// No slot has this id.
    #[error("slot {id} of address space {address_space} does not exist")]
    NoSuchSlot {
        /// Where it was looked for.
        address_space: AddressSpaceId,
        /// The id.
        id: SlotId,
    },
    /// A slot has at least one page, and at most as many as the table's limit.
    #[error("slot {id} would have {pages} pages; a slot has 1 to {limit}")]
    BadLength {
        /// The slot.
        id: SlotId,
        /// Its pages.
        pages: u64,
        /// [`Limits::pages_per_slot`](crate::Limits::pages_per_slot).
        limit: u64,
    },
    /// The guest physical addresses of these frames do not fit 64 bits.
    #[error("slot {id} would end at gfn {:#x}, beyond the 64-bit address space", gfns.end())]
    GfnsTooHigh {
        /// The slot.
        id: SlotId,
        /// Its frames.
        gfns: GfnRange,
    },
    /// A slot cannot be moved that far: its frames would not fit 64 bits.
    #[error("slot {id} cannot start at gfn {to}: it would end beyond the 64-bit address space")]
    MovedTooHigh {
        /// The slot.
        id: SlotId,
        /// Where to.
        to: Gfn,
    },
    /// A host address or a file offset is not a multiple of the page size.
    #[error("slot {id}: {backing:?} is not aligned to pages of {page_bytes} bytes")]
    Unaligned {
        /// The slot.
        id: SlotId,
        /// Its backing.
        backing: Backing,
        /// The page size.
        page_bytes: u64,
    },
    /// The backing would end behind the last 64-bit address or offset.
    #[error("slot {id}: {pages} pages from {backing:?} on pass the end of the 64-bit space")]
    BackingWraps {
        /// The slot.
        id: SlotId,
        /// Its backing.
        backing: Backing,
        /// Its pages.
        pages: u64,
    },
    /// Two slots of an address space would cover the same frames.
    #[error("{slot} overlaps {with}")]
    Overlap {
        /// The slot that the operation made.
        slot: Slot,
        /// The slot that is in its way.
        with: Slot,
    },
    /// A slot can only be split at a frame strictly inside of it.
    #[error("{slot} cannot be split at gfn {at}: that is not inside of it")]
    NotInside {
        /// The slot.
        slot: Slot,
        /// Where it was to be split.
        at: Gfn,
    },
    /// Only neighbours can be merged: the second slot must start where the first one ends.
    #[error("{low} and {high} cannot be merged: they are not neighbours")]
    NotNeighbours {
        /// The first slot.
        low: Slot,
        /// The second slot.
        high: Slot,
    },
    /// Only slots with the same flags and one continuous backing can be merged.
    #[error("{low} and {high} cannot be merged: {what} differ")]
    NotAlike {
        /// The first slot.
        low: Slot,
        /// The second slot.
        high: Slot,
        /// What differs.
        what: &'static str,
    },
    /// A listener refused the change while it prepared, or failed while it committed (and was undone).
    #[error("listener {listener} refused: {error}")]
    Listener {
        /// The listener's name; empty where there was no memory for it.
        listener: String,
        /// Its error.
        error: Box<dyn core::error::Error + Send + Sync>,
    },
    /// An earlier operation of the transaction failed, and the caller went on all the same.
    #[error("operation {operation} had failed, so the transaction as a whole fails")]
    FailedBefore {
        /// The operation that failed.
        operation: usize,
    },
}
