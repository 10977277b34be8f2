//! Tables whose walkers announce themselves with a plain store: nothing that was in use is freed without the heavy fence.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{HVA, RAM, range, spec};
use memslot::dirty::{FenceRefused, HeavyFence};
use memslot::{Gpa, Limits, SlotFlags, SlotId, SlotTable};
use memslot_mmu::format::{Access, Npt};
use memslot_mmu::user::UserHost;
use memslot_mmu::{Config, Fault, Level, Mmu};

/// Counts, and refuses if it is told to.
#[derive(Clone, Default)]
struct Fence(Arc<(AtomicU64, AtomicBool)>);

impl HeavyFence for Fence {
    fn fence(&self) -> Result<(), FenceRefused> {
        std::sync::atomic::fence(Ordering::SeqCst);
        self.0.0.fetch_add(1, Ordering::Relaxed);
        if self.0.1.load(Ordering::Relaxed) { Err(FenceRefused) } else { Ok(()) }
    }
}

impl Fence {
    fn count(&self) -> u64 {
        self.0.0.load(Ordering::Relaxed)
    }

    fn refuse(&self, refuse: bool) {
        self.0.1.store(refuse, Ordering::Relaxed);
    }
}

fn guest(fence: &Fence) -> (SlotTable, Mmu<Npt, UserHost>) {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let config = Config { largest: Level::K4, ..Config::default() };
    let mmu =
        Mmu::attach_with_fence(&mut table, UserHost::default(), config, Box::new(fence.clone())).unwrap();
    table.create(spec(0, 0, 4096, HVA, SlotFlags::empty())).unwrap();
    (table, mmu)
}

#[test]
fn tables_are_freed_behind_a_fence_and_one_does_for_many() {
    let fence = Fence::default();
    let (_table, mmu) = guest(&fence);
    let mut vcpu = mmu.walker().unwrap();
    let _ = vcpu.prefault(range(0, 4096), usize::MAX).unwrap();
    let (tables, before) = (mmu.host().tables(), fence.count());
    let flush = mmu.zap(range(0, 4096));
    assert_eq!((mmu.host().tables(), fence.count()), (tables, before), "owed to a flush");
    flush.discharge();
    mmu.reclaim();
    // The eight tables of pages, and those above them; the walker has some left.
    assert_eq!((tables - mmu.host().tables(), fence.count()), (10, before + 1));
    let before = fence.count();
    mmu.reclaim();
    assert_eq!(fence.count(), before, "nothing waits: no fence");
}

#[test]
fn while_the_fence_is_refused_nothing_is_freed_and_faults_go_on() {
    let fence = Fence::default();
    let (mut table, mmu) = guest(&fence);
    let mut vcpu = mmu.walker().unwrap();
    let gpa = Gpa::new(0x12_3000);
    assert_eq!(vcpu.fault(gpa, Access::WRITE).unwrap(), Fault::Mapped(Level::K4));
    fence.refuse(true);
    let tables = mmu.host().tables();
    for _ in 0..3 {
        mmu.zap(range(0, 4096)).discharge();
        mmu.reclaim();
        assert_eq!(vcpu.translate(gpa), None);
        assert_eq!(vcpu.fault(gpa, Access::WRITE).unwrap(), Fault::Mapped(Level::K4));
    }
    table.set_flags(RAM, SlotId::new(0), SlotFlags::LOG_DIRTY_PAGES).unwrap();
    assert!(mmu.host().tables() > tables, "what was freed would have been used again");
    fence.refuse(false);
    mmu.zap(range(0, 4096)).discharge();
    mmu.reclaim();
    drop(vcpu);
    assert_eq!((mmu.stats().tables, mmu.host().tables()), (1, 1));
}

#[test]
fn without_walkers_no_fence_is_needed() {
    let fence = Fence::default();
    let (mut table, mmu) = guest(&fence);
    let mut vcpu = mmu.walker().unwrap();
    let _ = vcpu.prefault(range(0, 4096), usize::MAX).unwrap();
    drop(vcpu);
    fence.refuse(true);
    table.delete(RAM, SlotId::new(0)).unwrap();
    mmu.reclaim();
    assert_eq!((mmu.stats().tables, mmu.host().tables()), (1, 1));
}
