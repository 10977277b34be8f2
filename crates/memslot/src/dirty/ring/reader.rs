//! The side that reads a ring: user space, which trusts nothing either.

use core::sync::atomic::Ordering;

use super::layout::{DIRTY, ENTRY_BYTES, Entry, MAX_ENTRIES, RESET, RingError};
use crate::addr::Gfn;
use crate::slot::{AddressSpaceId, SlotId};
use crate::table::View;

/// A page that a [`RingReader`] found, as its entry names it; nothing of it is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyPage {
    /// The address space; KVM has 2, but this is whatever stood there.
    pub address_space: u16,
    /// The slot.
    pub slot: SlotId,
    /// The page, counted from the slot's first one.
    pub offset: u64,
}

impl DirtyPage {
    /// Which frame that is, or `None` where the table has no such slot or the slot no such page.
    #[must_use]
    pub fn gfn(&self, view: &View) -> Option<(AddressSpaceId, Gfn)> {
        let space = AddressSpaceId::new(u8::try_from(self.address_space).ok()?);
        let slot = view.slot(space, self.slot).filter(|slot| self.offset < slot.pages())?;
        Some((space, slot.base_gfn().checked_add(self.offset)?))
    }
}

/// The user's side of a ring, of this crate's or of the kernel's.
///
/// `M` is the memory: for a ring of the kernel's the mapping of the vCPU's file descriptor (at page offset 64).
/// A ring has one reader, who must see every entry. The last page that it finds may be one whose write has not
/// happened yet; it is reported for sure when it was read only after the vCPU has left the guest.
#[derive(Debug)]
pub struct RingReader<M> {
    memory: M,
    entries: u32,
    position: u32,
}

impl<M: AsRef<[Entry]>> RingReader<M> {
    /// A reader that starts with the first entry of a new ring.
    ///
    /// # Errors
    /// [`RingError::NotPowerOfTwo`], [`RingError::TooLarge`]: no ring has this many entries.
    pub fn new(memory: M) -> Result<Self, RingError> {
        Self::at(memory, 0)
    }

    /// A reader that goes on where another one was; see [`position`](Self::position).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn at(memory: M, position: u32) -> Result<Self, RingError> {
        let entries = memory.as_ref().len();
        let bytes = entries as u64 * ENTRY_BYTES;
        match u32::try_from(entries) {
            Ok(entries) if entries <= MAX_ENTRIES && entries.is_power_of_two() => {
                Ok(Self { memory, entries, position })
            }
            _ if entries.is_power_of_two() => {
                Err(RingError::TooLarge { bytes, most: u64::from(MAX_ENTRIES) * ENTRY_BYTES })
            }
            _ => Err(RingError::NotPowerOfTwo { bytes }),
        }
    }

    /// How many entries it has collected, modulo 2^32.
    #[must_use]
    pub const fn position(&self) -> u32 {
        self.position
    }

    /// Whether every entry that was collected has been reset. Until then their pages can be written unnoticed, so they
    /// are not to be read yet.
    ///
    /// `KVM_RESET_DIRTY_RINGS` stops early, without an error, when a signal comes (Linux 6.16 and later).
    #[must_use]
    pub fn is_reset(&self) -> bool {
        // They are reset in order; and the last one before the first collect has no flags.
        let last = self.position.wrapping_sub(1) & (self.entries - 1);
        let entry = self.memory.as_ref().get(last as usize);
        entry.is_none_or(|entry| entry.flags.load(Ordering::Acquire) & RESET == 0)
    }

    /// The dirty pages in the order of their writes. Each is marked as read when the iterator yields it, so the
    /// iterator can be dropped at any time; one never yields more pages than the ring has entries.
    pub fn collect(&mut self) -> impl Iterator<Item = DirtyPage> {
        let mut left = self.entries;
        core::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            let entry = self.memory.as_ref().get((self.position & (self.entries - 1)) as usize)?;
            if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return None;
            }
            let place = entry.slot.load(Ordering::Relaxed);
            let page = DirtyPage {
                address_space: (place >> 16) as u16,
                slot: SlotId::new(place & 0xffff),
                offset: entry.offset.load(Ordering::Relaxed),
            };
            // Whoever sees this may write the entry again: it was read before.
            entry.flags.store(RESET, Ordering::Release);
            self.position = self.position.wrapping_add(1);
            Some(page)
        })
    }
}
