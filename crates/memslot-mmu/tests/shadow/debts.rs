//! What is owed to processors that still have an old translation, and to the dirty log, whoever was the first to find nothing there.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use memslot::dirty::Rearm;
use memslot::{AddressSpaceId, Gfn, GfnRange, Gpa, SlotId};
use memslot_mmu::shadow::guest::GuestAccess;
use memslot_mmu::shadow::{ShadowConfig, ShadowFault, ShadowRearm, ShadowVcpu};

use crate::past_bugs::{ALL, Guest, LOG, PAGE_SIZE, PD, PT, USER_WRITE, in_pd};
use crate::world::host::TestHost;
use crate::world::layout::LARGE;
use crate::world::{RAM, World, range, slot};

const SLOT: u32 = 1;

const WRITES: GuestAccess = GuestAccess::WRITE.union(GuestAccess::USER);

/// A guest that has written to a page of a logged slot, and has done so lately: its processor can write there by itself.
fn writes() -> Guest {
    let mut guest = Guest::small();
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 0, LARGE << 12 | ALL);
    guest.set_flags(SLOT, LOG);
    guest.leads(0, 0, USER_WRITE, LARGE);
    guest
}

/// Re-arms, and fails afterwards: as where pages are re-armed in several tables, and the second of them cannot.
struct Fails(ShadowRearm<TestHost>);

impl Rearm for Fails {
    type Error = &'static str;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Self::Error> {
        let Ok(()) = self.0.rearm(space, gfns);
        Err("not now")
    }

    fn flush(&mut self) -> Result<(), Self::Error> {
        unreachable!("it has failed")
    }
}

/// A harvest that fails has taken W away, and nobody was flushed. The next one finds no W, and owes a flush all the same: also where the first
/// one's re-arming is gone by then, and where it is not.
#[test]
fn a_harvest_that_fails_leaves_its_flush_to_the_next() {
    for is_kept in [false, true] {
        let mut guest = writes();
        let mut fails = Fails(guest.world.shadow.dirty_rearm().unwrap());
        assert!(guest.world.consumer.harvest(&mut fails).is_err());
        let kept = is_kept.then_some(fails);
        assert!(guest.step(World::harvest).contains(&(RAM, LARGE)));
        // If it needs no fault, nobody hears of it.
        guest.leads(0, 0, USER_WRITE, LARGE);
        assert!(guest.step(World::harvest).contains(&(RAM, LARGE)), "kept: {is_kept}");
        drop(kept);
    }
}

/// The same where logging stops and starts again.
#[test]
fn a_harvest_that_fails_leaves_its_flush_to_the_next_start_of_logging() {
    for is_kept in [false, true] {
        let mut guest = writes();
        let mut fails = Fails(guest.world.shadow.dirty_rearm().unwrap());
        assert!(guest.world.consumer.harvest(&mut fails).is_err());
        let kept = is_kept.then_some(fails);
        guest.set_flags(SLOT, memslot::SlotFlags::empty());
        guest.set_flags(SLOT, LOG);
        guest.leads(0, 0, USER_WRITE, LARGE);
        assert!(guest.step(World::harvest).contains(&(RAM, LARGE)), "kept: {is_kept}");
        drop(kept);
    }
}

/// Where all pages are dirty at first, large pages stay writable until they are harvested.
#[test]
fn large_pages_that_are_dirty_at_first() {
    let mut guest = Guest::new(ShadowConfig::default());
    guest.world.log.set_initially_set(true);
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    guest.leads(0, 0, USER_WRITE, LARGE);
    guest.set_flags(SLOT, LOG);
    guest.leads(0, 1 << 12, USER_WRITE, LARGE + 1);
    assert!(guest.step(World::harvest).contains(&(RAM, LARGE + 1)));
    guest.leads(0, 1 << 12, USER_WRITE, LARGE + 1);
    assert!(guest.step(World::harvest).contains(&(RAM, LARGE + 1)));
    guest.step(|world| world.shadow.zap_gfn_range(RAM, range(LARGE, 512)));
}

/// A slot of its own, which is logged and moves, and where it comes to lie.
const MOVES: u32 = 7;
const FROM: u64 = 4096;
const TO: u64 = 8192;

/// A guest with a page of [`MOVES`] at the address 0, which is mapped and can be written after a fault; a virtual processor besides; and what is dirty
/// is harvested.
fn moves() -> (Guest, ShadowVcpu<TestHost>) {
    let mut guest = Guest::small();
    guest.change(|world| _ = world.table.create(slot(RAM, MOVES, range(FROM, 16), FROM, LOG)).unwrap());
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 0, FROM << 12 | ALL);
    guest.leads(0, 0, USER_WRITE, FROM);
    guest.step(World::harvest);
    let mut vcpu = guest.world.shadow.vcpu().unwrap();
    vcpu.load(guest.world.cpus[0].paging, RAM).unwrap();
    (guest, vcpu)
}

/// The slot moves, and then this page of it must be dirty.
fn move_and_find(guest: &mut Guest, page: u64) {
    guest.change(|world| _ = world.table.move_to(RAM, SlotId::new(MOVES), Gfn::new(TO)).unwrap());
    assert!(!guest.world.meanwhile.is_planned());
    let dirty = guest.step(World::harvest);
    assert!(dirty.contains(&(RAM, TO + page)), "page {page} was written, and these are dirty: {dirty:x?}");
}

/// While a slot moves, a page of it is written and then unmapped by the guest: when the shadow tables hear of the move, there is no entry that
/// would say so.
#[test]
fn what_is_written_and_unmapped_while_its_slot_moves_is_dirty() {
    let (mut guest, mut vcpu) = moves();
    let (shadow, host) = (guest.world.shadow.clone(), guest.world.host.clone());
    let (_, pt) = guest.world.resolve(RAM, PT).unwrap();
    guest.world.meanwhile.set(move || {
        assert!(matches!(vcpu.fault(0, WRITES).unwrap(), ShadowFault::Mapped(_)));
        host.write(pt, 0, 0);
        shadow.wrote(RAM, Gpa::new(PT << 12), 8);
    });
    move_and_find(&mut guest, 0);
}

/// A table of the guest's lies in the slot: its accessed bits are set meanwhile.
#[test]
fn a_table_that_is_walked_while_its_slot_moves_is_dirty() {
    let (mut guest, mut vcpu) = moves();
    guest.put(FROM + 1, 0, LARGE << 12 | ALL & !0x20);
    guest.put(PD, 1, (FROM + 1) << 12 | ALL);
    guest.world.meanwhile.set(move || {
        assert!(matches!(vcpu.fault(in_pd(1), GuestAccess::USER).unwrap(), ShadowFault::Mapped(_)));
    });
    move_and_find(&mut guest, 1);
}

/// The memory goes on under another id, and a part of it only.
#[test]
fn what_is_written_while_its_memory_changes_its_slot_is_dirty() {
    let (mut guest, mut vcpu) = moves();
    let (shadow, host) = (guest.world.shadow.clone(), guest.world.host.clone());
    let (_, pt) = guest.world.resolve(RAM, PT).unwrap();
    guest.put(PT, 1, (FROM + 9) << 12 | ALL);
    guest.leads(0, 1 << 12, USER_WRITE, FROM + 9);
    guest.step(World::harvest);
    guest.world.meanwhile.set(move || {
        for address in [0, 1 << 12] {
            assert!(matches!(vcpu.fault(address, WRITES).unwrap(), ShadowFault::Mapped(_)));
            host.write(pt, usize::try_from(address >> 12).unwrap(), 0);
        }
        shadow.wrote(RAM, Gpa::new(PT << 12), 16);
    });
    guest.change(|world| {
        let change = world.table.transaction(|tx| {
            tx.delete(RAM, SlotId::new(MOVES))?;
            tx.create(slot(RAM, MOVES + 1, range(TO, 8), FROM + 4, LOG))
        });
        change.unwrap();
    });
    // Page 0 is gone; page 9 is the sixth now.
    assert_eq!(guest.step(World::harvest), [(RAM, TO + 5)]);
}

/// The slot goes, and somebody wants to know what was written to it until then.
#[test]
fn what_is_written_while_its_slot_is_deleted_is_handed_over() {
    let (mut guest, mut vcpu) = moves();
    let keeper = guest.world.log.consumer_keeping_removed().unwrap();
    guest.world.meanwhile.set(move || {
        assert!(matches!(vcpu.fault(0, WRITES).unwrap(), ShadowFault::Mapped(_)));
    });
    guest.delete(MOVES);
    let removed = keeper.take_removed().unwrap();
    let pages: Vec<_> = removed.iter().flat_map(memslot::dirty::Removed::runs).collect();
    assert_eq!(pages, [range(FROM, 1)]);
}

/// The same by the fast path, which has no lock, at each moment at which a table is reached: whenever it makes a page of the slot writable, that is
/// dirty where it comes to lie.
#[test]
fn what_the_fast_path_makes_writable_while_its_slot_moves_is_dirty() {
    let mut hits = 0;
    for moment in 0.. {
        let (mut guest, mut vcpu) = moves();
        let shadow = guest.world.shadow.clone();
        let (asks, asked) = mpsc::channel::<()>();
        let (answers, answer) = mpsc::channel::<()>();
        let before = shadow.stats().fast_faults;
        let faulting = thread::spawn(move || {
            asked.recv().unwrap();
            let _ = vcpu.fault(0, WRITES).unwrap();
            let _ = answers.send(());
            shadow.stats().fast_faults > before
        });
        let (is_moving, moments) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let here = thread::current().id();
        let watch = {
            let (is_moving, moments) = (is_moving.clone(), moments.clone());
            let channels = Mutex::new((asks.clone(), answer));
            move |is_reached: bool| {
                let counts = is_reached && is_moving.load(SeqCst) && thread::current().id() == here;
                if counts && moments.fetch_add(1, SeqCst) == moment {
                    let (asks, answer) = &*channels.lock().unwrap();
                    asks.send(()).unwrap();
                    // If it wants the lock, it gets it later.
                    let _ = answer.recv_timeout(Duration::from_secs(1));
                }
            }
        };
        assert!(guest.world.host.watch.set(Box::new(watch)).is_ok());
        guest.change(|world| {
            is_moving.store(true, SeqCst);
            world.table.move_to(RAM, SlotId::new(MOVES), Gfn::new(TO)).unwrap();
            is_moving.store(false, SeqCst);
        });
        if moments.load(SeqCst) <= moment {
            // There are no more than that.
            asks.send(()).unwrap();
            assert!(!faulting.join().unwrap());
            break;
        }
        if faulting.join().unwrap() {
            hits += 1;
            let dirty = guest.step(World::harvest);
            assert!(dirty.contains(&(RAM, TO)), "at moment {moment}");
        }
    }
    assert!(hits > 0);
}
