//! The fault path. What makes it right is in the [module documentation](super), 1 to 3.

use memslot::{Gfn, GfnRange, HvaRange, OutOfMemory, Slot, SlotFlags};

use super::install::{Leaves, Path, fill_split};
use super::place::Place;
use super::{Pin, Published, Shared, TableError};
use crate::cache::Cache;
use crate::format::{Access, Format};
use crate::host::{Answer, Frame, Host, Pfn};
use crate::invalidate::{ends, range};
use crate::level::{Level, PAGE_SHIFT};
use crate::moving::for_each_home;
use crate::sync::{AtomicU64, Ordering};

/// What became of a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Fault {
    /// The access is allowed now, in a page of this size.
    Mapped(Level),
    /// It was allowed already: another processor was quicker, or this one had an old translation.
    AlreadyMapped,
    /// No memory is to be mapped there, or the slot is read-only and this is a write: the access is emulated.
    Mmio,
    /// The host does not allow to write to this page.
    WriteProtected,
    /// The host does not allow to execute this page.
    NotExecutable,
    /// Something is changing there: let the guest try again.
    Retry,
}

/// A fault that failed; nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError<E> {
    /// There was no table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The tables do not reach so far.
    #[error("frame {gfn} is beyond what the tables map: frames below {end}")]
    BeyondTables {
        /// The frame.
        gfn: Gfn,
        /// The first frame that cannot be mapped.
        end: Gfn,
    },
    /// The host had no answer.
    #[error("the host cannot say what is behind the page: {0}")]
    Frames(E),
}

impl<E> From<OutOfMemory> for FaultError<E> {
    fn from(_: OutOfMemory) -> Self {
        Self::Table(TableError::OutOfMemory)
    }
}

/// How often a fault starts again by itself when it was overtaken.
const ATTEMPTS: usize = 16;

/// Where an attempt ended.
pub(crate) enum Attempt {
    /// At an answer; so many frames from the one asked for on are mapped as it says.
    Done(Fault, u64),
    /// For want of so many tables.
    Tables(usize),
}

/// The slot that the last fault was in.
pub(crate) struct LastSlot {
    serial: u64,
    slot: Option<Slot>,
}

impl LastSlot {
    pub(crate) const NONE: Self = Self { serial: 0, slot: None };

    #[inline(always)]
    fn find<F: Format, H: Host>(
        &mut self,
        shared: &Shared<F, H>,
        published: &Published,
        gfn: u64,
    ) -> Option<&Slot> {
        let hit = self.serial == published.serial
            && self.slot.as_ref().is_some_and(|slot| gfn.wrapping_sub(slot.base_gfn().get()) < slot.pages());
        if hit { self.slot.as_ref() } else { self.look_up(shared, published, gfn) }
    }

    #[inline(never)]
    fn look_up<F: Format, H: Host>(
        &mut self,
        shared: &Shared<F, H>,
        published: &Published,
        gfn: u64,
    ) -> Option<&Slot> {
        self.slot = Some(*published.view.slot_at(shared.space(), Gfn::new(gfn))?);
        self.serial = published.serial;
        self.slot.as_ref()
    }
}

/// What may be mapped at once.
#[derive(Clone, Copy)]
struct Limit {
    /// The largest page.
    level: Level,
    /// Whether the pages beside the one asked for may be mapped, too.
    neighbours: bool,
}

/// What a fault wants.
#[derive(Clone, Copy)]
pub(crate) struct Wish {
    pub(crate) gfn: u64,
    pub(crate) access: Access,
    /// Frames behind it that are welcome, too, where a new table is made anyway; at least the one asked for.
    pub(crate) end: u64,
    /// The page is not used yet.
    pub(crate) prefault: bool,
}

impl<F: Format, H: Host> Pin<'_, F, H> {
    /// What maps `gfn`: the entry, and its level.
    pub(crate) fn leaf(&self, gfn: u64) -> Option<(u64, Level)> {
        let place = self.place_down_to(gfn, Level::K4);
        F::is_present(place.seen).then_some((place.seen, place.level))
    }

    /// Resolves a fault, or says what is missing for it. `wish.gfn` is below [`Shared::END`].
    #[inline(never)]
    pub(crate) fn fault(
        &self,
        cache: &mut Cache,
        last_slot: &mut LastSlot,
        wish: &Wish,
    ) -> Result<Attempt, FaultError<H::Error>> {
        for _ in 0..ATTEMPTS {
            if let Some(done) = self.attempt(cache, last_slot, wish)? {
                return Ok(done);
            }
        }
        Ok(Attempt::Done(Fault::Retry, 0))
    }

    /// The same once; `None` where somebody was quicker.
    #[inline(always)]
    pub(super) fn attempt(
        &self,
        cache: &mut Cache,
        last_slot: &mut LastSlot,
        wish: &Wish,
    ) -> Result<Option<Attempt>, FaultError<H::Error>> {
        let shared = self.shared;
        let done = |fault| Ok(Some(Attempt::Done(fault, 1)));
        // First the entry, then the slots, then the frame: whoever changes them does so in the opposite order.
        let place = self.place_down_to(wish.gfn, Level::K4);
        let is_present = F::is_present(place.seen);
        if is_present && F::access(place.seen).contains(wish.access) {
            let rest = place.level.pages() - (wish.gfn & (place.level.pages() - 1));
            return Ok(Some(Attempt::Done(Fault::AlreadyMapped, rest)));
        }
        let published = self.published();
        let Some(slot) = last_slot.find(shared, published, wish.gfn) else { return done(Fault::Mmio) };
        let is_read_only = slot.flags().contains(SlotFlags::READONLY);
        if is_read_only && wish.access.contains(Access::WRITE) {
            return done(Fault::Mmio);
        }
        if is_present
            && place.seen & F::MAY_WRITE != 0
            && F::access(place.seen | F::WRITE).contains(wish.access)
        {
            return self.allow_writing(cache, published, slot, &place, wish);
        }
        let Some(limit) = self.limit(slot, wish) else { return done(Fault::Retry) };
        let answer = shared.host.frame(slot, Gfn::new(wish.gfn), wish.access).map_err(FaultError::Frames)?;
        let frame = match answer {
            Answer::Frame(frame) => frame,
            Answer::Mmio => return done(Fault::Mmio),
            Answer::Retry => return done(Fault::Retry),
        };
        if !frame.access.contains(wish.access) {
            let is_write = wish.access.contains(Access::WRITE) && !frame.access.contains(Access::WRITE);
            return done(if is_write { Fault::WriteProtected } else { Fault::NotExecutable });
        }
        if is_present {
            // The host allows more than it did. Only an entry with a nonce proves that this is still so.
            if shared.uses_dirty_bits() && place.seen & F::DIRTY != 0 {
                shared.mark_logged(&published.view, block(place.level, wish.gfn));
            }
            let stale = if place.seen & F::WRITE != 0 { F::STALE_BITS } else { F::STALE };
            place.replace(F::empty(shared.nonce()) | stale);
            return Ok(None);
        }
        self.install(cache, published, slot, &place, wish, &frame, limit)
    }

    /// What slot, dirty log and invalidations allow. `None` if the page itself is being invalidated.
    ///
    /// Invalidations count from before the host is asked: what is invalidated later changes the entry.
    #[inline]
    fn limit(&self, slot: &Slot, wish: &Wish) -> Option<Limit> {
        let shared = self.shared;
        let level = if shared.is_logged(slot) { Level::K4 } else { shared.config.largest.min(F::LARGEST) };
        if shared.invalidations.count() == 0 {
            return Some(Limit { level, neighbours: true });
        }
        self.limit_beside_invalidations(slot, wish, level)
    }

    #[cold]
    fn limit_beside_invalidations(&self, slot: &Slot, wish: &Wish, mut level: Level) -> Option<Limit> {
        let covers = |gfns: GfnRange| {
            let bytes = gfns.len() << PAGE_SHIFT;
            let hvas = slot.hva_of(gfns.start()).and_then(|hva| HvaRange::with_len(hva, bytes));
            self.shared.invalidations.cover(gfns, hvas)
        };
        while level > Level::K4 && !is_within(level, wish.gfn, slot.gfns()) {
            level = level.down();
        }
        if level > Level::K4 && covers(block(level, wish.gfn)) {
            level = Level::K4;
        }
        let is_covered = level == Level::K4 && covers(range(wish.gfn, wish.gfn + 1));
        (!is_covered).then_some(Limit { level, neighbours: false })
    }

    /// Puts a page, or a path to it, into an empty entry.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "all of what a fault has found")]
    fn install(
        &self,
        cache: &mut Cache,
        published: &Published,
        slot: &Slot,
        place: &Place<'_>,
        wish: &Wish,
        frame: &Frame,
        limit: Limit,
    ) -> Result<Option<Attempt>, FaultError<H::Error>> {
        let shared = self.shared;
        let is_logged = shared.is_logged(slot);
        let is_write = wish.access.contains(Access::WRITE);
        let may_write = frame.access.contains(Access::WRITE) && !slot.flags().contains(SlotFlags::READONLY);
        // What was writable when a fault emptied it processors may write still, without a fault and without another dirty bit: so it
        // is writable, and counts as written, until somebody takes that away and flushes.
        let is_written = is_write || place.seen & F::STALE_WRITABLE != 0;
        let writable = may_write && (is_written || !is_logged || shared.uses_dirty_bits());

        let mut level = limit.level.min(place.level);
        if level > Level::K4 {
            let backed = backed(slot, frame);
            while level > Level::K4
                && !(is_aligned(level, wish.gfn, frame.pfn.get()) && is_within(level, wish.gfn, backed))
            {
                level = level.down();
            }
        }
        let tables = Path::tables(place.level, level);
        if tables > cache.len() {
            return Ok(Some(Attempt::Tables(tables)));
        }
        let mut access = frame.access;
        access.set(Access::WRITE, writable);
        let within = wish.gfn & (level.pages() - 1);
        let pfn = Pfn::new(frame.pfn.get() - within);
        let mut leaf = F::leaf(pfn, level, access, frame.memory);
        if may_write {
            leaf |= F::MAY_WRITE;
        }
        if !wish.prefault {
            leaf |= F::ACCESSED;
        }
        if is_written && writable {
            leaf |= F::DIRTY;
        }
        let pages = if tables == 0 {
            place.replace(leaf).then(|| level.pages() - within)
        } else {
            let neighbours = if limit.neighbours { backed(slot, frame) } else { GfnRange::default() };
            self.install_path(cache, place, wish, leaf, level, neighbours)
        };
        let Some(pages) = pages else { return Ok(None) };
        if writable {
            let first = wish.gfn - within;
            let mark = (is_logged && is_written).then_some(slot);
            self.granted(published, mark, range(first, first + within + pages));
        }
        Ok(Some(Attempt::Done(Fault::Mapped(level), pages)))
    }

    /// Puts a path of tables into an empty entry, whose last has `leaf` and maybe some of its `neighbours`. Returns how many
    /// frames are mapped from the one asked for on; `None` where somebody was quicker.
    #[inline(never)]
    fn install_path(
        &self,
        cache: &mut Cache,
        place: &Place<'_>,
        wish: &Wish,
        leaf: u64,
        level: Level,
        neighbours: GfnRange,
    ) -> Option<u64> {
        let is_wished = wish.end - wish.gfn > 1 && !neighbours.is_empty();
        let count = if is_wished { Self::count(wish, level, neighbours) } else { 1 };
        let leaves = Leaves { first: leaf, level, gfn: wish.gfn, count };
        let path = Path::build(self.shared, cache, place.level, place.seen, leaves);
        let is_linked = path.link(self.shared, cache, place.entry);
        is_linked.then(|| count as u64 * level.pages() - (wish.gfn & (level.pages() - 1)))
    }

    /// How many pages of this size a new table gets at once: those wished for that are backed contiguously.
    fn count(wish: &Wish, level: Level, backed: GfnRange) -> usize {
        let first = level.align_down(wish.gfn);
        let end = wish.end.min(ends(backed).1).min(level.up().align_down(first) + level.up().pages());
        usize::try_from((end - first) / level.pages()).unwrap_or(1).max(1)
    }

    /// Lets the processor write to a page that it may write to.
    #[inline(never)]
    fn allow_writing(
        &self,
        cache: &mut Cache,
        published: &Published,
        slot: &Slot,
        place: &Place<'_>,
        wish: &Wish,
    ) -> Result<Option<Attempt>, FaultError<H::Error>> {
        let shared = self.shared;
        let is_logged = shared.is_logged(slot);
        let granted = F::WRITE | F::ACCESSED | F::DIRTY;
        let gfns = block(place.level, wish.gfn);
        let is_whole = slot.gfns().contains_range(&gfns);
        if place.level == Level::K4 || (!is_logged && is_whole) {
            if !place.replace(place.seen | granted) {
                return Ok(None);
            }
            self.granted(published, is_logged.then_some(slot), gfns);
            let rest = ends(gfns).1 - wish.gfn;
            return Ok(Some(Attempt::Done(Fault::Mapped(place.level), rest)));
        }
        // Of a large page in a logged slot, only the page that is written becomes writable.
        let tables = usize::from(place.level.get() - 1);
        if tables > cache.len() {
            return Ok(Some(Attempt::Tables(tables)));
        }
        let mut large = place.seen;
        let mut level = place.level;
        let mut above: Option<&AtomicU64> = None;
        let mut top = 0;
        for number in 0..tables {
            let frame = cache.peek(number);
            let table = cache.table(shared, frame);
            fill_split::<F>(table, large, level);
            match above {
                Some(above) => above.store(F::table(frame), Ordering::Relaxed),
                None => top = F::table(frame),
            }
            level = level.down();
            let entry = table.entry(level, wish.gfn);
            large = entry.load(Ordering::Relaxed);
            above = Some(entry);
        }
        if let Some(entry) = above {
            entry.store(large | granted, Ordering::Relaxed);
        }
        if !place.replace(top) {
            for number in 0..tables {
                cache.clean(shared, cache.peek(number));
            }
            return Ok(None);
        }
        cache.take(tables);
        self.granted(published, is_logged.then_some(slot), range(wish.gfn, wish.gfn + 1));
        Ok(Some(Attempt::Done(Fault::Mapped(Level::K4), 1)))
    }

    /// Write access to `gfns` was granted, according to this version of the slots; if that is to be marked, in this slot.
    #[inline(always)]
    fn granted(&self, published: &Published, mark: Option<&Slot>, gfns: GfnRange) {
        if mark.is_some() {
            self.shared.mark(gfns);
        }
        if !self.shared.is_current(published) {
            self.mark_what_is_logged_now(mark, gfns);
        }
    }

    /// The slots have changed. Somebody may have written before the mark, and the tables may have followed before it, too: so
    /// memory that has moved is marked where it is now.
    #[cold]
    fn mark_what_is_logged_now(&self, marked: Option<&Slot>, gfns: GfnRange) {
        let mut published = self.published();
        loop {
            self.shared.mark_logged(&published.view, gfns);
            if let Some(slot) = marked {
                for_each_home(slot, gfns, &published.view, |home| self.shared.mark(home));
            }
            if marked.is_none() || self.shared.is_current(published) {
                return;
            }
            published = self.published();
        }
    }
}

/// The frames of the slot that are contiguous in the host.
fn backed(slot: &Slot, frame: &Frame) -> GfnRange {
    slot.gfns().intersect(&frame.run).unwrap_or_default()
}

/// The frames of the page of this size that has `gfn`.
fn block(level: Level, gfn: u64) -> GfnRange {
    let first = level.align_down(gfn);
    range(first, first + level.pages())
}

/// Whether guest and host frame lie at the same place within a page of this size.
fn is_aligned(level: Level, gfn: u64, pfn: u64) -> bool {
    level.is_aligned(gfn ^ pfn)
}

/// Whether the page of this size that has `gfn` lies in `gfns` as a whole.
fn is_within(level: Level, gfn: u64, gfns: GfnRange) -> bool {
    gfns.contains_range(&block(level, gfn))
}
