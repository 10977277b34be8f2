//! Giving memory back to the host.
//!
//! What does it differs from kind to kind, and what is wrong for a kind often fails in silence: `MADV_DONTNEED` on a
//! memfd returns success, frees nothing and leaves every byte as it was. The table is in [`Memory::discard`].

use std::ops::RangeBounds;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::Advice;

use crate::error::MemoryError;
use crate::memory::{Memory, MemoryKind, Part};

impl Memory {
    /// Gives the memory of a range back to the host. Its bytes read as zero afterwards, in every kind, and whoever writes
    /// there gets new memory.
    ///
    /// | kind | what is done | what is freed |
    /// |---|---|---|
    /// | anonymous | `madvise(MADV_DONTNEED)` | the pages |
    /// | memfd, shared file, guest_memfd | `fallocate(PUNCH_HOLE)` | the pages and the file's blocks, for everybody who has the file |
    /// | private file | new anonymous memory over the range | the copies; the file is as it was, and no longer shows |
    ///
    /// * Memory that a device has pinned (VFIO) must not be discarded: the device would go on with the old pages.
    /// * Pages of a pool are discarded as a whole.
    /// * A discard is a write that no dirty log sees; who copies the guest's memory must hear of it.
    /// * In a private file's memory each discard may cost two of the process's mappings (`/proc/sys/vm/max_map_count`;
    ///   ranges that touch become one), and what was set up for these addresses by other means (NUMA policy, `mlock`,
    ///   userfaultfd) does not hold for the new memory.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Unaligned`] if the range does not begin and end at a
    /// [page](Self::page_size); [`MemoryError::Unsupported`] where the file system cannot make holes;
    /// [`MemoryError::Call`]. When a call fails half way, a part of the range may be discarded.
    pub fn discard(&self, range: impl RangeBounds<u64>) -> Result<(), MemoryError> {
        let part = self.part(&range, self.page)?;
        if part.bytes == 0 {
            return Ok(());
        }
        match (self.kind, &self.file) {
            (MemoryKind::Anonymous, _) | (_, None) => {
                self.advise(part, Advice::LinuxDontNeed, "madvise(MADV_DONTNEED)")
            }
            (MemoryKind::PrivateFile, _) => self.replace(part),
            (MemoryKind::Memfd | MemoryKind::SharedFile | MemoryKind::GuestMemfd, Some((file, offset))) => {
                let (from, bytes) = (offset + part.offset as u64, part.bytes as u64);
                punch_hole(file, from, bytes).map_err(|error| match error {
                    rustix::io::Errno::OPNOTSUPP => self.unsupported(
                        "a discard",
                        "the file's file system cannot punch holes; put the file on tmpfs, ext4, xfs or btrfs, or use a memfd",
                    ),
                    error => self.failed("fallocate(PUNCH_HOLE)", part.bytes, error.into()),
                })
            }
        }
    }

    /// Drops what was written to a range of a [private file's](MemoryKind::PrivateFile) memory: the file shows through
    /// again. That is no discard, for the bytes are not zero but the file's, old secrets of a snapshot among them.
    ///
    /// A range that was [discarded](Self::discard) stays zero.
    ///
    /// # Errors
    /// [`MemoryError::Unsupported`] for other kinds; else as [`discard`](Self::discard).
    pub fn revert(&self, range: impl RangeBounds<u64>) -> Result<(), MemoryError> {
        let part = self.part(&range, self.page)?;
        if self.kind != MemoryKind::PrivateFile {
            return Err(
                self.unsupported("going back to the file", "what is written there is written to stay")
            );
        }
        self.advise(part, Advice::LinuxDontNeed, "madvise(MADV_DONTNEED)")
    }

    /// New memory over a part of a private file's.
    fn replace(&self, part: Part) -> Result<(), MemoryError> {
        self.mapping
            .replace_by_zeroes(part.offset, part.bytes)
            .map_err(|source| self.failed("mmap(MAP_FIXED | MAP_ANONYMOUS)", part.bytes, source))?;
        if self.exclude_from_dumps { self.keep_out_of_dumps(part) } else { Ok(()) }
    }

    pub(crate) fn keep_out_of_dumps(&self, part: Part) -> Result<(), MemoryError> {
        self.advise(part, Advice::LinuxDontDump, "madvise(MADV_DONTDUMP)")
    }
}

/// Frees a range of a file and leaves the file's size as it is.
pub(crate) fn punch_hole(file: impl std::os::fd::AsFd, from: u64, bytes: u64) -> rustix::io::Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::io::retry_on_intr(|| fallocate(file.as_fd(), mode, from, bytes))
}
