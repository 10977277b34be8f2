//! Which memory was adopted and still lives.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use memslot::{Hva, HvaRange};

use crate::guest_memfd::GuestMemfd;
use crate::memory::Memory;

/// Weak references to what was adopted. Live memories never overlap; dead ones may lie anywhere, and are passed over.
#[derive(Default)]
pub(super) struct Registry(Mutex<Adopted>);

#[derive(Default)]
struct Adopted {
    /// By the address of the first byte.
    memories: BTreeMap<u64, Weak<Memory>>,
    files: BTreeMap<u32, Weak<GuestMemfd>>,
    /// The dead are cleared away when there are this many.
    clear_at: usize,
}

impl Registry {
    pub(super) fn adopt(&self, memory: &Arc<Memory>) {
        let adopted = &mut *self.lock();
        adopted.memories.insert(memory.hva().get(), Arc::downgrade(memory));
        adopted.clear();
    }

    pub(super) fn adopt_file(&self, file: &Arc<GuestMemfd>) {
        let adopted = &mut *self.lock();
        adopted.files.insert(file.number(), Arc::downgrade(file));
        adopted.clear();
    }

    /// The memory that has the byte at this address.
    pub(super) fn memory(&self, hva: Hva) -> Option<Arc<Memory>> {
        self.lock().up_to(hva.get()).filter(|memory| memory.hvas().contains(hva))
    }

    /// A memory that has some byte of this range.
    pub(super) fn overlapping(&self, hvas: &HvaRange) -> Option<Arc<Memory>> {
        let last = hvas.end().get().checked_sub(1)?;
        self.lock().up_to(last).filter(|memory| memory.hvas().overlaps(hvas))
    }

    pub(super) fn file(&self, number: u32) -> Option<Arc<GuestMemfd>> {
        self.lock().files.get(&number)?.upgrade()
    }

    /// Whoever panicked with the lock left a map that is whole.
    fn lock(&self) -> MutexGuard<'_, Adopted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Adopted {
    /// The live memory that begins last among those that begin at or before `address`.
    fn up_to(&self, address: u64) -> Option<Arc<Memory>> {
        self.memories.range(..=address).rev().find_map(|(_, memory)| memory.upgrade())
    }

    /// Clears the dead away: seldom, so that each adoption pays for a few of them only, and often enough that there are
    /// never many more of them than of the living.
    fn clear(&mut self) {
        if self.memories.len() + self.files.len() < self.clear_at {
            return;
        }
        self.memories.retain(|_, memory| memory.strong_count() > 0);
        self.files.retain(|_, file| file.strong_count() > 0);
        self.clear_at = 2 * (self.memories.len() + self.files.len()) + 16;
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let adopted = self.lock();
        let live = adopted.memories.values().filter_map(Weak::upgrade);
        f.debug_list().entries(live).entries(adopted.files.values().filter_map(Weak::upgrade)).finish()
    }
}
