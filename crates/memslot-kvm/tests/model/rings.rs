//! Rings, and bits that are fetched at every step of a change.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use memslot::dirty::Consumer;
use memslot::*;
use memslot_kvm::Options;
use memslot_testing::{Random, programs};

use crate::common::{MODEL_HVA as HVA, RAM, gfns, random_op, spec};
use crate::dirty::{harvested, logs, with_log};
use crate::fake::{Frame, Frames, Writers, frames};
use crate::ring::Vcpu;
use crate::{FRAMES, Rig};

/// With rings of 128 entries, of which 64 are kept back, for so many vCPUs.
fn with_rings(vcpus: u32, offers_bitmap: bool) -> (Rig, Consumer, Vec<Vcpu>) {
    let mut rig = Rig::new(200, Options::default());
    rig.fake.inner().rings.offers_bitmap = offers_bitmap;
    let (_, consumer) = with_log(&mut rig);
    rig.slots.enable_rings(128).unwrap();
    let vcpus = (0..vcpus).map(|number| {
        let vcpu = rig.fake.vcpu();
        rig.slots.add_vcpu(number, &vcpu).unwrap();
        vcpu
    });
    let vcpus = vcpus.collect();
    (rig, consumer, vcpus)
}

#[test]
fn each_vcpu_has_a_ring_and_a_full_one_is_emptied() {
    let (mut rig, consumer, _vcpus) = with_rings(3, false);
    rig.table.create(spec(0, 0, 300, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    let written: BTreeSet<u64> = (0..80).filter(|&gfn| rig.fake.write_by(gfn, 0)).collect();
    assert_eq!(written, (0..64).collect(), "the ring is full");
    assert!(rig.fake.write_by(64, 1) && rig.fake.write_by(65, 2) && rig.fake.write_by(64, 2));
    assert_eq!(harvested(&rig, &consumer), (0..66).collect());
    // There is room again, and every page is noticed again; many times round.
    for round in 0..20 {
        let gfn = round % 7;
        let all: BTreeSet<u64> = (gfn..gfn + 50).collect();
        assert!(all.iter().all(|&gfn| rig.fake.write_by(gfn, 0)));
        assert_eq!(harvested(&rig, &consumer), all);
    }
    assert_eq!(harvested(&rig, &consumer), BTreeSet::new());
}

/// A page that is handed out before its entry is reset could be written again unnoticed.
#[test]
fn a_reset_that_a_signal_ends_is_asked_for_again() {
    let (mut rig, consumer, _vcpus) = with_rings(2, false);
    rig.table.create(spec(0, 0, 100, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    rig.fake.inner().rings.resets_until_signal = Some(10);
    let all: BTreeSet<u64> = (0..60).collect();
    assert!(all.iter().all(|&gfn| rig.fake.write(gfn)));
    assert_eq!(harvested(&rig, &consumer), all);
    assert_eq!(rig.fake.inner().rings.writable, BTreeSet::new());
    assert_eq!(rig.fake.inner().rings.reset_calls, 6);
    // If it never gets done, that is an error, and no page is lost.
    rig.fake.inner().rings.resets_until_signal = Some(0);
    assert!(rig.fake.write(70));
    assert!(rig.slots.fetch().is_err());
    rig.fake.inner().rings.resets_until_signal = None;
    assert_eq!(harvested(&rig, &consumer), BTreeSet::from([70]));
}

#[test]
fn vcpus_are_added_once_and_removed_with_their_pages() {
    let mut rig = Rig::new(200, Options::default());
    let (_, consumer) = with_log(&mut rig);
    let error = |result: Result<u64, memslot_kvm::DirtyError>| result.unwrap_err().to_string();
    let no_rings = "dirty rings are not enabled: call KvmSlots::enable_rings first";
    assert_eq!(error(rig.slots.add_vcpu(0, &-1).map(|()| 0)), no_rings);

    rig.slots.enable_rings(128).unwrap();
    rig.table.create(spec(0, 0, 100, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    let vcpus: Vec<Vcpu> = (0..2).map(|_| rig.fake.vcpu()).collect();
    rig.slots.add_vcpu(7, &vcpus[0]).unwrap();
    assert_eq!(error(rig.slots.add_vcpu(7, &vcpus[0]).map(|()| 0)), "vCPU 7 is known already");
    rig.slots.add_vcpu(8, &vcpus[1]).unwrap();
    assert_eq!(error(rig.slots.remove_vcpu(0)), "vCPU 0 is not known: it was not added, or removed already");
    assert!(rig.fake.write_by(3, 0) && rig.fake.write_by(4, 1));
    assert_eq!(rig.slots.remove_vcpu(7).unwrap(), 2);
    assert_eq!(harvested(&rig, &consumer), BTreeSet::from([3, 4]));
    assert!(rig.fake.write_by(5, 1));
    assert_eq!(harvested(&rig, &consumer), BTreeSet::from([5]));
    // The number is free again.
    rig.fake.inner().rings.vcpus.remove(0);
    let another = rig.fake.vcpu();
    rig.slots.add_vcpu(7, &another).unwrap();
    assert!(rig.fake.write_by(6, 1));
    assert_eq!(harvested(&rig, &consumer), BTreeSet::from([6]));
}

/// Where the kernel writes for itself, its pages are in a bitmap; it has to know that before there is any slot.
#[test]
fn a_bitmap_beside_the_rings() {
    let mut rig = Rig::new(200, Options::default());
    rig.fake.inner().rings.offers_bitmap = true;
    with_log(&mut rig);
    rig.table.create(spec(0, 0, 100, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    let error = rig.slots.enable_rings(128).unwrap_err().to_string();
    assert_eq!(
        error,
        "dirty rings with a bitmap have to be enabled before there are slots, and KVM has 1 now"
    );
    assert_eq!(rig.fake.inner().rings.entries, 0, "nothing has changed");

    let (mut rig, consumer, _vcpus) = with_rings(1, true);
    assert!(rig.fake.inner().rings.with_bitmap);
    rig.table.create(spec(0, 0, 100, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert!(rig.fake.write(3) && rig.fake.write_by_kernel(90));
    assert_eq!(harvested(&rig, &consumer), BTreeSet::from([3, 90]));
    // Also of a slot that goes.
    assert!(rig.fake.write(4) && rig.fake.write_by_kernel(5));
    rig.table.transaction(|tx| tx.resize(RAM, SlotId::new(0), 50)).unwrap();
    assert_eq!(harvested(&rig, &consumer), BTreeSet::from([4, 5]));
}

/// Entries that are left in a ring name a slot by its id, which another one may have by then.
#[test]
fn entries_of_a_slot_that_is_no_longer_logged_are_nobodys() {
    let (mut rig, consumer, _vcpus) = with_rings(1, false);
    rig.table.create(spec(0, 0, 16, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert!(rig.fake.write(3));
    rig.table.set_flags(RAM, SlotId::new(0), SlotFlags::empty()).unwrap();
    rig.table.delete(RAM, SlotId::new(0)).unwrap();
    rig.table.create(spec(1, 100, 16, HVA + (1 << 30), SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert_eq!(harvested(&rig, &consumer), BTreeSet::new());
}

/// What the hook of a test saw and did.
#[derive(Default)]
struct Seen {
    /// Frames with their memory, written where they were logged.
    written: Vec<(u64, Frame)>,
    after: Frames,
}

/// At every step of a change the guest writes and somebody fetches. Every write of memory that was logged all the time is
/// reported where that memory is in the end.
#[test]
fn no_write_is_lost_however_often_bits_are_fetched() {
    for mode in ["bitmap", "manual", "rings", "rings and bitmap"] {
        for mut random in programs(40) {
            let (mut rig, consumer, _vcpus) = if mode.starts_with("rings") {
                with_rings(2, mode != "rings")
            } else {
                let mut rig = Rig::new(200, Options::default());
                let (_, consumer) = with_log(&mut rig);
                (rig, consumer, Vec::new())
            };
            if mode == "manual" {
                rig.slots.enable_manual_protect(false).unwrap();
            }
            let seen = Arc::new(Mutex::new(Seen::default()));
            let (slots, fake, seen_there) = (rig.slots.clone(), rig.fake.clone(), Arc::clone(&seen));
            let mut steps = Random::new(random.next());
            rig.hook.set(move |_, update| {
                let seen = &mut *seen_there.lock().unwrap();
                if let Some(update) = update {
                    seen.after = frames(update.after);
                }
                for _ in 0..steps.below(6) {
                    // Mostly what changes.
                    let changed = update.and_then(|update| {
                        let change = update.slots[steps.index(update.slots.len())];
                        let slot = if steps.once_in(2) { change.new } else { change.old.or(change.new) };
                        slot.map(|slot| slot.base_gfn().get() + steps.below(slot.pages()))
                    });
                    let gfn = changed.filter(|_| !steps.once_in(3)).unwrap_or_else(|| steps.below(FRAMES));
                    let slot = fake.inner().table.view().slot_at(RAM, Gfn::new(gfn)).copied();
                    let logged = slot.filter(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES));
                    if let Some(slot) = logged.filter(|_| fake.write(gfn)) {
                        let bytes = 4096 * (gfn - slot.base_gfn().get());
                        seen.written.push((gfn, (slot.backing().advanced(bytes).unwrap(), true)));
                    }
                }
                if steps.once_in(2) {
                    slots.fetch().unwrap();
                }
            });
            rig.slots.set_vcpus(Writers { hook: rig.hook.clone(), ..Writers::of(&rig.fake, &[]) });
            let mut expected = BTreeSet::new();
            for _ in 0..40 {
                for _ in 0..random.below(6) {
                    let gfn = random.below(FRAMES);
                    if rig.fake.write(gfn) && logs(&rig, gfn) {
                        expected.insert(gfn);
                    }
                }
                let before = rig.table.snapshot();
                // One of them: a failure while taking back is another test's.
                let refuses = random.once_in(5);
                let fails = !refuses && random.once_in(5);
                rig.fake.inner().fail_in = fails.then(|| u32::try_from(random.below(3)).unwrap());
                rig.fake.inner().failures = 1;
                rig.refuse.store(refuses, Ordering::Relaxed);
                let result = rig
                    .table
                    .transaction(|tx| (0..2).try_for_each(|_| random_op(tx, &mut random, 16, FRAMES, HVA)));
                rig.fake.inner().fail_in = None;
                rig.refuse.store(false, Ordering::Relaxed);
                let (was, is) = (frames(&before), frames(rig.table.view()));
                let Seen { written, after } = std::mem::take(&mut *seen.lock().unwrap());
                let logged_before = |gfn: u64| {
                    before.slot_at(RAM, Gfn::new(gfn)).is_some_and(|slot| {
                        slot.hva().is_some() && slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
                    })
                };
                let same = |gfn, memory: &Frame| was.get(&gfn).is_some_and(|frame| frame.0 == memory.0);
                for (gfn, memory) in written {
                    if same(gfn, &memory) && logged_before(gfn) {
                        expected.insert(gfn);
                    }
                    // It had moved, and is back.
                    let homes: Vec<u64> = (0..FRAMES).filter(|&home| same(home, &memory)).collect();
                    let stayed = |home: &u64| after.get(home).is_some_and(|frame| frame.0 == memory.0);
                    match homes[..] {
                        [home] if result.is_err() && !stayed(&home) && logged_before(home) => {
                            expected.insert(home);
                        }
                        _ => {}
                    }
                }
                expected.retain(|gfn| {
                    let memory = |frames: &Frames| frames.get(gfn).map(|frame| frame.0);
                    memory(&was) == memory(&is) && logs(&rig, *gfn)
                });
                rig.check();
                if random.once_in(3) {
                    let found = harvested(&rig, &consumer);
                    assert!(expected.is_subset(&found), "{mode}: {expected:?} of {found:?}");
                    expected.clear();
                    assert_eq!(harvested(&rig, &consumer), BTreeSet::new(), "{mode}");
                }
            }
        }
    }
}

/// A range is harvested beside others while a change waits for it: the state is one.
#[test]
fn fetches_in_another_thread_beside_changes() {
    let (mut rig, consumer, _vcpus) = with_rings(2, false);
    rig.table.create(spec(0, 0, 64, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let (slots, fake) = (rig.slots.clone(), rig.fake.clone());
    let found = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut found = BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                let harvest = slots.harvest(&consumer).unwrap();
                found.extend(harvest.runs().flat_map(|run| run.gfns.start().get()..run.gfns.end().get()));
                harvest.commit();
            }
            found
        });
        for round in 0..300u64 {
            assert!(fake.write(round % 64));
            // The kernel's slot goes and comes again, and the page stays.
            let id = SlotId::new(1);
            rig.table.create(spec(1, 100, 8, HVA + (1 << 30), SlotFlags::LOG_DIRTY_PAGES)).unwrap();
            rig.table.transaction(|tx| tx.resize(RAM, SlotId::new(0), 65 + round % 3)).unwrap();
            rig.table.delete(RAM, id).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    let mut all: BTreeSet<u64> = harvested(&rig, &consumer);
    all.extend(found);
    assert!((0..64).all(|gfn| all.contains(&gfn)));
    let harvest = consumer.harvest_range(RAM, gfns(0, 64), &mut rig.slots.rearm()).unwrap();
    assert_eq!(harvest.pages(), 0);
}
