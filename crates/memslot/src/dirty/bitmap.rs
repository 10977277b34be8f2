//! The bits of one address space, indexed by gfn: marks from any thread, taken away by one.
//!
//! # Shape
//!
//! ```text
//! root ─► inner nodes, 512 ways each, as many levels as the highest gfn needs (none below 2^24 frames)
//!           └─► directory: 512 places, and a word-wise summary of those that may have bits
//!                 └─► place: nothing │ FULL │ chunk of 32768 bits (`chunk.rs`), with a summary of its own
//! ```
//!
//! Everything is made when the first bit needs it and stays where it is, so a walk takes no lock; clean memory
//! costs nothing, and a harvest that finds a summary empty is done with 64 GiB.
//!
//! # Taking bits away
//!
//! Clearing word by word would cost an atomic exchange for every 64 pages. Instead whoever takes a whole chunk
//! *replaces* it by an empty one, counts the place's turn, and reads the old chunk at leisure. A marker may still
//! be at work there: so it looks at the turn again **after** its mark, and where it is another it marks once more
//! in the new chunk. If it is the same, the mark came first and is in what was taken:
//!
//! ```text
//! marker   look at the turn ─ find the chunk ─ set the bit ─ the same turn still? ── done (else: once more)
//! taker                 replace the chunk ─ count the turn ─ read the bits
//! ```
//!
//! All of them are sequentially consistent, so one of the two sees the other, or both do: a mark may be seen twice
//! and is never lost. The turn, not the chunk's address, is compared because a chunk comes back: it belongs to its
//! place for ever and waits there, empty, so that a late marker touches nothing that is somebody else's.
//!
//! A mark of what is marked already need not be an exchange, where takers make a heavy fence: see `fence.rs`.
//!
//! A marker that makes a place FULL counts no turn. What was marked in the chunk before is covered.
//!
//! # Without memory
//!
//! A mark cannot fail. Directories are made before a slot is logged; a mark where there is none is of no slot, and
//! forgotten. Where there is no memory for a chunk the whole place becomes FULL: too much is reported, never too little.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::{self, NonNull};
use core::sync::atomic::compiler_fence;

use super::chunk::{Chunk, PAGES, try_box, words_of};
use super::place::{Held, Place};
use crate::addr::GfnRange;
use crate::error::OutOfMemory;
use crate::sync::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence_for_loom};

const WAY_BITS: u32 = if cfg!(loom) { 1 } else { 9 };
const WAYS: usize = 1 << WAY_BITS;
/// Pages below a directory: 64 GiB of 4 KiB pages.
const DIRECTORY_SHIFT: u32 = PAGES.trailing_zeros() + WAY_BITS;

#[repr(align(64))]
struct Directory {
    /// A bit for every place: whether it may have bits. Set after the bits, cleared before them.
    occupied: [AtomicU64; WAYS.div_ceil(64)],
    places: [Place; WAYS],
}

#[repr(align(64))]
struct Inner {
    ways: [AtomicPtr<u8>; WAYS],
}

/// Dirty bits of one address space. Marking needs no lock and no slot: a bit belongs to a gfn.
pub(super) struct Bitmap {
    /// The topmost node; how many levels of inner nodes there are stands in its low bits.
    root: AtomicPtr<u8>,
    /// Somebody could not find out where a mark belongs.
    everything: AtomicBool,
    /// Whether takers make a heavy fence, so that marks may leave alone what is marked: see `fence.rs`.
    leaves: AtomicBool,
    /// Bytes of all nodes and chunks.
    bytes: AtomicUsize,
}

const LEVELS: usize = 63;

impl Bitmap {
    pub(super) fn new() -> Self {
        Self {
            root: AtomicPtr::new(ptr::null_mut()),
            everything: AtomicBool::new(false),
            leaves: AtomicBool::new(false),
            bytes: AtomicUsize::new(0),
        }
    }

    /// The directory of a gfn, if it is there.
    #[inline]
    fn directory(&self, gfn: u64) -> Option<&Directory> {
        let root = self.root.load(Ordering::Acquire);
        let mut levels = root.addr() & LEVELS;
        let mut node = root.map_addr(|address| address & !LEVELS);
        if node.is_null() || !reaches(levels, gfn) {
            return None;
        }
        while levels > 0 {
            levels -= 1;
            // SAFETY: a node with levels below it is an `Inner`; nodes are freed with the bitmap.
            let inner = unsafe { &*node.cast::<Inner>() };
            node = inner.ways[way(gfn, levels)].load(Ordering::Acquire);
            if node.is_null() {
                return None;
            }
        }
        // SAFETY: a node without levels below it is a `Directory`; nodes are freed with the bitmap.
        Some(unsafe { &*node.cast::<Directory>() })
    }

    /// The directory of a gfn; it is made if need be.
    fn make_directory(&self, gfn: u64) -> Result<&Directory, OutOfMemory> {
        loop {
            let root = self.root.load(Ordering::Acquire);
            let levels = root.addr() & LEVELS;
            let top = root.map_addr(|address| address & !LEVELS);
            if top.is_null() {
                self.install(&self.root, root, Directory::new()?, 0);
                continue;
            }
            if !reaches(levels, gfn) {
                let above = Inner::new()?;
                above.ways[0].store(top, Ordering::Relaxed);
                self.install(&self.root, root, above, levels + 1);
                continue;
            }
            let mut node = top;
            for below in (0..levels).rev() {
                // SAFETY: as in `directory`.
                let inner = unsafe { &*node.cast::<Inner>() };
                let place = &inner.ways[way(gfn, below)];
                if place.load(Ordering::Acquire).is_null() {
                    if below == 0 {
                        self.install(place, ptr::null_mut(), Directory::new()?, 0);
                    } else {
                        self.install(place, ptr::null_mut(), Inner::new()?, 0);
                    }
                }
                node = place.load(Ordering::Acquire);
            }
            // SAFETY: as in `directory`.
            return Ok(unsafe { &*node.cast::<Directory>() });
        }
    }

    /// Puts a node where `current` is, unless somebody else was quicker: theirs is as good.
    fn install<T>(&self, place: &AtomicPtr<u8>, current: *mut u8, node: Box<T>, tag: usize) {
        const { assert!(align_of::<T>() > LEVELS) };
        let node = Box::into_raw(node);
        let new = node.cast::<u8>().map_addr(|address| address | tag);
        if place.compare_exchange(current, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.bytes.fetch_add(size_of::<T>(), Ordering::Relaxed);
        } else {
            // SAFETY: nobody has seen it.
            drop(unsafe { Box::from_raw(node) });
        }
    }

    /// Makes the directories for these gfns, so that marks there find one.
    pub(super) fn reserve(&self, gfns: GfnRange) -> Result<(), OutOfMemory> {
        for (first, _) in steps(gfns.start().get(), gfns.end().get(), 1 << DIRECTORY_SHIFT) {
            self.make_directory(first)?;
        }
        Ok(())
    }

    /// Whether marks may leave alone what is marked already. Whoever asks for it makes heavy fences.
    pub(super) fn set_leaves(&self, leaves: bool) {
        self.leaves.store(leaves, Ordering::SeqCst);
    }

    #[inline]
    pub(super) fn leaves(&self) -> bool {
        self.leaves.load(Ordering::Relaxed)
    }

    /// The light half of the fence, in front of all looks of a mark. Returns whether what is marked may be left alone.
    #[inline]
    fn light_fence(&self) -> bool {
        let leaves = self.leaves();
        compiler_fence(Ordering::SeqCst);
        leaves
    }

    /// Marks one page.
    #[inline]
    pub(super) fn mark(&self, gfn: u64) {
        let leave = self.light_fence();
        if !self.directory(gfn).is_some_and(|directory| directory.mark(gfn, leave)) {
            self.mark_slowly(gfn, gfn + 1, leave);
        }
    }

    /// Marks the pages of a range, a word or more at a time.
    pub(super) fn mark_range(&self, gfns: GfnRange) {
        let leave = self.light_fence();
        let (from, to) = (gfns.start().get(), gfns.end().get());
        // Most ranges lie in one chunk, which is there.
        let chunk = self.directory(from).filter(|_| from < to && from | (PAGES - 1) >= to - 1);
        match chunk {
            Some(directory) => directory.mark_range(from, to, leave, &self.bytes),
            None => self.mark_slowly(from, to, leave),
        }
    }

    #[inline(never)]
    fn mark_slowly(&self, from: u64, to: u64, leave: bool) {
        let mut at = from;
        while at < to {
            let Some(directory) = self.directory(at) else {
                // No slot was ever logged here.
                match self.next_directory(at) {
                    Some(next) if next < to => at = next,
                    _ => return,
                }
                continue;
            };
            let end = (at | (PAGES - 1)).saturating_add(1).min(to);
            directory.mark_range(at, end, leave, &self.bytes);
            at = end;
        }
    }

    /// Whether everything counts as dirty, because a mark found no memory. From now on it does not.
    pub(super) fn take_everything(&self) -> bool {
        self.everything.load(Ordering::SeqCst) && self.everything.swap(false, Ordering::SeqCst)
    }

    /// From now on everything counts as dirty.
    pub(super) fn mark_everything(&self) {
        self.everything.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_everything(&self) -> bool {
        self.everything.load(Ordering::SeqCst)
    }

    /// Whether a page is marked.
    pub(super) fn is_marked(&self, gfn: u64) -> bool {
        self.is_everything() || self.word(gfn) >> (gfn % 64) & 1 != 0
    }

    /// Bytes of all nodes and chunks.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The bits of the 64 pages of which `gfn` is one, without taking them.
    pub(super) fn word(&self, gfn: u64) -> u64 {
        let held = self.directory(gfn).and_then(|directory| directory.places[way_of_place(gfn)].look());
        held.map_or(0, |held| held.word(word_of(gfn)))
    }

    /// Takes some bits of the 64 pages of which `gfn` is one; returns those that were set.
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing was taken.
    ///
    /// # Safety
    /// As [`take`](Self::take).
    pub(super) unsafe fn take_word(&self, gfn: u64, bits: u64) -> Result<u64, OutOfMemory> {
        let Some(directory) = self.directory(gfn) else { return Ok(0) };
        // SAFETY: passed on.
        unsafe { directory.places[way_of_place(gfn)].take_word(word_of(gfn), bits, &self.bytes) }
    }

    /// Marks again what was taken, and takes the chunk back.
    ///
    /// # Safety
    /// As [`give_back`](Self::give_back).
    pub(super) unsafe fn restore(&self, number: u64, held: Held) {
        for run in super::runs::Runs::new(&[(number, held)], 0, u64::MAX) {
            self.mark_slowly(run.0, run.1, false);
        }
        // SAFETY: passed on.
        unsafe { self.give_back(number, held) };
    }

    /// Takes all marks of the gfns `[from, to)` away, chunk by chunk in order. A chunk that lies in the range as
    /// a whole is replaced; of one at its edge the bits are taken one word after the other.
    ///
    /// # Errors
    /// [`OutOfMemory`]; what was not taken stays, what is in `got` is the caller's.
    ///
    /// # Safety
    /// Nobody else takes or gives back at the same time.
    pub(super) unsafe fn take(
        &self,
        from: u64,
        to: u64,
        got: &mut Vec<(u64, Held)>,
    ) -> Result<(), OutOfMemory> {
        self.each_occupied(from, to, |number, directory, place| {
            got.try_reserve(1).map_err(|_| OutOfMemory)?;
            let (start, at) = (number * PAGES, way_of_place(number * PAGES));
            // Cleared before the bits, as markers set it after them.
            directory.occupied[at / 64].fetch_and(!(1 << (at % 64)), Ordering::SeqCst);
            fence_for_loom();
            let (first, end) = (from.max(start) - start, (to - start).min(PAGES));
            // SAFETY: passed on.
            let result = unsafe {
                if (first, end) == (0, PAGES) {
                    place.take(&self.bytes)
                } else {
                    place.take_part(first, end, &self.bytes)
                }
            };
            // Bits may be left: of another part, or because there was no memory.
            if place.look().is_some_and(|held| held.chunk().is_none_or(|chunk| !chunk.is_clean())) {
                directory.announce(at);
            }
            if let Some(held) = result? {
                got.push((number, held));
            }
            Ok(())
        })
    }

    fn each_occupied<'a>(
        &'a self,
        from: u64,
        to: u64,
        mut visit: impl FnMut(u64, &'a Directory, &'a Place) -> Result<(), OutOfMemory>,
    ) -> Result<(), OutOfMemory> {
        let mut at = from;
        while at < to {
            let Some(directory) = self.directory(at) else {
                match self.next_directory(at) {
                    Some(next) if next < to => at = next,
                    _ => break,
                }
                continue;
            };
            let start = at & !((1 << DIRECTORY_SHIFT) - 1);
            let last = (to - 1 - start).min((1 << DIRECTORY_SHIFT) - 1);
            for (word, wanted) in words_of((at - start) / PAGES, last / PAGES + 1) {
                let mut occupied = directory.occupied[word].load(Ordering::SeqCst) & wanted;
                while occupied != 0 {
                    let place = 64 * word + occupied.trailing_zeros() as usize;
                    occupied &= occupied - 1;
                    visit(start / PAGES + place as u64, directory, &directory.places[place])?;
                }
            }
            match start.checked_add(1 << DIRECTORY_SHIFT) {
                Some(next) => at = next,
                None => break,
            }
        }
        Ok(())
    }

    /// The start of the first directory behind a gfn that has none; nodes that are not there are stepped over.
    fn next_directory(&self, gfn: u64) -> Option<u64> {
        let root = self.root.load(Ordering::Acquire);
        let levels = root.addr() & LEVELS;
        let top = root.map_addr(|address| address & !LEVELS);
        if top.is_null() {
            return None;
        }
        let mut at = gfn;
        'down: while reaches(levels, at) {
            let mut node = top;
            for below in (0..levels).rev() {
                // SAFETY: as in `directory`.
                let inner = unsafe { &*node.cast::<Inner>() };
                node = inner.ways[way(at, below)].load(Ordering::Acquire);
                if node.is_null() {
                    let step = step_shift(below);
                    at = (at >> step).checked_add(1).filter(|next| next.leading_zeros() >= step)? << step;
                    continue 'down;
                }
            }
            return Some(at);
        }
        None
    }

    fn place(&self, number: u64) -> Result<&Place, OutOfMemory> {
        let first = number * PAGES;
        Ok(&self.make_directory(first)?.places[way_of_place(first)])
    }

    /// An empty chunk of a place, for bits that somebody keeps.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    ///
    /// # Safety
    /// As [`take`](Self::take).
    pub(super) unsafe fn empty(&self, number: u64) -> Result<NonNull<Chunk>, OutOfMemory> {
        // SAFETY: passed on.
        unsafe { self.place(number)?.empty(&self.bytes) }
    }

    /// Takes back what [`take`](Self::take) or [`empty`](Self::empty) gave, with the number of its place.
    ///
    /// # Safety
    /// As [`take`](Self::take), and nobody uses it again.
    pub(super) unsafe fn give_back(&self, number: u64, held: Held) {
        if let (Held::Bits(chunk), Ok(place)) = (held, self.place(number)) {
            place.push(chunk);
        }
    }
}

impl Directory {
    fn new() -> Result<Box<Self>, OutOfMemory> {
        try_box(Self {
            occupied: core::array::from_fn(|_| AtomicU64::new(0)),
            places: core::array::from_fn(|_| Place::new()),
        })
    }

    /// Marks a page where there is a chunk; returns whether there is.
    #[inline]
    fn mark(&self, gfn: u64, leave: bool) -> bool {
        let at = way_of_place(gfn);
        let marked = self.places[at].mark_bit(word_of(gfn), 1 << (gfn % 64), leave);
        if marked {
            self.announce(at);
        }
        marked
    }

    /// Marks the pages `[from, to)`, which lie in one place.
    #[inline]
    fn mark_range(&self, from: u64, to: u64, leave: bool, bytes: &AtomicUsize) {
        let (at, start) = (way_of_place(from), from & !(PAGES - 1));
        self.places[at].mark(from - start, to - start, leave, bytes);
        self.announce(at);
    }

    #[inline]
    fn announce(&self, at: usize) {
        let occupied = &self.occupied[at / 64];
        fence_for_loom();
        if occupied.load(Ordering::SeqCst) >> (at % 64) & 1 == 0 {
            occupied.fetch_or(1 << (at % 64), Ordering::SeqCst);
        }
    }
}

impl Inner {
    fn new() -> Result<Box<Self>, OutOfMemory> {
        try_box(Self { ways: core::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())) })
    }
}

impl Drop for Bitmap {
    fn drop(&mut self) {
        let root = self.root.load(Ordering::Acquire);
        // SAFETY: nobody else has the bitmap any more.
        unsafe { free_node(root.map_addr(|address| address & !LEVELS), root.addr() & LEVELS, &self.bytes) };
    }
}

/// # Safety
/// Nobody uses the node or what is below it again.
unsafe fn free_node(node: *mut u8, levels: usize, bytes: &AtomicUsize) {
    if node.is_null() {
        return;
    }
    // SAFETY: nodes come from boxes of these types; each is reachable once.
    unsafe {
        if levels > 0 {
            let inner = Box::from_raw(node.cast::<Inner>());
            inner.ways.iter().for_each(|way| free_node(way.load(Ordering::Acquire), levels - 1, bytes));
            return;
        }
        let directory = Box::from_raw(node.cast::<Directory>());
        directory.places.iter().for_each(|place| place.free(bytes));
    }
}

/// Whether a tree of so many levels of inner nodes has a place for a gfn.
#[inline]
fn reaches(levels: usize, gfn: u64) -> bool {
    let bits = DIRECTORY_SHIFT as usize + levels * WAY_BITS as usize;
    bits >= 64 || gfn >> bits == 0
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "levels are few")]
fn step_shift(below: usize) -> u32 {
    DIRECTORY_SHIFT + below as u32 * WAY_BITS
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the low bits are wanted")]
fn way(gfn: u64, below: usize) -> usize {
    (gfn >> step_shift(below)) as usize % WAYS
}

#[inline]
pub(super) fn word_of(gfn: u64) -> usize {
    (gfn % PAGES / 64) as usize
}

#[inline]
fn way_of_place(gfn: u64) -> usize {
    (gfn / PAGES) as usize % WAYS
}

/// Cuts `[from, to)` at the multiples of `size`, a power of two.
fn steps(from: u64, to: u64, size: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = from;
    core::iter::from_fn(move || {
        if at >= to {
            return None;
        }
        let end = (at | (size - 1)).saturating_add(1).min(to);
        Some((core::mem::replace(&mut at, end), end))
    })
}

#[cfg(all(test, loom))]
#[path = "bitmap_loom.rs"]
mod loom_tests;
