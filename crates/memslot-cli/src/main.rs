//! `memslot`: replays, checks and draws what a VMM does to its guest's memory.
//!
//! `record` runs a VMM and makes such a file, with a library of the crate `memslot-preload` inside it.
//! The way through the program: [`trace`] turns a file into KVM calls, [`replay`] applies them through
//! [`engine`] (the one module that touches the slot table) and keeps a [`history`]; [`warnings`], [`report`],
//! [`text`], [`map`], [`dirty`] and [`svg`] say what came of it.

#![forbid(unsafe_code)]

mod cli;
mod dirty;
mod engine;
mod history;
mod layout;
mod map;
#[cfg(target_os = "linux")]
mod record;
mod replay;
mod report;
mod style;
mod svg;
mod text;
mod trace;
mod units;
mod verdict;
mod warnings;
mod words;

use std::fs::File;
use std::io::{self, BufReader, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use indicatif::{ProgressBar, ProgressStyle};

use cli::{Cli, Command, Input};
use dirty::DirtyReport;
use dirty::migration::Link;
use replay::Replay;
use report::Report;
use trace::TraceReader;

/// What the exit status says. Of several files the worst counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Status {
    Agrees,
    Disagrees,
    Unreadable,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let status = match &cli.command {
        Command::Record(args) => return ExitCode::from(record(args)),
        Command::Replay(args) => run(&args.input, args.svg.as_deref(), Output::Report),
        Command::Map(args) => run(&args.input, None, Output::Map),
        Command::Dirty(args) => run(&args.input, args.svg.as_deref(), Output::Dirty(args.link())),
    };
    ExitCode::from(match status {
        Status::Agrees => 0,
        Status::Disagrees => 1,
        Status::Unreadable => 2,
    })
}

#[cfg(target_os = "linux")]
fn record(args: &cli::RecordArgs) -> u8 {
    record::run(args)
}

#[cfg(not(target_os = "linux"))]
fn record(_: &cli::RecordArgs) -> u8 {
    _ = writeln!(anstream::stderr(), "error: KVM is Linux's, and so is recording it");
    125
}

#[derive(Clone, Copy)]
enum Output {
    Report,
    Map,
    Dirty(Link),
}

fn run(input: &Input, svg: Option<&Path>, output: Output) -> Status {
    if input.files.len() > 1 && (input.at.is_some() || svg.is_some()) {
        let message = "--at and --svg are about one trace, but several were given";
        Cli::command().error(ErrorKind::ArgumentConflict, message).exit();
    }
    let mut status = Status::Agrees;
    let mut documents = Vec::new();
    for (nth, path) in input.files.iter().enumerate() {
        let name = if path.as_os_str() == "-" { "<stdin>".to_owned() } else { path.display().to_string() };
        let replay = match read(path, input.at) {
            Ok(replay) => replay,
            Err(message) => {
                complain(&name, &message);
                status = Status::Unreadable;
                continue;
            }
        };
        if !replay.disagreements.is_empty() {
            status = status.max(Status::Disagrees);
        }
        if let Some(file) = svg {
            let picture = match output {
                Output::Dirty(_) => svg::heat::draw(&name, &replay),
                Output::Report | Output::Map => svg::draw(&name, &replay),
            };
            if let Err(error) = std::fs::write(file, picture) {
                complain(&file.display().to_string(), &error.to_string());
                status = Status::Unreadable;
            }
        }
        let report = Report::new(&name, input.at, &replay);
        if input.json {
            let document = match output {
                Output::Report => serde_json::to_string_pretty(&report),
                Output::Map => serde_json::to_string_pretty(&report.map()),
                Output::Dirty(link) => serde_json::to_string_pretty(&DirtyReport::new(&name, &replay, link)),
            };
            documents.extend(document);
            continue;
        }
        let mut text = if nth > 0 { "\n".to_owned() } else { String::new() };
        let written = match output {
            Output::Report => text::write(&mut text, &report),
            Output::Dirty(link) => dirty::text::write(&mut text, &DirtyReport::new(&name, &replay, link)),
            Output::Map => {
                let maps: Vec<_> = replay.vms.iter().map(replay::Vm::map).collect();
                map::write(&mut text, &report, &maps, width())
            }
        };
        match print(&text) {
            _ if written.is_err() => return Status::Unreadable,
            Printed::Whole => {}
            Printed::NobodyReads => return status,
            Printed::Failed => return Status::Unreadable,
        }
    }
    if input.json {
        let document = match (&documents[..], input.files.len()) {
            ([], 1) => return status,
            ([document], 1) => format!("{document}\n"),
            _ => format!("[{}]\n", documents.join(",\n")),
        };
        if print(&document) == Printed::Failed {
            return Status::Unreadable;
        }
    }
    status
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Printed {
    Whole,
    /// The pipe is closed (`| head`): no failure, but no reason to go on either.
    NobodyReads,
    /// A full disk, say. Has been complained about.
    Failed,
}

fn print(text: &str) -> Printed {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Printed::Whole,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Printed::NobodyReads,
        Err(error) => {
            complain("<stdout>", &error.to_string());
            Printed::Failed
        }
    }
}

fn complain(name: &str, message: &str) {
    let error = style::paint(style::BAD, "error");
    _ = writeln!(anstream::stderr(), "{error}: {name}: {message}");
}

/// Columns to draw in.
fn width() -> usize {
    let asked = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse::<usize>().ok());
    let terminal = || io::stdout().is_terminal().then(terminal_size::terminal_size).flatten();
    let width = asked.or_else(|| terminal().map(|(width, _)| usize::from(width.0)));
    width.unwrap_or(80).clamp(40, 400)
}

/// Opens and replays one file.
fn read(path: &Path, until: Option<u64>) -> Result<Replay, String> {
    let (input, size): (Box<dyn Read>, Option<u64>) = if path.as_os_str() == "-" {
        (Box::new(io::stdin().lock()), None)
    } else {
        let file = File::open(path).map_err(|error| plain(&error))?;
        let about = file.metadata().map_err(|error| plain(&error))?;
        if about.is_dir() {
            return Err("is a directory, not a trace".to_owned());
        }
        (Box::new(file), about.is_file().then_some(about.len()))
    };
    let mut reader = TraceReader::new(BufReader::with_capacity(1 << 16, input));
    let mut progress = Progress::new(size);
    let replay = replay::replay(&mut reader, until, |bytes, line| progress.at(bytes, line));
    progress.done();
    let replay = replay.map_err(|error| match error {
        trace::TraceError::Io(error) => plain(&error),
        other => other.to_string(),
    })?;
    match until {
        Some(line) if reader.line() < line => {
            Err(format!("has {}; --at {line} is beyond its end", units::count(reader.line(), "line")))
        }
        _ => Ok(replay),
    }
}

/// The error without "(os error 2)".
fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file".to_owned(),
        io::ErrorKind::PermissionDenied => "no permission to read it".to_owned(),
        io::ErrorKind::IsADirectory => "is a directory, not a trace".to_owned(),
        _ => error.to_string(),
    }
}

/// A progress bar that appears only if reading takes over a second, and only on a terminal.
struct Progress {
    size: Option<u64>,
    began: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    fn new(size: Option<u64>) -> Self {
        Progress { size, began: Instant::now(), bar: None }
    }

    fn at(&mut self, bytes: u64, line: u64) {
        if self.bar.is_none() && (line % 256 != 0 || self.began.elapsed() < Duration::from_secs(1)) {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| match self.size {
            Some(size) => {
                let template = "{bytes:>10} of {total_bytes} [{wide_bar}] {percent}% {eta} left";
                let style = ProgressStyle::with_template(template);
                ProgressBar::new(size).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            }
            None => ProgressBar::new_spinner(),
        });
        bar.set_position(bytes);
    }

    fn done(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
