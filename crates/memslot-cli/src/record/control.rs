//! The small file through which this program and the library in every recorded process speak.
//!
//! The library maps it; here it is read and written as a file, which comes to the same. Its table is in the library's module
//! `control`; the magic's last character is the table's version and must change with it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Refusal, Trace};

/// The environment variable with the file's path.
pub(super) const VARIABLE: &str = "MEMSLOT_RECORD";

const MAGIC: u64 = u64::from_be_bytes(*b"memslot1");
const BYTES: usize = 8192;
const PATH_AT: usize = 4096;
/// The longest path, of which the NUL must also have room.
const LONGEST_PATH: usize = BYTES - PATH_AT - 1;
const PROCESSES: u64 = 4;
const LINES: u64 = 6;
const LOST: u64 = 7;
const STOPPED: u64 = 8;
const TOO_LARGE: u64 = 1 << 32;
const OVER: u64 = 2 << 32;

/// The file, as long as the recording lasts.
pub(super) struct Control {
    pub(super) path: PathBuf,
    file: File,
}

/// Why a recording stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// A line could not be written.
    Errno(i32),
    /// The trace would have passed the limit on the size of files that the VMM has.
    TooLarge,
}

impl Control {
    /// Lays it down in this folder.
    pub(super) fn create(folder: &Path, trace_path: &Path, trace: &File) -> Result<Self, Refusal> {
        let trace_path = trace_path.as_os_str().as_bytes();
        if trace_path.len() > LONGEST_PATH {
            return Err(Refusal::recorder(format!("the trace's path is longer than {LONGEST_PATH} bytes")));
        }
        let path = folder.join("control");
        let create = || -> io::Result<File> {
            let (device, inode) = Trace::identity(trace)?;
            let mut bytes = vec![0; BYTES];
            for (word, value) in [MAGIC, device, inode].into_iter().enumerate() {
                bytes[8 * word..][..8].copy_from_slice(&value.to_ne_bytes());
            }
            bytes[PATH_AT..][..trace_path.len()].copy_from_slice(trace_path);
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            file.write_all_at(&bytes, 0)?;
            Ok(file)
        };
        let file = create().map_err(|error| Refusal::recorder(format!("{}: {error}", path.display())))?;
        Ok(Control { path, file })
    }

    fn word(&self, word: u64) -> u64 {
        let mut bytes = [0; 8];
        match self.file.read_exact_at(&mut bytes, 8 * word) {
            Ok(()) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }

    /// How many processes loaded the library.
    pub(super) fn processes(&self) -> u64 {
        self.word(PROCESSES)
    }

    /// How many lines were written.
    pub(super) fn lines(&self) -> u64 {
        self.word(LINES)
    }

    /// Calls that were not recorded since the recording stopped.
    pub(super) fn lost(&self) -> u64 {
        self.word(LOST)
    }

    /// Why it stopped, if it did before [`end`](Self::end).
    pub(super) fn stopped(&self) -> Option<Stopped> {
        match self.word(STOPPED) {
            0 | OVER => None,
            TOO_LARGE => Some(Stopped::TooLarge),
            errno => Some(Stopped::Errno(i32::try_from(errno).unwrap_or(0))),
        }
    }

    /// Tells processes that go on that nothing is recorded any more.
    pub(super) fn end(&self) {
        if self.word(STOPPED) == 0 {
            _ = self.file.write_all_at(&OVER.to_ne_bytes(), 8 * STOPPED);
        }
    }
}
