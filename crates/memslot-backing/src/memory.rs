//! One mapping, and what can be done with it.

use std::fmt;
use std::ops::{Bound, RangeBounds};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use memslot::{Hva, HvaRange};
use rustix::mm::Advice;

use crate::error::MemoryError;
use crate::mapping::Mapping;

/// What kind of memory it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Private to the process, in no file.
    Anonymous,
    /// In a memfd of its own, which other processes can map too.
    Memfd,
    /// A file that is mapped shared: what is written goes to the file.
    SharedFile,
    /// A file that is mapped private: what is written stays in the process, as a copy.
    PrivateFile,
    /// A guest_memfd of KVM, mapped for the host.
    GuestMemfd,
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "anonymous",
            Self::Memfd => "memfd",
            Self::SharedFile => "shared file",
            Self::PrivateFile => "private file",
            Self::GuestMemfd => "guest_memfd",
        })
    }
}

/// Host memory for a guest: one mapping, readable and writable, with guard pages around it.
///
/// Made by [`anonymous`](Self::anonymous), [`memfd`](Self::memfd), [`huge`](Self::huge), [`file`](Self::file) or
/// [`guest_memfd`](Self::guest_memfd), which start a [`MemoryBuilder`](crate::MemoryBuilder).
/// Unmapped when it is dropped, so whoever uses its addresses keeps it: as an `Arc`, which
/// [`Backings`](crate::Backings) keep for the slots.
///
/// A memory hands out addresses and no references. Guests, other processes and [`discard`](Self::discard) change what
/// is there at any time: read and write it through raw pointers, as volatile.
///
/// ```
/// use memslot_backing::Memory;
/// let memory = Memory::memfd("guest-ram", 4 << 20).map()?;
/// let byte = memory.as_ptr().wrapping_add(0x1234);
/// // SAFETY: the byte lies in the memory, and nobody else writes it meanwhile.
/// unsafe { byte.write_volatile(7) };
/// assert_eq!(memory.resident(..)?, 4096); // whole pages
///
/// memory.discard(0x1000..0x2000)?;
/// // SAFETY: as above.
/// assert_eq!(unsafe { byte.read_volatile() }, 0);
/// assert_eq!(memory.hva().get() % (2 << 20), 0);
/// # Ok::<(), memslot_backing::MemoryError>(())
/// ```
pub struct Memory {
    pub(crate) mapping: Mapping,
    pub(crate) kind: MemoryKind,
    /// The file, and where in it the memory begins.
    pub(crate) file: Option<(OwnedFd, u64)>,
    pub(crate) page: u64,
    pub(crate) hugetlb: bool,
    /// Pages that replace others must be left out of core dumps as these were.
    pub(crate) exclude_from_dumps: bool,
}

/// A part of a memory, checked.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

impl Memory {
    /// Where its first byte lies.
    #[must_use]
    pub fn hva(&self) -> Hva {
        Hva::new(self.mapping.start() as u64)
    }

    /// Its size in bytes; never 0.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.mapping.bytes() as u64
    }

    /// All its addresses, the guards not included.
    #[must_use]
    pub fn hvas(&self) -> HvaRange {
        let range = HvaRange::with_len(self.hva(), self.bytes());
        range.expect("the addresses of a process end far below 2^64")
    }

    /// Its first byte, as a pointer that is good for all of it.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.mapping.start())
    }

    /// The size in bytes of the pages that it is made of, and so what can be discarded at the least: the host's base
    /// pages, or huge pages of a pool. (Transparent huge pages do not count: the kernel splits them.)
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page
    }

    /// What kind it is.
    #[must_use]
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// Whether it is made of huge pages from a pool of the host.
    #[must_use]
    pub fn is_hugetlb(&self) -> bool {
        self.hugetlb
    }

    /// The file behind it, and where in the file its first byte lies: what a vhost-user backend or another process
    /// needs to map the same memory. Anonymous memory has none.
    ///
    /// For a [private](MemoryKind::PrivateFile) mapping the file is what was there before the guest wrote.
    #[must_use]
    pub fn file_offset(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.file.as_ref().map(|(file, offset)| (file.as_fd(), *offset))
    }

    /// How many bytes of a range are in the host's memory.
    ///
    /// What is counted is the memory itself: pages of a file count when they are in the page cache, whoever read or
    /// wrote them; pages that were swapped out do not. This asks `mincore(2)`, page by page: some 10 ns each.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::Unaligned`] to the host's page size.
    pub fn resident(&self, range: impl RangeBounds<u64>) -> Result<u64, MemoryError> {
        let page = rustix::param::page_size() as u64;
        let part = self.part(&range, page)?;
        let pages = self
            .mapping
            .resident(part.offset, part.bytes)
            .map_err(|source| self.failed("mincore", part.bytes, source))?;
        Ok(pages * page)
    }

    /// Makes every page of a range present and writable now, so that no access has to wait for it later.
    ///
    /// Pages of a shared file get their blocks, those of a private one are copied. Needs Linux 5.14.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::Unaligned`], [`MemoryError::Call`] where there is not enough memory;
    /// some pages may be present then.
    pub fn prefault(&self, range: impl RangeBounds<u64>) -> Result<(), MemoryError> {
        let part = self.part(&range, self.page)?;
        self.advise(part, Advice::LinuxPopulateWrite, "madvise(MADV_POPULATE_WRITE)")
    }

    /// Asks the kernel to use transparent huge pages for all of it, or not to.
    ///
    /// It can where a 2 MiB page of the guest lies in a 2 MiB page of the host: see
    /// [`congruent_to`](crate::MemoryBuilder::congruent_to). Whether it does is the host's
    /// `/sys/kernel/mm/transparent_hugepage/enabled` (for memfds: `shmem_enabled`), which says `madvise` on most.
    ///
    /// # Errors
    /// [`MemoryError::Unsupported`] on pages of a pool, which are huge anyway; [`MemoryError::Call`] on a kernel that has
    /// none.
    pub fn advise_huge(&self, wanted: bool) -> Result<(), MemoryError> {
        if self.hugetlb {
            return Err(self.unsupported("advice on huge pages", "its pages are huge ones of a pool already"));
        }
        let whole = Part { offset: 0, bytes: self.mapping.bytes() };
        if wanted {
            self.advise(whole, Advice::LinuxHugepage, "madvise(MADV_HUGEPAGE)")
        } else {
            self.advise(whole, Advice::LinuxNoHugepage, "madvise(MADV_NOHUGEPAGE)")
        }
    }

    pub(crate) fn advise(&self, part: Part, advice: Advice, call: &'static str) -> Result<(), MemoryError> {
        if part.bytes == 0 {
            return Ok(());
        }
        self.mapping
            .advise(part.offset, part.bytes, advice)
            .map_err(|source| self.failed(call, part.bytes, source))
    }

    /// The range as a checked part; its ends must be multiples of `unit`.
    pub(crate) fn part(&self, range: &impl RangeBounds<u64>, unit: u64) -> Result<Part, MemoryError> {
        let bytes = self.bytes();
        let start = match range.start_bound() {
            Bound::Unbounded => Some(0),
            Bound::Included(&start) => Some(start),
            Bound::Excluded(&before) => before.checked_add(1),
        };
        let end = match range.end_bound() {
            Bound::Unbounded => Some(bytes),
            Bound::Excluded(&end) => Some(end),
            Bound::Included(&last) => last.checked_add(1),
        };
        let (start, end) = (start.unwrap_or(u64::MAX), end.unwrap_or(u64::MAX));
        if start > end || end > bytes {
            return Err(MemoryError::OutOfRange { start, end, bytes });
        }
        for (what, value) in [("a range's start", start), ("a range's end", end)] {
            if value % unit != 0 {
                return Err(MemoryError::Unaligned { what, value, multiple: unit });
            }
        }
        // Both are at most the mapping's size, which is a `usize`.
        let to_usize = |value| usize::try_from(value).unwrap_or(usize::MAX);
        Ok(Part { offset: to_usize(start), bytes: to_usize(end - start) })
    }

    pub(crate) fn failed(&self, call: &'static str, bytes: usize, source: std::io::Error) -> MemoryError {
        MemoryError::Call { call, kind: self.kind, bytes: bytes as u64, source }
    }

    pub(crate) fn unsupported(&self, operation: &'static str, instead: &'static str) -> MemoryError {
        MemoryError::Unsupported { operation, kind: self.kind, instead }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} memory, hva {:#x}, {:#x} bytes", self.kind, self.hva(), self.bytes())?;
        if self.hugetlb {
            write!(f, ", huge pages of {:#x} bytes", self.page)?;
        }
        f.write_str(")")
    }
}
