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
//! copy is linked before the next step (see `gfn_index.rs` for why). A full child is split on the way down, so
//! that its parent always has room; what becomes small is merged on the way up.

use core::ptr::NonNull;

use super::node::{Arena, NodePtr, Pool};
use super::search::{KEYS, Keys, key, offset};
use crate::error::OutOfMemory;
use crate::slot::Slot;

/// Items in a node, at most.
const FAN_OUT: usize = KEYS;
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

/// Where the items of a node start and end, counted from the first one's start.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Bounds {
    base: u64,
    starts: Keys,
    ends: Keys,
}

impl Bounds {
    /// Places without an item start behind everything.
    fn of(items: impl Iterator<Item = (u64, u64)> + Clone) -> Self {
        let base = items.clone().next().map_or(0, |(start, _)| start);
        let mut bounds = Self { base, starts: Keys([key(u32::MAX); KEYS]), ends: Keys([key(0); KEYS]) };
        for (i, (start, end)) in items.enumerate() {
            bounds.set(i, start, end);
        }
        bounds
    }

    fn set(&mut self, at: usize, start: u64, end: u64) {
        self.starts.0[at] = key(saturated(start - self.base).min(u32::MAX - 1));
        self.ends.0[at] = key(saturated(end - self.base));
    }

    /// Which items overlap `[start, end)`, a bit for each.
    #[inline]
    fn overlapping(&self, start: u64, end: u64) -> u32 {
        let end = saturated(end.saturating_sub(self.base));
        let start = saturated(start.saturating_sub(self.base)).min(u32::MAX - 1);
        match end.checked_sub(1) {
            Some(last) => !self.starts.above(key(last)) & self.ends.above(key(start)),
            None => 0,
        }
    }
}

fn saturated(pages: u64) -> u32 {
    u32::try_from(pages).unwrap_or(u32::MAX)
}

/// Whether one leaf can hold intervals that start there.
fn one_leaf(first: u64, last: u64) -> bool {
    last - first < 1 << 31
}

/// Leaves hold ids; starts and lengths are in the bounds.
type Leaf = NodePtr<Bounds, u32>;
type Inner = NodePtr<Bounds, Child>;

/// Gives a node another child in the place of one.
///
/// # Safety
/// The node is private.
unsafe fn set_child(inner: Inner, at: usize, child: Child) {
    // SAFETY: passed on; the copies lie outside of the node.
    unsafe {
        let old = core::mem::replace(&mut inner.items_mut()[at], child);
        if at == 0 && old.start != child.start {
            // All bounds count from the first child's start.
            let (children, len) = copy_of(inner.items());
            set_children(inner, &children[..len]);
        } else if (old.start, old.end) != (child.start, child.end) {
            let mut bounds = *inner.header();
            bounds.set(at, child.start, child.end);
            inner.set_header(bounds);
        }
    }
}

/// The items of a leaf, unpacked.
struct Intervals {
    array: [Interval; FAN_OUT],
    len: usize,
}

impl Intervals {
    /// # Safety
    /// The leaf is alive.
    unsafe fn of(leaf: Leaf) -> Self {
        // SAFETY: passed on.
        let (bounds, ids) = unsafe { (leaf.header(), leaf.items()) };
        let mut array = [Interval { start: 0, pages: 0, id: 0 }; FAN_OUT];
        for (i, &id) in ids.iter().enumerate() {
            let (start, end) = (offset(bounds.starts.0[i]), offset(bounds.ends.0[i]));
            array[i] = Interval { start: bounds.base + u64::from(start), pages: end - start, id };
        }
        Self { array, len: ids.len() }
    }

    fn as_slice(&self) -> &[Interval] {
        &self.array[..self.len]
    }

    fn insert(&mut self, at: usize, new: Interval) {
        self.array.copy_within(at..self.len, at + 1);
        self.array[at] = new;
        self.len += 1;
    }

    fn remove(&mut self, at: usize) {
        self.array.copy_within(at + 1..self.len, at);
        self.len -= 1;
    }
}

fn alloc_leaf(arena: &mut Arena, items: &[Interval]) -> Result<Leaf, OutOfMemory> {
    let mut ids = [0; FAN_OUT];
    for (id, item) in ids.iter_mut().zip(items) {
        *id = item.id;
    }
    let bounds = Bounds::of(items.iter().map(|item| (item.start, item.end())));
    arena.alloc(bounds, &ids[..items.len()], items.len())
}

/// Every inner node has room for [`FAN_OUT`] children.
fn alloc_inner(arena: &mut Arena, children: &[Child], level: u8) -> Result<Inner, OutOfMemory> {
    let bounds = Bounds::of(children.iter().map(|child| (child.start, child.end)));
    let inner = arena.alloc(bounds, children, FAN_OUT)?;
    // SAFETY: the node is new and private.
    unsafe { Pool::set_level(inner, level) };
    Ok(inner)
}

/// Gives a node other children.
///
/// # Safety
/// The node is private.
unsafe fn set_children(inner: Inner, children: &[Child]) {
    // SAFETY: passed on.
    unsafe {
        inner.set_header(Bounds::of(children.iter().map(|child| (child.start, child.end))));
        inner.set_items(children);
    }
}

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
                    let Bounds { base, ends, .. } = leaf.header();
                    let end = ends.0.iter().map(|&end| offset(end)).max().unwrap_or(0);
                    Child { start: *base, end: base + u64::from(end), id: leaf.items()[0], node: leaf.raw() }
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
                self.root = Some(alloc_leaf(arena, &[new])?.raw());
                return Ok(());
            };
            let mut child = Node::of(root).as_child();
            if Node::of(root).len() == FAN_OUT || !fits(child, new) {
                let level = Leaf::from_raw(root).head().level + 1;
                let parent = alloc_inner(arena, &[child], level)?;
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
            Node::Leaf(leaf) if insert_in_place(arena, leaf, new) => {}
            Node::Leaf(leaf) => {
                let mut items = Intervals::of(leaf);
                let at = items.as_slice().partition_point(|item| item.key() < new.key());
                items.insert(at, new);
                replace_leaf(arena, place, leaf, items.as_slice())?;
            }
            Node::Inner(inner) => {
                let inner = arena.privately(inner)?;
                place.node = inner.raw();
                let mut at = child_for(inner, new.key());
                if !fits(inner.items()[at], new) {
                    // Too far from the leaf where it would belong: a leaf of its own.
                    let child = Node::Leaf(alloc_leaf(arena, &[new])?).as_child();
                    add_child(inner, child);
                } else {
                    if Node::of(inner.items()[at].node).len() == FAN_OUT {
                        split(arena, inner, at, new.key())?;
                        at = child_for(inner, new.key());
                    }
                    let mut child = inner.items()[at];
                    let result = insert(arena, &mut child, new);
                    set_child(inner, at, child);
                    result?;
                }
            }
        }
        if new.key() < place.key() {
            (place.start, place.id) = new.key();
        }
        place.end = place.end.max(new.end());
        Ok(())
    }
}

/// The child below which a key belongs.
///
/// # Safety
/// The node is alive.
unsafe fn child_for(inner: Inner, key: (u64, u32)) -> usize {
    // SAFETY: passed on.
    unsafe { inner.items() }.partition_point(|child| child.key() <= key).saturating_sub(1)
}

/// Whether `new` can go below `child`: always, unless the child is a leaf and would span too much.
///
/// # Safety
/// The child is alive.
unsafe fn fits(child: Child, new: Interval) -> bool {
    // SAFETY: passed on.
    match unsafe { Node::of(child.node) } {
        Node::Leaf(leaf) => {
            // SAFETY: passed on.
            let last = unsafe { last_start(leaf) };
            one_leaf(child.start.min(new.start), last.max(new.start))
        }
        Node::Inner(_) => true,
    }
}

/// Where the last interval of a leaf starts.
///
/// # Safety
/// The leaf is alive and not empty.
unsafe fn last_start(leaf: Leaf) -> u64 {
    // SAFETY: passed on.
    let (bounds, ids) = unsafe { (leaf.header(), leaf.items()) };
    bounds.base + u64::from(offset(bounds.starts.0[(ids.len() - 1) % KEYS]))
}

/// A node's children, to be changed.
fn copy_of(children: &[Child]) -> ([Child; FAN_OUT], usize) {
    let mut copy = [children[0]; FAN_OUT];
    copy[..children.len()].copy_from_slice(children);
    (copy, children.len())
}

/// # Safety
/// The node is private and has room.
unsafe fn add_child(inner: Inner, child: Child) {
    // SAFETY: passed on; the copy lies outside of the node.
    unsafe {
        let (mut children, len) = copy_of(inner.items());
        let at = children[..len].partition_point(|other| other.key() < child.key());
        children.copy_within(at..len, at + 1);
        children[at] = child;
        set_children(inner, &children[..=len]);
    }
}

/// Where a key belongs in a leaf, and how far its start lies behind the base; `None` before the base.
fn place_in(bounds: &Bounds, ids: &[u32], item: &Interval) -> Option<(usize, u32)> {
    let from = u32::try_from(item.start.checked_sub(bounds.base)?).ok()?;
    // Places that hold nothing are above; a full leaf has none.
    let mut at = (bounds.starts.above(key(from)) | 1 << KEYS).trailing_zeros() as usize;
    while at > 0 && bounds.starts.0[at - 1] == key(from) && ids[at - 1] >= item.id {
        at -= 1;
    }
    Some((at, from))
}

/// Inserts into a private leaf that has room and whose base stays. Returns whether it did.
///
/// # Safety
/// The leaf is alive and belongs to the working version; it has less than [`FAN_OUT`] items.
unsafe fn insert_in_place(arena: &Arena, leaf: Leaf, new: Interval) -> bool {
    // SAFETY: the leaf is written only if it is private, and after the last use of what was read of it.
    unsafe {
        let (mut bounds, ids) = (*leaf.header(), leaf.items());
        match place_in(&bounds, ids, &new) {
            // A new first item of the same start is fine: the base stays.
            Some((at, from)) if arena.is_private(leaf) && ids.len() < leaf.capacity() => {
                bounds.starts.insert(at, key(from));
                bounds.ends.insert(at, key(from + new.pages));
                leaf.insert_item(at, new.id);
                leaf.set_header(bounds);
                true
            }
            _ => false,
        }
    }
}

/// Removes from a private leaf whose base stays. Returns whether it did.
///
/// # Safety
/// As [`insert_in_place`].
unsafe fn remove_in_place(arena: &Arena, leaf: Leaf, old: Interval) -> bool {
    // SAFETY: as above.
    unsafe {
        let (mut bounds, ids) = (*leaf.header(), leaf.items());
        match place_in(&bounds, ids, &old) {
            Some((at, _)) if at > 0 && ids.get(at) == Some(&old.id) && arena.is_private(leaf) => {
                bounds.starts.remove(at, key(u32::MAX));
                bounds.ends.remove(at, key(0));
                leaf.remove_item(at);
                leaf.set_header(bounds);
                true
            }
            _ => false,
        }
    }
}

/// Replaces a leaf by one with other items.
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
        arena.reserve_dead(1)?;
        if items.is_empty() {
            // The parent drops it; until then it is empty.
            let empty: Leaf = arena.alloc(Bounds::of([].into_iter()), &[], 0)?;
            place.node = empty.raw();
        } else {
            place.node = alloc_leaf(arena, items)?.raw();
        }
        arena.discard(leaf);
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
                let items = Intervals::of(leaf);
                let items = items.as_slice();
                let from = split_point(key < items[0].key(), key > items[FAN_OUT - 1].key());
                arena.reserve_dead(1)?;
                let left = alloc_leaf(arena, &items[..from])?;
                let right = alloc_leaf(arena, &items[from..]).inspect_err(|_| arena.free_private(left))?;
                arena.discard(leaf);
                (Node::Leaf(left), Node::Leaf(right))
            }
            Node::Inner(node) => {
                let items = node.items();
                let from = split_point(key < items[0].key(), key > items[FAN_OUT - 1].key());
                let level = node.head().level;
                arena.reserve_dead(1)?;
                let left = alloc_inner(arena, &items[..from], level)?;
                let right =
                    alloc_inner(arena, &items[from..], level).inspect_err(|_| arena.free_private(left))?;
                arena.discard(node);
                (Node::Inner(left), Node::Inner(right))
            }
        };
        inner.items_mut()[at] = left.as_child();
        add_child(inner, right.as_child());
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
            Node::Leaf(leaf) if remove_in_place(arena, leaf, old) => {}
            Node::Leaf(leaf) => {
                let mut items = Intervals::of(leaf);
                let at = items.as_slice().partition_point(|item| item.key() < old.key());
                debug_assert!(items.as_slice().get(at).is_some_and(|item| item.key() == old.key()));
                items.remove(at);
                replace_leaf(arena, place, leaf, items.as_slice())?;
            }
            Node::Inner(inner) => {
                let inner = arena.privately(inner)?;
                place.node = inner.raw();
                let at = child_for(inner, old.key());
                let mut child = inner.items()[at];
                let result = remove(arena, &mut child, old);
                set_child(inner, at, child);
                result?;
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
        let apart = match (left, right) {
            (Node::Leaf(a), Node::Leaf(b)) => !one_leaf(a.header().base, last_start(b)),
            _ => false,
        };
        if len > MERGE_ITEMS || apart {
            return Ok(());
        }
        arena.reserve_dead(2)?;
        let joined = match (left, right) {
            (Node::Leaf(a), Node::Leaf(b)) => {
                let (mut items, others) = (Intervals::of(a), Intervals::of(b));
                items.array[first..len].copy_from_slice(others.as_slice());
                let joined = alloc_leaf(arena, &items.array[..len])?;
                arena.discard(a);
                arena.discard(b);
                Node::Leaf(joined)
            }
            (Node::Inner(a), Node::Inner(b)) => {
                let mut buffer = [a.items()[0]; FAN_OUT];
                buffer[..first].copy_from_slice(a.items());
                buffer[first..len].copy_from_slice(b.items());
                let joined = alloc_inner(arena, &buffer[..len], a.head().level)?;
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
        let (mut children, len) = copy_of(inner.items());
        children.copy_within(at + 1..len, at);
        set_children(inner, &children[..len - 1]);
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
