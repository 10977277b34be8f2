//! A second walker, written from the manuals' prose and without a look at the first: one function for each kind of
//! table, every rule where it applies.

use memslot_mmu::shadow::guest::{EntrySize, Processor, Registers};

/// Where the entries are.
pub trait Source {
    /// The entry at this address; `None` where there is no memory.
    fn entry(&self, gpa: u64, size: EntrySize) -> Option<u64>;
}

/// What an access does, in the words of the manual.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    pub write: bool,
    pub user: bool,
    pub fetch: bool,
    pub ac: bool,
}

/// A page that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub gpa: u64,
    pub bytes: u64,
    pub user: bool,
    pub writable: bool,
    pub executable: bool,
    /// The entries that were gone through: address and value before any bit is set.
    pub entries: Vec<(u64, u64)>,
    pub dirty_at: u64,
}

/// A walk in progress.
struct Walker<'a> {
    memory: &'a dyn Source,
    registers: Registers,
    processor: Processor,
    want: Want,
    entries: Vec<(u64, u64)>,
    all_user: bool,
    all_writable: bool,
    any_nx: bool,
}

fn bit(value: u64, number: u32) -> bool {
    value >> number & 1 == 1
}

/// The page, or the error code.
pub fn naive_walk(
    memory: &dyn Source,
    registers: Registers,
    processor: Processor,
    pdptes: [u64; 4],
    address: u64,
    want: Want,
) -> Result<Found, u32> {
    let entries = Vec::new();
    let walker = Walker {
        memory,
        registers,
        processor,
        want,
        entries,
        all_user: true,
        all_writable: true,
        any_nx: false,
    };
    let paging = bit(registers.cr0, 31);
    let pae = bit(registers.cr4, 5);
    let long = bit(registers.efer, 8);
    if !paging {
        panic!("nothing to walk");
    } else if !pae {
        walker.two_levels(address)
    } else if !long {
        walker.pae(pdptes, address)
    } else {
        walker.long(address)
    }
}

impl Walker<'_> {
    fn nxe(&self) -> bool {
        bit(self.registers.efer, 11)
    }

    /// Makes an error code: P and RSVD are given, the others follow from the access.
    fn fault(&self, present: bool, reserved: bool) -> u32 {
        let smep = bit(self.registers.cr4, 20);
        let pae = bit(self.registers.cr4, 5);
        let instruction = self.want.fetch && (smep || (pae && self.nxe()));
        u32::from(present)
            + 2 * u32::from(self.want.write)
            + 4 * u32::from(self.want.user)
            + 8 * u32::from(reserved)
            + 16 * u32::from(instruction)
    }

    fn read(&mut self, gpa: u64, size: EntrySize) -> Result<u64, u32> {
        let Some(entry) = self.memory.entry(gpa, size) else { return Err(self.fault(false, false)) };
        self.entries.push((gpa, entry));
        if !bit(entry, 0) {
            return Err(self.fault(false, false));
        }
        self.all_writable &= bit(entry, 1);
        self.all_user &= bit(entry, 2);
        Ok(entry)
    }

    fn must_be_zero(&self, entry: u64, bits: impl IntoIterator<Item = u32>) -> Result<(), u32> {
        if bits.into_iter().any(|number| bit(entry, number)) { Err(self.fault(true, true)) } else { Ok(()) }
    }

    fn nx_bit(&mut self, entry: u64) -> Result<(), u32> {
        if !self.nxe() {
            return self.must_be_zero(entry, [63]);
        }
        self.any_nx |= bit(entry, 63);
        Ok(())
    }

    fn two_levels(mut self, address: u64) -> Result<Found, u32> {
        let address = address % (1 << 32);
        let directory = self.registers.cr3 % (1 << 32) / 4096 * 4096;
        let pde = self.read(directory + 4 * (address >> 22), EntrySize::Four)?;
        if bit(pde, 7) && bit(self.registers.cr4, 4) {
            // How many address bits above 32 the bits from 13 on can hold: none without PSE-36.
            let width = if self.processor.pse36 {
                u32::from(self.processor.physical_address_bits).min(40)
            } else {
                32
            };
            self.must_be_zero(pde, (13 + (width - 32))..=21)?;
            let base = (pde >> 13 & 0xff) * (1 << 32) + (pde >> 22) * (1 << 22);
            return self.page(base, 4 << 20, address);
        }
        let pte = self.read(pde / 4096 * 4096 + 4 * (address >> 12 & 1023), EntrySize::Four)?;
        self.page(pte / 4096 * 4096, 4096, address)
    }

    fn pae(mut self, pdptes: [u64; 4], address: u64) -> Result<Found, u32> {
        let address = address % (1 << 32);
        let width = u32::from(self.processor.physical_address_bits);
        let frame = |entry: u64| entry & ((1 << 52) - 1) & !4095;
        let pdpte = pdptes[usize::try_from(address >> 30).unwrap()];
        if !bit(pdpte, 0) {
            return Err(self.fault(false, false));
        }
        let pde = self.read(frame(pdpte) + 8 * (address >> 21 & 511), EntrySize::Eight)?;
        self.must_be_zero(pde, width..=62)?;
        self.nx_bit(pde)?;
        if bit(pde, 7) {
            self.must_be_zero(pde, 13..=20)?;
            return self.page(frame(pde) & !0x1f_ffff, 2 << 20, address);
        }
        let pte = self.read(frame(pde) + 8 * (address >> 12 & 511), EntrySize::Eight)?;
        self.must_be_zero(pte, width..=62)?;
        self.nx_bit(pte)?;
        self.page(frame(pte), 4096, address)
    }

    fn long(mut self, address: u64) -> Result<Found, u32> {
        let width = u32::from(self.processor.physical_address_bits);
        let frame = |entry: u64| entry & ((1 << 52) - 1) & !4095;
        let mut table = frame(self.registers.cr3);
        let upper = if bit(self.registers.cr4, 12) { &[48, 39][..] } else { &[39] };
        for shift in upper {
            let entry = self.read(table + 8 * (address >> shift & 511), EntrySize::Eight)?;
            self.must_be_zero(entry, width..=51)?;
            self.nx_bit(entry)?;
            self.must_be_zero(entry, [7])?;
            if self.processor.amd {
                self.must_be_zero(entry, [8])?;
            }
            table = frame(entry);
        }
        let pdpte = self.read(table + 8 * (address >> 30 & 511), EntrySize::Eight)?;
        self.must_be_zero(pdpte, width..=51)?;
        self.nx_bit(pdpte)?;
        if bit(pdpte, 7) {
            if !self.processor.gigabyte_pages {
                return Err(self.fault(true, true));
            }
            self.must_be_zero(pdpte, 13..=29)?;
            return self.page(frame(pdpte) & !0x3fff_ffff, 1 << 30, address);
        }
        let pde = self.read(frame(pdpte) + 8 * (address >> 21 & 511), EntrySize::Eight)?;
        self.must_be_zero(pde, width..=51)?;
        self.nx_bit(pde)?;
        if bit(pde, 7) {
            self.must_be_zero(pde, 13..=20)?;
            return self.page(frame(pde) & !0x1f_ffff, 2 << 20, address);
        }
        let pte = self.read(frame(pde) + 8 * (address >> 12 & 511), EntrySize::Eight)?;
        self.must_be_zero(pte, width..=51)?;
        self.nx_bit(pte)?;
        self.page(frame(pte), 4096, address)
    }

    fn page(self, base: u64, bytes: u64, address: u64) -> Result<Found, u32> {
        let found = Found {
            gpa: base + address % bytes,
            bytes,
            user: self.all_user,
            writable: self.all_writable,
            executable: !self.any_nx,
            dirty_at: self.entries.last().unwrap().0,
            entries: self.entries.clone(),
        };
        if found.allows(self.registers, self.want) { Ok(found) } else { Err(self.fault(true, false)) }
    }
}

impl Found {
    /// Section 4.6, "Access Rights", case by case.
    pub fn allows(&self, registers: Registers, want: Want) -> bool {
        let wp = bit(registers.cr0, 16);
        let smep = bit(registers.cr4, 20);
        let smap = bit(registers.cr4, 21);
        let Want { write, user, fetch, ac } = want;
        match (user, self.user) {
            // Supervisor-mode accesses to supervisor-mode addresses.
            (false, false) if fetch => self.executable,
            (false, false) if write => !wp || self.writable,
            (false, false) => true,
            // Supervisor-mode accesses to user-mode addresses.
            (false, true) if fetch => !smep && self.executable,
            (false, true) if write => (!smap || ac) && (!wp || self.writable),
            (false, true) => !smap || ac,
            // User-mode accesses.
            (true, false) => false,
            (true, true) if fetch => self.executable,
            (true, true) if write => self.writable,
            (true, true) => true,
        }
    }
}
