//! AMD's nested page tables: ordinary x86-64 long-mode entries.
//!
//! AMD64 Architecture Programmer's Manual, volume 2, 5.3 (long-mode translation) and 15.25 (nested paging).
//!
//! ```text
//!  63  62      52 51                    12 11  9  8  7  6  5   4   3   2   1   0
//! ┌───┬──────────┬────────────────────────┬─────┬───┬──┬──┬──┬───┬───┬───┬───┬───┐
//! │NX │ software │ physical address       │ sw  │ G │PS│ D│ A│PCD│PWT│U/S│R/W│ P │
//! └───┴──────────┴────────────────────────┴─────┴───┴──┴──┴──┴───┴───┴───┴───┴───┘
//! ```
//!
//! * Nested accesses are user accesses: U/S must be set at every level.
//! * A page that is present can be read; there is no page that can only be executed.
//! * NX needs `EFER.NXE` of the host.
//! * PWT and PCD choose from the host's page attribute table; its power-on contents are used: write-back,
//!   write-through, uncached-minus (unused here), uncacheable.
//! * Entries that lead to tables are made with A set, so that the processor never changes them.

use super::{Access, Format, MemoryType};
use crate::host::Pfn;
use crate::level::{Level, PAGE_SHIFT};

/// AMD's nested page tables with so many levels: 4, or 5 where the host runs with `CR4.LA57`.
#[derive(Clone, Copy, Debug)]
pub struct Npt<const LEVELS: u8 = 4>;

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
/// Software bits of empty entries.
const STALE: u64 = 1 << 11;
const STALE_WRITABLE: u64 = 1 << 10;
/// Software bit of leaves.
const MAY_WRITE: u64 = 1 << 52;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = (1 << 52) - (1 << PAGE_SHIFT);

impl<const LEVELS: u8> Format for Npt<LEVELS> {
    const NAME: &'static str = "NPT";
    const LEVELS: u8 = LEVELS;
    const LARGEST: Level = Level::G1;
    const WRITE: u64 = WRITE;
    const ACCESSED: u64 = ACCESSED;
    const DIRTY: u64 = DIRTY;
    const MAY_WRITE: u64 = MAY_WRITE;
    const STALE: u64 = STALE;
    const STALE_WRITABLE: u64 = STALE_WRITABLE;

    #[inline]
    fn table(table: Pfn) -> u64 {
        table.get() << PAGE_SHIFT | PRESENT | WRITE | USER | ACCESSED
    }

    #[inline]
    fn leaf(pfn: Pfn, level: Level, access: Access, memory: MemoryType) -> u64 {
        let mut entry = pfn.get() << PAGE_SHIFT | PRESENT | USER;
        if access.contains(Access::WRITE) {
            entry |= WRITE;
        }
        if !access.contains(Access::EXECUTE) {
            entry |= NO_EXECUTE;
        }
        if level > Level::K4 {
            entry |= LARGE;
        }
        entry
            | match memory {
                MemoryType::WriteBack => 0,
                MemoryType::WriteThrough => WRITE_THROUGH,
                MemoryType::WriteCombining | MemoryType::Uncacheable => WRITE_THROUGH | CACHE_DISABLE,
            }
    }

    /// 51 bits of the nonce fit in. AMD's processors do not look at the address of an entry that is not present.
    #[inline]
    fn empty(nonce: u64) -> u64 {
        nonce << PAGE_SHIFT
    }

    #[inline]
    fn is_present(entry: u64) -> bool {
        entry & PRESENT != 0
    }

    #[inline]
    fn is_table(entry: u64, level: Level) -> bool {
        level > Level::K4 && entry & (PRESENT | LARGE) == PRESENT
    }

    #[inline]
    fn pfn(entry: u64, _: Level) -> Pfn {
        Pfn::new((entry & ADDRESS) >> PAGE_SHIFT)
    }

    #[inline]
    fn access(entry: u64) -> Access {
        let mut access = Access::READ;
        access.set(Access::WRITE, entry & WRITE != 0);
        access.set(Access::EXECUTE, entry & NO_EXECUTE == 0);
        access
    }

    fn memory(entry: u64) -> MemoryType {
        match (entry & CACHE_DISABLE != 0, entry & WRITE_THROUGH != 0) {
            (false, false) => MemoryType::WriteBack,
            (false, true) => MemoryType::WriteThrough,
            (true, _) => MemoryType::Uncacheable,
        }
    }
}
