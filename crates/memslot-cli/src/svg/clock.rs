//! The time axis.
//!
//! The x of a moment does not grow with time but with the changes: each pause between two of them is as wide as
//! its logarithm. So bursts of calls 30 µs apart can be told apart although minutes lie between the bursts.

use super::{PLOT_WIDTH, text_width};
use crate::history::Lifetime;
use crate::units;

/// Time to the right: pauses weigh by their logarithm.
pub(super) struct Clock {
    /// Moment and x, ascending in both.
    points: Vec<(u64, u64, f64)>,
    /// Whether the trace has times; without, lines stand in for them.
    pub(super) timed: bool,
}

impl Clock {
    pub(super) fn new(lifetimes: &[&Lifetime], end_ns: Option<u64>) -> Self {
        let mut moments: Vec<(u64, u64)> = lifetimes
            .iter()
            .flat_map(|lifetime| [Some(lifetime.from), lifetime.until])
            .flatten()
            .map(|moment| (moment.line, moment.ns))
            .collect();
        moments.sort_unstable();
        moments.dedup();
        // Without times, the replay counts lines in their place.
        let timed = moments.iter().any(|(line, ns)| line != ns);
        let mut points = Vec::with_capacity(moments.len());
        let (mut before, mut x) = (None::<u64>, 0.0);
        for (line, ns) in moments {
            if let Some(before) = before {
                let pause = ns.saturating_sub(before) as f64;
                x += if timed { weight(pause) } else { pause };
            }
            before = Some(before.map_or(ns, |before| before.max(ns)));
            points.push((line, ns, x));
        }
        // After the last change the map stands still. That weighs as any other pause does, but has room for a label.
        let rest = match end_ns {
            Some(end) if timed => weight(end.saturating_sub(before.unwrap_or(end)) as f64),
            _ => 0.0,
        };
        let scale = PLOT_WIDTH / (x + rest.max(0.06 * x).max(1.0));
        for point in &mut points {
            point.2 *= scale;
        }
        Clock { points, timed }
    }

    /// The x of the last change at or before a line.
    pub(super) fn x_of_line(&self, line: u64) -> f64 {
        let after = self.points.partition_point(|point| point.0 <= line);
        after.checked_sub(1).and_then(|at| self.points.get(at)).map_or(0.0, |point| point.2)
    }

    /// Labelled moments: those after the longest pauses first, as many as fit without touching.
    pub(super) fn ticks(&self, end_ns: Option<u64>) -> Vec<(f64, String)> {
        let pause = |at: usize| match at.checked_sub(1) {
            Some(before) => self.points[at].2 - self.points[before].2,
            None => f64::INFINITY,
        };
        let mut order: Vec<usize> = (0..self.points.len()).collect();
        order.sort_by(|&a, &b| pause(b).total_cmp(&pause(a)));
        let mut ticks: Vec<(f64, String)> = Vec::new();
        ticks.extend(end_ns.map(|ns| (PLOT_WIDTH, units::duration(ns))));
        for at in order {
            let (line, ns, x) = self.points[at];
            let label = if self.timed { units::duration(ns) } else { line.to_string() };
            let free = ticks.iter().all(|(other, text): &(f64, String)| {
                text != &label
                    && (other - x).abs() > (text_width(text, 10.0) + text_width(&label, 10.0)) / 2.0 + 10.0
            });
            if free {
                ticks.push((x, label));
            }
        }
        ticks
    }
}

/// How wide a pause is: 0.25 at least, and one more for each factor of e above 100 µs.
fn weight(nanoseconds: f64) -> f64 {
    0.25 + (1.0 + nanoseconds / 1e5).ln()
}
