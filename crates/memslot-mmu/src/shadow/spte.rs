//! Entries of shadow tables: what the processor reads, and what we remember in the bits that it ignores.
//!
//! ```text
//!  63  62      52 51                    12 11   10       9     8   7   6  5   4   3   2   1   0
//! ┌───┬──────────┬────────────────────────┬───┬───────┬───────┬───┬───┬──┬──┬───┬───┬───┬───┬───┐
//! │NX │          │ physical address       │   │ mmu-W │ host-W│   │PS │ D│ A│PCD│PWT│U/S│R/W│ P │
//! └───┴──────────┴────────────────────────┴───┴───────┴───────┴───┴───┴──┴──┴───┴───┴───┴───┴───┘
//! ```
//!
//! An entry that leads to a table permits everything: what the guest's entries above permit is in the [role](super::Role)
//! of the table below. A leaf has, besides R/W,
//!
//! * **host-writable**: the slot is not read-only and the host lets the page be written;
//! * **MMU-writable**: the guest's own entries allow writing, the guest's dirty bit is set, and no shadow page wants the frame
//!   write-protected.
//!
//! | host | MMU | W | the page is |
//! |---|---|---|---|
//! | 1 | 1 | 1 | writable |
//! | 1 | 1 | 0 | protected for the dirty log: the next write needs nothing but W, which the [fast path](super::fast) sets |
//! | 1 | 0 | 0 | read-only for the guest, or a guest's page table |
//! | 0 | 0 | 0 | read-only for the slot or the host |
//!
//! Other combinations do not exist. Whether taking write access away needs a flush is decided by *MMU-writable*, never by W: where W is
//! clear already, whoever has cleared it may not have flushed yet, and where both are set the processor sets nothing by itself. Bit 8
//! (global) is never set: flushing an address space flushes all of it.

use core::num::NonZeroU64;

use super::guest::Rights;
use crate::format::MemoryType;
use crate::host::Pfn;
use crate::level::{ENTRIES, Level, PAGE_SHIFT};
use crate::rmap::RmapEntry;

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const WRITE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
pub(super) const HOST_WRITABLE: u64 = 1 << 9;
pub(super) const MMU_WRITABLE: u64 = 1 << 10;
/// With [`PRESENT`]: no mapping, but [a memory](super::mmio) of there being nothing to map.
pub(super) const MARK: u64 = 1 << 11;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = (1 << 52) - (1 << PAGE_SHIFT);

/// An entry that leads to a table.
pub(super) const fn table(table: Pfn) -> u64 {
    table.get() << PAGE_SHIFT | PRESENT | WRITE | USER | ACCESSED
}

/// One of the four entries of a PAE root, where most bits are reserved.
pub(super) const fn pdpte(table: Pfn) -> u64 {
    table.get() << PAGE_SHIFT | PRESENT
}

/// What a leaf is made of.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    /// The first frame, aligned to the page's size.
    pub(super) pfn: Pfn,
    pub(super) level: Level,
    /// What the guest permits, everything taken together.
    pub(super) rights: Rights,
    pub(super) memory: MemoryType,
    pub(super) executable: bool,
    pub(super) host_writable: bool,
    /// Whether the frame may be written as far as shadow paging is concerned.
    pub(super) untracked: bool,
    /// Whether it becomes writable at once.
    pub(super) write: bool,
}

impl Leaf {
    pub(super) fn entry(&self) -> u64 {
        let mut entry = self.pfn.get() << PAGE_SHIFT | PRESENT;
        if self.rights.contains(Rights::USER) {
            entry |= USER;
        }
        if !self.rights.contains(Rights::EXECUTE) || !self.executable {
            entry |= NO_EXECUTE;
        }
        if self.level > Level::K4 {
            entry |= LARGE;
        }
        if self.host_writable {
            entry |= HOST_WRITABLE;
            if self.rights.contains(Rights::WRITE) && self.untracked {
                entry |= MMU_WRITABLE;
                if self.write {
                    entry |= WRITE;
                }
            }
        }
        entry
            | match self.memory {
                MemoryType::WriteBack => 0,
                MemoryType::WriteThrough => WRITE_THROUGH,
                MemoryType::WriteCombining | MemoryType::Uncacheable => WRITE_THROUGH | CACHE_DISABLE,
            }
    }
}

/// Whether an entry leads somewhere.
#[inline]
pub(super) const fn is_present(entry: u64) -> bool {
    entry & (PRESENT | MARK) == PRESENT
}

/// Whether an entry of a table of this level leads to a table.
#[inline]
pub(super) fn is_table(entry: u64, level: Level) -> bool {
    level > Level::K4 && entry & (PRESENT | LARGE | MARK) == PRESENT
}

#[inline]
pub(super) fn is_leaf(entry: u64, level: Level) -> bool {
    is_present(entry) && !is_table(entry, level)
}

/// Where a present entry leads.
#[inline]
pub(super) const fn pfn(entry: u64) -> Pfn {
    Pfn::new((entry & ADDRESS) >> PAGE_SHIFT)
}

/// The same leaf with no more than these rights.
pub(super) fn restricted(entry: u64, rights: Rights) -> u64 {
    let mut entry = entry;
    if !rights.contains(Rights::USER) {
        entry &= !USER;
    }
    if !rights.contains(Rights::EXECUTE) {
        entry |= NO_EXECUTE;
    }
    if !rights.contains(Rights::WRITE) {
        entry &= !(WRITE | MMU_WRITABLE);
    }
    entry
}

/// Where an entry is: its physical address in the host, which finds the table for those who walk without a lock, and the shadow
/// page for those who have it. Frame 0 is no table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SpteRef(NonZeroU64);

impl SpteRef {
    #[inline]
    pub(super) fn new(table: Pfn, index: usize) -> Self {
        let word = table.get() << PAGE_SHIFT | (index as u64) << 3;
        Self(NonZeroU64::new(word).unwrap_or(NonZeroU64::MIN))
    }

    #[inline]
    pub(super) const fn table(self) -> Pfn {
        Pfn::new(self.0.get() >> PAGE_SHIFT)
    }

    #[inline]
    pub(super) const fn index(self) -> usize {
        (self.0.get() >> 3) as usize & (ENTRIES - 1)
    }
}

impl RmapEntry for SpteRef {
    #[inline]
    fn into_word(self) -> NonZeroU64 {
        self.0
    }

    #[inline]
    fn from_word(word: NonZeroU64) -> Self {
        Self(word)
    }
}
