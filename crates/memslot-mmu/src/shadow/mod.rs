//! Shadow paging: tables for the processor that are made of the guest's own page tables.

pub mod guest;

mod host;
mod role;
pub mod slot_set;
mod stats;
mod vcpu;

use alloc::sync::Arc;

use memslot::dirty::DirtyLog;
use memslot::{AddressSpaceId, GfnRange, HvaRange, OutOfMemory, SlotTable};

pub use self::host::{GuestMemory, ShadowHost};
pub use self::role::{Key, Reading, Role};
pub use self::slot_set::{SlotSet, SlotSetCache};
pub use self::stats::{RMAP_CLASSES, ShadowStats};
pub use self::vcpu::{RootKind, ShadowFault, ShadowRoot, ShadowVcpu};
use crate::host::Context;
use crate::level::Level;
use crate::nested::{AttachError, TableError};

/// What shadow tables shall be like.
#[derive(Clone, Debug)]
pub struct ShadowConfig {
    /// What flushes are tagged with.
    pub context: Context,
    /// The largest page that is made.
    pub largest: Level,
    /// How many shadow pages there may be: when there are more, the oldest go. At least 64.
    pub pages: usize,
    /// Up to which level the guest may write its tables freely between two flushes of its own: such a table is *unsync*.
    /// KVM: [`Level::K4`]. Tables above stay write-protected, and writes to them are
    /// [`WriteTracked`](ShadowFault::WriteTracked).
    pub unsync: Level,
    /// Where pages of logged slots are marked. Without it, logged slots are treated as if they were not.
    pub log: Option<DirtyLog>,
}

impl Default for ShadowConfig {
    fn default() -> Self {
        Self {
            context: Context::default(),
            largest: Level::G1,
            pages: 1 << 14,
            unsync: Level::new(5).unwrap_or(Level::K4),
            log: None,
        }
    }
}

/// Why something could not be done; nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShadowError<E> {
    /// There was no memory for a table or for what is kept beside it.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The host had no answer.
    #[error("the host cannot say what is behind the page: {0}")]
    Frames(E),
    /// Nothing has been loaded yet.
    #[error("no root was loaded")]
    NoRoot,
}

impl<E> From<OutOfMemory> for ShadowError<E> {
    fn from(_: OutOfMemory) -> Self {
        Self::Table(TableError::OutOfMemory)
    }
}

/// The shadow tables of one guest, all of its address spaces. A handle: clones are the same tables, on any thread.
pub struct Shadow<H: ShadowHost> {
    pub(crate) shared: Arc<H>,
}

impl<H: ShadowHost> Clone for Shadow<H> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<H: ShadowHost + Send + Sync + 'static> Shadow<H> {
    /// Tables for the slots of `table`, none at first. They follow every later change of the slots, as one of the table's listeners. A
    /// dirty log is attached before them.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(table: &mut SlotTable, host: H, config: ShadowConfig) -> Result<Self, AttachError> {
        let _ = (table, host, config);
        todo!()
    }
}

impl<H: ShadowHost> Shadow<H> {
    /// A virtual processor's access. Make one for each, and keep it.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn vcpu(&self) -> Result<ShadowVcpu<H>, OutOfMemory> {
        todo!()
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> &H {
        &self.shared
    }

    /// Somebody other than the guest's processors (a device, the VMM) has written `bytes` bytes of guest memory from `gpa` on, or
    /// the write that was [`WriteTracked`](ShadowFault::WriteTracked) has been emulated. To be called after the write.
    pub fn wrote(&self, space: AddressSpaceId, gpa: memslot::Gpa, bytes: u64) {
        let _ = (space, gpa, bytes);
        todo!()
    }

    /// Gives up all shadow pages of the table in this frame, so that the guest may write to it without being noticed. Returns whether
    /// there were any.
    ///
    /// What a hypervisor without an instruction emulator does with [`WriteTracked`](ShadowFault::WriteTracked) before the guest
    /// tries again.
    pub fn unprotect(&self, gfn: memslot::Gfn) -> bool {
        let _ = gfn;
        todo!()
    }

    /// Nothing maps these frames of the address space any more, and no processor has a translation to them, when this returns. One flush.
    pub fn zap_gfn_range(&self, space: AddressSpaceId, gfns: GfnRange) {
        let _ = (space, gfns);
        todo!()
    }

    /// Gives up all shadow pages, in bounded steps. Virtual processors find their roots [stale](ShadowVcpu::is_stale).
    pub fn zap_all(&self) {
        todo!()
    }

    /// Begins to invalidate host memory: when this returns, no processor has a translation to it, and until the result is dropped no
    /// fault makes one.
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing was invalidated.
    pub fn invalidate_hva(&self, hvas: HvaRange) -> Result<ShadowInvalidation<'_, H>, OutOfMemory> {
        let _ = hvas;
        todo!()
    }

    /// How many of the pages that map these frames were used since they were aged last; takes no lock.
    ///
    /// # Errors
    /// [`OutOfMemory`]: for a place among those who walk.
    pub fn age(&self, space: AddressSpaceId, gfns: GfnRange) -> Result<u64, OutOfMemory> {
        let _ = (space, gfns);
        todo!()
    }

    /// What a harvest of the dirty log needs of these tables.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn dirty_rearm(&self) -> Result<ShadowRearm<H>, OutOfMemory> {
        todo!()
    }

    /// What there is, and what was done so far.
    #[must_use]
    pub fn stats(&self) -> ShadowStats {
        todo!()
    }

    /// The shadow pages that there are, by role and number.
    #[must_use]
    pub fn roles(&self) -> alloc::vec::Vec<(Role, usize)> {
        todo!()
    }

    /// Looks whether everything is as it must be between two operations (KVM's invariants of rmap, shadow pages, write tracking), and says
    /// what is not. Slow.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn check(&self) -> Result<(), alloc::string::String> {
        todo!()
    }
}

/// An invalidation under way: nothing maps what it covers, and nothing will until it is dropped.
#[must_use = "faults retry for as long as this exists: keep it until the memory has changed"]
pub struct ShadowInvalidation<'m, H: ShadowHost> {
    shadow: &'m Shadow<H>,
}

impl<H: ShadowHost> ShadowInvalidation<'_, H> {
    /// The memory has changed: faults find it as it is now. The same as dropping it.
    pub fn end(self) {
        let _ = self.shadow;
    }
}

/// Re-arms pages for a consumer of the dirty log, by write protection through the reverse map, without a lock. Implements
/// [`Rearm`](memslot::dirty::Rearm).
pub struct ShadowRearm<H: ShadowHost> {
    shadow: Shadow<H>,
}

impl<H: ShadowHost> memslot::dirty::Rearm for ShadowRearm<H> {
    type Error = core::convert::Infallible;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Self::Error> {
        let _ = (space, gfns, &self.shadow);
        todo!()
    }

    fn flush(&mut self) -> Result<(), Self::Error> {
        todo!()
    }
}
