//! Nodes of intervals: leaves and inner nodes, their bounds, and changing one of them.

use core::ptr::NonNull;

use super::super::node::{Arena, NodePtr};
use super::super::pool::Pool;
use super::super::search::{KEYS, Keys, key, offset};
use crate::error::OutOfMemory;
use crate::slot::Slot;

/// Items in a node, at most.
pub(super) const FAN_OUT: usize = KEYS;

/// One slot: its host pages `[start, start + pages)`.
#[derive(Clone, Copy)]
pub(in crate::table) struct Interval {
    pub(super) start: u64,
    pub(super) pages: u32,
    pub(super) id: u32,
}

impl Interval {
    /// The interval of a slot that has host memory.
    pub(in crate::table) fn of(slot: &Slot) -> Option<Self> {
        let start = slot.hva()?.get() >> slot.page_size().shift();
        Some(Self { start, pages: slot.pages32(), id: slot.id().get() })
    }

    pub(in crate::table) fn key(&self) -> (u64, u32) {
        (self.start, self.id)
    }

    pub(super) fn end(&self) -> u64 {
        self.start + u64::from(self.pages)
    }
}

/// A subtree: its smallest key, the end of its furthest interval, its node.
#[derive(Clone, Copy)]
pub(super) struct Child {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) id: u32,
    pub(super) node: NonNull<u8>,
}

impl Child {
    pub(super) fn key(&self) -> (u64, u32) {
        (self.start, self.id)
    }
}

/// Where the items of a node start and end, counted from the first one's start.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Bounds {
    pub(super) base: u64,
    pub(super) starts: Keys,
    pub(super) ends: Keys,
}

impl Bounds {
    /// Places without an item start behind everything.
    pub(super) fn of(items: impl Iterator<Item = (u64, u64)> + Clone) -> Self {
        let base = items.clone().next().map_or(0, |(start, _)| start);
        let mut bounds = Self { base, starts: Keys([key(u32::MAX); KEYS]), ends: Keys([key(0); KEYS]) };
        for (i, (start, end)) in items.enumerate() {
            bounds.set(i, start, end);
        }
        bounds
    }

    pub(super) fn set(&mut self, at: usize, start: u64, end: u64) {
        self.starts.0[at] = key(saturated(start - self.base).min(u32::MAX - 1));
        self.ends.0[at] = key(saturated(end - self.base));
    }

    /// Which items overlap the pages `[first, last]`, a bit for each.
    #[inline]
    pub(super) fn overlapping(&self, first: u64, last: u64) -> u32 {
        // One page, not far away: both comparisons are with the same number, and that needs no clipping.
        match last.checked_sub(self.base).map(u32::try_from) {
            None => 0,
            Some(Ok(from)) if first == last && from != u32::MAX => {
                self.starts.covering(&self.ends, key(from))
            }
            Some(_) => self.overlapping_many(first, last),
        }
    }

    #[inline(never)]
    fn overlapping_many(&self, first: u64, last: u64) -> u32 {
        let clipped = |page: u64| key(saturated(page.saturating_sub(self.base)).min(u32::MAX - 1));
        !self.starts.above(clipped(last)) & self.ends.above(clipped(first))
    }
}

pub(super) fn saturated(pages: u64) -> u32 {
    u32::try_from(pages).unwrap_or(u32::MAX)
}

/// Whether one leaf can hold intervals that start there.
pub(super) fn one_leaf(first: u64, last: u64) -> bool {
    last - first < 1 << 31
}

/// Leaves hold ids; starts and lengths are in the bounds.
pub(super) type Leaf = NodePtr<Bounds, u32>;

pub(super) type Inner = NodePtr<Bounds, Child>;

/// Gives a node another child in the place of one.
///
/// # Safety
/// The node is private.
pub(super) unsafe fn set_child(inner: Inner, at: usize, child: Child) {
    // SAFETY: passed on; the copies lie outside of the node.
    unsafe {
        let old = core::mem::replace(&mut inner.items_mut()[at], child);
        if at == 0 && old.start != child.start {
            // All bounds count from the first child's start.
            let (children, len) = copy_of(inner.items());
            set_children(inner, &children[..len]);
        } else if (old.start, old.end) != (child.start, child.end) {
            inner.header_mut().set(at, child.start, child.end);
        }
    }
}

/// The items of a leaf, unpacked.
pub(super) struct Intervals {
    pub(super) array: [Interval; FAN_OUT],
    pub(super) len: usize,
}

impl Intervals {
    /// # Safety
    /// The leaf is alive.
    pub(super) unsafe fn of(leaf: Leaf) -> Self {
        // SAFETY: passed on.
        let (bounds, ids) = unsafe { (leaf.header(), leaf.items()) };
        let mut array = [Interval { start: 0, pages: 0, id: 0 }; FAN_OUT];
        for (i, &id) in ids.iter().enumerate() {
            let (start, end) = (offset(bounds.starts.0[i]), offset(bounds.ends.0[i]));
            array[i] = Interval { start: bounds.base + u64::from(start), pages: end - start, id };
        }
        Self { array, len: ids.len() }
    }

    pub(super) fn as_slice(&self) -> &[Interval] {
        &self.array[..self.len]
    }

    pub(super) fn insert(&mut self, at: usize, new: Interval) {
        self.array.copy_within(at..self.len, at + 1);
        self.array[at] = new;
        self.len += 1;
    }

    pub(super) fn remove(&mut self, at: usize) {
        self.array.copy_within(at + 1..self.len, at);
        self.len -= 1;
    }
}

pub(super) fn alloc_leaf(arena: &mut Arena, items: &[Interval]) -> Result<Leaf, OutOfMemory> {
    let mut ids = [0; FAN_OUT];
    for (id, item) in ids.iter_mut().zip(items) {
        *id = item.id;
    }
    let bounds = Bounds::of(items.iter().map(|item| (item.start, item.end())));
    arena.alloc(bounds, &ids[..items.len()], items.len())
}

/// Every inner node has room for [`FAN_OUT`] children.
pub(super) fn alloc_inner(arena: &mut Arena, children: &[Child], level: u8) -> Result<Inner, OutOfMemory> {
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
pub(super) unsafe fn set_children(inner: Inner, children: &[Child]) {
    // SAFETY: passed on.
    unsafe {
        *inner.header_mut() = Bounds::of(children.iter().map(|child| (child.start, child.end)));
        inner.set_items(children);
    }
}

/// A node and its level: leaves are at level 0.
#[derive(Clone, Copy)]
pub(super) enum Node {
    Leaf(Leaf),
    Inner(Inner),
}

impl Node {
    /// # Safety
    /// `raw` is a node of this index that is alive.
    #[inline]
    pub(super) unsafe fn of(raw: NonNull<u8>) -> Self {
        // SAFETY: passed on; every node starts with a head.
        match unsafe { Leaf::from_raw(raw).head().level } {
            0 => Self::Leaf(Leaf::from_raw(raw)),
            _ => Self::Inner(Inner::from_raw(raw)),
        }
    }

    /// # Safety
    /// The node is alive.
    pub(super) unsafe fn len(self) -> usize {
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
    pub(super) unsafe fn as_child(self) -> Child {
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

/// Where the last interval of a leaf starts.
///
/// # Safety
/// The leaf is alive and not empty.
pub(super) unsafe fn last_start(leaf: Leaf) -> u64 {
    // SAFETY: passed on.
    let (bounds, ids) = unsafe { (leaf.header(), leaf.items()) };
    bounds.base + u64::from(offset(bounds.starts.0[(ids.len() - 1) % KEYS]))
}

/// A node's children, to be changed.
pub(super) fn copy_of(children: &[Child]) -> ([Child; FAN_OUT], usize) {
    let mut copy = [children[0]; FAN_OUT];
    copy[..children.len()].copy_from_slice(children);
    (copy, children.len())
}

/// # Safety
/// The node is private and has room.
pub(super) unsafe fn add_child(inner: Inner, child: Child) {
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
pub(super) fn place_in(bounds: &Bounds, ids: &[u32], item: &Interval) -> Option<(usize, u32)> {
    let from = u32::try_from(item.start.checked_sub(bounds.base)?).ok()?;
    // Places that hold nothing are above; a full leaf has none.
    let mut at = (bounds.starts.above(key(from)) | 1 << KEYS).trailing_zeros() as usize;
    while at > 0 && bounds.starts.0[at - 1] == key(from) && ids[at - 1] >= item.id {
        at -= 1;
    }
    Some((at, from))
}

/// Inserts into a leaf that is neither empty nor full, without unpacking it: where it stands if it is private and
/// has room, else in a copy. Returns the leaf that the caller links in the old one's place at once, or `None`, with
/// nothing done, where the item would be the first.
///
/// # Safety
/// The leaf is alive and belongs to the working version.
pub(super) unsafe fn insert_packed(
    arena: &mut Arena,
    leaf: Leaf,
    new: Interval,
) -> Result<Option<Leaf>, OutOfMemory> {
    // SAFETY: a leaf is written only once it is private, and after the last use of what was read of it.
    unsafe {
        // A new first item of the same start is fine: the base stays.
        let Some((at, from)) = place_in(leaf.header(), leaf.items(), &new) else { return Ok(None) };
        let leaf = arena.with_item(leaf, at, new.id)?;
        let bounds = leaf.header_mut();
        bounds.starts.insert(at, key(from));
        bounds.ends.insert(at, key(from + new.pages));
        Ok(Some(leaf))
    }
}

/// Removes from a leaf; otherwise as [`insert_packed`]. `None` where the item is the only one.
///
/// # Safety
/// As [`insert_packed`].
pub(super) unsafe fn remove_packed(
    arena: &mut Arena,
    leaf: Leaf,
    old: Interval,
) -> Result<Option<Leaf>, OutOfMemory> {
    // SAFETY: as above.
    unsafe {
        let (bounds, ids) = (leaf.header(), leaf.items());
        let at = match place_in(bounds, ids, &old) {
            Some((at, _)) if ids.len() > 1 && ids.get(at) == Some(&old.id) => at,
            _ => return Ok(None),
        };
        let leaf = arena.without_item(leaf, at)?;
        let bounds = leaf.header_mut();
        bounds.starts.remove(at, key(u32::MAX));
        bounds.ends.remove(at, key(0));
        if at == 0 {
            // All bounds count from the first item's start.
            let step = offset(bounds.starts.0[0]);
            bounds.base += u64::from(step);
            let len = leaf.items().len();
            for key in bounds.starts.0[..len].iter_mut().chain(&mut bounds.ends.0[..len]) {
                *key = key.wrapping_sub_unsigned(step);
            }
        }
        Ok(Some(leaf))
    }
}

/// # Safety
/// `inner` is private.
pub(super) unsafe fn drop_child(inner: Inner, at: usize) {
    // SAFETY: passed on; the buffer is a copy.
    unsafe {
        let (mut children, len) = copy_of(inner.items());
        children.copy_within(at + 1..len, at);
        set_children(inner, &children[..len - 1]);
    }
}
