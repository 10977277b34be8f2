//! A place: where one chunk of a bitmap is, and how it is taken away while marks go on.
//!
//! The protocol is explained in `bitmap.rs`.

use alloc::boxed::Box;
use core::ptr::{self, NonNull};

use super::chunk::{Chunk, PAGES, WORDS, words_of};
use crate::error::OutOfMemory;
use crate::sync::{AtomicPtr, AtomicUsize, Ordering, fence, fence_for_loom};

/// Stands for a chunk whose bits are all set.
const FULL: *mut Chunk = ptr::without_provenance_mut(64);

/// Where a chunk can be.
pub(super) struct Place {
    /// Nothing, [`FULL`], or the chunk that takes marks.
    active: AtomicPtr<Chunk>,
    /// How often what was active has been taken away.
    turn: AtomicUsize,
    /// Chunks that wait for their next turn, linked, and with old bits in them. Anybody pushes; only whoever takes
    /// bits away pops, so a chunk cannot come back between a pop's look at it and its exchange.
    idle: AtomicPtr<Chunk>,
}

/// Bits taken away: a chunk, or the word that all bits of a chunk were set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Held {
    Full,
    Bits(NonNull<Chunk>),
}

// SAFETY: whoever has a `Held` is its only user, apart from late markers, whose accesses are atomic; the memory
// lives as long as the bitmap.
unsafe impl Send for Held {}
// SAFETY: all of a chunk is atomics.
unsafe impl Sync for Held {}

/// The summary of a full chunk.
const ALL_WORDS: u64 = if WORDS < 64 { (1 << (WORDS % 64)) - 1 } else { u64::MAX };

impl Held {
    /// The chunk, unless it is full.
    #[inline]
    pub(super) fn chunk(&self) -> Option<&Chunk> {
        match self {
            Self::Full => None,
            // SAFETY: chunks are freed with the bitmap, which outlives what was taken from it (`DirtyLog` and all
            // that hold bits share it).
            Self::Bits(chunk) => Some(unsafe { chunk.as_ref() }),
        }
    }

    /// The bits of a word.
    #[inline]
    pub(super) fn word(&self, word: usize) -> u64 {
        self.chunk().map_or(u64::MAX, |chunk| chunk.word(word))
    }

    /// A bit for each of 64 words: whether it may have bits.
    #[inline]
    pub(super) fn summary(&self, group: usize) -> u64 {
        self.chunk().map_or(ALL_WORDS, |chunk| chunk.summary(group))
    }

    /// The first word at `from` or behind it that is not all ones; `WORDS` where there is none.
    #[inline]
    pub(super) fn skip_full(&self, from: usize) -> usize {
        self.chunk().map_or(WORDS, |chunk| chunk.skip_full(from, WORDS))
    }
}

impl Place {
    pub(super) fn new() -> Self {
        let nothing = || AtomicPtr::new(ptr::null_mut());
        Self { active: nothing(), turn: AtomicUsize::new(0), idle: nothing() }
    }

    /// Marks a page where there is a chunk. Returns whether there is, and the mark certain to be seen. With `leave`, what
    /// is marked is left alone: see `fence.rs`.
    #[inline]
    pub(super) fn mark_bit(&self, word: usize, bit: u64, leave: bool) -> bool {
        let turn = self.turn.load(Ordering::Acquire);
        let active = self.active.load(Ordering::SeqCst);
        if active.is_null() || active == FULL {
            return leave && active == FULL;
        }
        // SAFETY: chunks are freed with the bitmap.
        unsafe { &*active }.mark(word, bit, leave);
        fence_for_loom();
        self.turn.load(Ordering::SeqCst) == turn
    }

    /// Marks the pages `[from, to)` of the place; `leave` as in [`mark_bit`](Self::mark_bit).
    pub(super) fn mark(&self, from: u64, to: u64, leave: bool, bytes: &AtomicUsize) {
        loop {
            let turn = self.turn.load(Ordering::Acquire);
            let active = self.active.load(Ordering::SeqCst);
            if active == FULL {
                // An exchange, though nothing changes: whoever takes the place later sees what the caller wrote.
                if leave || self.replace(active, FULL) {
                    return;
                }
            } else if to - from == PAGES {
                if self.replace(active, FULL) {
                    if let Some(chunk) = NonNull::new(active) {
                        self.push(chunk);
                    }
                    return;
                }
            } else if let Some(chunk) = NonNull::new(active) {
                // SAFETY: chunks are freed with the bitmap.
                unsafe { chunk.as_ref() }.mark_range(from, to, leave);
                fence_for_loom();
                if self.turn.load(Ordering::SeqCst) == turn {
                    return;
                }
            } else {
                match alloc(bytes) {
                    Ok(chunk) => {
                        if !self.replace(active, chunk.as_ptr()) {
                            // SAFETY: it was never seen by anybody.
                            unsafe { free(chunk, bytes) };
                        }
                    }
                    Err(OutOfMemory) => {
                        self.replace(active, FULL);
                    }
                }
            }
        }
    }

    fn replace(&self, current: *mut Chunk, new: *mut Chunk) -> bool {
        self.active.compare_exchange(current, new, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    fn count_turn(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
        // What is read of the chunk from here on is read without such an order of its own.
        fence(Ordering::SeqCst);
    }

    /// What is there, to look at.
    pub(super) fn look(&self) -> Option<Held> {
        match self.active.load(Ordering::SeqCst) {
            FULL => Some(Held::Full),
            active => NonNull::new(active).map(Held::Bits),
        }
    }

    /// # Safety
    /// As `Bitmap::take`.
    pub(super) unsafe fn take(&self, bytes: &AtomicUsize) -> Result<Option<Held>, OutOfMemory> {
        loop {
            let active = self.active.load(Ordering::SeqCst);
            let new = match self.look() {
                None => return Ok(None),
                Some(Held::Full) => self.pop().map_or(ptr::null_mut(), NonNull::as_ptr),
                Some(Held::Bits(chunk)) => {
                    // SAFETY: chunks are freed with the bitmap.
                    if unsafe { chunk.as_ref() }.is_clean() {
                        return Ok(None);
                    }
                    // SAFETY: passed on.
                    unsafe { self.empty(bytes)?.as_ptr() }
                }
            };
            if self.replace(active, new) {
                self.count_turn();
                return Ok(Some(match NonNull::new(active) {
                    Some(chunk) if active != FULL => Held::Bits(chunk),
                    _ => Held::Full,
                }));
            }
            // A marker made the place full in between.
            if let Some(new) = NonNull::new(new) {
                self.push(new);
            }
        }
    }

    /// Takes the marks of the pages `[from, to)` only.
    ///
    /// # Safety
    /// As `Bitmap::take`.
    pub(super) unsafe fn take_part(
        &self,
        from: u64,
        to: u64,
        bytes: &AtomicUsize,
    ) -> Result<Option<Held>, OutOfMemory> {
        // SAFETY: passed on; both chunks are alive.
        unsafe {
            let part = self.empty(bytes)?;
            let taken = part.as_ref();
            match self.look() {
                None => {}
                // Where it becomes full meanwhile, the pages are reported again.
                Some(Held::Bits(active)) => {
                    for (word, bits) in words_of(from, to) {
                        let got = active.as_ref().take(word, bits);
                        if got != 0 {
                            taken.add(word, got);
                        }
                    }
                }
                // From now on all bits but these are set. Markers leave a full place as it is.
                Some(Held::Full) => {
                    let rest = self.empty(bytes).inspect_err(|_| self.push(part))?;
                    rest.as_ref().fill();
                    for (word, bits) in words_of(from, to) {
                        taken.add(word, rest.as_ref().remove(word, bits));
                    }
                    self.replace(FULL, rest.as_ptr());
                    self.count_turn();
                }
            }
            if taken.is_clean() {
                self.push(part);
                return Ok(None);
            }
            Ok(Some(Held::Bits(part)))
        }
    }

    /// # Safety
    /// As `Bitmap::take`.
    pub(super) unsafe fn take_word(
        &self,
        word: usize,
        bits: u64,
        bytes: &AtomicUsize,
    ) -> Result<u64, OutOfMemory> {
        match self.look() {
            None => Ok(0),
            // SAFETY: chunks are freed with the bitmap.
            Some(Held::Bits(active)) => Ok(unsafe { active.as_ref() }.take(word, bits)),
            // As in `take_part`.
            Some(Held::Full) => {
                // SAFETY: passed on.
                let new = unsafe { self.empty(bytes)? };
                // SAFETY: the chunk is alive.
                let rest = unsafe { new.as_ref() };
                rest.fill();
                rest.remove(word, bits);
                self.replace(FULL, new.as_ptr());
                self.count_turn();
                Ok(bits)
            }
        }
    }

    /// # Safety
    /// As `Bitmap::take`.
    pub(super) unsafe fn empty(&self, bytes: &AtomicUsize) -> Result<NonNull<Chunk>, OutOfMemory> {
        self.pop().map_or_else(|| alloc(bytes), Ok)
    }

    /// Frees all chunks.
    ///
    /// # Safety
    /// Nobody uses the place again.
    pub(super) unsafe fn free(&self, bytes: &AtomicUsize) {
        for stack in [&self.active, &self.idle] {
            let mut chunk = stack.load(Ordering::Acquire);
            while let Some(gone) = NonNull::new(chunk).filter(|_| chunk != FULL) {
                // SAFETY: passed on; every chunk is in one place. The active one's link is a remnant.
                unsafe {
                    let next = gone.as_ref().next.load(Ordering::Relaxed);
                    chunk = if ptr::eq(stack, &raw const self.active) { ptr::null_mut() } else { next };
                    free(gone, bytes);
                }
            }
        }
    }

    /// An empty one of the chunks that wait here.
    fn pop(&self) -> Option<NonNull<Chunk>> {
        let mut top = self.idle.load(Ordering::Acquire);
        loop {
            let first = NonNull::new(top)?;
            // SAFETY: chunks are freed with the bitmap.
            let chunk = unsafe { first.as_ref() };
            let next = chunk.next.load(Ordering::Relaxed);
            match self.idle.compare_exchange(top, next, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => {
                    chunk.clear();
                    return Some(first);
                }
                Err(now) => top = now,
            }
        }
    }

    /// Keeps a chunk for later.
    pub(super) fn push(&self, chunk: NonNull<Chunk>) {
        let new = chunk.as_ptr();
        // SAFETY: chunks are freed with the bitmap.
        let chunk = unsafe { chunk.as_ref() };
        let mut top = self.idle.load(Ordering::Relaxed);
        loop {
            chunk.next.store(top, Ordering::Relaxed);
            match self.idle.compare_exchange(top, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }
}

fn alloc(bytes: &AtomicUsize) -> Result<NonNull<Chunk>, OutOfMemory> {
    let chunk = Chunk::alloc()?;
    bytes.fetch_add(size_of::<Chunk>(), Ordering::Relaxed);
    Ok(chunk)
}

/// # Safety
/// From [`alloc`], and nobody uses it again.
unsafe fn free(chunk: NonNull<Chunk>, bytes: &AtomicUsize) {
    bytes.fetch_sub(size_of::<Chunk>(), Ordering::Relaxed);
    // SAFETY: passed on.
    drop(unsafe { Box::from_raw(chunk.as_ptr()) });
}
