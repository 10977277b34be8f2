//! Runs steps and keeps the score.
//!
//! A [`Step`] is one program. [`Report::run`] prints a heading, runs it, echoes its output while reading test counts
//! from it, and remembers the verdict; nothing stops the steps that follow. [`Report::finish`] prints the summary.
//!
//! A test that needs what the machine lacks tells us by appending a line to the file named in `MEMSLOT_SKIPPED_FILE`
//! (test runners hide the output of tests that pass, so printing is not enough):
//! `skipped: WHY` if the test did nothing, one line for each such test, which then counts as skipped, not passed;
//! `partly skipped: WHY` if it left something out, which is shown but not counted.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::counts::{self, Counts};
use crate::step::{Reads, Step, target_directory, workspace_root};
use crate::summary::{Finished, Outcome, Verdict, judge, seconds, summarise};

/// The variable that names the file in which tests say what they skipped.
const SKIPPED_FILE: &str = "MEMSLOT_SKIPPED_FILE";

/// The steps that have run so far.
pub(crate) struct Report {
    steps: Vec<Finished>,
    skipped_file: PathBuf,
    /// `skipped:` lines that came from another `xtask` command, which has already counted them.
    inherited: Vec<String>,
}

impl Report {
    /// Begins a report and the file in which tests say what they skipped.
    pub(crate) fn new() -> Result<Self> {
        let directory = target_directory().join("xtask");
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let skipped_file = directory.join(format!("skipped-{}", std::process::id()));
        fs::write(&skipped_file, "").with_context(|| format!("cannot write {}", skipped_file.display()))?;
        Ok(Self { steps: Vec::new(), skipped_file, inherited: Vec::new() })
    }

    /// Runs a step; a failure is remembered, not returned.
    pub(crate) fn run(&mut self, step: &Step) {
        say(&format!("\n== {}: {}", step.name, step.command_line()));
        let started = Instant::now();
        let (verdict, counts) = match self.spawn(step) {
            Ok(outcome) => judge(step, &outcome),
            Err(error) => (Verdict::Failed(format!("{error:#}")), Counts::default()),
        };
        let took = started.elapsed();
        if let Verdict::Failed(why) = &verdict {
            say(&format!("== {}: FAILED, {why} ({})", step.name, seconds(took)));
        } else {
            say(&format!("== {}: passed ({})", step.name, seconds(took)));
        }
        self.steps.push(Finished { name: step.name.clone(), verdict, counts, took });
    }

    /// Whether nothing has failed so far, for what needs the steps before it.
    pub(crate) fn is_good(&self) -> bool {
        !self.steps.iter().any(|step| matches!(step.verdict, Verdict::Failed(_)))
    }

    /// Whether the last step failed, for what would only fail again.
    pub(crate) fn has_just_failed(&self) -> bool {
        matches!(self.steps.last(), Some(Finished { verdict: Verdict::Failed(_), .. }))
    }

    /// Records something that was not a step: its verdict, and how long it took.
    pub(crate) fn record(&mut self, name: &str, verdict: Result<(), String>, took: Duration) {
        let verdict = match verdict {
            Ok(()) => {
                say(&format!("== {name}: PASS ({})", seconds(took)));
                Verdict::Passed
            }
            Err(why) => {
                say(&format!("== {name}: FAILED, {why} ({})", seconds(took)));
                Verdict::Failed(why)
            }
        };
        self.steps.push(Finished { name: name.to_owned(), verdict, counts: Counts::default(), took });
    }

    /// Records a step that cannot run on this machine.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        say(&format!("\n== {name}\nskipped: {why}"));
        let verdict = Verdict::Skipped(why.to_owned());
        self.steps.push(Finished {
            name: name.to_owned(),
            verdict,
            counts: Counts::default(),
            took: Duration::ZERO,
        });
    }

    /// Prints the summary and says whether nothing failed.
    pub(crate) fn finish(self) -> bool {
        let said = fs::read_to_string(&self.skipped_file).unwrap_or_default();
        let _ = fs::remove_file(&self.skipped_file);
        let (total, summary) = summarise(&self.steps, &said, &self.inherited);
        say(&format!("\n{summary}{total}"));
        total.failed == 0
    }

    fn spawn(&mut self, step: &Step) -> Result<Outcome> {
        let mut command = Command::new(&step.program);
        command
            .args(&step.arguments)
            .envs(step.environment.iter().map(|(name, value)| (name, value)))
            .env(SKIPPED_FILE, &self.skipped_file)
            .current_dir(workspace_root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if io::stdout().is_terminal() && std::env::var_os("CARGO_TERM_COLOR").is_none() {
            command.env("CARGO_TERM_COLOR", "always");
        }
        let mut child = command.spawn().with_context(|| format!("cannot start {}", step.program))?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let (reads, echo) = (step.reads, !step.quiet);
        let (out, err) = thread::scope(|scope| {
            let err = scope.spawn(|| err.map(|pipe| follow(pipe, reads, echo.then(io::stderr))));
            let out = out.map(|pipe| follow(pipe, reads, echo.then(io::stdout)));
            (out.unwrap_or_default(), err.join().ok().flatten().unwrap_or_default())
        });
        let status = child.wait().with_context(|| format!("cannot wait for {}", step.program))?;
        let passed = status.code().is_some_and(|code| step.accepts.contains(&code));
        if step.quiet && !passed {
            say(&format!("{}{}", out.text, err.text));
        }
        let mut counts = out.counts;
        counts += err.counts;
        self.inherited.extend(out.skipped);
        Ok(Outcome { failure: (!passed).then(|| status.to_string()), counts })
    }
}

/// What was read from one of a program's outputs.
#[derive(Default)]
struct Followed {
    counts: Counts,
    skipped: Vec<String>,
    text: String,
}

/// Reads a program's output line by line, echoing it to `echo` if given and keeping it otherwise.
fn follow(pipe: impl Read, reads: Reads, mut echo: Option<impl Write>) -> Followed {
    let mut followed = Followed::default();
    for line in BufReader::new(pipe).split(b'\n') {
        let Ok(line) = line else { break };
        let line = String::from_utf8_lossy(&line);
        match &mut echo {
            // Whoever reads us may have gone away; the step's own verdict is what counts.
            Some(out) => drop(writeln!(out, "{line}")),
            None => drop(writeln!(followed.text, "{line}")),
        }
        let plain = counts::without_colours(&line);
        match reads {
            Reads::Nothing => {}
            Reads::Tests => followed.counts += counts::of_libtest(&plain).unwrap_or_default(),
            Reads::Nextest => followed.counts += counts::of_nextest(&plain).unwrap_or_default(),
            Reads::Xtask => {
                if let Some(counts) = counts::of_summary(&plain) {
                    followed.counts = counts;
                } else if plain.starts_with("skipped: ") || plain.starts_with("partly skipped: ") {
                    followed.skipped.push(plain);
                }
            }
        }
    }
    followed
}

/// Prints a line. If whoever read us has gone away (`| head`), the steps go on and the exit status still counts.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}
