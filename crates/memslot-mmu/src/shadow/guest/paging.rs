//! What the control registers say about paging.

use memslot::Gpa;

use super::access::{ErrorCode, GuestAccess, PageFault, Rights};
use super::entry::{EntrySize, NO_EXECUTE, PRESENT, ReservedBits, USER, WRITE};
use super::tables::GuestTables;
use crate::level::Level;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LME: u64 = 1 << 8;
const EFER_NXE: u64 = 1 << 11;

/// A guest's registers that paging depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[allow(missing_docs, reason = "their names say it")]
pub struct Registers {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

/// What the guest's processor can do as far as page tables show it: from its CPUID.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Processor {
    /// The width of physical addresses, 32 to 52: address bits from here on are reserved in entries.
    pub physical_address_bits: u8,
    /// Pages of 1 GiB; without them the page-size bit is reserved in level 3.
    pub gigabyte_pages: bool,
    /// 4 MiB pages above 4 GiB, in 32-bit tables. As far up as the physical addresses go, at most 40 bits.
    pub pse36: bool,
    /// AMD's processors reserve bit 8 (global) in the entries of levels 4 and 5.
    pub amd: bool,
}

impl Default for Processor {
    /// AMD's, with 48 bits and all the rest.
    fn default() -> Self {
        Self { physical_address_bits: 48, gigabyte_pages: true, pse36: true, amd: true }
    }
}

/// The shape of a guest's page tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Mode {
    /// `CR0.PG` is 0: addresses are physical, 32 bits of them.
    Off,
    /// Two levels of 1024 entries of 4 bytes.
    Bits32,
    /// Four registers, and two levels of 512 entries of 8 bytes.
    Pae,
    /// Long mode, four levels.
    Level4,
    /// Long mode, five levels (`CR4.LA57`).
    Level5,
}

/// A PDPTE has a reserved bit set: loading CR3 (or changing CR0 or CR4) raises a general-protection fault with
/// error code 0, and nothing is loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "PDPTE {index} is {value:#x}, which has a reserved bit set: a general-protection fault for the guest"
)]
pub struct BadPdpte {
    /// Which one, 0 to 3.
    pub index: u8,
    /// What it is.
    pub value: u64,
}

/// A guest's paging: all that a walk needs to know besides the tables.
///
/// ```
/// use memslot::Gpa;
/// use memslot_mmu::shadow::guest::{GuestPaging, Mode, Processor, Registers};
///
/// let linux = Registers { cr0: 0x8005_0033, cr3: 0x1234_5018, cr4: 0x6f0, efer: 0xd01 };
/// let paging = GuestPaging::new(linux, Processor::default());
/// assert_eq!(paging.mode(), Mode::Level4);
/// assert_eq!(paging.root(), Gpa::new(0x1234_5000));
/// assert!(paging.no_execute() && paging.write_protect() && !paging.smep());
/// assert!(paging.is_canonical(0xffff_8000_0000_0000) && !paging.is_canonical(1 << 47));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GuestPaging {
    registers: Registers,
    processor: Processor,
    mode: Mode,
    /// For PAE: what the last load of CR3 has put into the processor.
    pdptes: [u64; 4],
    reserved: ReservedBits,
}

impl GuestPaging {
    /// Paging as these registers say it. In PAE mode follows [`load_pdptes`](Self::load_pdptes) or
    /// [`set_pdptes`](Self::set_pdptes); without either no PDPTE is present.
    ///
    /// Registers that no processor accepts (long mode without PAE) are read as if the bit that makes them so
    /// were not set.
    #[must_use]
    pub fn new(registers: Registers, processor: Processor) -> Self {
        let Registers { cr0, cr4, efer, .. } = registers;
        let mode = match (cr0 & CR0_PG != 0, cr4 & CR4_PAE != 0, efer & EFER_LME != 0, cr4 & CR4_LA57 != 0) {
            (false, ..) => Mode::Off,
            (_, false, ..) => Mode::Bits32,
            (_, _, false, _) => Mode::Pae,
            (.., false) => Mode::Level4,
            (.., true) => Mode::Level5,
        };
        let no_execute = mode >= Mode::Pae && efer & EFER_NXE != 0;
        let pse = mode != Mode::Bits32 || cr4 & CR4_PSE != 0;
        let reserved = ReservedBits::new(mode, &processor, no_execute, pse);
        Self { registers, processor, mode, pdptes: [0; 4], reserved }
    }

    /// Reads the four PDPTEs of PAE paging, as the processor does when CR3 is loaded and when paging is changed; does
    /// nothing in other modes. One that lies in no slot counts as not present.
    ///
    /// # Errors
    /// That of the tables. Inside: which PDPTE is bad; the old ones stay.
    pub fn load_pdptes<T: GuestTables + ?Sized>(
        &mut self,
        tables: &T,
    ) -> Result<Result<(), BadPdpte>, T::Error> {
        let mut pdptes = [0; 4];
        if self.mode != Mode::Pae {
            return Ok(Ok(()));
        }
        for (gpa, pdpte) in (self.root().get()..).step_by(8).zip(&mut pdptes) {
            *pdpte = tables.read(Gpa::new(gpa), EntrySize::Eight)?.unwrap_or(0);
        }
        Ok(self.set_pdptes(pdptes))
    }

    /// Takes PDPTEs that are known: from the control block of a virtual machine, or a saved state.
    ///
    /// # Errors
    /// One is bad; the old ones stay.
    pub fn set_pdptes(&mut self, pdptes: [u64; 4]) -> Result<(), BadPdpte> {
        for (index, value) in (0..).zip(pdptes) {
            if value & PRESENT != 0 && value & ReservedBits::of_pdpte(&self.processor) != 0 {
                return Err(BadPdpte { index, value });
            }
        }
        self.pdptes = pdptes;
        Ok(())
    }

    /// The PDPTEs of PAE paging; 0 before they are loaded, and in other modes.
    #[must_use]
    pub const fn pdptes(&self) -> [u64; 4] {
        self.pdptes
    }

    /// The registers it was made from.
    #[must_use]
    pub const fn registers(&self) -> Registers {
        self.registers
    }

    /// The processor it was made for.
    #[must_use]
    pub const fn processor(&self) -> Processor {
        self.processor
    }

    /// The shape of the tables.
    #[inline]
    #[must_use]
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// Where CR3 leads: the table of the highest level (for PAE the four PDPTEs, 32 bytes anywhere in a page). Without
    /// paging it means nothing.
    #[inline]
    #[must_use]
    pub const fn root(&self) -> Gpa {
        Gpa::new(
            self.registers.cr3
                & match self.mode {
                    Mode::Off => 0,
                    Mode::Bits32 => 0xffff_f000,
                    Mode::Pae => 0xffff_ffe0,
                    Mode::Level4 | Mode::Level5 => super::entry::ADDRESS,
                },
        )
    }

    /// The level of the highest table in memory: 2 for 32-bit and PAE tables. `None` without paging.
    #[inline]
    #[must_use]
    pub const fn root_level(&self) -> Option<Level> {
        Level::new(match self.mode {
            Mode::Off => 0,
            Mode::Bits32 | Mode::Pae => 2,
            Mode::Level4 => 4,
            Mode::Level5 => 5,
        })
    }

    /// The size of an entry of the tables.
    #[inline]
    #[must_use]
    pub const fn entry_size(&self) -> EntrySize {
        match self.mode {
            Mode::Off | Mode::Bits32 => EntrySize::Four,
            _ => EntrySize::Eight,
        }
    }

    /// `CR0.WP`: supervisors need [`Rights::WRITE`], too.
    #[inline]
    #[must_use]
    pub const fn write_protect(&self) -> bool {
        self.registers.cr0 & CR0_WP != 0
    }

    /// `EFER.NXE`, where the entries have the bit: in PAE and long mode.
    #[inline]
    #[must_use]
    pub const fn no_execute(&self) -> bool {
        !matches!(self.mode, Mode::Off | Mode::Bits32) && self.registers.efer & EFER_NXE != 0
    }

    /// `CR4.SMEP`: supervisors cannot execute users' pages.
    #[inline]
    #[must_use]
    pub const fn smep(&self) -> bool {
        self.registers.cr4 & CR4_SMEP != 0
    }

    /// `CR4.SMAP`: supervisors do not read or write users' pages, unless `RFLAGS.AC` is set.
    #[inline]
    #[must_use]
    pub const fn smap(&self) -> bool {
        self.registers.cr4 & CR4_SMAP != 0
    }

    /// `CR4.PGE`: there are global pages, which stay when CR3 is loaded.
    #[inline]
    #[must_use]
    pub const fn global_pages(&self) -> bool {
        self.registers.cr4 & CR4_PGE != 0
    }

    #[inline]
    pub(super) const fn reserved(&self) -> &ReservedBits {
        &self.reserved
    }

    /// Whether a long-mode processor translates `address` at all. Without long mode every address of 32 bits is.
    #[must_use]
    pub const fn is_canonical(&self, address: u64) -> bool {
        let above = match self.mode {
            Mode::Level4 => 47,
            Mode::Level5 => 56,
            _ => return address >> 32 == 0,
        };
        let sign = address >> above;
        sign == 0 || sign == u64::MAX >> above
    }

    /// Whether the rights of all entries of a walk together allow this. Without paging everything is allowed.
    #[inline]
    #[must_use]
    pub const fn permits(&self, rights: Rights, access: GuestAccess) -> bool {
        if matches!(self.mode, Mode::Off) {
            return true;
        }
        if access.contains(GuestAccess::FETCH) && !rights.contains(Rights::EXECUTE) {
            return false;
        }
        let is_write = access.contains(GuestAccess::WRITE);
        if access.contains(GuestAccess::USER) {
            return rights.contains(Rights::USER) && (!is_write || rights.contains(Rights::WRITE));
        }
        if rights.contains(Rights::USER) {
            if access.contains(GuestAccess::FETCH) {
                if self.smep() {
                    return false;
                }
            } else if self.smap() && !access.contains(GuestAccess::AC) {
                return false;
            }
        }
        !is_write || rights.contains(Rights::WRITE) || !self.write_protect()
    }

    /// The page fault that `access` to `address` raises; `why` is of `PRESENT` and `RESERVED`.
    pub(in crate::shadow) fn page_fault(
        &self,
        address: u64,
        access: GuestAccess,
        why: ErrorCode,
    ) -> PageFault {
        let mut error_code = why;
        error_code.set(ErrorCode::WRITE, access.contains(GuestAccess::WRITE));
        error_code.set(ErrorCode::USER, access.contains(GuestAccess::USER));
        let fetches_are_told = self.no_execute() || self.smep();
        error_code.set(ErrorCode::FETCH, fetches_are_told && access.contains(GuestAccess::FETCH));
        PageFault { address, error_code }
    }

    /// What one entry permits by itself.
    #[inline]
    #[must_use]
    pub const fn rights_of(&self, entry: u64) -> Rights {
        let mut rights = Rights::empty();
        if entry & WRITE != 0 {
            rights = rights.union(Rights::WRITE);
        }
        if entry & USER != 0 {
            rights = rights.union(Rights::USER);
        }
        if !self.no_execute() || entry & NO_EXECUTE == 0 {
            rights = rights.union(Rights::EXECUTE);
        }
        rights
    }
}
