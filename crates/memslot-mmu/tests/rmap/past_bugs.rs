//! Bugs that KVM's reverse map has had, each as a test that fails where the same mistake is made here.
//!
//! Numbers are the rows of the project's list of past bugs.

use std::collections::HashSet;

use memslot::{Gfn, GfnRange};
use memslot_mmu::Level;
use memslot_mmu::rmap::{Rmap, RmapError, Under, Writer};

use super::common::{Book, Entry, not_filed};

fn range(start: u64, len: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(start), len).unwrap()
}

/// CVE-2026-46113: a guest's page directory entry changed from outside, so that a shadow page came to stand for other
/// frames; its entries were removed under the new gfn, and stayed filed under the old one after the slot was gone.
#[test]
fn row_29_the_gfn_changes_between_add_and_remove() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let slot = rmap.slot(range(0, 0x2000), Level::K4).unwrap();
    let (mut cache, book) = (rmap.cache(), Book::default());
    cache.reserve(1).unwrap();
    let entry = |number| Entry { list: 0, number };
    let (a, b) = (Gfn::new(0x123), Gfn::new(0x1123));
    let (list_a, list_b) = (slot.reserve(Level::K4, a).unwrap(), slot.reserve(Level::K4, b).unwrap());
    book.add(&mut writer, list_a, entry(1), &mut cache);
    book.add(&mut writer, list_b, entry(2), &mut cache);
    // The shadow page is for other frames now: whoever computes the gfn again gets `b`. Nobody asks.
    assert_eq!(book.remove(&mut writer, entry(1)), 0);
    assert!(slot.list(Level::K4, a).unwrap().is_empty());
    assert_eq!(writer.entries(slot.list(Level::K4, b).unwrap()).collect::<Vec<_>>(), [entry(2)]);
    // Everything that is filed in the slot is found through it, and each has a record that leads back there.
    for (gfn, list) in slot.lists(Level::K4, slot.gfns()) {
        for entry in writer.entries(list) {
            let under = writer.filed_under(&book.look(entry).unwrap());
            assert_eq!(under, Some(Under::Gfn { gfn, level: Level::K4 }));
        }
    }
}

/// CVE-2026-53359: a shadow page was used for another role, and its entries removed as if they were of that role.
#[test]
fn row_30_the_role_changes_between_add_and_remove() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let slot = rmap.slot(range(0, 0x1000), Level::M2).unwrap();
    let (mut cache, book) = (rmap.cache(), Book::default());
    let child = rmap.parents().unwrap();
    // The same entry, once a large page, once a way to a shadow page: the record tells which, not the caller.
    let entry = Entry { list: 0, number: 9 };
    let large = slot.reserve(Level::M2, Gfn::new(0x200)).unwrap();
    book.add(&mut writer, large, entry, &mut cache);
    let small = slot.reserve(Level::K4, Gfn::new(0x200)).unwrap();
    assert_eq!(book.remove(&mut writer, entry), 0);
    assert!(large.is_empty() && small.is_empty());
    book.add(&mut writer, child.list(), entry, &mut cache);
    assert_eq!(writer.filed_under(&book.look(entry).unwrap()), Some(Under::Parents));
    assert_eq!(book.remove(&mut writer, entry), 0);
    assert!(child.list().is_empty());
}

/// A slot goes with entries still filed: their records lead nowhere, also when the memory is another slot's.
#[test]
fn row_29_records_outlive_their_slot() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let (mut cache, book) = (rmap.cache(), Book::default());
    let (gfn, entry) = (Gfn::new(5), |number| Entry { list: 0, number });
    let slot = rmap.slot(range(0, 0x200), Level::K4).unwrap();
    cache.reserve(1).unwrap();
    for number in 0..5 {
        book.add(&mut writer, slot.reserve(Level::K4, gfn).unwrap(), entry(number), &mut cache);
    }
    let mut walker = rmap.walker().unwrap();
    let inside = walker.enter();
    drop(slot);
    // The chunk is gone; what the walker might be in is not.
    assert!(!writer.reclaim(10));
    for number in 0..2 {
        let gone = writer.remove(book.take(entry(number)).unwrap(), entry(number), book.keep());
        assert_eq!(gone, Err(not_filed(entry(number), None)));
        assert!(gone.unwrap_err().to_string().ends_with("is not filed under a list that is gone"));
    }
    drop(inside);
    assert!(writer.reclaim(10));
    let slot = rmap.slot(range(0x1000, 0x200), Level::K4).unwrap();
    let list = slot.reserve(Level::K4, Gfn::new(0x1005)).unwrap();
    let other = Book::default();
    for number in 10..15 {
        other.add(&mut writer, list, entry(number), &mut cache);
    }
    for number in 2..5 {
        let gone = writer.remove(book.take(entry(number)).unwrap(), entry(number), book.keep());
        let under = Under::Gfn { gfn: Gfn::new(0x1005), level: Level::K4 };
        assert_eq!(gone, Err(not_filed(entry(number), Some(under))));
    }
    writer.check(list, |entry| other.look(entry)).unwrap();
}

/// Row 32: a large page that begins before its slot, or ends behind it, has no list, and no index out of bounds.
#[test]
fn rows_32_33_large_pages_that_are_not_all_in_the_slot() {
    let (rmap, _writer) = Rmap::<Entry>::new().unwrap();
    // 2 MiB pages at 0x400 and 0x600 are in it; those at 0x200 and 0x800 in part.
    let slot = rmap.slot(range(0x3ff, 0x402), Level::G1).unwrap();
    for (level, gfn, inside) in [
        (Level::K4, 0x3fe, false),
        (Level::K4, 0x3ff, true),
        (Level::K4, 0x800, true),
        (Level::K4, 0x801, false),
        (Level::M2, 0x200, false),
        (Level::M2, 0x3ff, false),
        (Level::M2, 0x400, true),
        (Level::M2, 0x7ff, true),
        (Level::M2, 0x800, false),
        (Level::M2, 0, false),
        (Level::G1, 0x400, false),
        (Level::K4, u64::MAX, false),
        (Level::M2, u64::MAX, false),
    ] {
        let gfn = Gfn::new(gfn);
        let reserved = slot.reserve(level, gfn);
        assert_eq!(reserved.is_ok(), inside, "{level} at {gfn}");
        assert_eq!(slot.list(level, gfn).is_some(), inside);
        if !inside {
            assert_eq!(reserved.unwrap_err(), RmapError::Outside { gfn, level, slot: slot.gfns() });
        }
    }
    // No frames, no lists; the last frame that there is has one.
    let none = rmap.slot(range(7, 0), Level::G1).unwrap();
    assert!(none.reserve(Level::K4, Gfn::new(7)).is_err());
    let last =
        rmap.slot(GfnRange::new(Gfn::new(u64::MAX - 5), Gfn::new(u64::MAX)).unwrap(), Level::G1).unwrap();
    assert!(last.reserve(Level::K4, Gfn::new(u64::MAX - 1)).is_ok());
    assert!(last.reserve(Level::M2, Gfn::new(u64::MAX - 1)).is_err());
    let large = Level::new(4).unwrap();
    assert_eq!(rmap.slot(range(0, 1), large).err(), Some(RmapError::Level { level: large }));
    assert_eq!(slot.reserve(large, Gfn::new(0x400)).err(), Some(RmapError::Level { level: large }));
}

/// Row 43, and the proposal of 2013: the count was that after adding in one place and that before in another.
#[test]
fn row_43_add_returns_the_count_before() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let (mut cache, book, parents) = (rmap.cache(), Book::default(), rmap.parents().unwrap());
    cache.reserve(80).unwrap();
    for number in 0..1002 {
        let before = book.add(&mut writer, parents.list(), Entry { list: 0, number }, &mut cache);
        assert_eq!(before, number as usize);
        assert_eq!(writer.count(parents.list()), before + 1);
    }
    for number in 0..1002 {
        assert_eq!(book.remove(&mut writer, Entry { list: 0, number }), 1001 - number as usize);
    }
}

/// Row 43: an entry that is removed moves another into its place, where a walker that goes on in the wrong direction has been
/// already. Played step by step: the walker stops after each entry, and the writer removes each other.
#[test]
fn row_43_a_walker_misses_no_entry_that_moves() {
    for size in [2usize, 3, 13, 14, 15, 16, 28, 29, 30] {
        for stop in 0..size {
            for victim in 0..size as u32 {
                let (rmap, mut writer) = Rmap::new().unwrap();
                let (mut cache, book, parents) = (rmap.cache(), Book::default(), rmap.parents().unwrap());
                cache.reserve(8).unwrap();
                let list = parents.list();
                let entry = |number| Entry { list: 0, number };
                for number in 0..size as u32 {
                    book.add(&mut writer, list, entry(number), &mut cache);
                }
                let mut walker = rmap.walker().unwrap();
                let inside = walker.enter();
                let mut walk = inside.entries(list);
                let mut seen: HashSet<Entry> = walk.by_ref().take(stop).collect();
                // Two go, one comes.
                let next = (victim + 1) % size as u32;
                book.remove(&mut writer, entry(victim));
                book.add(&mut writer, list, entry(1000), &mut cache);
                book.remove(&mut writer, entry(next));
                seen.extend(walk);
                for number in (0..size as u32).filter(|&number| number != victim && number != next) {
                    assert!(
                        seen.contains(&entry(number)),
                        "{size} entries, {stop} seen, {victim} removed: {number}"
                    );
                }
                drop(inside);
            }
        }
    }
}

/// Row 43, what was proposed in 2013: the last entry of the first descriptor moves into the hole, and walks go *upwards*, so it moves to where
/// the walk has been. Played in a plain array, with each place where the walk can be and each entry that can go, upwards and
/// downwards: the same moves, and only the direction decides whether an entry is missed.
#[test]
fn row_43_walking_upwards_misses_what_moves() {
    let missed = |upwards: bool| {
        let mut missed = 0;
        for size in 2..=14usize {
            for (stop, victim) in (0..=size).flat_map(|stop| (0..size).map(move |victim| (stop, victim))) {
                let mut cells: Vec<Option<usize>> = (0..size).map(Some).collect();
                let order: Vec<usize> = if upwards { (0..size).collect() } else { (0..size).rev().collect() };
                let mut seen: HashSet<usize> = order[..stop].iter().filter_map(|&at| cells[at]).collect();
                cells[victim] = cells[size - 1];
                cells[size - 1] = None;
                seen.extend(order[stop..].iter().filter_map(|&at| cells[at]));
                missed += (0..size).filter(|number| *number != victim && !seen.contains(number)).count();
            }
        }
        missed
    };
    // With each place of the walk between the hole and the last entry, that entry is missed.
    assert_eq!(missed(true), (2..=14).map(|size| size * (size - 1) / 2).sum());
    assert_eq!(missed(false), 0);
}

/// Row 43: the last entry; and a list that has two again and again.
#[test]
fn row_43_lists_fold_back_into_their_word() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let (mut cache, book, parents) = (rmap.cache(), Book::default(), rmap.parents().unwrap());
    let entry = |number| Entry { list: 0, number };
    book.add(&mut writer, parents.list(), entry(0), &mut cache);
    for round in 0..1000 {
        cache.reserve(1).unwrap();
        assert_eq!(book.add(&mut writer, parents.list(), entry(round + 1), &mut cache), 1);
        assert_eq!(book.remove(&mut writer, entry(round)), 1);
        book.check(&writer, parents.list(), &[entry(round + 1)], Under::Parents);
    }
    assert_eq!(book.remove(&mut writer, entry(1000)), 0);
    assert!(parents.list().is_empty());
    // Not a descriptor for each round: those that left were used again.
    assert!(rmap.bytes() < 100 * 1024, "{} bytes", rmap.bytes());
}

/// Row 44: what is done under the lock does not depend on how long a list is. Counted in records that change: two at most.
#[test]
fn row_44_changes_are_bounded() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let (mut cache, parents) = (rmap.cache(), rmap.parents().unwrap());
    cache.reserve(400).unwrap();
    let mut records = std::collections::HashMap::new();
    for number in 0..5000 {
        let mut told = 0;
        let entry = Entry { list: 0, number };
        let keep = |entry: Entry, filed: memslot_mmu::rmap::Filed| {
            told += 1;
            records.insert(entry, filed);
        };
        writer.add(parents.list(), entry, &mut cache, keep).unwrap();
        // The oldest of 14 hears when a second descriptor comes.
        assert_eq!(told, if number == 14 { 2 } else { 1 });
    }
    for number in (0..5000).rev().step_by(2).chain((0..5000).step_by(2)) {
        let mut told = 0;
        let entry = Entry { list: 0, number };
        let filed = records.remove(&entry).unwrap();
        let keep = |entry: Entry, filed: memslot_mmu::rmap::Filed| {
            told += 1;
            records.insert(entry, filed);
        };
        writer.remove(filed, entry, keep).unwrap();
        assert!(told <= 1);
    }
    assert!(records.is_empty() && parents.list().is_empty());
}

/// The record of the oldest of 14 is told once, when a 15th comes: not again, and not if another is in its place by then.
#[test]
fn row_44_the_oldest_hears_once() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let (mut cache, parents) = (rmap.cache(), rmap.parents().unwrap());
    cache.reserve(10).unwrap();
    let book = Book::default();
    let entry = |number| Entry { list: 0, number };
    let mut add = |writer: &mut memslot_mmu::rmap::Writer<Entry>, number| {
        let mut told = Vec::new();
        let keep = |entry: Entry, filed: memslot_mmu::rmap::Filed| {
            told.push(entry.number);
            book.keep()(entry, filed);
        };
        writer.add(parents.list(), entry(number), &mut cache, keep).unwrap();
        told
    };
    for number in 0..14 {
        assert_eq!(add(&mut writer, number), [number]);
    }
    assert_eq!(add(&mut writer, 14), [0, 14]);
    book.remove(&mut writer, entry(14));
    assert_eq!(add(&mut writer, 15), [15], "it has heard");
    (1..16).filter(|&number| number != 14).for_each(|number| _ = book.remove(&mut writer, entry(number)));
    for number in 20..33 {
        add(&mut writer, number);
    }
    // The last one moves into the first cell, and hears of it.
    book.remove(&mut writer, entry(0));
    assert_eq!(add(&mut writer, 33), [33]);
    assert_eq!(add(&mut writer, 34), [34]);
    writer.check(parents.list(), |entry| book.look(entry)).unwrap();
}

/// Row 46: what a walk goes through is replaced, and freed, only when no walk is in it.
#[test]
fn row_46_a_walker_keeps_what_it_walks() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let (mut cache, book, parents) = (rmap.cache(), Book::default(), rmap.parents().unwrap());
    let other = rmap.parents().unwrap();
    cache.reserve(10).unwrap();
    for number in 0..100 {
        book.add(&mut writer, parents.list(), Entry { list: 0, number }, &mut cache);
    }
    let mut walker = rmap.walker().unwrap();
    let inside = walker.enter();
    let mut walk = inside.entries(parents.list());
    let first = walk.next().unwrap();
    for number in 0..100 {
        book.remove(&mut writer, Entry { list: 0, number });
    }
    assert!(!writer.reclaim(10), "a walker is inside");
    for number in 0..200 {
        cache.reserve(1).unwrap();
        book.add(&mut writer, other.list(), Entry { list: 1, number }, &mut cache);
    }
    let seen: Vec<_> = walk.collect();
    assert!(first.list == 0 && seen.iter().all(|entry| entry.list == 0), "{seen:?}");
    drop(inside);
    assert!(writer.reclaim(10));
}

/// Rows of seed 003 and KVM's limit: the 1001st entry sends old ones away, not the one that was just added.
#[test]
fn a_bounded_list_lets_go_of_the_oldest() {
    const LIMIT: usize = 1000;
    let (rmap, mut writer) = Rmap::new().unwrap();
    let (mut cache, book, parents) = (rmap.cache(), Book::default(), rmap.parents().unwrap());
    for number in 0..10_000 {
        cache.reserve(1).unwrap();
        let entry = Entry { list: 0, number };
        book.add(&mut writer, parents.list(), entry, &mut cache);
        let is_long = writer.count(parents.list()) > LIMIT;
        let gone = writer.recycle(parents.list(), LIMIT, entry, |old| {
            // A hundred and twelve go, or fewer.
            assert!(old.number + LIMIT as u32 - 8 * 14 <= number, "{} went when {number} came", old.number);
            let _ = book.take(old).unwrap();
        });
        assert_eq!(gone > 0, is_long);
    }
    // Nothing is forgotten: the oldest that is left is not older than the limit.
    let oldest = writer.entries(parents.list()).map(|entry| entry.number).min().unwrap();
    assert!(10_000 - oldest <= LIMIT as u32, "{oldest}");
}

/// Whatever is called the newest, there are others to let go while the list is too long.
#[test]
fn a_list_that_is_too_long_always_has_some_to_let_go() {
    for size in 2..60 {
        for kept in 0..size {
            let (rmap, mut writer) = Rmap::new().unwrap();
            let (mut cache, book, parents) = (rmap.cache(), Book::default(), rmap.parents().unwrap());
            cache.reserve(8).unwrap();
            let entry = |number| Entry { list: 0, number };
            for number in 0..size {
                book.add(&mut writer, parents.list(), entry(number), &mut cache);
            }
            while writer.count(parents.list()) > 1 {
                let gone = writer.recycle(parents.list(), 1, entry(kept), |old| {
                    assert_ne!(old, entry(kept), "{size} entries");
                    let _ = book.take(old).unwrap();
                });
                assert!(gone > 0, "{size} entries, {kept} stays");
            }
            book.check(&writer, parents.list(), &[entry(kept)], Under::Parents);
        }
    }
}

/// The oldest go together, with the descriptors that they are in, but for the one that is said to be the newest.
#[test]
fn what_is_recycled_is_the_oldest_but_for_the_newest() {
    let (rmap, mut writer) = Rmap::new().unwrap();
    let (mut cache, book, parents) = (rmap.cache(), Book::default(), rmap.parents().unwrap());
    cache.reserve(90).unwrap();
    let (entry, list) = (|number| Entry { list: 0, number }, parents.list());
    let recycle = |writer: &mut Writer<Entry>, limit, newest| {
        let mut old = Vec::new();
        let gone = writer.recycle(list, limit, entry(newest), |entry| {
            old.push((entry.number, book.take(entry).unwrap()));
        });
        assert_eq!(gone, old.len());
        // Their records lead nowhere.
        let check = |(number, filed)| {
            assert!(writer.remove(filed, entry(number), book.keep()).is_err());
            number
        };
        let mut old: Vec<_> = old.into_iter().map(check).collect();
        old.sort_unstable();
        let mut there: Vec<_> = writer.entries(list).collect();
        there.sort_unstable();
        book.check(writer, list, &there, Under::Parents);
        old
    };
    for number in 0..45 {
        book.add(&mut writer, list, entry(number), &mut cache);
    }
    assert_eq!(recycle(&mut writer, 45, 44), []);
    assert_eq!(recycle(&mut writer, 44, 44), (0..14).collect::<Vec<_>>());
    // 44 moves to where 20 is, among the oldest. Then those in front go.
    assert_eq!(book.remove(&mut writer, entry(20)), 30);
    assert_eq!(book.add(&mut writer, list, entry(50), &mut cache), 30);
    assert_eq!(recycle(&mut writer, 10, 44), [42, 43, 50]);
    assert_eq!(recycle(&mut writer, 10, 44), (28..42).collect::<Vec<_>>());
    assert_eq!(recycle(&mut writer, 10, 44), (14..20).chain(21..28).collect::<Vec<_>>());
    book.check(&writer, list, &[entry(44)], Under::Parents);
    assert_eq!(recycle(&mut writer, 0, 44), []);
    // One that is not there spares nothing.
    book.add(&mut writer, list, entry(51), &mut cache);
    assert_eq!(recycle(&mut writer, 1, 99), [44, 51]);
    assert!(list.is_empty());
    // One entry in the first, and those behind it go: it is in the head then.
    for number in 100..115 {
        book.add(&mut writer, list, entry(number), &mut cache);
    }
    assert_eq!(recycle(&mut writer, 14, 114), (100..114).collect::<Vec<_>>());
    book.check(&writer, list, &[entry(114)], Under::Parents);
    book.remove(&mut writer, entry(114));
    // Long lists lose more at a time, but not without end.
    for number in 0..1000 {
        book.add(&mut writer, list, entry(number), &mut cache);
    }
    assert_eq!(recycle(&mut writer, 999, 999), (0..8 * 14).collect::<Vec<_>>());
    assert_eq!(recycle(&mut writer, 800, 999), (8 * 14..15 * 14).collect::<Vec<_>>());
    assert_eq!(writer.count(list), 1000 - 15 * 14);
}
