//! `cargo xtask deep`: proofs that are too slow for every run.

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;

use crate::run::{Report, say};
use crate::step::{self, Step};
use crate::{oldest, test, tools};

/// Run the slow proofs: the real kernel, deep loom models, walks beside a writer, Miri, sanitizers, fresh random programs, fuzzing, Linux,
/// mutants.
///
/// Takes minutes to hours. What needs a tool that is missing (a nightly toolchain, Miri, cargo-mutants) is skipped and
/// says so; `cargo xtask setup` lists them. Each proof that needs other compiler flags builds in its own folder below
/// the target directory, so the ordinary build stays warm.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run this proof only; may be given several times.
    #[arg(long, value_name = "NAME")]
    only: Vec<Proof>,
    /// How many operations to try against the real kernel.
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    operations: u64,
    /// How many times loom may preempt a thread in one execution; the time grows steeply.
    #[arg(long, value_name = "N", default_value_t = 3)]
    preemptions: u8,
    /// How many entries to look for in walks beside a writer, in each of three runs.
    #[arg(long, value_name = "N", default_value_t = 200_000_000)]
    checks: u64,
    /// How long to try random programs, in seconds: rounds of fresh seeds, the last of which is finished.
    #[arg(long, value_name = "SECONDS", default_value_t = 1200)]
    random_seconds: u64,
    /// How many times as many random programs as in `cargo xtask test` to try in each round.
    #[arg(long, value_name = "N", default_value_t = 20)]
    times: u32,
    /// How long to fuzz each target, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    fuzz_seconds: u32,
}

/// The crates with unsafe code or properties. Not memslot-vm-memory: where a map outlives its table, the bridge leaves what the
/// map stands on for good, which is a leak to AddressSanitizer.
const CRATES: [&str; 8] =
    ["-p", "memslot", "-p", "memslot-backing", "-p", "memslot-kvm", "-p", "memslot-mmu"];

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Proof {
    /// Random programs against the real kernel, errno for errno, and tables programmed into it (needs /dev/kvm)
    Oracle,
    /// The models of versions, the dirty log, page tables and the reverse map, with more preemptions
    Loom,
    /// The reverse map walked beside a writer that never stops: every entry that was there all the while is seen
    Rmap,
    /// The tests of the core and the page tables in an interpreter that sees undefined behaviour (needs nightly with miri)
    Miri,
    /// The tests of the core and of what maps and programs memory under AddressSanitizer, leaks included (needs nightly)
    Asan,
    /// The same under ThreadSanitizer (needs nightly)
    Tsan,
    /// Every random test with fresh seeds, round after round, with many cases and all assertions
    Random,
    /// Bytes that nobody would write on purpose, as traces, ring memory and programs (needs nightly with cargo-fuzz)
    Fuzz,
    /// Linux on the hypervisor: every scenario, the dirty log with both sizes of pages and both ways (needs QEMU)
    Linux,
    /// The libraries with the oldest compiler they promise, Rust 1.85, for x86-64 and arm64 (needs mmdebstrap)
    Oldest,
    /// Changes the core and the reverse map on purpose and lists the changes that no test notices (needs cargo-mutants)
    Mutants,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut report = Report::new()?;
    let chosen = if args.only.is_empty() { Proof::value_variants() } else { &args.only };
    for proof in chosen {
        match proof {
            Proof::Oracle => {
                report.run(&oracle(args.operations));
                report.run(&programmed(args.operations / 50));
            }
            Proof::Loom => report.run(&test::loom(args.preemptions)),
            Proof::Rmap => report.run(&rmap(args.checks)),
            Proof::Miri => miri(&mut report),
            Proof::Asan => sanitizer(&mut report, "asan", "-Zsanitizer=address"),
            // The standard library that rustup ships is not built for TSan; the second flag lets it link all the same.
            Proof::Tsan => {
                sanitizer(&mut report, "tsan", "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer");
            }
            Proof::Random => random(&mut report, Duration::from_secs(args.random_seconds), args.times),
            Proof::Fuzz => fuzz(&mut report, args.fuzz_seconds),
            Proof::Linux => linux(&mut report),
            Proof::Oldest => oldest::run(&mut report),
            Proof::Mutants => mutants(&mut report),
        }
    }
    Ok(report.finish())
}

fn linux(report: &mut Report) {
    let all = [
        "--scenario=trivial",
        "--scenario=boot",
        "--scenario=hotplug",
        "--scenario=storm",
        "--scenario=shootdown",
    ];
    let large = ["--scenario=dirty", "--pages=2m"];
    let small =
        ["--scenario=boot", "--scenario=hotplug", "--scenario=storm", "--scenario=dirty", "--pages=4k"];
    let two = ["--smp=2", "--scenario=boot", "--scenario=hotplug", "--scenario=storm", "--scenario=dirty"];
    let four = ["--smp=4", "--scenario=boot", "--scenario=dirty", "--pages=4k"];
    let runs: [(&str, &[&str]); 5] = [
        ("large pages", &all),
        ("dirty log", &large),
        ("small pages", &small),
        ("two processors", &two),
        ("four processors", &four),
    ];
    let repeatable = ["--icount", "--twice", "--memory=256M", "--rounds=1", "--scenario=dirty", "--pages=4k"];
    let step = ["xtask", "linux", "--quiet"].into_iter().chain(repeatable);
    report.run(&Step::cargo("linux, repeatable", step).xtask());
    for (name, arguments) in runs {
        for rearm in ["protect", "bits"] {
            let name = format!("linux, {name}, {rearm}");
            let step = ["xtask", "linux", "--quiet"].iter().chain(arguments).copied();
            report.run(&Step::cargo(&name, step).arg(format!("--rearm={rearm}")).xtask());
        }
    }
    // Under nested paging the processor itself walks what the torture guest edits.
    let torture = ["--scenario=torture"];
    let scenarios = [
        "--scenario=torture",
        "--scenario=boot",
        "--scenario=hotplug",
        "--scenario=storm",
        "--scenario=dirty",
    ];
    let runs: [(&str, &[&str], &[&str]); 6] = [
        ("torture, nested", &torture, &[]),
        ("shadow", &scenarios, &["--paging=shadow"]),
        ("shadow, small pages", &scenarios, &["--paging=shadow", "--pages=4k"]),
        (
            "shadow, page tables of its own for user space",
            &["--scenario=boot"],
            &["--paging=shadow", "--pti"],
        ),
        ("shadow, without KASLR", &["--scenario=boot"], &["--paging=shadow", "--no-kaslr"]),
        ("shadow, unsync as KVM has it", &scenarios[..2], &["--paging=shadow", "--unsync=1"]),
    ];
    for (name, scenarios, options) in runs {
        let step = ["xtask", "linux", "--quiet"].iter().chain(scenarios).chain(options).copied();
        report.run(&Step::cargo(&format!("linux, {name}"), step).xtask());
    }
}

fn oracle(operations: u64) -> Step {
    Step::cargo(
        "oracle",
        ["test", "--quiet", "--release", "-p", "memslot", "--test", "oracle", "--test", "dirty_oracle"],
    )
    .env("MEMSLOT_ORACLE_OPS", operations.to_string())
    .tests()
}

/// A change of the table is some calls and a dozen writes of the guest.
fn programmed(changes: u64) -> Step {
    Step::cargo(
        "programmed",
        ["test", "--quiet", "--release", "-p", "memslot-kvm", "--test", "kernel", "--test", "model"],
    )
    .env("MEMSLOT_KVM_CHANGES", changes.to_string())
    .env("PROPTEST_CASES", (changes / 20).max(1).to_string())
    .tests()
}

fn rmap(checks: u64) -> Step {
    Step::cargo("rmap", ["test", "--quiet", "--release", "-p", "memslot-mmu", "--test", "rmap", "stress"])
        .env("MEMSLOT_RMAP_CHECKS", checks.to_string())
        .tests()
}

fn miri(report: &mut Report) {
    if !tools::has_miri() {
        return report.skip("miri", "miri is not installed for nightly");
    }
    // Without isolation, tests may say in a file what they skipped. There are few cases in Miri unless they are asked for.
    report.run(
        &Step::cargo(
            "miri",
            ["+nightly", "miri", "test", "-p", "memslot", "-p", "memslot-mmu", "--no-fail-fast"],
        )
        .env("MIRIFLAGS", "-Zmiri-disable-isolation")
        .own_target("miri")
        .tests(),
    );
}

fn sanitizer(report: &mut Report, name: &str, flags: &str) {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    if !tools::has_nightly() {
        return report.skip(name, "no nightly toolchain");
    }
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return report.skip(name, "sanitizers are set up for x86-64 Linux only");
    }
    let arguments = ["+nightly", "test", "--quiet", "--lib", "--tests", "--no-fail-fast", "--target", TARGET];
    report.run(
        &Step::cargo(name, arguments.into_iter().chain(CRATES)).rustflags(flags).own_target(name).tests(),
    );
}

/// `cargo xtask test` tries the same random programs in each run. Here no two rounds do.
///
/// The heading of the round that failed is the command that repeats it.
fn random(report: &mut Report, time: Duration, times: u32) {
    let until = Instant::now() + time;
    for round in 1.. {
        let seed = RandomState::new().build_hasher().finish() % 1_000_000_000;
        let arguments = ["test", "--quiet", "--release", "--lib", "--bins", "--tests", "--no-fail-fast"];
        let more = ["-p", "memslot-cli", "-p", "memslot-preload"];
        let step = Step::cargo(&format!("random, round {round}"), arguments)
            .args(CRATES.into_iter().chain(more))
            .env("MEMSLOT_SEED", seed.to_string())
            .env("MEMSLOT_TIMES", times.to_string())
            .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true")
            .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .own_target("random");
        report.run(&step.tests());
        // What was found once is found again by the next seed.
        if report.has_just_failed() || Instant::now() >= until {
            break;
        }
    }
}

/// Every target of `fuzz/`, from its seeds on. What is found is kept below `fuzz/`.
fn fuzz(report: &mut Report, seconds: u32) {
    if !tools::has_fuzz() {
        return report.skip("fuzz", "cargo-fuzz or a nightly toolchain is not installed");
    }
    for target in ["trace", "ring", "dirty", "shadow"] {
        let corpus = format!("fuzz/corpus/{target}");
        if let Err(error) = fs::create_dir_all(step::workspace_root().join(&corpus)) {
            return report.skip("fuzz", &format!("{corpus} cannot be made: {error}"));
        }
        let name = format!("fuzz {target}");
        let step = Step::cargo(&name, ["+nightly", "fuzz", "run", target])
            .arg(corpus)
            .arg(format!("fuzz/seeds/{target}"))
            .arg("--")
            .arg(format!("-max_total_time={seconds}"))
            .arg("-max_len=4096");
        report.run(&step.own_target("fuzz"));
    }
}

/// A mutant that survives is a question to a person (is it a hole in the tests, or the same program?), not a failure.
fn mutants(report: &mut Report) {
    if !tools::has_mutants() {
        return report.skip("mutants", "cargo-mutants is not installed");
    }
    // Models are tests, which the ordinary build does not have.
    let core: &[&str] = &["--package", "memslot", "--exclude", "**/*_loom.rs"];
    // Only the tests that are about it: all of the crate's would take minutes for each mutant.
    let rmap: &[&str] = &[
        "--package",
        "memslot-mmu",
        "--file",
        "crates/memslot-mmu/src/rmap/*.rs",
        "--exclude",
        "**/loom_tests.rs",
        "--",
        "--test",
        "rmap",
        "--test",
        "rmap_allocation",
    ];
    for (name, arguments) in [("mutants", core), ("mutants, rmap", rmap)] {
        let output = step::target_directory().join(name.replace(", ", "-"));
        let step = Step::cargo(name, ["mutants", "--no-shuffle", "--output"])
            .arg(output.display().to_string())
            .env("MEMSLOT_RMAP_CHECKS", "200000");
        let step = arguments.iter().fold(step, |step, argument| step.arg(*argument));
        // cargo-mutants ends with 2 if mutants survived, with 3 if some ran into the time limit.
        report.run(&step.accepts(&[2, 3]));
        for (list, title) in [("missed.txt", "survived"), ("timeout.txt", "ran into the time limit")] {
            let found = fs::read_to_string(output.join("mutants.out").join(list)).unwrap_or_default();
            say(&format!("{} mutants {title}", found.lines().count()));
            for mutant in found.lines() {
                say(&format!("  {mutant}"));
            }
        }
    }
}
