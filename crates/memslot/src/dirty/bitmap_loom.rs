//! Interleavings of marking and taking, run by loom, with chunks of two words and directories of two places.
//!
//! What is checked in all of them: a mark that was made is in what is taken then or later, and whoever takes it
//! sees what was written before it.
//!
//! The same is checked with marks that leave alone what is marked (`fence.rs`); models in which takers make no heavy fence
//! must fail. loom knows no sequential consistency of single accesses, so the marker has fences in a model that it does
//! not have elsewhere, and they would order its write, too. Therefore such a write goes into a store buffer, which is a
//! thread of its own: the write comes out whenever that thread runs, and a heavy fence waits for what is in the buffer. The
//! exchange of `issued` is the place in the writer's thread that the fence is in front of or behind.

use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize as Written;
use loom::thread;

use super::*;
use crate::dirty::runs::Runs;

/// A guest's memory: a page, and the bitmap that its writer marks.
struct Guest {
    bitmap: Bitmap,
    page: Written,
    /// How many writes went into the store buffer, and how many came out; none where writes are made at once.
    issued: Written,
    drained: Written,
    buffers: bool,
    /// Whether takers make a heavy fence.
    fences: bool,
}

const PAGE: u64 = 65;

impl Guest {
    fn clean(buffers: bool, fences: bool) -> Self {
        let none = || Written::new(0);
        let guest =
            Self { bitmap: Bitmap::new(), page: none(), issued: none(), drained: none(), buffers, fences };
        guest.bitmap.reserve(gfns(0, PAGES)).unwrap();
        guest
    }

    /// With a chunk in place, as after a first mark.
    fn new() -> Arc<Self> {
        let guest = Self::clean(false, false);
        guest.bitmap.mark(0);
        Arc::new(guest)
    }

    /// With marks that leave alone what is marked, as the page is. Without `fences` that must go wrong.
    fn leaving(fences: bool) -> Arc<Self> {
        let guest = Self::clean(true, fences);
        guest.bitmap.mark(PAGE);
        guest.bitmap.set_leaves(true);
        Arc::new(guest)
    }

    /// The same with a place that is full.
    fn full(fences: bool) -> Arc<Self> {
        let guest = Self::leaving(fences);
        guest.bitmap.mark_range(gfns(0, PAGES));
        guest
    }

    /// Takes what is dirty in `[from, to)`, and gives it back at once; what the page holds if it is among it.
    fn take(&self, from: u64, to: u64) -> Option<usize> {
        let mut got = Vec::new();
        // SAFETY: only one thread of each model takes.
        unsafe { self.bitmap.take(from, to, &mut got).unwrap() };
        self.fence();
        let copy = Runs::new(&got, PAGE, PAGE + 1).next().map(|_| self.page.load(Ordering::Relaxed));
        for (number, held) in got {
            // SAFETY: as above.
            unsafe { self.bitmap.give_back(number, held) };
        }
        copy
    }

    /// Takes a word, as a clear does.
    fn clear(&self) -> Option<usize> {
        // SAFETY: only one thread of each model takes.
        let bits = unsafe { self.bitmap.take_word(PAGE, u64::MAX).unwrap() };
        self.fence();
        (bits != 0).then(|| self.page.load(Ordering::Relaxed))
    }

    fn fence(&self) {
        if self.fences {
            self.drain();
        }
    }

    /// Waits for all that is in the store buffer.
    fn drain(&self) {
        let issued = self.issued.fetch_add(0, Ordering::AcqRel);
        while self.drained.load(Ordering::Acquire) < issued {
            thread::yield_now();
        }
    }
}

fn write(guest: &Arc<Guest>, value: usize) {
    if guest.buffers {
        guest.issued.fetch_add(1, Ordering::AcqRel);
        let buffer = guest.clone();
        thread::spawn(move || {
            buffer.page.store(value, Ordering::Relaxed);
            buffer.drained.fetch_add(1, Ordering::Release);
        });
    } else {
        guest.page.store(value, Ordering::Relaxed);
    }
    guest.bitmap.mark(PAGE);
}

/// Runs a writer and a taker, and checks that the last value taken is the last one written.
fn check(write: fn(&Arc<Guest>), take: fn(&Guest) -> Option<usize>, last: usize) {
    check_on(Guest::new, write, take, last);
    check_on(|| Guest::leaving(true), write, take, last);
}

fn check_on(
    guest: fn() -> Arc<Guest>,
    write: fn(&Arc<Guest>),
    take: fn(&Guest) -> Option<usize>,
    last: usize,
) {
    loom::model(move || {
        let guest = guest();
        let writer = thread::spawn({
            let guest = guest.clone();
            move || write(&guest)
        });
        let seen = take(&guest);
        writer.join().unwrap();
        guest.drain();
        let rest = guest.take(0, PAGES);
        assert_eq!(rest.or(seen), Some(last), "taken beside the writer: {seen:?}, afterwards: {rest:?}");
    });
}

#[test]
fn a_mark_beside_a_harvest_is_in_it_or_in_the_next() {
    check(|guest| write(guest, 1), |guest| guest.take(0, PAGES), 1);
}

#[test]
fn a_chunk_that_comes_back_does_not_swallow_a_mark() {
    check(
        |guest| write(guest, 1),
        |guest| {
            // The chunk that the writer may have in hand is cleared, and active again after the second harvest.
            let first = guest.take(0, PAGES);
            guest.bitmap.mark(1);
            guest.take(0, PAGES).or(first)
        },
        1,
    );
}

#[test]
fn the_last_of_two_writes_is_never_missed() {
    check_on(
        Guest::new,
        |guest| {
            write(guest, 1);
            write(guest, 2);
        },
        |guest| guest.take(0, PAGES),
        2,
    );
}

#[test]
fn a_mark_beside_the_taking_of_a_part_is_not_lost() {
    check(|guest| write(guest, 1), |guest| guest.take(64, PAGES), 1);
}

#[test]
fn a_place_that_becomes_full_covers_what_was_marked_before() {
    check(
        |guest| {
            write(guest, 1);
            guest.bitmap.mark_range(gfns(0, PAGES));
        },
        |guest| guest.take(0, PAGES),
        1,
    );
    check(
        |guest| {
            guest.bitmap.mark_range(gfns(0, PAGES));
            write(guest, 1);
        },
        |guest| guest.take(0, PAGES),
        1,
    );
}

#[test]
fn a_writer_and_one_that_makes_the_place_full() {
    loom::model(|| {
        let guest = Guest::new();
        let threads = [
            |guest: &Arc<Guest>| write(guest, 1),
            |guest: &Arc<Guest>| guest.bitmap.mark_range(gfns(0, PAGES)),
        ]
        .map(|work| {
            let guest = guest.clone();
            thread::spawn(move || work(&guest))
        });
        let seen = guest.take(0, PAGES);
        for thread in threads {
            thread.join().unwrap();
        }
        let rest = guest.take(0, PAGES);
        assert_eq!(rest.or(seen), Some(1));
    });
}

#[test]
fn the_first_marks_of_two_threads_make_one_chunk() {
    loom::model(|| {
        let bitmap = Arc::new(Bitmap::new());
        bitmap.reserve(gfns(0, PAGES)).unwrap();
        let other = thread::spawn({
            let bitmap = bitmap.clone();
            move || bitmap.mark(0)
        });
        bitmap.mark(PAGE);
        other.join().unwrap();
        assert!(bitmap.is_marked(0) && bitmap.is_marked(PAGE));
    });
}

fn gfns(from: u64, to: u64) -> GfnRange {
    GfnRange::new(crate::addr::Gfn::new(from), crate::addr::Gfn::new(to)).unwrap()
}

#[test]
fn a_mark_beside_a_clear_of_its_word_is_not_lost() {
    check(|guest| write(guest, 1), Guest::clear, 1);
}

#[test]
#[should_panic(expected = "taken beside the writer")]
fn without_a_heavy_fence_a_harvest_misses_a_write() {
    check_on(|| Guest::leaving(false), |guest| write(guest, 1), |guest| guest.take(0, PAGES), 1);
}

#[test]
#[should_panic(expected = "taken beside the writer")]
fn without_a_heavy_fence_a_part_misses_a_write() {
    check_on(|| Guest::leaving(false), |guest| write(guest, 1), |guest| guest.take(64, PAGES), 1);
}

#[test]
#[should_panic(expected = "taken beside the writer")]
fn without_a_heavy_fence_a_clear_misses_a_write() {
    check_on(|| Guest::leaving(false), |guest| write(guest, 1), Guest::clear, 1);
}

#[test]
#[should_panic(expected = "taken beside the writer")]
fn without_a_heavy_fence_a_write_to_a_full_place_is_missed() {
    check_on(|| Guest::full(false), |guest| write(guest, 1), |guest| guest.take(0, PAGES), 1);
}

#[test]
fn a_mark_in_a_full_place_leaves_it_alone() {
    check_on(|| Guest::full(true), |guest| write(guest, 1), |guest| guest.take(0, PAGES), 1);
    check_on(|| Guest::full(true), |guest| write(guest, 1), |guest| guest.take(64, PAGES), 1);
    check_on(|| Guest::full(true), |guest| write(guest, 1), Guest::clear, 1);
}

/// Whoever sets the bit has not come to its flags yet, and another one leaves the bit alone: when that one is done, the
/// next harvest has the page.
#[test]
fn a_bit_without_its_flags_is_not_relied_upon() {
    loom::model(|| {
        let guest = Guest::leaving(true);
        let slow = thread::spawn({
            let guest = guest.clone();
            move || guest.bitmap.mark(PAGE)
        });
        let writer = thread::spawn({
            let guest = guest.clone();
            move || write(&guest, 1)
        });
        let seen = guest.take(0, PAGES);
        writer.join().unwrap();
        let rest = guest.take(0, PAGES);
        assert_eq!(rest.or(seen), Some(1), "taken beside the writer: {seen:?}, afterwards: {rest:?}");
        slow.join().unwrap();
    });
}

/// A page behind page tables: a write to a page that is not writable faults, and the fault marks it before it grants
/// the write. The harvester takes the bit, takes the permission away, flushes, and only then copies the page. Whatever
/// it has not copied is then dirty again.
#[test]
fn a_page_is_not_reported_before_it_is_armed_again() {
    loom::model(|| {
        let guest = Guest::new();
        // The lock stands for what a flush is: it waits until a write through an old translation is done.
        let writable = Arc::new(loom::sync::Mutex::new(false));
        let writer = thread::spawn({
            let (guest, writable) = (guest.clone(), writable.clone());
            move || {
                for value in [1, 2] {
                    let mut writable = writable.lock().unwrap();
                    if !*writable {
                        guest.bitmap.mark(PAGE);
                        *writable = true;
                    }
                    guest.page.store(value, Ordering::Relaxed);
                }
            }
        });
        let harvest = || {
            let mut got = Vec::new();
            // SAFETY: only one thread of the model takes.
            unsafe { guest.bitmap.take(0, PAGES, &mut got).unwrap() };
            let is_dirty = Runs::new(&got, PAGE, PAGE + 1).next().is_some();
            for (number, held) in got {
                // SAFETY: as above.
                unsafe { guest.bitmap.give_back(number, held) };
            }
            is_dirty.then(|| {
                *writable.lock().unwrap() = false;
                guest.page.load(Ordering::Relaxed)
            })
        };
        let first = harvest();
        writer.join().unwrap();
        assert_eq!(harvest().or(first), Some(2));
    });
}
