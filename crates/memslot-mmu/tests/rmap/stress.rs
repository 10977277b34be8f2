//! Walks beside a writer that never stops, with real threads.
//!
//! `MEMSLOT_RMAP_CHECKS` says how many checks each run makes (`cargo xtask deep` makes hundreds of millions). A check
//! is one entry in one walk: it was there all the while and must be seen, or it was away all the while and must not be.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memslot_mmu::rmap::{Cache, List, Parents, Rmap, Walker, Writer};
use memslot_testing::{Random, number, seed};

use super::common::{Book, Entry};

// What an entry's state says, modulo 4. Each change adds 1.
const AWAY: u64 = 0;
const PRESENT: u64 = 2;

struct Lists {
    parents: Vec<Parents<Entry>>,
    /// For each list, each entry's state.
    states: Vec<Vec<AtomicU64>>,
}

impl Lists {
    fn state(&self, entry: Entry) -> &AtomicU64 {
        &self.states[entry.list as usize][entry.number as usize]
    }

    fn list(&self, list: usize) -> List<'_, Entry> {
        self.parents[list].list()
    }
}

/// The writer, with the records.
struct Changer<'a> {
    lists: &'a Lists,
    writer: Writer<Entry>,
    cache: Cache,
    book: Book,
    changes: u64,
}

impl Changer<'_> {
    /// Adds what is away, removes what is there.
    fn flip(&mut self, entry: Entry) {
        let state = self.lists.state(entry);
        let is_away = state.load(Ordering::Relaxed) % 4 == AWAY;
        state.fetch_add(1, Ordering::AcqRel);
        if is_away {
            self.cache.reserve(1).unwrap();
            let list = self.lists.list(entry.list as usize);
            self.book.add(&mut self.writer, list, entry, &mut self.cache);
        } else {
            self.book.remove(&mut self.writer, entry);
        }
        state.fetch_add(1, Ordering::AcqRel);
        self.changes += 1;
    }

    /// All entries of a list that are there, or away.
    fn flip_all(&mut self, list: usize, those: u64, but: Option<usize>) {
        for number in (0..self.lists.states[list].len()).filter(|&number| Some(number) != but) {
            let entry = Entry { list: list as u32, number: number as u32 };
            if self.lists.state(entry).load(Ordering::Relaxed) % 4 == those {
                self.flip(entry);
            }
        }
    }

    /// The same, all that are in one place at once.
    fn recycle(&mut self, list: usize, limit: usize, newest: Entry) {
        let (lists, mut old) = (self.lists, Vec::new());
        let place = lists.list(list);
        while self.writer.count(place) > limit {
            let gone = self.writer.recycle(place, limit, newest, |entry| {
                assert_eq!(lists.state(entry).fetch_add(1, Ordering::AcqRel) % 4, PRESENT);
                let _ = self.book.take(entry).unwrap();
                old.push(entry);
            });
            assert!(gone > 0 && gone == old.len() && !old.contains(&newest));
            for entry in old.drain(..) {
                lists.state(entry).fetch_add(1, Ordering::AcqRel);
                self.changes += 1;
            }
        }
    }
}

/// Adds what is away, removes what is there; now and then all of a list, or all but one, or the oldest.
fn write(lists: &Lists, writer: Writer<Entry>, cache: Cache, stop: &AtomicBool) -> u64 {
    let mut random = Random::new(seed());
    let mut changer = Changer { lists, writer, cache, book: Book::default(), changes: 0 };
    while !stop.load(Ordering::Relaxed) {
        let list = random.index(lists.states.len());
        let size = lists.states[list].len();
        let entry = Entry { list: list as u32, number: random.index(size) as u32 };
        match random.below(256) {
            0 => changer.flip_all(list, PRESENT, Some(entry.number as usize)),
            1 => changer.flip_all(list, PRESENT, None),
            2 => changer.flip_all(list, AWAY, None),
            3 => changer.recycle(list, 1 + size / 2, entry),
            _ => changer.flip(entry),
        }
    }
    changer.changes
}

/// Makes so many checks; how many were of entries that were there, and how many walks.
fn walk(lists: &Lists, mut walker: Walker<Entry>, wanted: u64) -> (u64, u64, u64) {
    let (mut random, mut checks, mut there, mut walks) = (Random::new(!seed()), 0, 0, 0);
    let largest = lists.states.iter().map(Vec::len).max().unwrap();
    let (mut before, mut seen) = (vec![0; largest], vec![0; largest]);
    while checks < wanted {
        let list = random.index(lists.states.len());
        let states = &lists.states[list];
        walks += 1;
        for (before, state) in before.iter_mut().zip(states) {
            *before = state.load(Ordering::SeqCst);
        }
        let inside = walker.enter();
        if walks % 2 == 0 {
            inside.entries(lists.list(list)).for_each(|entry| {
                assert_eq!(entry.list as usize, list, "foreign");
                seen[entry.number as usize] = walks;
            });
        } else {
            for entry in inside.entries(lists.list(list)) {
                assert_eq!(entry.list as usize, list, "foreign");
                seen[entry.number as usize] = walks;
            }
        }
        drop(inside);
        for (number, state) in states.iter().enumerate() {
            let (before, after) = (before[number], state.load(Ordering::SeqCst));
            if before != after {
                continue;
            }
            if before % 4 == PRESENT {
                assert_eq!(seen[number], walks, "list {list}: {number} was there all the while");
                there += 1;
                checks += 1;
            } else if before % 4 == AWAY {
                assert_ne!(seen[number], walks, "list {list}: {number} was away all the while");
                checks += 1;
            }
        }
    }
    (checks, there, walks)
}

fn stress(sizes: &[usize], share: u64) {
    let wanted: u64 = number("MEMSLOT_RMAP_CHECKS", if cfg!(miri) { 2_000 } else { 4_000_000 });
    let (rmap, writer) = Rmap::<Entry>::starting_at(u64::MAX - 10).unwrap();
    let lists = Lists {
        parents: sizes.iter().map(|_| rmap.parents().unwrap()).collect(),
        states: sizes.iter().map(|&size| (0..size).map(|_| AtomicU64::new(0)).collect()).collect(),
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (cache, walker) = (rmap.cache(), rmap.walker().unwrap());
        let writing = scope.spawn(|| write(&lists, writer, cache, &stop));
        let walking = scope.spawn(|| walk(&lists, walker, wanted / share));
        let walked = walking.join();
        stop.store(true, Ordering::Relaxed);
        let changes = writing.join().unwrap();
        let (checks, there, walks) = walked.unwrap();
        println!(
            "{sizes:?}: {checks} checks, {there} of entries that were there; {walks} walks, {changes} changes"
        );
        assert!(there > 0 && changes > 0);
    });
}

/// Lists of a few entries: into a descriptor and out of it.
#[test]
fn rmap_stress_short_lists() {
    stress(&[2, 3, 4], 4);
}

/// Descriptors come and go.
#[test]
fn rmap_stress_two_descriptors() {
    stress(&[15, 16, 29, 30], 1);
}

/// Long lists, and a short one beside them that gets their descriptors.
#[test]
fn rmap_stress_long_lists() {
    stress(&[12, 100, 400], 1);
}
