//! The tables without memory: each allocation fails once, for good or only that time. Either the answer is an error and
//! nothing has changed, or the work is done as if there had been memory; what processors cached is flushed, and nothing
//! is leaked.
//!
//! Tables of the test's host come from the global allocator, too, so tables fail with all the rest.
#![allow(missing_docs, reason = "tests")]
#![expect(unsafe_code, reason = "a global allocator is unsafe to write")]

mod common;

use std::collections::BTreeMap;

use common::*;
use memslot::dirty::{DirtyLog, HarvestError};
use memslot::{
    Gfn, GfnRange, Gpa, Limits, Listener, ListenerError, SlotFlags, SlotId, SlotTable, TransactionError,
    Update,
};
use memslot_mmu::format::{Access, Ept, Format, Npt};
use memslot_mmu::{AttachError, Config, DirtyMode, Fault, FaultError, Level, Mmu, TableError, Walker, Work};
use memslot_testing::{ALLOWED, Failing, Shortage, bytes, short};

#[global_allocator]
static ALLOCATOR: Failing = Failing;

/// All frames that these tests know.
const FRAMES: u64 = 1 << 15;

/// Pages that were written.
const WRITTEN: [u64; 5] = [0, 3, 70, 199, 1030];

/// What a guest finds at each frame: where it leads, whether it may be written. Sizes of pages do not count.
type Seen = BTreeMap<u64, (u64, bool)>;

fn seen<F: Format>(guest: &Guest<F>) -> Seen {
    let pages =
        |(first, leaf): (u64, Leaf)| (0..leaf.pages).map(move |i| (first + i, (leaf.pfn + i, leaf.write)));
    guest.leaves().into_iter().flat_map(pages).filter(|(gfn, _)| *gfn < FRAMES).collect()
}

/// A guest with pages of both sizes, one half of them logged, all of which a processor has used; and one page unmapped.
fn guest<F: Format>(dirty: DirtyMode) -> Guest<F> {
    let mut guest = Guest::<F>::with(Config { largest: Level::M2, dirty, ..Config::default() });
    guest.create(0, 0, 2048, HVA, NONE);
    guest.create(1, 4096, 2560, HVA + (4096 << 12), LOG);
    for base in [0, 4096] {
        guest.host.user.set_run(0);
        let _ = guest.vcpu.prefault(range(base, 200), usize::MAX).unwrap();
        guest.host.user.set_run(63);
        let _ = guest.vcpu.prefault(range(base + 1024, 600), usize::MAX).unwrap();
        for gfn in WRITTEN.map(|gfn| base + gfn) {
            let _ = guest.write(gfn);
            assert!(guest.processor_writes(gfn));
        }
    }
    guest.host.touch_all(&guest.mmu);
    // An empty cache: the next fault asks for tables.
    guest.vcpu = guest.mmu.walker().unwrap();
    guest.host.take_flushes();
    guest.host.reserve_flushes(100);
    guest
}

fn dirty_frames<F: Format>(guest: &Guest<F>) -> Vec<u64> {
    (0..FRAMES).filter(|&gfn| guest.log.is_marked(RAM, Gfn::new(gfn))).collect()
}

/// Does `work` with ever more memory, until it was enough. `is_whole` says that after an error nothing has changed.
fn at_every_allocation<F: Format, E: std::fmt::Debug>(
    dirty: DirtyMode,
    is_whole: bool,
    mut work: impl FnMut(&mut Guest<F>) -> Result<(), E>,
) -> i64 {
    let (mut enough, mut points) = (Seen::new(), 0);
    // What comes behind a failure needs no memory, mostly; so for one format that is tried, too.
    for for_good in [true, false].into_iter().filter(|&for_good| for_good || F::NAME == "NPT") {
        for allowed in -1.. {
            let had = bytes();
            let shortage = Shortage { allowed, for_good };
            let mut guest = guest::<F>(dirty);
            let before = (seen(&guest), dirty_frames(&guest));
            let generation = guest.table.view().generation();
            let (result, has_failed) = short(shortage, || work(&mut guest));
            assert_eq!(guest.host.stale(&guest.mmu, range(0, FRAMES)), [], "{shortage:?}: a flush is lost");
            if let Err(error) = result {
                assert!(has_failed, "{error:?}");
                if is_whole {
                    let after = (seen(&guest), dirty_frames(&guest));
                    assert!(before == after, "{shortage:?}: {error:?}, and something has changed");
                    assert_eq!(guest.table.view().generation(), generation);
                }
                // And now there is memory.
                work(&mut guest).unwrap();
                assert_eq!(guest.host.stale(&guest.mmu, range(0, FRAMES)), []);
            }
            // With memory or not, the guest finds the same in the end. (Without, it may fault more.)
            if allowed < 0 {
                enough = seen(&guest);
            } else {
                assert!(seen(&guest) == enough, "{shortage:?}: not what it is with memory");
            }
            // What is not writable becomes so.
            for &gfn in before.0.keys().step_by(7) {
                let is_there = guest.table.view().slot_at(RAM, Gfn::new(gfn)).copied();
                let fault = guest.write(gfn);
                let is_writable = is_there.is_some_and(|slot| !slot.flags().contains(SlotFlags::READONLY));
                assert_eq!(matches!(fault, Fault::Mapped(_) | Fault::AlreadyMapped), is_writable, "{gfn:#x}");
            }
            guest.mmu.zap(range(0, FRAMES)).discharge();
            let host = guest.host.clone();
            drop(guest);
            assert_eq!(host.user.tables(), 0, "{shortage:?}: tables are leaked");
            drop(host);
            drop(before);
            if allowed < 0 {
                continue;
            }
            assert_eq!(bytes(), had, "{shortage:?}: memory is leaked");
            points += i64::from(has_failed);
            if !has_failed {
                break;
            }
        }
    }
    points
}

/// For every format and way to log.
macro_rules! for_all {
    ($($name:ident $(,)?)*) => {$(
        #[test]
        fn $name() {
            checks::$name::<Npt>(DirtyMode::WriteProtect);
            checks::$name::<Npt>(DirtyMode::Hardware);
            checks::$name::<Ept<5, false>>(DirtyMode::WriteProtect);
            checks::$name::<Ept>(DirtyMode::Hardware);
        }
    )*};
}

for_all! {
    faults
    prefaults
    splits
    what_cannot_fail
    operations_in_steps
    invalidations
    walkers
    harvests
    changes_of_slots
    changes_that_are_refused
    a_limit_of_tables
    a_host_without_tables
}

fn out_of_memory<T, E>(result: Result<T, FaultError<E>>) -> Result<(), FaultError<E>> {
    match result {
        Err(error) => {
            assert!(matches!(error, FaultError::Table(TableError::OutOfMemory)));
            Err(error)
        }
        Ok(_) => Ok(()),
    }
}

mod checks {
    use super::*;

    pub(super) fn faults<F: Format>(dirty: DirtyMode) {
        // Into a table that is there, with a path to be made, beside others, and with a large page to be split.
        for (gfn, access, asks) in [
            (610, Access::WRITE, false),
            (1800, Access::WRITE, false),
            (4096 + 2100, Access::READ, true),
            (4096 + 2200, Access::WRITE, true),
            (4096 + 1040, Access::WRITE, false),
        ] {
            let work = |guest: &mut Guest<F>| out_of_memory(guest.vcpu.fault(Gpa::new(gfn << 12), access));
            let points = at_every_allocation::<F, _>(dirty, true, work);
            assert!(points > 0 || !asks, "{gfn}: {points}");
        }
        // A page that became large before it was logged.
        let work =
            |guest: &mut Guest<F>| out_of_memory(guest.vcpu.fault(Gpa::new(1030 << 12), Access::WRITE));
        at_every_allocation::<F, _>(dirty, true, |guest| {
            let allowed = ALLOWED.replace(-1);
            if !guest.table.view().slot(RAM, SlotId::new(0)).unwrap().flags().contains(LOG) {
                guest.table.set_flags(RAM, SlotId::new(0), LOG).unwrap();
            }
            ALLOWED.set(allowed);
            work(guest).or_else(|error| {
                // The flags have changed: that is no error of the fault.
                ALLOWED.set(-1);
                assert!(!guest.leaf_at(1030).unwrap().1.write, "{error}");
                work(guest)
            })
        });
    }

    pub(super) fn prefaults<F: Format>(dirty: DirtyMode) {
        let work = |guest: &mut Guest<F>| {
            let ends = [range(0, 2048), range(4096, 2560)].map(|gfns| guest.vcpu.prefault(gfns, usize::MAX));
            ends.into_iter().try_for_each(out_of_memory)
        };
        assert!(at_every_allocation::<F, _>(dirty, false, work) > 0);
    }

    pub(super) fn splits<F: Format>(dirty: DirtyMode) {
        let work = |guest: &mut Guest<F>| {
            guest.mmu.split(range(0, 8192), Level::K4).map(|_| ()).inspect_err(|error| {
                assert_eq!(*error, TableError::OutOfMemory);
            })
        };
        // What was split until then stays so, which no guest can see.
        assert!(at_every_allocation::<F, _>(dirty, true, work) > 0);
    }

    pub(super) fn what_cannot_fail<F: Format>(dirty: DirtyMode) {
        for gfns in [range(0, 8192), range(5, 1100), range(4096 + 100, 900), range(1030, 1)] {
            for work in [Work::Zap, Work::WriteProtect, Work::Collapse, Work::ClearDirty] {
                if work == Work::ClearDirty && F::DIRTY == 0 {
                    continue;
                }
                let work = |guest: &mut Guest<F>| -> Result<(), ()> {
                    let mut operation = guest.mmu.begin(work, gfns);
                    while operation.step(1 << 14) {}
                    operation.finish().discharge();
                    Ok(())
                };
                at_every_allocation::<F, _>(dirty, true, work);
            }
        }
    }

    pub(super) fn operations_in_steps<F: Format>(dirty: DirtyMode) {
        for work in [Work::Zap, Work::WriteProtect, Work::Collapse] {
            let work = |guest: &mut Guest<F>| -> Result<(), ()> {
                let mut operation = guest.mmu.begin(work, range(5, 5000));
                while operation.step(100) {}
                operation.finish().discharge();
                guest.mmu.reclaim();
                Ok(())
            };
            at_every_allocation::<F, _>(dirty, true, work);
        }
    }

    pub(super) fn invalidations<F: Format>(dirty: DirtyMode) {
        let work = |guest: &mut Guest<F>| {
            let mmu = guest.mmu.clone();
            let first = mmu.invalidate_hva(hvas(HVA + 0x3000, 700 << 12))?;
            mmu.invalidate_gfns(range(4096, 80))?.end();
            drop(first);
            Ok::<_, memslot::OutOfMemory>(())
        };
        // The second may fail where the first did not.
        assert!(at_every_allocation::<F, _>(dirty, false, work) > 0);
        let work = |guest: &mut Guest<F>| guest.mmu.invalidate_hva(hvas(HVA, 700 << 12)).map(drop);
        assert!(at_every_allocation::<F, _>(dirty, true, work) > 0);
    }

    pub(super) fn walkers<F: Format>(dirty: DirtyMode) {
        let work = |guest: &mut Guest<F>| {
            let mut walker: Walker<F, TestHost> = guest.mmu.walker()?;
            assert!(walker.translate(Gpa::new(0x3000)).is_some());
            drop(guest.mmu.dirty_rearm()?);
            Ok::<_, memslot::OutOfMemory>(())
        };
        assert!(at_every_allocation::<F, _>(dirty, true, work) > 1);
        // The tables themselves.
        let had = bytes();
        for allowed in 0.. {
            let mut table = SlotTable::new(Limits::default()).unwrap();
            let host = TestHost::default();
            let config = Config { dirty, ..Config::default() };
            let attach = || Mmu::<F, _>::attach(&mut table, host.clone(), config.clone());
            let (result, has_failed) = short(Shortage { allowed, for_good: true }, attach);
            match result {
                Ok(mmu) => assert_eq!((host.user.tables(), mmu.stats().tables), (1, 1)),
                Err(error) => {
                    assert_eq!(error, AttachError::Table(TableError::OutOfMemory));
                    assert_eq!(host.user.tables(), 0);
                    // The slot table is as it was.
                    table.create(spec(0, 0, 5, HVA, NONE)).unwrap();
                }
            }
            if !has_failed {
                assert!(allowed >= 4, "versions, the root, what is shared, the listener: {allowed}");
                break;
            }
        }
        assert_eq!(bytes(), had, "leaked");
    }

    pub(super) fn harvests<F: Format>(dirty: DirtyMode) {
        let work = |guest: &mut Guest<F>| {
            // One of its own each time: a harvest that failed must not owe its flush to the next one with the same.
            let mut rearm = guest.mmu.dirty_rearm().map_err(|_| HarvestError::OutOfMemory)?;
            let harvest = rearm.harvest(&guest.consumer)?;
            assert!(harvest.pages() >= 5, "{} {dirty:?} {}", harvest.pages(), F::NAME);
            harvest.commit();
            // Without memory for bits whole chunks count as dirty, and are protected.
            guest.mmu.write_protect(range(0, FRAMES)).discharge();
            Ok::<_, HarvestError<std::convert::Infallible>>(())
        };
        assert!(at_every_allocation::<F, _>(dirty, false, work) > 0);
    }

    type Change = fn(&mut SlotTable) -> Result<(), TransactionError>;

    pub(super) const CHANGES: [Change; 9] = [
        |table| table.delete(RAM, SlotId::new(0)).map(drop),
        |table| table.delete(RAM, SlotId::new(1)).map(drop),
        |table| table.move_to(RAM, SlotId::new(0), Gfn::new(8192 + 5)).map(drop),
        |table| table.move_to(RAM, SlotId::new(1), Gfn::new(8192)).map(drop),
        |table| table.set_flags(RAM, SlotId::new(0), LOG).map(drop),
        |table| table.set_flags(RAM, SlotId::new(1), NONE).map(drop),
        |table| table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).map(drop),
        |table| table.create(spec(5, 8192, 100, HVA + (8192 << 12), NONE)).map(drop),
        |table| {
            let many = table.transaction(|tx| {
                tx.split(RAM, SlotId::new(0), Gfn::new(1030), SlotId::new(7))?;
                tx.resize(RAM, SlotId::new(1), 1000)?;
                tx.set_flags(RAM, SlotId::new(7), LOG)
            });
            many.map(drop)
        },
    ];

    pub(super) fn changes_of_slots<F: Format>(dirty: DirtyMode) {
        for change in CHANGES {
            let work = |guest: &mut Guest<F>| change(&mut guest.table);
            assert!(at_every_allocation::<F, _>(dirty, true, work) > 0);
        }
    }

    /// A listener behind the tables that refuses one change.
    struct Refuses {
        commit: bool,
        once: bool,
    }

    impl Listener for Refuses {
        fn name(&self) -> &str {
            "refuses"
        }

        fn prepare(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
            if !self.commit && std::mem::take(&mut self.once) {
                Err(Box::new(std::fmt::Error))
            } else {
                Ok(())
            }
        }

        fn undo(&mut self, _: &Update<'_>) {}

        fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
            if self.commit && std::mem::take(&mut self.once) {
                Err(Box::new(std::fmt::Error))
            } else {
                Ok(())
            }
        }
    }

    pub(super) fn changes_that_are_refused<F: Format>(dirty: DirtyMode) {
        // Of each way to log one format: this is slow.
        let commits: &[bool] = if F::NAME == "NPT" { &[false, true] } else { &[] };
        for &commit in commits {
            for change in CHANGES {
                let work = |guest: &mut Guest<F>| {
                    let allowed = ALLOWED.replace(-1);
                    let refuses = Box::new(Refuses { commit, once: true });
                    guest.table.add_listener(refuses).unwrap();
                    let before: Vec<_> = guest.leaves().into_keys().collect();
                    let slots: Vec<_> = guest.table.view().slots(RAM).copied().collect();
                    ALLOWED.set(allowed);
                    assert!(change(&mut guest.table).is_err(), "refused, or no memory");
                    ALLOWED.set(-1);
                    assert!(guest.table.view().slots(RAM).eq(&slots));
                    // What was zapped is gone, and nothing else came.
                    let after: Vec<_> = guest.leaves().into_keys().collect();
                    assert!(commit || before == after);
                    for gfn in [0, 3, 70, 599, 1030] {
                        assert!(matches!(guest.write(gfn), Fault::Mapped(_) | Fault::AlreadyMapped));
                        assert!(matches!(guest.write(4096 + gfn), Fault::Mapped(_) | Fault::AlreadyMapped));
                        assert!(
                            guest.log.is_marked(RAM, Gfn::new(4096 + gfn)) || dirty == DirtyMode::Hardware
                        );
                    }
                    // And what was written is not lost.
                    let harvest = guest.harvest();
                    assert!([0, 3, 70, 599, 1030].iter().all(|gfn| harvest.contains(&(4096 + gfn))));
                    guest.mmu.zap(range(0, FRAMES)).discharge();
                    Ok::<_, ()>(())
                };
                at_every_allocation::<F, _>(dirty, true, work);
            }
        }
    }

    /// The host has memory, the caller allows no more tables.
    pub(super) fn a_limit_of_tables<F: Format>(dirty: DirtyMode) {
        for limit in 0..12 {
            let mut table = SlotTable::new(Limits::default()).unwrap();
            let log = DirtyLog::attach(&mut table).unwrap();
            let host = TestHost::default();
            let config = Config { dirty, tables: limit, log: Some(log), ..Config::default() };
            let mmu = match Mmu::<F, _>::attach(&mut table, host.clone(), config) {
                Ok(mmu) => mmu,
                Err(error) => {
                    assert!(limit == 0 && error == AttachError::Table(TableError::Limit { limit }));
                    continue;
                }
            };
            table.create(spec(0, 0, 4096, HVA, LOG)).unwrap();
            let mut walker = mmu.walker().unwrap();
            let mut is_full = false;
            for gfn in (0..4096).step_by(512) {
                let before = read_tables(&mmu);
                match walker.fault(Gpa::new(gfn << 12), Access::WRITE) {
                    Ok(fault) => assert_eq!(fault, Fault::Mapped(Level::K4)),
                    Err(error) => {
                        is_full = true;
                        assert!(matches!(error, FaultError::Table(TableError::Limit { .. })));
                        assert_eq!(read_tables(&mmu), before);
                    }
                }
                assert!(host.user.tables() <= limit && mmu.stats().tables == host.user.tables());
            }
            assert_eq!(is_full, limit < usize::from(F::LEVELS) + 7, "{limit}");
            // Zapping needs none, and what is freed can be used.
            mmu.zap(range(0, 4096)).discharge();
            if limit >= usize::from(F::LEVELS) {
                assert_eq!(walker.fault(Gpa::new(0x5000), Access::READ).unwrap(), Fault::Mapped(Level::K4));
            }
        }
    }

    /// The heap has memory, the host has no tables.
    pub(super) fn a_host_without_tables<F: Format>(dirty: DirtyMode) {
        for left in [0, 1, 5] {
            let mut guest = guest::<F>(dirty);
            guest.host.user.set_tables_left(left);
            let before = seen(&guest);
            let mut result = Ok(0);
            let gfns: [GfnRange; 2] = [range(0, 2048), range(4096, 2048)];
            for gfns in gfns {
                result = result.and_then(|_| guest.mmu.split(gfns, Level::K4));
            }
            assert!(seen(&guest) == before, "no translation has changed");
            for gfn in (0..6144).step_by(100).filter(|gfn| !(2048..4096).contains(gfn)) {
                let before = seen(&guest);
                let fault = guest.vcpu.fault(Gpa::new(gfn << 12), Access::WRITE);
                assert!(fault.is_ok() || seen(&guest) == before);
            }
            // With nothing left, all that takes away works.
            guest.mmu.write_protect(range(0, FRAMES)).discharge();
            assert!(seen(&guest).values().all(|(_, write)| !write));
            guest.table.delete(RAM, SlotId::new(0)).unwrap();
            guest.table.set_flags(RAM, SlotId::new(1), NONE).unwrap();
            assert_eq!(guest.host.stale(&guest.mmu, range(0, FRAMES)), []);
            guest.host.user.set_tables_left(usize::MAX);
            assert!(matches!(guest.write(4100), Fault::Mapped(_) | Fault::AlreadyMapped));
            let host = guest.host.clone();
            drop(guest);
            assert_eq!(host.user.tables(), 0);
        }
    }
}
