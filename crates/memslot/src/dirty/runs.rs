//! From bits to runs of pages.

use super::bitmap::word_of;
use super::chunk::{PAGES, SUMMARY, WORDS};
use super::place::Held;

/// The runs `[first, end)` of set bits among the gfns `[from, to)`, in order and as long as can be: a run goes on
/// across words and chunks.
#[derive(Clone)]
pub(super) struct Runs<'a> {
    /// Those behind the current one; sorted by number, each number once.
    chunks: &'a [(u64, Held)],
    held: Held,
    /// The current chunk's first page.
    start: u64,
    /// Which word of the chunk's summary is being read, and those of its bits that have not been.
    group: usize,
    words: u64,
    /// The word looked at last: its first page, and those of its bits that are not part of a run yet.
    word: u64,
    bits: u64,
    from: u64,
    to: u64,
}

impl<'a> Runs<'a> {
    pub(super) fn new(chunks: &'a [(u64, Held)], from: u64, to: u64) -> Self {
        let skipped = chunks.partition_point(|&(number, _)| number < from / PAGES);
        let chunks = &chunks[skipped..];
        let mut runs =
            Self { chunks, held: Held::Full, start: 0, group: SUMMARY, words: 0, word: 0, bits: 0, from, to };
        if chunks.first().is_some_and(|&(number, _)| number == from / PAGES) {
            runs.enter(word_of(from));
        }
        runs
    }

    /// Goes to the next chunk, to its word `first`.
    fn enter(&mut self, first: usize) -> Option<()> {
        let (&(number, held), rest) = self.chunks.split_first()?;
        (self.chunks, self.held, self.start) = (rest, held, number * PAGES);
        self.group = first / 64;
        self.words = held.summary(self.group) & (u64::MAX << (first % 64));
        Some(())
    }

    /// Goes to the next word that has bits.
    #[inline]
    fn find_word(&mut self) -> Option<()> {
        loop {
            while self.words == 0 {
                self.group += 1;
                if self.group < SUMMARY {
                    self.words = self.held.summary(self.group);
                } else {
                    self.enter(0)?;
                }
            }
            let word = 64 * self.group + self.words.trailing_zeros() as usize;
            self.words &= self.words - 1;
            self.word = self.start + 64 * word as u64;
            if self.word >= self.to {
                self.finish();
                return None;
            }
            self.bits = self.held.word(word);
            if self.word < self.from {
                self.bits &= u64::MAX << (self.from - self.word);
            }
            if self.bits != 0 {
                return Some(());
            }
        }
    }

    /// The end of a run that reaches up to `next`, the start of a word.
    fn extend(&mut self, mut next: u64) -> u64 {
        while next < self.to {
            if next == self.start + PAGES {
                // What is left of the summary is of words that the run has covered.
                (self.words, self.group) = (0, SUMMARY);
                if self.chunks.first().is_none_or(|&(number, _)| number * PAGES != next) {
                    break;
                }
                self.enter(0);
            }
            let word = self.held.skip_full(word_of(next));
            next = self.start + 64 * word as u64;
            if word < WORDS {
                self.group = word / 64;
                self.words = self.held.summary(self.group) & (u64::MAX << (word % 64)) << 1;
                self.word = next;
                self.bits = self.held.word(word);
                let ones = self.bits.trailing_ones();
                if ones < 64 {
                    self.bits &= u64::MAX << ones;
                    return next + u64::from(ones);
                }
                // It became full just now.
                self.bits = 0;
                next += 64;
            }
        }
        if next >= self.to {
            self.finish();
        }
        next
    }

    /// Nothing is left.
    fn finish(&mut self) {
        (self.chunks, self.group, self.words, self.bits) = (&[], SUMMARY, 0, 0);
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
            self.finish();
            return None;
        }
        let end = if end < 64 {
            self.bits &= u64::MAX << end;
            self.word + u64::from(end)
        } else {
            self.bits = 0;
            self.extend(self.word + 64)
        };
        Some((first, end.min(self.to)))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use alloc::vec::Vec;
    use core::ptr::NonNull;

    use proptest::prelude::*;

    use super::super::chunk::Chunk;
    use super::*;

    /// What a chunk has: nothing, everything, or words.
    #[derive(Clone, Debug)]
    enum Content {
        Nothing,
        Full,
        Words(Vec<(usize, u64)>),
    }

    fn content() -> impl Strategy<Value = Content> {
        let word = prop_oneof![3 => Just(u64::MAX), 1 => any::<u64>(), 1 => Just(1), 1 => Just(1 << 63), 1 => Just(0)];
        let place = prop_oneof![Just(0), Just(WORDS - 1), 60usize..70, 0..WORDS];
        prop_oneof![
            1 => Just(Content::Nothing),
            1 => Just(Content::Full),
            1 => Just(Content::Words((0..WORDS).map(|word| (word, u64::MAX)).collect())),
            3 => proptest::collection::vec((place, word), 0..12).prop_map(Content::Words),
        ]
    }

    proptest! {
        #![proptest_config(memslot_testing::proptest_config(200))]

        #[test]
        fn runs_are_the_set_bits(
            contents in proptest::collection::vec(content(), 1..5),
            (from, len) in (0u64..5 * PAGES, prop_oneof![0u64..200, 0u64..5 * PAGES]),
        ) {
            let mut chunks: Vec<(u64, Held)> = Vec::new();
            let mut bits = alloc::vec![false; 6 * usize::try_from(PAGES).unwrap()];
            for (number, content) in (0u64..).zip(&contents) {
                let first = usize::try_from(number * PAGES).unwrap();
                match content {
                    Content::Nothing => {}
                    Content::Full => {
                        chunks.push((number, Held::Full));
                        bits[first..first + 64 * WORDS].fill(true);
                    }
                    Content::Words(words) => {
                        let chunk: NonNull<Chunk> = Chunk::alloc().unwrap();
                        let held = Held::Bits(chunk);
                        for &(word, value) in words {
                            held.chunk().unwrap().add(word, value);
                            (0..64).filter(|bit| value >> bit & 1 != 0).for_each(|bit| bits[first + 64 * word + bit] = true);
                        }
                        chunks.push((number, held));
                    }
                }
            }
            let to = from + len;
            let mut wanted: Vec<(u64, u64)> = Vec::new();
            for gfn in from..to.min(6 * PAGES) {
                if bits[usize::try_from(gfn).unwrap()] {
                    match wanted.last_mut() {
                        Some(last) if last.1 == gfn => last.1 += 1,
                        _ => wanted.push((gfn, gfn + 1)),
                    }
                }
            }
            let got: Vec<_> = Runs::new(&chunks, from, to).collect();
            for (_, held) in chunks {
                if let Held::Bits(chunk) = held {
                    // SAFETY: it was made above, and nobody else has it.
                    drop(unsafe { alloc::boxed::Box::from_raw(chunk.as_ptr()) });
                }
            }
            prop_assert_eq!(got, wanted);
        }
    }
}
