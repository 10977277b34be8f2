//! Marking pages.

use std::num::NonZeroUsize;
use std::sync::Barrier;

use memslot::{AddressSpaceId, Gfn};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use super::{GIB, Guest, PAGE, gfns, random_pages};
use crate::Effort;
use crate::measure::{median, time, versus};
use crate::report::Report;

const PEER: &str = "AtomicBitmap";

pub(crate) fn atomic_bitmap(bytes: usize) -> AtomicBitmap {
    AtomicBitmap::new(bytes, NonZeroUsize::new(PAGE).unwrap_or(NonZeroUsize::MIN))
}

pub(super) fn run(effort: Effort, report: &mut Report) {
    let rounds = match effort {
        Effort::Smoke => 1,
        Effort::Normal => 15,
        Effort::Long => 101,
    };
    let Ok(guest) = Guest::new(64 * GIB) else { return };
    let peer = atomic_bitmap(64 * GIB);

    pages_one_by_one(&guest, &peer, "", rounds, report);
    if let Ok(Some(fenced)) = Guest::fenced(64 * GIB) {
        pages_one_by_one(&fenced, &peer, ", with a fence", rounds, report);
    }
    for (name, at, bytes, target) in
        [("mark a range", "2 MiB", 2 << 20, 50.0), ("mark a range", "1 GiB", GIB, 100.0)]
    {
        if !report.wants(name) {
            continue;
        }
        // As many ranges as make up 2 GiB, so that the clock's own time does not count.
        let (first, count) = (3 * GIB / PAGE, 2 * GIB / bytes);
        for (name, offset, clean, target) in [
            (name, 0, true, Some(target)),
            // No chunk of ours lies in it as a whole.
            ("mark a range, unaligned", 77, true, None),
            ("mark a range, dirty already", 0, false, None),
        ] {
            let start = |range: usize| first + offset + range * (bytes / PAGE);
            let ours = || {
                if clean {
                    guest.harvest().commit();
                }
                time(count, || {
                    for range in 0..count {
                        guest.log.mark_range(AddressSpaceId::NORMAL, gfns(start(range), bytes / PAGE));
                    }
                })
            };
            let theirs = || {
                if clean {
                    peer.reset_addr_range(start(0) * PAGE, 2 * GIB);
                }
                time(count, || (0..count).for_each(|range| peer.mark_dirty(start(range) * PAGE, bytes)))
            };
            let ns = versus(rounds, ours, theirs);
            report.text_row(name, at, PEER, ns, target);
        }
    }
    two_threads(&guest, rounds, report);
}

/// Random pages that are dirty already, and the same after a harvest.
fn pages_one_by_one(guest: &Guest, peer: &AtomicBitmap, with: &str, rounds: usize, report: &mut Report) {
    for (at, pages) in [("1 GiB", GIB / PAGE), ("64 GiB", 64 * GIB / PAGE)] {
        for (name, clean, target) in
            [("mark a page, dirty already", false, Some(1.0)), ("mark a page, clean", true, None)]
        {
            let name = format!("{name}{with}");
            if !report.wants(&name) {
                continue;
            }
            let pages = random_pages(pages, 1 << 18);
            let ours = || {
                if clean {
                    guest.harvest().commit();
                }
                time(pages.len(), || pages.iter().for_each(|&page| guest.mark(page)))
            };
            let theirs = || {
                if clean {
                    peer.reset();
                }
                time(pages.len(), || pages.iter().for_each(|&page| peer.mark_dirty(page * PAGE, 8)))
            };
            report.text_row(&name, at, PEER, versus(rounds, ours, theirs), target);
        }
    }
}

/// Marks a second by two threads against one; each thread has a GiB of its own.
fn two_threads(guest: &Guest, rounds: usize, report: &mut Report) {
    let name = "marks of 2 threads, distinct ranges";
    if !report.wants(name) {
        return;
    }
    let (log, pages) = (&guest.log, &random_pages(GIB / PAGE, 1 << 18));
    let work = |thread: usize| {
        for page in pages {
            log.mark(AddressSpaceId::NORMAL, Gfn::new((page + thread * (GIB / PAGE)) as u64));
        }
    };
    let times = 8;
    let one = || time(times * pages.len(), || (0..times).for_each(|_| work(0)));
    let two = || {
        let barrier = Barrier::new(2);
        let threads = std::thread::scope(|scope| {
            let threads = [0, 1].map(|thread| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    time(times * pages.len(), || (0..times).for_each(|_| work(thread)))
                })
            });
            threads.map(|thread| thread.join().unwrap_or(f64::NAN))
        });
        // Both together mark twice as much.
        threads[0].max(threads[1]) / 2.0
    };
    let (mut ones, mut twos) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ones.push(one());
        twos.push(two());
    }
    report.text_row(name, "1 GiB", "one thread", (median(&mut twos), median(&mut ones)), Some(1.8));
}
