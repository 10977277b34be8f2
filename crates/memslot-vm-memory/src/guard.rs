//! A version that is held, and its memory.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;

use memslot::{AttachmentKey, Guard, Snapshot, View};

use crate::map::Map;
use crate::memory::Memory;
use crate::space::Tracking;
use crate::stock::{self, Common, Ticket};

/// A version of an address space, held: what [`Space::memory`](crate::Space) gives. Dereferences to [`Memory`].
///
/// It is owned: it may be kept for ever, moved to another thread, shared, and it may outlive the [`Space`](crate::Space)
/// and the table. It keeps its version's memory alive and delays nobody. Clones hold the same version.
pub struct MemoryGuard<B> {
    memory: Memory<B>,
    held: ManuallyDrop<Held>,
}

/// What holds the version, and whatever the regions' bitmaps need.
enum Held {
    Reader { guard: Guard, common: Arc<Common> },
    Snapshot { snapshot: Snapshot, _common: Option<Arc<Common>> },
}

impl<B: Tracking> MemoryGuard<B> {
    #[inline]
    pub(crate) fn enter(ticket: Ticket, key: AttachmentKey<Map<B>>) -> Self {
        let Ticket { reader, common } = ticket;
        let guard = reader.into_guard();
        let memory = memory_of(&guard, key, &common).expect("every version carries the map of its regions");
        Self { memory, held: ManuallyDrop::new(Held::Reader { guard, common }) }
    }

    /// `None` for a version without this space's regions.
    pub(crate) fn of_snapshot(
        snapshot: Snapshot,
        key: AttachmentKey<Map<B>>,
        common: &Arc<Common>,
    ) -> Option<Self> {
        let memory = memory_of(&snapshot, key, common)?;
        let held = Held::Snapshot { snapshot, _common: common.marks.is_some().then(|| common.clone()) };
        Some(Self { memory, held: ManuallyDrop::new(held) })
    }
}

/// The memory of a version that the caller holds, and keeps holding as long as the result is there.
#[inline]
fn memory_of<B: Tracking>(
    view: &View,
    key: AttachmentKey<Map<B>>,
    common: &Arc<Common>,
) -> Option<Memory<B>> {
    let map = view.attachment(key)?;
    // The key may be of another table, whose regions mark what `common` does not keep alive.
    if map.owner != common.number {
        return None;
    }
    // SAFETY: the guard that is being made holds the view, and drops the memory before it lets go.
    Some(unsafe { Memory::new(view, map) })
}

impl<B> MemoryGuard<B> {
    /// The version, to be kept apart from the guard.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        match &*self.held {
            Held::Reader { guard, .. } => guard.snapshot(),
            Held::Snapshot { snapshot, .. } => snapshot.clone(),
        }
    }
}

impl<B> Clone for MemoryGuard<B> {
    fn clone(&self) -> Self {
        let common = match &*self.held {
            Held::Reader { common, .. } => common.marks.is_some().then_some(common),
            Held::Snapshot { _common: common, .. } => common.as_ref(),
        };
        let held = Held::Snapshot { snapshot: self.snapshot(), _common: common.cloned() };
        // The same version, so what is at these addresses is held by the clone, too.
        Self { memory: self.memory.again(), held: ManuallyDrop::new(held) }
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
        let held = unsafe { ManuallyDrop::take(&mut self.held) };
        match held {
            Held::Reader { guard, common } => stock::put(Ticket { reader: guard.into_reader(), common }),
            Held::Snapshot { .. } => {}
        }
    }
}

impl<B> std::fmt::Debug for MemoryGuard<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.memory.fmt(f)
    }
}
