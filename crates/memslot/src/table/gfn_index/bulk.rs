//! Many slots at once: a sorted batch goes down the tree together.
//!
//! Each inner node on the way is made private and looked at once for the whole batch, which is then cut where the
//! node's ways end. Where two or more new slots meet one leaf, they are merged with its slots and the leaves for all
//! of them are built at once, as if the block had been empty. Overlap shows in the merge: what is new is next to
//! what is in its way.

use alloc::vec::Vec;

use super::super::node::Arena;
use super::super::radix::{Entry, Inner, Way, way_of};
use super::Failure;
use super::edit::{Block, build, edit_entry, edit_run, fill, join_around, region, run_of, widen};
use super::leaf::{Change, Kind, Leaf, LeafHeader, Mapping, Piece};
use crate::error::OutOfMemory;

/// Inserts the slots of a batch as far as they lie in `block`; all of them touch it. They are in ascending order and
/// do not overlap each other. `merged` is for slots on their way from one leaf to others.
///
/// # Safety
/// As [`edit_entry`].
pub(super) unsafe fn insert_batch(
    arena: &mut Arena,
    place: *mut Entry,
    block: Block,
    batch: &[Piece],
    merged: &mut Vec<Piece>,
) -> Result<(), Failure> {
    let (first, last) = match batch {
        [] => return Ok(()),
        // SAFETY: passed on.
        &[piece] => return unsafe { edit_entry(arena, place, block, &Change { piece, kind: Kind::Insert }) },
        [first, .., last] => (first, last),
    };
    // SAFETY: the place is the writer's; what it names is reachable from the working version, and written
    // only where it is private.
    unsafe {
        match (*place).way::<LeafHeader, Mapping>() {
            Way::Nothing => *place = build(arena, block, batch)?,
            Way::Leaf(leaf) => {
                merge(leaf, batch, merged)?;
                arena.reserve_dead(1)?;
                *place = build(arena, block, merged)?;
                arena.discard(leaf);
            }
            Way::Inner(node, shift) => {
                let (low, high) = (first.start.max(block.start), last.last().min(block.last));
                let (start, end) = region(node, shift);
                let (node, shift) = if start <= low && high <= end {
                    let node = arena.privately(node)?;
                    *place = Entry::inner(node, shift);
                    (node, shift)
                } else {
                    widen(arena, place, node, shift, block, (start.min(low), end.max(high)))?
                };
                insert_into_ways(arena, node, shift, block, batch, merged)?;
            }
        }
        Ok(())
    }
}

/// # Safety
/// As [`edit_ways`](super::edit::edit_ways), for all slots of the batch.
unsafe fn insert_into_ways(
    arena: &mut Arena,
    node: Inner,
    shift: u32,
    block: Block,
    mut batch: &[Piece],
    merged: &mut Vec<Piece>,
) -> Result<(), Failure> {
    let mut from = block.start;
    // A bit for each way that leads somewhere for the first time.
    let mut fresh = 0u128;
    // SAFETY: the node is private; what its ways name belongs to the working version.
    unsafe {
        while let Some(piece) = batch.first().filter(|piece| piece.start <= block.last) {
            let way = way_of(piece.start.max(from), shift, node.items().len());
            let (first, n) = run_of(node.items(), way);
            let run = Block::of_ways(node.header().start, shift, first, n);
            if node.items()[way].is_nothing() {
                fresh |= 1 << first;
            }
            let here = batch.iter().take_while(|piece| piece.start <= run.last).count();
            if let Some(next) = batch.get(here).filter(|next| next.start <= block.last) {
                // It comes from memory while this leaf is being changed.
                node.items()[way_of(next.start, shift, node.items().len())].prefetch(0..4);
            }
            insert_into_run(arena, node, shift, (first, n), &batch[..here], merged)?;
            // The last slot may go on behind the run; then it starts the next one, too.
            let across = batch[here - 1].last() > run.last.min(block.last) && run.last < block.last;
            batch = &batch[here - usize::from(across)..];
            from = run.last.saturating_add(1);
        }
        // Only now: a leaf that is joined with its neighbour has slots that the batch may still come to.
        while fresh != 0 {
            join_around(arena, node, fresh.trailing_zeros() as usize)?;
            fresh &= fresh - 1;
        }
        Ok(())
    }
}

/// # Safety
/// As [`insert_into_ways`]; the ways are a run, which all slots of the batch touch.
unsafe fn insert_into_run(
    arena: &mut Arena,
    node: Inner,
    shift: u32,
    (first, n): (usize, usize),
    batch: &[Piece],
    merged: &mut Vec<Piece>,
) -> Result<(), Failure> {
    // SAFETY: the node is private; what its ways name belongs to the working version.
    unsafe {
        if n == 1 {
            let block = Block::of_ways(node.header().start, shift, first, 1);
            return insert_batch(arena, &raw mut node.items_mut()[first], block, batch, merged);
        }
        if let &[piece] = batch {
            return edit_run(arena, node, shift, (first, n), &Change { piece, kind: Kind::Insert });
        }
        match node.items()[first].way::<LeafHeader, Mapping>() {
            Way::Leaf(leaf) => {
                merge(leaf, batch, merged)?;
                arena.reserve_dead(1)?;
                fill(arena, node, shift, first, n, merged)?;
                arena.discard(leaf);
            }
            _ => fill(arena, node, shift, first, n, batch)?,
        }
        Ok(())
    }
}

/// Puts the slots of a leaf and of a batch into `merged`, in ascending order.
///
/// # Safety
/// The leaf is alive.
unsafe fn merge(leaf: Leaf, mut batch: &[Piece], merged: &mut Vec<Piece>) -> Result<(), Failure> {
    // SAFETY: passed on.
    let (header, mappings) = unsafe { (leaf.header(), leaf.items()) };
    merged.clear();
    merged.try_reserve(mappings.len() + batch.len()).map_err(|_| OutOfMemory)?;
    for (at, mapping) in mappings.iter().enumerate() {
        let old = Piece::from_leaf(header, at, mapping);
        let before = batch.iter().take_while(|new| new.start < old.start).count();
        merged.extend_from_slice(&batch[..before]);
        batch = &batch[before..];
        let in_the_way = before > 0 && merged.last().is_some_and(|new| new.last() >= old.start);
        if in_the_way || batch.first().is_some_and(|new| new.start <= old.last()) {
            return Err(Failure::Overlap(old.label.id()));
        }
        merged.push(old);
    }
    merged.extend_from_slice(batch);
    Ok(())
}
