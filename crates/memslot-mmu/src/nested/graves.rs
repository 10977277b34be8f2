//! Tables that were taken out, from then until they are freed.
//!
//! ```text
//!  taken out ──► owed to a flush ──► flushed, waits for walkers ──► freed, its tables below wait likewise
//!                (chain of a Flush)  (limbo)
//! ```
//!
//! Only the topmost table of a tree that was taken out is noted: those below are found through it when nobody is
//! inside any more. A note needs memory, and taking out must not fail; so a note is reserved for every table
//! when the table is allocated.

use alloc::vec::Vec;

use memslot::OutOfMemory;

use crate::host::Pfn;
use crate::level::Level;

const NONE: u32 = u32::MAX;

/// A table that was taken out.
#[derive(Clone, Copy)]
pub(crate) struct Grave {
    pub(crate) table: Pfn,
    /// The level of its entries.
    pub(crate) level: Level,
    /// Its first frame.
    pub(crate) base: u64,
    /// Walkers that entered at this epoch or later cannot reach it; `None` as long as a flush is owed.
    pub(crate) stamp: Option<u64>,
}

struct Node {
    grave: Grave,
    next: u32,
}

/// All notes; lists of them are [`Chain`]s.
pub(crate) struct Graves {
    nodes: Vec<Node>,
    unused: Chain,
}

/// A list of graves. It is only a pair of indexes: what is forgotten is lost until the end.
#[derive(Clone, Copy)]
pub(crate) struct Chain {
    first: u32,
    last: u32,
}

impl Chain {
    pub(crate) const EMPTY: Self = Self { first: NONE, last: NONE };

    pub(crate) fn is_empty(&self) -> bool {
        self.first == NONE
    }
}

const NOTHING: Grave = Grave { table: Pfn::new(0), level: Level::K4, base: 0, stamp: Some(0) };

impl Graves {
    pub(crate) const fn new() -> Self {
        Self { nodes: Vec::new(), unused: Chain::EMPTY }
    }

    /// Makes sure that there are notes for so many tables in all.
    pub(crate) fn reserve(&mut self, tables: usize) -> Result<(), OutOfMemory> {
        let missing = tables.saturating_sub(self.nodes.len());
        self.nodes.try_reserve(missing).map_err(|_| OutOfMemory)?;
        for _ in 0..missing {
            let Ok(index) = u32::try_from(self.nodes.len()) else { return Err(OutOfMemory) };
            self.nodes.push(Node { grave: NOTHING, next: NONE });
            link(&mut self.nodes, &mut self.unused, index);
        }
        Ok(())
    }

    fn take_unused(&mut self, grave: Grave) -> u32 {
        let index = unlink(&self.nodes, &mut self.unused).expect("a note is reserved for every table");
        self.nodes[index as usize].grave = grave;
        index
    }

    /// Adds a table at the end.
    pub(crate) fn push(&mut self, chain: &mut Chain, grave: Grave) {
        let index = self.take_unused(grave);
        link(&mut self.nodes, chain, index);
    }

    /// Adds a table at the start.
    pub(crate) fn push_front(&mut self, chain: &mut Chain, grave: Grave) {
        let index = self.take_unused(grave);
        self.nodes[index as usize].next = chain.first;
        chain.first = index;
        if chain.last == NONE {
            chain.last = index;
        }
    }

    /// The first one.
    pub(crate) fn first(&self, chain: &Chain) -> Option<&Grave> {
        self.nodes.get(chain.first as usize).map(|node| &node.grave)
    }

    /// Takes the first one out.
    pub(crate) fn pop(&mut self, chain: &mut Chain) -> Option<Grave> {
        let index = unlink(&self.nodes, chain)?;
        link(&mut self.nodes, &mut self.unused, index);
        Some(self.nodes[index as usize].grave)
    }

    /// Moves `other` to the end of `chain`.
    pub(crate) fn append(&mut self, chain: &mut Chain, other: Chain) {
        if chain.is_empty() {
            *chain = other;
        } else if !other.is_empty() {
            self.nodes[chain.last as usize].next = other.first;
            chain.last = other.last;
        }
    }

    /// Every table for which a flush is owed, whoever owes it.
    pub(crate) fn owed(&self) -> impl Iterator<Item = &Grave> {
        // A note that is not in use has the stamp of the table that it was for.
        self.nodes.iter().map(|node| &node.grave).filter(|grave| grave.stamp.is_none())
    }

    /// Every grave of a chain, to look at or stamp.
    pub(crate) fn for_each(&mut self, chain: &Chain, mut work: impl FnMut(&mut Grave)) {
        let mut index = chain.first;
        while let Some(node) = self.nodes.get_mut(index as usize) {
            work(&mut node.grave);
            index = node.next;
        }
    }
}

/// Adds a note at the end of a chain.
fn link(nodes: &mut [Node], chain: &mut Chain, index: u32) {
    nodes[index as usize].next = NONE;
    match nodes.get_mut(chain.last as usize) {
        Some(last) => last.next = index,
        None => chain.first = index,
    }
    chain.last = index;
}

/// Takes the first note of a chain out.
fn unlink(nodes: &[Node], chain: &mut Chain) -> Option<u32> {
    let first = chain.first;
    chain.first = nodes.get(first as usize)?.next;
    if chain.first == NONE {
        chain.last = NONE;
    }
    Some(first)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn grave(number: u64) -> Grave {
        Grave { table: Pfn::new(number), ..NOTHING }
    }

    #[test]
    fn chains_keep_their_order_and_notes_are_used_again() {
        let mut graves = Graves::new();
        graves.reserve(4).unwrap();
        for _ in 0..10 {
            let (mut a, mut b) = (Chain::EMPTY, Chain::EMPTY);
            graves.push(&mut a, grave(1));
            graves.push(&mut b, grave(2));
            graves.push(&mut b, grave(3));
            graves.push_front(&mut a, grave(0));
            graves.append(&mut a, b);
            graves.append(&mut a, Chain::EMPTY);
            graves.for_each(&a, |grave| grave.stamp = Some(9));
            assert_eq!(graves.first(&a).and_then(|grave| grave.stamp), Some(9));
            let order: Vec<_> = core::iter::from_fn(|| graves.pop(&mut a)).map(|g| g.table.get()).collect();
            assert_eq!(order, [0, 1, 2, 3]);
            assert!(a.is_empty());
            assert_eq!(graves.nodes.len(), 4);
        }
    }
}
