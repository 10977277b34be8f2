//! A walker beside a writer that never stops.
//!
//! The writer removes a random entry of a random list and adds it again; the walker walks random lists. Each has a
//! processor of its own. What is measured has to count both: the peer's walker and writer take the same lock, and who has it
//! tends to keep it, so that a walker alone looks quick while the writer stands still (changes of many microseconds were
//! seen, and a writer that did nothing at all in 50 ms), or the other way round.
//!
//! So the row with the target is *in step*: as many walks as changes, and neither side may be ahead of the other by more than 32. The time is
//! that of a walk and a change, side by side. Without that rule the same number of both can be done by one after the other,
//! each without a neighbour ("both done": the time until both are), or by one alone (the two rows of the race: the walker's time while the
//! writer goes on, and the writer's).
//!
//! There is a bound below all of these. A walk that sees a change has to fetch the cache lines that the change has written from the
//! other processor: "a line from the other processor" is the time of one such transfer, measured with a single word. So the ratio in step
//! can be no larger than the peer's time divided by that of a line, whatever the structure: about 3 to 4 at 2 and 14 entries, which
//! is below the target. Ours needs one or two lines for a change, most of the time at once; the peer has the lock's line
//! besides, and waits for it twice, before any other.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memslot_mmu::Level;

use super::{Ours, PEER, Theirs, gfn};
use crate::Effort;
use crate::layout::Random;
use crate::measure::median;
use crate::report::{Report, Row, nanoseconds};

pub(super) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let (rounds, length) = match effort {
        Effort::Smoke => (1, Duration::from_millis(5)),
        Effort::Normal => (7, Duration::from_millis(50)),
        Effort::Long => (31, Duration::from_millis(100)),
    };
    if !report.wants("walk beside a writer") {
        return Ok(());
    }
    if std::thread::available_parallelism().is_ok_and(|n| n.get() < 2) {
        report.skipped("walk beside a writer: one processor only");
        return Ok(());
    }
    line(rounds, report);
    for lines in [1, 2] {
        let (words, cell) = ([const { Padded(AtomicU64::new(0)) }; 2], Padded::default());
        let mut turn = 0;
        let change = |_| {
            turn += 1;
            words[..lines].iter().for_each(|word| word.0.store(turn, Ordering::Release));
        };
        let walk = |_| {
            cell.0.swap(1, Ordering::SeqCst);
            words[..lines].iter().for_each(|word| _ = black_box(word.0.load(Ordering::SeqCst)));
            cell.0.store(0, Ordering::Release);
        };
        let [step, ..] = round(length, 1, 1, change, walk);
        alone(&format!("… in step, {lines} word(s) written and read"), step, report);
    }
    // How many lists, of what length; from which on they are changed, below which they are walked.
    for (lists, size, changed, walked, target) in [
        (1, 1, 0, 1, Some(5.0)),
        (1, 2, 0, 1, Some(5.0)),
        (1, 8, 0, 1, Some(5.0)),
        (1, 14, 0, 1, Some(5.0)),
        (1, 15, 0, 1, Some(5.0)),
        (1, 100, 0, 1, Some(5.0)),
        (1, 1000, 0, 1, Some(5.0)),
        (64, 14, 0, 64, Some(1.0)),
        (64, 100, 0, 64, Some(1.0)),
        (64, 2, 32, 32, Some(1.0)),
        (64, 14, 32, 32, Some(1.0)),
        (64, 100, 32, 32, Some(1.0)),
    ] {
        let mut times = [const { Vec::new() }; 8];
        let (mut ours, mut theirs) = (Ours::new(lists, size)?, Theirs::new(lists, size));
        let those = Those { lists, size, changed, walked };
        for turn in 0..rounds {
            for side in [turn % 2, 1 - turn % 2] {
                let figures = if side == 0 {
                    our_round(&mut ours, those, length)?
                } else {
                    their_round(&mut theirs, those, length)
                };
                times.iter_mut().skip(4 * side).zip(figures).for_each(|(times, figure)| times.push(figure));
            }
        }
        let [step, both, walk, change, their_step, their_both, their_walk, their_change] =
            times.map(|mut times| median(&mut times));
        let at = match (lists, changed) {
            (1, _) => size.to_string(),
            (_, 0) => format!("{lists}x{size}"),
            _ => format!("2x{walked}x{size}"),
        };
        for (name, ours, theirs, target) in [
            ("walk beside a writer, in step", step, their_step, target),
            ("… until both are done", both, their_both, None),
            ("… the walk, in a race", walk, their_walk, None),
            ("… the remove and add, in a race", change, their_change, None),
        ] {
            report.text_row(name, &at, PEER, (ours, theirs), target);
        }
    }
    Ok(())
}

/// A row without a peer.
fn alone(name: &str, ns: f64, report: &mut Report) {
    let row = Row {
        bench: name.to_owned(),
        at: String::new(),
        ours_ns: ns,
        peer: String::new(),
        peer_ns: None,
        ratio: None,
        target: None,
    };
    report.add(row, &nanoseconds(ns), "");
}

/// The time of a piece, of many: that which a fifth is below. Threads in step cannot be quicker than they are together, but
/// wait for each other while one of them does not run, which says nothing about either side.
#[expect(clippy::cast_precision_loss, reason = "a time is not that exact")]
fn undisturbed(pieces: &mut [Duration], operations: u64) -> f64 {
    pieces.sort();
    pieces.get(pieces.len() / 5).map_or(f64::NAN, |piece| piece.as_nanos() as f64 / operations as f64)
}

/// How long it takes for a word to go to the other processor and come back changed, halved.
fn line(rounds: usize, report: &mut Report) {
    const TURNS: u64 = 1000;
    let pieces = 10 * rounds as u64;
    let word = Padded::default();
    let play = |own: u64, each: &mut dyn FnMut(u64)| {
        for turn in 0..pieces * TURNS {
            while word.0.load(Ordering::Acquire) != 2 * turn + own {}
            word.0.store(2 * turn + own + 1, Ordering::Release);
            each(turn);
        }
    };
    let mut times = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| play(1, &mut |_| ()));
        let mut start = Instant::now();
        play(0, &mut |turn| {
            if (turn + 1) % TURNS == 0 {
                times.push(start.elapsed());
                start = Instant::now();
            }
        });
    });
    let ns = undisturbed(&mut times, 2 * TURNS);
    alone("… a line from the other processor", ns, report);
}

/// Counts of what was done, each written by one thread.
#[derive(Default)]
struct Done {
    walks: Padded,
    changes: Padded,
}

#[derive(Default)]
#[repr(align(128))]
struct Padded(AtomicU64);

impl Padded {
    fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Waits until this is not behind by more than the lead. (Without the processor's pause, which takes as long as a walk.)
    fn keep_step(&self, other: u64) {
        while self.get() + LEAD < other {}
    }
}

const GROUP: u64 = 16;
const LEAD: u64 = 32;
const PAIRS: u64 = 96_000;
/// So many walks and changes are timed at once.
const PIECE: u64 = 1600;

/// Nanoseconds for a walk and a change: in step; as many of each, until both are done; then, while both go on, for each walk and
/// for each change.
fn round(
    length: Duration,
    lists: usize,
    entries: usize,
    mut change: impl FnMut(usize) + Send,
    mut walk: impl FnMut(usize),
) -> [f64; 4] {
    let (stop, done, barrier) = (AtomicBool::new(false), Done::default(), Barrier::new(2));
    std::thread::scope(|scope| {
        let (stop, done, barrier) = (&stop, &done, &barrier);
        scope.spawn(move || {
            let mut random = Random::new(31);
            let mut group = || {
                (0..GROUP).for_each(|_| change(random.below(entries)));
                done.changes.add(GROUP);
            };
            barrier.wait();
            for _ in 0..PAIRS / GROUP {
                done.walks.keep_step(done.changes.get());
                group();
            }
            barrier.wait();
            barrier.wait();
            (0..PAIRS / GROUP).for_each(|_| group());
            barrier.wait();
            barrier.wait();
            while !stop.load(Ordering::Relaxed) {
                group();
            }
        });
        let mut random = Random::new(17);
        let mut group = || {
            (0..GROUP).for_each(|_| walk(random.below(lists)));
            done.walks.add(GROUP);
        };
        barrier.wait();
        let mut pieces = Vec::new();
        for _ in 0..PAIRS / PIECE {
            let start = Instant::now();
            for _ in 0..PIECE / GROUP {
                done.changes.keep_step(done.walks.get());
                group();
            }
            pieces.push(start.elapsed());
        }
        barrier.wait();
        // Before the barrier: perhaps this thread does not run when the other starts.
        let start = Instant::now();
        barrier.wait();
        (0..PAIRS / GROUP).for_each(|_| group());
        barrier.wait();
        let both = start.elapsed();
        barrier.wait();
        let (walks, changes, start) = (done.walks.get(), done.changes.get(), Instant::now());
        while start.elapsed() < length {
            (0..4).for_each(|_| group());
        }
        let (elapsed, changes) = (start.elapsed(), (done.changes.get() - changes).max(1));
        stop.store(true, Ordering::Relaxed);
        #[expect(clippy::cast_precision_loss, reason = "a time is not that exact")]
        let per = |elapsed: Duration, count: u64| elapsed.as_nanos() as f64 / count as f64;
        [
            undisturbed(&mut pieces, PIECE),
            per(both, PAIRS),
            per(elapsed, done.walks.get() - walks),
            per(elapsed, changes),
        ]
    })
}

/// Lists of the same length, of which those from `changed` on are changed and those below `walked` are walked.
#[derive(Clone, Copy)]
struct Those {
    lists: usize,
    size: usize,
    changed: usize,
    walked: usize,
}

impl Those {
    /// The entry, of those that are changed, and its list.
    fn entry(self, number: usize) -> (usize, usize) {
        let changed = self.lists - self.changed;
        let list = self.changed + number % changed;
        (number / changed * self.lists + list, list)
    }

    /// How many entries are changed.
    fn entries(self) -> usize {
        (self.lists - self.changed) * self.size
    }
}

fn our_round(ours: &mut Ours, those: Those, length: Duration) -> anyhow::Result<[f64; 4]> {
    let mut walker = ours.rmap.walker()?;
    let Ours { slot, writer, cache, records, .. } = ours;
    let slot = &*slot;
    let all: Vec<_> = (0..those.walked).filter_map(|list| slot.list(Level::K4, gfn(list))).collect();
    let all = &all;
    let change = |number: usize| {
        let (number, list) = those.entry(number);
        super::remove(writer, number, records);
        super::add(writer, slot, number, gfn(list), cache, records);
    };
    let walk = |list: usize| _ = black_box(super::sum(walker.enter().entries(all[list])));
    Ok(round(length, those.walked, those.entries(), change, walk))
}

fn their_round(theirs: &mut Theirs, those: Those, length: Duration) -> [f64; 4] {
    let Theirs { slots, cache, gfns } = theirs;
    let slots = &*slots;
    let change = |number: usize| {
        let (number, list) = those.entry(number);
        super::peer_remove(slots, number, cache, gfns);
        super::peer_add(&slots.0, number, gfn(list).get(), cache, gfns);
    };
    let walk = |list: usize| _ = black_box(super::peer_sum_locked(slots.0.list(0, list as u64)));
    round(length, those.walked, those.entries(), change, walk)
}
