//! Measuring two things side by side.
//!
//! Both sides take turns, round by round, so that a neighbour on the machine disturbs both alike; the median
//! over the rounds is what counts. What is reported is the ratio.

use std::time::Instant;

/// Nanoseconds per operation of `operations` operations done by `work`.
pub(crate) fn time(operations: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    #[expect(clippy::cast_precision_loss, reason = "a time is not that exact")]
    let ns = start.elapsed().as_nanos() as f64 / operations.max(1) as f64;
    ns
}

/// Nanoseconds per item, for one piece of the items after the other. Where others run on the machine, they disturb some
/// pieces, and not the median of all.
pub(crate) fn pieces<T>(items: &[T], mut work: impl FnMut(&T)) -> impl Iterator<Item = f64> {
    items.chunks(2048).map(move |piece| time(piece.len(), || piece.iter().for_each(&mut work)))
}

/// The median.
pub(crate) fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs both in turn, after one round that does not count, and returns the medians.
pub(crate) fn versus(
    rounds: usize,
    mut ours: impl FnMut() -> f64,
    mut peer: impl FnMut() -> f64,
) -> (f64, f64) {
    let mut times = (Vec::new(), Vec::new());
    ours();
    peer();
    for round in 0..rounds {
        if round % 2 == 0 {
            times.0.push(ours());
            times.1.push(peer());
        } else {
            times.1.push(peer());
            times.0.push(ours());
        }
    }
    (median(&mut times.0), median(&mut times.1))
}
