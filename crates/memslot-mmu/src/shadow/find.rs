//! Finding, making and giving up shadow pages.

use core::ptr;

use memslot::Gfn;

use super::ShadowHost;
use super::guest::GuestPaging;
use super::page::ShadowPage;
use super::reserve::Reserve;
use super::role::Key;
use super::shared::{Locked, everything};
use super::stats::Counter;
use crate::level::ENTRIES;
use crate::sync::Ordering;

/// Where the limit is reached, so many pages are given up at once.
const BATCH: usize = 10;

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// Whether a page is as old as the last [`zap_all`](super::Shadow::zap_all), or older.
    pub(super) fn is_obsolete(&self, page: &ShadowPage) -> bool {
        page.generation != self.shared.generation.load(Ordering::SeqCst)
    }

    /// The page for this key, if there is one. **The whole key is compared.**
    pub(super) fn find(&self, key: &Key) -> Option<&'g ShadowPage> {
        self.pages_of(key.gfn).find(|page| page.key == *key && !self.is_obsolete(page))
    }

    /// The page for this key, which with all below it agrees with the guest's tables as they are now; made if there is none. `None`
    /// where the reserve is empty.
    ///
    /// What is unsync stays so: it is compared, which makes it as good as new, but not write-protected before the guest
    /// flushes.
    pub(super) fn page_for(
        &mut self,
        reserve: &mut Reserve,
        key: Key,
        paging: &GuestPaging,
    ) -> Option<&'g ShadowPage> {
        let page = self.page_with(reserve, key, paging)?;
        self.compare_all(page);
        Some(page)
    }

    /// The page for this key, as it is; made if there is none. `None` where the reserve is empty.
    pub(super) fn page_with(
        &mut self,
        reserve: &mut Reserve,
        key: Key,
        paging: &GuestPaging,
    ) -> Option<&'g ShadowPage> {
        if let Some(page) = self.find(&key) {
            page.writes.store(0, Ordering::Relaxed);
            return Some(page);
        }
        self.make_page(reserve, key, paging)
    }

    fn make_page(&mut self, reserve: &mut Reserve, key: Key, paging: &GuestPaging) -> Option<&'g ShadowPage> {
        let mut page = reserve.take()?;
        let generation = self.shared.generation.load(Ordering::SeqCst);
        page.become_page(key, *paging, generation, &mut reserve.nodes);
        page.walked.store(self.state.walks, Ordering::Relaxed);
        let page = self.shared.directory.insert(page);
        // SAFETY: just inserted, and no page is freed for 'g.
        let page: &'g ShadowPage = unsafe { &*page };
        self.state.pages += 1;
        self.count(Counter::Created);
        if !page.is_direct() {
            self.start_tracking(page);
        }
        Some(page)
    }

    /// A new page shadows a table of the guest's: from now on, what is written there is noticed, or the page is unsync.
    ///
    /// Where the frame is writable at the moment, the guest has just filled it, and often goes on to: then the page is unsync from the
    /// beginning, which costs one comparison at the next flush instead of a flush now and a fault soon.
    fn start_tracking(&mut self, page: &'g ShadowPage) {
        let gfn = page.key.gfn;
        for size in 0..2 {
            self.shared.block(size, gfn).fetch_add(1, Ordering::SeqCst);
        }
        let (small, large) = self.writable(gfn);
        let may_be_unsync = page.level() <= self.shared.config.unsync;
        if small && !large && may_be_unsync {
            self.set_unsync(page);
        } else if self.write_protect(gfn) {
            self.flush_now();
        }
    }

    /// Gives a page up: nothing leads to it, it leads nowhere, and it is not found any more. Its table is freed when all who
    /// use it have left; virtual processors whose root it is find it stale.
    ///
    /// Pages below that nothing leads to any more are kept, for when the guest uses them again.
    pub(super) fn zap_page(&mut self, page: &'g ShadowPage) {
        if page.is_zapped() {
            return;
        }
        self.count(Counter::Zapped);
        page.set_zapped();
        self.worked(ENTRIES);
        for index in 0..page.gptes.len() {
            if self.load(page, index) != 0 {
                self.drop_entry(page, index);
            }
        }
        self.unlink_parents(page);
        if !page.is_direct() {
            for size in 0..2 {
                self.shared.block(size, page.key.gfn).fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.leave_pass(page);
        self.shared.directory.forget(page);
        self.state.pages -= 1;
        self.must_flush = true;
        self.owe(everything());
        if page.roots.load(Ordering::SeqCst) == 0 {
            self.bury(page);
        }
    }

    /// Makes all entries that lead to a page not present.
    fn unlink_parents(&mut self, page: &'g ShadowPage) {
        loop {
            let first = self.state.writer.entries(page.parents.list()).next();
            let Some(entry) = first else { return };
            match self.page(entry.table()) {
                Some(parent) if self.drop_entry(parent, entry.index()) => {}
                _ => {
                    debug_assert!(false, "a parent that is not present");
                    return;
                }
            }
        }
    }

    /// A virtual processor has this page as root from now on.
    pub(super) fn add_root(page: &'g ShadowPage) {
        page.roots.fetch_add(1, Ordering::SeqCst);
    }

    /// It has it no more.
    ///
    /// # Safety
    /// The page was [added](Self::add_root), and not yet removed, so that it is not freed.
    pub(super) unsafe fn remove_root(&mut self, page: ptr::NonNull<ShadowPage>) {
        // SAFETY: the caller's word; with the lock held it is not freed for 'g.
        let page: &'g ShadowPage = unsafe { page.as_ref() };
        if page.roots.fetch_sub(1, Ordering::SeqCst) == 1 && page.is_zapped() {
            self.bury(page);
        }
    }

    /// Makes room for so many pages, the oldest go first. Roots that are in use stay.
    pub(super) fn make_room(&mut self, pages: usize) {
        let limit = self.shared.config.pages.max(64);
        if self.state.pages + pages <= limit {
            return;
        }
        for page in self.pages() {
            if self.state.pages + BATCH.max(pages) <= limit {
                break;
            }
            if page.roots.load(Ordering::SeqCst) == 0 {
                self.count(Counter::Reclaimed);
                self.zap_page(page);
            }
        }
    }

    /// Gives up all pages of the table in this frame. Returns whether there were any.
    pub(super) fn zap_pages_of(&mut self, gfn: Gfn) -> bool {
        let mut any = false;
        while let Some(page) = self.pages_of(gfn).find(|page| !page.is_direct()) {
            self.zap_page(page);
            any = true;
        }
        any
    }

    /// Gives up so many of the pages that are obsolete. Returns whether there are more: they are the oldest.
    pub(super) fn zap_obsolete(&mut self, budget: usize) -> bool {
        for _ in 0..budget {
            match self.pages().next().filter(|page| self.is_obsolete(page)) {
                Some(page) => self.zap_page(page),
                None => return false,
            }
        }
        true
    }

    /// Gives up all pages, at the end.
    pub(super) fn zap_everything(&mut self) {
        while let Some(page) = self.pages().next() {
            self.zap_page(page);
        }
    }
}
