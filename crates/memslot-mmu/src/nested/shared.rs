//! What walkers and operations share, and the two ways to hold tables: a [`Pin`] in an epoch, and the lock.

use alloc::boxed::Box;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use memslot::dirty::HeavyFence;
use memslot::{AddressSpaceId, GfnRange, OutOfMemory, Slot, SlotFlags, Snapshot, View};

use super::epoch::{Cell, Cells, Epoch};
use super::graves::{Chain, Grave, Graves};
use super::{AttachError, Config, DirtyMode, Stats, TableError};
use crate::counted::{Counted, try_box};
use crate::format::Format;
use crate::host::{Host, Pfn};
use crate::invalidate::{Invalidations, ends, range};
use crate::level::{Level, Table};
use crate::moving::Moving;
use crate::sync::{AtomicPtr, AtomicU64, Mutex, Ordering, fence_for_loom};

/// A version of the slots, as faults look at it.
pub(crate) struct Published {
    pub(crate) view: Snapshot,
    /// Never the same twice.
    pub(crate) serial: u64,
    stamp: u64,
    next: Option<Box<Self>>,
}

impl Published {
    pub(crate) fn new(view: Snapshot) -> Self {
        Self { view, serial: 0, stamp: 0, next: None }
    }
}

pub(crate) struct Shared<F: Format, H: Host> {
    pub(crate) host: H,
    pub(crate) config: Config,
    pub(crate) root: Pfn,
    /// What lets walkers announce themselves with a plain store.
    heavy: Option<Box<dyn HeavyFence>>,
    /// Replaced with the lock held, read under a pin or the lock.
    published: AtomicPtr<Published>,
    epoch: Epoch,
    pub(crate) invalidations: Invalidations,
    pub(crate) moving: Moving,
    /// The last nonce that was given away.
    pub(super) nonce: AtomicU64,
    flushes: AtomicU64,
    flushed_frames: AtomicU64,
    pub(crate) forgotten: AtomicU64,
    state: Mutex<State>,
    format: PhantomData<F>,
}

/// What the lock protects. Besides, whoever has it may look at all linked tables: they are freed under it only.
pub(crate) struct State {
    cells: Cells,
    pub(crate) graves: Graves,
    /// Tables that exist.
    tables: usize,
    serial: u64,
    pub(crate) pending: Pending,
    /// The version before, until what it had is zapped and flushed where the current one has it no more.
    pub(crate) leaving: Option<Snapshot>,
    /// Flushed, and stamped in order; waits for walkers.
    limbo: Chain,
    /// Versions that were replaced, newest first.
    replaced: Option<Box<Published>>,
}

/// What is owed: flushes that nobody has done yet.
#[derive(Default)]
pub(crate) struct Pending {
    /// How many obligations exist, forgotten ones included.
    pub(crate) count: usize,
    /// What they are about together, since there was none.
    pub(crate) hull: Option<GfnRange>,
    /// Of obligations that were dropped: their number, and their tables.
    pub(crate) forgotten: usize,
    pub(crate) forgotten_chain: Option<Chain>,
}

impl<F: Format, H: Host> Shared<F, H> {
    /// With all counters at this value.
    pub(crate) fn starting_at(
        host: H,
        config: Config,
        view: Snapshot,
        heavy: Option<Box<dyn HeavyFence>>,
        counters: u64,
    ) -> Result<Self, AttachError> {
        let limit = config.tables;
        if limit < F::ROOT_TABLES {
            return Err(TableError::Limit { limit }.into());
        }
        let published =
            try_box(Published { serial: counters, ..Published::new(view) }).map_err(TableError::from)?;
        let root = host.allocate(F::ROOT_TABLES).ok_or(TableError::OutOfMemory)?;
        let state = State {
            cells: Cells::new(),
            graves: Graves::new(),
            tables: F::ROOT_TABLES,
            serial: counters,
            pending: Pending::default(),
            leaving: None,
            limbo: Chain::EMPTY,
            replaced: None,
        };
        Ok(Self {
            host,
            config,
            root,
            heavy,
            published: AtomicPtr::new(Box::into_raw(published)),
            epoch: Epoch::starting_at(counters),
            invalidations: Invalidations::starting_at(counters),
            moving: Moving::new(),
            nonce: AtomicU64::new(counters),
            flushes: AtomicU64::new(0),
            flushed_frames: AtomicU64::new(0),
            forgotten: AtomicU64::new(0),
            state: Mutex::new(state),
            format: PhantomData,
        })
    }

    pub(crate) fn lock(&self) -> Locked<'_, F, H, impl DerefMut<Target = State>> {
        Locked { shared: self, state: self.state.lock() }
    }

    /// A number for entries that are emptied, never given twice.
    ///
    /// An entry has room for fewer bits than a number has, so after some 2^50 operations entries are the same again as
    /// those that were emptied then: whoever empties one looks that it changes. No entry becomes 0, which most are for
    /// all that time.
    pub(crate) fn nonce(&self) -> u64 {
        loop {
            let nonce = self.nonce.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
            if F::empty(nonce) != 0 {
                return nonce;
            }
        }
    }

    /// The first frame that the tables cannot map.
    pub(crate) const END: u64 = Level::end_of(F::LEVELS, F::ROOT_TABLES);

    pub(crate) fn space(&self) -> AddressSpaceId {
        self.config.address_space
    }

    /// Whether writes to the slot's pages are to be noticed.
    #[inline]
    pub(crate) fn is_logged(&self, slot: &Slot) -> bool {
        self.config.log.is_some() && slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
    }

    pub(crate) fn uses_dirty_bits(&self) -> bool {
        self.config.dirty == DirtyMode::Hardware
    }

    /// Marks frames as dirty; while their memory [moves](Moving), where it goes as well.
    pub(crate) fn mark(&self, gfns: GfnRange) {
        if let Some(log) = &self.config.log {
            log.mark_range(self.space(), gfns);
            self.moving.marked(self.space(), gfns, |gfns| log.mark_range(self.space(), gfns));
        }
    }

    /// Marks frames as dirty that a logged slot has lost: where their memory is now, if it is somewhere.
    pub(crate) fn mark_left(&self, gfns: GfnRange) {
        if let Some(log) = &self.config.log {
            let mark = |gfns| log.mark_range(self.space(), gfns);
            if !self.moving.marked(self.space(), gfns, mark) {
                mark(gfns);
            }
        }
    }

    /// Marks those frames as dirty whose slots are logged in this version.
    pub(crate) fn mark_logged(&self, view: &View, gfns: GfnRange) {
        for piece in view.slots_in(self.space(), gfns).filter(|piece| self.is_logged(piece.slot)) {
            self.mark(piece.gfns);
        }
    }

    /// The current version of the slots, to be kept.
    pub(crate) fn current_view(&self) -> Snapshot {
        self.lock().view().view.clone()
    }

    /// The same, with the version before, if what it had may be in use still.
    pub(crate) fn current_and_leaving(&self) -> (Snapshot, Option<Snapshot>) {
        let locked = self.lock();
        (locked.view().view.clone(), locked.leaving.clone())
    }

    /// Tables for a cache, as many as there are places, at least one. Returns how many.
    ///
    /// Every call frees twice as many that wait, so that no more of them wait than are in use.
    pub(crate) fn allocate_tables(&self, places: &mut [Pfn]) -> Result<usize, TableError> {
        let limit = self.config.tables;
        for budget in [2 * places.len(), usize::MAX] {
            let mut locked = self.lock();
            locked.reclaim(budget);
            let mut count = places.len().min(limit.saturating_sub(locked.tables));
            if count == 0 {
                continue;
            }
            let tables = locked.tables;
            if locked.graves.reserve(tables + count).is_err() {
                count = 1;
                locked.graves.reserve(tables + count)?;
            }
            locked.tables += count;
            drop(locked);
            let mut allocated = 0;
            for place in &mut places[..count] {
                let Some(table) = self.host.allocate(1) else { break };
                *place = table;
                allocated += 1;
            }
            if allocated < count {
                self.lock().tables -= count - allocated;
            }
            if allocated > 0 {
                return Ok(allocated);
            }
        }
        if self.lock().tables >= limit {
            Err(TableError::Limit { limit })
        } else {
            Err(TableError::OutOfMemory)
        }
    }

    /// # Safety
    /// From [`allocate_tables`](Self::allocate_tables), and never linked, or taken out, flushed and left by every
    /// walker.
    pub(crate) unsafe fn free_table(&self, table: Pfn) {
        self.lock().tables -= 1;
        // SAFETY: passed on.
        unsafe { self.host.free(table, 1) };
    }

    pub(crate) fn add_cell(&self) -> Result<Counted<Cell>, OutOfMemory> {
        self.lock().cells.add()
    }

    pub(crate) fn remove_cell(&self, cell: &Counted<Cell>) {
        self.lock().cells.remove(cell);
    }

    /// Announces the walker of `cell`. It is not inside yet.
    #[inline]
    pub(crate) fn pin<'a>(&'a self, cell: &'a Cell) -> Pin<'a, F, H> {
        self.epoch.enter(cell, self.heavy.is_some());
        Pin { shared: self, cell: Some(cell) }
    }

    pub(crate) fn flush(&self, gfns: GfnRange) {
        self.host.flush(self.config.context, gfns);
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.flushed_frames.fetch_add(gfns.len(), Ordering::Relaxed);
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats {
            tables: self.lock().tables,
            flushes: self.flushes.load(Ordering::Relaxed),
            flushed_frames: self.flushed_frames.load(Ordering::Relaxed),
            forgotten_flushes: self.forgotten.load(Ordering::Relaxed),
        }
    }

    /// Whether the version that a fault has looked at is still the current one.
    #[inline]
    pub(crate) fn is_current(&self, published: &Published) -> bool {
        // Pairs with the fence in `publish`: whoever publishes sees the entry that was written before this, or this
        // sees the new version.
        fence_for_loom();
        core::ptr::eq(self.published.load(Ordering::SeqCst), published)
    }
}

impl<F: Format, H: Host> Drop for Shared<F, H> {
    fn drop(&mut self) {
        let mut locked = self.lock();
        let root = self.root;
        let top = Level::new(F::LEVELS).unwrap_or(Level::K4);
        for number in 0..F::ROOT_TABLES {
            let table = Pfn::new(root.get() + number as u64);
            // SAFETY: nobody uses the tables any more: walkers and operations keep what is shared alive.
            let entries = unsafe { self.host.reach(table).as_ref() };
            locked.bury_below(entries, top, 0, 0);
        }
        let forgotten = locked.pending.forgotten_chain.take();
        if let Some(chain) = forgotten {
            locked.let_wait(chain);
        }
        locked.reclaim(usize::MAX);
        debug_assert_eq!(locked.tables, F::ROOT_TABLES, "tables are leaked");
        drop(locked);
        // SAFETY: as above.
        unsafe { self.host.free(root, F::ROOT_TABLES) };
        // SAFETY: made from a box; the others are in `replaced`, and drop with the state.
        drop(unsafe { Box::from_raw(self.published.load(Ordering::Relaxed)) });
    }
}

/// Leave to look at tables: what can be found through entries is not freed while this exists.
///
/// It exists where a walker has announced itself, or where the lock is held.
pub(crate) struct Pin<'a, F: Format, H: Host> {
    pub(crate) shared: &'a Shared<F, H>,
    cell: Option<&'a Cell>,
}

impl<F: Format, H: Host> Drop for Pin<'_, F, H> {
    #[inline]
    fn drop(&mut self) {
        if let Some(cell) = self.cell {
            cell.leave();
        }
    }
}

impl<F: Format, H: Host> Pin<'_, F, H> {
    /// The root table that `gfn` goes through; below [`Shared::END`].
    #[inline]
    pub(crate) fn root(&self, gfn: u64) -> &Table {
        let number = if F::ROOT_TABLES == 1 { 0 } else { gfn / Level::end_of(F::LEVELS, 1) };
        // SAFETY: the root lives as long as what is shared.
        unsafe { self.shared.host.reach(Pfn::new(self.shared.root.get() + number)).as_ref() }
    }

    /// The table that an entry leads to, which was read from a table found through this pin.
    #[inline]
    pub(crate) fn below(&self, entry: u64, level: Level) -> &Table {
        debug_assert!(F::is_table(entry, level));
        // SAFETY: only tables that were allocated are linked, and a table is freed when it was taken out before
        // every pin that exists: see the module documentation of `nested`, 4. The entry was read after pinning.
        unsafe { self.shared.host.reach(F::pfn(entry, level)).as_ref() }
    }

    /// The current version of the slots.
    #[inline]
    pub(crate) fn published(&self) -> &Published {
        // SAFETY: never null; a version that was replaced is freed as tables are.
        unsafe { &*self.shared.published.load(Ordering::SeqCst) }
    }
}

/// The lock, held.
pub(crate) struct Locked<'a, F: Format, H: Host, G: DerefMut<Target = State>> {
    shared: &'a Shared<F, H>,
    state: G,
}

impl<F: Format, H: Host, G: DerefMut<Target = State>> Deref for Locked<'_, F, H, G> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl<F: Format, H: Host, G: DerefMut<Target = State>> DerefMut for Locked<'_, F, H, G> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl<'a, F: Format, H: Host, G: DerefMut<Target = State>> Locked<'a, F, H, G> {
    /// Leave to look at tables, and the state beside it.
    pub(crate) fn pin(&mut self) -> (Pin<'_, F, H>, &mut State) {
        (Pin { shared: self.shared, cell: None }, &mut self.state)
    }

    /// The current version of the slots.
    pub(crate) fn view(&self) -> &Published {
        // SAFETY: never null; replaced and freed under the lock only, which `self` is.
        unsafe { &*self.shared.published.load(Ordering::SeqCst) }
    }

    /// Makes `next` the version that faults look at.
    pub(crate) fn publish(&mut self, mut next: Box<Published>) {
        self.state.serial = self.state.serial.wrapping_add(1);
        next.serial = self.state.serial;
        let old = self.shared.published.swap(Box::into_raw(next), Ordering::SeqCst);
        fence_for_loom();
        // SAFETY: `published` is always made from a box, and this one is nobody's any more.
        let mut old = unsafe { Box::from_raw(old) };
        old.stamp = self.shared.epoch.stamp();
        old.next = self.state.replaced.take();
        self.state.replaced = Some(old);
        self.drop_replaced();
    }

    /// Lets go of versions that no walker looks at any more.
    pub(crate) fn drop_replaced(&mut self) {
        let state = &mut *self.state;
        let (cells, heavy) = (&mut state.cells, self.shared.heavy.as_deref());
        // All behind one that can go are older.
        let mut kept = 0;
        let mut next = state.replaced.as_deref();
        while let Some(published) = next.filter(|published| !cells.have_passed(published.stamp, heavy)) {
            kept += 1;
            next = published.next.as_deref();
        }
        let mut place = &mut state.replaced;
        for _ in 0..kept {
            match place {
                Some(published) => place = &mut published.next,
                None => return,
            }
        }
        // One by one: a long list must not drop recursively.
        let mut old = place.take();
        while let Some(mut published) = old {
            old = published.next.take();
        }
    }

    /// Lets tables that were taken out and flushed wait for walkers.
    pub(crate) fn let_wait(&mut self, chain: Chain) {
        if chain.is_empty() {
            return;
        }
        let stamp = self.shared.epoch.stamp();
        let state = &mut *self.state;
        state.graves.for_each(&chain, |grave| grave.stamp = Some(stamp));
        state.graves.append(&mut state.limbo, chain);
    }

    /// Frees up to `budget` tables that no walker is inside of any more.
    pub(crate) fn reclaim(&mut self, mut budget: usize) {
        while let Some(&Grave { stamp: Some(stamp), .. }) = self.state.graves.first(&self.state.limbo) {
            if budget == 0 || !self.state.cells.have_passed(stamp, self.shared.heavy.as_deref()) {
                return;
            }
            // All with this stamp, without looking at the cells again.
            while budget > 0
                && self.state.graves.first(&self.state.limbo).is_some_and(|it| it.stamp == Some(stamp))
            {
                self.free_first(stamp);
                budget -= 1;
            }
        }
    }

    /// Frees the first table in limbo; those below it come into its place.
    fn free_first(&mut self, stamp: u64) {
        let state = &mut *self.state;
        let Some(grave) = state.graves.pop(&mut state.limbo) else { return };
        // SAFETY: taken out, and not freed yet.
        let table = unsafe { self.shared.host.reach(grave.table).as_ref() };
        self.bury_below(table, grave.level, grave.base, stamp);
        self.state.tables -= 1;
        // SAFETY: taken out, flushed, and every walker that could be inside has left.
        unsafe { self.shared.host.free(grave.table, 1) };
    }

    /// Brings the tables that are linked in `table` to the front of limbo.
    fn bury_below(&mut self, table: &Table, level: Level, base: u64, stamp: u64) {
        if level == Level::K4 {
            return;
        }
        let state = &mut *self.state;
        for (entry, base) in table.0.iter().zip((0..).map(|i| base + i * level.pages())) {
            let entry = entry.load(Ordering::Relaxed);
            if F::is_table(entry, level) {
                let below =
                    Grave { table: F::pfn(entry, level), level: level.down(), base, stamp: Some(stamp) };
                state.graves.push_front(&mut state.limbo, below);
            }
        }
    }
}

impl State {
    /// Another obligation to flush `gfns`.
    pub(crate) fn owe(&mut self, gfns: GfnRange, is_new: bool) {
        self.pending.count += usize::from(is_new);
        self.pending.hull = Some(hull(self.pending.hull, gfns));
    }

    /// Whether a flush of some of these frames is owed by somebody, apart from `own` obligations.
    pub(crate) fn is_owed_beside(&self, own: usize, gfns: GfnRange) -> bool {
        self.pending.count > own && self.pending.hull.is_some_and(|hull| hull.overlaps(&gfns))
    }

    /// So many obligations are discharged.
    pub(crate) fn discharged(&mut self, count: usize) {
        self.pending.count -= count;
        if self.pending.count == 0 {
            self.pending.hull = None;
        }
    }
}

/// The smallest range that has both.
pub(crate) fn hull(a: Option<GfnRange>, b: GfnRange) -> GfnRange {
    let Some(a) = a.filter(|a| !a.is_empty()) else { return b };
    if b.is_empty() {
        return a;
    }
    let ((a_start, a_end), (b_start, b_end)) = (ends(a), ends(b));
    range(a_start.min(b_start), a_end.max(b_end))
}
