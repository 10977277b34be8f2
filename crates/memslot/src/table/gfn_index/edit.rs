//! Changing the tree: from the root down, splitting what overflows, joining what has become small.

use super::super::node::Arena;
use super::super::radix::{Entry, Inner, WAYS, WIDE, Way, common_shift, region_last, way_of};
use super::Failure;
use super::leaf::{Change, Kind, LeafHeader, Mapping, Piece, Pieces, alloc_leaf, edit_leaf, fits};
use crate::error::OutOfMemory;

/// Two neighbouring leaves become one when this many slots or fewer remain in both.
pub(super) const MERGE_SLOTS: usize = 10;

/// The gfns `[start, last]`; inclusive, because the last block ends with the 64-bit space.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) start: u64,
    pub(super) last: u64,
}

impl Block {
    pub(super) const ALL: Self = Self { start: 0, last: u64::MAX };

    /// The block of `n` ways from `first` on.
    pub(super) fn of_ways(node_start: u64, shift: u32, first: usize, n: usize) -> Self {
        let start = node_start + ((first as u64) << shift);
        Self { start, last: start + ((n as u64 - 1) << shift) + ((1 << shift) - 1) }
    }

    pub(super) fn is_all(&self) -> bool {
        self.start == 0 && self.last == u64::MAX
    }
}

/// # Safety
/// `place` holds an entry of the working version and is private (or the working root); `block` is its block.
pub(super) unsafe fn edit_entry(
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
                if let Some(leaf) = edit_leaf(arena, leaf, change)? {
                    *place = Entry::leaf(leaf);
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
pub(super) unsafe fn region(node: Inner, shift: u32) -> (u64, u64) {
    // SAFETY: passed on.
    let (start, ways) = unsafe { (node.header().start, node.items().len()) };
    (start, region_last(start, shift, ways))
}

/// How a node that holds the gfns from `low` to `high` looks: its shift and its ways. Only the root is wide.
pub(super) fn shape(block: Block, low: u64, high: u64) -> (u32, usize) {
    let (narrow, wide) = (common_shift(0, low, high, WAYS), common_shift(0, low, high, WIDE));
    if wide < narrow && block.is_all() { (wide, WIDE) } else { (narrow, WAYS) }
}

/// Replaces the node at `place` by a private one that holds its ways and all gfns from `low` to `high`.
///
/// # Safety
/// As [`edit_entry`]; `node` is what `place` names.
pub(super) unsafe fn widen(
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
pub(super) unsafe fn narrow(
    arena: &mut Arena,
    node: Inner,
    shift: u32,
    first: usize,
) -> Result<Entry, OutOfMemory> {
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
pub(super) unsafe fn free_made(arena: &mut Arena, entry: Entry) {
    if let Way::Inner(node, _) = entry.way::<LeafHeader, Mapping>() {
        // SAFETY: passed on.
        unsafe { arena.free_private(node) };
    }
}

/// Whether all these ways lead to the same leaf, or to nothing.
pub(super) fn is_one(ways: &[Entry]) -> bool {
    !ways[0].is_inner() && ways.iter().all(|way| *way == ways[0])
}

/// The run of ways around `way` that lead where it leads: the largest block of 1, 2, 4 … ways that is one leaf, or
/// nothing. An inner node is a run of its own.
pub(super) fn run_of(ways: &[Entry], way: usize) -> (usize, usize) {
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
pub(super) unsafe fn edit_ways(
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
        // What has become less may fit into fewer leaves, and so may the first slot where there was none.
        let may_join = |way: usize| match change.kind {
            Kind::Insert => node.items()[way].is_nothing(),
            Kind::Remove => true,
            Kind::Replace => false,
        };
        let (join_first, join_last) = (may_join(first), last != first && may_join(last));
        let mut way = first;
        while way <= last {
            let (start, n) = run_of(node.items(), way);
            edit_run(arena, node, shift, (start, n), change)?;
            way = start + n;
        }
        if join_first {
            join_around(arena, node, first)?;
        }
        if join_last {
            join_around(arena, node, last)?;
        }
        Ok(())
    }
}

/// # Safety
/// As [`edit_ways`]; the ways are a run.
pub(super) unsafe fn edit_run(
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
        let old = node.items()[first].way::<LeafHeader, Mapping>();
        let mut pieces = Pieces::new();
        if let Way::Leaf(leaf) = old {
            if let Some(edited) = edit_leaf(arena, leaf, change)? {
                if edited != leaf {
                    node.items_mut()[first..first + n].fill(Entry::leaf(edited));
                }
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
pub(super) unsafe fn join_around(arena: &mut Arena, node: Inner, way: usize) -> Result<(), OutOfMemory> {
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
pub(super) unsafe fn join(
    arena: &mut Arena,
    node: Inner,
    first: usize,
    n: usize,
) -> Result<bool, OutOfMemory> {
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

/// A new subtree for the slots of a block. On failure nothing of it is left.
pub(super) fn build(arena: &mut Arena, block: Block, pieces: &[Piece]) -> Result<Entry, OutOfMemory> {
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
pub(super) unsafe fn fill(
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
pub(super) unsafe fn free_private(arena: &mut Arena, entry: Entry) {
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
