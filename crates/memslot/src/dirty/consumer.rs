//! Consumers: who takes dirty pages, each at its own pace.

use alloc::vec::Vec;

use super::bitmap::Bitmap;
use super::harvest::Harvest;
use super::log::{
    ALL, BitmapError, DirtyLog, Kept, RemovedSet, Shared, State, check_length, each_home, logged, runs_of,
    spread_everything,
};
use super::place::Held;
use super::rearm::Rearm;
use super::runs::Runs;
use super::set::Set;
use crate::addr::{Gfn, GfnRange};
use crate::error::OutOfMemory;
use crate::slot::{AddressSpaceId, Slot, SlotFlags};
use crate::table::{MAX_ADDRESS_SPACES, Snapshot, View};

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
        let mut fresh = Fresh { shared, chunks: Default::default() };
        let sets = &mut harvest.sets;
        // SAFETY: we have the lock.
        let result =
            unsafe { take(shared, &mut state, self.number, spaces, gfns, &mut fresh.chunks, sets, rearm) };
        if result.is_err() {
            for (bitmap, set) in shared.spaces.iter().zip(sets) {
                for (number, held) in set.chunks.drain(..) {
                    // SAFETY: we have the lock, and the chunk is ours.
                    unsafe { bitmap.restore(number, held) };
                }
            }
        }
        drop(fresh);
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
    /// [`HarvestError`]; nothing was taken.
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
        let start = gfns.start().get();
        let mut taken = Cleared { bitmap, first: start, words: Vec::new(), fresh: Vec::new() };
        taken.words.try_reserve_exact(mask.len()).map_err(|_| OutOfMemory)?;
        taken.fresh.try_reserve_exact(mask.len()).map_err(|_| OutOfMemory)?;
        for (at, &bits) in mask.iter().enumerate() {
            let first = start + 64 * at as u64;
            let bits = u64::from_le(bits) & up_to(gfns.end().get() - first);
            taken.words.push(0);
            taken.fresh.push(0);
            for (word, bits) in aligned(first, bits) {
                let bits = if bits == 0 { 0 } else { bits & !unsettled_bits(&state.unsettled, space, word) };
                if bits == 0 {
                    continue;
                }
                // SAFETY: we have the lock.
                let (fresh, all) = unsafe { take_word(bitmap, &mut state, self.number, space, word, bits)? };
                let shift = first % 64;
                let of_mask =
                    |bits: u64| if word <= first { bits >> shift } else { (bits << 1) << (63 - shift) };
                taken.words[at] |= of_mask(all);
                taken.fresh[at] |= of_mask(fresh);
            }
        }
        if taken.fresh.iter().any(|&bits| bits != 0) {
            shared.heavy_fence();
            if R::NEEDED {
                let words = (0u64..).zip(&taken.fresh);
                let words = words.flat_map(|(at, &bits)| aligned(start + 64 * at, bits));
                for (word, bits) in words.filter(|&(_, bits)| bits != 0) {
                    rearm_word(rearm, space, word, bits).map_err(HarvestError::Rearm)?;
                }
                rearm.flush().map_err(HarvestError::Rearm)?;
            }
        }
        // Not put back: they are clean.
        let words = core::mem::take(&mut taken.words);
        Ok(words.iter().map(|bits| u64::from(bits.count_ones())).sum())
    }

    /// The bits of slots that were deleted since the last call, for a consumer that
    /// [keeps them](DirtyLog::consumer_keeping_removed). One entry for every range of frames that went; in order. Pages
    /// that were in a harvest meanwhile, and put back since, are in an entry of their own.
    ///
    /// Whoever asks while a change is under way may get entries of that change, and a listener may refuse it yet: then
    /// the slot is back, and the same pages are dirty there. Or more pages of the same frames come later, in another entry.
    /// Ask after the change to see all of deleted slots, and those only.
    ///
    /// # Errors
    /// [`OutOfMemory`]; they can be asked for again.
    pub fn take_removed(&self) -> Result<Vec<Removed>, OutOfMemory> {
        let mut state = self.log.shared.state.lock();
        let Some(kept) = &mut state.consumers[self.number] else { return Ok(Vec::new()) };
        let mut removed = Vec::new();
        removed.try_reserve_exact(kept.removed.len()).map_err(|_| OutOfMemory)?;
        removed.extend(kept.removed.drain(..).map(|bits| Removed { log: self.log.clone(), bits }));
        if !removed.is_empty() {
            // When the slots went, their bits were taken without.
            self.log.shared.heavy_fence();
        }
        Ok(removed)
    }

    /// Puts bits back that were taken from the slots of `then`. Memory that has moved since is dirty where it is now;
    /// what is gone is handed over, if the consumer keeps that; what is not logged any more is nobody's.
    pub(super) fn keep(&self, sets: &mut [Set; MAX_ADDRESS_SPACES], then: &Snapshot) {
        let shared = &*self.log.shared;
        let mut state = shared.state.lock();
        let state = &mut *state;
        let Some(kept) = &mut state.consumers[self.number] else { return };
        let is_same = then.generation() == state.current.generation();
        state.put_back |= !is_same && !state.unsettled.is_empty();
        let Kept { sets: kept, keeps_removed, removed } = kept;
        for ((bitmap, kept), (space, set)) in
            shared.spaces.iter().zip(kept).zip(then.address_spaces().zip(sets))
        {
            if !is_same {
                for slot in logged(then, space) {
                    let mut gone = keeps_removed.then(Set::default);
                    for (from, to) in set.runs(slot.base_gfn().get(), slot.gfns().end().get()) {
                        keep_moved(bitmap, kept, gone.as_mut(), (then, &state.current), slot, (from, to));
                    }
                    if let Some(gone) = gone {
                        // SAFETY: we have the lock.
                        unsafe { hand_over(bitmap, removed, &state.current, slot, gone) };
                    }
                }
            }
            for (number, held) in set.chunks.drain(..) {
                // SAFETY: we have the lock.
                unsafe {
                    if is_same { kept.add(bitmap, number, held) } else { bitmap.give_back(number, held) }
                };
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

    /// Its frames that went. The memory of a part of them may have gone on elsewhere, under another id: there its
    /// dirty bits are, and not in [`runs`](Self::runs).
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

/// Chunks that were taken from the bitmaps and are nobody's yet. What is left here goes back, also where
/// [`Rearm`] panics. Dropped before the lock is let go of.
struct Fresh<'a> {
    shared: &'a Shared,
    chunks: [Vec<(u64, Held)>; MAX_ADDRESS_SPACES],
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        for (bitmap, chunks) in self.shared.spaces.iter().zip(&mut self.chunks) {
            for (number, held) in chunks.drain(..) {
                // SAFETY: the lock is held, and the chunk is ours.
                unsafe { bitmap.restore(number, held) };
            }
        }
    }
}

/// The bits that a clear has taken, laid out as its mask. They go back unless they are kept away.
struct Cleared<'a> {
    bitmap: &'a Bitmap,
    first: u64,
    words: Vec<u64>,
    /// Those of them that were in the bitmap.
    fresh: Vec<u64>,
}

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        for (at, &bits) in self.words.iter().enumerate() {
            remark(self.bitmap, self.first + 64 * at as u64, bits);
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
        unsafe {
            shared.spaces[space].take(from, to, &mut fresh[space])?;
            let back = |number, held| shared.spaces[space].restore(number, held);
            leave(&shared.spaces[space], &state.unsettled, space, &mut fresh[space], back)?;
        }
    }
    if fresh.iter().any(|chunks| !chunks.is_empty()) {
        shared.heavy_fence();
    }
    for space in spaces.clone() {
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
        let State { consumers, unsettled, .. } = state;
        for (number, kept) in consumers.iter_mut().enumerate() {
            let Some(kept) = kept else { continue };
            // SAFETY: the caller has the lock.
            unsafe {
                if number == consumer {
                    let (kept, own) = (&mut kept.sets[space], &mut sets[space].chunks);
                    kept.take(bitmap, from, to, own)?;
                    leave(bitmap, unsettled, space, own, |number, held| kept.add(bitmap, number, held))?;
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

/// Gives the bits of frames that are not settled back.
///
/// # Safety
/// The caller has the lock.
unsafe fn leave(
    bitmap: &Bitmap,
    unsettled: &[(AddressSpaceId, GfnRange)],
    space: usize,
    chunks: &mut Vec<(u64, Held)>,
    mut back: impl FnMut(u64, Held),
) -> Result<(), OutOfMemory> {
    for (_, gfns) in unsettled.iter().filter(|(of, _)| usize::from(of.get()) == space) {
        let mut set = Set { chunks: core::mem::take(chunks) };
        let mut left = Vec::new();
        // SAFETY: passed on.
        let result = unsafe { set.take(bitmap, gfns.start().get(), gfns.end().get(), &mut left) };
        *chunks = set.chunks;
        left.drain(..).for_each(|(number, held)| back(number, held));
        result?;
    }
    Ok(())
}

/// Those of the 64 pages from `first` on that are not settled.
fn unsettled_bits(unsettled: &[(AddressSpaceId, GfnRange)], space: AddressSpaceId, first: u64) -> u64 {
    let of_space = unsettled.iter().filter(|(of, _)| *of == space);
    of_space.fold(0, |bits, (_, gfns)| {
        let (from, to) = (gfns.start().get().max(first), gfns.end().get().min(first.saturating_add(64)));
        if from < to { bits | up_to(to - from) << (from - first) } else { bits }
    })
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

/// Adds the pages `[from, to)` of a slot that was logged, wherever their memory is logged now; those that are gone to
/// `gone`. The caller has the lock.
fn keep_moved(
    bitmap: &Bitmap,
    kept: &mut Set,
    mut gone: Option<&mut Set>,
    (then, now): (&View, &View),
    slot: &Slot,
    (from, to): (u64, u64),
) {
    let Some(gfns) = GfnRange::new(Gfn::new(from), Gfn::new(to)) else { return };
    if let Some(gone) = &mut gone {
        // SAFETY: the caller has the lock.
        unsafe { gone.add_range(bitmap, from, to) };
    }
    each_home(then, slot, gfns, now, |new, was, home| {
        let is_logged = new.flags().contains(SlotFlags::LOG_DIRTY_PAGES);
        if is_logged {
            // SAFETY: the caller has the lock.
            unsafe { kept.add_range(bitmap, home.start().get(), home.end().get()) };
        }
        if let Some(gone) = gone.as_mut().filter(|_| is_logged || was == home) {
            let mut here = Set::default();
            // Without memory they are handed over besides.
            // SAFETY: the caller has the lock.
            unsafe {
                _ = gone.take(bitmap, was.start().get(), was.end().get(), &mut here.chunks);
                here.clear(bitmap);
            }
        }
    });
}

/// Hands over pages of a slot that has gone, or of a part of it.
///
/// # Safety
/// The caller has the lock.
unsafe fn hand_over(bitmap: &Bitmap, removed: &mut Vec<RemovedSet>, now: &View, slot: &Slot, mut gone: Set) {
    let runs = || gone.runs(slot.base_gfn().get(), slot.gfns().end().get());
    let gfns = runs().next().zip(runs().last());
    let gfns = gfns.and_then(|((first, _), (_, end))| GfnRange::new(Gfn::new(first), Gfn::new(end)));
    match gfns {
        Some(gfns) if removed.try_reserve(1).is_ok() => {
            removed.push(RemovedSet { generation: now.generation(), slot: *slot, gfns, set: gone });
        }
        // SAFETY: passed on.
        _ => unsafe { gone.clear(bitmap) },
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

/// The 64 bits from `gfn` on, of words that start at multiples of 64. What lies behind the last gfn is not asked for.
fn unaligned(gfn: u64, word: impl Fn(u64) -> u64) -> u64 {
    match gfn % 64 {
        0 => word(gfn),
        shift => word(gfn) >> shift | word(gfn.wrapping_add(64)) << (64 - shift),
    }
}

/// The same 64 bits from `gfn` on, as parts of the two words that start at multiples of 64; the second may be empty.
fn aligned(gfn: u64, bits: u64) -> [(u64, u64); 2] {
    let shift = gfn % 64;
    [(gfn - shift, bits << shift), ((gfn - shift).wrapping_add(64), (bits >> 1) >> (63 - shift))]
}

/// The lowest `pages` bits.
fn up_to(pages: u64) -> u64 {
    if pages >= 64 { u64::MAX } else { (1 << pages) - 1 }
}
