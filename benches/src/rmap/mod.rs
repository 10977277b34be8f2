//! The reverse map: adding, removing, counting, walking; beside the kernel's layout, re-created in [`kernel`].
//!
//! Both sides do what a user of them has to do. Both have the same entries in the same lists, and an array with a word for
//! each entry, as a shadow page has: ours with the entry's record, the peer's with its gfn.
//!
//! * *add* begins with slot and gfn, as a fault has them: the cache is topped up if it runs low, the list is found, the
//!   entry is added, and its word is stored.
//! * *remove* begins with an entry: its word is loaded, which leads to the list (the peer's by the slot that was used last), and
//!   the entry is removed, with what this means for the words of others.
//! * *count* and *walk* begin with the list.
//!
//! What is added was removed before, at random places in random order, so neither side is measured at its tidiest. What is the
//! same on both sides is left out: finding the shadow page of an entry, statistics, the MMU's own lock.

mod beside;
mod kernel;

use std::hint::black_box;
use std::num::NonZeroU64;

use memslot::{Gfn, GfnRange};
use memslot_mmu::Level;
use memslot_mmu::rmap::{Cache, Entries, Filed, Rmap, SlotRmap, Walker, Writer};

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
    bounded(rounds, report)?;
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
        let (rmap, writer) = Rmap::new()?;
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
        let Self { slot, writer, cache, records, .. } = self;
        add(writer, slot, number, gfn(number % lists), cache, records);
    }
}

#[inline(always)]
fn add(
    writer: &mut Writer<NonZeroU64>,
    slot: &SlotRmap<NonZeroU64>,
    number: usize,
    gfn: Gfn,
    cache: &mut Cache,
    records: &mut [u64],
) {
    if cache.len() < kernel::LOW && cache.reserve(kernel::FULL).is_err() {
        panic!("memory");
    }
    let Some(list) = slot.list(Level::K4, gfn) else { panic!("reserved") };
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
    slots: kernel::Slots,
    cache: kernel::Cache,
    gfns: Vec<u64>,
}

impl Theirs {
    fn new(lists: usize, size: usize) -> Self {
        let slots = kernel::Slots(kernel::Slot::new(0, lists as u64));
        let cache = kernel::Cache::new(descriptors(lists, size));
        let mut theirs = Self { slots, cache, gfns: vec![0; lists * size] };
        for number in in_random_order(lists * size) {
            theirs.add(number, lists);
        }
        theirs
    }

    fn add(&mut self, number: usize, lists: usize) {
        let Self { slots, cache, gfns } = self;
        peer_add(&slots.0, number, gfn(number % lists).get(), cache, gfns);
    }
}

#[inline(always)]
fn peer_add(slot: &kernel::Slot, number: usize, gfn: u64, cache: &mut kernel::Cache, gfns: &mut [u64]) {
    cache.top_up();
    gfns[number] = gfn;
    black_box(slot.list(0, gfn).add(entry(number).get(), cache));
}

#[inline(always)]
fn peer_remove(slots: &kernel::Slots, number: usize, cache: &mut kernel::Cache, gfns: &[u64]) {
    let gfn = gfns[number];
    slots.find(gfn).list(0, gfn).remove(entry(number).get(), cache);
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
    let mut random = Random::new(99);
    let mut times = [const { Vec::new() }; 4];
    for round in 0..rounds + 2 {
        // The first time warms what the other side has pushed out; others go then than those that are measured.
        let victims = [(); 2].map(|()| victims(lists, size, per_list, &mut random));
        let mut measured = [0.0; 4];
        for side in [round % 2, 1 - round % 2] {
            for victims in &victims {
                if side == 0 {
                    measured[0] = our_removes(&mut ours, victims);
                    measured[1] = our_adds(&mut ours, victims);
                } else {
                    measured[2] = their_removes(&mut theirs, victims);
                    measured[3] = their_adds(&mut theirs, victims);
                }
            }
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

/// So many entries of each list, at random places, in random order.
fn victims(lists: usize, size: usize, per_list: usize, random: &mut Random) -> Vec<(usize, Gfn)> {
    let mut victims = Vec::with_capacity(lists * per_list);
    for list in 0..lists {
        let mut places: Vec<usize> = (0..size).collect();
        random.shuffle(&mut places);
        victims.extend(places.iter().take(per_list).map(|place| (place * lists + list, gfn(list))));
    }
    random.shuffle(&mut victims);
    victims
}

#[inline(never)]
fn our_removes(ours: &mut Ours, victims: &[(usize, Gfn)]) -> f64 {
    let Ours { writer, records, .. } = ours;
    time(victims.len(), || victims.iter().for_each(|&(number, _)| remove(writer, number, records)))
}

#[inline(never)]
fn our_adds(ours: &mut Ours, victims: &[(usize, Gfn)]) -> f64 {
    let Ours { writer, slot, cache, records, .. } = ours;
    time(victims.len(), || {
        victims.iter().for_each(|&(number, gfn)| add(writer, slot, number, gfn, cache, records));
    })
}

#[inline(never)]
fn their_removes(theirs: &mut Theirs, victims: &[(usize, Gfn)]) -> f64 {
    let Theirs { slots, cache, gfns } = theirs;
    time(victims.len(), || victims.iter().for_each(|&(number, _)| peer_remove(slots, number, cache, gfns)))
}

#[inline(never)]
fn their_adds(theirs: &mut Theirs, victims: &[(usize, Gfn)]) -> f64 {
    let Theirs { slots, cache, gfns } = theirs;
    time(victims.len(), || {
        victims.iter().for_each(|&(number, gfn)| peer_add(&slots.0, number, gfn.get(), cache, gfns));
    })
}

fn reads(size: usize, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    // Not so many that the lists' names, of which ours are twice as long, come from far away.
    let lists = (1024 / size).max(8);
    let (ours, theirs) = (Ours::new(lists, size)?, Theirs::new(lists, size));
    let repeat = if rounds == 1 { 1 } else { 32 };
    let peers: Vec<_> = (0..lists).map(|list| theirs.slots.0.list(0, list as u64)).collect();
    let all: Vec<_> = (0..lists).filter_map(|list| ours.slot.list(Level::K4, gfn(list))).collect();
    let operations = all.len() * repeat;
    let times = |work: &mut dyn FnMut()| time(operations, || (0..repeat).for_each(|_| work()));

    if report.wants("count") {
        let mine = || times(&mut || all.iter().for_each(|list| _ = black_box(ours.writer.count(*list))));
        let peer = || times(&mut || peers.iter().for_each(|head| _ = black_box(head.count())));
        report.times("count", size, PEER, versus(rounds, mine, peer), Some(1.0));
    }
    let mut walker: Walker<_> = ours.rmap.walker()?;
    let peer_locked = || times(&mut || peers.iter().for_each(|head| _ = black_box(peer_sum_locked(head))));
    let peer = || times(&mut || peers.iter().for_each(|head| _ = black_box(peer_sum(head))));
    if report.wants("walk a list, lock-free") {
        let mine =
            || times(&mut || all.iter().for_each(|&list| _ = black_box(sum(walker.enter().entries(list)))));
        let ns = versus(rounds, mine, peer_locked);
        report.times("walk a list, lock-free", size, "… with its lock", ns, Some(1.0));
    }
    if report.wants("walk many lists, lock-free") {
        let mine = || {
            times(&mut || {
                let inside = walker.enter();
                all.iter().for_each(|&list| _ = black_box(sum(inside.entries(list))));
            })
        };
        let ns = versus(rounds, mine, peer_locked);
        report.times("walk many lists, lock-free", size, "… with their locks", ns, Some(1.0));
    }
    if report.wants("walk, as the writer") {
        let mine =
            || times(&mut || all.iter().for_each(|&list| _ = black_box(sum(ours.writer.entries(list)))));
        let ns = versus(rounds, mine, peer);
        report.times("walk, as the writer", size, "… holding the MMU's lock", ns, Some(1.0));
    }
    Ok(())
}

/// What a walk does with the entries.
#[inline(always)]
fn sum(entries: Entries<'_, NonZeroU64>) -> u64 {
    entries.fold(0, |sum, entry| sum ^ entry.get())
}

#[inline(always)]
fn peer_sum(list: &kernel::Head) -> u64 {
    let mut sum = 0;
    list.walk(|entry| sum ^= entry);
    sum
}

#[inline(always)]
fn peer_sum_locked(list: &kernel::Head) -> u64 {
    let mut sum = 0;
    list.walk_locked(|entry| sum ^= entry);
    sum
}

/// From gfn to list: the kernel's array has room for all frames from the start.
fn find(rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("find the list of a gfn") {
        return Ok(());
    }
    let lists = 1 << 18;
    let (rmap, _writer) = Rmap::<NonZeroU64>::new()?;
    let slot = rmap.slot(GfnRange::with_len(gfn(0), lists as u64).unwrap_or_default(), Level::K4)?;
    for list in 0..lists {
        slot.reserve(Level::K4, gfn(list))?;
    }
    let peers = kernel::Slot::new(0, lists as u64);
    let mut random = Random::new(3);
    let places: Vec<usize> = (0..1 << 14).map(|_| random.below(lists)).collect();
    let mine = || {
        time(places.len(), || {
            for &place in &places {
                black_box(slot.list(Level::K4, gfn(place)).is_some_and(|list| list.is_empty()));
            }
        })
    };
    let peer = || {
        time(places.len(), || {
            for &place in &places {
                black_box(peers.list(0, place as u64).is_empty());
            }
        })
    };
    report.text_row("find the list of a gfn", "1 GiB", "an array", versus(rounds, mine, peer), None);
    Ok(())
}

/// Adds to a list that is kept at 1000 entries. The kernel zaps all of them when there are more, under the MMU's lock; here the oldest
/// go, no more than 14 at a time. So beside the time of an add, with its share of that work, there is the time of one such event.
fn bounded(rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    const LIMIT: usize = 1000;
    const NUMBERS: usize = 4096;
    const ADDS: usize = 10 * NUMBERS;
    if !report.wants("add, at most 1000 in a list") {
        return Ok(());
    }
    let mut ours = Ours::new(1, 0)?;
    ours.records = vec![0; NUMBERS];
    let mut theirs = Theirs::new(1, 0);
    theirs.cache = kernel::Cache::new(descriptors(1, NUMBERS));
    theirs.gfns = vec![0; NUMBERS];
    // What stands for the tables: zapping an entry is a store there.
    let mut tables = vec![0u64; NUMBERS];
    let (mut longest, mut their_longest) = (Vec::new(), Vec::new());
    let place = |word: u64| usize::try_from(word / 8 - 1).unwrap_or(0);
    // Asking for the time takes about as long as what is measured, so single events are timed in rounds of their own.
    let (mine, peer) = {
        let tables = std::cell::RefCell::new(&mut tables);
        let mut mine = |mut events: Option<&mut Vec<u128>>| {
            let Ours { writer, slot, cache, records, .. } = &mut ours;
            let tables = &mut *tables.borrow_mut();
            time(ADDS, || {
                for number in 0..ADDS {
                    let number = number % NUMBERS;
                    tables[number] = 1;
                    add(writer, slot, number, gfn(0), cache, records);
                    let Some(list) = slot.list(Level::K4, gfn(0)) else { panic!("reserved") };
                    if writer.count(list) > LIMIT {
                        let start = events.is_some().then(std::time::Instant::now);
                        let zap = |old: NonZeroU64| {
                            tables[place(old.get())] = 0;
                            records[place(old.get())] = 0;
                        };
                        black_box(writer.recycle(list, LIMIT, entry(number), zap));
                        if let (Some(start), Some(events)) = (start, &mut events) {
                            events.push(start.elapsed().as_nanos());
                        }
                    }
                }
            })
        };
        let mut peer = |mut events: Option<&mut Vec<u128>>| {
            let Theirs { slots, cache, gfns } = &mut theirs;
            let tables = &mut *tables.borrow_mut();
            time(ADDS, || {
                for number in 0..ADDS {
                    let number = number % NUMBERS;
                    tables[number] = 1;
                    peer_add(&slots.0, number, 0, cache, gfns);
                    let list = slots.0.list(0, 0);
                    if list.count() > LIMIT {
                        let start = events.is_some().then(std::time::Instant::now);
                        black_box(list.zap_all(cache, |word| tables[place(word)] = 0));
                        if let (Some(start), Some(events)) = (start, &mut events) {
                            events.push(start.elapsed().as_nanos());
                        }
                    }
                }
            })
        };
        for _ in 0..rounds {
            mine(Some(&mut longest));
            peer(Some(&mut their_longest));
        }
        versus(rounds, || mine(None), || peer(None))
    };
    report.times("add, at most 1000 in a list", LIMIT, PEER, (mine, peer), Some(1.0));
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let typical = |events: Vec<u128>| median(&mut events.into_iter().map(|ns| ns as f64).collect::<Vec<_>>());
    let ns = (typical(longest), typical(their_longest));
    report.times("… what goes at a time", LIMIT, PEER, ns, None);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn memory(report: &mut Report) -> anyhow::Result<()> {
    const TIB: u64 = 1 << 28;
    for (name, frames) in [("bytes, nothing mapped", 0), ("bytes, 1000 scattered frames mapped", 1000)] {
        if !report.wants(name) {
            continue;
        }
        let (rmap, _writer) = Rmap::<NonZeroU64>::new()?;
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
