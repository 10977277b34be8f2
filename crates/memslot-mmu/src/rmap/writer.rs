//! Adding and removing: the one writer.

use core::marker::PhantomData;
use core::num::NonZeroU64;

use super::descriptor::{CELLS, Descriptor, Head, Place, TAG_BITS, flag};
use super::filed::{Filed, Records, Under};
use super::heads::List;
use super::pool::Pool;
use super::shared::{Cache, Shared};
use super::walk::Entries;
use super::{RmapEntry, RmapError};
use crate::counted::Counted;
use crate::sync::{AtomicU64, Ordering};

/// The one that changes lists. There is one for a reverse map, and whoever has it writes: it belongs into what the lock
/// protects under which shadow pages are changed.
///
/// [`add`](Self::add) and [`remove`](Self::remove) take a bounded number of steps, whatever the length of the list, and
/// never allocate. (With every 64th descriptor that comes out of use they look whether walkers have left, and free up to 8 chunks
/// of slots that were dropped.)
pub struct Writer<E> {
    pub(super) shared: Counted<Shared>,
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
    pub(super) fn new(shared: Counted<Shared>) -> Self {
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
            // A record may be out of date or made up. What it leads to is checked, not trusted. In the first cell of the first
            // descriptor an entry is found whatever its record says. (Its record may not have been told, and for the
            // processor, to look is cheaper than to ask for the flag.)
            let (record, front) = (filed.place(), first.place());
            let is_oldest = first.cells[0].load(Ordering::Relaxed) == word;
            let cell = if is_oldest { 0 } else { record.cell() };
            let is_in_front = is_oldest || record.index() == front.index();
            let at = if is_in_front { first } else { covered(shared, filed)? };
            let there = at.cells.get(cell)?.load(Ordering::Relaxed);
            if there != word || is_in_front && cell >= front.cell() {
                return None;
            }
            Some(Found { head, place: Some((first, at, cell)) })
        }
        _ => None,
    }
}

/// The descriptor that a record leads to, if it is in the record's list behind the first.
#[inline(always)]
fn covered<'a>(shared: &'a Shared, filed: &Filed) -> Option<&'a Descriptor> {
    let at = shared.descriptors.all.get(filed.place().index())?;
    if at.is_covered_in(filed.list()) { Some(at) } else { None }
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
    /// Its record is given to `records`; so is that of the oldest of 14, when a 15th comes. Whether the entry is in the list
    /// already is not looked at: it would be there twice.
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
    /// let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
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
        // SAFETY: a head of this reverse map.
        match unsafe { Head::new(list.head.load(Ordering::Relaxed)) } {
            Head::Empty => {
                list.head.store(word, Ordering::Release);
                records.keep(entry, Filed::new(number, Place::ALONE));
                Ok(0)
            }
            Head::One(one) => {
                let place = make_two(&self.shared, &mut self.pool, list.head, [one, word], cache)?;
                records.keep(entry, Filed::new(number, place));
                Ok(1)
            }
            Head::Many(first) => {
                let (place, total) = (first.place(), first.total());
                if place.cell() < CELLS {
                    first.set(place.cell(), word);
                    // Only now it can be seen.
                    first.set_filled(Place(place.0 + 1), total + 1);
                    records.keep(entry, Filed::new(number, place));
                } else {
                    let (shared, pool) = (&*self.shared, &mut self.pool);
                    let place = put_in_front(shared, pool, (list.head, number), first, word, cache)?;
                    if first.flags() & flag::UNTOLD != 0 {
                        first.set_flags(0);
                        let oldest = first.cells[0].load(Ordering::Relaxed);
                        keep(&mut records, oldest, Filed::new(number, first.place().with_cell(0)));
                    }
                    records.keep(entry, Filed::new(number, place));
                }
                Ok(total as usize)
            }
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
    /// let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
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
        let (place, left) = (first.place(), first.total() - 1);
        if left == 1 {
            // The descriptor leaves as it is, with both entries: walkers that are there go on to see them. The one that is
            // left is found by its list from now on, whatever its record says of the place.
            let one = first.cells[usize::from(cell == 0)].load(Ordering::Relaxed);
            found.head.store(one, Ordering::Release);
            pool.take_out(shared, place.index());
            return Ok(1);
        }
        // The last entry of the first descriptor, where walks begin, moves into the hole, which is still before them.
        let last = Place(place.0 - 1);
        let moved = first.cells[last.cell()].load(Ordering::Relaxed);
        if moved != word {
            at.set(cell, moved);
            keep(&mut records, moved, Filed::new(filed.list(), at.place().with_cell(cell)));
            if cell == 0 && at.flags() & flag::UNTOLD != 0 {
                at.set_flags(at.flags() & !flag::UNTOLD);
            }
        }
        // Where it was, it stays: walkers that are on their way there see it there, too.
        first.set_filled(last, left);
        if last.cell() == 0 {
            take_front(shared, pool, found.head, first, left);
        }
        Ok(left as usize)
    }

    /// The entries of a list. Nothing changes while the iterator is there, so it sees exactly what there is.
    ///
    /// To zap a whole list, take the first again and again: each time it is found at once.
    ///
    /// ```
    /// # use std::{cell::RefCell, collections::HashMap, num::NonZeroU64};
    /// # use memslot_mmu::rmap::{Filed, Rmap};
    /// # let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
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
        // SAFETY: the list's own head.
        unsafe { Head::count(list.head.load(Ordering::Relaxed)) }
    }

    /// Lets the oldest entries of a list go that has more than `limit`: an eighth of them, or 14 if that is more (and up to 112), never
    /// `newest`. How many went, which is 0 only if the list is short enough, or has none but the newest.
    ///
    /// Each is given to `zap`, which makes it not present and forgets its record; then they are removed, all at
    /// once. Called after each [`add`](Self::add), it keeps lists, and so walks, short: KVM drops all entries at 1000; this lets
    /// go of the oldest only.
    ///
    /// Age is that of a descriptor: where entries were removed otherwise, those that moved into the holes pass for as
    /// old as their neighbours. (If `newest` is such a one, younger ones may go.)
    ///
    /// ```
    /// # use std::{collections::HashMap, num::NonZeroU64};
    /// # use memslot_mmu::rmap::{Filed, Rmap};
    /// # let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
    /// # let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
    /// # let list = parents.list();
    /// # let mut records = HashMap::new();
    /// const LIMIT: usize = 1000;
    /// for number in 1..=3000 {
    ///     # cache.reserve(1)?;
    ///     let entry = NonZeroU64::new(number << 3).unwrap();
    ///     writer.add(list, entry, &mut cache, |entry, filed: Filed| _ = records.insert(entry, filed))?;
    ///     writer.recycle(list, LIMIT, entry, |old| {
    ///         // … make it not present, and:
    ///         records.remove(&old);
    ///     });
    ///     assert!(writer.count(list) <= LIMIT);
    /// }
    /// // Those that are left are the youngest.
    /// assert!(writer.entries(list).all(|entry| entry.get() >> 3 > 3000 - 1000));
    /// # Ok::<(), memslot_mmu::rmap::RmapError>(())
    /// ```
    pub fn recycle(&mut self, list: List<'_, E>, limit: usize, newest: E, mut zap: impl FnMut(E)) -> usize {
        let (shared, pool) = (&*self.shared, &mut self.pool);
        let newest = newest.into_word().get();
        // SAFETY: the list's own head.
        let Head::Many(first) = (unsafe { Head::new(list.head.load(Ordering::Relaxed)) }) else { return 0 };
        let total = first.total() as usize;
        if total <= limit {
            return 0;
        }
        let behind = (total - first.place().cell()) / CELLS;
        // After this one they go, or after that with the newest.
        let mut last = first;
        for _ in 0..behind.saturating_sub((behind / 8).clamp(1, 8)) {
            // SAFETY: a descriptor of the list.
            last = unsafe { last.next() }.unwrap_or(last);
        }
        // SAFETY: descriptors of the list.
        let after =
            |last: &Descriptor| core::iter::successors(unsafe { last.next() }, |at| unsafe { at.next() });
        let has_newest =
            |at: &&Descriptor| at.cells.iter().any(|cell| cell.load(Ordering::Relaxed) == newest);
        last = after(last).filter(has_newest).last().unwrap_or(last);
        let mut gone = after(last).map(|at| zap_all(at, newest, &mut zap)).sum::<usize>();
        let left;
        if gone > 0 {
            let old = after(last);
            last.end();
            left = total - gone;
            for at in old {
                at.leave();
                pool.take_out(shared, at.place().index());
            }
            first.set_filled(first.place(), count(left));
        } else {
            gone = zap_all(first, newest, &mut zap);
            left = total - gone;
            if behind > 0 {
                take_front(shared, pool, list.head, first, count(left));
                return gone;
            }
        }
        if left <= 1 {
            // It leaves as it is, and the one entry goes into the head.
            let mut one = first.cells[..first.place().cell()].iter().map(|cell| cell.load(Ordering::Relaxed));
            let one =
                if gone + 1 == total && behind == 0 { one.find(|&word| word == newest) } else { one.next() };
            list.head.store(if left == 0 { 0 } else { one.unwrap_or(0) }, Ordering::Release);
            pool.take_out(shared, first.place().index());
        }
        gone
    }
}

/// Zaps the entries of a descriptor, all but the newest; how many.
#[inline]
fn zap_all<E: RmapEntry>(at: &Descriptor, newest: u64, zap: &mut impl FnMut(E)) -> usize {
    let words = at.cells[..at.place().cell()].iter().map(|cell| cell.load(Ordering::Relaxed));
    words
        .filter_map(NonZeroU64::new)
        .filter(|word| word.get() != newest)
        .map(|word| zap(E::from_word(word)))
        .count()
}

/// A number of entries, of which no more than 31 bits can be filed.
fn count(entries: usize) -> u32 {
    u32::try_from(entries).unwrap_or(u32::MAX)
}

/// A second entry: both come into a descriptor; the result is where the second is.
///
/// The record of the first is not told. It is found all the same, as long as this is the list's only descriptor and it
/// is in the first cell.
#[inline]
fn make_two(
    shared: &Shared,
    pool: &mut Pool,
    head: &AtomicU64,
    words: [u64; 2],
    cache: &mut Cache,
) -> Result<Place, RmapError> {
    let (first, index) = pool.take(shared, cache)?;
    first.set(0, words[0]);
    first.set(1, words[1]);
    first.begin(None, flag::UNTOLD, 2, Place::new(index, 2));
    head.store(Head::to(first), Ordering::Release);
    Ok(Place::new(index, 1))
}

/// The first descriptor is full: the entry comes into another in front of it.
///
/// Not inlined: one of 14 additions comes here, and the others are quicker without it.
#[inline(never)]
fn put_in_front(
    shared: &Shared,
    pool: &mut Pool,
    (head, number): (&AtomicU64, u32),
    first: &Descriptor,
    word: u64,
    cache: &mut Cache,
) -> Result<Place, RmapError> {
    let (front, index) = pool.take(shared, cache)?;
    front.set(0, word);
    front.begin(Some(first), 0, first.total() + 1, Place::new(index, 1));
    head.store(Head::to(front), Ordering::Release);
    first.cover(number);
    Ok(Place::new(index, 0))
}

/// The first descriptor is empty: the next becomes the first. Its own `next` stays, for walkers that are in it. (Not inlined, as above.)
#[inline(never)]
fn take_front(shared: &Shared, pool: &mut Pool, head: &AtomicU64, first: &Descriptor, left: u32) {
    // SAFETY: a descriptor of the list.
    let Some(next) = (unsafe { first.next() }) else { return };
    next.uncover(left);
    head.store(Head::to(next), Ordering::Release);
    pool.take_out(shared, first.place().index());
}
