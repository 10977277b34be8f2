//! What the harvests of a trace say about each slot.

use serde::Serialize;

use super::calls::Round;
use crate::warnings::Hex;

const PAGE: u64 = 4096;

/// A slot while it is logged, from its first `KVM_GET_DIRTY_LOG` to its last.
#[derive(Serialize)]
pub(crate) struct SlotDirty {
    pub(crate) address_space: u32,
    pub(crate) id: u32,
    pub(crate) gpa: Hex,
    pub(crate) bytes: u64,
    #[serde(skip)]
    session: u64,
    pub(crate) rounds: Vec<RoundReport>,
    /// Pages written, those of one round counted once, without the first round: nobody knows when it began.
    pub(crate) pages_written: u64,
    /// Pages written by a second, on average, between the first round and the last; `None` without times.
    pub(crate) pages_per_second: Option<f64>,
    /// Different pages written since the first round, in bytes.
    pub(crate) working_set: u64,
    #[serde(skip)]
    pub(crate) written: Vec<(u64, u64)>,
}

/// One round.
#[derive(Serialize)]
pub(crate) struct RoundReport {
    pub(crate) line: u64,
    pub(crate) ns: u64,
    /// Bits that were set.
    pub(crate) reported: u64,
    /// Pages written since the round before.
    pub(crate) written: u64,
    #[serde(skip)]
    pub(crate) runs: Vec<(u64, u64)>,
}

/// The slots of some rounds, in order of address space and gpa.
pub(crate) fn of(rounds: &[Round]) -> Vec<SlotDirty> {
    let mut slots: Vec<SlotDirty> = Vec::new();
    for round in rounds {
        let key = (round.address_space, round.id, round.gpa, round.size, round.session);
        let known =
            slots.iter().position(|it| (it.address_space, it.id, it.gpa.0, it.bytes, it.session) == key);
        let at = known.unwrap_or_else(|| {
            slots.push(SlotDirty {
                address_space: round.address_space,
                id: round.id,
                gpa: Hex(round.gpa),
                bytes: round.size,
                session: round.session,
                rounds: Vec::new(),
                pages_written: 0,
                pages_per_second: None,
                working_set: 0,
                written: Vec::new(),
            });
            slots.len() - 1
        });
        let slot = &mut slots[at];
        if !slot.rounds.is_empty() {
            slot.pages_written += round.pages_written();
            slot.written.extend(&round.written);
        }
        slot.rounds.push(RoundReport {
            line: round.at.line,
            ns: round.at.ns,
            reported: round.reported,
            written: round.pages_written(),
            runs: round.written.clone(),
        });
    }
    for slot in &mut slots {
        slot.written = union(std::mem::take(&mut slot.written));
        slot.working_set = PAGE * slot.written.iter().map(|run| run.1).sum::<u64>();
        let (first, last) =
            (slot.rounds.first().map_or(0, |it| it.ns), slot.rounds.last().map_or(0, |it| it.ns));
        if last > first {
            slot.pages_per_second = Some(slot.pages_written as f64 / ((last - first) as f64 / 1e9));
        }
    }
    slots.sort_by_key(|slot| (slot.address_space, slot.gpa.0, slot.rounds.first().map(|it| it.line)));
    slots
}

impl SlotDirty {
    /// How fast it is written, in bytes a second.
    pub(crate) fn bytes_per_second(&self) -> Option<f64> {
        self.pages_per_second.map(|pages| pages * PAGE as f64)
    }
}

/// The same pages as runs that neither touch nor overlap.
fn union(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    runs.sort_unstable();
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (first, count) in runs {
        match all.last_mut() {
            Some(last) if first <= last.0 + last.1 => last.1 = last.1.max(first + count - last.0),
            _ => all.push((first, count)),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_united() {
        assert_eq!(union(vec![(5, 2), (0, 3), (2, 1), (6, 5), (20, 1)]), [(0, 3), (5, 6), (20, 1)]);
    }
}
