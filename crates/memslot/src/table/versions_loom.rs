//! Interleavings of publishing, pinning, taking snapshots and reclaiming, run by loom.
//!
//! A version's payload is a flag that its drop clears. Whoever holds a version checks the flag: finding it
//! cleared means that the version was let go of under their hands. The dead "nodes" are numbers, and freeing one
//! marks it, so that a reader can also check what its version is made of.

use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::thread;

use super::*;

/// Node `n` is part of the versions from `n` to `n + 1`: each step leaves one behind and brings one.
const NODES: usize = 4;

struct Payload {
    number: usize,
    alive: Arc<AtomicBool>,
    freed: Arc<[AtomicBool; NODES]>,
}

impl Payload {
    fn check(&self) {
        assert!(self.alive.load(Ordering::Relaxed), "version {} was let go of while held", self.number);
        for node in [self.number, self.number.saturating_sub(1)] {
            assert!(
                !self.freed[node].load(Ordering::Relaxed),
                "node {node} of version {} was freed",
                self.number
            );
        }
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::Relaxed);
    }
}

struct Table {
    list: VersionList<Payload, usize>,
    freed: Arc<[AtomicBool; NODES]>,
    next: usize,
}

impl Table {
    fn new() -> (Owner<Payload, ()>, Self) {
        let owner = share(()).unwrap();
        let freed = Arc::new(core::array::from_fn(|_| AtomicBool::new(false)));
        let mut table = Self { list: VersionList::new(), freed, next: 0 };
        table.publish(&owner);
        (owner, table)
    }

    fn publish(&mut self, owner: &Owner<Payload, ()>) {
        let number = self.next;
        self.next += 1;
        let alive = Arc::new(AtomicBool::new(true));
        let payload = Payload { number, alive, freed: self.freed.clone() };
        // The node that was born two versions ago is left behind.
        let mut dead: Vec<usize> = number.checked_sub(2).into_iter().collect();
        self.list.reserve(1).unwrap();
        self.list.publish(owner, || payload, number as u64, &mut dead);
    }

    fn reclaim(&mut self, owner: &Owner<Payload, ()>) {
        let freed = self.freed.clone();
        self.list.reclaim(
            owner,
            |node| node as u64,
            |node| {
                assert!(!freed[node].swap(true, Ordering::Relaxed), "node {node} was freed twice");
            },
        );
    }
}

fn payload<'a>(version: NonNull<Version<Payload>>) -> &'a Payload {
    // SAFETY: called while the version is held.
    unsafe { &version.as_ref().payload }
}

/// The writer's thread ends before what is shared: `VersionList` frees versions when it drops.
fn finish(owner: Owner<Payload, ()>, mut table: Table) {
    table.reclaim(&owner);
    assert_eq!(table.list.len(), 1, "nobody holds an old version any more");
    assert_eq!(table.list.dead(), 0);
    drop(table);
    drop(owner);
}

#[test]
fn loom_a_pin_holds_its_version() {
    loom::model(|| {
        let (owner, mut table) = Table::new();
        let mut seat = owner.reader().unwrap();
        let reader = thread::spawn(move || {
            for _ in 0..2 {
                payload(seat.enter()).check();
                seat.leave();
            }
        });
        for _ in 0..2 {
            table.publish(&owner);
            table.reclaim(&owner);
        }
        reader.join().unwrap();
        finish(owner, table);
    });
}

#[test]
fn loom_a_snapshot_outlives_its_pin() {
    loom::model(|| {
        let (owner, mut table) = Table::new();
        let mut seat = owner.reader().unwrap();
        let reader = thread::spawn(move || {
            let version = seat.enter();
            // SAFETY: pinned.
            let held = unsafe { Held::new(seat.owner(), version) };
            seat.leave();
            held.payload().check();
            let other = held.clone();
            drop(held);
            other.payload().check();
        });
        for _ in 0..2 {
            table.publish(&owner);
            table.reclaim(&owner);
        }
        reader.join().unwrap();
        finish(owner, table);
    });
}

#[test]
fn loom_a_reader_never_goes_back() {
    loom::model(|| {
        let (owner, mut table) = Table::new();
        let mut seat = owner.reader().unwrap();
        let reader = thread::spawn(move || {
            let first = payload(seat.enter()).number;
            seat.leave();
            let second = payload(seat.enter()).number;
            seat.leave();
            assert!(second >= first, "version {second} after {first}");
        });
        table.publish(&owner);
        table.publish(&owner);
        table.reclaim(&owner);
        reader.join().unwrap();
        finish(owner, table);
    });
}

#[test]
fn loom_two_readers_beside_a_writer() {
    loom::model(|| {
        let (owner, mut table) = Table::new();
        let readers = [owner.reader().unwrap(), owner.reader().unwrap()].map(|mut seat| {
            thread::spawn(move || {
                payload(seat.enter()).check();
                seat.leave();
            })
        });
        table.publish(&owner);
        table.reclaim(&owner);
        for reader in readers {
            reader.join().unwrap();
        }
        finish(owner, table);
    });
}

#[test]
fn loom_seats_are_taken_once() {
    loom::model(|| {
        let (owner, mut table) = Table::new();
        drop(owner.reader().unwrap());
        let others: [_; 2] = core::array::from_fn(|_| {
            let owner = owner.clone();
            thread::spawn(move || {
                let mut seat = owner.reader().unwrap();
                payload(seat.enter()).check();
                seat.leave();
            })
        });
        table.publish(&owner);
        table.reclaim(&owner);
        for other in others {
            other.join().unwrap();
        }
        finish(owner, table);
    });
}
