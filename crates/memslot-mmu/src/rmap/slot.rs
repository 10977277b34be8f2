//! The lists of a slot, by gfn and level, and those of shadow pages' parents.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr;

use memslot::{Gfn, GfnRange, OutOfMemory};

use super::RmapError;
use super::heads::{CHUNK, CHUNK_BITS, Chunk, ChunkRef, List};
use super::shared::Shared;
use crate::counted::{Counted, try_box};
use crate::level::Level;
use crate::sync::{AtomicPtr, AtomicUsize, Ordering};

/// log2 of the chunks that a directory leads to.
const DIRECTORY_BITS: u32 = if cfg!(loom) { 1 } else { 9 };
const DIRECTORY: usize = 1 << DIRECTORY_BITS;
/// Pages of so many sizes can be mapped: 4 KiB, 2 MiB, 1 GiB.
const LEVELS: usize = 3;

/// The lists of one slot: for each level and gfn, the entries that map it.
///
/// A new one costs 8 bytes for each GiB of the slot. The heads come in chunks of 512 (2 MiB of guest memory, at the
/// lowest level), allocated when the first of them is [reserved](Self::reserve).
///
/// All methods take `&self` and may be used by any number of threads. Share it (in an `Arc`, say) with those who walk;
/// when the last one drops it, the [`Writer`](super::Writer) frees its memory with its next [`reclaim`](super::Writer::reclaim).
/// Entries that are still filed then are forgotten, and their records lead nowhere.
pub struct SlotRmap<E> {
    shared: Counted<Shared>,
    gfns: GfnRange,
    levels: [Heads; LEVELS],
    entries: PhantomData<fn(E) -> E>,
}

/// The heads of one level.
struct Heads {
    level: Level,
    /// Which entry of the level, counted from gfn 0, the first list is for: of the first page that the slot has as a whole. A
    /// large page may begin before the slot, or end behind it; such a one has no list.
    first: u64,
    len: u64,
    directories: Box<[AtomicPtr<Directory>]>,
}

struct Directory {
    chunks: [AtomicPtr<Chunk>; DIRECTORY],
}

impl<E> SlotRmap<E> {
    pub(super) fn new(shared: Counted<Shared>, gfns: GfnRange, largest: Level) -> Result<Self, RmapError> {
        let number_of_levels = usize::from(largest.get());
        if number_of_levels > LEVELS {
            return Err(RmapError::Level { level: largest });
        }
        let mut levels = [Heads::none(Level::K4), Heads::none(Level::M2), Heads::none(Level::G1)];
        for heads in levels.iter_mut().take(number_of_levels) {
            *heads = Heads::new(gfns, heads.level)?;
        }
        Ok(Self { shared, gfns, levels, entries: PhantomData })
    }

    /// The slot's frames.
    #[must_use]
    pub const fn gfns(&self) -> GfnRange {
        self.gfns
    }

    /// The list for the entry of `level` that maps `gfn`, with room for it made if it is the first in its chunk.
    ///
    /// Called before a lock is taken: this is where memory may run out. Any frame of a large page leads to the same list.
    ///
    /// # Errors
    /// * [`Outside`](RmapError::Outside): the slot does not have the whole page, or was made for smaller pages only.
    /// * [`Level`](RmapError::Level): there is no page of this level.
    /// * [`OutOfMemory`](RmapError::OutOfMemory): nothing has changed.
    pub fn reserve(&self, level: Level, gfn: Gfn) -> Result<List<'_, E>, RmapError> {
        let heads = self.heads(level).ok_or(RmapError::Level { level })?;
        let index = heads.index(gfn).ok_or(RmapError::Outside { gfn, level, slot: self.gfns })?;
        if let Some(list) = self.list_at(heads, index) {
            return Ok(list);
        }
        heads.make_room(&self.shared, index)?;
        self.list_at(heads, index).ok_or(RmapError::OutOfMemory)
    }

    /// The list for the entry of `level` that maps `gfn`; `None` if no list near it was ever reserved, and where
    /// [`reserve`](Self::reserve) is an error.
    #[inline]
    #[must_use]
    pub fn list(&self, level: Level, gfn: Gfn) -> Option<List<'_, E>> {
        let heads = self.heads(level)?;
        // The level as the caller says it, which is often a constant.
        self.list_at(heads, heads.index_at(level, gfn)?)
    }

    /// The lists of this level that are not empty, of the pages that have a frame in `gfns`, in order; each with the first
    /// frame of its page.
    ///
    /// Steps over what was never reserved: 1 GiB at a time at the lowest level.
    pub fn lists(&self, level: Level, gfns: GfnRange) -> impl Iterator<Item = (Gfn, List<'_, E>)> {
        let heads = self.heads(level);
        let wanted = heads.map_or(0..0, |heads| heads.range(gfns));
        Lists { slot: self, heads, wanted }
    }

    #[inline]
    fn heads(&self, level: Level) -> Option<&Heads> {
        self.levels.get(usize::from(level.get()) - 1)
    }

    #[inline]
    fn list_at(&self, heads: &Heads, index: u64) -> Option<List<'_, E>> {
        let chunk = heads.chunk(index)?;
        #[expect(clippy::cast_possible_truncation, reason = "below CHUNK")]
        let place = (index % CHUNK as u64) as usize;
        // SAFETY: chunks are freed after the slot's lists were dropped, and the result borrows from these. A chunk has a head for
        // each index below the level's length, as this one is.
        Some(unsafe { List::new(chunk, place) })
    }
}

impl<E> Drop for SlotRmap<E> {
    fn drop(&mut self) {
        let mut central = self.shared.central.lock();
        for place in self.levels.iter().flat_map(|heads| &heads.directories) {
            let directory = place.load(Ordering::Relaxed);
            if directory.is_null() {
                continue;
            }
            // SAFETY: made from a box, and found here only.
            let directory = unsafe { Box::from_raw(directory) };
            for chunk in &directory.chunks {
                // SAFETY: null or made from a chunk, which is not freed before it was pushed.
                if let Some(chunk) = unsafe { ChunkRef::from_ptr(chunk.load(Ordering::Relaxed)) } {
                    // SAFETY: nobody else finds it by gfn any more.
                    unsafe { central.dropped.push(chunk) };
                }
            }
            self.shared.bytes.fetch_sub(size_of::<Directory>(), Ordering::Relaxed);
        }
    }
}

impl Heads {
    /// No lists, for a level that was not asked for.
    fn none(level: Level) -> Self {
        Self { level, first: 0, len: 0, directories: Box::default() }
    }

    fn new(gfns: GfnRange, level: Level) -> Result<Self, OutOfMemory> {
        let shift = level.pages().trailing_zeros();
        let first = gfns.start().get().div_ceil(level.pages());
        let len = (gfns.end().get() >> shift).saturating_sub(first);
        let count = usize::try_from(len.div_ceil((CHUNK * DIRECTORY) as u64)).map_err(|_| OutOfMemory)?;
        let mut directories = Vec::new();
        directories.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
        directories.resize_with(count, || AtomicPtr::new(ptr::null_mut()));
        Ok(Self { level, first, len, directories: directories.into_boxed_slice() })
    }

    /// The place of the list.
    #[inline]
    fn index(&self, gfn: Gfn) -> Option<u64> {
        self.index_at(self.level, gfn)
    }

    /// The same for who knows the level.
    #[inline(always)]
    fn index_at(&self, level: Level, gfn: Gfn) -> Option<u64> {
        let index = (gfn.get() >> level.pages().trailing_zeros()).wrapping_sub(self.first);
        if index < self.len { Some(index) } else { None }
    }

    #[inline]
    const fn shift(&self) -> u32 {
        self.level.pages().trailing_zeros()
    }

    /// The places of the lists of pages with a frame in `gfns`.
    fn range(&self, gfns: GfnRange) -> core::ops::Range<u64> {
        let place = |page: u64| page.saturating_sub(self.first).min(self.len);
        place(gfns.start().get() >> self.shift())..place(gfns.end().get().div_ceil(self.level.pages()))
    }

    #[inline]
    fn directory(&self, index: u64) -> Option<&Directory> {
        let place = self.directories.get(usize::try_from(index >> (CHUNK_BITS + DIRECTORY_BITS)).ok()?)?;
        // SAFETY: null or made from a box, which is freed when these heads are dropped.
        unsafe { place.load(Ordering::Acquire).as_ref() }
    }

    #[inline]
    fn chunk(&self, index: u64) -> Option<ChunkRef> {
        let chunk =
            self.directory(index)?.chunks[(index >> CHUNK_BITS) as usize % DIRECTORY].load(Ordering::Acquire);
        // SAFETY: null or made from a chunk, which is freed after these heads were dropped.
        unsafe { ChunkRef::from_ptr(chunk) }
    }

    #[cold]
    fn make_room(&self, shared: &Shared, index: u64) -> Result<(), OutOfMemory> {
        if self.directory(index).is_none() {
            self.add_directory(&shared.bytes, index)?;
        }
        let directory = self.directory(index).ok_or(OutOfMemory)?;
        // The last chunk is as short as the slot.
        let first = index & !(CHUNK as u64 - 1);
        #[expect(clippy::cast_possible_truncation, reason = "no more than CHUNK")]
        let len = (self.len - first).min(CHUNK as u64) as usize;
        let base = Gfn::new((self.first + first) << self.shift());
        let chunk = shared.add_chunk(len, base, Some(self.level))?;
        let place = &directory.chunks[(index >> CHUNK_BITS) as usize % DIRECTORY];
        if place
            .compare_exchange(ptr::null_mut(), chunk.as_ptr(), Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            // Another thread was first.
            // SAFETY: nobody has seen this one.
            unsafe { shared.central.lock().dropped.push(chunk) };
        }
        Ok(())
    }

    fn add_directory(&self, bytes: &AtomicUsize, index: u64) -> Result<(), OutOfMemory> {
        let chunks = core::array::from_fn(|_| AtomicPtr::new(ptr::null_mut()));
        let directory = Box::into_raw(try_box(Directory { chunks })?);
        let place = &self.directories[(index >> (CHUNK_BITS + DIRECTORY_BITS)) as usize];
        if place.compare_exchange(ptr::null_mut(), directory, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            bytes.fetch_add(size_of::<Directory>(), Ordering::Relaxed);
        } else {
            // SAFETY: made from a box, and nobody has seen it.
            drop(unsafe { Box::from_raw(directory) });
        }
        Ok(())
    }
}

/// See [`SlotRmap::lists`].
struct Lists<'a, E> {
    slot: &'a SlotRmap<E>,
    heads: Option<&'a Heads>,
    wanted: core::ops::Range<u64>,
}

impl<'a, E> Iterator for Lists<'a, E> {
    type Item = (Gfn, List<'a, E>);

    fn next(&mut self) -> Option<Self::Item> {
        let heads = self.heads?;
        while !self.wanted.is_empty() {
            let index = self.wanted.start;
            let step = if heads.directory(index).is_none() {
                CHUNK_BITS + DIRECTORY_BITS
            } else if heads.chunk(index).is_none() {
                CHUNK_BITS
            } else {
                0
            };
            self.wanted.start = ((index >> step) + 1) << step;
            if step == 0 {
                let list = self.slot.list_at(heads, index)?;
                if !list.is_empty() {
                    return Some((Gfn::new((heads.first + index) << heads.shift()), list));
                }
            }
        }
        None
    }
}

/// The entries that lead to one shadow page.
///
/// Part of the shadow page: dropped with it, after the last entry was removed. Its memory is freed as that of a
/// [`SlotRmap`] is.
pub struct Parents<E> {
    shared: Counted<Shared>,
    chunk: ChunkRef,
    entries: PhantomData<fn(E) -> E>,
}

// SAFETY: the chunk has atomics and plain values that do not change, and is kept until this is dropped.
unsafe impl<E> Send for Parents<E> {}
// SAFETY: as above.
unsafe impl<E> Sync for Parents<E> {}

impl<E> Parents<E> {
    pub(super) fn new(shared: Counted<Shared>) -> Result<Self, OutOfMemory> {
        let chunk = shared.add_chunk(1, Gfn::new(0), None)?;
        Ok(Self { shared, chunk, entries: PhantomData })
    }

    /// The list.
    #[inline]
    #[must_use]
    pub fn list(&self) -> List<'_, E> {
        // SAFETY: the chunk, which has one head, is freed after this was dropped, and the result borrows from this.
        unsafe { List::new(self.chunk, 0) }
    }
}

impl<E> Drop for Parents<E> {
    fn drop(&mut self) {
        // SAFETY: only this has it.
        unsafe { self.shared.central.lock().dropped.push(self.chunk) };
    }
}
