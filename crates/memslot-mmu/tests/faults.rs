//! Faults: what is mapped, how large, and with which access.
#![allow(missing_docs, reason = "tests")]

mod common;

use common::*;
use memslot::{AddressSpaceId, Backing, Gfn, Gpa, SlotFlags, SlotId, SlotSpec};
use memslot_mmu::format::{Access, Format, MemoryType};
use memslot_mmu::{Config, DirtyMode, Fault, FaultError, Level, TableError};

for_every_format! {
    a_page_is_mapped_where_its_slot_says
    large_pages_fill_their_slot_and_do_not_pass_its_edges
    large_pages_need_guest_and_host_to_agree
    a_smaller_limit_makes_smaller_pages
    a_read_only_slot_is_never_writable
    a_page_that_the_host_shares_becomes_writable_later
    code_runs_where_the_host_allows
    a_logged_slot_has_small_pages_and_marks_what_is_written
    a_large_page_is_split_when_a_logged_slot_is_written
    prefault_maps_all_and_says_where_it_ended
    prefault_joins_what_is_there
    a_failed_allocation_changes_nothing
    the_limit_of_tables_holds
    beyond_the_tables_is_an_error
}

fn a_page_is_mapped_where_its_slot_says<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0x100, 3, HVA + 0x5000, SlotFlags::empty());
    assert_eq!(guest.read(0xff), Fault::Mmio);
    assert_eq!(guest.read(0x103), Fault::Mmio);
    assert_eq!(guest.write(0x102), Fault::Mapped(Level::K4));
    assert_eq!(guest.write(0x102), Fault::AlreadyMapped);
    assert_eq!(guest.fault(0x102, Access::all()), Fault::AlreadyMapped);
    let mapping = guest.vcpu.translate(Gpa::new(0x10_2abc)).unwrap();
    assert_eq!((mapping.pfn.get(), mapping.level), ((HVA >> 12) + 7, Level::K4));
    assert_eq!((mapping.access, mapping.memory), (Access::all(), MemoryType::WriteBack));
    assert_eq!(guest.vcpu.translate(Gpa::new(0x10_1000)), None);
    let leaves = guest.leaves();
    assert_eq!(leaves.keys().collect::<Vec<_>>(), [&0x102]);
    assert_eq!(guest.host.take_flushes(), [], "nothing was taken away");
    // A device is not memory.
    guest
        .table
        .create(SlotSpec {
            address_space: AddressSpaceId::NORMAL,
            id: SlotId::new(1),
            gfns: range(0x200, 1),
            backing: Backing::Device { token: 0xd000 },
            flags: SlotFlags::empty(),
        })
        .unwrap();
    assert_eq!(guest.read(0x200), Fault::Mmio);
}

fn large_pages_fill_their_slot_and_do_not_pass_its_edges<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    // From 5 pages before a 1 GiB border to 3 pages before the second next.
    let (gib, first) = (1 << 18, (1 << 18) - 5);
    guest.create(0, first, 2 * gib + 2, HVA + (first << 12), SlotFlags::empty());
    let last = 3 * gib - 4;
    assert_eq!(guest.write(first), Fault::Mapped(Level::K4));
    assert_eq!(guest.write(gib + 12345), Fault::Mapped(Level::G1));
    assert_eq!(guest.write(2 * gib + 12345), Fault::Mapped(Level::M2));
    assert_eq!(guest.write(last), Fault::Mapped(Level::K4));
    let pages: Vec<_> = guest.leaves().iter().map(|(&start, leaf)| (start, leaf.pages, leaf.pfn)).collect();
    let pfn = HVA >> 12;
    let middle = (2 * gib + 12345) & !511;
    let expected =
        [(first, 1, pfn + first), (gib, gib, pfn + gib), (middle, 512, pfn + middle), (last, 1, pfn + last)];
    assert_eq!(pages, expected);
}

fn large_pages_need_guest_and_host_to_agree<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 4096, HVA + 0x1000, SlotFlags::empty());
    assert_eq!(guest.write(1000), Fault::Mapped(Level::K4), "a page off");
    guest.create(1, 1 << 18, 1 << 19, HVA + (512 << 12), SlotFlags::empty());
    assert_eq!(guest.write((1 << 18) + 1000), Fault::Mapped(Level::M2), "2 MiB off");
    // The host has 64 KiB at a time.
    guest.host.user.set_run(4);
    assert_eq!(guest.write((1 << 18) + 5000), Fault::Mapped(Level::K4));
    guest.host.user.set_run(9);
    assert_eq!(guest.write((1 << 18) + 9000), Fault::Mapped(Level::M2));
}

fn a_smaller_limit_makes_smaller_pages<F: Format>(dirty: DirtyMode) {
    for (largest, expected) in [(Level::K4, Level::K4), (Level::M2, Level::M2), (Level::G1, Level::G1)] {
        let mut guest = Guest::<F>::with(Config { largest, dirty, ..Config::default() });
        guest.create(0, 0, 1 << 18, HVA, SlotFlags::empty());
        assert_eq!(guest.write(777), Fault::Mapped(expected));
    }
}

fn a_read_only_slot_is_never_writable<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 1024, HVA, SlotFlags::READONLY);
    assert_eq!(guest.write(3), Fault::Mmio);
    assert_eq!(guest.read(3), Fault::Mapped(Level::M2));
    assert_eq!(guest.write(3), Fault::Mmio);
    assert!(!guest.leaf_at(3).unwrap().1.write);
    assert_eq!(guest.vcpu.prefault(range(512, 512), 99).unwrap().last, Fault::Mapped(Level::M2));
    assert!(guest.leaves().values().all(|leaf| !leaf.write));
}

fn a_page_that_the_host_shares_becomes_writable_later<F: Format>(dirty: DirtyMode) {
    for flags in [SlotFlags::empty(), SlotFlags::LOG_DIRTY_PAGES] {
        let mut guest = Guest::<F>::new(dirty);
        guest.create(0, 0, 4, HVA, flags);
        guest.host.set_read_only(HVA + 0x1000, true);
        assert_eq!(guest.read(1), Fault::Mapped(Level::K4));
        assert_eq!(guest.write(1), Fault::WriteProtected);
        assert!(guest.leaf_at(1).is_some_and(|(_, leaf)| !leaf.write), "it stays mapped");
        guest.host.touch(&guest.mmu, 1);
        // The host allows more from now on: it need not say so.
        guest.host.set_read_only(HVA + 0x1000, false);
        assert_eq!(guest.write(1), Fault::Mapped(Level::K4));
        assert!(guest.leaf_at(1).is_some_and(|(_, leaf)| leaf.write && leaf.pfn == (HVA >> 12) + 1));
        assert_eq!(guest.harvest(), if flags.is_empty() { vec![] } else { vec![1] });
        // Whatever zaps it now must flush.
        let flush = guest.mmu.zap(range(0, 4));
        assert!(flush.gfns().is_some());
        flush.discharge();
        assert_eq!(guest.host.stale(&guest.mmu, range(0, 4)), []);
    }
}

fn code_runs_where_the_host_allows<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 4, HVA, SlotFlags::empty());
    guest.host.set_no_execute(HVA, true);
    assert_eq!(guest.fault(0, Access::EXECUTE), Fault::NotExecutable);
    assert_eq!(guest.fault(1, Access::EXECUTE), Fault::Mapped(Level::K4));
    assert_eq!(guest.write(0), Fault::Mapped(Level::K4));
    assert_eq!(guest.vcpu.translate(Gpa::new(0)).unwrap().access, Access::READ | Access::WRITE);
    // What was asked for and is missing is named: not writing, where only code was to run, or where writing is allowed.
    guest.host.set_no_execute(HVA + 0x2000, true);
    guest.host.set_read_only(HVA + 0x2000, true);
    assert_eq!(guest.fault(2, Access::EXECUTE), Fault::NotExecutable);
    assert_eq!(guest.fault(0, Access::WRITE | Access::EXECUTE), Fault::NotExecutable);
    assert_eq!(guest.write(2), Fault::WriteProtected);
}

fn a_logged_slot_has_small_pages_and_marks_what_is_written<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2048, HVA, SlotFlags::LOG_DIRTY_PAGES);
    assert_eq!(guest.read(700), Fault::Mapped(Level::K4));
    assert!(!guest.log.is_marked(RAM, Gfn::new(700)));
    assert_eq!(guest.write(701), Fault::Mapped(Level::K4));
    assert!(guest.log.is_marked(RAM, Gfn::new(701)), "marked when write access was granted");
    match dirty {
        DirtyMode::WriteProtect => {
            assert!(!guest.processor_writes(700), "the first write must fault");
            assert_eq!(guest.write(700), Fault::Mapped(Level::K4));
        }
        DirtyMode::Hardware => assert!(guest.processor_writes(700), "the processor notices by itself"),
    }
    assert_eq!(guest.harvest(), [700, 701]);
    assert_eq!(guest.host.take_flushes().len(), 1, "one flush a harvest");
    assert_eq!(guest.harvest(), []);
    // Armed again, both.
    for gfn in [700, 701] {
        if dirty == DirtyMode::WriteProtect {
            assert!(!guest.processor_writes(gfn));
            assert_eq!(guest.write(gfn), Fault::Mapped(Level::K4));
        }
        assert!(guest.processor_writes(gfn));
        assert_eq!(guest.harvest(), [gfn]);
    }
}

fn a_large_page_is_split_when_a_logged_slot_is_written<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    let gib = 1 << 18;
    guest.create(0, 0, 2 * gib, HVA, SlotFlags::empty());
    assert_eq!(guest.write(1000), Fault::Mapped(Level::G1));
    assert!(guest.processor_writes(2000));
    guest.table.set_flags(RAM, SlotId::new(0), SlotFlags::LOG_DIRTY_PAGES).unwrap();
    let leaves = guest.leaves();
    assert_eq!(leaves.len(), 1, "it stays mapped");
    assert!(!leaves[&0].write);
    guest.harvest();
    assert_eq!(guest.write(1000), Fault::Mapped(Level::K4));
    let leaves = guest.leaves();
    assert_eq!(leaves.len(), 511 + 512);
    assert_eq!(leaves.iter().filter(|(_, leaf)| leaf.write).map(|(gfn, _)| *gfn).collect::<Vec<_>>(), [1000]);
    assert!(leaves.iter().all(|(gfn, leaf)| leaf.pfn == (HVA >> 12) + gfn));
    assert!(guest.harvest().contains(&1000));
    // A large one in the same gibibyte.
    assert_eq!(guest.write(5000), Fault::Mapped(Level::K4));
    assert_eq!(guest.leaves().len(), 510 + 2 * 512);
}

fn prefault_maps_all_and_says_where_it_ended<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 3, 2000, HVA + 0x1000, SlotFlags::empty());
    let done = guest.vcpu.prefault(range(3, 5000), usize::MAX).unwrap();
    assert_eq!((done.rest, done.last), (range(2003, 3000), Fault::Mmio));
    let leaves = guest.leaves();
    assert_eq!(leaves.len(), 2000);
    assert!(leaves.iter().all(|(gfn, leaf)| leaf.pfn == (HVA >> 12) + 1 + gfn - 3 && leaf.write));
    assert!(leaves.values().all(|leaf| !leaf.accessed || F::ACCESSED == 0), "nobody has used them yet");
    // In small bites.
    guest.mmu.zap(range(0, 5000)).discharge();
    assert!(guest.leaves().is_empty());
    let mut rest = range(3, 2000);
    let mut bites = 0;
    while !rest.is_empty() {
        let done = guest.vcpu.prefault(rest, 1).unwrap();
        assert!(done.rest.len() < rest.len(), "every bite gets further");
        rest = done.rest;
        bites += 1;
    }
    assert!((2..=5).contains(&bites), "a table at a time: {bites}");
    assert_eq!(guest.leaves().len(), 2000);
    // Logged pages are mapped for reading.
    guest.create(1, 4096, 512, HVA, SlotFlags::LOG_DIRTY_PAGES);
    let done = guest.vcpu.prefault(range(4096, 512), usize::MAX).unwrap();
    assert!(done.rest.is_empty());
    assert_eq!(guest.harvest(), []);
    assert_eq!(guest.leaf_at(4100).unwrap().1.write, dirty == DirtyMode::Hardware);
}

fn prefault_joins_what_is_there<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::with(Config { largest: Level::M2, dirty, ..Config::default() });
    guest.create(0, 0, 4096, HVA, SlotFlags::empty());
    guest.host.user.set_run(3);
    assert_eq!(guest.write(1000), Fault::Mapped(Level::K4));
    guest.host.user.set_run(20);
    let done = guest.vcpu.prefault(range(0, 4096), usize::MAX).unwrap();
    assert!(done.rest.is_empty());
    let leaves = guest.leaves();
    assert_eq!(leaves.values().map(|leaf| leaf.pages).sum::<u64>(), 4096);
    assert_eq!(leaves.len(), 512 + 7);
    assert!(leaves.iter().all(|(gfn, leaf)| leaf.pfn == (HVA >> 12) + gfn));
}

fn a_failed_allocation_changes_nothing<F: Format>(dirty: DirtyMode) {
    for flags in [SlotFlags::empty(), SlotFlags::LOG_DIRTY_PAGES] {
        let mut failures = 0;
        for left in 0.. {
            let mut guest = Guest::<F>::new(dirty);
            guest.create(0, 0, 1 << 18, HVA, SlotFlags::empty());
            if !flags.is_empty() {
                // A large page that is to be split.
                assert_eq!(guest.write(0), Fault::Mapped(Level::G1));
                guest.table.set_flags(RAM, SlotId::new(0), flags).unwrap();
            } else {
                guest.host.user.set_run(0);
            }
            // A walker without a table in its cache.
            guest.vcpu = guest.mmu.walker().unwrap();
            let (before, tables) = (guest.leaves(), guest.host.user.tables());
            guest.host.user.set_tables_left(left);
            let result = guest.vcpu.fault(Gpa::new(12345 << 12), Access::WRITE);
            match result {
                Ok(fault) => {
                    assert_eq!(fault, Fault::Mapped(Level::K4));
                    break;
                }
                Err(error) => assert!(matches!(error, FaultError::Table(TableError::OutOfMemory))),
            }
            failures += 1;
            assert_eq!(guest.leaves(), before);
            drop(guest.vcpu);
            assert_eq!(guest.mmu.stats().tables, tables, "{left}");
            assert_eq!(guest.host.user.tables(), tables);
        }
        assert_eq!(failures, if flags.is_empty() { usize::from(F::LEVELS) - 1 } else { 2 });
    }
}

fn the_limit_of_tables_holds<F: Format>(dirty: DirtyMode) {
    let limit = usize::from(F::LEVELS) + 3;
    let mut guest = Guest::<F>::with(Config { tables: limit, dirty, ..Config::default() });
    guest.host.user.set_run(0);
    guest.create(0, 0, 1 << 18, HVA, SlotFlags::empty());
    let mut mapped = 0;
    loop {
        assert!(guest.host.user.tables() <= limit);
        match guest.vcpu.fault(Gpa::new((mapped * 512) << 12), Access::WRITE) {
            Ok(fault) => assert_eq!(fault, Fault::Mapped(Level::K4)),
            Err(error) => {
                assert!(matches!(error, FaultError::Table(TableError::Limit { limit: 7 | 8 })), "{error}");
                break;
            }
        }
        mapped += 1;
    }
    assert_eq!(mapped, 4);
    // What is zapped can be used again, without anybody having to say so.
    for round in 0..20 {
        guest.mmu.zap(range(0, 1 << 18)).discharge();
        for gfn in 0..4 {
            assert_eq!(guest.write((round * 7 + gfn) * 512), Fault::Mapped(Level::K4));
        }
    }
    drop(guest.vcpu);
    guest.mmu.zap(range(0, 1 << 18)).discharge();
    guest.mmu.reclaim();
    assert_eq!((guest.mmu.stats().tables, guest.host.user.tables()), (1, 1), "only the root is left");
}

fn beyond_the_tables_is_an_error<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    let end = 1 << (9 * F::LEVELS);
    guest.create(0, end - 1, 2, HVA, SlotFlags::empty());
    assert_eq!(guest.write(end - 1), Fault::Mapped(Level::K4));
    for gfn in [end, (1 << 52) - 1] {
        let error = guest.vcpu.fault(Gpa::new(gfn << 12), Access::READ).unwrap_err();
        assert!(matches!(error, FaultError::BeyondTables { .. }), "{error}");
        assert_eq!(guest.vcpu.translate(Gpa::new(gfn << 12)), None);
    }
    guest.table.delete(RAM, SlotId::new(0)).unwrap();
    assert!(guest.leaves().is_empty());
}
