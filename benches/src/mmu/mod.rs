//! Second-stage tables: faults, and whole ranges; beside the page tables of other crates.
//!
//! The peers' tables belong to one thread and know no slots: they show what the bare work costs. Ours are shared,
//! look the slot up, and are ready for processors that use them meanwhile. All take their frames from one pool.
//! Faults are measured with and without `Membarrier`, which spares each an atomic exchange, in the same rounds. They are timed in
//! pieces of 2048, and the median of all pieces counts. "Less the frame" is the time of a fault without that of its answer from
//! the host, measured alone by the same loop in the same rounds. Two threads are also shown with tables of their own, which share
//! nothing: that is what the machine has to give. Of their pieces those count during which the other thread was at work, and not
//! waiting for a processor: whose pieces beside them took no longer than twice their median.
//! The dirty log's work on mapped pages is beside the real kernel's.

mod kernel;
mod peers;
mod pool;

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use anyhow::Context;
use memslot::dirty::Membarrier;
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable,
};
use memslot_mmu::format::{Access, Npt};
use memslot_mmu::{Config, Frames, Level, Mmu, Walker};

use self::peers::{Multiarch, Offset, Peer};
use self::pool::BenchHost;
use crate::Effort;
use crate::measure::{median, pieces, time};
use crate::report::{Report, Row};

type Tables = Mmu<Npt, BenchHost>;
type Vcpu = Walker<Npt, BenchHost>;

const GIB: u64 = 1 << 30;
const PAGES: u64 = GIB / 4096;
const HVA: u64 = 0x10_0000_0000;

pub(crate) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let rounds = match effort {
        Effort::Smoke => 1,
        Effort::Normal => 15,
        Effort::Long => 101,
    };
    let has_fence = match Membarrier::new() {
        Ok(_) => true,
        Err(error) => {
            report.skipped(&format!("faults with Membarrier: {error}"));
            false
        }
    };
    faults(rounds, has_fence, report)?;
    for &fenced in if has_fence { [false, true].as_slice() } else { &[false] } {
        two_threads(rounds, fenced, report)?;
    }
    for large in [false, true] {
        ranges::<Offset>(rounds, large, report)?;
        ranges::<Multiarch>(rounds, large, report)?;
    }
    empty_slot(rounds, report)?;
    kernel::run(effort, report)
}

struct Guest {
    // The tables follow it.
    table: SlotTable,
    mmu: Tables,
    vcpu: Vcpu,
}

impl Guest {
    fn new(pages: u64, largest: Level) -> anyhow::Result<Self> {
        Self::with(pages, largest, false)
    }

    fn with(pages: u64, largest: Level, fenced: bool) -> anyhow::Result<Self> {
        let mut table = SlotTable::new(Limits::default())?;
        let config = Config { largest, ..Config::default() };
        let mmu = if fenced {
            Mmu::attach_with_fence(&mut table, BenchHost, config, Box::new(Membarrier::new()?))?
        } else {
            Mmu::attach(&mut table, BenchHost, config)?
        };
        table.create(SlotSpec {
            address_space: AddressSpaceId::NORMAL,
            id: SlotId::new(0),
            gfns: gfns(0, pages),
            backing: Backing::Host { hva: Hva::new(HVA) },
            flags: SlotFlags::empty(),
        })?;
        let vcpu = mmu.walker()?;
        Ok(Self { table, mmu, vcpu })
    }

    /// Nothing is mapped but for the first pages of tables, so that faults find these.
    fn prepare(&mut self, pages: u64) {
        (0..pages).step_by(512).for_each(|gfn| fault(&mut self.vcpu, gfn));
    }

    /// Nothing is mapped, and all tables are back in the pool.
    fn empty(&mut self, pages: u64) {
        self.mmu.zap(gfns(0, pages)).discharge();
        self.mmu.reclaim();
    }
}

fn gfns(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first), pages).unwrap_or_default()
}

fn fault(vcpu: &mut Vcpu, gfn: u64) {
    let _ = vcpu.fault(Gpa::new(gfn << 12), Access::WRITE).unwrap_or_else(|error| panic!("{error}"));
}

/// The pages of 1 GiB that are not the first of their table, in order or not.
fn order(random: bool) -> Vec<u64> {
    let mut at = 12345u64;
    let all = (0..PAGES).map(|page| {
        if !random {
            return page;
        }
        // A full cycle of a linear congruential generator.
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407) % PAGES;
        at
    });
    all.filter(|page| page % 512 != 0).collect()
}

/// What the rows of faults are called.
fn named(name: &str, fenced: bool) -> String {
    if fenced { format!("{name}, Membarrier") } else { name.to_owned() }
}

fn faults(rounds: usize, has_fence: bool, report: &mut Report) -> anyhow::Result<()> {
    for (name, random, limit) in [("fault, in order", false, 15.0), ("fault, at random", true, 40.0)] {
        if !report.wants(name) && !report.wants(&named(name, true)) {
            continue;
        }
        let pages = order(random);
        let mut guests = vec![Guest::with(PAGES, Level::K4, false)?];
        if has_fence {
            guests.push(Guest::with(PAGES, Level::K4, true)?);
        }
        let snapshot = guests[0].table.snapshot();
        let slot = *snapshot.slot_at(AddressSpaceId::NORMAL, Gfn::new(0)).context("the slot")?;
        let mut ours = vec![Vec::new(); guests.len()];
        let [mut frames, mut offset, mut multiarch]: [Vec<f64>; 3] = Default::default();
        for _ in 0..rounds {
            for (guest, times) in guests.iter_mut().zip(&mut ours) {
                guest.prepare(PAGES);
                times.extend(pieces(&pages, |&page| fault(&mut guest.vcpu, page)));
                guest.empty(PAGES);
            }
            frames.extend(pieces(&pages, |&page| {
                let _ = black_box(BenchHost.frame(&slot, Gfn::new(black_box(page)), Access::WRITE));
            }));
            peer_faults::<Offset>(&pages, &mut offset);
            peer_faults::<Multiarch>(&pages, &mut multiarch);
        }
        let [frame, offset, multiarch] = [frames, offset, multiarch].map(|mut times| median(&mut times));
        for (fenced, mut times) in [false, true].into_iter().zip(ours) {
            let (name, ns) = (&named(name, fenced), median(&mut times));
            report.text_row(name, "1 GiB", Offset::NAME, (ns, offset), None);
            report.text_row(name, "1 GiB", Multiarch::NAME, (ns, multiarch), None);
            // What was asked for: in order beyond the frame itself, at random all of it.
            let (name, ns) =
                if random { (name.clone(), ns) } else { (format!("{name}, less the frame"), ns - frame) };
            report.text_row(&name, "1 GiB", "the target", (ns, limit), Some(1.0));
        }
    }
    Ok(())
}

fn peer_faults<P: Peer>(pages: &[u64], times: &mut Vec<f64>) {
    let mut peer = P::new();
    (0..PAGES).step_by(512).for_each(|page| peer.map_page(page));
    times.extend(pieces(pages, |&page| peer.map_page(page)));
    peer.unmap(GIB, false);
}

/// Faults a second by two threads against one; each has a GiB of its own, in the same tables or in tables of its own.
fn two_threads(rounds: usize, fenced: bool, report: &mut Report) -> anyhow::Result<()> {
    let name = &named("faults of 2 threads, distinct regions", fenced);
    let apart = &named("faults of 2 threads, nothing shared", fenced);
    if !report.wants(name) && !report.wants(apart) {
        return Ok(());
    }
    let pages = order(false);
    let mut guest = Guest::with(2 * PAGES, Level::K4, fenced)?;
    let mut others = [Guest::with(PAGES, Level::K4, fenced)?, Guest::with(PAGES, Level::K4, fenced)?];
    let mut walkers = [guest.mmu.walker()?, guest.mmu.walker()?];
    let mut times: [Vec<f64>; 3] = Default::default();
    for _ in 0..rounds {
        guest.prepare(2 * PAGES);
        times[0].extend(pieces(&pages, |&page| fault(&mut guest.vcpu, page)));
        guest.empty(2 * PAGES);
        guest.prepare(2 * PAGES);
        at_once(walkers.each_mut(), &pages, PAGES, &mut times[1]);
        guest.empty(2 * PAGES);
        others.iter_mut().for_each(|guest| guest.prepare(PAGES));
        at_once(others.each_mut().map(|guest| &mut guest.vcpu), &pages, 0, &mut times[2]);
        others.iter_mut().for_each(|guest| guest.empty(PAGES));
    }
    // Both together do twice as much in the same time.
    let [one, both, own] = times.each_mut().map(|times| median(times));
    report.text_row(name, "1 GiB", "1 thread", (both / 2.0, one), Some(1.8));
    report.text_row(apart, "1 GiB", "1 thread", (own / 2.0, one), None);
    Ok(())
}

/// Faults of two threads, in nanoseconds each; the second has its pages so much further.
fn at_once(vcpus: [&mut Vcpu; 2], pages: &[u64], further: u64, times: &mut Vec<f64>) {
    let barrier = &Barrier::new(2);
    let runs = std::thread::scope(|scope| {
        let mut first = 0;
        let threads = vcpus.map(|vcpu| {
            let start = first;
            first += further;
            scope.spawn(move || {
                barrier.wait();
                let pieces = pieces(pages, |&page| fault(vcpu, start + page));
                let mut at = Instant::now();
                let piece = |ns| Piece { from: std::mem::replace(&mut at, Instant::now()), to: at, ns };
                pieces.map(piece).collect::<Vec<_>>()
            })
        });
        threads.map(|thread| thread.join().unwrap_or_default())
    });
    for (run, other) in [(&runs[0], &runs[1]), (&runs[1], &runs[0])] {
        let longest = 2.0 * median(&mut other.iter().map(|piece| piece.ns).collect::<Vec<_>>());
        let (Some(first), Some(last)) = (other.first(), other.last()) else { continue };
        let is_beside_work = |piece: &&Piece| {
            let mut beside = other.iter().filter(|other| other.from < piece.to && piece.from < other.to);
            first.from <= piece.from && piece.to <= last.to && beside.all(|other| other.ns <= longest)
        };
        times.extend(run.iter().filter(is_beside_work).map(|piece| piece.ns));
    }
}

/// A piece of a thread's faults.
struct Piece {
    from: Instant,
    to: Instant,
    ns: f64,
}

fn ranges<P: Peer>(rounds: usize, large: bool, report: &mut Report) -> anyhow::Result<()> {
    let (at, target) = if large { ("2 MiB", 1.0) } else { ("4 KiB", 5.0) };
    let name = "map, protect, unmap 1 GiB";
    if !report.wants(name) {
        return Ok(());
    }
    let largest = if large { Level::M2 } else { Level::K4 };
    let mut guest = Guest::new(PAGES, largest)?;
    let mut peer = P::new();
    let mut steps: [(Vec<f64>, Vec<f64>); 3] = Default::default();
    // The first round does not count: it brings memory into the caches.
    for round in 0..=rounds {
        let ours = [
            time(1, || {
                let done = guest.vcpu.prefault(gfns(0, PAGES), usize::MAX);
                assert!(done.is_ok_and(|done| done.rest.is_empty()));
            }),
            time(1, || guest.mmu.write_protect(gfns(0, PAGES)).discharge()),
            time(1, || guest.empty(PAGES)),
        ];
        let theirs = [
            time(1, || peer.map(GIB, large)),
            time(1, || peer.protect(GIB, large)),
            time(1, || peer.unmap(GIB, large)),
        ];
        if round == 0 {
            continue;
        }
        for (step, times) in steps.iter_mut().zip(ours.into_iter().zip(theirs)) {
            step.0.push(times.0);
            step.1.push(times.1);
        }
    }
    let mut sum = (0.0, 0.0);
    for (name, step) in ["map 1 GiB", "write-protect 1 GiB", "unmap 1 GiB"].into_iter().zip(&mut steps) {
        let ns = (median(&mut step.0), median(&mut step.1));
        report.text_row(name, at, P::NAME, ns, None);
        sum = (sum.0 + ns.0, sum.1 + ns.1);
    }
    report.text_row(name, at, P::NAME, sum, Some(target));
    Ok(())
}

/// What it takes to zap a slot depends on what is mapped.
fn empty_slot(rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let name = "zap a slot with one page mapped";
    if !report.wants(name) {
        return Ok(());
    }
    for (at, pages) in [("1 GiB", PAGES), ("1 TiB", 1024 * PAGES)] {
        let mut guest = Guest::new(pages, Level::K4)?;
        let mut times = Vec::new();
        for round in 0..=rounds as u64 {
            fault(&mut guest.vcpu, (round * 77_777) % pages);
            times.push(time(1, || guest.mmu.zap(gfns(0, pages)).discharge()));
        }
        let ns = median(&mut times);
        let flushes = guest.mmu.stats().flushes;
        assert_eq!(flushes, rounds as u64 + 1, "one flush per operation");
        let target = 10_000.0;
        let row = Row {
            bench: name.to_owned(),
            at: at.to_owned(),
            ours_ns: ns,
            peer: "the target".to_owned(),
            peer_ns: Some(target),
            ratio: Some(target / ns),
            target: Some(1.0),
        };
        report.add(row, &crate::report::nanoseconds(ns), &crate::report::nanoseconds(target));
    }
    Ok(())
}
