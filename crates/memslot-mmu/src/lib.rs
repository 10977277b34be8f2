//! Page tables driven by memory slots: how guest memory is *mapped*.
//!
//! [`memslot`] says what guest memory is; this crate brings it into the tables that a processor walks for a guest
//! (nested page tables, extended page tables, stage 2; or [shadow tables](shadow) made of the guest's own), and keeps them true while
//! slots, memory and the dirty log change.
//!
//! * [`Mmu`] has the tables of one guest. It follows a [`SlotTable`](memslot::SlotTable) as a listener.
//! * [`Walker`] is a virtual processor's own access: [`fault`](Walker::fault) takes no lock and waits for nobody.
//! * [`Operation`]s zap, write-protect and collapse ranges in bounded steps; each owes one [`Flush`].
//! * [`Invalidation`] is memory whose frames change, and [`DirtyRearm`] the page tables' half of the dirty log.
//! * [`format`](mod@format) says how entries are written, [`host`] what is needed of the machine: frames, and the
//!   flush.
//!
//! The protocol that makes all this safe is in [`nested`]. Shadow paging has its own part, [`shadow`], on top of the reverse map
//! ([`rmap`]). Which interleavings are run by a model checker says [`races`].
//!
//! # What it does not do
//!
//! * It does not hold guest memory: what [`Frames`] answers stays right because the host invalidates first.
//! * It does not know processors. Whoever implements [`TlbFlush`] brings all of them to flush, also those that
//!   do not run the guest at the moment.
//! * There are no encrypted or protected guests.
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

mod cache;
mod counted;
mod flush;
pub mod format;
pub mod host;
mod invalidate;
mod level;
#[cfg(all(test, loom))]
mod loom_host;
mod moving;
pub mod nested;
#[doc = include_str!("races.md")]
pub mod races {}
pub mod rmap;
pub mod shadow;
mod sync;
pub mod user;

pub use flush::Flush;
pub use host::{Answer, Context, Frame, Frames, Host, Pfn, TableMemory, TlbFlush};
pub use invalidate::Invalidation;
pub use level::{ENTRIES, Level, PAGE_SHIFT, Table};
pub use nested::fault::{Fault, FaultError};
pub use nested::operation::{Operation, Work};
pub use nested::rearm::DirtyRearm;
pub use nested::walker::{Mapping, Prefaulted};
pub use nested::{AttachError, Config, DirtyMode, Mmu, Stats, TableError, Walker};
