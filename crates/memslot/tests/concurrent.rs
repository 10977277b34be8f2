//! Readers on other threads beside a writer that never stops.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable, View,
};
use memslot_testing::times;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
/// Slots 0 and 1 always tell the same round; the others come and go.
const LOW: u64 = 0x10;
const HIGH: u64 = 0x40_0000;

fn spec(id: u32, base: u64, pages: u64, round: u64) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
        backing: Backing::Host { hva: Hva::new((round << 24) + (u64::from(id) << 16)) },
        flags: SlotFlags::empty(),
    }
}

/// The round that the slot at a frame tells.
fn round(view: &View, gfn: u64) -> u64 {
    let found = view.translate(RAM, Gpa::new(gfn << 12)).expect("the slot is in every version");
    assert_eq!(view.slot(RAM, found.slot).unwrap().hva_of(Gfn::new(gfn)), Some(found.hva));
    found.hva.get() >> 24
}

/// Both slots of a version tell the same round.
fn check(view: &View) -> u64 {
    let (low, high) = (round(view, LOW + 3), round(view, HIGH + 1));
    assert_eq!(low, high, "a reader sees all of a transaction or nothing");
    let by_hva: Vec<_> = view.slot_ids_at_hva(RAM, Hva::new(low << 24)).collect();
    assert_eq!(by_hva, [SlotId::new(0)]);
    low
}

fn table() -> SlotTable {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    table.create(spec(0, LOW, 8, 1)).unwrap();
    table.create(spec(1, HIGH, 8, 1)).unwrap();
    table
}

/// The next round: both slots replaced, and some others come or go, in one transaction.
fn write(table: &mut SlotTable, round: u64) {
    table
        .transaction(|tx| {
            for (id, base) in [(0, LOW), (1, HIGH)] {
                tx.delete(RAM, SlotId::new(id))?;
                tx.create(spec(id, base, 8, round))?;
            }
            let id = 2 + u32::try_from(round % 97).unwrap();
            if tx.slot(RAM, SlotId::new(id)).is_some() {
                tx.delete(RAM, SlotId::new(id))
            } else {
                tx.create(spec(id, 0x1000 + u64::from(id) * 0x100, 0x80, round))
            }
        })
        .unwrap();
}

fn a_while() -> Duration {
    Duration::from_millis(times() * if cfg!(miri) { 1 } else { 700 })
}

#[test]
fn readers_see_whole_transactions_in_order() {
    let mut table = table();
    let (stop, published) = (AtomicBool::new(false), AtomicU64::new(1));
    thread::scope(|scope| {
        for kind in 0..4 {
            let handle = table.handle();
            let (stop, published) = (&stop, &published);
            scope.spawn(move || {
                let mut reader = handle.reader().unwrap();
                let mut held = Vec::new();
                let mut last = 0;
                while !stop.load(Ordering::Relaxed) {
                    let at_least = published.load(Ordering::Acquire);
                    let now = match kind {
                        0 => check(&reader.pin()),
                        1 => reader.translate(RAM, Gpa::new(LOW << 12)).unwrap().hva.get() >> 24,
                        // A reader of one moment only.
                        2 => check(&handle.reader().unwrap().pin()),
                        _ => {
                            held.push((reader.snapshot(), 0));
                            let (snapshot, told) = held.last_mut().unwrap();
                            *told = check(snapshot);
                            let now = *told;
                            if held.len() > 40 {
                                held.drain(..30);
                            }
                            now
                        }
                    };
                    assert!(now >= at_least, "what was published before is seen");
                    assert!(now >= last, "never back");
                    last = now;
                    for (snapshot, told) in &held {
                        assert_eq!(check(snapshot), *told, "a snapshot stays what it is");
                    }
                }
            });
        }
        let start = Instant::now();
        let mut round = 1;
        while start.elapsed() < a_while() {
            round += 1;
            write(&mut table, round);
            published.store(round, Ordering::Release);
        }
        stop.store(true, Ordering::Relaxed);
    });
    table.reclaim();
    assert_eq!(table.stats().versions, 1, "nobody holds an old version");
    assert_eq!(table.stats().dead_nodes, 0);
    let ids: Vec<_> = table.view().slots(RAM).map(memslot::Slot::id).collect();
    for id in ids {
        table.delete(RAM, id).unwrap();
    }
    table.reclaim();
    assert_eq!(table.stats().nodes, 0, "every node came back");
}

#[test]
fn snapshots_and_readers_outlive_their_table() {
    for round in 2..if cfg!(miri) { 4 } else { 60 } {
        let mut table = table();
        let handle = table.handle();
        thread::scope(|scope| {
            for _ in 0..2 {
                let (snapshot, mut reader) = (table.snapshot(), handle.reader().unwrap());
                scope.spawn(move || {
                    for _ in 0..20 {
                        assert_eq!(check(&snapshot), 1);
                        assert!(check(&reader.pin()) >= 1);
                        assert_eq!(check(&snapshot.clone()), 1);
                    }
                });
            }
            write(&mut table, round);
            drop(table);
        });
        assert_eq!(check(&handle.snapshot().unwrap()), round);
    }
}

#[test]
fn readers_come_and_go_beside_a_writer() {
    let mut table = table();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            let handle = table.handle();
            let stop = &stop;
            scope.spawn(move || {
                let mut last = 0;
                while !stop.load(Ordering::Relaxed) {
                    // Two at once, and one that takes the place the other left.
                    let (mut one, mut two) = (handle.reader().unwrap(), handle.reader().unwrap());
                    let held = one.pin();
                    let generation = held.generation();
                    let told = check(&held);
                    assert!(told >= last, "never back");
                    last = check(&two.pin());
                    assert!(last >= told, "never back");
                    drop(two);
                    assert!(check(&handle.reader().unwrap().pin()) >= last);
                    assert_eq!((held.generation(), check(&held)), (generation, told), "pinned all the time");
                }
            });
        }
        let start = Instant::now();
        let mut round = 1;
        while start.elapsed() < a_while() {
            round += 1;
            write(&mut table, round);
            table.reclaim();
        }
        stop.store(true, Ordering::Relaxed);
    });
    table.reclaim();
    assert_eq!((table.stats().versions, table.stats().dead_nodes), (1, 0), "who went holds nothing");
}

#[test]
fn a_reader_never_takes_the_place_of_another() {
    let mut table = table();
    let mut readers: Vec<_> = (0..4).map(|_| table.reader().unwrap()).collect();
    let (one, others) = readers.split_first_mut().unwrap();
    let held = one.pin();
    for other in others {
        drop(other.pin());
    }
    drop(table.reader().unwrap());
    write(&mut table, 2);
    table.reclaim();
    assert_eq!(table.stats().versions, 2, "the pin still counts");
    assert_eq!(check(&held), 1);
    drop(held);
    table.reclaim();
    assert_eq!(table.stats().versions, 1);
}

#[test]
fn a_forgotten_pin_only_keeps_its_version() {
    let mut table = table();
    let mut reader = table.reader().unwrap();
    std::mem::forget(reader.pin());
    for round in 2..200 {
        write(&mut table, round);
    }
    table.reclaim();
    assert_eq!(table.stats().versions, 2);
    // The next pin announces another version; nothing of the forgotten one is left then.
    assert_eq!(check(&reader.pin()), 199);
    table.reclaim();
    assert_eq!(table.stats().versions, 1);
}
