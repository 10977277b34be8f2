//! A version that is held, and its memory.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use memslot::{AttachmentKey, Snapshot, View};

use crate::map::Map;
use crate::memory::Memory;
use crate::stock::{self, Common, Held, Ticket};

/// A version of an address space, held: what [`Space::memory`](crate::Space) gives. Dereferences to [`Memory`].
///
/// It is owned: it may be kept for ever, moved to another thread, shared, and it may outlive the [`Space`](crate::Space)
/// and the table. It keeps its version's memory alive and delays nobody. Clones hold the same version.
pub struct MemoryGuard<B> {
    /// Valid as long as the ticket holds its version, which is until the drop.
    memory: Memory<B>,
    ticket: ManuallyDrop<Box<Ticket>>,
}

impl<B: Send + Sync + 'static> MemoryGuard<B> {
    /// Holds the newest version.
    #[inline]
    pub(crate) fn enter(mut ticket: Box<Ticket>, key: AttachmentKey<Map<B>>) -> Self {
        let view = match &mut ticket.held {
            Held::Reader(holder) => holder.hold(),
            Held::Snapshot(snapshot) => NonNull::from(&**snapshot),
        };
        // SAFETY: the ticket holds the view.
        let guard = unsafe { Self::new(ticket, view, key) };
        guard.expect("every version carries the map of its regions")
    }

    /// `None` for a version without this space's regions.
    pub(crate) fn of_snapshot(
        snapshot: Snapshot,
        key: AttachmentKey<Map<B>>,
        common: &Arc<Common>,
    ) -> Option<Self> {
        let view = NonNull::from(&*snapshot);
        let ticket = Box::new(Ticket { held: Held::Snapshot(snapshot), common: common.clone() });
        // SAFETY: the ticket holds the view.
        unsafe { Self::new(ticket, view, key) }
    }

    /// # Safety
    /// The ticket holds the view.
    #[inline]
    unsafe fn new(ticket: Box<Ticket>, view: NonNull<View>, key: AttachmentKey<Map<B>>) -> Option<Self> {
        // SAFETY: it is held.
        let view = unsafe { view.as_ref() };
        let map = view.attachment(key)?;
        // The key may be of another table, whose regions mark what `common` does not keep alive.
        if map.owner != ticket.common.number {
            return None;
        }
        // SAFETY: the ticket holds the view until the guard is dropped, and a view does not move with its holder.
        let memory = unsafe { Memory::new(view, map) };
        Some(Self { memory, ticket: ManuallyDrop::new(ticket) })
    }
}

impl<B> MemoryGuard<B> {
    /// The version, to be kept apart from the guard.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        match &self.ticket.held {
            Held::Reader(holder) => holder.snapshot().expect("a guard holds a version"),
            Held::Snapshot(snapshot) => snapshot.clone(),
        }
    }
}

impl<B> Clone for MemoryGuard<B> {
    /// Holds the same version once more.
    ///
    /// While that is the newest one, as it mostly is, another reader enters it, which touches no cache line of others.
    #[inline]
    fn clone(&self) -> Self {
        let mut ticket = stock::take(&self.ticket.common);
        let view = match &mut ticket.held {
            Held::Reader(holder) => Some(holder.hold()),
            Held::Snapshot(_) => None,
        };
        if view != Some(NonNull::from(self.memory.view())) {
            stock::put(ticket);
            ticket = Box::new(Ticket {
                held: Held::Snapshot(self.snapshot()),
                common: self.ticket.common.clone(),
            });
        }
        // The same version, so what the memory points to is held by the clone, too.
        Self { memory: self.memory.again(), ticket: ManuallyDrop::new(ticket) }
    }
}

impl<B> Deref for MemoryGuard<B> {
    type Target = Memory<B>;

    #[inline]
    fn deref(&self) -> &Memory<B> {
        &self.memory
    }
}

impl<B> Drop for MemoryGuard<B> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: it is not used again; this is the drop.
        stock::put(unsafe { ManuallyDrop::take(&mut self.ticket) });
    }
}

impl<B> std::fmt::Debug for MemoryGuard<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.memory.fmt(f)
    }
}
