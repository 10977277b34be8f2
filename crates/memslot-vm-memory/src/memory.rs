//! One version of an address space, as vm-memory's memory.

use std::ptr::NonNull;

use memslot::{AddressSpaceId, Gpa, SlotFlags, View};
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use crate::map::Map;
use crate::region::{Region, to_usize};
use crate::space::Tracking;

/// One version of an address space: vm-memory's [`GuestMemoryBackend`], and with it `GuestMemory` and
/// `Bytes<GuestAddress>`. A [`MemoryGuard`](crate::MemoryGuard) has one.
///
/// Its regions are the slots with host memory, in order of guest address. A device's slot is a hole. A read-only slot is
/// a region like any other, see [`DeviceMemory`](crate::DeviceMemory).
pub struct Memory<B> {
    view: NonNull<View>,
    map: NonNull<Map<B>>,
}

// SAFETY: both pointers are to what is shared by reference.
unsafe impl<B: Send + Sync> Send for Memory<B> {}
// SAFETY: as above.
unsafe impl<B: Send + Sync> Sync for Memory<B> {}

impl<B> Memory<B> {
    /// The memory that `view` says, with the regions that it carries.
    ///
    /// # Safety
    /// The view is held as long as the result is there, and `map` is one of its attachments.
    pub(crate) unsafe fn new(view: &View, map: &Map<B>) -> Self {
        Self { view: NonNull::from(view), map: NonNull::from(map) }
    }

    /// The same memory, for somebody else who holds the view.
    pub(crate) fn again(&self) -> Self {
        Self { view: self.view, map: self.map }
    }

    /// The version of the table.
    #[inline]
    #[must_use]
    pub fn view(&self) -> &View {
        // SAFETY: the promise of `new`.
        unsafe { self.view.as_ref() }
    }

    /// The address space whose slots are the regions.
    #[must_use]
    pub fn address_space(&self) -> AddressSpaceId {
        self.map().space
    }

    #[inline]
    fn map(&self) -> &Map<B> {
        // SAFETY: the promise of `new`.
        unsafe { self.map.as_ref() }
    }

    /// The region of an address, and where in it the address lies.
    ///
    /// Not inlined, and its result is in two registers: vm-memory's iterator of slices, which asks for it, is then small
    /// enough to be inlined into `read_obj` and its kind. Otherwise it hands slices over in memory, piece by piece, and
    /// what takes them waits for that longer than the whole lookup lasts.
    #[inline(never)]
    fn locate(&self, addr: GuestAddress) -> Option<(&Region<B>, MemoryRegionAddress)> {
        if let Some(region) = self.map().main() {
            if let Some(offset) = region.offset_of(addr) {
                return Some((region, offset));
            }
        }
        let found = self.view().translate(self.map().space, Gpa::new(addr.0))?;
        let region = self.map().get(found.slot)?;
        // The region is of the slot that was found, so the address lies in it. Not asking again keeps the region's length
        // out of the way to the memory; `Region::get_slice` asks.
        Some((region, region.offset_from_start(addr)))
    }

    /// The host memory of an address, how many bytes of it there are in the slot, and in the highest bit of that whether
    /// the slot is read-only.
    ///
    /// As [`locate`](Self::locate), for those who do not need the region, and not inlined for the same reason.
    #[inline(never)]
    fn host_at(&self, addr: GuestAddress) -> Option<(NonNull<u8>, u64)> {
        let flagged = |left, read_only: bool| left | u64::from(read_only) << READ_ONLY_AT;
        if let Some(region) = self.map().main() {
            if let Some((host, left)) = region.host_at(addr) {
                return Some((host, flagged(left, region.is_read_only())));
            }
        }
        let found = self.view().translate(self.map().space, Gpa::new(addr.0))?;
        let host = NonNull::new(std::ptr::with_exposed_provenance_mut(to_usize(found.hva.get())))?;
        Some((host, flagged(found.bytes_left, found.flags.contains(SlotFlags::READONLY))))
    }
}

/// The bit of a number of bytes that says that they are read-only; a slot has fewer.
const READ_ONLY_AT: u32 = 63;

impl<B: Tracking> Memory<B> {
    /// The memory at an address up to `count` bytes or the end of the slot, and whether the slot is read-only.
    #[inline]
    pub(crate) fn slice(
        &self,
        addr: GuestAddress,
        count: usize,
    ) -> Option<(VolatileSlice<'_, BS<'_, B>>, bool)> {
        if let Some(untracked) = B::untracked(self) {
            let (host, left) = self.host_at(addr)?;
            let here = count.min(to_usize(left & !(1 << READ_ONLY_AT)));
            // SAFETY: as in `Region::get_slice`: the slot has `left` bytes of host memory from here on.
            let slice = unsafe { VolatileSlice::with_bitmap(host.as_ptr(), here, untracked, None) };
            return Some((slice, left >> READ_ONLY_AT != 0));
        }
        let (region, offset) = self.locate(addr)?;
        let left = to_usize(region.len() - offset.0);
        Some((region.get_slice(offset, count.min(left)).ok()?, region.is_read_only()))
    }
}

impl<B: Bitmap> GuestMemoryBackend for Memory<B> {
    type R = Region<B>;

    fn num_regions(&self) -> usize {
        self.map().len()
    }

    #[inline]
    fn find_region(&self, addr: GuestAddress) -> Option<&Region<B>> {
        Some(self.locate(addr)?.0)
    }

    fn iter(&self) -> impl Iterator<Item = &Region<B>> {
        self.view().slots(self.map().space).filter_map(|slot| self.map().get(slot.id()))
    }

    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<(&Region<B>, MemoryRegionAddress)> {
        self.locate(addr)
    }
}

impl<B> std::fmt::Debug for Memory<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory")
            .field("generation", &self.view().generation())
            .field("address_space", &self.map().space)
            .field("regions", &self.map().len())
            .finish()
    }
}
