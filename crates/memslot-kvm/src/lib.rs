//! The slots of a [`memslot`] table programmed into the real `/dev/kvm`.
//!
//! [`KvmSlots`] is a [`Listener`](memslot::Listener): it follows a [`SlotTable`](memslot::SlotTable) and keeps the
//! memory slots of a VM in step with it. A VMM changes the table, in transactions; the ioctls follow from that.
//!
#![cfg_attr(target_os = "linux", doc = "```no_run")]
#![cfg_attr(not(target_os = "linux"), doc = "```ignore")]
//! use memslot::*;
//! use memslot_kvm::{KvmSlots, NotRunning, Options, Vm};
//!
//! let kvm = kvm_ioctls::Kvm::new()?;
//! let vm = kvm.create_vm()?;
//! let mut table = SlotTable::new(Limits { address_spaces: 1, ..Limits::default() })?;
//! // SAFETY: the slots below stand on memory that is not used for anything else and outlives the VM.
//! let slots = unsafe { KvmSlots::attach(&mut table, Vm::of(&vm)?, NotRunning, Options::default()) }?;
//!
//! let memory = vec![0u8; 3 << 20];
//! let hva = (memory.as_ptr() as u64).next_multiple_of(4096);
//! table.create(SlotSpec {
//!     address_space: AddressSpaceId::NORMAL,
//!     id: SlotId::new(0),
//!     gfns: GfnRange::with_len(Gfn::new(0), 512).unwrap(),
//!     backing: Backing::Host { hva: Hva::new(hva) },
//!     flags: SlotFlags::empty(),
//! })?;
//! // The top half becomes read-only; KVM knows no such change, so it sees a delete and two creates, and the
//! // vCPUs stand still meanwhile.
//! table.transaction(|tx| {
//!     tx.split(AddressSpaceId::NORMAL, SlotId::new(0), Gfn::new(256), SlotId::new(1))?;
//!     tx.set_read_only(AddressSpaceId::NORMAL, SlotId::new(1), true)
//! })?;
//! assert_eq!(slots.slots().len(), 2);
//! # drop(memory);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The kernel's slots are an implementation detail
//!
//! KVM slots cannot be split, merged, grown or made read-only; they can only be deleted and created again, and
//! in between the guest finds nothing there. So this crate does not copy the table slot by slot. It asks of every
//! guest frame only that the kernel puts the same memory there, with the same flags:
//!
//! | change of the table | ioctls |
//! |---|---|
//! | split, merge | none: the kernel's slots cover the same frames with the same memory |
//! | grow, plug a block | one create for what is new |
//! | `LOG_DIRTY_PAGES` on or off | one flags-only call for each slot of the kernel's, if it concerns all of it |
//! | move | one move, where the new place is free of slots that go in the same change |
//! | shrink, read-only, another backing, logging of a part | the slots of the kernel's that it touches are deleted, what is to stay is created again |
//!
//! With [`Options::max_pages`] a large slot is cut into several of the kernel's, at multiples of that size, so that
//! blocks of it come and go (as `virtio-mem` does) without a touch of the rest.
//! Slots of the kernel's that were cut for such a change are joined again only when ids run out: then those that could
//! be one with a neighbour are, in the same change, while the vCPUs stand still. Ids are the lowest free ones
//! ([`SlotIds`]); [`KvmSlots::slots`] lists the slots.
//!
//! # Nothing half-done
//!
//! All ioctls of a transaction are planned when it is prepared: a change that needs more slots than the kernel has
//! is refused before anything happened. They are issued after the new version is published, in an order that
//! never overlaps, what the kernel may refuse first: creates, logs turned on, moves, then deletes, and after them only those
//! creates that need the place, or the id, of what was deleted. When one fails, those before it are undone in reverse order, and
//! the table publishes what it had before. So it does when something panics. Should even that fail (the kernel is out of memory), the frames
//! concerned are remembered and put right with the next change; until then [`KvmSlots::is_in_step`] is false.
//!
//! # Who stands still
//!
//! Where a guest could see the gap between a delete and a create, or where a slot that is logged goes and a write
//! could come between the last look at its dirty bitmap and its end, the ioctls run inside
//! [`Vcpus::while_paused`]. Everything else pauses nobody. What a guest may see of a change without a pause that fails is memory
//! that comes and goes again; and, only if a move fails after another one, or if ids are so short that a new
//! slot has to wait for the id of one that goes, or if another listener fails, memory that is missing for a moment, and then back.
//!
//! # Dirty pages
//!
//! [`KvmSlots::dirty_log`] gives the table a [`DirtyLog`](memslot::dirty::DirtyLog) that the kernel's bits flow into:
//! from its bitmaps, or from its rings. [`KvmSlots::harvest`] fetches them and gives a consumer what it has not
//! seen. Bits outlive every change: before a logged slot of the kernel's goes, its bitmap is fetched.
//!
//! They outlive a change that is taken back, too: pages that were written meanwhile count where the version before has their
//! memory. Only where another thread [fetches](KvmSlots::fetch) in the middle of that, all memory that had moved counts as dirty.
//!
//! # What it does not do
//!
//! Manual protection and rings are the VM's as a whole: with several tables on one VM, use neither.
//!
//! It makes no VM and maps no memory. It does not look at slots that somebody else programs into the same VM:
//! give those ids of their own with [`Options::ids`]. Slots without host memory
//! ([`Backing::Device`](memslot::Backing::Device)) are not programmed: their accesses exit to the VMM as MMIO.

// The names that the text above links to are not there.
#![cfg_attr(not(target_os = "linux"), allow(rustdoc::broken_intra_doc_links))]

#[cfg(target_os = "linux")]
mod dirty;
#[cfg(target_os = "linux")]
mod error;
#[cfg(target_os = "linux")]
mod ids;
#[cfg(target_os = "linux")]
mod kernel;
#[cfg(target_os = "linux")]
mod kvm_slot;
#[cfg(target_os = "linux")]
mod marks;
#[cfg(target_os = "linux")]
mod options;
#[cfg(target_os = "linux")]
mod plan;
#[cfg(target_os = "linux")]
mod programmed;
#[cfg(target_os = "linux")]
mod ring;
#[cfg(target_os = "linux")]
mod single;
#[cfg(target_os = "linux")]
mod slots;
#[cfg(target_os = "linux")]
mod step;
#[cfg(target_os = "linux")]
mod steps;
#[cfg(target_os = "linux")]
mod vm;

#[cfg(target_os = "linux")]
pub use crate::{
    dirty::KvmRearm,
    error::{AttachError, DirtyError, KvmError},
    ids::SlotIds,
    kernel::Kernel,
    kvm_slot::KvmSlot,
    options::{NotRunning, Options, Vcpus},
    slots::KvmSlots,
    vm::Vm,
};
