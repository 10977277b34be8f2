//! A place: where one chunk of a bitmap is, and how it is taken away while marks go on.
//!
//! The protocol is explained in `bitmap.rs`.

use core::ptr::{self, NonNull};

use super::chunk::{Chunk, PAGES, WORDS, words_of};
use crate::error::OutOfMemory;
use crate::sync::{AtomicPtr, AtomicUsize, Ordering, fence_for_loom};

/// Stands for a chunk whose bits are all set.
const FULL: *mut Chunk = ptr::without_provenance_mut(64);

/// Where a chunk can be.
pub(super) struct Place {
    /// Nothing, [`FULL`], or the chunk that takes marks.
    active: AtomicPtr<Chunk>,
    /// How often what was active has been taken away.
    turn: AtomicUsize,
    /// Chunks that a marker put aside because the place became full; not yet cleared.
    aside: AtomicPtr<Chunk>,
    /// Cleared chunks. Only whoever takes bits away looks at these.
    spare: AtomicPtr<Chunk>,
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

    /// The first word at `from` or behind it that may have bits.
    #[inline]
    pub(super) fn next_word(&self, from: usize) -> Option<usize> {
        self.chunk().map_or_else(|| (from < WORDS).then_some(from), |chunk| chunk.next_word(from))
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
        Self { active: nothing(), turn: AtomicUsize::new(0), aside: nothing(), spare: nothing() }
    }

    /// Marks a page where there is a chunk. Returns whether there is, and the mark certain to be seen.
    #[inline]
    pub(super) fn mark_bit(&self, word: usize, bit: u64) -> bool {
        let turn = self.turn.load(Ordering::Acquire);
        let active = self.active.load(Ordering::Acquire);
        if active.is_null() || active == FULL {
            return false;
        }
        // SAFETY: chunks are freed with the bitmap.
        unsafe { &*active }.mark(word, bit);
        fence_for_loom();
        self.turn.load(Ordering::SeqCst) == turn
    }

    /// Marks the pages `[from, to)` of the place.
    pub(super) fn mark(&self, from: u64, to: u64, bytes: &AtomicUsize) {
        loop {
            let turn = self.turn.load(Ordering::Acquire);
            let active = self.active.load(Ordering::Acquire);
            if active == FULL {
                // An exchange, though nothing changes: whoever takes the place later sees what the caller wrote.
                if self.replace(active, FULL) {
                    return;
                }
            } else if to - from == PAGES {
                if self.replace(active, FULL) {
                    if let Some(chunk) = NonNull::new(active) {
                        // SAFETY: chunks are freed with the bitmap.
                        push(&self.aside, unsafe { chunk.as_ref() });
                    }
                    return;
                }
            } else if let Some(chunk) = NonNull::new(active) {
                // SAFETY: chunks are freed with the bitmap.
                unsafe { chunk.as_ref() }.mark_range(from, to);
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
        fence_for_loom();
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
                // SAFETY: chunks are freed with the bitmap; this one came from the spare ones.
                push(&self.spare, unsafe { new.as_ref() });
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
            loop {
                match self.look() {
                    None => break,
                    Some(Held::Bits(active)) => {
                        let active = active.as_ref();
                        for (word, bits) in words_of(from, to) {
                            let got = active.take(word, bits);
                            if got != 0 {
                                taken.add(word, got);
                            }
                        }
                        fence_for_loom();
                        // Had it become full in between, the bits would be set all the same.
                        if self.active.load(Ordering::SeqCst) != FULL {
                            break;
                        }
                    }
                    Some(Held::Full) => {
                        // From now on all bits but these are set.
                        let rest = self.empty(bytes).inspect_err(|_| push(&self.spare, taken))?;
                        rest.as_ref().fill();
                        for (word, bits) in words_of(from, to) {
                            taken.add(word, rest.as_ref().remove(word, bits));
                        }
                        if self.replace(FULL, rest.as_ptr()) {
                            self.count_turn();
                            break;
                        }
                    }
                }
            }
            if taken.is_clean() {
                push(&self.spare, taken);
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
        loop {
            match self.look() {
                None => return Ok(0),
                Some(Held::Bits(active)) => {
                    // SAFETY: chunks are freed with the bitmap.
                    let got = unsafe { active.as_ref() }.take(word, bits);
                    fence_for_loom();
                    if self.active.load(Ordering::SeqCst) != FULL {
                        return Ok(got);
                    }
                }
                Some(Held::Full) => {
                    // SAFETY: passed on; the chunk is alive.
                    let rest = unsafe { self.empty(bytes)?.as_ref() };
                    rest.fill();
                    rest.remove(word, bits);
                    if self.replace(FULL, ptr::from_ref(rest).cast_mut()) {
                        self.count_turn();
                        return Ok(bits);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As `Bitmap::take`.
    pub(super) unsafe fn empty(&self, bytes: &AtomicUsize) -> Result<NonNull<Chunk>, OutOfMemory> {
        self.pop().map_or_else(|| alloc(bytes), Ok)
    }

    /// Clears a chunk and keeps it. Only whoever takes bits away does this.
    pub(super) fn put_back(&self, chunk: &Chunk) {
        chunk.clear();
        push(&self.spare, chunk);
    }

    /// Frees all chunks.
    ///
    /// # Safety
    /// Nobody uses the place again.
    pub(super) unsafe fn free(&self, bytes: &AtomicUsize) {
        for stack in [&self.active, &self.aside, &self.spare] {
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

    /// A cleared chunk that waits here. Only whoever takes bits away pops, so nothing comes back in between.
    fn pop(&self) -> Option<NonNull<Chunk>> {
        let mut aside = self.aside.swap(ptr::null_mut(), Ordering::Acquire);
        while let Some(chunk) = NonNull::new(aside) {
            // SAFETY: chunks are freed with the bitmap; what was put aside is not shared any more.
            let chunk = unsafe { chunk.as_ref() };
            aside = chunk.next.load(Ordering::Relaxed);
            chunk.clear();
            push(&self.spare, chunk);
        }
        let first = NonNull::new(self.spare.load(Ordering::Acquire))?;
        // SAFETY: as above.
        self.spare.store(unsafe { first.as_ref() }.next.load(Ordering::Relaxed), Ordering::Release);
        Some(first)
    }
}

fn push(stack: &AtomicPtr<Chunk>, chunk: &Chunk) {
    let new = ptr::from_ref(chunk).cast_mut();
    let mut top = stack.load(Ordering::Relaxed);
    loop {
        chunk.next.store(top, Ordering::Relaxed);
        match stack.compare_exchange(top, new, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return,
            Err(now) => top = now,
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
