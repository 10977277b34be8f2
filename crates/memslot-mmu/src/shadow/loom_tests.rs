//! Interleavings of what takes no lock with what has it, run by loom, with tables of two entries.
//!
//! The guest's tables are in frames 1 to 4 and map the address 0. A table that is freed while somebody might be inside makes loom panic
//! (`user.rs`).

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use memslot::dirty::{DirtyLog, Rearm};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, HvaRange, Limits, Slot, SlotFlags, SlotId, SlotSpec,
    SlotTable,
};

use super::guest::{GuestAccess, GuestPaging, Processor, Registers};
use super::reserve::Reserve;
use super::vcpu::ShadowFault;
use super::{Shadow, ShadowConfig, ShadowVcpu, spte};
use crate::host::{Pfn, TableMemory};
use crate::invalidate::range;
use crate::level::Level;
use crate::loom_host::LoomHost;
use crate::sync::{AtomicU64, Ordering as Order};
use crate::user::UserHost;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const FRAMES: u64 = 8;
/// Where the guest's page table and its page are.
const PT: u64 = 4;
const PAGE: u64 = 5;
const OTHER: u64 = 6;
/// The slot that the page is in where it has one of its own.
const DATA: u32 = 1;
/// What a present entry permits: everything, accessed and dirty.
const ALL: u64 = 0x67;

/// The frame behind a page of the guest's: one is behind two pages, so that an entry of one looks as that of the other. Beyond the
/// frames that the guest has its tables in, they lie side by side.
fn home(slot: &Slot, gfn: Gfn) -> (u64, GfnRange) {
    let page = slot.hva_of(gfn).map_or(0, Hva::get) >> 12;
    let run = if page < FRAMES { range(gfn.get(), gfn.get() + 1) } else { slot.gfns() };
    (0x1000 + if page == OTHER { PAGE } else { page }, run)
}

struct Guest {
    table: SlotTable,
    log: DirtyLog,
    shadow: Shadow<LoomHost>,
    host: LoomHost,
}

impl Guest {
    /// A guest whose address 0 leads to [`PAGE`].
    fn new(flags: SlotFlags) -> Self {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let host = LoomHost::new(UserHost::with_memory(Hva::new(0), FRAMES as usize), home);
        for frame in 1..=PT {
            host.entry(frame).store((frame + 1) << 12 | ALL, Order::SeqCst);
        }
        let config =
            ShadowConfig { log: Some(log.clone()), physical_address_bits: 48, ..ShadowConfig::default() };
        let shadow = Shadow::attach(&mut table, host.clone(), config).unwrap();
        let mut guest = Self { table, log, shadow, host };
        guest.create(0, (0, FRAMES), flags);
        guest
    }

    /// The same with the page in a slot of its own, whose number is [`DATA`].
    fn with_two_slots(flags: SlotFlags) -> Self {
        let mut guest = Self::new(flags);
        guest.table.delete(RAM, SlotId::new(0)).unwrap();
        guest.create(0, (0, PAGE), flags);
        guest.create(DATA, (PAGE, FRAMES), flags);
        guest
    }

    fn create(&mut self, id: u32, (first, end): (u64, u64), flags: SlotFlags) {
        let slot = SlotSpec {
            address_space: RAM,
            id: SlotId::new(id),
            gfns: range(first, end),
            backing: Backing::Host { hva: Hva::new(first << 12) },
            flags,
        };
        self.table.create(slot).unwrap();
    }

    fn vcpu(&self) -> ShadowVcpu<LoomHost> {
        let mut vcpu = self.shadow.vcpu().unwrap();
        let registers = Registers { cr0: 0x8001_0011, cr3: 0x1000, cr4: 0x20, efer: 0xd00 };
        vcpu.load(GuestPaging::new(registers, Processor::default()), RAM).unwrap();
        vcpu
    }
}

impl LoomHost {
    /// The first entry of the guest's table in a frame.
    fn entry(&self, frame: u64) -> &AtomicU64 {
        &self.0.user.memory()[usize::try_from(frame).unwrap()].0[0]
    }

    /// The frame that the processor finds for the address 0.
    fn mapped(&self, root: Pfn) -> Option<u64> {
        let entry = self.leaf(root)?.load(Order::SeqCst);
        spte::is_present(entry).then(|| spte::pfn(entry).get())
    }

    /// The entry that the processor finds for the address 0.
    fn leaf(&self, root: Pfn) -> Option<&AtomicU64> {
        let mut table = root;
        for level in (1..=4).rev() {
            // SAFETY: the caller's root is not given up meanwhile, nor what is below it.
            let entry = unsafe { &self.reach(table).as_ref().0[0] };
            let seen = entry.load(Order::SeqCst);
            if level == 1 || !spte::is_present(seen) {
                return spte::is_present(seen).then_some(entry);
            }
            table = spte::pfn(seen);
        }
        None
    }
}

fn model(work: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 50_000;
    if builder.preemption_bound.is_none() {
        builder.preemption_bound = Some(2);
    }
    builder.check(work);
}

/// D5: the fast path beside shadow paging's write protection. Nothing is writable afterwards, and no processor writes once it is
/// protected and flushed.
#[test]
fn loom_shadow_fast_path_beside_write_protection() {
    model(|| {
        let guest = Guest::new(SlotFlags::LOG_DIRTY_PAGES);
        let mut vcpu = guest.vcpu();
        assert!(matches!(vcpu.fault(0, GuestAccess::READ).unwrap(), ShadowFault::Mapped(_)));
        let (host, root) = (guest.host.clone(), vcpu.root().unwrap().pfn);
        let log = guest.log.clone();
        // Whether the page is write-protected, and everybody was flushed.
        let is_protected = Arc::new(AtomicUsize::new(0));
        let was_protected = is_protected.clone();
        let processor = thread::spawn(move || {
            let loaded = vcpu.loaded.as_ref().unwrap();
            let shared = vcpu.shadow().shared.clone();
            let done = super::fast::fast_fault(&shared, &vcpu.cell, loaded, 0, GuestAccess::WRITE);
            if done.is_some() {
                assert!(log.is_marked(RAM, Gfn::new(PAGE)));
                let _running = host.0.processor.lock().unwrap();
                let entry = host.leaf(root).map_or(0, |entry| entry.load(Order::SeqCst));
                if entry & spte::WRITE != 0 {
                    assert_eq!(was_protected.load(Ordering::SeqCst), 0, "written behind our back");
                }
            }
            vcpu
        });
        guest.shadow.shared.with(|locked| {
            if locked.write_protect(Gfn::new(PAGE)) {
                locked.flush_now();
            }
        });
        is_protected.store(1, Ordering::SeqCst);
        let vcpu = processor.join().unwrap();
        let entry = guest.host.leaf(root).unwrap().load(Order::SeqCst);
        assert_eq!(entry & (spte::WRITE | spte::MMU_WRITABLE), 0);
        drop((vcpu, guest.table));
    });
}

/// The fast path beside an entry that becomes that of another page with the same bits: whatever is writable is marked.
#[test]
fn loom_shadow_fast_path_marks_what_it_has_made_writable() {
    model(|| {
        let guest = Guest::new(SlotFlags::LOG_DIRTY_PAGES);
        let mut vcpu = guest.vcpu();
        assert!(matches!(vcpu.fault(0, GuestAccess::READ).unwrap(), ShadowFault::Mapped(_)));
        let root = vcpu.root().unwrap().pfn;
        let mut reserve = Reserve::new(guest.shadow.shared.rmap.cache());
        reserve.top_up(&guest.shadow.shared).unwrap();
        let slots = guest.shadow.shared.with(|locked| locked.state.slots.clone());
        slots.rmap_at(RAM, Gfn::new(OTHER)).unwrap().reserve(Level::K4, Gfn::new(OTHER)).unwrap();
        drop(slots);
        let processor = thread::spawn(move || {
            let loaded = vcpu.loaded.as_ref().unwrap();
            let shared = vcpu.shadow().shared.clone();
            let _ = super::fast::fast_fault(&shared, &vcpu.cell, loaded, 0, GuestAccess::WRITE);
            vcpu
        });
        let gpte = OTHER << 12 | ALL;
        guest.host.entry(PT).store(gpte, Order::SeqCst);
        let page = guest.shadow.shared.with(|locked| {
            let page = locked.pages_of(Gfn::new(PT)).next().unwrap();
            let slot = locked.slot_at(RAM, Gfn::new(OTHER)).unwrap();
            let entry = locked.load(page, 0) & !(spte::WRITE | spte::DIRTY);
            locked.drop_entry(page, 0);
            locked.map(&mut reserve, page, 0, gpte, (&slot, Gfn::new(OTHER)), entry).unwrap();
            page.key.gfn
        });
        assert_eq!(page, Gfn::new(PT));
        let vcpu = processor.join().unwrap();
        let entry = guest.host.leaf(root).unwrap().load(Order::SeqCst);
        assert!(
            entry & spte::WRITE == 0 || guest.log.is_marked(RAM, Gfn::new(OTHER)),
            "writable and not marked"
        );
        reserve.drain(&guest.shadow.shared);
        drop((vcpu, guest.table));
    });
}

/// D1: a fault beside a delete of the slot that its page is in. Nothing is mapped when that returns, and ever after.
#[test]
fn loom_shadow_fault_beside_a_delete() {
    model(|| {
        let mut guest = Guest::with_two_slots(SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        let root = vcpu.root().unwrap().pfn;
        let faulting = thread::spawn(move || {
            let _ = vcpu.fault(0, GuestAccess::WRITE).unwrap();
            vcpu
        });
        guest.table.delete(RAM, SlotId::new(DATA)).unwrap();
        assert!(guest.host.mapped(root).is_none(), "when the delete returns");
        let vcpu = faulting.join().unwrap();
        assert!(guest.host.mapped(root).is_none(), "and ever after");
        guest.shadow.check().unwrap();
        drop((vcpu, guest.table));
    });
}

/// D1, as far as there is no memory: what a fault remembers of that while the slot is made is not believed afterwards.
#[test]
fn loom_shadow_no_memory_is_remembered_beside_a_create() {
    model(|| {
        let mut guest = Guest::with_two_slots(SlotFlags::empty());
        guest.table.delete(RAM, SlotId::new(DATA)).unwrap();
        let mut vcpu = guest.vcpu();
        let access = GuestAccess::RESERVED;
        let faulting = thread::spawn(move || {
            for _ in 0..2 {
                let _ = vcpu.fault(0, access).unwrap();
            }
            vcpu
        });
        guest.create(DATA, (PAGE, FRAMES), SlotFlags::empty());
        let mut vcpu = faulting.join().unwrap();
        let fault = vcpu.fault(0, access).unwrap();
        assert!(matches!(fault, ShadowFault::Mapped(_) | ShadowFault::AlreadyMapped), "{fault:?}");
        guest.shadow.check().unwrap();
        drop((vcpu, guest.table));
    });
}

/// D2: a fault beside an invalidation never maps what was there before.
#[test]
fn loom_shadow_fault_beside_an_invalidation() {
    model(|| {
        let guest = Guest::new(SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        let root = vcpu.root().unwrap().pfn;
        let faulting = thread::spawn(move || {
            let _ = vcpu.fault(0, GuestAccess::WRITE).unwrap();
            vcpu
        });
        let hvas = HvaRange::with_len(Hva::new(PAGE << 12), 4096).unwrap();
        let invalidation = guest.shadow.invalidate_hva(hvas).unwrap();
        assert_eq!(guest.host.mapped(root), None);
        guest.host.0.offset.store(0x100, Ordering::Relaxed);
        assert_eq!(guest.host.mapped(root), None);
        invalidation.end();
        let vcpu = faulting.join().unwrap();
        assert!([None, Some(PAGE + 0x1100)].contains(&guest.host.mapped(root)));
        drop((vcpu, guest.table));
    });
}

/// D3: a slot is made while its memory is being invalidated, which found no slot when it began.
#[test]
fn loom_shadow_invalidation_beside_a_create() {
    model(|| {
        let mut guest = Guest::with_two_slots(SlotFlags::empty());
        guest.table.delete(RAM, SlotId::new(DATA)).unwrap();
        let mut vcpu = guest.vcpu();
        let (shadow, host) = (guest.shadow.clone(), guest.host.clone());
        let invalidating = thread::spawn(move || {
            let hvas = HvaRange::with_len(Hva::new(PAGE << 12), 4096).unwrap();
            let invalidation = shadow.invalidate_hva(hvas).unwrap();
            host.0.offset.store(0x100, Ordering::Relaxed);
            invalidation.end();
        });
        guest.create(DATA, (PAGE, FRAMES), SlotFlags::empty());
        let _ = vcpu.fault(0, GuestAccess::WRITE).unwrap();
        invalidating.join().unwrap();
        let root = vcpu.root().unwrap().pfn;
        assert!([None, Some(PAGE + 0x1100)].contains(&guest.host.mapped(root)));
        assert_eq!(guest.shadow.invalidations(), 0);
        drop((vcpu, guest.table));
    });
}

/// Memory is invalidated while its slot is deleted. Where the slot is not found any more, its memory may be in use still: nobody was flushed.
#[test]
fn loom_shadow_invalidation_beside_a_delete() {
    model(|| {
        let mut guest = Guest::with_two_slots(SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        assert!(matches!(vcpu.fault(0, GuestAccess::WRITE).unwrap(), ShadowFault::Mapped(_)));
        let shadow = guest.shadow.clone();
        let before = shadow.shared.counters.stats().flushes;
        let invalidating = thread::spawn(move || {
            let hvas = HvaRange::with_len(Hva::new(PAGE << 12), 4096).unwrap();
            let invalidation = shadow.invalidate_hva(hvas).unwrap();
            assert!(shadow.shared.counters.stats().flushes > before, "the page is used still");
            invalidation.end();
        });
        guest.table.delete(RAM, SlotId::new(DATA)).unwrap();
        invalidating.join().unwrap();
        drop((vcpu, guest.table));
    });
}

/// D4: what is written beside a harvest is in it or in the next one.
#[test]
fn loom_shadow_write_beside_a_harvest() {
    for is_mapped in [false, true] {
        model(move || {
            let guest = Guest::new(SlotFlags::LOG_DIRTY_PAGES);
            let consumer = guest.log.consumer().unwrap();
            let mut vcpu = guest.vcpu();
            if is_mapped {
                processor_writes(&mut vcpu, &guest.host, 1);
            }
            let host = guest.host.clone();
            let writing = thread::spawn(move || {
                processor_writes(&mut vcpu, &host, 2);
                vcpu
            });
            let mut rearm = guest.shadow.dirty_rearm().unwrap();
            let mut copy = || {
                let harvest = rearm.harvest(&consumer).unwrap();
                let is_dirty = harvest.runs().any(|run| run.gfns.contains(Gfn::new(PAGE)));
                let copy = is_dirty.then(|| guest.host.0.contents.load(Ordering::Relaxed));
                harvest.commit();
                copy
            };
            let first = copy();
            let vcpu = writing.join().unwrap();
            let second = copy();
            assert_eq!(second.or(first), Some(2), "first {first:?}, second {second:?}");
            drop((rearm, vcpu, guest.table));
        });
    }
}

/// A processor that writes `value` to the page: by the tables, or after a fault.
fn processor_writes(vcpu: &mut ShadowVcpu<LoomHost>, host: &LoomHost, value: usize) {
    let root = vcpu.root().unwrap().pfn;
    loop {
        {
            let _uses_translation = host.0.processor.lock().unwrap();
            let entry = host.leaf(root).map_or(0, |entry| entry.load(Order::SeqCst));
            if entry & spte::WRITE != 0 {
                host.0.contents.store(value, Ordering::Relaxed);
                return;
            }
        }
        let _ = vcpu.fault(0, GuestAccess::WRITE).unwrap();
    }
}

/// D10: an entry of the guest's is written by a device, or emulated, while its table is shadowed for the first time. Either whoever
/// tells of the write finds the shadow page, or whoever makes it finds what was written.
#[test]
fn loom_shadow_write_beside_first_shadowing() {
    model(|| {
        let guest = Guest::new(SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        let (shadow, host) = (guest.shadow.clone(), guest.host.clone());
        let writing = thread::spawn(move || {
            host.entry(PT).store(OTHER << 12 | ALL, Order::SeqCst);
            shadow.wrote(RAM, Gpa::new(PT << 12), 8);
        });
        let _ = vcpu.fault(0, GuestAccess::READ).unwrap();
        writing.join().unwrap();
        let seen = guest.shadow.shared.with(|locked| {
            let page = locked.pages_of(Gfn::new(PT)).next();
            page.map_or(0, |page| {
                assert!(!page.is_unsync(), "nothing maps the table writable");
                page.gptes[0].load(Order::SeqCst)
            })
        });
        assert!(
            [0, OTHER << 12 | ALL].contains(&seen),
            "made of {seen:#x}, which was written before it was told"
        );
        guest.shadow.check().unwrap();
        drop((vcpu, guest.table));
    });
}

/// D6: a walk of the reverse map that changes entries, beside all pages being given up and freed.
#[test]
fn loom_shadow_aging_beside_free() {
    model(|| {
        let guest = Guest::new(SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        assert!(matches!(vcpu.fault(0, GuestAccess::READ).unwrap(), ShadowFault::Mapped(_)));
        let mut ager = guest.shadow.ager().unwrap();
        drop(vcpu);
        let walker = thread::spawn(move || ager.age(RAM, range(PAGE, PAGE + 1)));
        guest.shadow.zap_all();
        guest.shadow.reclaim();
        assert!(walker.join().unwrap() <= 1);
        guest.shadow.reclaim();
        assert_eq!(guest.shadow.stats().tables, 0);
    });
}

/// D9: a table becomes unsync and the guest writes it; another processor that sees what was written, and flushes, finds it unsync.
#[test]
fn loom_shadow_unsync_beside_sync() {
    model(|| {
        let guest = Guest::new(SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        assert!(matches!(vcpu.fault(0, GuestAccess::READ).unwrap(), ShadowFault::Mapped(_)));
        let root = vcpu.root().unwrap().pfn;
        let (shadow, host) = (guest.shadow.clone(), guest.host.clone());
        let writer = thread::spawn(move || {
            // What a write's fault at the table does before its entry becomes writable.
            shadow.shared.with(|locked| _ = locked.may_write(Gfn::new(PT), true));
            host.entry(PT).store(OTHER << 12 | ALL, Order::SeqCst);
        });
        let sees = guest.host.entry(PT).load(Order::SeqCst) >> 12 == OTHER;
        vcpu.flush_guest();
        if sees {
            assert!(guest.host.leaf(root).is_none(), "an old entry after a flush");
        }
        writer.join().unwrap();
        vcpu.flush_guest();
        assert!(guest.host.leaf(root).is_none());
        drop((vcpu, guest.table));
    });
}

/// A slot is split while the dirty log re-arms a page of it: the entry is kept, and is write-protected afterwards, whichever version of the
/// slots the dirty log has looked at.
#[test]
fn loom_shadow_rearm_beside_a_split() {
    model(|| {
        let mut guest = Guest::new(SlotFlags::LOG_DIRTY_PAGES);
        let mut vcpu = guest.vcpu();
        assert!(matches!(vcpu.fault(0, GuestAccess::WRITE).unwrap(), ShadowFault::Mapped(_)));
        let root = vcpu.root().unwrap().pfn;
        let mut rearm = guest.shadow.dirty_rearm().unwrap();
        let rearming = thread::spawn(move || {
            let Ok(()) = rearm.rearm(RAM, range(PAGE, PAGE + 1));
            let Ok(()) = rearm.flush();
            rearm
        });
        guest.table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(PAGE), SlotId::new(1))).unwrap();
        let rearm = rearming.join().unwrap();
        let entry = guest.host.leaf(root).expect("it was kept").load(Order::SeqCst);
        assert_eq!(entry & (spte::WRITE | spte::MMU_WRITABLE), spte::MMU_WRITABLE, "a write will be lost");
        guest.shadow.check().unwrap();
        drop((rearm, vcpu, guest.table));
    });
}

/// A fault beside a split, after which the new slot goes: what the fault has mapped goes with it.
#[test]
fn loom_shadow_fault_beside_a_split() {
    model(|| {
        let mut guest = Guest::new(SlotFlags::empty());
        let mut vcpu = guest.vcpu();
        let root = vcpu.root().unwrap().pfn;
        let faulting = thread::spawn(move || {
            let _ = vcpu.fault(0, GuestAccess::WRITE).unwrap();
            vcpu
        });
        let id = SlotId::new;
        guest.table.transaction(|tx| tx.split(RAM, id(0), Gfn::new(PAGE), id(70))).unwrap();
        guest.table.delete(RAM, id(70)).unwrap();
        let vcpu = faulting.join().unwrap();
        assert!(guest.host.leaf(root).is_none(), "a page of a slot that is gone is mapped");
        guest.shadow.check().unwrap();
        drop((vcpu, guest.table));
    });
}

/// A large page is made beside a split that cuts it: it goes, whenever it was made.
#[test]
fn loom_shadow_large_page_beside_a_split() {
    model(|| {
        // Where processors allow a large page to be. It has two frames here.
        const LARGE: u64 = 512;
        let mut guest = Guest::new(SlotFlags::empty());
        guest.host.entry(3).store(LARGE << 12 | ALL | 0x80, Order::SeqCst);
        let slot = SlotSpec {
            address_space: RAM,
            id: SlotId::new(2),
            gfns: range(LARGE, LARGE + 4),
            backing: Backing::Host { hva: Hva::new(LARGE << 12) },
            flags: SlotFlags::empty(),
        };
        guest.table.create(slot).unwrap();
        let mut vcpu = guest.vcpu();
        let faulting = thread::spawn(move || {
            let done = vcpu.fault(0, GuestAccess::READ).unwrap();
            (done, vcpu)
        });
        let id = SlotId::new;
        guest.table.transaction(|tx| tx.split(RAM, id(2), Gfn::new(LARGE + 1), id(1))).unwrap();
        let (done, mut vcpu) = faulting.join().unwrap();
        assert!(matches!(done, ShadowFault::Mapped(_)), "{done:?}");
        guest.shadow.check().unwrap();
        assert!(matches!(
            vcpu.fault(0, GuestAccess::READ).unwrap(),
            ShadowFault::Mapped(Level::K4) | ShadowFault::AlreadyMapped
        ));
        drop((vcpu, guest.table));
    });
}
