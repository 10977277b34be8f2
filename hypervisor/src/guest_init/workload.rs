//! What the guest does to its memory: every word that is written is a function of who wrote it, when and where, and is checked.

use crate::system::{self, print};

const WRITERS: usize = 4;
const WORDS: usize = 512;

/// A word's value.
fn value(seed: u64, at: usize) -> u64 {
    (seed << 48 ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(memory: &mut [u64], seed: u64) {
    for (at, word) in memory.iter_mut().enumerate() {
        *word = value(seed, at);
    }
}

/// How many pages have a wrong word.
fn check(memory: &[u64], seed: u64) -> usize {
    let pages = memory.chunks(WORDS).enumerate();
    pages
        .filter(|(page, words)| {
            words.iter().enumerate().any(|(at, &word)| word != value(seed, page * WORDS + at))
        })
        .count()
}

/// Writes and checks `rounds` times; whether all was right.
fn writer(number: usize, bytes: usize, rounds: u64) -> bool {
    // Half of them with large pages of the guest's own.
    let Some(memory) = system::map(bytes, number % 2 == 0) else { return false };
    let mut wrong = 0;
    for round in 0..rounds {
        let seed = number as u64 + 16 * (round + 1);
        fill(memory, seed);
        wrong += check(memory, seed);
        // Again in another order, as a process does that looks at its memory later.
        let (low, high) = memory.split_at(memory.len() / 2 / WORDS * WORDS);
        let is_high_wrong = high
            .iter()
            .enumerate()
            .rev()
            .step_by(WORDS)
            .any(|(at, &word)| word != value(seed, low.len() + at));
        wrong += usize::from(is_high_wrong) + check(low, seed);
    }
    if wrong > 0 {
        print!("memslot-init: writer {number} found {wrong} wrong pages\n");
    }
    system::unmap(memory);
    wrong == 0
}

/// A process shares its memory with children that write to their halves of it: nobody sees what another writes.
fn copy_on_write(bytes: usize) -> bool {
    let Some(memory) = system::map(bytes, false) else { return false };
    fill(memory, 1);
    let half = memory.len() / 2 / WORDS * WORDS;
    for child in 0..2 {
        let forked = system::fork(|| {
            let own = if child == 0 { &mut memory[..half] } else { &mut memory[half..] };
            fill(own, 2 + child);
            check(own, 2 + child) == 0
        });
        if !forked {
            return false;
        }
    }
    let children = system::wait() & system::wait();
    children && check(memory, 1) == 0
}

/// Everything, and something else while the writers run. Returns the number of errors.
pub(crate) fn run(rounds: u64, percent: u64, meanwhile: impl FnOnce() -> u64) -> u64 {
    let free = system::free_memory();
    let bytes = (free / 100 * usize::try_from(percent).unwrap_or(0) / WRITERS) & !0xfff;
    let mut wrong = 0;
    let pages = bytes / 4096 * WRITERS;
    print!("memslot-init: {WRITERS} writers, {pages} pages, {rounds} rounds\n");
    let started = (0..WRITERS).filter(|&number| system::fork(|| writer(number, bytes, rounds))).count();
    wrong += (WRITERS - started) as u64;
    wrong += meanwhile();
    for _ in 0..started {
        wrong += u64::from(!system::wait());
    }
    wrong + u64::from(!copy_on_write(16 << 20))
}
