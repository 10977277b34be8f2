//! The log and its consumers.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::bitmap::Bitmap;
use super::follow::Follower;
use super::harvest::Harvest;
use super::place::Held;
use super::rearm::Rearm;
use super::runs::Runs;
use super::set::Set;
use crate::addr::{Gfn, GfnRange, Gpa, PageSize};
use crate::error::OutOfMemory;
use crate::slot::{AddressSpaceId, Slot, SlotFlags};
use crate::sync::{AtomicBool, Mutex, Ordering, fence};
use crate::table::{MAX_ADDRESS_SPACES, Pinned, SlotTable, Snapshot, View};

/// No guest physical address of 64 bits lies in this frame or behind it, whatever the page size.
const GFN_END: u64 = 1 << 52;

pub(super) struct Shared {
    /// Those of the table's address spaces; the others are never used.
    pub(super) spaces: [Bitmap; MAX_ADDRESS_SPACES],
    pub(super) initially_set: AtomicBool,
    pub(super) state: Mutex<State>,
}

/// What the lock protects. Besides, whoever has the lock is the one who takes bits from the bitmaps.
pub(super) struct State {
    /// The version that the bits belong to.
    pub(super) current: Snapshot,
    /// Places are reused; a consumer keeps its number.
    pub(super) consumers: Vec<Option<Kept>>,
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
        let current = table.snapshot();
        let spaces: [Bitmap; MAX_ADDRESS_SPACES] = core::array::from_fn(|_| Bitmap::new());
        for (bitmap, space) in spaces.iter().zip(current.address_spaces()) {
            for slot in logged(&current, space) {
                bitmap.reserve(slot.gfns())?;
            }
        }
        let state = Mutex::new(State { current, consumers: Vec::new() });
        let shared = Arc::new(Shared { spaces, initially_set: AtomicBool::new(false), state });
        table.add_listener(Box::new(Follower::new(shared.clone())))?;
        Ok(Self { shared })
    }

    /// Marks a page as dirty, from any thread, without a lock. It cannot fail: see the
    /// [module documentation](super) for what happens without memory.
    ///
    /// Write first, then mark. Whether the slot is logged ([`SlotFlags::LOG_DIRTY_PAGES`]) is the caller's to
    /// look at; the mark of a page that is not is forgotten at the next harvest. An address space that the table
    /// does not have, and a gfn of no 64-bit address, are ignored.
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
    /// and its marks would come to where the slot no longer is. This call looks at the table again after the mark;
    /// where it has changed, the pages are marked where their slots (by id) are now, too.
    pub fn mark_through(&self, pinned: &Pinned<'_>, space: AddressSpaceId, gfns: GfnRange) {
        self.mark_range(space, gfns);
        // The follower looks for late marks after the new version is published.
        fence(Ordering::SeqCst);
        if pinned.is_current() {
            return;
        }
        let Ok(now) = pinned.latest() else {
            return self.bitmap(space).map_or((), Bitmap::mark_everything);
        };
        for piece in pinned.slots_in(space, gfns) {
            let Some(slot) = now.slot(space, piece.slot.id()) else { continue };
            if let Some(moved) = moved_to(piece.slot, piece.gfns, slot) {
                self.mark_range(space, moved.1);
            }
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
            first += len;
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

const ALL: GfnRange = match GfnRange::new(Gfn::new(0), Gfn::new(GFN_END)) {
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

/// A harvest that did not come to be. Nothing is lost: the pages are dirty still.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarvestError<E> {
    /// No memory for what was to be taken.
    #[error("out of memory; no page was taken")]
    OutOfMemory,
    /// The page-table backend failed.
    #[error("pages could not be re-armed: {0}")]
    Rearm(E),
    /// The caller's bitmap has another length than the range.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
}

impl<E> From<OutOfMemory> for HarvestError<E> {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// Somebody who takes dirty pages from a log, at its own pace. Dropping it forgets what it has not taken.
pub struct Consumer {
    pub(super) log: DirtyLog,
    pub(super) number: usize,
}

impl Consumer {
    /// The log.
    #[must_use]
    pub fn log(&self) -> &DirtyLog {
        &self.log
    }

    /// The version of the table that the bits belong to at the moment.
    #[must_use]
    pub fn view(&self) -> Snapshot {
        self.log.shared.state.lock().current.clone()
    }

    /// Takes all dirty pages of all logged slots, and has them re-armed.
    ///
    /// The log is locked meanwhile: `rearm` must not call it, except to mark pages.
    ///
    /// # Errors
    /// [`HarvestError`]; nothing was taken.
    pub fn harvest<R: Rearm>(&self, rearm: &mut R) -> Result<Harvest<'_>, HarvestError<R::Error>> {
        self.harvest_ranges(0..self.log.shared.spaces.len(), ALL, rearm)
    }

    /// Takes the dirty pages of a range.
    ///
    /// # Errors
    /// [`HarvestError`]; nothing was taken.
    pub fn harvest_range<R: Rearm>(
        &self,
        space: AddressSpaceId,
        gfns: GfnRange,
        rearm: &mut R,
    ) -> Result<Harvest<'_>, HarvestError<R::Error>> {
        let space = usize::from(space.get());
        let spaces = if space < self.log.shared.spaces.len() { space..space + 1 } else { 0..0 };
        self.harvest_ranges(spaces, gfns.intersect(&ALL).unwrap_or_default(), rearm)
    }

    fn harvest_ranges<R: Rearm>(
        &self,
        spaces: core::ops::Range<usize>,
        gfns: GfnRange,
        rearm: &mut R,
    ) -> Result<Harvest<'_>, HarvestError<R::Error>> {
        let shared = &*self.log.shared;
        let mut state = shared.state.lock();
        let mut harvest = Harvest::new(self, state.current.clone(), gfns);
        let mut fresh: [Vec<(u64, Held)>; MAX_ADDRESS_SPACES] = Default::default();
        // SAFETY: we have the lock.
        let result = unsafe {
            take(shared, &mut state, self.number, spaces, gfns, &mut fresh, &mut harvest.sets, rearm)
        };
        if result.is_err() {
            for ((bitmap, fresh), set) in shared.spaces.iter().zip(&mut fresh).zip(&mut harvest.sets) {
                for (number, held) in fresh.drain(..).chain(set.chunks.drain(..)) {
                    // SAFETY: we have the lock, and the chunk is ours.
                    unsafe { bitmap.restore(number, held) };
                }
            }
        }
        drop(state);
        result.map(|()| harvest)
    }

    /// Copies the bits of a range without taking them, as KVM does with manual protection: bit `i` of word `w` is
    /// the page `64 * w + i` of `gfns`, in little-endian words. Returns how many are set.
    ///
    /// # Errors
    /// [`BitmapError`] where `words` does not have exactly the range's length.
    pub fn peek(&self, space: AddressSpaceId, gfns: GfnRange, words: &mut [u64]) -> Result<u64, BitmapError> {
        check_length(gfns, words)?;
        let shared = &*self.log.shared;
        let state = shared.state.lock();
        let mut pages = 0;
        let space = usize::from(space.get());
        let (Some(bitmap), Some(kept)) = (shared.spaces.get(space), &state.consumers[self.number]) else {
            words.fill(0);
            return Ok(0);
        };
        let everything = bitmap.is_everything();
        for (at, word) in words.iter_mut().enumerate() {
            let first = gfns.start().get() + 64 * at as u64;
            let mut bits = unaligned(first, |gfn| bitmap.word(gfn) | kept.sets[space].word(gfn));
            if everything {
                bits = u64::MAX;
            }
            bits &= up_to(gfns.end().get() - first);
            pages += u64::from(bits.count_ones());
            *word = bits.to_le();
        }
        Ok(pages)
    }

    /// Takes those pages of a range whose bits are set in `mask`, laid out as in [`peek`](Self::peek), and has
    /// them re-armed. Bits behind the range are ignored. Returns how many pages were dirty.
    ///
    /// # Errors
    /// [`HarvestError`]. Where the backend failed or memory was short, pages taken by then are dirty again.
    pub fn clear<R: Rearm>(
        &self,
        space: AddressSpaceId,
        gfns: GfnRange,
        mask: &[u64],
        rearm: &mut R,
    ) -> Result<u64, HarvestError<R::Error>> {
        check_length(gfns, mask)?;
        let shared = &*self.log.shared;
        let mut state = shared.state.lock();
        let Some(bitmap) = shared.spaces.get(usize::from(space.get())) else { return Ok(0) };
        spread_everything(shared, &state.current);
        let mut armed = false;
        let mut pages = 0;
        for (at, &bits) in mask.iter().enumerate() {
            let first = gfns.start().get() + 64 * at as u64;
            let bits = u64::from_le(bits) & up_to(gfns.end().get() - first);
            // The word may lie across two of the bitmap's.
            let shift = first % 64;
            for (gfn, bits) in [(first, bits << shift), (first - shift + 64, (bits >> 1) >> (63 - shift))] {
                if bits != 0 {
                    // SAFETY: we have the lock.
                    let (fresh, all) =
                        unsafe { take_word(bitmap, &mut state, self.number, space, gfn, bits)? };
                    pages += u64::from(all.count_ones());
                    if fresh != 0 && R::NEEDED {
                        armed = true;
                        if let Err(error) = rearm_word(rearm, space, gfn & !63, fresh) {
                            remark(bitmap, gfn & !63, fresh);
                            return Err(HarvestError::Rearm(error));
                        }
                    }
                }
            }
        }
        if armed {
            if let Err(error) = rearm.flush() {
                // Which pages are armed is not known: none of them is clean.
                for (at, &bits) in mask.iter().enumerate() {
                    let first = gfns.start().get() + 64 * at as u64;
                    remark(bitmap, first, u64::from_le(bits) & up_to(gfns.end().get() - first));
                }
                return Err(HarvestError::Rearm(error));
            }
        }
        Ok(pages)
    }

    /// The bits of slots that were deleted since the last call, for a consumer that
    /// [keeps them](DirtyLog::consumer_keeping_removed). One entry for every range of frames that went; in order.
    ///
    /// # Errors
    /// [`OutOfMemory`]; they can be asked for again.
    pub fn take_removed(&self) -> Result<Vec<Removed>, OutOfMemory> {
        let mut state = self.log.shared.state.lock();
        let Some(kept) = &mut state.consumers[self.number] else { return Ok(Vec::new()) };
        let mut removed = Vec::new();
        removed.try_reserve_exact(kept.removed.len()).map_err(|_| OutOfMemory)?;
        removed.extend(kept.removed.drain(..).map(|bits| Removed { log: self.log.clone(), bits }));
        Ok(removed)
    }

    /// Puts bits back that were taken.
    pub(super) fn keep(&self, sets: &mut [Set; MAX_ADDRESS_SPACES]) {
        let shared = &*self.log.shared;
        let mut state = shared.state.lock();
        let Some(kept) = &mut state.consumers[self.number] else { return };
        for ((bitmap, kept), set) in shared.spaces.iter().zip(&mut kept.sets).zip(sets) {
            for (number, held) in set.chunks.drain(..) {
                // SAFETY: we have the lock.
                unsafe { kept.add(bitmap, number, held) };
            }
        }
    }

    /// Lets go of bits that were taken.
    pub(super) fn forget(&self, sets: &mut [Set; MAX_ADDRESS_SPACES]) {
        let shared = &*self.log.shared;
        let _state = shared.state.lock();
        for (bitmap, set) in shared.spaces.iter().zip(sets) {
            // SAFETY: we have the lock.
            unsafe { set.clear(bitmap) };
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let shared = &*self.log.shared;
        let mut state = shared.state.lock();
        if let Some(mut kept) = state.consumers[self.number].take() {
            for (bitmap, set) in shared.spaces.iter().zip(&mut kept.sets) {
                // SAFETY: we have the lock.
                unsafe { set.clear(bitmap) };
            }
            for removed in &mut kept.removed {
                let bitmap = &shared.spaces[usize::from(removed.slot.address_space().get())];
                // SAFETY: we have the lock.
                unsafe { removed.set.clear(bitmap) };
            }
        }
    }
}

/// The dirty pages of frames that a deleted slot had.
pub struct Removed {
    log: DirtyLog,
    bits: RemovedSet,
}

impl Removed {
    /// The slot, as it was.
    #[must_use]
    pub fn slot(&self) -> &Slot {
        &self.bits.slot
    }

    /// Its frames that went.
    #[must_use]
    pub fn gfns(&self) -> GfnRange {
        self.bits.gfns
    }

    /// The dirty ones, in order.
    pub fn runs(&self) -> impl Iterator<Item = GfnRange> {
        let gfns = self.bits.gfns;
        let runs = self.bits.set.runs(gfns.start().get(), gfns.end().get());
        runs.filter_map(|(from, to)| GfnRange::new(Gfn::new(from), Gfn::new(to)))
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        let _state = self.log.shared.state.lock();
        let bitmap = &self.log.shared.spaces[usize::from(self.bits.slot.address_space().get())];
        // SAFETY: we have the lock.
        unsafe { self.bits.set.clear(bitmap) };
    }
}

/// The logged slots of an address space.
pub(super) fn logged(view: &View, space: AddressSpaceId) -> impl Iterator<Item = &Slot> {
    view.slots(space).filter(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES))
}

/// The part of `gfns`, frames of `old`, whose memory is in `new` at other frames; with the frames there.
pub(super) fn moved_to(old: &Slot, gfns: GfnRange, new: &Slot) -> Option<(GfnRange, GfnRange)> {
    let page = old.page_size();
    let hvas = crate::addr::HvaRange::with_len(old.hva_of(gfns.start())?, page.bytes_of(gfns.len())?)?;
    let same = hvas.intersect(&new.hvas()?)?;
    let pages = same.len() >> page.shift();
    let before = (same.start().get() - hvas.start().get()) >> page.shift();
    let after = (same.start().get() - new.hva()?.get()) >> page.shift();
    let from = GfnRange::with_len(gfns.start().checked_add(before)?, pages)?;
    let to = GfnRange::with_len(new.base_gfn().checked_add(after)?, pages)?;
    (from != to).then_some((from, to))
}

/// Where marks found no memory, every page of every logged slot is dirty.
pub(super) fn spread_everything(shared: &Shared, current: &View) {
    for (bitmap, space) in shared.spaces.iter().zip(current.address_spaces()) {
        if bitmap.take_everything() {
            logged(current, space).for_each(|slot| bitmap.mark_range(slot.gfns()));
        }
    }
}

/// # Safety
/// The caller has the lock.
#[expect(clippy::too_many_arguments, reason = "one step of `harvest_ranges`, apart for its error path")]
unsafe fn take<R: Rearm>(
    shared: &Shared,
    state: &mut State,
    consumer: usize,
    spaces: core::ops::Range<usize>,
    gfns: GfnRange,
    fresh: &mut [Vec<(u64, Held)>; MAX_ADDRESS_SPACES],
    sets: &mut [Set; MAX_ADDRESS_SPACES],
    rearm: &mut R,
) -> Result<(), HarvestError<R::Error>> {
    let (from, to) = (gfns.start().get(), gfns.end().get());
    spread_everything(shared, &state.current);
    let mut armed = false;
    for space in spaces.clone() {
        // SAFETY: the caller has the lock.
        unsafe { shared.spaces[space].take(from, to, &mut fresh[space])? };
        if R::NEEDED {
            let id = AddressSpaceId::new(u8::try_from(space).unwrap_or(u8::MAX));
            for chunk in fresh[space].chunks(1) {
                for (first, end) in Runs::new(chunk, from, to) {
                    if let Some(gfns) = GfnRange::new(Gfn::new(first), Gfn::new(end)) {
                        rearm.rearm(id, gfns).map_err(HarvestError::Rearm)?;
                        armed = true;
                    }
                }
            }
        }
    }
    if armed {
        rearm.flush().map_err(HarvestError::Rearm)?;
    }
    for space in spaces {
        let bitmap = &shared.spaces[space];
        for (number, kept) in state.consumers.iter_mut().enumerate() {
            let Some(kept) = kept else { continue };
            // SAFETY: the caller has the lock.
            unsafe {
                if number == consumer {
                    kept.sets[space].take(bitmap, from, to, &mut sets[space].chunks)?;
                } else {
                    for &(number, held) in &fresh[space] {
                        kept.sets[space].add_copy(bitmap, number, held)?;
                    }
                }
            }
        }
        if sets[space].chunks.is_empty() {
            core::mem::swap(&mut sets[space].chunks, &mut fresh[space]);
        }
        for (number, held) in fresh[space].drain(..) {
            // SAFETY: the caller has the lock.
            unsafe { sets[space].add(bitmap, number, held) };
        }
    }
    Ok(())
}

/// Takes bits of a word from the bitmap, for all consumers, and from what one consumer keeps. Returns those that
/// came from the bitmap, and all.
///
/// # Safety
/// The caller has the lock.
unsafe fn take_word(
    bitmap: &Bitmap,
    state: &mut State,
    consumer: usize,
    space: AddressSpaceId,
    gfn: u64,
    bits: u64,
) -> Result<(u64, u64), OutOfMemory> {
    let (first, space) = (gfn & !63, usize::from(space.get()));
    // SAFETY: passed on.
    unsafe {
        let fresh = bitmap.take_word(gfn, bits)?;
        let mut kept_bits = 0;
        for (number, kept) in state.consumers.iter_mut().enumerate() {
            let Some(kept) = kept else { continue };
            if number == consumer {
                match kept.sets[space].take_word(bitmap, gfn, bits) {
                    Ok(taken) => kept_bits = taken,
                    Err(error) => {
                        remark(bitmap, first, fresh);
                        return Err(error);
                    }
                }
            } else {
                for (from, to) in runs_of(first, fresh) {
                    kept.sets[space].add_range(bitmap, from, to);
                }
            }
        }
        Ok((fresh, fresh | kept_bits))
    }
}

fn rearm_word<R: Rearm>(rearm: &mut R, space: AddressSpaceId, first: u64, bits: u64) -> Result<(), R::Error> {
    for (from, to) in runs_of(first, bits) {
        if let Some(gfns) = GfnRange::new(Gfn::new(from), Gfn::new(to)) {
            rearm.rearm(space, gfns)?;
        }
    }
    Ok(())
}

fn remark(bitmap: &Bitmap, first: u64, bits: u64) {
    for (from, to) in runs_of(first, bits) {
        if let Some(gfns) = GfnRange::new(Gfn::new(from), Gfn::new(to)) {
            bitmap.mark_range(gfns);
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

/// The 64 bits from `gfn` on, of words that start at multiples of 64.
fn unaligned(gfn: u64, word: impl Fn(u64) -> u64) -> u64 {
    match gfn % 64 {
        0 => word(gfn),
        shift => word(gfn) >> shift | word(gfn + 64) << (64 - shift),
    }
}

/// The lowest `pages` bits.
fn up_to(pages: u64) -> u64 {
    if pages >= 64 { u64::MAX } else { (1 << pages) - 1 }
}
