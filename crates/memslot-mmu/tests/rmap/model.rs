//! Random programs, each step compared with lists that are plain vectors.

use memslot::{Gfn, GfnRange};
use memslot_mmu::Level;
use memslot_mmu::rmap::{Filed, List, Parents, Rmap, RmapEntry, RmapError, SlotRmap, Under, Walker, Writer};
use proptest::prelude::*;

use super::common::{Book, Entry, not_filed};

/// The slot: large pages at its ends are not all in it.
const SLOT: (u64, u64) = (0x3f0, 0xa10);
/// The pages that programs map.
const PAGES: [(Level, u64); 6] = [
    (Level::K4, 0x3f0),
    (Level::K4, 0x3ff),
    (Level::K4, 0x400),
    (Level::K4, 0xdff),
    (Level::M2, 0x400),
    (Level::M2, 0xa00),
];
/// And so many shadow pages.
const PARENTS: usize = 2;
const LISTS: usize = PAGES.len() + PARENTS;

#[derive(Clone, Debug)]
enum Step {
    Add {
        list: usize,
    },
    AddMany {
        list: usize,
        count: usize,
    },
    /// The entry at this place of the model's vector.
    Remove {
        list: usize,
        place: usize,
    },
    RemoveMany {
        list: usize,
        place: usize,
        count: usize,
    },
    /// With a record that was used already.
    RemoveAgain {
        place: usize,
    },
    /// With the record of another entry.
    RemoveWrong {
        list: usize,
        place: usize,
    },
    /// With any word.
    RemoveAny {
        list: usize,
        place: usize,
        bits: u64,
    },
    Recycle {
        list: usize,
        limit: usize,
        newest: usize,
    },
    /// A walker comes, or goes.
    Enter,
    /// The slot goes, and comes again.
    Slot,
    Reclaim,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Some programs use few lists, which get long.
    (1..=LISTS).prop_flat_map(|lists| {
        let (list, place) = (0..lists, any::<usize>());
        let step = prop_oneof![
            8 => list.clone().prop_map(|list| Step::Add { list }),
            2 => (list.clone(), 0..60usize).prop_map(|(list, count)| Step::AddMany { list, count }),
            8 => (list.clone(), place).prop_map(|(list, place)| Step::Remove { list, place }),
            2 => (list.clone(), place, 0..60usize)
                .prop_map(|(list, place, count)| Step::RemoveMany { list, place, count }),
            1 => place.prop_map(|place| Step::RemoveAgain { place }),
            1 => (list.clone(), place).prop_map(|(list, place)| Step::RemoveWrong { list, place }),
            1 => (list.clone(), place, any::<u64>(), any::<bool>()).prop_map(|(list, place, bits, small)| {
                // Often one that could be a record.
                let bits = if small { bits & 0x7_0000_00ff } else { bits };
                Step::RemoveAny { list, place, bits }
            }),
            4 => (list, 0..40usize, place)
                .prop_map(|(list, limit, newest)| Step::Recycle { list, limit, newest }),
            2 => Just(Step::Enter),
            1 => Just(Step::Slot),
            1 => Just(Step::Reclaim),
        ];
        proptest::collection::vec(step, 1..120)
    })
}

struct World {
    rmap: Rmap<Entry>,
    writer: Writer<Entry>,
    slot: SlotRmap<Entry>,
    parents: Vec<Parents<Entry>>,
    book: Book,
    model: Vec<Vec<Entry>>,
    used: Vec<(Entry, u64)>,
    next: u32,
}

fn slot(rmap: &Rmap<Entry>) -> SlotRmap<Entry> {
    rmap.slot(GfnRange::with_len(Gfn::new(SLOT.0), SLOT.1).unwrap(), Level::G1).unwrap()
}

fn list_of<'a>(
    slot: &'a SlotRmap<Entry>,
    parents: &'a [Parents<Entry>],
    list: usize,
) -> Option<List<'a, Entry>> {
    match PAGES.get(list) {
        Some(&(level, gfn)) => slot.list(level, Gfn::new(gfn)),
        None => Some(parents[list - PAGES.len()].list()),
    }
}

impl World {
    fn new(counters: u64) -> Self {
        let (rmap, writer) = Rmap::starting_at(counters).unwrap();
        let slot = slot(&rmap);
        let parents = (0..PARENTS).map(|_| rmap.parents().unwrap()).collect();
        let (book, model) = (Book::default(), vec![Vec::new(); LISTS]);
        Self { rmap, writer, slot, parents, book, model, used: Vec::new(), next: 0 }
    }

    fn under(list: usize) -> Under {
        match PAGES.get(list) {
            Some(&(level, gfn)) => Under::Gfn { gfn: Gfn::new(gfn), level },
            None => Under::Parents,
        }
    }

    fn add(&mut self, list: usize) {
        let mut cache = self.rmap.cache();
        let place = match PAGES.get(list) {
            // Any frame of the page will do.
            Some(&(level, gfn)) => {
                self.slot.reserve(level, Gfn::new(gfn + u64::from(self.next) % level.pages())).unwrap()
            }
            None => self.parents[list - PAGES.len()].list(),
        };
        let entry = Entry { list: list as u32, number: self.next };
        self.next += 1;
        let before = self.model[list].len();
        let mut result = self.writer.add(place, entry, &mut cache, self.book.keep());
        if result == Err(RmapError::NotReserved) {
            assert!(before == 1 || before > 0 && before % 14 == 0, "a descriptor for entry {before}");
            assert_eq!(self.writer.count(place), before);
            cache.reserve(1).unwrap();
            result = self.writer.add(place, entry, &mut cache, self.book.keep());
        }
        assert_eq!(result, Ok(before));
        self.model[list].push(entry);
    }

    fn remove(&mut self, list: usize, place: usize) {
        if self.model[list].is_empty() {
            return;
        }
        let place = place % self.model[list].len();
        let entry = self.model[list].swap_remove(place);
        let filed = self.book.take(entry).unwrap();
        self.used.push((entry, Filed::from_bits(filed.into_bits()).unwrap().into_bits()));
        let filed = Filed::from_bits(self.used.last().unwrap().1).unwrap();
        let left = self.writer.remove(filed, entry, self.book.keep());
        assert_eq!(left, Ok(self.model[list].len()));
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Add { list } => self.add(list),
            Step::AddMany { list, count } => (0..count).for_each(|_| self.add(list)),
            Step::Remove { list, place } => self.remove(list, place),
            Step::RemoveMany { list, place, count } => {
                (0..count).for_each(|round| self.remove(list, place.wrapping_mul(round + 1)));
            }
            Step::RemoveAgain { place } => {
                if self.used.is_empty() {
                    return;
                }
                let (entry, bits) = self.used[place % self.used.len()];
                let filed = Filed::from_bits(bits).unwrap();
                let under = self.writer.filed_under(&filed);
                assert_eq!(self.writer.remove(filed, entry, self.book.keep()), Err(not_filed(entry, under)));
            }
            Step::RemoveWrong { list, place } => {
                let Some(&entry) = self.model[list].get(place % self.model[list].len().max(1)) else {
                    return;
                };
                let other = Entry { list: entry.list, number: u32::MAX };
                let filed = self.book.look(entry).unwrap();
                let wrong = not_filed(other, Some(Self::under(list)));
                assert_eq!(self.writer.remove(filed, other, self.book.keep()), Err(wrong));
            }
            Step::RemoveAny { list, place, bits } => {
                let Some(&entry) = self.model[list].get(place % self.model[list].len().max(1)) else {
                    return;
                };
                let (Some(filed), Some(right)) = (Filed::from_bits(bits), self.book.look(entry)) else {
                    return;
                };
                // A guess may be right in all that counts: an entry that is in the word, or in the first cell of the first
                // descriptor, is found by its list.
                let right_list = filed.into_bits() >> 32 == right.into_bits() >> 32;
                let is_first = list_of(&self.slot, &self.parents, list)
                    .is_some_and(|list| self.writer.is_first(list, entry));
                let filed = Filed::from_bits(bits).unwrap();
                if right_list && is_first || bits == self.book.look(entry).unwrap().into_bits() {
                    return;
                }
                assert!(self.writer.remove(filed, entry, self.book.keep()).is_err());
            }
            Step::Recycle { list, limit, newest } => {
                let Some(place) = list_of(&self.slot, &self.parents, list) else { return };
                let before = self.model[list].len();
                // Most of the time that which came last, as it is meant.
                let newest = self.model[list].get(newest % (2 * before).max(1)).or(self.model[list].last());
                let newest = newest.copied().unwrap_or(Entry { list: 0, number: 0 });
                let (book, model, used) = (&self.book, &mut self.model[list], &mut self.used);
                let gone = self.writer.recycle(place, limit, newest, |old| {
                    assert_ne!(old, newest);
                    let place = model.iter().position(|&other| other == old).unwrap();
                    model.swap_remove(place);
                    used.push((old, book.take(old).unwrap().into_bits()));
                });
                assert_eq!(gone, before - self.model[list].len());
                assert_eq!(gone == 0, before <= limit.max(1), "{before} entries, limit {limit}");
                assert!(gone <= 112);
            }
            Step::Enter => {}
            Step::Slot => {
                // Entries that are filed when their slot goes are forgotten; their records lead nowhere.
                let new = slot(&self.rmap);
                drop(std::mem::replace(&mut self.slot, new));
                for list in 0..PAGES.len() {
                    for entry in std::mem::take(&mut self.model[list]) {
                        self.used.push((entry, self.book.take(entry).unwrap().into_bits()));
                    }
                }
                // Without this, they would still be found: the writer does not know yet.
                self.writer.reclaim(1000);
            }
            Step::Reclaim => _ = self.writer.reclaim(3),
        }
    }

    fn list(&self, list: usize) -> Option<List<'_, Entry>> {
        list_of(&self.slot, &self.parents, list)
    }

    fn check(&self) {
        for list in 0..LISTS {
            match self.list(list) {
                Some(place) => self.book.check(&self.writer, place, &self.model[list], Self::under(list)),
                None => assert!(self.model[list].is_empty()),
            }
        }
        for level in [Level::K4, Level::M2] {
            for (start, len) in [(SLOT.0, SLOT.1), (0, u64::MAX), (0x3ff, 2), (0x500, 0x8ff), (0x3f0, 0)] {
                let range = GfnRange::with_len(Gfn::new(start), len).unwrap();
                let seen: Vec<_> = self.slot.lists(level, range).map(|(gfn, _)| gfn.get()).collect();
                let expected: Vec<_> = (0..PAGES.len())
                    .filter(|&list| PAGES[list].0 == level && !self.model[list].is_empty())
                    .map(|list| PAGES[list].1)
                    .filter(|&gfn| gfn < start + len && start < gfn + level.pages())
                    .collect();
                assert_eq!(seen, expected, "level {level}, {start:#x}+{len:#x}");
            }
        }
    }
}

fn run(steps: &[Step], counters: u64) {
    let mut world = World::new(counters);
    let mut walker: Walker<Entry> = world.rmap.walker().unwrap();
    let mut steps = steps.iter();
    // A walker is inside from one `Enter` to the next.
    loop {
        let mut more = false;
        for step in steps.by_ref() {
            if matches!(step, Step::Enter) {
                more = true;
                break;
            }
            world.step(step);
            world.check();
        }
        let inside = walker.enter();
        for step in steps.by_ref() {
            if matches!(step, Step::Enter) {
                more = true;
                break;
            }
            world.step(step);
            world.check();
            for list in 0..LISTS {
                let Some(place) = world.list(list) else { continue };
                let mut seen: Vec<_> = inside.entries(place).collect();
                seen.sort_unstable();
                assert_eq!(
                    seen,
                    world.model[list]
                        .iter()
                        .copied()
                        .collect::<std::collections::BTreeSet<_>>()
                        .into_iter()
                        .collect::<Vec<_>>()
                );
                assert_eq!(inside.count(place), seen.len());
            }
        }
        drop(inside);
        if !more {
            break;
        }
    }
}

proptest! {
    #![proptest_config(memslot_testing::proptest_config(256))]

    #[test]
    fn rmap_random_programs(steps in steps(), counters in prop_oneof![Just(0), Just(u64::MAX - 3), Just((1 << 63) - 3)]) {
        run(&steps, counters);
    }
}

/// Sizes around the ends of descriptors: up, and down in three orders.
#[test]
fn rmap_every_size_up_and_down() {
    for size in [0, 1, 2, 3, 13, 14, 15, 16, 27, 28, 29, 30, 1000, 1001] {
        for order in 0..3 {
            let mut world = World::new(0);
            for _ in 0..size {
                world.add(0);
            }
            world.check();
            for left in (0..size).rev() {
                world.remove(0, [0, left, left / 2][order]);
                if size < 50 || left % 97 == 0 {
                    world.check();
                }
            }
            world.check();
            assert!(world.list(0).is_none_or(|list| list.is_empty()));
        }
    }
}

/// After all is gone, nothing more is needed the next time.
#[test]
fn rmap_descriptors_are_used_again() {
    let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
    let (parents, book) = (rmap.parents().unwrap(), Book::default());
    let mut bytes = None;
    for round in 0..50 {
        let mut cache = rmap.cache();
        cache.reserve(80).unwrap();
        let entries: Vec<_> = (0..1000).map(|number| Entry { list: round, number }).collect();
        for &entry in &entries {
            book.add(&mut writer, parents.list(), entry, &mut cache);
        }
        entries.iter().for_each(|&entry| _ = book.remove(&mut writer, entry));
        assert!(writer.reclaim(0) || writer.reclaim(1));
        if round == 2 {
            bytes = Some(rmap.bytes());
        }
    }
    assert_eq!(bytes, Some(rmap.bytes()));
}

/// The same where a walker stays so long that hundreds of them wait for it.
#[test]
fn rmap_descriptors_are_used_again_after_long_walks() {
    const ENTRIES: u32 = 600 * 14;
    let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
    let (parents, book, mut walker) = (rmap.parents().unwrap(), Book::default(), rmap.walker().unwrap());
    let mut bytes = Vec::new();
    for _ in 0..6 {
        let inside = walker.enter();
        let mut cache = rmap.cache();
        cache.reserve(600).unwrap();
        for number in 0..ENTRIES {
            book.add(&mut writer, parents.list(), Entry { list: 0, number }, &mut cache);
        }
        (0..ENTRIES).for_each(|number| _ = book.remove(&mut writer, Entry { list: 0, number }));
        assert!(!writer.reclaim(1));
        drop(inside);
        assert!(writer.reclaim(1));
        bytes.push(rmap.bytes());
    }
    assert_eq!(bytes[0], bytes[5], "{bytes:?}");
}

#[test]
fn rmap_words_that_are_no_entries_are_refused() {
    use std::num::NonZeroU64;
    let (rmap, mut writer) = Rmap::<NonZeroU64>::new().unwrap();
    let (mut cache, parents) = (rmap.cache(), rmap.parents().unwrap());
    for word in [1, 2, 4, 7, 9, u64::MAX] {
        let entry = NonZeroU64::new(word).unwrap();
        let added = writer.add(parents.list(), entry, &mut cache, |_, _| unreachable!());
        assert_eq!(added, Err(RmapError::Entry { entry: word }));
    }
    assert!(parents.list().is_empty());
}

#[test]
fn rmap_lists_of_another_map_are_refused() {
    let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
    let (other, mut other_writer) = Rmap::<Entry>::new().unwrap();
    let (here, there) = (rmap.parents().unwrap(), other.parents().unwrap());
    let (mut cache, mut other_cache) = (rmap.cache(), other.cache());
    cache.reserve(1).unwrap();
    other_cache.reserve(1).unwrap();
    let entry = |number| Entry { list: 0, number };
    assert_eq!(writer.add(there.list(), entry(1), &mut cache, |_, _| ()), Err(RmapError::Foreign));
    assert_eq!(writer.add(here.list(), entry(1), &mut other_cache, |_, _| ()), Ok(0));
    assert_eq!(writer.add(here.list(), entry(2), &mut other_cache, |_, _| ()), Err(RmapError::Foreign));
    assert_eq!(other_writer.add(there.list(), entry(1), &mut other_cache, |_, _| ()), Ok(0));
    assert_eq!(writer.count(here.list()), 1);
    assert!(RmapEntry::into_word(entry(0)).get() > 0);
}
