//! Shadow paging: tables for the processor that are made of the guest's own page tables.

pub mod guest;

mod check;
mod directory;
mod entry;
mod fast;
mod fault;
mod find;
mod follow;
mod host;
mod install;
mod page;
mod rearm;
mod reserve;
mod role;
mod shared;
mod slots;
mod spte;
mod stats;
mod sync;
mod tables;
mod track;
mod vcpu;
mod zap;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use memslot::dirty::DirtyLog;
use memslot::{AddressSpaceId, Gfn, Gpa, OutOfMemory, PageSize, SlotTable};

use self::follow::Follower;

pub use self::host::{GuestMemory, ShadowHost};
pub use self::rearm::{ShadowAger, ShadowRearm};
pub use self::role::{Key, Reading, Role};
use self::shared::Shared;
pub use self::stats::{RMAP_CLASSES, ShadowStats};
pub use self::vcpu::{RootKind, ShadowFault, ShadowRoot, ShadowVcpu};
pub use self::zap::ShadowInvalidation;
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

/// The shadow tables of one guest, all of its address spaces. See the [module documentation](self).
///
/// A handle: clones are the same tables, on any thread.
pub struct Shadow<H: ShadowHost> {
    shared: Arc<Shared<H>>,
}

impl<H: ShadowHost> Clone for Shadow<H> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<H: ShadowHost + Send + Sync + 'static> Shadow<H> {
    /// Tables for the slots of `table`, none at first. They follow every later change of the slots, as one of the table's
    /// listeners. A dirty log is attached before them.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(table: &mut SlotTable, host: H, config: ShadowConfig) -> Result<Self, AttachError> {
        let page = table.view().page_size();
        if page != PageSize::K4 {
            return Err(AttachError::PageSize(page));
        }
        let shared = Shared::new(host, config, &table.snapshot()).map_err(TableError::from)?;
        let shadow = Self { shared: Arc::new(shared) };
        table.add_listener(Box::new(Follower::new(shadow.clone()))).map_err(TableError::from)?;
        Ok(shadow)
    }
}

impl<H: ShadowHost> Shadow<H> {
    /// A virtual processor's access. Make one for each, and keep it.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn vcpu(&self) -> Result<ShadowVcpu<H>, OutOfMemory> {
        ShadowVcpu::new(self.clone())
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> &H {
        &self.shared.host
    }

    /// What the tables were made with.
    #[must_use]
    pub fn config(&self) -> &ShadowConfig {
        &self.shared.config
    }

    /// Somebody other than the guest's processors (a device, the VMM) has written `bytes` bytes of guest memory from `gpa` on,
    /// or the write that was [`WriteTracked`](ShadowFault::WriteTracked) has been emulated. To be called after the write.
    pub fn wrote(&self, space: AddressSpaceId, gpa: Gpa, bytes: u64) {
        self.shared.with(|locked| locked.wrote(space, gpa, bytes));
    }

    /// Gives up all shadow pages of the table in this frame, so that the guest may write to it without being noticed. Returns
    /// whether there were any.
    ///
    /// What a hypervisor without an instruction emulator does with [`WriteTracked`](ShadowFault::WriteTracked) before the guest
    /// tries again.
    pub fn unprotect(&self, gfn: Gfn) -> bool {
        self.shared.with(|locked| locked.zap_pages_of(gfn))
    }

    /// What there is, and what was done so far.
    #[must_use]
    pub fn stats(&self) -> ShadowStats {
        self.shared.with(|locked| locked.stats())
    }

    /// The shadow pages that there are, by role and number.
    #[must_use]
    pub fn roles(&self) -> Vec<(Role, usize)> {
        let mut roles: Vec<(Role, usize)> = Vec::new();
        self.shared.with(|locked| {
            for page in locked.pages() {
                match roles.iter_mut().find(|(role, _)| *role == page.key.role) {
                    Some((_, count)) => *count += 1,
                    None => roles.push((page.key.role, 1)),
                }
            }
        });
        roles
    }

    /// Frees every table that is out of use, those that are kept to be used again included: for when memory is short, and for the
    /// end of tests.
    pub fn reclaim(&self) {
        self.shared.with(|locked| locked.free_spare());
    }
}
