//! The record that is kept with an entry: where it is filed.

use core::fmt;
use core::num::NonZeroU64;

use memslot::Gfn;

use super::descriptor::Place;
use crate::level::Level;

/// Where an entry is filed: kept with the entry from [`add`](super::Writer::add) on, and all that
/// [`remove`](super::Writer::remove) wants to know.
///
/// There is no other way to remove an entry. Whatever happened in between to the guest's tables, to the shadow page or
/// to the slots, it is removed from the list to which it was added, since nobody says a gfn a second time.
///
/// One word, `None` being 0: a shadow page keeps an array of 512 of them beside its table, which takes the place of an array
/// of gfns ([`Writer::filed_under`](super::Writer::filed_under) tells the gfn). When an entry moves within its list, its
/// [`Records`] hear of it.
///
/// ```
/// use memslot_mmu::rmap::{Filed, Rmap};
/// # use std::num::NonZeroU64;
/// # let (rmap, mut writer) = Rmap::<NonZeroU64>::new()?;
/// # let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
/// assert_eq!(size_of::<Option<Filed>>(), 8);
/// let entry = NonZeroU64::new(0x1000).unwrap();
/// let mut record = 0; // in an atomic beside the entry, for instance
/// writer.add(parents.list(), entry, &mut cache, |_, filed: Filed| record = filed.into_bits())?;
/// let filed = Filed::from_bits(record).unwrap();
/// assert_eq!(writer.remove(filed, entry, |_, _| ())?, 0);
/// # Ok::<(), memslot_mmu::rmap::RmapError>(())
/// ```
#[derive(PartialEq, Eq)]
#[must_use = "an entry without its record cannot be removed"]
pub struct Filed(NonZeroU64);

/// Where the records of entries are kept: with each entry, found by what it is (the address of an entry leads to its
/// shadow page, and so to the page's array of records).
///
/// Closures will do.
pub trait Records<E> {
    /// The entry is filed here from now on: it was just added, or it has moved within its list.
    fn keep(&mut self, entry: E, filed: Filed);
}

impl<E, F: FnMut(E, Filed)> Records<E> for F {
    #[inline(always)]
    fn keep(&mut self, entry: E, filed: Filed) {
        self(entry, filed);
    }
}

impl Filed {
    #[inline(always)]
    pub(super) const fn new(list: u32, place: Place) -> Self {
        // A place is never 0, as descriptor 0 is not used; the bit changes nothing and spares the check.
        match NonZeroU64::new((list as u64) << 32 | place.0 as u64) {
            Some(bits) => Self(bits),
            None => Self(NonZeroU64::MIN),
        }
    }

    #[cfg(all(test, loom))]
    pub(super) const fn again(&self) -> Self {
        Self(self.0)
    }

    /// The record as a word, which is never 0.
    #[inline]
    #[must_use]
    pub const fn into_bits(self) -> u64 {
        self.0.get()
    }

    /// The record that [`into_bits`](Self::into_bits) has made a word of; `None` for 0.
    ///
    /// A word that was not made so, or that is used twice, is an error when it comes to removing, nothing worse.
    #[inline]
    #[must_use]
    pub const fn from_bits(bits: u64) -> Option<Self> {
        match NonZeroU64::new(bits) {
            Some(bits) => Some(Self(bits)),
            None => None,
        }
    }

    #[inline(always)]
    pub(super) const fn list(&self) -> u32 {
        (self.0.get() >> 32) as u32
    }

    /// Where the entry is in its list, unless that has no more than one, or this is the oldest of no more than 14: such an
    /// entry is found without, and the place may be out of date.
    #[inline(always)]
    pub(super) const fn place(&self) -> Place {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
        Place(self.0.get() as u32)
    }
}

impl fmt::Debug for Filed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.place();
        write!(f, "Filed(list {}, descriptor {}, cell {})", self.list(), place.index(), place.cell())
    }
}

/// What a list is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Under {
    /// The entries that map guest memory.
    Gfn {
        /// The first frame that such an entry maps.
        gfn: Gfn,
        /// The entry's level, and so how many frames.
        level: Level,
    },
    /// The entries that lead to a shadow page.
    Parents,
}

impl fmt::Display for Under {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gfn { gfn, level } => write!(f, "gfn {gfn} ({level})"),
            Self::Parents => f.write_str("the parents of a shadow page"),
        }
    }
}
