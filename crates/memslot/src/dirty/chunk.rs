//! A chunk: the bits of 32768 neighbouring pages, and which of its words have any.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;

use crate::error::OutOfMemory;
use crate::prefetch::prefetch;
use crate::sync::{AtomicPtr, AtomicU64, Ordering, fence_for_loom};

/// Words of 64 pages in a chunk. A model checker looks at every one of them, so it gets a smaller chunk.
pub(super) const WORDS: usize = if cfg!(loom) { 2 } else { 512 };
/// Pages in a chunk: 32768, which is 128 MiB of pages of 4 KiB.
pub(super) const PAGES: u64 = 64 * WORDS as u64;
/// Words of a chunk's summary.
pub(super) const SUMMARY: usize = WORDS.div_ceil(64);

/// Bits of pages. Bit `i` of word `w` is page `64 * w + i`, as in KVM's bitmaps.
#[repr(C, align(64))]
pub(super) struct Chunk {
    /// A bit for every word: whether it may have bits. Set after the word, cleared before it.
    summary: [AtomicU64; SUMMARY],
    words: [AtomicU64; WORDS],
    /// Links the chunks of a place that are not in use.
    pub(super) next: AtomicPtr<Chunk>,
}

impl Chunk {
    fn new() -> Self {
        Self {
            summary: core::array::from_fn(|_| AtomicU64::new(0)),
            words: core::array::from_fn(|_| AtomicU64::new(0)),
            next: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    /// A chunk without bits. It is the caller's to free.
    pub(super) fn alloc() -> Result<NonNull<Self>, OutOfMemory> {
        Ok(NonNull::from(Box::leak(try_box(Self::new())?)))
    }

    /// Sets bits of a word, for everybody to see. With `leave` they are left alone where they are set: see `fence.rs`.
    #[inline]
    pub(super) fn mark(&self, word: usize, bits: u64, leave: bool) {
        if !(leave && self.has(word, bits)) {
            // Nothing is loaded beside an atomic exchange: so before it, what is looked at after it.
            prefetch(NonNull::from(&self.summary).cast(), 0..1);
            self.words[word].fetch_or(bits, Ordering::SeqCst);
        }
        fence_for_loom();
        self.announce(word / 64, 1 << (word % 64));
    }

    #[inline]
    fn has(&self, word: usize, bits: u64) -> bool {
        !self.words[word].load(Ordering::SeqCst) & bits == 0
    }

    #[inline]
    fn announce(&self, at: usize, words: u64) {
        if self.summary[at].load(Ordering::SeqCst) & words != words {
            self.summary[at].fetch_or(words, Ordering::SeqCst);
        }
    }

    /// Sets the bits of the pages `[from, to)`, a word at a time. A word is written also where all its bits are set
    /// already: so whoever takes them later sees what the caller wrote before. With `leave` that is seen to: see
    /// `fence.rs`.
    pub(super) fn mark_range(&self, from: u64, to: u64, leave: bool) {
        let set = |word: usize, bits| {
            if !(leave && self.has(word, bits)) {
                self.words[word].fetch_or(bits, Ordering::SeqCst);
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "up to WORDS")]
        let (first, end) = ((from.div_ceil(64)) as usize, (to / 64) as usize);
        if first <= end {
            // The whole words, and what is left at both edges.
            (first..end).for_each(|word| set(word, u64::MAX));
            for (word, bits) in words_of(from, 64 * first as u64).chain(words_of(64 * end as u64, to)) {
                set(word, bits);
            }
        } else {
            for (word, bits) in words_of(from, to) {
                set(word, bits);
            }
        }
        fence_for_loom();
        for (at, words) in words_of(from / 64, to.div_ceil(64)) {
            self.announce(at, words);
        }
    }

    /// Takes bits of a word away from everybody; returns those that were set.
    pub(super) fn take(&self, word: usize, bits: u64) -> u64 {
        if self.words[word].load(Ordering::SeqCst) & bits == 0 {
            return 0;
        }
        self.words[word].fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// The bits of a word.
    #[inline]
    pub(super) fn word(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    /// A bit for each of 64 words: whether it may have bits.
    #[inline]
    pub(super) fn summary(&self, group: usize) -> u64 {
        self.summary[group].load(Ordering::Acquire)
    }

    /// Whether no word may have bits.
    pub(super) fn is_clean(&self) -> bool {
        self.summary.iter().all(|words| words.load(Ordering::SeqCst) == 0)
    }

    /// The first word at `from` or behind it that may have bits.
    #[inline]
    pub(super) fn next_word(&self, from: usize) -> Option<usize> {
        let mut at = from / 64;
        let mut words = self.summary.get(at)?.load(Ordering::Acquire) & (u64::MAX << (from % 64));
        while words == 0 {
            at += 1;
            words = self.summary.get(at)?.load(Ordering::Acquire);
        }
        Some(64 * at + words.trailing_zeros() as usize)
    }

    /// The first word at `from` or behind it, before `to`, that is not all ones; `to` where there is none.
    #[inline]
    pub(super) fn skip_full(&self, from: usize, to: usize) -> usize {
        let mut words = self.words[from..to].chunks_exact(8);
        let mut at = from;
        for eight in &mut words {
            if eight.iter().fold(u64::MAX, |all, word| all & word.load(Ordering::Acquire)) != u64::MAX {
                break;
            }
            at += 8;
        }
        while at < to && self.word(at) == u64::MAX {
            at += 1;
        }
        at
    }

    /// Adds bits to a chunk that is not shared at the moment.
    pub(super) fn add(&self, word: usize, bits: u64) {
        self.words[word].store(self.word(word) | bits, Ordering::Release);
        let summary = &self.summary[word / 64];
        summary.store(summary.load(Ordering::Relaxed) | 1 << (word % 64), Ordering::Release);
    }

    /// Removes bits from a chunk that is not shared at the moment; returns those that were set.
    pub(super) fn remove(&self, word: usize, bits: u64) -> u64 {
        let old = self.word(word);
        if old & bits != 0 {
            self.words[word].store(old & !bits, Ordering::Release);
        }
        old & bits
    }

    /// Adds all bits of another chunk; neither is shared at the moment.
    pub(super) fn add_all(&self, other: &Self) {
        let mut at = 0;
        while let Some(word) = other.next_word(at) {
            self.add(word, other.word(word));
            at = word + 1;
        }
    }

    /// Sets every bit of a chunk that is not shared.
    pub(super) fn fill(&self) {
        for word in 0..WORDS {
            self.add(word, u64::MAX);
        }
    }

    /// Clears every bit of a chunk that is not shared at the moment.
    pub(super) fn clear(&self) {
        for (at, summary) in self.summary.iter().enumerate() {
            let mut words = summary.load(Ordering::Relaxed);
            if words.count_ones() > 16 {
                self.words[64 * at..(64 * at + 64).min(WORDS)]
                    .iter()
                    .for_each(|word| word.store(0, Ordering::Relaxed));
            } else {
                while words != 0 {
                    self.words[64 * at + words.trailing_zeros() as usize].store(0, Ordering::Relaxed);
                    words &= words - 1;
                }
            }
            summary.store(0, Ordering::Relaxed);
        }
    }
}

/// The words that the bits `[from, to)` lie in, each with those bits.
pub(super) fn words_of(from: u64, to: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut at = from;
    core::iter::from_fn(move || {
        if at >= to {
            return None;
        }
        let start = at & !63;
        let end = (start + 64).min(to);
        let bits = u64::MAX << (at - start) & u64::MAX >> (start + 64 - end);
        at = end;
        usize::try_from(start / 64).ok().map(|word| (word, bits))
    })
}

/// `Box::new` that can fail.
pub(super) fn try_box<T>(value: T) -> Result<Box<T>, OutOfMemory> {
    let mut one = Vec::new();
    one.try_reserve_exact(1).map_err(|_| OutOfMemory)?;
    one.push(value);
    let one: Box<[T; 1]> = one.try_into().map_err(|_| OutOfMemory)?;
    // SAFETY: an array of one `T` has the layout of a `T`.
    Ok(unsafe { Box::from_raw(Box::into_raw(one).cast()) })
}
