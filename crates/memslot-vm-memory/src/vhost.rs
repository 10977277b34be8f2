//! Regions as vhost's backends want to hear of them.

use std::os::fd::AsRawFd;

use ::vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress};

/// What a vhost backend is told of a region: vhost has a constructor for vm-memory's own region type only.
///
/// The kernel's vhost wants the addresses, vhost-user also the file that the backend maps: without one
/// ([`HostMemory::with_file_offset`](crate::HostMemory::with_file_offset)) the descriptor is -1, and a backend in another
/// process cannot be given the region.
///
/// # Errors
/// Where the region has no host address.
pub fn region_info<R: GuestMemoryRegion>(region: &R) -> Result<VhostUserMemoryRegionInfo, GuestMemoryError> {
    let host = region.get_host_address(MemoryRegionAddress(0))?;
    let file = region.file_offset();
    Ok(VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: host.expose_provenance() as u64,
        mmap_offset: file.map_or(0, |file| file.start()),
        mmap_handle: file.map_or(-1, |file| file.file().as_raw_fd()),
    })
}

/// All regions of a version, in order of guest address: the argument of `set_mem_table`.
///
/// # Errors
/// As [`region_info`].
pub fn memory_table<M: GuestMemoryBackend>(
    memory: &M,
) -> Result<Vec<VhostUserMemoryRegionInfo>, GuestMemoryError> {
    memory.iter().map(region_info).collect()
}
