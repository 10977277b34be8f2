//! Who calls, and when: process and thread id, the clock, and `errno`.
//!
//! The two ids are kept, because asking for them is a system call each, which costs time and which a sandbox may
//! forbid. A forked child must not use its parent's: the process id lies in a page that the kernel empties for the
//! child, however it was forked, and a thread's id counts only together with the process id it was learnt under.

use std::cell::Cell;
use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};

use crate::mapping::Mapping;

/// A page that is zero in a forked child; null where the kernel has no such pages.
static PROCESS: AtomicPtr<AtomicI32> = AtomicPtr::new(ptr::null_mut());

thread_local! {
    /// Process and thread id, as they were when the thread first needed them.
    static THREAD: Cell<(i32, i32)> = const { Cell::new((0, 0)) };
}

/// Maps the page. Called once, at load.
pub(crate) fn prepare() {
    let Some(page) = Mapping::new(4096) else { return };
    let address = page.leak();
    // SAFETY: the page just mapped, which nothing else knows yet.
    if unsafe { libc::madvise(address.cast(), 4096, libc::MADV_WIPEONFORK) } == 0 {
        PROCESS.store(address.cast(), Ordering::Release);
    }
}

/// The id of this process.
pub(crate) fn process() -> i32 {
    // SAFETY: null, or a page that is never unmapped; zeroes are an AtomicI32.
    let kept = unsafe { PROCESS.load(Ordering::Acquire).as_ref() };
    match kept.map(|kept| kept.load(Ordering::Relaxed)) {
        Some(id) if id != 0 => id,
        _ => {
            // SAFETY: takes nothing and cannot fail.
            let id = unsafe { libc::getpid() };
            if let Some(kept) = kept {
                kept.store(id, Ordering::Relaxed);
            }
            id
        }
    }
}

/// The ids of this process and this thread.
pub(crate) fn ids() -> (i32, i32) {
    let process = process();
    THREAD.with(|kept| match kept.get() {
        (known, thread) if known == process => (process, thread),
        _ => {
            // SAFETY: takes nothing and cannot fail.
            let thread = unsafe { libc::syscall(libc::SYS_gettid) };
            let thread = i32::try_from(thread).unwrap_or(0);
            kept.set((process, thread));
            (process, thread)
        }
    })
}

/// The monotonic clock, in nanoseconds.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: our timespec. The clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.wrapping_mul(1_000_000_000).wrapping_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// This thread's `errno`.
pub(crate) fn errno() -> c_int {
    // SAFETY: the address is the calling thread's own and always valid.
    unsafe { *libc::__errno_location() }
}

/// Sets it, so that what the library itself calls leaves no mark.
pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_the_kernels() {
        let (process, thread) = ids();
        assert_eq!(u32::try_from(process), Ok(std::process::id()));
        assert_eq!(ids(), (process, thread));
        let other = std::thread::spawn(ids).join().expect("no panic");
        assert!(other.0 == process && other.1 != thread);
    }
}
