//! A transaction: many operations, one generation, or nothing.
//!
//! Operations work on a *working version*, a fork of the current one that only the writer sees. They are
//! checked at once for all that concerns their own slot, and the id index, which holds the slots, is changed at
//! once, so that a later operation sees what an earlier one did. The other two indexes follow at the end, from
//! the difference between the two id indexes: first every slot that goes is taken out, then every slot that
//! comes is put in, and only there is overlap an error. So two slots may change places in one transaction, and
//! a slot that is created and deleted again costs nothing.
//!
//! Several changes are sorted for each index, so that neighbours in it go down its tree together. Of several
//! overlaps, the one to report is that of the first change in the order of ids; a sorted batch may meet another
//! one first. So a batch that meets any is undone, and what it did is done again one by one.

use alloc::vec::Vec;

use super::gfn_index::{Failure, GfnIndex, Piece};
use super::hva_index::Interval;
use super::node::Arena;
use super::view::View;
use crate::addr::{Gfn, GfnRange};
use crate::error::{OutOfMemory, Reason, TransactionError};
use crate::listener::SlotChange;
use crate::slot::{AddressSpaceId, Backing, Slot, SlotFlags, SlotId, SlotSpec};

/// A slot id that some operation has touched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Touch {
    space: AddressSpaceId,
    id: SlotId,
    /// The last operation that touched it is the one to blame for an overlap.
    operation: usize,
}

/// Lists that a transaction fills; kept between transactions so that a small one allocates nothing.
pub(super) struct Lists {
    touched: Vec<Touch>,
    pub(super) changes: Vec<SlotChange>,
    operations: Vec<usize>,
    pieces: Vec<Piece>,
    merged: Vec<Piece>,
    intervals: Vec<Interval>,
}

impl Lists {
    pub(super) const fn new() -> Self {
        Self {
            touched: Vec::new(),
            changes: Vec::new(),
            operations: Vec::new(),
            pieces: Vec::new(),
            merged: Vec::new(),
            intervals: Vec::new(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.touched.capacity() * size_of::<Touch>()
            + self.changes.capacity() * size_of::<SlotChange>()
            + self.operations.capacity() * size_of::<usize>()
            + (self.pieces.capacity() + self.merged.capacity()) * size_of::<Piece>()
            + self.intervals.capacity() * size_of::<Interval>()
    }
}

/// Operations to be published together; made by [`SlotTable::transaction`](crate::SlotTable::transaction).
///
/// A failed operation fails the whole transaction, whether or not the closure passes the error on.
pub struct Transaction<'t> {
    base: &'t View,
    working: View,
    arena: &'t mut Arena,
    lists: &'t mut Lists,
    operations: usize,
    failed: Option<usize>,
    /// What the first operation that changed a slot did. If it was the only one, that is all there is to know.
    first: SlotChange,
    done: bool,
}

type Outcome = Result<(), TransactionError>;

impl<'t> Transaction<'t> {
    pub(super) fn new(base: &'t View, arena: &'t mut Arena, lists: &'t mut Lists) -> Self {
        lists.touched.clear();
        lists.changes.clear();
        lists.operations.clear();
        let working = base.fork(arena.stamp);
        let first = SlotChange { old: None, new: None };
        Self { base, working, arena, lists, operations: 0, failed: None, first, done: false }
    }

    /// The slot with this id as the operations so far have left it.
    #[must_use]
    pub fn slot(&self, space: AddressSpaceId, id: SlotId) -> Option<&Slot> {
        self.working.slot(space, id)
    }

    /// Creates a slot. Its id must be free, and when the transaction ends, its frames too.
    ///
    /// # Errors
    /// Any [`Reason`] that concerns the slot itself; [`Reason::Overlap`] comes from the end of the transaction.
    pub fn create(&mut self, spec: SlotSpec) -> Outcome {
        self.operation(|tx| {
            if let Some(by) = tx.existing(spec.address_space, spec.id)? {
                return Err(Reason::IdInUse { by });
            }
            let slot = tx.valid(&spec)?;
            tx.put(spec.address_space, spec.id, None, Some(slot))
        })
    }

    /// Deletes a slot.
    ///
    /// # Errors
    /// [`Reason::NoSuchSlot`], [`Reason::OutOfMemory`].
    pub fn delete(&mut self, space: AddressSpaceId, id: SlotId) -> Outcome {
        self.operation(|tx| {
            let slot = tx.find(space, id)?;
            tx.put(space, id, Some(&slot), None)
        })
    }

    /// Moves a slot to other frames. Its backing moves along.
    ///
    /// # Errors
    /// [`Reason::NoSuchSlot`], [`Reason::MovedTooHigh`]; [`Reason::Overlap`] at the end of the transaction.
    pub fn move_to(&mut self, space: AddressSpaceId, id: SlotId, to: Gfn) -> Outcome {
        self.operation(|tx| {
            let slot = tx.find(space, id)?;
            let gfns = GfnRange::with_len(to, slot.pages()).ok_or(Reason::MovedTooHigh { id, to })?;
            tx.replace(&slot, SlotSpec { gfns, ..slot.spec() })
        })
    }

    /// Gives a slot other flags; unlike KVM, also [`READONLY`](SlotFlags::READONLY).
    ///
    /// # Errors
    /// [`Reason::NoSuchSlot`], [`Reason::OutOfMemory`].
    pub fn set_flags(&mut self, space: AddressSpaceId, id: SlotId, flags: SlotFlags) -> Outcome {
        self.operation(|tx| {
            let slot = tx.find(space, id)?;
            tx.replace(&slot, SlotSpec { flags, ..slot.spec() })
        })
    }

    /// Makes a slot read-only, or writable again, and leaves its other flags.
    ///
    /// # Errors
    /// As [`set_flags`](Self::set_flags).
    pub fn set_read_only(&mut self, space: AddressSpaceId, id: SlotId, read_only: bool) -> Outcome {
        self.operation(|tx| {
            let slot = tx.find(space, id)?;
            let mut flags = slot.flags();
            flags.set(SlotFlags::READONLY, read_only);
            tx.replace(&slot, SlotSpec { flags, ..slot.spec() })
        })
    }

    /// Grows or shrinks a slot at its end. What stays keeps its backing.
    ///
    /// # Errors
    /// [`Reason::NoSuchSlot`], [`Reason::BadLength`], [`Reason::BackingWraps`]; [`Reason::Overlap`] at the end.
    pub fn resize(&mut self, space: AddressSpaceId, id: SlotId, pages: u64) -> Outcome {
        self.operation(|tx| {
            let slot = tx.find(space, id)?;
            let limit = tx.base.limits.pages_per_slot;
            let gfns =
                GfnRange::with_len(slot.base_gfn(), pages).ok_or(Reason::BadLength { id, pages, limit })?;
            tx.replace(&slot, SlotSpec { gfns, ..slot.spec() })
        })
    }

    /// Splits a slot in two at frame `at`, which must lie strictly inside of it. The low part keeps the id, the
    /// high part gets `high`. Both keep flags and backing.
    ///
    /// # Errors
    /// [`Reason::NoSuchSlot`], [`Reason::IdInUse`], [`Reason::NotInside`], [`Reason::IdTooHigh`].
    pub fn split(&mut self, space: AddressSpaceId, id: SlotId, at: Gfn, high: SlotId) -> Outcome {
        self.operation(|tx| {
            let slot = tx.find(space, id)?;
            if let Some(by) = tx.existing(space, high)? {
                return Err(Reason::IdInUse { by });
            }
            let not_inside = Reason::NotInside { slot, at };
            if at <= slot.base_gfn() || at >= slot.gfns().end() {
                return Err(not_inside);
            }
            let low_gfns = GfnRange::new(slot.base_gfn(), at);
            let high_gfns = GfnRange::new(at, slot.gfns().end());
            let (Some(low_gfns), Some(high_gfns)) = (low_gfns, high_gfns) else { return Err(not_inside) };
            let bytes = slot.page_size().bytes_of(low_gfns.len());
            let Some(backing) = bytes.and_then(|bytes| slot.backing().advanced(bytes)) else {
                return Err(not_inside);
            };
            tx.replace(&slot, SlotSpec { gfns: low_gfns, ..slot.spec() })?;
            let upper = tx.valid(&SlotSpec { id: high, gfns: high_gfns, backing, ..slot.spec() })?;
            tx.put(space, high, None, Some(upper))
        })
    }

    /// Makes one slot of two neighbours: `high` must start, in the guest and in its backing, where `low` ends,
    /// and have the same flags. The result keeps the id of `low`; the id of `high` becomes free.
    ///
    /// # Errors
    /// [`Reason::NoSuchSlot`], [`Reason::NotNeighbours`], [`Reason::NotAlike`], [`Reason::BadLength`].
    pub fn merge(&mut self, space: AddressSpaceId, low: SlotId, high: SlotId) -> Outcome {
        self.operation(|tx| {
            let (low, high) = (tx.find(space, low)?, tx.find(space, high)?);
            if low.gfns().end() != high.base_gfn() {
                return Err(Reason::NotNeighbours { low, high });
            }
            if low.flags() != high.flags() {
                return Err(Reason::NotAlike { low, high, what: "their flags" });
            }
            let bytes = low.page_size().bytes_of(low.pages());
            if bytes.and_then(|bytes| low.backing().advanced(bytes)) != Some(high.backing()) {
                return Err(Reason::NotAlike { low, high, what: "their backings" });
            }
            let (id, pages) = (low.id(), low.pages() + high.pages());
            let limit = tx.base.limits.pages_per_slot;
            let gfns =
                GfnRange::with_len(low.base_gfn(), pages).ok_or(Reason::BadLength { id, pages, limit })?;
            tx.put(space, high.id(), Some(&high), None)?;
            tx.replace(&low, SlotSpec { gfns, ..low.spec() })
        })
    }

    fn operation(&mut self, work: impl FnOnce(&mut Self) -> Result<(), Reason>) -> Outcome {
        let operation = self.operations;
        self.operations += 1;
        work(self).map_err(|reason| {
            self.failed.get_or_insert(operation);
            TransactionError::at(operation, reason)
        })
    }

    /// The slot with this id, if the id is one that the table can have.
    fn existing(&self, space: AddressSpaceId, id: SlotId) -> Result<Option<Slot>, Reason> {
        let limits = &self.base.limits;
        if space.get() >= limits.address_spaces {
            return Err(Reason::NoSuchAddressSpace { asked: space, spaces: limits.address_spaces });
        }
        if id.get() >= limits.slots {
            return Err(Reason::IdTooHigh { id, limit: limits.slots });
        }
        Ok(self.working.slot(space, id).copied())
    }

    fn find(&self, space: AddressSpaceId, id: SlotId) -> Result<Slot, Reason> {
        self.existing(space, id)?.ok_or(Reason::NoSuchSlot { address_space: space, id })
    }

    /// The slot that `spec` describes, if there can be such a slot.
    fn valid(&self, spec: &SlotSpec) -> Result<Slot, Reason> {
        let SlotSpec { id, gfns, backing, .. } = *spec;
        let limits = &self.base.limits;
        let (page, pages) = (limits.page_size, gfns.len());
        if pages == 0 || pages > limits.pages_per_slot {
            return Err(Reason::BadLength { id, pages, limit: limits.pages_per_slot });
        }
        let bytes = match (gfns.gpas(page), page.bytes_of(pages)) {
            (Some(_), Some(bytes)) => bytes,
            _ => return Err(Reason::GfnsTooHigh { id, gfns }),
        };
        let aligned = match backing {
            Backing::Host { hva } => page.divides(hva.get()),
            Backing::GuestMemfd { hva, offset, .. } => page.divides(hva.get()) && page.divides(offset),
            Backing::Device { .. } => true,
        };
        if !aligned {
            return Err(Reason::Unaligned { id, backing, page_bytes: page.bytes() });
        }
        if backing.advanced(bytes).is_none() {
            return Err(Reason::BackingWraps { id, backing, pages });
        }
        Ok(Slot::from_spec(spec, self.arena.stamp, page))
    }

    /// Replaces `old` by what `spec` describes; it stays the same slot, so it keeps its generation.
    fn replace(&mut self, old: &Slot, spec: SlotSpec) -> Result<(), Reason> {
        self.valid(&spec)?;
        let new = Slot::from_spec(&spec, old.generation(), old.page_size());
        if new == *old {
            return Ok(());
        }
        self.put(spec.address_space, spec.id, Some(old), Some(new))
    }

    /// Replaces `old`, the working version's slot with this id, by `slot`.
    fn put(
        &mut self,
        space: AddressSpaceId,
        id: SlotId,
        old: Option<&Slot>,
        slot: Option<Slot>,
    ) -> Result<(), Reason> {
        if self.lists.touched.is_empty() {
            self.first = SlotChange { old: old.copied(), new: slot };
        }
        self.lists.touched.try_reserve(1).map_err(|_| Reason::OutOfMemory)?;
        let ids = &mut self.working.spaces[usize::from(space.get())].ids;
        // SAFETY: the index belongs to the working version.
        unsafe { ids.set(self.arena, id.get(), slot) }.map_err(|_| Reason::OutOfMemory)?;
        self.lists.touched.push(Touch { space, id, operation: self.operations - 1 });
        Ok(())
    }

    /// Brings the gfn and hva indexes up to date. Afterwards the working version can be published. Returns whether
    /// anything has changed.
    pub(super) fn finish(&mut self) -> Result<bool, TransactionError> {
        if let Some(operation) = self.failed {
            return Err(TransactionError::at(operation, Reason::FailedBefore { operation }));
        }
        self.list_changes()?;
        if self.lists.changes.is_empty() {
            return Ok(false);
        }
        self.count();
        let mut from = 0;
        while let Some(first) = self.lists.changes.get(from) {
            let space = space_of(first);
            let same = self.lists.changes[from..].iter().take_while(|change| space_of(change) == space);
            let to = from + same.count();
            self.change_gfns(space, from, to)?;
            self.change_hvas(space, from, to)?;
            from = to;
        }
        Ok(true)
    }

    /// The working version, for whoever prepares and publishes it.
    pub(super) fn parts(&mut self) -> (&mut View, &mut Arena, &mut Lists) {
        (&mut self.working, self.arena, self.lists)
    }

    /// The working version is published.
    pub(super) fn published(mut self) {
        self.done = true;
    }

    fn list_changes(&mut self) -> Result<(), OutOfMemory> {
        let Lists { touched, changes, operations, .. } = self.lists;
        if let [touch] = touched[..] {
            changes.try_reserve(1).map_err(|_| OutOfMemory)?;
            operations.try_reserve(1).map_err(|_| OutOfMemory)?;
            changes.push(self.first);
            operations.push(touch.operation);
            return Ok(());
        }
        // Of several touches of one slot, the last one stays.
        touched.sort_unstable();
        touched.reverse();
        touched.dedup_by_key(|touch| (touch.space, touch.id));
        touched.reverse();
        changes.try_reserve(touched.len()).map_err(|_| OutOfMemory)?;
        operations.try_reserve(touched.len()).map_err(|_| OutOfMemory)?;
        for touch in touched.iter() {
            let old = self.base.slot(touch.space, touch.id).copied();
            let new = self.working.slot(touch.space, touch.id).copied();
            if old != new {
                changes.push(SlotChange { old, new });
                operations.push(touch.operation);
            }
        }
        Ok(())
    }

    /// Brings the numbers of slots and pages up to date.
    fn count(&mut self) {
        for change in &self.lists.changes {
            if let Some(old) = change.old {
                self.working.spaces[space_of(change)].slots -= 1;
                self.working.pages -= old.pages();
            }
            if let Some(new) = change.new {
                self.working.spaces[space_of(change)].slots += 1;
                self.working.pages += new.pages();
            }
        }
    }

    /// Makes the changes `from..to`, which are of one address space, in its gfn index.
    fn change_gfns(&mut self, space: usize, from: usize, to: usize) -> Result<(), TransactionError> {
        let Lists { changes, operations, pieces, merged, .. } = &mut *self.lists;
        let (changes, operations) = (&changes[from..to], &operations[from..to]);
        let working = &mut self.working.spaces[space];
        if changes.len() > 1 {
            // SAFETY: the index belongs to the working version.
            match unsafe { change_all(&mut working.gfns, self.arena, changes, pieces, merged) } {
                Ok(()) => return Ok(()),
                Err(Failure::OutOfMemory) => return Err(OutOfMemory.into()),
                Err(Failure::Overlap(_)) => {}
            }
            // SAFETY: the index belongs to the working version, and what it was is not used again. The transaction
            // will fail, so it does no harm that the dead are listed twice.
            unsafe { working.gfns.abandon(self.arena) };
            working.gfns = self.base.spaces[space].gfns;
        }
        let ids = working.ids;
        // SAFETY: the indexes belong to the working version.
        unsafe {
            for old in changes.iter().filter_map(SlotChange::leaving) {
                working.gfns.remove(self.arena, old).map_err(|_| OutOfMemory)?;
            }
            for (change, &operation) in changes.iter().zip(operations) {
                let Some(new) = &change.new else { continue };
                let result = if change.arriving().is_some() {
                    working.gfns.insert(self.arena, new)
                } else {
                    working.gfns.replace(self.arena, new)
                };
                result.map_err(|failure| {
                    let reason = match failure {
                        Failure::OutOfMemory => Reason::OutOfMemory,
                        Failure::Overlap(other) => {
                            Reason::Overlap { slot: *new, with: ids.find(other).copied().unwrap_or(*new) }
                        }
                    };
                    TransactionError::at(operation, reason)
                })?;
            }
        }
        Ok(())
    }

    /// Makes the changes `from..to`, which are of one address space, in its hva index.
    fn change_hvas(&mut self, space: usize, from: usize, to: usize) -> Result<(), OutOfMemory> {
        let Lists { changes, intervals, .. } = &mut *self.lists;
        let hvas = &mut self.working.spaces[space].hvas;
        let moving = || changes[from..to].iter().filter(|change| change.hvas_change());
        if let &[change] = &changes[from..to] {
            if !change.hvas_change() {
                return Ok(());
            }
            // SAFETY: the index belongs to the working version.
            unsafe {
                if let Some(old) = change.old.as_ref().and_then(Interval::of) {
                    hvas.remove(self.arena, old)?;
                }
                if let Some(new) = change.new.as_ref().and_then(Interval::of) {
                    hvas.insert(self.arena, &[new])?;
                }
            }
            return Ok(());
        }
        intervals.clear();
        intervals.try_reserve(to - from).map_err(|_| OutOfMemory)?;
        intervals.extend(moving().filter_map(|change| Interval::of(change.old.as_ref()?)));
        intervals.sort_unstable_by_key(Interval::key);
        for &old in intervals.iter() {
            // SAFETY: the index belongs to the working version.
            unsafe { hvas.remove(self.arena, old)? };
        }
        intervals.clear();
        intervals.extend(moving().filter_map(|change| Interval::of(change.new.as_ref()?)));
        intervals.sort_unstable_by_key(Interval::key);
        // SAFETY: the index belongs to the working version.
        unsafe { hvas.insert(self.arena, intervals) }
    }
}

/// The address space of a change: its slots, before and after, have the same.
fn space_of(change: &SlotChange) -> usize {
    let slot = change.old.as_ref().or(change.new.as_ref());
    slot.map_or(0, |slot| usize::from(slot.address_space().get()))
}

/// Makes all changes in a gfn index, sorted. Where slots overlap, the index is left with some of the changes.
///
/// # Safety
/// The index belongs to the working version, whose stamp is the arena's.
unsafe fn change_all(
    gfns: &mut GfnIndex,
    arena: &mut Arena,
    changes: &[SlotChange],
    pieces: &mut Vec<Piece>,
    merged: &mut Vec<Piece>,
) -> Result<(), Failure> {
    pieces.clear();
    pieces.try_reserve(changes.len()).map_err(|_| OutOfMemory)?;
    pieces.extend(changes.iter().filter_map(SlotChange::leaving).map(Piece::of));
    // SAFETY: passed on.
    unsafe {
        gfns.remove_all(arena, pieces)?;
        for change in changes {
            if let Some(new) = change.new.as_ref().filter(|_| change.arriving().is_none()) {
                gfns.replace(arena, new)?;
            }
        }
        pieces.clear();
        pieces.extend(changes.iter().filter_map(SlotChange::arriving).map(Piece::of));
        gfns.insert_all(arena, pieces, merged)
    }
}

impl SlotChange {
    /// Whether the slot is before and after at the same gfns.
    fn stays(&self) -> bool {
        matches!((&self.old, &self.new), (Some(old), Some(new)) if old.gfns() == new.gfns())
    }

    /// The slot that goes from where it was.
    fn leaving(&self) -> Option<&Slot> {
        self.old.as_ref().filter(|_| !self.stays())
    }

    /// The slot that comes to where it was not.
    fn arriving(&self) -> Option<&Slot> {
        self.new.as_ref().filter(|_| !self.stays())
    }

    /// Whether the hva index says something else afterwards.
    fn hvas_change(&self) -> bool {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) => old.hvas() != new.hvas(),
            _ => true,
        }
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // Nothing was published: what the transaction made goes, what it replaced stays.
        abandon(&self.working, self.arena);
        self.arena.dead.clear();
    }
}

/// Frees the private nodes of a working version, or lists them as dead where the arena buries.
pub(super) fn abandon(working: &View, arena: &mut Arena) {
    for space in &working.spaces {
        // SAFETY: the working version is not used again.
        unsafe {
            space.gfns.abandon(arena);
            space.hvas.abandon(arena);
            space.ids.abandon(arena);
        }
    }
}
