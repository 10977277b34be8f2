//! The kernel's dirty bits on their way through changes of the table.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use memslot::dirty::{Consumer, DirtyLog};
use memslot::*;
use memslot_kvm::Options;
use memslot_testing::programs;

use crate::common::{MODEL_HVA as HVA, PAGE, RAM, random_op, spec};
use crate::fake::{Writers, frames};
use crate::{FRAMES, Rig};

pub(crate) fn with_log(rig: &mut Rig) -> (DirtyLog, Consumer) {
    let log = rig.slots.dirty_log(&mut rig.table).unwrap();
    let consumer = log.consumer().unwrap();
    (log, consumer)
}

pub(crate) fn harvested(rig: &Rig, consumer: &Consumer) -> BTreeSet<u64> {
    let harvest = rig.slots.harvest(consumer).unwrap();
    let pages = harvest.runs().flat_map(|run| run.gfns.start().get()..run.gfns.end().get()).collect();
    harvest.commit();
    pages
}

/// What was dirty in slots that went: first frames and pages.
fn removed(consumer: &Consumer) -> Vec<(u64, u64)> {
    let removed = consumer.take_removed().unwrap();
    removed.iter().flat_map(|removed| removed.runs()).map(|run| (run.start().get(), run.len())).collect()
}

/// The bits follow the memory through random changes: a page that was written, is still there and has been logged all
/// the time is reported; nothing is reported twice without a write.
#[test]
fn no_write_is_lost_in_a_change() {
    for manual in [false, true] {
        for mut random in programs(60) {
            let random = &mut random;
            let mut rig = Rig::new(200, Options::default());
            let (_, consumer) = with_log(&mut rig);
            if manual {
                rig.slots.enable_manual_protect(false).unwrap();
            }
            let mut expected = BTreeSet::new();
            for _ in 0..40 {
                for _ in 0..random.below(6) {
                    let gfn = random.below(FRAMES);
                    if rig.fake.write(gfn) && logs(&rig, gfn) {
                        expected.insert(gfn);
                    }
                }
                // These come between the plan and the pause.
                let late: Vec<u64> = (0..random.below(4)).map(|_| random.below(FRAMES)).collect();
                rig.slots.set_vcpus(Writers::of(&rig.fake, &late));
                let before = rig.table.snapshot();
                let fails = random.once_in(5);
                rig.fake.inner().fail_in = fails.then(|| u32::try_from(random.below(3)).unwrap());
                rig.fake.inner().failures = 1;
                let result = rig
                    .table
                    .transaction(|tx| (0..2).try_for_each(|_| random_op(tx, random, 16, FRAMES, HVA)));
                rig.fake.inner().fail_in = None;
                if rig.pauses() > 0 {
                    let writable = |gfn: &u64| {
                        before.slot_at(RAM, Gfn::new(*gfn)).is_some_and(|slot| {
                            slot.hva().is_some() && slot.flags() == SlotFlags::LOG_DIRTY_PAGES
                        })
                    };
                    expected.extend(late.into_iter().filter(writable));
                }
                if result.is_ok() {
                    // Where the memory is now, and logged before and after, the page is dirty still.
                    let (was, is) = (frames(&before), frames(rig.table.view()));
                    let stays = |gfn: &u64| {
                        was.get(gfn).map(|frame| frame.0) == is.get(gfn).map(|frame| frame.0)
                            && logs(&rig, *gfn)
                    };
                    expected.retain(stays);
                }
                rig.check();
                if random.once_in(3) {
                    let found = harvested(&rig, &consumer);
                    assert!(expected.is_subset(&found), "{expected:?} of {found:?}");
                    expected.clear();
                    assert_eq!(harvested(&rig, &consumer), BTreeSet::new());
                }
            }
        }
    }
}

pub(crate) fn logs(rig: &Rig, gfn: u64) -> bool {
    let slot = rig.table.view().slot_at(RAM, Gfn::new(gfn));
    slot.is_some_and(|slot| slot.hva().is_some() && slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES))
}

/// Memory that moves and stays as well, as another slot's: what was written is dirty where it was written, as it is in a log
/// without a kernel. (The kernel's own move takes all bits along.)
#[test]
fn frames_that_keep_their_memory_keep_their_bits_when_their_slot_moves() {
    let both = SlotFlags::LOG_DIRTY_PAGES | SlotFlags::READONLY;
    for flags in [SlotFlags::LOG_DIRTY_PAGES, both] {
        let mut rig = Rig::new(200, Options::default());
        let (_, consumer) = with_log(&mut rig);
        rig.table.create(spec(3, 100, 9, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
        assert!(rig.fake.write(102) && rig.fake.write(107));
        rig.table
            .transaction(|tx| {
                tx.move_to(RAM, SlotId::new(3), Gfn::new(60))?;
                tx.create(spec(12, 102, 4, HVA + 2 * PAGE, flags))
            })
            .unwrap();
        assert!(harvested(&rig, &consumer).is_superset(&BTreeSet::from([102, 67])));
        rig.check();
    }
}

#[test]
fn a_moved_slot_takes_its_pages_along() {
    let mut rig = Rig::new(200, Options::default());
    let (_, consumer) = with_log(&mut rig);
    rig.table.create(spec(0, 0, 8, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    rig.table.create(spec(1, 10, 8, HVA + (1 << 30), SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert!(rig.fake.write(3) && rig.fake.write(12));
    // One is moved by the kernel with its bitmap; then both change places, which the kernel cannot.
    rig.table.move_to(RAM, SlotId::new(0), Gfn::new(20)).unwrap();
    rig.table
        .transaction(|tx| {
            tx.move_to(RAM, SlotId::new(0), Gfn::new(10))?;
            tx.move_to(RAM, SlotId::new(1), Gfn::new(20))
        })
        .unwrap();
    // The bits of the second change were fetched while it was under way: they count for both sides of it.
    assert!(harvested(&rig, &consumer).is_superset(&BTreeSet::from([13, 22])));
    assert_eq!(harvested(&rig, &consumer), BTreeSet::new());
}

#[test]
fn who_asks_gets_the_pages_of_a_slot_that_went() {
    let mut rig = Rig::new(200, Options::default());
    let log = rig.slots.dirty_log(&mut rig.table).unwrap();
    let consumer = log.consumer_keeping_removed().unwrap();
    rig.table.create(spec(0, 8, 8, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert!(rig.fake.write(9));
    rig.slots.set_vcpus(Writers::of(&rig.fake, &[15]));
    rig.table.delete(RAM, SlotId::new(0)).unwrap();
    assert_eq!(rig.pauses(), 1, "a write between the last look and the end would be lost");
    assert_eq!(removed(&consumer), [(9, 1), (15, 1)]);
}

/// The kernel drops the bitmap of a slot that moves and is not logged any more; it does both in one call.
#[test]
fn who_asks_gets_the_pages_of_a_slot_that_is_not_logged_where_it_went() {
    let mut rig = Rig::new(200, Options::default());
    let log = rig.slots.dirty_log(&mut rig.table).unwrap();
    let consumer = log.consumer_keeping_removed().unwrap();
    rig.table.create(spec(0, 8, 8, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert!(rig.fake.write(9));
    rig.slots.set_vcpus(Writers::of(&rig.fake, &[15]));
    rig.table
        .transaction(|tx| {
            tx.move_to(RAM, SlotId::new(0), Gfn::new(30))?;
            tx.set_flags(RAM, SlotId::new(0), SlotFlags::empty())
        })
        .unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("create", 1), ("move", 1)], 1));
    assert_eq!(removed(&consumer), [(9, 1), (15, 1)]);
}

#[test]
fn the_log_is_of_the_table_that_is_followed() {
    let rig = Rig::new(200, Options::default());
    let mut other = SlotTable::new(Limits::default()).unwrap();
    let error = rig.slots.dirty_log(&mut other).unwrap_err().to_string();
    assert_eq!(error, "the table is not the one that these slots follow");
}

#[test]
fn where_the_kernel_does_not_tell_all_is_dirty() {
    let mut rig = Rig::new(200, Options::default());
    let (_, consumer) = with_log(&mut rig);
    rig.table.create(spec(0, 0, 8, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    rig.fake.inner().no_dirty_log = true;
    let error = rig.slots.fetch().unwrap_err().to_string();
    assert!(error.starts_with("get the dirty log of KVM slot 0 at 0x0, 0x8000 bytes: "), "{error}");
    // Half of the slot goes, and the kernel's bits of all of it with it.
    rig.table.transaction(|tx| tx.resize(RAM, SlotId::new(0), 4)).unwrap();
    rig.fake.inner().no_dirty_log = false;
    assert_eq!(harvested(&rig, &consumer), BTreeSet::from([0, 1, 2, 3]));
}

#[test]
fn manual_protection_clears_what_was_taken_and_nothing_else() {
    let mut rig = Rig::new(200, Options::default());
    let (log, consumer) = with_log(&mut rig);
    rig.slots.enable_manual_protect(true).unwrap();
    assert!(log.initially_set());
    rig.table.create(spec(0, 5, 90, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert_eq!(harvested(&rig, &consumer).len(), 90, "all pages are dirty at first");
    rig.fake.inner().calls.clear();

    for gfn in [5, 6, 68, 69, 94] {
        assert!(rig.fake.write(gfn));
    }
    // A range takes its own pages; the others stay dirty, in the kernel too.
    rig.slots.fetch().unwrap();
    let harvest = consumer.harvest_range(RAM, crate::common::gfns(6, 63), &mut rig.slots.rearm()).unwrap();
    assert_eq!(harvest.pages(), 2);
    harvest.commit();
    assert_eq!(rig.fake.inner().dirty[&0], BTreeSet::from([0, 64, 89]));
    assert_eq!(harvested(&rig, &consumer), BTreeSet::from([5, 69, 94]));
    assert_eq!(rig.fake.inner().dirty[&0], BTreeSet::new());
    // One call each, however many runs.
    assert_eq!(rig.calls(), [("clear", 2)]);
}

/// Pages that count as dirty at first are armed when their bits are cleared, and with rings no bits ever are.
#[test]
fn rings_and_manual_protection_exclude_each_other() {
    let excluded = "dirty rings and manual dirty log protection exclude each other";
    let mut rig = Rig::new(200, Options::default());
    let (log, _) = with_log(&mut rig);
    rig.slots.enable_rings(1024).unwrap();
    for initially_set in [false, true] {
        assert_eq!(rig.slots.enable_manual_protect(initially_set).unwrap_err().to_string(), excluded);
    }
    assert!(!log.initially_set());

    let mut rig = Rig::new(200, Options::default());
    with_log(&mut rig);
    rig.slots.enable_manual_protect(true).unwrap();
    assert_eq!(rig.slots.enable_rings(1024).unwrap_err().to_string(), excluded);
}

/// A slot moves to where another one goes, which takes a delete and a create, and is then taken back: the bits that
/// were fetched meanwhile belong to the slots as they are again.
#[test]
fn a_change_that_is_taken_back_loses_no_write() {
    for fails_in_kernel in [true, false] {
        let mut rig = Rig::new(200, Options::default());
        let (_, consumer) = with_log(&mut rig);
        rig.table.create(spec(0, 10, 8, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
        rig.table.create(spec(1, 20, 8, HVA + (1 << 30), SlotFlags::LOG_DIRTY_PAGES)).unwrap();
        assert!(rig.fake.write(11) && rig.fake.write(23));
        if fails_in_kernel {
            rig.fake.inner().fail_in = Some(2);
            rig.fake.inner().failures = 1;
        } else {
            rig.refuse.store(true, Ordering::Relaxed);
        }
        // Before the change this is a page of slot 1, and before it is taken back one of slot 0.
        rig.slots.set_vcpus(Writers::of(&rig.fake, &[25]));
        rig.table
            .transaction(|tx| {
                tx.delete(RAM, SlotId::new(1))?;
                tx.move_to(RAM, SlotId::new(0), Gfn::new(20))
            })
            .unwrap_err();
        let mut expected = BTreeSet::from([11, 23, 25]);
        if !fails_in_kernel {
            expected.insert(15);
        }
        let found = harvested(&rig, &consumer);
        assert!(expected.is_subset(&found), "{fails_in_kernel}: {expected:?} of {found:?}");
        assert_eq!(harvested(&rig, &consumer), BTreeSet::new());
    }
}
