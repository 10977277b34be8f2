//! The dirty report for a person.

use std::fmt::{self, Write};

use super::migration::Migration;
use super::slots::SlotDirty;
use super::{DirtyReport, VmDirty};
use crate::style::{self, paint};
use crate::units;

/// Writes the whole report.
pub(crate) fn write(out: &mut String, report: &DirtyReport) -> fmt::Result {
    let calls = &report.calls;
    write!(out, "{}: {}", paint(style::BOLD, &report.file), units::count(report.lines, "line"))?;
    writeln!(out, ", {} GET, {} CLEAR, {}", calls.get, calls.clear, units::count(calls.bits, "dirty bit"))?;
    if report.vms.is_empty() {
        let why = match (calls.unprinted, calls.reset_rings) {
            (0, 0) => "no KVM_GET_DIRTY_LOG is in this trace: nothing was logged, or nobody looked",
            (0, _) => "the dirty pages went through rings, and what was in them is not in the trace",
            _ => "the trace shows only pointers for the bitmaps (strace): record JSON lines to see them",
        };
        return writeln!(out, "{}", paint(style::WARN, why));
    }
    for vm in &report.vms {
        if report.vms.len() > 1 {
            writeln!(out, "\n{}", paint(style::BOLD, format!("VM {}", vm.name)))?;
        }
        slots(out, vm)?;
        match &vm.migration {
            Some(migration) => estimate(out, migration)?,
            None => writeln!(out, "\nNo estimate: a rate needs two rounds, and times")?,
        }
    }
    writeln!(out)?;
    if report.disagreements.is_empty() {
        return writeln!(out, "{}", paint(style::GOOD, "every bitmap agrees with KVM's rules"));
    }
    let wrong = units::count(report.disagreements.len(), "disagreement");
    writeln!(out, "{}; `memslot replay` shows them", paint(style::BAD, wrong))
}

fn slots(out: &mut String, vm: &VmDirty) -> fmt::Result {
    let digits = vm.slots.iter().map(|slot| units::digits(slot.gpa.0)).max().unwrap_or(1);
    let head = format!(
        "  {:<width$}  {:>10}  {:>4}  {:>6}  {:>8}  {:>13}  {:>18}  {}",
        "gpa",
        "size",
        "slot",
        "rounds",
        "written",
        "rate",
        "working set",
        "pages written by round",
        width = digits + 2
    );
    writeln!(out, "\n{}", paint(style::FAINT, head))?;
    for slot in &vm.slots {
        let id = match slot.address_space {
            0 => slot.id.to_string(),
            space => format!("{space}:{}", slot.id),
        };
        let rate = slot.bytes_per_second().map_or_else(|| "-".to_owned(), per_second);
        let share = 100.0 * slot.working_set as f64 / slot.bytes.max(1) as f64;
        writeln!(
            out,
            "  {}  {:>10}  {id:>4}  {:>6}  {:>8}  {rate:>13}  {:>10} {:>6}  {}",
            units::address(slot.gpa.0, digits),
            units::size(slot.bytes),
            slot.rounds.len(),
            slot.pages_written,
            units::size(slot.working_set),
            format!("({share:.0} %)"),
            sparkline(slot)
        )?;
    }
    Ok(())
}

/// Pages written in each round after the first, as bars; a dot is a round without any.
fn sparkline(slot: &SlotDirty) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let written: Vec<u64> = slot.rounds.iter().skip(1).map(|round| round.written).collect();
    let most = written.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&pages: &u64| match pages {
        0 => '·',
        pages => BARS[usize::try_from((pages * 8 - 1) / most).unwrap_or(7).min(7)],
    };
    written.iter().map(bar).collect()
}

fn estimate(out: &mut String, migration: &Migration) -> fmt::Result {
    let Migration { link, memory, dirty_rate, working_set, rounds, .. } = migration;
    let title = format!(
        "A pre-copy migration at {} and {} of downtime",
        per_second(link.bandwidth),
        seconds(link.downtime)
    );
    writeln!(out, "\n{}", paint(style::BOLD, title))?;
    writeln!(
        out,
        "  {} of memory, written at {}, working set {}",
        bytes(*memory),
        per_second(*dirty_rate),
        bytes(*working_set)
    )?;
    for (nth, round) in rounds.iter().enumerate().take(6) {
        let stopped = if migration.converges && nth + 1 == rounds.len() { ", the VM stopped" } else { "" };
        writeln!(
            out,
            "  round {:<2} sends {:>11} in {:>7}{stopped}",
            nth + 1,
            bytes(round.bytes),
            seconds(round.seconds)
        )?;
    }
    if rounds.len() > 6 {
        writeln!(out, "  … {} more", units::count(rounds.len() - 6, "round"))?;
    }
    if migration.converges {
        let rounds = units::count(rounds.len(), "round");
        let verdict = format!("converges: {rounds}, {} in all", seconds(migration.total_seconds));
        return writeln!(
            out,
            "  {}, the VM stands still for {}",
            paint(style::GOOD, verdict),
            seconds(migration.downtime)
        );
    }
    let left = rounds.last().map_or(0.0, |round| round.bytes);
    let why = format!("never converges: each round leaves {} dirty", bytes(left));
    writeln!(out, "  {}, and sending it takes {}", paint(style::BAD, why), seconds(migration.downtime))?;
    let needed = migration
        .bandwidth_needed
        .map_or_else(String::new, |bandwidth| format!("a bandwidth of {}, or ", per_second(bandwidth)));
    writeln!(out, "  it would with {needed}a downtime of {}", seconds(migration.downtime))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "figures for people")]
fn bytes(bytes: f64) -> String {
    let mut unit = 1.0;
    while bytes >= 1024.0 * unit {
        unit *= 1024.0;
    }
    // Two decimals at most, whatever the unit.
    units::size(((bytes / unit * 100.0).round() / 100.0 * unit).round() as u64)
}

fn per_second(rate: f64) -> String {
    format!("{}/s", bytes(rate))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "figures for people")]
fn seconds(seconds: f64) -> String {
    units::duration((seconds * 1e9).round() as u64)
}
