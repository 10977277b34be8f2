//! Walks computed by hand from the manuals: entries, the access, and what the processor does.

use memslot::{Gfn, Gpa};
use memslot_mmu::Level;
use memslot_mmu::shadow::guest::{
    BadPdpte, EntrySize, ErrorCode, GuestAccess, GuestPaging, Mode, NoPage, PageFault, Processor, Registers,
    Rights, Walk, WalkError, walk,
};

use crate::memory::Memory;

const CR0: u64 = 0x8001_0011;
const WITHOUT_WP: u64 = 0x8000_0011;
const PSE: u64 = 0x10;
const PAE: u64 = 0x20;
const PGE: u64 = 0x80;
const LA57: u64 = 0x1000;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const NXE: u64 = 0x800;
const LONG: u64 = 0x500;
const NX: u64 = 1 << 63;

const READ: GuestAccess = GuestAccess::READ;
const WRITE: GuestAccess = GuestAccess::WRITE;
const FETCH: GuestAccess = GuestAccess::FETCH;
const USER: GuestAccess = GuestAccess::USER;
const AC: GuestAccess = GuestAccess::AC;

/// What is expected of a walk: the address it leads to and the entries afterwards; or the error code.
type Expected<'a> = Result<(u64, &'a [u64]), u32>;

struct Guest {
    paging: GuestPaging,
    /// Where the entries are, from the root down.
    at: &'static [u64],
    address: u64,
}

impl Guest {
    fn new(registers: Registers, at: &'static [u64], address: u64) -> Self {
        Self { paging: GuestPaging::new(registers, Processor::default()), at, address }
    }

    /// Four levels: tables in the frames 1, 2, 3, 4 of which the entries 1, 2, 3, 4 are used.
    fn level4(cr0: u64, cr4: u64, efer: u64) -> Self {
        let registers = Registers { cr0, cr3: 0x1018, cr4: PAE | cr4, efer: LONG | efer };
        Self::new(registers, &[0x1008, 0x2010, 0x3018, 0x4020], 0x80_8060_4abc)
    }

    /// 32-bit tables in the frames 1 and 2, entries 0x201 and 0x302.
    fn bits32(cr0: u64, cr4: u64) -> Self {
        let registers = Registers { cr0, cr3: 0x1018, cr4, efer: 0 };
        Self::new(registers, &[0x1804, 0x2c08], 0x8070_2abc)
    }

    /// The PDPTE 2 in a register, the tables in frames 3 and 4 with entries 3 and 4.
    fn pae(cr0: u64, cr4: u64, efer: u64) -> Self {
        let registers = Registers { cr0, cr3: 0x1fe0, cr4: PAE | cr4, efer };
        let mut guest = Self::new(registers, &[0x3018, 0x4020], 0x8060_4abc);
        guest.paging.set_pdptes([0, 0, 0x3001, 0]).unwrap();
        guest
    }

    fn memory(&self, entries: &[u64]) -> Memory {
        let entries: Vec<_> = self.at.iter().copied().zip(entries.iter().copied()).collect();
        Memory::with(&entries, self.paging.entry_size())
    }

    #[track_caller]
    fn walks(&self, entries: &[u64], access: GuestAccess) -> Walk {
        walk(&self.memory(entries), &self.paging, self.address, access).unwrap().unwrap()
    }

    #[track_caller]
    fn check(&self, entries: &[u64], access: GuestAccess, expected: Expected<'_>) {
        let memory = self.memory(entries);
        let found = walk(&memory, &self.paging, self.address, access).unwrap();
        match (found, expected) {
            (Ok(walk), Ok((gpa, after))) => {
                assert_eq!(walk.gpa, Gpa::new(gpa));
                let now: Vec<_> =
                    self.at.iter().map(|at| memory.get(*at, self.paging.entry_size())).collect();
                assert_eq!(now[..after.len()], *after, "entries afterwards");
                assert_eq!(walk.steps().len(), after.len());
                assert!(walk.steps().iter().zip(after).all(|(step, after)| step.entry == *after));
                assert_eq!(walk.is_current(&memory), Ok(true));
            }
            (Err(why), Err(code)) => {
                let NoPage::Fault(fault) = why else { panic!("all tables are in memory: {why:?}") };
                assert_eq!(fault.error_code.bits(), code, "{fault}");
                assert_eq!(fault.address, self.address);
                let before = self.memory(entries);
                assert_eq!(memory.contents(), before.contents(), "a walk that faults changes nothing");
            }
            (found, expected) => panic!("{found:x?}, expected {expected:x?}"),
        }
    }
}

#[test]
fn a_walk_sets_accessed_and_dirty_bits() {
    let guest = Guest::level4(CR0, 0, NXE);
    let tables = [0x2007, 0x3007, 0x4007, 0x9007];
    guest.check(&tables, READ, Ok((0x9abc, &[0x2027, 0x3027, 0x4027, 0x9027])));
    guest.check(&tables, WRITE, Ok((0x9abc, &[0x2027, 0x3027, 0x4027, 0x9067])));
    guest.check(&tables, USER | FETCH, Ok((0x9abc, &[0x2027, 0x3027, 0x4027, 0x9027])));
    // A set dirty bit stays, and in tables bit 6 is ignored.
    guest.check(&[0x2047, 0x3007, 0x4007, 0x9047], READ, Ok((0x9abc, &[0x2067, 0x3027, 0x4027, 0x9067])));
    let walk = guest.walks(&tables, READ);
    assert_eq!((walk.level(), walk.dirty, walk.global), (Some(Level::K4), false, false));
    assert_eq!((walk.page.start(), walk.page.len()), (Gfn::new(9), 1));
    let steps: Vec<_> =
        walk.steps().iter().map(|step| (step.table.get(), step.index(EntrySize::Eight))).collect();
    assert_eq!(steps, [(1, 1), (2, 2), (3, 3), (4, 4)]);
    assert!(guest.walks(&tables, WRITE).dirty);
}

#[test]
fn not_present_at_each_level() {
    let guest = Guest::level4(CR0, 0, NXE);
    for level in 0..4 {
        let mut tables = [0x2007, 0x3007, 0x4007, 0x9007];
        // All other bits are set, reserved ones too: they mean nothing.
        tables[level] = !1;
        guest.check(&tables, READ, Err(0));
        guest.check(&tables, WRITE, Err(2));
        guest.check(&tables, USER, Err(4));
        guest.check(&tables, USER | WRITE, Err(6));
        guest.check(&tables, USER | FETCH, Err(0x14));
        // What is above may forbid it: what is not present comes first.
        tables[0] &= !6;
        guest.check(&tables, USER | WRITE, Err(6));
    }
}

#[test]
fn permissions_are_those_of_all_levels() {
    let guest = Guest::level4(CR0, 0, NXE);
    for level in 0..4 {
        let with = |entry: u64| {
            let mut tables = [0x2067, 0x3067, 0x4067, 0x9067];
            tables[level] = tables[level] & !7 | entry;
            tables
        };
        let same = |entry: u64| with(entry);
        // Read-only.
        guest.check(&with(5), READ, Ok((0x9abc, &same(5))));
        guest.check(&with(5), USER, Ok((0x9abc, &same(5))));
        guest.check(&with(5), WRITE, Err(3));
        guest.check(&with(5), USER | WRITE, Err(7));
        // A supervisor's.
        guest.check(&with(3), WRITE, Ok((0x9abc, &same(3))));
        guest.check(&with(3), FETCH, Ok((0x9abc, &same(3))));
        guest.check(&with(3), USER, Err(5));
        guest.check(&with(3), USER | WRITE, Err(7));
        guest.check(&with(3), USER | FETCH, Err(0x15));
        // Not executable.
        guest.check(&with(7 | NX), USER | WRITE, Ok((0x9abc, &same(7 | NX))));
        guest.check(&with(7 | NX), USER | FETCH, Err(0x15));
        guest.check(&with(7 | NX), FETCH, Err(0x11));
        let rights = |entry| guest.walks(&with(entry), READ).rights;
        assert_eq!(rights(5), Rights::USER | Rights::EXECUTE);
        assert_eq!(rights(3), Rights::WRITE | Rights::EXECUTE);
        assert_eq!(rights(7 | NX), Rights::USER | Rights::WRITE);
        // What each step says is of the entries down to it.
        let walk = guest.walks(&with(3), READ);
        for (depth, step) in walk.steps().iter().enumerate() {
            assert_eq!(step.rights.contains(Rights::USER), depth < level);
        }
    }
}

#[test]
fn write_protect_is_for_supervisors() {
    let read_only = [0x2027, 0x3027, 0x4027, 0x9025];
    let written = [0x2027, 0x3027, 0x4027, 0x9065];
    Guest::level4(CR0, 0, 0).check(&read_only, WRITE, Err(3));
    Guest::level4(WITHOUT_WP, 0, 0).check(&read_only, WRITE, Ok((0x9abc, &written)));
    Guest::level4(WITHOUT_WP, 0, 0).check(&read_only, USER | WRITE, Err(7));
}

#[test]
fn supervisors_and_users_pages() {
    let (users, written) = ([0x2027, 0x3027, 0x4027, 0x9027], [0x2027, 0x3027, 0x4027, 0x9067]);
    let supervisors = [0x2027, 0x3027, 0x4027, 0x9023];
    let smep = Guest::level4(CR0, SMEP, 0);
    smep.check(&users, FETCH, Err(0x11));
    smep.check(&users, FETCH | AC, Err(0x11));
    smep.check(&users, READ, Ok((0x9abc, &users)));
    smep.check(&users, USER | FETCH, Ok((0x9abc, &users)));
    smep.check(&supervisors, FETCH, Ok((0x9abc, &supervisors)));
    smep.check(&supervisors, USER | FETCH, Err(0x15));
    let smap = Guest::level4(CR0, SMAP, 0);
    smap.check(&users, READ, Err(1));
    smap.check(&users, WRITE, Err(3));
    smap.check(&users, READ | AC, Ok((0x9abc, &users)));
    smap.check(&users, WRITE | AC, Ok((0x9abc, &written)));
    smap.check(&users, USER | WRITE, Ok((0x9abc, &written)));
    smap.check(&users, FETCH, Ok((0x9abc, &users)));
    smap.check(&supervisors, WRITE, Ok((0x9abc, &[0x2027, 0x3027, 0x4027, 0x9063])));
    // SMAP does not need write protection, and AC does not overrule it.
    Guest::level4(WITHOUT_WP, SMAP, 0).check(&users, WRITE, Err(3));
    let read_only = [0x2027, 0x3027, 0x4027, 0x9025];
    smap.check(&read_only, WRITE | AC, Err(3));
    Guest::level4(WITHOUT_WP, SMAP, 0).check(
        &read_only,
        WRITE | AC,
        Ok((0x9abc, &[0x2027, 0x3027, 0x4027, 0x9065])),
    );
}

#[test]
fn a_fetch_is_told_only_where_it_can_differ() {
    let nothing = [0; 4];
    Guest::level4(CR0, 0, 0).check(&nothing, FETCH, Err(0));
    Guest::level4(CR0, 0, NXE).check(&nothing, FETCH, Err(0x10));
    Guest::level4(CR0, SMEP, 0).check(&nothing, FETCH, Err(0x10));
    Guest::bits32(CR0, 0).check(&nothing, FETCH, Err(0));
    Guest::bits32(CR0, SMEP).check(&nothing, FETCH, Err(0x10));
    // EFER.NXE means nothing to 32-bit tables.
    let registers = Registers { cr0: CR0, cr3: 0x1000, cr4: 0, efer: NXE };
    Guest::new(registers, &[0x1804, 0x2c08], 0x8070_2abc).check(&nothing, FETCH, Err(0));
    Guest::pae(CR0, 0, 0).check(&nothing, FETCH, Err(0));
    Guest::pae(CR0, 0, NXE).check(&nothing, FETCH, Err(0x10));
}

#[test]
fn reserved_bits_win_over_permissions() {
    let guest = Guest::level4(CR0, 0, NXE);
    for level in 0..4 {
        for bit in [48, 51] {
            // Nothing is permitted, and yet it is the reserved bit that is reported.
            let mut tables = [0x2001, 0x3001, 0x4001, 0x9001];
            tables[level] |= 1 << bit;
            guest.check(&tables, READ, Err(9));
            guest.check(&tables, USER | WRITE, Err(0xf));
            guest.check(&tables, USER | FETCH, Err(0x1d));
        }
        for bit in [9, 10, 11, 52, 58, 59, 62] {
            let mut tables = [0x2027, 0x3027, 0x4027, 0x9027];
            tables[level] |= 1 << bit;
            guest.check(&tables, READ, Ok((0x9abc, &tables)));
        }
        // Without EFER.NXE the bit is reserved.
        let mut tables = [0x2007, 0x3007, 0x4007, 0x9007];
        tables[level] |= NX;
        Guest::level4(CR0, 0, 0).check(&tables, READ, Err(9));
        Guest::level4(CR0, SMEP, 0).check(&tables, FETCH, Err(0x19));
    }
    // What is not present further up comes first.
    guest.check(&[0x2007, 0, 0x4007, 1 << 51 | 1], READ, Err(0));
    guest.check(&[0x2007, 1 << 51 | 1, 0, 0], READ, Err(9));
    // The highest level: page size, and on AMD global.
    guest.check(&[0x2087, 0x3007, 0x4007, 0x9007], READ, Err(9));
    guest.check(&[0x2107, 0x3007, 0x4007, 0x9007], READ, Err(9));
    let mut intel = Guest::level4(CR0, 0, NXE);
    intel.paging =
        GuestPaging::new(intel.paging.registers(), Processor { amd: false, ..Processor::default() });
    intel.check(&[0x2087, 0x3007, 0x4007, 0x9007], READ, Err(9));
    intel.check(&[0x2127, 0x3127, 0x4127, 0x9127], READ, Ok((0x9abc, &[0x2127, 0x3127, 0x4127, 0x9127])));
    guest.check(&[0x2027, 0x3127, 0x4127, 0x9127], READ, Ok((0x9abc, &[0x2027, 0x3127, 0x4127, 0x9127])));
}

#[test]
fn large_pages_of_long_mode() {
    let guest = Guest::level4(CR0, PGE, NXE);
    // 2 MiB at 0x4060_0000; bit 12 is a memory type.
    let large = [0x2027, 0x3027, 0x4060_1187];
    guest.check(&large, WRITE, Ok((0x4060_4abc, &[0x2027, 0x3027, 0x4060_11e7])));
    let walk = guest.walks(&large, READ);
    assert_eq!((walk.level(), walk.page.len(), walk.global), (Some(Level::M2), 512, true));
    assert_eq!(walk.page.start(), Gfn::new(0x4_0600));
    for bit in 13..=20 {
        guest.check(&[0x2027, 0x3027, 0x4060_0087 | 1 << bit], READ, Err(9));
    }
    // 1 GiB at 0x1_8000_0000.
    let huge = [0x2027, 0x1_8000_10c7];
    guest.check(&huge, USER, Ok((0x1_8060_4abc, &[0x2027, 0x1_8000_10e7])));
    let walk = guest.walks(&huge, READ);
    assert_eq!((walk.level(), walk.page.len(), walk.dirty), (Some(Level::G1), 1 << 18, true));
    for bit in 13..=29 {
        guest.check(&[0x2027, 0x1_8000_0087 | 1 << bit], READ, Err(9));
    }
    let mut small = Guest::level4(CR0, 0, NXE);
    let without = Processor { gigabyte_pages: false, ..Processor::default() };
    small.paging = GuestPaging::new(small.paging.registers(), without);
    small.check(&huge, READ, Err(9));
    // The global bit means nothing while CR4.PGE is off.
    assert!(!Guest::level4(CR0, 0, NXE).walks(&large, READ).global);
}

#[test]
fn the_width_of_addresses() {
    for width in [36, 40, 46, 52] {
        let mut guest = Guest::level4(CR0, 0, NXE);
        let processor = Processor { physical_address_bits: width, ..Processor::default() };
        guest.paging = GuestPaging::new(guest.paging.registers(), processor);
        let last = 1 << (width - 1);
        let leaf = last | 0x9027;
        guest.check(
            &[0x2027, 0x3027, 0x4027, leaf],
            READ,
            Ok((last | 0x9abc, &[0x2027, 0x3027, 0x4027, leaf])),
        );
        for bit in width..52 {
            guest.check(&[0x2027, 0x3027, 0x4027, 0x9027 | 1 << bit], READ, Err(9));
        }
    }
}

#[test]
fn five_levels() {
    let registers = Registers { cr0: CR0, cr3: 0x1000, cr4: PAE | LA57, efer: LONG | NXE };
    let at = &[0x1ff8, 0x2008, 0x3010, 0x4018, 0x5020];
    let guest = Guest::new(registers, at, 0xffff_0080_8060_4abc);
    assert_eq!(guest.paging.mode(), Mode::Level5);
    let tables = [0x2007, 0x3007, 0x4007, 0x5007, 0x9007];
    guest.check(&tables, WRITE, Ok((0x9abc, &[0x2027, 0x3027, 0x4027, 0x5027, 0x9067])));
    for level in 0..5 {
        let mut tables = tables;
        tables[level] &= !4;
        guest.check(&tables, USER, Err(5));
        tables[level] = 1 << 49 | 1;
        guest.check(&tables, USER, Err(0xd));
    }
    guest.check(&[0x2087, 0, 0, 0, 0], READ, Err(9));
    guest.check(&[0x2007, 0x3087, 0, 0, 0], READ, Err(9));
    guest.check(&[0x2107, 0, 0, 0, 0], READ, Err(9));
    assert!(guest.paging.is_canonical(0xff00_0000_0000_0000) && !guest.paging.is_canonical(1 << 56));
    assert!(guest.paging.is_canonical((1 << 56) - 1) && !guest.paging.is_canonical(0x7f00_0000_0000_0000));
}

#[test]
fn tables_of_32_bits() {
    let guest = Guest::bits32(CR0, PSE | PGE);
    guest.check(&[0x2007, 0xffff_f007], READ, Ok((0xffff_fabc, &[0x2027, 0xffff_f027])));
    guest.check(&[0x2007, 0x9107], USER | WRITE, Ok((0x9abc, &[0x2027, 0x9167])));
    guest.check(&[0x2007, 0x9005], WRITE, Err(3));
    guest.check(&[0x2003, 0x9007], USER, Err(5));
    guest.check(&[0x2007, 0x9006], READ, Err(0));
    // No bit of the lowest level is reserved, and bit 7 there is a memory type.
    guest.check(&[0x2027, 0x9fa7], READ, Ok((0x9abc, &[0x2027, 0x9fa7])));
    let walk = guest.walks(&[0x2007, 0x9107], READ);
    assert_eq!((walk.level(), walk.page.len(), walk.global), (Some(Level::K4), 1, true));
    let steps: Vec<_> =
        walk.steps().iter().map(|step| (step.table.get(), step.index(EntrySize::Four))).collect();
    assert_eq!(steps, [(1, 0x201), (2, 0x302)]);
}

#[test]
fn pages_of_4_mib() {
    let guest = Guest::bits32(CR0, PSE);
    // The address is 0x8070_2abc: 0x30_2abc within 4 MiB.
    guest.check(&[0x0040_0087], WRITE, Ok((0x0070_2abc, &[0x0040_00e7])));
    let walk = guest.walks(&[0x0040_1087], READ);
    assert_eq!((walk.level(), walk.page.len()), (Some(Level::M2), 1024));
    assert_eq!(walk.page.start(), Gfn::new(0x400));
    // Bits 20 to 13 are address bits 39 to 32.
    guest.check(&[0x0040_20a7], READ, Ok((0x1_0070_2abc, &[0x0040_20a7])));
    guest.check(&[0x0050_00a7], READ, Ok((0x80_0070_2abc, &[0x0050_00a7])));
    guest.check(&[0x0060_0087], READ, Err(9));
    // As far as the physical addresses go.
    let with = |processor| {
        let mut guest = Guest::bits32(CR0, PSE);
        guest.paging = GuestPaging::new(guest.paging.registers(), processor);
        guest
    };
    let narrow = with(Processor { physical_address_bits: 36, ..Processor::default() });
    narrow.check(&[0x0041_00a7], READ, Ok((0x8_0070_2abc, &[0x0041_00a7])));
    for bit in 17..=21 {
        narrow.check(&[0x0040_0087 | 1 << bit], READ, Err(9));
    }
    let without = with(Processor { pse36: false, ..Processor::default() });
    for bit in 13..=21 {
        without.check(&[0x0040_0087 | 1 << bit], READ, Err(9));
    }
    // Without CR4.PSE it is a table: the one in frame 0x400.
    Guest::bits32(CR0, 0).check(&[0x2087, 0x9007], READ, Ok((0x9abc, &[0x20a7, 0x9027])));
}

#[test]
fn tables_of_pae() {
    let guest = Guest::pae(CR0, 0, NXE);
    assert_eq!((guest.paging.mode(), guest.paging.root()), (Mode::Pae, Gpa::new(0x1fe0)));
    guest.check(&[0x4007, 0x9007], WRITE, Ok((0x9abc, &[0x4027, 0x9067])));
    guest.check(&[0x4007, NX | 0x9007], FETCH, Err(0x11));
    guest.check(&[0x0060_0087], READ, Ok((0x0060_4abc, &[0x0060_00a7])));
    guest.check(&[0x0060_2087], READ, Err(9));
    for bit in [48, 52, 62] {
        guest.check(&[0x4007 | 1 << bit, 0x9007], READ, Err(9));
        guest.check(&[0x4007, 0x9007 | 1 << bit], READ, Err(9));
    }
    Guest::pae(CR0, 0, 0).check(&[NX | 0x4007, 0x9007], READ, Err(9));
    // A PDPTE permits everything.
    assert_eq!(guest.walks(&[0x4007, 0x9007], READ).rights, Rights::all());
    assert_eq!(guest.walks(&[0x4007, 0x9007], READ).level(), Some(Level::K4));
}

#[test]
fn pdptes_are_loaded_with_cr3_and_not_walked() {
    let registers = Registers { cr0: CR0, cr3: 0x1fe0, cr4: PAE, efer: 0 };
    let mut guest = Guest::new(registers, &[0x3018, 0x4020], 0x8060_4abc);
    // Not loaded: none is present.
    guest.check(&[0x4007, 0x9007], USER | WRITE, Err(6));
    let memory = guest.memory(&[0x4007, 0x9007]);
    memory.set(0x1ff0, EntrySize::Eight, 0x3e19);
    assert_eq!(guest.paging.load_pdptes(&memory), Ok(Ok(())));
    assert_eq!(guest.paging.pdptes(), [0, 0, 0x3e19, 0]);
    guest.check(&[0x4007, 0x9007], USER | WRITE, Ok((0x9abc, &[0x4027, 0x9067])));
    // One that is not present may contain anything; one that is must not, and then none is loaded.
    memory.set(0x1fe0, EntrySize::Eight, !1);
    memory.set(0x1ff0, EntrySize::Eight, 0);
    assert_eq!(guest.paging.load_pdptes(&memory), Ok(Ok(())));
    guest.check(&[0x4007, 0x9007], READ, Err(0));
    for bit in [1, 2, 5, 8, 48, 52, 63] {
        let value = 0x3001 | 1 << bit;
        memory.set(0x1ff8, EntrySize::Eight, value);
        assert_eq!(guest.paging.load_pdptes(&memory), Ok(Err(BadPdpte { index: 3, value })));
        assert_eq!(guest.paging.pdptes()[0], !1, "the old ones stay");
    }
}

#[test]
fn without_paging_addresses_are_physical() {
    let registers = Registers { cr0: 0x11, cr3: 0x5000, cr4: PAE | SMEP | SMAP, efer: NXE };
    let guest = Guest::new(registers, &[], 0x1_8060_4abc);
    assert_eq!((guest.paging.mode(), guest.paging.root_level()), (Mode::Off, None));
    guest.check(&[], USER | WRITE, Ok((0x8060_4abc, &[])));
    let walk = guest.walks(&[], FETCH);
    assert_eq!((walk.page.start(), walk.page.len(), walk.level()), (Gfn::new(0x8_0000), 1 << 18, None));
    assert!(walk.dirty && walk.rights == Rights::all());
}

#[test]
fn modes_from_registers() {
    let mode = |cr0, cr4, efer| {
        GuestPaging::new(Registers { cr0, cr3: u64::MAX, cr4, efer }, Processor::default()).mode()
    };
    assert_eq!(mode(0x11, PAE | LA57, LONG), Mode::Off);
    assert_eq!(mode(CR0, 0, 0), Mode::Bits32);
    assert_eq!(mode(CR0, PAE, 0), Mode::Pae);
    assert_eq!(mode(CR0, PAE | LA57, 0), Mode::Pae);
    assert_eq!(mode(CR0, PAE, LONG), Mode::Level4);
    assert_eq!(mode(CR0, PAE | LA57, LONG), Mode::Level5);
    let root = |cr4, efer| {
        GuestPaging::new(Registers { cr0: CR0, cr3: u64::MAX, cr4, efer }, Processor::default()).root().get()
    };
    assert_eq!(root(0, 0), 0xffff_f000);
    assert_eq!(root(PAE, 0), 0xffff_ffe0);
    assert_eq!(root(PAE, LONG), 0x000f_ffff_ffff_f000);
}

#[test]
fn a_table_outside_all_slots_is_told_from_an_entry_that_is_not_present() {
    let guest = Guest::level4(CR0, 0, NXE);
    for level in 0..4 {
        let mut memory = guest.memory(&[0x2007, 0x3007, 0x4007, 0x9007]);
        memory.holes.insert(guest.at[level] >> 12);
        let why = walk(&memory, &guest.paging, guest.address, USER | WRITE).unwrap().unwrap_err();
        let entry = Gpa::new(guest.at[level]);
        let fault = PageFault { address: guest.address, error_code: ErrorCode::USER | ErrorCode::WRITE };
        assert_eq!(why, NoPage::NoTable { entry, fault });
        assert_eq!(why.fault(), fault);
        // What ends the walk before comes first.
        for (entries, code) in
            [(0x2006, ErrorCode::empty()), (0x2087, ErrorCode::PRESENT | ErrorCode::RESERVED)]
        {
            if level > 0 {
                memory.set(guest.at[0], EntrySize::Eight, entries);
                let why = walk(&memory, &guest.paging, guest.address, READ).unwrap().unwrap_err();
                assert_eq!(why, NoPage::Fault(PageFault { address: guest.address, error_code: code }));
            }
        }
    }
    // Where the page itself is does not matter to the walk.
    let mut memory = guest.memory(&[0x2007, 0x3007, 0x4007, 0x9007]);
    memory.holes.insert(9);
    assert!(walk(&memory, &guest.paging, guest.address, WRITE).unwrap().is_ok());
}

#[test]
fn tables_in_read_only_slots_keep_their_bits() {
    let guest = Guest::level4(CR0, 0, NXE);
    let mut memory = guest.memory(&[0x2007, 0x3007, 0x4007, 0x9007]);
    memory.read_only = [2, 4].into();
    let read = walk(&memory, &guest.paging, guest.address, READ).unwrap().unwrap();
    assert!(!read.dirty, "the next write is seen");
    let written = walk(&memory, &guest.paging, guest.address, WRITE).unwrap().unwrap();
    assert!(written.dirty, "no write would ever be let through");
    let now: Vec<_> = guest.at.iter().map(|at| memory.get(*at, EntrySize::Eight)).collect();
    assert_eq!(now, [0x2027, 0x3007, 0x4027, 0x9007]);
    assert_eq!(written.is_current(&memory), Ok(true));
}

#[test]
fn an_entry_that_changes_meanwhile_is_walked_again() {
    let guest = Guest::level4(CR0, 0, NXE);
    // Another processor moves the page, once: the walk finds where it is now.
    let memory = guest.memory(&[0x2007, 0x3007, 0x4007, 0x9007]);
    memory.races.borrow_mut().insert(0x4020, (0x3000, 1));
    let found = walk(&memory, &guest.paging, guest.address, WRITE).unwrap().unwrap();
    assert_eq!(found.gpa, Gpa::new(0xaabc));
    assert_eq!(memory.get(0x4020, EntrySize::Eight), 0xa067);
    // It takes the right to write away: the walk that is done anew faults.
    let memory = guest.memory(&[0x2007, 0x3007, 0x4007, 0x9007]);
    memory.races.borrow_mut().insert(0x4020, (2, 1));
    let fault = walk(&memory, &guest.paging, guest.address, WRITE).unwrap().unwrap_err().fault();
    assert_eq!(fault.error_code, ErrorCode::PRESENT | ErrorCode::WRITE);
    assert_eq!(memory.get(0x4020, EntrySize::Eight), 0x9005);
    // It never stops: the walk does.
    let memory = guest.memory(&[0x2007, 0x3007, 0x4007, 0x9007]);
    memory.races.borrow_mut().insert(0x3018, (1 << 9, usize::MAX));
    let error = walk(&memory, &guest.paging, guest.address, READ).unwrap_err();
    assert_eq!(error, WalkError::Busy { address: guest.address, gpa: Gpa::new(0x3018) });
    // Bits that are set already cost no exchange.
    let memory = guest.memory(&[0x2027, 0x3027, 0x4027, 0x9067]);
    walk(&memory, &guest.paging, guest.address, WRITE).unwrap().unwrap();
    assert_eq!(memory.exchanges.get(), 0);
}

#[test]
fn a_walk_knows_when_it_is_out_of_date() {
    let guest = Guest::level4(CR0, 0, NXE);
    let mut memory = guest.memory(&[0x2007, 0x3007, 0x4007, 0x9007]);
    let found = walk(&memory, &guest.paging, guest.address, READ).unwrap().unwrap();
    for at in guest.at {
        let entry = memory.get(*at, EntrySize::Eight);
        memory.set(*at, EntrySize::Eight, entry ^ 1 << 62);
        assert_eq!(found.is_current(&memory), Ok(false));
        memory.set(*at, EntrySize::Eight, entry);
        assert_eq!(found.is_current(&memory), Ok(true));
    }
    memory.holes.insert(3);
    assert_eq!(found.is_current(&memory), Ok(false));
}

#[test]
fn error_codes_make_accesses() {
    let access = |code| GuestAccess::from_error_code(code, false);
    assert_eq!(access(0), READ);
    assert_eq!(access(1), READ, "the processor found the shadow's entry present");
    assert_eq!(access(0xb), WRITE | GuestAccess::RESERVED, "what the shadow's entry remembers");
    assert_eq!(access(0x1f), WRITE | USER | FETCH | GuestAccess::RESERVED);
    assert_eq!(access(0xffff_ffe0), READ, "bits that we do not know");
}
