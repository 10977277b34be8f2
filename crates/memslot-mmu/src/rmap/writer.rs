//! Adding and removing: the one writer.

use alloc::sync::Arc;
use core::iter::FusedIterator;
use core::marker::PhantomData;
use core::num::NonZeroU64;

use super::descriptor::{CELLS, FULL, Head, TAG_BITS};
use super::filed::{Filed, Under};
use super::heads::List;
use super::pool::{At, Pool};
use super::shared::{Cache, Shared};
use super::walk::Entries;
use super::{RmapEntry, RmapError};
use crate::sync::{AtomicU64, Ordering};

/// The one that changes lists. There is one for a reverse map, and whoever has it writes: it belongs into what the lock
/// protects under which shadow pages are changed.
///
/// [`add`](Self::add) and [`remove`](Self::remove) take a bounded number of steps, whatever the length of the list, and
/// never allocate. (Every 32nd descriptor that is taken out looks whether walkers have left, and frees up to 8 chunks of
/// slots that were dropped.)
pub struct Writer<E> {
    pub(super) shared: Arc<Shared>,
    pool: Pool,
    entries: PhantomData<fn(E) -> E>,
}

/// What [`Writer::add`] has done.
#[derive(Debug)]
#[must_use = "an entry without its record cannot be removed"]
pub struct Added {
    /// How many entries the list had *before*.
    pub before: usize,
    /// To be kept with the entry.
    pub filed: Filed,
}

impl<E> Writer<E> {
    pub(super) fn new(shared: Arc<Shared>, births: u32) -> Self {
        Self { shared, pool: Pool::starting_at(births), entries: PhantomData }
    }

    /// What the list is for under which an entry with this record is filed; `None` if the list is gone.
    #[must_use]
    pub fn filed_under(&self, filed: &Filed) -> Option<Under> {
        let (chunk, place) = self.shared.chunk_of(filed.list())?;
        // SAFETY: only the writer frees chunks, through `&mut self`.
        unsafe {
            chunk.head(place)?;
            Some(chunk.header().under(place))
        }
    }

    /// Frees what was dropped and what walkers have left: up to so many chunks of 512 lists. Whether nothing is left to
    /// be freed.
    ///
    /// It goes on by itself, a little with every 32 descriptors that come out of use; to be called after a slot is gone, until
    /// it is done or walkers are inside.
    pub fn reclaim(&mut self, chunks: usize) -> bool {
        let swept = self.pool.sweep(&self.shared, chunks);
        self.pool.turn(&self.shared);
        swept && self.pool.is_settled()
    }
}

impl<E: RmapEntry> Writer<E> {
    /// Files an entry, and says how many there were before.
    ///
    /// Whether the entry is in the list already is not looked at: it would be there twice.
    ///
    /// # Errors
    /// * [`NotReserved`](RmapError::NotReserved): a descriptor is needed, and the cache has none: leave the lock,
    ///   [`reserve`](Cache::reserve) one, and come again.
    /// * [`Entry`](RmapError::Entry): the low bits of the entry are not clear.
    /// * [`Foreign`](RmapError::Foreign): the list or the cache was noticed to be another reverse map's.
    ///
    /// Nothing has changed then.
    ///
    /// ```
    /// # use std::num::NonZeroU64;
    /// # use memslot::{Gfn, GfnRange};
    /// # use memslot_mmu::Level;
    /// # use memslot_mmu::rmap::Rmap;
    /// let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
    /// let slot = rmap.slot(GfnRange::with_len(Gfn::new(0x100), 0x80).unwrap(), Level::K4)?;
    /// let mut cache = rmap.cache();
    /// let entry = |number: u64| NonZeroU64::new(number * 8).unwrap();
    ///
    /// // Before the lock is taken:
    /// cache.reserve(1)?;
    /// let list = slot.reserve(Level::K4, Gfn::new(0x123))?;
    /// // Under the lock:
    /// assert_eq!(writer.add(list, entry(1), &mut cache)?.before, 0);
    /// assert_eq!(writer.add(list, entry(2), &mut cache)?.before, 1);
    /// assert_eq!(list.len(), 2);
    /// # Ok::<(), memslot_mmu::rmap::RmapError>(())
    /// ```
    #[inline]
    pub fn add(&mut self, list: List<'_, E>, entry: E, cache: &mut Cache) -> Result<Added, RmapError> {
        let word = entry.into_word().get();
        if word & TAG_BITS != 0 {
            return Err(RmapError::Entry { entry: word });
        }
        let head = list.head.load(Ordering::Relaxed);
        if head == 0 {
            list.head.store(word, Ordering::Release);
            return Ok(Added { before: 0, filed: Filed::alone(list.number) });
        }
        let (shared, pool) = (&*self.shared, &mut self.pool);
        match Head::new(head) {
            Head::Many { first, count } => {
                let filed = add_to_many(shared, pool, list.number, first, word, cache)?;
                list.head.store(Head::Many { first, count: count + 1 }.word(), Ordering::Release);
                Ok(Added { before: count as usize, filed })
            }
            Head::Empty | Head::One(_) => {
                // The entry that was alone comes into the first cell of the first descriptor: there, `remove` finds it
                // whatever its record says.
                let at = pool.take(shared, cache)?;
                at.fill(1, word);
                at.fill(0, head);
                at.start(list.number, 0, 0b11);
                let links = shared.links(at.index)?;
                links.before.store(at.index, Ordering::Relaxed);
                links.born.store(pool.birth(), Ordering::Relaxed);
                list.head.store(Head::Many { first: at.index, count: 2 }.word(), Ordering::Release);
                Ok(Added { before: 1, filed: Filed::in_cell(list.number, at.index, 1) })
            }
        }
    }

    /// Removes an entry from where it was filed, and says how many are left there.
    ///
    /// # Errors
    /// [`NotFiled`](RmapError::NotFiled): the entry is not where its record says. Nothing has changed; the error names
    /// the entry and what the list is for. That is a mistake of the caller's (a record used twice, or kept beyond its slot, or
    /// of another entry); reverse map and records are still whole, and it is up to the caller how far to trust the guest.
    ///
    /// ```
    /// # use std::num::NonZeroU64;
    /// # use memslot_mmu::rmap::{Filed, Rmap, RmapError};
    /// let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
    /// let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
    /// let entry = NonZeroU64::new(0x7000).unwrap();
    /// let filed = writer.add(parents.list(), entry, &mut cache)?.filed;
    /// let bits = filed.into_bits();
    /// assert_eq!(writer.remove(Filed::from_bits(bits).unwrap(), entry), Ok(0));
    /// let twice = writer.remove(Filed::from_bits(bits).unwrap(), entry).unwrap_err();
    /// assert_eq!(twice.to_string(), "entry 0x7000 is not filed under the parents of a shadow page");
    /// # Ok::<(), RmapError>(())
    /// ```
    #[expect(clippy::needless_pass_by_value, reason = "the record is used up")]
    #[inline]
    pub fn remove(&mut self, filed: Filed, entry: E) -> Result<usize, RmapError> {
        let word = entry.into_word().get();
        let (shared, pool) = (&*self.shared, &mut self.pool);
        let found = shared.chunk_of(filed.list()).and_then(|(chunk, place)| {
            // SAFETY: only the writer frees chunks: not before `sweep`, which looks at no head afterwards.
            unsafe { chunk.head(place) }
        });
        let left = match found.map(|head| (head, Head::new(head.load(Ordering::Relaxed)))) {
            Some((head, Head::One(one))) if one == word => {
                head.store(0, Ordering::Release);
                Some(0)
            }
            Some((head, Head::Many { first, count })) => {
                remove_from_many(shared, pool, head, (first, count), &filed, word)?
            }
            _ => None,
        };
        left.ok_or_else(|| RmapError::NotFiled { entry: word, under: self.filed_under(&filed) })
    }

    /// The entries of a list. Nothing changes while the iterator is there, so it sees exactly what there is.
    ///
    /// To zap a whole list, take the first again and again: each time it is found at once.
    ///
    /// ```
    /// # use std::num::NonZeroU64;
    /// # use memslot_mmu::rmap::{Filed, Rmap};
    /// # let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
    /// # let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
    /// # let list = parents.list();
    /// # let mut records = std::collections::HashMap::new();
    /// # cache.reserve(10)?;
    /// for number in 1..=100 {
    ///     let entry = NonZeroU64::new(number << 3).unwrap();
    ///     records.insert(entry, writer.add(list, entry, &mut cache)?.filed);
    /// }
    /// while let Some(entry) = writer.entries(list).next() {
    ///     // … make the entry itself not present, then:
    ///     writer.remove(records.remove(&entry).unwrap(), entry)?;
    /// }
    /// assert!(list.is_empty());
    /// # Ok::<(), memslot_mmu::rmap::RmapError>(())
    /// ```
    #[inline]
    pub fn entries(&self, list: List<'_, E>) -> Entries<'_, E> {
        Entries::new(&self.shared.descriptors.all, list.head.load(Ordering::Relaxed))
    }

    /// The oldest entries of a list that has more than `limit`, to be zapped: at most 14 at a time, never the one whose record is
    /// `newest`. None if the list is short enough.
    ///
    /// They are still filed. Each is to be made not present, *then* [removed](Self::remove), so that walkers miss
    /// none that is in use. Called after each [`add`](Self::add), it keeps lists, and so walks, short: KVM drops all entries at
    /// 1000; this lets go of the oldest only.
    ///
    /// Age is that of a descriptor: what was filed into the hole that a removed entry had left passes for as old as its
    /// neighbours.
    ///
    /// ```
    /// # use std::num::NonZeroU64;
    /// # use memslot_mmu::rmap::{Filed, Rmap};
    /// # let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
    /// # let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
    /// # let list = parents.list();
    /// # let mut records = std::collections::HashMap::new();
    /// const LIMIT: usize = 1000;
    /// for number in 1..=3000 {
    ///     # cache.reserve(1)?;
    ///     let entry = NonZeroU64::new(number << 3).unwrap();
    ///     let added = writer.add(list, entry, &mut cache)?;
    ///     for old in writer.surplus(list, LIMIT, &added.filed) {
    ///         writer.remove(records.remove(&old).unwrap(), old)?;
    ///     }
    ///     records.insert(entry, added.filed);
    ///     assert!(list.len() <= LIMIT);
    /// }
    /// assert!(writer.entries(list).all(|entry| entry.get() >> 3 > 3000 - 1000));
    /// # Ok::<(), memslot_mmu::rmap::RmapError>(())
    /// ```
    pub fn surplus(&self, list: List<'_, E>, limit: usize, newest: &Filed) -> Surplus<E> {
        let mut surplus = Surplus { words: [0; CELLS], at: 0, entries: PhantomData };
        let Head::Many { first, count } = Head::new(list.head.load(Ordering::Relaxed)) else {
            return surplus;
        };
        if count as usize <= limit {
            return surplus;
        }
        for at in self.by_age(first).into_iter().flatten() {
            let others = (0..CELLS).filter(|&cell| newest.place() != (at.index, cell));
            let entries = others.filter_map(|cell| at.descriptor.entry(cell));
            let count = surplus.words.iter_mut().zip(entries).map(|(word, entry)| *word = entry).count();
            if count > 0 {
                break;
            }
        }
        surplus
    }

    /// The two descriptors that can be the oldest of a list: its first, and its last; the older one first.
    fn by_age(&self, first: u32) -> Option<[At<'_>; 2]> {
        let shared = &*self.shared;
        let links = shared.links(first).ok()?;
        let last = links.before.load(Ordering::Relaxed);
        let [first_born, last_born] =
            [links, shared.links(last).ok()?].map(|links| links.born.load(Ordering::Relaxed));
        let (first, last) = (shared.at(first)?, shared.at(last)?);
        // By their distance, so that a wrap does no harm.
        Some(if first_born.wrapping_sub(last_born) < 1 << 31 { [last, first] } else { [first, last] })
    }
}

impl At<'_> {
    #[inline(always)]
    fn fill(self, cell: usize, word: u64) {
        self.descriptor.cells[cell].store(word, Ordering::Release);
    }

    /// Makes a descriptor ready to be linked.
    fn start(self, list: u32, next: u32, mask: u32) {
        self.descriptor.owner.store(list, Ordering::Relaxed);
        self.descriptor.holes.store(0, Ordering::Relaxed);
        self.descriptor.next.store(next, Ordering::Relaxed);
        self.descriptor.mask.store(mask, Ordering::Release);
    }
}

/// Files an entry in a list that has descriptors; the count is the caller's.
fn add_to_many(
    shared: &Shared,
    pool: &mut Pool,
    list: u32,
    first: u32,
    word: u64,
    cache: &mut Cache,
) -> Result<Filed, RmapError> {
    let first = shared.known(first)?;
    if first.descriptor.owner.load(Ordering::Relaxed) != list {
        return Err(RmapError::Foreign);
    }
    let mut at = first;
    let mut mask = first.descriptor.mask.load(Ordering::Relaxed);
    if mask == 0 {
        shared.links(first.index)?.born.store(pool.birth(), Ordering::Relaxed);
    } else if mask == FULL {
        let with_holes = first.descriptor.holes.load(Ordering::Relaxed);
        if with_holes == 0 {
            return add_descriptor(shared, pool, list, first, word, cache);
        }
        at = shared.known(with_holes)?;
        mask = at.descriptor.mask.load(Ordering::Relaxed);
    }
    let cell = mask.trailing_ones();
    at.fill(cell as usize, word);
    // Only now it can be seen.
    at.descriptor.mask.store(mask | 1 << cell, Ordering::Release);
    if mask | 1 << cell == FULL && at.index != first.index {
        unlink_holes(shared, at)?;
    }
    Ok(Filed::in_cell(list, at.index, cell))
}

/// Files an entry in a new descriptor, behind the first: where no walker on its way through the others passes by.
fn add_descriptor(
    shared: &Shared,
    pool: &mut Pool,
    list: u32,
    first: At<'_>,
    word: u64,
    cache: &mut Cache,
) -> Result<Filed, RmapError> {
    let at = pool.take(shared, cache)?;
    let next = first.descriptor.next.load(Ordering::Relaxed);
    at.fill(0, word);
    at.start(list, next, 1);
    let links = shared.links(at.index)?;
    links.before.store(first.index, Ordering::Relaxed);
    links.born.store(pool.birth(), Ordering::Relaxed);
    // Behind the last one comes the first again.
    let behind = if next == 0 { first.index } else { next };
    shared.links(behind)?.before.store(at.index, Ordering::Relaxed);
    first.descriptor.next.store(at.index, Ordering::Release);
    link_holes(shared, first, at)?;
    Ok(Filed::in_cell(list, at.index, 0))
}

/// Removes an entry from a list that has descriptors, and says how many are left; `None` if it is not there.
fn remove_from_many(
    shared: &Shared,
    pool: &mut Pool,
    head: &AtomicU64,
    (first, count): (u32, u32),
    filed: &Filed,
    word: u64,
) -> Result<Option<usize>, RmapError> {
    let holds = |at: At<'_>, cell| {
        at.descriptor.owner.load(Ordering::Relaxed) == filed.list() && at.descriptor.entry(cell) == Some(word)
    };
    let first = shared.known(first)?;
    let (index, cell) = filed.place();
    let (at, cell) = match shared.at(index) {
        Some(at) if holds(at, cell) => (at, cell),
        // It was alone once, with a record of that time or an older one.
        _ if holds(first, 0) => (first, 0),
        _ => return Ok(None),
    };
    let before = at.descriptor.mask.load(Ordering::Relaxed);
    let mask = before & !(1 << cell);
    at.descriptor.mask.store(mask, Ordering::Release);
    let left = count - 1;
    if left == 1 {
        collapse(shared, pool, head, first);
        return Ok(Some(1));
    }
    head.store(Head::Many { first: first.index, count: left }.word(), Ordering::Release);
    if at.index != first.index {
        if before == FULL {
            link_holes(shared, first, at)?;
        }
        if mask == 0 {
            unlink_holes(shared, at)?;
            unlink(shared, first, at)?;
            pool.take_out(shared, at);
            pool.go_on(shared);
        }
    }
    Ok(Some(left as usize))
}

/// One entry is left: it comes into the head, and the descriptors out. They keep it in its cell, for walkers inside.
#[cold]
fn collapse(shared: &Shared, pool: &mut Pool, head: &AtomicU64, first: At<'_>) {
    let mut at = Some(first);
    while let Some(here) = at {
        let mask = here.descriptor.mask.load(Ordering::Relaxed);
        if let Some(word) = here.descriptor.entry(mask.trailing_zeros() as usize % 32) {
            head.store(word, Ordering::Release);
            break;
        }
        at = shared.at(here.descriptor.next.load(Ordering::Relaxed)).filter(|at| at.index != 0);
    }
    pool.take_out_all(shared, first.index);
    pool.go_on(shared);
}

/// Takes a descriptor other than the first out of the list. Its own `next` stays, for walkers inside.
fn unlink(shared: &Shared, first: At<'_>, at: At<'_>) -> Result<(), RmapError> {
    let before = shared.links(at.index)?.before.load(Ordering::Relaxed);
    let next = at.descriptor.next.load(Ordering::Relaxed);
    shared.known(before)?.descriptor.next.store(next, Ordering::Release);
    let behind = if next == 0 { first.index } else { next };
    shared.links(behind)?.before.store(before, Ordering::Relaxed);
    Ok(())
}

/// A descriptor other than the first has holes now.
fn link_holes(shared: &Shared, first: At<'_>, at: At<'_>) -> Result<(), RmapError> {
    let next = first.descriptor.holes.load(Ordering::Relaxed);
    at.descriptor.holes.store(next, Ordering::Relaxed);
    shared.links(at.index)?.holes_before.store(first.index, Ordering::Relaxed);
    if next != 0 {
        shared.links(next)?.holes_before.store(at.index, Ordering::Relaxed);
    }
    first.descriptor.holes.store(at.index, Ordering::Relaxed);
    Ok(())
}

/// It has none any more, or it is to be taken out.
fn unlink_holes(shared: &Shared, at: At<'_>) -> Result<(), RmapError> {
    let before = shared.links(at.index)?.holes_before.load(Ordering::Relaxed);
    let next = at.descriptor.holes.load(Ordering::Relaxed);
    shared.known(before)?.descriptor.holes.store(next, Ordering::Relaxed);
    if next != 0 {
        shared.links(next)?.holes_before.store(before, Ordering::Relaxed);
    }
    Ok(())
}

/// Up to 14 entries, from [`Writer::surplus`].
#[derive(Debug)]
#[must_use = "a list stays too long until they are zapped and removed"]
pub struct Surplus<E> {
    words: [u64; CELLS],
    at: usize,
    entries: PhantomData<fn(E) -> E>,
}

impl<E: RmapEntry> Iterator for Surplus<E> {
    type Item = E;

    fn next(&mut self) -> Option<E> {
        let word = NonZeroU64::new(*self.words.get(self.at)?)?;
        self.at += 1;
        Some(E::from_word(word))
    }
}

impl<E: RmapEntry> FusedIterator for Surplus<E> {}
