//! Walking lists without a lock.

use core::marker::PhantomData;
use core::num::NonZeroU64;

use super::RmapEntry;
use super::descriptor::{CELLS, Descriptor, Head};
use super::heads::List;
use super::shared::Shared;
use crate::counted::Counted;
use crate::nested::epoch::Cell;
use crate::sync::{AtomicU64, Ordering};

/// A thread's access to lists: walks them without a lock, beside whoever changes them.
pub struct Walker<E> {
    shared: Counted<Shared>,
    cell: Counted<Cell>,
    entries: PhantomData<fn(E) -> E>,
}

impl<E: RmapEntry> Walker<E> {
    pub(super) fn new(shared: Counted<Shared>, cell: Counted<Cell>) -> Self {
        Self { shared, cell, entries: PhantomData }
    }

    /// Announces that this thread walks, until the guard is dropped.
    ///
    /// Costs one atomic exchange, so a pass over many lists enters once. Nobody waits for the guard, but descriptors
    /// that were taken out since are not used again before it is dropped.
    #[inline]
    pub fn enter(&mut self) -> Inside<'_, E> {
        self.shared.epoch.enter(&self.cell, false);
        Inside { cell: &self.cell, entries: PhantomData }
    }
}

impl<E> Drop for Walker<E> {
    fn drop(&mut self) {
        self.shared.central.lock().cells.remove(&self.cell);
    }
}

/// Leave to walk, from [`Walker::enter`].
pub struct Inside<'a, E> {
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
    /// every entry that is seen was in it at some moment in between. An entry may be seen twice, if it
    /// [moves](super) meanwhile or is removed and added again.
    ///
    /// So an entry that is seen may have been removed since. What it refers to must not be freed before those who
    /// were inside have left; see [the protocol](super).
    ///
    /// The list has to be one of the walker's own reverse map. (Of another's, entries may be missed, or seen that are none of its.)
    #[inline]
    pub fn entries<'s>(&'s self, list: List<'s, E>) -> Entries<'s, E> {
        Entries::new(list)
    }

    /// How many entries the list has, at some moment of this call: two loads, whatever its length.
    #[inline]
    #[must_use]
    pub fn count(&self, list: List<'_, E>) -> usize {
        // SAFETY: inside.
        unsafe { list.count() }
    }
}

/// The entries of a list, from [`Inside::entries`] or [`Writer::entries`](super::Writer::entries), in no order.
pub struct Entries<'a, E> {
    /// The one entry of a list without descriptors.
    one: u64,
    descriptor: Option<&'a Descriptor>,
    /// How many of its cells are still to be seen, from the last filled one down.
    left: usize,
    entries: PhantomData<fn(E) -> E>,
}

impl<'a, E: RmapEntry> Entries<'a, E> {
    #[inline(always)]
    pub(super) fn new(list: List<'a, E>) -> Self {
        // Sequentially consistent: not before the announcement. So whoever took out what this finds sees the latter.
        // SAFETY: the list's own head; the list borrows from what keeps the reverse map.
        let (one, descriptor) = match unsafe { Head::new(list.head.load(Ordering::SeqCst)) } {
            Head::Empty => (0, None),
            Head::One(word) => (word, None),
            Head::Many(first) => (0, Some(first)),
        };
        let mut entries = Self { one, descriptor: None, left: 0, entries: PhantomData };
        entries.go_to(descriptor);
        entries
    }

    #[inline(always)]
    fn go_to(&mut self, descriptor: Option<&'a Descriptor>) {
        self.descriptor = descriptor;
        if let Some(descriptor) = descriptor {
            self.left = descriptor.place().cell();
        }
    }
}

/// Folds those of some cells that are among the first `left`, from the last one down. `left` is no more than were filled when
/// the walk came here.
#[inline(always)]
fn down<const FROM: usize, const TO: usize, B, E: RmapEntry, F: FnMut(B, E) -> B>(
    cells: &[AtomicU64; CELLS],
    left: usize,
    mut result: B,
    f: &mut F,
) -> B {
    for place in (FROM..TO.min(CELLS)).rev() {
        if place < left {
            // SAFETY: below those that were filled.
            result = f(result, unsafe { entry(&cells[place]) });
        }
    }
    result
}

/// An entry that is in a cell.
///
/// # Safety
/// The cell is one of those that were filled.
#[inline(always)]
unsafe fn entry<E: RmapEntry>(cell: &AtomicU64) -> E {
    let word = cell.load(Ordering::Acquire);
    // SAFETY: what is in a cell is replaced by other entries only, never by 0.
    E::from_word(unsafe { NonZeroU64::new_unchecked(word) })
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
            if let Some(left) = self.left.checked_sub(1) {
                self.left = left;
                // SAFETY: below those that were filled when the walk came here.
                return Some(unsafe { entry(descriptor.cells.get(left)?) });
            }
            // SAFETY: a descriptor of the list; see `new`.
            self.go_to(unsafe { descriptor.next() });
        }
    }

    #[inline]
    fn fold<B, F: FnMut(B, E) -> B>(mut self, init: B, mut f: F) -> B {
        let mut result = init;
        if let Some(word) = NonZeroU64::new(self.one) {
            result = f(result, E::from_word(word));
        }
        while let Some(descriptor) = self.descriptor {
            let cells = &descriptor.cells;
            // Each cell where the compiler knows the place: most descriptors are full, and in the first one, to ask for each is
            // cheaper than to count.
            let next = if self.left >= CELLS {
                // Early, as the others come from far away. What leaves meanwhile is seen, as it was there.
                // SAFETY: as in `next`.
                let next = unsafe { descriptor.next() };
                for cell in cells.iter().rev() {
                    // SAFETY: all were filled when the walk came here.
                    result = f(result, unsafe { entry(cell) });
                }
                next
            } else {
                if self.left > 8 {
                    result = down::<8, CELLS, B, E, F>(cells, self.left, result, &mut f);
                }
                if self.left > 4 {
                    result = down::<4, 8, B, E, F>(cells, self.left, result, &mut f);
                }
                result = down::<0, 4, B, E, F>(cells, self.left, result, &mut f);
                // SAFETY: as in `next`.
                unsafe { descriptor.next() }
            };
            self.go_to(next);
        }
        result
    }
}
