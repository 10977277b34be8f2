//! memslot's own chores, run as `cargo xtask COMMAND`.
//!
//! One file per command. Each command is a list of steps; [`run`] runs them all, even after one has failed, so that a
//! person sees everything that is wrong in one go, and [`counts`] turns what the test runners print into the last line.
//! No shell is involved: a step is a program, its arguments and its environment, and its heading can be pasted.

#![forbid(unsafe_code)]

mod bench;
mod ci;
mod counts;
mod deep;
mod linux;
mod oldest;
mod run;
mod setup;
mod step;
mod summary;
mod test;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The chores of the memslot workspace: tests, slow proofs, benchmarks, and what CI runs.
///
/// Every command prints a heading for each step with the exact command line it runs, goes on after a failure, and ends
/// with the plain line `N passed, N failed, N skipped`. The exit status is 0 only if nothing failed.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    arg_required_else_help = true,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Test(test::Args),
    Deep(deep::Args),
    Bench(bench::Args),
    Linux(linux::Args),
    Ci(ci::Args),
    Setup(setup::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Test(args) => test::run(&args),
        Command::Deep(args) => deep::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Linux(args) => linux::run(&args),
        Command::Ci(args) => ci::run(&args),
        Command::Setup(args) => setup::run(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}
