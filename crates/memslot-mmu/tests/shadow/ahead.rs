//! What the guest has put into a table before it flushes is there afterwards, without a fault; and nothing is there that must not be.
//!
//! After each step everything is checked (`Guest::step`).

use memslot_mmu::shadow::ShadowConfig;

use crate::past_bugs::{ALL, Guest, LOG, PD, PT, USER, USER_WRITE};
use crate::world::Touched;

/// An entry that no fault on the table's first page brings in.
const FAR: u64 = 100;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

const fn address(index: u64) -> u64 {
    index << 12
}

/// A guest whose lowest table is shadowed, and has one entry.
fn guest(config: ShadowConfig) -> Guest {
    let mut guest = Guest::new(config);
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 0, 30 << 12 | ALL);
    guest.leads(0, 0, USER_WRITE, 30);
    guest
}

/// How many faults this takes.
fn faults(guest: &mut Guest, work: impl FnOnce(&mut Guest)) -> u64 {
    let before = guest.world.shadow.stats().faults;
    work(guest);
    guest.world.shadow.stats().faults - before
}

/// The guest flushes. Returns how many entries that has made.
fn flush(guest: &mut Guest) -> u64 {
    let before = guest.world.shadow.stats().prefetched;
    guest.load(0, 0);
    guest.world.shadow.stats().prefetched - before
}

/// As Linux patches its code: an entry is made, used after a flush, and cleared before the next one, again and again.
#[test]
fn an_entry_that_is_new_at_a_flush_needs_no_fault() {
    let mut guest = guest(ShadowConfig::default());
    for gfn in [31, 32, 31, 33] {
        guest.store(0, PT, FAR, gfn << 12 | ALL);
        guest.load(0, 0);
        assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER_WRITE, gfn)), 0, "{gfn}");
        guest.store(0, PT, FAR, 0);
        guest.load(0, 0);
        assert_eq!(guest.touch(0, address(FAR), USER), Touched::Fault(4));
    }
    // Exchanged at once, without a flush between.
    guest.store(0, PT, FAR, 31 << 12 | ALL);
    guest.load(0, 0);
    guest.store(0, PT, FAR, 32 << 12 | ALL);
    guest.load(0, 0);
    assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER_WRITE, 32)), 0);
}

#[test]
fn what_was_not_accessed_is_left_for_its_fault() {
    let mut guest = guest(ShadowConfig::default());
    guest.store(0, PT, FAR, 31 << 12 | ALL & !ACCESSED);
    assert_eq!(flush(&mut guest), 0);
    assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER, 31)), 1);
}

/// What was not written is not writable: the guest's dirty bit has to be set.
#[test]
fn what_was_not_written_cannot_be_written_without_a_fault() {
    let mut guest = guest(ShadowConfig::default());
    guest.store(0, PT, FAR, 31 << 12 | ALL & !DIRTY);
    guest.load(0, 0);
    assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER, 31)), 0);
    assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER_WRITE, 31)), 1);
}

#[test]
fn a_page_of_a_logged_slot_is_not_writable_ahead() {
    let mut guest = guest(ShadowConfig::default());
    guest.set_flags(0, LOG);
    guest.store(0, PT, FAR, 31 << 12 | ALL);
    guest.load(0, 0);
    assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER, 31)), 0);
    assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER_WRITE, 31)), 1);
}

/// A table with many new entries was filled, not edited.
#[test]
fn of_many_entries_none_is_made_ahead() {
    for (count, made) in [(8, 8), (9, 0)] {
        let mut guest = guest(ShadowConfig::default());
        for index in 0..count {
            guest.store(0, PT, FAR + index, (31 + index) << 12 | ALL);
        }
        assert_eq!(flush(&mut guest), made, "of {count}");
    }
}

/// A frame that is a table in sync, or no memory.
#[test]
fn what_may_not_be_written_or_is_not_there_is_not_made_ahead() {
    let mut guest = guest(ShadowConfig::default());
    guest.store(0, PT, FAR, PD << 12 | ALL);
    guest.store(0, PT, FAR + 1, 100 << 12 | ALL);
    assert_eq!(flush(&mut guest), 1);
    assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER, PD)), 0);
    assert_eq!(faults(&mut guest, |guest| guest.leads(0, address(FAR), USER_WRITE, PD)), 1);
    assert_eq!(guest.touch(0, address(FAR + 1), USER), Touched::Mmio(100 << 12));
}
