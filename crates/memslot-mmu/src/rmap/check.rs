//! What must hold between any two changes, written down a second time.

use super::descriptor::{CELLS, Head};
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
        let filed = |word: u64, place: Filed| {
            let entry = core::num::NonZeroU64::new(word).map(E::from_word);
            require(entry.and_then(&record) == Some(place), "an entry's record says where it is")
        };
        // SAFETY: the list's own head.
        let mut at = match unsafe { Head::new(list.head.load(Ordering::Relaxed)) } {
            Head::Empty => return Ok(()),
            Head::One(word) => return filed(word, Filed::alone(number)),
            Head::Many(first) => Some(first),
        };
        let mut left = at.map_or(0, |first| first.count());
        require(left >= 2, "a list of fewer than two entries has no descriptors")?;
        let mut is_first = true;
        while let Some(descriptor) = at {
            let (next, index) = (descriptor.next(), descriptor.index.load(Ordering::Relaxed));
            let side =
                shared.descriptors.sides.get(index).ok_or("a descriptor has a number that was given out")?;
            require(side.owner.load(Ordering::Relaxed) == number, "a descriptor knows its list")?;
            require(is_first || next.filled() == CELLS, "all descriptors but the first are full")?;
            require((1..=CELLS).contains(&next.filled()), "no descriptor is empty")?;
            for cell in 0..CELLS {
                let word = descriptor.get(cell);
                if cell < next.filled() {
                    require(word != 0 && word & 7 == 0, "a filled cell has an entry")?;
                    filed(word, Filed::in_cell(number, index, cell))?;
                }
            }
            left = left.checked_sub(next.filled()).ok_or("the counts are not too small")?;
            require(
                descriptor.behind.load(Ordering::Relaxed) as usize == left,
                "a descriptor counts those behind it",
            )?;
            // SAFETY: read from a descriptor of the list.
            at = unsafe { next.descriptor() };
            is_first = false;
        }
        require(left == 0, "the counts are not too large")
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
