//! rust-vmm's `vm-memory` traits on memslot's versions.

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

pub use device::{DeviceGuard, DeviceMemory, DeviceSpace};
pub use guard::MemoryGuard;
pub use host::HostMemory;
pub use log::{LogSlice, SlotLog};
pub use memory::Memory;
pub use region::Region;
pub use space::{AttachError, Native, NativeError, Space, Tracking};
