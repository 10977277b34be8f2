//! The same for slots of a TiB, with sets of ranges: what matters are chunks, directories and the levels above them.

use std::collections::BTreeMap;

use memslot::dirty::{Consumer, DirtyLog, Harvest, Rearm};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable, View,
};
use proptest::prelude::*;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const CHUNK: u64 = 32768;
/// Two TiB slots, neither aligned to anything, and where their slots move to.
const HOMES: [u64; 4] = [7, (1 << 40) - 5, (1 << 33) + 3 * CHUNK, (1 << 50) + 64];

/// A set of frames, as ranges that do not touch: start, end.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn add(&mut self, mut from: u64, mut to: u64) {
        if from >= to {
            return;
        }
        while let Some((&start, &end)) = self.0.range(..=to).next_back().filter(|it| *it.1 >= from) {
            (from, to) = (from.min(start), to.max(end));
            self.0.remove(&start);
        }
        self.0.insert(from, to);
    }

    /// Takes the frames `[from, to)` out.
    fn take(&mut self, from: u64, to: u64) -> Self {
        let mut taken = Self::default();
        while let Some((&start, &end)) = self.0.range(..to).next_back().filter(|it| from < to && *it.1 > from)
        {
            self.0.remove(&start);
            self.add(start, from);
            self.add(to, end);
            taken.add(start.max(from), end.min(to));
        }
        taken
    }

    fn covers(&self, other: &Self) -> bool {
        other.0.iter().all(|(&from, &to)| self.clone().take(from, to).0 == BTreeMap::from([(from, to)]))
    }

    fn move_to(&mut self, from: u64, pages: u64, to: u64) {
        let taken = self.take(from, from + pages);
        taken.0.iter().for_each(|(&start, &end)| self.add(start - from + to, end - from + to));
    }

    fn len(&self) -> u64 {
        self.0.iter().map(|(from, to)| to - from).sum()
    }
}

impl FromIterator<GfnRange> for Ranges {
    fn from_iter<I: IntoIterator<Item = GfnRange>>(ranges: I) -> Self {
        let mut all = Self::default();
        ranges.into_iter().for_each(|range| all.add(range.start().get(), range.end().get()));
        all
    }
}

#[derive(Clone, Debug)]
enum Step {
    Mark { slot: u32, at: u64, pages: u64 },
    Harvest { consumer: usize, range: Option<(u32, u64, u64)>, commit: bool },
    Clear { consumer: usize, slot: u32, at: u64, words: usize, holes: bool },
    Resize { slot: u32, pages: u64 },
    Move { slot: u32, home: usize },
    SplitAndMerge { slot: u32, at: u64 },
    Logging { slot: u32, on: bool },
    InitiallySet(bool),
}

/// Offsets and lengths around the borders of words, chunks and directories.
fn pages() -> impl Strategy<Value = u64> {
    let unit = prop_oneof![1 => Just(1u64), 1 => Just(64), 3 => Just(CHUNK), 1 => Just(512 * CHUNK)];
    (unit, 0u64..9, prop_oneof![Just(0u64), Just(1), 0u64..64, 0..CHUNK])
        .prop_map(|(unit, n, more)| unit * n + more)
}

fn step() -> impl Strategy<Value = Step> {
    let range = proptest::option::of((0u32..2, pages(), pages()));
    let size = prop_oneof![Just(1u64 << 28), (1u64 << 20)..(1 << 28), pages().prop_map(|pages| pages + 1)];
    prop_oneof![
        6 => (0u32..2, pages(), pages()).prop_map(|(slot, at, pages)| Step::Mark { slot, at, pages }),
        4 => (0usize..2, range, any::<bool>())
            .prop_map(|(consumer, range, commit)| Step::Harvest { consumer, range, commit }),
        3 => (0usize..2, 0u32..2, pages(), 1usize..1200, any::<bool>())
            .prop_map(|(consumer, slot, at, words, holes)| Step::Clear { consumer, slot, at, words, holes }),
        2 => (0u32..2, size).prop_map(|(slot, pages)| Step::Resize { slot, pages }),
        1 => (0u32..2, 0usize..4).prop_map(|(slot, home)| Step::Move { slot, home }),
        1 => (0u32..2, pages()).prop_map(|(slot, at)| Step::SplitAndMerge { slot, at }),
        1 => (0u32..2, any::<bool>()).prop_map(|(slot, on)| Step::Logging { slot, on }),
        1 => any::<bool>().prop_map(Step::InitiallySet),
    ]
}

#[derive(Default)]
struct Armed(Vec<GfnRange>);

impl Rearm for Armed {
    type Error = ();

    fn rearm(&mut self, _: AddressSpaceId, gfns: GfnRange) -> Result<(), ()> {
        assert_eq!(gfns.start().get() / CHUNK, (gfns.end().get() - 1) / CHUNK, "in one chunk");
        self.0.push(gfns);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ()> {
        Ok(())
    }
}

struct World {
    table: SlotTable,
    log: DirtyLog,
    consumers: Vec<Consumer>,
    dirty: Vec<Ranges>,
    /// Marked and not armed.
    fresh: Ranges,
    initially_set: bool,
}

fn gfns(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first), pages).unwrap()
}

fn logged(view: &View) -> impl Iterator<Item = GfnRange> {
    let logged = view.slots(RAM).filter(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES));
    logged.map(memslot::Slot::gfns)
}

impl World {
    fn new() -> Self {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        for (id, home) in (0..2).zip(HOMES) {
            table
                .create(SlotSpec {
                    address_space: RAM,
                    id: SlotId::new(id),
                    gfns: gfns(home, 1 << 28),
                    backing: Backing::Host { hva: Hva::new(u64::from(id + 1) << 60) },
                    flags: SlotFlags::LOG_DIRTY_PAGES,
                })
                .unwrap();
        }
        let consumers = vec![log.consumer().unwrap(), log.consumer().unwrap()];
        let (dirty, fresh) = (vec![Ranges::default(); 2], Ranges::default());
        Self { table, log, consumers, dirty, fresh, initially_set: false }
    }

    fn slot(&self, id: u32) -> GfnRange {
        self.table.view().slot(RAM, SlotId::new(id)).unwrap().gfns()
    }

    fn sets(&mut self) -> impl Iterator<Item = &mut Ranges> {
        self.dirty.iter_mut().chain([&mut self.fresh])
    }

    /// Marks what is logged of a range, in the model.
    fn mark(&mut self, range: GfnRange) {
        let inside: Vec<GfnRange> =
            logged(self.table.view()).filter_map(|slot| slot.intersect(&range)).collect();
        for set in self.sets() {
            inside.iter().for_each(|part| set.add(part.start().get(), part.end().get()));
        }
    }

    fn set_logging(&mut self, id: u32, on: bool) {
        let was = self.table.view().slot(RAM, SlotId::new(id)).unwrap().flags();
        let flags = if on { SlotFlags::LOG_DIRTY_PAGES } else { SlotFlags::empty() };
        self.table.set_flags(RAM, SlotId::new(id), flags).unwrap();
        let slot = self.slot(id);
        if was != flags {
            self.sets().for_each(|set| _ = set.take(slot.start().get(), slot.end().get()));
            if on && self.initially_set {
                self.mark(slot);
            }
        }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Mark { slot, at, pages } => {
                let range = gfns(self.slot(slot).start().get() + at, pages);
                self.log.mark_range(RAM, range);
                self.mark(range);
            }
            Step::Harvest { consumer, range, commit } => {
                let range = range.map(|(slot, at, pages)| gfns(self.slot(slot).start().get() + at, pages));
                self.harvest(consumer, range.unwrap_or(gfns(0, 1 << 52)), commit);
            }
            Step::Clear { consumer, slot, at, words, holes } => self.clear(consumer, slot, at, words, holes),
            Step::Resize { slot, pages } => {
                let old = self.slot(slot);
                self.table.transaction(|tx| tx.resize(RAM, SlotId::new(slot), pages)).unwrap();
                let new = self.slot(slot);
                self.sets().for_each(|set| _ = set.take(new.end().get(), old.end().get()));
                if self.initially_set && old.len() < new.len() {
                    self.mark(gfns(old.end().get(), new.len() - old.len()));
                }
            }
            Step::Move { slot, home } => {
                let old = self.slot(slot);
                if self.table.move_to(RAM, SlotId::new(slot), Gfn::new(HOMES[home])).is_ok() {
                    let (from, pages) = (old.start().get(), old.len());
                    self.sets().for_each(|set| set.move_to(from, pages, HOMES[home]));
                }
            }
            Step::SplitAndMerge { slot, at } => {
                let (low, high) = (SlotId::new(slot), SlotId::new(9));
                let at = Gfn::new(self.slot(slot).start().get() + at);
                if self.table.transaction(|tx| tx.split(RAM, low, at, high)).is_ok() {
                    self.harvest(0, gfns(0, 1 << 52), false);
                    self.table.transaction(|tx| tx.merge(RAM, low, high)).unwrap();
                }
            }
            Step::Logging { slot, on } => self.set_logging(slot, on),
            Step::InitiallySet(on) => {
                self.log.set_initially_set(on);
                self.initially_set = on;
            }
        }
    }

    fn harvest(&mut self, at: usize, range: GfnRange, commit: bool) {
        let (from, to) = (range.start().get(), range.end().get());
        let wanted = self.dirty[at].clone().take(from, to);
        let mut armed = Armed::default();
        let harvest = self.consumers[at].harvest_range(RAM, range, &mut armed).unwrap();
        let runs: Ranges = harvest.runs().map(|run| run.gfns).collect();
        assert_eq!(runs, wanted);
        assert_eq!(harvest.pages(), wanted.len());
        check_spans(&harvest, range, &wanted);
        let armed: Ranges = armed.0.into_iter().collect();
        assert!(armed.covers(&self.fresh.take(from, to)), "everything that was marked is armed");
        if commit {
            harvest.commit();
            self.dirty[at].take(from, to);
        }
    }

    fn clear(&mut self, at: usize, slot: u32, offset: u64, words: usize, holes: bool) {
        let first = self.slot(slot).start().get() + offset;
        let mask: Vec<u64> =
            (0..words).map(|word| if holes && word % 3 == 1 { 0xff00 } else { u64::MAX }).collect();
        let asked: Vec<(u64, u64)> = (first..)
            .step_by(64)
            .zip(&mask)
            .map(|(gfn, &word)| if word == u64::MAX { (gfn, gfn + 64) } else { (gfn + 8, gfn + 16) })
            .collect();
        let mut armed = Armed::default();
        let range = gfns(first, 64 * words as u64);
        let count = self.consumers[at].clear(RAM, range, &mask, &mut armed).unwrap();
        let armed: Ranges = armed.0.into_iter().collect();
        let mut wanted = 0;
        for (from, to) in asked {
            wanted += self.dirty[at].take(from, to).len();
            assert!(armed.covers(&self.fresh.take(from, to)), "everything that was marked is armed");
        }
        assert!(count >= wanted, "frames without a slot may be among those that were cleared");
    }
}

fn check_spans(harvest: &Harvest<'_>, range: GfnRange, wanted: &Ranges) {
    let dirty: Ranges = harvest.spans().filter(|span| span.dirty).map(|span| span.run.gfns).collect();
    assert_eq!(dirty, *wanted);
    let all: Ranges = harvest.spans().map(|span| span.run.gfns).collect();
    assert_eq!(all, logged(harvest.view()).filter_map(|slot| slot.intersect(&range)).collect());
}

proptest! {
    #![proptest_config(memslot_testing::proptest_config(100))]

    #[test]
    fn a_log_of_tebibytes_is_a_set_of_ranges(steps in proptest::collection::vec(step(), 1..30)) {
        let mut world = World::new();
        for (step, number) in steps.iter().zip(1..) {
            world.run(step);
            // A harvest takes what is marked out of the bitmap: so not each time.
            if number % 4 == 0 || number == steps.len() {
                (0..2).for_each(|at| world.harvest(at, gfns(0, 1 << 52), false));
            }
        }
    }
}
