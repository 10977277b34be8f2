//! Counters near every value where one of their widths ends (row 50 of the project's list of past bugs: a sequence number
//! kept in 31 bits hung virtual processors for good, after two thousand million invalidations).
//!
//! Each test runs one program from many values of all counters: nonces of operations, epochs, versions of the slots,
//! numbers of invalidations.

use alloc::boxed::Box;
use core::convert::Infallible;
use core::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::vec::Vec;

use memslot::dirty::DirtyLog;
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, HvaRange, Limits, Slot, SlotFlags, SlotId, SlotSpec,
    SlotTable,
};

use super::fault::Fault;
use super::{Config, DirtyMode, Mmu, Walker};
use crate::format::{Access, Ept, Format, Npt};
use crate::host::{Answer, Context, Frames, Pfn, TableMemory, TlbFlush};
use crate::level::{Level, Table};
use crate::user::UserHost;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const HVA: u64 = 0x7f00_0000_0000;

type Hook = Box<dyn FnOnce() + Send>;

/// A host that runs something in the middle of the next fault.
#[derive(Clone, Default)]
struct Hooked(Arc<(UserHost, Mutex<Option<Hook>>)>);

impl Hooked {
    fn in_the_next_fault(&self, hook: impl FnOnce() + Send + 'static) {
        *self.0.1.lock().unwrap() = Some(Box::new(hook));
    }
}

// SAFETY: passed on.
unsafe impl TableMemory for Hooked {
    fn allocate(&self, tables: usize) -> Option<Pfn> {
        self.0.0.allocate(tables)
    }
    unsafe fn free(&self, first: Pfn, tables: usize) {
        // SAFETY: passed on.
        unsafe { self.0.0.free(first, tables) }
    }
    fn reach(&self, table: Pfn) -> NonNull<Table> {
        self.0.0.reach(table)
    }
}

impl Frames for Hooked {
    type Error = Infallible;
    fn frame(&self, slot: &Slot, gfn: Gfn, access: Access) -> Result<Answer, Infallible> {
        let hook = self.0.1.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        self.0.0.frame(slot, gfn, access)
    }
}

impl TlbFlush for Hooked {
    fn flush(&self, context: Context, gfns: GfnRange) {
        self.0.0.flush(context, gfns);
    }
}

struct Guest<F: Format> {
    table: Arc<Mutex<SlotTable>>,
    log: DirtyLog,
    mmu: Mmu<F, Hooked>,
    vcpu: Walker<F, Hooked>,
}

impl<F: Format> Guest<F> {
    fn new(counters: u64) -> Self {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let dirty = if F::DIRTY == 0 { DirtyMode::WriteProtect } else { DirtyMode::Hardware };
        let config = Config { log: Some(log.clone()), dirty, largest: Level::M2, ..Config::default() };
        let mmu = Mmu::starting_at(&mut table, Hooked::default(), config, None, counters).unwrap();
        let vcpu = mmu.walker().unwrap();
        let mut guest = Self { table: Arc::new(Mutex::new(table)), log, mmu, vcpu };
        guest.create(0, 0, 64);
        guest
    }

    fn create(&mut self, id: u32, first: u64, pages: u64) {
        let spec = SlotSpec {
            address_space: RAM,
            id: SlotId::new(id),
            gfns: range(first, pages),
            backing: Backing::Host { hva: Hva::new(HVA + (first << 12)) },
            flags: SlotFlags::empty(),
        };
        self.table.lock().unwrap().create(spec).unwrap();
    }

    fn fault(&mut self, gfn: u64, access: Access) -> Fault {
        self.vcpu.fault(Gpa::new(gfn << 12), access).unwrap()
    }

    fn write(&mut self, gfn: u64) -> Fault {
        self.fault(gfn, Access::WRITE)
    }

    fn is_writable(&mut self, gfn: u64) -> bool {
        let mapping = self.vcpu.translate(Gpa::new(gfn << 12));
        mapping.is_some_and(|mapping| mapping.access.contains(Access::WRITE))
    }

    fn end(self) {
        let Self { table, mmu, mut vcpu, .. } = self;
        assert_eq!(mmu.invalidations(), 0);
        mmu.zap(range(0, 1 << 30)).discharge();
        let _ = vcpu.translate(Gpa::new(0));
        drop(vcpu);
        mmu.reclaim();
        assert_eq!((mmu.stats().tables, mmu.host().0.0.tables()), (1, 1), "all were awaited and freed");
        drop(table);
    }
}

fn range(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first), pages).unwrap()
}

/// Every value of the counters from which a program of some tens of operations passes the end of a width: of an `int` and an
/// `unsigned int`, of what fits into an entry (50 to 52 bits), of an announced epoch, of a signed and of the whole number.
fn starts() -> Vec<u64> {
    let widths = [1 << 31, 1 << 32, 1 << 39, 1 << 49, 1 << 50, 1 << 51, 1 << 52, 1 << 62, 1 << 63, 0];
    let around = |end: u64| (0..16).chain([20, 25, 33]).map(move |before| end.wrapping_sub(before));
    widths.into_iter().flat_map(around).chain([1, 1000]).collect()
}

fn for_all_starts(npt: fn(Guest<Npt>), ept: fn(Guest<Ept>), without_bits: fn(Guest<Ept<5, false>>)) {
    for start in starts() {
        npt(Guest::new(start));
        ept(Guest::new(start));
        without_bits(Guest::new(start));
    }
}

macro_rules! from_every_start {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            for_all_starts(programs::$name, programs::$name, programs::$name);
        }
    )*};
}

from_every_start! {
    row_50_faults_beside_deletes_and_creates
    row_50_faults_beside_invalidations
    row_50_faults_beside_a_read_only_toggle
    row_50_tables_are_freed_when_walkers_have_left
    row_50_the_dirty_log_across_operations
}

mod programs {
    use super::*;

    pub(super) fn row_50_faults_beside_deletes_and_creates<F: Format>(mut guest: Guest<F>) {
        // A neighbour keeps the table in place.
        guest.create(1, 64, 64);
        let _ = guest.write(100);
        for round in 0..6 {
            let table = guest.table.clone();
            guest.mmu.host().in_the_next_fault(move || {
                let mut table = table.lock().unwrap();
                let slot = *table.view().slot(RAM, SlotId::new(0)).unwrap();
                table.delete(RAM, SlotId::new(0)).unwrap();
                for _ in 0..round % 3 {
                    let (gfns, backing, flags) = (slot.gfns(), slot.backing(), slot.flags());
                    let spec = SlotSpec { address_space: RAM, id: slot.id(), gfns, backing, flags };
                    table.create(spec).unwrap();
                    table.delete(RAM, SlotId::new(0)).unwrap();
                }
            });
            assert_eq!(guest.write(5), Fault::Mmio, "{round}: the fault notices");
            assert_eq!(guest.vcpu.translate(Gpa::new(0x5000)), None);
            guest.create(0, 0, 64);
            assert_eq!(guest.write(5), Fault::Mapped(Level::K4), "{round}: and nothing hangs");
            assert_eq!(guest.write(5), Fault::AlreadyMapped);
            guest.mmu.zap(range(5, 1)).discharge();
        }
        guest.end();
    }

    pub(super) fn row_50_faults_beside_invalidations<F: Format>(mut guest: Guest<F>) {
        let _ = guest.write(6);
        for _ in 0..8 {
            let mmu = guest.mmu.clone();
            let first = mmu.invalidate_gfns(range(5, 1)).unwrap();
            let page = HvaRange::with_len(Hva::new(HVA + 0x5000), 4096).unwrap();
            let second = mmu.invalidate_hva(page).unwrap();
            first.end();
            assert_eq!((guest.write(5), mmu.invalidations()), (Fault::Retry, 1));
            second.end();
            // One that comes and goes in the middle of a fault: it starts again.
            let (other, asked) = (guest.mmu.clone(), Arc::new(Mutex::new(0)));
            let times = asked.clone();
            let host = guest.mmu.host().clone();
            guest.mmu.host().in_the_next_fault(move || {
                other.invalidate_gfns(range(0, 8)).unwrap().end();
                host.in_the_next_fault(move || *times.lock().unwrap() += 1);
            });
            assert_eq!(guest.write(5), Fault::Mapped(Level::K4));
            assert_eq!(*asked.lock().unwrap(), 1, "the host is asked a second time");
        }
        guest.end();
    }

    pub(super) fn row_50_faults_beside_a_read_only_toggle<F: Format>(mut guest: Guest<F>) {
        let _ = guest.write(6);
        for _ in 0..5 {
            let table = guest.table.clone();
            guest.mmu.host().in_the_next_fault(move || {
                let mut table = table.lock().unwrap();
                table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
            });
            assert_eq!(guest.write(5), Fault::Mmio);
            assert!(!guest.is_writable(5));
            let mut table = guest.table.lock().unwrap();
            table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), false)).unwrap();
            drop(table);
            assert_eq!(guest.write(5), Fault::Mapped(Level::K4));
            guest.mmu.zap(range(5, 1)).discharge();
        }
        guest.end();
    }

    pub(super) fn row_50_tables_are_freed_when_walkers_have_left<F: Format>(mut guest: Guest<F>) {
        for _ in 0..6 {
            let mmu = guest.mmu.clone();
            assert_eq!(guest.write(1), Fault::Mapped(Level::K4));
            guest.mmu.host().in_the_next_fault(move || {
                // A fault is inside the table: it is freed when that has left, and not before.
                mmu.reclaim();
                let before = mmu.host().0.0.tables();
                mmu.zap(range(0, 512)).discharge();
                mmu.reclaim();
                assert_eq!(mmu.host().0.0.tables(), before);
            });
            let _ = guest.write(2);
            let before = guest.mmu.host().0.0.tables();
            guest.mmu.zap(range(0, 512)).discharge();
            guest.mmu.reclaim();
            assert!(guest.mmu.host().0.0.tables() < before);
        }
        guest.end();
    }

    pub(super) fn row_50_the_dirty_log_across_operations<F: Format>(mut guest: Guest<F>) {
        let consumer = guest.log.consumer().unwrap();
        for _ in 0..6 {
            let mut table = guest.table.lock().unwrap();
            table.set_flags(RAM, SlotId::new(0), SlotFlags::LOG_DIRTY_PAGES).unwrap();
            drop(table);
            assert!(matches!(guest.write(9), Fault::Mapped(_) | Fault::AlreadyMapped));
            let mut rearm = guest.mmu.dirty_rearm().unwrap();
            let harvest = rearm.harvest(&consumer).unwrap();
            assert!(harvest.pages() <= 1);
            harvest.commit();
            guest.mmu.write_protect(range(0, 64)).discharge();
            assert_eq!(guest.write(9), Fault::Mapped(Level::K4));
            assert_eq!(rearm.harvest(&consumer).unwrap().pages(), 1);
            guest.table.lock().unwrap().set_flags(RAM, SlotId::new(0), SlotFlags::empty()).unwrap();
        }
        guest.end();
    }
}

/// An entry that was emptied exactly as many operations ago as entries have nonces, in the middle of a fault.
#[test]
fn row_50_an_entry_changes_also_when_its_nonce_comes_again() {
    fn check<F: Format>(bits: u32) {
        for start in [1 << 31, 7, 1 << 49, (1 << 49) + (1 << bits), u64::MAX - 90] {
            // As many operations as there are nonces, and a few less or more, between two that empty the entry.
            for missing in 0..6 {
                let mut guest = Guest::<F>::new(start);
                let _ = guest.write(6);
                guest.mmu.zap(range(5, 1)).discharge();
                let (mmu, table) = (guest.mmu.clone(), guest.table.clone());
                guest.mmu.host().in_the_next_fault(move || {
                    let nonce = &mmu.shared.nonce;
                    let now = nonce.load(core::sync::atomic::Ordering::Relaxed);
                    nonce.store(
                        now.wrapping_add((1 << bits) - missing),
                        core::sync::atomic::Ordering::Relaxed,
                    );
                    table.lock().unwrap().delete(RAM, SlotId::new(0)).unwrap();
                });
                assert_eq!(guest.write(5), Fault::Mmio, "{} {start:#x} {missing}", F::NAME);
                assert_eq!(guest.vcpu.translate(Gpa::new(0x5000)), None);
            }
        }
    }
    check::<Npt>(52);
    check::<Ept>(50);
}

/// An entry that was never emptied does not look as if it were again, whatever the nonce.
#[test]
fn row_50_no_operation_makes_an_entry_zero() {
    fn check<F: Format>() {
        for start in starts() {
            let guest = Guest::<F>::new(start);
            assert!((0..100).all(|_| F::empty(guest.mmu.shared.nonce()) != 0));
        }
    }
    check::<Npt>();
    check::<Ept>();
}
