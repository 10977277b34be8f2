//! Races that a fault must win, played in one thread: the host runs the other side in the middle of a fault, after the
//! slot was looked up and before anything is installed. Numbers are the rows of `src/races.md`, which is checked here
//! as well: it names tests that there are.
#![allow(missing_docs, reason = "tests")]
#![cfg(not(loom))]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use memslot::{Gfn, Gpa, SlotId};
use memslot_mmu::format::{Access, Format};
use memslot_mmu::{DirtyMode, Fault, Level};

for_every_format! {
    d2_a_fault_that_raced_with_an_invalidation_asks_again
    d2_aba_the_same_entry_again_is_not_the_same
    d2_aba_of_an_entry_that_a_fault_emptied
    a_read_only_toggle_beside_a_fault
    logging_that_starts_beside_a_fault
    pages_beside_an_invalidation_are_small
}

fn d2_a_fault_that_raced_with_an_invalidation_asks_again<F: Format>(dirty: DirtyMode) {
    for run in [0, 9] {
        for has_table in [false, true] {
            let mut guest = Guest::<F>::new(dirty);
            guest.host.user.set_run(if has_table { 0 } else { run });
            guest.create(0, 0, 1024, HVA, NONE);
            if has_table {
                assert_eq!(guest.write(100), Fault::Mapped(Level::K4));
            }
            guest.warm_up();
            let (mmu, host) = (guest.mmu.clone(), guest.host.clone());
            guest.host.in_the_next_fault(move || {
                // The answer is on its way already: it is the old one.
                let invalidation = mmu.invalidate_hva(hvas(HVA + 0x5000, 4096)).unwrap();
                host.move_page(HVA + 0x5000, 0x999);
                invalidation.end();
            });
            let _ = guest.write(5);
            assert_eq!(guest.leaf_at(5).map(|(gfn, leaf)| (gfn, leaf.pages, leaf.pfn)), Some((5, 1, 0x999)));
        }
    }
}

fn d2_aba_the_same_entry_again_is_not_the_same<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 16, HVA, NONE);
    assert_eq!(guest.read(6), Fault::Mapped(Level::K4), "a neighbour keeps the table in place");
    guest.host.set_read_only(HVA + 0x5000, true);
    assert_eq!(guest.read(5), Fault::Mapped(Level::K4));
    let entry = guest.leaf_at(5);
    // While a fault holds "it may be written now", the page is shared again, and mapped as it was.
    guest.host.set_read_only(HVA + 0x5000, false);
    let (mmu, host) = (guest.mmu.clone(), guest.host.clone());
    guest.host.in_the_next_fault(move || {
        let invalidation = mmu.invalidate_hva(hvas(HVA + 0x5000, 4096)).unwrap();
        host.set_read_only(HVA + 0x5000, true);
        invalidation.end();
        let mut other = mmu.walker().unwrap();
        assert_eq!(other.fault(Gpa::new(0x5000), Access::READ).unwrap(), Fault::Mapped(Level::K4));
    });
    assert_eq!(guest.write(5), Fault::WriteProtected);
    assert_eq!(guest.leaf_at(5).or(entry), entry, "never writable");
    assert!(guest.leaf_at(5).is_none_or(|(_, leaf)| !leaf.write));
}

fn d2_aba_of_an_entry_that_a_fault_emptied<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 16, HVA, NONE);
    let page = HVA + 0x5000;
    // A neighbour keeps the table in place.
    assert_eq!(guest.read(6), Fault::Mapped(Level::K4));
    guest.host.set_read_only(page, true);
    assert_eq!(guest.read(5), Fault::Mapped(Level::K4));
    guest.host.set_read_only(page, false);
    // The fault hears that the page may be written, empties the entry, and asks again: then things happen.
    let (mmu, host) = (guest.mmu.clone(), guest.host.clone());
    let race = move || {
        let invalidation = mmu.invalidate_hva(hvas(page, 4096)).unwrap();
        host.move_page(page, 0x777);
        host.set_read_only(page, true);
        invalidation.end();
        let mut other = mmu.walker().unwrap();
        assert_eq!(other.fault(Gpa::new(0x5000), Access::READ).unwrap(), Fault::Mapped(Level::K4));
        host.set_read_only(page, false);
        // Another fault empties the entry as well, and gets no further.
        let later = host.clone();
        host.in_the_next_fault(move || later.set_retry(page, true));
        assert_eq!(other.fault(Gpa::new(0x5000), Access::WRITE).unwrap(), Fault::Retry);
        host.set_retry(page, false);
    };
    let host = guest.host.clone();
    guest.host.in_the_next_fault(move || host.in_the_next_fault(race));
    let _ = guest.write(5);
    assert_eq!(guest.leaf_at(5).unwrap().1.pfn, 0x777, "not where it was when the fault asked");
}

/// The tables that lead to frame 5 exist as far as a page of that size needs them: borders of slots pass by.
fn with_tables_for<F: Format>(dirty: DirtyMode, run: u32) -> Guest<F> {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2048, HVA, NONE);
    guest.host.user.set_run(run);
    assert!(matches!(guest.write(if run == 0 { 6 } else { 1024 }), Fault::Mapped(_)));
    guest
}

fn a_read_only_toggle_beside_a_fault<F: Format>(dirty: DirtyMode) {
    for (run, is_mapped) in [(0, false), (0, true), (9, false)] {
        let mut guest = with_tables_for::<F>(dirty, run);
        if is_mapped {
            // Read-only for the host's sake at first, so that the fault asks.
            guest.host.set_read_only(HVA + 0x5000, true);
            assert_eq!(guest.read(5), Fault::Mapped(Level::K4));
            guest.host.set_read_only(HVA + 0x5000, false);
        }
        let (mut guest, table) = shared_table(guest);
        guest.host.in_the_next_fault(move || {
            table.lock().unwrap().transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
        });
        assert_eq!(guest.write(5), Fault::Mmio, "read-only by now");
        assert!(guest.leaf_at(5).is_none_or(|(_, leaf)| !leaf.write));
    }
}

fn logging_that_starts_beside_a_fault<F: Format>(dirty: DirtyMode) {
    for run in [0, 9] {
        let guest = with_tables_for::<F>(dirty, run);
        let (mut guest, table) = shared_table(guest);
        guest.host.in_the_next_fault(move || {
            table.lock().unwrap().set_flags(RAM, SlotId::new(0), LOG).unwrap();
        });
        let level = if run == 0 { Level::K4 } else { Level::M2 };
        assert_eq!(guest.write(5), Fault::Mapped(level), "not wrong, only to be marked");
        // What became writable is marked: the page, or all of a large one.
        let (first, leaf) = guest.leaf_at(5).unwrap();
        assert!(leaf.write);
        assert_eq!(guest.harvest(), (first..first + leaf.pages).collect::<Vec<_>>());
        // And armed by the harvest.
        if dirty == DirtyMode::WriteProtect || run == 9 {
            assert!(!guest.processor_writes(5));
            assert_eq!(guest.write(5), Fault::Mapped(Level::K4));
        }
        assert!(guest.processor_writes(5));
        assert_eq!(guest.harvest(), [5]);
    }
}

fn pages_beside_an_invalidation_are_small<F: Format>(dirty: DirtyMode) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 1024, HVA, NONE);
    let mmu = guest.mmu.clone();
    let invalidation = mmu.invalidate_hva(hvas(HVA + (100 << 12), 4096)).unwrap();
    assert_eq!(guest.write(100), Fault::Retry);
    assert_eq!(guest.write(101), Fault::Mapped(Level::K4), "a large page would cover it");
    assert_eq!(guest.write(512), Fault::Mapped(Level::M2), "this one does not");
    let done = guest.vcpu.prefault(range(0, 512), usize::MAX).unwrap();
    assert_eq!((done.rest.start(), done.last), (Gfn::new(100), Fault::Retry));
    invalidation.end();
    let done = guest.vcpu.prefault(done.rest, usize::MAX).unwrap();
    assert!(done.rest.is_empty());
}

#[test]
fn the_table_of_races_names_tests_that_there_are() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let table = fs::read_to_string(sources.join("races.md")).unwrap();
    let models: String = ["nested", "rmap", "shadow"]
        .iter()
        .flat_map(|module| fs::read_dir(sources.join(module)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("loom"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let words = table.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
    let named: Vec<_> = words.filter(|word| word.starts_with("loom_")).collect();
    for name in &named {
        assert!(models.contains(&format!("fn {name}()")), "{name} is in the table, and nowhere else");
    }
    assert!(named.len() > 20);
    // Every row but that of the lock has one.
    for row in table.lines().filter(|line| line.starts_with("| D") && !line.starts_with("| D8 ")) {
        assert!(row.contains("`loom_"), "{row}");
    }
}
