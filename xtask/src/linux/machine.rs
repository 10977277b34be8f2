//! One run of QEMU: its console is shown live, and it ends by itself or at the time limit.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// What became of a run.
pub(crate) struct Ended {
    /// From the start of QEMU to its end.
    pub(crate) wall: Duration,
    /// The processor time of QEMU, all its threads together, where that can be told.
    pub(crate) processor: Option<Duration>,
    /// From the start to the first line of the guest's first program.
    pub(crate) userland: Option<Duration>,
    pub(crate) console: String,
    /// The hypervisor's figures; empty without one.
    pub(crate) figures: BTreeMap<String, String>,
    /// QEMU's exit status; `None` if it was ended at the time limit.
    pub(crate) status: Option<i32>,
}

/// The first line of the guest's first program begins with it.
const USERLAND: &str = "memslot-init: userland";

/// The program, with the machine that all runs have.
pub(crate) fn qemu(processor: &str, memory: u64, processors: u32, repeatable: bool) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", processor, "-machine", "pc", "-nodefaults", "-no-reboot"]);
    command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
    command.args(["-m", &(memory >> 20).to_string(), "-smp", &processors.to_string()]);
    if repeatable {
        command.args(["-icount", "shift=3,sleep=off", "-seed", "42"]);
        command.args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
    }
    command
}

/// Runs it. `figures` is where the hypervisor's debug console goes.
pub(crate) fn run(command: &mut Command, figures: &Path, limit: Duration, echo: bool) -> Result<Ended> {
    let _ = fs::remove_file(figures);
    let started = Instant::now();
    let before = children_time();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = command.spawn().context("cannot start qemu-system-x86_64")?;
    let console = child.stdout.take();
    let read = console.map(|pipe| follow(&mut child, pipe, started, limit, echo)).unwrap_or_default();
    let status = child.wait().context("cannot wait for QEMU")?;
    let wall = started.elapsed();
    let processor = children_time().zip(before).and_then(|(after, before)| after.checked_sub(before));
    let said = fs::read_to_string(figures).unwrap_or_default();
    let pair = |line: &str| line.split_once(' ').map(|(name, value)| (name.to_owned(), value.to_owned()));
    Ok(Ended {
        wall,
        processor,
        userland: read.userland,
        console: read.text,
        figures: said.lines().filter_map(pair).collect(),
        status: status.code().filter(|_| !read.too_long),
    })
}

/// The processor time of all programs that were started and have ended, in Linux's words: fields 16 and 17, in hundredths of
/// a second.
fn children_time() -> Option<Duration> {
    let said = fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<_> = said.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Duration::from_millis((number(16)? + number(17)?) * 10))
}

#[derive(Default)]
struct Followed {
    text: String,
    userland: Option<Duration>,
    too_long: bool,
}

/// Reads the console until QEMU closes it, or is ended for taking too long.
fn follow(
    child: &mut Child,
    mut pipe: ChildStdout,
    started: Instant,
    limit: Duration,
    echo: bool,
) -> Followed {
    let (send, receive) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = pipe.read(&mut buffer) {
            if length == 0 || send.send(buffer[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut followed = Followed::default();
    loop {
        match receive.recv_timeout(limit.saturating_sub(started.elapsed())) {
            Ok(bytes) => {
                if echo {
                    let _ = io::stdout().write_all(&bytes).and_then(|()| io::stdout().flush());
                }
                followed.text.push_str(&String::from_utf8_lossy(&bytes));
                if followed.userland.is_none() && followed.text.contains(USERLAND) {
                    followed.userland = Some(started.elapsed());
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                followed.too_long = true;
                let _ = child.kill();
                break;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let _ = reader.join();
    followed
}
