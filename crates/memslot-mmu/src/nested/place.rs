//! The walk from the root to the entry that maps a frame, or that is in the way.

use super::Pin;
use super::install::exchange;
use crate::format::Format;
use crate::host::Host;
use crate::level::{Level, Table};
use crate::sync::{AtomicU64, Ordering};

/// The entry that a walk ended at.
pub(crate) struct Place<'t> {
    pub(crate) entry: &'t AtomicU64,
    pub(crate) seen: u64,
    pub(crate) level: Level,
}

impl Place<'_> {
    #[inline]
    pub(crate) fn replace(&self, new: u64) -> bool {
        exchange(self.entry, self.seen, new)
    }
}

impl<F: Format, H: Host> Pin<'_, F, H> {
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
                return Place { entry, seen, level };
            }
            table = self.below(seen, level);
            level = level.down();
        }
    }

    /// The table that has the 4 KiB pages of `gfn`, if there is one: by the walk from the root.
    #[inline]
    pub(crate) fn leaf_table(&self, gfn: u64) -> Option<&Table> {
        let place = self.place_down_to(gfn, Level::M2);
        F::is_table(place.seen, place.level).then(|| self.below(place.seen, place.level))
    }
}
