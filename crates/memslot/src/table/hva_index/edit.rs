//! Changing the tree: insertion splits on the way down, removal joins on the way up.

use core::ptr::NonNull;

use super::super::node::Arena;
use super::node::{
    Bounds, Child, FAN_OUT, Inner, Interval, Intervals, Leaf, Node, add_child, alloc_inner, alloc_leaf,
    drop_child, insert_packed, last_start, one_leaf, remove_packed, set_child,
};
use crate::error::OutOfMemory;
use crate::prefetch::prefetch;

/// Two neighbours become one node when they have this many items or fewer together.
pub(super) const MERGE_ITEMS: usize = 10;

/// A full node shares its items with a neighbour that has this many or fewer.
const SHARE_ITEMS: usize = 14;

/// Inserts the first of some intervals below `place`, whose node is not full, and as many of the others as there is
/// room for; they are in ascending order, and all belong there. Returns how many. `place` names the private copy
/// afterwards, also on failure.
///
/// # Safety
/// The node belongs to the working version; there is at least one interval.
pub(super) unsafe fn insert(
    arena: &mut Arena,
    place: &mut Child,
    run: &[Interval],
) -> Result<usize, OutOfMemory> {
    let mut done = 0;
    // SAFETY: passed on; only private nodes are written.
    unsafe {
        match Node::of(place.node) {
            Node::Leaf(mut leaf) => loop {
                leaf = insert_into_leaf(arena, place, leaf, run[done])?;
                done += 1;
                let more = run.get(done).is_some_and(|next| one_leaf(leaf.header().base, next.start));
                if !more || leaf.items().len() == FAN_OUT {
                    break;
                }
            },
            Node::Inner(inner) => {
                let inner = arena.privately(inner)?;
                place.node = inner.raw();
                let mut at = child_for(inner, run[0].key());
                while done < run.len() && inner.items().len() < FAN_OUT {
                    let new = run[done];
                    at = child_from(inner, at, new.key());
                    if !fits(inner.items()[at], new) {
                        // Too far from the leaf where it would belong: a leaf of its own.
                        let child = Node::Leaf(alloc_leaf(arena, &[new])?).as_child();
                        add_child(inner, child);
                        done += 1;
                        continue;
                    }
                    if Node::of(inner.items()[at].node).len() == FAN_OUT {
                        if share(arena, inner, at)? {
                            // The place of the key may now be one further left, or need a leaf of its own.
                            at = at.saturating_sub(1);
                            continue;
                        }
                        split(arena, inner, at, new.key())?;
                        at = child_from(inner, at, new.key());
                    }
                    let next = inner.items().get(at + 1).map(Child::key);
                    let below = |item: &&Interval| next.is_none_or(|next| item.key() < next);
                    let here = 1 + run[done + 1..].iter().take_while(below).count();
                    if let Some(next) = run.get(done + here) {
                        // It comes from memory while this child is being changed.
                        let ahead = child_from(inner, at, next.key());
                        prefetch(inner.items()[ahead].node, 0..4);
                    }
                    let mut child = inner.items()[at];
                    let result = insert(arena, &mut child, &run[done..done + here]);
                    set_child(inner, at, child);
                    done += result?;
                }
            }
        }
        let inserted = &run[..done];
        if inserted[0].key() < place.key() {
            (place.start, place.id) = inserted[0].key();
        }
        place.end = inserted.iter().fold(place.end, |end, new| end.max(new.end()));
        Ok(done)
    }
}

/// Inserts into a leaf that is not full. Returns the leaf that is in its place now, in `place`, too.
///
/// # Safety
/// The leaf belongs to the working version and is what `place` names.
unsafe fn insert_into_leaf(
    arena: &mut Arena,
    place: &mut Child,
    leaf: Leaf,
    new: Interval,
) -> Result<Leaf, OutOfMemory> {
    // SAFETY: passed on.
    unsafe {
        if let Some(leaf) = insert_packed(arena, leaf, new)? {
            place.node = leaf.raw();
            return Ok(leaf);
        }
        let mut items = Intervals::of(leaf);
        items.insert(0, new);
        replace_leaf(arena, place, leaf, items.as_slice())?;
        Ok(Leaf::from_raw(place.node))
    }
}

/// The child below which a key belongs.
///
/// # Safety
/// The node is alive.
pub(super) unsafe fn child_for(inner: Inner, key: (u64, u32)) -> usize {
    // SAFETY: passed on.
    unsafe { inner.items() }.partition_point(|child| child.key() <= key).saturating_sub(1)
}

/// As [`child_for`], where that is not before the child `at`; quick where it is not far behind.
///
/// # Safety
/// The node is alive.
unsafe fn child_from(inner: Inner, at: usize, key: (u64, u32)) -> usize {
    // SAFETY: passed on.
    let children = unsafe { inner.items() };
    at + children[at + 1..].iter().take_while(|child| child.key() <= key).count()
}

/// Whether `new` can go below `child`: always, unless the child is a leaf and would span too much.
///
/// # Safety
/// The child is alive.
pub(super) unsafe fn fits(child: Child, new: Interval) -> bool {
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

/// Replaces a leaf by one with other items.
///
/// # Safety
/// The leaf belongs to the working version and is what `place` names; `items` lies outside of it.
pub(super) unsafe fn replace_leaf(
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

/// Shares the items of the full child `at` of a private node with a neighbour that has room. Returns whether there
/// was one.
///
/// # Safety
/// `inner` is private; its children belong to the working version.
unsafe fn share(arena: &mut Arena, inner: Inner, at: usize) -> Result<bool, OutOfMemory> {
    // SAFETY: passed on; only private nodes are written.
    unsafe {
        let len_of = |at: usize| inner.items().get(at).map_or(FAN_OUT, |child| Node::of(child.node).len());
        let (before, after) = (at.checked_sub(1).map_or(FAN_OUT, len_of), len_of(at + 1));
        if before.min(after) > SHARE_ITEMS {
            return Ok(false);
        }
        let low = if before < after { at - 1 } else { at };
        let (left, right) = (Node::of(inner.items()[low].node), Node::of(inner.items()[low + 1].node));
        let (first, len) = (left.len(), left.len() + right.len());
        let from = len / 2;
        arena.reserve_dead(2)?;
        let (new_left, new_right) = match (left, right) {
            (Node::Leaf(a), Node::Leaf(b)) => {
                let (all, others) = (Intervals::of(a), Intervals::of(b));
                let mut items = [all.array[0]; 2 * FAN_OUT];
                items[..first].copy_from_slice(all.as_slice());
                items[first..len].copy_from_slice(others.as_slice());
                let (left, right) = items[..len].split_at(from);
                if [left, right].iter().any(|part| !one_leaf(part[0].start, part[part.len() - 1].start)) {
                    return Ok(false);
                }
                let left = alloc_leaf(arena, left)?;
                let right = alloc_leaf(arena, right).inspect_err(|_| arena.free_private(left))?;
                arena.discard(a);
                arena.discard(b);
                (Node::Leaf(left), Node::Leaf(right))
            }
            (Node::Inner(a), Node::Inner(b)) => {
                let mut children = [a.items()[0]; 2 * FAN_OUT];
                children[..first].copy_from_slice(a.items());
                children[first..len].copy_from_slice(b.items());
                let level = a.head().level;
                let left = alloc_inner(arena, &children[..from], level)?;
                let right = alloc_inner(arena, &children[from..len], level)
                    .inspect_err(|_| arena.free_private(left))?;
                arena.discard(a);
                arena.discard(b);
                (Node::Inner(left), Node::Inner(right))
            }
            _ => unreachable!("neighbours have the same level"),
        };
        set_child(inner, low, new_left.as_child());
        set_child(inner, low + 1, new_right.as_child());
        Ok(true)
    }
}

/// Splits the full child `at` of a private node that has room.
///
/// Keys that arrive in order (a VMM that plugs memory upwards) go to the end of a node: there nearly all
/// stays in the left half, so that the nodes left behind are full and not half empty.
///
/// # Safety
/// `inner` is private; its children belong to the working version.
pub(super) unsafe fn split(
    arena: &mut Arena,
    inner: Inner,
    at: usize,
    key: (u64, u32),
) -> Result<(), OutOfMemory> {
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

pub(super) fn split_point(before_all: bool, after_all: bool) -> usize {
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
pub(super) unsafe fn remove(arena: &mut Arena, place: &mut Child, old: Interval) -> Result<(), OutOfMemory> {
    // SAFETY: passed on; only private nodes are written.
    unsafe {
        match Node::of(place.node) {
            Node::Leaf(leaf) => {
                if let Some(leaf) = remove_packed(arena, leaf, old)? {
                    place.node = leaf.raw();
                } else {
                    let mut items = Intervals::of(leaf);
                    let at = items.as_slice().partition_point(|item| item.key() < old.key());
                    debug_assert!(items.as_slice().get(at).is_some_and(|item| item.key() == old.key()));
                    items.remove(at);
                    replace_leaf(arena, place, leaf, items.as_slice())?;
                }
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
        // What is left starts and ends where it did, unless what went was the first or reached furthest.
        let same = old.key() != place.key() && old.end() < place.end;
        if !same && Node::of(place.node).len() > 0 {
            *place = Node::of(place.node).as_child();
        }
        Ok(())
    }
}

/// After a removal below child `at`: drops the child if it is empty, joins it with a neighbour if both are small.
///
/// # Safety
/// `inner` is private; its children belong to the working version.
pub(super) unsafe fn tidy(arena: &mut Arena, inner: Inner, at: usize) -> Result<(), OutOfMemory> {
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
        if node.len() >= MERGE_ITEMS {
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

/// Frees the private nodes of a subtree. A published node has no private ones below it.
///
/// # Safety
/// The subtree belongs to the working version, and nobody uses it again.
pub(super) unsafe fn free_private(arena: &mut Arena, raw: NonNull<u8>) {
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
