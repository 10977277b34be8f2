//! Zapping: a range maps nothing afterwards, and what was on its way into it does not arrive.
//!
//! Tables that lie in the range as a whole are taken out with one exchange, whatever is in them; so the time it takes
//! depends on what is mapped along the edges, and not on the size of the range. Tables along the edges that are empty
//! afterwards are taken out, too.

use memslot::{GfnRange, View};

use super::cursor::{At, Next, Visit};
use super::graves::{Chain, Grave, Graves};
use super::shared::{Locked, State, hull};
use super::{Pin, Shared};
use crate::format::Format;
use crate::host::Host;
use crate::invalidate::range;
use crate::level::Table;
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
    /// The frames that a logged slot has lost: what the processor's dirty bits say is marked, though nothing is logged there now.
    pub(crate) left: Option<GfnRange>,
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
    graves.push(tables, Grave { table, level: at.level.down(), base: at.base, stamp: None });
}

impl<F: Format, H: Host> Visit for Zap<'_, F, H> {
    const EMPTIES: bool = true;

    fn empty(&mut self, at: &At<'_>) -> Next {
        let mut new = at.emptied::<F>(self.nonce);
        if at.seen & F::STALE != 0 {
            // Of what a fault has emptied, processors may use all; this operation flushes its own range.
            if !at.whole {
                new |= at.seen & F::STALE_BITS;
            }
            self.changed = Some(hull(self.changed, range(at.base, at.end())));
        }
        if at.replace(new) { Next::Done } else { Next::Again }
    }

    fn leaf(&mut self, at: &At<'_>) -> Next {
        if !self.empty_out(at) {
            return Next::Again;
        }
        // By write protection, all that may be written is marked since it may be.
        if self.shared.uses_dirty_bits() && at.seen & F::DIRTY != 0 {
            let gfns = range(at.base, at.end());
            match self.left {
                Some(left) => gfns.intersect(&left).into_iter().for_each(|gfns| self.shared.mark_left(gfns)),
                None => self.shared.mark_logged(self.view, gfns),
            }
        }
        Next::Done
    }

    fn table(&mut self, at: &At<'_>, _: &Table) -> Next {
        if !at.whole || self.left.is_some() {
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
    /// Marks what the processor's dirty bits say of tables that were taken out.
    pub(crate) fn collect_dirty(&mut self, tables: &Chain) {
        let (pin, state) = self.pin();
        state.graves.for_each(tables, |grave| collect(&pin, grave, &mut |gfns| mark_now(&pin, gfns)));
    }

    /// The same for all tables that were taken out and whose flush is owed still, whoever owes it: what processors have
    /// written until now is in them, too.
    pub(crate) fn collect_owed(&mut self) {
        self.for_each_owed(mark_now);
    }

    /// Calls `work` with the frames of each page that is dirty in a table whose flush is owed.
    pub(crate) fn for_each_owed(&mut self, work: impl Fn(&Pin<'_, F, H>, GfnRange)) {
        let (pin, state) = self.pin();
        if state.pending.count > 0 {
            state.graves.owed().for_each(|grave| collect(&pin, grave, &mut |gfns| work(&pin, gfns)));
        }
    }
}

/// Marks what is logged in the current version.
fn mark_now<F: Format, H: Host>(pin: &Pin<'_, F, H>, gfns: GfnRange) {
    pin.shared.mark_logged(&pin.published().view, gfns);
}

/// Calls `found` with the frames of each dirty page of a tree of tables that was taken out.
fn collect<F: Format, H: Host>(pin: &Pin<'_, F, H>, root: &Grave, found: &mut impl FnMut(GfnRange)) {
    // SAFETY: taken out, and freed under the lock only, which is held.
    let table = unsafe { pin.shared.host.reach(root.table).as_ref() };
    for (entry, base) in table.0.iter().zip((0..).map(|i| root.base + i * root.level.pages())) {
        let entry = entry.load(Ordering::SeqCst);
        if F::is_table(entry, root.level) {
            let below = Grave { table: F::pfn(entry, root.level), level: root.level.down(), base, ..*root };
            collect(pin, &below, found);
        } else if F::is_present(entry) && entry & F::DIRTY != 0 {
            found(range(base, base + root.level.pages()));
        }
    }
}
