//! The atomics, which loom replaces when the crate is built with `--cfg loom`, and the one lock.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

/// Sequentially consistent accesses are enough; loom knows sequential consistency of fences only.
#[inline(always)]
pub(crate) fn fence_for_loom() {
    #[cfg(loom)]
    fence(Ordering::SeqCst);
}

/// A lock for what is rare and short: the system's where there is one, else one that spins.
///
/// Poison means nothing here: whoever holds the lock leaves the data whole at every step that can panic.
pub(crate) struct Mutex<T>(Inner<T>);

#[cfg(loom)]
type Inner<T> = loom::sync::Mutex<T>;
#[cfg(all(feature = "std", not(loom)))]
type Inner<T> = std::sync::Mutex<T>;
#[cfg(all(not(feature = "std"), not(loom)))]
type Inner<T> = spin::Mutex<T>;

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Inner::new(value))
    }

    #[cfg(any(feature = "std", loom))]
    pub(crate) fn lock(&self) -> impl core::ops::DerefMut<Target = T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[cfg(all(not(feature = "std"), not(loom)))]
    pub(crate) fn lock(&self) -> impl core::ops::DerefMut<Target = T> {
        self.0.lock()
    }
}
