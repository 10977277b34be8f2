//! The inner nodes of the gfn and id indexes: page tables for page numbers and ids.
//!
//! Both indexes are radix trees, walked like a page table: an inner node at `shift` has 64 [`Entry`]s, and the
//! next one is entry `(key >> shift) % 64`. Shifts are `first + 6 * level`; levels with only one way on are
//! left out (path compression), so a walk may arrive somewhere although the key belongs nowhere. What the walk
//! finds decides: a leaf knows its keys.
//!
//! An entry is one word: the address of a node, which is a multiple of 64, and in its low six bits what that
//! node is: [`LEAF`], or the shift of an inner node. So a step of the walk is a shift, a mask and one load.

use core::ptr::{self, NonNull};

use super::node::{Arena, NodePtr};
use crate::error::OutOfMemory;

/// Ways out of an inner node.
pub(super) const WAYS: usize = 64;
const TAG: usize = 63;
/// The tag of a leaf; no inner node has this shift.
const LEAF: usize = 63;

/// The smallest key that the node can hold; the region is `64 << shift` keys long.
#[derive(Clone, Copy)]
pub(super) struct Region {
    pub(super) start: u64,
}

pub(super) type Inner = NodePtr<Region, Entry>;

/// Nothing, a leaf, or an inner node with its shift.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Entry(*mut u8);

pub(super) enum Way<L> {
    Nothing,
    Leaf(L),
    Inner(Inner, u32),
}

impl Entry {
    pub(super) const NOTHING: Self = Self(ptr::null_mut());

    pub(super) fn leaf<H: Copy, T: Copy>(leaf: NodePtr<H, T>) -> Self {
        Self(leaf.raw().as_ptr().map_addr(|address| address | LEAF))
    }

    pub(super) fn inner(node: Inner, shift: u32) -> Self {
        debug_assert!((shift as usize) < LEAF);
        Self(node.raw().as_ptr().map_addr(|address| address | shift as usize))
    }

    #[inline]
    pub(super) fn is_nothing(self) -> bool {
        self.0.is_null()
    }

    #[inline]
    pub(super) fn is_inner(self) -> bool {
        !self.0.is_null() && self.0.addr() & TAG != LEAF
    }

    /// What the entry is. `H` and `T` are the leaf's shape; the index that owns the tree knows it.
    #[inline]
    pub(super) fn way<H: Copy, T: Copy>(self) -> Way<NodePtr<H, T>> {
        let tag = self.0.addr() & TAG;
        let Some(raw) = NonNull::new(self.0.map_addr(|address| address & !TAG)) else {
            return Way::Nothing;
        };
        if tag == LEAF {
            Way::Leaf(NodePtr::from_raw(raw))
        } else {
            #[expect(clippy::cast_possible_truncation, reason = "a tag has six bits")]
            Way::Inner(Inner::from_raw(raw), tag as u32)
        }
    }

    /// Walks to the leaf that would hold `key`.
    ///
    /// # Safety
    /// The entry belongs to a version that is held for `'a`, in a tree whose leaves have this shape.
    #[inline]
    pub(super) unsafe fn walk<H: Copy, T: Copy>(mut self, key: u64) -> Option<NodePtr<H, T>> {
        loop {
            match self.way() {
                Way::Nothing => return None,
                Way::Leaf(leaf) => return Some(leaf),
                // SAFETY: the node is reachable from the held version; inner nodes have 64 items.
                Way::Inner(node, shift) => self = unsafe { *node.item(way_of(key, shift)) },
            }
        }
    }
}

/// Which way `key` goes out of a node at `shift`.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the value is below 64")]
pub(super) const fn way_of(key: u64, shift: u32) -> usize {
    (key >> shift) as usize & (WAYS - 1)
}

/// The first key of the region of a node at `shift` that holds `key`.
pub(super) const fn region_start(key: u64, shift: u32) -> u64 {
    if shift + 6 >= 64 { 0 } else { key >> (shift + 6) << (shift + 6) }
}

/// The last key of the region of a node at `shift` that starts at `start`.
pub(super) const fn region_last(start: u64, shift: u32) -> u64 {
    if shift + 6 >= 64 { u64::MAX } else { start + ((1 << (shift + 6)) - 1) }
}

/// The smallest shift, of those that start with `first`, at which one node holds both keys.
pub(super) const fn common_shift(first: u32, a: u64, b: u64) -> u32 {
    let differ = 64 - (a ^ b).leading_zeros();
    let above = differ.saturating_sub(first);
    first + above.saturating_sub(1) / 6 * 6
}

impl Arena {
    /// A new inner node at `shift` whose region holds `key`, all ways empty.
    pub(super) fn alloc_inner(&mut self, key: u64, shift: u32) -> Result<Inner, OutOfMemory> {
        self.alloc(Region { start: region_start(key, shift) }, &[Entry::NOTHING; WAYS], WAYS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_shift_is_the_lowest_that_holds_both() {
        for first in [0, 4] {
            for (a, b) in [(0, 0), (0, 63), (0, 64), (5, 4095), (0, 4096), (1 << 51, 0), (u64::MAX, 0)] {
                let shift = common_shift(first, a, b);
                assert_eq!(region_start(a, shift), region_start(b, shift), "{a} {b} at {shift}");
                assert_eq!((shift - first) % 6, 0);
                if shift > first {
                    assert_ne!(region_start(a, shift - 6), region_start(b, shift - 6), "{a} {b} at {shift}");
                }
            }
        }
    }
}
