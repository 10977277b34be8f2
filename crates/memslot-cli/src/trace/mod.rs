//! Reading traces: what a VMM asked of KVM, call by call, and what KVM answered.
//!
//! Two formats come in, JSON lines (one object a call, as a preload logger writes them) and the text `strace`
//! prints, and one thing goes out: a [`Record`] a call, in the order in which the calls *finished*. That is the
//! order in which their effects can be relied on: KVM takes a lock around each change of the map, and a call
//! that strace shows as unfinished had not yet returned.
//!
//! The reader is strict where silence would make the replay lie (a memory-region call it cannot read is an
//! error) and lenient where nothing depends on it (other system calls, signals, a program's own output among
//! strace's lines are counted and left alone). It never panics, whatever the bytes.

mod ioctl;
mod jsonl;
mod strace;

pub(crate) use ioctl::{CAP_GUEST_MEMFD, CAP_MULTI_ADDRESS_SPACE, CAP_NR_MEMSLOTS, CAP_READONLY_MEM};

use std::borrow::Cow;
use std::fmt;
use std::io::{self, BufRead, Read};

use serde::Serialize;

/// A line longer than this is no trace line. The longest real ones, dirty bitmaps of large slots, stay far below.
const LONGEST_LINE: u64 = 256 << 20;

/// The format of a trace, decided by its first line that is not blank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// One JSON object a line.
    Jsonl,
    /// `PID TIME ioctl(FD, KVM_…, …) = RET <DURATION>`.
    Strace,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Jsonl => "JSON lines",
            Format::Strace => "strace output",
        })
    }
}

/// The argument of `KVM_SET_USER_MEMORY_REGION` or, with `guest_memfd`, of `KVM_SET_USER_MEMORY_REGION2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// Slot id in the low 16 bits, address space in the high 16, as KVM has it.
    pub(crate) slot: u32,
    /// `KVM_MEM_*`.
    pub(crate) flags: u32,
    /// Bytes.
    pub(crate) gpa: u64,
    /// Bytes; 0 deletes.
    pub(crate) size: u64,
    /// Bytes.
    pub(crate) hva: u64,
    /// The second form of the call carries a guest_memfd, used only if the flag says so.
    pub(crate) second: Option<GuestMemfd>,
}

/// A piece of a guest_memfd file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct GuestMemfd {
    /// File descriptor.
    pub(crate) file: u32,
    /// Bytes into it.
    pub(crate) offset: u64,
}

impl Region {
    /// The address space, from the high half of the slot number.
    pub(crate) fn address_space(&self) -> u32 {
        self.slot >> 16
    }

    /// The slot id within its address space.
    pub(crate) fn id(&self) -> u32 {
        self.slot & 0xffff
    }
}

/// A recorded dirty bitmap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bits {
    /// How many pages it is of.
    pub(crate) pages: u64,
    /// The set bits, as first page and number of pages; all of them lie below `pages`.
    pub(crate) runs: Vec<(u64, u64)>,
}

/// What a new VM may have, as the recorder found out when it was created: capability number and the kernel's answer.
pub(crate) type VmLimits = Vec<(u32, i64)>;

/// A VM, as the lines of a trace name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum VmKey {
    /// By the recorder's own number, which no other VM of the trace has.
    Numbered(u64),
    /// By its descriptor, in a process if the trace tells them apart.
    Descriptor { process: Option<i64>, fd: i64 },
}

/// What a call asks, as far as a replay cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// `KVM_CREATE_VM`; the result is the VM's file descriptor.
    CreateVm(VmLimits),
    /// `KVM_CHECK_EXTENSION`, with the capability's number where it is one the rules depend on.
    CheckExtension(Option<u32>),
    /// `KVM_SET_USER_MEMORY_REGION` and its second form.
    SetRegion(Region),
    /// One of these two whose argument the recorder printed as a mere pointer.
    SetRegionUnprinted,
    /// `KVM_ENABLE_CAP`, with the capability's number, the flags (of which KVM knows none) and the first argument.
    EnableCap { cap: u32, flags: u32, arg: u64 },
    /// `KVM_CREATE_VCPU`.
    CreateVcpu,
    /// `KVM_GET_DIRTY_LOG`, with the bitmap that came back.
    GetDirtyLog { slot: u32, bits: Bits },
    /// `KVM_CLEAR_DIRTY_LOG`, with the bitmap of what to clear from page `first` on.
    ClearDirtyLog { slot: u32, first: u64, mask: Bits },
    /// One of these two without its bitmap. The slot is known unless the recorder printed a mere pointer; of a CLEAR then
    /// also the first page and the number of pages.
    DirtyLogUnprinted { slot: Option<u32>, cleared: Option<(u64, u64)> },
    /// `KVM_CREATE_GUEST_MEMFD`; the result is the file's descriptor.
    CreateGuestMemfd,
    /// `KVM_RESET_DIRTY_RINGS`.
    ResetRings,
    /// Any other KVM call: counted.
    Other,
}

/// What the kernel answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// 0 or a positive result.
    Value(i64),
    /// An errno by its name.
    Errno(Cow<'static, str>),
    /// strace's `= ?`: the process ended inside the call.
    Unknown,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::Value(value) => write!(f, "{value}"),
            Answer::Errno(name) => f.write_str(name),
            Answer::Unknown => f.write_str("?"),
        }
    }
}

/// One KVM ioctl of the trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Line at which the call returned, from 1.
    pub(crate) line: u64,
    /// When the call began, on the recorder's clock.
    pub(crate) start_ns: Option<u64>,
    /// The file descriptor it went to.
    pub(crate) fd: i64,
    /// The process that called, if the trace tells.
    pub(crate) process: Option<i64>,
    /// The recorder's number of the VM concerned, or of the one created.
    pub(crate) vm: Option<u64>,
    /// The ioctl's name (`KVM_…`).
    pub(crate) name: Cow<'static, str>,
    /// What it asks.
    pub(crate) call: Call,
    /// What came back.
    pub(crate) answer: Answer,
}

impl Record {
    /// The VM that the call went to.
    pub(crate) fn key(&self) -> VmKey {
        self.key_of(self.fd)
    }

    /// The VM behind this descriptor, for the process that called.
    pub(crate) fn key_of(&self, fd: i64) -> VmKey {
        self.vm.map_or(VmKey::Descriptor { process: self.process, fd }, VmKey::Numbered)
    }
}

/// Lines that are no KVM ioctl, by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Ignored {
    /// System calls that are no KVM ioctl.
    pub(crate) other_calls: u64,
    /// Signals, exits and strace's own notes.
    pub(crate) events: u64,
    /// Lines strace did not print: the traced program's output, most likely.
    pub(crate) foreign: u64,
    /// KVM calls that began but of whose end the trace says nothing.
    pub(crate) unfinished: u64,
}

/// Why a trace cannot be read. The file's name is the caller's to add.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum TraceError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("is empty: a trace has at least one line")]
    Empty,
    #[error("is a binary file{0}, not a trace")]
    Binary(&'static str),
    #[error("line {line}: neither a JSON object nor a line that strace prints: `{excerpt}`")]
    NotATrace { line: u64, excerpt: String },
    #[error("line {line}: {what}")]
    Line { line: u64, what: String },
}

/// What one line turned out to be. Made by the two parsers, consumed by [`TraceReader`].
#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    Record(Record),
    OtherCall,
    Event,
    Foreign,
    /// Held back until its second half comes.
    Pending,
}

/// Reads records one after another; memory stays bounded by the longest line.
pub(crate) struct TraceReader<R> {
    input: R,
    format: Option<Format>,
    line: u64,
    bytes: u64,
    buffer: Vec<u8>,
    strace: strace::Joiner,
    recognised: bool,
    first_foreign: Option<(u64, String)>,
    ignored: Ignored,
}

impl<R: BufRead> TraceReader<R> {
    pub(crate) fn new(input: R) -> Self {
        TraceReader {
            input,
            format: None,
            line: 0,
            bytes: 0,
            buffer: Vec::new(),
            strace: strace::Joiner::default(),
            recognised: false,
            first_foreign: None,
            ignored: Ignored::default(),
        }
    }

    /// Lines read so far.
    pub(crate) fn line(&self) -> u64 {
        self.line
    }

    /// Bytes read so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Known once the first record has been read.
    pub(crate) fn format(&self) -> Option<Format> {
        self.format
    }

    /// What was passed over so far; calls still waiting for their second half count as unfinished.
    pub(crate) fn ignored(&self) -> Ignored {
        Ignored { unfinished: self.strace.waiting(), ..self.ignored }
    }

    /// The next KVM ioctl, or `None` at the end of the trace.
    pub(crate) fn next_record(&mut self) -> Result<Option<Record>, TraceError> {
        loop {
            let Some(complete) = self.read_line()? else {
                return self.finish().map(|()| None);
            };
            let text = String::from_utf8_lossy(&self.buffer);
            let text = text.trim_end_matches(['\n', '\r']);
            if text.trim().is_empty() {
                continue;
            }
            let format = *self.format.get_or_insert_with(|| match text.trim_start().starts_with('{') {
                true => Format::Jsonl,
                false => Format::Strace,
            });
            let parsed = match format {
                Format::Jsonl => jsonl::parse(text, self.line),
                Format::Strace => self.strace.parse(text, self.line),
            };
            let parsed = parsed.map_err(|what| TraceError::Line {
                line: self.line,
                what: match complete {
                    true => what,
                    false => format!("{what} (the last line of the file is cut short)"),
                },
            })?;
            match parsed {
                Line::Foreign if !complete && self.recognised => {
                    let what = format!("the last line of the file is cut short: `{}`", excerpt(text));
                    return Err(TraceError::Line { line: self.line, what });
                }
                Line::Foreign => {
                    self.ignored.foreign += 1;
                    self.first_foreign.get_or_insert_with(|| (self.line, excerpt(text)));
                    continue;
                }
                Line::Record(record) => {
                    self.recognised = true;
                    return Ok(Some(record));
                }
                Line::OtherCall => self.ignored.other_calls += 1,
                Line::Event => self.ignored.events += 1,
                Line::Pending => {}
            }
            self.recognised = true;
        }
    }

    /// Fills the buffer; says whether the line was whole, or `None` at the end.
    fn read_line(&mut self) -> Result<Option<bool>, TraceError> {
        self.buffer.clear();
        let read = (&mut self.input).take(LONGEST_LINE).read_until(b'\n', &mut self.buffer)?;
        if read == 0 {
            return Ok(None);
        }
        self.bytes = self.bytes.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
        self.line += 1;
        if let Some(kind) = binary(&self.buffer, self.line) {
            return Err(match self.line {
                1 => TraceError::Binary(kind),
                line => TraceError::Line { line, what: "holds binary data".to_owned() },
            });
        }
        let complete = self.buffer.last() == Some(&b'\n');
        if !complete && u64::try_from(read).is_ok_and(|read| read == LONGEST_LINE) {
            let what = format!("longer than {} MiB: not a trace line", LONGEST_LINE >> 20);
            return Err(TraceError::Line { line: self.line, what });
        }
        Ok(Some(complete))
    }

    fn finish(&mut self) -> Result<(), TraceError> {
        if self.recognised {
            return Ok(());
        }
        Err(match self.first_foreign.take() {
            Some((line, excerpt)) => TraceError::NotATrace { line, excerpt },
            None => TraceError::Empty,
        })
    }
}

/// Whether a line is binary data, and of which kind if its first bytes tell.
fn binary(bytes: &[u8], line: u64) -> Option<&'static str> {
    match bytes {
        [0x1f, 0x8b, ..] if line == 1 => Some(" (gzip: unpack it first)"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] if line == 1 => Some(" (zstd: unpack it first)"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] if line == 1 => Some(" (xz: unpack it first)"),
        [0x7f, b'E', b'L', b'F', ..] if line == 1 => Some(" (an ELF executable)"),
        _ => bytes.contains(&0).then_some(""),
    }
}

/// The beginning of a line, fit for a message.
fn excerpt(text: &str) -> String {
    let short: String = text.chars().take(60).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    match text.chars().nth(60) {
        Some(_) => short + "…",
        None => short,
    }
}

/// A number as traces write them: decimal, or hexadecimal with `0x`.
fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        None if !text.starts_with('+') => text.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
