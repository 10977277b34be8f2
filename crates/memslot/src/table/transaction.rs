//! A transaction: many operations, one generation, or nothing.
//!
//! Operations work on a *working version*, a fork of the current one that only the writer sees. They are
//! checked at once for all that concerns their own slot, and the id index, which holds the slots, is changed at
//! once, so that a later operation sees what an earlier one did. The other two indexes follow at the end, from
//! the difference between the two id indexes: first every slot that goes is taken out, then every slot that
//! comes is put in, and only there is overlap an error. So two slots may change places in one transaction, and
//! a slot that is created and deleted again costs nothing.

use alloc::vec::Vec;

use super::gfn_index::Failure;
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
}

impl Lists {
    pub(super) const fn new() -> Self {
        Self { touched: Vec::new(), changes: Vec::new(), operations: Vec::new() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.touched.capacity() * size_of::<Touch>()
            + self.changes.capacity() * size_of::<SlotChange>()
            + self.operations.capacity() * size_of::<usize>()
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
    done: bool,
}

type Outcome = Result<(), TransactionError>;

impl<'t> Transaction<'t> {
    pub(super) fn new(base: &'t View, arena: &'t mut Arena, lists: &'t mut Lists) -> Self {
        lists.touched.clear();
        lists.changes.clear();
        lists.operations.clear();
        let working = base.fork(arena.stamp);
        Self { base, working, arena, lists, operations: 0, failed: None, done: false }
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
            tx.put(spec.address_space, spec.id, Some(slot))
        })
    }

    /// Deletes a slot.
    ///
    /// # Errors
    /// [`Reason::NoSuchSlot`], [`Reason::OutOfMemory`].
    pub fn delete(&mut self, space: AddressSpaceId, id: SlotId) -> Outcome {
        self.operation(|tx| {
            tx.find(space, id)?;
            tx.put(space, id, None)
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
            tx.put(space, high, Some(upper))
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
            tx.put(space, high.id(), None)?;
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
        self.put(spec.address_space, spec.id, Some(new))
    }

    fn put(&mut self, space: AddressSpaceId, id: SlotId, slot: Option<Slot>) -> Result<(), Reason> {
        self.lists.touched.try_reserve(1).map_err(|_| Reason::OutOfMemory)?;
        let ids = &mut self.working.spaces[usize::from(space.get())].ids;
        // SAFETY: the index belongs to the working version.
        unsafe { ids.set(self.arena, id.get(), slot) }.map_err(|_| Reason::OutOfMemory)?;
        self.lists.touched.push(Touch { space, id, operation: self.operations - 1 });
        Ok(())
    }

    /// Brings the gfn and hva indexes up to date. Afterwards the working version can be published; it is `None`
    /// where nothing has changed.
    pub(super) fn finish(mut self) -> Result<Option<View>, TransactionError> {
        if let Some(operation) = self.failed {
            return Err(TransactionError::at(operation, Reason::FailedBefore { operation }));
        }
        self.list_changes()?;
        if self.lists.changes.is_empty() {
            return Ok(None);
        }
        for i in 0..self.lists.changes.len() {
            self.take_out(self.lists.changes[i])?;
        }
        for i in 0..self.lists.changes.len() {
            self.put_in(self.lists.changes[i])
                .map_err(|reason| TransactionError { operation: Some(self.lists.operations[i]), reason })?;
        }
        self.done = true;
        Ok(Some(self.working.fork(self.working.generation)))
    }

    fn list_changes(&mut self) -> Result<(), OutOfMemory> {
        let Lists { touched, changes, operations } = self.lists;
        if touched.len() > 1 {
            // Of several touches of one slot, the last one stays.
            touched.sort_unstable();
            touched.reverse();
            touched.dedup_by_key(|touch| (touch.space, touch.id));
            touched.reverse();
        }
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

    fn take_out(&mut self, change: SlotChange) -> Result<(), OutOfMemory> {
        let Some(old) = change.old else { return Ok(()) };
        let space = &mut self.working.spaces[usize::from(old.address_space().get())];
        space.slots -= 1;
        self.working.pages -= old.pages();
        // SAFETY: the indexes belong to the working version.
        unsafe {
            if change.new.is_none_or(|new| old.gfns() != new.gfns()) {
                space.gfns.remove(self.arena, &old).map_err(|_| OutOfMemory)?;
            }
            let leaves = change.new.is_none_or(|new| old.hvas() != new.hvas());
            if let Some(interval) = Interval::of(&old).filter(|_| leaves) {
                space.hvas.remove(self.arena, interval)?;
            }
        }
        Ok(())
    }

    fn put_in(&mut self, change: SlotChange) -> Result<(), Reason> {
        let Some(new) = change.new else { return Ok(()) };
        let space = &mut self.working.spaces[usize::from(new.address_space().get())];
        space.slots += 1;
        self.working.pages += new.pages();
        // SAFETY: the indexes belong to the working version.
        unsafe {
            if change.old.is_some_and(|old| old.gfns() == new.gfns()) {
                space.gfns.replace(self.arena, &new).map_err(|_| Reason::OutOfMemory)?;
            } else {
                space.gfns.insert(self.arena, &new).map_err(|failure| match failure {
                    Failure::OutOfMemory => Reason::OutOfMemory,
                    Failure::Overlap(other) => {
                        Reason::Overlap { slot: new, with: space.ids.find(other).copied().unwrap_or(new) }
                    }
                })?;
            }
            let comes = change.old.is_none_or(|old| old.hvas() != new.hvas());
            if let Some(interval) = Interval::of(&new).filter(|_| comes) {
                space.hvas.insert(self.arena, interval).map_err(|_| Reason::OutOfMemory)?;
            }
        }
        Ok(())
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
