//! The set of slots of a shadow page beside a set of numbers.

use std::collections::BTreeSet;

use memslot::SlotId;
use memslot_mmu::shadow::{SlotSet, SlotSetCache};
use memslot_testing::proptest_config;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Insert(u32),
    Remove(u32),
    /// Takes out the id that was added so many before.
    RemoveOld(usize),
    TopUp(usize),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    // Few groups, many groups, and the last that there are.
    let id = || prop_oneof![6 => 0u32..200, 4 => 0u32..32764, 1 => u32::MAX - 200..=u32::MAX];
    prop_oneof![
        60 => id().prop_map(Step::Insert),
        10 => id().prop_map(Step::Remove),
        30 => (0usize..64).prop_map(Step::RemoveOld),
        10 => (0usize..3).prop_map(Step::TopUp),
        1 => Just(Step::Clear),
    ]
}

fn groups(model: &BTreeSet<u32>) -> usize {
    model.iter().map(|id| id / 64).collect::<BTreeSet<_>>().len()
}

fn ids(set: &SlotSet) -> BTreeSet<u32> {
    let listed: Vec<u32> = set.iter().map(SlotId::get).collect();
    let ids: BTreeSet<u32> = listed.iter().copied().collect();
    assert_eq!(ids.len(), listed.len(), "an id is listed twice");
    ids
}

fn run(steps: &[Step]) -> Result<(), TestCaseError> {
    // Two sets, which grow at different times, share a cache.
    let mut cache = SlotSetCache::default();
    let mut sets = [SlotSet::default(), SlotSet::default()];
    let mut models = [BTreeSet::new(), BTreeSet::new()];
    let mut added = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        let which = number / 16 % 2;
        let (set, model) = (&mut sets[which], &mut models[which]);
        match *step {
            Step::Insert(id) => {
                let (before, had) = (groups(model), cache.len());
                match set.insert(SlotId::new(id), &mut cache) {
                    Ok(is_new) => {
                        prop_assert_eq!(is_new, model.insert(id));
                        added.push(id);
                    }
                    Err(_) => {
                        prop_assert!(cache.is_empty());
                        prop_assert!(before >= 1 && !model.iter().any(|other| other / 64 == id / 64));
                    }
                }
                prop_assert!(had - cache.len() <= usize::from(groups(model) > before));
            }
            Step::Remove(id) => prop_assert_eq!(set.remove(SlotId::new(id), &mut cache), model.remove(&id)),
            Step::RemoveOld(back) => {
                if let Some(&id) = added.iter().rev().nth(back) {
                    prop_assert_eq!(set.remove(SlotId::new(id), &mut cache), model.remove(&id));
                }
            }
            Step::TopUp(ids) => {
                cache.top_up(ids).unwrap();
                prop_assert!(cache.len() >= ids);
            }
            Step::Clear => {
                set.clear(&mut cache);
                model.clear();
            }
        }
        prop_assert_eq!(&ids(set), &*model);
        prop_assert_eq!(set.is_empty(), model.is_empty());
        prop_assert_eq!(set.is_inline(), groups(model) <= 1);
        if let Step::Insert(id) | Step::Remove(id) = *step {
            for id in [id, id ^ 1, id ^ 64, id ^ 0x40_0000] {
                prop_assert_eq!(set.contains(SlotId::new(id)), model.contains(&id));
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(proptest_config(256))]

    #[test]
    fn random_steps(steps in prop::collection::vec(step(), 1..200)) {
        run(&steps)?;
    }
}

#[test]
fn one_group_needs_no_memory() {
    let mut cache = SlotSetCache::default();
    let mut set = SlotSet::default();
    for id in 32704..32764 {
        assert_eq!(set.insert(SlotId::new(id), &mut cache), Ok(true));
    }
    assert!(set.is_inline() && set.contains(SlotId::new(32763)) && !set.contains(SlotId::new(59)));
    assert!(set.insert(SlotId::new(0), &mut cache).is_err(), "that takes a node");
    assert_eq!(ids(&set), (32704..32764).collect(), "nothing has changed");
    assert!(size_of::<SlotSet>() <= 24);
}

/// A node has room for four groups, and the next one is taken when it is full.
#[test]
fn nodes_are_filled() {
    let (mut set, mut cache) = (SlotSet::default(), SlotSetCache::default());
    cache.top_up(1).unwrap();
    for group in 0..5 {
        assert_eq!(set.insert(SlotId::new(group * 64), &mut cache), Ok(true), "group {group}");
    }
    assert!(set.insert(SlotId::new(5 * 64), &mut cache).is_err(), "there was one node");
    assert_eq!(ids(&set).len(), 5);
    set.clear(&mut cache);
}

/// Every entry of a page maps another slot, all of them far apart; and all of it goes back.
#[test]
fn as_many_slots_as_entries() {
    let mut cache = SlotSetCache::default();
    let mut set = SlotSet::default();
    for id in 0..512 {
        cache.top_up(1).unwrap();
        assert_eq!(set.insert(SlotId::new(id * 64), &mut cache), Ok(true));
    }
    assert_eq!(ids(&set), (0..512).map(|id| id * 64).collect());
    for id in (0..512).rev() {
        assert!(set.remove(SlotId::new(id * 64), &mut cache));
        assert!(!set.remove(SlotId::new(id * 64), &mut cache));
    }
    assert!(set.is_empty() && set.is_inline());
    assert_eq!(cache.len(), SlotSetCache::CAPACITY, "the cache does not grow without end");
}
