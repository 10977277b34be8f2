//! What must hold between any two changes, written down a second time.

use core::ptr;

use super::descriptor::{CELLS, Descriptor, Head, Place, flag};
use super::filed::Filed;
use super::heads::List;
use super::writer::Writer;
use super::{RmapEntry, RmapError};
use crate::sync::Ordering;

impl<E: RmapEntry> Writer<E> {
    /// Looks whether a list is whole, and says what is not: for tests and debugging, in time proportional to its length.
    ///
    /// `record` is asked for each entry's record, which must lead to it.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn check(&self, list: List<'_, E>, record: impl Fn(E) -> Option<Filed>) -> Result<(), &'static str> {
        let require = |holds: bool, rule: &'static str| if holds { Ok(()) } else { Err(rule) };
        let (number, home) = list.number_and_home();
        let shared = &*self.shared;
        require(home == shared.identity(), "a list is its reverse map's")?;
        // Where there is no doubt without, the place is not in the record.
        let filed = |word: u64, place: Option<Place>| {
            let record = core::num::NonZeroU64::new(word).map(E::from_word).and_then(&record);
            let record = record.ok_or("an entry has a record")?;
            require(record.list() == number, "an entry's record says in which list it is")?;
            require(
                place.is_none_or(|place| record.place() == place),
                "an entry's record says where in its list it is",
            )
        };
        // SAFETY: the list's own head.
        let mut at = match unsafe { Head::new(list.head.load(Ordering::Relaxed)) } {
            Head::Empty => return Ok(()),
            Head::One(word) => return filed(word, None),
            Head::Many(first) => Some(first),
        };
        let mut left = at.map_or(0, Descriptor::total) as usize;
        let is_only = left <= CELLS;
        require(left >= 2, "a list of fewer than two entries has no descriptors")?;
        let mut is_first = true;
        while let Some(descriptor) = at {
            let (place, flags) = (descriptor.place(), descriptor.flags());
            let itself = shared.descriptors.all.get(place.index());
            require(itself.is_some_and(|itself| ptr::eq(itself, descriptor)), "a descriptor has its number")?;
            require(
                is_first || descriptor.is_covered_in(number),
                "a descriptor that is covered knows its list",
            )?;
            require(is_first || place.cell() == CELLS, "all descriptors but the first are full")?;
            require((1..=CELLS).contains(&place.cell()), "no descriptor is empty")?;
            let untold = flags & flag::UNTOLD != 0;
            require(!untold || is_only, "only the record of the oldest entry of one descriptor is not told")?;
            for cell in 0..place.cell() {
                let word = descriptor.cells[cell].load(Ordering::Relaxed);
                require(word != 0 && word & 7 == 0, "a filled cell has an entry")?;
                filed(word, if untold && cell == 0 { None } else { Some(place.with_cell(cell)) })?;
            }
            left = left.checked_sub(place.cell()).ok_or("the count is not too small")?;
            // SAFETY: a descriptor of the list.
            at = unsafe { descriptor.next() };
            is_first = false;
        }
        require(left == 0, "the count is not too large")
    }

    /// Whether this entry is where it is found by its list alone: in the head, or in the first cell of the first descriptor.
    #[doc(hidden)]
    pub fn is_first(&self, list: List<'_, E>, entry: E) -> bool {
        // SAFETY: the list's own head.
        let word = match unsafe { Head::new(list.head.load(Ordering::Relaxed)) } {
            Head::Empty => 0,
            Head::One(word) => word,
            Head::Many(first) => first.cells[0].load(Ordering::Relaxed),
        };
        word == entry.into_word().get()
    }

    /// That an entry is not filed where its record says, which is the error that removing it would be.
    ///
    /// # Errors
    /// [`NotFiled`](RmapError::NotFiled).
    pub fn check_filed(&self, filed: &Filed, entry: E) -> Result<(), RmapError> {
        let word = entry.into_word().get();
        match self.find(filed, word) {
            Some(_) => Ok(()),
            None => Err(RmapError::NotFiled { entry: word, under: self.filed_under(filed) }),
        }
    }
}
