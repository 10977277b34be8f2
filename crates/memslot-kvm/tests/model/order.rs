//! The order of the ioctls, which slots move where, and how many there are: what a plan has to get right beyond the
//! frames.

use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use memslot::*;
use memslot_kvm::{KvmSlots, NotRunning, Options};

use crate::common::{MODEL_HVA as HVA, RAM, spec};
use crate::fake::{Fake, Hook, Hooked, frames};
use crate::{Carrier, Panicking, Rig};

const ID: fn(u32) -> SlotId = SlotId::new;

/// A change without a pause that the kernel refuses: the guest saw nothing of it but what was to come.
#[test]
fn what_may_be_refused_comes_before_what_is_taken_away() {
    for fail_in in 0..4 {
        let mut rig = Rig::new(200, Options::default());
        rig.table.create(spec(0, 0, 4, HVA, SlotFlags::empty())).unwrap();
        rig.table.create(spec(1, 10, 4, HVA + (1 << 30), SlotFlags::empty())).unwrap();
        rig.table.create(spec(2, 20, 4, HVA + (2 << 30), SlotFlags::empty())).unwrap();
        let before = frames(rig.table.view());
        rig.fake.inner().seen.clear();
        rig.fake.inner().fail_in = Some(fail_in);
        rig.fake.inner().failures = 1;
        let result = rig.table.transaction(|tx| {
            tx.delete(RAM, ID(0))?;
            tx.set_flags(RAM, ID(1), SlotFlags::LOG_DIRTY_PAGES)?;
            tx.create(spec(5, 30, 4, HVA + (5 << 30), SlotFlags::empty()))?;
            tx.create(spec(6, 40, 4, HVA + (6 << 30), SlotFlags::empty()))
        });
        let failed = rig.fake.inner().failed.take().unwrap();
        assert_eq!(
            (result.is_err(), failed),
            (true, ["create", "create", "change", "delete"][fail_in as usize])
        );
        for state in &rig.fake.inner().seen {
            assert!(before.iter().all(|frame| state.get(frame.0) == Some(frame.1)), "{state:?}");
        }
        rig.check();
    }
}

/// With too few ids for both, the old slot has to go first.
#[test]
fn ids_of_slots_that_go_are_used_where_no_other_is_free() {
    let mut rig = Rig::new(200, Options { max_pages: None, ids: Some(0..2) });
    rig.table.create(spec(0, 0, 4, HVA, SlotFlags::empty())).unwrap();
    rig.table
        .transaction(|tx| {
            tx.delete(RAM, ID(0))?;
            tx.create(spec(1, 10, 4, HVA + (1 << 30), SlotFlags::empty()))?;
            tx.create(spec(2, 20, 4, HVA + (2 << 30), SlotFlags::empty()))
        })
        .unwrap();
    assert_eq!(rig.slots.slots().iter().map(|slot| slot.id).collect::<Vec<_>>(), [1, 0]);
    rig.check();
}

/// The kernel lets no two slots have the same page of a guest_memfd, wherever they are.
#[test]
fn pages_of_a_guest_memfd_are_let_go_before_they_are_taken_again() {
    let mut rig = Rig::new(200, Options::default());
    rig.fake.inner().bound = Some(BTreeSet::new());
    let backing = Backing::GuestMemfd { hva: Hva::new(HVA), file: 3, offset: 0 };
    let private = SlotSpec { backing, ..spec(0, 0, 4, HVA, SlotFlags::empty()) };
    rig.table.create(private).unwrap();
    rig.table.move_to(RAM, ID(0), Gfn::new(50)).unwrap();
    rig.check();
}

/// A slot of the kernel's moves with its dirty bits: of two with the same memory, each has its own.
#[test]
fn aliases_that_move_are_not_mixed_up() {
    let mut rig = Rig::new(200, Options::default());
    let log = rig.slots.dirty_log(&mut rig.table).unwrap();
    let _consumer = log.consumer().unwrap();
    for (id, at) in [(0, 0), (1, 10)] {
        rig.table.create(spec(id, at, 8, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    }
    let ids = |rig: &Rig, gfn| rig.slots.slot_at(RAM, Gfn::new(gfn)).unwrap().id;
    let (first, second) = (ids(&rig, 0), ids(&rig, 10));
    rig.calls();
    rig.table
        .transaction(|tx| {
            tx.move_to(RAM, ID(0), Gfn::new(60))?;
            tx.move_to(RAM, ID(1), Gfn::new(40))
        })
        .unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("move", 2)], 0));
    assert_eq!((ids(&rig, 60), ids(&rig, 40)), (first, second));
    // One moves to where the kernel has to make a new slot of it, so nobody else may take its old one.
    rig.table.create(spec(2, 80, 8, HVA + (1 << 30), SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    rig.table
        .transaction(|tx| {
            tx.delete(RAM, ID(2))?;
            tx.move_to(RAM, ID(0), Gfn::new(84))?;
            tx.create(spec(3, 20, 8, HVA, SlotFlags::LOG_DIRTY_PAGES))
        })
        .unwrap();
    assert_ne!(ids(&rig, 20), first, "the bits of slot 0 are not those of slot 3");
    // One whose slot is no more: then it is as good as any.
    rig.calls();
    let old = ids(&rig, 20);
    rig.table
        .transaction(|tx| {
            tx.delete(RAM, ID(3))?;
            tx.create(spec(4, 30, 8, HVA, SlotFlags::LOG_DIRTY_PAGES))
        })
        .unwrap();
    assert_eq!((rig.calls(), ids(&rig, 30)), (vec![("move", 1)], old));
    rig.check();
}

/// Sizes beyond what a slot of the kernel's can have cut at their multiples all the same.
#[test]
fn borders_of_large_blocks_are_where_they_were_asked_for() {
    for most in [1 << 31, 3 << 30, (1 << 31) - 1, u64::MAX] {
        let mut rig = Rig::new(200, Options { max_pages: NonZeroU64::new(most), ids: None });
        let (first, pages) = (most.min(1 << 31) - 0x1000, 0x3000);
        rig.table.create(spec(0, first, pages, HVA, SlotFlags::empty())).unwrap();
        let cut: Vec<_> = rig.slots.slots().iter().map(|slot| slot.gfns.start().get()).collect();
        let expected: Vec<_> =
            [first].into_iter().chain(Some(most).filter(|most| *most < first + pages)).collect();
        assert_eq!(cut, expected, "{most:#x}");
    }
}

/// The numbers are those of one address space.
#[test]
fn ids_are_counted_where_they_are_short() {
    let mut rig = Rig::of(Fake::with_spaces(200, 2), Options { max_pages: None, ids: Some(0..3) });
    let smm = |id, at| SlotSpec {
        address_space: AddressSpaceId::SMM,
        ..spec(id, at, 4, HVA + (u64::from(id) << 30), SlotFlags::empty())
    };
    rig.table.create(spec(0, 0, 4, HVA, SlotFlags::empty())).unwrap();
    rig.table.create(smm(0, 0)).unwrap();
    rig.table.create(smm(1, 10)).unwrap();
    let kernel = rig.slots.slots();
    let error = rig
        .table
        .transaction(|tx| {
            tx.create(spec(1, 10, 4, HVA + (1 << 30), SlotFlags::empty()))?;
            tx.create(spec(2, 20, 4, HVA + (2 << 30), SlotFlags::empty()))?;
            // The id that this gives back is another address space's.
            tx.delete(RAM, ID(0))?;
            tx.delete(AddressSpaceId::SMM, ID(0))?;
            (5..8).try_for_each(|id| tx.create(smm(id, 10 * u64::from(id))))
        })
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "listener /dev/kvm refused: the change creates 3 KVM slots in address space 1, where 2 ids are free, \
         those of the slots that it deletes included"
    );
    assert_eq!(rig.slots.slots(), kernel);
}

/// Bits that are fetched while a change is taken back count where the memory is again, and nowhere else.
#[test]
fn a_change_that_is_taken_back_invents_no_write() {
    let mut rig = Rig::new(200, Options::default());
    let log = rig.slots.dirty_log(&mut rig.table).unwrap();
    let consumer = log.consumer().unwrap();
    rig.table.create(spec(0, 10, 8, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    rig.table.create(spec(1, 20, 8, HVA + (1 << 30), SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert!(rig.fake.write(11));
    rig.refuse.store(true, std::sync::atomic::Ordering::Relaxed);
    // When the change is taken back, a page of slot 0 is written where it is then.
    let (fake, mut pauses) = (rig.fake.clone(), 0);
    rig.hook.set(move |step, _| {
        pauses += u32::from(step == "pause");
        assert!((step, pauses) != ("pause", 2) || fake.write(25));
    });
    rig.table
        .transaction(|tx| {
            tx.delete(RAM, ID(1))?;
            tx.move_to(RAM, ID(0), Gfn::new(20))
        })
        .unwrap_err();
    let harvest = rig.slots.harvest(&consumer).unwrap();
    let pages: Vec<_> = harvest.runs().flat_map(|run| run.gfns.start().get()..run.gfns.end().get()).collect();
    assert_eq!(pages, [11, 15]);
}

/// The kernel has the slots of a version that is never followed, or of one that is left again: their memory has to stay.
#[test]
fn a_panic_lets_no_memory_go_that_the_kernel_has() {
    for (who, is_back) in [("before", true), ("pause", true), ("resume", false), ("after", true)] {
        let fake = Fake::new(200);
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let (key, versions) = (table.attachment_key().unwrap(), Arc::<Mutex<Vec<_>>>::default());
        table.add_listener(Box::new(Carrier(key, Arc::clone(&versions)))).unwrap();
        let (first, last) = (Hook::default(), Hook::default());
        table.add_listener(Box::new(Hooked(first.clone()))).unwrap();
        // SAFETY: the kernel is a model, which touches no memory.
        let slots =
            unsafe { KvmSlots::attach(&mut table, fake.clone(), NotRunning, Options::default()) }.unwrap();
        table.add_listener(Box::new(Hooked(last.clone()))).unwrap();
        table.create(spec(0, 0, 16, HVA, SlotFlags::empty())).unwrap();
        let panics = |step: &str, _: Option<&Update<'_>>| assert_ne!(step, "commit", "as the test wants it");
        match who {
            "before" => first.set(panics),
            "after" => last.set(panics),
            _ => slots.set_vcpus(Panicking { works_first: who == "resume" }),
        }
        // Another memory behind half of it: the version before has what the one after has not, and the other way round.
        catch_unwind(AssertUnwindSafe(|| {
            table.transaction(|tx| {
                tx.delete(RAM, ID(0))?;
                tx.create(spec(0, 0, 16, HVA + (1 << 30), SlotFlags::empty()))
            })
        }))
        .unwrap_err();
        table.reclaim();
        let lives = |version: usize| versions.lock().unwrap()[version].upgrade().is_some();
        let same = frames(fake.inner().table.view()) == frames(table.view());
        assert_eq!((same, slots.is_in_step()), (is_back, is_back), "{who}");
        // The table is at the version before, and the kernel perhaps at the one after.
        assert_eq!((lives(0), lives(1)), (true, !is_back), "{who}");
        first.set(|_, _| {});
        last.set(|_, _| {});
        slots.set_vcpus(NotRunning);
        table.create(spec(1, 50, 4, HVA, SlotFlags::empty())).unwrap();
        table.reclaim();
        assert!(slots.is_in_step() && !lives(1), "{who}");
        assert_eq!(frames(fake.inner().table.view()), frames(table.view()));
    }
}
