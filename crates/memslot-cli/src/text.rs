//! The report for a person: ioctls, map, warnings, and the verdict last, where a terminal shows it.

use std::fmt::{self, Write};

use crate::history::Kind;
use crate::report::{HoleReport, Report, SlotReport, VmReport};
use crate::style::{self, paint};
use crate::units;
use crate::warnings::Warning;

/// More findings than this of one sort are only counted; `--json` has them all.
const SHOWN: usize = 10;

/// Writes the whole report.
pub(crate) fn write(out: &mut String, report: &Report) -> fmt::Result {
    header(out, report)?;
    ioctls(out, report)?;
    for vm in &report.vms {
        changes(out, vm)?;
        map(out, report, vm)?;
        warnings(out, vm)?;
    }
    not_judged(out, report)?;
    verdict(out, report)
}

fn header(out: &mut String, report: &Report) -> fmt::Result {
    let format = report.format.map_or_else(String::new, |format| format!("{format}, "));
    let calls: u64 = report.ioctls_by_count.iter().map(|(_, count)| count).sum();
    write!(out, "{}: {format}{}", paint(style::BOLD, &report.file), units::count(report.lines, "line"))?;
    write!(out, ", {}", units::count(calls, "KVM ioctl"))?;
    if let Some(span) = report.span_ns {
        write!(out, " in {}", units::duration(span))?;
    }
    match report.at {
        Some(line) => writeln!(out, ", up to line {line}")?,
        None => writeln!(out)?,
    }
    let ignored = &report.ignored;
    let parts: Vec<String> = [
        (ignored.other_calls, "other system call"),
        (ignored.events, "signal or exit line"),
        (ignored.foreign, "line not from strace"),
        (ignored.unfinished, "KVM call without an end"),
    ]
    .iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{count} \u{d7} {what}"))
    .collect();
    match parts.is_empty() {
        true => Ok(()),
        false => writeln!(out, "passed over: {}", parts.join(", ")),
    }
}

fn ioctls(out: &mut String, report: &Report) -> fmt::Result {
    writeln!(out, "\n{}", paint(style::BOLD, "VMM ioctls"))?;
    let width = report.ioctls_by_count.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, count) in &report.ioctls_by_count {
        writeln!(out, "  {name:width$}  {count:>7}")?;
    }
    Ok(())
}

fn changes(out: &mut String, vm: &VmReport) -> fmt::Result {
    let c = &vm.changes;
    let total = c.create + c.delete + c.moved + c.flags + c.nothing + c.refused;
    let parts: Vec<String> = [
        (c.create, "create"),
        (c.delete, "delete"),
        (c.moved, "move"),
        (c.flags, "change of flags"),
        (c.nothing, "without effect"),
        (c.refused, "refused"),
    ]
    .iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{count} {what}"))
    .collect();
    writeln!(out, "\n{}", paint(style::BOLD, format_args!("VM {}", vm.name)))?;
    write!(out, "  {} to the map", units::count(total, "call"))?;
    match parts.is_empty() {
        true => writeln!(out)?,
        false => writeln!(out, ": {}", parts.join(", "))?,
    }
    match vm.most_slots.slots {
        0 => Ok(()),
        most => writeln!(
            out,
            "  at most {} alive at once, first at line {}",
            units::count(most, "slot"),
            vm.most_slots.line
        ),
    }
}

fn map(out: &mut String, report: &Report, vm: &VmReport) -> fmt::Result {
    writeln!(
        out,
        "  map after line {}: {}, {}\n",
        report.lines,
        units::count(vm.slots.len(), "slot"),
        units::size(vm.bytes)
    )?;
    if vm.slots.is_empty() {
        return Ok(());
    }
    let gpa_digits = units::digits(vm.slots.iter().map(|slot| slot.end.0).max().unwrap_or(0));
    let hva_digits = units::digits(vm.slots.iter().map(|slot| slot.hva.0).max().unwrap_or(0));
    let (gpa, hva) = (gpa_digits + 2, hva_digits + 2);
    let head = format!(
        "  {:gpa$}  {:gpa$}  {:>10}  {:>5}  {:hva$}  {:11}  {:23}  aliases",
        "gpa", "end", "size", "slot", "hva", "kind", "flags"
    );
    writeln!(out, "{}", paint(style::FAINT, head))?;
    let mut holes = vm.holes.iter().peekable();
    for slot in &vm.slots {
        while let Some(hole) = holes.next_if(|hole| before(hole, slot)) {
            let row = format!(
                "  {}  {}  {:>10}      \u{b7}  hole",
                units::address(hole.gpa.0, gpa_digits),
                units::address(hole.end.0, gpa_digits),
                units::size(hole.size)
            );
            writeln!(out, "{}", paint(style::FAINT, row))?;
        }
        let id = match slot.address_space {
            0 => slot.slot.to_string(),
            space => format!("{space}:{}", slot.slot),
        };
        let row = format!(
            "  {}  {}  {:>10}  {id:>5}  {}  {}  {:23}  {}",
            units::address(slot.gpa.0, gpa_digits),
            units::address(slot.end.0, gpa_digits),
            units::size(slot.size),
            units::address(slot.hva.0, hva_digits),
            paint(style::kind(slot.kind), format_args!("{:11}", slot.kind.label())),
            slot.flags,
            aliases(slot),
        );
        writeln!(out, "{}", row.trim_end())?;
    }
    Ok(())
}

fn before(hole: &HoleReport, slot: &SlotReport) -> bool {
    (hole.address_space, hole.gpa) < (slot.address_space, slot.gpa)
}

fn aliases(slot: &SlotReport) -> String {
    let mut text = slot.aliases.iter().take(4).map(String::as_str).collect::<Vec<_>>().join(", ");
    if slot.aliases.len() > 4 {
        _ = write!(text, ", \u{2026} ({})", slot.aliases.len());
    }
    if slot.kind == Kind::GuestMemfd {
        if let Some(memfd) = slot.guest_memfd {
            _ = write!(text, " memfd {}+{:#x}", memfd.file, memfd.offset);
        }
    }
    text
}

fn warnings(out: &mut String, vm: &VmReport) -> fmt::Result {
    if vm.warnings.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n  {}", paint(style::WARN, units::count(vm.warnings.len(), "warning")))?;
    let sort = std::mem::discriminant::<Warning>;
    for same in vm.warnings.chunk_by(|a, b| sort(a) == sort(b)) {
        for warning in same.iter().take(SHOWN) {
            writeln!(out, "  - {}", warning.describe())?;
        }
        if same.len() > SHOWN {
            writeln!(out, "    and {} more of this sort (all of them with --json)", same.len() - SHOWN)?;
        }
    }
    Ok(())
}

fn not_judged(out: &mut String, report: &Report) -> fmt::Result {
    if report.not_judged.is_empty() {
        return Ok(());
    }
    let title = format!("{} cannot be judged", units::count(report.not_judged.len(), "answer"));
    writeln!(out, "\n{}", paint(style::WARN, title))?;
    for call in report.not_judged.iter().take(SHOWN) {
        writeln!(out, "  {}:{}: {} = {}: {}", report.file, call.line, call.call, call.recorded, call.why)?;
    }
    more(out, report.not_judged.len())
}

fn verdict(out: &mut String, report: &Report) -> fmt::Result {
    writeln!(out)?;
    let dirty = &report.dirty_log;
    if dirty.get + dirty.clear > 0 {
        let (get, clear) = (dirty.get, dirty.clear);
        writeln!(
            out,
            "dirty log: {get} GET with {} and {clear} CLEAR compared",
            units::count(dirty.bits, "dirty bit")
        )?;
    }
    if dirty.reset_rings > 0 {
        let resets = units::count(dirty.reset_rings, "reset");
        writeln!(out, "dirty rings: {resets} compared; what was in the rings is not in the trace")?;
    }
    if dirty.unprinted > 0 {
        let calls = units::count(dirty.unprinted, "dirty-log call");
        writeln!(out, "dirty log: {calls} not compared: the trace shows only a pointer for the bitmap")?;
    }
    if report.compared == 0 {
        let hint = "no call that memslot can judge is in this trace: nothing was compared";
        return writeln!(out, "{}", paint(style::WARN, hint));
    }
    if report.disagreements.is_empty() {
        let text =
            format!("agrees with KVM: {} of {} answers, 0 disagreements", report.agreed, report.compared);
        return writeln!(out, "{}", paint(style::GOOD, text));
    }
    for found in report.disagreements.iter().take(SHOWN) {
        writeln!(
            out,
            "{} {}:{}: {}",
            paint(style::BAD, "disagreement"),
            report.file,
            found.line,
            found.call
        )?;
        writeln!(out, "    recorded {}, came {}: {}", found.recorded, found.came, found.why)?;
    }
    more(out, report.disagreements.len())?;
    let text = format!(
        "disagrees with the trace: {} of {} answers differ",
        report.disagreements.len(),
        report.compared
    );
    writeln!(out, "{}", paint(style::BAD, text))
}

fn more(out: &mut String, found: usize) -> fmt::Result {
    match found.checked_sub(SHOWN) {
        None | Some(0) => Ok(()),
        Some(more) => writeln!(out, "  and {more} more (all of them with --json)"),
    }
}
