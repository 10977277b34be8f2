//! id → slot: where the slots themselves live.
//!
//! A radix tree over the ids (`radix.rs`) whose leaves hold 16 slots each. It is as high as the highest id in
//! use needs: ids below 16 cost one leaf, KVM's 32764 two inner nodes above it, and a table that allows
//! millions of ids pays for those it uses. Nothing is allocated for the limit.

use super::node::{Arena, NodePtr};
use super::radix::{Entry, WAYS, Way, common_shift, region_last, way_of};
use crate::error::OutOfMemory;
use crate::slot::Slot;

/// Slots in a leaf; a power of two.
const LEAF_SLOTS: usize = 16;
const LEAF_SHIFT: u32 = LEAF_SLOTS.trailing_zeros();

/// The leaf's first id, divided by the slots in a leaf.
#[derive(Clone, Copy)]
pub(super) struct LeafHeader {
    number: u64,
}

type Leaf = NodePtr<LeafHeader, Option<Slot>>;
const _: () = assert!(size_of::<Option<Slot>>() == 40, "an empty place costs no extra room");

/// The index of one address space in one version; copying it copies the root only.
#[derive(Clone, Copy)]
pub(super) struct IdIndex {
    root: Entry,
}

impl IdIndex {
    pub(super) const EMPTY: Self = Self { root: Entry::NOTHING };

    /// The slot with this id.
    ///
    /// # Safety
    /// The index belongs to a version that is held for `'a`.
    #[inline]
    pub(super) unsafe fn find<'a>(&self, id: u32) -> Option<&'a Slot> {
        // SAFETY: the version is held; the leaf is reachable from it and has LEAF_SLOTS items.
        unsafe {
            let leaf: Leaf = self.root.walk(u64::from(id))?;
            if leaf.header().number != u64::from(id) >> LEAF_SHIFT {
                return None;
            }
            leaf.item(id as usize % LEAF_SLOTS).as_ref()
        }
    }

    /// Puts `slot` under its id, or nothing where `slot` is `None`.
    ///
    /// # Safety
    /// The index belongs to the writer's working version, whose stamp is the arena's.
    pub(super) unsafe fn set(
        &mut self,
        arena: &mut Arena,
        id: u32,
        slot: Option<Slot>,
    ) -> Result<(), OutOfMemory> {
        let key = u64::from(id);
        // SAFETY: passed on; the root is the writer's own. What stands above a private leaf is private, too.
        unsafe {
            // A leaf that this transaction has touched before needs no second way down.
            if arena.private > 0 && slot.is_some() {
                let leaf: Option<Leaf> = self.root.walk(key);
                let own = |leaf: &Leaf| leaf.header().number == key >> LEAF_SHIFT && arena.is_private(*leaf);
                if let Some(leaf) = leaf.filter(own) {
                    leaf.items_mut()[way_in_leaf(key)] = slot;
                    return Ok(());
                }
            }
            set(arena, &raw mut self.root, key, slot)
        }
    }

    /// Frees every private node: the change did not come to be.
    ///
    /// # Safety
    /// As [`set`](Self::set), and the working version is not used again.
    pub(super) unsafe fn abandon(self, arena: &mut Arena) {
        // SAFETY: passed on.
        unsafe { free_private(arena, self.root) };
    }
}

/// # Safety
/// `place` holds an entry of the working version and is private, or the working root.
unsafe fn set(arena: &mut Arena, place: *mut Entry, id: u64, slot: Option<Slot>) -> Result<(), OutOfMemory> {
    // SAFETY: the place is the writer's; what it names is reachable from the working version, and written
    // only where it is private.
    unsafe {
        let (node_start, node_last, shift) = match (*place).way::<LeafHeader, Option<Slot>>() {
            Way::Nothing => {
                if slot.is_some() {
                    let leaf: Leaf = arena.alloc(header(id), &[None; LEAF_SLOTS], LEAF_SLOTS)?;
                    leaf.items_mut()[way_in_leaf(id)] = slot;
                    *place = Entry::leaf(leaf);
                }
                return Ok(());
            }
            Way::Leaf(leaf) if leaf.header().number == id >> LEAF_SHIFT => {
                let leaf = arena.privately(leaf)?;
                *place = Entry::leaf(leaf);
                leaf.items_mut()[way_in_leaf(id)] = slot;
                if slot.is_none() && leaf.items().iter().all(Option::is_none) {
                    *place = Entry::NOTHING;
                    arena.free_private(leaf);
                }
                return Ok(());
            }
            Way::Leaf(leaf) => {
                let start = leaf.header().number << LEAF_SHIFT;
                (start, start + (LEAF_SLOTS as u64 - 1), 0)
            }
            Way::Inner(node, shift) => {
                let start = node.header().start;
                (start, region_last(start, shift, WAYS), shift)
            }
        };
        if id < node_start || id > node_last {
            // Nothing to take away there; something to put there needs a node above both.
            if slot.is_none() {
                return Ok(());
            }
            let above = common_shift(LEAF_SHIFT, node_start.min(id), node_last.max(id), WAYS);
            let parent = arena.alloc_inner(id, above, WAYS)?;
            parent.items_mut()[way_of(node_start, above, WAYS)] = *place;
            *place = Entry::inner(parent, above);
            return set(arena, &raw mut parent.items_mut()[way_of(id, above, WAYS)], id, slot);
        }
        let Way::Inner(node, _) = (*place).way::<LeafHeader, Option<Slot>>() else { return Ok(()) };
        let node = arena.privately(node)?;
        *place = Entry::inner(node, shift);
        set(arena, &raw mut node.items_mut()[way_of(id, shift, WAYS)], id, slot)?;
        if slot.is_none() {
            let mut left = node.items().iter().filter(|way| !way.is_nothing());
            let only = left.next().copied().unwrap_or(Entry::NOTHING);
            if left.next().is_none() {
                *place = only;
                arena.free_private(node);
            }
        }
        Ok(())
    }
}

fn header(id: u64) -> LeafHeader {
    LeafHeader { number: id >> LEAF_SHIFT }
}

#[expect(clippy::cast_possible_truncation, reason = "the value is below LEAF_SLOTS")]
fn way_in_leaf(id: u64) -> usize {
    id as usize % LEAF_SLOTS
}

/// Frees the private nodes of a subtree. A published node has no private ones below it.
///
/// # Safety
/// The subtree belongs to the working version, and nobody uses it again.
unsafe fn free_private(arena: &mut Arena, entry: Entry) {
    // SAFETY: passed on; every node stands in one place.
    unsafe {
        match entry.way::<LeafHeader, Option<Slot>>() {
            Way::Leaf(leaf) if arena.is_private(leaf) => arena.free_private(leaf),
            Way::Inner(node, _) if arena.is_private(node) => {
                for &way in &node.items()[..WAYS] {
                    free_private(arena, way);
                }
                arena.free_private(node);
            }
            _ => {}
        }
    }
}
