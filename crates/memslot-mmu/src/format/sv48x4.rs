//! RISC-V's G-stage tables, Sv48x4 (`hgatp`).
//!
//! The RISC-V Instruction Set Manual, volume II, "Hypervisor Extension: Two-Stage Address Translation", and Svpbmt.
//!
//! ```text
//!  63 62  61 60      54 53                              10 9  8   7   6   5   4   3   2   1   0
//! ┌──┬──────┬──────────┬──────────────────────────────────┬─────┬───┬───┬───┬───┬───┬───┬───┬───┐
//! │ N│ PBMT │ reserved │ frame number                     │ sw  │ D │ A │ G │ U │ X │ W │ R │ V │
//! └──┴──────┴──────────┴──────────────────────────────────┴─────┴───┴───┴───┴───┴───┴───┴───┴───┘
//! ```
//!
//! * The root has 2048 entries, in four tables side by side.
//! * An entry leads to a table if it has none of R, W and X; then A, D and U are reserved. A leaf needs U: all accesses
//!   of a guest are a user's.
//! * The processor sets A and D with Svadu only. Without, a leaf that lacks them faults, so it is made with both.
//! * Memory types other than write-back need Svpbmt. There is no write-through: uncached memory has no stale copy either.

use super::{Access, Format, MemoryType};
use crate::host::Pfn;
use crate::level::Level;

/// RISC-V's Sv48x4. `AD`: whether the processor sets accessed and dirty bits (Svadu, `henvcfg.ADUE`).
#[derive(Clone, Copy, Debug)]
pub struct Sv48x4<const AD: bool = true>;

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
/// Software bit of leaves.
const MAY_WRITE: u64 = 1 << 8;
/// Software bits of empty entries.
const STALE: u64 = 1 << 9;
const STALE_WRITABLE: u64 = 1 << 8;
const FRAME_SHIFT: u32 = 10;
const FRAME: u64 = (1 << 54) - (1 << FRAME_SHIFT);
const TYPE: u64 = 3 << 61;
const UNCACHED: u64 = 1 << 61;
const DEVICE: u64 = 2 << 61;

impl<const AD: bool> Format for Sv48x4<AD> {
    const NAME: &'static str = "Sv48x4";
    const LEVELS: u8 = 4;
    const ROOT_TABLES: usize = 4;
    const FRAME_SHIFT: u32 = FRAME_SHIFT;
    const LARGEST: Level = Level::G1;
    const WRITE: u64 = WRITE;
    const ACCESSED: u64 = if AD { ACCESSED } else { 0 };
    const DIRTY: u64 = if AD { DIRTY } else { 0 };
    const MAY_WRITE: u64 = MAY_WRITE;
    const STALE: u64 = STALE;
    const STALE_WRITABLE: u64 = STALE_WRITABLE;

    #[inline]
    fn table(table: Pfn) -> u64 {
        table.get() << FRAME_SHIFT | VALID
    }

    #[inline]
    fn leaf(pfn: Pfn, _: Level, access: Access, memory: MemoryType) -> u64 {
        let mut entry = pfn.get() << FRAME_SHIFT | USER | READ | VALID;
        if access.contains(Access::WRITE) {
            entry |= WRITE;
        }
        if access.contains(Access::EXECUTE) {
            entry |= EXECUTE;
        }
        if !AD {
            entry |= ACCESSED | DIRTY;
        }
        entry
            | match memory {
                MemoryType::WriteBack => 0,
                MemoryType::WriteThrough | MemoryType::WriteCombining => UNCACHED,
                MemoryType::Uncacheable => DEVICE,
            }
    }

    /// 54 bits of the nonce fit in: a processor looks at nothing else where V is clear.
    #[inline]
    fn empty(nonce: u64) -> u64 {
        nonce << FRAME_SHIFT
    }

    #[inline]
    fn is_present(entry: u64) -> bool {
        entry & VALID != 0
    }

    #[inline]
    fn is_table(entry: u64, level: Level) -> bool {
        level > Level::K4 && entry & (VALID | READ | WRITE | EXECUTE) == VALID
    }

    #[inline]
    fn pfn(entry: u64, _: Level) -> Pfn {
        Pfn::new((entry & FRAME) >> FRAME_SHIFT)
    }

    #[inline]
    fn access(entry: u64) -> Access {
        if entry & (READ | WRITE | EXECUTE) == 0 {
            return Access::all();
        }
        let mut access = Access::READ;
        access.set(Access::WRITE, entry & WRITE != 0);
        access.set(Access::EXECUTE, entry & EXECUTE != 0);
        access
    }

    fn memory(entry: u64) -> MemoryType {
        match entry & TYPE {
            0 => MemoryType::WriteBack,
            UNCACHED => MemoryType::WriteCombining,
            _ => MemoryType::Uncacheable,
        }
    }
}
