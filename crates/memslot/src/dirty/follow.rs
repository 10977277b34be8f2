//! What becomes of dirty bits when slots change.
//!
//! Bits belong to gfns, so most changes need nothing: a split, merge, grown, shrunk or read-only slot has its bits
//! where they were. What is left:
//!
//! | change | bits |
//! |---|---|
//! | logging starts, or a logged slot is created | what is there is stale and goes; all are set with `INITIALLY_SET` |
//! | logging stops | go |
//! | the memory moves to other frames | go with it |
//! | a slot is deleted | go, or to the consumers that keep them |
//!
//! Readers are not waited for, so a late writer may mark pages of the version before at any time. The bits of frames
//! that lose their slot are therefore taken three times: before the new version is published, when whose they are is
//! certain, then when the log hears of it, and again when all listeners have: page tables find out only while they
//! unmap the slot what was written to it until then, and mark it. What comes in between is the old slot's if nothing else
//! is logged there now, and counts for both if something is; but what comes last, only if nothing is. (Later still, [`DirtyLog::mark_through`](super::DirtyLog::mark_through) finds the
//! slot's new place by itself.)
//!
//! What was taken is brought to where its memory is, or handed over, when all listeners have followed. Until then a change
//! that is taken back finds it as it was, and what was marked at the new place apart from it. Memory that
//! was not logged in between is dirty as a whole then: nobody had to mark it. Pages that it had set initially stay dirty, where
//! they are logged by another slot: a late mark may be among them.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::bitmap::Bitmap;
use super::log::{RemovedSet, Shared, State, same_memory, spread_everything};
use super::place::Held;
use super::runs::Runs;
use super::set::Set;
use crate::addr::{Gfn, GfnRange};
use crate::error::OutOfMemory;
use crate::listener::{Listener, ListenerError, PieceKind, Update};
use crate::slot::{AddressSpaceId, Slot, SlotFlags};
use crate::sync::{Ordering, fence};
use crate::table::Snapshot;

/// The log as a listener of its table.
pub(super) struct Follower {
    shared: Arc<Shared>,
    taken: Vec<Taken>,
    /// What the last change published instead of.
    previous: Option<Snapshot>,
}

/// Frames that lost their logged slot.
struct Taken {
    old: Slot,
    gfns: GfnRange,
    /// Whether the frames lost their memory, not just their logging.
    removed: bool,
    bits: Bits,
    /// With room for what each consumer that keeps removed bits may get.
    handed_over: Vec<Set>,
    /// There was no memory to find out what was marked late.
    is_incomplete: bool,
}

/// The bits of some frames, taken from everybody who had them.
struct Bits {
    space: AddressSpaceId,
    gfns: GfnRange,
    /// From the bitmap. A chunk may appear more than once.
    fresh: Vec<(u64, Held)>,
    /// From each consumer, by its number.
    kept: Vec<Vec<(u64, Held)>>,
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, taken: Vec::new(), previous: None }
    }

    fn try_prepare(&mut self, update: &Update<'_>) -> Result<(), OutOfMemory> {
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        spread_everything(shared, &state.current);
        state.settle();
        state.unsettled.try_reserve(update.pieces.len()).map_err(|_| OutOfMemory)?;
        let open = update.pieces.iter().filter(|piece| lost(&piece.kind).is_some() || gained(&piece.kind));
        state.unsettled.extend(open.map(|piece| (piece.address_space, piece.gfns)));
        let leaving = update.pieces.iter().filter(|piece| lost(&piece.kind).is_some()).count();
        self.taken.try_reserve(leaving).map_err(|_| OutOfMemory)?;
        for kept in state.consumers.iter_mut().flatten().filter(|kept| kept.keeps_removed) {
            // Twice for each: a consumer may take what was handed over before all listeners have heard of the change.
            kept.removed.try_reserve(2 * leaving).map_err(|_| OutOfMemory)?;
        }
        for piece in update.pieces {
            let bitmap = &shared.spaces[usize::from(piece.address_space.get())];
            if let Some((old, removed)) = lost(&piece.kind) {
                let bits = Bits::none(piece.address_space, piece.gfns, state.consumers.len())?;
                let gfns = piece.gfns;
                self.taken.push(Taken {
                    old,
                    gfns,
                    removed,
                    bits,
                    handed_over: Vec::new(),
                    is_incomplete: false,
                });
                if let Some(taken) = self.taken.last_mut() {
                    taken.prepare_handing_over(&state)?;
                    taken.bits.take(bitmap, &mut state)?;
                }
            } else if gained(&piece.kind) {
                bitmap.reserve(piece.gfns)?;
                // Frames that another logged slot has until then are no stale ones: a piece of it has the same gfns.
                let is_new = |it: &Taken| (it.bits.space, it.bits.gfns) != (piece.address_space, piece.gfns);
                if !self.taken.iter().all(is_new) {
                    continue;
                }
                let mut stale = Bits::none(piece.address_space, piece.gfns, state.consumers.len())?;
                let result = stale.take(bitmap, &mut state);
                stale.forget(shared);
                result?;
            }
        }
        Ok(())
    }
}

impl Follower {
    /// A change that was published is taken back: what was marked where memory had moved goes to where it is again.
    ///
    /// Among these are marks of the version before: of late writers, and of listeners that find out what was written to a
    /// slot while they unmap it. So they count for the slot that is logged there again, too.
    fn bring_back(&self, shared: &Shared, state: &mut State, update: &Update<'_>) {
        // Whoever marks through that version later finds out by itself: see `mark_through`.
        shared.withdrawn.store(update.after.generation(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // What moved goes back, with what was marked at the new place since: all is taken before any is put back.
        // Where the new version did not log, nobody had to mark: all of it may have been written.
        for taken in &self.taken {
            let is_unlogged = |slot: &Slot| slot.address_space() == taken.bits.space && !logs(slot);
            let now = update.slots.iter().filter_map(|change| change.new).filter(is_unlogged);
            let moved = now.filter_map(|slot| same_memory(&taken.old, taken.bits.gfns, &slot));
            moved.for_each(|(from, _)| taken.bits.bitmap(shared).mark_range(from));
            if !taken.removed {
                taken.bits.bitmap(shared).mark_range(taken.bits.gfns);
            }
        }
        let mut back = Vec::new();
        for taken in self.taken.iter().filter(|taken| taken.removed) {
            for (from, to) in taken.moves(update) {
                let bitmap = taken.bits.bitmap(shared);
                let bits = Bits::none(taken.bits.space, to, state.consumers.len()).and_then(|mut bits| {
                    back.try_reserve(1).map_err(|_| OutOfMemory)?;
                    let result = bits.take(bitmap, state);
                    back.push((from, bits));
                    result
                });
                if bits.is_err() {
                    // What was written at the new place is not known: so all of it.
                    bitmap.mark_range(from);
                }
            }
        }
        for (from, bits) in back {
            bits.copy(shared, state, bits.gfns, from);
            let before = update.before.slots_in(bits.space, bits.gfns);
            for piece in before.filter(|piece| logs(piece.slot)) {
                bits.copy(shared, state, piece.gfns, piece.gfns);
            }
            bits.forget(shared);
        }
    }
}

impl Listener for Follower {
    fn name(&self) -> &str {
        "dirty log"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        self.try_prepare(update).map_err(|error| {
            self.abort(update);
            Box::from(error)
        })
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        // Pairs with the fence in `mark_through`: a mark that is not seen here sees the new version.
        fence(Ordering::SeqCst);
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        if let Some(snapshot) = update.snapshot() {
            self.previous = Some(core::mem::replace(&mut state.current, snapshot));
        }
        for taken in &mut self.taken {
            taken.is_incomplete = taken.bits.take_late(shared, &mut state).is_err();
        }
        // What was taken is brought to where its memory is when nothing is taken back any more: until then what is marked
        // there is of this change alone.
        if shared.initially_set.load(Ordering::SeqCst) {
            for piece in update.pieces.iter().filter(|piece| gained(&piece.kind)) {
                let bitmap = &shared.spaces[usize::from(piece.address_space.get())];
                // Memory that moved here was logged before.
                let here = self.taken.iter().filter(|it| it.removed && it.bits.space == piece.address_space);
                let moved = || here.clone().flat_map(|taken| taken.moves(update).map(|(_, to)| to));
                gaps(piece.gfns, moved).for_each(|gfns| bitmap.mark_range(gfns));
            }
        }
        // What is not settled stays so: listeners behind this one may mark it.
        Ok(())
    }

    fn undo(&mut self, update: &Update<'_>) {
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        let generation = update.after.generation();
        for kept in state.consumers.iter_mut().flatten() {
            while kept.removed.last().is_some_and(|removed| removed.generation == generation) {
                if let Some(mut removed) = kept.removed.pop() {
                    let bitmap = &shared.spaces[usize::from(removed.slot.address_space().get())];
                    // SAFETY: we have the lock.
                    unsafe { removed.set.clear(bitmap) };
                }
            }
        }
        self.bring_back(shared, &mut state, update);
        if state.put_back {
            shared.spaces.iter().for_each(Bitmap::mark_everything);
        }
        if let Some(previous) = self.previous.take() {
            state.current = previous;
        }
        for taken in self.taken.drain(..) {
            taken.bits.restore(shared, &mut state);
        }
        state.settle();
    }

    fn settled(&mut self, update: &Update<'_>) {
        // Or the version before would live, with all that it keeps alive, until the next change.
        self.previous = None;
        let mut state = self.shared.state.lock();
        for mut taken in self.taken.drain(..) {
            if taken.removed {
                taken.settle(&self.shared, &mut state, update);
                taken.settle_late(&self.shared, &mut state, update);
            }
            taken.bits.forget(&self.shared);
        }
        state.settle();
    }

    fn abort(&mut self, update: &Update<'_>) {
        let mut state = self.shared.state.lock();
        // Another listener may have failed to commit: readers have seen the new version all the same.
        if update.snapshot().is_some() {
            self.bring_back(&self.shared, &mut state, update);
        }
        for taken in self.taken.drain(..) {
            taken.bits.restore(&self.shared, &mut state);
        }
        state.settle();
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _state = self.shared.state.lock();
        for taken in self.taken.drain(..) {
            taken.bits.forget(&self.shared);
        }
    }
}

impl Taken {
    /// Where parts of the frames' memory are after the update: from, to. These may be the same frames, where a slot has
    /// become one of another kind.
    fn moves<'a>(&'a self, update: &'a Update<'_>) -> impl Iterator<Item = (GfnRange, GfnRange)> + 'a {
        let new = update.slots.iter().filter_map(|change| change.new);
        let new = new.filter(move |slot| slot.address_space() == self.bits.space && logs(slot));
        new.filter_map(|slot| same_memory(&self.old, self.gfns, &slot))
    }

    fn prepare_handing_over(&mut self, state: &State) -> Result<(), OutOfMemory> {
        let keepers = state.consumers.iter().flatten().filter(|kept| kept.keeps_removed).count();
        self.handed_over.try_reserve_exact(keepers).map_err(|_| OutOfMemory)?;
        self.handed_over.resize_with(keepers, Set::default);
        self.handed_over.iter_mut().try_for_each(|set| set.reserve(self.bits.gfns))
    }

    /// Brings bits to where their memory is now, and the rest to the consumers that keep what was removed.
    fn settle(&mut self, shared: &Shared, state: &mut State, update: &Update<'_>) {
        for (from, to) in self.moves(update) {
            self.bits.copy(shared, state, from, to);
        }
        let mut rooms = core::mem::take(&mut self.handed_over);
        for gone in gaps(self.gfns, || self.moves(update).map(|(from, _)| from)) {
            self.hand_over(shared, state, &mut rooms, update, gone);
        }
        self.handed_over = rooms;
    }

    /// Brings what listeners behind this one have marked to where the memory is now, or hands it over; of frames that are
    /// not logged now. (Of others it cannot be told from what is the new slot's.)
    fn settle_late(&mut self, shared: &Shared, state: &mut State, update: &Update<'_>) {
        let mut rooms = core::mem::take(&mut self.handed_over);
        let (current, space) = (state.current.clone(), self.bits.space);
        let mut at = self.gfns.start();
        // One after the other, as taking changes what is asked.
        while let Some(gone) = {
            let logged = || current.slots_in(space, self.gfns).filter(|piece| logs(piece.slot));
            let logged = || logged().map(|piece| piece.gfns);
            GfnRange::new(at, self.gfns.end()).and_then(|rest| gaps(rest, logged).next())
        } {
            at = gone.end();
            self.bits.empty(shared);
            self.bits.gfns = gone;
            let bitmap = &shared.spaces[usize::from(space.get())];
            let result = self.bits.take(bitmap, state).inspect_err(|_| bitmap.mark_everything());
            self.is_incomplete = result.is_err();
            for (from, to) in self.moves(update) {
                let Some(part) = from.intersect(&gone) else { continue };
                let skipped = part.start().get() - from.start().get();
                let there = to.start().checked_add(skipped).and_then(|to| GfnRange::with_len(to, part.len()));
                there.into_iter().for_each(|to| self.bits.copy(shared, state, part, to));
            }
            for gone in gaps(gone, || self.moves(update).map(|(from, _)| from)) {
                self.hand_over(shared, state, &mut rooms, update, gone);
            }
        }
    }

    /// Hands bits of some of the frames to the consumers that keep them; for the second time, what has come since.
    /// `rooms` are sets with room for them.
    fn hand_over(
        &self,
        shared: &Shared,
        state: &mut State,
        rooms: &mut Vec<Set>,
        update: &Update<'_>,
        gone: GfnRange,
    ) {
        let (gfns, generation) = (self.gfns, update.after.generation());
        for (number, kept) in state.consumers.iter_mut().enumerate() {
            let Some(kept) = kept.as_mut().filter(|kept| kept.keeps_removed) else { continue };
            let is_same =
                |it: &&mut RemovedSet| (it.generation, it.slot, it.gfns) == (generation, self.old, gfns);
            let before = kept.removed.iter_mut().rev().find(is_same);
            let is_first = before.is_none();
            // A consumer that is new since the preparation gets what there is memory for.
            let mut own = if is_first { rooms.pop().unwrap_or_default() } else { Set::default() };
            let set = before.map_or(&mut own, |removed| &mut removed.set);
            if self.is_incomplete {
                // SAFETY: the caller has the lock.
                unsafe { set.add_range(self.bits.bitmap(shared), gone.start().get(), gone.end().get()) };
            }
            self.bits.add_to(set, shared, number, gone);
            if !is_first {
                continue;
            }
            if own.chunks.is_empty() {
                if rooms.len() < rooms.capacity() {
                    rooms.insert(0, own);
                }
            } else if kept.removed.try_reserve(1).is_ok() {
                kept.removed.push(RemovedSet { generation, slot: self.old, gfns, set: own });
            } else {
                // SAFETY: the caller has the lock.
                unsafe { own.clear(self.bits.bitmap(shared)) };
            }
        }
    }
}

/// The caller of each of these has the log's lock.
impl Bits {
    fn none(space: AddressSpaceId, gfns: GfnRange, consumers: usize) -> Result<Self, OutOfMemory> {
        let mut kept = Vec::new();
        kept.try_reserve_exact(consumers).map_err(|_| OutOfMemory)?;
        kept.resize_with(consumers, Vec::new);
        Ok(Self { space, gfns, fresh: Vec::new(), kept })
    }

    fn bitmap<'a>(&self, shared: &'a Shared) -> &'a Bitmap {
        &shared.spaces[usize::from(self.space.get())]
    }

    /// Takes the bits of the frames from the bitmap and from every consumer.
    fn take(&mut self, bitmap: &Bitmap, state: &mut State) -> Result<(), OutOfMemory> {
        let (from, to) = (self.gfns.start().get(), self.gfns.end().get());
        // SAFETY: the caller has the lock.
        unsafe {
            bitmap.take(from, to, &mut self.fresh)?;
            for (kept, got) in state.consumers.iter_mut().zip(&mut self.kept) {
                if let Some(kept) = kept {
                    kept.sets[usize::from(self.space.get())].take(bitmap, from, to, got)?;
                }
            }
        }
        Ok(())
    }

    /// Takes what was marked since; where another logged slot is there now, it keeps the marks, too.
    ///
    /// # Errors
    /// [`OutOfMemory`]. Whose the marks are is open then: they stay, and all memory counts as dirty, wherever it is now.
    /// What is gone counts as dirty by the caller.
    fn take_late(&mut self, shared: &Shared, state: &mut State) -> Result<(), OutOfMemory> {
        let bitmap = self.bitmap(shared);
        let before = self.fresh.len();
        let result = self.take(bitmap, state).inspect_err(|_| bitmap.mark_everything());
        for piece in state.current.slots_in(self.space, self.gfns).filter(|piece| logs(piece.slot)) {
            for (from, to) in bits_of(&self.fresh[before..], piece.gfns) {
                mark(bitmap, from, to);
            }
        }
        result
    }

    /// Adds all that a consumer would have seen of some of the frames.
    fn add_to(&self, set: &mut Set, shared: &Shared, number: usize, gfns: GfnRange) {
        let own = self.kept.get(number).map_or(&[][..], Vec::as_slice);
        for (from, to) in bits_of(&self.fresh, gfns).chain(bits_of(own, gfns)) {
            // SAFETY: the caller has the lock.
            unsafe { set.add_range(self.bitmap(shared), from, to) };
        }
    }

    /// Copies the bits of the frames `from` to the frames `to`.
    fn copy(&self, shared: &Shared, state: &mut State, from: GfnRange, to: GfnRange) {
        let bitmap = self.bitmap(shared);
        let there = |gfn: u64| gfn - from.start().get() + to.start().get();
        for (first, end) in bits_of(&self.fresh, from) {
            mark(bitmap, there(first), there(end));
        }
        for (kept, own) in state.consumers.iter_mut().zip(&self.kept) {
            let Some(kept) = kept else { continue };
            let set = &mut kept.sets[usize::from(self.space.get())];
            for (first, end) in bits_of(own, from) {
                // SAFETY: the caller has the lock.
                unsafe { set.add_range(bitmap, there(first), there(end)) };
            }
        }
    }

    /// Puts everything back where it came from.
    fn restore(self, shared: &Shared, state: &mut State) {
        let (bitmap, space) = (self.bitmap(shared), usize::from(self.space.get()));
        // SAFETY: the caller has the lock.
        unsafe {
            for (number, held) in self.fresh {
                bitmap.restore(number, held);
            }
            for (at, own) in self.kept.into_iter().enumerate() {
                for (number, held) in own {
                    match state.consumers.get_mut(at) {
                        Some(Some(kept)) => kept.sets[space].add(bitmap, number, held),
                        _ => bitmap.give_back(number, held),
                    }
                }
            }
        }
    }

    /// Lets go of everything.
    fn forget(mut self, shared: &Shared) {
        self.empty(shared);
    }

    /// Lets go of all bits, and keeps the room for others.
    fn empty(&mut self, shared: &Shared) {
        let bitmap = &shared.spaces[usize::from(self.space.get())];
        let kept = self.kept.iter_mut().flat_map(|own| own.drain(..));
        for (number, held) in self.fresh.drain(..).chain(kept) {
            // SAFETY: the caller has the lock.
            unsafe { bitmap.give_back(number, held) };
        }
    }
}

/// The parts of `gfns` that are in none of some ranges, which may overlap and come in any order.
fn gaps<I: Iterator<Item = GfnRange>>(
    gfns: GfnRange,
    ranges: impl Fn() -> I,
) -> impl Iterator<Item = GfnRange> {
    let mut at = gfns.start();
    core::iter::from_fn(move || {
        while at < gfns.end() {
            let next = ranges().filter(|range| range.end() > at).min_by_key(GfnRange::start);
            let next = next.filter(|range| range.start() < gfns.end());
            let gap = GfnRange::new(at, next.map_or(gfns.end(), |range| range.start().max(at)))?;
            at = next.map_or(gfns.end(), |range| range.end());
            if !gap.is_empty() {
                return Some(gap);
            }
        }
        None
    })
}

fn logs(slot: &Slot) -> bool {
    slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
}

/// Runs of set bits; where a chunk appears twice, a run may, too.
fn bits_of(chunks: &[(u64, Held)], gfns: GfnRange) -> impl Iterator<Item = (u64, u64)> {
    let chunks = chunks.chunks(1);
    chunks.flat_map(move |chunk| Runs::new(chunk, gfns.start().get(), gfns.end().get()))
}

fn mark(bitmap: &Bitmap, from: u64, to: u64) {
    if let Some(gfns) = GfnRange::new(Gfn::new(from), Gfn::new(to)) {
        bitmap.mark_range(gfns);
    }
}

/// The slot that no longer logs these frames, and whether it no longer has them either.
fn lost(kind: &PieceKind) -> Option<(Slot, bool)> {
    match kind {
        PieceKind::Removed { old } if logs(old) => Some((*old, true)),
        PieceKind::Changed { old, new } if logs(old) && !logs(new) => Some((*old, false)),
        _ => None,
    }
}

/// Whether these frames are logged and were not.
fn gained(kind: &PieceKind) -> bool {
    match kind {
        PieceKind::Added { new } => logs(new),
        PieceKind::Changed { old, new } => !logs(old) && logs(new),
        PieceKind::Removed { .. } => false,
    }
}
