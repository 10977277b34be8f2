//! How a pre-copy migration of the VM would go.
//!
//! The model: the first round sends all memory; each later one sends what was written during the one before.
//! Writes come at the measured rate and fall into the measured working set: in a time t they touch
//! `W · (1 - exp(-rate · t / W))` of it, so the rate at first and never more than W. When what is left can be
//! sent within the allowed downtime, the VM stops and the rest follows.

use serde::Serialize;

use super::slots::SlotDirty;

/// What a migration may use.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Link {
    /// Bytes a second.
    pub(crate) bandwidth: f64,
    /// Seconds.
    pub(crate) downtime: f64,
}

/// A migration, as it would go.
#[derive(Serialize)]
pub(crate) struct Migration {
    pub(crate) link: Link,
    /// All logged memory, in bytes.
    pub(crate) memory: f64,
    /// Bytes written a second.
    pub(crate) dirty_rate: f64,
    /// Bytes.
    pub(crate) working_set: f64,
    pub(crate) converges: bool,
    /// What each round sends, the last one with the VM stopped; if it does not converge, those until nothing changes.
    pub(crate) rounds: Vec<Sent>,
    pub(crate) total_seconds: f64,
    /// How long the VM would stand still.
    pub(crate) downtime: f64,
    /// If it does not converge: the bandwidth, in bytes a second, with which it would.
    pub(crate) bandwidth_needed: Option<f64>,
}

/// One round.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Sent {
    pub(crate) bytes: f64,
    pub(crate) seconds: f64,
}

/// Nobody waits for more.
const MOST_ROUNDS: usize = 10_000;

impl Migration {
    /// From what is known about the slots; `None` without a rate.
    pub(crate) fn estimate(slots: &[SlotDirty], link: Link) -> Option<Self> {
        if slots.iter().all(|slot| slot.pages_per_second.is_none()) {
            return None;
        }
        let sum = |value: &dyn Fn(&SlotDirty) -> f64| slots.iter().map(value).sum::<f64>();
        let memory = sum(&|slot| slot.bytes as f64);
        let dirty_rate = sum(&|slot| slot.bytes_per_second().unwrap_or(0.0));
        let working_set = sum(&|slot| slot.working_set as f64);
        let (rounds, converges) = run(memory, dirty_rate, working_set, link);
        let bandwidth_needed = (!converges).then(|| {
            let enough = |bandwidth| run(memory, dirty_rate, working_set, Link { bandwidth, ..link }).1;
            let (mut low, mut high) = (link.bandwidth, link.bandwidth);
            while !enough(high) && high < 1e18 {
                (low, high) = (high, 2.0 * high);
            }
            for _ in 0..40 {
                let middle = f64::midpoint(low, high);
                if enough(middle) { high = middle } else { low = middle }
            }
            high
        });
        let downtime = rounds.last().map_or(0.0, |round| round.seconds);
        let total_seconds = rounds.iter().map(|round| round.seconds).sum();
        Some(Self {
            link,
            memory,
            dirty_rate,
            working_set,
            converges,
            rounds,
            total_seconds,
            downtime,
            bandwidth_needed,
        })
    }
}

/// The rounds, and whether the last one is short enough.
fn run(memory: f64, rate: f64, working_set: f64, link: Link) -> (Vec<Sent>, bool) {
    let mut rounds = Vec::new();
    let mut left = memory;
    for _ in 0..MOST_ROUNDS {
        let seconds = left / link.bandwidth;
        rounds.push(Sent { bytes: left, seconds });
        if seconds <= link.downtime {
            return (rounds, true);
        }
        let written =
            if working_set > 0.0 { working_set * -(-rate * seconds / working_set).exp_m1() } else { 0.0 };
        // A guest that writes slower than the link sends leaves less each round, however little less. One that writes
        // faster leaves what falls towards a floor; close to it, it is there.
        if rounds.len() > 1 && rate >= link.bandwidth && written > 0.999 * left {
            rounds.push(Sent { bytes: written, seconds: written / link.bandwidth });
            return (rounds, false);
        }
        left = written;
    }
    (rounds, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1048576.0;

    #[test]
    fn a_quiet_guest_takes_two_rounds() {
        let link = Link { bandwidth: 100.0 * MIB, downtime: 0.3 };
        let (rounds, converges) = run(1000.0 * MIB, MIB, 50.0 * MIB, link);
        assert!(converges);
        assert_eq!(rounds.len(), 2);
        assert!(rounds[1].bytes > 9.0 * MIB && rounds[1].bytes < 10.0 * MIB);
    }

    #[test]
    fn a_guest_that_writes_hardly_slower_takes_its_time() {
        let link = Link { bandwidth: 129.0 * MIB, downtime: 0.1 };
        let (rounds, converges) = run(4096.0 * MIB, 128.0 * MIB, 2048.0 * MIB, link);
        assert!(converges && rounds.len() > 20, "{} rounds", rounds.len());
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_never_converges() {
        let link = Link { bandwidth: 100.0 * MIB, downtime: 0.3 };
        let (rounds, converges) = run(1000.0 * MIB, 500.0 * MIB, 400.0 * MIB, link);
        assert!(!converges);
        assert!(rounds.last().is_some_and(|round| round.bytes > 300.0 * MIB));
        // Unless all it writes can be sent while it stands still.
        assert!(run(1000.0 * MIB, 500.0 * MIB, 20.0 * MIB, link).1);
    }
}
