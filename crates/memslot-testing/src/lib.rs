//! What tests of several crates need: an allocator that [fails](failing()) when it is told to, [numbers](Random) that are the
//! same for the same seed, [which and how many](cases()) random programs to try, and a [line](skipped()) that says why a test did
//! nothing.

mod cases;
mod random;
mod shortage;
mod skipped;

pub use cases::{Programs, cases, number, programs, proptest_config, seed, times};
pub use random::Random;
pub use shortage::{ALLOWED, Failing, Shortage, bytes, failing, short};
pub use skipped::skipped;
