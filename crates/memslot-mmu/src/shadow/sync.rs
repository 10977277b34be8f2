//! Unsync tables: tables that the guest may write, and when that is looked at.
//!
//! A processor may remember translations until it is told to forget them, so a guest that changes its tables has to flush (load CR3,
//! INVLPG …) before it can rely on the change. Shadow tables make use of that: a table that the guest writes is not
//! write-protected again at once, but becomes *unsync*. The guest writes as much as it likes; when it flushes, we compare
//! each entry that is present with the guest's entry it was made of, and drop or restrict it where the two differ.
//!
//! Any number of tables can be unsync, of all levels up to [`ShadowConfig::unsync`](super::ShadowConfig::unsync). (KVM's are
//! of the lowest level only, since it emulates writes to the others; we have no emulator to fall back on.) What makes that right:
//!
//! * **An entry that is present has a snapshot** of the guest's entry, which is what it is compared with. One that is not present
//!   needs no comparison: the next access faults.
//! * **A page that shadows a table in sync has no MMU-writable entry for the table's frame anywhere.** A page becomes unsync
//!   before an entry becomes writable, and entries are made read-only and flushed before a page is compared for the last time.
//! * **Parents know**: each page says which of its entries have something unsync below, up to the roots. A page that becomes
//!   unsync tells its parents; a page that is linked while something below it is unsync tells its new parent. So what a root can
//!   reach is found without looking at what is in sync. The marks are cleared by those who look and find nothing.
//! * **Pages are compared before they are linked, with all below them**, since the guest may have flushed while they could not be reached.
//! * **Faults compare what they go through**, whether it is unsync or not.
//! * **A flush is numbered, and goes in steps**, between which others get the lock. Each page says of which flush it was compared last, or before which
//!   it became unsync; either way, what was written before that flush has been seen. So a flush ends, whatever becomes unsync meanwhile. A
//!   page that is linked meanwhile is compared then.
//!
//! # When to write-protect again
//!
//! Comparing costs a look at 512 entries, write-protecting costs a flush, and a fault for each table that is written again. A table stays
//! writable until it had not changed some times in a row; then it is write-protected, compared, and in sync. (Once is not enough: a kernel
//! that patches its code through a page table of its own, as Linux does, loads CR3 twice for each time it writes there.)

use super::ShadowHost;
use super::ahead::Hints;
use super::fault::GROUP;
use super::guest::{Entry, Rights};
use super::page::ShadowPage;
use super::shared::Locked;
use super::spte;
use super::stats::Counter;
use crate::level::{ENTRIES, Level};
use crate::rmap::Under;
use crate::sync::Ordering;

/// At most so many pages are compared under one hold of the lock.
const STEP: usize = if cfg!(loom) { 2 } else { 16 };

/// [`ShadowPage::quiet`]: how often it was compared, one time after the other, and had not changed.
const BUSY: usize = 0;
/// So often is enough: a comparison is cheaper than a fault and a flush, by about this factor.
const QUIET: usize = 4;
/// Was write-protected again, and is to be compared for the last time.
const PROTECTED: usize = usize::MAX;

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// The guest may write to the page's table from now on.
    pub(super) fn set_unsync(&mut self, page: &'g ShadowPage) {
        if page.is_unsync() {
            return;
        }
        self.count(Counter::Unsyncs);
        page.quiet.store(BUSY, Ordering::Relaxed);
        page.synced.store(self.state.syncs, Ordering::Relaxed);
        page.set_unsync(true);
        self.tell_parents(page);
    }

    /// The entries that lead to a page have something unsync below.
    fn tell_parents(&self, page: &'g ShadowPage) {
        for entry in self.state.writer.entries(page.parents.list()) {
            self.worked(1);
            if let Some(parent) = self.page(entry.table()) {
                self.note_unsync_below(parent, entry.index());
            }
        }
    }

    /// Something below this entry is unsync. As deep as there are levels.
    pub(super) fn note_unsync_below(&self, page: &'g ShadowPage, index: usize) {
        let knew = page.has_unsync_below();
        page.set_unsync_below(index, true);
        if !knew {
            self.tell_parents(page);
        }
    }

    /// A flush of the guest's begins: what was written before is seen when it ends. Returns its number.
    pub(super) fn begin_sync(&mut self) -> u64 {
        self.forget_hints();
        self.state.syncs = self.state.syncs.wrapping_add(1);
        self.state.syncs
    }

    /// Makes a page and some of what is below it agree with what the guest's tables are now, as far as its levels are `lowest` and
    /// more. Returns whether that was all there is to be done for the flush with this number.
    pub(super) fn sync_some(&mut self, page: &'g ShadowPage, lowest: Level, sync: u64) -> bool {
        if !page.needs_sync() {
            return true;
        }
        self.state.walks = self.state.walks.wrapping_add(1);
        let mut found = [None; STEP];
        let most = (self.shared.config.hold / ENTRIES).clamp(1, STEP);
        let mut count = 0;
        let is_all = self.find_unsync(page, (lowest, sync), &mut found[..most], &mut count);
        let found = found.into_iter().flatten();
        let mut must_flush = false;
        for page in found.clone() {
            // To be in sync again, its table is write-protected first.
            if page.quiet.load(Ordering::Relaxed) == QUIET {
                must_flush |= self.write_protect(page.key.gfn);
                page.quiet.store(PROTECTED, Ordering::Relaxed);
            }
        }
        if must_flush {
            self.flush_now();
        }
        for page in found {
            let quiet = page.quiet.load(Ordering::Relaxed);
            let is_protected = quiet == PROTECTED;
            let changed = self.sync_page(page);
            if is_protected {
                page.set_unsync(false);
            }
            let next = if changed == 0 && !is_protected { (quiet + 1).min(QUIET) } else { BUSY };
            page.quiet.store(next, Ordering::Relaxed);
            page.synced.store(sync, Ordering::Relaxed);
        }
        is_all
    }

    /// Finds pages that are unsync since before the flush, at a page and below. Returns whether all were found. What is known to be unsync
    /// and is not any more is forgotten on the way.
    fn find_unsync(
        &mut self,
        page: &'g ShadowPage,
        (lowest, sync): (Level, u64),
        found: &mut [Option<&'g ShadowPage>],
        count: &mut usize,
    ) -> bool {
        // The guest's tables may lead to the same table from everywhere: it is visited once, or there would be as many visits as there are
        // paths.
        if page.walked.swap(self.state.walks, Ordering::Relaxed) == self.state.walks {
            return true;
        }
        self.worked(1);
        // By distance: the numbers may wrap.
        let is_due = page.synced.load(Ordering::Relaxed).wrapping_sub(sync) >= 1 << 63;
        if page.is_unsync() && page.level() >= lowest && is_due {
            let Some(place) = found.get_mut(*count) else { return false };
            *place = Some(page);
            *count += 1;
        }
        if page.level() <= lowest {
            return true;
        }
        for index in page.unsync_entries() {
            let child = self.child(page, index).filter(|child| child.needs_sync());
            match child {
                Some(child) => {
                    if !self.find_unsync(child, (lowest, sync), found, count) {
                        return false;
                    }
                }
                None => _ = page.set_unsync_below(index, false),
            }
        }
        true
    }

    /// Compares a page and what is below it, as far as it is unsync, before something leads there: whoever gets there may have
    /// flushed since it could be reached last. Where that is much, the rest is not led to any more: it is compared when something is to lead
    /// there again.
    pub(super) fn compare_all(&mut self, page: &'g ShadowPage) {
        if page.is_unsync() {
            self.sync_page(page);
        }
        self.state.walks = self.state.walks.wrapping_add(1);
        self.compare_below(page, &mut { STEP });
    }

    fn compare_below(&mut self, page: &'g ShadowPage, left: &mut usize) {
        for index in page.unsync_entries() {
            let Some(child) = self.child(page, index) else { continue };
            let was_here = child.walked.load(Ordering::Relaxed) == self.state.walks;
            if was_here {
                continue;
            }
            if *left == 0 {
                self.drop_entry(page, index);
                continue;
            }
            *left -= 1;
            child.walked.store(self.state.walks, Ordering::Relaxed);
            if child.is_unsync() {
                self.sync_page(child);
            }
            self.compare_below(child, left);
        }
    }

    /// Compares a page with the guest's table. Returns how many entries have changed.
    pub(super) fn sync_page(&mut self, page: &'g ShadowPage) -> u64 {
        self.count(Counter::Syncs);
        self.worked(ENTRIES);
        let (space, gfn) = (page.key.role.address_space, page.key.gfn);
        let slot = self.slot_at(space, gfn);
        let shared = self.shared;
        let mut changed = 0;
        // What the guest has and we have not: the first of them, and how many.
        let (mut others, mut count) = ([(0, 0); GROUP], 0);
        let has_leaves = page.level() == Level::K4;
        let compared = slot.and_then(|slot| {
            shared.host.with_page(&slot, gfn, |table| {
                for index in 0..ENTRIES {
                    let seen = page.gptes[index].load(Ordering::Relaxed);
                    let now = page.guest_entry(table, index);
                    if seen != 0 {
                        if now == seen {
                            continue;
                        }
                        self.sync_entry(page, index, now);
                        changed += 1;
                        if page.gptes[index].load(Ordering::Relaxed) != 0 {
                            continue;
                        }
                    }
                    if has_leaves && Hints::is_one(now) {
                        if let Some(place) = others.get_mut(count) {
                            *place = (index, now);
                        }
                        count += 1;
                    }
                }
            })
        });
        if let Some(others) = others.get(..count) {
            self.state.hints.note(page, others);
        }
        if compared.is_none() {
            // There is no memory any more: nothing is present.
            for index in 0..ENTRIES {
                changed += u64::from(self.drop_entry(page, index));
            }
        }
        shared.counters.add(Counter::SyncedEntries, changed);
        changed
    }

    /// The guest's entry is another one than that which an entry was made of.
    ///
    /// Access is taken away here and never given: what the guest allows now and did not before, the next fault finds out.
    pub(super) fn sync_entry(&mut self, page: &'g ShadowPage, index: usize, gpte: u64) {
        const ACCESSED: u64 = 1 << 5;
        const DIRTY: u64 = 1 << 6;
        let level = page.level();
        let entry = self.load(page, index);
        // Without the accessed bit the guest wants to know of the next use.
        let keeps = gpte & ACCESSED != 0
            && match page.paging.entry(level, gpte) {
                Entry::NotPresent | Entry::Reserved => false,
                Entry::Table(gfn) => self.child(page, index).is_some_and(|child| {
                    let role = &child.key.role;
                    !role.direct
                        && child.key.gfn == gfn
                        && role.rights == page.key.role.rights & page.paging.rights_of(gpte)
                }),
                Entry::Page(_) => {
                    let same = |gfn| self.filed_for(page, index) == Some(Under::Gfn { gfn, level });
                    spte::is_leaf(entry, level) && page.leaf_gfn(index, gpte).is_some_and(same)
                }
            };
        if !keeps {
            self.drop_entry(page, index);
            return;
        }
        page.gptes[index].store(gpte, Ordering::SeqCst);
        if spte::is_leaf(entry, level) {
            let mut rights = page.key.role.rights & page.paging.rights_of(gpte);
            if gpte & DIRTY == 0 {
                rights -= Rights::WRITE;
            }
            self.restrict(page, index, rights);
        }
    }

    /// Takes from a leaf what these rights do not have.
    fn restrict(&mut self, page: &'g ShadowPage, index: usize, rights: Rights) {
        // With CR0.WP clear, a supervisor's write has made a read-only page writable, and not a user's: that starts anew.
        if !page.key.role.reading.write_protect {
            self.drop_entry(page, index);
            return;
        }
        loop {
            let old = self.load(page, index);
            let new = spte::restricted(old, rights);
            if new == old {
                return;
            }
            // The fast path may have set W meanwhile.
            let entry = &self.table(page).0[index];
            if entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                break;
            }
        }
        if let Some(Under::Gfn { gfn, level }) = self.filed_for(page, index) {
            self.owe(crate::invalidate::range(gfn.get(), gfn.get() + level.pages()));
        }
    }
}
