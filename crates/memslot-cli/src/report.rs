//! The report as data: what `--json` prints, and what the text is made from.
//!
//! The keys are an interface. New ones may be added; those that are there keep their name and meaning. Addresses
//! are strings (`"0x…"`), sizes are numbers of bytes, lines count from 1. The crate's README lists them.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::dirty::calls::DirtyCalls;
use crate::history::{Kind, MOST_ALIASES, MapSlot, flag_names};
use crate::replay::{Changes, Replay, Vm};
use crate::trace::{Format, GuestMemfd, Ignored};
use crate::verdict::{Disagreement, Unjudged};
use crate::warnings::{Hex, Warning, warnings};

/// One file's report.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) file: String,
    pub(crate) format: Option<Format>,
    pub(crate) lines: u64,
    /// The line given with `--at`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at: Option<u64>,
    pub(crate) span_ns: Option<u64>,
    pub(crate) ioctls: BTreeMap<String, u64>,
    /// The same, most frequent first: the text's order.
    #[serde(skip)]
    pub(crate) ioctls_by_count: Vec<(String, u64)>,
    pub(crate) ignored: Ignored,
    pub(crate) compared: u64,
    pub(crate) agreed: u64,
    /// All calls on the dirty log.
    pub(crate) dirty_log_calls: u64,
    pub(crate) dirty_log: DirtyCalls,
    pub(crate) disagreements: Vec<Disagreement>,
    pub(crate) not_judged: Vec<Unjudged>,
    pub(crate) vms: Vec<VmReport>,
}

/// One VM's part of it.
#[derive(Serialize)]
pub(crate) struct VmReport {
    pub(crate) fd: i64,
    /// The process that created it, if the trace tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pid: Option<i64>,
    #[serde(skip)]
    pub(crate) name: String,
    pub(crate) opened_at_line: u64,
    pub(crate) changes: Changes,
    pub(crate) most_slots: MostSlots,
    pub(crate) slots: Vec<SlotReport>,
    pub(crate) holes: Vec<HoleReport>,
    pub(crate) bytes: u64,
    pub(crate) warnings: Vec<Warning>,
}

/// The largest number of slots alive at once.
#[derive(Serialize)]
pub(crate) struct MostSlots {
    pub(crate) slots: usize,
    /// Where it was first reached; 0 if there never was a slot.
    pub(crate) line: u64,
}

/// A slot of the map.
#[derive(Serialize)]
pub(crate) struct SlotReport {
    pub(crate) address_space: u32,
    pub(crate) slot: u32,
    pub(crate) gpa: Hex,
    pub(crate) end: Hex,
    pub(crate) size: u64,
    pub(crate) hva: Hex,
    pub(crate) flags: String,
    pub(crate) kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) guest_memfd: Option<GuestMemfd>,
    /// Other slots on some of the same host memory, as `slot` or `address space:slot`; 64 at most.
    pub(crate) aliases: Vec<String>,
}

/// A hole between two slots.
#[derive(Serialize)]
pub(crate) struct HoleReport {
    pub(crate) address_space: u32,
    pub(crate) gpa: Hex,
    pub(crate) end: Hex,
    pub(crate) size: u64,
}

/// What `map --json` prints.
#[derive(Serialize)]
pub(crate) struct MapReport<'a> {
    pub(crate) file: &'a str,
    pub(crate) lines: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at: Option<u64>,
    pub(crate) vms: Vec<VmMap<'a>>,
}

/// One VM's map.
#[derive(Serialize)]
pub(crate) struct VmMap<'a> {
    pub(crate) fd: i64,
    pub(crate) bytes: u64,
    pub(crate) slots: &'a [SlotReport],
    pub(crate) holes: &'a [HoleReport],
}

impl Report {
    pub(crate) fn new(file: &str, at: Option<u64>, replay: &Replay) -> Self {
        let by_count: Vec<(String, u64)> =
            replay.ioctls.iter().map(|(name, count)| (name.to_string(), *count)).collect();
        Report {
            file: file.to_owned(),
            format: replay.format,
            lines: replay.lines,
            at,
            span_ns: replay.span_ns,
            ioctls: by_count.iter().cloned().collect(),
            ioctls_by_count: by_count,
            ignored: replay.ignored,
            compared: replay.compared,
            agreed: replay.agreed,
            dirty_log_calls: replay.dirty.calls(),
            dirty_log: replay.dirty,
            disagreements: replay.disagreements.clone(),
            not_judged: replay.unjudged.clone(),
            vms: replay.vms.iter().map(VmReport::new).collect(),
        }
    }

    /// The part that is the map.
    pub(crate) fn map(&self) -> MapReport<'_> {
        MapReport {
            file: &self.file,
            lines: self.lines,
            at: self.at,
            vms: self.vms.iter().map(VmReport::map).collect(),
        }
    }
}

impl VmReport {
    fn map(&self) -> VmMap<'_> {
        VmMap { fd: self.fd, bytes: self.bytes, slots: &self.slots, holes: &self.holes }
    }

    fn new(vm: &Vm) -> Self {
        let map = vm.map();
        let most = vm.history.most();
        VmReport {
            fd: vm.fd,
            pid: vm.process,
            name: vm.name.clone(),
            opened_at_line: vm.opened_at,
            changes: vm.changes,
            most_slots: MostSlots {
                slots: most.map_or(0, |(slots, _)| slots),
                line: most.map_or(0, |(_, moment)| moment.line),
            },
            holes: holes(&map),
            bytes: map.iter().map(|slot| slot.size).sum(),
            slots: slots(&map),
            warnings: warnings(&vm.history, &vm.aliases),
        }
    }
}

fn slots(map: &[MapSlot]) -> Vec<SlotReport> {
    let mut aliases: Vec<Vec<String>> = vec![Vec::new(); map.len()];
    let mut by_hva: Vec<usize> = (0..map.len()).collect();
    by_hva.sort_by_key(|&at| map[at].hva);
    for (nth, &at) in by_hva.iter().enumerate() {
        for &other in by_hva[nth + 1..].iter().take_while(|&&other| map[other].hva < map[at].hva_end()) {
            if aliases[at].len() >= MOST_ALIASES {
                break;
            }
            if map[at].aliases(&map[other]) && aliases[other].len() < MOST_ALIASES {
                aliases[at].push(map[other].name());
                aliases[other].push(map[at].name());
            }
        }
    }
    map.iter()
        .zip(aliases)
        .map(|(slot, aliases)| SlotReport {
            address_space: slot.address_space,
            slot: slot.id,
            gpa: Hex(slot.gpa),
            end: Hex(slot.end()),
            size: slot.size,
            hva: Hex(slot.hva),
            flags: flag_names(slot.flags),
            kind: slot.kind(),
            guest_memfd: slot.guest_memfd,
            aliases,
        })
        .collect()
}

fn holes(map: &[MapSlot]) -> Vec<HoleReport> {
    map.windows(2)
        .filter(|pair| pair[0].address_space == pair[1].address_space && pair[0].end() < pair[1].gpa)
        .map(|pair| HoleReport {
            address_space: pair[0].address_space,
            gpa: Hex(pair[0].end()),
            end: Hex(pair[1].gpa),
            size: pair[1].gpa - pair[0].end(),
        })
        .collect()
}
