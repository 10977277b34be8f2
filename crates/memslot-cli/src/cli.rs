//! The command line: what can be asked, and the help that teaches it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::dirty::migration::Link;

macro_rules! exit_status {
    () => {
        "\
Exit status:
  0  everything was read, and every answer agrees
  1  the engine and a recorded answer disagree
  2  something could not be read, or the command line is wrong
"
    };
}

const AFTER: &str = concat!(
    exit_status!(),
    "  (record: that of the VMM)

How to record a trace of your VMM:
  memslot record --output vmm.jsonl -- YOUR-VMM ...
  strace -f -v -ttt -T -e trace=ioctl -o vmm.strace YOUR-VMM ...   (if it is a static program)

Examples:
  memslot replay vmm.jsonl                      check it, show map and warnings
  memslot replay --svg map.svg vmm.jsonl        draw the map over time
  memslot map --at 120 vmm.jsonl                the map as it was after line 120
  memslot dirty --bandwidth 10Gbit/s vmm.jsonl  what is written, and how it would migrate
"
);

const AFTER_REPLAY: &str = concat!(
    exit_status!(),
    "
Examples:
  memslot replay vmm.jsonl                  check it, show map and warnings
  memslot replay --svg map.svg vmm.strace   draw the map over time
  memslot replay --json a.jsonl b.jsonl | jq '.[].disagreements'
"
);

const AFTER_MAP: &str = concat!(
    exit_status!(),
    "
Examples:
  memslot map vmm.jsonl            the map as it was at the end
  memslot map --at 120 vmm.jsonl   the map as it was after line 120
"
);

const AFTER_DIRTY: &str = concat!(
    exit_status!(),
    "
Examples:
  memslot dirty --bandwidth 10Gbit/s vmm.jsonl   would it migrate over such a link?
  memslot dirty --svg dirty.svg vmm.jsonl        draw which pages were written when
"
);

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

const DIRTY: &str = "\
Reads the KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG calls of a trace. One GET of a slot is a round; what the guest wrote \
in it is what was reported and had not been dirty already.

For each slot: rounds, pages written, the rate, and the working set (different pages written since the first round).

The estimate is of a pre-copy migration: the first round sends all memory, each later one what was written during the \
one before, until the rest fits into the downtime. Writes come at the measured rate and stay in the measured working \
set. A guest that writes faster than the link sends never gets there; then the bandwidth or the downtime that would do \
is named.";

const RECORD: &str = "\
Runs COMMAND with a library in it (LD_PRELOAD) that writes down each KVM ioctl about guest memory, with its result, time, thread \
and dirty bitmap, in a file that `memslot replay`, `map` and `dirty` read. Processes that COMMAND starts are followed.

COMMAND has the terminal, standard input and output and the signals as if it ran by itself. What was recorded is said at \
the end, on standard error. If the disk runs full the recording ends, and COMMAND goes on.

A static program cannot be recorded from inside: it is refused, with the strace command line that does it from outside. So is a \
program that runs with more privileges than its caller.

The library is libmemslot_preload.so; it is looked for next to this program, and in ../lib/memslot and ../lib.";

const AFTER_RECORD: &str = "\
Exit status:
  that of COMMAND; 128 + N if signal N ended it
  2    the command line is wrong
  125  the recording could not begin: the output exists, the library is missing, ...
  126  COMMAND cannot be run, or cannot be recorded from inside
  127  COMMAND was not found

Examples:
  memslot record --output boot.jsonl -- qemu-system-x86_64 -accel kvm -m 256M -display none
  memslot replay boot.jsonl
  memslot record --force -o boot.jsonl ./start-my-vm.sh
";

/// Records, replays, checks and draws what a VMM does to its guest's memory.
///
/// A VMM tells KVM which host memory backs which guest memory, one slot at a time. memslot records these calls, and from
/// a recording shows what they built: for that it needs neither KVM nor the VMM.
#[derive(Debug, Parser)]
#[command(name = "memslot", version, after_help = AFTER, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Apply a trace to the slot engine, compare every answer, report the map and what is odd about it
    #[command(long_about = REPLAY, after_help = AFTER_REPLAY)]
    Replay(ReplayArgs),
    /// Draw the guest's address space in the terminal, to scale, with holes compressed
    ///
    /// Every block of rows has one scale: a cell stands for the number of bytes written at its right. Large holes
    /// are one line. A slot is drawn [id size], filled by its kind. The width is that of the terminal, or COLUMNS,
    /// or 80; colours only on a terminal and not with NO_COLOR.
    #[command(after_help = AFTER_MAP)]
    Map(MapArgs),
    /// Run a VMM and write down its memory ioctls, for the other commands to read
    #[command(long_about = RECORD, after_help = AFTER_RECORD)]
    Record(RecordArgs),
    /// Show which memory the guest writes, how fast, and how a live migration of it would go
    #[command(long_about = DIRTY, after_help = AFTER_DIRTY)]
    Dirty(DirtyArgs),
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
pub(crate) struct DirtyArgs {
    #[command(flatten)]
    pub(crate) input: Input,
    /// What the migration's link sends in a second: 1GiB/s, 10Gbit/s, 125MB
    #[arg(long, value_name = "RATE", default_value = "1GiB/s", value_parser = bandwidth)]
    bandwidth: f64,
    /// How long the VM may stand still: 300ms, 1s
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = downtime)]
    downtime: std::time::Duration,
    /// Draw which pages were written when into this file (one trace only)
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

impl DirtyArgs {
    pub(crate) fn link(&self) -> Link {
        Link { bandwidth: self.bandwidth, downtime: self.downtime.as_secs_f64() }
    }
}

fn downtime(text: &str) -> Result<std::time::Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time.is_zero() => Err("a VM cannot move without standing still".to_owned()),
        Ok(time) => Ok(time),
        Err(error) => Err(error.to_string()),
    }
}

/// Bytes a second. Bits are told from bytes by `bit`.
fn bandwidth(text: &str) -> Result<f64, String> {
    let rate = text.strip_suffix("/s").unwrap_or(text).trim();
    let (size, bits) = match rate.strip_suffix("bit").or_else(|| rate.strip_suffix("bits")) {
        Some(size) => (format!("{size}B"), 8.0),
        None => (rate.to_owned(), 1.0),
    };
    match parse_size::parse_size(&size) {
        Ok(0) => Err("a link that sends nothing migrates nothing".to_owned()),
        Ok(bytes) => Ok(bytes as f64 / bits),
        Err(_) => Err("not a rate; write it as 1GiB/s, 125MB/s or 10Gbit/s".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct RecordArgs {
    /// The trace to write
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Overwrite the trace if it exists
    #[arg(long)]
    pub(crate) force: bool,
    /// Say nothing at the end, unless something went wrong
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The recording library, if it is not where it is looked for
    #[arg(long, value_name = "PATH", env = "MEMSLOT_PRELOAD")]
    pub(crate) library: Option<PathBuf>,
    /// The VMM, or what starts it, and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
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
