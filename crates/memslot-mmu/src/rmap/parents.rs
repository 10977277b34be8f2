//! The list of the entries that lead to a shadow page.

use core::marker::PhantomData;

use memslot::{Gfn, OutOfMemory};

use super::heads::{ChunkRef, List};
use super::shared::Shared;
use crate::counted::Counted;

/// The entries that lead to one shadow page.
///
/// Part of the shadow page: dropped with it, after the last entry was removed. Its memory is freed as that of a
/// [`SlotRmap`](super::SlotRmap) is.
pub struct Parents<E> {
    shared: Counted<Shared>,
    chunk: ChunkRef,
    entries: PhantomData<fn(E) -> E>,
}

// SAFETY: the chunk has atomics and plain values that do not change, and is kept until this is dropped.
unsafe impl<E> Send for Parents<E> {}
// SAFETY: as above.
unsafe impl<E> Sync for Parents<E> {}

impl<E> Parents<E> {
    pub(super) fn new(shared: Counted<Shared>) -> Result<Self, OutOfMemory> {
        let chunk = shared.add_chunk(1, Gfn::new(0), None)?;
        Ok(Self { shared, chunk, entries: PhantomData })
    }

    /// The list.
    #[inline]
    #[must_use]
    pub fn list(&self) -> List<'_, E> {
        // SAFETY: the chunk, which has one head, is freed after this was dropped, and the result borrows from this.
        unsafe { List::new(self.chunk, 0) }
    }
}

impl<E> Drop for Parents<E> {
    fn drop(&mut self) {
        // SAFETY: only this has it.
        unsafe { self.shared.central.lock().dropped.push(self.chunk) };
    }
}
