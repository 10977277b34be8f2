//! Second-stage tables: faults, and whole ranges; beside the page tables of other crates.
//!
//! The peers' tables belong to one thread and know no slots: they show what the bare work costs. Ours are shared,
//! look the slot up, and are ready for processors that use them meanwhile. All take their frames from one pool.
//! The dirty log's work on mapped pages is beside the real kernel's.

mod kernel;
mod peers;
mod pool;

use std::sync::Barrier;

use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable,
};
use memslot_mmu::format::{Access, Npt};
use memslot_mmu::{Config, Level, Mmu, Walker};

use self::peers::{Multiarch, Offset, Peer};
use self::pool::BenchHost;
use crate::Effort;
use crate::measure::{median, time, versus};
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
    faults::<Offset>(rounds, report)?;
    faults::<Multiarch>(rounds, report)?;
    two_threads(rounds, report)?;
    for large in [false, true] {
        ranges::<Offset>(rounds, large, report)?;
        ranges::<Multiarch>(rounds, large, report)?;
    }
    empty_slot(rounds, report)?;
    kernel::run(effort, report)
}

struct Guest {
    // The tables follow it.
    _table: SlotTable,
    mmu: Tables,
    vcpu: Vcpu,
}

impl Guest {
    fn new(pages: u64, largest: Level) -> anyhow::Result<Self> {
        let mut table = SlotTable::new(Limits::default())?;
        let mmu = Mmu::attach(&mut table, BenchHost, Config { largest, ..Config::default() })?;
        table.create(SlotSpec {
            address_space: AddressSpaceId::NORMAL,
            id: SlotId::new(0),
            gfns: gfns(0, pages),
            backing: Backing::Host { hva: Hva::new(HVA) },
            flags: SlotFlags::empty(),
        })?;
        let vcpu = mmu.walker()?;
        Ok(Self { _table: table, mmu, vcpu })
    }

    /// Empties all tables but for their first pages, so that faults find them.
    fn empty(&mut self, pages: u64) {
        self.mmu.zap(gfns(0, pages)).discharge();
        (0..pages).step_by(512).for_each(|gfn| fault(&mut self.vcpu, gfn));
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

fn faults<P: Peer>(rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    for (name, random, limit) in [("fault, in order", false, 15.0), ("fault, at random", true, 40.0)] {
        if !report.wants(name) {
            continue;
        }
        let pages = order(random);
        let mut guest = Guest::new(PAGES, Level::K4)?;
        let ours = || {
            guest.empty(PAGES);
            time(pages.len(), || pages.iter().for_each(|&page| fault(&mut guest.vcpu, page)))
        };
        let theirs = || {
            let mut peer = P::new();
            (0..PAGES).step_by(512).for_each(|page| peer.map_page(page));
            let ns = time(pages.len(), || pages.iter().for_each(|&page| peer.map_page(page)));
            peer.unmap(GIB, false);
            ns
        };
        let ns = versus(rounds, ours, theirs);
        report.text_row(name, "1 GiB", P::NAME, ns, None);
        if P::NAME == Multiarch::NAME {
            report.text_row(name, "1 GiB", "the target", (ns.0, limit), Some(1.0));
        }
    }
    Ok(())
}

/// Faults a second by two threads against one; each has a GiB of its own.
fn two_threads(rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let name = "faults of 2 threads, distinct regions";
    if !report.wants(name) {
        return Ok(());
    }
    let pages = order(false);
    let mut guest = Guest::new(2 * PAGES, Level::K4)?;
    let mut walkers = [guest.mmu.walker()?, guest.mmu.walker()?];
    let mut times = (Vec::new(), Vec::new());
    for _ in 0..=rounds {
        guest.empty(2 * PAGES);
        times.0.push(time(pages.len(), || pages.iter().for_each(|&page| fault(&mut guest.vcpu, page))));
        guest.empty(2 * PAGES);
        let barrier = Barrier::new(2);
        let both = std::thread::scope(|scope| {
            let mut first = 0;
            let threads = walkers.each_mut().map(|vcpu| {
                let (barrier, pages) = (&barrier, &pages);
                let start = first;
                first += PAGES;
                scope.spawn(move || {
                    barrier.wait();
                    time(pages.len(), || pages.iter().for_each(|&page| fault(vcpu, start + page)))
                })
            });
            threads.map(|thread| thread.join().unwrap_or(f64::NAN))
        });
        // Both together do twice as much.
        times.1.push(both[0].max(both[1]) / 2.0);
    }
    let ns = (median(&mut times.1), median(&mut times.0));
    report.text_row(name, "1 GiB", "1 thread", ns, Some(1.8));
    Ok(())
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
    let mut steps: [(Vec<f64>, Vec<f64>); 4] = Default::default();
    for _ in 0..=rounds {
        let mut ours = [0.0; 4];
        ours[0] = time(1, || {
            let done = guest.vcpu.prefault(gfns(0, PAGES), usize::MAX);
            assert!(done.is_ok_and(|done| done.rest.is_empty()));
        });
        ours[1] = time(1, || guest.mmu.write_protect(gfns(0, PAGES)).discharge());
        ours[2] = time(1, || {
            guest.mmu.zap(gfns(0, PAGES)).discharge();
            guest.mmu.reclaim();
        });
        let theirs = [
            time(1, || peer.map(GIB, large)),
            time(1, || peer.protect(GIB, large)),
            time(1, || peer.unmap(GIB, large)),
        ];
        ours[3] = ours[..3].iter().sum();
        for (step, times) in steps.iter_mut().enumerate() {
            times.0.push(ours[step]);
            times.1.push(theirs.get(step).copied().unwrap_or_else(|| theirs.iter().sum()));
        }
    }
    for (step, (name, target)) in
        [("map 1 GiB", None), ("write-protect 1 GiB", None), ("unmap 1 GiB", None), (name, Some(target))]
            .into_iter()
            .enumerate()
    {
        let times = &mut steps[step];
        // The first round does not count: it brings memory into the caches.
        times.0.remove(0);
        times.1.remove(0);
        report.text_row(name, at, P::NAME, (median(&mut times.0), median(&mut times.1)), target);
    }
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
