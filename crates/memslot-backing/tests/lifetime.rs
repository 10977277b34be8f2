//! Memory lives exactly as long as somebody can reach a slot on it.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use common::{PAGE, Refuser, fill, is_mapped, set};
use memslot::*;
use memslot_backing::{AttachError, Backings, DiscardError, Foreign, Memory, MemoryError};

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const SMM: AddressSpaceId = AddressSpaceId::SMM;

fn table() -> (SlotTable, Backings) {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let backings = Backings::attach(&mut table).unwrap();
    (table, backings)
}

/// 16 pages in a memfd of this name, adopted.
fn memory(backings: &Backings, name: &str) -> Arc<Memory> {
    let memory = Arc::new(Memory::memfd(name, 16 * PAGE).map().unwrap());
    backings.adopt(&memory);
    memory
}

fn id(number: u32) -> SlotId {
    SlotId::new(number)
}

fn gfn(number: u64) -> Gfn {
    Gfn::new(number)
}

/// What an address of the guest leads to, through a version.
fn read(view: &View, gpa: u64) -> u8 {
    let hva = view.translate(RAM, Gpa::new(gpa)).unwrap().hva;
    let pointer: *const u8 = std::ptr::with_exposed_provenance(usize::try_from(hva.get()).unwrap());
    // SAFETY: backings keep what a version translates to mapped; that is what is tested.
    unsafe { pointer.read_volatile() }
}

fn listener_error(error: TransactionError) -> String {
    match error.reason {
        Reason::Listener { listener, error } if listener == "backings" => error.to_string(),
        other => panic!("{other}"),
    }
}

#[test]
fn a_snapshot_reads_its_memory_after_the_slot_is_gone() {
    let (mut table, backings) = table();
    let ram = memory(&backings, "snapshot-reads");
    fill(&ram, 0..16 * PAGE, 0x5a);
    table.create(backings.spec(id(0), gfn(0), &ram, ..).unwrap()).unwrap();
    drop(ram);
    let snapshot = table.snapshot();
    table.delete(RAM, id(0)).unwrap();
    table.reclaim();
    assert_eq!(read(&snapshot, 15 * PAGE), 0x5a);
    let hva = snapshot.translate(RAM, Gpa::new(0)).unwrap().hva;
    assert!(backings.memory_in(&snapshot, hva).is_some() && backings.memory_in(table.view(), hva).is_none());

    // On another thread, and when the table itself is gone.
    let reader = std::thread::spawn(move || {
        drop(table);
        assert_eq!(read(&snapshot, 0), 0x5a);
        assert!(is_mapped("snapshot-reads"));
    });
    reader.join().unwrap();
    assert!(!is_mapped("snapshot-reads"));
}

#[test]
fn pins_and_guards_hold_as_snapshots_do() {
    let (mut table, backings) = table();
    let ram = memory(&backings, "pins-hold");
    fill(&ram, 0..PAGE, 1);
    table.create(backings.spec(id(0), gfn(0), &ram, ..).unwrap()).unwrap();
    drop(ram);
    let mut reader = table.reader().unwrap();
    let pin = reader.pin();
    let guard = table.reader().unwrap().into_guard();
    table.delete(RAM, id(0)).unwrap();
    table.reclaim();
    assert_eq!((read(&pin, 0), read(&guard, 0)), (1, 1));
    drop(pin);
    table.reclaim();
    assert_eq!(read(&guard, 0), 1);
    drop(guard);
    assert!(is_mapped("pins-hold"), "a reader unmaps nothing");
    table.reclaim();
    assert!(!is_mapped("pins-hold"));
}

#[test]
fn a_snapshot_held_for_ever_keeps_its_own_memory_only() {
    let (mut table, backings) = table();
    let own = memory(&backings, "held-own");
    table.create(backings.spec(id(0), gfn(0), &own, ..).unwrap()).unwrap();
    drop(own);
    let held = table.snapshot();
    let mut gone: Vec<Weak<Memory>> = Vec::new();
    for round in 0..200 {
        let other = memory(&backings, "held-others");
        gone.push(Arc::downgrade(&other));
        table.create(backings.spec(id(1), gfn(0x1000 + round), &other, ..).unwrap()).unwrap();
        drop(other);
        table.delete(RAM, id(1)).unwrap();
        let alive = gone.iter().filter(|memory| memory.strong_count() > 0).count();
        assert!(alive <= 9, "the table looks by itself every 16 generations; {alive} alive");
    }
    table.reclaim();
    assert!(gone.iter().all(|memory| memory.strong_count() == 0) && !is_mapped("held-others"));
    assert_eq!(backings.memories(&held).count(), 1);
    assert_eq!(read(&held, 0), 0);
}

#[test]
fn as_long_as_one_slot_of_any_address_space_stands_on_it() {
    let (mut table, backings) = table();
    let ram = memory(&backings, "several-slots");
    let gone = Arc::downgrade(&ram);
    let spec =
        |number, at, range: std::ops::Range<u64>| backings.spec(id(number), gfn(at), &ram, range).unwrap();
    table.create(spec(0, 0, 0..4 * PAGE)).unwrap();
    table.create(spec(1, 0x100, 0..4 * PAGE)).unwrap(); // an alias
    table.create(SlotSpec { address_space: SMM, ..spec(0, 0, 15 * PAGE..16 * PAGE) }).unwrap();
    drop(ram);
    table.delete(RAM, id(0)).unwrap();
    table.delete(RAM, id(1)).unwrap();
    table.reclaim();
    assert!(gone.strong_count() == 1);
    // Neither does a change of the slot lose it, nor one that puts others on it.
    table.move_to(SMM, id(0), gfn(0x50)).unwrap();
    table.set_flags(SMM, id(0), SlotFlags::READONLY).unwrap();
    let again = gone.upgrade().unwrap();
    let all = backings.spec(id(7), gfn(0), &again, ..).unwrap();
    drop(again);
    table
        .transaction(|tx| {
            tx.delete(SMM, id(0))?;
            tx.create(all)
        })
        .unwrap();
    table.transaction(|tx| tx.split(RAM, id(7), gfn(8), id(8))).unwrap();
    table.delete(RAM, id(7)).unwrap();
    table.reclaim();
    assert!(gone.strong_count() == 1 && is_mapped("several-slots"));
    table.delete(RAM, id(8)).unwrap();
    table.reclaim();
    assert!(gone.strong_count() == 0 && !is_mapped("several-slots"));
}

#[test]
fn changes_that_bring_no_memory_carry_the_same_set_on() {
    let (mut table, backings) = table();
    let ram = memory(&backings, "same-set");
    table.create(backings.spec(id(0), gfn(0), &ram, ..PAGE).unwrap()).unwrap();
    let count = Arc::strong_count(&ram);
    let held: Vec<Snapshot> = (1..8)
        .map(|n| {
            let range = u64::from(n) * PAGE..u64::from(n + 1) * PAGE;
            table.create(backings.spec(id(n), gfn(u64::from(n)), &ram, range).unwrap()).unwrap();
            table.snapshot()
        })
        .collect();
    assert_eq!(Arc::strong_count(&ram), count, "one set for {} versions", held.len() + 1);
}

#[test]
fn slots_on_memory_that_nobody_vouches_for_are_refused() {
    let (mut table, backings) = table();
    let ram = memory(&backings, "gate");
    let spec = backings.spec(id(0), gfn(0), &ram, ..).unwrap();
    let at = |hva: u64, pages| SlotSpec {
        gfns: GfnRange::with_len(gfn(0), pages).unwrap(),
        backing: Backing::Host { hva: Hva::new(hva) },
        ..spec
    };
    let start = ram.hva().get();
    for (hva, pages, says) in [
        (0x1000, 1, "not adopted"),
        (start - PAGE, 1, "not adopted"),      // the guard
        (start + 16 * PAGE, 1, "not adopted"), // the other guard
        (start, 17, "lies only partly"),
        (start + 15 * PAGE, 2, "lies only partly"),
        (start - PAGE, 2, "lies only partly"),
        (start - PAGE, 18, "lies only partly"),
    ] {
        let error = listener_error(table.create(at(hva, pages)).unwrap_err());
        assert!(error.contains(says), "{error}");
    }
    assert!(table.view().is_empty());
    // A good slot beside a bad one in the same change leaves nothing.
    let both = table.transaction(|tx| {
        tx.create(spec)?;
        tx.create(SlotSpec { id: id(1), gfns: GfnRange::with_len(gfn(0x100), 1).unwrap(), ..at(0x1000, 1) })
    });
    assert!(
        listener_error(both.unwrap_err())
            .starts_with("slot 1 [0x100000, +4 KiB) would stand on hva [0x1000, 0x2000): memory")
    );
    assert_eq!((backings.memories(table.view()).count(), Arc::strong_count(&ram)), (0, 1));

    table.create(at(start + PAGE, 15)).unwrap();
    // Growing past the end is refused, devices are nobody's memory.
    let grown = table.transaction(|tx| tx.resize(RAM, id(0), 16)).unwrap_err();
    assert!(listener_error(grown).contains("lies only partly"));
    let device = SlotSpec {
        id: id(1),
        gfns: GfnRange::with_len(gfn(0x200), 1).unwrap(),
        backing: Backing::Device { token: 0x1000 },
        ..spec
    };
    table.create(device).unwrap();

    // Memory that is gone is unknown, whatever lies there now.
    table.delete(RAM, id(0)).unwrap();
    table.reclaim();
    drop(ram);
    assert!(!is_mapped("gate") && backings.memory_at(Hva::new(start)).is_none());
    assert!(listener_error(table.create(spec).unwrap_err()).contains("gone"));
}

#[test]
fn memory_owned_elsewhere_is_let_through_where_that_is_allowed() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let backings = Backings::attach_to_slots(&mut table, &[], Foreign::Allow).unwrap();
    assert_eq!(backings.foreign(), Foreign::Allow);
    let ram = memory(&backings, "beside-foreign");
    let own = backings.spec(id(0), gfn(0), &ram, ..).unwrap();
    let foreign = |n: u32, hva| SlotSpec {
        id: id(n),
        gfns: GfnRange::with_len(gfn(0x1000 * u64::from(n)), 16).unwrap(),
        backing: Backing::Host { hva: Hva::new(hva) },
        ..own
    };
    table.create(foreign(1, 0x1000_0000)).unwrap();
    table.create(own).unwrap();
    assert!(
        listener_error(table.create(foreign(2, ram.hva().get() + PAGE)).unwrap_err())
            .contains("lies only partly")
    );
    assert!(
        listener_error(table.create(foreign(2, ram.hva().get() - PAGE)).unwrap_err())
            .contains("lies only partly")
    );
    let range = GfnRange::with_len(gfn(0x1000), 1).unwrap();
    let error = backings.discard(table.view(), RAM, range).unwrap_err();
    assert!(matches!(error, DiscardError::Unknown { slot } if slot.id() == id(1)), "{error}");

    // A slot that came before its memory was adopted does not take the memory away from others when it goes.
    let late = Arc::new(Memory::memfd("adopted-late", 16 * PAGE).map().unwrap());
    table.create(foreign(2, late.hva().get())).unwrap();
    backings.adopt(&late);
    table.create(foreign(3, late.hva().get())).unwrap();
    drop(late);
    table.delete(RAM, id(2)).unwrap();
    table.reclaim();
    assert!(is_mapped("adopted-late"));
    table.delete(RAM, id(3)).unwrap();
    table.reclaim();
    assert!(!is_mapped("adopted-late"));
}

#[test]
fn a_table_that_has_slots_already() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let ram = Arc::new(Memory::memfd("slots-first", 16 * PAGE).map().unwrap());
    let spec = SlotSpec {
        address_space: RAM,
        id: id(0),
        gfns: GfnRange::with_len(gfn(0), 16).unwrap(),
        backing: Backing::Host { hva: ram.hva() },
        flags: SlotFlags::empty(),
    };
    table.create(spec).unwrap();
    let generation = table.view().generation();
    let refused = Backings::attach(&mut table).unwrap_err();
    assert!(
        matches!(refused, AttachError::Standing(_))
            && refused.to_string().starts_with("slot 0 [0x0, +64 KiB)")
    );
    assert_eq!(table.view().generation(), generation);

    let backings =
        Backings::attach_to_slots(&mut table, std::slice::from_ref(&ram), Foreign::Refuse).unwrap();
    drop(ram);
    assert_eq!(backings.memories(table.view()).count(), 1);
    table.delete(RAM, id(0)).unwrap();
    table.reclaim();
    assert!(!is_mapped("slots-first"));

    while table.attachment_key::<u8>().is_some() {}
    assert!(matches!(Backings::attach(&mut table).unwrap_err(), AttachError::NoKey));
}

#[test]
fn what_is_refused_or_taken_back_leaves_everything_as_it_was() {
    for refuser_first in [false, true] {
        let refuse = Arc::new(AtomicU8::new(0));
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let refuser = Box::new(Refuser(Arc::clone(&refuse)));
        if refuser_first {
            table.add_listener(refuser).unwrap();
        }
        let backings = Backings::attach(&mut table).unwrap();
        if !refuser_first {
            table.add_listener(Box::new(Refuser(Arc::clone(&refuse)))).unwrap();
        }
        let (stays, comes) = (memory(&backings, "stays"), memory(&backings, "comes"));
        let (stay, come) = (
            backings.spec(id(0), gfn(0), &stays, ..).unwrap(),
            backings.spec(id(1), gfn(0x100), &comes, ..).unwrap(),
        );
        table.create(stay).unwrap();
        let gone = Arc::downgrade(&stays);
        drop(stays);
        for how in [1, 2] {
            refuse.store(how, Relaxed);
            table
                .transaction(|tx| {
                    tx.delete(RAM, id(0))?;
                    tx.create(come)
                })
                .unwrap_err();
            table.delete(RAM, id(0)).unwrap_err();
            table.create(come).unwrap_err();
            table.reclaim();
            assert_eq!(Arc::strong_count(&comes), 1, "{how}");
            let standing: Vec<u64> =
                backings.memories(table.view()).map(|memory| memory.hva().get()).collect();
            assert_eq!(
                (standing, gone.strong_count()),
                (vec![stay.backing.hva().unwrap().get()], 1),
                "{how}"
            );
        }
        // A listener that panics while it commits has failed: what was there before is there again.
        refuse.store(3, Relaxed);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| table.create(come)));
        assert!(panicked.is_err());
        refuse.store(0, Relaxed);
        assert!(table.view().slot(RAM, id(1)).is_none() && is_mapped("stays"));
        table.reclaim();
        assert_eq!(Arc::strong_count(&comes), 1);
        table.create(come).unwrap();
        drop(comes);
        table.reclaim();
        assert!(is_mapped("comes"));
        table.delete(RAM, id(1)).unwrap();
        table.delete(RAM, id(0)).unwrap();
        table.reclaim();
        assert!(!is_mapped("comes") && gone.strong_count() == 0);
    }
}

#[test]
fn frames_are_discarded_through_the_slots() {
    let (mut table, backings) = table();
    let (low, high) = (memory(&backings, "discard-low"), memory(&backings, "discard-high"));
    for ram in [&low, &high] {
        fill(ram, 0..16 * PAGE, 0xee);
    }
    // low at 0..16 (as two slots), a device at 16..32, a hole, high at 0x30..0x40, low once more at 0x100.
    table
        .transaction(|tx| {
            tx.create(backings.spec(id(0), gfn(0), &low, ..8 * PAGE).unwrap())?;
            tx.create(backings.spec(id(1), gfn(8), &low, 8 * PAGE..).unwrap())?;
            tx.create(SlotSpec {
                id: id(2),
                gfns: GfnRange::with_len(gfn(16), 16).unwrap(),
                backing: Backing::Device { token: 1 << 40 },
                ..backings.spec(id(2), gfn(0), &low, ..).unwrap()
            })?;
            tx.create(backings.spec(id(3), gfn(0x30), &high, ..).unwrap())?;
            tx.create(backings.spec(id(4), gfn(0x100), &low, ..).unwrap())
        })
        .unwrap();
    let discard = |table: &SlotTable, from, end| {
        backings.discard(table.view(), RAM, GfnRange::new(gfn(from), gfn(end)).unwrap())
    };
    assert_eq!(discard(&table, 4, 0x32).unwrap(), (12 + 2) * PAGE);
    for page in 0..16 {
        let gone = |from| if page >= from { 0 } else { 0xee };
        assert_eq!(common::all(&low, page * PAGE..(page + 1) * PAGE), Some(gone(4)));
        assert_eq!(common::all(&high, page * PAGE..(page + 1) * PAGE), Some(if page < 2 { 0 } else { 0xee }));
    }
    assert_eq!(read(table.view(), 0x10f << 12), 0, "the alias sees it");
    assert_eq!(discard(&table, 0x400, 0x500).unwrap(), 0, "nothing is there");

    // Neighbours for the guest, apart in the memory: what lies between stays.
    fill(&low, 0..16 * PAGE, 0xee);
    table
        .transaction(|tx| {
            tx.create(backings.spec(id(5), gfn(0x200), &low, ..4 * PAGE).unwrap())?;
            tx.create(backings.spec(id(6), gfn(0x204), &low, 8 * PAGE..12 * PAGE).unwrap())
        })
        .unwrap();
    assert_eq!(discard(&table, 0x202, 0x206).unwrap(), 4 * PAGE);
    let zero: Vec<u64> = (0..16).filter(|page| common::get(&low, page * PAGE) == 0).collect();
    assert_eq!(zero, [2, 3, 8, 9]);

    // Read-only frames are not the guest's to give up, and nothing before them is discarded either.
    table.set_flags(RAM, id(3), SlotFlags::READONLY).unwrap();
    set(&low, 0, 1);
    let error = discard(&table, 0, 0x40).unwrap_err();
    assert!(matches!(error, DiscardError::ReadOnly { slot } if slot.id() == id(3)), "{error}");
    assert_eq!(read(table.view(), 0), 1);

    // A slot that moved since: an old version discards what it shows.
    let old = table.snapshot();
    table.delete(RAM, id(0)).unwrap();
    table.delete(RAM, id(4)).unwrap();
    assert_eq!(backings.discard(&old, RAM, GfnRange::with_len(gfn(0), 1).unwrap()).unwrap(), PAGE);
    assert_eq!(common::get(&low, 0), 0);
}

#[test]
fn specifications_of_slots() {
    let (_, backings) = table();
    let ram = memory(&backings, "specs");
    let spec = backings.spec(id(3), gfn(0x100), &ram, 4 * PAGE..8 * PAGE).unwrap();
    assert_eq!(spec.gfns, GfnRange::with_len(gfn(0x100), 4).unwrap());
    assert_eq!(spec.backing, Backing::Host { hva: Hva::new(ram.hva().get() + 4 * PAGE) });
    assert!(matches!(backings.spec(id(0), gfn(0), &ram, 1..PAGE), Err(MemoryError::Unaligned { .. })));
    assert!(matches!(backings.spec(id(0), gfn(0), &ram, ..17 * PAGE), Err(MemoryError::OutOfRange { .. })));
    let top = gfn(u64::MAX - 3);
    assert!(matches!(backings.spec(id(0), top, &ram, ..), Err(MemoryError::GfnsTooHigh { pages: 16, .. })));
    assert_eq!(backings.memory_at(ram.hvas().end()).map(|_| ()), None);
    assert!(Arc::ptr_eq(&backings.memory_at(Hva::new(ram.hvas().end().get() - 1)).unwrap(), &ram));
}

/// Addresses are used again: what lies there now counts, not what was adopted there once.
#[test]
fn memory_at_the_place_of_one_that_is_gone() {
    let (mut table, backings) = table();
    // With so large an alignment there is one place only.
    let at = |page: u64, pages: u64| {
        let memory =
            Memory::anonymous(pages * PAGE).alignment(1 << 45).congruent_to(Gpa::new(page * PAGE)).map();
        let memory = Arc::new(memory.unwrap());
        backings.adopt(&memory);
        memory
    };
    let small = [0x1010, 0x1030].map(|page| at(page, 4).hva());
    let large = at(0x1000, 0x40);
    if small.iter().any(|&hva| !large.hvas().contains(hva)) {
        return memslot_testing::skipped(
            "memory at the place of one that is gone: the kernel puts it elsewhere",
        );
    }
    let whole = backings.spec(id(0), gfn(0), &large, ..).unwrap();
    table.create(whole).unwrap();
    for page in 0..0x40 {
        let hva = Hva::new(large.hva().get() + page * PAGE);
        assert!(Arc::ptr_eq(&backings.memory_at(hva).unwrap(), &large), "page {page}");
    }
    table.delete(RAM, id(0)).unwrap();
    table.reclaim();
    let end = large.hvas().end();
    drop(large);
    // And the other way round: a slot that begins outside of what lives now.
    let small = at(0x1010, 4);
    assert!(backings.memory_at(Hva::new(end.get() - 1)).is_none());
    assert!(listener_error(table.create(whole).unwrap_err()).contains("lies only partly"));
    table.create(backings.spec(id(0), gfn(0), &small, ..).unwrap()).unwrap();
}

/// Threads read guest memory through pins while the writer plugs and unplugs it: no read ever faults, and each finds what
/// belongs to the frame.
#[test]
fn readers_never_fault_while_memory_comes_and_goes() {
    let (mut table, backings) = table();
    let stop = AtomicBool::new(false);
    let handle = table.handle();
    std::thread::scope(|scope| {
        let stop_at_the_end = StopAtTheEnd(&stop);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (handle, stop) = (handle.clone(), &stop);
                scope.spawn(move || {
                    let (mut reader, mut found) = (handle.reader().unwrap(), 0u64);
                    let mut kept = None;
                    while !stop.load(Relaxed) {
                        let pin = reader.pin();
                        for place in 0..4u8 {
                            let gpa = u64::from(place) << 20;
                            if pin.translate(RAM, Gpa::new(gpa)).is_some() {
                                assert_eq!(read(&pin, gpa), place);
                                found += 1;
                            }
                        }
                        if found % 64 == 0 {
                            kept = Some(pin.snapshot());
                        }
                        if let Some(old) = &kept {
                            for slot in old.slots(RAM) {
                                let gpa = slot.base_gfn().get() << 12;
                                assert_eq!(u64::from(read(old, gpa)), gpa >> 20);
                            }
                        }
                    }
                    found
                })
            })
            .collect();
        for round in 0..2000u32 {
            let place = u8::try_from(round % 4).unwrap();
            if table.view().slot(RAM, id(place.into())).is_some() {
                table.delete(RAM, id(place.into())).unwrap();
                table.reclaim();
            }
            let ram = Arc::new(Memory::anonymous(16 * PAGE).alignment(PAGE).map().unwrap());
            set(&ram, 0, place);
            backings.adopt(&ram);
            table
                .create(backings.spec(id(place.into()), gfn(u64::from(place) << 8), &ram, ..).unwrap())
                .unwrap();
        }
        drop(stop_at_the_end);
        let found: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        assert!(found > 0);
    });
}

/// Lets the readers end also where the writer panics.
struct StopAtTheEnd<'a>(&'a AtomicBool);

impl Drop for StopAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
