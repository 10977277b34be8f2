//! The reverse map: from a guest frame, or a shadow page, to every page-table entry that maps it.
//!
//! # Lists
//!
//! A list is one word as long as it has no more than one entry. Two and more are in descriptors of two cache lines,
//! with room for 14 each, all full but the first; when one entry is left, it goes back into the word. [`SlotRmap`] has a list
//! for each gfn and level of a slot, in chunks allocated on first use; [`Parents`] is the list of the entries that lead to a
//! shadow page.
//!
//! ```text
//!  head ─► 0                 empty
//!       ─► entry             one
//!       ─► [ 2 entries ─ ─ ─ ] ─► [ 14 entries ] ─► [ 14 entries ]
//!            ◄── a walk, in each descriptor from the last filled cell to the first ──►
//! ```
//!
//! | who | what | waits | steps |
//! |---|---|---|---|
//! | the [`Writer`] | adds and removes | for nobody | bounded, whatever the length |
//! | any number of [`Walker`]s | walk, count | for nobody | one for each entry and descriptor |
//! | anybody | [`List::is_empty`] | for nobody | one load |
//!
//! # The protocol
//!
//! **1. A list is dense, and entries move forward only.** An entry is added behind the last filled cell of the first
//! descriptor, or in a new descriptor in front. When one is removed, the last entry of the first descriptor moves into the hole: it is
//! first written there, then the first descriptor says that it has one less. Where it was it stays until another comes there, so
//! a walker on its way there sees it there too. A walk begins at that last cell and goes *down* in each descriptor, then
//! to the next, so **whatever moves is where walks begin, and goes to a place that comes later**: a walker either has
//! seen it before, or comes to where it is going. (Walking upwards, as was proposed to KVM in 2013, misses it.) A walker may see
//! it twice.
//!
//! **2. Going into a descriptor, and out of it.** A second entry: both are written into a new descriptor, then the head is
//! changed: a walker reads the head before (and sees the first entry there) or after. One entry left: it is written to the head,
//! and the descriptor leaves *as it is*. A walker that is there still sees it.
//!
//! **3. Descriptors come and go at the front.** One that has become empty leaves, by one store to the head, and keeps
//! its own `next`: a walker that is in it goes on to what follows, all of which was there when it left. At the end they only go, all
//! behind one at once, with all their entries ([`Writer::recycle`]): a walker that is there or on its way there, perhaps from
//! one that left in front, comes to entries that have gone, or to the end; nothing that stays is behind them, and nothing moves there any
//! more. (So it does not matter when a walk loads `next`, before or after the entries beside it.)
//!
//! From 1 to 3: *a walk sees every entry that is in the list all the while*. And an entry that it sees was in the list at some
//! moment of the walk: a walker reads how many cells of a descriptor are filled when it comes there, and in those cells
//! there is from then on only what was there at that moment, or came later.
//!
//! **4. Descriptors are used again when no walker can be in them.** Walkers announce themselves in an epoch (the same
//! scheme as for [tables](crate::nested), 4); descriptors that have left are stamped, in batches, and used again when
//! every walker that was inside then has gone. Nobody waits: what cannot be used yet stays, and the next batch looks
//! again. Whoever frees what the *entries* refer to (the shadow page with its table) has to do likewise: an entry may be seen by a
//! walker that was inside when it was removed.
//!
//! **5. Nothing is allocated in `add`.** Memory is reserved before ([`SlotRmap::reserve`], [`Cache::reserve`]), outside of
//! the lock that the writer is protected by.
//!
//! # Records
//!
//! Removing wants no gfn, level or role, but the record that adding gave: [`Filed`], one word, kept with the entry. An entry
//! cannot be removed from another list than it was added to, whatever the guest did to its tables meanwhile (that is how
//! CVE-2026-46113 and CVE-2026-53359 came about: the gfn was computed a second time, and differently). The record names
//! list, descriptor and cell: nothing is searched, be the list as long as it may. When an entry moves (1.), its list stays the same
//! and [`Records`] are told the new place. (Not when it moves between the word and the first cell of a list's only descriptor: it is
//! looked for in these two places anyway, and its neighbour's coming and going spares its record.) A record is checked, never trusted: one that does not lead to its entry is
//! an [error](RmapError::NotFiled) that names the entry.
//!
//! # What it does not do
//!
//! * It does not know what entries are. Words of another thing than the list is for are its user's mistake.
//! * An entry is meant to be in one list, once; nobody looks whether it is.
//! * Descriptors are not given back to the system before the whole reverse map is dropped, only used again.
//!
//! # Example
//!
//! ```
//! use std::collections::{HashMap, HashSet};
//! use std::num::NonZeroU64;
//! use memslot::{Gfn, GfnRange};
//! use memslot_mmu::Level;
//! use memslot_mmu::rmap::{Filed, Rmap, Under};
//!
//! let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
//! let slot = rmap.slot(GfnRange::with_len(Gfn::new(0), 0x4_0000).unwrap(), Level::M2)?;
//! let mut cache = rmap.cache();
//! let mut records = HashMap::new();
//!
//! // Where a table's entry is: its address, say.
//! let (a, b) = (NonZeroU64::new(0xffff_8880_1234_5008).unwrap(), NonZeroU64::new(0xffff_8880_6789_a010).unwrap());
//! cache.reserve(1)?;
//! let list = slot.reserve(Level::K4, Gfn::new(0x42))?;
//! let mut keep = |entry, filed: Filed| _ = records.insert(entry, filed);
//! writer.add(list, a, &mut cache, &mut keep)?;
//! writer.add(list, b, &mut cache, &mut keep)?;
//!
//! // Another thread, meanwhile:
//! let mut walker = rmap.walker()?;
//! let inside = walker.enter();
//! let list = slot.list(Level::K4, Gfn::new(0x42)).unwrap();
//! assert_eq!(inside.entries(list).collect::<HashSet<_>>(), [a, b].into());
//! drop(inside);
//!
//! // However the guest has changed its tables by now:
//! let filed = records.remove(&a).unwrap();
//! assert_eq!(writer.filed_under(&filed), Some(Under::Gfn { gfn: Gfn::new(0x42), level: Level::K4 }));
//! assert_eq!(writer.remove(filed, a, |entry, filed| _ = records.insert(entry, filed))?, 1);
//! assert_eq!(writer.remove(records.remove(&b).unwrap(), b, |_, _| ())?, 0);
//! # Ok::<(), memslot_mmu::rmap::RmapError>(())
//! ```

mod arena;
mod check;
mod descriptor;
mod filed;
mod heads;
mod parents;
mod pool;
mod shared;
mod slot;
mod space;
mod walk;
mod writer;

#[cfg(all(test, loom))]
mod loom_tests;

use core::fmt;
use core::marker::PhantomData;
use core::num::NonZeroU64;

use memslot::{Gfn, GfnRange, OutOfMemory};

pub use self::filed::{Filed, Records, Under};
pub use self::heads::List;
pub use self::parents::Parents;
pub use self::shared::Cache;
use self::shared::Shared;
pub use self::slot::SlotRmap;
pub(crate) use self::space::LEVELS;
pub use self::space::SpaceRmap;
pub use self::walk::{Entries, Inside, Walker};
pub use self::writer::Writer;
use crate::counted::Counted;
use crate::level::Level;
use crate::sync::Ordering;

/// What a reverse map stores: a word that is not zero and whose low three bits are clear, such as the address of a
/// page-table entry.
pub trait RmapEntry: Copy {
    /// The word.
    fn into_word(self) -> NonZeroU64;
    /// What [`into_word`](Self::into_word) has made this word of.
    fn from_word(word: NonZeroU64) -> Self;
}

impl RmapEntry for NonZeroU64 {
    #[inline(always)]
    fn into_word(self) -> NonZeroU64 {
        self
    }

    #[inline(always)]
    fn from_word(word: NonZeroU64) -> Self {
        word
    }
}

/// The reverse map of one guest: what its lists, caches and walkers come from. A handle; clones are the same one.
pub struct Rmap<E> {
    shared: Counted<Shared>,
    entries: PhantomData<fn(E) -> E>,
}

impl<E> Clone for Rmap<E> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), entries: PhantomData }
    }
}

impl<E: RmapEntry> Rmap<E> {
    /// An empty reverse map, and the one who writes it.
    ///
    /// # Errors
    /// [`OutOfMemory`](RmapError::OutOfMemory).
    pub fn new() -> Result<(Self, Writer<E>), RmapError> {
        Self::starting_at(0)
    }

    /// As [`new`](Self::new), with all counters at a value of the caller's choice, so that tests go through the wrap.
    #[doc(hidden)]
    pub fn starting_at(counters: u64) -> Result<(Self, Writer<E>), RmapError> {
        let shared = Counted::new(Shared::starting_at(counters))?;
        let writer = Writer::new(shared.clone());
        Ok((Self { shared, entries: PhantomData }, writer))
    }

    /// The lists of an address space, for its slots to have.
    ///
    /// # Errors
    /// [`OutOfMemory`](RmapError::OutOfMemory).
    pub fn space(&self) -> Result<SpaceRmap<E>, RmapError> {
        Ok(SpaceRmap::new(self.shared.clone())?)
    }

    /// The lists of a slot with these frames, for entries of the levels up to `largest`: one that has its lists for itself, for users whose
    /// slots do not take the place of each other. Else it is one of a [space](Self::space).
    ///
    /// # Errors
    /// [`OutOfMemory`](RmapError::OutOfMemory); [`Level`](RmapError::Level) for more than 1 GiB.
    pub fn slot(&self, gfns: GfnRange, largest: Level) -> Result<SlotRmap<E>, RmapError> {
        self.space()?.slot(gfns, largest)
    }

    /// The list of a shadow page's parents.
    ///
    /// # Errors
    /// [`OutOfMemory`](RmapError::OutOfMemory).
    pub fn parents(&self) -> Result<Parents<E>, RmapError> {
        Ok(Parents::new(self.shared.clone())?)
    }

    /// An empty cache, for a thread that adds.
    #[must_use]
    pub fn cache(&self) -> Cache {
        Cache::new(self.shared.clone())
    }

    /// A walker, for a thread that walks.
    ///
    /// # Errors
    /// [`OutOfMemory`](RmapError::OutOfMemory).
    pub fn walker(&self) -> Result<Walker<E>, RmapError> {
        let cell = self.shared.central.lock().cells.add()?;
        Ok(Walker::new(self.shared.clone(), cell))
    }

    /// How many bytes descriptors, chunks and directories take, those that are free at the moment included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shared.bytes.load(Ordering::Relaxed)
    }
}

/// Why something was not done; nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RmapError {
    /// No memory, outside of every lock.
    #[error("out of memory for the reverse map")]
    OutOfMemory,
    /// The cache is empty, and a descriptor is needed: reserve one first.
    #[error("no descriptor is reserved")]
    NotReserved,
    /// A word whose low bits are not clear.
    #[error("entry {entry:#x} cannot be filed: its low three bits are not clear")]
    Entry {
        /// The word.
        entry: u64,
    },
    /// The entry is not where its record says.
    #[error("entry {entry:#x} is not filed under {}", Named(*.under))]
    NotFiled {
        /// The entry's word.
        entry: u64,
        /// What the list is for that the record names; `None` if there is no such list any more.
        under: Option<Under>,
    },
    /// The slot does not have all frames of such a page.
    #[error(
        "slot {slot} has no list for a page of {level} at gfn {gfn}: it is not all in the slot, or larger than its pages"
    )]
    Outside {
        /// A frame of the page.
        gfn: Gfn,
        /// The page's level.
        level: Level,
        /// The slot's frames.
        slot: GfnRange,
    },
    /// There are lists up to 1 GiB.
    #[error("there are no pages of {level}")]
    Level {
        /// The level.
        level: Level,
    },
    /// A list or a cache of another reverse map.
    #[error("the list or the cache is another reverse map's")]
    Foreign,
}

impl From<OutOfMemory> for RmapError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// For messages.
struct Named(Option<Under>);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(under) => under.fmt(f),
            None => f.write_str("a list that is gone"),
        }
    }
}
