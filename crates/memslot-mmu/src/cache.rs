//! Tables that a walker has at hand, so that nothing fails once it is inside.
//!
//! A fault that finds too few here leaves, tops up, and starts again. Topping up is the only step that may run out of
//! memory, and it happens outside of every lock and before anything is changed.

use crate::format::Format;
use crate::host::{Host, Pfn};
use crate::level::Table;
use crate::nested::{Shared, TableError};
use crate::sync::Ordering;

/// At most one table for each level below the highest root.
const CAPACITY: usize = 8;

/// Some tables, all of whose entries are 0.
pub(crate) struct Cache {
    tables: [Pfn; CAPACITY],
    len: usize,
}

impl Cache {
    pub(crate) const fn new() -> Self {
        Self { tables: [Pfn::new(0); CAPACITY], len: 0 }
    }

    #[inline]
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// The table at this place, counted from the last one; below [`len`](Self::len).
    #[inline]
    pub(crate) fn peek(&self, place: usize) -> Pfn {
        self.tables[self.len - 1 - place]
    }

    /// The last so many tables are in use now.
    #[inline]
    pub(crate) fn take(&mut self, count: usize) {
        self.len -= count;
    }

    /// Makes sure that there are `needed` tables; has some more if that is easy.
    pub(crate) fn top_up<F: Format, H: Host>(
        &mut self,
        shared: &Shared<F, H>,
        needed: usize,
    ) -> Result<(), TableError> {
        self.fill(shared, needed, CAPACITY)
    }

    /// Makes sure that there are `needed` tables, and has up to `welcome` if that is easy.
    pub(crate) fn fill<F: Format, H: Host>(
        &mut self,
        shared: &Shared<F, H>,
        needed: usize,
        welcome: usize,
    ) -> Result<(), TableError> {
        debug_assert!(needed <= CAPACITY);
        let welcome = welcome.clamp(needed, CAPACITY);
        while self.len < welcome {
            match shared.allocate_tables(&mut self.tables[self.len..welcome]) {
                Ok(tables) => self.len += tables,
                Err(_) if self.len >= needed => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Gives all tables back.
    pub(crate) fn drain<F: Format, H: Host>(&mut self, shared: &Shared<F, H>) {
        while self.len > 0 {
            self.len -= 1;
            // SAFETY: the table was allocated for this cache and never linked since.
            unsafe { shared.free_table(self.tables[self.len]) };
        }
    }

    /// Makes all entries of a table of the cache 0 again.
    #[cold]
    pub(crate) fn clean<F: Format, H: Host>(&self, shared: &Shared<F, H>, table: Pfn) {
        let entries = &self.table(shared, table).0;
        entries.iter().for_each(|entry| entry.store(0, Ordering::Relaxed));
    }

    /// A table of the cache, which nobody else sees.
    #[inline]
    pub(crate) fn table<'s, F: Format, H: Host>(&self, shared: &'s Shared<F, H>, table: Pfn) -> &'s Table {
        debug_assert!(self.tables[..self.len].contains(&table));
        // SAFETY: allocated, and freed or linked through this cache only, which whoever has it does not do meanwhile.
        unsafe { shared.host.reach(table).as_ref() }
    }
}
