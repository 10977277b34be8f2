//! Leaves: up to 15 slots in ascending order, and what a change does to them.

use super::super::node::{Arena, NodePtr};
use super::super::search::{KEYS, Keys, key, offset};
use super::Failure;
use crate::error::OutOfMemory;
use crate::slot::{MAX_PAGES_PER_SLOT, MAX_SLOTS, Slot};

/// Slots in a leaf, at most: one key is always above everything.
pub(super) const LEAF_SLOTS: usize = KEYS - 1;

/// The key of a place in a leaf that holds no slot; no frame is that far from its leaf's base.
pub(super) const NO_OFFSET: u32 = u32::MAX;

/// What a leaf says of one slot: all that translating an address needs.
#[derive(Clone, Copy)]
pub(super) struct Mapping {
    /// The slot's host address minus its guest physical address.
    pub(super) delta: u64,
    /// The first page behind the slot, counted from the leaf's base.
    pub(super) end: u32,
    pub(super) label: Label,
}

/// A slot's id with, in the four highest bits, its [`SlotFlags`] and whether it has host memory.
#[derive(Clone, Copy)]
pub(super) struct Label(pub(super) u32);

impl Label {
    pub(super) const NO_HOST_MEMORY: u32 = 1 << 31;
    pub(super) const FLAGS_AT: u32 = 28;

    pub(super) fn of(slot: &Slot) -> Self {
        let no_memory = if slot.hva().is_none() { Self::NO_HOST_MEMORY } else { 0 };
        Self(slot.id().get() | slot.flags().bits() << Self::FLAGS_AT | no_memory)
    }

    #[inline]
    pub(super) fn id(self) -> u32 {
        self.0 & (MAX_SLOTS - 1)
    }
}

const _: () = assert!(MAX_SLOTS == 1 << Label::FLAGS_AT);

/// What a leaf says of all its slots.
///
/// Keys are the low 32 bits of the gfns where slots start, and a lookup compares those of the gfn it is given: the
/// search need not wait for the base. That would go wrong where gfns pass a multiple of 2^32 (16 TiB with pages of
/// 4 KiB), so the keys of a leaf that lies across one count from its base. Such a leaf has a reach of 0.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct LeafHeader {
    /// First gfn of the leaf's first slot; the ends of mappings count from here.
    pub(super) base: u64,
    /// How many gfns from the base on may be looked up by their low 32 bits.
    pub(super) reach: u32,
    pub(super) keys: Keys,
}

impl LeafHeader {
    /// The header of a leaf without slots.
    fn new(base: u64, last: u64) -> Self {
        // The last gfn before the multiple is out of reach: its low 32 bits are the key of a place without a slot.
        let reach = NO_OFFSET - low(base);
        let reach = if last - base < u64::from(reach) { reach } else { 0 };
        Self { base, reach, keys: Keys([key(NO_OFFSET); KEYS]) }
    }

    /// From where on keys count, as far as 32 bits tell.
    #[inline]
    fn origin(&self) -> u32 {
        if self.reach == 0 { low(self.base) } else { 0 }
    }

    /// The key of a slot that starts at `gfn`.
    fn key(&self, gfn: u64) -> i32 {
        key(low(gfn).wrapping_sub(self.origin()))
    }

    /// How far from the base the slot at a place starts.
    pub(super) fn from(&self, at: usize) -> u32 {
        offset(self.keys.0[at % KEYS]).wrapping_add(self.origin()).wrapping_sub(low(self.base))
    }

    /// Whether a slot that starts in the leaf and ends with this gfn may be in it.
    fn reaches(&self, last: u64) -> bool {
        let reach = if self.reach == 0 { NO_OFFSET - 1 } else { self.reach };
        last - self.base < u64::from(reach.min(NO_OFFSET - 1))
    }
}

/// The low 32 bits.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "that is what it is for")]
pub(super) const fn low(gfn: u64) -> u32 {
    gfn as u32
}

pub(super) type Leaf = NodePtr<LeafHeader, Mapping>;

/// A slot on its way from one leaf to another: as [`Mapping`], but with its own start.
#[derive(Clone, Copy)]
pub(in crate::table) struct Piece {
    pub(super) start: u64,
    pub(super) delta: u64,
    pub(super) pages: u32,
    pub(super) label: Label,
}

impl Piece {
    pub(in crate::table) fn of(slot: &Slot) -> Self {
        let start = slot.base_gfn().get();
        let delta = slot.address().wrapping_sub(start << slot.page_size().shift());
        Self { start, delta, pages: slot.pages32(), label: Label::of(slot) }
    }

    pub(super) fn from_leaf(header: &LeafHeader, at: usize, mapping: &Mapping) -> Self {
        let from = header.from(at);
        Self {
            start: header.base + u64::from(from),
            delta: mapping.delta,
            pages: mapping.end - from,
            label: mapping.label,
        }
    }

    fn to_leaf(self, header: &LeafHeader) -> (i32, Mapping) {
        // Whoever asks has checked with `fits` or `reaches` that nothing saturates here.
        let from = u32::try_from(self.start - header.base).unwrap_or(NO_OFFSET);
        let end = from.saturating_add(self.pages);
        (header.key(self.start), Mapping { delta: self.delta, end, label: self.label })
    }

    pub(super) fn last(&self) -> u64 {
        self.start + u64::from(self.pages) - 1
    }
}

/// A leaf's slots and one more, in ascending order.
pub(super) struct Pieces {
    pub(super) array: [Piece; LEAF_SLOTS + 1],
    pub(super) len: usize,
}

impl Pieces {
    pub(super) fn new() -> Self {
        let none = Piece { start: 0, delta: 0, pages: 1, label: Label(0) };
        Self { array: [none; LEAF_SLOTS + 1], len: 0 }
    }

    pub(super) fn as_slice(&self) -> &[Piece] {
        &self.array[..self.len]
    }

    pub(super) fn push(&mut self, piece: Piece) {
        self.array[self.len] = piece;
        self.len += 1;
    }

    /// Appends a leaf's slots, without those that are there already (they lie across the border).
    ///
    /// # Safety
    /// The leaf is alive.
    pub(super) unsafe fn append(&mut self, leaf: Leaf) {
        // SAFETY: passed on.
        let (header, mappings) = unsafe { (leaf.header(), leaf.items()) };
        for (at, mapping) in mappings.iter().enumerate() {
            let piece = Piece::from_leaf(header, at, mapping);
            if self.len == 0 || self.array[self.len - 1].start < piece.start {
                self.push(piece);
            }
        }
    }

    /// An insertion meets every slot in its way: both are in the leaf of the block where they overlap.
    pub(super) fn apply(&mut self, change: &Change) -> Result<(), Failure> {
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

pub(super) struct Change {
    pub(super) piece: Piece,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Insert,
    Remove,
    /// The same gfns, said otherwise.
    Replace,
}

/// Changes a leaf without unpacking it: where it stands if it is private and has room, else in a copy. Returns the
/// leaf that the caller links in the old one's place at once, or `None`, with nothing done, where the change
/// needs another number of leaves than one, finds nothing to change, or is rare.
///
/// # Safety
/// The leaf is alive and belongs to the working version.
pub(super) unsafe fn edit_leaf(
    arena: &mut Arena,
    leaf: Leaf,
    change: &Change,
) -> Result<Option<Leaf>, Failure> {
    let piece = change.piece;
    // SAFETY: a leaf is written only once it is private, and after the last use of what was read of it.
    unsafe {
        let (header, mappings) = (leaf.header(), leaf.items());
        if piece.start < header.base {
            return match change.kind {
                Kind::Insert => insert_first(arena, leaf, piece),
                Kind::Remove | Kind::Replace => Ok(None),
            };
        }
        if !header.reaches(piece.last()) {
            return Ok(None);
        }
        let (new_key, new) = piece.to_leaf(header);
        let from = new.end - piece.pages;
        // At least 1: the first slot starts at the base.
        let at = header.keys.not_above(new_key);
        let before = mappings[at - 1];
        match change.kind {
            Kind::Insert => {
                if before.end > from {
                    return Err(Failure::Overlap(before.label.id()));
                }
                if let Some(after) = mappings.get(at).filter(|_| header.from(at) < new.end) {
                    return Err(Failure::Overlap(after.label.id()));
                }
                if mappings.len() == LEAF_SLOTS {
                    return Ok(None);
                }
                let leaf = arena.with_item(leaf, at, new)?;
                leaf.header_mut().keys.insert(at, new_key);
                Ok(Some(leaf))
            }
            _ if header.keys.0[at - 1] != new_key => Ok(None),
            Kind::Remove if mappings.len() == 1 || (at == 1 && header.reach == 0) => Ok(None),
            Kind::Remove => {
                let leaf = arena.without_item(leaf, at - 1)?;
                leaf.header_mut().keys.remove(at - 1, key(NO_OFFSET));
                if at == 1 {
                    rebase(leaf);
                }
                Ok(Some(leaf))
            }
            Kind::Replace => {
                let leaf = arena.privately(leaf)?;
                leaf.items_mut()[at - 1] = new;
                Ok(Some(leaf))
            }
        }
    }
}

/// As [`edit_leaf`] with a slot that starts before the leaf's first one.
///
/// # Safety
/// As [`edit_leaf`].
unsafe fn insert_first(arena: &mut Arena, leaf: Leaf, piece: Piece) -> Result<Option<Leaf>, Failure> {
    // SAFETY: as in `edit_leaf`.
    unsafe {
        let (header, mappings) = (leaf.header(), leaf.items());
        if piece.last() >= header.base {
            return Err(Failure::Overlap(mappings[0].label.id()));
        }
        let last = header.base + u64::from(mappings[mappings.len() - 1].end) - 1;
        let grown = LeafHeader::new(piece.start, last);
        if mappings.len() == LEAF_SLOTS || header.reach == 0 || !grown.reaches(last) || grown.reach == 0 {
            return Ok(None);
        }
        let (new_key, new) = piece.to_leaf(&grown);
        let leaf = arena.with_item(leaf, 0, new)?;
        leaf.header_mut().keys.insert(0, new_key);
        rebase(leaf);
        leaf.items_mut()[0] = new;
        Ok(Some(leaf))
    }
}

/// Makes the first key the base. The keys stay, so the leaf must not lie across a multiple of 2^32, before or after.
///
/// # Safety
/// The leaf is private.
unsafe fn rebase(leaf: Leaf) {
    // SAFETY: passed on.
    let (header, mappings) = unsafe { (leaf.header_mut(), leaf.items_mut()) };
    let (old, new) = (low(header.base), offset(header.keys.0[0]));
    header.base = header.base - u64::from(old) + u64::from(new);
    header.reach = NO_OFFSET - new;
    for mapping in mappings {
        mapping.end = mapping.end.wrapping_add(old).wrapping_sub(new);
    }
}

/// Whether one leaf can hold these slots: few enough, and all of them within 32 bits of the first.
///
/// Two slots of the largest size side by side still fit. Where more lies between, ever smaller blocks keep them
/// apart, so halving comes to an end.
pub(super) fn fits(pieces: &[Piece]) -> bool {
    match (pieces.first(), pieces.last()) {
        (Some(first), Some(last)) => {
            pieces.len() <= LEAF_SLOTS && last.last() - first.start < u64::from(NO_OFFSET) - 1
        }
        _ => true,
    }
}

const _: () = assert!(2 * MAX_PAGES_PER_SLOT < NO_OFFSET as u64);

pub(super) fn alloc_leaf(arena: &mut Arena, pieces: &[Piece]) -> Result<Leaf, OutOfMemory> {
    let mut header = LeafHeader::new(pieces[0].start, pieces[pieces.len() - 1].last());
    let mut mappings = [Mapping { delta: 0, end: 0, label: Label(0) }; KEYS];
    for (at, piece) in pieces.iter().enumerate() {
        (header.keys.0[at], mappings[at]) = piece.to_leaf(&header);
    }
    arena.alloc(header, &mappings[..pieces.len()], pieces.len())
}
