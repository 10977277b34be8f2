//! Searching for overlap.

use core::ptr::NonNull;

use super::HvaIndex;
use super::node::{FAN_OUT, Leaf, Node};

/// The number of a child takes so many bits of a path.
const CHILD_BITS: usize = FAN_OUT.trailing_zeros() as usize;

/// The intervals that overlap host pages `[first, last]`, in order of (start, id).
///
/// A node's items are all compared when it is entered, without a branch on the outcome; what is left to visit is
/// a mask. With a branch for each item, the processor would guess wrong once in every node.
///
/// Nearly always one leaf has everything, so the way back up is not kept: where the search came along is one number,
/// and whoever has to go on elsewhere walks from the root again. A stack of nodes would have to live in memory, and
/// every search would wait for that.
#[derive(Clone, Copy)]
pub(in crate::table) struct Search {
    root: NonNull<u8>,
    /// The leaf that is being visited, and its items still to yield; without any, there may be no leaf.
    leaf: Leaf,
    mask: u32,
    /// Which inner nodes on the path have more children to visit; the root is bit 0.
    open: u32,
    /// The children on the path, the root's lowest.
    path: u64,
    first: u64,
    last: u64,
}

impl Search {
    /// # Safety
    /// The index belongs to a version that is held while the search is used.
    #[inline]
    pub(in crate::table) unsafe fn new(index: HvaIndex, start: u64, end: u64) -> Self {
        let root = index.root.unwrap_or(NonNull::dangling());
        let last = end.wrapping_sub(1);
        let search = Self { root, leaf: Leaf::from_raw(root), mask: 0, open: 0, path: 0, first: start, last };
        if index.root.is_none() || start >= end {
            return search;
        }
        // SAFETY: passed on.
        unsafe { search.descend(root, 0) }
    }

    /// Goes to the first leaf below a node, at so many levels below the root, that may have something.
    ///
    /// # Safety
    /// The version is held.
    #[inline]
    unsafe fn descend(mut self, mut node: NonNull<u8>, mut level: usize) -> Self {
        // SAFETY: passed on; a mask has bits for the node's items only.
        unsafe {
            loop {
                match Node::of(node) {
                    Node::Leaf(leaf) => {
                        self.leaf = leaf;
                        self.mask = leaf.header().overlapping(self.first, self.last);
                        return self;
                    }
                    Node::Inner(inner) => {
                        let mask = inner.header().overlapping(self.first, self.last);
                        if mask == 0 {
                            return self;
                        }
                        let at = mask.trailing_zeros() as usize;
                        self.path |= (at as u64) << (level * CHILD_BITS);
                        self.open |= u32::from(mask & (mask - 1) != 0) << level;
                        node = inner.item(at).node;
                        level += 1;
                    }
                }
            }
        }
    }

    /// Goes to the next leaf that may have something: below the lowest node of the path with more to visit. There
    /// is one.
    ///
    /// # Safety
    /// The version is held.
    #[cold]
    #[inline(never)]
    unsafe fn go_on(mut self) -> Self {
        let lowest = self.open.ilog2() as usize;
        let mut node = self.root;
        for level in 0..=lowest {
            // SAFETY: passed on; the path leads through inner nodes down to this level.
            unsafe {
                let Node::Inner(inner) = Node::of(node) else { return self };
                #[expect(clippy::cast_possible_truncation, reason = "the value is below FAN_OUT")]
                let mut at = (self.path >> (level * CHILD_BITS)) as usize % FAN_OUT;
                if level == lowest {
                    let left = inner.header().overlapping(self.first, self.last) >> at >> 1;
                    at += 1 + left.trailing_zeros() as usize;
                    self.path &= (1 << (level * CHILD_BITS)) - 1;
                    self.path |= (at as u64) << (level * CHILD_BITS);
                    self.open ^= u32::from(left & (left - 1) == 0) << level;
                }
                node = inner.item(at).node;
            }
        }
        // SAFETY: passed on.
        unsafe { self.descend(node, lowest + 1) }
    }

    /// The id of the next slot.
    ///
    /// # Safety
    /// The version is held.
    #[inline]
    pub(in crate::table) unsafe fn next(&mut self) -> Option<u32> {
        while self.mask == 0 {
            if self.open == 0 {
                return None;
            }
            // SAFETY: passed on.
            *self = unsafe { self.go_on() };
        }
        let at = self.mask.trailing_zeros() as usize;
        self.mask &= self.mask - 1;
        // SAFETY: passed on; the mask has bits for the leaf's items only.
        Some(unsafe { *self.leaf.item(at) })
    }
}
