//! What a slot cannot say of its memory: the file behind it, whether it is of hugetlbfs, and who owns it.

use std::any::Any;
use std::sync::Arc;

use memslot::{ListenerError, Slot};
use vm_memory::FileOffset;

/// What there is to know of the host memory behind a slot, besides its address.
///
/// A slot has an address and nothing else; who gives regions to vhost-user, or writes snapshots to the file that the
/// memory is, wants more. [`Native::describe`](crate::Native::describe) and
/// [`Bridge::describe`](crate::Bridge::describe) take a function that knows.
#[derive(Clone, Default)]
pub struct HostMemory {
    pub(crate) file_offset: Option<FileOffset>,
    pub(crate) hugetlbfs: Option<bool>,
    pub(crate) keep: Option<Arc<dyn Any + Send + Sync>>,
}

/// Who knows what stands behind slots.
pub(crate) type Describe = Box<dyn FnMut(&Slot) -> Result<HostMemory, ListenerError> + Send>;

impl HostMemory {
    /// Nothing is known.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The file that is mapped there, and where in it the slot's first byte lies.
    #[must_use]
    pub fn with_file_offset(mut self, file_offset: FileOffset) -> Self {
        self.file_offset = Some(file_offset);
        self
    }

    /// Whether the file is of hugetlbfs.
    #[must_use]
    pub fn with_hugetlbfs(mut self, hugetlbfs: bool) -> Self {
        self.hugetlbfs = Some(hugetlbfs);
        self
    }

    /// Something to keep for as long as a reader can get to the slot: the owner of the mapping, which unmaps when it
    /// is dropped.
    #[must_use]
    pub fn keeping(mut self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        self.keep = Some(owner);
        self
    }
}

impl std::fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostMemory")
            .field("file_offset", &self.file_offset)
            .field("hugetlbfs", &self.hugetlbfs)
            .field("keeps", &self.keep.is_some())
            .finish()
    }
}
