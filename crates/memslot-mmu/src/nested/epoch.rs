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
//! # With a heavy fence
//!
//! That announcement is an atomic exchange, 40 % of what a fault in order costs. It is one for a single reason: the processor must
//! not load entries before others can see the announcement, and loads do overtake stores, even on x86-64. With a [`HeavyFence`]
//! the announcement is a plain store, which overtakes nothing that the same thread has stored before, and which the compiler
//! leaves in front of the loads. The rest is done by whoever frees, which is rare: it takes out, looks at the cells, has the thread
//! of every walker go through a full barrier, and **looks again**. That barrier falls somewhere in the walker's thread:
//!
//! * behind the announcement: then the second look sees it, or sees that the walker has left;
//! * in front of the announcement, hence in front of all that the walker loads from then on: then the walker finds the entry
//!   changed, and never comes to what was taken out.
//!
//! So no order between the announcement and the loads behind it is needed. The first look decides nothing: it saves the fence
//! where somebody is known to be inside. The walker's loads stay behind its announcement in the program, and its leaving is a
//! release, so that a look that sees it left has all its loads behind it. Where the fence is refused, nothing is freed.
//!
//! One fence does for everything that was taken out in front of it: [`Cells`] remember the newest stamp that everybody has passed.
//! What got this stamp or an older one was taken out before the looks that were behind the fence; a walker that was not inside
//! then, and one that announces an older epoch ever after, finds nothing of it.
//!
//! A fault needs no other order from its announcement: what it installs it installs by compare-exchanges, and what it looks at
//! behind these ([`nested`](super), 2) is ordered by them.
//!
//! Nobody ever waits here: what cannot be freed yet stays where it is, for the next look.

use alloc::vec::Vec;
use core::sync::atomic::compiler_fence;

use memslot::OutOfMemory;
use memslot::dirty::HeavyFence;

use crate::counted::Counted;
use crate::sync::{AtomicU64, Ordering, fence};

/// Where a walker announces: 0 outside, else twice the epoch plus 1. Alone in its cache lines (processors fetch
/// pairs).
#[repr(align(128))]
pub(crate) struct Cell(AtomicU64);

/// The current epoch, which walkers read.
pub(crate) struct Epoch(AtomicU64);

#[cfg(loom)]
loom::lazy_static! {
    /// What a heavy fence falls in front of or behind, in a thread that announces lightly. In a model, the fence is an exchange
    /// of this; all such exchanges have an order.
    pub(crate) static ref CROSSING: AtomicU64 = AtomicU64::new(0);
}

impl Epoch {
    pub(crate) fn starting_at(epoch: u64) -> Self {
        Self(AtomicU64::new(epoch))
    }

    /// Announces. Until [`Cell::leave`], nothing that can be found from here on is freed. `light` where whoever looks at
    /// cells makes a heavy fence.
    #[inline]
    pub(crate) fn enter(&self, cell: &Cell, light: bool) {
        let announced = self.0.load(Ordering::SeqCst) << 1 | 1;
        if light {
            cell.0.store(announced, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            #[cfg(loom)]
            CROSSING.fetch_add(0, Ordering::AcqRel);
        } else if cfg!(loom) {
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
pub(crate) struct Cells {
    cells: Vec<Counted<Cell>>,
    /// The newest stamp that everybody is known to have passed. Stamps are asked for in the order they were given.
    passed: Option<u64>,
}

impl Cells {
    pub(crate) const fn new() -> Self {
        Self { cells: Vec::new(), passed: None }
    }

    pub(crate) fn add(&mut self) -> Result<Counted<Cell>, OutOfMemory> {
        self.cells.try_reserve(1).map_err(|_| OutOfMemory)?;
        let cell = Counted::new(Cell(AtomicU64::new(0)))?;
        self.cells.push(cell.clone());
        Ok(cell)
    }

    pub(crate) fn remove(&mut self, cell: &Counted<Cell>) {
        self.cells.retain(|other| !other.is_same(cell));
    }

    /// Whether nobody is inside who entered before `stamp`. With the heavy fence that walkers rely on, if they do; where
    /// it is refused, somebody might be.
    pub(crate) fn have_passed(&mut self, stamp: u64, heavy: Option<&dyn HeavyFence>) -> bool {
        // Walkers that have loaded an older epoch and announce it only now find nothing that was taken out before the look
        // that this remembers.
        if self.passed.is_some_and(|passed| !is_before(passed, stamp)) {
            return true;
        }
        fence(Ordering::SeqCst);
        let mut passed = self.look(stamp);
        if let Some(heavy) = heavy.filter(|_| passed && !self.cells.is_empty()) {
            passed = heavy.fence().is_ok() && self.look(stamp);
        }
        if passed {
            self.passed = Some(stamp);
        }
        passed
    }

    fn look(&self, stamp: u64) -> bool {
        self.cells.iter().all(|cell| {
            let announced = cell.0.load(Ordering::SeqCst);
            announced & 1 == 0 || !is_before(announced >> 1 << 1, stamp << 1)
        })
    }
}

/// Numbers are compared by their distance, so a wrap does no harm.
fn is_before(number: u64, other: u64) -> bool {
    number.wrapping_sub(other) >= 1 << 63
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
            epoch.enter(&a, false);
            let first = epoch.stamp();
            assert!(!cells.have_passed(first, None), "{start:#x}");
            epoch.enter(&b, false);
            let second = epoch.stamp();
            a.leave();
            assert!(cells.have_passed(first, None) && !cells.have_passed(second, None), "{start:#x}");
            b.leave();
            assert!(cells.have_passed(second, None));
            epoch.enter(&a, false);
            assert!(cells.have_passed(second, None));
            cells.remove(&a);
        }
    }
}
