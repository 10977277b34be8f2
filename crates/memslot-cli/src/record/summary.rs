//! What came of a recording, told at its end.
//!
//! The trace is read as `replay` will read it, so what is promised here is what the user gets. A last line that was
//! cut, because the disk was full or the VMM was killed while it wrote, is taken away: the trace is whole without it.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;

use super::control::{Control, Stopped};
use super::{Trace, name, quoted, say, strace_instead};
use crate::cli::RecordArgs;
use crate::style::{self, paint};
use crate::trace::{Answer, Call, TraceReader};
use crate::units;

#[derive(Default)]
struct Contents {
    calls: BTreeMap<String, u64>,
    vms: u64,
    processes: HashSet<Option<i64>>,
    first_ns: Option<u64>,
    last_ns: u64,
    /// Lines that can be read, and the bytes they take.
    lines: u64,
    bytes: u64,
    /// What is wrong with the line after them.
    broken: Option<String>,
}

/// Says on standard error what was recorded.
pub(super) fn write(args: &RecordArgs, trace: &Trace, control: &Control) {
    let mut contents = Contents::read(trace);
    let stopped = control.stopped();
    let cut = contents.broken.is_some() && (stopped.is_some() || contents.broken_line_is_last(trace));
    if cut && trace.file.set_len(contents.bytes).is_ok() {
        contents.broken = None;
    }
    let mut text = String::new();
    if contents.lines == 0 {
        trace.remove();
        nothing(&mut text, args, control);
    } else if !args.quiet {
        contents.describe(&mut text, args);
    }
    if let Some(why) = stopped {
        let why = match why {
            Stopped::Errno(errno) => std::io::Error::from_raw_os_error(errno).to_string(),
            Stopped::TooLarge => "the VMM may not write larger files (ulimit -f)".to_owned(),
        };
        let lost = units::count(control.lost(), "call");
        warn(
            &mut text,
            &format!(
                "the recording stopped before its end, after {} lines: {why}. {lost} are missing",
                contents.lines
            ),
        );
    }
    if let Some(broken) = &contents.broken {
        warn(
            &mut text,
            &format!("line {} cannot be read, and replay will end there: {broken}", contents.lines + 1),
        );
    }
    if !text.is_empty() {
        say(text.trim_end());
    }
}

fn warn(text: &mut String, message: &str) {
    _ = writeln!(text, "memslot: {}: {message}", paint(style::WARN, "warning"));
}

/// Why there may be nothing, although the command was fit to be recorded.
fn nothing(text: &mut String, args: &RecordArgs, control: &Control) {
    let command = name(&args.command);
    let why = match (control.processes(), control.lines()) {
        (0, _) => {
            format!("{command} did not load the recording library: another version than this program's?")
        }
        (_, 0) => format!(
            "{command} made no KVM call that goes through libc's ioctl. If it started a static program, or one that enters \
             the kernel by itself, strace sees more:\n{}",
            strace_instead(args)
        ),
        _ => "what was written is gone".to_owned(),
    };
    warn(text, &format!("nothing was recorded, and {} is not there: {why}", args.output.display()));
}

impl Contents {
    fn read(trace: &Trace) -> Self {
        let mut contents = Contents::default();
        let Ok(file) = File::open(&trace.path) else { return contents };
        let mut reader = TraceReader::new(BufReader::with_capacity(1 << 16, file));
        loop {
            let record = match reader.next_record() {
                Ok(Some(record)) => record,
                Ok(None) => break,
                Err(error) => {
                    contents.broken = (reader.bytes() > 0).then(|| error.to_string());
                    break;
                }
            };
            contents.lines = reader.line();
            contents.bytes = reader.bytes();
            contents.processes.insert(record.process);
            if let Some(ns) = record.start_ns {
                contents.first_ns = Some(contents.first_ns.map_or(ns, |first| first.min(ns)));
                contents.last_ns = contents.last_ns.max(ns);
            }
            if matches!((&record.call, &record.answer), (Call::CreateVm(_), Answer::Value(_))) {
                contents.vms += 1;
            }
            *contents.calls.entry(record.name.into_owned()).or_default() += 1;
        }
        contents
    }

    /// Whether nothing follows the line that cannot be read.
    fn broken_line_is_last(&self, trace: &Trace) -> bool {
        use std::os::unix::fs::FileExt;
        let (Ok(about), mut at) = (trace.file.metadata(), self.bytes) else { return false };
        let mut piece = [0; 4096];
        while at < about.len() {
            let Ok(read @ 1..) = trace.file.read_at(&mut piece, at) else { return false };
            if piece[..read].contains(&b'\n') {
                return false;
            }
            at += u64::try_from(read).unwrap_or(u64::MAX);
        }
        true
    }

    fn describe(&self, text: &mut String, args: &RecordArgs) {
        let calls = units::count(self.calls.values().sum::<u64>(), "KVM call");
        let vms = units::count(self.vms, "VM");
        let output = args.output.display();
        _ = write!(text, "{}: {calls} on {vms}", paint(style::BOLD, &output));
        if self.processes.len() > 1 {
            _ = write!(text, " in {} processes", self.processes.len());
        }
        let span = self.last_ns.saturating_sub(self.first_ns.unwrap_or(0));
        _ = writeln!(text, ", within {}, {}", units::duration(span), units::size(self.bytes));
        let mut calls: Vec<_> = self.calls.iter().collect();
        calls.sort_by(|(a, n), (b, m)| m.cmp(n).then_with(|| a.cmp(b)));
        let width = calls.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, count) in calls {
            _ = writeln!(text, "  {name:width$}  {count:>7}");
        }
        _ = writeln!(text, "replay it with: memslot replay {}", quoted(args.output.as_os_str()));
    }
}
