//! What can go wrong with memory.

use std::io;

use memslot::{Gfn, OutOfMemory, Slot};

use crate::{HugePage, MemoryKind};

/// Why memory was not mapped, discarded or looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Nothing was asked for.
    #[error("memory of 0 bytes cannot be mapped; ask for at least one page of {page} bytes")]
    Empty {
        /// The page size.
        page: u64,
    },
    /// A size, an offset or an end is no multiple of the page size.
    #[error("{what} {value:#x} is not a multiple of {multiple:#x} bytes; {}", nearest(*value, *multiple))]
    Unaligned {
        /// What it is.
        what: &'static str,
        /// Its value in bytes.
        value: u64,
        /// Of what it must be a multiple, in bytes.
        multiple: u64,
    },
    /// An alignment that no mapping can have.
    #[error("an alignment is a power of two and at least one page ({page:#x} bytes), not {asked:#x}")]
    BadAlignment {
        /// What was asked for.
        asked: u64,
        /// The page size.
        page: u64,
    },
    /// A range of bytes does not lie in the memory.
    #[error("the bytes {start:#x}..{end:#x} do not lie in memory of {bytes:#x} bytes")]
    OutOfRange {
        /// The first byte.
        start: u64,
        /// The byte behind the last.
        end: u64,
        /// How many bytes the memory has.
        bytes: u64,
    },
    /// The file ends before the memory would: behind its end is nothing but `SIGBUS`.
    #[error(
        "the file has {has:#x} bytes and the memory would end at {needs:#x} of it; make the file longer first"
    )]
    FileTooShort {
        /// The file's size in bytes.
        has: u64,
        /// The size it needs.
        needs: u64,
    },
    /// The host has too few huge pages, or none of that size.
    #[error(
        "{wanted} huge pages of {page} are wanted and {} free: reserve some with `echo N > {setting}`",
        available.map_or_else(|| "this host has none of that size; none are".to_owned(), |n| format!("{n} are"))
    )]
    NoHugePages {
        /// Their size.
        page: HugePage,
        /// How many the memory needs.
        wanted: u64,
        /// How many are free and not promised to somebody else; `None` where the host does not know the size.
        available: Option<u64>,
        /// The file that sets how many the host has.
        setting: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest frames would end behind the last 64-bit frame number.
    #[error("{pages} pages from gfn {gfn:#x} on pass the last frame there can be")]
    GfnsTooHigh {
        /// The first frame.
        gfn: Gfn,
        /// How many pages.
        pages: u64,
    },
    /// The memory's kind cannot do this.
    #[error("{operation} does not work on {kind} memory: {instead}")]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// The kind.
        kind: MemoryKind,
        /// Why, and what to do instead.
        instead: &'static str,
    },
    /// A system call failed.
    #[error("{call} of {bytes:#x} bytes of {kind} memory failed: {source}")]
    Call {
        /// Which call, with the part of its arguments that matters.
        call: &'static str,
        /// The kind of memory.
        kind: MemoryKind,
        /// How many bytes it was about.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

fn nearest(value: u64, multiple: u64) -> String {
    let down = value - value % multiple;
    match down.checked_add(multiple) {
        Some(up) => format!("the nearest are {down:#x} and {up:#x}"),
        None => format!("the nearest is {down:#x}"),
    }
}

/// Why a slot may not stand on what it asked for. As a listener's error it is inside of
/// [`Reason::Listener`](memslot::Reason::Listener).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StandingError {
    /// The slot's host memory is nobody's that [`Backings`](crate::Backings) know.
    #[error("{slot} would stand on {hvas}: memory that was not adopted, or that is gone", hvas = ShowHvas(slot))]
    Unknown {
        /// The slot.
        slot: Slot,
    },
    /// The slot begins in an adopted memory and ends outside of it, or the other way round.
    #[error(
        "{slot} would stand on {hvas}, which lies only partly in the memory [{start:#x}, +{bytes:#x} bytes): \
         a slot stands on one memory", hvas = ShowHvas(slot)
    )]
    NotInside {
        /// The slot.
        slot: Slot,
        /// Where the memory begins.
        start: u64,
        /// How many bytes it has.
        bytes: u64,
    },
    /// The slot's private memory is no guest_memfd that was adopted.
    #[error("{slot} has its private memory in file {file}, which was not adopted, or is gone")]
    UnknownFile {
        /// The slot.
        slot: Slot,
        /// The file's number.
        file: u32,
    },
    /// The slot's private memory ends behind the file.
    #[error("{slot} ends at {end:#x} of the guest_memfd {file}, which has {bytes:#x} bytes")]
    FileTooShort {
        /// The slot.
        slot: Slot,
        /// The file's number.
        file: u32,
        /// Where the slot would end in the file.
        end: u64,
        /// How many bytes the file has.
        bytes: u64,
    },
}

struct ShowHvas<'a>(&'a Slot);

impl std::fmt::Display for ShowHvas<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.hvas() {
            Some(hvas) => write!(f, "hva [{:#x}, {:#x})", hvas.start(), hvas.end()),
            None => f.write_str("no hva"),
        }
    }
}

/// Why [`Backings`](crate::Backings) could not be attached. The table is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The table has given away all of its [`MAX_ATTACHMENTS`](memslot::MAX_ATTACHMENTS) keys.
    #[error("the table has no attachment key left; it has {}", memslot::MAX_ATTACHMENTS)]
    NoKey,
    /// A slot that the table has already stands on memory that was not handed over.
    #[error(transparent)]
    Standing(#[from] StandingError),
    /// No memory for a version or a list.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// Why guest frames were not discarded. Unless it says how many were, none was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscardError {
    /// The guest cannot write these frames, so it cannot give them up either.
    #[error("{slot} is read-only: what is in it is not the guest's to discard")]
    ReadOnly {
        /// The slot.
        slot: Slot,
    },
    /// The frames stand on memory that was not adopted: only its owner knows how to discard it.
    #[error("{slot} stands on memory that was not adopted: only its owner knows how to discard it")]
    Unknown {
        /// The slot.
        slot: Slot,
    },
    /// The frames cannot be discarded by themselves: the memory has larger pages.
    #[error("the frames behind gfn {at:#x} cannot be discarded: {source}")]
    Pages {
        /// The first of them.
        at: Gfn,
        /// What must be changed.
        source: MemoryError,
    },
    /// The kernel refused when some of the frames were discarded already.
    #[error("discarding stopped at gfn {at:#x}, after {bytes:#x} bytes: {source}")]
    Stopped {
        /// The first frame of the part that failed.
        at: Gfn,
        /// How many bytes were discarded before.
        bytes: u64,
        /// What failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
