//! `--svg`: the memory map over time.
//!
//! Up is guest-physical address, on the broken axis of [`crate::layout`]; right is time. A slot is a rectangle
//! from the moment it came to the moment it went. VMMs change their maps in bursts of microseconds with seconds
//! between, so time is compressed too: the width of a pause grows with its logarithm, and the labels below say
//! the true time.

mod clock;
pub(crate) mod heat;

use std::collections::HashSet;

use svg::Document;
use svg::node::element::{Group, Line, Path, Rectangle, Text, Title};

use clock::Clock;

use crate::history::{Kind, Lifetime, MapSlot};
use crate::layout::{self, Segment};
use crate::replay::{Replay, Vm};
use crate::trace::VmKey;
use crate::units;

const PLOT_WIDTH: f64 = 900.0;
const RIGHT: f64 = 34.0;
const LABEL_HEIGHT: f64 = 12.0;
const GAP_HEIGHT: f64 = 26.0;
/// Between neighbouring segments of different scales.
const SEAM: f64 = 6.0;
/// Cells a one-line segment would have, and the most lines of one: sets how much is drawn to one scale.
const CELLS: u64 = 24;
const MAX_ROWS: u64 = 48;

/// With more lifetimes than this, rectangles a pixel or two apart are drawn as one.
const MANY: usize = 20_000;

const INK: &str = "#24292f";
const FAINT: &str = "#6e7781";
const RULE: &str = "#d8dee4";

const fn fill(kind: Kind) -> &'static str {
    match kind {
        Kind::Ram => "#4c78a8",
        Kind::RamLogged => "#f2a541",
        Kind::Rom => "#59a14f",
        Kind::RomLogged => "#b07aa1",
        Kind::GuestMemfd => "#3aa6a6",
    }
}

/// Dark enough or light enough to be read on [`fill`].
const fn ink_on(kind: Kind) -> &'static str {
    match kind {
        Kind::RamLogged => "#24292f",
        _ => "#ffffff",
    }
}

/// The picture as SVG text.
pub(crate) fn draw(name: &str, replay: &Replay) -> String {
    let tracks: Vec<Track<'_>> = replay.vms.iter().flat_map(|vm| Track::of(vm, replay.span_ns)).collect();
    let digits = tracks.iter().flat_map(|track| &track.segments).map(|s| units::digits(s.end)).max();
    let left = 7.0 * (digits.unwrap_or(1) + 2) as f64 + 34.0;
    let width = left + PLOT_WIDTH + RIGHT;
    let mut y = 30.0;
    let mut body = Group::new();
    body = body.add(
        text(16.0, y, 16.0, INK, &format!("Guest memory over time: {}", base_name(name)))
            .set("font-weight", "bold"),
    );
    y += 20.0;
    body = body.add(text(16.0, y, 12.0, FAINT, &summary(replay)));
    y += 14.0;
    body = legend(body, &tracks, &mut y);
    for track in &tracks {
        if tracks.len() > 1 {
            y += 24.0;
            body = body.add(text(16.0, y, 13.0, INK, &track.title).set("font-weight", "bold"));
        }
        y += 32.0;
        body = track.draw(body, left, digits.unwrap_or(1), &mut y, replay);
    }
    if tracks.is_empty() {
        y += 30.0;
        body = body.add(text(16.0, y, 13.0, INK, "No slot was ever created."));
    }
    let height = y + 16.0;
    document(&format!("Guest memory over time: {name}"), (width, height), body)
}

/// The text of a picture on white paper.
fn document(title: &str, (width, height): (f64, f64), body: Group) -> String {
    let paper = Rectangle::new().set("width", width).set("height", height).set("fill", "#ffffff");
    let document = Document::new()
        .set("viewBox", (0, 0, width.ceil(), height.ceil()))
        .set("width", width.ceil())
        .set("height", height.ceil())
        .set("font-family", "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif")
        .add(Title::new(escape(title)))
        .add(paper)
        .add(body);
    format!("{document}\n")
}

fn summary(replay: &Replay) -> String {
    let changes: u64 = replay
        .vms
        .iter()
        .map(|vm| vm.changes.create + vm.changes.delete + vm.changes.moved + vm.changes.flags)
        .sum();
    let most = replay.vms.iter().filter_map(|vm| vm.history.most()).map(|(most, _)| most).max().unwrap_or(0);
    let mut parts =
        vec![units::count(changes, "change"), format!("at most {} at once", units::count(most, "slot"))];
    if let Some(span) = replay.span_ns {
        parts.push(format!("{} recorded", units::duration(span)));
    }
    if !replay.disagreements.is_empty() {
        parts.push(format!("{} (red)", units::count(replay.disagreements.len(), "disagreement")));
    }
    parts.join(" \u{b7} ")
}

fn legend(mut body: Group, tracks: &[Track<'_>], y: &mut f64) -> Group {
    let mut x = 16.0;
    for kind in Kind::ALL {
        if !tracks.iter().any(|track| track.lifetimes.iter().any(|lifetime| lifetime.slot.kind() == kind)) {
            continue;
        }
        let swatch = Rectangle::new().set("x", x).set("y", *y).set("width", 14).set("height", 12);
        body = body.add(swatch.set("fill", fill(kind)).set("rx", 2));
        body = body.add(text(x + 20.0, *y + 10.0, 12.0, INK, kind.label()));
        x += 46.0 + 7.2 * kind.label().chars().count() as f64;
    }
    *y += 12.0;
    body
}

/// One address space of one VM.
struct Track<'a> {
    title: String,
    key: VmKey,
    lifetimes: Vec<&'a Lifetime>,
    segments: Vec<Segment>,
    clock: Clock,
}

impl<'a> Track<'a> {
    fn of(vm: &'a Vm, end_ns: Option<u64>) -> Vec<Self> {
        let mut spaces: Vec<u32> = vm.history.lifetimes().iter().map(|l| l.slot.address_space).collect();
        spaces.sort_unstable();
        spaces.dedup();
        let track = |space: u32| {
            let lifetimes: Vec<&Lifetime> =
                vm.history.lifetimes().iter().filter(|l| l.slot.address_space == space).collect();
            let ranges: Vec<(u64, u64)> = lifetimes.iter().map(|l| (l.slot.gpa, l.slot.end())).collect();
            let segments = layout::segments(&layout::pieces(&ranges), CELLS, MAX_ROWS);
            let title = match space {
                0 => format!("VM {}", vm.name),
                1 => format!("VM {}, address space 1 (SMM)", vm.name),
                other => format!("VM {}, address space {other}", vm.name),
            };
            let clock = Clock::new(&lifetimes, end_ns);
            Track { title, key: vm.key, lifetimes, segments, clock }
        };
        spaces.into_iter().map(track).collect()
    }

    fn draw(&self, mut body: Group, left: f64, digits: usize, y: &mut f64, replay: &Replay) -> Group {
        let top = *y;
        // Addresses grow upwards, so the last segment is drawn first.
        let mut bands = Vec::new();
        for segment in self.segments.iter().rev() {
            let height = height(segment);
            let seam =
                bands.last().is_some_and(|above: &Band<'_>| above.scaled() && segment.cell_shift.is_some());
            *y += if seam { SEAM } else { 0.0 };
            bands.push(Band { segment, top: *y, height });
            if seam {
                body = body.add(strokes(left, *y - SEAM / 2.0));
            }
            *y += height;
        }
        let bottom = *y;
        body = body.add(axis_title(left, top));
        for band in bands.iter().filter(|band| band.scaled()) {
            let frame = Rectangle::new().set("x", left).set("y", round(band.top)).set("width", PLOT_WIDTH);
            body = body.add(frame.set("height", round(band.height)).set("fill", "#f6f8fa"));
        }
        let (grid, labels) = self.time_axis(left, top, bottom, replay.span_ns);
        body = body.add(grid);
        for band in &bands {
            body = match band.scaled() {
                false => body.add(break_mark(band, left)),
                true => body.add(self.slots(band, &bands, left)),
            };
        }
        body = body.add(self.address_axis(&bands, left, digits));
        for found in replay.disagreements.iter().filter(|found| found.key == self.key) {
            let x = left + self.clock.x_of_line(found.line);
            let mark =
                line(x, top, x, bottom, "#cf222e").set("stroke-dasharray", "4 3").set("stroke-width", 1.5);
            body = body.add(mark.add(Title::new(format!("disagreement at line {}", found.line))));
        }
        *y += 34.0;
        body.add(labels)
    }

    fn slots(&self, band: &Band<'_>, bands: &[Band<'_>], left: f64) -> Group {
        let mut rectangles = Group::new();
        let mut labels = Group::new();
        // In a trace of very many changes most rectangles fall on one another; one of each is enough.
        let mut drawn = HashSet::new();
        let grain = if self.lifetimes.len() > MANY { 0.5 } else { 4.0 };
        for lifetime in &self.lifetimes {
            let slot = &lifetime.slot;
            let (start, end) = (slot.gpa.max(band.segment.start), slot.end().min(band.segment.end));
            if start >= end {
                continue;
            }
            let (low, high) = (band.y(start), band.y(end));
            let x = left + self.clock.x_of_line(lifetime.from.line);
            let until = lifetime.until.map_or(PLOT_WIDTH, |until| self.clock.x_of_line(until.line));
            let (width, height) = ((left + until - x).max(0.6), (low - high).max(0.5));
            let place = [x, high, width, height].map(|value| (value * grain).round().to_bits());
            if !drawn.insert((place, slot.kind())) {
                continue;
            }
            // A white edge keeps neighbours apart, but would eat a thin rectangle.
            let edge = if height > 3.0 && width > 3.0 { 0.6 } else { 0.0 };
            let tip = format!(
                "slot {} {}: {} [{:#x}, {:#x}), hva {:#x}, lines {} to {}",
                slot.name(),
                slot.kind().label(),
                units::size(slot.size),
                slot.gpa,
                slot.end(),
                slot.hva,
                lifetime.from.line,
                lifetime.until.map_or_else(|| "the end".to_owned(), |until| until.line.to_string()),
            );
            let rectangle = Rectangle::new()
                .set("x", round(x))
                .set("y", round(high))
                .set("width", round(width))
                .set("height", round(height))
                .set("fill", fill(slot.kind()))
                .set("stroke", "#ffffff")
                .set("stroke-width", edge);
            rectangles = rectangles.add(rectangle.add(Title::new(tip)));
            let long = format!("slot {} \u{b7} {}", slot.name(), units::size(slot.size));
            let short = slot.name();
            let room = width - 8.0;
            let label = [long, short].into_iter().find(|label| text_width(label, 10.0) <= room);
            // A slot across several segments is named once, where it is tallest.
            let tallest = bands.iter().all(|other| other.extent(slot) <= band.extent(slot));
            if let (Some(label), true) = (label, tallest && height >= LABEL_HEIGHT) {
                let middle = (low + high) / 2.0 + 3.5;
                labels = labels.add(text(x + 4.0, middle, 10.0, ink_on(slot.kind()), &label));
            }
        }
        Group::new().add(rectangles).add(labels)
    }

    /// Addresses at the edges of slots, as many as fit without touching; a segment's own edges come first.
    fn address_axis(&self, bands: &[Band<'_>], left: f64, digits: usize) -> Group {
        let mut wanted: Vec<(u8, f64, u64)> = Vec::new();
        for band in bands.iter().filter(|band| band.segment.cell_shift.is_some()) {
            wanted.push((0, band.top + band.height, band.segment.start));
            wanted.push((1, band.top, band.segment.end));
            for lifetime in &self.lifetimes {
                for edge in [lifetime.slot.gpa, lifetime.slot.end()] {
                    if band.segment.start < edge && edge < band.segment.end {
                        // Rounder addresses are better landmarks.
                        let roundness = u8::try_from(64 - edge.trailing_zeros()).unwrap_or(64);
                        wanted.push((2 + roundness, band.y(edge), edge));
                    }
                }
            }
        }
        wanted.sort_by(|a, b| a.0.cmp(&b.0).then(a.2.cmp(&b.2)));
        let mut taken: Vec<(f64, u64)> = Vec::new();
        let mut group = Group::new();
        for (_, y, address) in wanted {
            if taken.iter().any(|&(other, _)| (other - y).abs() < LABEL_HEIGHT) {
                continue;
            }
            taken.push((y, address));
            let label = text(left - 8.0, y + 3.5, 10.0, INK, &units::address(address, digits));
            group = group
                .add(
                    label
                        .set("text-anchor", "end")
                        .set("font-family", "DejaVu Sans Mono, Menlo, Consolas, monospace"),
                )
                .add(line(left - 5.0, y, left, y, FAINT));
        }
        group
    }

    fn time_axis(&self, left: f64, top: f64, bottom: f64, end_ns: Option<u64>) -> (Group, Group) {
        let (mut grid, mut labels) = (Group::new(), Group::new());
        for (x, label) in self.clock.ticks(end_ns) {
            let x = left + x;
            grid = grid.add(line(x, top, x, bottom, RULE));
            labels = labels.add(line(x, bottom, x, bottom + 4.0, FAINT));
            labels = labels.add(text(x, bottom + 15.0, 10.0, INK, &label).set("text-anchor", "middle"));
        }
        let title = match self.clock.timed {
            true => "time since the first call, pauses compressed \u{b7} // the address scale changes",
            false => "line of the trace \u{b7} // the address scale changes",
        };
        let title = text(left + PLOT_WIDTH / 2.0, bottom + 31.0, 11.0, FAINT, title);
        (grid, labels.add(title.set("text-anchor", "middle")))
    }
}

/// A segment's place on the page.
struct Band<'a> {
    segment: &'a Segment,
    top: f64,
    height: f64,
}

impl Band<'_> {
    fn scaled(&self) -> bool {
        self.segment.cell_shift.is_some()
    }

    /// How tall a slot is in this band.
    fn extent(&self, slot: &MapSlot) -> f64 {
        self.y(slot.gpa) - self.y(slot.end())
    }

    fn y(&self, address: u64) -> f64 {
        let (start, end) = (self.segment.start, self.segment.end);
        let part = (address.clamp(start, end) - start) as f64 / (end - start) as f64;
        self.top + self.height * (1.0 - part)
    }
}

/// Room by the number of things to tell apart, and a little by size.
fn height(segment: &Segment) -> f64 {
    let Some(_) = segment.cell_shift else { return GAP_HEIGHT };
    let by_size = 2.5 * f64::from((segment.end - segment.start).max(4096).ilog2() - 12) + 22.0;
    let single = segment.len() <= CELLS;
    let by_cells = if single { segment.len() as f64 } else { segment.len() as f64 * 7.0 };
    by_size.max(by_cells.min(520.0))
}

/// What is left out of the axis.
fn break_mark(band: &Band<'_>, left: f64) -> Group {
    let middle = band.top + band.height / 2.0;
    let label = format!("hole {}", units::size(band.segment.end - band.segment.start));
    strokes(left, middle)
        .add(text(left + 14.0, middle + 3.5, 10.0, FAINT, &label).set("font-style", "italic"))
}

/// Two slanted strokes on the axis: here its scale changes.
fn strokes(left: f64, middle: f64) -> Group {
    let mut group = Group::new();
    for y in [middle - 3.0, middle + 3.0] {
        let stroke = format!("M{} {} l10 -5", round(left - 5.0), round(y + 2.5));
        group = group.add(Path::new().set("d", stroke).set("stroke", FAINT).set("fill", "none"));
    }
    group
}

fn axis_title(left: f64, top: f64) -> Text {
    text(left - 8.0, top - 10.0, 11.0, FAINT, "guest address").set("text-anchor", "end")
}

fn text(x: f64, y: f64, size: f64, colour: &str, content: &str) -> Text {
    Text::new(escape(content))
        .set("x", round(x))
        .set("y", round(y))
        .set("font-size", size)
        .set("fill", colour)
}

fn line(x1: f64, y1: f64, x2: f64, y2: f64, colour: &str) -> Line {
    Line::new()
        .set("x1", round(x1))
        .set("y1", round(y1))
        .set("x2", round(x2))
        .set("y2", round(y2))
        .set("stroke", colour)
}

/// Generous, since the reader's font is not known.
fn text_width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * 0.64
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// The file name without its folders.
fn base_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Control characters are not allowed in XML at all; the rest is escaped by the writer.
fn escape(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
