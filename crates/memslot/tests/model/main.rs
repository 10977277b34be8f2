//! A naive model (one map) against the engine, under random programs of operations and transactions.
//!
//! After every step everything that can be looked up is compared: by id, by frame, by range, holes, by host
//! address, through a reader that remembers, and in snapshots of earlier states. How many programs, and
//! which: see `memslot_testing::cases`.
#![allow(unreachable_pub, reason = "the modules of a test program")]

#[path = "../common/mod.rs"]
mod common;
mod compare;
mod naive;
mod program;

use compare::{check_reader, compare, known};
use memslot::{
    AddressSpaceId, Backing, Hva, Limits, PageSize, Reader, Reason, SlotFlags, SlotId, SlotSpec, SlotTable,
    Snapshot, TransactionError,
};
use memslot_testing::{Random, programs, proptest_config};
use naive::{Model, Op, Slots, range};
use program::random_op;
use proptest::prelude::*;

/// Both sides together.
struct Pair {
    table: SlotTable,
    model: Model,
    reader: Reader,
    snapshots: Vec<(Snapshot, Slots, u64)>,
}

impl Pair {
    fn new(limits: Limits) -> Self {
        let table = SlotTable::new(limits).unwrap();
        let reader = table.reader().unwrap();
        Self { table, model: Model::new(limits), reader, snapshots: Vec::new() }
    }

    /// Runs the operations as one transaction on both sides, which must agree on each of them and on the whole.
    /// A `stubborn` caller goes on after an operation that fails.
    fn step(&mut self, ops: &[Op], stubborn: bool) -> bool {
        let Self { table, model, .. } = self;
        let mut failed = None;
        let result = table.transaction(|tx| {
            for (i, op) in ops.iter().enumerate() {
                let (expected, outcome) = (model.apply(op).is_some(), op.submit(tx));
                assert!(failed.is_some() || outcome.is_ok() == expected, "{op:?}: {outcome:?}");
                if let Err(error) = outcome {
                    assert_eq!(error.operation, Some(i));
                    failed.get_or_insert(i);
                    if !stubborn {
                        return Err(error);
                    }
                }
                for (space, id) in op.keys() {
                    let slot = tx.slot(AddressSpaceId::new(space), SlotId::new(id)).map(known);
                    let wanted = model.slots.get(&(space, id));
                    assert!(failed.is_some() || slot.as_ref() == wanted, "{op:?} has left {slot:?}");
                }
            }
            Ok(())
        });
        let expected = failed.is_none() && model.disjoint();
        match &result {
            Ok(generation) => {
                assert!(expected, "{ops:?} should fail");
                assert_eq!(*generation, model.keep(), "{ops:?}");
            }
            Err(error) => {
                assert!(!expected, "{ops:?}: {error}");
                check_error(error, failed, model, ops.len());
                model.forget();
            }
        }
        assert_eq!(table.view().generation(), model.generation(), "{ops:?}");
        expected
    }

    fn check(&mut self, random: &mut Random) {
        compare(self.table.view(), &self.model.slots, random);
        check_reader(&mut self.reader, &self.model.slots, &self.model.limits, random);
        if let Some((snapshot, slots, generation)) = self.snapshots.get(random.index(20)) {
            assert_eq!(snapshot.generation(), *generation);
            compare(snapshot, slots, random);
        }
    }

    /// Nothing is left when all is deleted.
    fn finish(mut self, random: &mut Random) {
        for (snapshot, slots, generation) in &self.snapshots {
            assert_eq!(snapshot.generation(), *generation);
            compare(snapshot, slots, random);
        }
        self.snapshots.clear();
        let all: Vec<_> = self.model.slots.keys().map(|&(space, id)| Op::Delete(space, id)).collect();
        assert!(self.step(&all, false));
        self.check(random);
        self.table.reclaim();
        let stats = self.table.stats();
        assert_eq!((stats.nodes, stats.versions, stats.dead_nodes), (0, 1, 0));
    }
}

/// The error names the operation to blame, and slots that are really in each other's way.
fn check_error(error: &TransactionError, failed: Option<usize>, model: &Model, operations: usize) {
    match &error.reason {
        Reason::Overlap { slot, with } => {
            assert!(failed.is_none() && slot.gfns().overlaps(&with.gfns()), "{error}");
            assert!(error.operation.is_some_and(|operation| operation < operations), "{error}");
            for slot in [slot, with] {
                let key = (slot.address_space().get(), slot.id().get());
                assert_eq!(model.slots.get(&key), Some(&known(slot)), "{error}");
            }
            assert!(slot.address_space() == with.address_space() && slot.id() != with.id(), "{error}");
        }
        Reason::FailedBefore { operation } => assert_eq!(Some(*operation), failed, "{error}"),
        _ => assert!(failed.is_some() && error.operation == failed, "{error}"),
    }
}

/// One step: a transaction of one operation or some, and now and then a snapshot taken or dropped.
fn step(pair: &mut Pair, random: &mut Random, ids: u64) {
    let count = if random.once_in(5) { 1 + random.below(12) } else { 1 };
    let mut ops = Vec::new();
    for _ in 0..count {
        // Operations of a transaction see those before them.
        let op = random_op(random, &pair.model, ids);
        let fine = pair.model.apply(&op).is_some();
        // Most transactions shall come to be.
        if count == 1 || fine || random.once_in(20) {
            ops.push(op);
        }
    }
    pair.model.forget();
    pair.step(&ops, random.once_in(8));
    if random.once_in(40) && pair.snapshots.len() < 12 {
        let generation = pair.model.generation();
        pair.snapshots.push((pair.table.snapshot(), pair.model.slots.clone(), generation));
    }
    if random.once_in(60) && !pair.snapshots.is_empty() {
        let at = random.index(pair.snapshots.len());
        pair.snapshots.swap_remove(at);
    }
}

fn limits(page_size: PageSize) -> Limits {
    Limits { page_size, slots: 4_000_000, ..Limits::default() }
}

/// A program: each step is made from its own seed, so that steps can be left out one by one.
fn run(page_size: PageSize, steps: &[u64], ids: u64, check_every: usize) {
    let mut pair = Pair::new(limits(page_size));
    let mut last = Random::new(0);
    for (i, &seed) in steps.iter().enumerate() {
        last = Random::new(seed);
        step(&mut pair, &mut last, ids);
        if i % check_every == 0 {
            pair.check(&mut last);
        }
    }
    pair.check(&mut last);
    pair.finish(&mut last);
}

fn steps(most: usize) -> impl Strategy<Value = Vec<u64>> {
    proptest::collection::vec(any::<u64>().no_shrink(), 1..if cfg!(miri) { 20 } else { most })
}

fn page_size() -> impl Strategy<Value = PageSize> {
    prop_oneof![Just(PageSize::K4), Just(PageSize::K4), Just(PageSize::K16), Just(PageSize::K64)]
}

proptest! {
    #![proptest_config(proptest_config(2500))]

    #[test]
    fn small_maps(page_size in page_size(), steps in steps(60)) {
        run(page_size, &steps, 12, 1);
    }
}

proptest! {
    #![proptest_config(proptest_config(150))]

    #[test]
    fn maps_of_some_hundred_slots(page_size in page_size(), steps in steps(800)) {
        run(page_size, &steps, 300, 9);
    }
}

/// Slot `i` of a map without holes: four pages behind slot `i - 1`, in the guest and in the host.
fn brick(i: u32) -> SlotSpec {
    let first = u64::from(i) * 4;
    SlotSpec {
        address_space: AddressSpaceId::NORMAL,
        id: SlotId::new(i),
        gfns: range(first, 4).unwrap(),
        backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000 + first * 4096) },
        flags: SlotFlags::empty(),
    }
}

/// Filled in random order until no hole is left, shaken, and emptied in random order: deep trees that split and
/// merge their nodes.
#[test]
#[cfg_attr(miri, ignore = "too long for Miri")]
fn a_map_of_thousands_of_slots() {
    for mut random in programs(2) {
        let mut pair = Pair::new(limits(PageSize::K4));
        let mut bricks: Vec<Op> = (0..5000).map(|i| Op::Create(brick(i))).collect();
        shuffle(&mut bricks, &mut random);
        while !bricks.is_empty() {
            let count = if random.once_in(4) { random.below(200) } else { 1 };
            let rest = bricks.len().saturating_sub(usize::try_from(count).unwrap());
            assert!(pair.step(&bricks.split_off(rest), false));
        }
        pair.check(&mut random);
        for i in 0..8000 {
            step(&mut pair, &mut random, 6000);
            if i % 800 == 0 {
                pair.check(&mut random);
            }
        }
        let most = pair.model.slots.len();
        assert!(most > 3000, "{most} slots");
        let mut keys: Vec<_> = pair.model.slots.keys().copied().collect();
        shuffle(&mut keys, &mut random);
        for (i, &(space, id)) in keys.iter().enumerate() {
            assert!(pair.step(&[Op::Delete(space, id)], false));
            if i % 800 == 0 || keys.len() - i < 20 {
                pair.check(&mut random);
            }
        }
        pair.finish(&mut random);
    }
}

fn shuffle<T>(items: &mut [T], random: &mut Random) {
    for i in (1..items.len()).rev() {
        items.swap(i, random.index(i + 1));
    }
}
