//! The reverse map: from a guest frame, or a shadow page, to every page-table entry that maps it.
//!
//! # Lists
//!
//! A list is one word as long as it has no more than one entry. Two and more are in descriptors of two cache lines,
//! with room for 14 each; when one entry is left, it goes back into the word. [`SlotRmap`] has a list for each gfn and level
//! of a slot, in chunks allocated on first use; [`Parents`] is the list of the entries that lead to a shadow page.
//!
//! ```text
//!  head ─► 0                      empty
//!       ─► entry                  one
//!       ─► count, first ─► [ next mask · entries ] ─► [ newest ] ─► … ─► [ oldest ]
//! ```
//!
//! | who | what | waits | steps |
//! |---|---|---|---|
//! | the [`Writer`] | adds and removes | for nobody | bounded, whatever the length |
//! | any number of [`Walker`]s | walk | for nobody | one for each entry and descriptor |
//! | anybody | [`List::len`] | for nobody | one load |
//!
//! # The protocol
//!
//! **1. An entry does not move.** It stays in its cell from the time it is added to the time it is removed. A cell is empty
//! when its bit in the descriptor's mask is clear; that is all that removing does to it. Adding writes the cell, then sets the bit;
//! holes are filled before a new descriptor is taken, so a list has never more descriptors than its greatest length needed.
//! Packing lists densely, as KVM does, moves the last entry into the hole, and a walker who has passed the hole misses it.
//!
//! **2. The word is the exception, and both ways are safe.** A second entry: the first is copied into cell 0 of a new
//! descriptor, then the head is changed: a walker reads the head before (and sees it there) or after (and sees it in the cell).
//! One entry left: it is written to the head, and *stays in its cell*; the descriptors leave with their contents. A
//! walker that is among them still sees it.
//!
//! **3. New descriptors come in behind the first, old ones leave when they are empty.** Both are one store to a `next`. The
//! first descriptor stays the first, empty or not, as long as there are two entries. A descriptor that leaves keeps its own
//! `next`; behind it, the list only ever loses empty descriptors, so whoever is in it still passes all that was there.
//!
//! From 1 to 3: *a walk sees every entry that is in the list all the while*, since such an entry is in one cell, in a descriptor
//! that the walk comes through; and an entry that it sees was in the list at some moment of the walk, since its bit was
//! set after the walk began.
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
//! list, descriptor and cell, so it is found without a search; it is checked, never trusted. One entry of a list may have a record
//! that is out of date, the one that was alone in the list (2.): it is in cell 0 of the first descriptor, the second place where
//! `remove` looks. A record that matches neither is an [error](RmapError::NotFiled) that names the entry.
//!
//! # What it does not do
//!
//! * It does not know what entries are. Words of another thing than the list is for are its user's mistake.
//! * A sparse list is not packed: 1000 entries of which 72 remain may be in 72 descriptors, all of which a walk passes.
//! * Descriptors are not given back to the system before the whole reverse map is dropped, only used again.
//!
//! # Example
//!
//! ```
//! use std::num::NonZeroU64;
//! use memslot::{Gfn, GfnRange};
//! use memslot_mmu::Level;
//! use memslot_mmu::rmap::{Rmap, Under};
//!
//! let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
//! let slot = rmap.slot(GfnRange::with_len(Gfn::new(0), 0x4_0000).unwrap(), Level::M2)?;
//! let mut cache = rmap.cache();
//!
//! // Where a table's entry is: its address, say.
//! let (a, b) = (NonZeroU64::new(0xffff_8880_1234_5008).unwrap(), NonZeroU64::new(0xffff_8880_6789_a010).unwrap());
//! cache.reserve(1)?;
//! let list = slot.reserve(Level::K4, Gfn::new(0x42))?;
//! let filed_a = writer.add(list, a, &mut cache)?.filed;
//! let filed_b = writer.add(list, b, &mut cache)?.filed;
//!
//! // Another thread, meanwhile:
//! let mut walker = rmap.walker()?;
//! let inside = walker.enter();
//! let list = slot.list(Level::K4, Gfn::new(0x42)).unwrap();
//! assert_eq!(inside.entries(list).collect::<Vec<_>>(), [a, b]);
//! drop(inside);
//!
//! assert_eq!(writer.filed_under(&filed_a), Some(Under::Gfn { gfn: Gfn::new(0x42), level: Level::K4 }));
//! assert_eq!(writer.remove(filed_a, a)?, 1);
//! assert_eq!(writer.remove(filed_b, b)?, 0);
//! # Ok::<(), memslot_mmu::rmap::RmapError>(())
//! ```

mod arena;
mod check;
mod descriptor;
mod filed;
mod heads;
mod pool;
mod shared;
mod slot;
mod walk;
mod writer;

#[cfg(all(test, loom))]
mod loom_tests;

use alloc::sync::Arc;
use core::fmt;
use core::marker::PhantomData;
use core::num::NonZeroU64;

use memslot::{Gfn, GfnRange, OutOfMemory};

pub use self::filed::{Filed, Under};
pub use self::heads::List;
pub use self::shared::Cache;
use self::shared::Shared;
pub use self::slot::{Parents, SlotRmap};
pub use self::walk::{Entries, Inside, Walker};
pub use self::writer::{Added, Surplus, Writer};
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
    shared: Arc<Shared>,
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
        let shared = Arc::new(Shared::starting_at(counters));
        #[expect(clippy::cast_possible_truncation, reason = "a counter that wraps")]
        let writer = Writer::new(shared.clone(), counters as u32);
        Ok((Self { shared, entries: PhantomData }, writer))
    }

    /// The lists of a slot with these frames, for entries of the levels up to `largest`.
    ///
    /// # Errors
    /// [`OutOfMemory`](RmapError::OutOfMemory).
    pub fn slot(&self, gfns: GfnRange, largest: Level) -> Result<SlotRmap<E>, RmapError> {
        SlotRmap::new(self.shared.clone(), gfns, largest)
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
    #[error("the slot {slot} does not have the whole page of {level} at gfn {gfn}")]
    Outside {
        /// A frame of the page.
        gfn: Gfn,
        /// The page's level.
        level: Level,
        /// The slot's frames.
        slot: GfnRange,
    },
    /// The slot was made without lists for this level.
    #[error("the slot has no lists for pages of {level}")]
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
