//! A slot with host memory, as vm-memory's region.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use memslot::{Slot, SlotFlags};
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

use crate::host::HostMemory;

/// A slot with host memory, in vm-memory's words.
///
/// What every access reads stands in the region itself, two of them in a cache line; the rest is behind a pointer.
#[repr(align(32))]
pub struct Region<B> {
    start: u64,
    len: u64,
    /// The host address; its lowest bit, in which a page's address has nothing, says that the slot is read-only.
    host: *mut u8,
    rest: Arc<Rest<B>>,
}

/// In the host address of a region.
const READ_ONLY: usize = 1;

/// What an access does not need, and the bitmap, which only writes need.
struct Rest<B> {
    bitmap: B,
    slot: Slot,
    file_offset: Option<FileOffset>,
    hugetlbfs: Option<bool>,
    /// Dropped with the last version that has the region.
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: the host address is not used but by the promise of `Native::attach`, which holds on every thread.
unsafe impl<B: Send + Sync> Send for Region<B> {}
// SAFETY: as above; guest memory is accessed as vm-memory does it, volatile and from any thread.
unsafe impl<B: Send + Sync> Sync for Region<B> {}

impl<B> Clone for Region<B> {
    fn clone(&self) -> Self {
        Self { start: self.start, len: self.len, host: self.host, rest: self.rest.clone() }
    }
}

impl<B> Region<B> {
    /// The region of a slot; `None` for a device's, which has no memory.
    pub(crate) fn new(slot: &Slot, memory: HostMemory, bitmap: B) -> Option<Self> {
        let page = slot.page_size();
        let host = usize::try_from(slot.hva()?.get()).ok()?;
        let HostMemory { file_offset, hugetlbfs, keep } = memory;
        let flag = if slot.flags().contains(SlotFlags::READONLY) { READ_ONLY } else { 0 };
        Some(Self {
            start: slot.base_gfn().get() << page.shift(),
            len: page.bytes_of(slot.pages())?,
            // The mapping is the VMM's own; it has exposed its address when it made the slot.
            host: std::ptr::with_exposed_provenance_mut(host | flag),
            rest: Arc::new(Rest { bitmap, slot: *slot, file_offset, hugetlbfs, _keep: keep }),
        })
    }

    /// The slot.
    #[must_use]
    pub fn slot(&self) -> &Slot {
        &self.rest.slot
    }

    /// Whether the guest may not write to it.
    #[inline]
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.host.addr() & READ_ONLY != 0
    }

    /// Where the region begins in the host.
    #[inline]
    fn host(&self) -> *mut u8 {
        self.host.map_addr(|address| address & !READ_ONLY)
    }

    /// The host memory of an address, and how much of it there is, if the address lies in the region.
    #[inline]
    pub(crate) fn host_at(&self, addr: GuestAddress) -> Option<(NonNull<u8>, u64)> {
        let offset = self.offset_of(addr)?.0;
        Some((NonNull::new(self.host().wrapping_add(to_usize(offset)))?, self.len - offset))
    }

    /// Where an address of the region lies in it.
    #[inline]
    pub(crate) fn offset_from_start(&self, addr: GuestAddress) -> MemoryRegionAddress {
        let offset = addr.0.wrapping_sub(self.start);
        debug_assert!(offset < self.len, "{addr:?} is not in {self:?}");
        MemoryRegionAddress(offset)
    }

    /// Where an address lies in the region, if it does.
    #[inline]
    pub(crate) fn offset_of(&self, addr: GuestAddress) -> Option<MemoryRegionAddress> {
        let offset = addr.0.wrapping_sub(self.start);
        (offset < self.len).then_some(MemoryRegionAddress(offset))
    }
}

impl<B: Bitmap> Region<B> {
    /// The bitmap from an offset on.
    #[inline]
    pub(crate) fn bitmap_at(&self, offset: usize) -> BS<'_, B> {
        self.rest.bitmap.slice_at(offset)
    }
}

impl<B: Bitmap> GuestMemoryRegion for Region<B> {
    type B = B;

    #[inline]
    fn len(&self) -> GuestUsize {
        self.len
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, B> {
        self.bitmap_at(0)
    }

    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<MemoryRegionAddress> {
        self.offset_of(addr)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let offset = self.check_address(addr).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.host().wrapping_add(to_usize(offset.0)))
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.rest.file_offset.as_ref()
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, B>>, GuestMemoryError> {
        let end = offset.0.checked_add(count as u64).filter(|&end| end <= self.len);
        end.ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let offset = to_usize(offset.0);
        let bitmap = self.bitmap_at(offset);
        // SAFETY: by the promise of `Native::attach` the slot's host memory, `len` bytes from `host` on, is there as
        // long as a version that has the slot is held, and whoever has `&self` holds one.
        Ok(unsafe { VolatileSlice::with_bitmap(self.host().add(offset), count, bitmap, None) })
    }

    #[cfg(target_os = "linux")]
    fn is_hugetlbfs(&self) -> Option<bool> {
        self.rest.hugetlbfs
    }
}

impl<B: Bitmap> GuestMemoryRegionBytes for Region<B> {}

/// An offset in a slot: hosts have 64 bits here, as vm-memory supports no others.
#[inline]
pub(crate) fn to_usize(offset: u64) -> usize {
    const { assert!(size_of::<usize>() == size_of::<u64>()) };
    #[expect(clippy::cast_possible_truncation, reason = "see the line above")]
    let offset = offset as usize;
    offset
}

impl<B> std::fmt::Debug for Region<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region")
            .field("slot", &self.rest.slot)
            .field("file_offset", &self.rest.file_offset)
            .finish_non_exhaustive()
    }
}
