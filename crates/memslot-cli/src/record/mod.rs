//! `memslot record`: runs a VMM with the recording library in it, and sums up what came of it.
//!
//! The work is done by the library of the crate `memslot-preload`, inside the VMM. What is done here: find it
//! ([`library`]), make sure that the dynamic loader will load it into this program ([`program`]), lay down the file through
//! which the two speak ([`control`]), and be a transparent parent while the VMM runs ([`child`]).
//!
//! Everything that would make a recording silently empty is refused before anything is started: the user has come for
//! the trace, and may wait hours for it.

mod child;
mod control;
mod image;
mod library;
mod program;
mod summary;

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::cli::RecordArgs;
use crate::style::{self, paint};
use control::Control;
use library::Library;
use program::Program;

/// Why nothing was started, and with which exit status that is said.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: u8,
    message: String,
}

impl Refusal {
    /// The recorder itself cannot do its part.
    const RECORDER: u8 = 125;
    /// The command is there, and cannot be run or recorded.
    const UNFIT: u8 = 126;
    /// The command is not there.
    const NOT_FOUND: u8 = 127;

    fn recorder(message: impl fmt::Display) -> Self {
        Refusal { status: Self::RECORDER, message: message.to_string() }
    }
}

/// Runs the command and returns the exit status: the command's own, or why it was not started.
pub(crate) fn run(args: &RecordArgs) -> u8 {
    match record(args) {
        Ok(status) => status,
        Err(refusal) => {
            say(format_args!("{}: {}", paint(style::BAD, "error"), refusal.message));
            refusal.status
        }
    }
}

fn record(args: &RecordArgs) -> Result<u8, Refusal> {
    // Wherever this fails before the command has started, the trace just made is taken away again.
    let program = Program::find(&args.command)?;
    let library = Library::find(args.library.as_deref())?;
    program.check(&library, &strace_instead(args))?;
    let trace = Trace::create(&args.output, args.force)?;
    let folder = tempfile::Builder::new()
        .prefix("memslot-record-")
        .tempdir()
        .map_err(|error| Refusal::recorder(format!("no folder for temporary files: {error}")))?;
    let started = Control::create(folder.path(), &trace.path, &trace.file)
        .and_then(|control| Ok((child::start(args, &program, &library, &control, folder.path())?, control)));
    let (child, control) = match started {
        Ok(started) => started,
        Err(refusal) => {
            trace.remove();
            return Err(refusal);
        }
    };
    let status = child.wait(|message| {
        if !args.quiet {
            say(message);
        }
    });
    control.end();
    summary::write(args, &trace, &control);
    Ok(status)
}

/// The file that is being recorded to.
struct Trace {
    path: PathBuf,
    file: File,
}

impl Trace {
    fn create(path: &Path, force: bool) -> Result<Self, Refusal> {
        let refuse = |what: &dyn fmt::Display| Refusal::recorder(format!("{}: {what}", path.display()));
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = if force { options.create(true).truncate(false) } else { options.create_new(true) }
            .open(path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => refuse(&"exists already; --force overwrites it"),
                io::ErrorKind::NotFound => refuse(&"no such folder"),
                _ => refuse(&error),
            })?;
        let about = file.metadata().map_err(|error| refuse(&error))?;
        if !about.is_file() {
            return Err(refuse(
                &"is no ordinary file: a trace is written by several processes, each at its end",
            ));
        }
        file.set_len(0).map_err(|error| refuse(&error))?;
        let absolute = fs::canonicalize(path).map_err(|error| refuse(&error))?;
        Ok(Trace { path: absolute, file })
    }

    fn identity(file: &File) -> io::Result<(u64, u64)> {
        file.metadata().map(|about| (about.dev(), about.ino()))
    }

    /// Takes the file away again, in which there is nothing.
    fn remove(&self) {
        _ = fs::remove_file(&self.path);
    }
}

/// How strace would record the same command: for programs that the library cannot be loaded into.
fn strace_instead(args: &RecordArgs) -> String {
    let output = quoted(args.output.with_extension("strace").as_os_str());
    let command: Vec<String> = args.command.iter().map(|word| quoted(word)).collect();
    format!(
        "  strace -f -v -ttt -T -e trace=ioctl -o {output} {}\n  memslot replay {output}",
        command.join(" ")
    )
}

/// A word as a shell would have to be given it.
fn quoted(word: &std::ffi::OsStr) -> String {
    let text = word.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_=+./:,%@".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.into_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// A line on standard error, which is where everything about the recording goes: standard output is the VMM's.
fn say(message: impl fmt::Display) {
    use io::Write;
    _ = writeln!(anstream::stderr(), "{message}");
}

/// The command's name, for messages.
fn name(command: &[OsString]) -> String {
    command.first().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        for (word, expected) in [
            ("-m", "-m"),
            ("256M,slots=4", "256M,slots=4"),
            ("", "''"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("$HOME", "'$HOME'"),
        ] {
            assert_eq!(quoted(word.as_ref()), expected);
        }
    }
}
