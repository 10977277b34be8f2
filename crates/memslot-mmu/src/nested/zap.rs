//! Zapping: a range maps nothing afterwards, and what was on its way into it does not arrive.
//!
//! Tables that lie in the range as a whole are taken out with one exchange, whatever is in them; so the time it takes
//! depends on what is mapped along the edges, and not on the size of the range. Tables along the edges that are empty
//! afterwards are taken out, too.

use memslot::{GfnRange, View};

use super::Shared;
use super::cursor::{At, Next, Visit};
use super::graves::{Chain, Grave, Graves};
use super::shared::{Locked, State, hull};
use crate::format::Format;
use crate::host::Host;
use crate::invalidate::{ends, range};
use crate::level::{Level, Table};
use crate::sync::Ordering;
use core::ops::DerefMut;

/// See the [module documentation](self).
pub(crate) struct Zap<'a, F: Format, H: Host> {
    pub(crate) shared: &'a Shared<F, H>,
    /// The current version of the slots.
    pub(crate) view: &'a View,
    pub(crate) graves: &'a mut Graves,
    pub(crate) tables: &'a mut Chain,
    pub(crate) nonce: u64,
    /// For memory of a logged slot that is at other frames now, or nowhere: the frames it was at, and how much further it
    /// is (0 if nowhere). What has been written is marked there.
    pub(crate) moved: Option<(GfnRange, u64)>,
    /// What has changed.
    pub(crate) changed: Option<GfnRange>,
}

impl<F: Format, H: Host> Zap<'_, F, H> {
    /// Empties an entry that the processor may use.
    fn empty_out(&mut self, at: &At<'_>) -> bool {
        let is_emptied = at.replace(F::empty(self.nonce));
        if is_emptied {
            self.changed = Some(hull(self.changed, range(at.base, at.end())));
        }
        is_emptied
    }

    fn take_out(&mut self, at: &At<'_>) -> bool {
        let is_out = self.empty_out(at);
        if is_out {
            bury::<F>(self.graves, self.tables, at);
        }
        is_out
    }
}

/// Notes the table that an entry led to.
pub(crate) fn bury<F: Format>(graves: &mut Graves, tables: &mut Chain, at: &At<'_>) {
    let table = F::pfn(at.seen, at.level);
    graves.push(tables, Grave { table, level: at.level.down(), base: at.base, stamp: 0 });
}

impl<F: Format, H: Host> Visit for Zap<'_, F, H> {
    const EMPTIES: bool = true;

    fn empty(&mut self, at: &At<'_>) -> Next {
        let mut new = at.emptied::<F>(self.nonce);
        if at.seen & F::STALE != 0 {
            // Of what a fault has emptied, processors may use all; this operation flushes its own range.
            if !at.whole {
                new |= F::STALE;
            }
            self.changed = Some(hull(self.changed, range(at.base, at.end())));
        }
        if at.replace(new) { Next::Done } else { Next::Again }
    }

    fn leaf(&mut self, at: &At<'_>) -> Next {
        if !self.empty_out(at) {
            return Next::Again;
        }
        let uses_dirty_bits = self.shared.uses_dirty_bits();
        let gfns = range(at.base, at.end());
        if let Some((from, further)) = self.moved {
            let may_be_dirty = at.seen & if uses_dirty_bits { F::DIRTY } else { F::WRITE } != 0;
            if let Some((start, end)) = gfns.intersect(&from).filter(|_| may_be_dirty).map(ends) {
                self.shared.mark(range(start.wrapping_add(further), end.wrapping_add(further)));
            }
        } else if uses_dirty_bits && at.seen & F::DIRTY != 0 {
            self.shared.mark_logged(self.view, gfns);
        }
        Next::Done
    }

    fn table(&mut self, at: &At<'_>, _: &Table) -> Next {
        if !at.whole || self.moved.is_some() {
            return Next::Below;
        }
        if self.take_out(at) { Next::Done } else { Next::Again }
    }

    fn behind(&mut self, at: &At<'_>, table: &Table) {
        let is_empty = table.0.iter().all(|entry| !F::is_present(entry.load(Ordering::SeqCst)));
        if is_empty {
            self.take_out(at);
        }
    }
}

/// Zaps a large page that reaches across its own first frame in the range: the range is the first frame behind a
/// border that no page may cross. Faults that are about to make such a page are turned away.
pub(crate) struct Cut<'a, F: Format, H: Host> {
    pub(crate) zap: Zap<'a, F, H>,
    pub(crate) border: u64,
}

impl<F: Format, H: Host> Visit for Cut<'_, F, H> {
    const EMPTIES: bool = true;

    fn empty(&mut self, at: &At<'_>) -> Next {
        if at.base == self.border { Next::Done } else { self.zap.empty(at) }
    }

    fn leaf(&mut self, at: &At<'_>) -> Next {
        if at.base == self.border { Next::Done } else { self.zap.leaf(at) }
    }
}

impl<F: Format, H: Host, G: DerefMut<Target = State>> Locked<'_, F, H, G> {
    /// Marks what the processor's dirty bits say of tables that were taken out and flushed.
    pub(crate) fn collect_dirty(&mut self, tables: &Chain) {
        let (pin, state) = self.pin();
        state.graves.for_each(tables, |grave| {
            // SAFETY: taken out, and freed under the lock only, which is held.
            let table = unsafe { pin.shared.host.reach(grave.table).as_ref() };
            collect(pin.shared, &pin.published().view, table, grave.level, grave.base);
        });
    }
}

fn collect<F: Format, H: Host>(shared: &Shared<F, H>, view: &View, table: &Table, level: Level, base: u64) {
    for (entry, base) in table.0.iter().zip((0..).map(|i| base + i * level.pages())) {
        let entry = entry.load(Ordering::SeqCst);
        if F::is_table(entry, level) {
            // SAFETY: as above: what is below a table that was taken out is freed after it.
            let below = unsafe { shared.host.reach(F::pfn(entry, level)).as_ref() };
            collect(shared, view, below, level.down(), base);
        } else if F::is_present(entry) && entry & F::DIRTY != 0 {
            shared.mark_logged(view, range(base, base + level.pages()));
        }
    }
}
