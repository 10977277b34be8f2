//! What a page-table backend does for the log: notice the next write to a page again.

use core::convert::Infallible;

use crate::addr::GfnRange;
use crate::slot::AddressSpaceId;

/// Makes writes to pages noticed again, by write protection or by clearing hardware dirty bits.
///
/// The log calls it in the order that loses nothing: it takes bits, makes the [`HeavyFence`](super::HeavyFence) that it
/// was given, has all their pages re-armed, and asks for **one** flush. What was written before the flush is on a page that is reported already; what is written after
/// it faults, or sets the dirty bit, and is marked for the next harvest.
pub trait Rearm {
    /// What can go wrong.
    type Error;
    /// Whether there is anything to re-arm; without it the log does not look for the pages.
    const NEEDED: bool = true;

    /// Re-arms these frames, which lie in one chunk of 32768. It need not be in force before
    /// [`flush`](Self::flush). The log calls in ascending order and names no page twice; a [`ring`](super::ring)
    /// calls in the order of its entries. A frame may have no slot any more: then there is nothing to do.
    ///
    /// # Errors
    /// The harvest fails, and loses nothing: the pages stay dirty.
    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Self::Error>;

    /// Brings all that was re-armed since the last flush into force: no processor writes through an old
    /// translation once this returns. Called once, and only where something was re-armed.
    ///
    /// # Errors
    /// As [`rearm`](Self::rearm).
    fn flush(&mut self) -> Result<(), Self::Error>;
}

/// For logs without page tables: marks come from software alone, at each write.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftwareOnly;

impl Rearm for SoftwareOnly {
    type Error = Infallible;
    const NEEDED: bool = false;

    fn rearm(&mut self, _: AddressSpaceId, _: GfnRange) -> Result<(), Infallible> {
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl<R: Rearm> Rearm for &mut R {
    type Error = R::Error;
    const NEEDED: bool = R::NEEDED;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), R::Error> {
        (**self).rearm(space, gfns)
    }

    fn flush(&mut self) -> Result<(), R::Error> {
        (**self).flush()
    }
}
