//! The walker beside the naive one, under random tables.

use memslot::{Gfn, Gpa};
use memslot_mmu::shadow::guest::{
    EntrySize, GuestAccess, GuestPaging, NoPage, Processor, Registers, Rights, Walk, walk,
};
use memslot_testing::proptest_config;
use proptest::prelude::*;

use crate::memory::Memory;
use crate::naive::{Want, naive_walk};

/// Tables are in frames 1 to 8; 9 to 12 hold no tables. Entries lead anywhere there, most to tables.
const FRAMES: u64 = 12;

/// An entry of eight bytes: mostly one that can be gone through.
fn entry8() -> impl Strategy<Value = u64> {
    let often = |bit: u32| prop_oneof![9 => Just(1u64 << bit), 1 => Just(0)];
    let rarely = |bit: u32| prop_oneof![16 => Just(0u64), 1 => Just(1u64 << bit)];
    let software = prop_oneof![4 => Just(0u64), 1 => (0u64..64).prop_map(|bits| bits << 53)];
    let stray = prop_oneof![40 => Just(0u64), 1 => (12u32..64).prop_map(|bit| 1 << bit)];
    (
        (often(0), often(1), often(2), rarely(3), rarely(4), any::<bool>(), any::<bool>()),
        (rarely(7), rarely(8), rarely(9), rarely(63)),
        // Far up only for pages: where there are no tables.
        prop_oneof![12 => 1..=FRAMES, 12 => 1..=8u64, 1 => (0u64..8).prop_map(|block| block << 18), 1 => Just(1 << 30)],
        (software, stray),
    )
        .prop_map(|(a, b, frame, c)| {
            let accessed = u64::from(a.5) << 5 | u64::from(a.6) << 6;
            // A large page has its address aligned, most of the time.
            let frame = if b.0 != 0 && frame % 4 != 1 { frame & !0x3_ffff } else { frame };
            a.0 | a.1 | a.2 | a.3 | a.4 | accessed | b.0 | b.1 | b.2 | b.3 | frame << 12 | c.0 | c.1
        })
}

fn entry4() -> impl Strategy<Value = u64> {
    (entry8(), prop_oneof![3 => Just(0u64), 1 => (13u32..22).prop_map(|bit| 1 << bit)])
        .prop_map(|(entry, high)| (entry | if entry & 0x80 != 0 { high } else { 0 }) & 0xffff_ffff)
}

fn registers() -> impl Strategy<Value = Registers> {
    let frame = 1u64..=8;
    (0u8..4, frame, any::<[bool; 6]>(), 0u64..128).prop_map(|(mode, frame, bits, low)| {
        let flag = |on: bool, bit: u32| u64::from(on) << bit;
        let cr0 = 0x8000_0011 | flag(bits[0], 16);
        let mut cr4 = flag(bits[1], 4) | flag(bits[2], 7) | flag(bits[3], 20) | flag(bits[4], 21);
        let mut efer = flag(bits[5], 11);
        cr4 |= if mode > 0 { 0x20 } else { 0 } | if mode == 3 { 0x1000 } else { 0 };
        efer |= if mode > 1 { 0x500 } else { 0 };
        // Low bits that are no address: for PAE some of them are.
        Registers { cr0, cr3: frame << 12 | low << 5 | 0x18, cr4, efer }
    })
}

fn processor() -> impl Strategy<Value = Processor> {
    (prop_oneof![Just(32u8), Just(36), Just(39), Just(40), Just(48), Just(52)], any::<[bool; 3]>()).prop_map(
        |(physical_address_bits, [gigabyte_pages, pse36, amd])| Processor {
            physical_address_bits,
            gigabyte_pages,
            pse36,
            amd,
        },
    )
}

#[derive(Clone, Debug)]
struct Case {
    registers: Registers,
    processor: Processor,
    /// Table frame, entry, value.
    entries: Vec<(u64, u64, u64)>,
    holes: Vec<u64>,
    read_only: Vec<u64>,
    walks: Vec<(u64, [bool; 4])>,
}

fn case() -> impl Strategy<Value = Case> {
    (registers(), processor()).prop_flat_map(|(registers, processor)| {
        let narrow = registers.cr4 & 0x20 == 0;
        let entry = if narrow { entry4().boxed() } else { entry8().boxed() };
        // Four entries for each of the eight tables.
        let entries = prop::collection::vec(entry, 32).prop_map(|values| {
            (0..).zip(values).map(|(number, value)| (1 + number / 4, number % 4, value)).collect::<Vec<_>>()
        });
        let rare = |n| prop_oneof![3 => Just(vec![]), 1 => prop::collection::vec(1..=FRAMES, 0..n)];
        let walks = prop::collection::vec((0u64..1 << 10, any::<[bool; 4]>()), 1..12);
        (entries, rare(2), rare(4), walks).prop_map(move |(entries, holes, read_only, walks)| Case {
            registers,
            processor,
            entries,
            holes,
            read_only,
            walks,
        })
    })
}

/// An address whose indexes are two bits of `choice` for each level, so that a few entries serve all.
fn address(narrow: bool, choice: u64) -> u64 {
    let index = |level: u32| choice >> (2 * level) & 3;
    if narrow {
        return index(0) << 12 | index(1) << 22 | 0x678;
    }
    let address: u64 = (0..5).map(|level| index(level) << (12 + 9 * level)).sum();
    address | 0x678
}

fn check(case: &Case) -> Result<usize, TestCaseError> {
    let narrow = case.registers.cr4 & 0x20 == 0;
    let size = if narrow { EntrySize::Four } else { EntrySize::Eight };
    let mut memory = Memory::default();
    for &(table, index, value) in &case.entries {
        memory.set((table << 12) + index * size.bytes(), size, value);
    }
    memory.holes.extend(&case.holes);
    memory.read_only.extend(&case.read_only);
    let mut paging = GuestPaging::new(case.registers, case.processor);
    // PDPTEs come from the first four entries of the frame, made valid.
    let pdptes =
        [0u64, 1, 2, 3].map(|index| memory.get((paging.root().get() & !0xfff) + index * 8, EntrySize::Eight));
    let pdptes = pdptes.map(|pdpte| pdpte & 0xf_f019);
    paging.set_pdptes(pdptes).unwrap();
    let mut found = 0;
    for &(choice, [write, user, fetch, ac]) in &case.walks {
        let want = Want { write: write && !fetch, user, fetch, ac };
        let va = address(narrow, choice);
        let mut access = GuestAccess::empty();
        access.set(GuestAccess::WRITE, want.write);
        access.set(GuestAccess::USER, user);
        access.set(GuestAccess::FETCH, fetch);
        access.set(GuestAccess::AC, ac);
        let expected = naive_walk(&memory, case.registers, case.processor, pdptes, va, want);
        let model = memory.clone();
        let answer = walk(&memory, &paging, va, access).unwrap();
        match (answer, expected) {
            (Err(why), Err(code)) => {
                let fault = why.fault();
                let is_missing = matches!(why, NoPage::NoTable { entry, .. } if memory.holes.contains(&(entry.get() >> 12)));
                prop_assert!(is_missing || matches!(why, NoPage::Fault(_)), "{:?}", why);
                prop_assert_eq!(fault.error_code.bits(), code, "{:#x} {:?}", va, want);
                prop_assert_eq!(fault.address, va);
            }
            (Ok(walk), Ok(page)) => {
                found += 1;
                for &(gpa, _) in &page.entries {
                    if !memory.read_only.contains(&(gpa >> 12)) {
                        let dirty = if want.write && gpa == page.dirty_at { 0x40 } else { 0 };
                        model.set(gpa, size, model.get(gpa, size) | 0x20 | dirty);
                    }
                }
                same(&walk, &page, &model, &want, case, size)?;
            }
            (answer, expected) => {
                prop_assert!(false, "{va:#x} {want:?}: {answer:x?}, but naively {expected:x?}");
            }
        }
        prop_assert_eq!(memory.contents(), model.contents(), "accessed and dirty bits");
    }
    Ok(found)
}

fn same(
    walk: &Walk,
    page: &crate::naive::Found,
    model: &Memory,
    want: &Want,
    case: &Case,
    size: EntrySize,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(walk.gpa, Gpa::new(page.gpa));
    prop_assert_eq!(walk.page.len() * 4096, page.bytes);
    prop_assert_eq!(walk.page.start(), Gfn::new(page.gpa / page.bytes * page.bytes / 4096));
    prop_assert_eq!(walk.rights.contains(Rights::WRITE), page.writable);
    prop_assert_eq!(walk.rights.contains(Rights::USER), page.user);
    prop_assert_eq!(walk.rights.contains(Rights::EXECUTE), page.executable);
    let leaf = model.get(page.dirty_at, size);
    prop_assert_eq!(walk.dirty, leaf & 0x40 != 0 || want.write);
    prop_assert_eq!(walk.global, leaf & 0x100 != 0 && case.registers.cr4 & 0x80 != 0);
    let steps: Vec<_> = walk.steps().iter().map(|step| step.gpa.get()).collect();
    let entries: Vec<_> = page.entries.iter().map(|(gpa, _)| *gpa).collect();
    prop_assert_eq!(steps, entries);
    Ok(())
}

proptest! {
    #![proptest_config(proptest_config(2000))]

    #[test]
    fn random_tables(case in case()) {
        check(&case)?;
    }
}

/// The random tables are worth walking: enough of the walks arrive, in every mode and with every size of page.
#[test]
fn random_walks_arrive() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut arrived = [0; 4];
    let mut walks = 0;
    for _ in 0..2000 {
        let case = case().new_tree(&mut runner).unwrap().current();
        let mode = match (case.registers.cr4 & 0x20, case.registers.efer & 0x100, case.registers.cr4 & 0x1000)
        {
            (0, ..) => 0,
            (_, 0, _) => 1,
            (.., 0) => 2,
            _ => 3,
        };
        arrived[mode] += check(&case).unwrap();
        walks += case.walks.len();
    }
    assert!(arrived.iter().all(|arrived| arrived * 40 > walks), "{arrived:?} of {walks}");
}
