//! Shadow paging. The walker of the guest's tables: cases computed by hand, and random tables beside a second walker.
#![cfg(not(loom))]
#![allow(missing_docs, unreachable_pub, reason = "a test program")]

mod ahead;
mod collapse;
mod debts;
mod holds;
mod kept;
mod memory;
mod naive;
mod nothing;
mod past_bugs;
mod programs;
mod regressions;
mod slot_set;
mod walk_cases;
mod walk_model;
mod world;
