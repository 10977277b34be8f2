//! What is asked of the kernel.

use std::io;

use memslot::rules::UserMemoryRegion2;

/// The calls of a VM that this crate needs. [`Vm`](crate::Vm) makes them on a file descriptor; a VMM whose process
/// may not do so itself forwards them, and tests put a model here.
///
/// In every call `slot` is as in KVM: bits 0-15 the id, bits 16-31 the address space.
pub trait Kernel: Send + Sync {
    /// The size of the pages that slots and dirty bitmaps consist of: the host's.
    fn page_bytes(&self) -> u64 {
        // SAFETY: the call asks for a number.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(bytes).unwrap_or(0)
    }

    /// `KVM_CHECK_EXTENSION` on the VM; 0 for what it does not have.
    fn check_extension(&self, cap: u32) -> u32;

    /// `KVM_ENABLE_CAP` on the VM, with one argument.
    ///
    /// # Errors
    /// The kernel's.
    fn enable_cap(&self, cap: u32, argument: u64) -> io::Result<()>;

    /// `KVM_SET_USER_MEMORY_REGION`, or its second form where the flags ask for a guest_memfd.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Safety
    /// The guest may read and, unless the slot is read-only, write the host memory of the region until the slot is
    /// deleted: nobody relies on it not to.
    unsafe fn set_user_memory_region(&self, region: &UserMemoryRegion2) -> io::Result<()>;

    /// `KVM_GET_DIRTY_LOG`. `words` has a bit for each page of the slot.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Safety
    /// The slot has no more pages than `words` has bits.
    unsafe fn get_dirty_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()>;

    /// `KVM_CLEAR_DIRTY_LOG` for `pages` pages from `first_page` on, whose bits are in `words`.
    ///
    /// # Errors
    /// The kernel's.
    fn clear_dirty_log(&self, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()>;

    /// `KVM_RESET_DIRTY_RINGS`. Returns how many entries were reset.
    ///
    /// # Errors
    /// The kernel's.
    fn reset_dirty_rings(&self) -> io::Result<u32>;
}
