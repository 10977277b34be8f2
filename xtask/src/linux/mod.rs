//! `cargo xtask linux`: Linux on the hypervisor of this repository, in QEMU without hardware support.

mod archive;
mod figures;
pub(crate) mod kernel;
mod machine;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use self::archive::Archive;
use self::figures::Run;
use self::machine::Ended;
use crate::run::{Report, say};
use crate::step::{Step, target_directory};
use crate::{setup, tools};

/// Boot an unmodified Debian kernel on the hypervisor of this repository and say what became of it.
///
/// Builds `hypervisor/`, packs kernel and first program, starts `qemu-system-x86_64 -accel tcg`, shows the console live, and ends by
/// itself: with PASS or a reason, and with figures (boot time, exits, faults, tables, flushes, dirty rounds). What is missing, QEMU or
/// the kernel package, is installed or downloaded where apt-get may be used; else the run is skipped.
///
/// Times are QEMU's. What means something is the ratio that `--plain` prints: to the same kernel and work in QEMU alone. Where the
/// machine does something else as well, the ratio of processor times says more than that of wall times.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What is done; may be given several times
    #[arg(long, value_name = "NAME", default_value = "boot")]
    scenario: Vec<Scenario>,
    /// How the guest's memory is translated
    #[arg(long, default_value = "nested")]
    paging: Paging,
    /// The guest's memory, such as 384M or 1G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size)]
    memory: u64,
    /// The largest page; in `dirty`, 4k has the log run from the start, 2m has it start later and split pages
    #[arg(long, default_value = "2m")]
    pages: Pages,
    /// How the dirty log notices the next write to a page
    #[arg(long, default_value = "protect")]
    rearm: Rearm,
    /// Let Linux have page tables of its own for user space (as it has on processors that leak the kernel's)
    #[arg(long)]
    pti: bool,
    /// Let Linux not choose where its kernel lies
    #[arg(long)]
    no_kaslr: bool,
    /// With shadow paging: how many shadow pages there may be
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(64..))]
    shadow_pages: Option<u32>,
    /// With shadow paging: up to which level the guest's tables may be out of step between its flushes
    #[arg(long, value_name = "LEVEL", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=5))]
    unsync: u8,
    /// Linux's processors, 1 to 4 (QEMU has one more then, as a bug keeps its first from running guests beside others)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    smp: u32,
    /// Leave other processors their old translations when a flush is due: then `dirty` finds lost pages, and fails
    #[arg(long)]
    no_shootdown: bool,
    /// How often the guest fills its memory and checks it
    #[arg(long, value_name = "N", default_value_t = 2)]
    rounds: u32,
    /// How much of its free memory it fills
    #[arg(long, value_name = "PERCENT", default_value_t = 70, value_parser = clap::value_parser!(u32).range(1..=90))]
    percent: u32,
    /// Run the same work in QEMU without the hypervisor first, and compare the times
    #[arg(long)]
    plain: bool,
    /// Do it so many times, each with QEMU alone beside it, and say the smallest, the median and the largest ratio
    #[arg(long, value_name = "N", default_value_t = 1, requires = "plain", value_parser = clap::value_parser!(u32).range(1..=100))]
    times: u32,
    /// Let the machine's time follow its instructions (QEMU's -icount), so that runs are the same to the byte
    #[arg(long)]
    icount: bool,
    /// Run it twice, and fail if console or figures differ in a byte
    #[arg(long, requires = "icount")]
    twice: bool,
    /// Show the console only if something fails
    #[arg(long)]
    quiet: bool,
    /// Another kernel image (bzImage)
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// End a run that takes longer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    time_limit: u64,
    /// Install and download nothing
    #[arg(long)]
    no_setup: bool,
    /// Also write the figures to FILE as a JSON array
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// A guest of five instructions, to see nested paging work at all (no Linux)
    Trivial,
    /// Linux to user space, processes that fill most of RAM, every page checked
    Boot,
    /// A copy of RAM kept up to date from the dirty log, compared with RAM at the end
    Dirty,
    /// Memory plugged in, made ROM, moved, split, resized, unplugged; a program of the guest looks at it
    Hotplug,
    /// Slots churn and pages move thousands of times a second while the guest works
    Storm,
    /// A page is protected, moved and taken away while another processor writes to it (no Linux)
    Shootdown,
    /// A guest that edits its own page tables in the orders that have broken shadow paging before (no Linux)
    Torture,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Paging {
    /// Nested page tables
    Nested,
    /// Shadow page tables, made of the guest's own: nested paging is off, and Linux has four levels
    Shadow,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pages {
    #[value(name = "4k")]
    K4,
    #[value(name = "2m")]
    M2,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rearm {
    /// Write protection
    Protect,
    /// The processor's dirty bits
    Bits,
}

impl Args {
    /// What a run is of, in words.
    fn heading(&self, scenario: Scenario) -> String {
        let mut text =
            format!("{} paging, {} MiB, pages {}", word(&self.paging), self.memory >> 20, word(&self.pages));
        if scenario == Scenario::Dirty {
            text += match self.rearm {
                Rearm::Protect => ", write protection",
                Rearm::Bits => ", dirty bits",
            };
        }
        if self.smp > 1 && scenario != Scenario::Shootdown {
            text += &format!(", {} processors", self.smp);
        }
        text
    }

    /// Whether the options go together, before anything is built.
    fn check(&self) -> Result<()> {
        if self.icount && self.smp > 1 {
            bail!(
                "--icount is for one processor: QEMU then runs several in long turns, and they wait for each other"
            );
        }
        if self.no_shootdown && self.smp == 1 {
            bail!("--no-shootdown makes no difference with one processor: add --smp 2");
        }
        if self.paging == Paging::Nested {
            return Ok(());
        }
        if self.smp > 1 {
            bail!(
                "--paging shadow is for one processor here: the hypervisor starts Linux's other processors on nested tables \
                 only. Leave out --smp {}, or --paging shadow",
                self.smp
            );
        }
        let is_nested = |scenario: &&Scenario| matches!(scenario, Scenario::Trivial | Scenario::Shootdown);
        if let Some(scenario) = self.scenario.iter().find(is_nested) {
            bail!(
                "--scenario {} is about nested tables and has no shadow tables: leave out --paging shadow",
                word(scenario)
            );
        }
        if self.rearm == Rearm::Bits {
            bail!(
                "--rearm bits is for nested tables: with --paging shadow the log works by write protection"
            );
        }
        Ok(())
    }

    /// The processor. Without nested paging and with the same in QEMU alone, Linux has four levels of tables.
    fn cpu(&self) -> &'static str {
        match self.paging {
            Paging::Nested => "max",
            Paging::Shadow => "max,-la57",
        }
    }
}

fn word(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = text.split_at(text.trim_end_matches(['M', 'G']).len());
    let number: u64 = number.parse().map_err(|_| "a size is a number and M or G")?;
    let bytes = match unit {
        "M" => number << 20,
        "G" => number << 30,
        _ => return Err("a size is a number and M or G".to_owned()),
    };
    if (128 << 20..=2 << 30).contains(&bytes) { Ok(bytes) } else { Err("from 128M to 2G".to_owned()) }
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    args.check()?;
    let mut report = Report::new()?;
    let kernel = match kernel(args) {
        Ok(kernel) => kernel,
        Err(why) => {
            args.scenario.iter().for_each(|&scenario| {
                report.skip(&format!("linux {}", word(&scenario)), &format!("{why:#}"));
            });
            return Ok(report.finish());
        }
    };
    let build = [
        "build",
        "--quiet",
        "-p",
        "memslot-hypervisor",
        "--features",
        "bare-metal",
        "--profile",
        "bare-metal",
        "--bins",
    ];
    report.run(&Step::cargo("build", build));
    if !report.is_good() {
        return Ok(report.finish());
    }
    let files = Files::pack(&kernel)?;
    let mut rows = Vec::new();
    for &scenario in &args.scenario {
        let mut ratios = Vec::new();
        for time in 1..=args.times {
            let mut name = format!("linux {}", word(&scenario));
            if args.times > 1 {
                name += &format!(", {time} of {}", args.times);
            }
            let started = Instant::now();
            say(&format!("\n== {name}: {}", args.heading(scenario)));
            let run = one(args, scenario, &files)?;
            let verdict = run.verdict();
            if args.quiet && verdict.is_err() {
                say(&run.ended.console);
            }
            say(&format!("\n{}", run.text()));
            report.record(&name, verdict, started.elapsed());
            ratios.extend(run.ratios());
            rows.push(run.json());
        }
        if args.times > 1 {
            say(&format!("\n== {}: {}", word(&scenario), figures::spread(&ratios)));
        }
    }
    if let Some(file) = &args.json {
        let text = format!("[\n{}\n]\n", rows.join(",\n"));
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(report.finish())
}

/// The kernel image, or why there is none.
fn kernel(args: &Args) -> Result<PathBuf> {
    const QEMU: &str = "qemu-system-x86_64";
    if !tools::has_program(QEMU) && (args.no_setup || !setup::install() || !tools::has_program(QEMU)) {
        bail!("{QEMU} is not installed (cargo xtask setup)");
    }
    if let Some(kernel) = args.kernel.clone().or_else(kernel::find) {
        return Ok(kernel);
    }
    if args.no_setup {
        bail!("no kernel image was downloaded (cargo xtask setup)");
    }
    kernel::download()
}

/// What QEMU is given.
struct Files {
    folder: PathBuf,
    hypervisor: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Files {
    fn pack(kernel: &Path) -> Result<Self> {
        let folder = target_directory().join("xtask");
        let programs = target_directory().join("bare-metal");
        let program = programs.join("memslot-guest-init");
        let init = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
        let archive = Archive::default().folder("dev").device("dev/console", 5, 1).device("dev/mem", 1, 1);
        let initramfs = folder.join("initramfs");
        write(&initramfs, &archive.file("init", 0o755, &init).finish())?;
        Ok(Self {
            hypervisor: programs.join("memslot-hypervisor"),
            kernel: kernel.to_owned(),
            initramfs,
            folder,
        })
    }

    /// The container that the hypervisor finds everything in.
    fn container(&self, command_line: &str) -> Result<PathBuf> {
        let read = |file: &Path| fs::read(file).with_context(|| format!("cannot read {}", file.display()));
        let archive = Archive::default()
            .file("kernel", 0o644, &read(&self.kernel)?)
            .file("initramfs", 0o644, &read(&self.initramfs)?)
            .file("command-line", 0o644, command_line.as_bytes());
        let container = self.folder.join("container");
        write(&container, &archive.finish())?;
        Ok(container)
    }
}

fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(file, bytes).with_context(|| format!("cannot write {}", file.display()))
}

fn one(args: &Args, scenario: Scenario, files: &Files) -> Result<Run> {
    // Without the look whether the timer ticks: on a busy machine QEMU's ticks come late, and Linux gives up.
    let mut common = format!(
        "console=ttyS0 panic=-1 no_timer_check MEMSLOT_ROUNDS={} MEMSLOT_PERCENT={}",
        args.rounds, args.percent
    );
    if args.pti {
        common += " pti=on";
    }
    if args.no_kaslr {
        common += " nokaslr";
    }
    let progress = |what: &str| {
        if args.plain || args.twice {
            say(&format!("-- {what}"));
        }
    };
    let plain = if args.plain {
        progress("in QEMU alone");
        Some(plain(args, files, &common)?)
    } else {
        None
    };
    let hotplug = if scenario == Scenario::Hotplug { 3 * args.rounds } else { 0 };
    let container = files.container(&format!("{common} MEMSLOT_HYPERVISOR=1 MEMSLOT_HOTPLUG={hotplug}"))?;
    let words = format!(
        "scenario={} paging={} memory={} pages={} rearm={} unsync={} shadow-pages={} processors={} shootdown={}",
        word(&scenario),
        word(&args.paging),
        args.memory >> 20,
        word(&args.pages),
        word(&args.rearm),
        args.unsync,
        // Few, where it is the point that they run out.
        args.shadow_pages.unwrap_or(if scenario == Scenario::Torture { 128 } else { 8192 }),
        if scenario == Scenario::Shootdown { 1 } else { args.smp },
        if args.no_shootdown { "off" } else { "on" },
    );
    // Besides the guest's memory: the hypervisor's own, modules, firmware, and the copy that some scenarios keep.
    let copy = if scenario == Scenario::Dirty { args.memory } else { 0 };
    // The hypervisor keeps the first processor of several from the guest.
    let processors = match args.smp {
        _ if scenario == Scenario::Shootdown => 2,
        1 => 1,
        more => more + 1,
    };
    let mut qemu = machine::qemu(args.cpu(), args.memory + copy + (304 << 20), processors, args.icount);
    let figures = files.folder.join("figures");
    qemu.arg("-debugcon").arg(format!("file:{}", figures.display()));
    qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-append", &words]);
    qemu.arg("-kernel").arg(&files.hypervisor).arg("-initrd").arg(&container);
    let limit = Duration::from_secs(args.time_limit);
    progress("on the hypervisor");
    let ended = machine::run(&mut qemu, &figures, limit, !args.quiet)?;
    let again = if args.twice {
        progress("on the hypervisor again");
        Some(machine::run(&mut qemu, &figures, limit, false)?)
    } else {
        None
    };
    let what = vec![
        ("scenario", word(&scenario)),
        ("paging", word(&args.paging)),
        ("pages", word(&args.pages)),
        ("rearm", word(&args.rearm)),
        ("memory", (args.memory >> 20).to_string()),
        ("processors", args.smp.to_string()),
        ("rounds", args.rounds.to_string()),
        ("percent", args.percent.to_string()),
        ("icount", args.icount.to_string()),
        ("pti", args.pti.to_string()),
        ("kaslr", (!args.no_kaslr).to_string()),
    ];
    Ok(Run { what, ended, again, plain })
}

/// The same without the hypervisor.
fn plain(args: &Args, files: &Files, command_line: &str) -> Result<Ended> {
    let mut qemu = machine::qemu(args.cpu(), args.memory, args.smp, args.icount);
    qemu.arg("-kernel")
        .arg(&files.kernel)
        .arg("-initrd")
        .arg(&files.initramfs)
        .args(["-append", command_line]);
    let none = files.folder.join("no-figures");
    let ended = machine::run(&mut qemu, &none, Duration::from_secs(args.time_limit), false)?;
    if !ended.console.contains("memslot-init: PASS") {
        say(&ended.console);
        bail!("the guest does not pass in QEMU alone");
    }
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert!(size("512").is_err() && size("M").is_err() && size("64M").is_err() && size("3G").is_err());
    }
}
