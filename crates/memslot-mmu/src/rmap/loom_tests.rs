//! Interleavings of one writer with walkers, all of them (up to a bound of preemptions).
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p memslot-mmu --release --lib loom_rmap`. Descriptors have two cells here,
//! so that few entries make up a chain.

use std::collections::HashMap;

use loom::thread;

use super::*;

type Entry = NonZeroU64;

fn entry(number: u64) -> Entry {
    NonZeroU64::new(number << 3).unwrap()
}

/// A list and its writer, with the records of what is in it.
struct Side {
    writer: Writer<Entry>,
    cache: Cache,
    parents: std::sync::Arc<Parents<Entry>>,
    records: HashMap<u64, Filed>,
}

impl Side {
    fn new(rmap: &Rmap<Entry>, writer: Writer<Entry>) -> Self {
        let mut cache = rmap.cache();
        cache.reserve(6).unwrap();
        let parents = std::sync::Arc::new(rmap.parents().unwrap());
        Self { writer, cache, parents, records: HashMap::new() }
    }

    fn add(&mut self, number: u64) {
        let count = self.records.len();
        let keep = |entry: Entry, filed| _ = self.records.insert(entry.get() >> 3, filed);
        let before = self.writer.add(self.parents.list(), entry(number), &mut self.cache, keep).unwrap();
        assert_eq!(before, count);
    }

    fn remove(&mut self, number: u64) {
        let filed = self.records.remove(&number).unwrap();
        let left = self.records.len();
        let keep = |entry: Entry, filed| _ = self.records.insert(entry.get() >> 3, filed);
        assert_eq!(self.writer.remove(filed, entry(number), keep), Ok(left));
    }

    fn check(&self) {
        let record = |entry: Entry| self.records.get(&(entry.get() >> 3)).map(Filed::again);
        self.writer.check(self.parents.list(), record).unwrap();
    }
}

/// One walk: what was seen.
fn walk(walker: &mut Walker<Entry>, parents: &Parents<Entry>) -> Vec<u64> {
    walker.enter().entries(parents.list()).map(|entry| entry.get() >> 3).collect()
}

/// A walker walks twice beside a writer that runs `program` (positive: add, negative: remove) on a list that begins
/// with `start`. Entries that the program does not touch must be seen, and nothing that never was there.
fn beside(start: &'static [u64], program: &'static [i64]) {
    loom::model(move || {
        let (rmap, writer) = Rmap::new().unwrap();
        let mut side = Side::new(&rmap, writer);
        start.iter().for_each(|&number| side.add(number));
        let mut walker = rmap.walker().unwrap();
        let parents = side.parents.clone();
        let writing = thread::spawn(move || {
            for &step in program {
                if step > 0 { side.add(step.unsigned_abs()) } else { side.remove(step.unsigned_abs()) }
            }
            side.check();
            side
        });
        let touched = |number: &u64| program.iter().any(|step| step.unsigned_abs() == *number);
        for _ in 0..2 {
            let seen = walk(&mut walker, &parents);
            for number in start.iter().filter(|number| !touched(number)) {
                assert!(seen.contains(number), "{number} was there all the while: {seen:?}");
            }
            assert!(seen.iter().all(|number| start.contains(number) || touched(number)), "foreign: {seen:?}");
        }
        let side = writing.join().unwrap();
        let mut seen = walk(&mut walker, &parents);
        seen.sort_unstable();
        let mut there: Vec<_> = side.records.keys().copied().collect();
        there.sort_unstable();
        assert_eq!(seen, there, "each once, now that nobody writes");
    });
}

#[test]
fn loom_rmap_second_entry_and_back() {
    beside(&[1], &[2, -2, 3]);
}

#[test]
fn loom_rmap_the_first_of_two_goes() {
    beside(&[1, 2], &[-1, 3]);
}

#[test]
fn loom_rmap_a_descriptor_comes() {
    beside(&[1, 2], &[3, 4]);
}

#[test]
fn loom_rmap_a_descriptor_goes() {
    // 5 is in the first, 3 4 behind it, 1 2 in the last.
    beside(&[1, 2, 3, 4, 5], &[-5, -3, 6]);
}

#[test]
fn loom_rmap_two_descriptors_go() {
    beside(&[1, 2, 3, 4, 5], &[-5, -4, -3]);
}

#[test]
fn loom_rmap_entries_move_into_the_last_descriptor() {
    beside(&[1, 2, 3, 4, 5], &[-1, -2]);
}

#[test]
fn loom_rmap_an_entry_moves_twice() {
    // 5 moves to where 3 is, and from there to where 1 is.
    beside(&[1, 2, 3, 4, 5], &[-3, -4, -1]);
}

#[test]
fn loom_rmap_a_hole_is_filled() {
    // 3 moves into the hole; a walker that goes upwards misses it.
    beside(&[1, 2, 3], &[-1, 4]);
}

#[test]
fn loom_rmap_three_become_one_become_three() {
    beside(&[1, 2, 3], &[-1, -2, 4]);
}

/// The oldest leave together, from the end of the list, beside a walk and a count.
#[test]
fn loom_rmap_the_oldest_go() {
    for newest in [5, 1] {
        loom::model(move || {
            let (rmap, writer) = Rmap::new().unwrap();
            let mut side = Side::new(&rmap, writer);
            (1..=5).for_each(|number| side.add(number));
            let mut walker = rmap.walker().unwrap();
            let parents = side.parents.clone();
            let writing = thread::spawn(move || {
                let mut old = Vec::new();
                let list = side.parents.list();
                let gone = side.writer.recycle(list, 4, entry(newest), |entry| old.push(entry.get() >> 3));
                assert_eq!(gone, old.len());
                assert_eq!(old, if newest == 5 { vec![1, 2] } else { vec![5] });
                old.iter().for_each(|old| _ = side.records.remove(old).map(Filed::into_bits));
                side.check();
                // One of those that left is used again, if the walker is not inside.
                side.writer.reclaim(1);
                (6..=8).for_each(|number| side.add(number));
            });
            let seen = walk(&mut walker, &parents);
            let stay = if newest == 5 { 3..=5 } else { 1..=4 };
            assert!(stay.into_iter().all(|number| seen.contains(&number)), "{seen:?}");
            assert!(seen.iter().all(|number| (1..=8).contains(number)), "{seen:?}");
            assert!((3..=8).contains(&walker.enter().count(parents.list())));
            writing.join().unwrap();
        });
    }
}

/// Counts beside changes are those of some moment, also when another descriptor comes in front of the one that has the count.
#[test]
fn loom_rmap_count() {
    loom::model(|| {
        let (rmap, writer) = Rmap::new().unwrap();
        let mut side = Side::new(&rmap, writer);
        side.add(1);
        side.add(2);
        let mut walker = rmap.walker().unwrap();
        let parents = side.parents.clone();
        let writing = thread::spawn(move || {
            side.add(3);
            side.remove(3);
            side.remove(2);
            side.add(4);
        });
        for _ in 0..2 {
            let count = walker.enter().count(parents.list());
            assert!((1..=3).contains(&count), "{count}");
        }
        writing.join().unwrap();
        assert_eq!(walker.enter().count(parents.list()), 2);
    });
}

/// A descriptor that left one list comes into another: who walks the first sees nothing of the second.
#[test]
fn loom_rmap_nothing_foreign() {
    loom::model(|| {
        let (rmap, writer) = Rmap::new().unwrap();
        let mut side = Side::new(&rmap, writer);
        let other = rmap.parents().unwrap();
        side.add(1);
        side.add(2);
        let mut walker = rmap.walker().unwrap();
        let parents = side.parents.clone();
        let writing = thread::spawn(move || {
            side.remove(2);
            side.writer.reclaim(1);
            for number in [11, 12, 13] {
                let _ = side.writer.add(other.list(), entry(number), &mut side.cache, |_, _| ()).unwrap();
            }
            assert_eq!(side.writer.count(other.list()), 3);
        });
        let seen = walk(&mut walker, &parents);
        assert!(seen.contains(&1) && seen.iter().all(|number| [1, 2].contains(number)), "{seen:?}");
        writing.join().unwrap();
    });
}

/// What a descriptor had in its cells in another list is not seen when it is filled again.
#[test]
fn loom_rmap_a_descriptor_that_was_used() {
    loom::model(|| {
        let (rmap, writer) = Rmap::new().unwrap();
        let mut side = Side::new(&rmap, writer);
        side.add(11);
        side.add(12);
        // It comes out of use with 1 and 2 in its cells, and into use again in front of the list of 11.
        let (other, mut filed) = (rmap.parents().unwrap(), None);
        for number in [1, 2] {
            let keep = |_, place| filed = Some(place);
            let _ = side.writer.add(other.list(), entry(number), &mut side.cache, keep).unwrap();
        }
        assert_eq!(side.writer.remove(filed.unwrap(), entry(2), |_, _| ()), Ok(1));
        assert!(side.writer.reclaim(1));
        let mut walker = rmap.walker().unwrap();
        let parents = side.parents.clone();
        let writing = thread::spawn(move || {
            for number in [13, 14] {
                side.add(number);
            }
        });
        for _ in 0..2 {
            let seen = walk(&mut walker, &parents);
            assert!(
                seen.contains(&11)
                    && seen.contains(&12)
                    && seen.iter().all(|number| (11..15).contains(number)),
                "{seen:?}"
            );
        }
        writing.join().unwrap();
    });
}

/// What an entry refers to is freed when the walkers have left that were inside when it was removed.
#[test]
fn loom_rmap_two_walkers() {
    loom::model(|| {
        let (rmap, writer) = Rmap::new().unwrap();
        let mut side = Side::new(&rmap, writer);
        side.add(1);
        side.add(2);
        let walkers: Vec<_> = (0..2)
            .map(|_| {
                let (mut walker, parents) = (rmap.walker().unwrap(), side.parents.clone());
                thread::spawn(move || assert!(walk(&mut walker, &parents).contains(&1)))
            })
            .collect();
        side.remove(2);
        side.add(3);
        walkers.into_iter().for_each(|walker| walker.join().unwrap());
    });
}

/// Two threads add and remove in turns, under a lock, while a third walks.
#[test]
fn loom_rmap_writers_take_turns() {
    loom::model(|| {
        let (rmap, writer) = Rmap::new().unwrap();
        let mut side = Side::new(&rmap, writer);
        side.add(1);
        let (mut walker, parents) = (rmap.walker().unwrap(), side.parents.clone());
        let side = loom::sync::Arc::new(loom::sync::Mutex::new(side));
        let other = side.clone();
        let writing = thread::spawn(move || {
            other.lock().unwrap().add(2);
            other.lock().unwrap().remove(2);
        });
        let walking = thread::spawn(move || assert!(walk(&mut walker, &parents).contains(&1)));
        side.lock().unwrap().add(3);
        writing.join().unwrap();
        walking.join().unwrap();
        let side = side.lock().unwrap();
        assert_eq!(side.writer.count(side.parents.list()), 2);
    });
}

/// Two threads make room for the same list, and for its neighbour.
#[test]
fn loom_rmap_first_use() {
    loom::model(|| {
        let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
        let gfns = GfnRange::with_len(Gfn::new(5), 4).unwrap();
        let slot = std::sync::Arc::new(rmap.slot(gfns, Level::K4).unwrap());
        let other = slot.clone();
        let number = |slot: &SlotRmap<Entry>| slot.reserve(Level::K4, Gfn::new(6)).unwrap().number_and_home();
        let reserving = thread::spawn(move || number(&other));
        assert_eq!(number(&slot), reserving.join().unwrap());
        let (mut cache, mut record) = (rmap.cache(), None);
        let list = slot.list(Level::K4, Gfn::new(6)).unwrap();
        writer.add(list, entry(1), &mut cache, |_, filed| record = Some(filed)).unwrap();
        let filed = record.unwrap();
        assert_eq!(writer.filed_under(&filed), Some(Under::Gfn { gfn: Gfn::new(6), level: Level::K4 }));
        drop(slot);
        assert!(writer.reclaim(9));
        assert!(matches!(
            writer.remove(filed, entry(1), |_, _| ()),
            Err(RmapError::NotFiled { under: None, .. })
        ));
    });
}

fn frames(first: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(first), Gfn::new(end)).unwrap()
}

/// A slot is split and what was split is merged, while somebody walks one of its lists through the slot that it was.
#[test]
fn loom_rmap_slots_change_beside_a_walk() {
    loom::model(|| {
        let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
        let (space, mut cache, mut walker) = (rmap.space().unwrap(), rmap.cache(), rmap.walker().unwrap());
        cache.reserve(2).unwrap();
        let old = std::sync::Arc::new(space.slot(frames(0, 4), Level::K4).unwrap());
        let gfn = Gfn::new(1);
        let mut record = None;
        let list = old.reserve(Level::K4, gfn).unwrap();
        writer.add(list, entry(1), &mut cache, |_, filed| record = Some(filed)).unwrap();
        let held = old.clone();
        let walking = thread::spawn(move || {
            let inside = walker.enter();
            let list = held.list(Level::K4, gfn).unwrap();
            let seen: Vec<u64> = inside.entries(list).map(|entry| entry.get() >> 3).collect();
            assert!(seen.contains(&1) && seen.iter().all(|number| [1, 2].contains(number)), "{seen:?}");
        });
        let [low, high] =
            [(0, 1), (1, 4)].map(|(first, end)| space.slot(frames(first, end), Level::K4).unwrap());
        drop(old);
        writer.add(high.list(Level::K4, gfn).unwrap(), entry(2), &mut cache, |_, _| ()).unwrap();
        let whole = space.slot(frames(0, 4), Level::K4).unwrap();
        drop((low, high));
        writer.reclaim(9);
        walking.join().unwrap();
        assert_eq!(writer.count(whole.list(Level::K4, gfn).unwrap()), 2);
        assert_eq!(writer.remove(record.unwrap(), entry(1), |_, _| ()), Ok(1));
        drop(whole);
        writer.reclaim(9);
    });
}

/// Room for a list is made through a slot that is being replaced: the new one has it.
#[test]
fn loom_rmap_room_is_made_beside_a_new_slot() {
    loom::model(|| {
        let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
        let space = rmap.space().unwrap();
        let old = space.slot(frames(0, 4), Level::K4).unwrap();
        let gfn = Gfn::new(1);
        let reserving = thread::spawn(move || {
            let list = old.reserve(Level::K4, gfn).unwrap();
            (list.number_and_home().0, old)
        });
        let new = space.slot(frames(1, 4), Level::K4).unwrap();
        let own = new.reserve(Level::K4, gfn).unwrap().number_and_home().0;
        let (number, old) = reserving.join().unwrap();
        assert_eq!(number, own, "one list for each frame");
        drop(old);
        writer.reclaim(9);
        let list = new.list(Level::K4, gfn).unwrap();
        assert_eq!(list.number_and_home().0, number);
    });
}
