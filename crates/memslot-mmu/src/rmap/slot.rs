//! The lists of a slot, by gfn and level.

use core::marker::PhantomData;
use core::ops::Range;

use memslot::{Gfn, GfnRange, OutOfMemory};

use super::RmapError;
use super::heads::{CHUNK, CHUNK_BITS, ChunkRef, List};
use super::space::{Heads, LEVELS, REACH_BITS, Space};
use crate::counted::Counted;
use crate::level::Level;

/// The lists of one slot: for each level and gfn, the entries that map it.
///
/// A new one costs 8 bytes for each GiB of the slot. The heads come in chunks of 512 (2 MiB of guest memory, at the
/// lowest level), allocated when the first of them is [reserved](Self::reserve), and shared by all slots of the
/// [address space](super::SpaceRmap) that have any of those frames: a slot that takes the place of others has their lists as they are.
///
/// All methods take `&self` and may be used by any number of threads. Share it (in an `Arc`, say) with those who walk;
/// when the last one drops it, the [`Writer`](super::Writer) frees the chunks that no other slot has a part of, with its next
/// [`reclaim`](super::Writer::reclaim). Entries that are still filed there are forgotten, and their records lead nowhere.
pub struct SlotRmap<E> {
    space: Counted<Space>,
    gfns: GfnRange,
    levels: [Heads; LEVELS.len()],
    /// The window's seat in its space.
    seat: usize,
    entries: PhantomData<fn(E) -> E>,
}

impl<E> SlotRmap<E> {
    pub(super) fn new(space: Counted<Space>, gfns: GfnRange, largest: Level) -> Result<Self, RmapError> {
        if largest > Level::G1 {
            return Err(RmapError::Level { level: largest });
        }
        let heads = |level| if level <= largest { Heads::new(gfns, level) } else { Heads::none() };
        let levels = [heads(Level::K4)?, heads(Level::M2)?, heads(Level::G1)?];
        let seat = space.enter(&levels)?;
        Ok(Self { space, gfns, levels, seat, entries: PhantomData })
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
        let number = number(level, gfn);
        if !heads.has(number) {
            return Err(RmapError::Outside { gfn, level, slot: self.gfns });
        }
        if let Some(list) = Self::list_at(heads, number) {
            return Ok(list);
        }
        self.make_room(heads, level, number)?;
        Self::list_at(heads, number).ok_or(RmapError::OutOfMemory)
    }

    /// The list for the entry of `level` that maps `gfn`; `None` if no list near it was ever reserved, and where
    /// [`reserve`](Self::reserve) is an error.
    #[inline]
    #[must_use]
    pub fn list(&self, level: Level, gfn: Gfn) -> Option<List<'_, E>> {
        let (heads, number) = (self.heads(level)?, number(level, gfn));
        if heads.has(number) { Self::list_at(heads, number) } else { None }
    }

    /// The lists of this level that are not empty, of the pages that have a frame in `gfns`, in order; each with the first
    /// frame of its page.
    ///
    /// Steps over what was never reserved: 1 GiB at a time at the lowest level.
    pub fn lists(&self, level: Level, gfns: GfnRange) -> impl Iterator<Item = (Gfn, List<'_, E>)> {
        self.lists_within(level, gfns, usize::MAX)
    }

    /// The same, until it has looked at so many places; [`Lists::rest`] says where that was.
    pub(crate) fn lists_within(&self, level: Level, gfns: GfnRange, places: usize) -> Lists<'_, E> {
        let heads = self.heads(level);
        let wanted = number(level, gfns.start())..gfns.end().get().div_ceil(level.pages());
        let wanted = heads.map_or(0..0, |heads| heads.clip(wanted));
        Lists { level, heads, wanted, left: places, entries: PhantomData }
    }

    #[inline]
    fn heads(&self, level: Level) -> Option<&Heads> {
        self.levels.get(usize::from(level.get()) - 1)
    }

    /// One of the lists of these heads.
    #[inline]
    fn list_at<'a>(heads: &'a Heads, number: u64) -> Option<List<'a, E>> {
        let chunk: ChunkRef = heads.directory(number)?.chunk(number)?;
        #[expect(clippy::cast_possible_truncation, reason = "below CHUNK")]
        let place = (number % CHUNK as u64) as usize;
        // SAFETY: chunks are freed after the window that reaches them was dropped, which the result borrows from. All of a slot's
        // chunks have CHUNK heads.
        Some(unsafe { List::new(chunk, place) })
    }

    #[cold]
    fn make_room(&self, heads: &Heads, level: Level, number: u64) -> Result<(), OutOfMemory> {
        if heads.directory(number).is_none() {
            self.space.add_directory(level, number)?;
        }
        let directory = heads.directory(number).ok_or(OutOfMemory)?;
        let first = number & !(CHUNK as u64 - 1);
        let base = Gfn::new(first << level.pages().trailing_zeros());
        let shared = &self.space.shared;
        let chunk = shared.add_chunk(CHUNK, base, Some(level))?;
        if !directory.set_chunk(number, chunk) {
            // Another thread was first.
            // SAFETY: nobody has seen this one.
            unsafe { shared.central.lock().dropped.push(chunk) };
        }
        Ok(())
    }
}

impl<E> Drop for SlotRmap<E> {
    fn drop(&mut self) {
        self.space.leave(self.seat);
    }
}

/// The number of the list for the page of this level with this frame.
#[inline(always)]
fn number(level: Level, gfn: Gfn) -> u64 {
    // The level as the caller says it, which is often a constant.
    gfn.get() >> level.pages().trailing_zeros()
}

/// See [`SlotRmap::lists`].
pub(crate) struct Lists<'a, E> {
    level: Level,
    heads: Option<&'a Heads>,
    wanted: Range<u64>,
    /// So many places may be looked at still.
    left: usize,
    entries: PhantomData<fn(E) -> E>,
}

impl<E> Lists<'_, E> {
    /// The first frame of what was not looked at; `None` at the end.
    pub(crate) fn rest(&self) -> Option<Gfn> {
        let is_done = self.heads.is_none() || self.wanted.is_empty();
        (!is_done).then(|| Gfn::new(self.wanted.start << self.level.pages().trailing_zeros()))
    }

    /// How many places may be looked at still.
    pub(crate) fn left(&self) -> usize {
        self.left
    }
}

impl<'a, E> Iterator for Lists<'a, E> {
    type Item = (Gfn, List<'a, E>);

    fn next(&mut self) -> Option<Self::Item> {
        let heads = self.heads?;
        while !self.wanted.is_empty() && self.left > 0 {
            self.left -= 1;
            let number = self.wanted.start;
            let step = match heads.directory(number) {
                None => REACH_BITS,
                Some(directory) if directory.chunk(number).is_none() => CHUNK_BITS,
                Some(_) => 0,
            };
            self.wanted.start = (number | ((1 << step) - 1)).saturating_add(1);
            if step == 0 {
                let list = SlotRmap::list_at(heads, number)?;
                if !list.is_empty() {
                    return Some((Gfn::new(number << self.level.pages().trailing_zeros()), list));
                }
            }
        }
        None
    }
}
