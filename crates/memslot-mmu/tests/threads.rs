//! Many threads at once: processors fault and use what they cached, slots come and go, memory is invalidated, the log
//! is harvested. Nothing that was removed may be in use once its removal returned, and nothing leaks.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{HVA, RAM, hvas, range, spec};
use memslot::dirty::DirtyLog;
use memslot::{Gpa, Limits, SlotFlags, SlotId, SlotTable};
use memslot_mmu::format::{Access, Npt};
use memslot_mmu::user::UserHost;
use memslot_mmu::{Config, Fault, Level, Mmu, Work};
use memslot_testing::{Random, seed, times};

fn duration() -> Duration {
    Duration::from_millis(times() * if cfg!(miri) { 20 } else { 400 })
}

/// A processor: faults all over, and counts what became of it.
fn processor(mmu: &Mmu<Npt, UserHost>, stop: &AtomicBool, pages: u64, seed: u64) -> u64 {
    let mut vcpu = mmu.walker().unwrap();
    let mut numbers = Random::new(seed);
    let mut mapped = 0;
    while !stop.load(Ordering::Relaxed) {
        let random = numbers.next();
        let gpa = Gpa::new(((random >> 8) % pages) << 12);
        let access = if random & 1 == 0 { Access::READ } else { Access::WRITE };
        match vcpu.fault(gpa, access).unwrap() {
            Fault::Mapped(_) => mapped += 1,
            Fault::AlreadyMapped | Fault::Mmio | Fault::Retry => {}
            other => panic!("{other:?}"),
        }
        if random % 64 == 0 {
            let _ = vcpu.prefault(range((random >> 8) % pages, 700), 4).unwrap();
            vcpu.age(range(0, 600));
        }
    }
    mapped
}

#[test]
fn slots_and_memory_change_under_running_processors() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    let config = Config { log: Some(log.clone()), largest: Level::M2, ..Config::default() };
    let mmu = Mmu::<Npt, _>::attach(&mut table, UserHost::default(), config).unwrap();
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    table.create(spec(0, 0, 4096, HVA, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    std::thread::scope(|scope| {
        let vcpus: Vec<_> = (0..2)
            .map(|number| {
                let (mmu, stop) = (&mmu, &stop);
                scope.spawn(move || processor(mmu, stop, 3 * 4096, seed().wrapping_add(number << 32)))
            })
            .collect();
        // Memory is invalidated all the time.
        scope.spawn(|| {
            let mut reader = mmu.walker().unwrap();
            let mut page = 0;
            while !stop.load(Ordering::Relaxed) {
                page = (page + 77) % 4096;
                let invalidation = mmu.invalidate_hva(hvas(HVA + (page << 12), 3 << 12)).unwrap();
                assert_eq!(reader.translate(Gpa::new(page << 12)), None, "not while it is invalidated");
                invalidation.end();
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        // The log is harvested, and ranges are worked on.
        scope.spawn(|| {
            let consumer = log.consumer().unwrap();
            let mut rearm = mmu.dirty_rearm().unwrap();
            while !stop.load(Ordering::Relaxed) {
                rearm.harvest(&consumer).unwrap().commit();
                for work in [Work::WriteProtect, Work::Collapse, Work::Zap] {
                    let mut operation = mmu.begin(work, range(1000, 3000));
                    while operation.step(200) {}
                    operation.finish().discharge();
                }
                mmu.split(range(4096, 1024), Level::K4).unwrap();
            }
        });
        // Slots come, change and go.
        let until = Instant::now() + duration();
        let mut reader = mmu.walker().unwrap();
        while Instant::now() < until {
            table.create(spec(1, 4096, 4096, HVA + (4096 << 12), SlotFlags::empty())).unwrap();
            table.set_flags(RAM, SlotId::new(1), SlotFlags::LOG_DIRTY_PAGES).unwrap();
            table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(1), true)).unwrap();
            for gfn in [4096, 5000, 8000] {
                let mapping = reader.translate(Gpa::new(gfn << 12));
                assert!(mapping.is_none_or(|mapping| !mapping.access.contains(Access::WRITE)), "read-only");
            }
            table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(1), false)).unwrap();
            table.set_flags(RAM, SlotId::new(1), SlotFlags::empty()).unwrap();
            table.move_to(RAM, SlotId::new(1), memslot::Gfn::new(8192)).unwrap();
            assert_eq!(reader.translate(Gpa::new(5000 << 12)), None);
            table.delete(RAM, SlotId::new(1)).unwrap();
            for gfn in 8192..8292 {
                assert_eq!(reader.translate(Gpa::new(gfn << 12)), None, "gone when the delete returned");
            }
        }
        stop.store(true, Ordering::Relaxed);
        let mapped: u64 = vcpus.into_iter().map(|vcpu| vcpu.join().unwrap()).sum();
        assert!(mapped > 0 && rounds.load(Ordering::Relaxed) > 0);
    });
    table.delete(RAM, SlotId::new(0)).unwrap();
    mmu.reclaim();
    assert_eq!((mmu.stats().tables, mmu.host().tables()), (1, 1), "nothing leaks");
    assert_eq!(mmu.invalidations(), 0);
}
