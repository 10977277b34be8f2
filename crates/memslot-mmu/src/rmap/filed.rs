//! The record that is kept with an entry: where it is filed.

use core::fmt;
use core::num::NonZeroU64;

use memslot::Gfn;

use super::arena::INDEX_BITS;
use crate::level::Level;

/// Where an entry is filed: kept with the entry from [`add`](super::Writer::add) on, and all that
/// [`remove`](super::Writer::remove) wants to know.
///
/// There is no other way to remove an entry. Whatever happened in between to the guest's tables, to the shadow page or
/// to the slots, it is removed from the list to which it was added, since nobody says a gfn a second time.
///
/// One word: a shadow page keeps an array of 512 of them beside its table, which takes the place of an array of gfns
/// ([`Writer::filed_under`](super::Writer::filed_under) tells the gfn). `None` is 0.
///
/// ```
/// use memslot_mmu::rmap::Filed;
/// # use std::num::NonZeroU64;
/// # let (rmap, mut writer) = memslot_mmu::rmap::Rmap::<NonZeroU64>::new()?;
/// # let (mut cache, parents) = (rmap.cache(), rmap.parents()?);
/// assert_eq!(size_of::<Option<Filed>>(), 8);
/// let entry = NonZeroU64::new(0x1000).unwrap();
/// let filed = writer.add(parents.list(), entry, &mut cache)?.filed;
/// let bits: u64 = filed.into_bits(); // kept in an atomic, for instance
/// let filed = Filed::from_bits(bits).unwrap();
/// assert_eq!(writer.remove(filed, entry)?, 0);
/// # Ok::<(), memslot_mmu::rmap::RmapError>(())
/// ```
#[derive(PartialEq, Eq)]
#[must_use = "an entry without its record cannot be removed"]
pub struct Filed(NonZeroU64);

/// log2 of the cells that a place can name.
const CELL_BITS: u32 = 4;
const _: () = assert!(CELL_BITS + INDEX_BITS <= 32);
/// The place of an entry that was added to an empty list. No descriptor has so many cells.
const ALONE: u32 = (1 << CELL_BITS) - 1;

impl Filed {
    #[inline(always)]
    pub(super) const fn alone(list: u32) -> Self {
        Self::new(list, ALONE)
    }

    /// Descriptor 0 is never used, so that the word is not 0.
    #[inline(always)]
    pub(super) const fn in_cell(list: u32, descriptor: u32, cell: u32) -> Self {
        Self::new(list, descriptor << CELL_BITS | cell)
    }

    #[inline(always)]
    const fn new(list: u32, place: u32) -> Self {
        // A place is never 0; the bit changes nothing and spares the check.
        match NonZeroU64::new((list as u64) << 32 | place as u64) {
            Some(bits) => Self(bits),
            None => Self(NonZeroU64::MIN),
        }
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

    /// Descriptor and cell at the time when the entry was added.
    #[inline(always)]
    pub(super) const fn place(&self) -> (u32, usize) {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
        let place = self.0.get() as u32;
        (place >> CELL_BITS, (place & ALONE) as usize)
    }
}

impl fmt::Debug for Filed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (descriptor, cell) = self.place();
        write!(f, "Filed(list {}, descriptor {descriptor}, cell {cell})", self.list())
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
