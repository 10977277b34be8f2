//! The trace: one `write` a line, at the end of the file, whoever else writes there.
//!
//! The system calls are made with `syscall`: libc's `write` is a place where a thread may be cancelled, which `ioctl`
//! is not, and other libraries may stand in front of it.

use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use crate::control::{Control, TOO_LARGE};
use crate::threads;

/// The trace's descriptor, or -1. It may be closed by the VMM at any time and become something else.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);
/// The largest file that this process may write, as it was at load: to pass it would end the VMM by a signal.
static LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Opens the trace early, since a VMM may later be where it cannot: another root, another user, a sandbox.
pub(crate) fn open(control: &Control) {
    if let Some(limit) = limit(libc::RLIMIT_FSIZE) {
        LIMIT.store(limit, Ordering::Relaxed);
    }
    // What went wrong shows again, and counts, when there is a line to write.
    _ = reopen(control, -1);
}

/// Appends a line. If that cannot be done the recording ends, for all processes: a trace with a gap would mislead.
pub(crate) fn append(control: &Control, line: &[u8]) {
    if control.is_stopped() {
        return control.lost();
    }
    match try_append(control, line) {
        Ok(()) => control.written(),
        Err(why) => {
            control.stop(why);
            control.lost();
        }
    }
}

fn try_append(control: &Control, line: &[u8]) -> Result<(), u64> {
    let descriptor = DESCRIPTOR.load(Ordering::Relaxed);
    let (descriptor, size) = match size_of_trace(control, descriptor) {
        Some(size) => (descriptor, size),
        None => reopen(control, descriptor)?,
    };
    let length = u64::try_from(line.len()).unwrap_or(u64::MAX);
    if size.saturating_add(length) > LIMIT.load(Ordering::Relaxed) {
        return Err(TOO_LARGE);
    }
    loop {
        // SAFETY: the bytes are ours and stay for the length of the call.
        let written = unsafe { libc::syscall(libc::SYS_write, descriptor, line.as_ptr(), line.len()) };
        match u64::try_from(written) {
            Ok(written) if written == length => return Ok(()),
            // A line was cut, which happens where space ends. The program removes it in the end.
            Ok(_) => return Err(error(libc::ENOSPC)),
            Err(_) if threads::errno() == libc::EINTR => {}
            Err(_) => return Err(error(threads::errno())),
        }
    }
}

/// Opens the trace and makes it the descriptor in use, in place of `lost`.
fn reopen(control: &Control, lost: c_int) -> Result<(c_int, u64), u64> {
    let path = control.path().ok_or(error(libc::ENOENT))?;
    let flags = libc::O_WRONLY | libc::O_APPEND | libc::O_CLOEXEC | libc::O_NOCTTY;
    // SAFETY: a NUL-terminated path that stays.
    let low = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags) };
    let low = c_int::try_from(low).unwrap_or(-1);
    if low < 0 {
        return Err(error(threads::errno()));
    }
    let Some(size) = size_of_trace(control, low) else {
        close(low);
        return Err(error(libc::ESTALE));
    };
    // High, out of the way of programs that count on getting the lowest number, or close the first few.
    let descriptors = limit(libc::RLIMIT_NOFILE).unwrap_or(1024).min(4096);
    let high = c_int::try_from(descriptors.saturating_sub(32)).unwrap_or(0);
    // SAFETY: our own descriptor.
    let raised = unsafe { libc::syscall(libc::SYS_fcntl, low, libc::F_DUPFD_CLOEXEC, high) };
    let descriptor = match c_int::try_from(raised) {
        Ok(raised) if raised >= 0 => {
            close(low);
            raised
        }
        _ => low,
    };
    match DESCRIPTOR.compare_exchange(lost, descriptor, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => Ok((descriptor, size)),
        // Another thread was quicker. What is in use may be lost again at once; then this line goes with ours.
        Err(theirs) if size_of_trace(control, theirs).is_some() => {
            close(descriptor);
            Ok((theirs, size))
        }
        Err(_) => Ok((descriptor, size)),
    }
}

/// The trace's size, if the descriptor is the trace's.
fn size_of_trace(control: &Control, descriptor: c_int) -> Option<u64> {
    if descriptor < 0 {
        return None;
    }
    // SAFETY: a zeroed stat is a valid one, and it is written by the call.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: any number may be asked about; the stat is ours. The kernel's layout is libc's on 64-bit machines.
    let answer = unsafe { libc::syscall(libc::SYS_fstat, descriptor, &raw mut about) };
    let ours = answer == 0 && (about.st_dev, about.st_ino) == control.trace();
    if ours { u64::try_from(about.st_size).ok() } else { None }
}

fn close(descriptor: c_int) {
    // SAFETY: opened by us a moment ago and known to nobody else.
    unsafe { libc::syscall(libc::SYS_close, descriptor) };
}

/// A limit of this process, if there is one.
fn limit(which: impl Into<i64>) -> Option<u64> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let (ourselves, unchanged) = (0_i64, ptr::null::<libc::rlimit64>());
    let which: i64 = which.into();
    // SAFETY: our rlimit, written by the call.
    let answer = unsafe { libc::syscall(libc::SYS_prlimit64, ourselves, which, unchanged, &raw mut limit) };
    (answer == 0 && limit.rlim_cur != libc::RLIM64_INFINITY).then_some(limit.rlim_cur)
}

fn error(errno: c_int) -> u64 {
    u64::try_from(errno).unwrap_or(1)
}
