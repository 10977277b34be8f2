//! The lists of the dead, without threads: what is freed, when, and how often a node is looked at.

use alloc::collections::BTreeSet;
use std::vec;

use super::*;

/// A version's payload: the births of the nodes it is made of.
type Nodes = BTreeSet<u64>;

struct Table {
    owner: Owner<Nodes, ()>,
    list: VersionList<Nodes, u64>,
    alive: BTreeSet<u64>,
    stamp: u64,
}

impl Table {
    fn new(stamp: u64) -> Self {
        let mut table = Self {
            owner: share(()).unwrap(),
            list: VersionList::new(),
            alive: BTreeSet::from([stamp]),
            stamp,
        };
        table.list.reserve(1).unwrap();
        table.list.publish(&table.owner, || Nodes::from([stamp]), stamp, &mut Vec::new());
        table
    }

    fn current(&self) -> &Nodes {
        // SAFETY: this is the one writer.
        unsafe { &self.owner.current().payload }
    }

    /// A step that brings one node, named by its stamp, and leaves these behind.
    fn step(&mut self, leaves: &[u64]) {
        self.stamp = self.stamp.wrapping_add(1);
        let mut nodes = self.current().clone();
        for leaving in leaves {
            assert!(nodes.remove(leaving));
        }
        nodes.insert(self.stamp);
        self.alive.insert(self.stamp);
        self.list.reserve(1).unwrap();
        self.list.publish(&self.owner, || nodes, self.stamp, &mut leaves.to_vec());
    }

    fn snapshot(&self) -> Held<Nodes, ()> {
        // SAFETY: this is the one writer, and it publishes nothing during the call.
        unsafe { Held::new(&self.owner, NonNull::from(self.owner.current())) }
    }

    fn reclaim(&mut self) {
        let alive = &mut self.alive;
        self.list.reclaim(&self.owner, |birth| birth, |birth| assert!(alive.remove(&birth), "freed twice"));
    }

    /// Alive are exactly the nodes that a held version or the current one has.
    fn check(&mut self, held: &[Held<Nodes, ()>]) {
        self.reclaim();
        let mut wanted = self.current().clone();
        for held in held {
            wanted.extend(held.payload());
        }
        assert_eq!(self.alive, wanted);
    }
}

#[test]
fn a_snapshot_keeps_its_own_nodes_and_no_others() {
    let mut table = Table::new(0);
    table.step(&[]);
    let held = vec![table.snapshot()];
    for _ in 0..1000 {
        let oldest = *table.current().iter().next_back().unwrap();
        table.step(&[oldest]);
        table.check(&held);
        assert!(table.list.len() <= 2, "only the snapshot's version and the current one stay");
    }
    table.check(&held);
    drop(held);
    table.check(&[]);
}

#[test]
fn random_steps_and_snapshots() {
    for seed in 1..40u64 {
        // Half of the runs go through the wrap of the stamp.
        let mut table = Table::new(if seed % 2 == 0 { 5 } else { u64::MAX - 30 });
        let mut held = Vec::new();
        let mut random = seed;
        let mut below = |n: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(random >> 33).unwrap() % n
        };
        for _ in 0..200 {
            match below(4) {
                0 => held.push(table.snapshot()),
                1 if !held.is_empty() => drop(held.swap_remove(below(held.len()))),
                _ => {
                    let nodes: Vec<u64> = table.current().iter().copied().collect();
                    let leaves: Vec<u64> = nodes.into_iter().filter(|_| below(3) == 0).collect();
                    table.step(&leaves);
                }
            }
            if below(3) == 0 {
                table.check(&held);
            }
        }
        held.clear();
        table.check(&held);
        assert_eq!((table.list.len(), table.list.dead()), (1, 0));
    }
}

#[test]
fn stamps_are_compared_by_distance() {
    assert!(is_after(1, 0) && !is_after(0, 1) && !is_after(7, 7));
    assert!(is_after(0, u64::MAX) && !is_after(u64::MAX, 0));
}

#[test]
fn a_pinned_version_stays() {
    let mut table = Table::new(0);
    let mut seat = table.owner.reader().unwrap();
    let version = seat.enter();
    table.step(&[0]);
    table.reclaim();
    // SAFETY: pinned.
    assert_eq!(unsafe { &version.as_ref().payload }, &Nodes::from([0]));
    assert!(table.alive.contains(&0));
    seat.leave();
    table.reclaim();
    assert!(!table.alive.contains(&0));
}

#[test]
fn a_seat_that_was_left_is_taken_again() {
    let table = Table::new(0);
    let first = table.owner.reader().unwrap();
    let cell = first.cell;
    drop(first);
    assert_eq!(table.owner.reader().unwrap().cell, cell);
}
