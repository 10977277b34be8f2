//! Shared ownership whose making can fail.
//!
//! The standard library's `Arc::new` ends the program where there is no memory. Walkers and tables are made while guests
//! run, so here that is an error.

use alloc::boxed::Box;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;
// Not the atomics that loom replaces: as with the standard `Arc`, the count is no part of any model.
use core::sync::atomic::{AtomicUsize, Ordering, fence};

use memslot::OutOfMemory;

/// A value that all its clones share; it is dropped with the last of them.
pub(crate) struct Counted<T>(NonNull<Inner<T>>, PhantomData<Inner<T>>);

struct Inner<T> {
    count: AtomicUsize,
    value: T,
}

// SAFETY: as `Arc`: every clone reaches the value from its thread, and the last one drops it in its own.
unsafe impl<T: Send + Sync> Send for Counted<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Counted<T> {}

impl<T> Counted<T> {
    pub(crate) fn new(value: T) -> Result<Self, OutOfMemory> {
        let inner = try_box(Inner { count: AtomicUsize::new(1), value })?;
        Ok(Self(NonNull::from(Box::leak(inner)), PhantomData))
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    /// The value, if nobody else shares it.
    pub(crate) fn get_mut(&mut self) -> Option<&mut T> {
        // Acquire: what those who shared it did comes before.
        if self.inner().count.load(Ordering::Acquire) != 1 {
            return None;
        }
        // SAFETY: this is the only clone, and it is borrowed mutably, so nobody makes another one meanwhile.
        Some(unsafe { &mut self.0.as_mut().value })
    }

    #[inline]
    fn inner(&self) -> &Inner<T> {
        // SAFETY: it lives as long as anything that counts.
        unsafe { self.0.as_ref() }
    }
}

impl<T> Clone for Counted<T> {
    fn clone(&self) -> Self {
        let before = self.inner().count.fetch_add(1, Ordering::Relaxed);
        // Reached only by clones that are forgotten. The count stays where it is, so that nothing is freed too early.
        assert!(before < usize::MAX / 2, "too many clones");
        Self(self.0, PhantomData)
    }
}

impl<T> Deref for Counted<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.inner().value
    }
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        if self.inner().count.fetch_sub(1, Ordering::Release) == 1 {
            // What the others did comes before the drop.
            fence(Ordering::Acquire);
            // SAFETY: made from a box, and this was the last.
            drop(unsafe { Box::from_raw(self.0.as_ptr()) });
        }
    }
}

/// `Box::new` that can fail.
pub(crate) fn try_box<T>(value: T) -> Result<Box<T>, OutOfMemory> {
    use alloc::alloc::{Layout, alloc};
    const { assert!(size_of::<T>() > 0) };
    // SAFETY: the size is not zero.
    let memory: *mut T = unsafe { alloc(Layout::new::<T>()) }.cast();
    if memory.is_null() {
        return Err(OutOfMemory);
    }
    // SAFETY: fresh memory of a box's layout, which is written before it becomes one.
    unsafe {
        memory.write(value);
        Ok(Box::from_raw(memory))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_last_clone_drops_the_value() {
        let dropped = std::sync::Arc::new(());
        let mut first = Counted::new(dropped.clone()).unwrap();
        assert!(first.get_mut().is_some());
        let second = first.clone();
        assert!(first.get_mut().is_none(), "it is shared");
        assert!(first.is_same(&second));
        let other = Counted::new(dropped.clone()).unwrap();
        assert!(!first.is_same(&other));
        drop((first, other));
        assert_eq!(std::sync::Arc::strong_count(&dropped), 2);
        std::thread::spawn(move || drop(second)).join().unwrap();
        assert_eq!(std::sync::Arc::strong_count(&dropped), 1);
    }
}
