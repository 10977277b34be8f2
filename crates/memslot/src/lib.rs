//! KVM's guest-memory core: memory slots with lock-free readers, transactions, the dirty log, and KVM's own rules.
//!
//! A hypervisor must answer, millions of times a second and while other threads change the answer: *which memory
//! backs this guest page, and may it be written?* In Linux that is the job of KVM's memory slots. This crate is
//! that machinery as a library, for VMMs in user space and, without the standard library, for hypervisors and
//! kernels.
//!
//! * [`SlotTable`] owns the slots and changes them, singly or many in one [`Transaction`].
//! * [`Reader`], [`Pinned`] and [`Snapshot`] look things up without a lock: [`View`] has every lookup.
//! * [`Listener`]s follow every change exactly: page tables, `/dev/kvm`, VFIO, vhost.
//! * [`dirty`] is the log of pages that were written, for many consumers, and the dirty ring.
//! * [`rules`] is the front end with KVM's arguments, order of checks and errnos.
//!
//! The library depends on an allocator and on nothing else; it knows no thread, no libc and no KVM header.
//!
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

/// Compiles and runs the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

pub mod addr;
pub mod dirty;
mod error;
pub mod listener;
mod prefetch;
pub mod rules;
pub mod slot;
mod sync;
pub mod table;

pub use addr::{Gfn, GfnRange, Gpa, GpaRange, Hva, HvaRange, PageSize};
pub use error::{LimitsError, OutOfMemory, Reason, TransactionError};
pub use listener::{Listener, ListenerError, Piece, PieceKind, SlotChange, Update};
pub use slot::{AddressSpaceId, Backing, MAX_PAGES_PER_SLOT, MAX_SLOTS, Slot, SlotFlags, SlotId, SlotSpec};
pub use table::{
    AttachmentKey, Guard, Handle, Holder, HvaHit, Limits, MAX_ADDRESS_SPACES, MAX_ATTACHMENTS, Pinned,
    Reader, SlotPiece, SlotTable, Snapshot, Stats, Transaction, Translation, View,
};
