//! The words of the structure: what a head says, and the descriptor that a longer list is made of.

use core::ptr;

use super::arena::{Arena, AtomicU32, Object};
use crate::sync::{AtomicU64, Ordering};

/// How many entries a descriptor has room for. Models run by loom have small ones.
pub(super) const CELLS: usize = if cfg!(loom) { 2 } else { 14 };
/// The bits of an entry's word that must be clear.
pub(super) const TAG_BITS: u64 = 0b111;

/// Set in a head that leads to descriptors.
const MANY: u64 = 1;
/// The low bits of a descriptor's address, which are clear.
const LOW_BITS: u64 = align_of::<Descriptor>() as u64 - 1;
const _: () = assert!(CELLS as u64 <= LOW_BITS && MANY & TAG_BITS == MANY);

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

/// Two cache lines with up to [`CELLS`] entries. What walkers of short lists need is in the first.
#[repr(C, align(128))]
pub(super) struct Descriptor {
    /// The next descriptor's address, and in its low bits how many cells are filled here: see [`Next`].
    next: AtomicU64,
    /// How many entries are behind this descriptor. Does not change while it is in a list.
    pub(super) behind: AtomicU32,
    /// This descriptor's own number.
    pub(super) index: AtomicU32,
    /// The entries' words, filled from the first on.
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
            behind: AtomicU32::new(0),
            index: AtomicU32::new(0),
            cells: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

/// What follows a descriptor, and how many of its cells are filled: read and written as one.
#[derive(Clone, Copy)]
pub(super) struct Next(u64);

impl Next {
    #[inline(always)]
    pub(super) fn new(next: Option<&Descriptor>, filled: usize) -> Self {
        Self(next.map_or(0, word) | filled as u64)
    }

    #[inline(always)]
    pub(super) const fn filled(self) -> usize {
        (self.0 & LOW_BITS) as usize
    }

    #[inline(always)]
    pub(super) const fn with_filled(self, filled: usize) -> Self {
        Self(self.0 & !LOW_BITS | filled as u64)
    }

    /// The next descriptor.
    ///
    /// # Safety
    /// Read from a descriptor of a reverse map that is there for `'a`.
    #[inline(always)]
    pub(super) unsafe fn descriptor<'a>(self) -> Option<&'a Descriptor> {
        // SAFETY: 0, or a descriptor's address, which is never freed before the reverse map is.
        unsafe { address(self.0).as_ref() }
    }
}

impl Descriptor {
    /// Sequentially consistent, as is the load of a head: not before a walker's announcement.
    #[inline(always)]
    pub(super) fn next(&self) -> Next {
        Next(self.next.load(Ordering::SeqCst))
    }

    #[inline(always)]
    pub(super) fn set_next(&self, next: Next) {
        self.next.store(next.0, Ordering::Release);
    }

    #[inline(always)]
    pub(super) fn get(&self, cell: usize) -> u64 {
        self.cells[cell].load(Ordering::Acquire)
    }

    #[inline(always)]
    pub(super) fn set(&self, cell: usize, word: u64) {
        self.cells[cell].store(word, Ordering::Release);
    }

    /// How many entries there are from here on, if this is the first.
    #[inline(always)]
    pub(super) fn count(&self) -> usize {
        self.behind.load(Ordering::Acquire) as usize + self.next().filled()
    }
}

/// What only the writer needs to know about a descriptor.
pub(super) struct Side {
    /// The list that it is part of, or [`NO_LIST`].
    pub(super) owner: AtomicU32,
    /// Out of use: the next in its chain.
    pub(super) link: AtomicU32,
    /// In the first of a list: whose turn it is to be handed back, counted from the last.
    pub(super) turn: AtomicU32,
}

/// The owner of a descriptor that was taken out. (A fresh one has 0, and nothing in its cells.)
pub(super) const NO_LIST: u32 = u32::MAX;

// SAFETY: atomics only, and `fresh` has zeroes only.
unsafe impl Object for Side {
    #[cfg(loom)]
    fn fresh() -> Self {
        Self { owner: AtomicU32::new(0), link: AtomicU32::new(0), turn: AtomicU32::new(0) }
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
