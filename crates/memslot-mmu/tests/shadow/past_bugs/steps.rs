//! Rows 36 and 44: what takes long is done in steps, which skip nothing.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::{ALL, Guest, LOG, NONE, PAGE_SIZE, PD, READONLY, USER_WRITE, in_pd, set_flags};
use crate::world::{RAM, Touched, range, slot};

/// Where the memory of these tests is, and how much: a step of the engine has 1024 entries. A bit less than seven shadow pages have, so that
/// a change of the whole slot goes through its frames, and not through the pages.
const FIRST: u64 = 4096;
const PAGES: u64 = 7 * 512 - 100;
const SLOT: u32 = 7;

/// Every page of a slot is mapped by an entry of its own: so many that a walk pauses three times, not at the end.
fn populated() -> Guest {
    let mut guest = Guest::small();
    guest.change(|world| {
        world.table.create(slot(RAM, SLOT, range(FIRST, PAGES), FIRST, NONE)).unwrap();
    });
    for index in 0..PAGES.div_ceil(512) {
        guest.put(PD, index, (FIRST + 512 * index) << 12 | ALL | PAGE_SIZE);
    }
    populate(&mut guest);
    guest
}

fn populate(guest: &mut Guest) {
    // What the processor has cached does not make an entry young.
    guest.load(0, 0);
    for page in 0..PAGES {
        let found = guest.world.touch(0, page << 12, USER_WRITE);
        assert!(matches!(found, Touched::Done(_)));
    }
    assert_eq!(guest.leaves() as u64, PAGES);
}

/// The frames that are mapped: asked by aging after the processor has used everything.
fn mapped(guest: &Guest) -> Vec<u64> {
    let mut ager = guest.world.shadow.ager().unwrap();
    (FIRST..FIRST + PAGES).filter(|gfn| ager.age(RAM, range(*gfn, 1)) > 0).collect()
}

/// Row 36: CVE-2021-47094: after a pause in the middle, the walk went on behind entries that it had not seen. Every page is gone
/// in the end, and none that was not asked for, wherever the pauses fall.
#[test]
fn row_36_zapping_in_steps_skips_nothing() {
    let mut guest = populated();
    for first in [0, 1, 511, 700] {
        populate(&mut guest);
        let shadow = guest.world.shadow.clone();
        guest.step(|_| shadow.zap_gfn_range(RAM, range(FIRST + first, PAGES - first - 1)));
        let expected: Vec<_> = (FIRST..FIRST + first).chain([FIRST + PAGES - 1]).collect();
        assert_eq!(mapped(&guest), expected);
        assert_eq!(guest.leaves(), expected.len(), "what was not asked for stays");
    }
}

/// Row 36, for what takes away the right to write and leaves the pages.
#[test]
fn row_36_write_protecting_in_steps_skips_nothing() {
    for flags in [LOG, READONLY] {
        let mut guest = populated();
        set_flags(&mut guest, SLOT, flags);
        assert_eq!(guest.leaves() as u64, PAGES, "they stay");
        for page in 0..PAGES {
            let cached = guest.world.host.cached(0, page);
            assert!(cached.is_none_or(|cached| !cached.rights.write), "{flags:?} {page}");
        }
        for page in [0, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 3073, PAGES - 1] {
            let found = guest.touch(0, page << 12, USER_WRITE);
            assert_eq!(matches!(found, Touched::Done(_)), flags == LOG, "{page}");
        }
    }
}

/// Row 36, where a slot's entries are found through the shadow pages that have some: more of those than a step looks at.
#[test]
fn row_36_visiting_pages_in_steps_skips_nothing() {
    const TABLES: u64 = 150;
    let mut guest = Guest::small();
    guest.change(|world| {
        world.table.create(slot(RAM, SLOT, range(FIRST, TABLES * 512), FIRST, NONE)).unwrap();
    });
    for index in 0..TABLES {
        guest.world.poke(RAM, (PD << 12) + index * 8, (FIRST + 512 * index) << 12 | ALL | PAGE_SIZE);
        let found = guest.world.touch(0, in_pd(index), USER_WRITE);
        assert!(matches!(found, Touched::Done(_)));
    }
    guest.step(|_| ());
    assert!(guest.leaves() as u64 >= TABLES);
    guest.delete(SLOT);
    assert_eq!(guest.leaves(), 0);
}

/// Row 44: soft lockups: everything went under one hold of the lock. What was given up under one hold of the lock is flushed for at its end, so there are as many flushes
/// as holds, and each is for a few pages.
#[test]
fn row_44_all_shadow_pages_go_a_few_at_a_time() {
    const TABLES: u64 = 150;
    let mut guest = Guest::small();
    guest.change(|world| {
        world.table.create(slot(RAM, SLOT, range(FIRST, TABLES * 512), FIRST, NONE)).unwrap();
    });
    for index in 0..TABLES {
        guest.put(PD, index, (FIRST + 512 * index) << 12 | ALL | PAGE_SIZE);
        let found = guest.world.touch(0, in_pd(index), USER_WRITE);
        assert!(matches!(found, Touched::Done(_)));
    }
    let before = guest.world.shadow.stats();
    assert!(before.pages as u64 >= TABLES);
    guest.world.shadow.zap_all();
    let after = guest.world.shadow.stats();
    let (zapped, flushes) = (after.zapped - before.zapped, after.flushes - before.flushes);
    assert_eq!((zapped, after.pages, after.leaves), (before.pages as u64, 0, 0));
    assert!(flushes >= zapped / 16, "{zapped} shadow pages went in {flushes} steps");
    guest.step(|_| ());
}

thread_local! {
    /// Whether this thread stays inside until it is let go.
    static STAYS: Cell<bool> = const { Cell::new(false) };
}

#[derive(Default)]
struct Watched {
    is_inside: AtomicBool,
    may_leave: AtomicBool,
    has_left: AtomicBool,
    is_zapping: AtomicBool,
    reached: AtomicU64,
    /// What `reached` was when the lock was given back.
    given_back: AtomicU64,
}

fn wait_for(flag: &AtomicBool) {
    while !flag.load(SeqCst) {
        std::thread::yield_now();
    }
}

/// Row 44, for a range: the lock is given back while it goes. That shows from outside because whoever gives it back frees the tables that
/// waited for those inside: somebody is inside, and leaves when the range has begun to go.
#[test]
fn row_44_the_lock_is_given_back_while_a_range_goes() {
    // More than are kept to be used again.
    const TABLES: u64 = 200;
    let mut guest = populated();
    guest.change(|world| {
        world.table.create(slot(RAM, 8, range(1 << 20, TABLES * 512), 1 << 19, NONE)).unwrap();
    });
    for index in 0..TABLES {
        let large = ((1 << 20) + 512 * index) << 12;
        guest.world.poke(RAM, (PD << 12) + (100 + index) * 8, large | ALL | PAGE_SIZE);
        assert!(matches!(guest.world.touch(0, in_pd(100 + index), USER_WRITE), Touched::Done(_)));
    }
    let watched = Arc::new(Watched::default());
    let watch = watched.clone();
    let watch = move |is_reached: bool| {
        if STAYS.get() {
            watch.is_inside.store(true, SeqCst);
            wait_for(&watch.may_leave);
        } else if watch.is_zapping.load(SeqCst) && is_reached {
            if watch.reached.fetch_add(1, SeqCst) == 100 {
                watch.may_leave.store(true, SeqCst);
                wait_for(&watch.has_left);
            }
        } else if watch.is_zapping.load(SeqCst) {
            let now = watch.reached.load(SeqCst);
            let _ = watch.given_back.compare_exchange(0, now, SeqCst, SeqCst);
        }
    };
    assert!(guest.world.host.watch.set(Box::new(watch)).is_ok());
    let shadow = guest.world.shadow.clone();
    let mut ager = shadow.ager().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            STAYS.set(true);
            ager.age(RAM, range(FIRST, 1));
            watched.has_left.store(true, SeqCst);
        });
        wait_for(&watched.is_inside);
        shadow.zap_all();
        populate(&mut guest);
        watched.is_zapping.store(true, SeqCst);
        shadow.zap_gfn_range(RAM, range(FIRST, PAGES));
        watched.is_zapping.store(false, SeqCst);
    });
    let (first, all) = (watched.given_back.load(SeqCst), watched.reached.load(SeqCst));
    assert!(0 < first && first * 2 < all, "of {all} entries, {first} went before the lock was given back");
    guest.step(|_| ());
    assert_eq!(guest.leaves(), 0);
}
