//! Levels of a page table, and the type of a table.
//!
//! Levels are counted as KVM counts them: 1 is the lowest, whose entries map 4 KiB pages; an entry of level 2 maps
//! 2 MiB or leads to a table of level 1, and so on up to the root.

use core::fmt;

use memslot::{Gfn, GfnRange};

use crate::sync::AtomicU64;

/// log2 of the entries of a table. Models run by loom have tables of two entries.
pub(crate) const TABLE_BITS: u32 = if cfg!(loom) { 1 } else { 9 };

/// How many entries a table has: 512.
pub const ENTRIES: usize = 1 << TABLE_BITS;

/// log2 of the size of a page and of a table, in bytes.
pub const PAGE_SHIFT: u32 = 12;

/// A table as the processor sees it. Every access is atomic: the processor sets accessed and dirty bits meanwhile.
#[repr(C, align(4096))]
pub struct Table(pub [AtomicU64; ENTRIES]);

impl Table {
    /// The entry of `level` that `gfn` goes through.
    #[inline]
    pub(crate) fn entry(&self, level: Level, gfn: u64) -> &AtomicU64 {
        &self.0[level.index(gfn)]
    }
}

/// A level of a page table, from 1 (4 KiB pages) upwards.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// Level 1: pages of 4 KiB.
    pub const K4: Self = Self(1);
    /// Level 2: pages of 2 MiB.
    pub const M2: Self = Self(2);
    /// Level 3: pages of 1 GiB.
    pub const G1: Self = Self(3);

    /// The level with this number; `None` for 0 and for more than 5.
    ///
    /// ```
    /// use memslot_mmu::Level;
    /// assert_eq!(Level::new(2), Some(Level::M2));
    /// assert_eq!(Level::M2.pages(), 512);
    /// assert_eq!(Level::new(0), None);
    /// ```
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if 0 < number && number <= 5 { Some(Self(number)) } else { None }
    }

    /// The number.
    #[inline]
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// How many 4 KiB pages an entry of this level covers.
    #[inline]
    #[must_use]
    pub const fn pages(self) -> u64 {
        1 << self.shift()
    }

    /// The frames that share an entry of this level with `gfn`; `None` where their end passes 2^64 - 1.
    #[inline]
    #[must_use]
    pub const fn block(self, gfn: Gfn) -> Option<GfnRange> {
        GfnRange::with_len(Gfn::new(self.align_down(gfn.get())), self.pages())
    }

    #[inline]
    const fn shift(self) -> u32 {
        TABLE_BITS * (self.0 as u32 - 1)
    }

    /// The first frame of the entry that `gfn` goes through.
    #[inline]
    pub(crate) const fn align_down(self, gfn: u64) -> u64 {
        gfn & !(self.pages() - 1)
    }

    #[inline]
    pub(crate) const fn is_aligned(self, gfn: u64) -> bool {
        gfn & (self.pages() - 1) == 0
    }

    /// Which entry of its table `gfn` goes through.
    #[inline]
    pub(crate) const fn index(self, gfn: u64) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "masked to nine bits")]
        let index = (gfn >> self.shift()) as usize & (ENTRIES - 1);
        index
    }

    /// The level below; that of 4 KiB pages has none and stays.
    #[inline]
    pub(crate) const fn down(self) -> Self {
        Self(if self.0 > 1 { self.0 - 1 } else { 1 })
    }

    #[inline]
    pub(crate) const fn up(self) -> Self {
        Self(self.0 + 1)
    }

    /// The first frame behind those that a table tree of so many levels reaches, its root being `tables` side by
    /// side.
    pub(crate) const fn end_of(levels: u8, tables: usize) -> u64 {
        (tables as u64) << (TABLE_BITS * levels as u32)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("4 KiB"),
            2 => f.write_str("2 MiB"),
            3 => f.write_str("1 GiB"),
            4 => f.write_str("512 GiB"),
            _ => f.write_str("256 TiB"),
        }
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Level({})", self.0)
    }
}
