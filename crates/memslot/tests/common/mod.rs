//! What several test programs share.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test program uses a part of it")]

use std::path::PathBuf;

use proptest::prelude::ProptestConfig;

/// xorshift: the same numbers for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[usize::try_from(self.below(items.len() as u64)).unwrap()]
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// So many random cases for each property, or as many as `PROPTEST_CASES` says; few for Miri.
pub fn cases(default: u32) -> ProptestConfig {
    let default = if cfg!(miri) { 4 } else { default };
    let cases = std::env::var("PROPTEST_CASES").map_or(default, |cases| cases.parse().unwrap());
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// A file of the project's `data/`.
pub fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../data").join(name)
}

/// Says why a test does nothing here, also to whoever collects such lines.
pub fn skipped(why: &str) {
    let line = format!("skipped: {why}");
    println!("{line}");
    if let Some(file) = std::env::var_os("MEMSLOT_SKIPPED_FILE") {
        use std::io::Write;
        if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(file) {
            let _ = writeln!(file, "{line}");
        }
    }
}
