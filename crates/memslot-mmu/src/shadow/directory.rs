//! Where shadow pages are found: by the frame of the guest's table, by their own table, and by age.
//!
//! All three are linked through the pages themselves, so that nothing is allocated where pages come and go. The chains by table are
//! walked by the fast path, without the lock: a page that is taken out keeps its own link, so that whoever is at it goes on, and
//! it is freed when nobody can be.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr;

use memslot::{Gfn, OutOfMemory};

use super::page::ShadowPage;
use crate::host::Pfn;
use crate::sync::{AtomicPtr, Ordering};

/// log2 of the number of chains. Models run by loom have one: where tables lie must make no difference there.
const CHAIN_BITS: u32 = if cfg!(loom) {
    0
} else if cfg!(miri) {
    2
} else {
    12
};

/// Frames side by side have chains side by side: tables often lie so, and one fault looks for several.
fn hash(frame: u64) -> usize {
    let folded = frame ^ frame >> CHAIN_BITS ^ frame >> (2 * CHAIN_BITS);
    (folded & ((1 << CHAIN_BITS) - 1)) as usize
}

type Chains = Box<[AtomicPtr<ShadowPage>]>;

fn chains() -> Result<Chains, OutOfMemory> {
    let mut chains = Vec::new();
    chains.try_reserve_exact(1 << CHAIN_BITS).map_err(|_| OutOfMemory)?;
    chains.resize_with(1 << CHAIN_BITS, || AtomicPtr::new(ptr::null_mut()));
    Ok(chains.into_boxed_slice())
}

/// See the [module documentation](self). All pointers are null or lead to pages that are not freed.
pub(super) struct Directory {
    by_gfn: Chains,
    by_table: Chains,
    newest: AtomicPtr<ShadowPage>,
    oldest: AtomicPtr<ShadowPage>,
}

impl Directory {
    pub(super) fn new() -> Result<Self, OutOfMemory> {
        let none = || AtomicPtr::new(ptr::null_mut());
        Ok(Self { by_gfn: chains()?, by_table: chains()?, newest: none(), oldest: none() })
    }

    /// How many chains there are by gfn.
    pub(super) const CHAINS: usize = 1 << CHAIN_BITS;

    /// The first of a chain by gfn.
    pub(super) fn first_in(&self, chain: usize) -> *mut ShadowPage {
        self.by_gfn[chain].load(Ordering::Relaxed)
    }

    /// The first of those that may be of this frame; the others follow by their links.
    pub(super) fn first_of(&self, gfn: Gfn) -> *mut ShadowPage {
        self.by_gfn[hash(gfn.get())].load(Ordering::Relaxed)
    }

    pub(super) fn oldest(&self) -> *mut ShadowPage {
        self.oldest.load(Ordering::Relaxed)
    }

    /// The page with this table. Also without the lock.
    ///
    /// # Safety
    /// For `'a`, no page is freed that is found here: the lock is held, or the caller is pinned.
    pub(super) unsafe fn page<'a>(&self, table: Pfn) -> Option<&'a ShadowPage> {
        let mut at = self.by_table[hash(table.get())].load(Ordering::SeqCst);
        // SAFETY: null or not freed; see above.
        while let Some(page) = unsafe { at.as_ref() } {
            if page.table == table {
                return Some(page);
            }
            at = page.links.by_table.load(Ordering::SeqCst);
        }
        None
    }

    /// Makes a page findable.
    pub(super) fn insert(&self, page: Box<ShadowPage>) -> *mut ShadowPage {
        let page = Box::into_raw(page);
        // SAFETY: made from a box.
        let this = unsafe { &*page };
        let chain = &self.by_gfn[hash(this.key.gfn.get())];
        this.links.by_gfn.store(chain.load(Ordering::Relaxed), Ordering::Relaxed);
        chain.store(page, Ordering::Relaxed);
        let chain = &self.by_table[hash(this.table.get())];
        this.links.by_table.store(chain.load(Ordering::Relaxed), Ordering::Relaxed);
        chain.store(page, Ordering::SeqCst);
        let newest = self.newest.load(Ordering::Relaxed);
        this.links.newer.store(ptr::null_mut(), Ordering::Relaxed);
        this.links.older.store(newest, Ordering::Relaxed);
        // SAFETY: null or a page.
        match unsafe { newest.as_ref() } {
            Some(newest) => newest.links.newer.store(page, Ordering::Relaxed),
            None => self.oldest.store(page, Ordering::Relaxed),
        }
        self.newest.store(page, Ordering::Relaxed);
        page
    }

    /// Takes a page out of those that are found by gfn and by age.
    pub(super) fn forget(&self, page: &ShadowPage) {
        let next = |page: &ShadowPage| page.links.by_gfn.load(Ordering::Relaxed);
        let mut place = &self.by_gfn[hash(page.key.gfn.get())];
        // SAFETY: null or a page.
        while let Some(at) = unsafe { place.load(Ordering::Relaxed).as_ref() } {
            if ptr::eq(at, page) {
                place.store(next(page), Ordering::Relaxed);
                break;
            }
            place = &at.links.by_gfn;
        }
        let (newer, older) =
            (page.links.newer.load(Ordering::Relaxed), page.links.older.load(Ordering::Relaxed));
        // SAFETY: null or pages.
        let (newer_page, older_page) = unsafe { (newer.as_ref(), older.as_ref()) };
        newer_page.map_or(&self.newest, |newer| &newer.links.older).store(older, Ordering::Relaxed);
        older_page.map_or(&self.oldest, |older| &older.links.newer).store(newer, Ordering::Relaxed);
    }

    /// Takes a page out of those that are found by their table: nothing leads to it any more.
    pub(super) fn forget_table(&self, page: &ShadowPage) {
        let mut place = &self.by_table[hash(page.table.get())];
        // SAFETY: null or a page.
        while let Some(at) = unsafe { place.load(Ordering::Relaxed).as_ref() } {
            if ptr::eq(at, page) {
                place.store(page.links.by_table.load(Ordering::Relaxed), Ordering::SeqCst);
                return;
            }
            place = &at.links.by_table;
        }
    }
}
