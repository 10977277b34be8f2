//! Entries computed by hand from the manuals' pictures, both ways.

use super::*;

const RWX: Access = Access::all();
const RW: Access = Access::READ.union(Access::WRITE);
const RX: Access = Access::READ.union(Access::EXECUTE);
const R: Access = Access::READ;

type Leaf = (u64, Level, Access, MemoryType, u64);

fn check_leaves<F: Format>(leaves: &[Leaf]) {
    for &(pfn, level, access, memory, entry) in leaves {
        let made = F::leaf(Pfn::new(pfn), level, access, memory);
        assert_eq!(made, entry, "{} {pfn:#x} {level} {access:?} {memory:?}: {made:#x}", F::NAME);
        assert!(F::is_present(entry) && F::is_leaf(entry, level) && !F::is_table(entry, level));
        assert_eq!((F::pfn(entry, level).get(), F::access(entry)), (pfn, access));
        let same = F::leaf(Pfn::new(pfn), level, access, F::memory(entry));
        assert_eq!(same, entry, "the memory type is read back");
        assert_eq!(entry & F::WRITE != 0, access.contains(Access::WRITE));
        assert_eq!(entry & (F::ACCESSED | F::DIRTY | F::MAY_WRITE), 0);
    }
}

fn check_the_rest<F: Format>() {
    let root = Level::new(F::LEVELS).unwrap();
    for level in [Level::M2, Level::G1, root] {
        let table = F::table(Pfn::new(0x8_7654_3210));
        assert!(F::is_table(table, level) && !F::is_leaf(table, level));
        assert_eq!(F::pfn(table, level), Pfn::new(0x8_7654_3210));
        assert_eq!(F::access(table), RWX, "a table's entry takes nothing away");
    }
    assert_eq!(F::empty(0), 0);
    let mut seen = std::collections::BTreeSet::new();
    for nonce in (0..50).map(|bit| 1 << bit).chain([0, 3, (1 << 50) - 1]) {
        for entry in [0, F::STALE, F::STALE_BITS].map(|stale| F::empty(nonce) | stale) {
            assert!(!F::is_present(entry) && !F::is_leaf(entry, Level::K4) && !F::is_table(entry, Level::M2));
            assert!(seen.insert(entry), "{entry:#x} twice");
        }
    }
    // The nonce wraps without ever becoming present.
    for nonce in [u64::MAX, 1 << 50, 1 << 51, 1 << 52, 1 << 63] {
        assert!(!F::is_present(F::empty(nonce)));
        assert_eq!(F::empty(nonce) & F::STALE_BITS, 0);
    }
}

#[test]
fn npt_entries_are_those_of_the_manual() {
    use MemoryType::{Uncacheable, WriteBack, WriteThrough};
    check_leaves::<Npt>(&[
        // P U/S R/W
        (0x12345, Level::K4, RWX, WriteBack, 0x0000_0000_1234_5007),
        (0x12345, Level::K4, RX, WriteBack, 0x0000_0000_1234_5005),
        (0x12345, Level::K4, RW, WriteBack, 0x8000_0000_1234_5007),
        (0x12345, Level::K4, R, WriteBack, 0x8000_0000_1234_5005),
        // PS
        (0x200, Level::M2, RWX, WriteBack, 0x0000_0000_0020_0087),
        (0x4_0000, Level::G1, RX, WriteBack, 0x0000_0000_4000_0085),
        // PWT, PCD
        (0xfee00, Level::K4, RW, Uncacheable, 0x8000_0000_fee0_001f),
        (0xfd000, Level::M2, RW, WriteThrough, 0x8000_0000_fd00_008f),
        // The last frame of 52 bits of address.
        (0xff_ffff_ffff, Level::K4, RWX, WriteBack, 0x000f_ffff_ffff_f007),
    ]);
    let combining = Npt::<4>::leaf(Pfn::new(1), Level::K4, RW, MemoryType::WriteCombining);
    assert_eq!(Npt::<4>::memory(combining), Uncacheable, "never less ordered than asked for");
    // P R/W U/S A
    assert_eq!(Npt::<4>::table(Pfn::new(0x1234)), 0x0000_0000_0123_4027);
    assert_eq!((Npt::<4>::ACCESSED, Npt::<4>::DIRTY), (0x20, 0x40));
    assert_eq!(Npt::<4>::empty(5), 0x5000);
    check_the_rest::<Npt>();
    check_the_rest::<Npt<5>>();
}

#[test]
fn ept_entries_are_those_of_the_manual() {
    use MemoryType::{Uncacheable, WriteBack, WriteCombining, WriteThrough};
    check_leaves::<Ept>(&[
        // R W X, type 6
        (0x12345, Level::K4, RWX, WriteBack, 0x0000_0000_1234_5037),
        (0x12345, Level::K4, RX, WriteBack, 0x0000_0000_1234_5035),
        (0x12345, Level::K4, RW, WriteBack, 0x0000_0000_1234_5033),
        (0x12345, Level::K4, R, WriteBack, 0x0000_0000_1234_5031),
        (0x200, Level::M2, RWX, WriteBack, 0x0000_0000_0020_00b7),
        (0x4_0000, Level::G1, RX, WriteBack, 0x0000_0000_4000_00b5),
        // types 0, 1, 4
        (0xfee00, Level::K4, RW, Uncacheable, 0x0000_0000_fee0_0003),
        (0xe0000, Level::M2, RW, WriteCombining, 0x0000_0000_e000_008b),
        (0xfd000, Level::M2, RW, WriteThrough, 0x0000_0000_fd00_00a3),
        (0xff_ffff_ffff, Level::K4, RWX, WriteBack, 0x000f_ffff_ffff_f037),
    ]);
    // R W X A
    assert_eq!(Ept::<4>::table(Pfn::new(0x1234)), 0x0000_0000_0123_4107);
    assert_eq!(Ept::<4, false>::table(Pfn::new(0x1234)), 0x0000_0000_0123_4007);
    assert_eq!((Ept::<4>::ACCESSED, Ept::<4>::DIRTY), (0x100, 0x200));
    assert_eq!((Ept::<4, false>::ACCESSED, Ept::<4, false>::DIRTY), (0, 0));
    // An address with bit 51 set: behind all memory.
    assert_eq!(Ept::<4>::empty(5), 0x0008_0000_0000_5000);
    assert_eq!(Ept::<4>::empty(1 << 39), 0x0018_0000_0000_0000);
    check_the_rest::<Ept>();
    check_the_rest::<Ept<5>>();
    check_the_rest::<Ept<4, false>>();
}

#[test]
fn splitting_and_collapsing_are_inverse() {
    fn check<F: Format>() {
        for access in [RWX, RX, RW, R] {
            for memory in [MemoryType::WriteBack, MemoryType::Uncacheable] {
                let bits = [0, F::ACCESSED, F::DIRTY, F::MAY_WRITE, F::ACCESSED | F::DIRTY | F::MAY_WRITE];
                for bits in bits {
                    let huge = F::leaf(Pfn::new(0x40000), Level::G1, access, memory) | bits;
                    let large = F::split(huge, Level::G1);
                    let small = F::split(large, Level::M2);
                    assert!(F::is_leaf(large, Level::M2) && F::is_leaf(small, Level::K4));
                    assert_eq!(small, F::leaf(Pfn::new(0x40000), Level::K4, access, memory) | bits);
                    assert_eq!(F::collapse(small, Level::K4), large);
                    assert_eq!(F::collapse(large, Level::M2), huge);
                }
            }
        }
    }
    check::<Npt>();
    check::<Ept>();
    check::<Sv48x4>();
    check::<Sv48x4<false>>();
}

#[test]
fn sv48x4_entries_are_those_of_the_manual() {
    use MemoryType::{Uncacheable, WriteBack, WriteCombining};
    check_leaves::<Sv48x4>(&[
        // V R W X U; the frame number starts at bit 10: 0x12345 << 10 = 0x48d1400.
        (0x12345, Level::K4, RWX, WriteBack, 0x0000_0000_048d_141f),
        (0x12345, Level::K4, RX, WriteBack, 0x0000_0000_048d_141b),
        (0x12345, Level::K4, RW, WriteBack, 0x0000_0000_048d_1417),
        (0x12345, Level::K4, R, WriteBack, 0x0000_0000_048d_1413),
        // A leaf is a leaf at every level: nothing says how large it is.
        (0x200, Level::M2, RWX, WriteBack, 0x0000_0000_0008_001f),
        (0x4_0000, Level::G1, RX, WriteBack, 0x0000_0000_1000_001b),
        // PBMT 2, 1
        (0xfee00, Level::K4, RW, Uncacheable, 0x4000_0000_3fb8_0017),
        (0xe0000, Level::M2, RW, WriteCombining, 0x2000_0000_3800_0017),
        // The last frame of 44 bits.
        (0xfff_ffff_ffff, Level::K4, RWX, WriteBack, 0x003f_ffff_ffff_fc1f),
    ]);
    // Without Svadu: A and D from the start.
    check_leaves::<Sv48x4<false>>(&[
        (0x12345, Level::K4, RW, WriteBack, 0x0000_0000_048d_14d7),
        (0x12345, Level::K4, RX, WriteBack, 0x0000_0000_048d_14db),
    ]);
    assert_eq!(Sv48x4::<true>::table(Pfn::new(0x1234)), 0x0000_0000_0048_d001);
    assert_eq!((Sv48x4::<true>::ACCESSED, Sv48x4::<true>::DIRTY), (0x40, 0x80));
    assert_eq!(Sv48x4::<true>::empty(5), 0x1400);
    check_the_rest::<Sv48x4>();
    check_the_rest::<Sv48x4<false>>();
}

/// Nothing but its file knows the format: pages of all sizes, splits, collapses and all four tables of the root.
#[test]
fn sv48x4_tables_work_as_all_others() {
    use crate::user::UserHost;
    use crate::{Config, Fault, Mmu};
    use memslot::{
        AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable,
    };
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let config = Config { largest: Level::M2, ..Config::default() };
    let mmu = Mmu::<Sv48x4, _>::attach(&mut table, UserHost::default(), config).unwrap();
    assert_eq!(mmu.root().get() % 4, 0);
    let mut vcpu = mmu.walker().unwrap();
    for quarter in 0..4u64 {
        let (base, hva) = (quarter << 36, 0x7000_0000_0000 + (quarter << 30));
        let spec = SlotSpec {
            address_space: AddressSpaceId::NORMAL,
            id: SlotId::new(u32::try_from(quarter).unwrap()),
            gfns: GfnRange::with_len(Gfn::new(base), 1024).unwrap(),
            backing: Backing::Host { hva: Hva::new(hva) },
            flags: SlotFlags::empty(),
        };
        let gfns = spec.gfns;
        table.create(spec).unwrap();
        assert_eq!(vcpu.fault(Gpa::new((base + 5) << 12), Access::WRITE).unwrap(), Fault::Mapped(Level::M2));
        assert_eq!(mmu.split(gfns, Level::K4).unwrap(), 1);
        for gfn in [0, 1, 5, 511] {
            let mapping = vcpu.translate(Gpa::new((base + gfn) << 12)).unwrap();
            assert_eq!((mapping.pfn.get(), mapping.level), ((hva >> 12) + gfn, Level::K4));
        }
        mmu.collapse(gfns).discharge();
        let mapping = vcpu.translate(Gpa::new((base + 7) << 12)).unwrap();
        assert_eq!((mapping.pfn.get(), mapping.level), ((hva >> 12) + 7, Level::M2));
        mmu.host().set_run(0);
        let rest = GfnRange::with_len(Gfn::new(base + 512), 512).unwrap();
        assert!(vcpu.prefault(rest, usize::MAX).unwrap().rest.is_empty());
        mmu.host().set_run(63);
        assert_eq!(vcpu.translate(Gpa::new((base + 700) << 12)).unwrap().pfn.get(), (hva >> 12) + 700);
        mmu.write_protect(gfns).discharge();
        assert!(!vcpu.translate(Gpa::new((base + 700) << 12)).unwrap().access.contains(Access::WRITE));
    }
    let beyond = vcpu.fault(Gpa::new(4 << 48), Access::READ);
    assert!(beyond.is_err());
    for quarter in 0..4 {
        table.delete(AddressSpaceId::NORMAL, SlotId::new(quarter)).unwrap();
    }
    drop(vcpu);
    mmu.reclaim();
    assert_eq!((mmu.stats().tables, mmu.host().tables()), (4, 4), "the root");
}
