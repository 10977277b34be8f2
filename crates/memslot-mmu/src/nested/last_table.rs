//! The leaf table that a thread was in last: most faults are near the last one.
//!
//! A thread may go to its table again without the walk from the root if no table was taken out since it found it:
//! [`Shared::taken_out`](super::Shared) counts those. The count is read *after* the thread has announced itself, so one
//! that has not changed says that the table was linked at that time, or was being taken out just then and is not counted yet.
//! In both cases the announcement comes before the stamp that the table gets, and it is not freed as long as
//! the thread is inside.
//!
//! In the second case what the thread installs is lost with the table, as in any table that is taken out under it
//! ([`nested`](super), 4). It comes back with the same fault soon and finds the page mapped: then it looks from the root. So it
//! waits for nobody, not even for whoever is between taking out and counting.

use super::Pin;
use super::install::exchange;
use crate::format::Format;
use crate::host::{Host, Pfn};
use crate::level::{Level, Table};
use crate::sync::{AtomicU64, Ordering};

/// See the [module documentation](self).
pub(crate) struct LastTable {
    /// Its first frame; one that no table begins at where there is none.
    base: u64,
    table: Pfn,
    taken_out: u64,
}

impl LastTable {
    pub(crate) const NONE: Self = Self { base: u64::MAX, table: Pfn::new(0), taken_out: 0 };

    /// Whether it is the table that has the 4 KiB pages of `gfn`.
    #[inline]
    pub(crate) fn has(&self, gfn: u64) -> bool {
        Level::M2.align_down(gfn) == self.base
    }

    pub(crate) fn forget(&mut self) {
        *self = Self::NONE;
    }
}

impl<F: Format, H: Host> Pin<'_, F, H> {
    /// The table again, for one of the frames that it [has](LastTable::has), if it is sure to exist.
    #[inline]
    pub(crate) fn table_again(&self, last: &LastTable) -> Option<&Table> {
        // Pairs with `taken_out` in `bury`, and with the fence that comes with a stamp.
        if self.shared.taken_out.load(Ordering::SeqCst) != last.taken_out {
            return None;
        }
        // SAFETY: linked when it was found, and not taken out before this pin: see the module documentation.
        Some(unsafe { self.shared.host.reach(last.table).as_ref() })
    }

    /// The table that has the 4 KiB pages of `gfn`, if there is one: by the walk from the root.
    #[inline]
    pub(crate) fn leaf_table(&self, gfn: u64) -> Option<&Table> {
        let place = self.place_down_to(gfn, Level::M2);
        F::is_table(place.seen, place.level).then(|| self.below(place.seen, place.level))
    }

    /// The entry that maps `gfn`, or that is in the way; by the last table if that has it.
    #[inline]
    pub(crate) fn place_near(&self, last: &mut LastTable, gfn: u64) -> Place<'_> {
        if last.has(gfn) {
            if let Some(table) = self.table_again(last) {
                let entry = table.entry(Level::K4, gfn);
                return Place {
                    entry,
                    seen: entry.load(Ordering::SeqCst),
                    level: Level::K4,
                    from_root: false,
                };
            }
        }
        self.place_and_remember(last, gfn)
    }

    #[inline(never)]
    fn place_and_remember(&self, last: &mut LastTable, gfn: u64) -> Place<'_> {
        // Before the walk: what is taken out behind this makes the number another one.
        let taken_out = self.shared.taken_out.load(Ordering::SeqCst);
        let above = self.place_down_to(gfn, Level::M2);
        if !F::is_table(above.seen, above.level) {
            return above;
        }
        let table = F::pfn(above.seen, above.level);
        *last = LastTable { base: Level::M2.align_down(gfn), table, taken_out };
        let entry = self.below(above.seen, above.level).entry(Level::K4, gfn);
        Place { entry, seen: entry.load(Ordering::SeqCst), level: Level::K4, from_root: true }
    }

    /// The entry that maps `gfn`, or that is in the way, or that of this level.
    #[inline]
    pub(crate) fn place_down_to(&self, gfn: u64, lowest: Level) -> Place<'_> {
        let mut table = self.root(gfn);
        let mut level = const {
            match Level::new(F::LEVELS) {
                Some(level) => level,
                None => panic!("tables have 1 to 5 levels"),
            }
        };
        loop {
            let entry = table.entry(level, gfn);
            let seen = entry.load(Ordering::SeqCst);
            if level == lowest || !F::is_table(seen, level) {
                return Place { entry, seen, level, from_root: true };
            }
            table = self.below(seen, level);
            level = level.down();
        }
    }
}

/// The entry that a walk ended at.
pub(crate) struct Place<'t> {
    pub(crate) entry: &'t AtomicU64,
    pub(crate) seen: u64,
    pub(crate) level: Level,
    /// Whether it was linked when this was found.
    pub(crate) from_root: bool,
}

impl Place<'_> {
    #[inline]
    pub(crate) fn replace(&self, new: u64) -> bool {
        exchange(self.entry, self.seen, new)
    }
}
