//! The lists that the slots of an address space have in common: slots are split, merged, grown, moved and dropped in every order, old ones
//! stay for a while, and every list is where it was.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memslot::{Gfn, GfnRange};
use memslot_mmu::Level;
use memslot_mmu::rmap::{Cache, Rmap, RmapError, SlotRmap, SpaceRmap, Under, Writer};
use proptest::prelude::*;

use super::common::{Book, Entry};

const LEVELS: [Level; 3] = [Level::K4, Level::M2, Level::G1];
/// Frames on both sides of a border between directories, and of one of 2 MiB.
const FIRST: u64 = (1 << 18) - 0x300;
const END: u64 = (1 << 18) + 0x500;

fn range(first: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(first), Gfn::new(end)).unwrap()
}

/// What a page's list is called: its level, and its number there.
type Key = (Level, u64);

fn key(level: Level, gfn: u64) -> Key {
    (level, gfn / level.pages())
}

fn frames((level, number): Key) -> GfnRange {
    range(number * level.pages(), (number + 1) * level.pages())
}

struct Model {
    rmap: Rmap<Entry>,
    writer: Writer<Entry>,
    cache: Cache,
    space: SpaceRmap<Entry>,
    book: Book,
    /// The slots as they are, disjoint, by their first frame.
    slots: BTreeMap<u64, SlotRmap<Entry>>,
    /// Slots that were, which somebody holds.
    old: Vec<SlotRmap<Entry>>,
    entries: BTreeMap<Key, BTreeSet<Entry>>,
    next: u32,
}

impl Model {
    fn new() -> Self {
        let (rmap, writer) = Rmap::new().unwrap();
        let (cache, space) = (rmap.cache(), rmap.space().unwrap());
        let (book, slots, entries) = (Book::default(), BTreeMap::new(), BTreeMap::new());
        Self { rmap, writer, cache, space, book, slots, old: vec![], entries, next: 0 }
    }

    /// The slots between have other borders from now on: `borders` are the first frames and the last one's end.
    fn replace(&mut self, borders: &[u64], keeps_old: bool) {
        let (first, end) = (borders[0], *borders.last().unwrap());
        let gone: Vec<_> = self.slots.range(first..end).map(|(base, _)| *base).collect();
        // Those of large pages that a border cuts are removed before, as entries of what goes are.
        for &border in borders {
            self.remove_where(|key| {
                frames(key).contains(Gfn::new(border)) && frames(key).start() < Gfn::new(border)
            });
        }
        let new: Vec<_> = borders
            .windows(2)
            .map(|pair| (pair[0], self.space.slot(range(pair[0], pair[1]), Level::G1).unwrap()))
            .collect();
        for base in gone {
            let old = self.slots.remove(&base).unwrap();
            if keeps_old {
                self.old.push(old);
            }
        }
        self.slots.extend(new);
    }

    fn remove_where(&mut self, condition: impl Fn(Key) -> bool) {
        let keys: Vec<_> = self.entries.keys().copied().filter(|key| condition(*key)).collect();
        for key in keys {
            for entry in self.entries.remove(&key).unwrap() {
                self.book.remove(&mut self.writer, entry);
            }
        }
    }

    fn slot_at(&self, gfn: u64) -> Option<&SlotRmap<Entry>> {
        let (_, slot) = self.slots.range(..=gfn).next_back()?;
        slot.gfns().contains(Gfn::new(gfn)).then_some(slot)
    }

    fn add(&mut self, level: Level, gfn: u64) {
        self.cache.reserve(1).unwrap();
        let Some(slot) = self.slots.range(..=gfn).next_back().map(|(_, slot)| slot) else { return };
        let Ok(list) = slot.reserve(level, Gfn::new(gfn)) else { return };
        let entry = Entry { list: level.get().into(), number: self.next };
        self.next += 1;
        self.book.add(&mut self.writer, list, entry, &mut self.cache);
        self.entries.entry(key(level, gfn)).or_default().insert(entry);
    }

    fn step(&mut self, [what, a, b, c]: [u16; 4]) {
        let gfn = FIRST + u64::from(a) % (END - FIRST);
        let level = LEVELS[usize::from(c % 8).saturating_sub(5)];
        let keeps_old = b % 3 == 0;
        match what % 16 {
            0..7 => (0..1 + b % 20).for_each(|_| self.add(level, gfn)),
            7..9 => {
                let first = self.entries.iter().nth(usize::from(b) % self.entries.len().max(1));
                if let Some((&key, entries)) = first {
                    let entry = *entries.first().unwrap();
                    self.book.remove(&mut self.writer, entry);
                    let entries = self.entries.get_mut(&key).unwrap();
                    entries.remove(&entry);
                    if entries.is_empty() {
                        self.entries.remove(&key);
                    }
                }
            }
            9..11 => {
                // Split.
                if let Some(gfns) = self.slot_at(gfn).map(SlotRmap::gfns) {
                    let (start, end) = (gfns.start().get(), gfns.end().get());
                    if start < gfn {
                        self.replace(&[start, gfn, end], keeps_old);
                    }
                }
            }
            11..13 => {
                // Merged with the next, or grown over the gap there, or to the end.
                if let Some(gfns) = self.slot_at(gfn).map(SlotRmap::gfns) {
                    let (start, end) = (gfns.start().get(), gfns.end().get());
                    let next = self.slots.range(end..).next();
                    let new_end = match next {
                        Some((&base, slot)) if base == end => slot.gfns().end().get(),
                        Some((&base, _)) => base,
                        None => END,
                    };
                    if new_end > end {
                        self.replace(&[start, new_end], keeps_old);
                    }
                }
            }
            13 => {
                // Deleted, after its entries.
                if let Some(gfns) = self.slot_at(gfn).map(SlotRmap::gfns) {
                    self.remove_where(|key| frames(key).overlaps(&gfns));
                    let slot = self.slots.remove(&gfns.start().get()).unwrap();
                    if keeps_old {
                        self.old.push(slot);
                    }
                }
            }
            14 => {
                // Created, in a gap.
                let end = self.slots.range(gfn..).next().map_or(END, |(base, _)| *base);
                if self.slot_at(gfn).is_none() && gfn < end {
                    let end = end.min(gfn + 1 + u64::from(b));
                    let slot = self.space.slot(range(gfn, end), Level::G1).unwrap();
                    self.slots.insert(gfn, slot);
                }
            }
            _ => {
                self.old.clear();
                self.writer.reclaim(usize::from(b % 4));
            }
        }
        self.check();
    }

    fn check(&self) {
        let mut found = BTreeMap::new();
        for slot in self.slots.values() {
            for level in LEVELS {
                for (gfn, list) in slot.lists(level, slot.gfns()) {
                    let expected: Vec<_> = self.entries[&key(level, gfn.get())].iter().copied().collect();
                    self.book.check(&self.writer, list, &expected, Under::Gfn { gfn, level });
                    assert!(found.insert(key(level, gfn.get()), ()).is_none(), "{gfn} is in two slots");
                }
            }
        }
        assert!(
            found.keys().eq(self.entries.keys()),
            "{:?} instead of {:?}",
            found.keys(),
            self.entries.keys()
        );
        // Whoever holds a slot that is gone sees the same.
        for slot in &self.old {
            for level in LEVELS {
                for (gfn, list) in slot.lists(level, slot.gfns()) {
                    let expected = &self.entries[&key(level, gfn.get())];
                    assert_eq!(self.writer.entries(list).collect::<BTreeSet<_>>(), *expected);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(memslot_testing::proptest_config(128))]

    #[test]
    fn rmap_slots_take_the_place_of_each_other(
        program in prop::collection::vec(any::<[u16; 4]>(), 1..120)
    ) {
        let mut model = Model::new();
        // Room for numbers of chunks.
        let use_one = |model: &mut Model| {
            let slot = model.space.slot(range(FIRST, END), Level::G1).unwrap();
            let _ = slot.reserve(Level::K4, Gfn::new(FIRST)).unwrap();
            drop(slot);
            while !model.writer.reclaim(100) {}
        };
        use_one(&mut model);
        model.slots.insert(FIRST, model.space.slot(range(FIRST, END), Level::G1).unwrap());
        program.into_iter().for_each(|step| model.step(step));
        model.remove_where(|_| true);
        model.slots.clear();
        model.old.clear();
        while !model.writer.reclaim(100) {}
        let bytes = model.rmap.bytes();
        use_one(&mut model);
        prop_assert_eq!(model.rmap.bytes(), bytes);
    }
}

/// A chunk is there as long as any slot has a part of it, and no longer.
#[test]
fn rmap_a_chunk_goes_with_the_last_slot_that_has_a_part_of_it() {
    let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
    let space = rmap.space().unwrap();
    let slots =
        [(0, 10), (10, 0x280), (0x280, 0x300)].map(|(a, b)| space.slot(range(a, b), Level::K4).unwrap());
    let _ = slots[0].reserve(Level::K4, Gfn::new(5)).unwrap();
    let one = rmap.bytes();
    let _ = slots[1].reserve(Level::K4, Gfn::new(0x200)).unwrap();
    let chunk = rmap.bytes() - one;
    assert!(slots[1].list(Level::K4, Gfn::new(11)).is_some(), "the first chunk is theirs in common");
    assert!(slots[2].list(Level::K4, Gfn::new(0x281)).is_some(), "and so is the second");
    assert!(slots[2].list(Level::K4, Gfn::new(0x27f)).is_none(), "but not each other's lists");
    let [first, second, third] = slots;
    drop(first);
    while !writer.reclaim(10) {}
    assert_eq!(rmap.bytes(), one + chunk);
    drop(second);
    while !writer.reclaim(10) {}
    assert_eq!(rmap.bytes(), one, "the first chunk has gone");
    assert!(third.list(Level::K4, Gfn::new(0x281)).is_some());
    drop(third);
    while !writer.reclaim(10) {}
    assert!(rmap.bytes() < one - chunk + 1);
}

/// Two address spaces have nothing in common.
#[test]
fn rmap_each_space_has_its_own_lists() {
    let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
    let slots = [(); 2].map(|()| rmap.space().unwrap().slot(range(0, 10), Level::K4).unwrap());
    let (book, mut cache, entry) = (Book::default(), rmap.cache(), Entry { list: 0, number: 0 });
    book.add(&mut writer, slots[0].reserve(Level::K4, Gfn::new(5)).unwrap(), entry, &mut cache);
    assert!(slots[1].list(Level::K4, Gfn::new(5)).is_none());
    assert!(slots[1].reserve(Level::K4, Gfn::new(5)).unwrap().is_empty());
    assert_eq!(
        slots[1]
            .reserve(Level::M2, Gfn::new(5))
            .err()
            .map(|error| matches!(error, RmapError::Outside { .. })),
        Some(true)
    );
}

/// Walks beside slots that take the place of each other: entries that stay are seen in every walk, whichever slot it goes through.
#[test]
fn rmap_stress_walks_beside_slots_that_change() {
    let rounds = if cfg!(miri) { 20 } else { 20_000 };
    let (rmap, mut writer) = Rmap::<Entry>::new().unwrap();
    let space = rmap.space().unwrap();
    let (book, mut cache) = (Book::default(), rmap.cache());
    let whole = || space.slot(range(0, 0x400), Level::K4).unwrap();
    let current = Mutex::new(std::sync::Arc::new(whole()));
    let gfn = Gfn::new(0x155);
    cache.reserve(64).unwrap();
    let list = whole();
    for number in 0..5 {
        let list = list.reserve(Level::K4, gfn).unwrap();
        book.add(&mut writer, list, Entry { list: 1, number }, &mut cache);
    }
    drop(list);
    let (is_over, walks) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut walker = rmap.walker().unwrap();
                while !is_over.load(Ordering::Relaxed) {
                    let slot = current.lock().unwrap().clone();
                    // It may be gone by now.
                    for _ in 0..3 {
                        let inside = walker.enter();
                        let list = slot.list(Level::K4, gfn).unwrap();
                        let seen: BTreeSet<u32> = inside.entries(list).map(|entry| entry.number).collect();
                        assert!((0..5).all(|number| seen.contains(&number)), "{seen:?}");
                        assert!(seen.iter().all(|number| *number < 5 || *number >= 100), "{seen:?}");
                    }
                    walks.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut round = 0;
        while round < rounds || walks.load(Ordering::Relaxed) < 3 {
            round += 1;
            let at = 1 + round % 0x3fe;
            let halves = [range(0, at), range(at, 0x400)].map(|gfns| space.slot(gfns, Level::K4).unwrap());
            let [low, high] = halves.map(std::sync::Arc::new);
            let has = if gfn.get() < at { low.clone() } else { high.clone() };
            *current.lock().unwrap() = has.clone();
            let entry = Entry { list: 1, number: 100 + u32::try_from(round % 7).unwrap() };
            cache.reserve(8).unwrap();
            book.add(&mut writer, has.list(Level::K4, gfn).unwrap(), entry, &mut cache);
            drop((low, high, has));
            *current.lock().unwrap() = std::sync::Arc::new(whole());
            book.remove(&mut writer, entry);
            writer.reclaim(1);
        }
        is_over.store(true, Ordering::Relaxed);
    });
}
