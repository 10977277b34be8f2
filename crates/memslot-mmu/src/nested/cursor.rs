//! One walk over a range of frames, for every range operation.
//!
//! A [`Visit`] says what is done with each entry; the cursor finds the entries, in ascending order of frames, tables
//! before what is in them. It stops after a number of entries and says where to go on: from the root again, as no
//! table that it has seen need exist by then.

use core::marker::PhantomData;

use super::Pin;
use crate::format::Format;
use crate::host::Host;
use crate::level::{Level, Table};
use crate::sync::{AtomicU64, Ordering};

/// An entry, as the cursor found it.
pub(crate) struct At<'t> {
    pub(crate) entry: &'t AtomicU64,
    pub(crate) seen: u64,
    pub(crate) level: Level,
    /// The first frame it covers.
    pub(crate) base: u64,
    /// Whether all its frames are in the range.
    pub(crate) whole: bool,
}

impl At<'_> {
    /// The first frame behind those it covers.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.level.pages()
    }

    /// What to put into an empty entry so that it changes, whatever it was. Without [`Format::STALE_BITS`].
    #[inline]
    pub(crate) fn emptied<F: Format>(&self, nonce: u64) -> u64 {
        let new = F::empty(nonce);
        // It was emptied as many operations ago as entries have nonces.
        if new == self.seen & !F::STALE_BITS { F::empty(nonce ^ HALF_OF_THE_NONCES) } else { new }
    }

    /// Replaces the entry, if it is what it was.
    #[inline]
    pub(crate) fn replace(&self, new: u64) -> bool {
        super::install::exchange(self.entry, self.seen, new)
    }
}

/// A bit of a nonce that every format has room for.
const HALF_OF_THE_NONCES: u64 = 1 << 49;

/// What the cursor does next.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Goes on behind the entry.
    Done,
    /// Looks at the entry again: it is another one now.
    Again,
    /// Goes into the table.
    Below,
    /// Stops here, and looks at the entry again when it goes on.
    Stop,
}

/// What is done with each kind of entry.
pub(crate) trait Visit {
    /// Whether empty entries are of interest.
    const EMPTIES: bool = false;

    fn empty(&mut self, at: &At<'_>) -> Next {
        let _ = at;
        Next::Done
    }

    fn leaf(&mut self, at: &At<'_>) -> Next;

    /// Before the entries of a table.
    fn table(&mut self, at: &At<'_>, table: &Table) -> Next {
        let _ = (at, table);
        Next::Below
    }

    /// Behind the entries of a table; `at` is as it was before them.
    fn behind(&mut self, at: &At<'_>, table: &Table) {
        let _ = (at, table);
    }
}

/// A walk over `start..end`.
pub(crate) struct Cursor<'p, F: Format, H: Host> {
    pin: &'p Pin<'p, F, H>,
    start: u64,
    end: u64,
    budget: usize,
    format: PhantomData<F>,
}

impl<'p, F: Format, H: Host> Cursor<'p, F, H> {
    /// Over frames below what the tables reach; others have no entries.
    pub(crate) fn new(pin: &'p Pin<'p, F, H>, start: u64, end: u64, budget: usize) -> Self {
        Self { pin, start, end: end.min(super::Shared::<F, H>::END), budget, format: PhantomData }
    }

    /// Visits the entries from `from` on. Returns where it stopped: the end, unless the budget was used up.
    pub(crate) fn run<V: Visit>(&mut self, from: u64, visit: &mut V) -> u64 {
        let top = const {
            match Level::new(F::LEVELS) {
                Some(level) => level,
                None => panic!("tables have 1 to 5 levels"),
            }
        };
        let reach = Level::end_of(F::LEVELS, 1);
        let mut gfn = from;
        while gfn < self.end {
            let end = (gfn / reach + 1) * reach;
            let root = self.pin.root(gfn);
            let stopped = self.table(root, top, gfn, end.min(self.end), visit);
            if stopped < end.min(self.end) {
                return stopped;
            }
            gfn = end;
        }
        self.end.max(from)
    }

    /// The entries of one table, from `from` to `end`, which lie in it.
    fn table<V: Visit>(&mut self, table: &Table, level: Level, from: u64, end: u64, visit: &mut V) -> u64 {
        let mut gfn = from;
        while gfn < end {
            if self.budget == 0 {
                return gfn;
            }
            let entry = table.entry(level, gfn);
            let base = level.align_down(gfn);
            let behind = base + level.pages();
            let stopped = self.entry(entry, level, base, gfn, behind.min(end), visit);
            if stopped < behind.min(end) {
                return stopped;
            }
            gfn = behind;
        }
        end
    }

    /// One entry, and what is below it from `from` to `end`.
    #[inline]
    fn entry<V: Visit>(
        &mut self,
        entry: &AtomicU64,
        level: Level,
        base: u64,
        from: u64,
        end: u64,
        visit: &mut V,
    ) -> u64 {
        let whole = self.start <= base && base + level.pages() <= self.end;
        loop {
            let seen = entry.load(Ordering::SeqCst);
            let at = At { entry, seen, level, base, whole };
            let next = if F::is_table(seen, level) {
                let below = self.pin.below(seen, level);
                match visit.table(&at, below) {
                    Next::Below => {
                        let stopped = self.table(below, level.down(), from, end, visit);
                        if stopped < end {
                            return stopped;
                        }
                        visit.behind(&at, below);
                        return end;
                    }
                    other => other,
                }
            } else if F::is_present(seen) {
                visit.leaf(&at)
            } else if V::EMPTIES {
                visit.empty(&at)
            } else {
                Next::Done
            };
            match next {
                Next::Again => {}
                Next::Stop => {
                    self.budget = 0;
                    return from;
                }
                Next::Done | Next::Below => {
                    // The way down does not count: every walk gets further, however small its budget.
                    self.budget -= 1;
                    return end;
                }
            }
        }
    }
}
