//! Interleavings of faults with everything else, run by loom, with tables of two entries and two levels.
//!
//! A table that is freed while a walker might be inside makes loom panic (`user.rs`); so every model here is one of
//! reclamation, too.

use loom::sync::atomic::Ordering;
use loom::thread;
use memslot::dirty::{Consumer, DirtyLog, HeavyFence};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, HvaRange, Limits, SlotFlags, SlotId, SlotSpec,
    SlotTable,
};

use super::cursor::{At, Cursor, Next, Visit};
use super::fault::Fault;
use super::{Config, DirtyMode, Mmu, Walker};
use crate::format::{Access, Format, Npt};
use crate::level::Level;
use crate::loom_host::{Home, LoomHost};
use crate::user::UserHost;

pub(super) type Tables = Mmu<Npt<2>, LoomHost>;
pub(super) type Vcpu = Walker<Npt<2>, LoomHost>;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const HVA: u64 = 0x7000_0000;
const HOME: Home = |slot, gfn| (slot.hva_of(gfn).map_or(0, Hva::get) >> 12, slot.gfns());

pub(super) struct Guest {
    pub(super) table: SlotTable,
    pub(super) log: Option<DirtyLog>,
    pub(super) mmu: Tables,
    pub(super) host: LoomHost,
}

impl Guest {
    pub(super) fn new(has_log: bool, largest: Level, flags: SlotFlags) -> Self {
        Self::noticing(DirtyMode::WriteProtect, has_log, largest, flags)
    }

    pub(super) fn noticing(dirty: DirtyMode, has_log: bool, largest: Level, flags: SlotFlags) -> Self {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = has_log.then(|| DirtyLog::attach(&mut table).unwrap());
        let host = LoomHost::new(UserHost::default(), HOME);
        let config = Config { log: log.clone(), largest, dirty, ..Config::default() };
        let mmu = Mmu::attach(&mut table, host.clone(), config).unwrap();
        let mut guest = Self { table, log, mmu, host };
        guest.create(flags);
        guest
    }

    /// Pages of 4 KiB, with this fence; `keeps` as for the host.
    pub(super) fn with_fence(fence: Box<dyn HeavyFence>, keeps: bool) -> Self {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let host = LoomHost::keeping(UserHost::default(), HOME, keeps);
        let config = Config { largest: Level::K4, ..Config::default() };
        let mmu = Mmu::attach_with_fence(&mut table, host.clone(), config, fence).unwrap();
        let mut guest = Self { table, log: None, mmu, host };
        guest.create(SlotFlags::empty());
        guest
    }

    fn create(&mut self, flags: SlotFlags) {
        self.table
            .create(SlotSpec {
                address_space: RAM,
                id: SlotId::new(0),
                gfns: range(0, 2),
                backing: Backing::Host { hva: Hva::new(HVA) },
                flags,
            })
            .unwrap();
    }

    pub(super) fn vcpu(&self) -> Vcpu {
        let mut vcpu = self.mmu.walker().unwrap();
        // A fault that starts again for want of tables is another model.
        vcpu.top_up();
        vcpu
    }

    pub(super) fn pfn(&self, gfn: u64) -> Option<u64> {
        self.mmu.walker().unwrap().translate(gpa(gfn)).map(|mapping| mapping.pfn.get())
    }
}

pub(super) fn range(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first), pages).unwrap()
}

pub(super) fn gpa(gfn: u64) -> Gpa {
    Gpa::new(gfn << 12)
}

pub(super) fn write(vcpu: &mut Vcpu, gfn: u64) -> Fault {
    vcpu.fault(gpa(gfn), Access::WRITE).unwrap()
}

#[test]
fn loom_faults_on_the_same_table_and_page() {
    for gfns in [(0, 0), (0, 1)] {
        loom::model(move || {
            let guest = Guest::new(false, Level::K4, SlotFlags::empty());
            let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
            let other = thread::spawn(move || write(&mut a, gfns.0));
            let mine = write(&mut b, gfns.1);
            let theirs = other.join().unwrap();
            for fault in [mine, theirs] {
                assert!(matches!(fault, Fault::Mapped(Level::K4) | Fault::AlreadyMapped));
            }
            assert!(
                gfns.0 == gfns.1 || (mine, theirs) == (Fault::Mapped(Level::K4), Fault::Mapped(Level::K4))
            );
            assert_eq!(guest.pfn(gfns.0), Some((HVA >> 12) + gfns.0));
            assert_eq!(guest.pfn(gfns.1), Some((HVA >> 12) + gfns.1));
        });
    }
}

/// D1. With the page's table there, and without.
#[test]
fn loom_a_fault_beside_a_delete_installs_nothing() {
    for (largest, has_table) in [(Level::K4, true), (Level::K4, false), (Level::M2, false)] {
        loom::model(move || {
            let mut guest = Guest::new(false, largest, SlotFlags::empty());
            let mut vcpu = guest.vcpu();
            if has_table {
                let _ = write(&mut vcpu, 1);
            }
            let other = thread::spawn(move || {
                let _ = write(&mut vcpu, 0);
            });
            guest.table.delete(RAM, SlotId::new(0)).unwrap();
            assert_eq!(guest.pfn(0), None, "when the delete returns");
            other.join().unwrap();
            assert_eq!(guest.pfn(0), None, "and ever after");
        });
    }
}

/// D3: a slot is made while its memory is being invalidated, which found no slot when it began: it is covered all the same.
#[test]
fn loom_an_invalidation_beside_a_create() {
    loom::model(|| {
        let mut guest = Guest::new(false, Level::K4, SlotFlags::empty());
        guest.table.delete(RAM, SlotId::new(0)).unwrap();
        let mut vcpu = guest.vcpu();
        let (mmu, host) = (guest.mmu.clone(), guest.host.clone());
        let invalidating = thread::spawn(move || {
            let hvas = HvaRange::with_len(Hva::new(HVA), 4096).unwrap();
            let invalidation = mmu.invalidate_hva(hvas).unwrap();
            host.0.offset.store(100, Ordering::Relaxed);
            invalidation.end();
        });
        guest.create(SlotFlags::empty());
        let _ = write(&mut vcpu, 0);
        invalidating.join().unwrap();
        assert!([None, Some((HVA >> 12) + 100)].contains(&guest.pfn(0)));
        assert_eq!(guest.mmu.invalidations(), 0);
    });
}

/// D3: memory is invalidated while its slot is deleted. Where no slot is found any more, it may be in use still: nobody was flushed.
#[test]
fn loom_an_invalidation_beside_a_delete() {
    loom::model(|| {
        let mut guest = Guest::new(false, Level::K4, SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        let _ = write(&mut vcpu, 0);
        let mmu = guest.mmu.clone();
        let before = mmu.stats().flushes;
        let invalidating = thread::spawn(move || {
            let hvas = HvaRange::with_len(Hva::new(HVA), 4096).unwrap();
            let invalidation = mmu.invalidate_hva(hvas).unwrap();
            assert!(mmu.stats().flushes > before, "the page is used still");
            invalidation.end();
        });
        guest.table.delete(RAM, SlotId::new(0)).unwrap();
        invalidating.join().unwrap();
    });
}

/// D2.
#[test]
fn loom_a_fault_beside_an_invalidation_never_maps_the_old_frame() {
    for has_table in [true, false] {
        loom::model(move || {
            let guest = Guest::new(false, Level::K4, SlotFlags::empty());
            let mut vcpu = guest.vcpu();
            if has_table {
                let _ = write(&mut vcpu, 1);
            }
            let other = thread::spawn(move || {
                let _ = write(&mut vcpu, 0);
            });
            let hvas = HvaRange::with_len(Hva::new(HVA), 4096).unwrap();
            let invalidation = guest.mmu.invalidate_hva(hvas).unwrap();
            assert_eq!(guest.pfn(0), None);
            guest.host.0.offset.store(100, Ordering::Relaxed);
            assert_eq!(guest.pfn(0), None);
            invalidation.end();
            other.join().unwrap();
            assert!([None, Some((HVA >> 12) + 100)].contains(&guest.pfn(0)));
        });
    }
}

/// Tables go while a fault may be inside.
#[test]
fn loom_a_fault_beside_a_zap_that_frees_its_table() {
    loom::model(|| {
        let guest = Guest::new(false, Level::K4, SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        let _ = write(&mut vcpu, 1);
        let other = thread::spawn(move || {
            let fault = write(&mut vcpu, 0);
            assert_eq!(fault, Fault::Mapped(Level::K4));
        });
        guest.mmu.zap(range(0, 2)).discharge();
        guest.mmu.reclaim();
        other.join().unwrap();
        guest.mmu.zap(range(0, 2)).discharge();
        guest.mmu.reclaim();
        assert_eq!(guest.pfn(0), None);
    });
}

/// D7: a large page is split by a write beside another write, and collapsed when logging stops.
#[test]
fn loom_a_split_beside_a_split() {
    loom::model(|| {
        let guest = Guest::new(true, Level::M2, SlotFlags::empty());
        let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
        let mut table = guest.table;
        assert_eq!(write(&mut a, 0), Fault::Mapped(Level::M2));
        table.set_flags(RAM, SlotId::new(0), SlotFlags::LOG_DIRTY_PAGES).unwrap();
        let other = thread::spawn(move || write(&mut a, 0));
        let mine = write(&mut b, 1);
        assert_eq!((mine, other.join().unwrap()), (Fault::Mapped(Level::K4), Fault::Mapped(Level::K4)));
        let log = guest.log.unwrap();
        assert!(log.is_marked(RAM, Gfn::new(0)) && log.is_marked(RAM, Gfn::new(1)));
    });
}

#[test]
fn loom_a_collapse_beside_a_fault() {
    loom::model(|| {
        let mut guest = Guest::new(true, Level::M2, SlotFlags::LOG_DIRTY_PAGES);
        let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
        let _ = (write(&mut a, 0), a.fault(gpa(1), Access::READ).unwrap());
        let other = thread::spawn(move || {
            let fault = write(&mut a, 1);
            assert!(matches!(fault, Fault::Mapped(_) | Fault::AlreadyMapped));
        });
        guest.table.set_flags(RAM, SlotId::new(0), SlotFlags::empty()).unwrap();
        other.join().unwrap();
        assert!(matches!(write(&mut b, 1), Fault::Mapped(_) | Fault::AlreadyMapped));
        assert_eq!((guest.pfn(0), guest.pfn(1)), (Some(HVA >> 12), Some((HVA >> 12) + 1)));
    });
}

/// Logging starts beside a fault: what is writable afterwards is marked.
#[test]
fn loom_logging_starts_beside_a_fault() {
    for has_table in [true, false] {
        loom::model(move || {
            let mut guest = Guest::new(true, Level::K4, SlotFlags::empty());
            let mut vcpu = guest.vcpu();
            if has_table {
                let _ = vcpu.fault(gpa(1), Access::READ).unwrap();
            }
            let other = thread::spawn(move || {
                let _ = write(&mut vcpu, 0);
            });
            guest.table.set_flags(RAM, SlotId::new(0), SlotFlags::LOG_DIRTY_PAGES).unwrap();
            other.join().unwrap();
            let mapping = guest.mmu.walker().unwrap().translate(gpa(0));
            let is_writable = mapping.is_some_and(|mapping| mapping.access.contains(Access::WRITE));
            assert!(!is_writable || guest.log.unwrap().is_marked(RAM, Gfn::new(0)));
        });
    }
}

/// Read-only starts beside a fault: nothing is writable afterwards.
#[test]
fn loom_read_only_starts_beside_a_fault() {
    for has_table in [true, false] {
        loom::model(move || {
            let mut guest = Guest::new(false, Level::K4, SlotFlags::empty());
            let mut vcpu = guest.vcpu();
            if has_table {
                let _ = vcpu.fault(gpa(1), Access::READ).unwrap();
            }
            let other = thread::spawn(move || {
                let _ = write(&mut vcpu, 0);
            });
            guest.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(0), true)).unwrap();
            other.join().unwrap();
            let mapping = guest.mmu.walker().unwrap().translate(gpa(0));
            assert!(mapping.is_none_or(|mapping| !mapping.access.contains(Access::WRITE)));
        });
    }
}

/// A processor that writes `value` to page 0: by the tables, or after a fault.
pub(super) fn processor_writes(vcpu: &mut Vcpu, host: &LoomHost, value: usize) {
    loop {
        {
            let _uses_translation = host.0.processor.lock().unwrap();
            let mapping = vcpu.translate(gpa(0));
            if mapping.is_some_and(|mapping| mapping.access.contains(Access::WRITE)) {
                host.0.contents.store(value, Ordering::Relaxed);
                return;
            }
        }
        let _ = write(vcpu, 0);
    }
}

/// What a harvest says, and a copy of page 0 if it is among it.
fn copy(guest: &Guest, consumer: &Consumer) -> Option<usize> {
    let mut rearm = guest.mmu.dirty_rearm().unwrap();
    let harvest = rearm.harvest(consumer).unwrap();
    let copy = harvest.runs().next().map(|_| guest.host.0.contents.load(Ordering::Relaxed));
    harvest.commit();
    copy
}

/// D4: what is written beside a harvest is in it or in the next one.
#[test]
fn loom_a_write_beside_a_harvest() {
    for is_mapped in [false, true] {
        loom::model(move || {
            let guest = Guest::new(true, Level::K4, SlotFlags::LOG_DIRTY_PAGES);
            let consumer = guest.log.as_ref().unwrap().consumer().unwrap();
            let mut vcpu = guest.vcpu();
            if is_mapped {
                processor_writes(&mut vcpu, &guest.host, 1);
            }
            let host = guest.host.clone();
            let other = thread::spawn(move || processor_writes(&mut vcpu, &host, 2));
            let first = copy(&guest, &consumer);
            other.join().unwrap();
            let second = copy(&guest, &consumer);
            assert_eq!(second.or(first), Some(2), "first {first:?}, second {second:?}");
        });
    }
}

/// Sets accessed and dirty bits of a leaf that may be written, as a processor does.
struct SetDirty(bool);

impl Visit for SetDirty {
    fn leaf(&mut self, at: &At<'_>) -> Next {
        if at.seen & <Npt<2> as Format>::WRITE == 0 {
            return Next::Done;
        }
        self.0 = at.replace(at.seen | <Npt<2> as Format>::ACCESSED | <Npt<2> as Format>::DIRTY);
        if self.0 { Next::Done } else { Next::Again }
    }
}

/// As `processor_writes`, with a processor that notes it in the entry. What it has noted once it may go on using until it
/// is flushed.
fn processor_writes_and_notes(vcpu: &mut Vcpu, host: &LoomHost, value: usize) {
    loop {
        {
            let _uses_translation = host.0.processor.lock().unwrap();
            let mut set = SetDirty(false);
            let pin = vcpu.mmu.shared.pin(&vcpu.cell);
            Cursor::new(&pin, 0, 1, usize::MAX).run(0, &mut set);
            if set.0 {
                host.0.contents.store(value, Ordering::Relaxed);
                return;
            }
        }
        let _ = write(vcpu, 0);
    }
}

/// D4 by the processor's dirty bits.
#[test]
fn loom_a_write_beside_a_harvest_of_dirty_bits() {
    for is_mapped in [false, true] {
        loom::model(move || {
            let guest = Guest::noticing(DirtyMode::Hardware, true, Level::K4, SlotFlags::LOG_DIRTY_PAGES);
            let consumer = guest.log.as_ref().unwrap().consumer().unwrap();
            let mut vcpu = guest.vcpu();
            if is_mapped {
                processor_writes_and_notes(&mut vcpu, &guest.host, 1);
            }
            let host = guest.host.clone();
            let other = thread::spawn(move || processor_writes_and_notes(&mut vcpu, &host, 2));
            let first = copy(&guest, &consumer);
            other.join().unwrap();
            let second = copy(&guest, &consumer);
            assert_eq!(second.or(first), Some(2), "first {first:?}, second {second:?}");
        });
    }
}

/// A slot is deleted beside a processor that writes: what it wrote is among what was removed.
#[test]
fn loom_a_write_beside_a_delete_is_handed_over() {
    loom::model(|| {
        let mut guest = Guest::noticing(DirtyMode::Hardware, true, Level::K4, SlotFlags::LOG_DIRTY_PAGES);
        let keeper = guest.log.as_ref().unwrap().consumer_keeping_removed().unwrap();
        let mut vcpu = guest.vcpu();
        let _ = vcpu.fault(gpa(0), Access::READ).unwrap();
        let host = guest.host.clone();
        let other = thread::spawn(move || {
            let _uses_translation = host.0.processor.lock().unwrap();
            let mut set = SetDirty(false);
            let pin = vcpu.mmu.shared.pin(&vcpu.cell);
            Cursor::new(&pin, 0, 1, usize::MAX).run(0, &mut set);
            set.0
        });
        guest.table.delete(RAM, SlotId::new(0)).unwrap();
        let removed = keeper.take_removed().unwrap();
        let found = removed.iter().flat_map(|removed| removed.runs().collect::<Vec<_>>()).next();
        assert_eq!(other.join().unwrap(), found.is_some());
    });
}
