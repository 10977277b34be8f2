//! gfn → slot: a page table whose leaves are small sorted arrays.
//!
//! # Shape
//!
//! Inner nodes split the gfn space 64 ways (`radix.rs`). A leaf holds up to 16 slots, in ascending order: every
//! slot that touches the leaf's block of gfns. A slot that lies across the border of two blocks is in both
//! leaves, so that one walk always suffices. Within an inner node a leaf may stand in 2, 4, 8 … neighbouring
//! ways at once; when it overflows, its ways are halved (as in extendible hashing), and only when one way is
//! left does a new inner node appear. So leaves stay half full or better at any density, and a slot of many
//! pages costs a few leaves, not one entry a page.
//!
//! # Why not a search tree
//!
//! Looking a gfn up in a balanced tree is a chain of compare steps, each waiting for the one before. A walk
//! here is a chain of plain loads, two for tens of thousands of slots, and one search in 16 keys that are
//! compared all at once. Leaves keep their keys as 32-bit offsets from the leaf's first slot, so that the
//! search touches one or two cache lines; that is why a slot has at most 2^31 - 1 pages.
//!
//! # Changing it
//!
//! [`GfnIndex::insert`] and [`GfnIndex::remove`] work from the root down: a published node is copied and the
//! copy linked in its place before the next step, so that every new node can be reached from the working root
//! when a later allocation fails, and [`GfnIndex::abandon`] finds it.

use super::node::{Arena, NodePtr};
use super::radix::{Entry, Inner, WAYS, Way, common_shift, region_last, way_of};
use crate::error::OutOfMemory;
use crate::slot::{Slot, SlotFlags};

/// Slots in a leaf, at most.
const LEAF_SLOTS: usize = 16;
/// Two neighbouring leaves become one when this many slots or fewer remain in both.
const MERGE_SLOTS: usize = 10;
/// Key of a place in a leaf that holds no slot.
const NO_KEY: u32 = u32::MAX;

/// What a leaf says of one slot: all that translating an address needs.
#[derive(Clone, Copy)]
pub(super) struct Mapping {
    /// The host address; a page's worth of low bits hold [`SlotFlags`] and [`Mapping::NO_HOST_MEMORY`].
    address: u64,
    pub(super) pages: u32,
    pub(super) id: u32,
}

impl Mapping {
    /// No pages at all.
    pub(super) const NONE: Self = Self { address: Self::NO_HOST_MEMORY, pages: 0, id: 0 };

    const NO_HOST_MEMORY: u64 = 4;
    const LOW_BITS: u64 = 0xfff;

    fn of(slot: &Slot) -> Self {
        let flags = u64::from(slot.flags().bits());
        let address = match slot.hva() {
            Some(_) => slot.address() | flags,
            None => Self::NO_HOST_MEMORY | flags,
        };
        Self { address, pages: slot.pages32(), id: slot.id().get() }
    }

    /// The host address of the slot's first page, if it has one.
    #[inline]
    pub(super) fn hva(&self) -> Option<u64> {
        (self.address & Self::NO_HOST_MEMORY == 0).then_some(self.address & !Self::LOW_BITS)
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the flags are the low bits")]
    pub(super) fn flags(&self) -> SlotFlags {
        SlotFlags::from_bits_truncate(self.address as u32)
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct LeafHeader {
    /// First gfn of the leaf's first slot; the keys count from here.
    base: u64,
    _line: u64,
    keys: [u32; LEAF_SLOTS],
}

type Leaf = NodePtr<LeafHeader, Mapping>;

/// A slot on its way from one leaf to another.
#[derive(Clone, Copy)]
struct Piece {
    start: u64,
    mapping: Mapping,
}

impl Piece {
    fn last(&self) -> u64 {
        self.start + u64::from(self.mapping.pages) - 1
    }
}

/// The gfns `[start, last]`; inclusive, because the last block ends with the 64-bit space.
#[derive(Clone, Copy)]
struct Block {
    start: u64,
    last: u64,
}

impl Block {
    const ALL: Self = Self { start: 0, last: u64::MAX };

    /// The block of `n` ways from `first` on.
    fn of_ways(node_start: u64, shift: u32, first: usize, n: usize) -> Self {
        let start = node_start + ((first as u64) << shift);
        Self { start, last: start + ((n as u64 - 1) << shift) + ((1 << shift) - 1) }
    }

    fn touches(&self, piece: &Piece) -> bool {
        piece.start <= self.last && piece.last() >= self.start
    }
}

/// Up to two leaves' worth of slots, in ascending order.
struct Pieces {
    array: [Piece; 2 * LEAF_SLOTS + 1],
    len: usize,
}

impl Pieces {
    fn new() -> Self {
        let none = Piece { start: 0, mapping: Mapping { address: 0, pages: 1, id: 0 } };
        Self { array: [none; 2 * LEAF_SLOTS + 1], len: 0 }
    }

    fn as_slice(&self) -> &[Piece] {
        &self.array[..self.len]
    }

    fn push(&mut self, piece: Piece) {
        self.array[self.len] = piece;
        self.len += 1;
    }

    /// Appends a leaf's slots, without those that are there already (they lie across the border).
    ///
    /// # Safety
    /// The leaf is alive.
    unsafe fn append(&mut self, leaf: Leaf) {
        // SAFETY: passed on.
        let (header, mappings) = unsafe { (leaf.header(), leaf.items()) };
        for (&key, &mapping) in header.keys.iter().zip(mappings) {
            let start = header.base + u64::from(key);
            if self.len == 0 || self.array[self.len - 1].start < start {
                self.push(Piece { start, mapping });
            }
        }
    }

    fn apply(&mut self, change: &Change) {
        let at = self.as_slice().partition_point(|piece| piece.start < change.piece.start);
        if change.insert {
            self.array.copy_within(at..self.len, at + 1);
            self.array[at] = change.piece;
            self.len += 1;
        } else if at < self.len && self.array[at].start == change.piece.start {
            self.array.copy_within(at + 1..self.len, at);
            self.len -= 1;
        }
    }
}

struct Change {
    piece: Piece,
    insert: bool,
}

/// The index of one address space in one version; copying it copies the root only.
#[derive(Clone, Copy)]
pub(super) struct GfnIndex {
    root: Entry,
}

impl GfnIndex {
    pub(super) const EMPTY: Self = Self { root: Entry::NOTHING };

    /// The slot that covers `gfn`, and how many pages into it `gfn` lies.
    ///
    /// # Safety
    /// The index belongs to a version that is held for `'a`.
    #[inline]
    pub(super) unsafe fn find<'a>(&self, gfn: u64) -> Option<(&'a Mapping, u32)> {
        // SAFETY: the version is held; the leaf is reachable from it.
        let leaf: Leaf = unsafe { self.root.walk(gfn)? };
        // SAFETY: as above.
        let header = unsafe { leaf.header() };
        let offset = u32::try_from(gfn.wrapping_sub(header.base)).ok().filter(|&offset| offset != NO_KEY)?;
        let before: u32 = header.keys.iter().map(|&key| u32::from(key <= offset)).sum();
        // The first key is 0, so at least one is not above the offset; empty places are above every offset.
        let at = (before as usize).wrapping_sub(1) & (LEAF_SLOTS - 1);
        // SAFETY: as above; a key that is not NO_KEY has its mapping.
        let mapping = unsafe { leaf.item(at) };
        let into = offset - header.keys[at];
        (into < mapping.pages).then_some((mapping, into))
    }

    /// The first slot that covers a gfn of `[start, last]`.
    ///
    /// # Safety
    /// The index belongs to a version that is held.
    pub(super) unsafe fn first_in(&self, start: u64, last: u64) -> Option<(u64, Mapping)> {
        // SAFETY: passed on.
        unsafe { Walk::new(*self, start, last).next() }
    }

    /// Adds a slot. None of its gfns may be covered yet.
    ///
    /// # Safety
    /// The index belongs to the writer's working version, whose stamp is the arena's.
    pub(super) unsafe fn insert(&mut self, arena: &mut Arena, slot: &Slot) -> Result<(), OutOfMemory> {
        let piece = Piece { start: slot.base_gfn().get(), mapping: Mapping::of(slot) };
        // SAFETY: passed on; the root is the writer's own.
        unsafe { edit_entry(arena, &raw mut self.root, Block::ALL, &Change { piece, insert: true }) }
    }

    /// Removes a slot that is there.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn remove(&mut self, arena: &mut Arena, slot: &Slot) -> Result<(), OutOfMemory> {
        let piece = Piece { start: slot.base_gfn().get(), mapping: Mapping::of(slot) };
        // SAFETY: passed on; the root is the writer's own.
        unsafe { edit_entry(arena, &raw mut self.root, Block::ALL, &Change { piece, insert: false }) }
    }

    /// Frees every private node: the change did not come to be.
    ///
    /// # Safety
    /// As [`insert`](Self::insert), and the working version is not used again.
    pub(super) unsafe fn abandon(self, arena: &mut Arena) {
        // SAFETY: passed on.
        unsafe { free_private(arena, self.root) };
    }
}

/// # Safety
/// `place` holds an entry of the working version and is private (or the working root); `block` is its block.
unsafe fn edit_entry(
    arena: &mut Arena,
    place: *mut Entry,
    block: Block,
    change: &Change,
) -> Result<(), OutOfMemory> {
    // SAFETY: the place is the writer's; what it names is reachable from the working version, and written
    // only where it is private.
    unsafe {
        let (node, shift) = match (*place).way::<LeafHeader, Mapping>() {
            Way::Inner(node, shift) => {
                let start = node.header().start;
                let low = change.piece.start.max(block.start);
                let high = change.piece.last().min(block.last);
                if start <= low && high <= region_last(start, shift) {
                    let node = arena.privately(node)?;
                    *place = Entry::inner(node, shift);
                    (node, shift)
                } else {
                    // The slot lies beside the node's region: one node above both.
                    let above = common_shift(0, start.min(low), high.max(region_last(start, shift)));
                    let parent = arena.alloc_inner(start, above)?;
                    parent.items_mut()[way_of(start, above)] = *place;
                    *place = Entry::inner(parent, above);
                    (parent, above)
                }
            }
            Way::Leaf(leaf) => {
                let mut pieces = Pieces::new();
                pieces.append(leaf);
                pieces.apply(change);
                arena.reserve_dead(1)?;
                *place = build(arena, block, pieces.as_slice())?;
                arena.discard(leaf);
                return Ok(());
            }
            Way::Nothing => {
                if change.insert {
                    *place = build(arena, block, &[change.piece])?;
                }
                return Ok(());
            }
        };
        edit_ways(arena, node, shift, 0, WAYS, change)?;
        let ways = node.items();
        if is_one(ways) {
            // All that is left fits one leaf: the node has no work to do.
            arena.reserve_dead(1)?;
            *place = ways[0];
            arena.discard(node);
        } else if !change.insert {
            let mut left = ways.iter().filter(|way| !way.is_nothing());
            if let (Some(&only), None) = (left.next(), left.next())
                && only.is_inner()
            {
                arena.reserve_dead(1)?;
                *place = only;
                arena.discard(node);
            }
        }
        Ok(())
    }
}

/// Whether all these ways lead to the same leaf, or to nothing.
fn is_one(ways: &[Entry]) -> bool {
    !ways[0].is_inner() && ways.iter().all(|way| *way == ways[0])
}

/// # Safety
/// `node` is private and belongs to the working version; `n` is a power of two that divides `first`.
unsafe fn edit_ways(
    arena: &mut Arena,
    node: Inner,
    shift: u32,
    first: usize,
    n: usize,
    change: &Change,
) -> Result<(), OutOfMemory> {
    // SAFETY: the node is private; what its ways name belongs to the working version.
    unsafe {
        let block = Block::of_ways(node.header().start, shift, first, n);
        if !block.touches(&change.piece) {
            return Ok(());
        }
        if n == 1 {
            return edit_entry(arena, &raw mut node.items_mut()[first], block, change);
        }
        if is_one(&node.items()[first..first + n]) {
            let mut pieces = Pieces::new();
            let old = node.items()[first].way::<LeafHeader, Mapping>();
            if let Way::Leaf(leaf) = old {
                pieces.append(leaf);
            }
            pieces.apply(change);
            arena.reserve_dead(1)?;
            fill(arena, node, shift, first, n, pieces.as_slice())?;
            if let Way::Leaf(leaf) = old {
                arena.discard(leaf);
            }
            return Ok(());
        }
        edit_ways(arena, node, shift, first, n / 2, change)?;
        edit_ways(arena, node, shift, first + n / 2, n / 2, change)?;
        join(arena, node, first, n, block)
    }
}

/// Makes one leaf of the two halves of some ways, if what they hold is little enough.
///
/// # Safety
/// As [`edit_ways`].
unsafe fn join(
    arena: &mut Arena,
    node: Inner,
    first: usize,
    n: usize,
    block: Block,
) -> Result<(), OutOfMemory> {
    // SAFETY: the node is private; what its ways name belongs to the working version.
    unsafe {
        let ways = &mut node.items_mut()[first..first + n];
        let (low, high) = ways.split_at_mut(n / 2);
        if !is_one(low) || !is_one(high) {
            return Ok(());
        }
        match (low[0].way::<LeafHeader, Mapping>(), high[0].way::<LeafHeader, Mapping>()) {
            (Way::Leaf(a), Way::Leaf(b)) if a != b => {
                if a.items().len() + b.items().len() > MERGE_SLOTS + 1 {
                    return Ok(());
                }
                let mut pieces = Pieces::new();
                pieces.append(a);
                pieces.append(b);
                if !fits(pieces.as_slice(), block) {
                    return Ok(());
                }
                arena.reserve_dead(2)?;
                let leaf = Entry::leaf(alloc_leaf(arena, pieces.as_slice())?);
                ways.fill(leaf);
                arena.discard(a);
                arena.discard(b);
            }
            (Way::Leaf(a), Way::Nothing) | (Way::Nothing, Way::Leaf(a)) => {
                let mut pieces = Pieces::new();
                pieces.append(a);
                if fits(pieces.as_slice(), block) {
                    ways.fill(Entry::leaf(a));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether one leaf can hold these slots for `block`: few enough, and every gfn of the block that one of them
/// covers within 32 bits of the first.
fn fits(pieces: &[Piece], block: Block) -> bool {
    match (pieces.first(), pieces.last()) {
        (Some(first), Some(last)) => {
            pieces.len() <= LEAF_SLOTS && last.last().min(block.last) - first.start < u64::from(NO_KEY)
        }
        _ => true,
    }
}

fn alloc_leaf(arena: &mut Arena, pieces: &[Piece]) -> Result<Leaf, OutOfMemory> {
    let base = pieces[0].start;
    let mut keys = [NO_KEY; LEAF_SLOTS];
    let mut mappings = [pieces[0].mapping; LEAF_SLOTS];
    for ((key, mapping), piece) in keys.iter_mut().zip(&mut mappings).zip(pieces) {
        *key = u32::try_from(piece.start - base).unwrap_or(NO_KEY);
        *mapping = piece.mapping;
    }
    arena.alloc(LeafHeader { base, _line: 0, keys }, &mappings[..pieces.len()], pieces.len())
}

/// A new subtree for the slots of a block. On failure nothing of it is left.
fn build(arena: &mut Arena, block: Block, pieces: &[Piece]) -> Result<Entry, OutOfMemory> {
    let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else {
        return Ok(Entry::NOTHING);
    };
    if fits(pieces, block) {
        return Ok(Entry::leaf(alloc_leaf(arena, pieces)?));
    }
    let low = first.start.max(block.start);
    let shift = common_shift(0, low, last.last().min(block.last));
    let node = arena.alloc_inner(low, shift)?;
    // SAFETY: the node is new and private.
    unsafe {
        fill(arena, node, shift, 0, WAYS, pieces)
            .inspect_err(|_| free_private(arena, Entry::inner(node, shift)))?;
    }
    Ok(Entry::inner(node, shift))
}

/// Puts the slots into `n` ways from `first` on, in as few leaves as halving allows.
///
/// # Safety
/// As [`edit_ways`].
unsafe fn fill(
    arena: &mut Arena,
    node: Inner,
    shift: u32,
    first: usize,
    n: usize,
    pieces: &[Piece],
) -> Result<(), OutOfMemory> {
    // SAFETY: the node is private.
    let (block, ways) = unsafe {
        (Block::of_ways(node.header().start, shift, first, n), &mut node.items_mut()[first..first + n])
    };
    let from = pieces.partition_point(|piece| piece.last() < block.start);
    let to = pieces.partition_point(|piece| piece.start <= block.last);
    let pieces = &pieces[from..to];
    if n == 1 || fits(pieces, block) {
        ways.fill(build(arena, block, pieces)?);
        return Ok(());
    }
    // SAFETY: as above; the borrow of the ways has ended.
    unsafe {
        fill(arena, node, shift, first, n / 2, pieces)?;
        fill(arena, node, shift, first + n / 2, n / 2, pieces)
    }
}

/// Frees the private nodes of a subtree. A published node has no private ones below it.
///
/// # Safety
/// The subtree belongs to the working version, and nobody uses it again.
unsafe fn free_private(arena: &mut Arena, entry: Entry) {
    // SAFETY: passed on; a leaf that stands in several ways stands in neighbouring ones and is freed once.
    unsafe {
        match entry.way::<LeafHeader, Mapping>() {
            Way::Leaf(leaf) if arena.is_private(leaf) => arena.free_private(leaf),
            Way::Inner(node, _) if arena.is_private(node) => {
                let mut previous = Entry::NOTHING;
                for &way in node.items() {
                    if way != previous {
                        free_private(arena, way);
                    }
                    previous = way;
                }
                arena.free_private(node);
            }
            _ => {}
        }
    }
}

/// The deepest tree: one inner node for every six bits of a 64-bit gfn.
const DEPTH: usize = 11;

/// Slots in ascending order, from a gfn on.
#[derive(Clone)]
pub(super) struct Walk {
    /// The way down: nodes with the next way to take.
    stack: [(Entry, usize); DEPTH],
    depth: usize,
    leaf: Entry,
    at: usize,
    /// Slots that end before this gfn are not wanted, or have been yielded.
    from: u64,
    last: u64,
}

impl Walk {
    /// Yields the slots that cover a gfn of `[from, last]`.
    ///
    /// # Safety
    /// The index belongs to a version that is held while the walk is used.
    pub(super) unsafe fn new(index: GfnIndex, from: u64, last: u64) -> Self {
        let stack = [(Entry::NOTHING, 0); DEPTH];
        let mut walk = Self { stack, depth: 0, leaf: Entry::NOTHING, at: 0, from, last };
        // SAFETY: passed on.
        unsafe { walk.enter(index.root) };
        walk
    }

    /// # Safety
    /// The version is held.
    unsafe fn enter(&mut self, entry: Entry) {
        if let Way::Inner(node, shift) = entry.way::<LeafHeader, Mapping>() {
            // SAFETY: passed on.
            let start = unsafe { node.header().start };
            let first = if self.from <= start {
                0
            } else if self.from > region_last(start, shift) {
                WAYS
            } else {
                way_of(self.from, shift)
            };
            self.stack[self.depth] = (entry, first);
            self.depth += 1;
        } else {
            self.leaf = entry;
            self.at = 0;
        }
    }

    /// The next slot: its first gfn and its mapping.
    ///
    /// # Safety
    /// The version is held.
    pub(super) unsafe fn next(&mut self) -> Option<(u64, Mapping)> {
        loop {
            if let Way::Leaf(leaf) = self.leaf.way::<LeafHeader, Mapping>() {
                // SAFETY: passed on.
                let (header, mappings) = unsafe { (leaf.header(), leaf.items()) };
                while let Some(&mapping) = mappings.get(self.at) {
                    let piece = Piece { start: header.base + u64::from(header.keys[self.at]), mapping };
                    self.at += 1;
                    if piece.last() >= self.from {
                        if piece.start > self.last {
                            self.depth = 0;
                            self.leaf = Entry::NOTHING;
                            return None;
                        }
                        self.from = piece.last() + 1;
                        return Some((piece.start, mapping));
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
