//! The dirty log of a trace: what the engine makes of its calls ([`calls`]), what they say about each slot
//! ([`slots`]), what that means for a migration ([`migration`]), and all of it in words ([`text`]).

pub(crate) mod calls;
pub(crate) mod migration;
pub(crate) mod slots;
pub(crate) mod text;

use serde::Serialize;

use self::migration::{Link, Migration};
use self::slots::SlotDirty;
use crate::replay::Replay;
use crate::verdict::Disagreement;

/// Everything that `memslot dirty` says about one trace.
#[derive(Serialize)]
pub(crate) struct DirtyReport {
    pub(crate) file: String,
    pub(crate) lines: u64,
    pub(crate) span_ns: Option<u64>,
    pub(crate) calls: calls::DirtyCalls,
    pub(crate) disagreements: Vec<Disagreement>,
    pub(crate) vms: Vec<VmDirty>,
}

/// One VM's part of it.
#[derive(Serialize)]
pub(crate) struct VmDirty {
    pub(crate) fd: i64,
    #[serde(skip)]
    pub(crate) name: String,
    pub(crate) slots: Vec<SlotDirty>,
    /// What migrating this VM would take; `None` where there is too little to go by.
    pub(crate) migration: Option<Migration>,
}

impl DirtyReport {
    pub(crate) fn new(file: &str, replay: &Replay, link: Link) -> Self {
        let vms = replay.vms.iter().map(|vm| {
            let slots = slots::of(&vm.rounds);
            let migration = replay.span_ns.and_then(|_| Migration::estimate(&slots, link));
            VmDirty { fd: vm.fd, name: vm.name.clone(), slots, migration }
        });
        DirtyReport {
            file: file.to_owned(),
            lines: replay.lines,
            span_ns: replay.span_ns,
            calls: replay.dirty,
            disagreements: replay.disagreements.clone(),
            vms: vms.filter(|vm| !vm.slots.is_empty()).collect(),
        }
    }
}
