//! `cargo xtask test`: everything that is quick enough to run before each commit.

use anyhow::Result;

use crate::run::Report;
use crate::step::Step;
use crate::tools;

/// Run the tests: units, properties, doctests, the core without std, and shallow loom models.
///
/// Steps, in this order: the tests of all crates (cargo-nextest if it is installed, else cargo test); those of
/// memslot-vm-memory that need its optional features; the examples in the documentation; the core and the page tables
/// without the standard library; the loom models with at most 2 preemptions; Linux on the hypervisor, small, where QEMU
/// and a kernel package are there or can be had. A failing
/// step does not stop the others. Tests that need what this machine lacks, /dev/kvm for instance, are listed at the
/// end with the reason and count as skipped.
///
/// While working on one thing, name it: `cargo xtask test -- transaction`. Then only the first step runs, and what
/// follows `--` goes to nextest or cargo test.
///
/// Random programs are the same in each run, so that a test that fails does so because of what was changed. Variables that
/// reach the tests: MEMSLOT_SEED (other random programs), MEMSLOT_TIMES (how many times as many), PROPTEST_CASES (how many
/// for each property), MEMSLOT_ORACLE_OPS (operations to try against the real kernel).
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Try more: a million operations against the real kernel, 16 times as many random programs, 3 preemptions in loom.
    #[arg(long)]
    full: bool,
    /// Install and download nothing: skip Linux on the hypervisor where QEMU or the kernel package is missing
    #[arg(long)]
    no_setup: bool,
    /// Arguments for nextest or cargo test, such as a part of a test's name.
    #[arg(last = true, value_name = "EXTRA")]
    extra: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut report = Report::new()?;
    report.run(&workspace_tests(args));
    if args.extra.is_empty() {
        let optional = ["test", "--quiet", "-p", "memslot-vm-memory", "--all-features", "--tests"];
        report.run(&Step::cargo("vm-memory, all features", optional).tests());
        report.run(
            &Step::cargo("doctests", ["test", "--quiet", "--workspace", "--doc", "--no-fail-fast"]).tests(),
        );
        for (name, package) in [("core without std", "memslot"), ("page tables without std", "memslot-mmu")] {
            report.run(&Step::cargo(name, ["check", "-p", package, "--no-default-features"]));
        }
        report.run(&loom(if args.full { 3 } else { 2 }));
        linux(args).iter().for_each(|step| report.run(step));
    }
    Ok(report.finish())
}

fn workspace_tests(args: &Args) -> Step {
    const NEXTEST: &[&str] =
        &["nextest", "run", "--workspace", "--no-fail-fast", "--status-level=slow", "--cargo-quiet"];
    const LIBTEST: &[&str] =
        &["test", "--quiet", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"];
    let name = "workspace tests";
    let mut step = if tools::has_nextest() {
        Step::cargo(name, NEXTEST.iter().copied()).nextest()
    } else {
        Step::cargo(name, LIBTEST.iter().copied()).tests()
    };
    for argument in &args.extra {
        step = step.arg(argument.as_str());
    }
    if args.full { step.env("MEMSLOT_ORACLE_OPS", "1000000").env("MEMSLOT_TIMES", "16") } else { step }
}

/// Linux on the hypervisor with little memory: with large pages and with small ones, the dirty log in both ways, nested and shadow
/// tables.
fn linux(args: &Args) -> [Step; 5] {
    let runs = [
        ("linux boot", ["--scenario=boot", "--pages=2m", "--rearm=protect"]),
        ("linux dirty, by protection", ["--scenario=dirty", "--pages=4k", "--rearm=protect"]),
        ("linux dirty, by dirty bits", ["--scenario=dirty", "--pages=2m", "--rearm=bits"]),
        ("torture, shadow tables", ["--scenario=torture", "--pages=2m", "--paging=shadow"]),
        ("linux dirty, shadow tables", ["--scenario=dirty", "--pages=2m", "--paging=shadow"]),
    ];
    runs.map(|(name, arguments)| {
        let mut step = Step::cargo(name, ["xtask", "linux", "--quiet", "--memory=256M", "--rounds=1"]);
        for argument in arguments.iter().copied().chain(args.no_setup.then_some("--no-setup")) {
            step = step.arg(argument);
        }
        step.xtask()
    })
}

/// The loom models: the tests of the core and the page tables that have `loom_` in their path, which exist only under `--cfg loom`.
///
/// In release mode, because loom runs each model thousands of times.
pub(crate) fn loom(preemptions: u8) -> Step {
    Step::cargo(
        "loom",
        ["test", "--quiet", "-p", "memslot", "-p", "memslot-mmu", "--release", "--lib", "loom_"],
    )
    .rustflags("--cfg loom")
    .env("LOOM_MAX_PREEMPTIONS", preemptions.to_string())
    .own_target("loom")
    .tests()
}
