//! Memory that keeps its place: objects found by number, in segments that double in size.
//!
//! A segment is never moved and never given back before the whole arena is, so a number once handed out leads
//! to valid memory for ever, also one that is out of date. What a stale number leads to has to be checked by whoever
//! follows it; it cannot do worse than not match.

use alloc::alloc::{Layout, dealloc};
use core::ptr;

use memslot::OutOfMemory;

#[cfg(not(loom))]
pub(super) use core::sync::atomic::AtomicU32;
#[cfg(loom)]
pub(super) use loom::sync::atomic::AtomicU32;

use crate::sync::{AtomicPtr, Ordering};

/// log2 of the length of the first segment. Models run by loom have small ones.
const FIRST_BITS: u32 = if cfg!(loom) { 2 } else { 6 };
/// Numbers have so many bits: the rest of their words is used for other things, and what so many descriptors hold is counted in 31.
pub(super) const INDEX_BITS: u32 = 27;
const SEGMENTS: usize = (INDEX_BITS - FIRST_BITS) as usize;

/// What an arena is made of.
///
/// # Safety
/// Memory that is all zero is such an object, the same as `fresh` makes (loom's atomics are not: there, `fresh` is used).
pub(super) unsafe trait Object {
    #[cfg(loom)]
    fn fresh() -> Self;
}

/// Objects with numbers from 0 upwards, as far as [`grow`](Self::grow) has made room.
pub(super) struct Arena<T: Object> {
    segments: [AtomicPtr<T>; SEGMENTS],
}

/// Segment and place in it.
#[inline(always)]
const fn place_of(index: u32) -> (usize, usize) {
    let shifted = index as usize + (1 << FIRST_BITS);
    let top = usize::BITS - 1 - shifted.leading_zeros();
    ((top - FIRST_BITS) as usize, shifted - (1 << top))
}

impl<T: Object> Arena<T> {
    pub(super) fn new() -> Self {
        Self { segments: core::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())) }
    }

    /// The object with this number; `None` if there is no room for it yet.
    #[inline(always)]
    pub(super) fn get(&self, index: u32) -> Option<&T> {
        let (segment, offset) = place_of(index);
        let start = self.segments.get(segment)?.load(Ordering::Acquire);
        if start.is_null() {
            return None;
        }
        // SAFETY: the segment is as long as its place says, all of it was written before it was published, and it is
        // freed with the arena.
        Some(unsafe { &*start.add(offset) })
    }

    /// Makes room for this number and all in the same segment. Whether that took memory: its size in bytes, else 0.
    pub(super) fn grow(&self, index: u32) -> Result<usize, OutOfMemory> {
        let (segment, _) = place_of(index);
        let place = self.segments.get(segment).ok_or(OutOfMemory)?;
        if !place.load(Ordering::Acquire).is_null() {
            return Ok(0);
        }
        let layout = Self::layout(segment)?;
        let start = Self::allocate(layout, segment)?;
        if place.compare_exchange(ptr::null_mut(), start, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            return Ok(layout.size());
        }
        // SAFETY: just allocated, and nobody else has seen it.
        unsafe { Self::free(start, segment) };
        Ok(0)
    }

    fn layout(segment: usize) -> Result<Layout, OutOfMemory> {
        const { assert!(size_of::<T>() > 0) };
        Layout::array::<T>(1 << (segment + FIRST_BITS as usize)).map_err(|_| OutOfMemory)
    }

    #[cfg(not(loom))]
    fn allocate(layout: Layout, _: usize) -> Result<*mut T, OutOfMemory> {
        // Zeroed by whoever has zeroes at hand: a large segment costs only what is used of it.
        // SAFETY: the size is not zero.
        let start: *mut T = unsafe { alloc::alloc::alloc_zeroed(layout) }.cast();
        if start.is_null() { Err(OutOfMemory) } else { Ok(start) }
    }

    #[cfg(loom)]
    fn allocate(layout: Layout, segment: usize) -> Result<*mut T, OutOfMemory> {
        // SAFETY: the size is not zero.
        let start: *mut T = unsafe { alloc::alloc::alloc(layout) }.cast();
        if start.is_null() {
            return Err(OutOfMemory);
        }
        for offset in 0..1 << (segment + FIRST_BITS as usize) {
            // SAFETY: within what was allocated.
            unsafe { start.add(offset).write(T::fresh()) };
        }
        Ok(start)
    }

    /// # Safety
    /// From [`allocate`](Self::allocate) with the same segment, and nobody uses it any more.
    unsafe fn free(start: *mut T, segment: usize) {
        let Ok(layout) = Self::layout(segment) else { return };
        if core::mem::needs_drop::<T>() {
            for offset in 0..1 << (segment + FIRST_BITS as usize) {
                // SAFETY: written when it was allocated, dropped once.
                unsafe { start.add(offset).drop_in_place() };
            }
        }
        // SAFETY: allocated with this layout.
        unsafe { dealloc(start.cast(), layout) };
    }
}

impl<T: Object> Drop for Arena<T> {
    fn drop(&mut self) {
        for (segment, place) in self.segments.iter().enumerate() {
            let start = place.load(Ordering::Relaxed);
            if !start.is_null() {
                // SAFETY: `self` is nobody else's.
                unsafe { Self::free(start, segment) };
            }
        }
    }
}
