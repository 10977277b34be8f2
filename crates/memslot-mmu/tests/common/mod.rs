//! What several test programs share: a host with processors that cache translations, and a walker of its own.
#![allow(clippy::needless_pass_by_value, reason = "tests make values for one call")]
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test program uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use memslot::dirty::{Consumer, DirtyLog};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, HvaRange, Limits, Slot, SlotFlags, SlotId, SlotSpec,
    SlotTable,
};
use memslot_mmu::format::{Access, Format};
use memslot_mmu::user::UserHost;
use memslot_mmu::{
    Answer, Config, Context, DirtyMode, Fault, Frame, Frames, Mmu, Pfn, Table, TableMemory, TlbFlush, Walker,
};

pub const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
/// Where host memory starts in tests: aligned to 1 GiB.
pub const HVA: u64 = 0x7f00_0000_0000;

pub const NONE: SlotFlags = SlotFlags::empty();
pub const LOG: SlotFlags = SlotFlags::LOG_DIRTY_PAGES;

type Hook = Box<dyn FnOnce() + Send>;

/// A leaf, as the independent walker reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    pub pages: u64,
    pub pfn: u64,
    pub write: bool,
    pub dirty: bool,
    pub accessed: bool,
}

#[derive(Default)]
struct State {
    /// Host pages that are not where their address says.
    moved: BTreeMap<u64, u64>,
    read_only: BTreeSet<u64>,
    no_execute: BTreeSet<u64>,
    mmio: BTreeSet<u64>,
    retry: BTreeSet<u64>,
    /// Run once when the host is asked for a frame.
    hook: Option<Hook>,
    /// The translations that some processor has cached: first frame → leaf.
    tlb: BTreeMap<u64, Leaf>,
    flushes: Vec<(Context, GfnRange)>,
}

/// A host in user space whose frames can be changed, and whose one processor caches translations.
#[derive(Clone, Default)]
pub struct TestHost {
    pub user: Arc<UserHost>,
    state: Arc<Mutex<State>>,
}

impl TestHost {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap())
    }

    /// The frame behind a page of host memory is another one now.
    pub fn move_page(&self, hva: u64, pfn: u64) {
        self.with(|state| state.moved.insert(hva >> 12, pfn));
    }

    pub fn set_read_only(&self, hva: u64, on: bool) {
        self.with(
            |state| if on { state.read_only.insert(hva >> 12) } else { state.read_only.remove(&(hva >> 12)) },
        );
    }

    pub fn set_no_execute(&self, hva: u64, on: bool) {
        self.with(|state| {
            if on { state.no_execute.insert(hva >> 12) } else { state.no_execute.remove(&(hva >> 12)) }
        });
    }

    pub fn set_mmio(&self, hva: u64) {
        self.with(|state| state.mmio.insert(hva >> 12));
    }

    /// Whether the host asks for patience with a page.
    pub fn set_retry(&self, hva: u64, on: bool) {
        self.with(|state| if on { state.retry.insert(hva >> 12) } else { state.retry.remove(&(hva >> 12)) });
    }

    /// Runs `hook` in the middle of the next fault that asks for a frame.
    pub fn in_the_next_fault(&self, hook: impl FnOnce() + Send + 'static) {
        self.with(|state| state.hook = Some(Box::new(hook)));
    }

    /// Every flush since the last call.
    pub fn take_flushes(&self) -> Vec<GfnRange> {
        self.with(|state| state.flushes.drain(..).map(|(_, gfns)| gfns).collect())
    }

    /// Notes that many flushes without asking for memory.
    pub fn reserve_flushes(&self, flushes: usize) {
        self.with(|state| state.flushes.reserve(flushes));
    }

    /// The processor uses `gfn`: it caches what the tables say.
    pub fn touch<F: Format>(&self, mmu: &Mmu<F, Self>, gfn: u64) {
        let leaves = read_tables(mmu);
        if let Some((&start, leaf)) =
            leaves.range(..=gfn).next_back().filter(|(start, leaf)| gfn - **start < leaf.pages)
        {
            self.with(|state| state.tlb.insert(start, *leaf));
        }
    }

    /// The processor uses everything.
    pub fn touch_all<F: Format>(&self, mmu: &Mmu<F, Self>) {
        let leaves = read_tables(mmu);
        self.with(|state| state.tlb.extend(leaves));
    }

    /// Cached translations of `gfns` that the tables do not allow any more.
    pub fn stale<F: Format>(&self, mmu: &Mmu<F, Self>, gfns: GfnRange) -> Vec<(u64, Leaf)> {
        let leaves = read_tables(mmu);
        let is_stale = |(start, cached): &(u64, Leaf)| {
            (*start..start + cached.pages)
                .any(|gfn| gfns.contains(Gfn::new(gfn)) && !holds(&leaves, gfn, *start, cached))
        };
        self.cached().into_iter().filter(is_stale).collect()
    }

    /// The frames of such translations that the tables do not allow any more.
    pub fn stale_frames<F: Format>(&self, mmu: &Mmu<F, Self>) -> BTreeSet<u64> {
        let leaves = &read_tables(mmu);
        let frames = |(start, cached): (u64, Leaf)| {
            (start..start + cached.pages).filter(move |&gfn| !holds(leaves, gfn, start, &cached))
        };
        self.cached().into_iter().flat_map(frames).collect()
    }

    fn cached(&self) -> Vec<(u64, Leaf)> {
        self.with(|state| state.tlb.iter().map(|(start, leaf)| (*start, *leaf)).collect())
    }
}

/// Whether the tables allow what a processor has cached for this frame.
fn holds(leaves: &BTreeMap<u64, Leaf>, gfn: u64, start: u64, cached: &Leaf) -> bool {
    let found = leaves.range(..=gfn).next_back().filter(|(start, leaf)| gfn - **start < leaf.pages);
    found.is_some_and(|(&from, leaf)| {
        leaf.pfn + (gfn - from) == cached.pfn + (gfn - start) && (leaf.write || !cached.write)
    })
}

// SAFETY: passed on.
unsafe impl TableMemory for TestHost {
    fn allocate(&self, tables: usize) -> Option<Pfn> {
        self.user.allocate(tables)
    }

    unsafe fn free(&self, first: Pfn, tables: usize) {
        // SAFETY: passed on.
        unsafe { self.user.free(first, tables) }
    }

    fn reach(&self, table: Pfn) -> NonNull<Table> {
        self.user.reach(table)
    }
}

impl Frames for TestHost {
    type Error = Infallible;

    fn frame(&self, slot: &Slot, gfn: Gfn, access: Access) -> Result<Answer, Infallible> {
        let answer = self.user.frame(slot, gfn, access)?;
        let hook = self.with(|state| state.hook.take());
        let Some(hva) = slot.hva_of(gfn) else { return Ok(answer) };
        let (page, Answer::Frame(mut frame)) = (hva.get() >> 12, answer) else { return Ok(answer) };
        let (mmio, retry) = self.with(|state| {
            if let Some(&pfn) = state.moved.get(&page) {
                frame = Frame { pfn: Pfn::new(pfn), run: range(gfn.get(), 1), ..frame };
            } else if let Some((first, last)) = state.moved.keys().next().zip(state.moved.keys().next_back())
            {
                // Neighbours of pages that have moved are not contiguous with them.
                let (start, end) = (frame.run.start().get(), frame.run.end().get());
                let at = |other: u64| (gfn.get() + other).saturating_sub(page);
                let below = state.moved.range(..page).next_back().filter(|_| *first < page);
                let above = state.moved.range(page..).next().filter(|_| *last > page);
                let start = below.map_or(start, |(&other, _)| start.max(at(other) + 1));
                let end = above.map_or(end, |(&other, _)| end.min(at(other)));
                frame.run = GfnRange::new(Gfn::new(start), Gfn::new(end)).unwrap();
            }
            frame.access.set(Access::WRITE, !state.read_only.contains(&page));
            frame.access.set(Access::EXECUTE, !state.no_execute.contains(&page));
            if !(state.read_only.is_empty() && state.no_execute.is_empty()) {
                frame.run = range(gfn.get(), 1);
            }
            (state.mmio.contains(&page), state.retry.contains(&page))
        });
        if let Some(hook) = hook {
            hook();
        }
        Ok(match (mmio, retry) {
            (true, _) => Answer::Mmio,
            (_, true) => Answer::Retry,
            _ => Answer::Frame(frame),
        })
    }
}

impl TlbFlush for TestHost {
    fn flush(&self, context: Context, gfns: GfnRange) {
        self.with(|state| {
            state.flushes.push((context, gfns));
            state.tlb.retain(|&start, leaf| !gfns.overlaps(&range(start, leaf.pages)));
        });
    }
}

/// Everything that a test needs.
pub struct Guest<F: Format> {
    pub table: SlotTable,
    pub log: DirtyLog,
    pub consumer: Consumer,
    pub mmu: Mmu<F, TestHost>,
    pub host: TestHost,
    pub vcpu: Walker<F, TestHost>,
}

impl<F: Format> Guest<F> {
    pub fn new(dirty: DirtyMode) -> Self {
        Self::with(Config { dirty, ..Config::default() })
    }

    pub fn with(config: Config) -> Self {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let consumer = log.consumer().unwrap();
        let host = TestHost::default();
        let mmu = Mmu::attach(&mut table, host.clone(), Config { log: Some(log.clone()), ..config }).unwrap();
        let vcpu = mmu.walker().unwrap();
        Self { table, log, consumer, mmu, host, vcpu }
    }

    pub fn create(&mut self, id: u32, base: u64, pages: u64, hva: u64, flags: SlotFlags) {
        self.table.create(spec(id, base, pages, hva, flags)).unwrap();
    }

    /// Has the walker fill its cache, so that the next fault does not start again for want of tables.
    pub fn warm_up(&mut self) {
        let (id, gfn) = (SlotId::new(999), 1 << 30);
        self.create(999, gfn, 1, HVA, SlotFlags::empty());
        let mut walker = self.mmu.walker().unwrap();
        let _ = walker.fault(Gpa::new(gfn << 12), Access::READ).unwrap();
        self.table.delete(RAM, id).unwrap();
        self.vcpu = walker;
        self.host.take_flushes();
    }

    pub fn fault(&mut self, gfn: u64, access: Access) -> Fault {
        self.vcpu.fault(Gpa::new(gfn << 12), access).unwrap()
    }

    pub fn write(&mut self, gfn: u64) -> Fault {
        self.fault(gfn, Access::WRITE)
    }

    pub fn read(&mut self, gfn: u64) -> Fault {
        self.fault(gfn, Access::READ)
    }

    pub fn leaves(&self) -> BTreeMap<u64, Leaf> {
        read_tables(&self.mmu)
    }

    pub fn leaf_at(&self, gfn: u64) -> Option<(u64, Leaf)> {
        let leaves = self.leaves();
        let found = leaves.range(..=gfn).next_back().filter(|(start, leaf)| gfn - **start < leaf.pages);
        found.map(|(&start, &leaf)| (start, leaf))
    }

    pub fn harvest(&mut self) -> Vec<u64> {
        let mut rearm = self.mmu.dirty_rearm().unwrap();
        let harvest = rearm.harvest(&self.consumer).unwrap();
        let runs = harvest.runs().flat_map(|run| run.gfns.start().get()..run.gfns.end().get());
        let gfns = runs.collect();
        harvest.commit();
        gfns
    }

    /// The processor writes through the tables: it sets accessed and dirty bits. Whether it may.
    pub fn processor_writes(&mut self, gfn: u64) -> bool {
        processor(&self.mmu, gfn, true)
    }

    /// The same for a read or a write.
    pub fn processor_writes_if(&mut self, gfn: u64, is_write: bool) -> bool {
        processor(&self.mmu, gfn, is_write)
    }
}

/// A guest whose slot table can be changed in the middle of a fault.
pub fn shared_table<F: Format>(mut guest: Guest<F>) -> (Guest<F>, Arc<Mutex<SlotTable>>) {
    guest.warm_up();
    let empty = SlotTable::new(Limits::default()).unwrap();
    let table = Arc::new(Mutex::new(std::mem::replace(&mut guest.table, empty)));
    (guest, table)
}

pub fn spec(id: u32, base: u64, pages: u64, hva: u64, flags: SlotFlags) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: range(base, pages),
        backing: Backing::Host { hva: Hva::new(hva) },
        flags,
    }
}

pub fn range(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first), pages).unwrap()
}

pub fn hvas(start: u64, bytes: u64) -> HvaRange {
    HvaRange::with_len(Hva::new(start), bytes).unwrap()
}

/// The bits of an entry, read here once more from the manuals: present, write, accessed, dirty.
fn bits<F: Format>() -> (u64, u64, u64, u64) {
    match F::NAME {
        "NPT" => (1, 2, 1 << 5, 1 << 6),
        // Without accessed and dirty bits in EPTP the processor leaves both alone.
        "EPT" if F::ACCESSED == 0 => (7, 2, 0, 0),
        "EPT" => (7, 2, 1 << 8, 1 << 9),
        other => panic!("{other}"),
    }
}

const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// All leaves, read by a walker that shares nothing with the crate's but the way to a table. Tables that
/// nothing is mapped in are counted on the way.
pub fn read_tables<F: Format>(mmu: &Mmu<F, TestHost>) -> BTreeMap<u64, Leaf> {
    let mut leaves = BTreeMap::new();
    read_table::<F>(mmu, mmu.root().get(), u32::from(F::LEVELS), 0, &mut leaves);
    leaves
}

fn read_table<F: Format>(
    mmu: &Mmu<F, TestHost>,
    table: u64,
    level: u32,
    base: u64,
    leaves: &mut BTreeMap<u64, Leaf>,
) {
    let (present, write, accessed, dirty) = bits::<F>();
    let pages = 1u64 << (9 * (level - 1));
    // SAFETY: the test changes no tables meanwhile.
    let table = unsafe { mmu.host().reach(Pfn::new(table)).as_ref() };
    for (index, entry) in table.0.iter().enumerate() {
        let entry = entry.load(Ordering::SeqCst);
        let start = base + index as u64 * pages;
        if entry & present == 0 {
            continue;
        }
        if F::NAME == "EPT" {
            assert_ne!(entry & 3, 2, "writable and not readable is a misconfiguration");
        } else {
            assert_ne!(entry & 4, 0, "every nested entry is a user's");
        }
        if level > 1 && entry & LARGE == 0 {
            read_table::<F>(mmu, (entry & ADDRESS) >> 12, level - 1, start, leaves);
            continue;
        }
        assert!(level <= 3, "no page is larger than 1 GiB");
        let pfn = (entry & ADDRESS) >> 12;
        assert_eq!(pfn % pages, 0, "a page is aligned to its size: bits of the offset are reserved");
        let leaf = Leaf {
            pages,
            pfn,
            write: entry & write != 0,
            dirty: entry & dirty != 0,
            accessed: entry & accessed != 0,
        };
        assert!(leaves.insert(start, leaf).is_none());
    }
}

/// What a processor does to use a page: walks, and sets accessed and dirty bits by itself.
pub fn processor<F: Format>(mmu: &Mmu<F, TestHost>, gfn: u64, is_write: bool) -> bool {
    let (present, write, accessed, dirty) = bits::<F>();
    let mut table = mmu.root().get();
    let mut level = u32::from(F::LEVELS);
    loop {
        // SAFETY: as in `read_table`.
        let entries = unsafe { mmu.host().reach(Pfn::new(table)).as_ref() };
        let entry = &entries.0[usize::try_from(gfn >> (9 * (level - 1)) & 511).unwrap()];
        let seen = entry.load(Ordering::SeqCst);
        if seen & present == 0 || (is_write && seen & write == 0) {
            return false;
        }
        if level == 1 || seen & LARGE != 0 {
            let used = seen | accessed | if is_write { dirty } else { 0 };
            if entry.compare_exchange(seen, used, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                return true;
            }
        } else {
            table = (seen & ADDRESS) >> 12;
            level -= 1;
        }
    }
}

/// Runs a generic test for every format and way to log.
#[macro_export]
macro_rules! for_every_format {
    ($($(#[$attribute:meta])* $name:ident)*) => {
        $(mod $name {
            use memslot_mmu::DirtyMode::{Hardware, WriteProtect};
            use memslot_mmu::format::{Ept, Npt};
            $(#[$attribute])*
            #[test]
            fn npt_by_write_protection() { super::$name::<Npt>(WriteProtect); }
            $(#[$attribute])*
            #[test]
            fn npt_by_dirty_bits() { super::$name::<Npt>(Hardware); }
            $(#[$attribute])*
            #[test]
            fn ept_by_write_protection() { super::$name::<Ept<5, false>>(WriteProtect); }
            $(#[$attribute])*
            #[test]
            fn ept_by_dirty_bits() { super::$name::<Ept>(Hardware); }
        })*
    };
}
