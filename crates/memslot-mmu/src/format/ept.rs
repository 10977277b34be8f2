//! Intel's extended page tables.
//!
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 3C, 30.3.2 (EPT translation mechanism).
//!
//! ```text
//!  63   62 60  57 56  52 51                    12 11 10  9  8  7  6  5  3  2  1  0
//! ┌────┬──────────┬──────┬────────────────────────┬──┬──┬──┬──┬──┬──┬─────┬──┬──┬──┐
//! │#VE │ optional │ sw   │ physical address       │sw│XU│ D│ A│PS│PT│type │ X│ W│ R│
//! └────┴──────────┴──────┴────────────────────────┴──┴──┴──┴──┴──┴──┴─────┴──┴──┴──┘
//! ```
//!
//! * An entry is present if any of R, W and X is set; W without R is a misconfiguration, so a page that can be
//!   written can be read.
//! * The memory type is in the leaf itself, and combined with the guest's page attribute table (bit 6, "ignore PAT",
//!   stays clear).
//! * Accessed and dirty bits exist if EPTP bit 6 enables them. Entries that lead to tables are made with A set, so
//!   that the processor never changes them.
//! * Mode-based execute control, sub-page permissions and virtualization exceptions are off: their bits stay clear.

use super::{Access, Format, MemoryType};
use crate::host::Pfn;
use crate::level::{Level, PAGE_SHIFT};

/// Intel's extended page tables with so many levels, 4 or 5. `AD`: whether EPTP enables accessed and dirty bits.
#[derive(Clone, Copy, Debug)]
pub struct Ept<const LEVELS: u8 = 4, const AD: bool = true>;

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const TYPE_SHIFT: u32 = 3;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
/// Software bits of empty entries.
const STALE: u64 = 1 << 11;
const STALE_WRITABLE: u64 = 1 << 10;
/// Software bit of leaves.
const MAY_WRITE: u64 = 1 << 52;
const ADDRESS: u64 = (1 << 52) - (1 << PAGE_SHIFT);
/// Set in empty entries with a nonce: an address that no memory has. Processors with the L1 terminal fault guess with
/// the address of an entry that is not present.
const NOWHERE: u64 = 1 << 51;
const LOW_NONCE_BITS: u32 = 51 - PAGE_SHIFT;

const UNCACHEABLE: u64 = 0;
const WRITE_COMBINING: u64 = 1;
const WRITE_THROUGH: u64 = 4;
const WRITE_BACK: u64 = 6;

impl<const LEVELS: u8, const AD: bool> Format for Ept<LEVELS, AD> {
    const NAME: &'static str = "EPT";
    const LEVELS: u8 = LEVELS;
    const LARGEST: Level = Level::G1;
    const WRITE: u64 = WRITE;
    const ACCESSED: u64 = if AD { ACCESSED } else { 0 };
    const DIRTY: u64 = if AD { DIRTY } else { 0 };
    const MAY_WRITE: u64 = MAY_WRITE;
    const STALE: u64 = STALE;
    const STALE_WRITABLE: u64 = STALE_WRITABLE;

    #[inline]
    fn table(table: Pfn) -> u64 {
        table.get() << PAGE_SHIFT | READ | WRITE | EXECUTE | Self::ACCESSED
    }

    #[inline]
    fn leaf(pfn: Pfn, level: Level, access: Access, memory: MemoryType) -> u64 {
        let mut entry = pfn.get() << PAGE_SHIFT | READ;
        if access.contains(Access::WRITE) {
            entry |= WRITE;
        }
        if access.contains(Access::EXECUTE) {
            entry |= EXECUTE;
        }
        if level > Level::K4 {
            entry |= LARGE;
        }
        let memory = match memory {
            MemoryType::WriteBack => WRITE_BACK,
            MemoryType::WriteThrough => WRITE_THROUGH,
            MemoryType::WriteCombining => WRITE_COMBINING,
            MemoryType::Uncacheable => UNCACHEABLE,
        };
        entry | memory << TYPE_SHIFT
    }

    /// 50 bits of the nonce fit in.
    #[inline]
    fn empty(nonce: u64) -> u64 {
        if nonce == 0 {
            return 0;
        }
        let low = nonce & ((1 << LOW_NONCE_BITS) - 1);
        let high = nonce >> LOW_NONCE_BITS & 0x7ff;
        NOWHERE | low << PAGE_SHIFT | high << 52
    }

    #[inline]
    fn is_present(entry: u64) -> bool {
        entry & (READ | WRITE | EXECUTE) != 0
    }

    #[inline]
    fn is_table(entry: u64, level: Level) -> bool {
        level > Level::K4 && entry & LARGE == 0 && Self::is_present(entry)
    }

    #[inline]
    fn pfn(entry: u64, _: Level) -> Pfn {
        Pfn::new((entry & ADDRESS) >> PAGE_SHIFT)
    }

    #[inline]
    fn access(entry: u64) -> Access {
        let mut access = Access::empty();
        access.set(Access::READ, entry & READ != 0);
        access.set(Access::WRITE, entry & WRITE != 0);
        access.set(Access::EXECUTE, entry & EXECUTE != 0);
        access
    }

    fn memory(entry: u64) -> MemoryType {
        match entry >> TYPE_SHIFT & 7 {
            WRITE_BACK => MemoryType::WriteBack,
            WRITE_THROUGH => MemoryType::WriteThrough,
            WRITE_COMBINING => MemoryType::WriteCombining,
            _ => MemoryType::Uncacheable,
        }
    }
}
