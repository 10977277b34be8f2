//! Taking access away from pages that stay mapped: for the dirty log, and for slots that become read-only.

use memslot::GfnRange;

use super::cursor::{At, Next, Visit};
use super::shared::hull;
use crate::format::Format;
use crate::invalidate::range;
use crate::level::Level;
use core::marker::PhantomData;

/// What is taken away from a leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Take {
    /// Writing, until the next fault.
    Writing,
    /// The dirty bit, which must exist.
    Dirty,
    /// What makes the next write noticed: the dirty bit of 4 KiB pages, writing of larger ones, which are then split.
    DirtyOrLarge,
    /// Writing, for good: the slot is read-only. Faults that are about to install something writable are turned away.
    WritingForGood,
}

/// See the [module documentation](self). `EMPTIES` for [`Take::WritingForGood`].
pub(crate) struct Protect<F: Format, const EMPTIES: bool> {
    take: Take,
    nonce: u64,
    /// What has changed, as far as processors must hear of it.
    pub(crate) changed: Option<GfnRange>,
    format: PhantomData<F>,
}

impl<F: Format, const EMPTIES: bool> Protect<F, EMPTIES> {
    pub(crate) fn new(take: Take, nonce: u64) -> Self {
        Self { take, nonce, changed: None, format: PhantomData }
    }

    #[inline]
    fn mask(&self, level: Level) -> u64 {
        match self.take {
            Take::Writing => F::WRITE,
            Take::Dirty => F::DIRTY,
            Take::DirtyOrLarge if level == Level::K4 => F::DIRTY,
            // As long as it is writable, all of it counts as dirty: nothing is lost with its dirty bit.
            Take::DirtyOrLarge => F::WRITE | F::DIRTY,
            Take::WritingForGood => F::WRITE | F::MAY_WRITE,
        }
    }
}

impl<F: Format, const EMPTIES: bool> Visit for Protect<F, EMPTIES> {
    const EMPTIES: bool = EMPTIES;

    fn empty(&mut self, at: &At<'_>) -> Next {
        let new = F::empty(self.nonce) | at.seen & F::STALE;
        if at.replace(new) { Next::Done } else { Next::Again }
    }

    #[inline]
    fn leaf(&mut self, at: &At<'_>) -> Next {
        let mask = self.mask(at.level);
        let taken = at.seen & mask;
        if taken == 0 {
            return Next::Done;
        }
        if !at.replace(at.seen & !mask) {
            return Next::Again;
        }
        if taken & !F::MAY_WRITE != 0 {
            self.changed = Some(hull(self.changed, range(at.base, at.end())));
        }
        Next::Done
    }
}
