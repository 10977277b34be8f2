//! Changing single entries of shadow tables, with what belongs to each: its record in the reverse map, the guest's entry that it was
//! made of, and who must hear of it.
//!
//! **An entry is present exactly if it has a record, and is removed from where the record says.** Nothing here computes a gfn to
//! remove an entry: the guest may have changed its tables meanwhile, and the shadow page is not asked what its entries
//! *should* be about (CVE-2026-46113, CVE-2026-53359). Entries are changed with the lock held and atomically all the same, as the
//! fast path, aging and the dirty log change single bits of them without it.

use memslot::{AddressSpaceId, Gfn, Slot};

use super::page::ShadowPage;
use super::reserve::Reserve;
use super::shared::{Locked, everything};
use super::spte::{self, SpteRef};
use super::stats::Counter;
use super::{ShadowHost, mmio};
use crate::invalidate::range;
use crate::level::Level;
use crate::rmap::{LEVELS, List, RmapError, Under};
use crate::sync::Ordering;

/// The most entries that map a page of guest memory, or lead to a shadow page. KVM has the same figure, and lets go of all of them.
pub const LONGEST_LIST: usize = 1000;

impl<'g, H: ShadowHost> Locked<'g, H> {
    pub(super) fn load(&self, page: &'g ShadowPage, index: usize) -> u64 {
        self.table(page).0[index].load(Ordering::SeqCst)
    }

    /// The page that an entry leads to.
    pub(super) fn child(&self, page: &'g ShadowPage, index: usize) -> Option<&'g ShadowPage> {
        let entry = self.load(page, index);
        if spte::is_table(entry, page.level()) { self.page(spte::pfn(entry)) } else { None }
    }

    /// Makes an entry not present, and removes it from the reverse map. Returns whether it was present. What processors may still have
    /// of it is pending.
    pub(super) fn drop_entry(&mut self, page: &'g ShadowPage, index: usize) -> bool {
        self.worked(1);
        let old = self.table(page).0[index].swap(0, Ordering::SeqCst);
        if !spte::is_present(old) {
            if mmio::is_mmio(old) {
                page.gptes[index].store(0, Ordering::SeqCst);
                self.shared.counters.mmio.fetch_sub(1, Ordering::Relaxed);
            }
            return false;
        }
        page.gptes[index].store(0, Ordering::SeqCst);
        match self.unfile(page, index) {
            Some(Under::Gfn { gfn, level }) => {
                self.shared.counters.leaves.fetch_sub(1, Ordering::Relaxed);
                self.owe(range(gfn.get(), gfn.get() + level.pages()));
            }
            _ => {
                page.set_unsync_below(index, false);
                self.owe(everything());
            }
        }
        true
    }

    /// What an entry is filed for.
    pub(super) fn filed_for(&self, page: &ShadowPage, index: usize) -> Option<Under> {
        let filed = crate::rmap::Filed::from_bits(page.filed[index].load(Ordering::Relaxed))?;
        self.state.writer.filed_under(&filed)
    }

    /// Makes an entry that is not present lead to a page, which is in sync or known to be unsync.
    pub(super) fn link(
        &mut self,
        reserve: &mut Reserve,
        page: &'g ShadowPage,
        index: usize,
        gpte: u64,
        child: &'g ShadowPage,
    ) -> Result<(), RmapError> {
        let entry = page.reference(index);
        self.file(child.parents.list(), entry, &mut reserve.descriptors)?;
        page.version.fetch_add(1, Ordering::SeqCst);
        page.gptes[index].store(gpte, Ordering::SeqCst);
        self.table(page).0[index].store(spte::table(child.table), Ordering::SeqCst);
        if child.needs_sync() {
            self.note_unsync_below(page, index);
        }
        self.recycle(child.parents.list(), (page, index));
        Ok(())
    }

    /// Makes an entry map a page of memory. One that maps the same frames already stays filed and gets the access that `new`
    /// has; any other is dropped first. Returns whether anything has changed.
    ///
    /// `slot` and `gfn`: where it is filed; its list was reserved.
    pub(super) fn map(
        &mut self,
        reserve: &mut Reserve,
        page: &'g ShadowPage,
        index: usize,
        gpte: u64,
        (slot, gfn): (&Slot, Gfn),
        new: u64,
    ) -> Result<bool, RmapError> {
        let entry = &self.table(page).0[index];
        let old = entry.load(Ordering::SeqCst);
        let level = page.level();
        let under = Under::Gfn { gfn, level };
        if spte::is_leaf(old, level)
            && spte::pfn(old) == spte::pfn(new)
            && self.filed_for(page, index) == Some(under)
        {
            page.gptes[index].store(gpte, Ordering::SeqCst);
            return Ok(self.replace_leaf(page, index, new));
        }
        self.drop_entry(page, index);
        let slots = self.state.slots.clone();
        let list = slots.rmap_at(slot.address_space(), gfn).and_then(|rmap| rmap.list(level, gfn));
        let list = list.ok_or(RmapError::NotReserved)?;
        self.note_slot(reserve, page, slot, gfn)?;
        self.file(list, page.reference(index), &mut reserve.descriptors)?;
        page.version.fetch_add(1, Ordering::SeqCst);
        page.gptes[index].store(gpte, Ordering::SeqCst);
        entry.store(new, Ordering::SeqCst);
        self.shared.counters.leaves.fetch_add(1, Ordering::Relaxed);
        self.recycle(list, (page, index));
        Ok(true)
    }

    /// A list that has become longer than it may be loses its oldest entries, but never the newest, which is this one: so whatever looks at a whole
    /// list looks at few entries. They are faulted in again when they are used.
    fn recycle(&mut self, list: List<'_, SpteRef>, (page, index): (&ShadowPage, usize)) {
        if self.state.writer.count(list) <= LONGEST_LIST {
            return;
        }
        let under = self.filed_for(page, index);
        let shared = self.shared;
        let gone = self.state.writer.recycle(list, LONGEST_LIST, page.reference(index), |old| {
            // SAFETY: the lock is held, so no page is freed, nor its table.
            let found = unsafe {
                shared.directory.page(old.table()).map(|page| (page, shared.host.reach(page.table).as_ref()))
            };
            if let Some((page, table)) = found {
                let index = old.index();
                table.0[index].store(0, Ordering::SeqCst);
                page.gptes[index].store(0, Ordering::SeqCst);
                page.filed[index].store(0, Ordering::Relaxed);
                page.set_unsync_below(index, false);
            }
        });
        self.worked(gone);
        shared.counters.add(Counter::Recycled, gone as u64);
        if let Some(Under::Gfn { gfn, level }) = under {
            shared.counters.leaves.fetch_sub(gone as u64, Ordering::Relaxed);
            self.owe(range(gfn.get(), gfn.get() + level.pages()));
        } else {
            self.owe(everything());
        }
    }

    /// Gives a leaf other access to the same page, keeping its accessed and dirty bits; and W, if the page may still become writable. Who
    /// takes W from a page that may (the dirty log) decides by W whether processors must hear of it, and so must be the only
    /// one.
    pub(super) fn replace_leaf(&mut self, page: &'g ShadowPage, index: usize, new: u64) -> bool {
        const KEPT: u64 = spte::ACCESSED | spte::DIRTY;
        let entry = &self.table(page).0[index];
        let mut old = entry.load(Ordering::SeqCst);
        loop {
            let kept = if new & spte::MMU_WRITABLE == 0 { KEPT } else { KEPT | spte::WRITE };
            let wanted = new | old & kept;
            if wanted == old || !spte::is_present(old) {
                return false;
            }
            match entry.compare_exchange(old, wanted, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => break,
                Err(now) => old = now,
            }
        }
        let lost = old & !new & (spte::MMU_WRITABLE | spte::USER) | !old & new & spte::NO_EXECUTE;
        if lost != 0 {
            if let Some(Under::Gfn { gfn, level }) = self.filed_for(page, index) {
                self.owe(range(gfn.get(), gfn.get() + level.pages()));
            }
        }
        true
    }

    /// Takes bits from a leaf that is present. Returns those that were set.
    pub(super) fn take_bits(&self, entry: SpteRef, bits: u64) -> u64 {
        self.worked(1);
        match self.page(entry.table()) {
            Some(page) => self.table(page).0[entry.index()].fetch_and(!bits, Ordering::SeqCst) & bits,
            None => 0,
        }
    }

    /// Write-protects a frame for shadow paging: in all address spaces, at all levels. Whether somebody must be flushed is decided by what was
    /// MMU-writable, or is pending; it is noted as pending. Returns whether that is so.
    pub(super) fn write_protect(&mut self, gfn: Gfn) -> bool {
        let slots = self.state.slots.clone();
        let mut changed = 0;
        for space in slots.spaces() {
            let Some(rmap) = slots.rmap_at(space, gfn) else { continue };
            for level in LEVELS {
                let Some(list) = rmap.list(level, gfn) else { continue };
                for entry in self.state.writer.entries(list) {
                    changed |= self.take_bits(entry, spte::WRITE | spte::MMU_WRITABLE);
                }
            }
        }
        let one = range(gfn.get(), gfn.get().saturating_add(1));
        if changed & spte::MMU_WRITABLE != 0 {
            self.owe(one);
        }
        self.state.pending.is_some_and(|pending| pending.overlaps(&one))
    }

    /// Whether an entry may make a frame writable for the guest: of 4 KiB pages, and of larger ones.
    pub(super) fn writable(&self, gfn: Gfn) -> (bool, bool) {
        let slots = &self.state.slots;
        let is_writable = |level: Level| {
            slots.spaces().any(|space| {
                let list = slots.rmap_at(space, gfn).and_then(|rmap| rmap.list(level, gfn));
                list.is_some_and(|list| {
                    self.state.writer.entries(list).any(|entry| {
                        self.page(entry.table())
                            .is_some_and(|page| self.load(page, entry.index()) & spte::MMU_WRITABLE != 0)
                    })
                })
            })
        };
        (is_writable(Level::K4), is_writable(Level::M2) || is_writable(Level::G1))
    }

    /// Write access to these frames of a slot was granted: they are dirty from now on.
    pub(super) fn granted(&self, slot: &Slot, gfn: Gfn, level: Level) {
        if self.shared.is_logged(slot) {
            self.shared.mark(slot.address_space(), range(gfn.get(), gfn.get() + level.pages()));
        }
    }

    /// Reads a table of the guest's: `None` where there is no memory.
    pub(super) fn read_guest<R>(
        &self,
        space: AddressSpaceId,
        gfn: Gfn,
        work: impl FnOnce(&crate::level::Table) -> R,
    ) -> Option<R> {
        let slot = self.slot_at(space, gfn)?;
        self.shared.host.with_page(&slot, gfn, work)
    }

    pub(super) fn count(&self, counter: Counter) {
        self.shared.counters.add(counter, 1);
    }
}
