//! `memslot dirty --svg`: which memory the guest wrote, and when.
//!
//! Right is time, a column for each round of a slot (from the round before to this one); up is guest-physical
//! address, each slot in its own band of buckets. A bucket's colour is the share of its pages that were written in
//! the round. The first round of a slot is not drawn: nobody knows when it began.

use svg::node::element::{Group, Rectangle, Title};

use super::{FAINT, INK, PLOT_WIDTH, RIGHT, RULE, base_name, document, line, round, text, text_width};
use crate::dirty::slots::{self, SlotDirty};
use crate::replay::Replay;
use crate::units;

const PAGE: u64 = 4096;
/// Height of a bucket.
const CELL: f64 = 7.0;
const MOST_BUCKETS: u64 = 40;
const BAND_GAP: f64 = 26.0;

/// From hardly to all written.
const RAMP: [&str; 6] = ["#fee8c8", "#fdc38d", "#fc8d59", "#e34a33", "#b30000", "#67000d"];

/// The picture as SVG text.
pub(crate) fn draw(name: &str, replay: &Replay) -> String {
    let all: Vec<SlotDirty> = replay.vms.iter().flat_map(|vm| slots::of(&vm.rounds)).collect();
    let digits = all.iter().map(|slot| units::digits(slot.gpa.0 + slot.bytes)).max().unwrap_or(1);
    let left = text_width(&units::address(0, digits), 11.0) + 34.0;
    let width = left + PLOT_WIDTH + RIGHT;
    let times = || all.iter().flat_map(|slot| slot.rounds.iter().map(|round| round.ns));
    let (from, to) = (times().min().unwrap_or(0), times().max().unwrap_or(0));
    let x_of = |ns: u64| left + PLOT_WIDTH * (ns - from) as f64 / (to - from).max(1) as f64;
    let mut y = 30.0;
    let title = format!("Pages written over time: {}", base_name(name));
    let mut body = Group::new().add(text(16.0, y, 16.0, INK, &title).set("font-weight", "bold"));
    y += 20.0;
    body = body.add(text(16.0, y, 12.0, FAINT, &summary(&all, replay, to - from)));
    y += 14.0;
    body = legend(body, &mut y);
    for slot in all.iter().rev() {
        y += BAND_GAP;
        body = band(body, slot, &mut y, left, digits, &x_of);
    }
    if all.is_empty() {
        y += 30.0;
        body = body.add(text(16.0, y, 13.0, INK, "No dirty bitmap is in this trace."));
    } else {
        y += 8.0;
        body = axis(body, &mut y, (from, to), replay.span_ns.is_some(), &x_of);
    }
    let height = y + 16.0;
    document(&title, (width, height), body)
}

fn summary(slots: &[SlotDirty], replay: &Replay, span: u64) -> String {
    let rounds: usize = slots.iter().map(|slot| slot.rounds.len()).sum();
    let pages: u64 = slots.iter().map(|slot| slot.pages_written).sum();
    let mut parts = vec![
        units::count(slots.len(), "slot"),
        units::count(rounds, "round"),
        format!("{} written", units::count(pages, "page")),
    ];
    if replay.span_ns.is_some() && span > 0 {
        parts.push(format!("{} from the first round to the last", units::duration(span)));
    }
    parts.join(" \u{b7} ")
}

fn legend(mut body: Group, y: &mut f64) -> Group {
    let mut x = 16.0;
    for (nth, colour) in RAMP.iter().enumerate() {
        let swatch = Rectangle::new().set("x", x).set("y", *y).set("width", 14).set("height", 12);
        body = body.add(swatch.set("fill", *colour));
        let label = match nth {
            0 => "to 2 %",
            1 => "10 %",
            2 => "25 %",
            3 => "50 %",
            4 => "75 %",
            _ => "100 % of a bucket's pages, in one round",
        };
        body = body.add(text(x + 20.0, *y + 10.0, 12.0, INK, label));
        x += 36.0 + text_width(label, 12.0);
    }
    *y += 12.0;
    body
}

fn colour(share: f64) -> &'static str {
    let limits = [0.02, 0.1, 0.25, 0.5, 0.75];
    RAMP[limits.iter().filter(|&&limit| share > limit).count()]
}

/// One slot: the highest address on top.
fn band(
    mut body: Group,
    slot: &SlotDirty,
    y: &mut f64,
    left: f64,
    digits: usize,
    x_of: &impl Fn(u64) -> f64,
) -> Group {
    let pages = slot.bytes / PAGE;
    // A slot that was never written is one line; buckets are as large as a person would choose.
    let most = if slot.written.is_empty() { 1 } else { MOST_BUCKETS };
    let size = pages.div_ceil(most).max(1).next_power_of_two();
    let buckets = pages.div_ceil(size).max(1);
    let height = (buckets as f64 * CELL).max(14.0);
    let cell = height / buckets as f64;
    let space = if slot.address_space > 0 {
        format!("address space {}, ", slot.address_space)
    } else {
        String::new()
    };
    let label = match slot.bytes_per_second() {
        _ if slot.written.is_empty() => "not written".to_owned(),
        rate => format!(
            "{} of {} \u{b7} working set {}{}",
            units::count(buckets, "bucket"),
            units::size(size * PAGE),
            units::size(slot.working_set),
            rate.map_or_else(String::new, |rate| format!(" \u{b7} {:.1} MiB/s", rate / 1048576.0))
        ),
    };
    let label = format!("{space}slot {} \u{b7} {} \u{b7} {label}", slot.id, units::size(slot.bytes));
    body = body.add(text(left, *y - 5.0, 11.0, INK, &label));
    let frame = Rectangle::new().set("x", round(left)).set("y", round(*y)).set("width", PLOT_WIDTH);
    body = body.add(frame.set("height", round(height)).set("fill", "#f6f8fa").set("stroke", RULE));
    for (gpa, at) in [(slot.gpa.0 + slot.bytes, *y + 9.0), (slot.gpa.0, *y + height)] {
        if height >= 20.0 || gpa == slot.gpa.0 {
            body = body.add(
                text(left - 8.0, at, 11.0, FAINT, &units::address(gpa, digits)).set("text-anchor", "end"),
            );
        }
    }
    for pair in slot.rounds.windows(2) {
        let (x, end) = (x_of(pair[0].ns), x_of(pair[1].ns));
        let mut written = vec![0_u64; usize::try_from(buckets).unwrap_or(1)];
        for &(first, count) in &pair[1].runs {
            let mut at = first;
            while at < first + count {
                let bucket = (at / size).min(buckets - 1);
                let to = ((bucket + 1) * size).min(first + count);
                written[usize::try_from(bucket).unwrap_or(0)] += to - at;
                at = to;
            }
        }
        for (bucket, &written) in (0_u64..).zip(&written) {
            if written == 0 {
                continue;
            }
            let share = written as f64 / size.min(pages - bucket * size) as f64;
            let top = *y + height - (bucket + 1) as f64 * cell;
            let rectangle = Rectangle::new().set("x", round(x)).set("y", round(top));
            let rectangle = rectangle.set("width", round((end - x).max(1.0))).set("height", round(cell));
            let hint = format!(
                "{} of {} at {:#x}",
                units::count(written, "page"),
                size.min(pages - bucket * size),
                slot.gpa.0 + bucket * size * PAGE
            );
            body = body.add(rectangle.set("fill", colour(share)).add(Title::new(hint)));
        }
    }
    *y += height;
    body
}

/// Times below the plot, since the trace began.
fn axis(
    mut body: Group,
    y: &mut f64,
    (from, to): (u64, u64),
    timed: bool,
    x_of: &impl Fn(u64) -> f64,
) -> Group {
    body = body.add(line(x_of(from), *y, x_of(to.max(from + 1)), *y, FAINT));
    for tick in 0..=5_u64 {
        let ns = from + (to - from) / 5 * tick;
        let x = x_of(ns);
        body = body.add(line(x, *y, x, *y + 4.0, FAINT));
        let label = if timed { units::duration(ns) } else { format!("line {ns}") };
        let anchor = match tick {
            0 => "start",
            5 => "end",
            _ => "middle",
        };
        body = body.add(text(x, *y + 17.0, 11.0, FAINT, &label).set("text-anchor", anchor));
    }
    *y += 22.0;
    body
}
