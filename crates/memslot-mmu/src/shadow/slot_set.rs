//! The set of slots that a shadow page maps.
//!
//! When a slot is deleted, moved or write-protected, only pages that map something of it need to be looked through. So each
//! page says which slots it maps; a guest may have thousands of slots, a page hardly ever maps more than a few.
//!
//! # The two forms
//!
//! Slot ids are taken in groups of 64. A set whose ids are all of one group, whichever that is, is *inline*: the
//! group's number and a word of bits, in the page itself, with no memory besides. Other sets have further groups in *nodes*,
//! a cache line each. Which form it has is recorded in the set: inline is a set without nodes. It depends on nothing but
//! its own contents: neither on how many slots there are nor how many there may be, so pages of both forms live side by side while
//! the number of slots grows, and no page has to be rebuilt then. When ids leave, nodes go back and a set becomes inline again.
//!
//! # Nothing fails under a lock
//!
//! Adding one id takes at most one node, from a [`SlotSetCache`] that was [topped up](SlotSetCache::top_up) before the lock was taken.
//! Nodes that are not needed any more go back there.
//!
//! # What it does not promise
//!
//! The set knows nothing of entries. Whoever keeps it adds the slot before the entry, and may leave the slot in when the last entry
//! goes: then the set says *may map*. It has to take it out when the slot is deleted, before the id is used for another slot.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use memslot::{OutOfMemory, SlotId};

/// Ids in a group.
const GROUP: u32 = u64::BITS;
/// Groups in a node: as many as a cache line holds.
const GROUPS: usize = 4;

/// Some slots, by id. See the [module documentation](self).
///
/// ```
/// use memslot::SlotId;
/// use memslot_mmu::shadow::{SlotSet, SlotSetCache};
///
/// let mut cache = SlotSetCache::default();
/// let mut set = SlotSet::default();
/// assert!(set.insert(SlotId::new(509), &mut cache)?); // inline: no memory
/// cache.top_up(1)?; // before the lock
/// assert!(set.insert(SlotId::new(3), &mut cache)?);
/// assert!(set.contains(SlotId::new(3)) && set.contains(SlotId::new(509)));
/// assert!(set.remove(SlotId::new(509), &mut cache) && set.is_inline());
/// # Ok::<(), memslot::OutOfMemory>(())
/// ```
#[derive(Default)]
pub struct SlotSet {
    /// Has ids if the set does.
    first: Group,
    /// Nodes that all have groups; only the first one may have room.
    more: Option<NodeBox>,
}

/// 64 ids; the bits are 0 where there is no group.
#[derive(Clone, Copy, Default)]
struct Group {
    bits: u64,
    number: u32,
}

#[derive(Default)]
#[repr(align(64))]
struct Node {
    next: Option<NodeBox>,
    bits: [u64; GROUPS],
    numbers: [u32; GROUPS],
    len: u8,
}

const _: () = assert!(size_of::<Node>() == 64);

/// A box that can be had without a panic for want of memory.
type NodeBox = Box<[Node; 1]>;

fn new_node() -> Result<NodeBox, OutOfMemory> {
    let mut node = Vec::new();
    node.try_reserve_exact(1).map_err(|_| OutOfMemory)?;
    node.push(Node::default());
    node.into_boxed_slice().try_into().map_err(|_| OutOfMemory)
}

impl Node {
    fn len(&self) -> usize {
        usize::from(self.len)
    }

    fn place_of(&self, number: u32) -> Option<usize> {
        self.numbers[..self.len()].iter().position(|other| *other == number)
    }

    fn push(&mut self, group: Group) {
        let at = self.len();
        (self.bits[at], self.numbers[at]) = (group.bits, group.number);
        self.len += 1;
    }

    fn pop(&mut self) -> Group {
        self.len -= 1;
        let at = self.len();
        Group { bits: self.bits[at], number: self.numbers[at] }
    }
}

const fn split(id: SlotId) -> (u32, u64) {
    (id.get() / GROUP, 1 << (id.get() % GROUP))
}

impl SlotSet {
    /// Whether the slot is in the set.
    #[inline]
    #[must_use]
    pub fn contains(&self, id: SlotId) -> bool {
        let (number, bit) = split(id);
        if self.first.number == number {
            return self.first.bits & bit != 0;
        }
        self.more.is_some()
            && self.nodes().any(|node| node.place_of(number).is_some_and(|at| node.bits[at] & bit != 0))
    }

    /// Adds the slot; returns whether it was not there.
    ///
    /// # Errors
    /// It takes a node, and the cache has none; nothing has changed.
    #[inline]
    pub fn insert(&mut self, id: SlotId, cache: &mut SlotSetCache) -> Result<bool, OutOfMemory> {
        let (number, bit) = split(id);
        if self.first.bits == 0 {
            self.first.number = number;
        }
        if self.first.number == number {
            let is_new = self.first.bits & bit == 0;
            self.first.bits |= bit;
            return Ok(is_new);
        }
        self.insert_in_nodes(number, bit, cache)
    }

    #[cold]
    fn insert_in_nodes(
        &mut self,
        number: u32,
        bit: u64,
        cache: &mut SlotSetCache,
    ) -> Result<bool, OutOfMemory> {
        if let Some(bits) = self.bits_in_nodes(number) {
            let is_new = *bits & bit == 0;
            *bits |= bit;
            return Ok(is_new);
        }
        if self.nodes().next().is_none_or(|node| node.len() == GROUPS) {
            let mut node = cache.take().ok_or(OutOfMemory)?;
            node[0].next = self.more.take();
            self.more = Some(node);
        }
        if let Some([node]) = self.more.as_deref_mut() {
            node.push(Group { bits: bit, number });
        }
        Ok(true)
    }

    /// Takes the slot out; returns whether it was there.
    #[inline]
    pub fn remove(&mut self, id: SlotId, cache: &mut SlotSetCache) -> bool {
        let (number, bit) = split(id);
        if self.first.number == number {
            let was_there = self.first.bits & bit != 0;
            self.first.bits &= !bit;
            if self.first.bits == 0 && self.more.is_some() {
                self.first = self.take_group(cache);
            }
            return was_there;
        }
        self.more.is_some() && self.remove_from_nodes(number, bit, cache)
    }

    #[cold]
    fn remove_from_nodes(&mut self, number: u32, bit: u64, cache: &mut SlotSetCache) -> bool {
        let Some(bits) = self.bits_in_nodes(number) else { return false };
        let was_there = *bits & bit != 0;
        *bits &= !bit;
        if *bits == 0 {
            // Another group takes the place, unless it is this one that was taken.
            let group = self.take_group(cache);
            if let Some((node, at)) = self.place_in_nodes(number) {
                (node.bits[at], node.numbers[at]) = (group.bits, group.number);
            }
        }
        was_there
    }

    /// Takes the last group out of the first node, which there is, and the node as well if it is empty then.
    fn take_group(&mut self, cache: &mut SlotSetCache) -> Group {
        let Some(mut first) = self.more.take() else { return Group::default() };
        let group = first[0].pop();
        if first[0].len() == 0 {
            self.more = first[0].next.take();
            cache.give_back(first);
        } else {
            self.more = Some(first);
        }
        group
    }

    fn place_in_nodes(&mut self, number: u32) -> Option<(&mut Node, usize)> {
        let mut next = self.more.as_deref_mut();
        while let Some([node]) = next {
            if let Some(at) = node.place_of(number) {
                return Some((node, at));
            }
            next = node.next.as_deref_mut();
        }
        None
    }

    fn bits_in_nodes(&mut self, number: u32) -> Option<&mut u64> {
        self.place_in_nodes(number).map(|(node, at)| &mut node.bits[at])
    }

    fn nodes(&self) -> impl Iterator<Item = &Node> {
        let first = self.more.as_deref();
        core::iter::successors(first, |[node]| node.next.as_deref()).map(|[node]| node)
    }

    /// All of them, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = SlotId> + '_ {
        let groups = self.nodes().flat_map(|node| {
            let all = node.bits.iter().zip(&node.numbers).take(node.len());
            all.map(|(&bits, &number)| Group { bits, number })
        });
        core::iter::once(self.first).chain(groups).flat_map(|group| {
            let ids = (0..GROUP).filter(move |bit| group.bits >> bit & 1 != 0);
            ids.map(move |bit| SlotId::new(group.number * GROUP + bit))
        })
    }

    /// Whether no slot is in the set.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.bits == 0
    }

    /// Whether it has no memory besides itself.
    #[inline]
    #[must_use]
    pub fn is_inline(&self) -> bool {
        self.more.is_none()
    }

    /// Takes all slots out.
    pub fn clear(&mut self, cache: &mut SlotSetCache) {
        self.first = Group::default();
        while let Some(mut node) = self.more.take() {
            self.more = node[0].next.take();
            cache.give_back(node);
        }
    }
}

impl Drop for SlotSet {
    /// Node by node: the drop of a chain would recurse.
    fn drop(&mut self) {
        drop_chain(self.more.take());
    }
}

impl fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

fn drop_chain(mut next: Option<NodeBox>) {
    while let Some(mut node) = next {
        next = node[0].next.take();
    }
}

/// Nodes for sets that grow while a lock is held.
///
/// One cache serves any number of sets. It keeps the nodes that come back, up to [`CAPACITY`](Self::CAPACITY).
#[derive(Default)]
pub struct SlotSetCache {
    spare: Option<NodeBox>,
    len: usize,
}

impl SlotSetCache {
    /// How many nodes it keeps at most.
    pub const CAPACITY: usize = 64;

    /// Makes sure that so many ids can be added, to whichever sets. `ids` is at most [`CAPACITY`](Self::CAPACITY), the rest is ignored.
    ///
    /// # Errors
    /// There is no memory; what there was stays.
    pub fn top_up(&mut self, ids: usize) -> Result<(), OutOfMemory> {
        while self.len < ids.min(Self::CAPACITY) {
            self.give_back(new_node()?);
        }
        Ok(())
    }

    /// How many ids can be added, at least.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether only sets that stay inline can be added to.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn take(&mut self) -> Option<NodeBox> {
        let mut node = self.spare.take()?;
        self.spare = node[0].next.take();
        self.len -= 1;
        Some(node)
    }

    /// An empty node without a next one.
    fn give_back(&mut self, mut node: NodeBox) {
        if self.len < Self::CAPACITY {
            node[0] = Node { next: self.spare.take(), ..Node::default() };
            self.spare = Some(node);
            self.len += 1;
        }
    }
}

impl Drop for SlotSetCache {
    fn drop(&mut self) {
        drop_chain(self.spare.take());
    }
}
