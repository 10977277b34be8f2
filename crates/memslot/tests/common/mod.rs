//! What several test programs share.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test program uses a part of it")]

use std::path::PathBuf;

/// A file of the project's `data/`.
pub fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../data").join(name)
}
