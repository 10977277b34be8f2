//! The log: marks come in, consumers are added.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::bitmap::Bitmap;
use super::consumer::Consumer;
use super::fence::HeavyFence;
use super::follow::Follower;
use super::set::Set;
use crate::addr::{Gfn, GfnRange, Gpa, Hva, HvaRange, PageSize};
use crate::error::OutOfMemory;
use crate::slot::{AddressSpaceId, Slot, SlotFlags};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, fence};
use crate::table::{MAX_ADDRESS_SPACES, Pinned, SlotPiece, SlotTable, Snapshot, View};

/// No guest physical address of 64 bits lies in this frame or behind it, whatever the page size.
const GFN_END: u64 = 1 << 52;

pub(super) struct Shared {
    /// Those of the table's address spaces; the others are never used.
    pub(super) spaces: [Bitmap; MAX_ADDRESS_SPACES],
    pub(super) initially_set: AtomicBool,
    /// The generation that was published and taken back last; no generation at first.
    pub(super) withdrawn: AtomicU64,
    /// Made after bits were taken, where marks leave alone what is marked.
    fence: Option<Box<dyn HeavyFence>>,
    pub(super) state: Mutex<State>,
}

impl Shared {
    /// Makes the heavy fence, where there is one. Whoever has taken bits of a bitmap does so before pages are re-armed or
    /// anybody reads them, and with the lock.
    pub(super) fn heavy_fence(&self) {
        let fence = self.fence.as_ref().filter(|_| self.spaces[0].leaves());
        if fence.is_some_and(|fence| fence.fence().is_err()) {
            for bitmap in &self.spaces {
                bitmap.set_leaves(false);
                bitmap.mark_everything();
            }
        }
    }
}

/// What the lock protects. Besides, whoever has the lock is the one who takes bits from the bitmaps.
pub(super) struct State {
    /// The version that the bits belong to.
    pub(super) current: Snapshot,
    /// Frames of a change that is published or about to be, and not followed yet: whose their bits are is open, so
    /// they are left alone until it is.
    pub(super) unsettled: Vec<(AddressSpaceId, GfnRange)>,
    /// A harvest of an older version was put back meanwhile. What it had of slots that the change deletes is gone, so
    /// nobody knows of it should the change be taken back.
    pub(super) put_back: bool,
    /// Places are reused; a consumer keeps its number.
    pub(super) consumers: Vec<Option<Kept>>,
}

impl State {
    /// No change is under way, or another one.
    pub(super) fn settle(&mut self) {
        self.unsettled.clear();
        self.put_back = false;
    }
}

/// What a consumer has not taken yet, apart from what is in the bitmaps.
#[derive(Default)]
pub(super) struct Kept {
    pub(super) sets: [Set; MAX_ADDRESS_SPACES],
    pub(super) keeps_removed: bool,
    pub(super) removed: Vec<RemovedSet>,
}

pub(super) struct RemovedSet {
    pub(super) generation: u64,
    pub(super) slot: Slot,
    pub(super) gfns: GfnRange,
    pub(super) set: Set,
}

/// Which pages of a table's slots were written. See the [module documentation](super).
///
/// A log is a handle: clones are the same log, on any thread.
///
/// ```
/// use memslot::dirty::{DirtyLog, SoftwareOnly};
/// use memslot::*;
///
/// let mut table = SlotTable::new(Limits::default())?;
/// let log = DirtyLog::attach(&mut table)?;
/// let ram = AddressSpaceId::NORMAL;
/// table.create(SlotSpec {
///     address_space: ram,
///     id: SlotId::new(0),
///     gfns: GfnRange::with_len(Gfn::new(0x100), 1 << 18).unwrap(),
///     backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000) },
///     flags: SlotFlags::LOG_DIRTY_PAGES,
/// })?;
///
/// let (migration, display) = (log.consumer()?, log.consumer()?);
/// log.mark_range(ram, GfnRange::with_len(Gfn::new(0x1000), 3).unwrap());
///
/// let harvest = migration.harvest(&mut SoftwareOnly)?;
/// let runs: Vec<_> = harvest.runs().map(|run| (run.gfns.start().get(), run.gfns.len())).collect();
/// assert_eq!(runs, [(0x1000, 3)]);
/// harvest.commit();
///
/// // What one consumer has taken, the other still sees.
/// assert_eq!(migration.harvest(&mut SoftwareOnly)?.pages(), 0);
/// assert_eq!(display.harvest(&mut SoftwareOnly)?.pages(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct DirtyLog {
    pub(super) shared: Arc<Shared>,
}

impl DirtyLog {
    /// A log of the slots of `table`. It follows every later change of the table, as one of its listeners.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn attach(table: &mut SlotTable) -> Result<Self, OutOfMemory> {
        Self::attach_to(table, None)
    }

    /// As [`attach`](Self::attach), with marks that only look at what is marked already: several times as fast, where pages
    /// are written more often than harvested. In return each harvest or clear that takes anything makes a
    /// [`HeavyFence`], once.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn attach_with_fence(table: &mut SlotTable, fence: Box<dyn HeavyFence>) -> Result<Self, OutOfMemory> {
        Self::attach_to(table, Some(fence))
    }

    fn attach_to(table: &mut SlotTable, fence: Option<Box<dyn HeavyFence>>) -> Result<Self, OutOfMemory> {
        let current = table.snapshot();
        let spaces: [Bitmap; MAX_ADDRESS_SPACES] = core::array::from_fn(|_| Bitmap::new());
        spaces.iter().for_each(|bitmap| bitmap.set_leaves(fence.is_some()));
        for (bitmap, space) in spaces.iter().zip(current.address_spaces()) {
            for slot in logged(&current, space) {
                bitmap.reserve(slot.gfns())?;
            }
        }
        let state =
            Mutex::new(State { current, unsettled: Vec::new(), put_back: false, consumers: Vec::new() });
        let withdrawn = AtomicU64::new(u64::MAX);
        let initially_set = AtomicBool::new(false);
        let shared = Arc::new(Shared { spaces, initially_set, withdrawn, fence, state });
        table.add_listener(Box::new(Follower::new(shared.clone())))?;
        Ok(Self { shared })
    }

    /// Marks a page as dirty, from any thread, without a lock. It cannot fail: see the
    /// [module documentation](super) for what happens without memory.
    ///
    /// Write first, then mark. A mark that finds a chunk of bits is a sequentially consistent read-modify-write, also
    /// where the bit was set. Whether the slot is logged ([`SlotFlags::LOG_DIRTY_PAGES`]) is the caller's to
    /// look at; the mark of a page that is not is forgotten, at the latest with the next harvest. An address space
    /// that the table does not have, and a gfn of no 64-bit address, are ignored.
    ///
    /// A writer that is not stopped while its slot moves uses [`mark_through`](Self::mark_through).
    #[inline]
    pub fn mark(&self, space: AddressSpaceId, gfn: Gfn) {
        if let Some(bitmap) = self.bitmap(space) {
            if gfn.get() < GFN_END {
                bitmap.mark(gfn.get());
            }
        }
    }

    /// Marks every page of a range, a word of 64 pages at a time, or a whole chunk of 32768.
    pub fn mark_range(&self, space: AddressSpaceId, gfns: GfnRange) {
        if let (Some(bitmap), Some(gfns)) = (self.bitmap(space), gfns.intersect(&ALL)) {
            bitmap.mark_range(gfns);
        }
    }

    /// Marks the pages that `len` bytes from `gpa` on touch; none for 0 bytes.
    pub fn mark_bytes(&self, space: AddressSpaceId, gpa: Gpa, len: u64, page: PageSize) {
        let Some(last) = len.checked_sub(1) else { return };
        let last = gpa.checked_add(last).unwrap_or(Gpa::new(u64::MAX));
        let (first, last) = (gpa.gfn(page), last.gfn(page));
        if first == last {
            self.mark(space, first);
        } else if let Some(gfns) = GfnRange::with_len(first, last.get() - first.get() + 1) {
            self.mark_range(space, gfns);
        }
    }

    /// Marks pages that were written through a pinned version, also when their slots have moved meanwhile.
    ///
    /// A change of the table does not wait for readers: a thread may still write through the version before,
    /// and its marks would come to where the memory no longer is. This call looks at the table again after the mark;
    /// where it has changed, the pages are marked where their memory is now, too, under whichever id. Where a version
    /// was taken back just now, because a listener refused it, every page of the address space counts as dirty.
    pub fn mark_through(&self, pinned: &Pinned<'_>, space: AddressSpaceId, gfns: GfnRange) {
        let Some(bitmap) = self.bitmap(space) else { return };
        let is_withdrawn = |view: &View| view.generation() == self.shared.withdrawn.load(Ordering::SeqCst);
        self.mark_range(space, gfns);
        // The follower looks for late marks after the new version is published, or taken back.
        fence(Ordering::SeqCst);
        if is_withdrawn(pinned) {
            return bitmap.mark_everything();
        }
        if pinned.is_current() {
            return;
        }
        let mut generation = None;
        loop {
            let Ok(now) = pinned.latest() else { return bitmap.mark_everything() };
            // Marked by this version already, and it is the newest still.
            if generation.replace(now.generation()) == Some(now.generation()) {
                return;
            }
            self.mark_in(&now, pinned, space, gfns);
            fence(Ordering::SeqCst);
            if is_withdrawn(&now) {
                return bitmap.mark_everything();
            }
        }
    }

    /// Marks pages of the version `then` where their memory is in the version `now`.
    fn mark_in(&self, now: &View, then: &View, space: AddressSpaceId, gfns: GfnRange) {
        for SlotPiece { slot, gfns } in then.slots_in(space, gfns) {
            each_home(then, slot, gfns, now, |_, _, home| self.mark_range(space, home));
        }
    }

    /// Adds bits that somebody else has collected: the kernel's log, a vhost log, a bitmap of the VMM's own writes.
    /// Bit `i` of word `w` is the page `64 * w + i` of `gfns`. Returns how many bits were set.
    ///
    /// # Errors
    /// [`BitmapError`] where the bitmap does not have exactly the range's length; nothing was added.
    pub fn merge(&self, space: AddressSpaceId, gfns: GfnRange, words: &[u64]) -> Result<u64, BitmapError> {
        check_length(gfns, words)?;
        if let Some((&last, used)) = words.last().zip(gfns.len().checked_rem(64).filter(|&used| used > 0)) {
            if u64::from_le(last) >> used != 0 {
                return Err(BitmapError::BitsBehindTheEnd { pages: gfns.len() });
            }
        }
        let mut pages = 0;
        let mut first = gfns.start().get();
        // Neighbouring full words become one range.
        for same in words.chunk_by(|a, b| (*a, *b) == (u64::MAX, u64::MAX)) {
            let len = 64 * same.len() as u64;
            let word = u64::from_le(same[0]);
            pages += same.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            if word == u64::MAX {
                self.mark_up_to(space, first, first + len);
            } else {
                runs_of(first, word).for_each(|(from, to)| self.mark_up_to(space, from, to));
            }
            first = first.wrapping_add(len);
        }
        Ok(pages)
    }

    fn mark_up_to(&self, space: AddressSpaceId, from: u64, to: u64) {
        if let Some(gfns) = GfnRange::new(Gfn::new(from), Gfn::new(to)) {
            self.mark_range(space, gfns);
        }
    }

    /// Whether pages count as dirty from the moment their slot is logged (KVM's `INITIALLY_SET`). Then a page-table
    /// backend arms nothing when logging starts: every page is re-armed when it is first harvested. Off by default;
    /// a change of it concerns slots whose logging starts later.
    pub fn set_initially_set(&self, on: bool) {
        self.shared.initially_set.store(on, Ordering::SeqCst);
    }

    /// See [`set_initially_set`](Self::set_initially_set).
    #[must_use]
    pub fn initially_set(&self) -> bool {
        self.shared.initially_set.load(Ordering::SeqCst)
    }

    /// Somebody who wants to know of dirty pages. It sees everything marked from now on, and what was marked
    /// before and nobody has harvested yet.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn consumer(&self) -> Result<Consumer, OutOfMemory> {
        self.add_consumer(false)
    }

    /// A consumer that also gets the bits of slots that are deleted: see [`Consumer::take_removed`].
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn consumer_keeping_removed(&self) -> Result<Consumer, OutOfMemory> {
        self.add_consumer(true)
    }

    /// Whether any consumer [keeps](Self::consumer_keeping_removed) the bits of slots that are deleted. Page tables ask
    /// when they unmap one: if so, what was written to it until then is worth marking.
    #[must_use]
    pub fn keeps_removed(&self) -> bool {
        self.shared.state.lock().consumers.iter().flatten().any(|kept| kept.keeps_removed)
    }

    fn add_consumer(&self, keeps_removed: bool) -> Result<Consumer, OutOfMemory> {
        let mut state = self.shared.state.lock();
        let kept = Some(Kept { keeps_removed, ..Kept::default() });
        let number = match state.consumers.iter().position(Option::is_none) {
            Some(number) => {
                state.consumers[number] = kept;
                number
            }
            None => {
                state.consumers.try_reserve(1).map_err(|_| OutOfMemory)?;
                state.consumers.push(kept);
                state.consumers.len() - 1
            }
        };
        Ok(Consumer { log: self.clone(), number })
    }

    /// Whether a page is marked and no consumer has harvested it since.
    #[must_use]
    pub fn is_marked(&self, space: AddressSpaceId, gfn: Gfn) -> bool {
        self.bitmap(space).is_some_and(|bitmap| gfn.get() < GFN_END && bitmap.is_marked(gfn.get()))
    }

    /// Bytes of heap memory for bits, whether set or kept for later; not counting the log's own few.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shared.spaces.iter().map(Bitmap::bytes).sum()
    }

    #[inline]
    fn bitmap(&self, space: AddressSpaceId) -> Option<&Bitmap> {
        self.shared.spaces.get(usize::from(space.get()))
    }
}

pub(super) const ALL: GfnRange = match GfnRange::new(Gfn::new(0), Gfn::new(GFN_END)) {
    Some(all) => all,
    None => panic!("the range is not inverted"),
};

impl core::fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("DirtyLog").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// A bitmap that does not fit the pages it is said to be of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// It has fewer or more words than the pages need.
    #[error("a bitmap of {pages} pages has {needed} words, not {words}")]
    Length {
        /// The pages.
        pages: u64,
        /// The words they need.
        needed: u64,
        /// The words there are.
        words: u64,
    },
    /// Bits are set behind the last page.
    #[error("the bitmap has bits behind its {pages} pages")]
    BitsBehindTheEnd {
        /// The pages.
        pages: u64,
    },
}

pub(super) fn check_length(gfns: GfnRange, words: &[u64]) -> Result<(), BitmapError> {
    let (pages, needed, words) = (gfns.len(), gfns.len().div_ceil(64), words.len() as u64);
    if needed == words { Ok(()) } else { Err(BitmapError::Length { pages, needed, words }) }
}

/// The logged slots of an address space.
pub(super) fn logged(view: &View, space: AddressSpaceId) -> impl Iterator<Item = &Slot> {
    view.slots(space).filter(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES))
}

/// The part of `gfns`, frames of `old`, whose memory is in `new`; with the frames there.
///
/// Memory is told by its host address, a device by its token.
pub(super) fn same_memory(old: &Slot, gfns: GfnRange, new: &Slot) -> Option<(GfnRange, GfnRange)> {
    let page = old.page_size();
    // Tokens need not be aligned: pages that overlap in part are not the same.
    let is_apart = !page.divides(old.address().wrapping_sub(new.address()));
    if is_apart || old.hva().is_some() != new.hva().is_some() {
        return None;
    }
    let skipped = page.bytes_of(gfns.start().offset_from(old.base_gfn())?)?;
    let addresses = |start, pages| HvaRange::with_len(Hva::new(start), page.bytes_of(pages)?);
    let here = addresses(old.address().checked_add(skipped)?, gfns.len())?;
    let same = here.intersect(&addresses(new.address(), new.pages())?)?;
    let pages = same.len() >> page.shift();
    let before = (same.start().get() - here.start().get()) >> page.shift();
    let after = (same.start().get() - new.address()) >> page.shift();
    let from = GfnRange::with_len(gfns.start().checked_add(before)?, pages)?;
    let to = GfnRange::with_len(new.base_gfn().checked_add(after)?, pages)?;
    Some((from, to))
}

/// Finds where the memory of `gfns`, frames of the slot `old` in the version `then`, is in the version `now`; also at
/// the same frames, since it may have been elsewhere in between. `found` gets the slot, the frames then and now.
///
/// Elsewhere, a slot that is what it was is an alias, and none of its pages was written.
pub(super) fn each_home(
    then: &View,
    old: &Slot,
    gfns: GfnRange,
    now: &View,
    mut found: impl FnMut(&Slot, GfnRange, GfnRange),
) {
    let space = old.address_space();
    let mut look = |new: &Slot| {
        let home = same_memory(old, gfns, new);
        let is_moved = |from, to| from == to || then.slot(space, new.id()) != Some(new);
        if let Some((from, to)) = home.filter(|&(from, to)| is_moved(from, to)) {
            found(new, from, to);
        }
    };
    let hvas = old.hva_of(gfns.start()).zip(old.page_size().bytes_of(gfns.len()));
    match hvas.and_then(|(hva, bytes)| HvaRange::with_len(hva, bytes)) {
        Some(hvas) => now.slots_at_hva(space, hvas).for_each(|hit| look(hit.slot)),
        None => now.slots(space).for_each(look),
    }
}

/// Where marks found no memory, every page of every logged slot is dirty.
pub(super) fn spread_everything(shared: &Shared, current: &View) {
    for (bitmap, space) in shared.spaces.iter().zip(current.address_spaces()) {
        if bitmap.take_everything() {
            logged(current, space).for_each(|slot| bitmap.mark_range(slot.gfns()));
        }
    }
}

/// The runs of set bits, of 64 pages from `first` on.
pub(super) fn runs_of(first: u64, mut bits: u64) -> impl Iterator<Item = (u64, u64)> {
    core::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let start = u64::from(bits.trailing_zeros());
        let end = start + u64::from((bits >> start).trailing_ones());
        bits &= if end < 64 { u64::MAX << end } else { 0 };
        Some((first + start, first + end))
    })
}
