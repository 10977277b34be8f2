//! The library that `memslot record` loads into a VMM: it writes down the ioctls that concern guest memory.
//!
//! It defines `ioctl`, so the dynamic loader gives the VMM this one instead of libc's. Each call goes on to the next
//! `ioctl` in line with the arguments it came with. Where it was one of KVM's about a VM's memory, one JSON line is
//! appended to the trace before the VMM sees the answer: so two calls of which the second depends on the first
//! stand in the trace in that order. Of calls that truly run at the same time, the order of the lines is not
//! known to be the kernel's.
//!
//! # What the VMM may rely on
//!
//! * The answer, `errno` and the memory behind the argument are what the kernel left. Nothing is printed.
//! * Inside the hook nothing is allocated from the heap and no lock is taken, so it may be called from any thread, from a
//!   signal handler and in a forked child. Bitmaps that do not fit on the stack are encoded in pages mapped for the call.
//! * No pointer is followed that the kernel has not followed in the same call; where that is in doubt (a call that
//!   failed early), the kernel is asked to copy, which answers with an error instead of a fault.
//! * The trace's descriptor has a high number. Before each line it is asked whether it still is the trace, since VMMs
//!   close descriptors that they do not know and then get the number for something else.
//! * When the disk is full, the recording ends and the VMM goes on. `memslot record` says so.
//!
//! # What it cannot see
//!
//! Calls that do not go through the `ioctl` symbol: static programs, and those that enter the kernel by themselves (Go, or
//! Rust's rustix). A descriptor that was duplicated is recognised when it is first used; one that is closed and whose number
//! becomes another VM's by `dup2` is not. After `vfork`, calls of the child bear the parent's process id.
//!
//! # How it is told what to do
//!
//! One environment variable names a small file, made by `memslot record`, that is mapped and shared by all processes:
//! see the module `control`. Without it every call is passed on and that is all.

//!
//! # Unsafe code
//!
//! It is calls of libc, and reads of memory that the kernel has just read or written: nothing that Miri or loom could run. What
//! can be done without it (the lines, the runs of a bitmap) is done in modules without it.

#![cfg(target_os = "linux")]

mod arguments;
mod bitmap;
mod calls;
mod control;
mod line;
mod mapping;
mod output;
mod threads;
mod vms;

use std::ffi::{c_int, c_ulong, c_void};
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use calls::Request;

/// The next `ioctl` in line, most often libc's: null until it is first needed.
static NEXT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// libc's `ioctl`, in its place.
///
/// The C function is variadic. On every architecture that has both KVM and this library a third argument is passed
/// to it like to any other function; without one, what is passed on is what the register happened to hold, and the
/// kernel does not look at it, as it would not have without us.
///
/// # Safety
///
/// As that of the ioctl that is called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // KVM's requests have 32 bits; a VMM that keeps them in an `int` passes them sign-extended.
    let request_bits = u32::try_from(request & 0xffff_ffff).unwrap_or(0);
    // SAFETY: the caller's own call, unchanged.
    let forward = || unsafe { pass_on(fd, request, argument) };
    match (Request::of(request_bits), control::shared()) {
        (Some(request), Some(control)) => calls::record(control, fd, request, argument, forward),
        _ => forward(),
    }
}

/// The next `ioctl` in line.
///
/// # Safety
///
/// As that of the ioctl that is called.
unsafe fn pass_on(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    type Ioctl = unsafe extern "C" fn(c_int, c_ulong, ...) -> c_int;
    let mut next = NEXT.load(Ordering::Relaxed);
    if next.is_null() {
        // SAFETY: a NUL-terminated name; RTLD_NEXT is allowed in a shared object.
        next = unsafe { libc::dlsym(libc::RTLD_NEXT, c"ioctl".as_ptr()) };
        NEXT.store(next, Ordering::Relaxed);
    }
    if next.is_null() {
        // SAFETY: the caller's own call, unchanged. The result of an ioctl is an int.
        let answer = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
        return c_int::try_from(answer).unwrap_or(-1);
    }
    // SAFETY: it is the address of a function named ioctl, and libc's has this signature.
    let ioctl = unsafe { mem::transmute::<*mut c_void, Ioctl>(next) };
    // SAFETY: the caller's own call, unchanged.
    unsafe { ioctl(fd, request, argument) }
}

/// `KVM_CHECK_EXTENSION` of a VM, past ourselves: not recorded.
fn check_extension(vm: c_int, capability: c_int) -> c_int {
    const KVM_CHECK_EXTENSION: c_ulong = 0xae03;
    let capability = ptr::without_provenance_mut(usize::try_from(capability).unwrap_or(0));
    // SAFETY: the call takes a number and changes nothing.
    unsafe { pass_on(vm, KVM_CHECK_EXTENSION, capability) }
}

/// Run by the dynamic loader before the program's own code, while there is one thread.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = {
    extern "C" fn at_load() {
        let errno = threads::errno();
        threads::prepare();
        if let Some(control) = control::attach() {
            output::open(control);
        }
        threads::set_errno(errno);
    }
    at_load
};
