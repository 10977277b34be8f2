//! What a device sees: the same memory, except that it cannot write to read-only slots.
//!
//! vm-memory's region traits know no permission: a [`Memory`] reads and writes whatever is mapped, as `GuestMemoryMmap`
//! does. That is right for a VMM that puts firmware into a ROM, and wrong for a device that a guest has told to put a
//! packet there: on the bus such a write goes nowhere. Only the newer `GuestMemory` (made for IOMMUs) says what an
//! access wants to do. [`DeviceMemory`] implements that one, and not `GuestMemoryBackend`, whose blanket
//! implementation drops the permission. Virtqueues ask for no more; kernel loaders and vhost take a
//! [`Space`].
//!
//! The iterator of slices is our own because it checks; it knows the host address without the region, where nothing is
//! tracked.

use std::iter::FusedIterator;
use std::ops::Deref;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, Permissions, VolatileSlice};

use crate::guard::MemoryGuard;
use crate::memory::Memory;
use crate::space::{Space, Tracking};

/// One version of an address space as devices see it: vm-memory's `GuestMemory`, and with it `Bytes<GuestAddress>`.
///
/// A write to a read-only slot fails with `PermissionDenied`; what was written before the slot stays written. A slice
/// is given out for the access that was asked for, and cannot check any more.
#[repr(transparent)]
pub struct DeviceMemory<B> {
    memory: Memory<B>,
}

impl<B> DeviceMemory<B> {
    #[inline]
    fn of(memory: &Memory<B>) -> &Self {
        // SAFETY: it is the same but for its name (`repr(transparent)`).
        unsafe { &*std::ptr::from_ref(memory).cast() }
    }

    /// The same memory without the check.
    #[must_use]
    pub fn unchecked(&self) -> &Memory<B> {
        &self.memory
    }
}

impl<B: Tracking> GuestMemory for DeviceMemory<B> {
    type PhysicalMemory = Memory<B>;
    type Bitmap = B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        Slices::new(&self.memory, addr, count, access).all(|slice| slice.is_ok())
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, B>>, GuestMemoryError> {
        Ok(Slices::new(&self.memory, addr, count, access))
    }

    fn physical_memory(&self) -> Option<&Memory<B>> {
        Some(&self.memory)
    }
}

/// The slices of a range, one for each slot.
struct Slices<'a, B> {
    memory: &'a Memory<B>,
    addr: GuestAddress,
    left: usize,
    writes: bool,
}

type Slice<'a, B> = VolatileSlice<'a, BS<'a, B>>;

impl<'a, B: Tracking> Slices<'a, B> {
    #[inline]
    fn new(memory: &'a Memory<B>, addr: GuestAddress, left: usize, access: Permissions) -> Self {
        Self { memory, addr, left, writes: access.has_write() }
    }

    /// The next slice, where there is one to come.
    #[inline]
    fn advance(&mut self) -> Result<Slice<'a, B>, GuestMemoryError> {
        let Some((slice, read_only)) = self.memory.slice(self.addr, self.left) else {
            return Err(self.fail(false));
        };
        if self.writes && read_only {
            return Err(self.fail(true));
        }
        self.left -= slice.len();
        // No slot has the last page of the address space, so that the address does not wrap.
        self.addr = GuestAddress(self.addr.0.wrapping_add(slice.len() as u64));
        Ok(slice)
    }

    #[cold]
    fn fail(&mut self, denied: bool) -> GuestMemoryError {
        self.left = 0;
        if denied {
            GuestMemoryError::IOError(std::io::ErrorKind::PermissionDenied.into())
        } else {
            GuestMemoryError::InvalidGuestAddress(self.addr)
        }
    }
}

impl<'a, B: Tracking> Iterator for Slices<'a, B> {
    type Item = Result<Slice<'a, B>, GuestMemoryError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        (self.left > 0).then(|| self.advance())
    }
}

impl<B: Tracking> FusedIterator for Slices<'_, B> {}

impl<'a, B: Tracking> GuestMemorySliceIterator<'a, BS<'a, B>> for Slices<'a, B> {
    #[inline]
    fn stop_on_error(mut self) -> Result<impl Iterator<Item = Slice<'a, B>>, GuestMemoryError> {
        let first = if self.left > 0 { Some(self.advance()?) } else { None };
        Ok(UntilError { first, rest: self })
    }
}

/// Slices up to the first error, of which the first is known to be none.
struct UntilError<'a, B: Tracking> {
    first: Option<Slice<'a, B>>,
    rest: Slices<'a, B>,
}

impl<'a, B: Tracking> Iterator for UntilError<'a, B> {
    type Item = Slice<'a, B>;

    #[inline]
    fn next(&mut self) -> Option<Slice<'a, B>> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        if self.rest.left == 0 { None } else { self.further() }
    }
}

impl<'a, B: Tracking> UntilError<'a, B> {
    /// Most accesses end in the slot in which they begin.
    #[cold]
    #[inline(never)]
    fn further(&mut self) -> Option<Slice<'a, B>> {
        self.rest.advance().ok()
    }
}

/// An address space as devices see it; see [`DeviceMemory`]. Made by [`Space::for_devices`].
#[derive(Debug)]
pub struct DeviceSpace<B: Tracking = ()> {
    space: Space<B>,
}

impl<B: Tracking> Clone for DeviceSpace<B> {
    fn clone(&self) -> Self {
        Self { space: self.space.clone() }
    }
}

impl<B: Tracking> Space<B> {
    /// The same address space as devices see it: they cannot write to read-only slots.
    #[must_use]
    pub fn for_devices(&self) -> DeviceSpace<B> {
        DeviceSpace { space: self.clone() }
    }
}

impl<B: Tracking> DeviceSpace<B> {
    /// The same address space without the check.
    #[must_use]
    pub fn unchecked(&self) -> &Space<B> {
        &self.space
    }
}

impl<B: Tracking> GuestAddressSpace for DeviceSpace<B> {
    type M = DeviceMemory<B>;
    type T = DeviceGuard<B>;

    #[inline]
    fn memory(&self) -> DeviceGuard<B> {
        DeviceGuard { guard: self.space.memory() }
    }
}

/// A version of an address space, held, as devices see it. Dereferences to [`DeviceMemory`]; otherwise as
/// [`MemoryGuard`].
pub struct DeviceGuard<B> {
    guard: MemoryGuard<B>,
}

impl<B> Clone for DeviceGuard<B> {
    #[inline]
    fn clone(&self) -> Self {
        Self { guard: self.guard.clone() }
    }
}

impl<B> std::fmt::Debug for DeviceGuard<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.guard.fmt(f)
    }
}

impl<B> From<MemoryGuard<B>> for DeviceGuard<B> {
    fn from(guard: MemoryGuard<B>) -> Self {
        Self { guard }
    }
}

impl<B> DeviceGuard<B> {
    /// The guard of the same memory without the check.
    #[must_use]
    pub fn into_unchecked(self) -> MemoryGuard<B> {
        self.guard
    }
}

impl<B> Deref for DeviceGuard<B> {
    type Target = DeviceMemory<B>;

    #[inline]
    fn deref(&self) -> &DeviceMemory<B> {
        DeviceMemory::of(&self.guard)
    }
}

impl<B> std::fmt::Debug for DeviceMemory<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.memory.fmt(f)
    }
}
