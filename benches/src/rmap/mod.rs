//! The reverse map: adding, removing, counting, walking; beside the kernel's layout, re-created in [`kernel`].
//!
//! Both sides have the same entries in the same lists, and an array with a word for each entry, as a shadow page has: ours
//! with the entry's record, the peer's with its gfn, by which it finds the list. What is added was removed before, at
//! random places, so neither side is measured at its tidiest.

mod beside;
mod kernel;

use std::hint::black_box;
use std::num::NonZeroU64;

use memslot::{Gfn, GfnRange};
use memslot_mmu::Level;
use memslot_mmu::rmap::{Cache, Filed, List, Rmap, SlotRmap, Walker, Writer};

use crate::Effort;
use crate::layout::Random;
use crate::measure::{median, time, versus};
use crate::report::{Report, Row};

const PEER: &str = "kernel's layout";
const SIZES: [usize; 7] = [1, 2, 8, 14, 15, 100, 1000];

pub(crate) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let rounds = match effort {
        Effort::Smoke => 1,
        Effort::Normal => 41,
        Effort::Long => 301,
    };
    for size in SIZES {
        changes(size, rounds, report)?;
    }
    for size in SIZES {
        reads(size, rounds, report)?;
    }
    find(rounds, report)?;
    beside::run(effort, report)?;
    memory(report)
}

fn entry(number: usize) -> NonZeroU64 {
    NonZeroU64::MIN.saturating_add((number as u64 + 1) * 8 - 1)
}

fn gfn(list: usize) -> Gfn {
    Gfn::new(list as u64)
}

/// Lists of the same length, entry `n` in list `n % lists`.
struct Ours {
    rmap: Rmap<NonZeroU64>,
    slot: SlotRmap<NonZeroU64>,
    writer: Writer<NonZeroU64>,
    cache: Cache,
    records: Vec<u64>,
}

impl Ours {
    fn new(lists: usize, size: usize) -> anyhow::Result<Self> {
        let (rmap, writer) = Rmap::new();
        let gfns = GfnRange::with_len(gfn(0), lists as u64).unwrap_or_default();
        let slot = rmap.slot(gfns, Level::K4)?;
        let mut cache = rmap.cache();
        cache.reserve(descriptors(lists, size))?;
        let mut ours = Self { rmap, slot, writer, cache, records: vec![0; lists * size] };
        for list in 0..lists {
            ours.slot.reserve(Level::K4, gfn(list))?;
        }
        for number in in_random_order(lists * size) {
            ours.add(number, lists);
        }
        Ok(ours)
    }

    fn add(&mut self, number: usize, lists: usize) {
        let Some(list) = self.slot.list(Level::K4, gfn(number % lists)) else { return };
        add(&mut self.writer, list, number, &mut self.cache, &mut self.records);
    }
}

#[inline(always)]
fn add(
    writer: &mut Writer<NonZeroU64>,
    list: List<'_, NonZeroU64>,
    number: usize,
    cache: &mut Cache,
    records: &mut [u64],
) {
    match writer.add(list, entry(number), cache, keep_in(records)) {
        Ok(before) => _ = black_box(before),
        Err(error) => panic!("{error}"),
    }
}

#[inline(always)]
fn remove(writer: &mut Writer<NonZeroU64>, number: usize, records: &mut [u64]) {
    let filed = Filed::from_bits(records[number]).unwrap_or_else(|| panic!("filed"));
    if let Err(error) = writer.remove(filed, entry(number), keep_in(records)) {
        panic!("{error}");
    }
}

/// Records by the entry's number, as a shadow page has them by the place of the entry.
#[inline(always)]
fn keep_in(records: &mut [u64]) -> impl FnMut(NonZeroU64, Filed) {
    move |entry, filed| records[usize::try_from(entry.get() / 8 - 1).unwrap_or(0)] = filed.into_bits()
}

/// The same of the peer.
struct Theirs {
    heads: Vec<kernel::Head>,
    cache: kernel::Cache,
    gfns: Vec<u64>,
}

impl Theirs {
    fn new(lists: usize, size: usize) -> Self {
        let heads = (0..lists).map(|_| kernel::Head::default()).collect();
        let cache = kernel::Cache::new(descriptors(lists, size));
        let mut theirs = Self { heads, cache, gfns: vec![0; lists * size] };
        for number in in_random_order(lists * size) {
            theirs.add(number, lists);
        }
        theirs
    }

    fn add(&mut self, number: usize, lists: usize) {
        let list = number % lists;
        peer_add(&self.heads[list], list, number, &mut self.cache, &mut self.gfns);
    }
}

#[inline(always)]
fn peer_add(head: &kernel::Head, gfn: usize, number: usize, cache: &mut kernel::Cache, gfns: &mut [u64]) {
    gfns[number] = gfn as u64;
    black_box(head.add(entry(number).get(), cache));
}

#[inline(always)]
fn peer_remove(heads: &[kernel::Head], number: usize, cache: &mut kernel::Cache, gfns: &[u64]) {
    let gfn = usize::try_from(gfns[number]).unwrap_or(0);
    heads[gfn].remove(entry(number).get(), cache);
}

fn lists_of(size: usize) -> usize {
    (8192 / size).max(8)
}

fn descriptors(lists: usize, size: usize) -> usize {
    lists * (size / 14 + 2) + 256
}

fn in_random_order(count: usize) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..count).collect();
    Random::new(7).shuffle(&mut numbers);
    numbers
}

/// Removes some entries of each list at random, and adds them again.
fn changes(size: usize, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("add") && !report.wants("remove") {
        return Ok(());
    }
    let lists = lists_of(size);
    let per_list = (size / 16).max(1);
    let (mut ours, mut theirs) = (Ours::new(lists, size)?, Theirs::new(lists, size));
    // Both sides are given the list itself to add to; the row "find" shows what finding it costs.
    let Ours { slot, writer, cache, records, .. } = &mut ours;
    let slot = &*slot;
    let all: Vec<_> = (0..lists).filter_map(|list| slot.list(Level::K4, gfn(list))).collect();
    let Theirs { heads, cache: peer_cache, gfns } = &mut theirs;
    let heads: &[kernel::Head] = heads;
    let peers: Vec<&kernel::Head> = heads.iter().collect();
    let mut random = Random::new(99);
    let mut times = [const { Vec::new() }; 4];
    for round in 0..rounds + 2 {
        let mut victims = Vec::with_capacity(lists * per_list);
        for list in 0..lists {
            let mut places: Vec<usize> = (0..size).collect();
            random.shuffle(&mut places);
            victims.extend(places.iter().take(per_list).map(|place| place * lists + list));
        }
        random.shuffle(&mut victims);
        let (victims, count) = (&victims, victims.len());
        let mut measured = [0.0; 4];
        for side in [round % 2, 1 - round % 2] {
            if side == 0 {
                measured[0] = time(count, || {
                    victims.iter().for_each(|&number| remove(writer, number, records));
                });
                measured[1] = time(count, || {
                    victims
                        .iter()
                        .for_each(|&number| add(writer, all[number % lists], number, cache, records));
                });
            } else {
                measured[2] = time(count, || {
                    victims.iter().for_each(|&number| peer_remove(heads, number, peer_cache, gfns));
                });
                measured[3] = time(count, || {
                    victims.iter().for_each(|&number| {
                        let list = number % lists;
                        peer_add(peers[list], list, number, peer_cache, gfns);
                    });
                });
            }
            // Outside of the lock, as a fault does.
            cache.reserve(descriptors(lists, 0))?;
        }
        // The first rounds warm up.
        if round >= 2 {
            times.iter_mut().zip(measured).for_each(|(times, time)| times.push(time));
        }
    }
    let [our_remove, our_add, their_remove, their_add] = times.map(|mut times| median(&mut times));
    if report.wants("add") {
        report.times("add", size, PEER, (our_add, their_add), Some(1.0));
    }
    if report.wants("remove") {
        let target = if size == 1000 { 5.0 } else { 1.0 };
        report.times("remove", size, PEER, (our_remove, their_remove), Some(target));
    }
    Ok(())
}

fn reads(size: usize, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let lists = lists_of(size);
    let (ours, theirs) = (Ours::new(lists, size)?, Theirs::new(lists, size));
    let repeat = if rounds == 1 { 1 } else { 4 };
    let peers: Vec<&kernel::Head> = theirs.heads.iter().collect();
    let all: Vec<_> = (0..lists).filter_map(|list| ours.slot.list(Level::K4, gfn(list))).collect();
    let operations = all.len() * repeat;
    let times = |work: &mut dyn FnMut()| time(operations, || (0..repeat).for_each(|_| work()));

    if report.wants("count") {
        let mine = || times(&mut || all.iter().for_each(|list| _ = black_box(ours.writer.count(*list))));
        let peer = || times(&mut || peers.iter().for_each(|head| _ = black_box(head.count())));
        report.times("count", size, PEER, versus(rounds, mine, peer), Some(1.0));
    }
    let mut walker: Walker<_> = ours.rmap.walker()?;
    let peer_locked =
        || times(&mut || peers.iter().for_each(|head| head.walk_locked(|word| _ = black_box(word))));
    let peer = || times(&mut || peers.iter().for_each(|head| head.walk(|word| _ = black_box(word))));
    if report.wants("walk a list, lock-free") {
        let mine = || {
            times(&mut || {
                for &list in &all {
                    walker.enter().entries(list).for_each(|entry| _ = black_box(entry));
                }
            })
        };
        let ns = versus(rounds, mine, peer_locked);
        report.times("walk a list, lock-free", size, "… with its lock", ns, Some(1.0));
    }
    if report.wants("walk many lists, lock-free") {
        let mine = || {
            times(&mut || {
                let inside = walker.enter();
                all.iter().for_each(|&list| inside.entries(list).for_each(|entry| _ = black_box(entry)));
            })
        };
        let ns = versus(rounds, mine, peer_locked);
        report.times("walk many lists, lock-free", size, "… with their locks", ns, Some(1.0));
    }
    if report.wants("walk, as the writer") {
        let mine = || {
            times(&mut || {
                all.iter().for_each(|&list| ours.writer.entries(list).for_each(|entry| _ = black_box(entry)));
            })
        };
        let ns = versus(rounds, mine, peer);
        report.times("walk, as the writer", size, "… holding the MMU's lock", ns, Some(1.0));
    }
    Ok(())
}

/// From gfn to list: the kernel's array has room for all frames from the start.
fn find(rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("find the list of a gfn") {
        return Ok(());
    }
    let lists = 1 << 18;
    let (rmap, _writer) = Rmap::<NonZeroU64>::new();
    let slot = rmap.slot(GfnRange::with_len(gfn(0), lists as u64).unwrap_or_default(), Level::K4)?;
    for list in 0..lists {
        slot.reserve(Level::K4, gfn(list))?;
    }
    let heads: Vec<kernel::Head> = (0..lists).map(|_| kernel::Head::default()).collect();
    let mut random = Random::new(3);
    let places: Vec<usize> = (0..1 << 14).map(|_| random.below(lists)).collect();
    let mine = || {
        time(places.len(), || {
            for &place in &places {
                black_box(slot.list(Level::K4, gfn(place)).is_some_and(|list| list.is_empty()));
            }
        })
    };
    let peer =
        || time(places.len(), || places.iter().for_each(|&place| _ = black_box(heads[place].count() == 0)));
    report.text_row("find the list of a gfn", "1 GiB", "an array", versus(rounds, mine, peer), None);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn memory(report: &mut Report) -> anyhow::Result<()> {
    const TIB: u64 = 1 << 28;
    for (name, frames) in [("bytes, nothing mapped", 0), ("bytes, 1000 scattered frames mapped", 1000)] {
        if !report.wants(name) {
            continue;
        }
        let (rmap, _writer) = Rmap::<NonZeroU64>::new();
        let before = rmap.bytes();
        let slot = rmap.slot(GfnRange::with_len(gfn(0), TIB).unwrap_or_default(), Level::G1)?;
        for frame in 0..frames {
            slot.reserve(Level::K4, Gfn::new(frame * (TIB / 1000)))?;
        }
        let (ours, kernel) =
            ((rmap.bytes() - before) as f64, (8 * (TIB + TIB / 512 + TIB / (512 * 512))) as f64);
        let mib = |bytes: f64| format!("{:.2} MiB", bytes / f64::from(1 << 20));
        let row = Row {
            bench: name.to_owned(),
            at: "1 TiB".to_owned(),
            ours_ns: ours,
            peer: "kernel: arrays".to_owned(),
            peer_ns: Some(kernel),
            ratio: Some(kernel / ours),
            target: Some(64.0),
        };
        report.add(row, &mib(ours), &mib(kernel));
    }
    Ok(())
}
