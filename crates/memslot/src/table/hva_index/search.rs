//! Searching for overlap.

use core::ptr::NonNull;

use super::HvaIndex;
use super::node::Node;

/// More levels than 2^32 slots can need.
pub(super) const DEPTH: usize = 12;

/// The intervals that overlap `[start, end)`, in order of (start, id).
///
/// A node's items are all compared when it is entered, without a branch on the outcome; what is left to visit is
/// a mask. With a branch for each item, the processor would guess wrong once in every node.
#[derive(Clone)]
pub(in crate::table) struct Search {
    /// The way down: nodes with the items still to visit.
    pub(super) stack: [(NonNull<u8>, u32); DEPTH],
    pub(super) depth: usize,
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Search {
    /// # Safety
    /// The index belongs to a version that is held while the search is used.
    #[inline]
    pub(in crate::table) unsafe fn new(index: HvaIndex, start: u64, end: u64) -> Self {
        let mut search = Self { stack: [(NonNull::dangling(), 0); DEPTH], depth: 0, start, end };
        if let Some(root) = index.root {
            // SAFETY: passed on.
            unsafe { search.enter(root) };
        }
        search
    }

    /// # Safety
    /// The node is alive.
    #[inline]
    pub(super) unsafe fn enter(&mut self, raw: NonNull<u8>) {
        // SAFETY: passed on.
        let mask = unsafe {
            match Node::of(raw) {
                Node::Leaf(leaf) => leaf.header().overlapping(self.start, self.end),
                Node::Inner(inner) => inner.header().overlapping(self.start, self.end),
            }
        };
        self.stack[self.depth] = (raw, mask);
        self.depth += 1;
    }

    /// The id of the next slot.
    ///
    /// # Safety
    /// The version is held.
    #[inline]
    pub(in crate::table) unsafe fn next(&mut self) -> Option<u32> {
        loop {
            let (raw, mask) = &mut self.stack[self.depth.checked_sub(1)?];
            if *mask == 0 {
                self.depth -= 1;
                continue;
            }
            let at = mask.trailing_zeros() as usize;
            *mask &= *mask - 1;
            // SAFETY: passed on; the mask has bits for the node's items only.
            unsafe {
                match Node::of(*raw) {
                    Node::Leaf(leaf) => return Some(*leaf.item(at)),
                    Node::Inner(inner) => {
                        let node = inner.item(at).node;
                        self.enter(node);
                    }
                }
            }
        }
    }
}
