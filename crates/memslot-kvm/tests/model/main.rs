//! The plans against a model of the kernel: no call is ever refused, no gap is ever seen, nothing stays half-done.
#![cfg(target_os = "linux")]

#[path = "../common/mod.rs"]
mod common;
mod dirty;
mod fake;
mod order;
mod ring;
mod rings;

use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use memslot::*;
use memslot_kvm::{KvmSlots, NotRunning, Options, Vcpus};
use memslot_testing::programs;

use crate::common::{MODEL_HVA as HVA, PAGE, RAM, random_op, spec};
use crate::fake::{Fake, Frames, Hook, Hooked, Writers, frames};

const FRAMES: u64 = 320;

/// Refuses commits on demand, after the kernel was programmed, and slot 99 always, before.
struct Refuser(Arc<AtomicBool>);

impl Listener for Refuser {
    fn name(&self) -> &str {
        "refuser"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let refused = update.after.slot(RAM, SlotId::new(99)).is_some();
        if refused { Err("refused".into()) } else { Ok(()) }
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if self.0.load(Ordering::Relaxed) { Err("refused".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

struct Rig {
    /// Called at each step of a change, before the kernel is programmed and after.
    hook: Hook,
    fake: Fake,
    table: SlotTable,
    slots: KvmSlots<Fake>,
    refuse: Arc<AtomicBool>,
}

impl Rig {
    fn new(limit: u32, options: Options) -> Self {
        Self::of(Fake::new(limit), options)
    }

    fn of(fake: Fake, options: Options) -> Self {
        let mut table = SlotTable::new(Limits { address_spaces: 2, ..Limits::default() }).unwrap();
        let hook = Hook::default();
        table.add_listener(Box::new(Hooked(hook.clone()))).unwrap();
        // SAFETY: the kernel is a model, which touches no memory.
        let slots = unsafe { KvmSlots::attach(&mut table, fake.clone(), NotRunning, options) }.unwrap();
        let refuse = Arc::new(AtomicBool::new(false));
        table.add_listener(Box::new(Hooked(hook.clone()))).unwrap();
        table.add_listener(Box::new(Refuser(Arc::clone(&refuse)))).unwrap();
        slots.set_vcpus(Writers { hook: hook.clone(), ..Writers::of(&fake, &[]) });
        Self { hook, fake, table, slots, refuse }
    }

    /// The kernel shows what the table says, and is as we think it is.
    fn check(&self) {
        let inner = self.fake.inner();
        assert_eq!(frames(inner.table.view()), frames(self.table.view()));
        let theirs: Vec<_> = inner
            .table
            .view()
            .slots(RAM)
            .map(|slot| (slot.id().get(), slot.gfns(), slot.backing(), slot.flags()))
            .collect();
        let ours: Vec<_> = self
            .slots
            .slots()
            .iter()
            .map(|slot| (u32::from(slot.id), slot.gfns, slot.backing, slot.flags))
            .collect();
        assert_eq!(ours, theirs);
        for slot in self.table.view().slots(RAM).filter(|slot| slot.hva().is_some()) {
            for page in 0..slot.pages() {
                let there = self.slots.slot_at(RAM, slot.base_gfn().checked_add(page).unwrap()).unwrap();
                assert_eq!(there.flags, slot.flags());
                assert_eq!(self.slots.slot(RAM, there.id), Some(there));
            }
        }
    }

    fn calls(&self) -> Vec<(&'static str, u32)> {
        std::mem::take(&mut self.fake.inner().calls).into_iter().collect()
    }

    fn pauses(&self) -> u32 {
        std::mem::take(&mut self.fake.inner().pauses)
    }
}

/// What a guest saw in between was, frame by frame, what was before or what is after; and no frame that has memory
/// before and after was ever without.
fn no_gap(seen: &[Frames], before: &Frames, after: &Frames) {
    for state in seen {
        for gfn in 0..2 * FRAMES {
            let (now, was, is) = (state.get(&gfn), before.get(&gfn), after.get(&gfn));
            assert!(now == was || now == is, "gfn {gfn}: {now:?} between {was:?} and {is:?}");
        }
    }
}

#[test]
fn random_transactions_with_failures() {
    let (mut committed, mut failed, mut refused, mut pauses) = (0, 0, 0, 0);
    let random_programs = programs(100);
    let programs = random_programs.len() as u64;
    for mut random in random_programs {
        let random = &mut random;
        let max_pages = random.pick(&[None, None, NonZeroU64::new(4), NonZeroU64::new(7)]);
        let limit = random.pick(&[12, 200, 200]);
        let mut rig = Rig::new(limit, Options { max_pages, ids: None });
        for _ in 0..60 {
            let before = frames(rig.table.view());
            let kernel_before = rig.slots.slots();
            // One of them: a failure while taking back is another test's.
            let (fails, refuses) = (random.once_in(4), random.once_in(8));
            let fails = fails && !refuses;
            rig.fake.inner().fail_in = fails.then(|| u32::try_from(random.below(4)).unwrap());
            rig.fake.inner().failures = 1;
            rig.refuse.store(refuses, Ordering::Relaxed);
            rig.fake.inner().seen.clear();
            let operations = 1 + random.below(5);
            let result = rig
                .table
                .transaction(|tx| (0..operations).try_for_each(|_| random_op(tx, random, 16, FRAMES, HVA)));
            let after = frames(rig.table.view());
            let is_back = result.is_err();
            rig.check();
            assert!(rig.slots.is_in_step());
            // Pages of a guest_memfd have to go from one slot before they come to another.
            let private = before.values().any(|frame| matches!(frame.0, Backing::GuestMemfd { .. }));
            let failed_in = rig.fake.inner().failed.take();
            if is_back && limit == 200 && !private && failed_in == Some("create") {
                // What the kernel refused came before anything was taken away, or nobody was looking.
                refused += 1;
                for state in &rig.fake.inner().seen {
                    assert!(before.iter().all(|frame| state.get(frame.0) == Some(frame.1)));
                }
            }
            if is_back {
                failed += 1;
                assert_eq!(before, after);
                assert_eq!(rig.slots.slots(), kernel_before);
            } else {
                committed += 1;
                no_gap(&rig.fake.inner().seen, &before, &after);
            }
            pauses += rig.pauses();
        }
    }
    println!(
        "{committed} changes committed, {failed} taken back, {refused} refused creates, {pauses} pauses"
    );
    assert!(refused > programs / 4);
    assert!(committed > 10 * programs && failed > 2 * programs && pauses > u32::try_from(programs).unwrap());
}

#[test]
fn a_failure_that_cannot_be_undone_is_put_right_later() {
    let mut was_out = 0;
    let programs = programs(100);
    let count = programs.len();
    for mut random in programs {
        let random = &mut random;
        let mut rig = Rig::new(200, Options::default());
        for _ in 0..40 {
            // Undoing fails, too, now and then.
            rig.fake.inner().fail_in = random.once_in(3).then(|| u32::try_from(random.below(4)).unwrap());
            rig.fake.inner().failures = 3;
            let result =
                rig.table.transaction(|tx| (0..3).try_for_each(|_| random_op(tx, random, 16, FRAMES, HVA)));
            let _ = result;
            rig.fake.inner().fail_in = None;
            if !rig.slots.is_in_step() {
                was_out += 1;
                // Any change will do.
                let free = SlotId::new(1000);
                rig.table.create(spec(1000, FRAMES + 20, 1, HVA, SlotFlags::empty())).unwrap();
                rig.table.delete(RAM, free).unwrap();
                assert!(rig.slots.is_in_step());
            }
            rig.check();
        }
    }
    assert!(was_out > count / 5, "{was_out} of {count}");
}

#[test]
fn split_and_merge_need_no_call_at_all() {
    let mut rig = Rig::new(200, Options::default());
    rig.table.create(spec(0, 0, 40, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert_eq!(rig.calls(), [("create", 1)]);
    rig.table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(10), SlotId::new(1))).unwrap();
    rig.table.transaction(|tx| tx.split(RAM, SlotId::new(1), Gfn::new(30), SlotId::new(2))).unwrap();
    rig.table.transaction(|tx| tx.merge(RAM, SlotId::new(1), SlotId::new(2))).unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![], 0));
    assert_eq!(rig.table.view().len(RAM), 2);
    rig.check();
    // Growing adds; what is there stays.
    rig.table.transaction(|tx| tx.resize(RAM, SlotId::new(1), 50)).unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("create", 1)], 0));
    rig.check();
}

#[test]
fn only_changes_that_leave_a_gap_pause() {
    let mut rig = Rig::new(200, Options::default());
    rig.table.create(spec(0, 0, 40, HVA, SlotFlags::empty())).unwrap();
    rig.table.create(spec(1, 50, 10, HVA + 50 * PAGE, SlotFlags::empty())).unwrap();
    rig.table.set_flags(RAM, SlotId::new(0), SlotFlags::LOG_DIRTY_PAGES).unwrap();
    rig.table.move_to(RAM, SlotId::new(1), Gfn::new(70)).unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("create", 2), ("flags", 1), ("move", 1)], 0));
    // Half of its frames have memory before and after, and the kernel takes the slot out in between.
    rig.table.move_to(RAM, SlotId::new(1), Gfn::new(75)).unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("move", 1)], 1));
    rig.table.delete(RAM, SlotId::new(1)).unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("delete", 1)], 0));

    rig.table
        .transaction(|tx| {
            tx.split(RAM, SlotId::new(0), Gfn::new(16), SlotId::new(1))?;
            tx.set_read_only(RAM, SlotId::new(1), true)
        })
        .unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("create", 2), ("delete", 1)], 1));
    rig.check();
    // Two slots change places: no order of moves does that.
    rig.table.create(spec(5, 50, 4, HVA + (1 << 30), SlotFlags::empty())).unwrap();
    rig.table.create(spec(6, 60, 4, HVA + (2 << 30), SlotFlags::empty())).unwrap();
    rig.calls();
    rig.table
        .transaction(|tx| {
            tx.move_to(RAM, SlotId::new(5), Gfn::new(60))?;
            tx.move_to(RAM, SlotId::new(6), Gfn::new(50))
        })
        .unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("create", 2), ("delete", 2)], 1));
    rig.check();
}

#[test]
fn vcpus_that_cannot_be_paused_stop_the_change() {
    let mut rig = Rig::new(200, Options::default());
    rig.table.create(spec(0, 0, 40, HVA, SlotFlags::empty())).unwrap();
    rig.slots.set_vcpus(Writers { obey: false, ..Writers::of(&rig.fake, &[]) });
    let error = rig.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "listener /dev/kvm refused: the vCPUs could not be paused, so nothing was done"
    );
    rig.check();
    assert!(rig.slots.is_in_step());
}

#[test]
fn large_memory_in_many_slots_comes_and_goes_in_blocks() {
    let options = Options { max_pages: NonZeroU64::new(32), ids: Some(5..100) };
    let mut rig = Rig::new(200, options);
    rig.table.create(spec(0, 16, 100, HVA + 16 * PAGE, SlotFlags::empty())).unwrap();
    let cut: Vec<_> = rig.slots.slots().iter().map(|slot| (slot.id, slot.gfns.start().get())).collect();
    assert_eq!(cut, [(5, 16), (6, 32), (7, 64), (8, 96)]);
    // Blocks at the end go and come back; the others are not touched.
    rig.calls();
    rig.table.transaction(|tx| tx.resize(RAM, SlotId::new(0), 48)).unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("delete", 2)], 0));
    rig.table.transaction(|tx| tx.resize(RAM, SlotId::new(0), 80)).unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("create", 1)], 0));
    // A hole in the middle, at block borders.
    rig.table
        .transaction(|tx| {
            tx.split(RAM, SlotId::new(0), Gfn::new(32), SlotId::new(1))?;
            tx.split(RAM, SlotId::new(1), Gfn::new(64), SlotId::new(2))?;
            tx.delete(RAM, SlotId::new(1))
        })
        .unwrap();
    assert_eq!((rig.calls(), rig.pauses()), (vec![("delete", 1)], 0));
    rig.check();
}

#[test]
fn ids_run_out_before_anything_happens() {
    let mut rig = Rig::new(200, Options { max_pages: None, ids: Some(10..12) });
    for id in 0..2 {
        rig.table.create(spec(id, 10 * u64::from(id), 4, HVA, SlotFlags::empty())).unwrap();
    }
    rig.calls();
    let error = rig.table.create(spec(7, 80, 4, HVA, SlotFlags::empty())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "listener /dev/kvm refused: the change creates 1 KVM slots in address space 0, where 0 ids are free, \
         those of the slots that it deletes included"
    );
    assert_eq!(rig.calls(), []);
    rig.check();
    // Nor are any lost by changes that do not come to be.
    rig.table.delete(RAM, SlotId::new(1)).unwrap();
    for _ in 0..3 {
        rig.table.create(spec(99, 80, 4, HVA, SlotFlags::empty())).unwrap_err();
        rig.fake.inner().fail_in = Some(0);
        rig.fake.inner().failures = 1;
        rig.table.create(spec(1, 80, 4, HVA, SlotFlags::empty())).unwrap_err();
        rig.fake.inner().fail_in = None;
    }
    rig.table.create(spec(1, 10, 4, HVA, SlotFlags::empty())).unwrap();
    // Ids of slots that go in the same change count.
    rig.table
        .transaction(|tx| {
            tx.delete(RAM, SlotId::new(0))?;
            tx.create(spec(7, 80, 4, HVA, SlotFlags::empty()))
        })
        .unwrap();
    rig.check();
}

/// Slots of the kernel's that only the past keeps apart are put together before a change is refused for want of ids.
#[test]
fn pieces_are_gathered_when_ids_run_out() {
    let mut rig = Rig::new(200, Options { max_pages: None, ids: Some(0..6) });
    rig.table.create(spec(0, 0, 64, HVA, SlotFlags::empty())).unwrap();
    rig.table.create(spec(9, 70, 4, HVA + (1 << 30), SlotFlags::empty())).unwrap();
    let id = SlotId::new;
    for page in 1..63 {
        rig.table
            .transaction(|tx| {
                tx.split(RAM, id(0), Gfn::new(page), id(1))?;
                tx.split(RAM, id(1), Gfn::new(page + 1), id(2))?;
                tx.set_read_only(RAM, id(1), true)
            })
            .unwrap();
        rig.check();
        rig.table
            .transaction(|tx| {
                tx.set_read_only(RAM, id(1), false)?;
                tx.merge(RAM, id(0), id(1))?;
                tx.merge(RAM, id(0), id(2))
            })
            .unwrap();
        rig.check();
    }
    assert!(rig.slots.slots().len() <= 6);
    // More than there are ids, however they are put together.
    rig.table.create(spec(10, 80, 4, HVA + (2 << 30), SlotFlags::empty())).unwrap();
    let before = rig.slots.slots();
    let error = rig
        .table
        .transaction(|tx| {
            (20..26).try_for_each(|n| tx.create(spec(n, 10 * u64::from(n), 4, HVA, SlotFlags::empty())))
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains("ids are free"), "{error}");
    assert_eq!(rig.slots.slots(), before);
    rig.check();
}

#[test]
fn an_address_space_that_the_vm_does_not_have() {
    let mut rig = Rig::new(200, Options::default());
    let smm = SlotSpec { address_space: AddressSpaceId::SMM, ..spec(0, 0, 4, HVA, SlotFlags::empty()) };
    let error = rig.table.create(smm).unwrap_err().to_string();
    assert!(error.ends_with("the VM has 1 address spaces, so no slot can be in address space 1"), "{error}");
}

#[test]
fn a_guest_memfd_slot_cannot_log() {
    let mut rig = Rig::new(200, Options::default());
    let backing = Backing::GuestMemfd { hva: Hva::new(HVA), file: 3, offset: 0 };
    let private = SlotSpec { backing, ..spec(0, 0, 4, HVA, SlotFlags::empty()) };
    rig.table.create(private).unwrap();
    let error = rig.table.set_flags(RAM, SlotId::new(0), SlotFlags::LOG_DIRTY_PAGES).unwrap_err().to_string();
    assert!(error.contains("slot 0 has a guest_memfd"), "{error}");
    rig.check();
}

#[test]
fn attaching_programs_what_is_there() {
    let fake = Fake::new(200);
    let mut table = SlotTable::new(Limits::default()).unwrap();
    for id in 0..5 {
        table.create(spec(id, 10 * u64::from(id), 4, HVA, SlotFlags::empty())).unwrap();
    }
    fake.inner().fail_in = Some(3);
    fake.inner().failures = 1;
    // SAFETY: the kernel is a model, which touches no memory.
    let refused = unsafe { KvmSlots::attach(&mut table, fake.clone(), NotRunning, Options::default()) };
    let error = refused.map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("create KVM slot 3 at 0x1e000, 0x4000 bytes: "), "{error}");
    assert!(fake.inner().table.view().is_empty());
    fake.inner().fail_in = None;
    // SAFETY: as above.
    let slots =
        unsafe { KvmSlots::attach(&mut table, fake.clone(), NotRunning, Options::default()) }.unwrap();
    assert_eq!(slots.slots().len(), 5);
    assert_eq!(frames(fake.inner().table.view()), frames(table.view()));
}

/// The kernel writes a dirty bit for each of its own pages: with larger ones in the table it would write past the end.
#[test]
fn a_table_with_other_pages_than_the_hosts() {
    let limits = Limits { page_size: PageSize::K64, ..Limits::default() };
    let mut table = SlotTable::new(limits).unwrap();
    // SAFETY: the kernel is a model, which touches no memory.
    let refused = unsafe { KvmSlots::attach(&mut table, Fake::new(200), NotRunning, Options::default()) };
    let error = refused.map(|_| ()).unwrap_err().to_string();
    assert_eq!(error, "the table has pages of 65536 bytes, and KVM's are of 4096 bytes here");
}

/// A change puts right what is out of step, and is taken back by another listener: then it is out of step again.
#[test]
fn what_is_put_right_by_a_change_that_is_taken_back() {
    let mut rig = Rig::new(200, Options::default());
    rig.table.create(spec(0, 0, 16, HVA, SlotFlags::empty())).unwrap();
    // The create fails, and so does the one that would undo the delete.
    rig.fake.inner().fail_in = Some(1);
    rig.fake.inner().failures = 2;
    rig.table.set_flags(RAM, SlotId::new(0), SlotFlags::READONLY).unwrap_err();
    rig.fake.inner().fail_in = None;
    assert!(!rig.slots.is_in_step());
    rig.refuse.store(true, Ordering::Relaxed);
    rig.table.create(spec(1, 50, 4, HVA, SlotFlags::empty())).unwrap_err();
    rig.refuse.store(false, Ordering::Relaxed);
    assert_eq!(rig.slots.is_in_step(), frames(rig.fake.inner().table.view()) == frames(rig.table.view()));
    rig.table.create(spec(1, 50, 4, HVA, SlotFlags::empty())).unwrap();
    rig.check();
    assert!(rig.slots.is_in_step());
}

/// vCPUs that fall over before the change, or after it.
struct Panicking {
    works_first: bool,
}

impl Vcpus for Panicking {
    fn while_paused(&mut self, work: &mut dyn FnMut()) {
        if self.works_first {
            work();
        }
        panic!("as the test wants it");
    }
}

#[test]
fn a_panic_in_the_middle_is_put_right_later() {
    for works_first in [false, true] {
        let mut rig = Rig::new(200, Options { max_pages: None, ids: Some(0..3) });
        rig.table.create(spec(0, 0, 16, HVA, SlotFlags::empty())).unwrap();
        rig.slots.set_vcpus(Panicking { works_first });
        let change = |table: &mut SlotTable| {
            table.transaction(|tx| {
                tx.split(RAM, SlotId::new(0), Gfn::new(8), SlotId::new(1))?;
                tx.set_read_only(RAM, SlotId::new(1), true)
            })
        };
        catch_unwind(AssertUnwindSafe(|| change(&mut rig.table))).unwrap_err();
        let same = frames(rig.fake.inner().table.view()) == frames(rig.table.view());
        assert!(same || !rig.slots.is_in_step(), "{works_first}");
        rig.slots.set_vcpus(Writers::of(&rig.fake, &[]));
        // Ids that were taken for what did not come to be are free again.
        rig.table.create(spec(2, 50, 4, HVA, SlotFlags::empty())).unwrap();
        rig.check();
        assert!(rig.slots.is_in_step());
    }
}

/// Panics while it prepares, after the ids were taken.
struct PanickingListener(Arc<AtomicBool>);

impl Listener for PanickingListener {
    fn name(&self) -> &str {
        "panicking"
    }

    fn prepare(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        assert!(!self.0.load(Ordering::Relaxed), "as the test wants it");
        Ok(())
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

#[test]
fn a_listener_that_panics_costs_no_ids() {
    let mut rig = Rig::new(200, Options { max_pages: None, ids: Some(0..1) });
    let panics = Arc::new(AtomicBool::new(true));
    rig.table.add_listener(Box::new(PanickingListener(Arc::clone(&panics)))).unwrap();
    let ram = spec(0, 0, 16, HVA, SlotFlags::empty());
    catch_unwind(AssertUnwindSafe(|| rig.table.create(ram))).unwrap_err();
    panics.store(false, Ordering::Relaxed);
    rig.table.create(ram).unwrap();
    rig.check();
}

/// Has each version carry what its memory would be.
struct Carrier(AttachmentKey<u64>, Arc<Mutex<Vec<Weak<u64>>>>);

impl Listener for Carrier {
    fn name(&self) -> &str {
        "carrier"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let memory = Arc::new(update.after.generation());
        self.1.lock().unwrap().push(Arc::downgrade(&memory));
        update.attach(self.0, memory);
        Ok(())
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// A slot that was created for a change that failed, and cannot be deleted: the guest still gets at its memory.
#[test]
fn memory_stays_as_long_as_the_kernel_may_have_it() {
    let mut rig = Rig::new(200, Options::default());
    let (key, versions) = (rig.table.attachment_key().unwrap(), Arc::default());
    rig.table.add_listener(Box::new(Carrier(key, Arc::clone(&versions)))).unwrap();
    let lives = |table: &mut SlotTable, version: usize| {
        table.reclaim();
        versions.lock().unwrap()[version].upgrade().is_some()
    };
    let fail = |rig: &mut Rig, failures| {
        rig.fake.inner().fail_in = Some(1);
        rig.fake.inner().failures = failures;
        rig.table
            .transaction(|tx| {
                tx.create(spec(0, 0, 4, HVA, SlotFlags::empty()))?;
                tx.create(spec(1, 10, 4, HVA, SlotFlags::empty()))
            })
            .unwrap_err();
        rig.fake.inner().fail_in = None;
    };
    fail(&mut rig, 1);
    assert!(rig.slots.is_in_step() && !lives(&mut rig.table, 0));
    fail(&mut rig, 2);
    assert!(!rig.slots.is_in_step() && lives(&mut rig.table, 1));
    assert_eq!(rig.fake.inner().table.view().len(RAM), 1);
    // Put right by a change that is taken back, and that cannot be taken back.
    rig.refuse.store(true, Ordering::Relaxed);
    rig.table.create(spec(5, 50, 4, HVA, SlotFlags::empty())).unwrap_err();
    rig.refuse.store(false, Ordering::Relaxed);
    assert!(!rig.slots.is_in_step() && lives(&mut rig.table, 1));
    rig.table.create(spec(5, 50, 4, HVA, SlotFlags::empty())).unwrap();
    assert!(rig.slots.is_in_step() && !lives(&mut rig.table, 1));
    rig.check();
}
