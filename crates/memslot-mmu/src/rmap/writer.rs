//! Adding and removing: the one writer.

use alloc::sync::Arc;
use core::iter::FusedIterator;
use core::marker::PhantomData;
use core::num::NonZeroU64;

use super::descriptor::{CELLS, Descriptor, Head, Next, TAG_BITS};
use super::filed::{Filed, Records, Under};
use super::heads::List;
use super::pool::Pool;
use super::shared::{Cache, Shared};
use super::walk::Entries;
use super::{RmapEntry, RmapError};
use crate::sync::{AtomicU64, Ordering};

/// The one that changes lists. There is one for a reverse map, and whoever has it writes: it belongs into what the lock
/// protects under which shadow pages are changed.
///
/// [`add`](Self::add) and [`remove`](Self::remove) take a bounded number of steps, whatever the length of the list, and
/// never allocate. (With every 64th descriptor that comes out of use they look whether walkers have left, and free up to 8 chunks
/// of slots that were dropped.)
pub struct Writer<E> {
    pub(super) shared: Arc<Shared>,
    pool: Pool,
    entries: PhantomData<fn(E) -> E>,
}

/// Where an entry was found.
pub(super) struct Found<'a> {
    head: &'a AtomicU64,
    /// The list's first descriptor, then the entry's own and its cell there; `None` where the entry is in the head.
    place: Option<(&'a Descriptor, &'a Descriptor, usize)>,
}

impl<E> Writer<E> {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, pool: Pool::new(), entries: PhantomData }
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
        self.pool.turn(&self.shared, 2);
        swept && self.pool.is_settled()
    }

    /// Where an entry is, by its record; `None` if it is not there.
    #[inline(always)]
    pub(super) fn find(&self, filed: &Filed, word: u64) -> Option<Found<'_>> {
        find(&self.shared, filed, word)
    }
}

/// See [`Writer::find`]. For the writer.
#[inline(always)]
fn find<'a>(shared: &'a Shared, filed: &Filed, word: u64) -> Option<Found<'a>> {
    let (chunk, place) = shared.chunk_of(filed.list())?;
    // SAFETY: only the writer frees chunks, and uses nothing of what was found then.
    let head = unsafe { chunk.head(place) }?;
    // SAFETY: a head of this reverse map.
    match unsafe { Head::new(head.load(Ordering::Relaxed)) } {
        Head::One(one) if one == word => Some(Found { head, place: None }),
        Head::Many(first) => {
            // A record may be out of date or made up. What it leads to is checked, not trusted.
            let (index, cell) = filed.place();
            let descriptor = shared.descriptors.all.get(index)?;
            let owner = shared.descriptors.sides.get(index)?.owner.load(Ordering::Relaxed);
            let there = descriptor.cells.get(cell)?.load(Ordering::Relaxed);
            let filled = cell < descriptor.next().filled();
            if owner == filed.list() && there == word && filled {
                Some(Found { head, place: Some((first, descriptor, cell)) })
            } else {
                None
            }
        }
        _ => None,
    }
}

/// A word of a list as its entry.
#[inline(always)]
fn keep<E: RmapEntry>(records: &mut impl Records<E>, word: u64, filed: Filed) {
    if let Some(word) = NonZeroU64::new(word) {
        records.keep(E::from_word(word), filed);
    }
}

impl<E: RmapEntry> Writer<E> {
    /// Files an entry, and says how many there were before.
    ///
    /// Its record is given to `records`, and if the list had one entry before, that entry's new one, too. Whether the entry is
    /// in the list already is not looked at: it would be there twice.
    ///
    /// # Errors
    /// * [`NotReserved`](RmapError::NotReserved): a descriptor is needed, and the cache has none: leave the lock,
    ///   [`reserve`](Cache::reserve) one, and come again.
    /// * [`Entry`](RmapError::Entry): the low bits of the entry are not clear.
    /// * [`Foreign`](RmapError::Foreign): the list or the cache is another reverse map's.
    ///
    /// Nothing has changed then.
    ///
    /// ```
    /// # use std::{collections::HashMap, num::NonZeroU64};
    /// # use memslot::{Gfn, GfnRange};
    /// # use memslot_mmu::Level;
    /// # use memslot_mmu::rmap::{Filed, Rmap};
    /// let (rmap, mut writer) = Rmap::<NonZeroU64>::new();
    /// let slot = rmap.slot(GfnRange::with_len(Gfn::new(0x100), 0x80).unwrap(), Level::K4)?;
    /// let mut cache = rmap.cache();
    /// let mut records = HashMap::new();
    /// let entry = |number: u64| NonZeroU64::new(number * 8).unwrap();
    ///
    /// // Before the lock is taken:
    /// cache.reserve(1)?;
    /// let list = slot.reserve(Level::K4, Gfn::new(0x123))?;
    /// // Under the lock:
    /// let mut keep = |entry, filed: Filed| _ = records.insert(entry, filed);
    /// assert_eq!(writer.add(list, entry(1), &mut cache, &mut keep)?, 0);
    /// assert_eq!(writer.add(list, entry(2), &mut cache, &mut keep)?, 1);
    /// assert_eq!(writer.count(list), 2);
    /// # Ok::<(), memslot_mmu::rmap::RmapError>(())
    /// ```
    #[inline(always)]
    pub fn add(
        &mut self,
        list: List<'_, E>,
        entry: E,
        cache: &mut Cache,
        mut records: impl Records<E>,
    ) -> Result<usize, RmapError> {
        let word = entry.into_word().get();
        if word & TAG_BITS != 0 {
            return Err(RmapError::Entry { entry: word });
        }
        let (number, home) = list.number_and_home();
        if home != self.shared.identity() {
            return Err(RmapError::Foreign);
        }
        if list.head.load(Ordering::Relaxed) == 0 {
            list.head.store(word, Ordering::Release);
            records.keep(entry, Filed::alone(number));
            return Ok(0);
        }
        self.add_beside(list, (entry, word), number, cache, &mut records)
    }

    /// As [`add`](Self::add), to a list that is not empty.
    fn add_beside(
        &mut self,
        list: List<'_, E>,
        (entry, word): (E, u64),
        number: u32,
        cache: &mut Cache,
        records: &mut impl Records<E>,
    ) -> Result<usize, RmapError> {
        let (shared, pool) = (&*self.shared, &mut self.pool);
        // SAFETY: a head of this reverse map.
        match unsafe { Head::new(list.head.load(Ordering::Relaxed)) } {
            Head::Many(first) => {
                let (next, behind) = (first.next(), first.behind.load(Ordering::Relaxed));
                let (filled, before) = (next.filled(), behind as usize + next.filled());
                let filed = if filled < CELLS {
                    first.set(filled, word);
                    // Only now it can be seen.
                    first.set_next(next.with_filled(filled + 1));
                    Filed::in_cell(number, first.index.load(Ordering::Relaxed), filled)
                } else {
                    let index = put_in_front(shared, pool, (list.head, number), first, word, cache)?;
                    Filed::in_cell(number, index, 0)
                };
                records.keep(entry, filed);
                Ok(before)
            }
            Head::One(one) => {
                let index = make_two(shared, pool, (list.head, number), [one, word], cache)?;
                keep(records, one, Filed::in_cell(number, index, 0));
                records.keep(entry, Filed::in_cell(number, index, 1));
                Ok(1)
            }
            Head::Empty => Ok(0),
        }
    }

    /// Removes an entry from where it was filed, and says how many are left there.
    ///
    /// If another entry moves into its place, `records` is given that entry's new record.
    ///
    /// # Errors
    /// [`NotFiled`](RmapError::NotFiled): the entry is not where its record says. Nothing has changed; the error names
    /// the entry and what the list is for. That is a mistake of the caller's (a record used twice, or kept beyond its slot, or
    /// of another entry, or one that was not [kept](Records::keep)); lists are still whole.
    ///
    /// ```
    /// # use std::num::NonZeroU64;
    /// # use memslot_mmu::rmap::{Filed, Rmap, RmapError};
    /// let (rmap, mut writer) = Rmap::<NonZeroU64>::new();
    /// let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
    /// let entry = NonZeroU64::new(0x7000).unwrap();
    /// let mut record = 0;
    /// writer.add(parents.list(), entry, &mut cache, |_, filed: Filed| record = filed.into_bits())?;
    /// assert_eq!(writer.remove(Filed::from_bits(record).unwrap(), entry, |_, _| ()), Ok(0));
    /// let twice = writer.remove(Filed::from_bits(record).unwrap(), entry, |_, _| ()).unwrap_err();
    /// assert_eq!(twice.to_string(), "entry 0x7000 is not filed under the parents of a shadow page");
    /// # Ok::<(), RmapError>(())
    /// ```
    #[expect(clippy::needless_pass_by_value, reason = "the record is used up")]
    #[inline]
    pub fn remove(
        &mut self,
        filed: Filed,
        entry: E,
        mut records: impl Records<E>,
    ) -> Result<usize, RmapError> {
        let word = entry.into_word().get();
        let (shared, pool) = (&*self.shared, &mut self.pool);
        let Some(found) = find(shared, &filed, word) else {
            return Err(RmapError::NotFiled { entry: word, under: self.filed_under(&filed) });
        };
        let Some((first, at, cell)) = found.place else {
            found.head.store(0, Ordering::Release);
            return Ok(0);
        };
        let (next, behind) = (first.next(), first.behind.load(Ordering::Relaxed) as usize);
        let last = next.filled() - 1;
        let left = behind + last;
        if left == 1 {
            // The descriptor leaves as it is, with both entries: walkers that are there go on to see them.
            let one = first.cells[usize::from(cell == 0)].load(Ordering::Relaxed);
            keep(&mut records, one, Filed::alone(filed.list()));
            found.head.store(one, Ordering::Release);
            pool.take_out(shared, first);
            return Ok(1);
        }
        // The last entry of the first descriptor, where walks begin, moves into the hole, which is still before them.
        let moved = first.cells[last].load(Ordering::Relaxed);
        if moved != word {
            at.set(cell, moved);
            keep(&mut records, moved, Filed::in_cell(filed.list(), at.index.load(Ordering::Relaxed), cell));
        }
        first.set(last, 0);
        first.set_next(next.with_filled(last));
        if last == 0 {
            take_front(shared, pool, found.head, first);
        }
        Ok(left)
    }

    /// The entries of a list. Nothing changes while the iterator is there, so it sees exactly what there is.
    ///
    /// To zap a whole list, take the first again and again: each time it is found at once.
    ///
    /// ```
    /// # use std::{cell::RefCell, collections::HashMap, num::NonZeroU64};
    /// # use memslot_mmu::rmap::{Filed, Rmap};
    /// # let (rmap, mut writer) = Rmap::<NonZeroU64>::new();
    /// # let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
    /// # let list = parents.list();
    /// # let records = RefCell::new(HashMap::new());
    /// # let keep = |entry, filed: Filed| _ = records.borrow_mut().insert(entry, filed);
    /// # let take = |entry: &NonZeroU64| records.borrow_mut().remove(entry).unwrap();
    /// # cache.reserve(10)?;
    /// for number in 1..=100 {
    ///     writer.add(list, NonZeroU64::new(number << 3).unwrap(), &mut cache, keep)?;
    /// }
    /// while let Some(entry) = writer.entries(list).next() {
    ///     // … make the entry itself not present, then:
    ///     writer.remove(take(&entry), entry, keep)?;
    /// }
    /// assert!(list.is_empty());
    /// # Ok::<(), memslot_mmu::rmap::RmapError>(())
    /// ```
    #[inline]
    pub fn entries<'s>(&'s self, list: List<'s, E>) -> Entries<'s, E> {
        Entries::new(list)
    }

    /// How many entries a list has: two loads, whatever its length.
    #[inline]
    #[must_use]
    pub fn count(&self, list: List<'_, E>) -> usize {
        // SAFETY: the writer.
        unsafe { list.count() }
    }

    /// The oldest entries of a list that has more than `limit`, to be zapped: at most 14 at a time, never `newest`. None if
    /// the list is short enough.
    ///
    /// They are still filed. Each is to be made not present, *then* [removed](Self::remove), so that walkers miss
    /// none that is in use. Called after each [`add`](Self::add), it keeps lists, and so walks, short: KVM drops all entries at
    /// 1000; this lets go of the oldest only.
    ///
    /// Descriptors are handed back in turns, so age is that of a descriptor: where entries were removed otherwise,
    /// those that moved into the holes pass for as old as their neighbours.
    ///
    /// ```
    /// # use std::{cell::RefCell, collections::HashMap, num::NonZeroU64};
    /// # use memslot_mmu::rmap::{Filed, Rmap};
    /// # let (rmap, mut writer) = Rmap::<NonZeroU64>::new();
    /// # let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
    /// # let list = parents.list();
    /// # let records = RefCell::new(HashMap::new());
    /// # let keep = |entry, filed: Filed| _ = records.borrow_mut().insert(entry, filed);
    /// # let take = |entry: &NonZeroU64| records.borrow_mut().remove(entry).unwrap();
    /// const LIMIT: usize = 1000;
    /// for number in 1..=3000 {
    ///     # cache.reserve(1)?;
    ///     let entry = NonZeroU64::new(number << 3).unwrap();
    ///     writer.add(list, entry, &mut cache, keep)?;
    ///     for old in writer.surplus(list, LIMIT, entry) {
    ///         // … make it not present, then:
    ///         writer.remove(take(&old), old, keep)?;
    ///     }
    ///     assert!(writer.count(list) <= LIMIT);
    /// }
    /// // Those that are left are the youngest, give or take a few descriptors.
    /// assert!(writer.entries(list).all(|entry| entry.get() >> 3 > 3000 - 1000 - 3 * 14));
    /// # Ok::<(), memslot_mmu::rmap::RmapError>(())
    /// ```
    pub fn surplus(&mut self, list: List<'_, E>, limit: usize, newest: E) -> Surplus<E> {
        let mut surplus = Surplus { words: [0; CELLS], at: 0, entries: PhantomData };
        // SAFETY: the list's own head.
        let Head::Many(first) = (unsafe { Head::new(list.head.load(Ordering::Relaxed)) }) else {
            return surplus;
        };
        if first.count() <= limit {
            return surplus;
        }
        // The first is the youngest: it has no turn, unless there is no other.
        let behind = first.behind.load(Ordering::Relaxed) as usize / CELLS;
        let (mut at, mut cells) = (first, first.next().filled());
        if let Some(side) = self.shared.descriptors.sides.get(first.index.load(Ordering::Relaxed)) {
            let turn = side.turn.load(Ordering::Relaxed);
            let turn = if turn as usize >= behind { 0 } else { turn };
            side.turn.store(turn + 1, Ordering::Relaxed);
            for _ in turn as usize..behind {
                // SAFETY: read from a descriptor of the list.
                at = unsafe { at.next().descriptor() }.unwrap_or(at);
            }
            // Behind the first, the upper cells are as young: that many have come since the last turn, in both together.
            cells = if turn as usize + 1 == behind { cells } else { at.next().filled() };
        }
        let newest = newest.into_word().get();
        let old = at.cells[..cells].iter().map(|cell| cell.load(Ordering::Relaxed));
        surplus
            .words
            .iter_mut()
            .zip(old.filter(|&word| word != newest))
            .for_each(|(place, word)| *place = word);
        surplus
    }
}

/// A second entry: both come into a descriptor, whose number is the result.
#[inline(never)]
fn make_two(
    shared: &Shared,
    pool: &mut Pool,
    (head, number): (&AtomicU64, u32),
    words: [u64; 2],
    cache: &mut Cache,
) -> Result<u32, RmapError> {
    let (first, side) = pool.take(shared, cache)?;
    first.set(0, words[0]);
    first.set(1, words[1]);
    first.behind.store(0, Ordering::Relaxed);
    first.set_next(Next::new(None, 2));
    side.owner.store(number, Ordering::Relaxed);
    side.turn.store(0, Ordering::Relaxed);
    head.store(Head::to(first), Ordering::Release);
    Ok(first.index.load(Ordering::Relaxed))
}

/// The first descriptor is full: the entry comes into another in front of it.
#[inline(never)]
fn put_in_front(
    shared: &Shared,
    pool: &mut Pool,
    (head, number): (&AtomicU64, u32),
    first: &Descriptor,
    word: u64,
    cache: &mut Cache,
) -> Result<u32, RmapError> {
    let (front, side) = pool.take(shared, cache)?;
    front.set(0, word);
    #[expect(clippy::cast_possible_truncation, reason = "that many entries have no place in memory")]
    front.behind.store(first.count() as u32, Ordering::Relaxed);
    front.set_next(Next::new(Some(first), 1));
    side.owner.store(number, Ordering::Relaxed);
    side.turn.store(turn_of(shared, first), Ordering::Relaxed);
    head.store(Head::to(front), Ordering::Release);
    Ok(front.index.load(Ordering::Relaxed))
}

/// The first descriptor is empty: the next becomes the first. Its own `next` stays, for walkers that are in it.
#[inline(never)]
fn take_front(shared: &Shared, pool: &mut Pool, head: &AtomicU64, first: &Descriptor) {
    // SAFETY: read from a descriptor of the list.
    let Some(next) = (unsafe { first.next().descriptor() }) else { return };
    if let Some(side) = shared.descriptors.sides.get(next.index.load(Ordering::Relaxed)) {
        side.turn.store(turn_of(shared, first), Ordering::Relaxed);
    }
    head.store(Head::to(next), Ordering::Release);
    pool.take_out(shared, first);
}

fn turn_of(shared: &Shared, first: &Descriptor) -> u32 {
    let side = shared.descriptors.sides.get(first.index.load(Ordering::Relaxed));
    side.map_or(0, |side| side.turn.load(Ordering::Relaxed))
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
