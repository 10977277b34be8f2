//! Heads: the one word of each list, in chunks that are found by number.
//!
//! A chunk has the heads of neighbouring gfns of one level of a slot, or the one of a shadow page's parents. It belongs
//! to its [`SlotRmap`](super::SlotRmap) or [`Parents`](super::Parents), and is freed by the writer after these were dropped:
//! so the writer may follow any record at any time, also one that is out of date, and finds a chunk or none.

use alloc::alloc::{Layout, alloc, dealloc};
use core::marker::PhantomData;
use core::ptr::{self, NonNull};

use memslot::{Gfn, OutOfMemory};

use super::arena::{AtomicU32, Object};
use super::descriptor::{Head, LISTS};
use super::filed::Under;
use crate::level::Level;
use crate::sync::{AtomicPtr, AtomicU64, Ordering};

/// log2 of the most heads a chunk has. Models run by loom have small ones.
pub(super) const CHUNK_BITS: u32 = if cfg!(loom) { 1 } else { 9 };
pub(super) const CHUNK: usize = 1 << CHUNK_BITS;
/// How many chunks can be numbered: the number of a list has 31 bits. The last is left out, so that a number and 1 is one, too.
pub(super) const CHUNKS: u32 = (LISTS >> CHUNK_BITS) - 1;

/// A chunk's header; its heads stand behind it.
#[repr(C)]
pub(super) struct Chunk {
    /// The reverse map that it is part of.
    home: usize,
    number: u32,
    len: u32,
    /// The first frame of the first head's entries.
    base: Gfn,
    /// Which entries the lists are for; `None` for a shadow page's parents.
    level: Option<Level>,
    /// The next chunk that was dropped.
    pub(super) next_dropped: AtomicPtr<Chunk>,
}

const HEADS_OFFSET: usize = size_of::<Chunk>();
const _: () =
    assert!(align_of::<Chunk>() >= align_of::<AtomicU64>() && HEADS_OFFSET % align_of::<AtomicU64>() == 0);

/// A chunk that was allocated and not freed yet.
#[derive(Clone, Copy)]
pub(super) struct ChunkRef(NonNull<Chunk>);

impl ChunkRef {
    /// A chunk with so many empty lists.
    pub(super) fn allocate(
        home: usize,
        number: u32,
        len: usize,
        base: Gfn,
        level: Option<Level>,
    ) -> Result<Self, OutOfMemory> {
        let layout = Self::layout(len).ok_or(OutOfMemory)?;
        // SAFETY: the size is not zero: there is the header.
        let chunk = NonNull::new(unsafe { alloc(layout) }.cast::<Chunk>()).ok_or(OutOfMemory)?;
        let len = u32::try_from(len).map_err(|_| OutOfMemory)?;
        // SAFETY: fresh memory, large and aligned enough for the header and for so many heads behind it.
        unsafe {
            chunk.write(Chunk {
                home,
                number,
                len,
                base,
                level,
                next_dropped: AtomicPtr::new(ptr::null_mut()),
            });
            let heads = chunk.cast::<u8>().add(HEADS_OFFSET).cast::<AtomicU64>();
            for place in 0..len as usize {
                heads.add(place).write(AtomicU64::new(0));
            }
        }
        Ok(Self(chunk))
    }

    fn layout(len: usize) -> Option<Layout> {
        let heads = Layout::array::<AtomicU64>(len).ok()?;
        Some(Layout::new::<Chunk>().extend(heads).ok()?.0)
    }

    /// # Safety
    /// Made by [`as_ptr`](Self::as_ptr), and not freed.
    pub(super) const unsafe fn from_ptr(chunk: *mut Chunk) -> Option<Self> {
        match NonNull::new(chunk) {
            Some(chunk) => Some(Self(chunk)),
            None => None,
        }
    }

    pub(super) const fn as_ptr(self) -> *mut Chunk {
        self.0.as_ptr()
    }

    /// # Safety
    /// Not freed while the reference is used.
    pub(super) unsafe fn header<'a>(self) -> &'a Chunk {
        // SAFETY: passed on.
        unsafe { self.0.as_ref() }
    }

    /// The head at this place.
    ///
    /// # Safety
    /// Not freed while the reference is used.
    #[inline(always)]
    pub(super) unsafe fn head<'a>(self, place: usize) -> Option<&'a AtomicU64> {
        // SAFETY: the chunk is there; its length is never changed.
        unsafe {
            let len = (*self.0.as_ptr()).len;
            if place >= len as usize {
                return None;
            }
            Some(self.head_unchecked(place))
        }
    }

    /// The head at this place.
    ///
    /// # Safety
    /// Not freed while the reference is used, and at least so long.
    #[inline(always)]
    unsafe fn head_unchecked<'a>(self, place: usize) -> &'a AtomicU64 {
        // SAFETY: the chunk is there and has so many heads behind its header. The pointer was made by the allocator, so it may
        // be used for all of the chunk.
        unsafe { self.0.cast::<u8>().add(HEADS_OFFSET).cast::<AtomicU64>().add(place).as_ref() }
    }

    /// # Safety
    /// Nobody uses the chunk any more.
    pub(super) unsafe fn free(self) {
        // SAFETY: the caller's word.
        let len = unsafe { self.header() }.len as usize;
        let Some(layout) = Self::layout(len) else { return };
        // SAFETY: written when it was allocated. (loom's atomics have something to drop.)
        unsafe { self.0.drop_in_place() };
        for place in 0..len {
            // SAFETY: written when it was allocated. (loom's atomics have something to drop.)
            unsafe { self.0.cast::<u8>().add(HEADS_OFFSET).cast::<AtomicU64>().add(place).drop_in_place() };
        }
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.0.as_ptr().cast(), layout) };
    }
}

impl Chunk {
    pub(super) const fn number(&self) -> u32 {
        self.number
    }

    pub(super) const fn len(&self) -> usize {
        self.len as usize
    }

    pub(super) const fn bytes(&self) -> usize {
        HEADS_OFFSET + self.len as usize * size_of::<AtomicU64>()
    }

    /// The number of the list at this place.
    pub(super) const fn list(&self, place: usize) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "places are below CHUNK")]
        let place = place as u32;
        self.number << CHUNK_BITS | place
    }

    /// What the list at this place is for.
    pub(super) fn under(&self, place: usize) -> Under {
        match self.level {
            Some(level) => {
                Under::Gfn { gfn: Gfn::new(self.base.get() + place as u64 * level.pages()), level }
            }
            None => Under::Parents,
        }
    }
}

/// Where a chunk is found by its number.
pub(super) struct Entry {
    pub(super) chunk: AtomicPtr<Chunk>,
    /// Without a chunk: 1 + the next number that is free.
    pub(super) next_free: AtomicU32,
}

// SAFETY: atomics only, null and 0.
unsafe impl Object for Entry {
    #[cfg(loom)]
    fn fresh() -> Self {
        Self { chunk: AtomicPtr::new(ptr::null_mut()), next_free: AtomicU32::new(0) }
    }
}

/// One list of entries: its head, and the chunk that this is in.
///
/// Borrowed from the [`SlotRmap`](super::SlotRmap) or the [`Parents`](super::Parents) that it is a part of.
pub struct List<'a, E> {
    pub(super) head: &'a AtomicU64,
    chunk: ChunkRef,
    entries: PhantomData<fn(E) -> E>,
}

impl<E> Clone for List<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for List<'_, E> {}

// SAFETY: atomics, and a chunk of atomics and of plain values that do not change.
unsafe impl<E> Send for List<'_, E> {}
// SAFETY: as above.
unsafe impl<E> Sync for List<'_, E> {}

impl<'a, E> List<'a, E> {
    /// The list at this place of a chunk.
    ///
    /// # Safety
    /// The chunk and its reverse map are there for `'a`, and the chunk is at least so long.
    #[inline(always)]
    pub(super) unsafe fn new(chunk: ChunkRef, place: usize) -> Self {
        // SAFETY: the caller's word.
        Self { head: unsafe { chunk.head_unchecked(place) }, chunk, entries: PhantomData }
    }

    /// The list's number, and the identity of its reverse map.
    #[inline(always)]
    pub(super) fn number_and_home(self) -> (u32, usize) {
        // SAFETY: the chunk is there for 'a.
        let chunk = unsafe { self.chunk.header() };
        let offset = ptr::from_ref(self.head).addr() - self.chunk.as_ptr().addr() - HEADS_OFFSET;
        (chunk.list(offset / size_of::<AtomicU64>()), chunk.home)
    }

    /// How many entries there are, as the head was at this moment.
    ///
    /// # Safety
    /// The descriptor that the head leads to is not used for another list meanwhile: the caller is inside.
    #[inline(always)]
    pub(super) unsafe fn count(self) -> usize {
        loop {
            // SAFETY: the list's own head; the reverse map is there for 'a.
            match unsafe { Head::new(self.head.load(Ordering::SeqCst)) } {
                Head::Empty => return 0,
                Head::One(_) => return 1,
                Head::Many(first) => {
                    if let Some(count) = first.count() {
                        return count;
                    }
                }
            }
        }
    }

    /// Whether there are no entries: one load, by anybody, at any time.
    #[inline]
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.head.load(Ordering::Acquire) == 0
    }
}

impl<E> core::fmt::Debug for List<'_, E> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "List({})", self.number_and_home().0)
    }
}
