//! A piece of the process's address space: every call that maps, unmaps or advises is here.
//!
//! ```text
//!   outer                                                          outer_end
//!   │ guard (PROT_NONE) │ start … bytes … : what was asked for │ guard (PROT_NONE) │
//! ```
//!
//! First the whole is reserved without access, larger by the alignment; then the surplus is given back, and what was
//! asked for is mapped over the middle. So no other thread can take a place in between, and when the second step
//! fails, nothing is left.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// The guards' size: a multiple of every page size there is, and it costs nothing but addresses.
const GUARD: usize = 64 << 10;

/// Where a mapping shall lie: at an address that leaves `remainder` when divided by `alignment`.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// A power of two, at least a page.
    pub(crate) alignment: usize,
    /// Less than `alignment`, and a multiple of the page size.
    pub(crate) remainder: usize,
    pub(crate) guards: bool,
}

/// What shall be mapped there.
#[derive(Clone, Copy)]
pub(crate) enum What<'a> {
    Anonymous,
    Shared(BorrowedFd<'a>, u64),
    Private(BorrowedFd<'a>, u64),
}

/// Addresses that belong to this value alone; unmapped when it goes.
///
/// They are kept as numbers, with their provenance exposed: a mapping may be moved to other threads and shared.
pub(crate) struct Mapping {
    outer: usize,
    outer_end: usize,
    start: usize,
    bytes: usize,
}

impl Mapping {
    /// Maps `bytes` (a multiple of the page size, not 0) for reading and writing.
    pub(crate) fn new(what: What<'_>, bytes: usize, no_reserve: bool, place: Place) -> io::Result<Self> {
        let mapping = Self::reserve(bytes, place)?;
        let reserve = if no_reserve { MapFlags::NORESERVE } else { MapFlags::empty() };
        mapping.put(0, bytes, what, reserve)?;
        Ok(mapping)
    }

    /// Takes the addresses, without access.
    fn reserve(bytes: usize, place: Place) -> io::Result<Self> {
        let too_large = || io::Error::from(rustix::io::Errno::NOMEM);
        let guard = if place.guards { GUARD } else { 0 };
        // The kernel's choice is a page's address, so that much of the alignment is there already.
        let surplus = place.alignment - rustix::param::page_size();
        let total = bytes.checked_add(2 * guard + surplus).ok_or_else(too_large)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let outer = unsafe { mmap_anonymous(ptr::null_mut(), total, ProtFlags::empty(), flags) }?;
        let outer = outer.expose_provenance();
        let lowest = outer + guard;
        let start = lowest + (place.remainder.wrapping_sub(lowest) & (place.alignment - 1));
        let mut mapping = Self { outer, outer_end: outer + total, start, bytes };
        mapping.trim(start - guard, start + bytes + guard);
        Ok(mapping)
    }

    /// Gives back what lies outside of the addresses `from..end`. A surplus that the kernel does not take back (there
    /// are too many mappings to cut one in two) stays a part of the guards.
    fn trim(&mut self, from: usize, end: usize) {
        if from > self.outer {
            // SAFETY: the addresses are this mapping's, and nobody has heard of them yet.
            if unsafe { munmap(pointer(self.outer), from - self.outer) }.is_ok() {
                self.outer = from;
            }
        }
        if end < self.outer_end {
            // SAFETY: as above.
            if unsafe { munmap(pointer(end), self.outer_end - end) }.is_ok() {
                self.outer_end = end;
            }
        }
    }

    /// Maps `what` over a part of the middle.
    fn put(&self, offset: usize, bytes: usize, what: What<'_>, flags: MapFlags) -> io::Result<()> {
        let at = pointer(self.within(offset, bytes));
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = flags | MapFlags::FIXED;
        // SAFETY: the addresses are this mapping's own. Whoever has a pointer to them knows that the contents can change
        // at any time (see `Memory`); they stay mapped.
        unsafe {
            match what {
                What::Anonymous => mmap_anonymous(at, bytes, access, flags | MapFlags::PRIVATE),
                What::Shared(file, from) => mmap(at, bytes, access, flags | MapFlags::SHARED, file, from),
                What::Private(file, from) => mmap(at, bytes, access, flags | MapFlags::PRIVATE, file, from),
            }?;
        }
        Ok(())
    }

    /// Puts new anonymous memory, all zero, over a part of the middle.
    pub(crate) fn replace_by_zeroes(&self, offset: usize, bytes: usize) -> io::Result<()> {
        let result = self.put(offset, bytes, What::Anonymous, MapFlags::NORESERVE);
        if result.is_err() {
            self.fill_holes(offset, bytes);
        }
        result
    }

    /// After a replacement that failed: the kernel may have unmapped what was there before. A hole must not stay, for
    /// somebody else's mapping could come to lie in it, and old addresses would lead there.
    fn fill_holes(&self, offset: usize, bytes: usize) {
        if self.resident(offset, bytes).is_ok() {
            return; // Every page of it is mapped.
        }
        let at = pointer(self.within(offset, bytes));
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the addresses are this mapping's own.
        if unsafe { mmap_anonymous(at, bytes, ProtFlags::empty(), flags) }.is_err() {
            // Nothing that keeps the promise is left to do.
            std::process::abort();
        }
    }

    /// Gives advice on a part of the middle that changes at most its contents.
    pub(crate) fn advise(&self, offset: usize, bytes: usize, advice: Advice) -> io::Result<()> {
        let at = pointer(self.within(offset, bytes));
        // SAFETY: the addresses are this mapping's own; for advice that changes contents, as in `put`.
        Ok(rustix::io::retry_on_intr(|| unsafe { madvise(at, bytes, advice) })?)
    }

    /// How many pages of a part of the middle are in memory. An error if a part of it is not mapped.
    pub(crate) fn resident(&self, offset: usize, bytes: usize) -> io::Result<u64> {
        const PAGES: usize = 4096;
        let page = rustix::param::page_size();
        let mut states = [0u8; PAGES];
        let mut resident = 0;
        let (mut at, end) = (self.within(offset, bytes), self.within(offset, bytes) + bytes);
        while at < end {
            let part = (end - at).min(PAGES * page);
            // SAFETY: the call writes one byte for each page of the part, of which there are at most `PAGES`.
            if unsafe { libc::mincore(pointer(at), part, states.as_mut_ptr()) } != 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::WouldBlock {
                    continue; // The kernel was short of memory for a moment.
                }
                return Err(error);
            }
            resident += states[..part.div_ceil(page)].iter().filter(|&state| state & 1 != 0).count() as u64;
            at += part;
        }
        Ok(resident)
    }

    /// The address of a part of the middle, which must lie there: everything below depends on it.
    fn within(&self, offset: usize, bytes: usize) -> usize {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(inside, "bytes {offset:#x}, +{bytes:#x} of a mapping of {:#x}", self.bytes);
        self.start + offset
    }

    pub(crate) const fn start(&self) -> usize {
        self.start
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the addresses are this mapping's own, and whoever uses one keeps the mapping alive.
        let gone = unsafe { munmap(pointer(self.outer), self.outer_end - self.outer) };
        if gone.is_err() {
            // The kernel keeps anonymous neighbours without guards as one mapping, and does not cut it in three when the
            // process has too many. Then the addresses are lost, but not the memory.
            // SAFETY: as above.
            let _ = unsafe { madvise(pointer(self.start), self.bytes, Advice::LinuxDontNeed) };
        }
    }
}

fn pointer(address: usize) -> *mut std::ffi::c_void {
    ptr::with_exposed_provenance_mut(address)
}
