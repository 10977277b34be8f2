//! hva → slots: a B+tree of intervals, which may overlap.
//!
//! Several slots may stand on the same host memory (QEMU shows its VGA memory at two guest addresses), so the
//! hva index keeps intervals sorted by (start, slot id), and every inner node knows for each child where the
//! last interval below it ends. A search for `[start, end)` follows the children that begin before `end` and
//! end behind `start`; with disjoint slots that is one path.
//!
//! All numbers here are host *pages*. Nodes are copied before they are changed, from the root down, and the
//! copy is linked before the next step (see `gfn_index.rs` for why). A full child is split on the way down, so
//! that its parent always has room; what becomes small is merged on the way up.

use core::ptr::NonNull;

use super::node::{Arena, NodePtr, Pool};
use crate::error::OutOfMemory;
use crate::slot::Slot;

/// Items in a node, at most.
const FAN_OUT: usize = 16;
/// Two neighbours become one node when they have this many items or fewer together.
const MERGE_ITEMS: usize = 10;

/// One slot: its host pages `[start, start + pages)`.
#[derive(Clone, Copy)]
pub(super) struct Interval {
    start: u64,
    pages: u32,
    id: u32,
}

impl Interval {
    /// The interval of a slot that has host memory.
    pub(super) fn of(slot: &Slot) -> Option<Self> {
        let start = slot.hva()?.get() >> slot.page_size().shift();
        Some(Self { start, pages: slot.pages32(), id: slot.id().get() })
    }

    fn key(&self) -> (u64, u32) {
        (self.start, self.id)
    }

    fn end(&self) -> u64 {
        self.start + u64::from(self.pages)
    }
}

/// A subtree: its smallest key, the end of its furthest interval, its node.
#[derive(Clone, Copy)]
struct Child {
    start: u64,
    end: u64,
    id: u32,
    node: NonNull<u8>,
}

impl Child {
    fn key(&self) -> (u64, u32) {
        (self.start, self.id)
    }
}

type Leaf = NodePtr<(), Interval>;
type Inner = NodePtr<(), Child>;

/// A node and its level: leaves are at level 0.
#[derive(Clone, Copy)]
enum Node {
    Leaf(Leaf),
    Inner(Inner),
}

impl Node {
    /// # Safety
    /// `raw` is a node of this index that is alive.
    #[inline]
    unsafe fn of(raw: NonNull<u8>) -> Self {
        // SAFETY: passed on; every node starts with a head.
        match unsafe { Leaf::from_raw(raw).head().level } {
            0 => Self::Leaf(Leaf::from_raw(raw)),
            _ => Self::Inner(Inner::from_raw(raw)),
        }
    }

    /// # Safety
    /// The node is alive.
    unsafe fn len(self) -> usize {
        // SAFETY: passed on.
        unsafe {
            match self {
                Self::Leaf(leaf) => leaf.items().len(),
                Self::Inner(inner) => inner.items().len(),
            }
        }
    }

    /// The node as its parent describes it.
    ///
    /// # Safety
    /// The node is alive and not empty.
    unsafe fn as_child(self) -> Child {
        // SAFETY: passed on.
        unsafe {
            match self {
                Self::Leaf(leaf) => {
                    let items = leaf.items();
                    let end = items.iter().map(Interval::end).max().unwrap_or(0);
                    Child { start: items[0].start, end, id: items[0].id, node: leaf.raw() }
                }
                Self::Inner(inner) => {
                    let items = inner.items();
                    let end = items.iter().map(|child| child.end).max().unwrap_or(0);
                    Child { start: items[0].start, end, id: items[0].id, node: inner.raw() }
                }
            }
        }
    }
}

/// The index of one address space in one version; copying it copies the root only.
#[derive(Clone, Copy)]
pub(super) struct HvaIndex {
    root: Option<NonNull<u8>>,
}

impl HvaIndex {
    pub(super) const EMPTY: Self = Self { root: None };

    /// Adds an interval that is not there.
    ///
    /// # Safety
    /// The index belongs to the writer's working version, whose stamp is the arena's.
    pub(super) unsafe fn insert(&mut self, arena: &mut Arena, new: Interval) -> Result<(), OutOfMemory> {
        // SAFETY: the root is the writer's own; what it names belongs to the working version.
        unsafe {
            let Some(root) = self.root else {
                self.root = Some(arena.alloc((), &[new], 1)?.raw());
                return Ok(());
            };
            let mut child = Node::of(root).as_child();
            if Node::of(root).len() == FAN_OUT {
                let level = Leaf::from_raw(root).head().level;
                let parent: Inner = arena.alloc((), &[child], FAN_OUT)?;
                Pool::set_level(parent, level + 1);
                self.root = Some(parent.raw());
                child = Node::Inner(parent).as_child();
            }
            let result = insert(arena, &mut child, new);
            self.root = Some(child.node);
            result
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

/// Inserts below `place`, whose node is not full. `place` names the private copy afterwards, also on failure.
///
/// # Safety
/// The node belongs to the working version.
unsafe fn insert(arena: &mut Arena, place: &mut Child, new: Interval) -> Result<(), OutOfMemory> {
    // SAFETY: passed on; only private nodes are written.
    unsafe {
        match Node::of(place.node) {
            Node::Leaf(leaf) => {
                let items = leaf.items();
                let at = items.partition_point(|item| item.key() < new.key());
                let mut buffer = [new; FAN_OUT];
                buffer[..at].copy_from_slice(&items[..at]);
                buffer[at + 1..=items.len()].copy_from_slice(&items[at..]);
                let len = items.len() + 1;
                replace_leaf(arena, place, leaf, &buffer[..len])?;
            }
            Node::Inner(inner) => {
                let inner = arena.privately(inner)?;
                place.node = inner.raw();
                let mut at = inner.items().partition_point(|child| child.key() <= new.key()).saturating_sub(1);
                if Node::of(inner.items()[at].node).len() == FAN_OUT {
                    split(arena, inner, at, new.key())?;
                    at = inner.items().partition_point(|child| child.key() <= new.key()).saturating_sub(1);
                }
                insert(arena, &mut inner.items_mut()[at], new)?;
            }
        }
        if new.key() < place.key() {
            (place.start, place.id) = new.key();
        }
        place.end = place.end.max(new.end());
        Ok(())
    }
}

/// Gives a leaf other items: in place where it is private and they fit, else in a new one.
///
/// # Safety
/// The leaf belongs to the working version and is what `place` names; `items` lies outside of it.
unsafe fn replace_leaf(
    arena: &mut Arena,
    place: &mut Child,
    leaf: Leaf,
    items: &[Interval],
) -> Result<(), OutOfMemory> {
    // SAFETY: passed on; the leaf is written only if it is private.
    unsafe {
        // Within a line of the right size, so that leaves stay small also after many removals.
        if arena.is_private(leaf) && items.len() <= leaf.capacity() && items.len() + 4 > leaf.capacity() {
            leaf.set_items(items);
        } else {
            arena.reserve_dead(1)?;
            place.node = arena.alloc((), items, items.len())?.raw();
            arena.discard(leaf);
        }
        Ok(())
    }
}

/// Splits the full child `at` of a private node that has room.
///
/// Keys that arrive in order (a VMM that plugs memory upwards) go to the end of a node: there nearly all
/// stays in the left half, so that the nodes left behind are full and not half empty.
///
/// # Safety
/// `inner` is private; its children belong to the working version.
unsafe fn split(arena: &mut Arena, inner: Inner, at: usize, key: (u64, u32)) -> Result<(), OutOfMemory> {
    // SAFETY: passed on; only private nodes are written.
    unsafe {
        let child = inner.items()[at];
        let (left, right) = match Node::of(child.node) {
            Node::Leaf(leaf) => {
                let items = leaf.items();
                let from = split_point(key < items[0].key(), key > items[FAN_OUT - 1].key());
                arena.reserve_dead(1)?;
                let left: Leaf = arena.alloc((), &items[..from], from)?;
                let right: Leaf = arena
                    .alloc((), &items[from..], FAN_OUT - from)
                    .inspect_err(|_| arena.free_private(left))?;
                arena.discard(leaf);
                (Node::Leaf(left), Node::Leaf(right))
            }
            Node::Inner(node) => {
                let items = node.items();
                let from = split_point(key < items[0].key(), key > items[FAN_OUT - 1].key());
                let level = node.head().level;
                arena.reserve_dead(1)?;
                let left: Inner = arena.alloc((), &items[..from], FAN_OUT)?;
                let right: Inner = arena
                    .alloc((), &items[from..], FAN_OUT)
                    .inspect_err(|_| arena.free_private(left))?;
                Pool::set_level(left, level);
                Pool::set_level(right, level);
                arena.discard(node);
                (Node::Inner(left), Node::Inner(right))
            }
        };
        let items = inner.items();
        let mut buffer = [child; FAN_OUT];
        buffer[..at].copy_from_slice(&items[..at]);
        buffer[at] = left.as_child();
        buffer[at + 1] = right.as_child();
        buffer[at + 2..=items.len()].copy_from_slice(&items[at + 1..]);
        let len = items.len() + 1;
        inner.set_items(&buffer[..len]);
        Ok(())
    }
}

fn split_point(before_all: bool, after_all: bool) -> usize {
    match (before_all, after_all) {
        (true, _) => 1,
        (_, true) => FAN_OUT - 1,
        _ => FAN_OUT / 2,
    }
}

/// Removes from below `place`, which names the private copy afterwards, also on failure.
///
/// # Safety
/// The node belongs to the working version.
unsafe fn remove(arena: &mut Arena, place: &mut Child, old: Interval) -> Result<(), OutOfMemory> {
    // SAFETY: passed on; only private nodes are written.
    unsafe {
        match Node::of(place.node) {
            Node::Leaf(leaf) => {
                let items = leaf.items();
                let at = items.partition_point(|item| item.key() < old.key());
                debug_assert!(items.get(at).is_some_and(|item| item.key() == old.key()));
                let mut buffer = [old; FAN_OUT];
                let len = items.len() - 1;
                buffer[..at].copy_from_slice(&items[..at]);
                buffer[at..len].copy_from_slice(&items[at + 1..]);
                replace_leaf(arena, place, leaf, &buffer[..len])?;
            }
            Node::Inner(inner) => {
                let inner = arena.privately(inner)?;
                place.node = inner.raw();
                let at = inner.items().partition_point(|child| child.key() <= old.key()).saturating_sub(1);
                remove(arena, &mut inner.items_mut()[at], old)?;
                tidy(arena, inner, at)?;
            }
        }
        if Node::of(place.node).len() > 0 {
            *place = Node::of(place.node).as_child();
        }
        Ok(())
    }
}

/// After a removal below child `at`: drops the child if it is empty, joins it with a neighbour if both are small.
///
/// # Safety
/// `inner` is private; its children belong to the working version.
unsafe fn tidy(arena: &mut Arena, inner: Inner, at: usize) -> Result<(), OutOfMemory> {
    // SAFETY: passed on; only private nodes are written.
    unsafe {
        let node = Node::of(inner.items()[at].node);
        if node.len() == 0 {
            match node {
                Node::Leaf(leaf) => arena.free_private(leaf),
                Node::Inner(empty) => arena.free_private(empty),
            }
            drop_child(inner, at);
            return Ok(());
        }
        let low = if at > 0 { at - 1 } else { at };
        let Some(&[left, right]) = inner.items().get(low..low + 2) else { return Ok(()) };
        let (left, right) = (Node::of(left.node), Node::of(right.node));
        let (first, len) = (left.len(), left.len() + right.len());
        if len > MERGE_ITEMS {
            return Ok(());
        }
        arena.reserve_dead(2)?;
        let joined = match (left, right) {
            (Node::Leaf(a), Node::Leaf(b)) => {
                let mut buffer = [a.items()[0]; FAN_OUT];
                buffer[..first].copy_from_slice(a.items());
                buffer[first..len].copy_from_slice(b.items());
                let joined = arena.alloc((), &buffer[..len], len)?;
                arena.discard(a);
                arena.discard(b);
                Node::Leaf(joined)
            }
            (Node::Inner(a), Node::Inner(b)) => {
                let mut buffer = [a.items()[0]; FAN_OUT];
                buffer[..first].copy_from_slice(a.items());
                buffer[first..len].copy_from_slice(b.items());
                let joined = arena.alloc((), &buffer[..len], FAN_OUT)?;
                Pool::set_level(joined, a.head().level);
                arena.discard(a);
                arena.discard(b);
                Node::Inner(joined)
            }
            _ => unreachable!("neighbours have the same level"),
        };
        inner.items_mut()[low] = joined.as_child();
        drop_child(inner, low + 1);
        Ok(())
    }
}

/// # Safety
/// `inner` is private.
unsafe fn drop_child(inner: Inner, at: usize) {
    // SAFETY: passed on; the buffer is a copy.
    unsafe {
        let items = inner.items();
        let mut buffer = [items[0]; FAN_OUT];
        let len = items.len() - 1;
        buffer[..at].copy_from_slice(&items[..at]);
        buffer[at..len].copy_from_slice(&items[at + 1..]);
        inner.set_items(&buffer[..len]);
    }
}

/// Frees the private nodes of a subtree. A published node has no private ones below it.
///
/// # Safety
/// The subtree belongs to the working version, and nobody uses it again.
unsafe fn free_private(arena: &mut Arena, raw: NonNull<u8>) {
    // SAFETY: passed on; every node stands in one place.
    unsafe {
        match Node::of(raw) {
            Node::Leaf(leaf) if arena.is_private(leaf) => arena.free_private(leaf),
            Node::Inner(inner) if arena.is_private(inner) => {
                for child in inner.items() {
                    free_private(arena, child.node);
                }
                arena.free_private(inner);
            }
            _ => {}
        }
    }
}

/// More levels than 2^32 slots can need.
const DEPTH: usize = 12;

/// The intervals that overlap `[start, end)`, in order of (start, id).
///
/// A node's items are all compared when it is entered, without a branch on the outcome; what is left to visit is
/// a mask. With a branch for each item, the processor would guess wrong once in every node.
#[derive(Clone)]
pub(super) struct Search {
    /// The way down: nodes with the items still to visit.
    stack: [(NonNull<u8>, u32); DEPTH],
    depth: usize,
    start: u64,
    end: u64,
}

impl Search {
    /// # Safety
    /// The index belongs to a version that is held while the search is used.
    #[inline]
    pub(super) unsafe fn new(index: HvaIndex, start: u64, end: u64) -> Self {
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
    unsafe fn enter(&mut self, raw: NonNull<u8>) {
        let mut mask = 0;
        let mut visit = |i, start: u64, end: u64| {
            mask |= u32::from((start < self.end) & (end > self.start)) << i;
        };
        // SAFETY: passed on.
        match unsafe { Node::of(raw) } {
            Node::Leaf(leaf) => {
                // SAFETY: as above.
                for (i, item) in unsafe { leaf.items() }.iter().enumerate() {
                    visit(i, item.start, item.end());
                }
            }
            Node::Inner(inner) => {
                // SAFETY: as above.
                for (i, child) in unsafe { inner.items() }.iter().enumerate() {
                    visit(i, child.start, child.end);
                }
            }
        }
        self.stack[self.depth] = (raw, mask);
        self.depth += 1;
    }

    /// The id of the next slot.
    ///
    /// # Safety
    /// The version is held.
    #[inline]
    pub(super) unsafe fn next(&mut self) -> Option<u32> {
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
                    Node::Leaf(leaf) => return Some(leaf.item(at).id),
                    Node::Inner(inner) => {
                        let node = inner.item(at).node;
                        self.enter(node);
                    }
                }
            }
        }
    }
}
