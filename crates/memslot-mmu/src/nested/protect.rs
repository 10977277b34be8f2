//! Taking access away from pages that stay mapped: for the dirty log, and for slots that become read-only.
//!
//! A compare-exchange for each entry is what this costs, and most of what starting the dirty log costs. So a table that
//! is in the range as a whole is replaced by a protected *copy*, with one exchange in the entry above it: what faults
//! do in the old table meanwhile is lost, and faults again, as in any table that was taken out (see
//! [`nested`](super), 4). A copy would lose dirty bits that the processor sets meanwhile, so this is for write
//! protection only.

use core::marker::PhantomData;

use memslot::GfnRange;

use super::Shared;
use super::cursor::{At, Next, Visit};
use super::graves::{Chain, Graves};
use super::shared::hull;
use super::zap::bury;
use crate::cache::Cache;
use crate::format::Format;
use crate::host::{Host, Pfn};
use crate::invalidate::range;
use crate::level::{ENTRIES, Level, Table};
use crate::sync::Ordering;

/// What is taken away from a leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Take {
    /// Writing, until the next fault.
    Writing,
    /// The dirty bit, which must exist.
    Dirty,
    /// What makes the next write noticed: the dirty bit of 4 KiB pages, writing of larger ones, which are then split.
    DirtyOrLarge,
    /// Writing, for good: the slot is read-only. Faults that are about to install something writable are turned away.
    WritingForGood,
}

/// See the [module documentation](self). `FOR_GOOD` is for [`Take::WritingForGood`].
pub(crate) struct Protect<F: Format, const FOR_GOOD: bool> {
    take: Take,
    nonce: u64,
    /// What has changed, as far as processors must hear of it.
    pub(crate) changed: Option<GfnRange>,
    format: PhantomData<F>,
}

impl<F: Format, const FOR_GOOD: bool> Protect<F, FOR_GOOD> {
    pub(crate) fn new(take: Take, nonce: u64) -> Self {
        Self { take, nonce, changed: None, format: PhantomData }
    }

    #[inline]
    fn mask(&self, level: Level) -> u64 {
        match self.take {
            Take::Writing => F::WRITE,
            Take::Dirty => F::DIRTY,
            Take::DirtyOrLarge if level == Level::K4 => F::DIRTY,
            // As long as it is writable, all of it counts as dirty: nothing is lost with its dirty bit.
            Take::DirtyOrLarge => F::WRITE | F::DIRTY,
            Take::WritingForGood => F::WRITE | F::MAY_WRITE,
        }
    }
}

impl<F: Format> Protect<F, false> {
    /// The 4 KiB pages from `from` to `end` of one table.
    #[inline]
    pub(crate) fn small_pages(&mut self, table: &Table, from: u64, end: u64) {
        let mask = self.mask(Level::K4);
        let (mut first, mut last) = (None, from);
        for gfn in from..end {
            let entry = table.entry(Level::K4, gfn);
            let mut seen = entry.load(Ordering::SeqCst);
            let is_changed = loop {
                if !F::is_present(seen) {
                    break seen & F::STALE_WRITABLE != 0;
                }
                if seen & mask == 0 {
                    break false;
                }
                match entry.compare_exchange(seen, seen & !mask, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => break true,
                    Err(other) => seen = other,
                }
            };
            if is_changed {
                first = first.or(Some(gfn));
                last = gfn;
            }
        }
        if let Some(first) = first {
            self.changed = Some(hull(self.changed, range(first, last + 1)));
        }
    }
}

impl<F: Format, const FOR_GOOD: bool> Visit for Protect<F, FOR_GOOD> {
    const EMPTIES: bool = true;

    #[inline]
    fn empty(&mut self, at: &At<'_>) -> Next {
        if FOR_GOOD && !at.replace(at.emptied::<F>(self.nonce) | at.seen & F::STALE_BITS) {
            return Next::Again;
        }
        if at.seen & F::STALE_WRITABLE != 0 {
            // A page that a fault has emptied is write-protected nowhere but in processors.
            self.changed = Some(hull(self.changed, range(at.base, at.end())));
        }
        Next::Done
    }

    #[inline]
    fn leaf(&mut self, at: &At<'_>) -> Next {
        let mask = self.mask(at.level);
        let taken = at.seen & mask;
        if taken == 0 {
            return Next::Done;
        }
        if !at.replace(at.seen & !mask) {
            return Next::Again;
        }
        if taken & !F::MAY_WRITE != 0 {
            self.changed = Some(hull(self.changed, range(at.base, at.end())));
        }
        Next::Done
    }
}

/// Write protection by copies of tables.
pub(crate) struct ProtectByCopy<'a, F: Format, H: Host> {
    pub(crate) entries: Protect<F, false>,
    pub(crate) shared: &'a Shared<F, H>,
    pub(crate) graves: &'a mut Graves,
    pub(crate) tables: &'a mut Chain,
    /// Tables for copies.
    pub(crate) cache: &'a mut Cache,
}

/// With fewer writable pages, a table is not worth a copy.
const WORTH_A_COPY: usize = ENTRIES / 32;

impl<F: Format, H: Host> ProtectByCopy<'_, F, H> {
    /// Whether the table could be copied: a table that is linked in it must not be in two.
    #[inline]
    fn copy(&self, table: &Table, level: Level, frame: Pfn) -> bool {
        let copy = self.cache.table(self.shared, frame);
        if level == Level::K4 {
            // Pieces of so many entries are copied without a loop.
            const PIECE: usize = if ENTRIES < 8 { ENTRIES } else { 8 };
            for (from, to) in table.0.chunks_exact(PIECE).zip(copy.0.chunks_exact(PIECE)) {
                for (from, to) in from.iter().zip(to) {
                    to.store(protected::<F>(from.load(Ordering::SeqCst)), Ordering::Relaxed);
                }
            }
            return true;
        }
        for (from, to) in table.0.iter().zip(&copy.0) {
            let entry = from.load(Ordering::SeqCst);
            if F::is_table(entry, level) {
                return false;
            }
            to.store(protected::<F>(entry), Ordering::Relaxed);
        }
        true
    }
}

/// An entry without write access.
#[inline]
fn protected<F: Format>(entry: u64) -> u64 {
    let protected = entry & !F::WRITE;
    if F::is_present(entry) { protected } else { entry }
}

impl<F: Format, H: Host> Visit for ProtectByCopy<'_, F, H> {
    const EMPTIES: bool = true;

    #[inline]
    fn empty(&mut self, at: &At<'_>) -> Next {
        self.entries.empty(at)
    }

    #[inline]
    fn leaf(&mut self, at: &At<'_>) -> Next {
        self.entries.leaf(at)
    }

    fn table(&mut self, at: &At<'_>, table: &Table) -> Next {
        if !at.whole {
            return Next::Below;
        }
        let below = at.level.down();
        let entries = || table.0.iter().map(|entry| entry.load(Ordering::SeqCst));
        if below > Level::K4 && entries().any(|entry| F::is_table(entry, below)) {
            return Next::Below;
        }
        let writable = entries().filter(|&entry| F::is_present(entry) && entry & F::WRITE != 0);
        if writable.take(WORTH_A_COPY).count() < WORTH_A_COPY {
            return Next::Below;
        }
        if self.cache.len() == 0 {
            return Next::Stop;
        }
        let frame = self.cache.peek(0);
        if !self.copy(table, below, frame) {
            self.cache.clean(self.shared, frame);
            return Next::Again;
        }
        if !at.replace(F::table(frame)) {
            self.cache.clean(self.shared, frame);
            return Next::Again;
        }
        self.cache.take(1);
        bury::<F>(self.graves, self.tables, at);
        self.entries.changed = Some(hull(self.entries.changed, range(at.base, at.end())));
        Next::Done
    }
}
