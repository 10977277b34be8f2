//! What several test programs share.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test program uses a part of it")]

use std::path::PathBuf;

use proptest::prelude::ProptestConfig;

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
