//! What the author of a VMM would want to be told about a map that KVM accepted without a word.
//!
//! Each finding is reported once, with how often it occurred, and the worst first.

use std::collections::HashMap;

use serde::Serialize;

use crate::history::{History, MapSlot, Moment, range};
use crate::units;

/// The size of a huge page on the architectures KVM runs on with 4 KiB pages.
const HUGE_PAGE: u64 = 2 << 20;

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Warning {
    /// gpa and hva disagree modulo 2 MiB, so no huge page can ever map the slot.
    HugePagesImpossible {
        address_space: u32,
        slot: u32,
        gpa: Hex,
        size: u64,
        hva: Hex,
        line: u64,
        times: u64,
        alive: bool,
    },
    /// Neighbours in the map that could be one slot.
    Mergeable { address_space: u32, slots: Vec<u32>, gpa: Hex, size: u64, hva: Hex },
    /// The same range deleted and created again.
    Churn { address_space: u32, gpa: Hex, size: u64, recreated: u64, first_line: u64, last_line: u64 },
    /// Two slots on the same host memory.
    Alias { slots: [u32; 2], gpas: [Hex; 2], hva: Hex, size: u64, line: u64, times: u64, alive: bool },
}

/// An address: `"0x…"` in JSON, because 64-bit numbers do not survive every JSON reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Hex(pub(crate) u64);

impl Serialize for Hex {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl Warning {
    /// One line for a person, without a capital or a full stop.
    pub(crate) fn describe(&self) -> String {
        match self {
            Warning::HugePagesImpossible { slot, gpa, size, hva, line, times, alive, .. } => format!(
                "huge pages impossible: slot {slot} {} at hva {:#x}: gpa and hva differ by {:#x} modulo 2 MiB \
                 (line {line}{}{})",
                range(gpa.0, *size),
                hva.0,
                hva.0.wrapping_sub(gpa.0) % HUGE_PAGE,
                again(*times),
                gone(*alive)
            ),
            Warning::Mergeable { slots, gpa, size, .. } => format!(
                "mergeable: slots {} are neighbours in gpa and hva with the same flags: one slot {} would do",
                list(slots),
                range(gpa.0, *size)
            ),
            Warning::Churn { gpa, size, recreated, first_line, last_line, .. } => format!(
                "churn: {} deleted and created again {} (lines {first_line} to {last_line})",
                range(gpa.0, *size),
                units::count(*recreated, "time"),
            ),
            Warning::Alias { slots, gpas, hva, size, line, times, alive } => format!(
                "alias: slots {} and {} share {} of host memory at {:#x}: gpa {:#x} is also gpa {:#x} (line {line}{}{})",
                slots[0],
                slots[1],
                units::size(*size),
                hva.0,
                gpas[0].0,
                gpas[1].0,
                again(*times),
                gone(*alive)
            ),
        }
    }
}

fn again(times: u64) -> String {
    if times > 1 { format!(", {times} times") } else { String::new() }
}

fn gone(alive: bool) -> &'static str {
    if alive { "" } else { ", no longer there" }
}

fn list(slots: &[u32]) -> String {
    let shown: Vec<String> = slots.iter().take(8).map(u32::to_string).collect();
    match slots.len() {
        0..=8 => shown.join(", "),
        more => format!("{}, … ({more} of them)", shown.join(", ")),
    }
}

/// Two pieces of guest memory on the same host memory, lower gpa first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct AliasKey {
    spaces: [u32; 2],
    gpas: [u64; 2],
    hva: u64,
    size: u64,
}

#[derive(Clone, Copy, Debug)]
struct Sighting {
    slots: [u32; 2],
    line: u64,
    times: u64,
}

/// Aliases as they arise. A pair is met when the later of the two is created.
#[derive(Debug, Default)]
pub(crate) struct AliasLog {
    seen: HashMap<AliasKey, Sighting>,
}

impl AliasLog {
    /// `slot` was created while `others` already shared its host memory.
    pub(crate) fn created(&mut self, slot: &MapSlot, others: &[MapSlot], now: Moment) {
        for other in others.iter().filter(|other| slot.aliases(other)) {
            let (key, slots) = pair(slot, other);
            let sighting = self.seen.entry(key).or_insert(Sighting { slots, line: now.line, times: 0 });
            sighting.times += 1;
        }
    }
}

fn pair(a: &MapSlot, b: &MapSlot) -> (AliasKey, [u32; 2]) {
    let (a, b) = if (a.gpa, a.address_space) <= (b.gpa, b.address_space) { (a, b) } else { (b, a) };
    let hva = a.hva.max(b.hva);
    let size = a.hva_end().min(b.hva_end()) - hva;
    let gpas = [a.gpa + (hva - a.hva), b.gpa + (hva - b.hva)];
    (AliasKey { spaces: [a.address_space, b.address_space], gpas, hva, size }, [a.id, b.id])
}

/// Every finding about one VM.
pub(crate) fn warnings(history: &History, aliases: &AliasLog) -> Vec<Warning> {
    let mut all = huge_pages(history);
    all.extend(alias_warnings(history, aliases));
    all.extend(mergeable(&history.alive()));
    all.extend(churn(history));
    all
}

fn huge_pages(history: &History) -> Vec<Warning> {
    struct Case {
        first: MapSlot,
        line: u64,
        times: u64,
        alive: bool,
    }
    let mut found: HashMap<(u32, u64, u64, u64), Case> = HashMap::new();
    for lifetime in history.lifetimes() {
        let slot = lifetime.slot;
        if slot.size < HUGE_PAGE || slot.gpa % HUGE_PAGE == slot.hva % HUGE_PAGE {
            continue;
        }
        // The address within the huge page is what is wrong; where else the host put it does not matter.
        let key = (slot.address_space, slot.gpa, slot.size, slot.hva % HUGE_PAGE);
        let new = Case { first: slot, line: lifetime.from.line, times: 0, alive: false };
        let case = found.entry(key).or_insert(new);
        case.times += u64::from(lifetime.created);
        case.alive |= lifetime.until.is_none();
    }
    let mut warnings: Vec<Warning> = found
        .into_values()
        .map(|case| Warning::HugePagesImpossible {
            address_space: case.first.address_space,
            slot: case.first.id,
            gpa: Hex(case.first.gpa),
            size: case.first.size,
            hva: Hex(case.first.hva),
            line: case.line,
            times: case.times,
            alive: case.alive,
        })
        .collect();
    warnings.sort_by_key(|warning| match warning {
        Warning::HugePagesImpossible { size, gpa, line, .. } => (u64::MAX - size, gpa.0, *line),
        _ => (0, 0, 0),
    });
    warnings
}

fn alias_warnings(history: &History, aliases: &AliasLog) -> Vec<Warning> {
    let alive = history.alive();
    let at = |space: u32, gpa: u64| {
        let after = alive.partition_point(|slot| (slot.address_space, slot.gpa) <= (space, gpa));
        after.checked_sub(1).map(|at| &alive[at])
    };
    let still = |key: &AliasKey| {
        let [low, high] = [0, 1].map(|half| at(key.spaces[half], key.gpas[half]));
        low.zip(high).is_some_and(|(low, high)| low != high && low.aliases(high) && pair(low, high).0 == *key)
    };
    let mut found: Vec<(&AliasKey, &Sighting)> = aliases.seen.iter().collect();
    found.sort_by_key(|(key, sighting)| (u64::MAX - key.size, sighting.line, key.gpas));
    found
        .into_iter()
        .map(|(key, sighting)| Warning::Alias {
            slots: sighting.slots,
            gpas: key.gpas.map(Hex),
            hva: Hex(key.hva),
            size: key.size,
            line: sighting.line,
            times: sighting.times,
            alive: still(key),
        })
        .collect()
}

fn mergeable(alive: &[MapSlot]) -> Vec<Warning> {
    let follows = |a: &MapSlot, b: &MapSlot| {
        a.address_space == b.address_space
            && a.end() == b.gpa
            && a.hva_end() == b.hva
            && a.flags == b.flags
            && match (a.guest_memfd, b.guest_memfd) {
                (None, None) => true,
                (Some(x), Some(y)) => x.file == y.file && x.offset.checked_add(a.size) == Some(y.offset),
                _ => false,
            }
    };
    let mut runs: Vec<Warning> = alive
        .chunk_by(follows)
        .filter(|run| run.len() > 1)
        .map(|run| Warning::Mergeable {
            address_space: run[0].address_space,
            slots: run.iter().map(|slot| slot.id).collect(),
            gpa: Hex(run[0].gpa),
            size: run.iter().map(|slot| slot.size).sum(),
            hva: Hex(run[0].hva),
        })
        .collect();
    runs.sort_by_key(|warning| match warning {
        Warning::Mergeable { slots, .. } => usize::MAX - slots.len(),
        _ => 0,
    });
    runs
}

fn churn(history: &History) -> Vec<Warning> {
    let mut ranges: HashMap<(u32, u64, u64), (u64, u64, u64)> = HashMap::new();
    for lifetime in history.lifetimes().iter().filter(|lifetime| lifetime.created) {
        let (slot, line) = (&lifetime.slot, lifetime.from.line);
        let entry = ranges.entry((slot.address_space, slot.gpa, slot.size)).or_insert((0, line, line));
        entry.0 += 1;
        entry.2 = line;
    }
    let mut found: Vec<_> = ranges.into_iter().filter(|(_, (creates, ..))| *creates > 2).collect();
    found.sort_by_key(|((space, gpa, _), (creates, ..))| (u64::MAX - creates, *space, *gpa));
    found
        .into_iter()
        .map(|((address_space, gpa, size), (creates, first_line, last_line))| Warning::Churn {
            address_space,
            gpa: Hex(gpa),
            size,
            recreated: creates - 1,
            first_line,
            last_line,
        })
        .collect()
}
