//! A fault that asks for more than a page allows empties the entry and asks the host anew. Processors may have the old
//! translation until somebody flushes, so whoever changes these frames next must find out.
#![allow(missing_docs, reason = "tests")]

mod common;

use common::*;
use memslot::{Gpa, SlotFlags, SlotId};
use memslot_mmu::format::{Access, Format};
use memslot_mmu::{DirtyMode, Fault, Level};

for_every_format! {
    small_pages_in_place_of_a_large_one_that_a_fault_emptied
    a_path_that_was_not_linked_leaves_its_tables_as_they_were
    a_page_that_was_written_and_emptied_is_harvested
    a_page_that_was_written_and_emptied_is_protected_for_good
}

/// A large page that was mapped when its slot was read-only, and that a processor uses.
fn with_a_read_only_page<F: Format>(dirty: DirtyMode, level: Level) -> Guest<F> {
    let mut guest = Guest::<F>::new(dirty);
    guest.host.user.set_run(if level == Level::G1 { 18 } else { 9 });
    guest.create(0, 0, 2 * level.pages(), HVA, NONE);
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
    assert_eq!(guest.read(5), Fault::Mapped(level));
    guest.host.touch(&guest.mmu, 5);
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), false)).unwrap();
    assert_eq!(guest.host.stale(&guest.mmu, range(0, level.pages())), []);
    guest
}

fn small_pages_in_place_of_a_large_one_that_a_fault_emptied<F: Format>(dirty: DirtyMode) {
    for level in [Level::M2, Level::G1] {
        for run in [0, 9] {
            for other in [4, 6, 511, 512, level.pages() - 1] {
                let mut guest = with_a_read_only_page::<F>(dirty, level);
                guest.host.user.set_run(run);
                let Fault::Mapped(now) = guest.write(5) else { panic!("not mapped") };
                if now == level || other >= level.pages() {
                    continue;
                }
                // The memory behind a page beside it is given away.
                let flush = guest.mmu.zap(range(other, 1));
                flush.discharge();
                assert_eq!(guest.host.stale(&guest.mmu, range(other, 1)), [], "{level:?} {now:?} {other}");
            }
        }
    }
}

fn a_path_that_was_not_linked_leaves_its_tables_as_they_were<F: Format>(dirty: DirtyMode) {
    let mut guest = with_a_read_only_page::<F>(dirty, Level::M2);
    guest.host.user.set_run(0);
    guest.warm_up();
    let mmu = guest.mmu.clone();
    let host = guest.host.clone();
    guest.host.in_the_next_fault(move || {
        // The entry is emptied by now, and the fault asks again: somebody else is quicker.
        host.in_the_next_fault(move || {
            assert_eq!(
                mmu.walker().unwrap().fault(Gpa::new(0x6000), Access::READ).unwrap(),
                Fault::Mapped(Level::K4)
            );
        });
    });
    assert_eq!(guest.write(5), Fault::Mapped(Level::K4));
    guest.mmu.zap(range(0, 512)).discharge();
    // The tables that were not linked are elsewhere now, where nobody has an old translation.
    assert_eq!(guest.write(517), Fault::Mapped(Level::K4));
    assert_eq!(guest.mmu.zap(range(518, 1)).gfns(), None);
}

/// A page that a processor has written, until a fault wants to execute it, and the host is not ready to say more.
fn with_a_written_page<F: Format>(dirty: DirtyMode, flags: SlotFlags) -> Guest<F> {
    let mut guest = Guest::<F>::new(dirty);
    let page = HVA + 0x5000;
    guest.create(0, 0, 64, HVA, flags);
    guest.host.set_no_execute(page, true);
    let _ = guest.read(6);
    assert_eq!(guest.read(5), Fault::Mapped(Level::K4));
    let _ = guest.write(5);
    assert!(guest.processor_writes(5));
    guest.host.touch(&guest.mmu, 5);
    guest.host.set_no_execute(page, false);
    let host = guest.host.clone();
    guest.host.in_the_next_fault(move || host.set_retry(page, true));
    assert_eq!(guest.fault(5, Access::EXECUTE), Fault::Retry);
    assert_eq!(guest.leaf_at(5), None);
    guest
}

fn a_page_that_was_written_and_emptied_is_harvested<F: Format>(dirty: DirtyMode) {
    // Few pages, and all of a table.
    for all in [false, true] {
        let mut guest = with_a_written_page::<F>(dirty, LOG);
        if all {
            let _ = guest.vcpu.prefault(range(6, 58), usize::MAX).unwrap();
            (6..64).for_each(|gfn| _ = guest.write(gfn));
        }
        assert!(guest.harvest().contains(&5));
        assert_eq!(guest.host.stale(&guest.mmu, range(5, 1)), [], "the next write is noticed");
    }
    // By an operation, with and without tables for copies.
    let guest = with_a_written_page::<F>(dirty, NONE);
    guest.host.take_flushes();
    guest.mmu.write_protect(range(5, 1)).discharge();
    assert_eq!(guest.host.take_flushes().len(), 1);
}

fn a_page_that_was_written_and_emptied_is_protected_for_good<F: Format>(dirty: DirtyMode) {
    let mut guest = with_a_written_page::<F>(dirty, NONE);
    guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
    assert_eq!(guest.host.stale(&guest.mmu, range(5, 1)), []);
}
