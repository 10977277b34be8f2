//! The atomics, which loom replaces when the crate is built with `--cfg loom`, and the one kind of lock.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

/// A full fence. Where single accesses are sequentially consistent it is for loom alone, which knows sequential
/// consistency of fences only.
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

/// What is protected, as long as the lock is held.
#[cfg(loom)]
pub(crate) type Guard<'a, T> = loom::sync::MutexGuard<'a, T>;
/// What is protected, as long as the lock is held.
#[cfg(all(feature = "std", not(loom)))]
pub(crate) type Guard<'a, T> = std::sync::MutexGuard<'a, T>;
/// What is protected, as long as the lock is held.
#[cfg(all(not(feature = "std"), not(loom)))]
pub(crate) type Guard<'a, T> = spin::MutexGuard<'a, T>;

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Inner::new(value))
    }

    #[cfg(any(feature = "std", loom))]
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[cfg(all(not(feature = "std"), not(loom)))]
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        self.0.lock()
    }

    /// The same where nobody else has it.
    #[cfg(any(feature = "std", loom))]
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    /// The same where nobody else has it.
    #[cfg(all(not(feature = "std"), not(loom)))]
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        self.0.try_lock()
    }
}

/// Lets others run who are waited for.
pub(crate) fn relax() {
    #[cfg(all(feature = "std", not(loom)))]
    std::thread::yield_now();
    #[cfg(all(not(feature = "std"), not(loom)))]
    core::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
}
