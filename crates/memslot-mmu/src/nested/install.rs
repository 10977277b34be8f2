//! Building tables aside, to be linked with one exchange.
//!
//! Nobody sees these tables until the exchange succeeds; if it does not, they go back to the cache as they were, all
//! entries 0.

use super::Shared;
use crate::cache::Cache;
use crate::format::Format;
use crate::host::Host;
use crate::level::{ENTRIES, Level, Table};
use crate::sync::{AtomicU64, Ordering};

/// Leaves to install, in one table.
#[derive(Clone, Copy)]
pub(crate) struct Leaves {
    /// The first one.
    pub(crate) first: u64,
    pub(crate) level: Level,
    pub(crate) gfn: u64,
    /// How many follow each other, the first one included; they do not pass the end of the table.
    pub(crate) count: usize,
}

/// A path of tables from the cache down to some leaves.
pub(crate) struct Path {
    leaves: Leaves,
    /// The level of the entry that will lead to it.
    top: Level,
    /// The entry as it is now, which is empty.
    seen: u64,
    /// What to put there.
    pub(crate) entry: u64,
}

impl Path {
    /// How many tables a path from an entry of `top` down to leaves of `level` has.
    #[inline]
    pub(crate) fn tables(top: Level, level: Level) -> usize {
        usize::from(top.get() - level.get())
    }

    /// Builds the path that an empty entry of level `top` will lead to, of tables that are in the cache.
    ///
    /// What the entry says of processors ([`Format::STALE`]), the tables say of all their frames: a processor may have a
    /// translation of any of them, and whoever changes one later must find that out.
    #[inline]
    pub(crate) fn build<F: Format, H: Host>(
        shared: &Shared<F, H>,
        cache: &Cache,
        top: Level,
        seen: u64,
        leaves: Leaves,
    ) -> Self {
        let mut entry = leaves.first;
        let mut level = leaves.level;
        while level < top {
            let frame = cache.peek(usize::from(level.get() - leaves.level.get()));
            let table = cache.table(shared, frame);
            if seen & F::STALE != 0 {
                fill_stale(table, seen & F::STALE_BITS);
            }
            if level == leaves.level {
                leaves.write::<F>(table);
            } else {
                table.entry(level, leaves.gfn).store(entry, Ordering::Relaxed);
            }
            entry = F::table(frame);
            level = level.up();
        }
        Self { leaves, top, seen, entry }
    }

    /// Links the path, if the entry is what it was.
    #[inline]
    pub(crate) fn link<F: Format, H: Host>(
        self,
        shared: &Shared<F, H>,
        cache: &mut Cache,
        entry: &AtomicU64,
    ) -> bool {
        let is_linked = exchange(entry, self.seen, self.entry);
        if is_linked {
            cache.take(Self::tables(self.top, self.leaves.level));
        } else {
            self.clear(shared, cache);
        }
        is_linked
    }

    #[cold]
    fn clear<F: Format, H: Host>(&self, shared: &Shared<F, H>, cache: &Cache) {
        let mut level = self.leaves.level;
        while level < self.top {
            let frame = cache.peek(usize::from(level.get() - self.leaves.level.get()));
            if self.seen & F::STALE != 0 {
                cache.clean(shared, frame);
            } else {
                let count = if level == self.leaves.level { self.leaves.count } else { 1 };
                let first = level.index(self.leaves.gfn);
                let entries = &cache.table(shared, frame).0[first..first + count];
                entries.iter().for_each(|entry| entry.store(0, Ordering::Relaxed));
            }
            level = level.up();
        }
    }
}

impl Leaves {
    /// Writes them into a table that nobody else sees.
    #[inline]
    pub(crate) fn write<F: Format>(&self, table: &Table) {
        let step = self.level.pages() << F::FRAME_SHIFT;
        let first = self.level.index(self.gfn);
        let mut leaf = self.first;
        // Pieces of so many entries are written without a loop.
        const PIECE: usize = 8;
        let entries = &table.0[first..first + self.count];
        let pieces = entries.chunks_exact(PIECE);
        let rest = pieces.remainder();
        for piece in pieces {
            for (entry, number) in piece.iter().zip(0..) {
                entry.store(leaf + number * step, Ordering::Relaxed);
            }
            leaf += PIECE as u64 * step;
        }
        for entry in rest {
            entry.store(leaf, Ordering::Relaxed);
            leaf += step;
        }
    }
}

/// Fills a table that nobody else sees with empty entries whose translations a processor may have.
#[cold]
fn fill_stale(table: &Table, stale: u64) {
    table.0.iter().for_each(|entry| entry.store(stale, Ordering::Relaxed));
}

/// Fills a table that nobody else sees with the pages that a large one is split into.
pub(crate) fn fill_split<F: Format>(table: &Table, large: u64, level: Level) {
    Leaves { first: F::split(large, level), level: level.down(), gfn: 0, count: ENTRIES }.write::<F>(table);
}

/// Replaces an entry, if it is what it was.
#[inline]
pub(crate) fn exchange(entry: &AtomicU64, seen: u64, new: u64) -> bool {
    entry.compare_exchange(seen, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
}
