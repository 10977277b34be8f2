//! The replay itself: every recorded change goes to the engine, and every answer is held against the recorded one.
//!
//! The *recorded* answer decides how the replay goes on. Where the engine accepts what the kernel refused, the
//! change is taken back; where the engine refuses what the kernel accepted, the map cannot follow, and the
//! report says so. Either way one disagreement does not breed a hundred.
//!
//! Not every recorded refusal can be judged. The engine knows the rules of the map, hence `EINVAL` and `EEXIST`;
//! it does not know the host's memory, signals or file descriptors (`ENOMEM`, `EINTR`, `EFAULT`, …). Such calls
//! are listed apart and not applied.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::io::BufRead;

use crate::dirty::calls::{self, DirtyCalls, Round};
use crate::engine::{Capabilities, Change, Engine};
use crate::history::{History, LOG_DIRTY_PAGES, MapSlot, Moment};
use crate::trace::{
    Answer, CAP_GUEST_MEMFD, CAP_MULTI_ADDRESS_SPACE, CAP_NR_MEMSLOTS, CAP_READONLY_MEM, Call, Format,
    Ignored, Record, Region, TraceError, TraceReader, VmKey,
};
use crate::verdict::{Disagreement, Unjudged, Verdict};
use crate::warnings::AliasLog;
use crate::words::{describe, effect, unasked, unknowable};

/// How many changes of each class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Changes {
    pub(crate) create: u64,
    pub(crate) delete: u64,
    #[serde(rename = "move")]
    pub(crate) moved: u64,
    pub(crate) flags: u64,
    pub(crate) nothing: u64,
    pub(crate) refused: u64,
}

/// One VM of the trace.
pub(crate) struct Vm {
    pub(crate) fd: i64,
    pub(crate) key: VmKey,
    /// The process that created it, or was first seen to use it, if the trace tells.
    pub(crate) process: Option<i64>,
    /// How it is called: by its descriptor, and by its process where there are several.
    pub(crate) name: String,
    pub(crate) opened_at: u64,
    pub(crate) changes: Changes,
    pub(crate) history: History,
    pub(crate) aliases: AliasLog,
    /// Every GET of its dirty log, in order.
    pub(crate) rounds: Vec<Round>,
    /// How often logging was turned on, by address space and slot id.
    logged: HashMap<(u32, u32), u64>,
    pub(crate) engine: Engine,
}

/// What a trace came to.
pub(crate) struct Replay {
    pub(crate) format: Option<Format>,
    /// The last line read.
    pub(crate) lines: u64,
    /// From the first call to the last, if the trace has times.
    pub(crate) span_ns: Option<u64>,
    pub(crate) ioctls: Vec<(Cow<'static, str>, u64)>,
    pub(crate) ignored: Ignored,
    pub(crate) compared: u64,
    pub(crate) agreed: u64,
    pub(crate) dirty: DirtyCalls,
    pub(crate) disagreements: Vec<Disagreement>,
    pub(crate) unjudged: Vec<Unjudged>,
    pub(crate) vms: Vec<Vm>,
}

/// Replays a trace, up to and including line `until` if there is one. `progress` hears of every record.
pub(crate) fn replay<R: BufRead>(
    reader: &mut TraceReader<R>,
    until: Option<u64>,
    mut progress: impl FnMut(u64, u64),
) -> Result<Replay, TraceError> {
    let mut run = Run::default();
    let until = until.unwrap_or(u64::MAX);
    while reader.line() < until {
        let Some(record) = reader.next_record()? else { break };
        // A record's line can lie beyond `until` if lines before it were passed over.
        if record.line > until {
            break;
        }
        run.apply(record)?;
        progress(reader.bytes(), reader.line());
    }
    Ok(run.finish(reader, until))
}

/// A replay under way.
#[derive(Default)]
struct Run {
    capabilities: Capabilities,
    vms: Vec<Vm>,
    by_key: HashMap<VmKey, usize>,
    ioctls: HashMap<Cow<'static, str>, u64>,
    first_ns: Option<u64>,
    now_ns: u64,
    untimed: bool,
    compared: u64,
    dirty: DirtyCalls,
    disagreements: Vec<Disagreement>,
    unjudged: Vec<Unjudged>,
}

impl Run {
    fn apply(&mut self, record: Record) -> Result<(), TraceError> {
        self.clock(&record);
        match self.ioctls.get_mut(&record.name) {
            Some(count) => *count += 1,
            None => _ = self.ioctls.insert(record.name.clone(), 1),
        }
        match &record.call {
            Call::CreateVm(limits) => {
                if let Answer::Value(fd) = record.answer {
                    for &(capability, value) in limits {
                        self.learn(capability, &Answer::Value(value));
                    }
                    self.open_vm(record.key_of(fd), fd, &record)?;
                }
            }
            Call::CreateGuestMemfd => {
                if let Answer::Value(file) = record.answer {
                    let vm = self.vm_of(&record)?;
                    self.vms[vm].engine.guest_memfd_created(u32::try_from(file).unwrap_or(u32::MAX));
                }
            }
            Call::CheckExtension(Some(capability)) => self.learn(*capability, &record.answer),
            Call::SetRegion(region) => self.set(&record, region)?,
            Call::SetRegionUnprinted => {
                let why = match record.answer {
                    Answer::Value(_) => {
                        "the trace shows only a pointer for the region: the map may differ from here on"
                    }
                    _ => "the trace shows only a pointer for the region",
                };
                self.unjudged.push(Unjudged {
                    line: record.line,
                    fd: record.fd,
                    call: record.name.into_owned(),
                    recorded: record.answer.to_string(),
                    why: why.to_owned(),
                });
            }
            Call::EnableCap { .. }
            | Call::CreateVcpu
            | Call::GetDirtyLog { .. }
            | Call::ClearDirtyLog { .. }
            | Call::DirtyLogUnprinted { .. }
            | Call::ResetRings => self.dirty_log(&record)?,
            Call::CheckExtension(None) | Call::Other => {}
        }
        Ok(())
    }

    /// Threads' clocks are read before their calls, so neighbouring lines may be out of order by a little.
    fn clock(&mut self, record: &Record) {
        match record.start_ns {
            Some(ns) => {
                let first = *self.first_ns.get_or_insert(ns);
                self.now_ns = self.now_ns.max(ns.saturating_sub(first));
            }
            None => self.untimed = true,
        }
    }

    /// The moment of a record, which has been [clocked](Self::clock).
    fn now(&self, line: u64) -> Moment {
        Moment { line, ns: if self.untimed { line } else { self.now_ns } }
    }

    /// The VM that a call went to; one that the trace did not see created comes up here.
    fn vm_of(&mut self, record: &Record) -> Result<usize, TraceError> {
        match self.by_key.get(&record.key()) {
            Some(&at) => Ok(at),
            None => self.open_vm(record.key(), record.fd, record),
        }
    }

    fn open_vm(&mut self, key: VmKey, fd: i64, record: &Record) -> Result<usize, TraceError> {
        let line = record.line;
        let engine = Engine::new(self.capabilities).map_err(|what| TraceError::Line { line, what })?;
        let (history, aliases, rounds) = (History::default(), AliasLog::default(), Vec::new());
        let changes = Changes::default();
        self.vms.push(Vm {
            fd,
            key,
            process: record.process,
            name: format!("fd {fd}"),
            opened_at: line,
            changes,
            history,
            aliases,
            rounds,
            engine,
            logged: HashMap::new(),
        });
        self.by_key.insert(key, self.vms.len() - 1);
        Ok(self.vms.len() - 1)
    }

    /// The kernel's own limits, where the VMM asked for them, are the ones to replay with. A VM that is still
    /// empty is set up anew, for VMMs ask both before and after they create it.
    fn learn(&mut self, capability: u32, answer: &Answer) {
        let Answer::Value(value) = *answer else { return };
        let number = u32::try_from(value).ok();
        let known = &mut self.capabilities;
        match capability {
            CAP_NR_MEMSLOTS => known.slots = number.filter(|&slots| slots > 0),
            CAP_MULTI_ADDRESS_SPACE => known.address_spaces = number.map(|spaces| spaces.max(1)),
            CAP_READONLY_MEM => known.readonly_mem = Some(value > 0),
            CAP_GUEST_MEMFD => known.guest_memfd = Some(value > 0),
            _ => return,
        }
        for vm in &mut self.vms {
            if vm.changes == Changes::default() {
                if let Ok(engine) = vm.engine.anew(self.capabilities) {
                    vm.engine = engine;
                }
            }
        }
    }

    fn set(&mut self, record: &Record, region: &Region) -> Result<(), TraceError> {
        let at = self.vm_of(record)?;
        let call = || describe(&record.name, region);
        let accepted = match &record.answer {
            Answer::Value(_) => true,
            Answer::Errno(name) if name == "EINVAL" || name == "EEXIST" => false,
            other => {
                self.unjudged.push(Unjudged {
                    line: record.line,
                    fd: record.fd,
                    call: call(),
                    recorded: other.to_string(),
                    why: unknowable(other).to_owned(),
                });
                return Ok(());
            }
        };
        self.compared += 1;
        let now = self.now(record.line);
        let vm = &mut self.vms[at];
        let before = vm.engine.slot(region.address_space(), region.id());
        let disagreement = |came: String, why: String| Disagreement {
            line: record.line,
            fd: record.fd,
            key: record.key(),
            call: call(),
            recorded: record.answer.to_string(),
            came,
            why,
        };
        match (vm.engine.set(region), accepted) {
            (Ok(change), true) => vm.note(region, change, before.as_ref(), now),
            (Ok(change), false) => {
                vm.changes.refused += 1;
                vm.engine.restore(region, before);
                if let Some(why) = unasked(region, &self.capabilities) {
                    self.compared -= 1;
                    let (line, fd, recorded) = (record.line, record.fd, record.answer.to_string());
                    self.unjudged.push(Unjudged { line, fd, call: call(), recorded, why: why.to_owned() });
                    return Ok(());
                }
                let why = format!(
                    "no rule forbids it: it would {}. The change is taken back, as the kernel refused it",
                    effect(change, region, before.as_ref())
                );
                self.disagreements.push(disagreement("0".to_owned(), why));
            }
            (Err(refusal), true) => {
                let why = format!("{}. From here on the map lacks this change", refusal.why);
                vm.changes.refused += 1;
                self.disagreements.push(disagreement(refusal.errno.to_owned(), why));
            }
            (Err(refusal), false) => {
                vm.changes.refused += 1;
                if record.answer != Answer::Errno(Cow::Borrowed(refusal.errno)) {
                    self.disagreements.push(disagreement(refusal.errno.to_owned(), refusal.why));
                }
            }
        }
        Ok(())
    }

    /// One of the calls that concern the dirty log.
    fn dirty_log(&mut self, record: &Record) -> Result<(), TraceError> {
        let at = self.vm_of(record)?;
        let now = self.now(record.line);
        let vm = &mut self.vms[at];
        let Some(outcome) = self.dirty.follow(&mut vm.engine, record) else { return Ok(()) };
        if let Some((slot, written)) = outcome.round {
            let session = vm.session(slot.address_space, slot.id);
            vm.rounds.push(Round {
                at: now,
                address_space: slot.address_space,
                id: slot.id,
                gpa: slot.gpa,
                size: slot.size,
                session,
                reported: outcome.reported,
                written,
            });
        }
        let (line, fd, call) = (record.line, record.fd, calls::describe(record));
        let recorded = record.answer.to_string();
        let verdict = calls::judge(record, outcome.answer);
        self.compared += u64::from(!matches!(verdict, Verdict::Unjudged { .. }));
        match verdict {
            Verdict::Agreed => {}
            Verdict::Unjudged { why } => {
                self.unjudged.push(Unjudged { line, fd, call, recorded, why: why.to_owned() });
            }
            Verdict::Disagreed { came, why } => {
                let key = record.key();
                self.disagreements.push(Disagreement { line, fd, key, call, recorded, came, why });
            }
        }
        Ok(())
    }

    fn finish<R: BufRead>(self, reader: &TraceReader<R>, until: u64) -> Replay {
        let mut ioctls: Vec<_> = self.ioctls.into_iter().collect();
        ioctls.sort_by(|(a, n), (b, m)| m.cmp(n).then_with(|| a.cmp(b)));
        let mut vms = self.vms;
        // A descriptor probed and closed again is of no interest unless nothing else is there.
        if vms.iter().any(|vm| vm.changes != Changes::default()) {
            vms.retain(|vm| vm.changes != Changes::default());
        }
        let processes: HashSet<Option<i64>> = vms.iter().map(|vm| vm.process).collect();
        for vm in vms.iter_mut().filter(|_| processes.len() > 1) {
            if let Some(process) = vm.process {
                vm.name = format!("fd {} of process {process}", vm.fd);
            }
        }
        Replay {
            format: reader.format(),
            lines: reader.line().min(until),
            span_ns: self.first_ns.filter(|_| !self.untimed).map(|_| self.now_ns),
            ioctls,
            ignored: reader.ignored(),
            compared: self.compared,
            agreed: self.compared - u64::try_from(self.disagreements.len()).unwrap_or(0),
            dirty: self.dirty,
            disagreements: self.disagreements,
            unjudged: self.unjudged,
            vms,
        }
    }
}

impl Vm {
    /// How often logging of a slot has been turned on.
    fn session(&self, address_space: u32, id: u32) -> u64 {
        self.logged.get(&(address_space, id)).copied().unwrap_or(0)
    }

    fn note(&mut self, region: &Region, change: Change, before: Option<&MapSlot>, now: Moment) {
        match change {
            Change::Create => self.changes.create += 1,
            Change::Delete => self.changes.delete += 1,
            Change::Move => self.changes.moved += 1,
            Change::FlagsOnly => self.changes.flags += 1,
            Change::Nothing => {
                self.changes.nothing += 1;
                return;
            }
        }
        let key = (region.address_space(), region.id());
        let slot = self.engine.slot(key.0, key.1);
        let logs = |slot: Option<&MapSlot>| slot.is_some_and(|slot| slot.flags & LOG_DIRTY_PAGES != 0);
        if logs(slot.as_ref()) && !logs(before) {
            *self.logged.entry(key).or_default() += 1;
        }
        if let (Change::Create | Change::Move, Some(slot)) = (change, &slot) {
            self.aliases.created(slot, &self.engine.aliases_of(slot), now);
        }
        self.history.record(key, slot, now);
    }

    /// Slots alive now, by address space and gpa.
    pub(crate) fn map(&self) -> Vec<MapSlot> {
        self.history.alive()
    }
}
