//! The pool: where guest memory comes from.
//!
//! A hypervisor in user space gives its guests pieces of its own address space, and the kernel decides which frame is
//! behind each page of it. The pool is both: it has *pool addresses*, which are what slots are backed by (the `hva` of
//! [`Backing::Host`]), and a frame behind each page of them. Frames are handed out
//! in an order that keeps no guest address equal to its host address, and pages can be
//! [moved](Pool::move_page) to other frames while the guest runs, if they are invalidated first.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memslot::{Backing, Gfn, GfnRange, Hva};
use spin::Mutex;

use crate::cpu::index;
use crate::physical;

/// The first pool address. No pointer: nothing is mapped there.
const FIRST: u64 = 0x7000_0000_0000;
/// Pages of a block: 2 MiB.
pub(crate) const BLOCK: u64 = 512;
/// Frames that no page has at first, for pages to move to.
pub(crate) const SPARE: u64 = BLOCK;

/// See the [module documentation](self).
pub(crate) struct Pool {
    /// The frame behind each page.
    frames: Vec<AtomicU64>,
    /// Whether the frames of a block are contiguous, so that it can be one large page.
    whole: Vec<AtomicBool>,
    spare: Mutex<Vec<u64>>,
    /// The first frame.
    first: u64,
}

impl Pool {
    /// A pool of `pages`, a multiple of [`BLOCK`], in physical memory that begins at a multiple of 2 MiB and has room for them and
    /// [`SPARE`] more.
    pub(crate) fn new(first_frame: u64, pages: u64, large: bool) -> Self {
        let blocks = pages / BLOCK;
        let frame = |page: u64| {
            if large {
                // Blocks from the last one downwards, each whole.
                first_frame + (blocks - 1 - page / BLOCK) * BLOCK + page % BLOCK
            } else {
                // A stride that has no factor in common with a number of pages that is some blocks.
                first_frame + (page * stride(pages) + pages / 3) % pages
            }
        };
        Self {
            frames: (0..pages).map(|page| AtomicU64::new(frame(page))).collect(),
            whole: (0..blocks).map(|_| AtomicBool::new(large)).collect(),
            spare: Mutex::new((0..SPARE).map(|spare| first_frame + pages + spare).collect()),
            first: first_frame,
        }
    }

    /// How many pages there are.
    pub(crate) fn pages(&self) -> u64 {
        self.frames.len() as u64
    }

    /// The frame behind a page.
    pub(crate) fn frame(&self, page: u64) -> u64 {
        self.frames[index(page)].load(Ordering::SeqCst)
    }

    /// Does something with the frame behind a page, which stays behind it meanwhile.
    pub(crate) fn with_frame<R>(&self, page: u64, work: impl FnOnce(u64) -> R) -> Option<R> {
        let _no_move = self.spare.lock();
        let frame = self.frames.get(index(page))?.load(Ordering::SeqCst);
        Some(work(frame))
    }

    /// The page at a pool address.
    pub(crate) fn page_at(&self, address: Hva) -> Option<u64> {
        let page = address.get().checked_sub(FIRST)? >> 12;
        (page < self.pages()).then_some(page)
    }

    /// The guest frames around `gfn` whose frames are contiguous with that behind `page`, which `gfn` has.
    pub(crate) fn run(&self, gfn: Gfn, page: u64) -> GfnRange {
        let one = GfnRange::with_len(gfn, 1).unwrap_or_default();
        if !self.whole[index(page / BLOCK)].load(Ordering::SeqCst) {
            return one;
        }
        let within = page % BLOCK;
        let start = gfn.get().checked_sub(within).map(Gfn::new);
        start.and_then(|start| GfnRange::with_len(start, BLOCK)).unwrap_or(one)
    }

    /// Puts another frame behind a page, with the same contents, and has the old one as spare. Returns whether there
    /// was a spare frame.
    ///
    /// # Safety
    /// The page is invalidated: nobody has a translation to it, nor will until this returns.
    pub(crate) unsafe fn move_page(&self, page: u64) -> bool {
        let mut spare = self.spare.lock();
        let Some(place) = spare.len().checked_sub(1).map(|last| index(page * 7) % (last + 1)) else {
            return false;
        };
        let new = spare[place];
        let old = self.frame(page);
        // SAFETY: nobody has the new frame, and nobody writes to the old one.
        unsafe { physical::copy_page(old << 12, new << 12) };
        self.whole[index(page / BLOCK)].store(false, Ordering::SeqCst);
        self.frames[index(page)].store(new, Ordering::SeqCst);
        spare[place] = old;
        true
    }

    /// Whether every frame of the pool is in exactly one place: behind one page, or spare.
    pub(crate) fn is_sound(&self) -> bool {
        let mut seen = alloc::vec![false; index(self.pages() + SPARE)];
        let spare = self.spare.lock();
        let all = self.frames.iter().map(|frame| frame.load(Ordering::SeqCst)).chain(spare.iter().copied());
        all.into_iter().all(|frame| {
            let place = frame.checked_sub(self.first).and_then(|place| seen.get_mut(index(place)));
            place.is_some_and(|seen| !core::mem::replace(seen, true))
        }) && seen.iter().all(|&seen| seen)
    }
}

/// What a slot is backed by whose first frame has this page.
pub(crate) fn backing(page: u64) -> Backing {
    Backing::Host { hva: Hva::new(FIRST + (page << 12)) }
}

/// A number near pages / 5 that shares no factor with `pages`.
fn stride(pages: u64) -> u64 {
    let shares = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a != 1
    };
    let mut stride = (pages / 5) | 1;
    while shares(stride, pages) {
        stride += 2;
    }
    stride
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_is_in_one_place() {
        for (pages, large) in
            [(512, true), (5 * 512, true), (512, false), (15 * 512, false), (96 * 512, false)]
        {
            let pool = Pool::new(1 << 20, pages, large);
            assert!(pool.is_sound(), "{pages} {large}");
        }
    }

    #[test]
    fn whole_blocks_are_runs() {
        let pool = Pool::new(1 << 20, 4 * 512, true);
        let run = pool.run(Gfn::new(0x10_0205), 512 + 5);
        assert_eq!((run.start().get(), run.len()), (0x10_0200, 512));
        assert_eq!(pool.frame(512 + 5), (1 << 20) + 2 * 512 + 5);
        let pool = Pool::new(1 << 20, 4 * 512, false);
        assert_eq!(pool.run(Gfn::new(0x10_0205), 512 + 5).len(), 1);
    }
}
