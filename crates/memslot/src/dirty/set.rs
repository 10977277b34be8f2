//! Bits that somebody keeps: a consumer, a harvest, the follower of a change.

use alloc::vec::Vec;

use super::bitmap::{Bitmap, word_of};
use super::chunk::{PAGES, words_of};
use super::place::Held;
use super::runs::Runs;
use crate::addr::GfnRange;
use crate::error::OutOfMemory;

/// Bits of one address space, as chunks of its [`Bitmap`], sorted by their number.
///
/// All `unsafe fn`s here pass on the bitmap's condition: the caller has the log's lock, so that nobody else takes
/// or gives back at the same time. A set that is dropped with chunks in it leaks them until the bitmap goes.
#[derive(Default)]
pub(super) struct Set {
    pub(super) chunks: Vec<(u64, Held)>,
}

impl Set {
    pub(super) fn runs(&self, from: u64, to: u64) -> Runs<'_> {
        Runs::new(&self.chunks, from, to)
    }

    /// Makes room for all chunks of a range, so that adding bits there always finds some.
    pub(super) fn reserve(&mut self, gfns: GfnRange) -> Result<(), OutOfMemory> {
        let chunks = gfns.end().get().div_ceil(PAGES) - gfns.start().get() / PAGES;
        let chunks = usize::try_from(chunks).map_err(|_| OutOfMemory)?;
        self.chunks.try_reserve(chunks).map_err(|_| OutOfMemory)
    }

    fn find(&self, number: u64) -> Result<usize, usize> {
        self.chunks.binary_search_by_key(&number, |&(number, _)| number)
    }

    /// The bits of the 64 pages of which `gfn` is one.
    pub(super) fn word(&self, gfn: u64) -> u64 {
        self.find(gfn / PAGES).map_or(0, |at| self.chunks[at].1.word(word_of(gfn)))
    }

    /// Adds bits, and takes the chunk over. Where there is no memory they are marked in the bitmap again, which
    /// loses nothing either.
    ///
    /// # Safety
    /// See [`Set`].
    pub(super) unsafe fn add(&mut self, bitmap: &Bitmap, number: u64, held: Held) {
        // SAFETY: passed on.
        unsafe {
            match self.find(number) {
                Ok(at) => {
                    let mine = &mut self.chunks[at].1;
                    match (mine.chunk(), held.chunk()) {
                        (None, _) => bitmap.give_back(number, held),
                        (Some(_), None) => bitmap.give_back(number, core::mem::replace(mine, held)),
                        (Some(to), Some(from)) => {
                            to.add_all(from);
                            bitmap.give_back(number, held);
                        }
                    }
                }
                Err(_) if self.chunks.try_reserve(1).is_err() => bitmap.restore(number, held),
                Err(at) => self.chunks.insert(at, (number, held)),
            }
        }
    }

    /// Adds the same bits, and leaves `held` to its owner. Without memory for a copy, all bits of the chunk.
    ///
    /// # Errors
    /// [`OutOfMemory`] where not even that could be noted; nothing was added.
    ///
    /// # Safety
    /// See [`Set`].
    pub(super) unsafe fn add_copy(
        &mut self,
        bitmap: &Bitmap,
        number: u64,
        held: Held,
    ) -> Result<(), OutOfMemory> {
        // SAFETY: passed on.
        unsafe {
            let at = match self.find(number) {
                Ok(at) => {
                    match (self.chunks[at].1.chunk(), held.chunk()) {
                        (None, _) => {}
                        (Some(to), Some(from)) => to.add_all(from),
                        (Some(_), None) => self.add(bitmap, number, Held::Full),
                    }
                    return Ok(());
                }
                Err(at) => at,
            };
            self.chunks.try_reserve(1).map_err(|_| OutOfMemory)?;
            let copy = match held.chunk().map(|from| (from, bitmap.empty(number))) {
                Some((from, Ok(chunk))) => {
                    chunk.as_ref().add_all(from);
                    Held::Bits(chunk)
                }
                _ => Held::Full,
            };
            self.chunks.insert(at, (number, copy));
            Ok(())
        }
    }

    /// Adds the pages `[from, to)`. What finds no memory is marked in the bitmap.
    ///
    /// # Safety
    /// See [`Set`].
    pub(super) unsafe fn add_range(&mut self, bitmap: &Bitmap, from: u64, to: u64) {
        let mut at = from;
        while at < to {
            let number = at / PAGES;
            let start = number * PAGES;
            let end = (start + PAGES).min(to);
            // SAFETY: passed on.
            unsafe {
                if end - at == PAGES {
                    self.add(bitmap, number, Held::Full);
                } else if let Ok(chunk) = bitmap.empty(number) {
                    words_of(at - start, end - start).for_each(|(word, bits)| chunk.as_ref().add(word, bits));
                    self.add(bitmap, number, Held::Bits(chunk));
                } else {
                    self.add(bitmap, number, Held::Full);
                }
            }
            at = end;
        }
    }

    /// Moves the bits of the pages `[from, to)` to the end of `got`, in order.
    ///
    /// # Errors
    /// [`OutOfMemory`]; what was not moved is still here.
    ///
    /// # Safety
    /// See [`Set`].
    pub(super) unsafe fn take(
        &mut self,
        bitmap: &Bitmap,
        from: u64,
        to: u64,
        got: &mut Vec<(u64, Held)>,
    ) -> Result<(), OutOfMemory> {
        let first = self.chunks.partition_point(|&(number, _)| number < from / PAGES);
        let last = self.chunks.partition_point(|&(number, _)| number < to.div_ceil(PAGES));
        got.try_reserve(last.saturating_sub(first)).map_err(|_| OutOfMemory)?;
        let mut result = Ok(());
        let mut at = first;
        let mut failed = false;
        for index in first..last {
            let (number, held) = self.chunks[index];
            let start = number * PAGES;
            let (low, high) = (from.max(start) - start, (to - start).min(PAGES));
            if failed {
                self.chunks[at] = (number, held);
                at += 1;
            } else if (low, high) == (0, PAGES) {
                got.push((number, held));
            } else {
                // SAFETY: passed on.
                match unsafe { cut(bitmap, number, held, low, high) } {
                    Ok((part, rest)) => {
                        got.push((number, part));
                        self.chunks[at] = (number, rest);
                        at += 1;
                    }
                    Err(OutOfMemory) => {
                        (result, failed) = (Err(OutOfMemory), true);
                        self.chunks[at] = (number, held);
                        at += 1;
                    }
                }
            }
        }
        self.chunks.drain(at..last);
        result
    }

    /// Takes some bits of the 64 pages of which `gfn` is one; returns those that were set.
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing was taken.
    ///
    /// # Safety
    /// See [`Set`].
    pub(super) unsafe fn take_word(
        &mut self,
        bitmap: &Bitmap,
        gfn: u64,
        bits: u64,
    ) -> Result<u64, OutOfMemory> {
        let Ok(at) = self.find(gfn / PAGES) else { return Ok(0) };
        if let Some(chunk) = self.chunks[at].1.chunk() {
            return Ok(chunk.remove(word_of(gfn), bits));
        }
        // SAFETY: passed on.
        let chunk = unsafe { bitmap.empty(gfn / PAGES)? };
        // SAFETY: the chunk is alive.
        let rest = unsafe { chunk.as_ref() };
        rest.fill();
        rest.remove(word_of(gfn), bits);
        self.chunks[at].1 = Held::Bits(chunk);
        Ok(bits)
    }

    /// Gives all chunks back: the bits are gone.
    ///
    /// # Safety
    /// See [`Set`].
    pub(super) unsafe fn clear(&mut self, bitmap: &Bitmap) {
        for (number, held) in self.chunks.drain(..) {
            // SAFETY: passed on.
            unsafe { bitmap.give_back(number, held) };
        }
    }
}

/// Moves the pages `[low, high)` of a chunk into one of their own; returns it and what is left.
///
/// # Safety
/// See [`Set`].
unsafe fn cut(
    bitmap: &Bitmap,
    number: u64,
    held: Held,
    low: u64,
    high: u64,
) -> Result<(Held, Held), OutOfMemory> {
    // SAFETY: passed on; all chunks are alive.
    unsafe {
        let part = bitmap.empty(number)?;
        let rest = match held {
            Held::Bits(chunk) => chunk,
            Held::Full => {
                let rest =
                    bitmap.empty(number).inspect_err(|_| bitmap.give_back(number, Held::Bits(part)))?;
                rest.as_ref().fill();
                rest
            }
        };
        for (word, bits) in words_of(low, high) {
            let moved = rest.as_ref().remove(word, bits);
            if moved != 0 {
                part.as_ref().add(word, moved);
            }
        }
        Ok((Held::Bits(part), Held::Bits(rest)))
    }
}
