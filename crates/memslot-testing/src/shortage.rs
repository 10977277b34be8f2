//! An allocator that fails when it is told to.
//!
//! A test program that makes [`Failing`] its global allocator can let the n-th allocation of a thread fail, and knows how
//! many bytes a thread has. All of it is by thread, so that tests beside each other do not meet.
//!
//! ```
//! use memslot_testing::{Failing, bytes, failing};
//!
//! #[global_allocator]
//! static ALLOCATOR: Failing = Failing;
//!
//! let before = bytes();
//! let mut list = Vec::<u8>::new();
//! assert!(failing(0, || list.try_reserve(10)).is_err());
//! assert!(failing(1, || list.try_reserve(10)).is_ok());
//! drop(list);
//! assert_eq!(bytes(), before);
//! ```
#![expect(unsafe_code, reason = "a global allocator is unsafe to write")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// How many allocations of this thread succeed before one fails; negative: none fails.
    pub static ALLOWED: Cell<i64> = const { Cell::new(-1) };
    /// Whether those behind it fail, too.
    static FOR_GOOD: Cell<bool> = const { Cell::new(true) };
    static FAILED: Cell<bool> = const { Cell::new(false) };
    static BYTES: Cell<i64> = const { Cell::new(0) };
}

/// The system's allocator, as far as it is allowed to succeed.
#[derive(Debug)]
pub struct Failing;

/// Whether this allocation fails.
fn fails() -> bool {
    let left = ALLOWED.get();
    if left > 0 || (left == 0 && !FOR_GOOD.get()) {
        ALLOWED.set(left - 1);
    }
    if left == 0 {
        FAILED.set(true);
    }
    left == 0
}

fn count(bytes: usize, sign: i64) {
    BYTES.set(BYTES.get() + sign * i64::try_from(bytes).unwrap_or(0));
}

// SAFETY: everything is passed on to the system's allocator, or null is returned, which is allowed.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if fails() {
            return std::ptr::null_mut();
        }
        count(layout.size(), 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(memory, layout) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if fails() {
            return std::ptr::null_mut();
        }
        count(layout.size(), -1);
        count(size, 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// Which allocations fail.
#[derive(Clone, Copy, Debug)]
pub struct Shortage {
    /// So many succeed before.
    pub allowed: i64,
    /// Whether all behind the first that fails do, too.
    pub for_good: bool,
}

/// Runs `work` short of memory. The result, and whether an allocation failed.
pub fn short<T>(shortage: Shortage, work: impl FnOnce() -> T) -> (T, bool) {
    FOR_GOOD.set(shortage.for_good);
    FAILED.set(false);
    ALLOWED.set(shortage.allowed);
    let result = work();
    ALLOWED.set(-1);
    FOR_GOOD.set(true);
    (result, FAILED.get())
}

/// Runs `work` with the allocation after `allowed` ones failing, and all after that.
pub fn failing<T>(allowed: i64, work: impl FnOnce() -> T) -> T {
    short(Shortage { allowed, for_good: true }, work).0
}

/// How many bytes this thread has.
#[must_use]
pub fn bytes() -> i64 {
    BYTES.get()
}
