//! What all who use a reverse map have in common: descriptors, chunks by number, and who is inside.

use alloc::vec::Vec;
use core::ptr;

use memslot::{Gfn, OutOfMemory};

use super::arena::Arena;
use super::descriptor::{Chain, Descriptors};
use super::heads::{CHUNK_BITS, CHUNKS, Chunk, ChunkRef, Entry};
use crate::counted::Counted;
use crate::level::Level;
use crate::nested::epoch::{Cells, Epoch};
use crate::sync::{AtomicUsize, Mutex, Ordering};

pub(super) struct Shared {
    pub(super) descriptors: Descriptors,
    chunks: Arena<Entry>,
    pub(super) epoch: Epoch,
    /// Bytes allocated for descriptors, chunks and what leads to them.
    pub(super) bytes: AtomicUsize,
    pub(super) central: Mutex<Central>,
}

/// What is rarely needed. Nobody allocates while holding its lock, apart from a walker that comes.
pub(super) struct Central {
    pub(super) cells: Cells,
    /// Descriptors that nobody has in a cache.
    pub(super) free: Free,
    /// The first descriptor that was never used. Number 0 stands for none.
    unused: u32,
    /// 1 + the first free number of a chunk, and the first that was never used.
    free_chunk: u32,
    unused_chunk: u32,
    /// Chunks whose owner is gone, for the writer to free.
    pub(super) dropped: Dropped,
}

/// Descriptors that are free: side by side as far as there is room, which spares taking one after the other from memory, else
/// linked.
#[derive(Default)]
pub(super) struct Free {
    numbers: Vec<u32>,
    more: Chain,
}

impl Free {
    #[inline]
    pub(super) fn push(&mut self, descriptors: &Descriptors, number: u32) {
        if self.numbers.len() < self.numbers.capacity() {
            self.numbers.push(number);
        } else {
            self.more.push(descriptors, number);
        }
    }

    /// Takes over all of `chain`.
    pub(super) fn append(&mut self, descriptors: &Descriptors, chain: &mut Chain) {
        self.more.append(descriptors, chain);
    }

    #[inline]
    fn pop(&mut self, descriptors: &Descriptors) -> Option<u32> {
        self.numbers.pop().or_else(|| self.more.pop(descriptors))
    }
}

/// Chunks linked through [`Chunk::next_dropped`], which are the list's alone.
pub(super) struct Dropped(*mut Chunk);

// SAFETY: the chunks belong to the list, and have nothing that is bound to a thread.
unsafe impl Send for Dropped {}

impl Dropped {
    /// # Safety
    /// The chunk's owner gives it up: nobody but the writer finds it any more, through its number.
    pub(super) unsafe fn push(&mut self, chunk: ChunkRef) {
        // SAFETY: nobody frees it before it is popped.
        unsafe { chunk.header() }.next_dropped.store(self.0, Ordering::Relaxed);
        self.0 = chunk.as_ptr();
    }

    pub(super) fn pop(&mut self) -> Option<ChunkRef> {
        // SAFETY: only chunks are linked, and whoever frees them has popped them.
        let chunk = unsafe { ChunkRef::from_ptr(self.0) }?;
        // SAFETY: as above.
        self.0 = unsafe { chunk.header() }.next_dropped.load(Ordering::Relaxed);
        Some(chunk)
    }

    pub(super) const fn take(&mut self) -> Self {
        core::mem::replace(self, Self(ptr::null_mut()))
    }
}

impl Shared {
    pub(super) fn starting_at(epoch: u64) -> Self {
        Self {
            descriptors: Descriptors { all: Arena::new(), sides: Arena::new() },
            chunks: Arena::new(),
            epoch: Epoch::starting_at(epoch),
            bytes: AtomicUsize::new(0),
            central: Mutex::new(Central {
                cells: Cells::new(),
                free: Free::default(),
                unused: 1,
                free_chunk: 0,
                unused_chunk: 0,
                dropped: Dropped(ptr::null_mut()),
            }),
        }
    }

    /// What tells this reverse map from others while it is there.
    #[inline(always)]
    pub(super) fn identity(&self) -> usize {
        core::ptr::from_ref(self).addr()
    }

    /// Brings a cache to so many descriptors; it has what there was if there is no memory for more.
    fn top_up(&self, numbers: &mut Vec<u32>, wanted: usize) -> Result<(), OutOfMemory> {
        numbers.try_reserve(wanted.saturating_sub(numbers.len())).map_err(|_| OutOfMemory)?;
        loop {
            let unused = {
                let mut central = self.central.lock();
                while numbers.len() < wanted {
                    let Some(number) = central.take(&self.descriptors) else { break };
                    numbers.push(number);
                }
                central.unused
            };
            if numbers.len() >= wanted {
                return Ok(());
            }
            let sides = self.descriptors.sides.grow(unused)?;
            self.bytes.fetch_add(sides, Ordering::Relaxed);
            let bytes = self.descriptors.all.grow(unused)?;
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            // Room for the numbers of twice as many, so that this is rare. Without it things go on.
            let mut room = Vec::new();
            if bytes > 0 && room.try_reserve_exact(2 * unused as usize + 128).is_ok() {
                let free = &mut self.central.lock().free;
                let had = free.numbers.capacity();
                if room.capacity() > had {
                    self.bytes.fetch_add((room.capacity() - had) * size_of::<u32>(), Ordering::Relaxed);
                    room.extend_from_slice(&free.numbers);
                    core::mem::swap(&mut free.numbers, &mut room);
                }
            }
        }
    }

    /// Makes a chunk that is found by its number.
    pub(super) fn add_chunk(
        &self,
        len: usize,
        base: Gfn,
        level: Option<Level>,
    ) -> Result<ChunkRef, OutOfMemory> {
        let number = self.chunk_number()?;
        let chunk = ChunkRef::allocate(self.identity(), number, len, base, level);
        let entry = self.chunks.get(number);
        if let (Ok(chunk), Some(entry)) = (&chunk, entry) {
            entry.chunk.store(chunk.as_ptr(), Ordering::Release);
            // SAFETY: just allocated.
            self.bytes.fetch_add(unsafe { chunk.header() }.bytes(), Ordering::Relaxed);
        } else {
            self.central.lock().free_number(&self.chunks, number);
        }
        chunk
    }

    fn chunk_number(&self) -> Result<u32, OutOfMemory> {
        loop {
            let unused = {
                let mut central = self.central.lock();
                if let Some(number) = central.take_number(&self.chunks) {
                    return Ok(number);
                }
                central.unused_chunk
            };
            if unused >= CHUNKS {
                return Err(OutOfMemory);
            }
            self.bytes.fetch_add(self.chunks.grow(unused)?, Ordering::Relaxed);
        }
    }

    /// The chunk that a list is in, and its place there.
    ///
    /// For the writer, who alone frees chunks, and for whoever knows that the chunk's owner is there.
    #[inline(always)]
    pub(super) fn chunk_of(&self, list: u32) -> Option<(ChunkRef, usize)> {
        let chunk = self.chunks.get(list >> CHUNK_BITS)?.chunk.load(Ordering::Acquire);
        // SAFETY: made from a `ChunkRef`; freed only by the writer, which is whoever calls this, and taken from here before.
        let chunk = unsafe { ChunkRef::from_ptr(chunk) }?;
        Some((chunk, list as usize & ((1 << CHUNK_BITS) - 1)))
    }

    /// Frees a chunk, all of whose lists are empty.
    ///
    /// # Safety
    /// Its owner is gone, and the caller is the writer.
    pub(super) unsafe fn free_chunk(&self, chunk: ChunkRef) {
        // SAFETY: not freed before, as the owner gave it up once.
        let (number, bytes) = unsafe { (chunk.header().number(), chunk.header().bytes()) };
        if let Some(entry) = self.chunks.get(number) {
            entry.chunk.store(ptr::null_mut(), Ordering::Relaxed);
        }
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        // SAFETY: it cannot be found any more, and the writer is not looking at it.
        unsafe { chunk.free() };
        self.central.lock().free_number(&self.chunks, number);
    }
}

impl Central {
    fn take(&mut self, descriptors: &Descriptors) -> Option<u32> {
        if let Some(index) = self.free.pop(descriptors) {
            return Some(index);
        }
        let number = self.unused;
        descriptors.sides.get(number)?;
        descriptors.all.get(number)?;
        self.unused += 1;
        Some(number)
    }

    fn take_number(&mut self, chunks: &Arena<Entry>) -> Option<u32> {
        if let Some(number) = self.free_chunk.checked_sub(1) {
            self.free_chunk = chunks.get(number)?.next_free.load(Ordering::Relaxed);
            return Some(number);
        }
        if self.unused_chunk >= CHUNKS || chunks.get(self.unused_chunk).is_none() {
            return None;
        }
        self.unused_chunk += 1;
        Some(self.unused_chunk - 1)
    }

    fn free_number(&mut self, chunks: &Arena<Entry>, number: u32) {
        if let Some(entry) = chunks.get(number) {
            entry.next_free.store(self.free_chunk, Ordering::Relaxed);
            self.free_chunk = number + 1;
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut dropped = self.central.lock().dropped.take();
        while let Some(chunk) = dropped.pop() {
            // SAFETY: its owner is gone, and so is everybody else.
            unsafe { chunk.free() };
        }
    }
}

/// Descriptors that are reserved for [`add`](super::Writer::add): it takes from here and never allocates.
///
/// Each thread that adds has one of its own, and tops it up before it takes the lock under which it writes. An add needs at
/// most one descriptor; most need none. What is left is kept for the next time, and given back by dropping it.
///
/// ```
/// # use std::num::NonZeroU64;
/// let (rmap, mut writer) = memslot_mmu::rmap::Rmap::<NonZeroU64>::new()?;
/// let mut cache = rmap.cache();
/// cache.reserve(5)?; // may run out of memory
/// assert_eq!(cache.len(), 5);
/// # Ok::<(), memslot_mmu::rmap::RmapError>(())
/// ```
pub struct Cache {
    pub(super) shared: Counted<Shared>,
    pub(super) numbers: Vec<u32>,
}

impl Cache {
    pub(super) fn new(shared: Counted<Shared>) -> Self {
        Self { shared, numbers: Vec::new() }
    }

    /// Makes sure that there are so many descriptors; at once if there are.
    ///
    /// # Errors
    /// [`OutOfMemory`](super::RmapError::OutOfMemory); those that could be had are in the cache.
    #[inline]
    pub fn reserve(&mut self, descriptors: usize) -> Result<(), super::RmapError> {
        if self.numbers.len() < descriptors {
            self.shared.top_up(&mut self.numbers, descriptors)?;
        }
        Ok(())
    }

    /// How many descriptors there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let mut central = self.shared.central.lock();
        for number in self.numbers.drain(..) {
            central.free.push(&self.shared.descriptors, number);
        }
    }
}
