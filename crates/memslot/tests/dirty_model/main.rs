//! Random programs on a table with a dirty log, against sets of pages.
//!
//! The model (`model.rs`) knows nothing of chunks, words or consumers' chunks: a consumer is a set of gfns, and a
//! change of the table moves each of them by itself. After every step all ways to ask must agree with it.

mod model;
mod program;

use std::convert::Infallible;

use memslot::dirty::{Consumer, DirtyLog, Harvest, HarvestError, Rearm, Span};
use memslot::{AddressSpaceId, Gfn, GfnRange, Limits, Listener, ListenerError, SlotTable, Update};
use proptest::prelude::*;

use self::model::Model;
use self::program::{SPACES, Step, step};

/// Fails to commit when told to, after the log has committed: the change is taken back.
struct Refuser(std::sync::Arc<std::sync::atomic::AtomicBool>);

impl Listener for Refuser {
    fn name(&self) -> &str {
        "refuser"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if self.0.load(std::sync::atomic::Ordering::Relaxed) { Err("refused".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// Remembers what it was asked, and fails at one call if it is told to.
#[derive(Default)]
pub(crate) struct Recording {
    armed: Vec<(AddressSpaceId, GfnRange)>,
    flushes: u32,
    fail_at: Option<usize>,
}

impl Recording {
    fn step(&mut self) -> Result<(), &'static str> {
        match &mut self.fail_at {
            Some(0) => Err("told to fail"),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Rearm for Recording {
    type Error = &'static str;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), &'static str> {
        assert_eq!(self.flushes, 0, "nothing is re-armed after the flush");
        self.step()?;
        self.armed.push((space, gfns));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), &'static str> {
        self.step()?;
        self.flushes += 1;
        assert_eq!(self.flushes, 1, "one flush");
        Ok(())
    }
}

struct World {
    table: SlotTable,
    log: DirtyLog,
    consumers: Vec<Consumer>,
    refuse: std::sync::Arc<std::sync::atomic::AtomicBool>,
    model: Model,
}

fn pages(harvest: &Harvest<'_>) -> Vec<(u8, u64)> {
    let runs = harvest.runs();
    runs.flat_map(|run| gfns(run.gfns).map(move |gfn| (run.address_space.get(), gfn))).collect()
}

fn gfns(range: GfnRange) -> std::ops::Range<u64> {
    range.start().get()..range.end().get()
}

impl World {
    fn new() -> Self {
        let mut table = SlotTable::new(Limits { address_spaces: SPACES, ..Limits::default() }).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let refuse = std::sync::Arc::default();
        table.add_listener(Box::new(Refuser(std::sync::Arc::clone(&refuse)))).unwrap();
        let consumers = vec![log.consumer().unwrap(), log.consumer_keeping_removed().unwrap()];
        Self { table, log, consumers, refuse, model: Model::new(2) }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Change { operations, refuse } => {
                // What was set initially and is then taken back leaves pages dirty, which is allowed.
                // So does logging that stopped for a moment.
                let stops = operations.iter().any(|it| matches!(it, program::Operation::Flags(..)));
                let refuse = *refuse && !self.model.initially_set && !stops;
                self.refuse.store(refuse, std::sync::atomic::Ordering::Relaxed);
                let before = self.table.snapshot();
                let result = self.table.transaction(|tx| operations.iter().try_for_each(|it| it.apply(tx)));
                if result.is_ok() {
                    self.model.change(&before, self.table.view());
                }
            }
            Step::Mark { space, first, pages } => {
                let range = GfnRange::with_len(Gfn::new(*first), *pages).unwrap();
                let id = AddressSpaceId::new(*space);
                match pages {
                    1 => self.log.mark(id, range.start()),
                    _ => self.log.mark_range(id, range),
                }
                self.model.mark(self.table.view(), *space, gfns(range));
            }
            Step::Merge { space, first, words } => {
                let range = GfnRange::with_len(Gfn::new(*first), 64 * words.len() as u64).unwrap();
                let count = self.log.merge(AddressSpaceId::new(*space), range, words).unwrap();
                assert_eq!(count, words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>());
                for page in
                    (0..range.len()).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 != 0)
                {
                    self.model.mark(self.table.view(), *space, first + page..first + page + 1);
                }
            }
            Step::Harvest { consumer, range, commit, fail_at } => {
                let at = consumer % self.consumers.len();
                let mut rearm = Recording { fail_at: *fail_at, ..Recording::default() };
                let range = range.map(|(space, first, pages)| {
                    (AddressSpaceId::new(space), GfnRange::with_len(Gfn::new(first), pages).unwrap())
                });
                let harvest = match range {
                    Some((space, gfns)) => self.consumers[at].harvest_range(space, gfns, &mut rearm),
                    None => self.consumers[at].harvest(&mut rearm),
                };
                let harvest = match harvest {
                    Ok(harvest) => harvest,
                    Err(error) => return assert_eq!(error, HarvestError::Rearm("told to fail")),
                };
                let wanted = self.model.pages(at, range);
                assert_eq!(pages(&harvest), wanted);
                assert_eq!(harvest.pages(), wanted.len() as u64);
                check_spans(&self.table, &harvest, range, &wanted);
                check_words(&harvest, &wanted);
                assert_eq!(rearm.flushes, u32::from(!rearm.armed.is_empty()), "a flush if it is needed");
                self.model.check_armed(at, range, &rearm.armed);
                if *commit {
                    harvest.commit();
                    self.model.take(at, &wanted);
                }
            }
            Step::Clear { consumer, space, first, mask, cut } => {
                let at = consumer % self.consumers.len();
                let pages = 64 * mask.len() as u64 - cut;
                let range = GfnRange::with_len(Gfn::new(*first), pages).unwrap();
                let id = AddressSpaceId::new(*space);
                let wanted: Vec<_> = self.model.pages(at, Some((id, range)));
                let is_asked =
                    |gfn: u64| mask[((gfn - first) / 64) as usize] >> ((gfn - first) % 64) & 1 != 0;
                let wanted: Vec<_> = wanted.into_iter().filter(|&(_, gfn)| is_asked(gfn)).collect();
                let mut rearm = Recording::default();
                let count = self.consumers[at].clear(id, range, mask, &mut rearm).unwrap();
                // Pages that no slot logs may be among those that were cleared.
                assert!(count >= wanted.len() as u64);
                self.model.check_armed_pages(at, &wanted, &rearm.armed);
                self.model.take(at, &wanted);
            }
            Step::NewConsumer => {
                if self.consumers.len() < 4 {
                    self.consumers.push(self.log.consumer().unwrap());
                    self.model.add_consumer();
                }
            }
            Step::DropConsumer { consumer } => {
                if self.consumers.len() > 2 {
                    let at = 2 + consumer % (self.consumers.len() - 2);
                    drop(self.consumers.remove(at));
                    self.model.drop_consumer(at);
                }
            }
            Step::InitiallySet(on) => {
                self.log.set_initially_set(*on);
                self.model.initially_set = *on;
            }
        }
    }

    /// What every consumer would see, without taking it.
    fn check(&mut self) {
        for (at, consumer) in self.consumers.iter().enumerate() {
            for space in 0..SPACES {
                let id = AddressSpaceId::new(space);
                for slot in self.table.view().slots(id) {
                    let mut words = vec![0; usize::try_from(slot.pages().div_ceil(64)).unwrap()];
                    let count = consumer.peek(id, slot.gfns(), &mut words).unwrap();
                    if !slot.flags().contains(memslot::SlotFlags::LOG_DIRTY_PAGES) {
                        continue;
                    }
                    let wanted = self.model.pages(at, Some((id, slot.gfns())));
                    assert_eq!(count, wanted.len() as u64, "consumer {at}, {slot}");
                    for (_, gfn) in wanted {
                        let page = gfn - slot.base_gfn().get();
                        assert!(words[(page / 64) as usize] >> (page % 64) & 1 != 0, "page {page} of {slot}");
                    }
                }
            }
        }
        let removed: Vec<(u8, u64)> = self.consumers[1]
            .take_removed()
            .unwrap()
            .iter()
            .flat_map(|it| {
                let space = it.slot().address_space().get();
                it.runs().flat_map(gfns).map(move |gfn| (space, gfn)).collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(removed, self.model.take_removed());
    }
}

/// Spans cover every logged slot without a gap, and are dirty where they should be.
fn check_spans(
    table: &SlotTable,
    harvest: &Harvest<'_>,
    range: Option<(AddressSpaceId, GfnRange)>,
    wanted: &[(u8, u64)],
) {
    let spans: Vec<Span> = harvest.spans().collect();
    for space in (0..SPACES).map(AddressSpaceId::new) {
        let inside: Vec<Span> = spans.iter().copied().filter(|it| it.run.address_space == space).collect();
        let logged = table
            .view()
            .slots(space)
            .filter(|slot| slot.flags().contains(memslot::SlotFlags::LOG_DIRTY_PAGES));
        let all: Vec<GfnRange> = logged
            .filter_map(|slot| match range {
                None => Some(slot.gfns()),
                Some((of, gfns)) if of == space => slot.gfns().intersect(&gfns),
                Some((_, gfns)) => slot.gfns().intersect(&gfns),
            })
            .collect();
        assert_eq!(
            inside.iter().map(|it| it.run.gfns.len()).sum::<u64>(),
            all.iter().map(GfnRange::len).sum::<u64>()
        );
        assert!(inside.windows(2).all(|two| two[0].run.gfns.end() <= two[1].run.gfns.start()));
        let dirty = inside.iter().filter(|it| it.dirty).flat_map(|it| gfns(it.run.gfns));
        let wanted = wanted.iter().filter(|it| it.0 == space.get()).map(|it| it.1);
        assert!(dirty.eq(wanted));
    }
}

/// The bits of some unaligned windows.
fn check_words(harvest: &Harvest<'_>, wanted: &[(u8, u64)]) {
    let Some(&(space, gfn)) = wanted.first() else { return };
    for (before, pages) in [(0, 1), (1, 64), (63, 65), (7, 300)] {
        let first = gfn.saturating_sub(before);
        let range = GfnRange::with_len(Gfn::new(first), pages).unwrap();
        let mut words = vec![u64::MAX; usize::try_from(pages.div_ceil(64)).unwrap()];
        let count = harvest.words(AddressSpaceId::new(space), range, &mut words).unwrap();
        assert_eq!(count, words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>());
        for page in 0..pages {
            let is_wanted = wanted.contains(&(space, first + page));
            assert!(!is_wanted || words[(page / 64) as usize] >> (page % 64) & 1 != 0);
        }
        assert!(harvest.words(AddressSpaceId::new(space), range, &mut words[1..]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_log_is_a_set_of_pages(steps in proptest::collection::vec(step(), 1..40)) {
        let mut world = World::new();
        for step in &steps {
            world.run(step);
            world.check();
        }
    }
}

#[test]
fn software_alone_needs_nothing() {
    const { assert!(!<memslot::dirty::SoftwareOnly as Rearm>::NEEDED) };
    let _: Result<(), Infallible> = memslot::dirty::SoftwareOnly.flush();
}
