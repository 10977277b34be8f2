//! Walking the slots in order.

use super::super::radix::{Entry, Way, way_of};
use super::GfnIndex;
use super::edit::region;
use super::leaf::{LeafHeader, Mapping};

/// The deepest tree: one inner node for every six bits of a 64-bit gfn.
pub(super) const DEPTH: usize = 11;

/// Slots in ascending order, from a gfn on.
#[derive(Clone)]
pub(in crate::table) struct Walk {
    /// The way down: nodes with the next way to take.
    pub(super) stack: [(Entry, usize); DEPTH],
    pub(super) depth: usize,
    pub(super) leaf: Entry,
    pub(super) at: usize,
    /// Slots that end before this gfn are not wanted, or have been yielded.
    pub(super) from: u64,
    pub(super) last: u64,
}

impl Walk {
    /// Yields the slots that cover a gfn of `[from, last]`.
    ///
    /// # Safety
    /// The index belongs to a version that is held while the walk is used.
    pub(in crate::table) unsafe fn new(index: GfnIndex, from: u64, last: u64) -> Self {
        let stack = [(Entry::NOTHING, 0); DEPTH];
        let mut walk = Self { stack, depth: 0, leaf: Entry::NOTHING, at: 0, from, last };
        // SAFETY: passed on.
        unsafe { walk.enter(index.root) };
        walk
    }

    /// # Safety
    /// The version is held.
    pub(super) unsafe fn enter(&mut self, entry: Entry) {
        if let Way::Inner(node, shift) = entry.way::<LeafHeader, Mapping>() {
            // SAFETY: passed on.
            let ((start, last), ways) = unsafe { (region(node, shift), node.items().len()) };
            let first = if self.from <= start {
                0
            } else if self.from > last {
                ways
            } else {
                way_of(self.from, shift, ways)
            };
            self.stack[self.depth] = (entry, first);
            self.depth += 1;
        } else {
            self.leaf = entry;
            self.at = 0;
        }
    }

    /// The id of the next slot.
    ///
    /// # Safety
    /// The version is held.
    pub(in crate::table) unsafe fn next(&mut self) -> Option<u32> {
        loop {
            if let Way::Leaf(leaf) = self.leaf.way::<LeafHeader, Mapping>() {
                // SAFETY: passed on.
                let (header, mappings) = unsafe { (leaf.header(), leaf.items()) };
                while let Some(mapping) = mappings.get(self.at) {
                    let start = header.base + u64::from(header.from(self.at));
                    let end = header.base + u64::from(mapping.end);
                    self.at += 1;
                    if end > self.from {
                        if start > self.last {
                            self.depth = 0;
                            self.leaf = Entry::NOTHING;
                            return None;
                        }
                        self.from = end;
                        return Some(mapping.label.id());
                    }
                }
            }
            // On to the next way that leads somewhere else than this leaf.
            let left = self.leaf;
            self.leaf = Entry::NOTHING;
            let next = loop {
                let (entry, way) = self.stack.get_mut(self.depth.checked_sub(1)?)?;
                let Way::Inner(node, shift) = entry.way::<LeafHeader, Mapping>() else { return None };
                // SAFETY: passed on.
                let (start, ways) = unsafe { (node.header().start, node.items()) };
                let Some(&next) = ways.get(*way) else {
                    self.depth -= 1;
                    continue;
                };
                if start + ((*way as u64) << shift) > self.last {
                    return None;
                }
                *way += 1;
                if !next.is_nothing() && next != left {
                    break next;
                }
            };
            // SAFETY: passed on.
            unsafe { self.enter(next) };
        }
    }
}
