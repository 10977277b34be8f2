//! The host memory behind a guest's memory slots: mapped, aligned, guarded, discarded, and alive as long as anybody can
//! reach it.
//!
//! A slot of a [`SlotTable`](memslot::SlotTable) names host memory by its address and no more. This crate makes that
//! memory ([`Memory`]) and lets the table's versions keep it alive ([`Backings`]).
//!
//! ```
//! use std::sync::Arc;
//! use memslot::*;
//! use memslot_backing::{Backings, Memory};
//!
//! let mut table = SlotTable::new(Limits::default())?;
//! let backings = Backings::attach(&mut table)?;
//!
//! // 64 MiB of RAM from guest address 0 on, with a hole at 640 KiB: two slots on one memory.
//! let ram = Arc::new(Memory::anonymous(64 << 20).huge_pages(true).map()?);
//! backings.adopt(&ram);
//! table.transaction(|tx| {
//!     tx.create(backings.spec(SlotId::new(0), Gfn::new(0), &ram, ..0xa_0000).unwrap())?;
//!     tx.create(backings.spec(SlotId::new(1), Gfn::new(0x100), &ram, 0x10_0000..).unwrap())
//! })?;
//! drop(ram); // The table has it now.
//!
//! // The guest's balloon gives up 1 MiB.
//! let space = AddressSpaceId::NORMAL;
//! let given_up = GfnRange::with_len(Gfn::new(0x800), 256).unwrap();
//! assert_eq!(backings.discard(table.view(), space, given_up)?, 1 << 20);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Which kind of memory
//!
//! | | for | other processes | huge pages | a discard gives back |
//! |---|---|---|---|---|
//! | [`anonymous`](Memory::anonymous) | most guests | no | transparent | the pages |
//! | [`memfd`](Memory::memfd) | vhost-user, handing the memory to another process | yes | transparent, if the host's `shmem_enabled` says so | the pages, for all who have it mapped |
//! | [`huge`](Memory::huge) | steady speed; the host must set pages aside | yes | always, of one size | whole huge pages |
//! | [`file`](Memory::file), shared | memory that outlives the process | yes | of a hugetlbfs, or what the file system has | the pages and the file's blocks |
//! | [`file`](Memory::file), private | a guest that starts from a snapshot's file and leaves it as it is | no | no | the process's copies |
//! | [`GuestMemfd`] | memory that the host cannot read: confidential guests | no | no | the pages |
//!
//! After [`Memory::discard`] the bytes are zero in every kind; how, and at what price, is in its documentation.
//!
//! # How long memory lives
//!
//! A [`Memory`] is unmapped when its last `Arc` is dropped. [`Backings`] see to it that each version of the table has an
//! `Arc` of every memory that its slots stand on. So memory is unmapped when all of this is true:
//!
//! * the caller has dropped its own `Arc`s;
//! * no slot of the current version stands on it;
//! * no snapshot, guard or pin of a version with a slot on it is left;
//! * the table has looked: it lets go of versions that nobody holds every 16 generations, and in
//!   [`SlotTable::reclaim`](memslot::SlotTable::reclaim). After an unplug call that, to have the memory unmapped at once.
//!
//! A snapshot that is held for ever keeps its own memories and no others. To get the *pages* back no matter who holds
//! what, discard them: then holders of old versions read zeroes there. To see whether a memory is gone, keep
//! a [`Weak`](std::sync::Weak) of it.
//!
//! Large memory takes a while to unmap (about a tenth of a second for a GiB of small pages). It is done by whoever lets
//! go last: a thread that drops its own `Arc`, or the table's writer when it reclaims; never by a reader that leaves
//! a pin or drops a snapshot, except where the table is gone already.
//!
//! With [`Foreign::Refuse`], which is the rule, the listener refuses every slot whose host addresses do not all lie in
//! one adopted memory. Then whoever holds a version knows that each address which that version translates to is mapped,
//! readable and writable, as long as it is held.
//!
//! # What an update pays
//!
//! The sets of memories are persistent trees that neighbouring versions share. A change pays for the slots that it
//! touches: for a slot that comes, a search by address in the set; for one that goes, a search in the table's index by
//! host address. When a memory gets its first slot or loses its last one, a path of the tree is copied: some
//! `2 log2(memories)` nodes of 40 bytes. Changes that bring no memory in and let none go allocate nothing. On a guest with
//! two processors, creating or deleting a slot took 0.2 to 1.2 µs more than without backings, at 1 to 4096 memories.
//!
//! # Huge pages and congruence
//!
//! A guest's page of 2 MiB can be one entry in the second-stage page table only if it lies in one huge page of the host,
//! that is, if guest and host addresses agree modulo 2 MiB. Memory is mapped at a multiple of 2 MiB; for guest memory
//! that begins elsewhere, or for pages of 1 GiB, say so: [`MemoryBuilder::congruent_to`],
//! [`MemoryBuilder::alignment`].
//!
//! # What this does not do
//!
//! * It places nothing on NUMA nodes: bind [`Memory::hvas`] (`mbind(2)`), then [`Memory::prefault`].
//! * It does not watch files: a file that somebody makes shorter is a `SIGBUS` at the next access. (Memfds are sealed.)
//! * It does not notice what other code maps over or unmaps from a memory's addresses.
//! * It reads and writes nothing: that is for the crates that know how, through [`Memory::as_ptr`].
//! * It does not convert between shared and private memory (`KVM_SET_MEMORY_ATTRIBUTES`); it discards either half.
//! * Allocations of its own that fail abort the process, as usual with the standard library.
//!
//! On anything but 64-bit Linux this crate is empty.

#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod backings;
mod builder;
mod discard;
mod error;
mod guest_memfd;
mod huge;
mod mapping;
mod memory;

pub use backings::{Backings, Foreign};
pub use builder::{MemoryBuilder, Sharing};
pub use error::{AttachError, DiscardError, MemoryError, StandingError};
pub use guest_memfd::{GuestMemfd, GuestMemfdError, GuestMemfdFlags};
pub use huge::HugePage;
pub use memory::{Memory, MemoryKind};
