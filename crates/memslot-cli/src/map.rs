//! `memslot map`: the address space drawn with characters.
//!
//! Each segment of the broken axis (see [`crate::layout`]) is a block of rows; every cell of a block stands for
//! the same number of bytes, written at the right. A slot is drawn `[id size███]` in the glyph of its kind, so
//! that the picture says the same without colour; holes are dots to scale, or one line where they are too large.

use std::fmt::{self, Write};

use anstyle::Style;

use crate::history::{Kind, MapSlot};
use crate::layout::{self, Segment};
use crate::report::Report;
use crate::style::{self, paint};
use crate::units;

const HOLE: char = '\u{b7}';
/// Rows a block may have; a map of very many slots is cut into more blocks instead.
const MAX_ROWS: u64 = 64;
/// Room for the scale at the right: ` 1023 GiB`.
const SCALE: usize = 9;

/// Pairs of slots on the same host memory that are listed below the picture.
const SHARING_SHOWN: usize = 10;

const fn glyph(kind: Kind) -> char {
    match kind {
        Kind::Ram => '\u{2588}',
        Kind::RamLogged => '\u{2593}',
        Kind::Rom => '\u{2592}',
        Kind::RomLogged => '\u{2591}',
        Kind::GuestMemfd => '\u{259e}',
    }
}

/// Writes the maps of all VMs of a report, `width` characters wide. `maps` holds each VM's slots, in its order.
pub(crate) fn write(out: &mut String, report: &Report, maps: &[Vec<MapSlot>], width: usize) -> fmt::Result {
    for (vm, map) in report.vms.iter().zip(maps) {
        for space in map.chunk_by(|a, b| a.address_space == b.address_space) {
            let bytes = units::size(space.iter().map(|slot| slot.size).sum());
            let title = match space[0].address_space {
                0 => format!("VM {}", vm.name),
                1 => format!("VM {}, address space 1 (SMM)", vm.name),
                other => format!("VM {}, address space {other}", vm.name),
            };
            writeln!(
                out,
                "{}  {}  {}, {bytes}, after line {}",
                paint(style::BOLD, &report.file),
                title,
                units::count(space.len(), "slot"),
                report.lines
            )?;
            draw(out, space, width)?;
            writeln!(out)?;
        }
        if map.is_empty() {
            writeln!(out, "{}: no slots after line {}", paint(style::BOLD, &report.file), report.lines)?;
        }
    }
    if report.vms.is_empty() {
        writeln!(out, "{}: no VM in this trace", paint(style::BOLD, &report.file))?;
    }
    if !report.disagreements.is_empty() {
        let text = format!("{} with the trace", units::count(report.disagreements.len(), "disagreement"));
        writeln!(out, "{}: the map may be wrong; `memslot replay` lists them", paint(style::BAD, text))?;
    }
    Ok(())
}

fn draw(out: &mut String, slots: &[MapSlot], width: usize) -> fmt::Result {
    let digits = units::digits(slots.iter().map(MapSlot::end).max().unwrap_or(0));
    let margin = digits + 2;
    // Rows of a round number of cells begin at rounder addresses.
    let cells = (width.saturating_sub(margin + 1 + SCALE) / 8 * 8).max(8);
    let ranges: Vec<(u64, u64)> = slots.iter().map(|slot| (slot.gpa, slot.end())).collect();
    let row = u64::try_from(cells).unwrap_or(u64::MAX);
    let segments = layout::segments(&layout::pieces(&ranges), row, MAX_ROWS);
    let aliased: Vec<bool> = aliased(slots);

    writeln!(out, "{}", paint(style::FAINT, format_args!("{:margin$} {:cells$} one cell", "gpa", "")))?;
    let mut next = 0;
    for segment in &segments {
        if segment.cell_shift.is_none() {
            hole(out, segment, digits, cells)?;
            continue;
        }
        let inside = slots[next..].iter().take_while(|slot| slot.gpa < segment.end).count();
        block(out, segment, &slots[next..next + inside], &aliased[next..next + inside], digits, cells)?;
        next += inside;
    }
    if let Some(last) = segments.last() {
        writeln!(out, "{}", paint(style::FAINT, units::address(last.end, digits)))?;
    }
    legend(out, slots, &aliased)
}

/// A hole that is not to scale: a line across, with its size.
fn hole(out: &mut String, segment: &Segment, digits: usize, cells: usize) -> fmt::Result {
    let label = format!(" hole {} ", units::size(segment.end - segment.start));
    let left = cells.saturating_sub(label.chars().count()) / 2;
    let right = cells.saturating_sub(label.chars().count() + left);
    let line = format!("{0:\u{2508}<left$}{label}{0:\u{2508}<right$}", "");
    writeln!(out, "{}", paint(style::FAINT, format_args!("{} {line}", units::address(segment.start, digits))))
}

/// A block of rows to one scale.
fn block(
    out: &mut String,
    segment: &Segment,
    slots: &[MapSlot],
    aliased: &[bool],
    digits: usize,
    width: usize,
) -> fmt::Result {
    let shift = segment.cell_shift.unwrap_or(0);
    let length = usize::try_from(segment.len()).unwrap_or(usize::MAX);
    let mut cells: Vec<(char, Style)> = vec![(HOLE, style::FAINT); length];
    for (slot, &aliased) in slots.iter().zip(aliased) {
        let (first, after) = segment.cells(slot.gpa, slot.end());
        let (first, after) = (usize::try_from(first).unwrap_or(0), usize::try_from(after).unwrap_or(0));
        let style = style::kind(slot.kind());
        let text = bar(slot, aliased, after.saturating_sub(first), width - first % width);
        for (cell, char) in cells.iter_mut().skip(first).zip(text) {
            *cell = (char, style);
        }
    }
    for (nth, row) in cells.chunks(width).enumerate() {
        let from = (segment.start >> shift) + u64::try_from(nth * width).unwrap_or(0);
        let from = (from << shift).max(segment.start);
        write!(out, "{} ", units::address(from, digits))?;
        for run in row.chunk_by(|a, b| a.1 == b.1) {
            let text: String = run.iter().map(|(char, _)| char).collect();
            write!(out, "{}", paint(run[0].1, text))?;
        }
        match nth {
            0 => {
                let pad = width - row.len();
                let scale = paint(style::FAINT, units::size(1 << shift));
                writeln!(out, "{:pad$} {scale}", "")?;
            }
            _ => writeln!(out)?,
        }
    }
    Ok(())
}

/// `[3* 128 KiB▒▒▒]`, as much of the text as fits `length` cells and the `left` ones of the row it begins in.
fn bar(slot: &MapSlot, aliased: bool, length: usize, left: usize) -> Vec<char> {
    let fill = glyph(slot.kind());
    if length < 2 {
        return vec![fill; length];
    }
    let id = format!("{}{}", slot.id, if aliased { "*" } else { "" });
    let long = format!("{id} {}", units::size(slot.size));
    let room = (length - 2).min(left.saturating_sub(1));
    let label = [long.as_str(), id.as_str(), ""].into_iter().find(|text| text.len() <= room).unwrap_or("");
    let mut text = vec!['['];
    text.extend(label.chars());
    text.resize(length - 1, fill);
    text.push(']');
    text
}

fn aliased(slots: &[MapSlot]) -> Vec<bool> {
    let mut by_hva: Vec<usize> = (0..slots.len()).collect();
    by_hva.sort_by_key(|&at| slots[at].hva);
    let mut aliased = vec![false; slots.len()];
    // The slot that reaches furthest so far is the one a later start can fall into.
    let mut furthest: Option<usize> = None;
    for &at in &by_hva {
        if let Some(before) = furthest {
            if slots[at].hva < slots[before].hva_end() {
                aliased[at] = true;
                aliased[before] = true;
            }
        }
        if furthest.is_none_or(|before| slots[at].hva_end() > slots[before].hva_end()) {
            furthest = Some(at);
        }
    }
    aliased
}

fn legend(out: &mut String, slots: &[MapSlot], aliased: &[bool]) -> fmt::Result {
    let mut parts = Vec::new();
    for kind in Kind::ALL {
        if slots.iter().any(|slot| slot.kind() == kind) {
            let bar = glyph(kind).to_string().repeat(2);
            parts.push(format!("{} {}", paint(style::kind(kind), bar), kind.label()));
        }
    }
    parts.push(format!("{} hole", paint(style::FAINT, format_args!("{HOLE}{HOLE}"))));
    if aliased.contains(&true) {
        parts.push("* shares host memory with another slot".to_owned());
    }
    writeln!(out, "{}", parts.join("   "))?;
    let sharing: Vec<&MapSlot> =
        slots.iter().zip(aliased).filter(|(_, shares)| **shares).map(|(s, _)| s).collect();
    let pairs = sharing.iter().enumerate().flat_map(|(nth, slot)| {
        sharing[nth + 1..].iter().filter(|other| slot.aliases(other)).map(move |other| (slot, other))
    });
    for (nth, (slot, other)) in pairs.take(SHARING_SHOWN + 1).enumerate() {
        match nth {
            SHARING_SHOWN => writeln!(out, "and more; `memslot map --json` has the aliases of each slot")?,
            _ => writeln!(out, "{} and {} share host memory", slot.describe(), other.describe())?,
        }
    }
    Ok(())
}
