//! A version that is held, and its memory.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;

use memslot::{AttachmentKey, Guard, ParkedReader, Snapshot, View};

use crate::map::Map;
use crate::memory::Memory;
use crate::space::Tracking;
use crate::stock::{self, Common};

/// A version of an address space, held: what [`Space::memory`](crate::Space) gives. Dereferences to [`Memory`].
///
/// It is owned: it may be kept for ever, moved to another thread, shared, and it may outlive the [`Space`](crate::Space)
/// and the table. It keeps its version's memory alive and delays nobody. Clones hold the same version.
pub struct MemoryGuard<B> {
    memory: Memory<B>,
    /// Whatever the regions' bitmaps need.
    common: ManuallyDrop<Arc<Common>>,
    held: ManuallyDrop<Held>,
}

/// What holds the version.
enum Held {
    Reader(Guard),
    Snapshot(Snapshot),
}

impl<B: Tracking> MemoryGuard<B> {
    #[inline]
    pub(crate) fn enter((reader, common): (ParkedReader, Arc<Common>), key: AttachmentKey<Map<B>>) -> Self {
        let guard = reader.into_guard();
        let memory = memory_of(&guard, key, &common).expect("every version carries the map of its regions");
        Self::new(memory, common, Held::Reader(guard))
    }

    /// `None` for a version without this space's regions.
    pub(crate) fn of_snapshot(
        snapshot: Snapshot,
        key: AttachmentKey<Map<B>>,
        common: &Arc<Common>,
    ) -> Option<Self> {
        let memory = memory_of(&snapshot, key, common)?;
        Some(Self::new(memory, common.clone(), Held::Snapshot(snapshot)))
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
    #[inline]
    fn new(memory: Memory<B>, common: Arc<Common>, held: Held) -> Self {
        Self { memory, common: ManuallyDrop::new(common), held: ManuallyDrop::new(held) }
    }

    /// The version, to be kept apart from the guard.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        match &*self.held {
            Held::Reader(guard) => guard.snapshot(),
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
        let (reader, common) = stock::take(&self.common);
        let guard = reader.into_guard();
        let held = if std::ptr::eq(&*guard, self.memory.view()) {
            Held::Reader(guard)
        } else {
            stock::put(guard.park(), common.clone());
            Held::Snapshot(self.snapshot())
        };
        // The same version, so what is at these addresses is held by the clone, too.
        Self::new(self.memory.again(), common, held)
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
        // SAFETY: they are not used again; this is the drop.
        let (common, held) =
            unsafe { (ManuallyDrop::take(&mut self.common), ManuallyDrop::take(&mut self.held)) };
        match held {
            Held::Reader(guard) => stock::put(guard.park(), common),
            Held::Snapshot(snapshot) => drop((snapshot, common)),
        }
    }
}

impl<B> std::fmt::Debug for MemoryGuard<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.memory.fmt(f)
    }
}
