//! The dirty log's calls of a trace: what the engine answers to them, held against the recorded answer.
//!
//! A trace has the bitmaps that came back, and not the guest's writes between them. So a recorded bit that the
//! engine does not have is taken for a write; everything else is checked: every bit that was not cleared must be
//! reported again, a slot that starts with all bits set (`INITIALLY_SET`) must report all of them, the number
//! of pages and each errno must be the same.

use std::borrow::Cow;

use crate::engine::{Engine, Got};
use crate::history::{MapSlot, Moment};
use crate::trace::{Answer, Bits, Call, Record};
use crate::units;
use crate::verdict::Verdict;
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

/// What the engine made of a call.
pub(crate) struct Outcome {
    /// The errno, or what is wrong although the call succeeded.
    pub(crate) answer: Result<Option<String>, &'static str>,
    /// The slot whose log was read, and the pages that the guest wrote.
    pub(crate) round: Option<(MapSlot, Vec<(u64, u64)>)>,
    /// How many bits the kernel reported.
    pub(crate) reported: u64,
}

impl From<Result<Option<String>, &'static str>> for Outcome {
    fn from(answer: Result<Option<String>, &'static str>) -> Self {
        Self { answer, round: None, reported: 0 }
    }
}

impl DirtyCalls {
    /// Gives a call that concerns the dirty log to the engine; `None` if there is nothing to compare.
    pub(crate) fn follow(&mut self, engine: &mut Engine, record: &Record) -> Option<Outcome> {
        let accepted = matches!(record.answer, Answer::Value(_));
        match &record.call {
            Call::CreateVcpu => {
                if accepted {
                    engine.vcpu_created();
                }
                None
            }
            Call::EnableCap { cap, flags, arg } => {
                let answer = engine.enable_cap(*cap, *flags, *arg)?;
                self.enable_cap += 1;
                Some(answer.map(|()| None).into())
            }
            Call::ResetRings => {
                self.reset_rings += 1;
                Some(if engine.has_rings() { Ok(None) } else { Err("EINVAL") }.into())
            }
            Call::DirtyLogUnprinted { slot, cleared } => {
                self.unprinted += 1;
                if let Some(slot) = slot.filter(|_| accepted) {
                    engine.follow_unprinted(slot, *cleared);
                }
                None
            }
            Call::GetDirtyLog { slot, bits } if accepted => {
                let reported = bits.runs.iter().map(|run| run.1).sum();
                self.get += 1;
                self.bits += reported;
                Some(match engine.get_dirty_log(*slot, bits) {
                    Ok(got) => {
                        let answer = Ok(contradiction(bits, &got));
                        let known = engine.slot(slot >> 16, slot & 0xffff);
                        Outcome { answer, round: known.map(|slot| (slot, got.written)), reported }
                    }
                    Err(errno) => Err(errno).into(),
                })
            }
            Call::GetDirtyLog { slot, bits } => {
                self.get += 1;
                Some(engine.get_dirty_log(*slot, bits).map(|_| None).into())
            }
            Call::ClearDirtyLog { slot, first, mask } => {
                self.clear += 1;
                self.cleared += mask.runs.iter().map(|run| run.1).sum::<u64>();
                Some(engine.clear_dirty_log(*slot, *first, mask).map(|()| None).into())
            }
            _ => None,
        }
    }
}

/// Holds an answer (an errno, or what is wrong although the call succeeded) against the recorded one.
pub(crate) fn judge(record: &Record, answer: Result<Option<String>, &'static str>) -> Verdict {
    let known = ["EINVAL", "ENOENT", "ENXIO", "E2BIG"];
    match &record.answer {
        Answer::Value(_) => {}
        Answer::Errno(name) if known.contains(&name.as_ref()) => {}
        other => return Verdict::Unjudged { why: unknowable(other) },
    }
    let (came, why) = match (&record.answer, answer) {
        (Answer::Value(_), Ok(None)) => return Verdict::Agreed,
        (Answer::Value(_), Ok(Some(wrong))) => (record.answer.to_string(), wrong),
        (Answer::Value(_), Err(errno)) => (errno.to_owned(), "KVM's rules refuse it".to_owned()),
        (_, Ok(_)) => ("0".to_owned(), "no rule forbids it".to_owned()),
        (Answer::Errno(name), Err(errno)) if *name == Cow::Borrowed(errno) => return Verdict::Agreed,
        (_, Err(errno)) => (errno.to_owned(), "KVM's rules refuse it for another reason".to_owned()),
    };
    Verdict::Disagreed { came, why }
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

/// The call as it is shown.
pub(crate) fn describe(record: &Record) -> String {
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
