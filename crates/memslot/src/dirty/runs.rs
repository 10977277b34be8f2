//! From bits to runs of pages.

use super::bitmap::word_of;
use super::chunk::{PAGES, WORDS};
use super::place::Held;

/// The runs `[first, end)` of set bits among the gfns `[from, to)`, in order and as long as can be: a run goes on
/// across words and chunks.
#[derive(Clone)]
pub(super) struct Runs<'a> {
    /// Sorted by number, each number once. The first is being read.
    chunks: &'a [(u64, Held)],
    /// The first page of the next word to look at.
    next: u64,
    /// The word looked at last: its first page, and those of its bits that are not part of a run yet.
    word: u64,
    bits: u64,
    from: u64,
    to: u64,
}

impl<'a> Runs<'a> {
    pub(super) fn new(chunks: &'a [(u64, Held)], from: u64, to: u64) -> Self {
        let skipped = chunks.partition_point(|&(number, _)| number < from / PAGES);
        Self { chunks: &chunks[skipped..], next: from & !63, word: 0, bits: 0, from, to }
    }

    /// Goes to the next word that has bits.
    #[inline]
    fn find_word(&mut self) -> Option<()> {
        loop {
            let (number, held) = self.chunks.first()?;
            let start = number * PAGES;
            let first = if start >= self.next { 0 } else { word_of(self.next) };
            let passed = start + PAGES <= self.next;
            let Some(word) = held.next_word(first).filter(|_| !passed) else {
                self.chunks = &self.chunks[1..];
                continue;
            };
            self.word = start + 64 * word as u64;
            self.next = self.word + 64;
            if self.word >= self.to {
                self.chunks = &[];
                return None;
            }
            self.bits = held.word(word);
            if self.word < self.from {
                self.bits &= u64::MAX << (self.from - self.word);
            }
            if self.bits != 0 {
                return Some(());
            }
        }
    }

    /// The end of a run that reaches up to `next`.
    fn extend(&mut self) -> u64 {
        while let Some((number, held)) = self.chunks.first() {
            let start = number * PAGES;
            if start + PAGES <= self.next {
                self.chunks = &self.chunks[1..];
                continue;
            }
            if start > self.next || self.next >= self.to {
                break;
            }
            let word = held.skip_full(word_of(self.next));
            self.next = start + 64 * word as u64;
            if word < WORDS {
                self.bits = held.word(word);
                let ones = self.bits.trailing_ones();
                self.word = self.next;
                self.next += 64;
                if ones < 64 {
                    self.bits &= u64::MAX << ones;
                    return self.word + u64::from(ones);
                }
                // It became full just now.
                self.bits = 0;
            }
        }
        self.next
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        if self.bits == 0 {
            self.find_word()?;
        }
        let start = self.bits.trailing_zeros();
        let end = start + (self.bits >> start).trailing_ones();
        let first = self.word + u64::from(start);
        if first >= self.to {
            (self.bits, self.chunks) = (0, &[]);
            return None;
        }
        let end = if end < 64 {
            self.bits &= u64::MAX << end;
            self.word + u64::from(end)
        } else {
            self.bits = 0;
            self.extend()
        };
        Some((first, end.min(self.to)))
    }
}
