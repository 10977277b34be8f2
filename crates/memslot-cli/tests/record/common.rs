//! What the tests of `record` share: the program, the library and the little VMM, and the trace as data.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

pub(crate) use memslot_testing::skipped;
use serde_json::Value;

/// What the preload crate builds.
pub(crate) struct Built {
    pub(crate) library: PathBuf,
    pub(crate) little_vmm: PathBuf,
}

/// Builds it. A library of its own kind and an example are no dependencies that cargo would build for this test, so cargo
/// is asked; if there is nothing to do, that takes a moment.
pub(crate) fn built() -> &'static Built {
    static BUILT: OnceLock<Built> = OnceLock::new();
    BUILT.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
        let output = Command::new(cargo)
            .args(["build", "--quiet", "--package", "memslot-preload", "--lib", "--example", "little-vmm"])
            .arg("--message-format=json-render-diagnostics")
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "the preload crate does not build");
        let messages = String::from_utf8(output.stdout).expect("UTF-8");
        let artifact = |name: &str| {
            let of_target = |message: &Value| {
                (message["target"]["name"] == name)
                    .then(|| message["filenames"][0].as_str().map(PathBuf::from))
            };
            let mut messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            messages.find_map(|message| of_target(&message)?).unwrap_or_else(|| panic!("no {name}:\n"))
        };
        Built { library: artifact("memslot_preload"), little_vmm: artifact("little-vmm") }
    })
}

/// `memslot record` of a command, into this file.
pub(crate) fn record(output: &Path) -> Command {
    let mut command = memslot();
    command.arg("record").arg("--library").arg(&built().library).arg("--output").arg(output).arg("--");
    command
}

/// The program, with nothing in its environment that would change what it does.
pub(crate) fn memslot() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("memslot"));
    for variable in ["LD_PRELOAD", "MEMSLOT_RECORD", "MEMSLOT_PRELOAD", "NO_COLOR", "CLICOLOR_FORCE"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs a command: exit status (128 and more after a signal is the program's own doing), standard output and error.
pub(crate) fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("memslot is not killed"), text(stdout), text(stderr))
}

/// The trace's lines.
pub(crate) fn lines(trace: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(trace).expect("a trace");
    let line = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    text.lines().map(line).collect()
}

/// Replays a trace, which must agree; the report.
pub(crate) fn replay(trace: &Path) -> Value {
    let (status, out, error) = run(memslot().args(["replay", "--json"]).arg(trace));
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("no JSON: {out}{error}"));
    assert_eq!((status, &report["disagreements"]), (0, &Value::Array(vec![])), "{out}");
    report
}

pub(crate) fn has_kvm() -> bool {
    let there = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        skipped("no /dev/kvm to record");
    }
    there
}
