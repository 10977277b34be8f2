//! What an entry says: its format in each mode, and which of its bits are reserved.

use memslot::{Gfn, GfnRange};

use super::paging::{GuestPaging, Mode, Processor};
use crate::level::{Level, PAGE_SHIFT};

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const WRITE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
pub(super) const GLOBAL: u64 = 1 << 8;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// Address bits of an entry of eight bytes.
pub(super) const ADDRESS: u64 = bits(PAGE_SHIFT, 51);

/// Bits `first` to `last`, both included; none where `first` is greater.
const fn bits(first: u32, last: u32) -> u64 {
    if first > last { 0 } else { u64::MAX >> (63 - last) & u64::MAX << first }
}

/// How many bytes an entry has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EntrySize {
    /// 32-bit paging.
    Four,
    /// All others.
    Eight,
}

impl EntrySize {
    /// The number of bytes.
    #[inline]
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// How many entries a table has.
    #[inline]
    #[must_use]
    pub const fn entries(self) -> u64 {
        4096 / self.bytes()
    }

    /// log2 of that.
    #[inline]
    pub(super) const fn index_bits(self) -> u32 {
        match self {
            Self::Four => 10,
            Self::Eight => 9,
        }
    }
}

/// What an entry is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Entry {
    /// Not present. All other bits mean nothing.
    NotPresent,
    /// Present, with a reserved bit set: any access through it is a page fault that says so.
    Reserved,
    /// Leads to the table in this frame.
    Table(Gfn),
    /// Maps these frames: a page of 4 KiB, 2 MiB, 4 MiB or 1 GiB.
    Page(GfnRange),
}

impl GuestPaging {
    /// What `value` is as an entry of a table of `level`.
    ///
    /// ```
    /// use memslot::{Gfn, GfnRange};
    /// use memslot_mmu::Level;
    /// use memslot_mmu::shadow::guest::{Entry, GuestPaging, Processor, Registers};
    ///
    /// let without_pae = Registers { cr0: 0x8000_0011, cr4: 0x10, ..Registers::default() };
    /// let paging = GuestPaging::new(without_pae, Processor::default());
    /// let page = GfnRange::with_len(Gfn::new(0x400), 0x400).unwrap();
    /// assert_eq!(paging.entry(Level::M2, 0x0040_0083), Entry::Page(page));
    /// assert_eq!(paging.entry(Level::M2, 0x0040_0003), Entry::Table(Gfn::new(0x400)));
    /// assert_eq!(paging.entry(Level::M2, 0x0060_0083), Entry::Reserved);
    /// assert_eq!(paging.entry(Level::M2, 0x0060_0082), Entry::NotPresent);
    /// ```
    #[inline]
    #[must_use]
    pub fn entry(&self, level: Level, value: u64) -> Entry {
        if value & PRESENT == 0 {
            return Entry::NotPresent;
        }
        let is_page = self.is_page(level, value);
        if value & self.reserved().of(level, is_page) != 0 {
            return Entry::Reserved;
        }
        let frame = (value & ADDRESS) >> PAGE_SHIFT;
        if !is_page {
            return Entry::Table(Gfn::new(frame));
        }
        let (first, pages) = match (self.mode(), level) {
            (_, Level::K4) => (frame, 1),
            // Bits 20 to 13 are address bits 39 to 32.
            (Mode::Bits32, _) => (frame & 0xf_fc00 | (frame >> 1 & 0xff) << 20, 1024),
            // Bit 12 is a memory type.
            _ => (level.align_down(frame), level.pages()),
        };
        // No physical address has more than 52 bits.
        GfnRange::with_len(Gfn::new(first), pages).map_or(Entry::Reserved, Entry::Page)
    }

    /// Whether a present entry ends the walk.
    #[inline]
    fn is_page(&self, level: Level, value: u64) -> bool {
        level == Level::K4 || (value & LARGE != 0 && self.reserved().large[usize::from(level.get() - 1)])
    }
}

/// The reserved bits of entries that are present, by level.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct ReservedBits {
    table: [u64; 5],
    page: [u64; 5],
    /// Whether the page-size bit makes a page. Where it does not, it is ignored or one of the reserved bits.
    large: [bool; 5],
}

impl ReservedBits {
    pub(super) fn new(mode: Mode, processor: &Processor, no_execute: bool, pse: bool) -> Self {
        let width = u32::from(processor.physical_address_bits).clamp(32, 52);
        let mut this = Self { table: [0; 5], page: [0; 5], large: [false; 5] };
        if matches!(mode, Mode::Off | Mode::Bits32) {
            this.large[1] = pse;
            // Bits 20 to 13 are address bits 39 to 32, as far as there are so many; bit 21 is none.
            let first = if processor.pse36 { width.min(40) - 32 + 13 } else { 13 };
            this.page[1] = bits(first, 21);
            return this;
        }
        // Above the address, long mode has bits for software and for protection keys, PAE has nothing.
        let mut always = bits(width, if mode == Mode::Pae { 62 } else { 51 });
        if !no_execute {
            always |= NO_EXECUTE;
        }
        this.table = [always; 5];
        this.page = [always; 5];
        this.large[1] = true;
        this.page[1] |= bits(13, 20);
        this.large[2] = processor.gigabyte_pages;
        this.page[2] |= bits(13, 29);
        if !processor.gigabyte_pages {
            this.table[2] |= LARGE;
        }
        for table in &mut this.table[3..] {
            *table |= LARGE | if processor.amd { GLOBAL } else { 0 };
        }
        this
    }

    #[inline]
    fn of(&self, level: Level, is_page: bool) -> u64 {
        let index = usize::from(level.get() - 1);
        if is_page { self.page[index] } else { self.table[index] }
    }

    /// Those of the four registers of PAE paging, which are looked at when they are loaded.
    pub(super) fn of_pdpte(processor: &Processor) -> u64 {
        let width = u32::from(processor.physical_address_bits).clamp(32, 52);
        bits(width, 63) | bits(5, 8) | bits(1, 2)
    }
}
