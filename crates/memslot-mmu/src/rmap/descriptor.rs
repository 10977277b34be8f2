//! The words of the structure: what a head says, and the descriptor that a longer list is made of.

use core::ptr;

use super::arena::{Arena, AtomicU32, INDEX_BITS, Object};
use crate::sync::{AtomicU64, Ordering};

/// How many entries a descriptor has room for. Models run by loom have small ones.
pub(super) const CELLS: usize = if cfg!(loom) { 2 } else { 14 };
/// The bits of an entry's word that must be clear.
pub(super) const TAG_BITS: u64 = 0b111;

/// Set in a head that leads to descriptors.
const MANY: u64 = 1;
/// The low bits of a descriptor's address, which are clear.
const LOW_BITS: u64 = align_of::<Descriptor>() as u64 - 1;
const _: () = assert!(MANY & TAG_BITS == MANY);

/// What the one word of a list says.
#[derive(Clone, Copy)]
pub(super) enum Head<'a> {
    Empty,
    /// The one entry, as it is.
    One(u64),
    /// Two or more, in the descriptors from this one on.
    Many(&'a Descriptor),
}

impl<'a> Head<'a> {
    /// # Safety
    /// The word was read from a head of a reverse map that is there for `'a`.
    #[inline(always)]
    pub(super) unsafe fn new(word: u64) -> Self {
        if word == 0 {
            Self::Empty
        } else if word & MANY == 0 {
            Self::One(word)
        } else {
            // SAFETY: made by `to`, from a descriptor, which is never freed before the reverse map is.
            Self::Many(unsafe { &*address(word) })
        }
    }

    /// How many entries there are. For the writer.
    ///
    /// # Safety
    /// As for [`new`](Self::new).
    #[inline(always)]
    pub(super) unsafe fn count(word: u64) -> usize {
        if word & MANY == 0 {
            return usize::from(word != 0);
        }
        // SAFETY: as in `new`.
        let first: &Descriptor = unsafe { &*address(word) };
        first.total() as usize
    }

    /// The word that leads to a descriptor.
    #[inline(always)]
    pub(super) fn to(descriptor: &Descriptor) -> u64 {
        word(descriptor) | MANY
    }
}

#[inline(always)]
fn word(descriptor: &Descriptor) -> u64 {
    ptr::from_ref(descriptor).expose_provenance() as u64
}

#[inline(always)]
fn address(word: u64) -> *const Descriptor {
    #[expect(clippy::cast_possible_truncation, reason = "it was an address")]
    let address = (word & !LOW_BITS) as usize;
    ptr::with_exposed_provenance(address)
}

/// Two cache lines with up to [`CELLS`] entries. What a change or a walk of a short list needs is in the first.
#[repr(C, align(128))]
pub(super) struct Descriptor {
    /// The next descriptor's address, which stays while walkers may be here, and in its low bits flags of the writer's.
    next: AtomicU64,
    /// In the first of a list: how many entries the list has. In others: the list's number, and [`COVERED`].
    total: AtomicU32,
    /// This descriptor's own number, and in the low bits how many cells are filled: see [`Place`].
    place: AtomicU32,
    /// The entries' words, filled from the first on. Behind the last filled one there are leftovers.
    pub(super) cells: [AtomicU64; CELLS],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Descriptor>() == 128);

// SAFETY: atomics only, and `fresh` has zeroes only.
unsafe impl Object for Descriptor {
    #[cfg(loom)]
    fn fresh() -> Self {
        Self {
            next: AtomicU64::new(0),
            total: AtomicU32::new(0),
            place: AtomicU32::new(0),
            cells: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

/// log2 of the cells that a place can name.
const CELL_BITS: u32 = 4;
const CELL_MASK: u32 = (1 << CELL_BITS) - 1;
const _: () = assert!(CELL_BITS + INDEX_BITS <= 32 && CELLS < CELL_MASK as usize);

/// A descriptor's number and one of its cells; in the descriptor itself, the first cell that is not filled. So what the
/// descriptor says before an entry is appended is where the entry goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(pub(super) u32);

impl Place {
    /// Of an entry in the head. No descriptor has such a number or so many cells.
    pub(super) const ALONE: Self = Self(CELL_MASK);

    #[inline(always)]
    pub(super) const fn new(index: u32, cell: usize) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "a few bits")]
        let cell = cell as u32;
        Self(index << CELL_BITS | cell)
    }

    #[inline(always)]
    pub(super) const fn index(self) -> u32 {
        self.0 >> CELL_BITS
    }

    #[inline(always)]
    pub(super) const fn cell(self) -> usize {
        (self.0 & CELL_MASK) as usize
    }

    /// In the same descriptor.
    #[inline(always)]
    pub(super) const fn with_cell(self, cell: usize) -> Self {
        Self::new(self.index(), cell)
    }
}

/// Set in what stands where the first descriptor has the list's length.
const COVERED: u32 = 1 << 31;
/// Numbers of lists are below.
pub(super) const LISTS: u32 = COVERED;
const _: () = assert!((1 << INDEX_BITS) * (CELLS as u64) <= COVERED as u64);

/// A descriptor's flags, for the writer only.
pub(super) mod flag {
    /// The record of the entry in the first cell does not say so: in the only one of a list.
    pub(in super::super) const UNTOLD: u64 = 1;
}

impl Descriptor {
    /// What a descriptor is before the head leads to it: `next`'s flags are clear, and `total` and the cells are right.
    #[inline(always)]
    pub(super) fn begin(&self, next: Option<&Self>, flags: u64, total: u32, place: Place) {
        self.next.store(next.map_or(0, word) | flags, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        self.place.store(place.0, Ordering::Release);
    }

    /// The next descriptor.
    ///
    /// # Safety
    /// This is a descriptor of a reverse map that is there for `'a`.
    #[inline(always)]
    pub(super) unsafe fn next<'a>(&self) -> Option<&'a Self> {
        // SAFETY: 0, or a descriptor's address, which is never freed before the reverse map is.
        unsafe { address(self.next.load(Ordering::Acquire)).as_ref() }
    }

    /// Those behind this have left.
    #[inline]
    pub(super) fn end(&self) {
        self.next.store(self.flags(), Ordering::Release);
    }

    /// For the writer.
    #[inline(always)]
    pub(super) fn flags(&self) -> u64 {
        self.next.load(Ordering::Relaxed) & LOW_BITS
    }

    /// For the writer.
    #[inline(always)]
    pub(super) fn set_flags(&self, flags: u64) {
        self.next.store(self.next.load(Ordering::Relaxed) & !LOW_BITS | flags, Ordering::Release);
    }

    /// The number, and how many cells are filled. Sequentially consistent, as is the load of a head: not before a walker's
    /// announcement. What was removed before that is not seen.
    #[inline(always)]
    pub(super) fn place(&self) -> Place {
        Place(self.place.load(Ordering::SeqCst))
    }

    /// So many cells are filled from now on, and so many entries there are in all.
    #[inline(always)]
    pub(super) fn set_filled(&self, place: Place, total: u32) {
        self.place.store(place.0, Ordering::Release);
        self.total.store(total, Ordering::Release);
    }

    #[inline(always)]
    pub(super) fn set(&self, cell: usize, word: u64) {
        self.cells[cell].store(word, Ordering::Release);
    }

    /// How many entries the list has whose first descriptor this is. For the writer, who knows that it is.
    #[inline(always)]
    pub(super) fn total(&self) -> u32 {
        self.total.load(Ordering::Relaxed)
    }

    /// How many entries the list has; `None` if another descriptor has come in front of this one, or had for a time, which the
    /// head will show.
    #[inline(always)]
    pub(super) fn count(&self) -> Option<usize> {
        let total = self.total.load(Ordering::Acquire);
        if total & COVERED == 0 { Some(total as usize) } else { None }
    }

    /// Another has come in front of this one: the head leads there already, so nobody has to wait who reads this.
    #[inline(always)]
    pub(super) fn cover(&self, list: u32) {
        self.total.store(COVERED | list, Ordering::Release);
    }

    /// This has left a list in which others were in front of it. Those who have come here long ago, to count, still see that.
    #[inline]
    pub(super) fn leave(&self) {
        self.cover(LISTS - 1);
    }

    /// This will be the first again, of so many entries.
    #[inline(always)]
    pub(super) fn uncover(&self, total: u32) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Whether this is in that list, and not the first.
    #[inline(always)]
    pub(super) fn is_covered_in(&self, list: u32) -> bool {
        self.total.load(Ordering::Relaxed) == COVERED | list
    }
}

/// What only the writer needs to know about a descriptor, and rarely.
pub(super) struct Side {
    /// Out of use: the next in its chain.
    link: AtomicU32,
}

// SAFETY: atomics only, and `fresh` has zeroes only.
unsafe impl Object for Side {
    #[cfg(loom)]
    fn fresh() -> Self {
        Self { link: AtomicU32::new(0) }
    }
}

/// All descriptors of a reverse map.
pub(super) struct Descriptors {
    pub(super) all: Arena<Descriptor>,
    pub(super) sides: Arena<Side>,
}

/// Descriptors that are out of use, linked through [`Side::link`].
#[derive(Default)]
pub(super) struct Chain {
    first: u32,
    last: u32,
    len: usize,
}

impl Chain {
    #[inline]
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(super) fn push(&mut self, descriptors: &Descriptors, index: u32) {
        if let Some(side) = descriptors.sides.get(index) {
            side.link.store(self.first, Ordering::Relaxed);
            self.first = index;
            if self.len == 0 {
                self.last = index;
            }
            self.len += 1;
        }
    }

    #[inline]
    pub(super) fn pop(&mut self, descriptors: &Descriptors) -> Option<u32> {
        if self.len == 0 {
            return None;
        }
        let index = self.first;
        self.first = descriptors.sides.get(index)?.link.load(Ordering::Relaxed);
        self.len -= 1;
        Some(index)
    }

    /// Takes over all of `other`.
    pub(super) fn append(&mut self, descriptors: &Descriptors, other: &mut Self) {
        let other = core::mem::take(other);
        if other.len == 0 {
            return;
        }
        if let Some(side) = descriptors.sides.get(other.last) {
            side.link.store(self.first, Ordering::Relaxed);
            self.last = if self.len == 0 { other.last } else { self.last };
            self.first = other.first;
            self.len += other.len;
        }
    }
}
