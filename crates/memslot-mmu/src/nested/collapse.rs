//! Collapsing: small pages become a large one again when nobody needs them small.
//!
//! A table whose pages are all there, contiguous, aligned and alike is replaced by one large page. One that has
//! holes, but whose pages are right for a large one, is zapped, so that the next fault can make one. The host is not
//! asked: this runs with the lock held, and the host may be waiting for an invalidation.

use memslot::{Gfn, GfnRange, SlotFlags, View};

use super::Shared;
use super::cursor::{At, Next, Visit};
use super::graves::{Chain, Graves};
use super::shared::hull;
use super::zap::bury;
use crate::format::Format;
use crate::host::Host;
use crate::invalidate::range;
use crate::level::{Level, Table};
use crate::sync::Ordering;

/// See the [module documentation](self).
pub(crate) struct Collapse<'a, F: Format, H: Host> {
    pub(crate) shared: &'a Shared<F, H>,
    pub(crate) graves: &'a mut Graves,
    pub(crate) tables: &'a mut Chain,
    /// The current version of the slots; no other is published meanwhile.
    pub(crate) view: &'a View,
    pub(crate) nonce: u64,
    pub(crate) changed: Option<GfnRange>,
}

/// What a table could become.
enum Becomes {
    Page(u64),
    Nothing,
    Itself,
}

impl<F: Format, H: Host> Collapse<'_, F, H> {
    /// Whether the slot allows one page for what the entry covers.
    fn is_allowed(&self, at: &At<'_>) -> bool {
        at.level <= self.shared.config.largest.min(F::LARGEST)
            && self.view.slot_at(self.shared.space(), Gfn::new(at.base)).is_some_and(|slot| {
                let is_logged = slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES);
                !is_logged && slot.gfns().contains_range(&range(at.base, at.end()))
            })
    }

    fn look(&self, at: &At<'_>, table: &Table) -> Becomes {
        let below = at.level.down();
        let step = below.pages() << F::FRAME_SHIFT;
        let processors = F::ACCESSED | F::DIRTY;
        let mut found: Option<u64> = None;
        let mut used = 0;
        let (mut writable, mut holes) = (F::WRITE, false);
        let mut offset = 0;
        for entry in &table.0 {
            let entry = entry.load(Ordering::SeqCst);
            if !F::is_present(entry) {
                holes = true;
            } else if F::is_leaf(entry, below) {
                used |= entry & processors;
                writable &= entry | (if entry & F::MAY_WRITE != 0 { F::WRITE } else { 0 });
                // What the first page of the table would have to be.
                let first = (entry & !(processors | F::WRITE)).wrapping_sub(offset);
                if found.is_some_and(|found| found != first) {
                    return Becomes::Itself;
                }
                found = Some(first);
            } else {
                return Becomes::Itself;
            }
            offset += step;
        }
        let Some(first) = found else { return Becomes::Itself };
        if !at.level.is_aligned(F::pfn(first, below).get()) {
            return Becomes::Itself;
        }
        if holes { Becomes::Nothing } else { Becomes::Page(F::collapse(first | writable, below) | used) }
    }

    /// Whether the entry was replaced.
    fn collapse(&mut self, at: &At<'_>, table: &Table) -> bool {
        if !self.is_allowed(at) {
            return false;
        }
        let new = match self.look(at, table) {
            Becomes::Page(entry) => entry,
            Becomes::Nothing => F::empty(self.nonce),
            Becomes::Itself => return false,
        };
        let is_replaced = at.replace(new);
        if is_replaced {
            bury::<F>(self.graves, self.tables, at);
            self.changed = Some(hull(self.changed, range(at.base, at.end())));
        }
        is_replaced
    }
}

impl<F: Format, H: Host> Visit for Collapse<'_, F, H> {
    fn leaf(&mut self, _: &At<'_>) -> Next {
        Next::Done
    }

    fn table(&mut self, at: &At<'_>, table: &Table) -> Next {
        if at.level > Level::M2 {
            return Next::Below;
        }
        self.collapse(at, table);
        Next::Done
    }

    fn behind(&mut self, at: &At<'_>, table: &Table) {
        self.collapse(at, table);
    }
}
