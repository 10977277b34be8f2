//! Interleavings of what takes no lock with what has it, run by loom, with tables of two entries.
//!
//! The guest's tables are in frames 1 to 4 and map the address 0. A table that is freed while somebody might be inside makes loom panic
//! (`user.rs`).

use core::convert::Infallible;
use core::ptr::NonNull;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use memslot::dirty::{DirtyLog, Rearm};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, Slot, SlotFlags, SlotId, SlotSpec, SlotTable,
};

use super::guest::{GuestAccess, GuestPaging, Processor, Registers};
use super::reserve::Reserve;
use super::vcpu::ShadowFault;
use super::{GuestMemory, Shadow, ShadowConfig, ShadowVcpu, spte};
use crate::format::{Access, MemoryType};
use crate::host::{Answer, Context, Frame, Frames, Pfn, TableMemory, TlbFlush};
use crate::invalidate::range;
use crate::level::{Level, Table};
use crate::sync::{AtomicU64, Ordering as Order};
use crate::user::UserHost;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const FRAMES: u64 = 8;
/// Where the guest's page table and its page are.
const PT: u64 = 4;
const PAGE: u64 = 5;
const OTHER: u64 = 6;
/// What a present entry permits: everything, accessed and dirty.
const ALL: u64 = 0x67;

#[derive(Clone)]
struct LoomHost(Arc<Inner>);

struct Inner {
    user: UserHost,
    memory: Vec<Table>,
    /// Held by a processor while it uses what it has found in the tables; a flush waits for that.
    processor: loom::sync::Mutex<()>,
    /// Whether the page is write-protected, and everybody was flushed.
    is_protected: AtomicUsize,
}

// SAFETY: passed on.
unsafe impl TableMemory for LoomHost {
    fn allocate(&self, tables: usize) -> Option<Pfn> {
        self.0.user.allocate(tables)
    }
    unsafe fn free(&self, first: Pfn, tables: usize) {
        // SAFETY: passed on.
        unsafe { self.0.user.free(first, tables) }
    }
    fn reach(&self, table: Pfn) -> NonNull<Table> {
        self.0.user.reach(table)
    }
}

impl Frames for LoomHost {
    type Error = Infallible;
    fn frame(&self, slot: &Slot, gfn: Gfn, _: Access) -> Result<Answer, Infallible> {
        // One frame is behind two pages, so that an entry of one looks as that of the other.
        let page = slot.hva_of(gfn).map_or(0, Hva::get) >> 12;
        let pfn = Pfn::new(if page == OTHER { PAGE } else { page } + 0x1000);
        let run = range(gfn.get(), gfn.get() + 1);
        Ok(Answer::Frame(Frame { pfn, run, access: Access::all(), memory: MemoryType::WriteBack }))
    }
}

impl TlbFlush for LoomHost {
    fn flush(&self, _: Context, _: GfnRange) {
        drop(self.0.processor.lock().unwrap());
    }
}

impl GuestMemory for LoomHost {
    fn with_page<R>(&self, slot: &Slot, gfn: Gfn, work: impl FnOnce(&Table) -> R) -> Option<R> {
        Some(work(&self.0.memory[usize::try_from(slot.hva_of(gfn)?.get() >> 12).ok()?]))
    }
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
        let zero = || Table(core::array::from_fn(|_| AtomicU64::new(0)));
        let host = LoomHost(Arc::new(Inner {
            user: UserHost::default(),
            memory: (0..FRAMES).map(|_| zero()).collect(),
            processor: loom::sync::Mutex::new(()),
            is_protected: AtomicUsize::new(0),
        }));
        for frame in 1..=PT {
            host.entry(frame).store((frame + 1) << 12 | ALL, Order::SeqCst);
        }
        let config = ShadowConfig { log: Some(log.clone()), ..ShadowConfig::default() };
        let shadow = Shadow::attach(&mut table, host.clone(), config).unwrap();
        let slot = SlotSpec {
            address_space: RAM,
            id: SlotId::new(0),
            gfns: range(0, FRAMES),
            backing: Backing::Host { hva: Hva::new(0) },
            flags,
        };
        table.create(slot).unwrap();
        Self { table, log, shadow, host }
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
        &self.0.memory[usize::try_from(frame).unwrap()].0[0]
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
        let processor = thread::spawn(move || {
            let loaded = vcpu.loaded.as_ref().unwrap();
            let shared = vcpu.shadow().shared.clone();
            let done = super::fast::fast_fault(&shared, &vcpu.cell, loaded, 0, GuestAccess::WRITE);
            if done.is_some() {
                assert!(log.is_marked(RAM, Gfn::new(PAGE)));
                let _running = host.0.processor.lock().unwrap();
                let entry = host.leaf(root).map_or(0, |entry| entry.load(Order::SeqCst));
                if entry & spte::WRITE != 0 {
                    assert_eq!(host.0.is_protected.load(Ordering::SeqCst), 0, "written behind our back");
                }
            }
            vcpu
        });
        guest.shadow.shared.with(|locked| {
            if locked.write_protect(Gfn::new(PAGE)) {
                locked.flush_now();
            }
        });
        guest.host.0.is_protected.store(1, Ordering::SeqCst);
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
