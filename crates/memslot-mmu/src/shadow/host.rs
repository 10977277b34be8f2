//! What shadow paging needs of the machine besides what nested paging needs: the guest's memory itself, where its
//! page tables are.

use alloc::sync::Arc;

use memslot::{Gfn, Slot};

use crate::host::Host;
use crate::level::Table;

/// Reaches guest memory, to read the guest's page tables and to set accessed and dirty bits in them.
pub trait GuestMemory {
    /// Hands the page of memory behind `gfn`, a frame of `slot`, to `work`; `None` where there is none that can be reached: a
    /// device's (then the guest has no table there), or one that is about to change (then whoever needs it tries again). Which of the
    /// two it is in a slot with host memory, [`Frames::frame`](crate::Frames::frame) says.
    ///
    /// The guest, and others, write there meanwhile; all access is atomic, by eight bytes. The page stays in its place until
    /// `work` returns (which is soon: it does not wait for anything), and it is the one that
    /// [`Frames::frame`](crate::Frames::frame) would answer with. Called with the lock of the tables held: it
    /// must not call back into them.
    fn with_page<R>(&self, slot: &Slot, gfn: Gfn, work: impl FnOnce(&Table) -> R) -> Option<R>;
}

impl<M: GuestMemory> GuestMemory for &M {
    #[inline]
    fn with_page<R>(&self, slot: &Slot, gfn: Gfn, work: impl FnOnce(&Table) -> R) -> Option<R> {
        (**self).with_page(slot, gfn, work)
    }
}

impl<M: GuestMemory> GuestMemory for Arc<M> {
    #[inline]
    fn with_page<R>(&self, slot: &Slot, gfn: Gfn, work: impl FnOnce(&Table) -> R) -> Option<R> {
        (**self).with_page(slot, gfn, work)
    }
}

/// All that shadow tables need of the host.
pub trait ShadowHost: Host + GuestMemory {}

impl<H: Host + GuestMemory> ShadowHost for H {}
