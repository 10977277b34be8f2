//! The address space: what a VMM gives to its devices.

use std::sync::Arc;

use memslot::dirty::DirtyLog;
use memslot::{AddressSpaceId, AttachmentKey, ListenerError, OutOfMemory, Slot, SlotTable, Snapshot};
use vm_memory::GuestAddressSpace;
use vm_memory::bitmap::Bitmap;

use crate::follower::Follower;
use crate::guard::MemoryGuard;
use crate::host::{Describe, HostMemory};
use crate::log::{Marks, SlotLog};
use crate::map::Map;
use crate::memory::Memory;
use crate::stock::{self, Common};

/// What the regions of a space track: nothing, `()`, or what is written, [`SlotLog`].
pub trait Tracking: Bitmap + Send + Sync + Sized + 'static + sealed::Make {}

impl Tracking for () {}
impl Tracking for SlotLog {}

pub(crate) mod sealed {
    use std::sync::Arc;

    use memslot::Slot;
    use vm_memory::bitmap::{BS, Bitmap};

    use crate::log::{LogSlice, Marks, SlotLog};
    use crate::memory::Memory;

    pub trait Make: Bitmap + Sized + 'static {
        /// The bitmap of any memory, where nothing is tracked: then nobody needs the region for it.
        fn untracked(memory: &Memory<Self>) -> Option<BS<'_, Self>>;

        /// The bitmap of a slot's region.
        ///
        /// # Safety
        /// `marks` are there, and alive whenever the result is used; where the result has no use for them, nothing.
        #[expect(private_interfaces, reason = "nobody outside of the crate can name the module")]
        unsafe fn make(slot: &Slot, generation: u64, marks: Option<&Arc<Marks>>) -> Self;
    }

    impl Make for () {
        #[inline]
        fn untracked(_: &Memory<()>) -> Option<()> {
            Some(())
        }

        #[expect(private_interfaces, reason = "as above")]
        unsafe fn make(_: &Slot, _: u64, _: Option<&Arc<Marks>>) {}
    }

    impl Make for SlotLog {
        #[inline]
        fn untracked(_: &Memory<Self>) -> Option<LogSlice<'_>> {
            None
        }

        #[expect(private_interfaces, reason = "as above")]
        unsafe fn make(slot: &Slot, generation: u64, marks: Option<&Arc<Marks>>) -> Self {
            let marks = marks.expect("a space whose regions log is made with a log");
            // SAFETY: passed on.
            unsafe { Self::new(marks, slot, generation) }
        }
    }
}

/// Makes a [`Space`] of one of a table's address spaces.
///
/// See the [crate's documentation](crate) for an example.
pub struct Native<B = ()> {
    space: AddressSpaceId,
    log: Option<DirtyLog>,
    describe: Describe,
    of: std::marker::PhantomData<fn() -> B>,
}

/// A space that could not be made; the table is as it was, but for a new generation perhaps.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The versions of a table carry so many things and no more.
    #[error("all {} attachment keys of the table are given away", memslot::MAX_ATTACHMENTS)]
    NoKey,
    /// The table does not have it.
    #[error("the table has no address space {0}")]
    NoSuchAddressSpace(AddressSpaceId),
    /// No memory for the table's part.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// vm-memory cannot have the slots as its own map; why.
    #[error("{0}")]
    Map(String),
}

/// A space that could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NativeError {
    /// See [`AttachError`].
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// What stands behind one of the slots could not be told.
    #[error("{slot}: {error}")]
    Describe {
        /// The slot.
        slot: Slot,
        /// Why.
        #[source]
        error: ListenerError,
    },
}

impl Native {
    /// Of this address space, without a dirty log.
    #[must_use]
    pub fn new(space: AddressSpaceId) -> Self {
        Self { space, log: None, describe: Box::new(|_| Ok(HostMemory::new())), of: std::marker::PhantomData }
    }

    /// Writes through the space mark `log`, which is a log of the same table.
    #[must_use]
    pub fn with_log(self, log: &DirtyLog) -> Native<SlotLog> {
        let Self { space, describe, .. } = self;
        Native { space, log: Some(log.clone()), describe, of: std::marker::PhantomData }
    }
}

impl<B: Tracking> Native<B> {
    /// Asks `describe` what stands behind each slot, once for every slot that is new or has changed.
    ///
    /// An error stops the transaction.
    #[must_use]
    pub fn describe(
        mut self,
        describe: impl FnMut(&Slot) -> Result<HostMemory, ListenerError> + Send + 'static,
    ) -> Self {
        self.describe = Box::new(describe);
        self
    }

    /// Makes the space, of the slots that the table has and of those that it will have.
    ///
    /// # Errors
    /// [`NativeError`].
    ///
    /// # Safety
    /// Whoever has the space reads and writes the host memory of its slots. So, for every slot with a host address
    /// that this address space of the table has or will have:
    ///
    /// * The addresses `slot.hvas()` are mapped, readable and writable, read-only slots included, and are
    ///   memory that no Rust reference points into.
    /// * They stay so as long as somebody can get to a version that has the slot: a guard, a
    ///   [`Snapshot`] or a stock of readers may have it long after the slot was deleted.
    ///   [`HostMemory::keeping`] is how an owner of mappings hears when it is over.
    pub unsafe fn attach(self, table: &mut SlotTable) -> Result<Space<B>, NativeError> {
        let Self { space, log, describe, .. } = self;
        if !table.view().address_spaces().any(|known| known == space) {
            return Err(AttachError::NoSuchAddressSpace(space).into());
        }
        let handle = table.handle();
        let marks = log.map(|log| Arc::new(Marks::new(log, handle.clone(), space, table.view())));
        let common = Common::new(handle, space, marks);
        // SAFETY: the bitmaps are used through guards, and each has `common` where there are marks.
        let mut follower = unsafe { Follower::<B>::new(common.clone(), describe, table.view()) };
        let map = follower.map_of(table.view())?;
        let key = table.attachment_key().ok_or(AttachError::NoKey)?;
        follower.set_key(key);
        table.attach(key, Arc::new(map)).map_err(AttachError::from)?;
        table.add_listener(Box::new(follower)).map_err(AttachError::from)?;
        Ok(Space { common, key })
    }
}

/// An address space of a slot table as vm-memory's [`GuestAddressSpace`]: what a VMM gives to its devices.
///
/// [`memory`](GuestAddressSpace::memory) gives the newest version. Clones are the same space; it may be used on any
/// thread, and after the table has gone.
pub struct Space<B: Tracking = ()> {
    common: Arc<Common>,
    key: AttachmentKey<Map<B>>,
}

impl<B: Tracking> Space<B> {
    /// Which address space of the table it is.
    #[must_use]
    pub fn address_space(&self) -> AddressSpaceId {
        self.common.space
    }

    /// The memory of a version that was kept. `None` for a version of another table, and for one from before the space
    /// was made.
    #[must_use]
    pub fn memory_of(&self, snapshot: Snapshot) -> Option<MemoryGuard<B>> {
        MemoryGuard::of_snapshot(snapshot, self.key, &self.common)
    }
}

impl<B: Tracking> GuestAddressSpace for Space<B> {
    type M = Memory<B>;
    type T = MemoryGuard<B>;

    /// The newest version, held.
    ///
    /// # Panics
    /// Where there is no memory for a reader of the table.
    #[inline]
    fn memory(&self) -> MemoryGuard<B> {
        MemoryGuard::enter(stock::take(&self.common), self.key)
    }
}

impl<B: Tracking> Clone for Space<B> {
    fn clone(&self) -> Self {
        Self { common: self.common.clone(), key: self.key }
    }
}

impl<B: Tracking> std::fmt::Debug for Space<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space").field("address_space", &self.common.space).finish_non_exhaustive()
    }
}
