//! The lists of one address space, which its slots have in common.
//!
//! The heads of each level stand in chunks, and these are found through directories; both are aligned in guest memory, whatever slots there
//! are:
//!
//! ```text
//!  gfn (level 4 KiB)   0            1 GiB         2 GiB
//!  directories         │ directory   │ (none yet)  │
//!  chunks, 2 MiB each  │▪│ │▪│▪│ ─ ─ │             │
//!  slots               [  0  )[      7      )
//! ```
//!
//! **A slot's reverse map is a window**: a range of frames, and a place for each directory that it reaches into. So nothing becomes of
//! lists when slots are split, merged, grown or shrunk: the new windows lead to the chunks that the old ones led to. No entry is filed anew,
//! no record changes, and a walk that goes through an old window sees what is filed through a new one.
//!
//! **A directory is in every window that reaches into it**, from the moment at which it can be found in any: whoever adds one puts it
//! into all, under the lock. So a place without one says that there is none.
//!
//! **A chunk is there as long as a window reaches it.** Directories count windows for each of their chunks, whether the
//! chunk was made already or not; when the last one goes, the chunk goes to the writer, which frees it. It is made by whoever
//! [reserves](super::SlotRmap::reserve) the first of its lists, through a window, which keeps it.
//!
//! The lock is for windows and directories that come and go, and is held for a time in proportion to the directories of a window (one for
//! each GiB that anything was mapped in) or to the number of windows; whoever holds it may allocate. Lists are found without it.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ops::Range;
use core::ptr::{self, NonNull};

use memslot::{GfnRange, OutOfMemory};

use super::arena::AtomicU32;
use super::heads::{CHUNK_BITS, Chunk, ChunkRef};
use super::shared::Shared;
use super::slot::SlotRmap;
use super::{RmapEntry, RmapError};
use crate::counted::{Counted, try_box};
use crate::level::Level;
use crate::sync::{AtomicPtr, Mutex, Ordering};

/// log2 of the chunks that a directory leads to.
const DIRECTORY_BITS: u32 = if cfg!(loom) { 1 } else { 9 };
const DIRECTORY: usize = 1 << DIRECTORY_BITS;
/// log2 of the lists that a directory leads to.
pub(super) const REACH_BITS: u32 = CHUNK_BITS + DIRECTORY_BITS;
/// Pages of so many sizes can be mapped.
pub(crate) const LEVELS: [Level; 3] = [Level::K4, Level::M2, Level::G1];

/// The lists of one address space: what the reverse maps of its slots come from. A handle; clones are the same one.
///
/// ```
/// # use std::num::NonZeroU64;
/// # use memslot::{Gfn, GfnRange};
/// # use memslot_mmu::Level;
/// # use memslot_mmu::rmap::{Filed, Rmap};
/// # let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
/// # let range = |first, len| GfnRange::with_len(Gfn::new(first), len).unwrap();
/// # let mut cache = rmap.cache();
/// let space = rmap.space()?;
/// let slot = space.slot(range(0, 0x400), Level::M2)?;
/// let (entry, mut record) = (NonZeroU64::new(0x1000).unwrap(), 0);
/// let list = slot.reserve(Level::K4, Gfn::new(0x123))?;
/// writer.add(list, entry, &mut cache, |_, filed: Filed| record = filed.into_bits())?;
///
/// // The slot is split. Its entries are where they were.
/// let halves = [space.slot(range(0, 0x100), Level::M2)?, space.slot(range(0x100, 0x300), Level::M2)?];
/// drop(slot);
/// let list = halves[1].list(Level::K4, Gfn::new(0x123)).unwrap();
/// assert_eq!(writer.entries(list).collect::<Vec<_>>(), [entry]);
/// assert_eq!(writer.remove(Filed::from_bits(record).unwrap(), entry, |_, _| ()), Ok(0));
/// # Ok::<(), memslot_mmu::rmap::RmapError>(())
/// ```
pub struct SpaceRmap<E> {
    space: Counted<Space>,
    entries: PhantomData<fn(E) -> E>,
}

impl<E> Clone for SpaceRmap<E> {
    fn clone(&self) -> Self {
        Self { space: self.space.clone(), entries: PhantomData }
    }
}

impl<E: RmapEntry> SpaceRmap<E> {
    pub(super) fn new(shared: Counted<Shared>) -> Result<Self, OutOfMemory> {
        let windows = Windows { directories: [const { Vec::new() }; 3], seats: Vec::new(), free: None };
        let space = Counted::new(Space { shared, windows: Mutex::new(windows) })?;
        Ok(Self { space, entries: PhantomData })
    }

    /// The lists of a slot with these frames, for entries of the levels up to `largest`.
    ///
    /// Where it has frames in common with other slots, those that it is to take the place of or others, it has the same lists.
    ///
    /// # Errors
    /// [`OutOfMemory`](RmapError::OutOfMemory); [`Level`](RmapError::Level) for more than 1 GiB.
    pub fn slot(&self, gfns: GfnRange, largest: Level) -> Result<SlotRmap<E>, RmapError> {
        SlotRmap::new(self.space.clone(), gfns, largest)
    }
}

/// What the windows of an address space share.
pub(super) struct Space {
    pub(super) shared: Counted<Shared>,
    windows: Mutex<Windows>,
}

/// What is under the lock.
struct Windows {
    /// By level, in order of their numbers.
    directories: [Vec<(u64, Found)>; LEVELS.len()],
    seats: Vec<Seat>,
    /// The first seat that is free.
    free: Option<usize>,
}

/// A directory in the map of all.
struct Found(NonNull<Directory>);

// SAFETY: a directory has nothing but atomics, and is freed by whoever has the lock, when nobody leads to it.
unsafe impl Send for Found {}

/// One window, or room for one.
enum Seat {
    Taken([Reach; LEVELS.len()]),
    Free { next: Option<usize> },
}

pub(super) struct Directory {
    chunks: [AtomicPtr<Chunk>; DIRECTORY],
    /// How many windows reach each chunk, that of its place; changed under the lock.
    windows: [AtomicU32; DIRECTORY],
}

/// What a window has of one level: some lists, numbered as the pages of the level are, from gfn 0 on, and the directories that they
/// are in.
pub(super) struct Heads(Reach);

/// Where [`Heads`] lead. Valid until these are dropped, which their window has left before.
#[derive(Clone, Copy)]
struct Reach {
    first: u64,
    len: u64,
    /// A place for each directory with any of the lists.
    places: NonNull<[AtomicPtr<Directory>]>,
}

// SAFETY: the places are atomics that belong to `Heads`.
unsafe impl Send for Reach {}
// SAFETY: as above.
unsafe impl Sync for Reach {}

impl Heads {
    /// The lists of a slot with these frames, for the pages that it has as a whole. (A large page may begin before the slot, or end
    /// behind it; such a one has no list.)
    pub(super) fn new(gfns: GfnRange, level: Level) -> Result<Self, OutOfMemory> {
        let first = gfns.start().get().div_ceil(level.pages());
        let end = gfns.end().get() >> level.pages().trailing_zeros();
        Self::with_lists(first, end.saturating_sub(first))
    }

    /// No lists, for a level that was not asked for.
    pub(super) fn none() -> Result<Self, OutOfMemory> {
        Self::with_lists(0, 0)
    }

    fn with_lists(first: u64, len: u64) -> Result<Self, OutOfMemory> {
        let numbers = directories_of(first, len);
        let count = usize::try_from(numbers.end - numbers.start).map_err(|_| OutOfMemory)?;
        let mut places = Vec::new();
        places.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
        places.resize_with(count, || AtomicPtr::new(ptr::null_mut()));
        let places = NonNull::from(Box::leak(places.into_boxed_slice()));
        Ok(Self(Reach { first, len, places }))
    }

    /// Whether this is one of the lists.
    #[inline(always)]
    pub(super) const fn has(&self, list: u64) -> bool {
        list.wrapping_sub(self.0.first) < self.0.len
    }

    /// Those of some lists that these have.
    pub(super) fn clip(&self, lists: Range<u64>) -> Range<u64> {
        let clip = |list: u64| list.clamp(self.0.first, self.0.first + self.0.len);
        clip(lists.start)..clip(lists.end)
    }

    /// The directory that leads to a list.
    #[inline(always)]
    pub(super) fn directory(&self, list: u64) -> Option<&Directory> {
        let place = self.0.place(list >> REACH_BITS)?;
        // SAFETY: null or made from a box, and not freed while a window leads there.
        unsafe { place.load(Ordering::Acquire).as_ref() }
    }
}

impl Drop for Heads {
    fn drop(&mut self) {
        // SAFETY: made from a box, and nobody else knows of it any more: the window has left.
        drop(unsafe { Box::from_raw(self.0.places.as_ptr()) });
    }
}

/// The directories that have so many lists.
fn directories_of(first: u64, len: u64) -> Range<u64> {
    let start = first >> REACH_BITS;
    if len == 0 { start..start } else { start..((first + (len - 1)) >> REACH_BITS) + 1 }
}

impl Reach {
    fn directories(self) -> Range<u64> {
        directories_of(self.first, self.len)
    }

    /// The chunks of a directory that have any of the lists.
    fn chunks(self, directory: u64) -> Range<usize> {
        let place = |list: u64| usize::try_from(list >> CHUNK_BITS).unwrap_or(DIRECTORY);
        let start = directory << REACH_BITS;
        let last = (self.first + self.len.saturating_sub(1)).saturating_sub(start);
        let end = if self.len == 0 { 0 } else { place(last.min((1 << REACH_BITS) - 1)) + 1 };
        place(self.first.saturating_sub(start))..end
    }

    #[inline(always)]
    fn place<'a>(self, directory: u64) -> Option<&'a AtomicPtr<Directory>> {
        let place = usize::try_from(directory.wrapping_sub(self.first >> REACH_BITS)).ok()?;
        // SAFETY: freed with the heads. Whoever asks has these, or the lock under which their window leaves.
        unsafe { self.places.as_ref() }.get(place)
    }
}

impl Directory {
    fn new() -> Result<Box<Self>, OutOfMemory> {
        let chunks = core::array::from_fn(|_| AtomicPtr::new(ptr::null_mut()));
        let windows = core::array::from_fn(|_| AtomicU32::new(0));
        try_box(Self { chunks, windows })
    }

    /// The chunk that has this list.
    #[inline(always)]
    pub(super) fn chunk(&self, list: u64) -> Option<ChunkRef> {
        let chunk = self.place(list).load(Ordering::Acquire);
        // SAFETY: null or made from a chunk, which is there as long as the window through which this was found.
        unsafe { ChunkRef::from_ptr(chunk) }
    }

    #[inline(always)]
    fn place(&self, list: u64) -> &AtomicPtr<Chunk> {
        &self.chunks[(list >> CHUNK_BITS) as usize % DIRECTORY]
    }

    /// Makes this the chunk that has the list, if there is none yet. Returns whether there was none.
    pub(super) fn set_chunk(&self, list: u64, chunk: ChunkRef) -> bool {
        let (none, new) = (ptr::null_mut(), chunk.as_ptr());
        self.place(list).compare_exchange(none, new, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn is_reached(&self) -> bool {
        self.windows.iter().any(|count| count.load(Ordering::Relaxed) > 0)
    }
}

impl Windows {
    /// Where a level's directories with these numbers are in the map.
    fn in_map(&self, at: usize, numbers: Range<u64>) -> Range<usize> {
        let place = |number: u64| self.directories[at].partition_point(|(other, _)| *other < number);
        place(numbers.start)..place(numbers.end)
    }
}

impl Space {
    /// A window comes: its seat. From now on it leads to all that there is.
    pub(super) fn enter(&self, levels: &[Heads; LEVELS.len()]) -> Result<usize, OutOfMemory> {
        let levels = levels.each_ref().map(|heads| heads.0);
        let mut windows = self.windows.lock();
        let windows = &mut *windows;
        let number = match windows.free {
            Some(number) => number,
            None => {
                windows.seats.try_reserve(1).map_err(|_| OutOfMemory)?;
                windows.seats.push(Seat::Free { next: None });
                windows.seats.len() - 1
            }
        };
        if let Seat::Free { next } = core::mem::replace(&mut windows.seats[number], Seat::Taken(levels)) {
            windows.free = next;
        }
        for (at, reach) in levels.into_iter().enumerate() {
            for (number, found) in &windows.directories[at][windows.in_map(at, reach.directories())] {
                found.reach(reach, *number);
            }
        }
        Ok(number)
    }

    /// A window goes: its lists are not used through it any more. Chunks that no other reaches go to the writer.
    pub(super) fn leave(&self, seat: usize) {
        let mut windows = self.windows.lock();
        let windows = &mut *windows;
        let free = Seat::Free { next: windows.free };
        let Some(Seat::Taken(levels)) =
            windows.seats.get_mut(seat).map(|seat| core::mem::replace(seat, free))
        else {
            return;
        };
        windows.free = Some(seat);
        for (at, reach) in levels.into_iter().enumerate() {
            let in_map = windows.in_map(at, reach.directories());
            let mut is_left = false;
            for (number, found) in &windows.directories[at][in_map.clone()] {
                is_left |= self.unreach(found, reach, *number);
            }
            if !is_left {
                continue;
            }
            let mut place = 0;
            windows.directories[at].retain(|(_, found)| {
                let stays = !in_map.contains(&place) || found.get().is_reached();
                place += 1;
                if !stays {
                    self.shared.bytes.fetch_sub(size_of::<Directory>(), Ordering::Relaxed);
                    // SAFETY: made from a box; no window leads to it any more, and this takes it out of the map.
                    drop(unsafe { Box::from_raw(found.0.as_ptr()) });
                }
                stays
            });
        }
    }

    /// A window does not reach its chunks of a directory any more. Whether one was left that nobody reaches.
    fn unreach(&self, found: &Found, reach: Reach, number: u64) -> bool {
        let directory = found.get();
        let mut is_left = false;
        for at in reach.chunks(number) {
            let left = directory.windows[at].load(Ordering::Relaxed).wrapping_sub(1);
            directory.windows[at].store(left, Ordering::Relaxed);
            if left > 0 {
                continue;
            }
            is_left = true;
            let chunk = directory.chunks[at].swap(ptr::null_mut(), Ordering::AcqRel);
            // SAFETY: null or made from a chunk, which is freed after it was pushed.
            if let Some(chunk) = unsafe { ChunkRef::from_ptr(chunk) } {
                // SAFETY: no window leads to it any more, and what is borrowed from a list is borrowed from a window.
                unsafe { self.shared.central.lock().dropped.push(chunk) };
            }
        }
        is_left
    }

    /// Makes the directory that leads to a list, and puts it into all windows that reach into it.
    #[cold]
    pub(super) fn add_directory(&self, level: Level, list: u64) -> Result<(), OutOfMemory> {
        let number = list >> REACH_BITS;
        let at = LEVELS.iter().position(|other| *other == level).ok_or(OutOfMemory)?;
        let mut windows = self.windows.lock();
        let Windows { directories, seats, .. } = &mut *windows;
        let directories = &mut directories[at];
        let Err(place) = directories.binary_search_by_key(&number, |(number, _)| *number) else {
            // Another thread was first.
            return Ok(());
        };
        directories.try_reserve(1).map_err(|_| OutOfMemory)?;
        let found = Found(NonNull::from(Box::leak(Directory::new()?)));
        for seat in seats {
            if let Seat::Taken(levels) = seat {
                if levels[at].directories().contains(&number) {
                    found.reach(levels[at], number);
                }
            }
        }
        directories.insert(place, (number, found));
        self.shared.bytes.fetch_add(size_of::<Directory>(), Ordering::Relaxed);
        Ok(())
    }
}

impl Found {
    fn get(&self) -> &Directory {
        // SAFETY: made from a box, and freed by `leave` only, which has the lock and takes it out of the map.
        unsafe { self.0.as_ref() }
    }

    /// A window reaches into it, and so has it from now on.
    fn reach(&self, reach: Reach, number: u64) {
        for count in &self.get().windows[reach.chunks(number)] {
            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        if let Some(place) = reach.place(number) {
            place.store(self.0.as_ptr(), Ordering::Release);
        }
    }
}
