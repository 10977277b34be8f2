//! Second-stage page tables driven by memory slots.
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

pub mod format;
pub mod host;
mod level;
mod sync;
pub mod user;
pub mod nested {
    //! placeholder
}
pub use level::{ENTRIES, Level, PAGE_SHIFT, Table};
