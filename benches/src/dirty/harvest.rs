//! Harvesting 64 GiB.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};

use super::mark::atomic_bitmap;
use super::{GIB, Guest, PAGE, gfns, random_pages};
use crate::Effort;
use crate::measure::{median, time};
use crate::report::Report;
use memslot::AddressSpaceId;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

const PAGES: usize = 64 * GIB / PAGE;

/// All that is dirty, as a consumer takes it: harvest, every run, commit.
fn ours(guest: &Guest) -> u64 {
    let harvest = guest.harvest();
    let pages = harvest.runs().map(|run| run.gfns.len()).sum();
    harvest.commit();
    pages
}

/// The same of a peer: the words, then runs of set bits.
fn theirs(peer: &AtomicBitmap) -> u64 {
    let words = peer.get_and_reset();
    let (mut pages, mut run) = (0, 0);
    for word in words {
        match word {
            0 => {}
            u64::MAX => run += 64,
            mut word => {
                while word != 0 {
                    let start = word.trailing_zeros();
                    let ones = (word >> start).trailing_ones();
                    pages += black_box(run) + u64::from(ones);
                    run = 0;
                    word &= (u64::MAX << (start + ones - 1)) << 1;
                }
            }
        }
    }
    pages + run
}

pub(super) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let rounds = match effort {
        Effort::Smoke => 1,
        Effort::Normal => 11,
        Effort::Long => 51,
    };
    let guest = Guest::new(64 * GIB)?;
    let peer = atomic_bitmap(64 * GIB);
    let scattered: Vec<usize> = (0..64).map(|at| at * (PAGES / 64) + 1234).collect();
    let percent = random_pages(PAGES, PAGES / 100);
    let rows: [(&str, &[usize], f64); 3] = [
        ("harvest, clean", &[], 500.0),
        ("harvest, 64 dirty pages", &scattered, 100.0),
        ("harvest, 1 % random", &percent, 2.0),
    ];
    for (name, pages, target) in rows {
        some_dirty(&guest, &peer, (name, pages, target), rounds, report);
    }
    if let Some(guest) = Guest::fenced(64 * GIB)? {
        for (name, pages, target) in rows {
            let name = format!("{name}, with a fence");
            some_dirty(&guest, &peer, (&name, pages, target), rounds, report);
            beside_a_thread(|| {
                let name = format!("{name}, beside a thread");
                some_dirty(&guest, &peer, (&name, pages, target), rounds, report);
            });
        }
    }
    all_dirty(&guest, &peer, rounds, report);
    Ok(())
}

fn some_dirty(
    guest: &Guest,
    peer: &AtomicBitmap,
    (name, pages, target): (&str, &[usize], f64),
    rounds: usize,
    report: &mut Report,
) {
    if !report.wants(name) {
        return;
    }
    let (mut mine, mut others, mut words) = (Vec::new(), Vec::new(), Vec::new());
    let mut buffer = vec![0; PAGES / 64];
    for _ in 0..rounds {
        pages.iter().for_each(|&page| guest.mark(page));
        mine.push(time(1, || assert!(ours(guest) <= PAGES as u64)));
        pages.iter().for_each(|&page| peer.mark_dirty(page * PAGE, 1));
        others.push(time(1, || assert!(theirs(peer) <= PAGES as u64)));
        pages.iter().for_each(|&page| guest.mark(page));
        words.push(time(1, || {
            let harvest = guest.harvest();
            let _ = black_box(harvest.words(AddressSpaceId::NORMAL, gfns(0, PAGES), &mut buffer));
            harvest.commit();
        }));
    }
    let peer_ns = median(&mut others);
    report.text_row(name, "64 GiB", "AtomicBitmap", (median(&mut mine), peer_ns), Some(target));
    let name = format!("{name}, as words");
    report.text_row(&name, "64 GiB", "AtomicBitmap", (median(&mut words), peer_ns), None);
}

/// While another thread of the process runs, which a fence interrupts.
pub(super) fn beside_a_thread(work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        // It has begun by then.
        std::thread::sleep(std::time::Duration::from_millis(20));
        work();
        done.store(true, Ordering::Relaxed);
    });
}

/// Every page dirty, against the cost of copying the bitmap once.
fn all_dirty(guest: &Guest, peer: &AtomicBitmap, rounds: usize, report: &mut Report) {
    let name = "harvest, all dirty, as runs";
    if !report.wants(name) {
        return;
    }
    let source = vec![u64::MAX; PAGES / 64];
    let mut copy = vec![0; PAGES / 64];
    let (mut at_once, mut by_page, mut copies, mut others) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        guest.log.mark_range(AddressSpaceId::NORMAL, guest.gfns);
        at_once.push(time(1, || assert_eq!(ours(guest), PAGES as u64)));
        // One page each leaves no chunk marked as a whole.
        (0..PAGES / 64).for_each(|word| {
            guest.log.mark_range(AddressSpaceId::NORMAL, gfns(64 * word, 64));
        });
        by_page.push(time(1, || assert_eq!(ours(guest), PAGES as u64)));
        copies.push(time(1, || black_box(&mut copy).copy_from_slice(black_box(&source))));
        peer.mark_dirty(0, 64 * GIB);
        others.push(time(1, || assert_eq!(theirs(peer), PAGES as u64)));
    }
    let (memcpy, atomic) = (median(&mut copies), median(&mut others));
    let by_page = median(&mut by_page);
    report.text_row(name, "64 GiB", "memcpy of the bitmap", (by_page, memcpy), Some(0.5));
    report.text_row(name, "64 GiB", "AtomicBitmap", (by_page, atomic), None);
    let name = "harvest, all dirty at once";
    report.text_row(name, "64 GiB", "memcpy of the bitmap", (median(&mut at_once), memcpy), Some(0.5));
}
