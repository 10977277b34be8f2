//! gfn → slot: a page table whose leaves are small sorted arrays.
//!
//! # Shape
//!
//! Inner nodes split the gfn space 64 ways (`radix.rs`). A leaf holds up to 15 slots, in ascending order: every
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
use super::radix::{Entry, Inner, WAYS, WIDE, Way, common_shift, region_last, way_of};
use super::search::{KEYS, Keys, key, offset, prefetch};
use crate::error::OutOfMemory;
use crate::slot::{MAX_PAGES_PER_SLOT, MAX_SLOTS, Slot, SlotFlags};

/// Slots in a leaf, at most: one key is always above everything.
const LEAF_SLOTS: usize = KEYS - 1;
/// Two neighbouring leaves become one when this many slots or fewer remain in both.
const MERGE_SLOTS: usize = 10;
/// The key of a place in a leaf that holds no slot; no frame is that far from its leaf's base.
const NO_OFFSET: u32 = u32::MAX;

/// What a leaf says of one slot: all that translating an address needs.
#[derive(Clone, Copy)]
struct Mapping {
    /// The slot's host address minus its guest physical address.
    delta: u64,
    /// The first page behind the slot, counted from the leaf's base.
    end: u32,
    label: Label,
}

/// A slot's id with, in the four highest bits, its [`SlotFlags`] and whether it has host memory.
#[derive(Clone, Copy)]
struct Label(u32);

impl Label {
    const NO_HOST_MEMORY: u32 = 1 << 31;
    const FLAGS_AT: u32 = 28;

    fn of(slot: &Slot) -> Self {
        let no_memory = if slot.hva().is_none() { Self::NO_HOST_MEMORY } else { 0 };
        Self(slot.id().get() | slot.flags().bits() << Self::FLAGS_AT | no_memory)
    }

    #[inline]
    fn id(self) -> u32 {
        self.0 & (MAX_SLOTS - 1)
    }
}

const _: () = assert!(MAX_SLOTS == 1 << Label::FLAGS_AT);

#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct LeafHeader {
    /// First gfn of the leaf's first slot; keys and mappings count from here.
    base: u64,
    keys: Keys,
}

type Leaf = NodePtr<LeafHeader, Mapping>;

/// What a lookup finds: a slot, and where the frame lies in it.
#[derive(Clone, Copy)]
pub(super) struct Found {
    delta: u64,
    /// Pages from the frame to the end of the slot.
    pub(super) pages_left: u32,
    /// Pages from the start of the slot to the frame.
    pub(super) pages_before: u32,
    label: Label,
}

impl Found {
    /// No slot: no page is left.
    pub(super) const NONE: Self =
        Self { delta: 0, pages_left: 0, pages_before: 0, label: Label(Label::NO_HOST_MEMORY) };

    /// The host address of a guest physical address in the slot, if the slot has host memory.
    #[inline]
    pub(super) fn hva(&self, gpa: u64) -> Option<u64> {
        (self.label.0 & Label::NO_HOST_MEMORY == 0).then_some(gpa.wrapping_add(self.delta))
    }

    #[inline]
    pub(super) fn id(&self) -> u32 {
        self.label.id()
    }

    #[inline]
    pub(super) fn flags(&self) -> SlotFlags {
        SlotFlags::from_bits_truncate(self.label.0 >> Label::FLAGS_AT)
    }

    /// The same slot at its first frame.
    pub(super) fn at_start(&self) -> Self {
        Self { pages_left: self.pages_left + self.pages_before, pages_before: 0, ..*self }
    }

    /// The same slot, `pages` further on; fewer than are left.
    #[inline]
    pub(super) fn further(&self, pages: u32) -> Self {
        Self { pages_left: self.pages_left - pages, pages_before: self.pages_before + pages, ..*self }
    }
}

/// A slot on its way from one leaf to another: as [`Mapping`], but with its own start.
#[derive(Clone, Copy)]
struct Piece {
    start: u64,
    delta: u64,
    pages: u32,
    label: Label,
}

impl Piece {
    fn of(slot: &Slot) -> Self {
        let start = slot.base_gfn().get();
        let delta = slot.address().wrapping_sub(start << slot.page_size().shift());
        Self { start, delta, pages: slot.pages32(), label: Label::of(slot) }
    }

    fn from_leaf(header: &LeafHeader, key: i32, mapping: &Mapping) -> Self {
        let from = offset(key);
        Self {
            start: header.base + u64::from(from),
            delta: mapping.delta,
            pages: mapping.end - from,
            label: mapping.label,
        }
    }

    fn to_leaf(self, base: u64) -> (i32, Mapping) {
        // Whoever asks has checked with `fits` that nothing saturates here.
        let from = u32::try_from(self.start - base).unwrap_or(NO_OFFSET);
        let end = from.saturating_add(self.pages);
        (key(from), Mapping { delta: self.delta, end, label: self.label })
    }

    fn last(&self) -> u64 {
        self.start + u64::from(self.pages) - 1
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

    fn is_all(&self) -> bool {
        self.start == 0 && self.last == u64::MAX
    }
}

/// A leaf's slots and one more, in ascending order.
struct Pieces {
    array: [Piece; LEAF_SLOTS + 1],
    len: usize,
}

impl Pieces {
    fn new() -> Self {
        let none = Piece { start: 0, delta: 0, pages: 1, label: Label(0) };
        Self { array: [none; LEAF_SLOTS + 1], len: 0 }
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
        for (&key, mapping) in header.keys.0.iter().zip(mappings) {
            let piece = Piece::from_leaf(header, key, mapping);
            if self.len == 0 || self.array[self.len - 1].start < piece.start {
                self.push(piece);
            }
        }
    }

    /// An insertion meets every slot in its way: both are in the leaf of the block where they overlap.
    fn apply(&mut self, change: &Change) -> Result<(), Failure> {
        let at = self.as_slice().partition_point(|piece| piece.start < change.piece.start);
        let there = at < self.len && self.array[at].start == change.piece.start;
        match change.kind {
            Kind::Insert => {
                let new = change.piece;
                let before = at.checked_sub(1).map(|before| self.array[before]);
                let after = self.as_slice().get(at).copied();
                let in_the_way = before.filter(|piece| piece.last() >= new.start);
                if let Some(other) = in_the_way.or(after.filter(|piece| piece.start <= new.last())) {
                    return Err(Failure::Overlap(other.label.id()));
                }
                self.array.copy_within(at..self.len, at + 1);
                self.array[at] = change.piece;
                self.len += 1;
            }
            Kind::Remove if there => {
                self.array.copy_within(at + 1..self.len, at);
                self.len -= 1;
            }
            Kind::Replace if there => self.array[at] = change.piece,
            Kind::Remove | Kind::Replace => {}
        }
        Ok(())
    }
}

struct Change {
    piece: Piece,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Insert,
    Remove,
    /// The same gfns, said otherwise.
    Replace,
}

/// Why a change of the index failed. What it has done so far is abandoned with the transaction.
pub(super) enum Failure {
    OutOfMemory,
    /// The slot with this id covers some of the gfns.
    Overlap(u32),
}

impl From<OutOfMemory> for Failure {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// The index of one address space in one version; copying it copies the root only.
#[derive(Clone, Copy)]
pub(super) struct GfnIndex {
    root: Entry,
}

impl GfnIndex {
    pub(super) const EMPTY: Self = Self { root: Entry::NOTHING };

    /// The slot that covers `gfn`.
    ///
    /// # Safety
    /// The index belongs to a version that is held.
    #[inline]
    pub(super) unsafe fn find(&self, gfn: u64) -> Option<Found> {
        // SAFETY: the version is held; the leaf is reachable from it.
        let leaf: Leaf = unsafe { self.root.walk(gfn)? };
        // The search decides which line of the mappings is needed; by then it is there.
        prefetch(leaf.raw(), 2..5);
        // SAFETY: as above.
        let header = unsafe { leaf.header() };
        let wanted =
            u32::try_from(gfn.wrapping_sub(header.base)).ok().filter(|&wanted| wanted != NO_OFFSET)?;
        // The first key is 0, so at least one is not above; places without a slot are above everything.
        let at = header.keys.not_above(key(wanted)).wrapping_sub(1);
        // SAFETY: as above; a key that is not above has its mapping.
        let mapping = unsafe { leaf.item(at) };
        (wanted < mapping.end).then(|| Found {
            delta: mapping.delta,
            pages_left: mapping.end - wanted,
            pages_before: wanted - offset(header.keys.0[at % KEYS]),
            label: mapping.label,
        })
    }

    /// Adds a slot.
    ///
    /// # Errors
    /// [`Failure::Overlap`] where some of its gfns are covered.
    ///
    /// # Safety
    /// The index belongs to the writer's working version, whose stamp is the arena's.
    pub(super) unsafe fn insert(&mut self, arena: &mut Arena, slot: &Slot) -> Result<(), Failure> {
        // SAFETY: passed on.
        unsafe { self.edit(arena, slot, Kind::Insert) }
    }

    /// Removes a slot that is there.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn remove(&mut self, arena: &mut Arena, slot: &Slot) -> Result<(), Failure> {
        // SAFETY: passed on.
        unsafe { self.edit(arena, slot, Kind::Remove) }
    }

    /// Puts a slot in the place of one with the same gfns.
    ///
    /// # Safety
    /// As [`insert`](Self::insert).
    pub(super) unsafe fn replace(&mut self, arena: &mut Arena, slot: &Slot) -> Result<(), Failure> {
        // SAFETY: passed on.
        unsafe { self.edit(arena, slot, Kind::Replace) }
    }

    /// # Safety
    /// As [`insert`](Self::insert).
    unsafe fn edit(&mut self, arena: &mut Arena, slot: &Slot, kind: Kind) -> Result<(), Failure> {
        // SAFETY: passed on; the root is the writer's own.
        unsafe { edit_entry(arena, &raw mut self.root, Block::ALL, &Change { piece: Piece::of(slot), kind }) }
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
) -> Result<(), Failure> {
    // SAFETY: the place is the writer's; what it names is reachable from the working version, and written
    // only where it is private.
    unsafe {
        let (node, shift) = match (*place).way::<LeafHeader, Mapping>() {
            Way::Inner(node, shift) => {
                let (start, last) = region(node, shift);
                let low = change.piece.start.max(block.start);
                let high = change.piece.last().min(block.last);
                if start <= low && high <= last {
                    let node = arena.privately(node)?;
                    *place = Entry::inner(node, shift);
                    (node, shift)
                } else {
                    // The slot lies beside the node's region: one node that holds both.
                    widen(arena, place, node, shift, block, (start.min(low), last.max(high)))?
                }
            }
            Way::Leaf(leaf) => {
                if edit_in_place(arena, leaf, change)? {
                    return Ok(());
                }
                let mut pieces = Pieces::new();
                pieces.append(leaf);
                pieces.apply(change)?;
                arena.reserve_dead(1)?;
                *place = build(arena, block, pieces.as_slice())?;
                arena.discard(leaf);
                return Ok(());
            }
            Way::Nothing => {
                if change.kind == Kind::Insert {
                    *place = build(arena, block, &[change.piece])?;
                }
                return Ok(());
            }
        };
        edit_ways(arena, node, shift, block, change)?;
        let ways = node.items();
        if is_one(ways) {
            // All that is left fits one leaf: the node has no work to do.
            *place = ways[0];
            arena.free_private(node);
        } else if change.kind == Kind::Remove {
            let mut left = ways.iter().filter(|way| !way.is_nothing());
            let (first, second) = (left.next().copied().unwrap_or(Entry::NOTHING), left.next());
            if first.is_inner() && second.is_none() {
                *place = first;
                arena.free_private(node);
            } else if let Some((low, high)) = ways.split_at_checked(WAYS) {
                // A wide root of which one half is empty need not be wide.
                let all_nothing = |half: &[Entry]| half.iter().all(|way| way.is_nothing());
                if all_nothing(high) && high.len() == WAYS {
                    *place = narrow(arena, node, shift, 0)?;
                    arena.free_private(node);
                } else if all_nothing(low) {
                    *place = narrow(arena, node, shift, WAYS)?;
                    arena.free_private(node);
                }
            }
        }
        Ok(())
    }
}

/// The keys of a node's region: the first and the last.
///
/// # Safety
/// The node is alive.
unsafe fn region(node: Inner, shift: u32) -> (u64, u64) {
    // SAFETY: passed on.
    let (start, ways) = unsafe { (node.header().start, node.items().len()) };
    (start, region_last(start, shift, ways))
}

/// How a node that holds the gfns from `low` to `high` looks: its shift and its ways. Only the root is wide.
fn shape(block: Block, low: u64, high: u64) -> (u32, usize) {
    let (narrow, wide) = (common_shift(0, low, high, WAYS), common_shift(0, low, high, WIDE));
    if wide < narrow && block.is_all() { (wide, WIDE) } else { (narrow, WAYS) }
}

/// Replaces the node at `place` by a private one that holds its ways and all gfns from `low` to `high`.
///
/// # Safety
/// As [`edit_entry`]; `node` is what `place` names.
unsafe fn widen(
    arena: &mut Arena,
    place: *mut Entry,
    node: Inner,
    shift: u32,
    block: Block,
    (low, high): (u64, u64),
) -> Result<(Inner, u32), OutOfMemory> {
    // SAFETY: passed on; only private nodes are written.
    unsafe {
        let (above, ways) = shape(block, low, high);
        let (start, old) = (node.header().start, node.items());
        let parent = arena.alloc_inner(low, above, ways)?;
        let at = way_of(start, above, ways);
        if above == shift {
            // The same level, but wide.
            let reserved = arena.reserve_dead(1);
            reserved.inspect_err(|_| arena.free_private(parent))?;
            parent.items_mut()[at..at + old.len()].copy_from_slice(old);
            *place = Entry::inner(parent, above);
            arena.discard(node);
        } else if old.len() == WAYS {
            parent.items_mut()[at] = *place;
            *place = Entry::inner(parent, above);
        } else {
            // A wide root becomes two ordinary nodes, side by side in the level above: in the parent, or in a
            // node of their own where the parent is higher still.
            let next = shift + WAYS.trailing_zeros();
            let mut made = [Entry::NOTHING; 3];
            let result = arena.reserve_dead(1).and_then(|()| {
                made[0] = narrow(arena, node, shift, 0)?;
                made[1] = narrow(arena, node, shift, WAYS)?;
                if above > next {
                    let between = arena.alloc_inner(start, next, WAYS)?;
                    made[2] = Entry::inner(between, next);
                }
                Ok(())
            });
            if result.is_err() {
                made.into_iter().for_each(|entry| free_made(arena, entry));
                arena.free_private(parent);
                return Err(OutOfMemory);
            }
            let both = match made[2].way::<LeafHeader, Mapping>() {
                Way::Inner(between, _) => {
                    parent.items_mut()[at] = made[2];
                    between
                }
                _ => parent,
            };
            let at = way_of(start, next, both.items().len());
            both.items_mut()[at..at + 2].copy_from_slice(&made[..2]);
            *place = Entry::inner(parent, above);
            arena.discard(node);
        }
        Ok((parent, above))
    }
}

/// Half of a wide node as a node of its own, or what all its ways lead to.
///
/// # Safety
/// The node is alive and belongs to the working version.
unsafe fn narrow(arena: &mut Arena, node: Inner, shift: u32, first: usize) -> Result<Entry, OutOfMemory> {
    // SAFETY: passed on; the new node is private.
    unsafe {
        let half = &node.items()[first..first + WAYS];
        if is_one(half) {
            return Ok(half[0]);
        }
        let start = node.header().start + ((first as u64) << shift);
        let new = arena.alloc_inner(start, shift, WAYS)?;
        new.items_mut().copy_from_slice(half);
        Ok(Entry::inner(new, shift))
    }
}

/// Frees an inner node that has just been made, without what it leads to.
///
/// # Safety
/// The entry is used no more; if it is an inner node, that node is new and private.
unsafe fn free_made(arena: &mut Arena, entry: Entry) {
    if let Way::Inner(node, _) = entry.way::<LeafHeader, Mapping>() {
        // SAFETY: passed on.
        unsafe { arena.free_private(node) };
    }
}

/// Whether all these ways lead to the same leaf, or to nothing.
fn is_one(ways: &[Entry]) -> bool {
    !ways[0].is_inner() && ways.iter().all(|way| *way == ways[0])
}

/// Changes a private leaf where it stands, if it has room and its base stays. Returns whether it did.
///
/// # Safety
/// The leaf is alive and belongs to the working version.
unsafe fn edit_in_place(arena: &Arena, leaf: Leaf, change: &Change) -> Result<bool, Failure> {
    // SAFETY: the leaf is written only if it is private, and after the last use of what was read of it.
    unsafe {
        let (mut header, mappings) = (*leaf.header(), leaf.items());
        let piece = change.piece;
        let from = match piece.start.checked_sub(header.base).map(u32::try_from) {
            Some(Ok(from)) if from != NO_OFFSET && arena.is_private(leaf) => from,
            _ => return Ok(false),
        };
        // At least 1: the first key is 0.
        let at = header.keys.not_above(key(from));
        let (new_key, new) = piece.to_leaf(header.base);
        let before = mappings[at - 1];
        match change.kind {
            Kind::Insert => {
                if before.end > from {
                    return Err(Failure::Overlap(before.label.id()));
                }
                if let Some(after) = mappings.get(at).filter(|_| offset(header.keys.0[at]) < new.end) {
                    return Err(Failure::Overlap(after.label.id()));
                }
                let fits = piece.last() - header.base < u64::from(NO_OFFSET) - 1;
                if !fits || mappings.len() == LEAF_SLOTS.min(leaf.capacity()) {
                    return Ok(false);
                }
                header.keys.insert(at, new_key);
                leaf.insert_item(at, new);
            }
            _ if header.keys.0[at - 1] != new_key => return Ok(false),
            Kind::Remove if at == 1 => return Ok(false),
            Kind::Remove => {
                header.keys.remove(at - 1, key(NO_OFFSET));
                leaf.remove_item(at - 1);
            }
            Kind::Replace => leaf.items_mut()[at - 1] = new,
        }
        leaf.set_header(header);
        Ok(true)
    }
}

/// The run of ways around `way` that lead where it leads: the largest block of 1, 2, 4 … ways that is one leaf, or
/// nothing. An inner node is a run of its own.
fn run_of(ways: &[Entry], way: usize) -> (usize, usize) {
    let entry = ways[way];
    let (mut first, mut n) = (way, 1);
    while n < ways.len() && !entry.is_inner() {
        let wider = first & !n;
        let block = &ways[wider..wider + 2 * n];
        // A leaf stands in neighbouring ways only, so if both ends lead to it, all do.
        let all = block[0] == entry && block[2 * n - 1] == entry;
        if !all || (entry.is_nothing() && !is_one(block)) {
            break;
        }
        (first, n) = (wider, 2 * n);
    }
    (first, n)
}

/// # Safety
/// `node` is private and belongs to the working version; the change lies in its region as far as it lies in
/// `block`.
unsafe fn edit_ways(
    arena: &mut Arena,
    node: Inner,
    shift: u32,
    block: Block,
    change: &Change,
) -> Result<(), Failure> {
    // SAFETY: the node is private; what its ways name belongs to the working version.
    unsafe {
        let ways = node.items().len();
        let first = way_of(change.piece.start.max(block.start), shift, ways);
        let last = way_of(change.piece.last().min(block.last), shift, ways);
        let mut way = first;
        while way <= last {
            let (start, n) = run_of(node.items(), way);
            edit_run(arena, node, shift, (start, n), change)?;
            way = start + n;
        }
        if change.kind != Kind::Replace {
            join_around(arena, node, first)?;
            if last != first {
                join_around(arena, node, last)?;
            }
        }
        Ok(())
    }
}

/// # Safety
/// As [`edit_ways`]; the ways are a run.
unsafe fn edit_run(
    arena: &mut Arena,
    node: Inner,
    shift: u32,
    (first, n): (usize, usize),
    change: &Change,
) -> Result<(), Failure> {
    // SAFETY: the node is private; what its ways name belongs to the working version.
    unsafe {
        if n == 1 {
            let block = Block::of_ways(node.header().start, shift, first, 1);
            return edit_entry(arena, &raw mut node.items_mut()[first], block, change);
        }
        let mut pieces = Pieces::new();
        let old = node.items()[first].way::<LeafHeader, Mapping>();
        if let Way::Leaf(leaf) = old {
            if edit_in_place(arena, leaf, change)? {
                return Ok(());
            }
            pieces.append(leaf);
        }
        pieces.apply(change)?;
        arena.reserve_dead(1)?;
        fill(arena, node, shift, first, n, pieces.as_slice())?;
        if let Way::Leaf(leaf) = old {
            arena.discard(leaf);
        }
        Ok(())
    }
}

/// Joins the run around `way` with its other half, and the result with its other half, as long as it goes.
///
/// # Safety
/// As [`edit_ways`].
unsafe fn join_around(arena: &mut Arena, node: Inner, way: usize) -> Result<(), OutOfMemory> {
    // SAFETY: the node is private; what its ways name belongs to the working version.
    unsafe {
        let ways = node.items().len();
        let (mut first, mut n) = run_of(node.items(), way);
        while n < ways && !node.items()[first].is_inner() {
            let whole = first & !n;
            if !join(arena, node, whole, 2 * n)? {
                break;
            }
            (first, n) = (whole, 2 * n);
        }
        Ok(())
    }
}

/// Makes one leaf of the two halves of some ways, if what they hold is little enough. Returns whether it did.
///
/// # Safety
/// As [`edit_ways`].
unsafe fn join(arena: &mut Arena, node: Inner, first: usize, n: usize) -> Result<bool, OutOfMemory> {
    // SAFETY: the node is private; what its ways name belongs to the working version.
    unsafe {
        let ways = &mut node.items_mut()[first..first + n];
        let (low, high) = ways.split_at_mut(n / 2);
        if !is_one(low) || !is_one(high) {
            return Ok(false);
        }
        let mut pieces = Pieces::new();
        match (low[0].way::<LeafHeader, Mapping>(), high[0].way::<LeafHeader, Mapping>()) {
            (Way::Leaf(a), Way::Leaf(b)) => {
                if a.items().len() + b.items().len() > MERGE_SLOTS + 1 {
                    return Ok(false);
                }
                pieces.append(a);
                pieces.append(b);
                if !fits(pieces.as_slice()) {
                    return Ok(false);
                }
                arena.reserve_dead(2)?;
                let leaf = Entry::leaf(alloc_leaf(arena, pieces.as_slice())?);
                ways.fill(leaf);
                arena.discard(a);
                arena.discard(b);
            }
            (Way::Leaf(a), Way::Nothing) | (Way::Nothing, Way::Leaf(a)) => {
                pieces.append(a);
                if !fits(pieces.as_slice()) {
                    return Ok(false);
                }
                ways.fill(Entry::leaf(a));
            }
            (Way::Nothing, Way::Nothing) => {}
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Whether one leaf can hold these slots: few enough, and all of them within 32 bits of the first.
///
/// Two slots of the largest size side by side still fit. Where more lies between, ever smaller blocks keep them
/// apart, so halving comes to an end.
fn fits(pieces: &[Piece]) -> bool {
    match (pieces.first(), pieces.last()) {
        (Some(first), Some(last)) => {
            pieces.len() <= LEAF_SLOTS && last.last() - first.start < u64::from(NO_OFFSET) - 1
        }
        _ => true,
    }
}

const _: () = assert!(2 * MAX_PAGES_PER_SLOT < NO_OFFSET as u64);

fn alloc_leaf(arena: &mut Arena, pieces: &[Piece]) -> Result<Leaf, OutOfMemory> {
    let base = pieces[0].start;
    let mut keys = [key(NO_OFFSET); KEYS];
    let mut mappings = [Mapping { delta: 0, end: 0, label: Label(0) }; KEYS];
    for ((key, mapping), piece) in keys.iter_mut().zip(&mut mappings).zip(pieces) {
        (*key, *mapping) = piece.to_leaf(base);
    }
    arena.alloc(LeafHeader { base, keys: Keys(keys) }, &mappings[..pieces.len()], pieces.len())
}

/// A new subtree for the slots of a block. On failure nothing of it is left.
fn build(arena: &mut Arena, block: Block, pieces: &[Piece]) -> Result<Entry, OutOfMemory> {
    let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else {
        return Ok(Entry::NOTHING);
    };
    if fits(pieces) {
        return Ok(Entry::leaf(alloc_leaf(arena, pieces)?));
    }
    let low = first.start.max(block.start);
    let (shift, ways) = shape(block, low, last.last().min(block.last));
    let node = arena.alloc_inner(low, shift, ways)?;
    // SAFETY: the node is new and private.
    unsafe {
        fill(arena, node, shift, 0, ways, pieces)
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
    if n == 1 || fits(pieces) {
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
    pub(super) unsafe fn next(&mut self) -> Option<u32> {
        loop {
            if let Way::Leaf(leaf) = self.leaf.way::<LeafHeader, Mapping>() {
                // SAFETY: passed on.
                let (header, mappings) = unsafe { (leaf.header(), leaf.items()) };
                while let Some(mapping) = mappings.get(self.at) {
                    let start = header.base + u64::from(offset(header.keys.0[self.at]));
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
