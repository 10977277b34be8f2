//! Random programs on a table with a dirty log, against sets of pages.
//!
//! The model (`model.rs`) knows nothing of chunks, words or consumers' chunks: a consumer is a set of gfns, and a
//! change of the table moves each of them by itself. After every step all ways to ask must agree with it.

#[path = "../common/mod.rs"]
mod common;
mod huge;
mod model;
mod program;

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use memslot::dirty::{
    BitmapError, Consumer, DirtyLog, FenceRefused, Harvest, HarvestError, HeavyFence, Rearm, Span,
};
use memslot::{
    AddressSpaceId, Gfn, GfnRange, Gpa, Limits, Listener, ListenerError, PageSize, SlotFlags, SlotTable,
    Update, View,
};
use proptest::prelude::*;

use self::model::Model;
use self::program::{Refuser, SPACES, Step, step};

/// What the listeners around the log are to do at the next change.
#[derive(Default)]
struct Orders {
    refuse: Option<Refuser>,
    late: Option<(u8, u64)>,
    log: Option<DirtyLog>,
}

/// A listener in front of the log, or behind it.
struct Around {
    orders: Arc<Mutex<Orders>>,
    is_first: bool,
}

impl Around {
    fn answer(&self, refusers: &[Refuser]) -> Result<(), ListenerError> {
        match self.orders.lock().unwrap().refuse {
            Some(refuser) if refusers.contains(&refuser) => Err("refused".into()),
            _ => Ok(()),
        }
    }
}

impl Listener for Around {
    fn name(&self) -> &str {
        "around the log"
    }

    fn prepare(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if self.is_first { Ok(()) } else { self.answer(&[Refuser::Prepare]) }
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if !self.is_first {
            return self.answer(&[Refuser::Last]);
        }
        let orders = self.orders.lock().unwrap();
        if let (Some((space, gfn)), Some(log)) = (orders.late, &orders.log) {
            log.mark(AddressSpaceId::new(space), Gfn::new(gfn));
        }
        drop(orders);
        self.answer(&[Refuser::First])
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// Remembers what it was asked, and fails at one call if it is told to.
pub(crate) struct Recording {
    log: DirtyLog,
    armed: Vec<(AddressSpaceId, GfnRange)>,
    flushes: u32,
    fail_at: Option<usize>,
    /// Whether the first page is marked again before the flush.
    touches: bool,
}

impl Recording {
    fn new(log: &DirtyLog, fail_at: Option<usize>) -> Self {
        Self { log: log.clone(), armed: Vec::new(), flushes: 0, fail_at, touches: false }
    }

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

    fn touched(&self) -> Option<(AddressSpaceId, GfnRange)> {
        self.armed.first().copied().filter(|_| self.touches && self.flushes > 0)
    }
}

impl Rearm for Recording {
    type Error = &'static str;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), &'static str> {
        assert_eq!(self.flushes, 0, "nothing is re-armed after the flush");
        let (first, last) = (gfns.start().get(), gfns.end().get() - 1);
        for gfn in [first, first.midpoint(last), last] {
            assert!(!self.log.is_marked(space, Gfn::new(gfn)), "{gfn:#x} is armed and was not taken");
        }
        let ascends = |&(before, armed): &(AddressSpaceId, GfnRange)| {
            (before, armed.end()) <= (space, gfns.start()) || before < space
        };
        assert!(self.armed.last().is_none_or(ascends), "in ascending order, and none twice");
        self.step()?;
        self.armed.push((space, gfns));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), &'static str> {
        self.step()?;
        self.flushes += 1;
        assert_eq!(self.flushes, 1, "one flush");
        if let Some((space, gfns)) = self.touched() {
            self.log.mark(space, gfns.start());
        }
        Ok(())
    }
}

struct NoFence;

impl HeavyFence for NoFence {
    fn fence(&self) -> Result<(), FenceRefused> {
        Ok(())
    }
}

struct World {
    table: SlotTable,
    log: DirtyLog,
    consumers: Vec<Consumer>,
    orders: Arc<Mutex<Orders>>,
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
    fn new(fenced: bool) -> Self {
        let mut table = SlotTable::new(Limits { address_spaces: SPACES, ..Limits::default() }).unwrap();
        let orders = Arc::<Mutex<Orders>>::default();
        let around = |is_first| Box::new(Around { orders: Arc::clone(&orders), is_first });
        table.add_listener(around(true)).unwrap();
        let log = match fenced {
            // One thread needs no fence; what marks leave alone is what is tried here.
            true => DirtyLog::attach_with_fence(&mut table, Box::new(NoFence)),
            false => DirtyLog::attach(&mut table),
        };
        let log = log.unwrap();
        table.add_listener(around(false)).unwrap();
        orders.lock().unwrap().log = Some(log.clone());
        let consumers = vec![log.consumer().unwrap(), log.consumer_keeping_removed().unwrap()];
        Self { table, log, consumers, orders, model: Model::new(2) }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Change { operations, refuse, late } => {
                // What was set initially and is then taken back leaves pages dirty, which is allowed.
                // So does logging that stopped for a moment.
                let stops = operations.iter().any(program::Operation::may_stop_logging);
                let refuse = refuse.filter(|&refuser| match refuser {
                    Refuser::First => !stops,
                    Refuser::Prepare => true,
                    Refuser::Last => !stops && !self.model.initially_set,
                });
                // Whose memory a late mark in a refused change means is tested elsewhere.
                let late = late.filter(|_| refuse.is_none());
                (self.orders.lock().unwrap().refuse, self.orders.lock().unwrap().late) = (refuse, late);
                let before = self.table.snapshot();
                let result = self.table.transaction(|tx| operations.iter().try_for_each(|it| it.apply(tx)));
                if result.is_ok() && self.table.view().generation() != before.generation() {
                    // It is marked where its memory was, and where the frame is logged now.
                    if let Some((space, gfn)) = late {
                        self.model.mark(&before, space, gfn..gfn + 1);
                    }
                    self.model.change(&before, self.table.view());
                    if let Some((space, gfn)) = late {
                        self.model.mark(self.table.view(), space, gfn..gfn + 1);
                    }
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
            Step::MarkBytes { space, gpa, bytes } => {
                self.log.mark_bytes(AddressSpaceId::new(*space), Gpa::new(*gpa), *bytes, PageSize::K4);
                let end = if *bytes == 0 { gpa >> 12 } else { ((gpa + bytes - 1) >> 12) + 1 };
                self.model.mark(self.table.view(), *space, gpa >> 12..end);
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
            Step::Harvest { consumer, range, commit, fail_at, touch } => {
                let at = consumer % self.consumers.len();
                let mut rearm = Recording { touches: *touch, ..Recording::new(&self.log, *fail_at) };
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
                check_words(self.table.view(), &wanted, |space, gfns, words| {
                    harvest.words(space, gfns, words)
                });
                assert_eq!(rearm.flushes, u32::from(!rearm.armed.is_empty()), "a flush if it is needed");
                self.model.check_armed(at, range, &rearm.armed);
                if *commit {
                    harvest.commit();
                    self.model.take(at, &wanted);
                } else {
                    drop(harvest);
                }
                if let Some((space, range)) = rearm.touched() {
                    let first = range.start().get();
                    self.model.mark(self.table.view(), space.get(), first..first + 1);
                }
            }
            Step::Clear { consumer, space, first, mask, cut, fail_at } => {
                let at = consumer % self.consumers.len();
                let pages = 64 * mask.len() as u64 - cut;
                let range = GfnRange::with_len(Gfn::new(*first), pages).unwrap();
                let id = AddressSpaceId::new(*space);
                let wanted: Vec<_> = self.model.pages(at, Some((id, range)));
                let is_asked =
                    |gfn: u64| mask[((gfn - first) / 64) as usize] >> ((gfn - first) % 64) & 1 != 0;
                let wanted: Vec<_> = wanted.into_iter().filter(|&(_, gfn)| is_asked(gfn)).collect();
                let mut rearm = Recording::new(&self.log, *fail_at);
                let count = match self.consumers[at].clear(id, range, mask, &mut rearm) {
                    Ok(count) => count,
                    Err(error) => {
                        assert_eq!(error, HarvestError::Rearm("told to fail"));
                        return self.put_back(at, &wanted);
                    }
                };
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

    /// A clear has failed: pages that it may have taken and put back.
    fn put_back(&mut self, at: usize, pages: &[(u8, u64)]) {
        let (log, consumers) = (&self.log, &self.consumers);
        self.model.put_back(at, pages, |other, (space, gfn)| {
            let one = GfnRange::with_len(Gfn::new(gfn), 1).unwrap();
            consumers[other].peek(AddressSpaceId::new(space), one, &mut [0]) == Ok(1)
        });
        for &(space, gfn) in
            pages.iter().filter(|it| log.is_marked(AddressSpaceId::new(it.0), Gfn::new(it.1)))
        {
            self.model.add_fresh((space, gfn));
        }
    }

    /// What every consumer would see, without taking it.
    fn check(&mut self) {
        for (at, consumer) in self.consumers.iter().enumerate() {
            let all = self.model.pages(at, None);
            check_words(self.table.view(), &all, |space, gfns, words| consumer.peek(space, gfns, words));
            for space in 0..SPACES {
                let id = AddressSpaceId::new(space);
                for slot in self.table.view().slots(id) {
                    let mut words = vec![0; usize::try_from(slot.pages().div_ceil(64)).unwrap()];
                    let count = consumer.peek(id, slot.gfns(), &mut words).unwrap();
                    if !slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) {
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
        let logged =
            table.view().slots(space).filter(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES));
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

/// The bits of some unaligned windows around the first page and the last.
fn check_words(
    view: &View,
    wanted: &[(u8, u64)],
    words_of: impl Fn(AddressSpaceId, GfnRange, &mut [u64]) -> Result<u64, BitmapError>,
) {
    let is_logged = |space, gfn| {
        view.slot_at(space, gfn).is_some_and(|it| it.flags().contains(SlotFlags::LOG_DIRTY_PAGES))
    };
    for &(space, gfn) in wanted.first().into_iter().chain(wanted.last()) {
        for (before, pages) in [(0, 1), (1, 64), (63, 65), (7, 300)] {
            let first = gfn.saturating_sub(before);
            let (id, range) =
                (AddressSpaceId::new(space), GfnRange::with_len(Gfn::new(first), pages).unwrap());
            let mut words = vec![u64::MAX; usize::try_from(pages.div_ceil(64)).unwrap()];
            let count = words_of(id, range, &mut words).unwrap();
            assert_eq!(count, words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>());
            for page in 0..64 * words.len() as u64 {
                let is_set = words[(page / 64) as usize] >> (page % 64) & 1 != 0;
                let is_wanted = page < pages && wanted.binary_search(&(space, first + page)).is_ok();
                // What no slot logs may be set or not.
                assert!(is_set == is_wanted || page < pages && !is_logged(id, Gfn::new(first + page)));
            }
            assert!(words_of(id, range, &mut words[1..]).is_err());
        }
    }
}

proptest! {
    #![proptest_config(memslot_testing::proptest_config(300))]

    #[test]
    fn a_log_is_a_set_of_pages(steps in proptest::collection::vec(step(), 1..40), fenced in any::<bool>()) {
        let mut world = World::new(fenced);
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
