//! Memory for the moment: whole pages from the kernel, because the heap is not to be used inside the hook.

use std::ptr::{self, NonNull};
use std::slice;

/// Zeroed pages, given back when dropped.
pub(crate) struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    /// At least this many bytes, which take up memory only once they are touched. `None` if the kernel has none.
    pub(crate) fn new(bytes: usize) -> Option<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, at an address the kernel chooses.
        let address = unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, -1, 0) };
        if address == libc::MAP_FAILED {
            return None;
        }
        Some(Mapping { address: NonNull::new(address.cast())?, bytes })
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: our pages, readable, writable and initialised with zeroes, borrowed as long as the slice lives.
        unsafe { slice::from_raw_parts_mut(self.address.as_ptr(), self.bytes) }
    }

    /// The pages, for good.
    pub(crate) fn leak(self) -> *mut u8 {
        let address = self.address.as_ptr();
        std::mem::forget(self);
        address
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our pages, to which no reference is left.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}
