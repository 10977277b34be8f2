//! A dirty bitmap as runs of set bits, which is how it stands in the trace.

use crate::line::digits;

/// The runs of set bits, as first bit and number of bits, in order.
pub(crate) struct Runs<W> {
    word: W,
    bits: u64,
    at: u64,
}

impl<W: FnMut(u64) -> u64> Runs<W> {
    /// Of the first `bits` bits of a bitmap whose 64-bit words `word` gives by their number.
    pub(crate) fn new(bits: u64, word: W) -> Self {
        Runs { word, bits, at: 0 }
    }

    /// The first bit from `at` on that is set (or clear), or the end.
    fn next_that_is(&mut self, set: bool) -> u64 {
        while self.at < self.bits {
            let word = (self.word)(self.at / 64);
            let left = (if set { word } else { !word }) >> (self.at % 64);
            if left != 0 {
                return (self.at + u64::from(left.trailing_zeros())).min(self.bits);
            }
            self.at = (self.at | 63) + 1;
        }
        self.bits
    }
}

impl<W: FnMut(u64) -> u64> Iterator for Runs<W> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        self.at = self.next_that_is(true);
        let first = self.at;
        if first >= self.bits {
            return None;
        }
        self.at = self.next_that_is(false);
        Some((first, self.at - first))
    }
}

/// What a bitmap comes to when it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    /// Set bits.
    pub(crate) set: u64,
    /// Characters that the runs take.
    pub(crate) characters: usize,
}

impl Size {
    pub(crate) fn of(runs: impl Iterator<Item = (u64, u64)>) -> Self {
        runs.fold(Size::default(), |size, (first, count)| Size {
            set: size.set + count,
            characters: size.characters.saturating_add(digits(first) + digits(count) + ",[,]".len()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bits: u64, words: &[u64]) -> Vec<(u64, u64)> {
        Runs::new(bits, |nth| words[usize::try_from(nth).expect("small")]).collect()
    }

    /// Bit by bit, the way nobody can get wrong.
    fn plainly(bits: u64, words: &[u64]) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for bit in
            (0..bits).filter(|bit| words[usize::try_from(bit / 64).expect("small")] >> (bit % 64) & 1 == 1)
        {
            match runs.last_mut() {
                Some(last) if last.0 + last.1 == bit => last.1 += 1,
                _ => runs.push((bit, 1)),
            }
        }
        runs
    }

    #[test]
    fn runs_cross_words_and_end_with_the_bitmap() {
        let all = u64::MAX;
        for (bits, words, expected) in [
            (0, &[][..], &[][..]),
            (64, &[0], &[]),
            (1, &[1], &[(0, 1)]),
            (70, &[all, all], &[(0, 70)]),
            (128, &[1 << 63, 1], &[(63, 2)]),
            (192, &[all, 0, all], &[(0, 64), (128, 64)]),
            (5, &[0b11_0101], &[(0, 1), (2, 1), (4, 1)]),
            (64, &[0b110], &[(1, 2)]),
        ] {
            assert_eq!(runs(bits, words), expected, "{bits} of {words:x?}");
        }
    }

    #[test]
    fn random_bitmaps() {
        for mut random in memslot_testing::programs(2000) {
            let words: Vec<u64> = (0..4)
                .map(|_| match random.below(4) {
                    0 => 0,
                    1 => u64::MAX,
                    2 => random.next() & random.next(),
                    _ => random.next() | random.next(),
                })
                .collect();
            let bits = random.below(257);
            assert_eq!(runs(bits, &words), plainly(bits, &words), "{bits} of {words:x?}");
        }
    }

    #[test]
    fn the_size_is_that_of_the_text() {
        let words = [0xff00_0000_0000_000f, 1, 0];
        let text: String =
            runs(192, &words).iter().map(|(first, count)| format!(",[{first},{count}]")).collect();
        let size = Size::of(runs(192, &words).into_iter());
        assert_eq!(size, Size { set: 13, characters: text.len() });
    }
}
