//! What a change of the tables owes: one flush, and the tables that it took out.

use memslot::GfnRange;

use crate::format::Format;
use crate::host::{Context, Host};
use crate::nested::graves::Chain;
use crate::nested::shared::hull;
use crate::nested::{DirtyMode, Mmu, Shared};
use crate::sync::Ordering;

/// An obligation: one flush, and the tables that were taken out.
///
/// It is [discharged](Self::discharge) once, with one flush for the union of what it and all that were
/// [merged](Self::merge) into it have changed. Until then the tables exist, and other operations on the same frames
/// owe a flush as well.
///
/// One that is dropped is not forgotten: its tables are kept, and the next flush that is discharged covers it. As
/// this leaves processors with old translations for an unknown time, it panics where debug assertions are on (with
/// `std`).
#[must_use = "processors use old translations until this is discharged"]
pub struct Flush<'m, F: Format, H: Host> {
    mmu: &'m Mmu<F, H>,
    pub(crate) owed: Owed,
}

/// What is owed.
pub(crate) struct Owed {
    /// Everything that has changed, and maybe more.
    pub(crate) gfns: Option<GfnRange>,
    /// For how many obligations it stands.
    pub(crate) count: usize,
    /// The tables that were taken out.
    pub(crate) tables: Chain,
}

impl Owed {
    pub(crate) const NOTHING: Self = Self { gfns: None, count: 0, tables: Chain::EMPTY };

    /// Takes over what `other` stands for, of the same tables; it is nothing any more.
    pub(crate) fn add<F: Format, H: Host>(&mut self, shared: &Shared<F, H>, other: &Self) {
        let &Self { gfns, count, tables } = other;
        self.gfns = gfns.map(|gfns| hull(self.gfns, gfns)).or(self.gfns);
        self.count += count;
        if !tables.is_empty() {
            shared.lock().graves.append(&mut self.tables, tables);
        }
    }
}

/// How many tables a discharge frees at most, of those that wait.
const RECLAIM: usize = 512;

impl<F: Format, H: Host> Mmu<F, H> {
    /// An obligation that is none, to merge others into.
    pub fn nothing_owed(&self) -> Flush<'_, F, H> {
        Flush { mmu: self, owed: Owed::NOTHING }
    }
}

impl<'m, F: Format, H: Host> Flush<'m, F, H> {
    pub(crate) fn of(mmu: &'m Mmu<F, H>, owed: Owed) -> Self {
        Self { mmu, owed }
    }

    /// For whoever outlives the tables' borrow and makes a flush [of](Self::of) it again.
    pub(crate) fn into_owed(mut self) -> Owed {
        core::mem::replace(&mut self.owed, Owed::NOTHING)
    }

    /// The frames whose translations must go; `None` if nothing has changed.
    #[must_use]
    pub fn gfns(&self) -> Option<GfnRange> {
        self.owed.gfns
    }

    /// What the flush will be tagged with.
    #[must_use]
    pub fn context(&self) -> Context {
        self.mmu.shared.config.context
    }

    /// Other tables owe these frames: one flush will do for both. Something must be owed already.
    pub(crate) fn widen(&mut self, gfns: GfnRange) {
        debug_assert!(self.owed.count > 0 && self.owed.gfns.is_some());
        self.owed.gfns = Some(hull(self.owed.gfns, gfns));
    }

    /// Takes over what `other` owes, of the same tables.
    ///
    /// # Panics
    /// If it is of other tables.
    pub fn merge(&mut self, mut other: Self) {
        assert!(core::ptr::eq(&*self.mmu.shared, &*other.mmu.shared), "flushes of different tables");
        let owed = core::mem::replace(&mut other.owed, Owed::NOTHING);
        self.owed.add(&self.mmu.shared, &owed);
    }

    /// Flushes once what has changed, if anything has, and lets go of the tables that were taken out.
    pub fn discharge(mut self) {
        let shared = &*self.mmu.shared;
        let mut owed = core::mem::replace(&mut self.owed, Owed::NOTHING);
        if owed.count == 0 {
            return;
        }
        if shared.forgotten.load(Ordering::Relaxed) > 0 {
            let mut locked = shared.lock();
            let pending = &mut locked.pending;
            owed.count += core::mem::take(&mut pending.forgotten);
            owed.gfns = pending.hull.map(|gfns| hull(owed.gfns, gfns)).or(owed.gfns);
            if let Some(forgotten) = pending.forgotten_chain.take() {
                locked.graves.append(&mut owed.tables, forgotten);
            }
        }
        if let Some(gfns) = owed.gfns {
            shared.flush(gfns);
        }
        let mut locked = shared.lock();
        if shared.config.dirty == DirtyMode::Hardware {
            locked.collect_dirty(&owed.tables);
        }
        locked.let_wait(owed.tables);
        locked.discharged(owed.count);
        locked.drop_replaced();
        locked.reclaim(RECLAIM);
    }
}

impl<F: Format, H: Host> Drop for Flush<'_, F, H> {
    fn drop(&mut self) {
        let owed = core::mem::replace(&mut self.owed, Owed::NOTHING);
        if owed.count == 0 {
            return;
        }
        let shared = &*self.mmu.shared;
        {
            let mut locked = shared.lock();
            let mut chain = locked.pending.forgotten_chain.take().unwrap_or(Chain::EMPTY);
            locked.graves.append(&mut chain, owed.tables);
            locked.pending.forgotten_chain = Some(chain);
            locked.pending.forgotten += owed.count;
            // Under the lock. It must not become 0 again: that says that there is nothing to pay.
            let forgotten = shared.forgotten.load(Ordering::Relaxed);
            shared.forgotten.store(forgotten.saturating_add(1), Ordering::Relaxed);
        }
        #[cfg(all(feature = "std", debug_assertions))]
        assert!(std::thread::panicking(), "a flush was owed and not done");
    }
}
