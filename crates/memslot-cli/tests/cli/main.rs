//! The program, run as its users run it.

mod common;
mod input;
mod pictures;
mod replay;
