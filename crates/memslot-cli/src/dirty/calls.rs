//! The dirty log's calls of a trace: what the engine answers to them, held against the recorded answer.
//!
//! A trace has the bitmaps that came back, and not the guest's writes between them. So a recorded bit that the
//! engine does not have is taken for a write; everything else is checked: every bit that was not cleared must be
//! reported again, a slot that starts with all bits set (`INITIALLY_SET`) must report all of them, the number
//! of pages and each errno must be the same.

use std::borrow::Cow;

use crate::engine::Got;
use crate::history::Moment;
use crate::replay::{Disagreement, Run, Unjudged};
use crate::trace::{Answer, Bits, Call, Record, TraceError};
use crate::units;
use crate::words::unknowable;

/// How many calls of each kind were judged, and the bits in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct DirtyCalls {
    /// `KVM_GET_DIRTY_LOG`.
    pub(crate) get: u64,
    /// `KVM_CLEAR_DIRTY_LOG`.
    pub(crate) clear: u64,
    /// `KVM_ENABLE_CAP` of the dirty log's capabilities.
    pub(crate) enable_cap: u64,
    /// `KVM_RESET_DIRTY_RINGS`.
    pub(crate) reset_rings: u64,
    /// Bits that were set in the recorded answers to GET.
    pub(crate) bits: u64,
    /// Bits that were set in the masks of CLEAR.
    pub(crate) cleared: u64,
    /// Calls of which the trace has not the bitmap, mostly because it shows only a pointer.
    pub(crate) unprinted: u64,
}

impl DirtyCalls {
    /// All calls on the log itself.
    pub(crate) fn calls(&self) -> u64 {
        self.get + self.clear + self.reset_rings + self.unprinted
    }
}

/// One `KVM_GET_DIRTY_LOG` of one slot.
#[derive(Clone, Debug)]
pub(crate) struct Round {
    pub(crate) at: Moment,
    pub(crate) address_space: u32,
    pub(crate) id: u32,
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    /// How often logging of this slot had been turned on.
    pub(crate) session: u64,
    /// How many bits were reported.
    pub(crate) reported: u64,
    /// Pages that the guest wrote since the call before: first page and number of pages.
    pub(crate) written: Vec<(u64, u64)>,
}

impl Round {
    /// How many pages the guest wrote.
    pub(crate) fn pages_written(&self) -> u64 {
        self.written.iter().map(|run| run.1).sum()
    }
}

impl Run {
    /// One of the calls that concern the dirty log.
    pub(crate) fn dirty_log(&mut self, record: &Record) -> Result<(), TraceError> {
        let vm = self.vm_of(record)?;
        let now = self.now(record.line);
        let engine = &mut self.vms[vm].engine;
        let accepted = matches!(record.answer, Answer::Value(_));
        let answer = match &record.call {
            Call::CreateVcpu => {
                if accepted {
                    engine.vcpu_created();
                }
                return Ok(());
            }
            Call::EnableCap { cap, flags, arg } => {
                let Some(answer) = engine.enable_cap(*cap, *flags, *arg) else { return Ok(()) };
                self.dirty.enable_cap += 1;
                answer.map(|()| None)
            }
            Call::ResetRings => {
                self.dirty.reset_rings += 1;
                if engine.has_rings() { Ok(None) } else { Err("EINVAL") }
            }
            Call::DirtyLogUnprinted { slot, cleared } => {
                self.dirty.unprinted += 1;
                if let Some(slot) = slot.filter(|_| accepted) {
                    engine.follow_unprinted(slot, *cleared);
                }
                return Ok(());
            }
            Call::GetDirtyLog { slot, bits } if accepted => {
                self.dirty.get += 1;
                self.dirty.bits += bits.runs.iter().map(|run| run.1).sum::<u64>();
                let got = engine.get_dirty_log(*slot, bits);
                if let Ok(got) = &got {
                    if let Some(known) = engine.slot(slot >> 16, slot & 0xffff) {
                        let session = self.vms[vm].session(known.address_space, known.id);
                        self.vms[vm].rounds.push(Round {
                            at: now,
                            address_space: known.address_space,
                            id: known.id,
                            gpa: known.gpa,
                            size: known.size,
                            session,
                            reported: bits.runs.iter().map(|run| run.1).sum(),
                            written: got.written.clone(),
                        });
                    }
                }
                got.map(|got| contradiction(bits, &got))
            }
            Call::GetDirtyLog { slot, bits } => {
                self.dirty.get += 1;
                engine.get_dirty_log(*slot, bits).map(|_| None)
            }
            Call::ClearDirtyLog { slot, first, mask } => {
                self.dirty.clear += 1;
                self.dirty.cleared += mask.runs.iter().map(|run| run.1).sum::<u64>();
                engine.clear_dirty_log(*slot, *first, mask).map(|()| None)
            }
            _ => return Ok(()),
        };
        self.judge(record, answer);
        Ok(())
    }

    /// Holds an answer (an errno, or what is wrong although the call succeeded) against the recorded one.
    fn judge(&mut self, record: &Record, answer: Result<Option<String>, &'static str>) {
        let (line, fd, key, call) = (record.line, record.fd, record.key(), describe(record));
        let recorded = record.answer.to_string();
        let known = ["EINVAL", "ENOENT", "ENXIO", "E2BIG"];
        match &record.answer {
            Answer::Value(_) => {}
            Answer::Errno(name) if known.contains(&name.as_ref()) => {}
            other => {
                let why = unknowable(other).to_owned();
                return self.unjudged.push(Unjudged { line, fd, call, recorded, why });
            }
        }
        self.compared += 1;
        let (came, why) = match (&record.answer, answer) {
            (Answer::Value(_), Ok(None)) => return,
            (Answer::Value(_), Ok(Some(wrong))) => (recorded.clone(), wrong),
            (Answer::Value(_), Err(errno)) => (errno.to_owned(), "KVM's rules refuse it".to_owned()),
            (_, Ok(_)) => ("0".to_owned(), "no rule forbids it".to_owned()),
            (Answer::Errno(name), Err(errno)) if *name == Cow::Borrowed(errno) => return,
            (_, Err(errno)) => (errno.to_owned(), "KVM's rules refuse it for another reason".to_owned()),
        };
        self.disagreements.push(Disagreement { line, fd, key, call, recorded, came, why });
    }
}

/// What is wrong with a recorded bitmap.
fn contradiction(recorded: &Bits, got: &Got) -> Option<String> {
    if recorded.pages != got.pages {
        return Some(format!("the bitmap is of {} pages, and the slot has {}", recorded.pages, got.pages));
    }
    let (runs, what) = match got.contradicts.is_empty() {
        false => (&got.contradicts, "missing: dirty before, and not cleared since"),
        true => (&got.lacks, "reported by the kernel, and not by the engine"),
    };
    let &(first, count) = runs.first()?;
    let all: u64 = runs.iter().map(|run| run.1).sum();
    let (last, more) = (first + count - 1, all - count);
    let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
    let pages = match count {
        1 => format!("page {first}{more} is"),
        _ => format!("pages {first} to {last}{more} are"),
    };
    Some(format!("{pages} {what}"))
}

fn describe(record: &Record) -> String {
    let name = &record.name;
    match &record.call {
        Call::EnableCap { cap, flags: 0, arg } => format!("{name} {{cap={cap}, args[0]={arg:#x}}}"),
        Call::EnableCap { cap, flags, arg } => {
            format!("{name} {{cap={cap}, flags={flags:#x}, args[0]={arg:#x}}}")
        }
        Call::GetDirtyLog { slot, bits } => {
            let set: u64 = bits.runs.iter().map(|run| run.1).sum();
            format!("{name} {{slot={slot}}}: {} of {} pages", set, bits.pages)
        }
        Call::ClearDirtyLog { slot, first, mask } => {
            let set: u64 = mask.runs.iter().map(|run| run.1).sum();
            let bits = units::count(set, "bit");
            format!("{name} {{slot={slot}, first_page={first}, num_pages={}}}: {bits}", mask.pages)
        }
        _ => name.to_string(),
    }
}
