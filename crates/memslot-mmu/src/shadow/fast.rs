//! The fast path: a write that needs nothing but W, without a lock.
//!
//! A leaf that is host-writable and MMU-writable but not W was made so for the dirty log. Whoever takes any of these two away does it in the
//! entry itself, so a compare-exchange that adds W to the entry *as it was read* cannot grant what was taken away.
//!
//! KVM does this for direct pages only: behind an entry that was made of a guest's entry, the gfn may be another one by the time of the
//! exchange, although the entry has the same bits (dropped, and made again for a gfn with the same frame behind it: ABA). Granting
//! W is right all the same, since the new entry is also one that lacks only W; but the *wrong page would be marked* in the dirty
//! log. So the page counts entries that were filed ([`version`](super::page::ShadowPage)), before it writes the guest's entry and the entry
//! itself. Here the order is
//!
//! ```text
//!   version ─► entry ─► guest's entry (the gfn) ─► exchange ─► mark the gfn ─► version again, slots again
//! ```
//!
//! If the version is the same, then no entry was filed from before the entry was read until after it was exchanged: it
//! is the same entry, and the guest's entry was its own. If it is not, the slow path, which has the lock, finds out what the entry
//! maps now and marks that, too; one page too many was marked then, which costs nothing. Likewise for a slot whose logging began
//! meanwhile: either it is seen here, or whoever began it has seen W and taken it away. And for memory that moves: it is marked at its new place as well.
//!
//! The tables are not freed meanwhile, as the processor has announced itself; shadow pages are found by their tables in
//! chains that may be walked beside changes.

use memslot::Gfn;

use super::guest::{GuestAccess, Rights};
use super::page::ShadowPage;
use super::shared::Shared;
use super::vcpu::{Loaded, ShadowFault};
use super::{ShadowHost, spte};
use crate::host::Pfn;
use crate::invalidate::range;
use crate::level::{Level, PAGE_SHIFT};
use crate::nested::epoch::Cell;
use crate::sync::{AtomicU64, Ordering};

/// Announces a processor until it is dropped.
pub(super) struct Pinned<'a>(pub(super) &'a Cell);

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Where the way down from a root ends.
pub(super) struct Bottom<'s> {
    pub(super) table: Pfn,
    pub(super) level: Level,
    pub(super) entry: &'s AtomicU64,
    pub(super) index: usize,
}

/// The last entry on the way down to an address: the caller is pinned, or has the lock.
#[inline]
pub(super) fn descend<'s, H: ShadowHost>(
    shared: &'s Shared<H>,
    loaded: &Loaded,
    va: u64,
) -> Option<Bottom<'s>> {
    let root = loaded.root(va)?;
    let (mut table, mut level) = (root.table, root.level());
    loop {
        let index = level.index(va >> PAGE_SHIFT);
        // SAFETY: linked tables are not freed before those inside have left, nor without the lock.
        let entry = unsafe { &shared.host.reach(table).as_ref().0[index] };
        let seen = entry.load(Ordering::SeqCst);
        if !spte::is_table(seen, level) {
            return Some(Bottom { table, level, entry, index });
        }
        (table, level) = (spte::pfn(seen), level.down());
    }
}

/// Resolves a write's fault for which the entry lacks only W; `None` where there is more to be done.
pub(super) fn fast_fault<H: ShadowHost>(
    shared: &Shared<H>,
    cell: &Cell,
    loaded: &Loaded,
    va: u64,
    access: GuestAccess,
) -> Option<ShadowFault> {
    if !access.contains(GuestAccess::WRITE) || loaded.is_stale(shared) {
        return None;
    }
    shared.epoch.enter(cell, false);
    let _pinned = Pinned(cell);
    let Bottom { table, level, entry, index } = descend(shared, loaded, va)?;
    if !spte::is_present(entry.load(Ordering::SeqCst)) {
        return None;
    }
    // SAFETY: pinned.
    let page = unsafe { shared.directory.page(table) }?;
    let version = page.version.load(Ordering::SeqCst);
    let serial = shared.serial.load(Ordering::SeqCst);
    let seen = entry.load(Ordering::SeqCst);
    if !spte::is_leaf(seen, level) || !is_permitted(loaded, seen | spte::WRITE, access) {
        return None;
    }
    // Where the entry allows the access already, the processor had an old translation, which a fault makes it forget: the slow path looks
    // whether the guest has changed its tables since. Large pages in logged slots are split there, too.
    if seen & (spte::MMU_WRITABLE | spte::WRITE) != spte::MMU_WRITABLE || level > Level::K4 {
        return None;
    }
    let gfn = page.leaf_gfn(index, page.gptes[index].load(Ordering::SeqCst))?;
    let new = seen | spte::WRITE | spte::ACCESSED | spte::DIRTY;
    entry.compare_exchange(seen, new, Ordering::SeqCst, Ordering::SeqCst).ok()?;
    shared.mark(loaded.space, range(gfn.get(), gfn.get() + 1));
    let is_same =
        page.version.load(Ordering::SeqCst) == version && shared.serial.load(Ordering::SeqCst) == serial;
    if !is_same {
        shared.with(|locked| locked.mark_entry(page, index));
    }
    Some(ShadowFault::Mapped(level))
}

/// Whether the processor, with this entry, allows the access.
fn is_permitted(loaded: &Loaded, entry: u64, access: GuestAccess) -> bool {
    let mut rights = Rights::empty();
    rights.set(Rights::WRITE, entry & spte::WRITE != 0);
    rights.set(Rights::USER, entry & spte::USER != 0);
    rights.set(Rights::EXECUTE, entry & spte::NO_EXECUTE == 0);
    loaded.paging.permits(rights, access)
}

impl<H: ShadowHost> super::shared::Locked<'_, H> {
    /// Marks what an entry maps now, if it is writable.
    #[cold]
    fn mark_entry(&self, page: &ShadowPage, index: usize) {
        // SAFETY: the table is freed with its page, and the caller is pinned.
        let entry = unsafe { &self.shared.host.reach(page.table).as_ref().0[index] };
        if entry.load(Ordering::SeqCst) & spte::WRITE == 0 {
            return;
        }
        if let Some(crate::rmap::Under::Gfn { gfn, level }) = self.filed_for(page, index) {
            let gfn = Gfn::new(gfn.get());
            self.shared.mark(page.key.role.address_space, range(gfn.get(), gfn.get() + level.pages()));
        }
    }
}
