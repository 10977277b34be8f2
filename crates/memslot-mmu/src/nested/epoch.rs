//! Epochs: who may still be inside a table that was taken out.
//!
//! Every walker has a cell of its own. Before it looks at the first entry it announces the current epoch there, and
//! it takes that back when it is done. What was taken out of the tables is stamped with the next epoch, *after*
//! it was taken out, and freed when no cell has an older one.
//!
//! A walker announces, then loads entries; whoever takes out changes an entry, then looks at the cells, with a full
//! fence between on both sides. Either it sees the announcement and waits, or the walker sees the entry changed.
//! (All these are sequentially consistent accesses: on x86-64 only the announcement costs anything.)
//!
//! Nobody ever waits here: what cannot be freed yet stays where it is, for the next look.

use alloc::vec::Vec;

use memslot::OutOfMemory;

use crate::counted::Counted;
use crate::sync::{AtomicU64, Ordering, fence};

/// Where a walker announces: 0 outside, else twice the epoch plus 1. Alone in its cache lines (processors fetch
/// pairs).
#[repr(align(128))]
pub(crate) struct Cell(AtomicU64);

/// The current epoch, which walkers read.
pub(crate) struct Epoch(AtomicU64);

impl Epoch {
    pub(crate) fn starting_at(epoch: u64) -> Self {
        Self(AtomicU64::new(epoch))
    }

    /// Announces. Until [`Cell::leave`], nothing that can be found from here on is freed.
    #[inline]
    pub(crate) fn enter(&self, cell: &Cell) {
        let announced = self.0.load(Ordering::SeqCst) << 1 | 1;
        if cfg!(loom) {
            // loom knows sequential consistency of fences, not of single accesses.
            cell.0.store(announced, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        } else {
            // One exchange is cheaper than a store and a fence.
            cell.0.swap(announced, Ordering::SeqCst);
        }
    }

    /// The stamp for what was taken out before this call.
    pub(crate) fn stamp(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.0.fetch_add(1, Ordering::SeqCst).wrapping_add(1)
    }
}

impl Cell {
    #[inline]
    pub(crate) fn leave(&self) {
        self.0.store(0, Ordering::Release);
    }
}

/// All cells; whoever looks at them has the lock that protects this.
pub(crate) struct Cells(Vec<Counted<Cell>>);

impl Cells {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn add(&mut self) -> Result<Counted<Cell>, OutOfMemory> {
        self.0.try_reserve(1).map_err(|_| OutOfMemory)?;
        let cell = Counted::new(Cell(AtomicU64::new(0)))?;
        self.0.push(cell.clone());
        Ok(cell)
    }

    pub(crate) fn remove(&mut self, cell: &Counted<Cell>) {
        self.0.retain(|other| !other.is_same(cell));
    }

    /// Whether nobody is inside who entered before `stamp`. Epochs are compared by their distance, so a wrap does
    /// no harm.
    pub(crate) fn have_passed(&self, stamp: u64) -> bool {
        fence(Ordering::SeqCst);
        let oldest = stamp << 1 | 1;
        self.0.iter().all(|cell| {
            let announced = cell.0.load(Ordering::SeqCst);
            announced & 1 == 0 || announced.wrapping_sub(oldest) < 1 << 63
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_out_waits_for_those_inside_also_across_the_wrap() {
        for start in [0, 1, u64::MAX, (1 << 63) - 1, (1 << 63) - 2, 1 << 63, (1 << 62) - 1] {
            let epoch = Epoch::starting_at(start);
            let mut cells = Cells::new();
            let (a, b) = (cells.add().unwrap(), cells.add().unwrap());
            epoch.enter(&a);
            let first = epoch.stamp();
            assert!(!cells.have_passed(first), "{start:#x}");
            epoch.enter(&b);
            let second = epoch.stamp();
            a.leave();
            assert!(cells.have_passed(first) && !cells.have_passed(second), "{start:#x}");
            b.leave();
            assert!(cells.have_passed(second));
            epoch.enter(&a);
            assert!(cells.have_passed(second));
            cells.remove(&a);
        }
    }
}
