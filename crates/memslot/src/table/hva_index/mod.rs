//! hva → slots: a B+tree of intervals, which may overlap.
//!
//! Several slots may stand on the same host memory (QEMU shows its VGA memory at two guest addresses), so the
//! hva index keeps intervals sorted by (start, slot id), and every inner node knows for each child where the
//! last interval below it ends. A search for `[start, end)` follows the children that begin before `end` and
//! end behind `start`; with disjoint slots that is one path.
//!
//! A node keeps where its items start and end as 32-bit offsets from its first one, which are compared all at once
//! (`search.rs`). In a leaf they are exact, so a leaf spans less than 2^31 pages (user space has room for a handful
//! of such leaves); in an inner node they are rounded outwards, and a child too many may be visited.
//!
//! All numbers here are host *pages*. Nodes are copied before they are changed, from the root down, and the
//! copy is linked before the next step (see `gfn_index` for why). A full child is split on the way down, so
//! that its parent always has room, unless a neighbour can take some of its items: nodes are fuller that way, which
//! saves memory and, at tens of thousands of slots, a level. What becomes small is merged on the way up. A sorted
//! run of intervals goes down together: a node takes those that belong below it until it is full.

mod edit;
mod node;
mod search;

pub(super) use self::node::Interval;
pub(super) use self::search::Search;

use core::ptr::NonNull;

use self::edit::{fits, free_private, insert, remove};
use self::node::{FAN_OUT, Leaf, Node, alloc_inner, alloc_leaf};
use super::node::Arena;
use crate::error::OutOfMemory;

/// The index of one address space in one version; copying it copies the root only.
#[derive(Clone, Copy)]
pub(super) struct HvaIndex {
    root: Option<NonNull<u8>>,
}

impl HvaIndex {
    pub(super) const EMPTY: Self = Self { root: None };

    /// Adds intervals that are not there, in ascending order of (start, id).
    ///
    /// # Safety
    /// The index belongs to the writer's working version, whose stamp is the arena's.
    pub(super) unsafe fn insert(
        &mut self,
        arena: &mut Arena,
        mut run: &[Interval],
    ) -> Result<(), OutOfMemory> {
        // SAFETY: the root is the writer's own; what it names belongs to the working version.
        unsafe {
            while let Some(&new) = run.first() {
                let Some(root) = self.root else {
                    self.root = Some(alloc_leaf(arena, &[new])?.raw());
                    run = &run[1..];
                    continue;
                };
                let mut child = Node::of(root).as_child();
                if Node::of(root).len() == FAN_OUT || !fits(child, new) {
                    let level = Leaf::from_raw(root).head().level + 1;
                    let parent = alloc_inner(arena, &[child], level)?;
                    self.root = Some(parent.raw());
                    child = Node::Inner(parent).as_child();
                }
                let result = insert(arena, &mut child, run);
                self.root = Some(child.node);
                run = &run[result?..];
            }
            Ok(())
        }
    }

    /// Removes an interval that is there.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn remove(&mut self, arena: &mut Arena, old: Interval) -> Result<(), OutOfMemory> {
        let Some(root) = self.root else { return Ok(()) };
        // SAFETY: the root is the writer's own; what it names belongs to the working version.
        unsafe {
            let mut child = Node::of(root).as_child();
            let result = remove(arena, &mut child, old);
            self.root = Some(child.node);
            result?;
            match Node::of(child.node) {
                Node::Leaf(leaf) if leaf.items().is_empty() => {
                    self.root = None;
                    arena.free_private(leaf);
                }
                Node::Inner(inner) if inner.items().len() == 1 => {
                    self.root = Some(inner.items()[0].node);
                    arena.free_private(inner);
                }
                _ => {}
            }
            Ok(())
        }
    }

    /// Frees every private node: the change did not come to be.
    ///
    /// # Safety
    /// As [`insert`](Self::insert), and the working version is not used again.
    pub(super) unsafe fn abandon(self, arena: &mut Arena) {
        if let Some(root) = self.root {
            // SAFETY: passed on.
            unsafe { free_private(arena, root) };
        }
    }
}
