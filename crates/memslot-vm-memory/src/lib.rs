//! rust-vmm's `vm-memory` traits on memslot's versions.

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
