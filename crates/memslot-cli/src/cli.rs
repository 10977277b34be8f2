//! The command line: what can be asked, and the help that teaches it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

const AFTER: &str = "\
Exit status:
  0  everything was read, and every answer agrees
  1  the engine and a recorded answer disagree
  2  something could not be read, or the command line is wrong

How to record a trace of your VMM:
  strace -f -ttt -T -e trace=ioctl -o vmm.strace YOUR-VMM ...

Examples:
  memslot replay vmm.strace                 check it, show map and warnings
  memslot replay --svg map.svg vmm.strace   draw the map over time
  memslot map --at 120 vmm.strace           the map as it was after line 120
  memslot replay --json a.jsonl b.jsonl | jq '.[].disagreements'
";

const REPLAY: &str = "\
Applies every KVM_SET_USER_MEMORY_REGION (and REGION2) of a trace to a memory-slot table under KVM's own rules, \
without KVM, and holds each result against the recorded one.

Printed are the ioctls and their numbers, the memory map with its holes, the largest number of slots alive, \
warnings, answers that cannot be judged (they depend on more than the map, such as ENOMEM), and disagreements.

Warnings are about maps that KVM accepts in silence:
  huge pages impossible  gpa and hva differ modulo 2 MiB
  alias                  two slots on the same host memory
  mergeable              neighbours that could be one slot
  churn                  the same range deleted and created again and again";

/// Replays, checks and draws what a VMM does to its guest's memory.
///
/// A VMM tells KVM which host memory backs which guest memory, one slot at a time. memslot reads a recording of
/// these calls and shows what they built: it needs neither KVM nor the VMM.
#[derive(Debug, Parser)]
#[command(name = "memslot", version, after_help = AFTER, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Apply a trace to the slot engine, compare every answer, report the map and what is odd about it
    #[command(long_about = REPLAY, after_help = AFTER)]
    Replay(ReplayArgs),
    /// Draw the guest's address space in the terminal, to scale, holes compressed
    ///
    /// Every block of rows has one scale: a cell stands for the number of bytes written at its right. Large holes
    /// are one line. A slot is drawn [id size], filled by its kind. The width is that of the terminal, or COLUMNS,
    /// or 80; colours only on a terminal and not with NO_COLOR.
    #[command(after_help = AFTER)]
    Map(MapArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    #[command(flatten)]
    pub(crate) input: Input,
    /// Draw the memory map over time into this file (one trace only)
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct MapArgs {
    #[command(flatten)]
    pub(crate) input: Input,
}

#[derive(Debug, Args)]
pub(crate) struct Input {
    /// Traces: JSON lines or strace's output, told apart by content; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Stop after this line of the trace (one trace only)
    #[arg(long, value_name = "LINE", value_parser = line_number)]
    pub(crate) at: Option<u64>,
    /// Print one JSON document instead: an object for one trace, an array for several
    #[arg(long)]
    pub(crate) json: bool,
}

fn line_number(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(0) => Err("lines count from 1".to_owned()),
        Ok(line) => Ok(line),
        Err(_) => Err("not a line number".to_owned()),
    }
}
