//! Interleavings of marking and taking, run by loom, with chunks of two words and directories of two places.
//!
//! What is checked in all of them: a mark that was made is in what is taken then or later, and whoever takes it
//! sees what was written before it.

use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize as Written;
use loom::thread;

use super::*;
use crate::dirty::runs::Runs;

/// A guest's memory: a page, and the bitmap that its writer marks.
struct Guest {
    bitmap: Bitmap,
    page: Written,
}

const PAGE: u64 = 65;

impl Guest {
    /// With a chunk in place, as after a first mark.
    fn new() -> Arc<Self> {
        let guest = Self { bitmap: Bitmap::new(), page: Written::new(0) };
        guest.bitmap.reserve(gfns(0, PAGES)).unwrap();
        guest.bitmap.mark(0);
        Arc::new(guest)
    }

    fn write(&self, value: usize) {
        self.page.store(value, Ordering::Relaxed);
        self.bitmap.mark(PAGE);
    }

    /// Takes what is dirty in `[from, to)`, and gives it back at once; what the page holds if it is among it.
    fn take(&self, from: u64, to: u64) -> Option<usize> {
        let mut got = Vec::new();
        // SAFETY: only one thread of each model takes.
        unsafe { self.bitmap.take(from, to, &mut got).unwrap() };
        let copy = Runs::new(&got, PAGE, PAGE + 1).next().map(|_| self.page.load(Ordering::Relaxed));
        for (number, held) in got {
            // SAFETY: as above.
            unsafe { self.bitmap.give_back(number, held) };
        }
        copy
    }
}

/// Runs a writer and a taker, and checks that the last value taken is the last one written.
fn check(write: fn(&Guest), take: fn(&Guest) -> Option<usize>, last: usize) {
    loom::model(move || {
        let guest = Guest::new();
        let writer = thread::spawn({
            let guest = guest.clone();
            move || write(&guest)
        });
        let seen = take(&guest);
        writer.join().unwrap();
        let rest = guest.take(0, PAGES);
        assert_eq!(rest.or(seen), Some(last), "taken beside the writer: {seen:?}, afterwards: {rest:?}");
    });
}

#[test]
fn a_mark_beside_a_harvest_is_in_it_or_in_the_next() {
    check(|guest| guest.write(1), |guest| guest.take(0, PAGES), 1);
}

#[test]
fn a_chunk_that_comes_back_does_not_swallow_a_mark() {
    check(
        |guest| guest.write(1),
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
    check(
        |guest| {
            guest.write(1);
            guest.write(2);
        },
        |guest| guest.take(0, PAGES),
        2,
    );
}

#[test]
fn a_mark_beside_the_taking_of_a_part_is_not_lost() {
    check(|guest| guest.write(1), |guest| guest.take(64, PAGES), 1);
}

#[test]
fn a_place_that_becomes_full_covers_what_was_marked_before() {
    check(
        |guest| {
            guest.write(1);
            guest.bitmap.mark_range(gfns(0, PAGES));
        },
        |guest| guest.take(0, PAGES),
        1,
    );
    check(
        |guest| {
            guest.bitmap.mark_range(gfns(0, PAGES));
            guest.write(1);
        },
        |guest| guest.take(0, PAGES),
        1,
    );
}

#[test]
fn a_writer_and_one_that_makes_the_place_full() {
    loom::model(|| {
        let guest = Guest::new();
        let threads =
            [|guest: &Guest| guest.write(1), |guest: &Guest| guest.bitmap.mark_range(gfns(0, PAGES))].map(
                |work| {
                    let guest = guest.clone();
                    thread::spawn(move || work(&guest))
                },
            );
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
    check(
        |guest| guest.write(1),
        // SAFETY: only one thread of the model takes.
        |guest| match unsafe { guest.bitmap.take_word(PAGE, u64::MAX).unwrap() } {
            0 => None,
            _ => Some(guest.page.load(Ordering::Relaxed)),
        },
        1,
    );
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
