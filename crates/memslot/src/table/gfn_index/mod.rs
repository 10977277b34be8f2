//! gfn → slot: a page table whose leaves are small sorted arrays.
//!
//! # Shape
//!
//! Inner nodes split the gfn space 64 ways (`radix.rs`). A leaf holds up to 15 slots, in ascending order: every
//! slot that touches the leaf's block of gfns. A slot that lies across the border of two blocks is in both
//! leaves, so that one walk always suffices. Within an inner node a leaf may stand in 2, 4, 8 … neighbouring
//! ways at once; when it overflows, its ways are halved (as in extendible hashing), and only when one way is
//! left does a new inner node appear. So leaves stay half full or better at any density, and a slot of many
//! pages costs a few leaves, not one entry a page.
//!
//! # Why not a search tree
//!
//! Looking a gfn up in a balanced tree is a chain of compare steps, each waiting for the one before. A walk
//! here is a chain of plain loads, two for tens of thousands of slots, and one search in 16 keys that are
//! compared all at once. Leaves keep 32 bits of their keys (`leaf.rs`), so that the search touches two cache
//! lines; that is why a slot has at most 2^31 - 1 pages.
//!
//! # Changing it
//!
//! [`GfnIndex::insert`] and [`GfnIndex::remove`] work from the root down: a published node is copied and the
//! copy linked in its place before the next step, so that every new node can be reached from the working root
//! when a later allocation fails, and [`GfnIndex::abandon`] finds it. [`GfnIndex::insert_all`] takes a sorted batch
//! down together (`bulk.rs`).

mod bulk;
mod edit;
mod leaf;
mod walk;

pub(super) use self::leaf::Piece;
pub(super) use self::walk::Walk;

use alloc::vec::Vec;

use self::bulk::insert_batch;
use self::edit::{Block, edit_entry, free_private};
use self::leaf::{Change, Kind, Label, Leaf, Mapping, NO_OFFSET, low};
use super::node::Arena;
use super::radix::{Entry, Way};
use super::search::{FEW, key};
use crate::error::OutOfMemory;
use crate::prefetch::prefetch;
use crate::slot::{Slot, SlotFlags};

/// What a lookup finds: a slot, and where the frame lies in it.
#[derive(Clone, Copy)]
pub(super) struct Found {
    delta: u64,
    /// Pages from the frame to the end of the slot.
    pub(super) pages_left: u32,
    /// Pages from the start of the slot to the frame.
    pub(super) pages_before: u32,
    label: Label,
}

impl Found {
    /// No slot: no page is left.
    pub(super) const NONE: Self =
        Self { delta: 0, pages_left: 0, pages_before: 0, label: Label(Label::NO_HOST_MEMORY) };

    /// The host address of a guest physical address in the slot, if the slot has host memory.
    #[inline]
    pub(super) fn hva(&self, gpa: u64) -> Option<u64> {
        if self.label.0 & Label::NO_HOST_MEMORY != 0 {
            rare();
            return None;
        }
        Some(gpa.wrapping_add(self.delta))
    }

    #[inline]
    pub(super) fn id(&self) -> u32 {
        self.label.id()
    }

    #[inline]
    pub(super) fn flags(&self) -> SlotFlags {
        SlotFlags::from_bits_truncate(self.label.0 >> Label::FLAGS_AT)
    }

    /// The same slot at its first frame.
    pub(super) fn at_start(&self) -> Self {
        Self { pages_left: self.pages_left + self.pages_before, pages_before: 0, ..*self }
    }

    /// The same slot, `pages` further on; fewer than are left.
    #[inline]
    pub(super) fn further(&self, pages: u32) -> Self {
        Self { pages_left: self.pages_left - pages, pages_before: self.pages_before + pages, ..*self }
    }
}

/// Why a change of the index failed. What it has done so far is abandoned with the transaction.
pub(super) enum Failure {
    OutOfMemory,
    /// The slot with this id covers some of the gfns.
    Overlap(u32),
}

impl From<OutOfMemory> for Failure {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// Keeps a branch a branch: with a conditional move, every translation would wait for the label, too.
#[cold]
#[inline(never)]
fn rare() {}

/// A gfn that lies beside the leaf, most often; or the leaf's keys count from its base.
///
/// # Safety
/// The leaf is alive.
#[cold]
#[inline(never)]
unsafe fn locate_beyond_reach(leaf: Leaf, gfn: u64) -> Option<(Leaf, usize)> {
    // SAFETY: the leaf is alive.
    let header = unsafe { leaf.header() };
    let wanted = u32::try_from(gfn.checked_sub(header.base)?).ok()?;
    (header.reach == 0 && wanted != NO_OFFSET).then(|| (leaf, header.keys.not_above(key(wanted))))
}

/// The index of one address space in one version; copying it copies the root only.
#[derive(Clone, Copy)]
pub(super) struct GfnIndex {
    root: Entry,
}

impl GfnIndex {
    pub(super) const EMPTY: Self = Self { root: Entry::NOTHING };

    /// The slot that covers `gfn`.
    ///
    /// # Safety
    /// The index belongs to a version that is held.
    #[inline]
    pub(super) unsafe fn find(&self, gfn: u64) -> Option<Found> {
        // SAFETY: passed on; the leaf has a slot of that number.
        unsafe {
            let (leaf, number) = self.locate(gfn)?;
            let Mapping { delta, end, label } = *leaf.item(number.wrapping_sub(1));
            let wanted = low(gfn.wrapping_sub(leaf.header().base));
            (wanted < end).then(|| Found {
                delta,
                pages_left: end - wanted,
                pages_before: wanted.wrapping_sub(leaf.header().from(number.wrapping_sub(1))),
                label,
            })
        }
    }

    /// The leaf and the number (from 1 on) of the last slot that starts at or before `gfn`, if the leaf has one.
    ///
    /// Not inlined: this is most of a lookup's code, and the call costs no time, as both results are in registers.
    /// So what is around it stays small enough to be inlined.
    ///
    /// # Safety
    /// As [`find`](Self::find).
    #[inline(never)]
    unsafe fn locate(&self, gfn: u64) -> Option<(Leaf, usize)> {
        // SAFETY: the version is held; the leaf is reachable from it.
        unsafe {
            let (leaf, few): (Leaf, _) = match self.root.way() {
                Way::Leaf(leaf) if leaf.items().len() <= FEW => (leaf, true),
                _ => (self.root.walk(gfn)?, false),
            };
            // The search decides which line of the mappings is needed; by then it is there.
            prefetch(leaf.raw(), 2..5);
            let header = leaf.header();
            if gfn.wrapping_sub(header.base) >= u64::from(header.reach) {
                return locate_beyond_reach(leaf, gfn);
            }
            let sought = key(low(gfn));
            let keys = &header.keys;
            // The first slot starts at the base, so at least one key is not above.
            Some((leaf, if few { keys.not_above_of_few(sought) } else { keys.not_above(sought) }))
        }
    }

    /// Adds a slot.
    ///
    /// # Errors
    /// [`Failure::Overlap`] where some of its gfns are covered.
    ///
    /// # Safety
    /// The index belongs to the writer's working version, whose stamp is the arena's.
    pub(super) unsafe fn insert(&mut self, arena: &mut Arena, slot: &Slot) -> Result<(), Failure> {
        // SAFETY: passed on.
        unsafe { self.edit(arena, slot, Kind::Insert) }
    }

    /// Removes a slot that is there.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn remove(&mut self, arena: &mut Arena, slot: &Slot) -> Result<(), Failure> {
        // SAFETY: passed on.
        unsafe { self.edit(arena, slot, Kind::Remove) }
    }

    /// Adds slots, and sorts the list. Where two overlap, or one meets another that is there, the index is left with
    /// some of them.
    ///
    /// # Errors
    /// [`Failure::Overlap`]; not necessarily with the slot that [`insert`](Self::insert)ing one by one would name.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn insert_all(
        &mut self,
        arena: &mut Arena,
        batch: &mut [Piece],
        merged: &mut Vec<Piece>,
    ) -> Result<(), Failure> {
        batch.sort_unstable_by_key(|piece| piece.start);
        if let Some(two) = batch.windows(2).find(|two| two[0].last() >= two[1].start) {
            return Err(Failure::Overlap(two[0].label.id()));
        }
        // SAFETY: passed on; the root is the writer's own.
        unsafe { insert_batch(arena, &raw mut self.root, Block::ALL, batch, merged) }
    }

    /// Removes slots that are there, and sorts the list.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn remove_all(
        &mut self,
        arena: &mut Arena,
        batch: &mut [Piece],
    ) -> Result<(), Failure> {
        // Neighbours in the index one after the other: what the last one has touched is at hand.
        batch.sort_unstable_by_key(|piece| piece.start);
        batch.iter().try_for_each(|&piece| {
            // SAFETY: passed on; the root is the writer's own.
            unsafe {
                edit_entry(arena, &raw mut self.root, Block::ALL, &Change { piece, kind: Kind::Remove })
            }
        })
    }

    /// Puts a slot in the place of one with the same gfns.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn replace(&mut self, arena: &mut Arena, slot: &Slot) -> Result<(), Failure> {
        // SAFETY: passed on.
        unsafe { self.edit(arena, slot, Kind::Replace) }
    }

    /// # Safety
    /// As [`insert`](Self::insert).
    unsafe fn edit(&mut self, arena: &mut Arena, slot: &Slot, kind: Kind) -> Result<(), Failure> {
        // SAFETY: passed on; the root is the writer's own.
        unsafe { edit_entry(arena, &raw mut self.root, Block::ALL, &Change { piece: Piece::of(slot), kind }) }
    }

    /// Frees every private node: the change did not come to be.
    ///
    /// # Safety
    /// As [`insert`](Self::insert), and the working version is not used again.
    pub(super) unsafe fn abandon(self, arena: &mut Arena) {
        // SAFETY: passed on.
        unsafe { free_private(arena, self.root) };
    }
}
