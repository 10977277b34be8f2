//! The words of the structure: what a head says, and the descriptor that a longer list is made of.

use super::arena::{Arena, AtomicU32, INDEX_BITS, Object};
use crate::sync::{AtomicU64, Ordering};

/// How many entries a descriptor has room for. Models run by loom have small ones.
pub(super) const CELLS: usize = if cfg!(loom) { 2 } else { 14 };
/// The mask of a descriptor without a hole.
pub(super) const FULL: u32 = (1 << CELLS) - 1;
/// The bits of an entry's word that must be clear.
pub(super) const TAG_BITS: u64 = 0b111;

/// Set in a head that leads to descriptors: `count << 32 | index << 3 | MANY`.
const MANY: u64 = 1;
const INDEX_SHIFT: u32 = 3;
const COUNT_SHIFT: u32 = 32;
const _: () = assert!(INDEX_SHIFT + INDEX_BITS <= COUNT_SHIFT);

/// What the one word of a list says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    Empty,
    /// The one entry, as it is.
    One(u64),
    /// So many entries, in the descriptors from this one on.
    Many {
        first: u32,
        count: u32,
    },
}

impl Head {
    #[inline(always)]
    pub(super) const fn new(word: u64) -> Self {
        if word == 0 {
            Self::Empty
        } else if word & MANY == 0 {
            Self::One(word)
        } else {
            #[expect(clippy::cast_possible_truncation, reason = "the halves of the word")]
            let (first, count) =
                ((word as u32) >> INDEX_SHIFT & ((1 << INDEX_BITS) - 1), (word >> COUNT_SHIFT) as u32);
            Self::Many { first, count }
        }
    }

    #[inline(always)]
    pub(super) const fn word(self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::One(word) => word,
            Self::Many { first, count } => {
                (count as u64) << COUNT_SHIFT | (first as u64) << INDEX_SHIFT | MANY
            }
        }
    }

    #[inline(always)]
    pub(super) const fn count(self) -> u32 {
        match self {
            Self::Empty => 0,
            Self::One(_) => 1,
            Self::Many { count, .. } => count,
        }
    }
}

/// The owner of a descriptor that was taken out: its cells stay filled, for walkers. (Fresh ones have no cell filled.)
pub(super) const NO_LIST: u32 = u32::MAX;

/// Two cache lines with up to [`CELLS`] entries. The numbers of other descriptors are 0 for none.
#[repr(C, align(128))]
pub(super) struct Descriptor {
    /// The next descriptor of the list. Stays as it is when this one is taken out, for walkers that are in it.
    pub(super) next: AtomicU32,
    /// Which cells hold entries. A cell without its bit is a hole, whatever it holds.
    pub(super) mask: AtomicU32,
    /// The list that this descriptor is part of, or [`NO_LIST`]. For the writer, who follows records that may be out of date.
    pub(super) owner: AtomicU32,
    /// In the first descriptor: the first of the others that have holes. In these: the next such.
    pub(super) holes: AtomicU32,
    /// The entries' words.
    pub(super) cells: [AtomicU64; CELLS],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Descriptor>() == 128);

// SAFETY: atomics only, and `fresh` has zeroes only.
unsafe impl Object for Descriptor {
    #[cfg(loom)]
    fn fresh() -> Self {
        Self {
            next: AtomicU32::new(0),
            mask: AtomicU32::new(0),
            owner: AtomicU32::new(0),
            holes: AtomicU32::new(0),
            cells: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Descriptor {
    /// The cell's entry; `None` for a hole. For the writer.
    #[inline]
    pub(super) fn entry(&self, cell: usize) -> Option<u64> {
        let filled = self.mask.load(Ordering::Relaxed) >> cell & 1 == 1;
        if filled { Some(self.cells.get(cell)?.load(Ordering::Relaxed)) } else { None }
    }
}

/// What only the writer needs to know about a descriptor of a longer list.
pub(super) struct Links {
    /// The descriptor before this one; in the first one: the last. Out of use: the next that is out of use.
    pub(super) before: AtomicU32,
    /// The descriptor whose `holes` leads here.
    pub(super) holes_before: AtomicU32,
    /// When it was taken into the list, or filled again after it was empty: the larger, the younger.
    pub(super) born: AtomicU32,
}

// SAFETY: atomics only, and `fresh` has zeroes only.
unsafe impl Object for Links {
    #[cfg(loom)]
    fn fresh() -> Self {
        Self { before: AtomicU32::new(0), holes_before: AtomicU32::new(0), born: AtomicU32::new(0) }
    }
}

/// All descriptors of a reverse map.
pub(super) struct Descriptors {
    pub(super) all: Arena<Descriptor>,
    pub(super) links: Arena<Links>,
}

/// Descriptors that are out of use, linked through [`Links::before`].
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
        if let Some(links) = descriptors.links.get(index) {
            links.before.store(self.first, Ordering::Relaxed);
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
        self.first = descriptors.links.get(index)?.before.load(Ordering::Relaxed);
        self.len -= 1;
        Some(index)
    }

    /// Takes over all of `other`.
    pub(super) fn append(&mut self, descriptors: &Descriptors, other: &mut Self) {
        let other = core::mem::take(other);
        if other.len == 0 {
            return;
        }
        if let Some(links) = descriptors.links.get(other.last) {
            links.before.store(self.first, Ordering::Relaxed);
            self.last = if self.len == 0 { other.last } else { self.last };
            self.first = other.first;
            self.len += other.len;
        }
    }
}
