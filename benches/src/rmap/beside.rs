//! A walker beside a writer that never stops.
//!
//! The writer removes a random entry of a random list and adds it again; the walker walks random lists. Each has a
//! processor of its own.

use std::hint::black_box;
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
        let mut times = [const { Vec::new() }; 4];
        let (mut ours, mut theirs) = (Ours::new(lists, size)?, Theirs::new(lists, size));
        for round in 0..rounds {
            for side in [round % 2, 1 - round % 2] {
                if side == 0 {
                    let (walk, change) = our_round(&mut ours, lists, size, length)?;
                    times[0].push(walk);
                    times[1].push(change);
                } else {
                    let (walk, change) = their_round(&mut theirs, lists, size, length);
                    times[2].push(walk);
                    times[3].push(change);
                }
            }
        }
        let [walk, change, their_walk, their_change] = times.map(|mut times| median(&mut times));
        let at = if lists == 1 { size.to_string() } else { format!("{lists}x{size}") };
        report.text_row("walk beside a writer", &at, PEER, (walk, their_walk), target);
        let row = Row {
            bench: "… and the writer's remove and add".to_owned(),
            at,
            ours_ns: change,
            peer: PEER.to_owned(),
            peer_ns: Some(their_change),
            ratio: Some(their_change / change),
            target: None,
        };
        report.add(row, &nanoseconds(change), &nanoseconds(their_change));
    }
    Ok(())
}

/// Nanoseconds for each walk, and for each change beside it.
fn round(
    length: Duration,
    lists: usize,
    entries: usize,
    mut change: impl FnMut(usize) + Send,
    mut walk: impl FnMut(usize),
) -> (f64, f64) {
    let (stop, changes) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (stop, changes) = (&stop, &changes);
        scope.spawn(move || {
            let mut random = Random::new(31);
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..16 {
                    change(random.below(entries));
                }
                changes.store(changes.load(Ordering::Relaxed) + 16, Ordering::Relaxed);
            }
        });
        while changes.load(Ordering::Relaxed) == 0 {
            std::hint::spin_loop();
        }
        let mut random = Random::new(17);
        let (mut walks, before, start) = (0u64, changes.load(Ordering::Relaxed), Instant::now());
        while start.elapsed() < length {
            for _ in 0..64 {
                walk(random.below(lists));
            }
            walks += 64;
        }
        #[expect(clippy::cast_precision_loss, reason = "a time is not that exact")]
        let (elapsed, walks, done) = (
            start.elapsed().as_nanos() as f64,
            walks as f64,
            (changes.load(Ordering::Relaxed) - before).max(1) as f64,
        );
        stop.store(true, Ordering::Relaxed);
        (elapsed / walks, elapsed / done)
    })
}

fn our_round(ours: &mut Ours, lists: usize, size: usize, length: Duration) -> anyhow::Result<(f64, f64)> {
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

fn their_round(theirs: &mut Theirs, lists: usize, size: usize, length: Duration) -> (f64, f64) {
    let Theirs { heads, cache, .. } = theirs;
    let heads = &*heads;
    let change = |number: usize| {
        heads[number % lists].remove(super::entry(number).get(), cache);
        black_box(heads[number % lists].add(super::entry(number).get(), cache));
    };
    let walk = |list: usize| heads[list].walk_locked(|word| _ = black_box(word));
    round(length, lists, lists * size, change, walk)
}
