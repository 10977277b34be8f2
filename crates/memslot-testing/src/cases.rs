//! How many random programs a test tries, and which.
//!
//! Every random test of the workspace asks here, so that all of them answer to the same variables:
//!
//! | variable | what it says |
//! |---|---|
//! | `MEMSLOT_SEED` | where the random numbers begin; 1 if it is not set |
//! | `MEMSLOT_TIMES` | how many times as many cases as usual |
//! | `PROPTEST_CASES` | how many cases, whatever is usual |
//!
//! The seed is fixed unless somebody asks for another one: a test that passes passes again, so one that fails does so
//! because of what was changed. What a fixed seed never tries is found by `cargo xtask deep --only random`, which goes
//! through fresh seeds. A test that fails prints its seed, and the same seed makes the same programs; more cases are the
//! same ones and others behind them.

use std::fmt::Display;
use std::str::FromStr;
use std::thread;

use proptest::test_runner::{Config, RngSeed};

use crate::Random;

/// The number in this variable of the environment, or `default` where it is not set.
///
/// # Panics
/// If it is set to something else: a misspelt number must not pass for a test.
#[must_use]
pub fn number<T: FromStr<Err: Display>>(name: &str, default: T) -> T {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|error| panic!("{name}={text} is not a number: {error}"))
    })
}

/// Where random numbers begin, from `MEMSLOT_SEED`.
#[must_use]
pub fn seed() -> u64 {
    number("MEMSLOT_SEED", 1)
}

/// How many times as much to do as usual, from `MEMSLOT_TIMES`: for tests of threads, which have no cases.
#[must_use]
pub fn times() -> u64 {
    number("MEMSLOT_TIMES", 1)
}

/// How many cases to try where so many are usual; few in Miri, which is some hundred times slower.
#[must_use]
pub fn cases(usual: u32) -> u32 {
    let usual = if cfg!(miri) { usual.min(4) } else { usual };
    number("PROPTEST_CASES", usual.saturating_mul(number("MEMSLOT_TIMES", 1)))
}

/// For a block of properties, with so many cases of each as usual.
///
/// Nothing is written down: an input that failed becomes a test with a name.
#[must_use]
pub fn proptest_config(usual: u32) -> Config {
    let (seed, cases) = (seed(), cases(usual));
    // Shown only if the test fails.
    println!("{cases} random cases; MEMSLOT_SEED={seed}");
    Config { cases, rng_seed: RngSeed::Fixed(seed), failure_persistence: None, ..Config::default() }
}

/// Numbers for so many programs as usual, for a test that makes its own.
#[must_use]
pub fn programs(usual: u32) -> Programs {
    Programs { seed: seed(), next: 0, count: cases(usual) }
}

/// What [`programs`] returns: the numbers of one program after the other.
#[derive(Debug)]
pub struct Programs {
    seed: u64,
    next: u32,
    count: u32,
}

impl Iterator for Programs {
    type Item = Random;

    fn next(&mut self) -> Option<Random> {
        let at = self.next;
        (at < self.count).then(|| {
            self.next += 1;
            // Seeds beside each other have no program in common.
            Random::new(self.seed.rotate_left(32).wrapping_add(u64::from(at)))
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::try_from(self.count - self.next).unwrap_or(usize::MAX);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Programs {}

impl Drop for Programs {
    /// A test that fails in one of the programs says which it was.
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("in random program {} of {}; MEMSLOT_SEED={}", self.next, self.count, self.seed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_numbers(seed: u64) -> Vec<u64> {
        Programs { seed, next: 0, count: 3 }.map(|mut random| random.next()).collect()
    }

    #[test]
    fn the_same_seed_makes_the_same_programs() {
        assert_eq!(first_numbers(7), first_numbers(7));
    }

    #[test]
    fn no_two_programs_are_the_same() {
        let mut all: Vec<_> = [1, 2, u64::MAX, 1 << 40].into_iter().flat_map(first_numbers).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 12);
    }

    #[test]
    fn more_cases_are_the_same_ones_first() {
        let numbers = |count| Programs { seed: 3, next: 0, count }.map(|mut random| random.next());
        assert!(numbers(5).eq(numbers(50).take(5)));
    }
}
