//! Shadow paging under arbitrary programs: page table entries, flushes, slots, the dirty log, moving memory.
//!
//! The guest, the processors and the checker are those of the tests of `memslot-mmu`.
#![no_main]
#![allow(dead_code, missing_docs, unreachable_pub, reason = "the tests use more of it")]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/memslot-mmu/tests/shadow/naive.rs"]
mod naive;
#[path = "../../crates/memslot-mmu/tests/shadow/world/mod.rs"]
mod world;

fuzz_target!(|bytes: &[u8]| world::run::run_bytes(bytes, 100));
