//! Lookups: each depends on the result of the last one, so that latency is measured, not throughput.

use std::hint::black_box;

use iset::IntervalMap;
use memslot::{Gpa, Hva};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};

use super::vm_memory_peer::collection;
use super::{table_of, target};
use crate::Effort;
use crate::layout::{PAGE, Piece, Random, SPACE, layout};
use crate::measure::{time, versus};
use crate::report::Report;

pub(crate) fn run(sizes: &[usize], effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let (rounds, queries) = match effort {
        Effort::Smoke => (3, 4096),
        Effort::Normal => (11, 1 << 15),
        Effort::Long => (41, 1 << 16),
    };
    for &n in sizes {
        if report.wants("gfn lookup") || report.wants("last-used") {
            gfn(n, rounds, queries, report)?;
        }
        if report.wants("hva") {
            hva(n, rounds, queries / 4, report)?;
        }
    }
    Ok(())
}

/// Frames to ask for, as 32-bit numbers so that the list itself takes little of the caches.
fn frames(pieces: &[Piece], queries: usize) -> Vec<u32> {
    let mut random = Random::new(777);
    (0..queries)
        .map(|_| {
            let piece = &pieces[random.below(pieces.len())];
            let into = random.below(usize::try_from(piece.size / PAGE).unwrap_or(1)) as u64;
            u32::try_from(piece.gpa / PAGE + into).unwrap_or(0)
        })
        .collect()
}

fn gpa(frame: u32) -> u64 {
    u64::from(frame) * PAGE + 8
}

/// Looks addresses up, each with what the one before came to: `zero` is 0, which the compiler does not know.
fn chain(addresses: impl Iterator<Item = u64>, zero: u64, mut lookup: impl FnMut(u64) -> u64) {
    black_box(addresses.fold(0, |last, address| lookup(address + (last & zero))));
}

fn gfn(n: usize, rounds: usize, queries: usize, report: &mut Report) -> anyhow::Result<()> {
    let pieces = layout(n);
    let table = table_of(&pieces)?;
    let peer = collection(&pieces)?;
    let atomic = GuestMemoryAtomic::new(collection(&pieces)?);
    let mut reader = table.reader()?;
    let frames = frames(&pieces, queries);
    let zero = black_box(0);

    for gpa in frames.iter().take(4096).copied().map(gpa) {
        let ours = table.view().translate(SPACE, Gpa::new(gpa)).map(|found| found.hva.get());
        let theirs = peer.find_region(GuestAddress(gpa));
        let theirs =
            theirs.map(|region| region.hva + (gpa - vm_memory::GuestMemoryRegion::start_addr(region).0));
        anyhow::ensure!(ours == theirs, "both sides must find the same");
    }

    let find = |gpa: u64| peer.find_region(GuestAddress(gpa)).map_or(0, |region| region.hva);
    let all = || frames.iter().copied().map(gpa);
    let first = || frames.iter().map(|_| gpa(frames[0]));

    let pinned = reader.pin();
    let ours = |gpa| pinned.translate(SPACE, Gpa::new(gpa)).map_or(0, |found| found.hva.get());
    let times = versus(
        rounds,
        || time(queries, || chain(all(), zero, ours)),
        || time(queries, || chain(all(), zero, find)),
    );
    report.times("gfn lookup, random", n, "vm-memory find_region", times, target(n, [2.0, 3.0, 4.5, 10.0]));

    let times = versus(
        rounds,
        || time(queries, || chain(first(), zero, ours)),
        || time(queries, || chain(first(), zero, find)),
    );
    report.times(
        "last-used slot again",
        n,
        "vm-memory find_region",
        times,
        target(n, [5.0, 10.0, 15.0, 15.0]),
    );
    drop(pinned);

    let mut ours = |gpa| reader.translate(SPACE, Gpa::new(gpa)).map_or(0, |found| found.hva.get());
    let theirs = |gpa| atomic.memory().find_region(GuestAddress(gpa)).map_or(0, |region| region.hva);
    let times = versus(
        rounds,
        || time(queries, || chain(all(), zero, &mut ours)),
        || time(queries, || chain(all(), zero, theirs)),
    );
    let targets = target(n, [2.0, 3.0, 4.5, 10.0]);
    report.times("gfn lookup + entering", n, "GuestMemoryAtomic + find", times, targets);
    Ok(())
}

fn hva(n: usize, rounds: usize, queries: usize, report: &mut Report) -> anyhow::Result<()> {
    let pieces = layout(n);
    let table = table_of(&pieces)?;
    let mut reader = table.reader()?;
    let mut peer = IntervalMap::new();
    for piece in crate::layout::creation_order(&pieces) {
        peer.insert(piece.hva..piece.hva + piece.size, piece.id);
    }
    let mut random = Random::new(999);
    let pages: Vec<u64> = (0..queries)
        .map(|_| {
            let piece = &pieces[random.below(n)];
            piece.hva + random.below(usize::try_from(piece.size / PAGE).unwrap_or(1)) as u64 * PAGE
        })
        .collect();
    let zero = black_box(0);
    let pinned = reader.pin();
    let ours: &dyn Fn(u64) -> u64 =
        &|hva| pinned.slot_ids_at_hva(SPACE, Hva::new(hva)).map(|id| u64::from(id.get())).sum::<u64>();
    let theirs: &dyn Fn(u64) -> u64 =
        &|hva| peer.values(hva..hva + PAGE).map(|&id| u64::from(id)).sum::<u64>();
    for &page in pages.iter().take(4096) {
        anyhow::ensure!(ours(page) == theirs(page), "both sides must find the same");
    }
    let all = || pages.iter().copied();
    let times = versus(
        rounds,
        || time(queries, || chain(all(), zero, ours)),
        || time(queries, || chain(all(), zero, theirs)),
    );
    report.times("hva → slots, one page", n, "iset", times, target(n, [5.0; 4]));
    Ok(())
}
