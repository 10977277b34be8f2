//! A host with guest memory that can be reached, and with processors that cache translations.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};

use memslot::{Gfn, GfnRange, Slot};
use memslot_mmu::format::Access;
use memslot_mmu::shadow::GuestMemory;
use memslot_mmu::user::UserHost;
use memslot_mmu::{Answer, Context, Frames, Pfn, Table, TableMemory, TlbFlush};

/// Where host memory starts: aligned to 1 GiB.
pub const HVA: u64 = 0x7f00_0000_0000;
/// The frame behind the first page of host memory, aligned to 1 GiB. No table has such an address.
pub const FIRST_PFN: u64 = 0x10_0000;

/// An entry that leads nowhere good.
pub const POISON: u64 = 0x6666_6667;

/// A translation that a processor has cached: of 4 KiB, wherever it comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cached {
    pub pfn: u64,
    pub rights: Hardware,
    /// The guest frames that it was of when it was cached.
    pub gfns: BTreeSet<u64>,
}

/// What the processor found in its tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hardware {
    pub write: bool,
    pub user: bool,
    pub execute: bool,
}

#[derive(Default)]
struct State {
    frames: BTreeMap<u64, Arc<Table>>,
    /// Pages of host memory that are not where their address says.
    moved: BTreeMap<u64, u64>,
    next: u64,
    read_only: BTreeSet<u64>,
    mmio: BTreeSet<u64>,
    /// About to change: nothing is answered.
    changing: BTreeSet<u64>,
    tlbs: Vec<BTreeMap<u64, Cached>>,
}

/// Somebody who looks at what happens to tables.
pub type Watch = Box<dyn Fn(bool) + Send + Sync>;

/// See the module's documentation. A handle.
#[derive(Clone, Default)]
pub struct TestHost {
    pub user: Arc<UserHost>,
    /// Called wherever a table is reached (true) or freed (false).
    pub watch: Arc<OnceLock<Watch>>,
    state: Arc<Mutex<State>>,
}

fn new_frame() -> Arc<Table> {
    Arc::new(Table([const { std::sync::atomic::AtomicU64::new(0) }; 512]))
}

impl State {
    fn pfn(&self, page: u64) -> u64 {
        self.moved.get(&page).copied().unwrap_or(page - (HVA >> 12) + FIRST_PFN)
    }

    fn frame(&mut self, pfn: u64) -> Arc<Table> {
        self.frames.entry(pfn).or_insert_with(new_frame).clone()
    }

    fn is_special(&self, page: u64) -> bool {
        let sets = [&self.read_only, &self.mmio, &self.changing];
        self.moved.contains_key(&page) || sets.iter().any(|set| set.contains(&page))
    }

    /// The nearest special page below and the nearest above.
    fn neighbours(&self, page: u64) -> (Option<u64>, Option<u64>) {
        let sets = [&self.read_only, &self.mmio, &self.changing];
        let below = sets.iter().filter_map(|set| set.range(..page).next_back().copied());
        let above = sets.iter().filter_map(|set| set.range(page..).next().copied());
        let moved = (self.moved.range(..page).next_back(), self.moved.range(page..).next());
        (below.chain(moved.0.map(|(page, _)| *page)).max(), above.chain(moved.1.map(|(page, _)| *page)).min())
    }
}

impl TestHost {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap())
    }

    /// The frame behind a page of host memory.
    pub fn pfn(&self, hva: u64) -> u64 {
        self.with(|state| state.pfn(hva >> 12))
    }

    /// The page of host memory that is in a frame.
    pub fn hva(&self, pfn: u64) -> Option<u64> {
        self.with(|state| {
            let moved = state.moved.iter().find(|(_, to)| **to == pfn).map(|(page, _)| *page);
            let home = (HVA >> 12) + pfn.checked_sub(FIRST_PFN)?;
            let is_home = pfn < FIRST_PFN * 2 && !state.moved.contains_key(&home);
            moved.or_else(|| is_home.then_some(home)).map(|page| page << 12)
        })
    }

    pub fn read(&self, pfn: u64, word: usize) -> u64 {
        self.with(|state| state.frame(pfn)).0[word].load(Ordering::SeqCst)
    }

    pub fn write(&self, pfn: u64, word: usize, value: u64) {
        self.with(|state| state.frame(pfn)).0[word].store(value, Ordering::SeqCst);
    }

    /// All frames that were ever touched.
    pub fn frames(&self) -> Vec<(u64, Arc<Table>)> {
        self.with(|state| state.frames.iter().map(|(pfn, frame)| (*pfn, frame.clone())).collect())
    }

    /// Moves a page of host memory to another frame, contents included. Whoever reads the old frame now is wrong.
    pub fn move_page(&self, hva: u64) {
        self.with(|state| {
            let old = state.pfn(hva >> 12);
            state.next += 1;
            let new = FIRST_PFN * 2 + state.next;
            let (from, to) = (state.frame(old), state.frame(new));
            for (from, to) in from.0.iter().zip(&to.0) {
                to.store(from.swap(POISON, Ordering::SeqCst), Ordering::SeqCst);
            }
            state.moved.insert(hva >> 12, new);
        });
    }

    pub fn set_read_only(&self, hva: u64, on: bool) {
        self.with(
            |state| {
                if on { state.read_only.insert(hva >> 12) } else { state.read_only.remove(&(hva >> 12)) }
            },
        );
    }

    /// The page is a device's from now on, or memory again.
    pub fn set_mmio(&self, hva: u64, on: bool) {
        self.with(|state| if on { state.mmio.insert(hva >> 12) } else { state.mmio.remove(&(hva >> 12)) });
    }

    pub fn is_mmio(&self, hva: u64) -> bool {
        self.with(|state| state.mmio.contains(&(hva >> 12)))
    }

    pub fn is_read_only(&self, hva: u64) -> bool {
        self.with(|state| state.read_only.contains(&(hva >> 12)))
    }

    /// Whether the page is about to change, and cannot be reached at all.
    pub fn set_changing(&self, hva: u64, on: bool) {
        self.with(
            |state| {
                if on { state.changing.insert(hva >> 12) } else { state.changing.remove(&(hva >> 12)) }
            },
        );
    }

    pub fn add_tlb(&self) -> usize {
        self.with(|state| {
            state.tlbs.push(BTreeMap::new());
            state.tlbs.len() - 1
        })
    }

    pub fn tlb(&self, number: usize) -> BTreeMap<u64, Cached> {
        self.with(|state| state.tlbs[number].clone())
    }

    pub fn cached(&self, number: usize, page: u64) -> Option<Cached> {
        self.with(|state| state.tlbs[number].get(&page).cloned())
    }

    pub fn cache(&self, number: usize, page: u64, translation: Cached) {
        self.with(|state| state.tlbs[number].insert(page, translation));
    }

    pub fn forget(&self, number: usize, page: u64) {
        self.with(|state| state.tlbs[number].remove(&page));
    }

    pub fn forget_all(&self, number: usize) {
        self.with(|state| state.tlbs[number].clear());
    }
}

// SAFETY: passed on.
#[allow(unsafe_code, reason = "the trait is unsafe to implement")]
unsafe impl TableMemory for TestHost {
    fn allocate(&self, tables: usize) -> Option<Pfn> {
        self.user.allocate(tables)
    }

    unsafe fn free(&self, first: Pfn, tables: usize) {
        if let Some(watch) = self.watch.get() {
            watch(false);
        }
        // SAFETY: passed on.
        unsafe { self.user.free(first, tables) }
    }

    fn reach(&self, table: Pfn) -> NonNull<Table> {
        if let Some(watch) = self.watch.get() {
            watch(true);
        }
        self.user.reach(table)
    }
}

impl Frames for TestHost {
    type Error = Infallible;

    fn frame(&self, slot: &Slot, gfn: Gfn, access: Access) -> Result<Answer, Infallible> {
        let answer = self.user.frame(slot, gfn, access)?;
        let Some(hva) = slot.hva_of(gfn) else { return Ok(answer) };
        let (page, Answer::Frame(mut frame)) = (hva.get() >> 12, answer) else { return Ok(answer) };
        Ok(self.with(|state| {
            if state.mmio.contains(&page) {
                return Answer::Mmio;
            }
            if state.changing.contains(&page) {
                return Answer::Retry;
            }
            frame.pfn = Pfn::new(state.pfn(page));
            frame.access.set(Access::WRITE, !state.read_only.contains(&page));
            let (start, end) = (frame.run.start().get(), frame.run.end().get());
            let at = |other: u64| (gfn.get() + other).saturating_sub(page);
            frame.run = if state.is_special(page) {
                GfnRange::with_len(gfn, 1).unwrap()
            } else {
                let (below, above) = state.neighbours(page);
                let start = below.map_or(start, |other| start.max(at(other) + 1));
                let end = above.map_or(end, |other| end.min(at(other)));
                GfnRange::new(Gfn::new(start), Gfn::new(end)).unwrap()
            };
            Answer::Frame(frame)
        }))
    }
}

impl TlbFlush for TestHost {
    fn flush(&self, _: Context, gfns: GfnRange) {
        self.with(|state| {
            for tlb in &mut state.tlbs {
                tlb.retain(|_, cached| !cached.gfns.iter().any(|gfn| gfns.contains(Gfn::new(*gfn))));
            }
        });
    }
}

impl GuestMemory for TestHost {
    fn with_page<R>(&self, slot: &Slot, gfn: Gfn, work: impl FnOnce(&Table) -> R) -> Option<R> {
        let page = slot.hva_of(gfn)?.get() >> 12;
        let frame = self.with(|state| {
            let is_there = !state.mmio.contains(&page) && !state.changing.contains(&page);
            is_there.then(|| {
                let pfn = state.pfn(page);
                state.frame(pfn)
            })
        });
        frame.map(|frame| work(&frame))
    }
}
