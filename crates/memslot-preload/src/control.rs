//! The file through which `memslot record` and every recorded process speak: mapped, shared, of 64-bit words.
//!
//! | word | what | written by |
//! |---|---|---|
//! | 0 | [`MAGIC`], of which the last digit is the version | the program |
//! | 1, 2 | device and inode number of the trace | the program |
//! | 3 | when the recording began, on the monotonic clock, in ns | the first process |
//! | 4 | processes that loaded the library | every process |
//! | 5 | VMs numbered so far | every process |
//! | 6 | lines written | every process |
//! | 7 | calls not recorded since the recording stopped | every process |
//! | 8 | why it stopped: 0 while it runs, else an errno, [`TOO_LARGE`] or [`OVER`] | whoever stops it |
//!
//! Words are in the machine's byte order. At [`PATH_AT`] stands the trace's absolute path, ended by a NUL. The file has [`BYTES`] bytes from
//! the start, so that no access can fail for want of space. The program has the same table; a library of another
//! version than the program finds another magic, and stays out of the way.

use std::ffi::CStr;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// The environment variable with the file's path.
pub(crate) const VARIABLE: &CStr = c"MEMSLOT_RECORD";
/// "memslot1".
pub(crate) const MAGIC: u64 = u64::from_be_bytes(*b"memslot1");
/// The file's size.
pub(crate) const BYTES: usize = 8192;
/// Where the trace's path stands.
pub(crate) const PATH_AT: usize = 4096;
/// Why a recording stopped: the next line would have passed the limit on the size of files that this process has.
pub(crate) const TOO_LARGE: u64 = 1 << 32;
/// Why a recording stopped: the program is done with it, though some process goes on.
#[expect(dead_code, reason = "written by the program; here for the table's sake")]
pub(crate) const OVER: u64 = 2 << 32;

const WORDS: usize = PATH_AT / 8;
const DEVICE: usize = 1;
const INODE: usize = 2;
const START: usize = 3;
const PROCESSES: usize = 4;
const VMS: usize = 5;
const LINES: usize = 6;
const LOST: usize = 7;
const STOPPED: usize = 8;

/// The mapped file.
#[repr(C)]
pub(crate) struct Control {
    words: [AtomicU64; WORDS],
    path: [u8; BYTES - PATH_AT],
}

static SHARED: AtomicPtr<Control> = AtomicPtr::new(ptr::null_mut());

/// The file of this recording, if this process is part of one.
pub(crate) fn shared() -> Option<&'static Control> {
    // SAFETY: null, or a mapping of BYTES bytes that is never undone. All but the path is atomic, and the path does not
    // change after the program wrote it.
    unsafe { SHARED.load(Ordering::Acquire).as_ref() }
}

/// Maps the file that the environment names. Called once, at load.
pub(crate) fn attach() -> Option<&'static Control> {
    // SAFETY: there is one thread yet, and the text is used before anybody can change the environment.
    let path = unsafe { libc::getenv(VARIABLE.as_ptr()) };
    if path.is_null() {
        return None;
    }
    // SAFETY: a NUL-terminated path; the result is a descriptor or -1.
    let fd = unsafe { libc::open(path, libc::O_RDWR | libc::O_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: a zeroed stat is a valid one, and it is written by the call.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: our descriptor and our stat.
    let whole = unsafe { libc::fstat(fd, &raw mut about) } == 0
        && usize::try_from(about.st_size).is_ok_and(|size| size >= BYTES);
    let mut address = libc::MAP_FAILED;
    if whole {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address the kernel chooses; the file has that many bytes.
        address = unsafe { libc::mmap(ptr::null_mut(), BYTES, access, libc::MAP_SHARED, fd, 0) };
    }
    // SAFETY: our descriptor; the mapping does not need it.
    unsafe { libc::close(fd) };
    if address == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the mapping has BYTES bytes, is aligned to a page, and stays; any bytes are a Control.
    let control = unsafe { &*address.cast::<Control>() };
    if control.words[0].load(Ordering::Relaxed) != MAGIC {
        return None;
    }
    let now = crate::threads::now().max(1);
    _ = control.words[START].compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
    control.words[PROCESSES].fetch_add(1, Ordering::Relaxed);
    SHARED.store(address.cast(), Ordering::Release);
    Some(control)
}

impl Control {
    /// Nanoseconds since the recording began.
    pub(crate) fn since_start(&self, now: u64) -> u64 {
        now.saturating_sub(self.words[START].load(Ordering::Relaxed))
    }

    /// The number of a VM that was not seen before; they count from 1 through all processes.
    pub(crate) fn next_vm(&self) -> u64 {
        self.words[VMS].fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Device and inode number of the trace.
    pub(crate) fn trace(&self) -> (u64, u64) {
        (self.words[DEVICE].load(Ordering::Relaxed), self.words[INODE].load(Ordering::Relaxed))
    }

    /// Where the trace is.
    pub(crate) fn path(&self) -> Option<&CStr> {
        CStr::from_bytes_until_nul(&self.path).ok()
    }

    pub(crate) fn written(&self) {
        self.words[LINES].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn lost(&self) {
        self.words[LOST].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.words[STOPPED].load(Ordering::Relaxed) != 0
    }

    /// Ends the recording for all processes; the first reason stays.
    pub(crate) fn stop(&self, why: u64) {
        _ = self.words[STOPPED].compare_exchange(0, why, Ordering::Relaxed, Ordering::Relaxed);
    }
}
