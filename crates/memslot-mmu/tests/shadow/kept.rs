//! Slots that are split, merged, resized, renamed or made read-only keep what is mapped of them, and what is kept is found by
//! everybody who looks for it afterwards: whoever deletes the new slots, the dirty log, aging, write tracking.
//!
//! After each step everything is checked (`Guest::step`), the reverse map's lists against the entries included.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memslot::{Gfn, Listener, ListenerError, SlotId, SlotSpec, Transaction, TransactionError, Update};
use memslot_mmu::Level;
use memslot_mmu::shadow::guest::GuestAccess;
use memslot_mmu::shadow::{ShadowConfig, ShadowFault, ShadowVcpu};

use crate::naive::Want;
use crate::past_bugs::{
    ALL, Guest, LOG, NONE, PAGE_SIZE, PD, PT, READONLY, USER, USER_WRITE, in_pd, set_flags,
};
use crate::world::host::TestHost;
use crate::world::layout::{END, LARGE};
use crate::world::{RAM, Touched, range, slot};

/// The slot that tests change, and ids for new ones: one whose bit is beside it, and one far away, for which sets of slots need memory.
const SLOT: u32 = 1;
const NEAR: u32 = 5;
const FAR: u32 = 300;

const fn id(number: u32) -> SlotId {
    SlotId::new(number)
}

/// How many pages of [`guest`] are mapped on each side of [`MIDDLE`].
const SIDE: u64 = HALF.unsigned_abs();
const MIDDLE: u64 = LARGE + 104;

/// A guest with small pages of [`SLOT`] on both sides of [`MIDDLE`], in pieces of a large page of its own, written and accessed; and the
/// kernel's own. What else is mapped is of slot 0.
fn guest() -> Guest {
    let mut guest = Guest::small();
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    use_all(&mut guest);
    guest
}

fn frames() -> impl Iterator<Item = u64> {
    MIDDLE - SIDE..MIDDLE + SIDE
}

fn use_all(guest: &mut Guest) {
    use_each(guest, USER_WRITE, frames());
}

/// Each leads where it should. Checked once, in the end.
fn use_each(guest: &mut Guest, want: Want, frames: impl Iterator<Item = u64>) {
    guest.step(|world| {
        for gfn in frames {
            let (_, pfn) = world.resolve(RAM, gfn).unwrap();
            assert_eq!(world.touch(0, (gfn - LARGE) << 12, want), Touched::Done(pfn), "{gfn:#x}");
        }
    });
}

/// How many faults it takes to use all of them, with nothing cached.
fn faults_to_use(guest: &mut Guest, frames: impl Iterator<Item = u64>) -> u64 {
    let before = guest.world.shadow.stats().faults;
    guest.world.host.forget_all(guest.world.cpus[0].tlb);
    use_each(guest, USER_WRITE, frames);
    guest.world.shadow.stats().faults - before
}

fn transaction(guest: &mut Guest, work: impl FnOnce(&mut Transaction<'_>) -> Result<(), TransactionError>) {
    guest.change(|world| {
        world.table.transaction(work).unwrap();
    });
}

/// How many leaves more than before there are when the work is done.
fn gained(guest: &mut Guest, work: impl FnOnce(&mut Guest)) -> i64 {
    let leaves = |guest: &Guest| i64::try_from(guest.leaves()).unwrap();
    let before = leaves(guest);
    work(guest);
    leaves(guest) - before
}

fn split(guest: &mut Guest, at: u64, new: u32) {
    transaction(guest, |tx| tx.split(RAM, id(SLOT), Gfn::new(at), id(new)));
}

/// The same, as a difference.
const HALF: i64 = 64;
const ALL_OF_THEM: i64 = 2 * HALF;

#[test]
fn split_keeps_what_is_mapped() {
    for new in [NEAR, FAR] {
        let mut guest = guest();
        assert_eq!(gained(&mut guest, |guest| split(guest, MIDDLE, new)), 0);
        assert_eq!(faults_to_use(&mut guest, frames()), 0);
        // In whichever order the halves go, what was kept of each goes with it, and nothing else does.
        let (first, second) = if new == NEAR { (SLOT, new) } else { (new, SLOT) };
        assert_eq!(gained(&mut guest, |guest| guest.delete(first)), -HALF);
        let (gone, there) = if first == new { (MIDDLE, MIDDLE - 1) } else { (MIDDLE - 1, MIDDLE) };
        assert_eq!(guest.touch(0, (gone - LARGE) << 12, USER), Touched::Mmio(gone << 12));
        guest.leads(0, (there - LARGE) << 12, USER_WRITE, there);
        assert_eq!(gained(&mut guest, |guest| guest.delete(second)), -HALF);
    }
}

#[test]
fn merge_keeps_what_is_mapped() {
    for new in [NEAR, FAR] {
        let mut guest = guest();
        // Of both halves something was mapped while they were two.
        guest.step(|world| world.shadow.zap_gfn_range(RAM, range(0, END)));
        split(&mut guest, MIDDLE, new);
        use_all(&mut guest);
        let merged = |guest: &mut Guest| transaction(guest, |tx| tx.merge(RAM, id(SLOT), id(new)));
        assert_eq!(gained(&mut guest, merged), 0);
        assert_eq!(faults_to_use(&mut guest, frames()), 0);
        assert_eq!(gained(&mut guest, |guest| guest.delete(SLOT)), -ALL_OF_THEM);
    }
}

/// The lists of a slot that comes beside another one, in the same chunk of heads, are one with it when both are merged.
#[test]
fn merge_keeps_what_a_new_neighbour_has_mapped() {
    let mut guest = guest();
    split(&mut guest, MIDDLE, NEAR);
    let spec = guest.world.table.view().slot(RAM, id(SLOT)).unwrap().spec();
    guest.delete(SLOT);
    guest.change(|world| {
        world.table.create(spec).unwrap();
    });
    use_all(&mut guest);
    let merged = |guest: &mut Guest| transaction(guest, |tx| tx.merge(RAM, id(SLOT), id(NEAR)));
    assert_eq!(gained(&mut guest, merged), 0);
    assert_eq!(faults_to_use(&mut guest, frames()), 0);
    assert_eq!(gained(&mut guest, |guest| guest.delete(SLOT)), -ALL_OF_THEM);
}

#[test]
fn grow_and_shrink_keep_what_stays() {
    let mut guest = guest();
    let resized = |pages| move |guest: &mut Guest| transaction(guest, |tx| tx.resize(RAM, id(SLOT), pages));
    assert_eq!(gained(&mut guest, resized(MIDDLE - LARGE + SIDE)), 0);
    assert_eq!(faults_to_use(&mut guest, frames()), 0);
    assert_eq!(gained(&mut guest, resized(END - LARGE)), 0, "grown");
    assert_eq!(faults_to_use(&mut guest, frames()), 0);
    assert_eq!(gained(&mut guest, resized(MIDDLE - LARGE)), -HALF, "what is cut off");
    assert_eq!(faults_to_use(&mut guest, MIDDLE - SIDE..MIDDLE), 0);
    assert_eq!(guest.touch(0, (MIDDLE - LARGE) << 12, USER), Touched::Mmio(MIDDLE << 12));
    assert_eq!(gained(&mut guest, |guest| guest.delete(SLOT)), -HALF);
}

#[test]
fn read_only_and_back_keeps_what_is_mapped() {
    let mut guest = guest();
    let read_only =
        |on| move |guest: &mut Guest| transaction(guest, |tx| tx.set_read_only(RAM, id(SLOT), on));
    assert_eq!(gained(&mut guest, read_only(true)), 0);
    let before = guest.world.shadow.stats().faults;
    guest.world.host.forget_all(guest.world.cpus[0].tlb);
    use_each(&mut guest, USER, frames());
    assert_eq!(guest.world.shadow.stats().faults, before, "it may be read as before");
    assert_eq!(guest.touch(0, (MIDDLE - LARGE) << 12, USER_WRITE), Touched::Mmio(MIDDLE << 12));
    assert_eq!(gained(&mut guest, read_only(false)), 0);
    // One fault for each that is written again, and none for those that are read.
    assert_eq!(faults_to_use(&mut guest, MIDDLE..MIDDLE + 1), 1);
    assert_eq!(gained(&mut guest, |guest| guest.delete(SLOT)), -ALL_OF_THEM);
}

#[test]
fn another_id_keeps_what_is_mapped() {
    let mut guest = guest();
    let spec = guest.world.table.view().slot(RAM, id(SLOT)).unwrap().spec();
    let renamed = |guest: &mut Guest| {
        transaction(guest, |tx| {
            tx.delete(RAM, id(SLOT))?;
            tx.create(SlotSpec { id: id(FAR), ..spec })
        });
    };
    assert_eq!(gained(&mut guest, renamed), 0);
    assert_eq!(faults_to_use(&mut guest, frames()), 0);
    assert_eq!(gained(&mut guest, |guest| guest.delete(FAR)), -ALL_OF_THEM);
}

/// As a hypervisor does that makes room for a ROM or takes a page away: all in one transaction.
#[test]
fn a_piece_that_is_cut_out_leaves_the_rest() {
    for what in 0..3 {
        let mut guest = guest();
        let middle = range(MIDDLE - 8, 16);
        let mut spec = None;
        let cut = |guest: &mut Guest| {
            transaction(guest, |tx| {
                tx.split(RAM, id(SLOT), middle.start(), id(NEAR))?;
                tx.split(RAM, id(NEAR), middle.end(), id(FAR))?;
                spec = tx.slot(RAM, id(NEAR)).map(memslot::Slot::spec);
                match what {
                    0 => tx.delete(RAM, id(NEAR)),
                    1 => tx.set_flags(RAM, id(NEAR), READONLY),
                    _ => tx.set_flags(RAM, id(NEAR), LOG),
                }
            });
        };
        assert_eq!(gained(&mut guest, cut), if what == 0 { -16 } else { 0 });
        let outside = || frames().filter(|gfn| !middle.contains(Gfn::new(*gfn)));
        assert_eq!(faults_to_use(&mut guest, outside()), 0);
        let wanted = [Touched::Mmio(MIDDLE << 12), Touched::Mmio(MIDDLE << 12)];
        if what < 2 {
            assert_eq!(guest.touch(0, (MIDDLE - LARGE) << 12, USER_WRITE), wanted[what]);
        } else {
            guest.leads(0, (MIDDLE - LARGE) << 12, USER_WRITE, MIDDLE);
            assert_eq!(guest.step(crate::world::World::harvest).len(), 1, "the one that was written");
        }
        let spec = spec.unwrap();
        let put_back = |guest: &mut Guest| {
            transaction(guest, |tx| {
                match what {
                    0 => tx.create(spec)?,
                    _ => tx.set_flags(RAM, id(NEAR), NONE)?,
                }
                tx.merge(RAM, id(SLOT), id(NEAR))?;
                tx.merge(RAM, id(SLOT), id(FAR))
            });
        };
        assert_eq!(gained(&mut guest, put_back), 0);
        assert_eq!(faults_to_use(&mut guest, outside()), 0);
        use_all(&mut guest);
        assert_eq!(gained(&mut guest, |guest| guest.delete(SLOT)), -ALL_OF_THEM);
    }
}

/// A large page stays if no new border cuts it.
#[test]
fn large_pages_stay_where_no_border_cuts_them() {
    for (at, cut) in [(LARGE + 512, 0), (LARGE + 100, -1), (LARGE + 1023, -1)] {
        let mut guest = Guest::new(ShadowConfig::default());
        guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
        guest.put(PD, 1, (LARGE + 512) << 12 | ALL | PAGE_SIZE);
        guest.leads(0, 0x5000, USER_WRITE, LARGE + 5);
        guest.leads(0, in_pd(1), USER_WRITE, LARGE + 512);
        let flushes = guest.world.shadow.stats().flushes;
        assert_eq!(gained(&mut guest, |guest| split(guest, at, NEAR)), cut);
        assert_eq!(guest.world.shadow.stats().flushes, flushes + cut.unsigned_abs(), "one flush, if any");
        guest.leads(0, 0x5000, USER_WRITE, LARGE + 5);
        guest.leads(0, in_pd(1), USER_WRITE, LARGE + 512);
        guest.delete(NEAR);
        guest.delete(SLOT);
        assert_eq!(guest.touch(0, 0x5000, USER), Touched::Mmio((LARGE + 5) << 12));
    }
}

/// What is cut off reaches into a large page of what stays.
#[test]
fn a_large_page_goes_with_a_part_of_it() {
    let mut guest = Guest::new(ShadowConfig::default());
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    guest.leads(0, 0x5000, USER_WRITE, LARGE + 5);
    assert_eq!(gained(&mut guest, |guest| transaction(guest, |tx| tx.resize(RAM, id(SLOT), 100))), -1);
    guest.leads(0, 0x5000, USER_WRITE, LARGE + 5);
    assert_eq!(guest.touch(0, 100 << 12, USER), Touched::Mmio((LARGE + 100) << 12));
}

#[test]
fn the_dirty_log_finds_what_was_kept() {
    let mut guest = Guest::small();
    guest.set_flags(SLOT, LOG);
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    use_all(&mut guest);
    split(&mut guest, MIDDLE, FAR);
    let dirty = guest.step(crate::world::World::harvest);
    assert_eq!(dirty.iter().filter(|(_, gfn)| *gfn >= LARGE).count() as u64, 2 * SIDE);
    // What was kept has lost W: each write is noticed again.
    assert_eq!(faults_to_use(&mut guest, frames()), 2 * SIDE);
    assert_eq!(guest.step(crate::world::World::harvest).len() as u64, 2 * SIDE);
    guest.delete(FAR);
    guest.delete(SLOT);
}

/// Logging of a new slot begins: what was kept is write-protected, through the lists of its frames (a small slot), or through the pages that
/// have the slot (a large one).
#[test]
fn logging_of_a_new_slot_finds_what_was_kept() {
    const WIDE: u64 = 4096;
    for new in [NEAR, FAR] {
        let mut guest = Guest::small();
        guest.change(|world| {
            world.table.create(slot(RAM, 7, range(WIDE, 1 << 14), WIDE, NONE)).unwrap();
        });
        guest.put(PD, 0, WIDE << 12 | ALL | PAGE_SIZE);
        guest.leads(0, 0x4000, USER_WRITE, WIDE + 4);
        guest.leads(0, 0x8000, USER_WRITE, WIDE + 8);
        let leaves = guest.leaves();
        transaction(&mut guest, |tx| tx.split(RAM, id(7), Gfn::new(WIDE + 8), id(new)));
        guest.set_flags(new, LOG);
        guest.leads(0, 0x4000, USER_WRITE, WIDE + 4);
        guest.leads(0, 0x8000, USER_WRITE, WIDE + 8);
        assert_eq!(guest.step(crate::world::World::harvest), [(RAM, WIDE + 8)]);
        assert_eq!(guest.leaves(), leaves);
        guest.delete(new);
        assert_eq!(guest.touch(0, 0x8000, USER), Touched::Mmio((WIDE + 8) << 12));
        guest.leads(0, 0x4000, USER_WRITE, WIDE + 4);
        guest.delete(7);
    }
}

#[test]
fn aging_finds_what_was_kept() {
    let mut guest = guest();
    let mut ager = guest.world.shadow.ager().unwrap();
    let both = range(MIDDLE - SIDE, 2 * SIDE);
    assert_eq!(ager.age(RAM, both), 2 * SIDE);
    use_all_again(&mut guest);
    split(&mut guest, MIDDLE, NEAR);
    // With the slots as they are now, and one who has looked at them before.
    assert!(guest.world.shadow.ager().unwrap().is_young(RAM, range(MIDDLE, 1)));
    assert_eq!(ager.age(RAM, range(MIDDLE, SIDE)), SIDE);
    assert_eq!(ager.age(RAM, both), SIDE);
}

/// The processor walks to all of them, and sets accessed bits.
fn use_all_again(guest: &mut Guest) {
    assert_eq!(faults_to_use(guest, frames()), 0);
}

/// A frame that was mapped writable before the split becomes a table after it: the entry that was kept is write-protected.
#[test]
fn write_tracking_finds_what_was_kept() {
    let mut guest = Guest::as_kvm();
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 1, 40 << 12 | ALL);
    guest.leads(0, 0x1000, USER_WRITE, 40);
    transaction(&mut guest, |tx| tx.split(RAM, id(0), Gfn::new(40), id(FAR)));
    // A table of level 2 must not be written freely.
    guest.put(41, 0, 33 << 12 | ALL);
    guest.store(0, 40, 0, 41 << 12 | ALL);
    guest.store(0, 5, 1, 40 << 12 | ALL);
    guest.leads(0, 1 << 30, USER, 33);
    assert_eq!(guest.touch(0, 0x1000, USER_WRITE), Touched::Emulated(40 << 12));
}

/// Fails to commit while that is on.
struct Fails(Arc<AtomicBool>);

impl Listener for Fails {
    fn name(&self) -> &str {
        "one that fails"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if self.0.load(Ordering::SeqCst) { Err("not now".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// A change that is taken back has kept the entries twice; they are the old slots'.
#[test]
fn a_change_that_is_taken_back_keeps_what_is_mapped() {
    for new in [NEAR, FAR] {
        let mut guest = guest();
        let fails = Arc::new(AtomicBool::new(true));
        guest.world.table.add_listener(Box::new(Fails(fails.clone()))).unwrap();
        let taken_back = |guest: &mut Guest| {
            guest.change(|world| {
                let split = world.table.transaction(|tx| tx.split(RAM, id(SLOT), Gfn::new(MIDDLE), id(new)));
                assert!(split.is_err());
            });
        };
        assert_eq!(gained(&mut guest, taken_back), 0);
        assert_eq!(faults_to_use(&mut guest, frames()), 0);
        fails.store(false, Ordering::SeqCst);
        split(&mut guest, MIDDLE, new);
        fails.store(true, Ordering::SeqCst);
        let taken_back = |guest: &mut Guest| {
            guest.change(|world| {
                assert!(world.table.transaction(|tx| tx.merge(RAM, id(SLOT), id(new))).is_err());
            });
        };
        assert_eq!(gained(&mut guest, taken_back), 0);
        assert_eq!(faults_to_use(&mut guest, frames()), 0);
        fails.store(false, Ordering::SeqCst);
        assert_eq!(gained(&mut guest, |guest| guest.delete(new)), -HALF);
        assert_eq!(gained(&mut guest, |guest| guest.delete(SLOT)), -HALF);
    }
}

/// Pages that have a slot are told of its new ids, and forget those that are gone: a slot with such an id that comes later is none of theirs.
#[test]
fn ids_come_and_go() {
    let mut guest = guest();
    for new in (2..2000).step_by(37) {
        let leaves = guest.leaves();
        split(&mut guest, MIDDLE, new);
        assert_eq!(guest.leaves(), leaves);
        transaction(&mut guest, |tx| tx.merge(RAM, id(SLOT), id(new)));
        assert_eq!(guest.leaves(), leaves);
    }
    set_flags(&mut guest, SLOT, READONLY);
    assert_eq!(gained(&mut guest, |guest| guest.delete(SLOT)), -ALL_OF_THEM);
}

/// The limit of what is one size only is not the test's matter: with large pages on, a split in the middle of small ones.
#[test]
fn pieces_of_a_large_page_stay_in_both_halves() {
    let mut guest = Guest::new(ShadowConfig { largest: Level::G1, ..ShadowConfig::default() });
    guest.set_flags(SLOT, LOG);
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    use_all(&mut guest);
    assert_eq!(gained(&mut guest, |guest| split(guest, MIDDLE, NEAR)), 0);
    assert_eq!(faults_to_use(&mut guest, frames()), 0);
}

/// Uses two addresses while a change is prepared and committed, and lets it fail, or not.
struct Uses {
    vcpu: ShadowVcpu<TestHost>,
    addresses: [u64; 2],
    fails: bool,
}

impl Uses {
    fn fault(&mut self, address: u64) {
        let fault = self.vcpu.fault(address, GuestAccess::WRITE | GuestAccess::USER).unwrap();
        assert_eq!(fault, ShadowFault::Mapped(Level::K4));
    }
}

impl Listener for Uses {
    fn name(&self) -> &str {
        "one that uses memory meanwhile"
    }

    fn prepare(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        self.fault(self.addresses[0]);
        Ok(())
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        self.fault(self.addresses[1]);
        if self.fails { Err("not now".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// Shadow pages that are made while a slot is split know both of its ids, whichever it comes to be.
#[test]
fn what_is_mapped_meanwhile_is_kept() {
    for (new, fails) in [(NEAR, false), (NEAR, true), (FAR, false), (FAR, true)] {
        let mut guest = Guest::small();
        // Through tables of different rights, so that each has a page of its own.
        for (index, rights) in [(0, ALL), (1, ALL | 1 << 63)] {
            guest.put(PD, index, LARGE << 12 | rights | PAGE_SIZE);
        }
        let mut vcpu = guest.world.shadow.vcpu().unwrap();
        vcpu.load(guest.world.cpus[0].paging, RAM).unwrap();
        let addresses = [(MIDDLE + 9 - LARGE) << 12, in_pd(1) | (MIDDLE + 9 - LARGE) << 12];
        guest.world.table.add_listener(Box::new(Uses { vcpu, addresses, fails })).unwrap();
        guest.change(|world| {
            let split = world.table.transaction(|tx| tx.split(RAM, id(SLOT), Gfn::new(MIDDLE), id(new)));
            assert_eq!(split.is_err(), fails);
        });
        for address in addresses {
            guest.leads(0, address, USER_WRITE, MIDDLE + 9);
        }
        assert!(guest.leaves() >= 2);
    }
}
