//! Write tracking: a table of the guest's that is shadowed in sync is write-protected wherever it is mapped.
//!
//! What is shadowed is found by the frame, in both address spaces: a table that is shadowed in system management mode must not be writable
//! outside either. Large pages are not made where any of their frames is shadowed.

use memslot::{Gfn, Gpa};

use super::ShadowHost;
use super::guest::{EntrySize, Mode};
use super::page::ShadowPage;
use super::shared::Locked;
use super::stats::Counter;
use crate::level::{ENTRIES, PAGE_SHIFT};
use crate::sync::Ordering;

/// After so many writes without its translations being used, a page is taken for one that is no table of the guest's any more.
const FLOOD: usize = 3;

/// Whether a frame may become writable.
pub(super) enum Verdict {
    /// No page shadows it, or all that do are unsync now.
    Yes,
    /// A page that shadows it stays in sync.
    No,
    /// Pages were given up for it.
    Again,
}

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// Whether a frame may become writable for the guest. For a write that has happened, pages that may be become unsync.
    pub(super) fn may_write(&mut self, gfn: Gfn, is_write: bool) -> Verdict {
        let shadows = |page: &&'g ShadowPage| !page.is_direct();
        if self.pages_of(gfn).find(shadows).is_none() {
            return Verdict::Yes;
        }
        let in_sync = |page: &&'g ShadowPage| shadows(page) && !page.is_unsync();
        if is_write {
            let highest = self.shared.config.unsync;
            let mut hit = false;
            let mut flooded = false;
            for page in self.pages_of(gfn).filter(in_sync) {
                hit = true;
                let writes = page.writes.load(Ordering::Relaxed) + 1;
                page.writes.store(writes, Ordering::Relaxed);
                flooded |= writes >= FLOOD && page.roots.load(Ordering::Relaxed) == 0;
            }
            if hit {
                self.count(Counter::TrackHits);
            }
            if flooded {
                self.count(Counter::Flooded);
                self.zap_pages_of(gfn);
                return Verdict::Again;
            }
            if self.pages_of(gfn).filter(in_sync).any(|page| page.level() > highest) {
                return Verdict::No;
            }
            for page in self.pages_of(gfn).filter(shadows) {
                self.set_unsync(page);
            }
        } else if self.pages_of(gfn).any(|page| in_sync(&page)) {
            return Verdict::No;
        }
        // What was about to be in sync is not, with the frame writable.
        self.pages_of(gfn).filter(shadows).for_each(ShadowPage::wake);
        Verdict::Yes
    }

    /// All pages of the table in this frame become unsync. Returns whether any was not.
    pub(super) fn unprotect(&mut self, gfn: Gfn) -> bool {
        let mut any = false;
        for page in self.pages_of(gfn).filter(|page| !page.is_direct()) {
            any |= !page.is_unsync();
            self.set_unsync(page);
            page.wake();
        }
        any
    }

    /// Guest memory was written: what is made of it is made anew. In all address spaces, which may have the same memory there.
    pub(super) fn wrote(&mut self, gpa: Gpa, bytes: u64) {
        let (first, last) = (gpa.get(), gpa.get().saturating_add(bytes.saturating_sub(1)));
        if bytes == 0 {
            return;
        }
        for gfn in first >> PAGE_SHIFT..=last >> PAGE_SHIFT {
            let start = gfn << PAGE_SHIFT;
            let (from, to) = (first.max(start) - start, last.min(start + 0xfff) - start);
            self.wrote_table(Gfn::new(gfn), (from, to));
        }
    }

    /// Bytes `from` to `to` of a frame were written.
    fn wrote_table(&mut self, gfn: Gfn, (from, to): (u64, u64)) {
        let of_this = |page: &&'g ShadowPage| !page.is_direct();
        let mut flooded = false;
        for page in self.pages_of(gfn).filter(of_this) {
            let space = page.key.role.address_space;
            let size = match page.key.role.reading.mode {
                Mode::Off | Mode::Bits32 => EntrySize::Four,
                _ => EntrySize::Eight,
            };
            let (first, last) = (from / size.bytes(), to / size.bytes());
            let is_whole = from % size.bytes() == 0 && to - from < size.bytes();
            if !page.is_unsync() {
                let writes = page.writes.load(Ordering::Relaxed) + 1;
                page.writes.store(writes, Ordering::Relaxed);
                // A table is written entry by entry; anything else is no table any more.
                flooded |= (writes >= FLOOD || !is_whole) && page.roots.load(Ordering::Relaxed) == 0;
            }
            for index in 0..ENTRIES {
                let at = page.guest_index(index) as u64;
                if first <= at && at <= last && page.gptes[index].load(Ordering::Relaxed) != 0 {
                    match self.read_guest(space, gfn, |table| page.guest_entry(table, index)) {
                        Some(now) if now == page.gptes[index].load(Ordering::Relaxed) => {}
                        Some(now) => self.sync_entry(page, index, now),
                        None => _ = self.drop_entry(page, index),
                    }
                }
            }
        }
        if flooded {
            self.count(Counter::Flooded);
            while let Some(page) = self.pages_of(gfn).find(of_this) {
                self.zap_page(page);
            }
        }
    }
}
