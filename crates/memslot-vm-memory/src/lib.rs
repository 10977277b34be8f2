//! rust-vmm's [`vm-memory`](vm_memory) traits on memslot's versions.
//!
//! memslot owns the truth about a guest's memory: which slots there are, in transactions, with a dirty log. The crates of
//! rust-vmm reach guest memory through vm-memory's traits. This crate lets them do so, in one of two ways:
//!
//! | | [native](Space) | [bridge](Bridge) |
//! |---|---|---|
//! | what devices hold | [`Space`], or [`DeviceSpace`] | vm-memory's own `GuestMemoryAtomic<GuestMemoryMmap<B>>` |
//! | finding a region | the table's index | binary search |
//! | a commit costs | what it changes | in proportion to all slots |
//! | a guard is | of the very version that the table published | of a map published a moment later |
//! | take it | where code is generic over vm-memory's traits, or names its types in a few aliases | where `GuestMemoryMmap` is everywhere, or a crate takes nothing else (vhost-user-backend) |
//!
//! Start with the bridge: one file of the VMM changes. Both can follow the same table at once, so devices can be moved
//! to the native mode one at a time.
//!
//! # Native
//!
//! ```
//! use memslot::*;
//! use memslot_vm_memory::Native;
//! use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};
//!
//! let ram = AddressSpaceId::NORMAL;
//! let mut table = SlotTable::new(Limits::default())?;
//! // SAFETY: the table has no slots yet; those below stand on memory that stays mapped.
//! let space = unsafe { Native::new(ram).attach(&mut table)? };
//!
//! # let mapping: vm_memory::MmapRegion = vm_memory::MmapRegion::new(0x20_0000)?;
//! # let hva = Hva::new(mapping.as_ptr().expose_provenance() as u64);
//! // 2 MiB at `hva`, which the VMM has mapped.
//! table.create(SlotSpec {
//!     address_space: ram,
//!     id: SlotId::new(0),
//!     gfns: GfnRange::with_len(Gfn::new(0), 512).unwrap(),
//!     backing: Backing::Host { hva },
//!     flags: SlotFlags::empty(),
//! })?;
//!
//! let before = space.memory(); // a guard: owned, `Send`, `Sync`, may be kept for ever
//! before.write_obj(0x1234_5678_u32, GuestAddress(0xf_fffe))?;
//!
//! // The second MiB becomes a slot of its own, and moves.
//! table.transaction(|tx| {
//!     tx.split(ram, SlotId::new(0), Gfn::new(0x100), SlotId::new(1))?;
//!     tx.move_to(ram, SlotId::new(1), Gfn::new(0x1000))
//! })?;
//! assert_eq!(space.memory().read_obj::<u16>(GuestAddress(0x100_0000))?, 0x1234);
//! assert_eq!(before.read_obj::<u32>(GuestAddress(0xf_fffe))?, 0x1234_5678);
//! assert_eq!((before.num_regions(), space.memory().num_regions()), (1, 2));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! * [`Native::with_log`] makes writes mark a [dirty log](memslot::dirty), also those of guards that were taken before
//!   logging began or before memory moved.
//! * [`Space::for_devices`] gives a [`DeviceSpace`]: the same memory as `GuestMemory`, where a write to a read-only
//!   slot fails. Devices should have that one: a guest must not be able to have its ROM overwritten by DMA.
//! * [`Native::describe`] tells of files behind slots, and keeps the owners of mappings.
//! * [`Space::memory_of`] turns a kept [`Snapshot`](memslot::Snapshot) into memory.
//!
//! # How it works
//!
//! A [listener](memslot::Listener) attaches to each version of the table a persistent map from slot id to
//! [`Region`]: a commit copies the chunks of ids that changed and shares the rest. An access asks the version's gfn index
//! for the slot and the map for its region; the largest region is tried before that. Versions and regions are published
//! together in one store, so nobody sees one without the other.
//!
//! A guard holds its version by a reader of its own. Readers of dropped guards wait in a stock of the thread that
//! dropped them, so that taking and cloning a guard touches no cache line that other threads write.
//!
//! # What it does not do
//!
//! * It maps nothing. [`Native::attach`] and [`Bridge::attach`] are `unsafe`, because what slots name is taken for
//!   memory.
//! * vm-memory's [`GuestMemoryBackend`](vm_memory::GuestMemoryBackend) knows no permissions. Through a [`Memory`] or a
//!   bridged map, a read-only slot can be written, and must therefore be mapped writable.
//! * A device's slot has no region; accesses there fail like those to a hole.
//! * A thread that has used a space and then sleeps for ever keeps a few readers in its stock, and with them the
//!   table's last version, after the table has gone: until it uses another space, or ends.
//! * Without a log, `B` is `()`. Bitmaps of a region's own are for the bridge only; in the native mode a region is too
//!   short-lived to own dirty bits.
//! * No `xen`, and 64-bit hosts only, as vm-memory.

#[cfg(all(feature = "backing", target_os = "linux", target_pointer_width = "64"))]
mod backing;
#[cfg(feature = "bridge")]
mod bridge;
mod device;
mod follower;
mod guard;
mod host;
mod log;
mod map;
mod memory;
mod region;
mod space;
mod stock;
#[cfg(feature = "vhost")]
mod vhost;

#[cfg(all(feature = "backing", target_os = "linux", target_pointer_width = "64"))]
pub use backing::backed;
#[cfg(feature = "bridge")]
pub use bridge::{Bridge, BridgeError, Origin};
pub use device::{DeviceGuard, DeviceMemory, DeviceSpace};
pub use guard::MemoryGuard;
pub use host::HostMemory;
#[cfg(feature = "bridge")]
pub use log::BridgedLog;
pub use log::{LogSlice, SlotLog};
pub use memory::Memory;
pub use region::Region;
pub use space::{AttachError, Native, NativeError, Space, Tracking};
#[cfg(feature = "vhost")]
pub use vhost::{memory_table, region_info};

/// Compiles and runs the example of the README.
#[cfg(all(doctest, feature = "bridge"))]
#[doc = include_str!("../README.md")]
struct Readme;
