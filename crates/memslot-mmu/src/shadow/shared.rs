//! What all who use shadow tables share, and what the lock protects.
//!
//! [`Shared::with`] takes the lock for one piece of work. When the work is done, what it owes is paid before the lock is given
//! back: one flush, if there is anything to be flushed, and then the shadow pages that it has given up wait for those who may be
//! inside without the lock. So whoever has the lock finds no obligations but one: entries that a *sync* has changed are not flushed
//! at once (the guest flushes by itself what it wants to be gone), only noted as *pending*. Whoever must be sure that processors
//! do not use old translations flushes if anything pending is about the same frames, whether it has changed entries itself or not.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;
use core::ptr;

use memslot::{AddressSpaceId, Gfn, GfnRange, OutOfMemory, Slot, SlotFlags};

use super::ahead::Hints;
use super::by_slot::Renamed;
use super::directory::Directory;
use super::page::ShadowPage;
use super::slot_set::SlotSetCache;
use super::slots::{Changes, Slots};
use super::spte::SpteRef;
use super::stats::{Counter, Counters};
use super::turns::Turns;
use super::{ShadowConfig, ShadowHost};
use crate::counted::Counted;
use crate::host::Pfn;
use crate::invalidate::{Invalidations, range};
use crate::level::Table;
use crate::moving::Moving;
use crate::nested::epoch::{Cells, Epoch};
use crate::nested::shared::hull;
use crate::rmap::{Filed, Rmap, RmapError, Writer};
use crate::sync::{AtomicU64, AtomicUsize, Mutex, Ordering};

/// All frames: what is owed where an entry has changed that may translate anything.
pub(super) fn everything() -> GfnRange {
    range(0, 1 << 52)
}

/// How many counters there are for shadowed tables in large pages.
const BLOCKS: usize = if cfg!(any(loom, miri)) { 16 } else { 4096 };

pub(super) struct Shared<H: ShadowHost> {
    pub(super) host: H,
    pub(super) config: ShadowConfig,
    pub(super) rmap: Rmap<SpteRef>,
    pub(super) directory: Directory,
    pub(super) epoch: Epoch,
    pub(super) invalidations: Invalidations,
    /// Counts versions of the slots; changed with the lock held.
    pub(super) serial: AtomicU64,
    /// That of shadow pages that are not obsolete; changed with the lock held.
    pub(super) generation: AtomicU64,
    /// How many shadowed tables of the guest lie in a 2 MiB page, and in a 1 GiB page, by hash: where there are any, no large page is
    /// made. Pages that share a counter cost each other only that.
    pub(super) blocks: [Box<[AtomicUsize]>; 2],
    pub(super) counters: Counters,
    pub(super) moving: Moving,
    turns: Turns,
    state: Mutex<State>,
}

/// What the lock protects.
pub(super) struct State {
    pub(super) slots: Counted<Slots>,
    /// The slot that was looked up last, of [`slots`](Self::slots): mostly the next one, too.
    last_slot: Cell<Option<(AddressSpaceId, Slot)>>,
    pub(super) writer: Writer<SpteRef>,
    pub(super) changes: Changes,
    pub(super) cells: Cells,
    /// Shadow pages that can be found.
    pub(super) pages: usize,
    /// Tables that exist.
    pub(super) tables: usize,
    /// What processors may use although it is not so any more.
    pub(super) pending: Option<GfnRange>,
    /// How many [re-arms](super::ShadowRearm) are under way: they take W away without the lock, and say what of it is pending when they
    /// flush only.
    pub(super) rearming: usize,
    /// Frames that are losing their slot: nothing is mapped there.
    pub(super) closed: Vec<(AddressSpaceId, GfnRange)>,
    /// Whether frames have lost their slot since the last flush: what is pending may be about memory to which no slot leads any more.
    pub(super) has_left: bool,
    /// Pages that were given up and wait for the flush, linked by `older`.
    dying: *mut ShadowPage,
    /// Given up, and used by nobody but those inside: the first to go, and the last.
    limbo: (*mut ShadowPage, *mut ShadowPage),
    /// Pages that can be used again, linked by `older`, and how many.
    spare: (*mut ShadowPage, usize),
    /// Nodes of pages' sets of slots that came back.
    pub(super) nodes: SlotSetCache,
    /// Counts flushes of the guest's.
    pub(super) syncs: u64,
    /// Counts searches for what is unsync.
    pub(super) walks: u64,
    /// What comparisons have found that may be made [ahead](super::ahead).
    pub(super) hints: Hints,
    /// The next page of the [pass](super::pass) that is under way.
    pub(super) pass: *mut ShadowPage,
    /// Frames whose slot is getting another id.
    pub(super) renamed: Vec<Renamed>,
    /// The first mistake that the reverse map has noticed.
    pub(super) broken: Option<RmapError>,
}

// SAFETY: the pages belong to what is shared, and have nothing that is bound to a thread.
unsafe impl Send for State {}

/// So many pages are kept to be used again.
const SPARE: usize = 128;
/// So many are freed under one hold of the lock.
const FREED: usize = 64;

impl<H: ShadowHost> Shared<H> {
    /// With all counters at a value of the caller's choice, so that tests go through the wrap.
    pub(super) fn starting_at(
        host: H,
        config: ShadowConfig,
        snapshot: &memslot::Snapshot,
        counters: u64,
    ) -> Result<Self, OutOfMemory> {
        let (rmap, writer) = Rmap::starting_at(counters).map_err(|_| OutOfMemory)?;
        let slots = Counted::new(Slots::new(&rmap, snapshot, snapshot.clone(), None)?)?;
        let blocks = || {
            let mut blocks = Vec::new();
            blocks.try_reserve_exact(BLOCKS).map_err(|_| OutOfMemory)?;
            blocks.resize_with(BLOCKS, || AtomicUsize::new(0));
            Ok::<_, OutOfMemory>(blocks.into_boxed_slice())
        };
        let state = State {
            slots,
            last_slot: Cell::new(None),
            writer,
            changes: Changes::starting_at(counters),
            cells: Cells::new(),
            pages: 0,
            tables: 0,
            pending: None,
            rearming: 0,
            closed: Vec::new(),
            has_left: false,
            dying: ptr::null_mut(),
            limbo: (ptr::null_mut(), ptr::null_mut()),
            spare: (ptr::null_mut(), 0),
            nodes: SlotSetCache::default(),
            syncs: counters,
            walks: counters,
            hints: Hints::default(),
            pass: ptr::null_mut(),
            renamed: Vec::new(),
            broken: None,
        };
        Ok(Self {
            host,
            config,
            rmap,
            directory: Directory::new()?,
            epoch: Epoch::starting_at(counters),
            invalidations: Invalidations::starting_at(counters),
            serial: AtomicU64::new(counters),
            generation: AtomicU64::new(counters),
            blocks: [blocks()?, blocks()?],
            counters: Counters::default(),
            moving: Moving::new(),
            turns: Turns::default(),
            state: Mutex::new(state),
        })
    }

    /// Takes the lock for this work, and settles what it owes.
    pub(super) fn with<R>(&self, work: impl for<'g> FnOnce(&mut Locked<'g, H>) -> R) -> R {
        let (mut state, overtaken) = self.turns.lock(&self.state);
        // Not a borrow of the guard that could be mixed up with one of the pages: those last until `settle`.
        let mut locked = Locked { shared: self, state: &mut state, must_flush: false, work: Work::new(0) };
        let result = work(&mut locked);
        locked.settle();
        self.counters.note_hold(locked.work.get(), overtaken);
        result
    }

    /// The same for a step of something that takes long: those go first who are waiting for the lock.
    pub(super) fn with_in_turn<R>(&self, work: impl for<'g> FnOnce(&mut Locked<'g, H>) -> R) -> R {
        self.turns.let_others_go();
        self.with(work)
    }

    /// Whether writes to the slot's pages are to be noticed.
    pub(super) fn is_logged(&self, slot: &Slot) -> bool {
        self.config.log.is_some() && slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
    }

    /// Marks frames as dirty; while their memory [moves](Moving), where it goes as well.
    pub(super) fn mark(&self, space: AddressSpaceId, gfns: GfnRange) {
        if let Some(log) = &self.config.log {
            log.mark_range(space, gfns);
            self.moving.marked(space, gfns, |gfns| log.mark_range(space, gfns));
        }
    }

    /// The counter of shadowed tables for a large page of this size.
    pub(super) fn block(&self, size: usize, gfn: Gfn) -> &AtomicUsize {
        let shift = if size == 0 { 9 } else { 18 };
        let number = (gfn.get() >> shift).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        &self.blocks[size][number as usize % BLOCKS]
    }

    /// Keeps the record of an entry: with the shadow page that has it. For whoever has the lock.
    fn keep(&self, entry: SpteRef, filed: Filed) {
        // SAFETY: pages are freed with the lock held only, which the caller has.
        if let Some(page) = unsafe { self.directory.page(entry.table()) } {
            page.filed[entry.index()].store(filed.into_bits(), Ordering::Relaxed);
        }
    }

    /// Takes a page that can be used again.
    pub(super) fn take_spare(&self) -> Option<Box<ShadowPage>> {
        self.with(|locked| locked.take_spare())
    }

    /// A page that is nobody's is not needed any more.
    pub(super) fn free_page(&self, page: Box<ShadowPage>) {
        self.with(|locked| locked.give_back(page));
    }
}

/// The lock, held for `'g`: so long no page is freed.
pub(super) struct Locked<'g, H: ShadowHost> {
    pub(super) shared: &'g Shared<H>,
    pub(super) state: &'g mut State,
    /// Whether what is pending is to be flushed before the lock is given back.
    pub(super) must_flush: bool,
    /// How many entries were looked at.
    pub(super) work: Work,
}

/// A count of entries, and of what costs as much as looking at one.
pub(super) type Work = Cell<usize>;

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// So many entries were looked at.
    #[inline]
    pub(super) fn worked(&self, entries: usize) {
        self.work.set(self.work.get() + entries);
    }

    /// The page with this table.
    pub(super) fn page(&self, table: Pfn) -> Option<&'g ShadowPage> {
        // SAFETY: for 'g the lock is held, and no page is freed before `settle`.
        unsafe { self.shared.directory.page(table) }
    }

    /// The pages of the table in this frame, whatever their roles.
    pub(super) fn pages_of(&self, gfn: Gfn) -> impl Iterator<Item = &'g ShadowPage> + use<'g, H> {
        let mut at = self.shared.directory.first_of(gfn);
        core::iter::from_fn(move || {
            // SAFETY: null or a page that can be found, and so is not freed for 'g.
            while let Some(page) = unsafe { at.as_ref() } {
                at = page.links.by_gfn.load(Ordering::Relaxed);
                if page.key.gfn == gfn {
                    return Some(page);
                }
            }
            None
        })
    }

    /// The pages in one of the directory's chains: each is in one.
    pub(super) fn pages_in(&self, chain: usize) -> impl Iterator<Item = &'g ShadowPage> + use<'g, H> {
        let mut at = self.shared.directory.first_in(chain);
        core::iter::from_fn(move || {
            // SAFETY: null or a page that can be found, and so is not freed for 'g.
            let page = unsafe { at.as_ref() }?;
            at = page.links.by_gfn.load(Ordering::Relaxed);
            Some(page)
        })
    }

    /// All pages, the oldest first. One that is given up meanwhile must be the one that was returned last.
    pub(super) fn pages(&self) -> impl Iterator<Item = &'g ShadowPage> + use<'g, H> {
        let mut at = self.shared.directory.oldest();
        core::iter::from_fn(move || {
            // SAFETY: null or a page that can be found, and so is not freed for 'g.
            let page = unsafe { at.as_ref() }?;
            at = page.links.newer.load(Ordering::Relaxed);
            Some(page)
        })
    }

    /// The table of a page.
    #[inline]
    pub(super) fn table(&self, page: &'g ShadowPage) -> &'g Table {
        // SAFETY: it is freed with the page.
        unsafe { self.shared.host.reach(page.table).as_ref() }
    }

    /// The slot that has this frame.
    #[inline]
    pub(super) fn slot_at(&self, space: AddressSpaceId, gfn: Gfn) -> Option<Slot> {
        if let Some((its_space, slot)) = self.state.last_slot.get() {
            if its_space == space && slot.gfns().contains(gfn) {
                debug_assert_eq!(self.state.slots.slot_at(space, gfn), Some(&slot));
                return Some(slot);
            }
        }
        let slot = self.state.slots.slot_at(space, gfn).copied()?;
        self.state.last_slot.set(Some((space, slot)));
        Some(slot)
    }

    /// From now on the slots are these. Returns what they were.
    pub(super) fn replace_slots(&mut self, slots: Counted<Slots>) -> Counted<Slots> {
        self.state.last_slot.set(None);
        core::mem::replace(&mut self.state.slots, slots)
    }

    /// Files an entry in one of the reverse map's lists.
    pub(super) fn file(
        &mut self,
        list: crate::rmap::List<'_, SpteRef>,
        entry: SpteRef,
        cache: &mut crate::rmap::Cache,
    ) -> Result<usize, RmapError> {
        let shared = self.shared;
        let keep = |entry, filed| shared.keep(entry, filed);
        self.state.writer.add(list, entry, cache, keep)
    }

    /// Removes an entry from where its record says that it is, and says what that was for.
    pub(super) fn unfile(&mut self, page: &'g ShadowPage, index: usize) -> Option<crate::rmap::Under> {
        let shared = self.shared;
        let filed = Filed::from_bits(page.filed[index].swap(0, Ordering::Relaxed))?;
        let under = self.state.writer.filed_under(&filed);
        let keep = |entry, filed| shared.keep(entry, filed);
        if let Err(error) = self.state.writer.remove(filed, page.reference(index), keep) {
            debug_assert!(false, "{error}");
            self.state.broken.get_or_insert(error);
        }
        under
    }

    /// Processors may have translations of these frames, or know tables on the way there, that are not so any more.
    pub(super) fn owe(&mut self, gfns: GfnRange) {
        self.state.pending = Some(hull(self.state.pending, gfns));
    }

    /// What is pending about these frames must be gone when the lock is given back; and what may be, where a re-arm is under way, or has
    /// failed before it asked for its flush.
    pub(super) fn flush_later(&mut self, gfns: GfnRange) {
        if self.state.rearming > 0 {
            self.owe(gfns);
        }
        self.must_flush |= self.state.pending.is_some_and(|pending| pending.overlaps(&gfns));
    }

    /// What is pending must be gone now.
    pub(super) fn flush_now(&mut self) {
        self.must_flush = false;
        if let Some(gfns) = self.state.pending.take() {
            self.shared.host.flush(self.shared.config.context, gfns);
            self.shared.counters.add(Counter::Flushes, 1);
        }
    }

    /// A page was given up, and nothing leads to it any more: it is freed after a flush.
    pub(super) fn bury(&mut self, page: &'g ShadowPage) {
        self.shared.directory.forget_table(page);
        page.links.older.store(self.state.dying, Ordering::Relaxed);
        self.state.dying = ptr::from_ref(page).cast_mut();
        self.must_flush = true;
        self.owe(everything());
    }

    /// Pays what is owed. No reference to a page is used after this.
    fn settle(&mut self) {
        if self.must_flush {
            self.flush_now();
        }
        if !self.state.dying.is_null() && self.state.pending.is_none() {
            self.let_wait();
        }
        if !self.state.limbo.0.is_null() {
            self.reclaim(FREED);
        }
    }

    /// Lets pages that were given up wait for those inside.
    fn let_wait(&mut self) {
        let stamp = self.shared.epoch.stamp();
        let mut next = core::mem::replace(&mut self.state.dying, ptr::null_mut());
        // SAFETY: null or a page that was buried and is not freed.
        while let Some(page) = unsafe { next.as_ref() } {
            let this = next;
            next = page.links.older.load(Ordering::Relaxed);
            page.links.stamp.store(stamp, Ordering::Relaxed);
            page.links.newer.store(ptr::null_mut(), Ordering::Relaxed);
            // SAFETY: as above.
            match unsafe { self.state.limbo.1.as_ref() } {
                Some(last) => last.links.newer.store(this, Ordering::Relaxed),
                None => self.state.limbo.0 = this,
            }
            self.state.limbo.1 = this;
        }
    }

    /// Frees up to so many pages that nobody is inside of any more.
    fn reclaim(&mut self, most: usize) {
        for _ in 0..most {
            // SAFETY: null or a page that waits.
            let Some(page) = (unsafe { self.state.limbo.0.as_ref() }) else { return };
            self.worked(1);
            if !self.state.cells.have_passed(page.links.stamp.load(Ordering::Relaxed), None) {
                return;
            }
            let first = self.state.limbo.0;
            self.state.limbo.0 = page.links.newer.load(Ordering::Relaxed);
            if self.state.limbo.0.is_null() {
                self.state.limbo.1 = ptr::null_mut();
            }
            // SAFETY: made from a box; nothing leads to it, processors were flushed, and nobody is inside.
            self.give_back(unsafe { Box::from_raw(first) });
        }
    }

    /// Keeps a page that is nobody's, to be used again, or frees it.
    fn give_back(&mut self, page: Box<ShadowPage>) {
        if self.state.spare.1 < SPARE {
            page.links.older.store(self.state.spare.0, Ordering::Relaxed);
            self.state.spare = (Box::into_raw(page), self.state.spare.1 + 1);
            return;
        }
        self.free(page);
    }

    fn free(&mut self, page: Box<ShadowPage>) {
        let table = page.table;
        drop(page);
        self.state.tables -= 1;
        // SAFETY: allocated with the page; nobody uses it.
        unsafe { self.shared.host.free(table, 1) };
    }

    fn take_spare(&mut self) -> Option<Box<ShadowPage>> {
        let (first, count) = self.state.spare;
        if first.is_null() {
            return None;
        }
        // SAFETY: made from a box, and in this list only.
        let page = unsafe { Box::from_raw(first) };
        self.state.spare = (page.links.older.load(Ordering::Relaxed), count - 1);
        Some(page)
    }

    /// Frees some of what can be freed. Returns whether there may be more.
    pub(super) fn free_spare(&mut self) -> bool {
        let tables = self.state.tables;
        self.reclaim(FREED);
        for _ in 0..FREED {
            let Some(page) = self.take_spare() else { break };
            self.worked(1);
            self.free(page);
        }
        self.state.tables < tables
    }
}

impl<H: ShadowHost> Drop for Shared<H> {
    fn drop(&mut self) {
        self.with(|locked| {
            locked.zap_everything();
            locked.settle();
            while locked.free_spare() {}
            debug_assert_eq!(locked.state.tables, 0, "tables are leaked");
        });
    }
}
