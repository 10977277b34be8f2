//! A transparent parent: the VMM gets our terminal, our signals and our name for it, and we end as it ends.
//!
//! Everything happens in one thread, woken by signals: so a signal is never passed on to a process that has already been
//! waited for. Processes that the command leaves behind, as a VMM that makes itself a daemon does, become our
//! children, and the recording lasts until the last of them has ended.

use std::fmt::Display;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use super::control::{self, Control};
use super::library::Library;
use super::program::Program;
use super::{Refusal, name};
use crate::cli::RecordArgs;

/// The command, running.
pub(super) struct Child {
    pid: Pid,
    name: String,
    signals: Signals,
}

/// Starts the command with the library in it.
pub(super) fn start(
    args: &RecordArgs,
    program: &Program,
    library: &Library,
    control: &Control,
    folder: &Path,
) -> Result<Child, Refusal> {
    let preload = library.preload(folder)?;
    // Orphans come to us; where that cannot be had, those are recorded that end before the command does.
    _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let ignored = ignored_signals();
    let ours = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];
    // What was ignored when we were started (nohup) must be so for the command, which a handler of ours would undo.
    let ours = ours.into_iter().filter(|signal| ignored & (1 << (signal - 1)) == 0);
    let signals = Signals::new(ours.chain([SIGCHLD]))
        .map_err(|error| Refusal::recorder(format!("cannot listen to signals: {error}")))?;
    let mut command = Command::new(&program.path);
    let (first, rest) = args.command.split_first().ok_or_else(|| Refusal::recorder("no command"))?;
    command.arg0(first).args(rest).env("LD_PRELOAD", preload).env(control::VARIABLE, &control.path);
    let child = command.spawn().map_err(|error| Refusal {
        status: Refusal::UNFIT,
        message: format!("{}: cannot be started: {error}", program.path.display()),
    })?;
    Ok(Child { pid: Pid::from_child(&child), name: name(&args.command), signals })
}

impl Child {
    /// Waits for the command and for all that it left behind; its exit status, as a shell would give it.
    pub(super) fn wait(mut self, say: impl Fn(&dyn Display)) -> u8 {
        let mut status = None;
        loop {
            // Children are waited for before signals are: a child may have ended before the handler was there.
            loop {
                match rustix::process::wait(WaitOptions::NOHANG) {
                    Ok(Some((pid, ended))) if pid == self.pid => status = status.or(exit_status(ended)),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    // No child is left.
                    Err(_) => return status.unwrap_or(Refusal::RECORDER),
                }
            }
            if let Some(status) = status {
                if !self.outlived(&say) {
                    return status;
                }
                continue;
            }
            for signal in self.signals.wait() {
                if signal != SIGCHLD && !self.had_it_from_the_terminal(signal) {
                    if let Some(signal) = Signal::from_named_raw(signal) {
                        _ = rustix::process::kill_process(self.pid, signal);
                    }
                }
            }
        }
    }

    /// The command has ended, and others have not. False if the user does not want to wait for them.
    fn outlived(&mut self, say: &impl Fn(&dyn Display)) -> bool {
        if !self.name.is_empty() {
            say(&format_args!(
                "memslot: {} has ended and left processes running: recording goes on until they end (Ctrl-C stops it)",
                self.name
            ));
            // Said once.
            self.name.clear();
        }
        self.signals.wait().all(|signal| signal == SIGCHLD)
    }

    /// Ctrl-C and Ctrl-\ are sent to all processes of the terminal's foreground: the command has got its own.
    fn had_it_from_the_terminal(&self, signal: i32) -> bool {
        matches!(signal, SIGINT | SIGQUIT)
            && File::open("/dev/tty")
                .and_then(|terminal| Ok(rustix::termios::tcgetpgrp(terminal)?))
                .is_ok_and(|foreground| foreground == rustix::process::getpgrp())
    }
}

fn exit_status(ended: WaitStatus) -> Option<u8> {
    let status = ended.exit_status().or_else(|| ended.terminating_signal().map(|signal| 128 + signal))?;
    u8::try_from(status).ok()
}

/// The signals that are ignored, as a mask; none if the kernel does not say.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
