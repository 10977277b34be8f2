//! The role of a shadow page: everything besides its gfn that decides what its entries mean.
//!
//! The same table of the guest is read in different ways: as a table of one level or another, for supervisors and
//! for users, with or without `CR0.WP`. Each of these is a shadow page of its own. **Nothing that changes
//! the meaning of an entry may be missing here**: a shadow page that is found by too small a key is used for what it
//! is not (CVE-2026-53359: the gfn was compared, the role was not).

use memslot::{AddressSpaceId, Gfn};

use super::guest::{GuestPaging, Mode, Processor, Rights};
use crate::level::Level;

/// Everything besides its gfn that decides what a shadow page's entries mean. **Nothing that changes their meaning is missing.**
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Role {
    /// The level of the shadow table.
    pub level: Level,
    /// Whether it maps a piece of guest memory as it is (of a large page of the guest, or without paging) and shadows no table.
    pub direct: bool,
    /// What all entries above permit together; for a direct page what the guest's large page permits, all levels included
    /// (CVE-2021-38198).
    pub rights: Rights,
    /// Which part of the guest's table it is for, where the guest's entries have four bytes and a shadow table has room for
    /// half or a quarter of them.
    pub quadrant: u8,
    /// Where the frames are looked up: that of system management mode is another one.
    pub address_space: AddressSpaceId,
    /// How the guest's entries are read.
    pub reading: Reading,
}

/// How the guest's entries are read: what the control registers say.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Reading {
    /// The shape of the guest's tables, and so the size of entries, and which of their bits are reserved.
    pub mode: Mode,
    /// `EFER.NXE`.
    pub no_execute: bool,
    /// `CR0.WP`.
    pub write_protect: bool,
    /// `CR4.SMEP` without `CR0.WP`: what supervisors may write although it is read-only, they must not execute.
    pub smep_without_write_protect: bool,
    /// `CR4.SMAP` without `CR0.WP`.
    pub smap_without_write_protect: bool,
    /// `CR4.PSE`, which decides about large pages of 32-bit tables.
    pub page_size_extension: bool,
    /// What the processor can do: which bits it reserves. Virtual processors need not all be told to be the same.
    pub processor: Processor,
}

impl Reading {
    /// As these control registers say.
    #[must_use]
    pub fn of(paging: &GuestPaging) -> Self {
        let mode = paging.mode();
        let has_tables = mode != Mode::Off;
        let write_protect = has_tables && paging.write_protect();
        Self {
            mode,
            no_execute: paging.no_execute(),
            write_protect,
            smep_without_write_protect: has_tables && paging.smep() && !write_protect,
            smap_without_write_protect: has_tables && paging.smap() && !write_protect,
            page_size_extension: mode == Mode::Bits32 && paging.registers().cr4 & 1 << 4 != 0,
            processor: if has_tables { paging.processor() } else { Processor::default() },
        }
    }
}

/// What a shadow page is found by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// The frame of the guest's table; of a direct page the first frame that it maps.
    pub gfn: Gfn,
    /// How it is read.
    pub role: Role,
}
