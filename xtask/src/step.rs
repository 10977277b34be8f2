//! A step: one program to run, and what to read from its output.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// What a step's output tells about tests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Nothing: the step as a whole passes or fails.
    Nothing,
    /// The result lines of libtest, one for each test program; a step that ran no test has failed.
    Tests,
    /// The summary of nextest; a step that ran no test has failed.
    Nextest,
    /// The last line of another `xtask` command, and the `skipped:` lines before it.
    Xtask,
}

/// One program to run, with what its heading shows.
pub(crate) struct Step {
    pub(crate) name: String,
    pub(crate) program: String,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) reads: Reads,
    pub(crate) quiet: bool,
    pub(crate) accepts: Vec<i32>,
}

impl Step {
    /// A step that runs `cargo` with these arguments, at the workspace root.
    pub(crate) fn cargo<S: Into<String>>(name: &str, arguments: impl IntoIterator<Item = S>) -> Self {
        Self::program(name, "cargo", arguments)
    }

    /// A step that runs another program there.
    pub(crate) fn program<S: Into<String>>(
        name: &str,
        program: &str,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            program: program.to_owned(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            environment: Vec::new(),
            reads: Reads::Nothing,
            quiet: false,
            accepts: vec![0],
        }
    }

    /// Adds an argument.
    pub(crate) fn arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    pub(crate) fn args<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Adds compiler flags to those the caller's environment already has.
    pub(crate) fn rustflags(self, flags: &str) -> Self {
        let all = match std::env::var("RUSTFLAGS") {
            Ok(theirs) if !theirs.is_empty() => format!("{theirs} {flags}"),
            _ => flags.to_owned(),
        };
        self.env("RUSTFLAGS", all)
    }

    /// Gives the step a target directory of its own, so that other flags do not rebuild everybody's dependencies.
    pub(crate) fn own_target(self, name: &str) -> Self {
        self.env("CARGO_TARGET_DIR", target_directory().join(name).display().to_string())
    }

    /// Counts the tests that the step runs. Having run none is a failure: a misspelt filter must not pass.
    pub(crate) fn tests(mut self) -> Self {
        self.reads = Reads::Tests;
        self
    }

    /// The same for a step that runs nextest.
    pub(crate) fn nextest(mut self) -> Self {
        self.reads = Reads::Nextest;
        self
    }

    /// Takes over the counts of another `xtask` command.
    pub(crate) fn xtask(mut self) -> Self {
        self.reads = Reads::Xtask;
        self
    }

    /// Shows the output only if the step fails.
    pub(crate) fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Exit codes besides 0 that are no failure.
    pub(crate) fn accepts(mut self, codes: &[i32]) -> Self {
        self.accepts.extend(codes);
        self
    }

    /// The command line as a person would type it.
    pub(crate) fn command_line(&self) -> String {
        let mut line = String::new();
        for (name, value) in &self.environment {
            let _ = write!(line, "{name}={} ", quoted(value));
        }
        line.push_str(&self.program);
        for argument in &self.arguments {
            let _ = write!(line, " {}", quoted(argument));
        }
        line
    }
}

/// The argument in quotes if a shell would take it apart.
fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,%@".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("'{argument}'")
    }
}

/// The workspace's root: the folder above this crate.
///
/// Asked of the environment first, because a program built in a target directory that two checkouts share may have been
/// compiled in the other one.
pub(crate) fn workspace_root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let here = PathBuf::from(here);
    here.parent().map_or_else(|| here.clone(), Path::to_path_buf)
}

/// Where cargo builds: `CARGO_TARGET_DIR`, or `target` at the workspace's root.
pub(crate) fn target_directory() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    workspace_root().join(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headings_can_be_pasted() {
        let step = Step::cargo("loom", ["test", "--lib"]).env("RUSTFLAGS", "--cfg loom");
        assert_eq!(step.command_line(), "RUSTFLAGS='--cfg loom' cargo test --lib");
    }
}
