//! The inner nodes of the gfn and id indexes: page tables for page numbers and ids.
//!
//! Both indexes are radix trees, walked like a page table: an inner node at `shift` has 64 [`Entry`]s, and the
//! next one is entry `(key >> shift) % 64`. Shifts are `first + 6 * level`; levels with only one way on are
//! left out (path compression), and the root may be twice as wide, which saves a level more often than not. So a walk may arrive somewhere although the key belongs nowhere. What the walk
//! finds decides: a leaf knows its keys.
//!
//! An entry is one word: the address of a node, which is a multiple of 64, and in its low six bits what that
//! node is: [`LEAF`], or the shift of an inner node. So a step of the walk is a shift, a mask and one load.

use core::ops::Range;
use core::ptr::{self, NonNull};

use super::node::{Arena, NodePtr};
use super::search::settled;
use crate::error::OutOfMemory;
use crate::prefetch::prefetch;

/// Ways out of an inner node.
pub(super) const WAYS: usize = 64;
/// Ways out of a wide root.
pub(super) const WIDE: usize = 128;
/// Levels are so many bits apart.
const LEVEL: u32 = WAYS.trailing_zeros();
const TAG: usize = 63;
/// The tag of a leaf; no inner node has this shift.
const LEAF: usize = 63;

/// The smallest key that the node can hold; the region is `ways << shift` keys long.
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

    /// Asks the processor to fetch some cache lines of the node, if there is one.
    pub(super) fn prefetch(self, lines: Range<usize>) {
        if let Some(node) = NonNull::new(self.0.map_addr(|address| address & !TAG)) {
            prefetch(node, lines);
        }
    }

    /// What the entry is. `H` and `T` are the leaf's shape; the index that owns the tree knows it.
    #[inline]
    pub(super) fn way<H: Copy, T: Copy>(self) -> Way<NodePtr<H, T>> {
        let tag = self.0.addr() & TAG;
        // Subtracting the tag, not masking it off: for a leaf that is a constant, which costs nothing.
        if tag == LEAF {
            // SAFETY: the entry of a leaf is its node's address plus LEAF, so what is left is not null.
            Way::Leaf(NodePtr::from_raw(unsafe { NonNull::new_unchecked(self.0.wrapping_byte_sub(LEAF)) }))
        } else if let Some(raw) = NonNull::new(self.0.wrapping_byte_sub(tag)) {
            #[expect(clippy::cast_possible_truncation, reason = "a tag has six bits")]
            Way::Inner(Inner::from_raw(raw), tag as u32)
        } else {
            Way::Nothing
        }
    }

    /// Walks from the root to the leaf that would hold `key`.
    ///
    /// The next node most often is one level below. Where that is so, the way out of it is taken from the level
    /// and not from the entry, so that a step waits for one load and for nothing else.
    ///
    /// # Safety
    /// The entry is a root of a version that is held for `'a`, in a tree whose leaves have this shape.
    #[inline]
    pub(super) unsafe fn walk<H: Copy, T: Copy>(self, key: u64) -> Option<NodePtr<H, T>> {
        // SAFETY: the nodes are reachable from the held version; the root says how many ways it has, and all
        // others have 64. Both are powers of two.
        unsafe {
            let (mut entry, mut below) = match self.way() {
                Way::Nothing => return None,
                Way::Leaf(leaf) => return Some(leaf),
                Way::Inner(node, shift) => {
                    (*node.item(way_of(key, shift, node.items().len())), shift.saturating_sub(LEVEL))
                }
            };
            // The tag is `below`, said so that the compiler does not take the one for the other. A tag of 0 may mean
            // that there is nothing, which is looked at further down.
            while below > 0 && entry.0.addr().wrapping_sub(below as usize) & TAG == 0 {
                let way = settled(Inner::item_at(way_of(key, below, WAYS)).wrapping_sub(below as usize));
                entry = *entry.0.wrapping_byte_add(way).cast();
                below = below.saturating_sub(LEVEL);
            }
            loop {
                match entry.way() {
                    Way::Nothing => return None,
                    Way::Leaf(leaf) => return Some(leaf),
                    Way::Inner(node, shift) => entry = *node.item(way_of(key, shift, WAYS)),
                }
            }
        }
    }
}

/// Which way `key` goes out of a node at `shift` with so many ways, a power of two.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the value is below the number of ways")]
pub(super) const fn way_of(key: u64, shift: u32, ways: usize) -> usize {
    (key >> shift) as usize & (ways - 1)
}

/// Where a node at `shift` with so many ways that holds `key` starts.
pub(super) const fn region_start(key: u64, shift: u32, ways: usize) -> u64 {
    let bits = shift + ways.trailing_zeros();
    if bits >= 64 { 0 } else { key >> bits << bits }
}

/// The last key of the region of a node at `shift` with so many ways that starts at `start`.
pub(super) const fn region_last(start: u64, shift: u32, ways: usize) -> u64 {
    let bits = shift + ways.trailing_zeros();
    if bits >= 64 { u64::MAX } else { start + ((1 << bits) - 1) }
}

/// The smallest shift, of those that start with `first`, at which one node of so many ways holds both keys.
pub(super) const fn common_shift(first: u32, a: u64, b: u64, ways: usize) -> u32 {
    let differ = 64 - (a ^ b).leading_zeros();
    let above = differ.saturating_sub(first + ways.trailing_zeros());
    first + above.next_multiple_of(LEVEL)
}

impl Arena {
    /// A new inner node at `shift` whose region holds `key`, all ways empty.
    pub(super) fn alloc_inner(&mut self, key: u64, shift: u32, ways: usize) -> Result<Inner, OutOfMemory> {
        let region = Region { start: region_start(key, shift, ways) };
        self.alloc(region, &[Entry::NOTHING; WIDE][..ways], ways)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_shift_is_the_lowest_that_holds_both() {
        for first in [0, 4] {
            for (a, b) in [(0, 0), (0, 63), (0, 64), (5, 4095), (0, 4096), (1 << 51, 0), (u64::MAX, 0)] {
                for ways in [WAYS, WIDE] {
                    let shift = common_shift(first, a, b, ways);
                    let start = |key, shift| region_start(key, shift, ways);
                    assert_eq!(start(a, shift), start(b, shift), "{a} {b} at {shift}");
                    assert_eq!((shift - first) % 6, 0);
                    if shift > first {
                        assert_ne!(start(a, shift - 6), start(b, shift - 6), "{a} {b} at {shift}");
                    }
                }
            }
        }
    }
}
