//! What a version carries besides slots, for whoever looks things up in it.
//!
//! A listener often makes something that readers want together with the slots: the host memory that stands behind
//! them, a device crate's view of them. Published on its own it would now and then belong to another version than
//! the slots that a reader sees. As a part of the version it is published with them in the same store, and lives
//! exactly as long as somebody can get to the version.
//!
//! The places are few and lie in the version itself: carrying them on costs an update no allocation.

use alloc::sync::Arc;
use core::any::Any;
use core::fmt;
use core::marker::PhantomData;

/// How many keys a table gives away.
pub const MAX_ATTACHMENTS: usize = 4;

/// Names one of the things that the versions of a table carry, and its type; made by
/// [`SlotTable::attachment_key`](crate::SlotTable::attachment_key).
///
/// A key of one table says nothing about another one: there it finds nothing, or what that table has at the same
/// place if it has the same type.
pub struct AttachmentKey<T> {
    place: usize,
    of: PhantomData<fn() -> T>,
}

impl<T> AttachmentKey<T> {
    pub(super) fn numbered(place: usize) -> Option<Self> {
        (place < MAX_ATTACHMENTS).then_some(Self { place, of: PhantomData })
    }
}

impl<T> Clone for AttachmentKey<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for AttachmentKey<T> {}

impl<T> fmt::Debug for AttachmentKey<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AttachmentKey({})", self.place)
    }
}

/// What a version carries.
#[derive(Clone)]
pub(crate) struct Attachments([Option<Arc<dyn Any + Send + Sync>>; MAX_ATTACHMENTS]);

impl Attachments {
    pub(super) const NONE: Self = Self([const { None }; MAX_ATTACHMENTS]);

    #[inline]
    pub(super) fn get<T: Any + Send + Sync>(&self, key: AttachmentKey<T>) -> Option<&T> {
        self.0[key.place].as_ref()?.downcast_ref()
    }

    pub(crate) fn set<T: Any + Send + Sync>(&mut self, key: AttachmentKey<T>, value: Arc<T>) {
        self.0[key.place] = Some(value);
    }
}
