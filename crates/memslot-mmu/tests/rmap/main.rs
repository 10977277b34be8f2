//! The reverse map: random programs beside a naive model, bugs that such maps have had, and walks beside a writer.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::cast_possible_truncation, reason = "test data is small")]

mod common;
mod model;
mod past_bugs;
mod space;
mod stress;
