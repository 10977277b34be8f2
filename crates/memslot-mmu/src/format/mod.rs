//! How an entry of a page table is written: everything that differs between processors.
//!
//! A [`Format`] is a type without values; the walker, the fault path and the range operations are written once for
//! all of them. [`Npt`] are AMD's nested page tables, [`Ept`] Intel's extended page tables, [`Sv48x4`] RISC-V's G-stage.
//!
//! # What an entry can be
//!
//! | kind | present | what the processor does | made by |
//! |---|---|---|---|
//! | empty | no | faults | [`Format::empty`] |
//! | table | yes | goes on in the table of the level below | [`Format::table`] |
//! | leaf | yes | has its translation | [`Format::leaf`] |
//!
//! Two things are ours and mean nothing to the processor. An **empty** entry carries a *nonce*, the number of the
//! change that emptied it, so that an entry that was emptied twice differs; this is how a fault notices that it was
//! overtaken (see the documentation of [`nested`](crate::nested)). With [`Format::STALE`] it also says that a
//! processor may still have the translation it had. And a **leaf** has [`Format::MAY_WRITE`]: the host and the slot
//! allow writing, so if the processor may not write, then only because writes are to be noticed.
//!
//! # Another format
//!
//! Is one file beside `npt.rs`, with a type that implements [`Format`], and a table of hand-computed entries for its
//! tests:
//!
//! * `sv48x4.rs` is an example that differs in more than bits: a root of four tables, frame numbers that start at bit 10
//!   ([`Format::FRAME_SHIFT`]), tables that are told by what they lack, and processors without accessed bits.
//! * **arm64 stage 2**, 4 KiB granule: `LEVELS` 4 (the architecture counts from 0 at the root; level 1 here is its
//!   level 3), `ROOT_TABLES` the number of concatenated tables that `VTCR_EL2.SL0` asks for. A leaf of level 1 has
//!   bits `11`, of others `01`; `S2AP[1]` is `WRITE`, `AF` is `ACCESSED`. With `VTCR_EL2.HD`, a page is
//!   writable-clean by `DBM` and dirty by `S2AP[1]`, so dirty is not a bit beside write: leave `DIRTY` 0 and use
//!   write protection. Its *break before make* rule is not kept: a fault may fill an entry before the
//!   flush of what was there, and [splitting and collapsing](crate::nested) replace a page by a table. That needs
//!   `FEAT_BBM` level 2, or a flush in those places first.

mod ept;
mod npt;
mod sv48x4;

use bitflags::bitflags;

pub use self::ept::Ept;
pub use self::npt::Npt;
pub use self::sv48x4::Sv48x4;

use crate::host::Pfn;
use crate::level::{Level, PAGE_SHIFT};

bitflags! {
    /// What an access does, and what an entry allows.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct Access: u8 {
        /// Loads.
        const READ = 1;
        /// Stores.
        const WRITE = 2;
        /// Instruction fetches.
        const EXECUTE = 4;
    }
}

/// How the host's processor caches a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum MemoryType {
    /// Ordinary memory.
    #[default]
    WriteBack,
    /// Writes go through to memory.
    WriteThrough,
    /// Frame buffers. [`Npt`] has it as uncacheable: the power-on page attribute table lacks it.
    WriteCombining,
    /// Device registers.
    Uncacheable,
}

/// A processor's entries. See the [module documentation](self).
pub trait Format: Copy + Send + Sync + 'static {
    /// What it is called.
    const NAME: &'static str;
    /// How many levels of tables there are; the root is at this level.
    const LEVELS: u8;
    /// How many tables side by side make the root; a power of two.
    const ROOT_TABLES: usize = 1;
    /// The lowest bit of the frame number in present entries; the bits above it are the number's, as far as it goes.
    const FRAME_SHIFT: u32 = PAGE_SHIFT;
    /// The largest page.
    const LARGEST: Level;
    /// Set in a present entry that the processor may write through.
    const WRITE: u64;
    /// Set by the processor in leaves that it used; 0 if it does not.
    const ACCESSED: u64;
    /// Set by the processor in leaves that it wrote through; 0 if it does not.
    const DIRTY: u64;
    /// In a leaf, ours: the host and the slot allow writing.
    const MAY_WRITE: u64;
    /// In an empty entry, ours: a processor may still have the translation that was here.
    const STALE: u64;
    /// In an empty entry beside [`STALE`](Self::STALE), ours: with that translation it may write.
    const STALE_WRITABLE: u64;
    /// All that an empty entry says besides its nonce.
    const STALE_BITS: u64 = Self::STALE | Self::STALE_WRITABLE;

    /// An entry that leads to a table, allowing everything.
    fn table(table: Pfn) -> u64;

    /// An entry that maps the page at `pfn`, which is aligned to its size. Neither accessed nor dirty; `access`
    /// allows reading at least, and `WRITE` in it makes the page writable at once.
    fn leaf(pfn: Pfn, level: Level, access: Access, memory: MemoryType) -> u64;

    /// An entry that maps nothing. Different nonces make different entries, up to the bits that there are, at least 50;
    /// nonce 0 is the entry 0.
    fn empty(nonce: u64) -> u64;

    /// Whether the processor uses the entry.
    fn is_present(entry: u64) -> bool;

    /// Whether the entry leads to a table.
    fn is_table(entry: u64, level: Level) -> bool;

    /// Where a present entry leads: the table, or the first frame of the page.
    fn pfn(entry: u64, level: Level) -> Pfn;

    /// What a leaf allows.
    fn access(entry: u64) -> Access;

    /// How a leaf is cached.
    fn memory(entry: u64) -> MemoryType;

    /// Whether the entry maps a page.
    #[inline]
    fn is_leaf(entry: u64, level: Level) -> bool {
        Self::is_present(entry) && !Self::is_table(entry, level)
    }

    /// The same leaf, a level below: the first of the pages that it is split into, with its accessed, dirty and
    /// software bits.
    #[inline]
    fn split(entry: u64, level: Level) -> u64 {
        let below =
            Self::leaf(Self::pfn(entry, level), level.down(), Self::access(entry), Self::memory(entry));
        below | entry & (Self::ACCESSED | Self::DIRTY | Self::MAY_WRITE)
    }

    /// The same leaf, a level above: what pages of which `entry` is the first are collapsed into.
    #[inline]
    fn collapse(entry: u64, level: Level) -> u64 {
        let above = Self::leaf(Self::pfn(entry, level), level.up(), Self::access(entry), Self::memory(entry));
        above | entry & (Self::ACCESSED | Self::DIRTY | Self::MAY_WRITE)
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
