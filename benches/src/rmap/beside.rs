//! A walker beside a writer that never stops.
//!
//! The writer removes a random entry of a random list and adds it again; the walker walks random lists. Each has a
//! processor of its own.
//!
//! The peer's walker and writer take the same lock, and who has it keeps it: on long lists the walker is as fast as if it were
//! alone, because the writer does not get on. So a walker's own time says little, and there are three rows: as many
//! walks as changes, side by side, until both are done; the walker's time while the writer goes on; and the writer's.

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
    for (lists, size, target) in [
        (1, 2, Some(5.0)),
        (1, 14, Some(5.0)),
        (1, 100, Some(5.0)),
        (1, 1000, Some(5.0)),
        (64, 14, Some(1.0)),
        (64, 100, Some(1.0)),
    ] {
        let mut times = [const { Vec::new() }; 6];
        let (mut ours, mut theirs) = (Ours::new(lists, size)?, Theirs::new(lists, size));
        for turn in 0..rounds {
            for side in [turn % 2, 1 - turn % 2] {
                let figures = if side == 0 {
                    our_round(&mut ours, lists, size, length)?
                } else {
                    their_round(&mut theirs, lists, size, length)
                };
                times.iter_mut().skip(3 * side).zip(figures).for_each(|(times, figure)| times.push(figure));
            }
        }
        let [both, walk, change, their_both, their_walk, their_change] =
            times.map(|mut times| median(&mut times));
        let at = if lists == 1 { size.to_string() } else { format!("{lists}x{size}") };
        for (name, ours, theirs, target) in [
            ("walk beside a writer, both done", both, their_both, target),
            ("… the walk, in a race", walk, their_walk, None),
            ("… the remove and add, in a race", change, their_change, None),
        ] {
            let row = Row {
                bench: name.to_owned(),
                at: at.clone(),
                ours_ns: ours,
                peer: PEER.to_owned(),
                peer_ns: Some(theirs),
                ratio: Some(theirs / ours),
                target,
            };
            report.add(row, &nanoseconds(ours), &nanoseconds(theirs));
        }
    }
    Ok(())
}

/// Nanoseconds for a walk and a change, as many of each, until both are done; then, while both go on, for each walk and
/// for each change.
fn round(
    length: Duration,
    lists: usize,
    entries: usize,
    mut change: impl FnMut(usize) + Send,
    mut walk: impl FnMut(usize),
) -> [f64; 3] {
    const GROUP: u64 = 16;
    const PAIRS: u64 = 100_000;
    let (stop, changes, barrier) = (AtomicBool::new(false), AtomicU64::new(0), Barrier::new(2));
    std::thread::scope(|scope| {
        let (stop, changes, barrier) = (&stop, &changes, &barrier);
        scope.spawn(move || {
            let mut random = Random::new(31);
            let mut group = || {
                (0..GROUP).for_each(|_| change(random.below(entries)));
                changes.store(changes.load(Ordering::Relaxed) + GROUP, Ordering::Relaxed);
            };
            barrier.wait();
            (0..PAIRS / GROUP).for_each(|_| group());
            barrier.wait();
            barrier.wait();
            while !stop.load(Ordering::Relaxed) {
                group();
            }
        });
        let mut random = Random::new(17);
        let mut group = || (0..GROUP).for_each(|_| walk(random.below(lists)));
        // Before the barrier: perhaps this thread does not run when the other starts.
        let start = Instant::now();
        barrier.wait();
        (0..PAIRS / GROUP).for_each(|_| group());
        barrier.wait();
        let both = start.elapsed();
        barrier.wait();
        let (mut walks, before, start) = (0u64, changes.load(Ordering::Relaxed), Instant::now());
        while start.elapsed() < length {
            (0..4).for_each(|_| group());
            walks += 4 * GROUP;
        }
        let (elapsed, done) = (start.elapsed(), (changes.load(Ordering::Relaxed) - before).max(1));
        stop.store(true, Ordering::Relaxed);
        #[expect(clippy::cast_precision_loss, reason = "a time is not that exact")]
        let per = |elapsed: Duration, count: u64| elapsed.as_nanos() as f64 / count as f64;
        [per(both, PAIRS), per(elapsed, walks), per(elapsed, done)]
    })
}

fn our_round(ours: &mut Ours, lists: usize, size: usize, length: Duration) -> anyhow::Result<[f64; 3]> {
    let mut walker = ours.rmap.walker()?;
    let Ours { slot, writer, cache, records, .. } = ours;
    cache.reserve(256)?;
    let slot = &*slot;
    let all: Vec<_> = (0..lists).filter_map(|list| slot.list(Level::K4, gfn(list))).collect();
    let all = &all;
    let change = |number: usize| {
        super::remove(writer, number, records);
        if cache.len() < 16 {
            assert!(cache.reserve(256).is_ok(), "memory");
        }
        super::add(writer, all[number % lists], number, cache, records);
    };
    let walk = |list: usize| walker.enter().entries(all[list]).for_each(|entry| _ = black_box(entry));
    Ok(round(length, lists, lists * size, change, walk))
}

fn their_round(theirs: &mut Theirs, lists: usize, size: usize, length: Duration) -> [f64; 3] {
    let Theirs { heads, cache, .. } = theirs;
    let heads = &*heads;
    let change = |number: usize| {
        heads[number % lists].remove(super::entry(number).get(), cache);
        black_box(heads[number % lists].add(super::entry(number).get(), cache));
    };
    let walk = |list: usize| heads[list].walk_locked(|word| _ = black_box(word));
    round(length, lists, lists * size, change, walk)
}
