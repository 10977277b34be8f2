//! Walking lists without a lock.

use alloc::sync::Arc;
use core::marker::PhantomData;
use core::num::NonZeroU64;

use super::RmapEntry;
use super::arena::Arena;
use super::descriptor::{CELLS, Descriptor, FULL, Head};
use super::heads::List;
use super::shared::Shared;
use crate::nested::epoch::Cell;
use crate::sync::Ordering;

/// A thread's access to lists: walks them without a lock, beside whoever changes them.
pub struct Walker<E> {
    shared: Arc<Shared>,
    cell: Arc<Cell>,
    entries: PhantomData<fn(E) -> E>,
}

impl<E: RmapEntry> Walker<E> {
    pub(super) fn new(shared: Arc<Shared>, cell: Arc<Cell>) -> Self {
        Self { shared, cell, entries: PhantomData }
    }

    /// Announces that this thread walks, until the guard is dropped.
    ///
    /// Costs one atomic exchange, so a pass over many lists enters once. Nobody waits for the guard, but descriptors
    /// that were taken out since are not used again before it is dropped.
    #[inline]
    pub fn enter(&mut self) -> Inside<'_, E> {
        self.shared.epoch.enter(&self.cell);
        Inside { shared: &self.shared, cell: &self.cell, entries: PhantomData }
    }
}

impl<E> Drop for Walker<E> {
    fn drop(&mut self) {
        self.shared.central.lock().cells.remove(&self.cell);
    }
}

/// Leave to walk, from [`Walker::enter`].
pub struct Inside<'a, E> {
    shared: &'a Shared,
    cell: &'a Cell,
    entries: PhantomData<fn(E) -> E>,
}

impl<E> Drop for Inside<'_, E> {
    #[inline]
    fn drop(&mut self) {
        self.cell.leave();
    }
}

impl<E: RmapEntry> Inside<'_, E> {
    /// Walks a list: every entry that is in it from this call until the iterator has come to its end is seen, and
    /// every entry that is seen was in it at some moment in between. An entry that is removed and added again meanwhile may
    /// be seen twice.
    ///
    /// So an entry that is seen may have been removed since. What it refers to must not be freed before those who
    /// were inside have left; see [the protocol](super).
    #[inline]
    pub fn entries(&self, list: List<'_, E>) -> Entries<'_, E> {
        // Sequentially consistent: not before the announcement. So whoever took out what this finds sees the latter.
        Entries::new(&self.shared.descriptors.all, list.head.load(Ordering::SeqCst))
    }
}

/// The entries of a list, from [`Inside::entries`] or [`Writer::entries`](super::Writer::entries), in no order.
pub struct Entries<'a, E> {
    all: &'a Arena<Descriptor>,
    /// The one entry of a list without descriptors.
    one: u64,
    descriptor: Option<&'a Descriptor>,
    /// The cells still to be seen of it.
    mask: u32,
    entries: PhantomData<fn(E) -> E>,
}

impl<'a, E: RmapEntry> Entries<'a, E> {
    #[inline(always)]
    pub(super) fn new(all: &'a Arena<Descriptor>, head: u64) -> Self {
        let (one, descriptor) = match Head::new(head) {
            Head::Empty => (0, None),
            Head::One(word) => (word, None),
            Head::Many { first, .. } => (0, all.get(first)),
        };
        let mask = descriptor.map_or(0, |descriptor| descriptor.mask.load(Ordering::Acquire));
        Self { all, one, descriptor, mask, entries: PhantomData }
    }
}

/// The next descriptor of the list, if any.
#[inline(always)]
fn next<'a>(all: &'a Arena<Descriptor>, descriptor: &Descriptor) -> Option<&'a Descriptor> {
    // As the load of the head: descriptors are taken out here, too.
    match descriptor.next.load(Ordering::SeqCst) {
        0 => None,
        next => all.get(next),
    }
}

/// Reads a cell whose bit was seen. It has had an entry ever since; perhaps another one than when the bit was seen.
#[inline(always)]
fn read<E: RmapEntry>(descriptor: &Descriptor, cell: usize) -> Option<E> {
    NonZeroU64::new(descriptor.cells[cell].load(Ordering::Acquire)).map(E::from_word)
}

impl<E: RmapEntry> Iterator for Entries<'_, E> {
    type Item = E;

    #[inline]
    fn next(&mut self) -> Option<E> {
        if let Some(word) = NonZeroU64::new(self.one) {
            self.one = 0;
            return Some(E::from_word(word));
        }
        loop {
            let descriptor = self.descriptor?;
            while self.mask != 0 {
                let cell = self.mask.trailing_zeros() as usize;
                self.mask &= self.mask - 1;
                if let Some(entry) = read(descriptor, cell) {
                    return Some(entry);
                }
            }
            self.descriptor = next(self.all, descriptor);
            self.mask = self.descriptor.map_or(0, |descriptor| descriptor.mask.load(Ordering::Acquire));
        }
    }

    #[inline]
    fn fold<B, F: FnMut(B, E) -> B>(self, init: B, mut f: F) -> B {
        let mut result = init;
        if let Some(word) = NonZeroU64::new(self.one) {
            result = f(result, E::from_word(word));
        }
        let (mut at, mut mask) = (self.descriptor, self.mask);
        while let Some(descriptor) = at {
            if mask == FULL {
                for cell in 0..CELLS {
                    if let Some(entry) = read(descriptor, cell) {
                        result = f(result, entry);
                    }
                }
            } else {
                while mask != 0 {
                    let cell = mask.trailing_zeros() as usize;
                    mask &= mask - 1;
                    if let Some(entry) = read(descriptor, cell) {
                        result = f(result, entry);
                    }
                }
            }
            at = next(self.all, descriptor);
            mask = at.map_or(0, |descriptor| descriptor.mask.load(Ordering::Acquire));
        }
        result
    }
}
