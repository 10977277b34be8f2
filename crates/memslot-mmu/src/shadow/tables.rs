//! The guest's tables, through the slots: what the guest's walk reads and writes.

use memslot::{AddressSpaceId, Gfn, Gpa, Slot, SlotFlags};

use super::ShadowHost;
use super::guest::{EntrySize, Exchange, GuestTables};
use super::shared::Locked;
use crate::invalidate::range;
use crate::level::{PAGE_SHIFT, Table};
use crate::sync::{AtomicU64, Ordering};

/// The tables of an address space, read with the lock held: so the slots are those of now, and when a slot's deletion has returned
/// nobody is reading its memory.
pub(super) struct Tables<'a, 'g, H: ShadowHost> {
    pub(super) locked: &'a Locked<'g, H>,
    pub(super) space: AddressSpaceId,
}

/// Which eight bytes of its page have the entry, and by how much it is shifted there.
fn place(table: &Table, gpa: Gpa) -> (&AtomicU64, u64) {
    let offset = (gpa.get() & 0xfff) as usize;
    (&table.0[offset / 8 % table.0.len()], if offset % 8 == 0 { 0 } else { 32 })
}

/// The entry that lies there in its frame.
#[inline]
pub(super) fn entry_at(table: &Table, gpa: Gpa, size: EntrySize) -> u64 {
    let (word, shift) = place(table, gpa);
    let value = word.load(Ordering::SeqCst);
    match size {
        EntrySize::Eight => value,
        EntrySize::Four => value >> shift & 0xffff_ffff,
    }
}

/// A slot's memory cannot be reached now. Whether it is about to change, or is none (a device's), the host can say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unreachable {
    pub(super) entry: Gpa,
    pub(super) slot: Slot,
}

impl<H: ShadowHost> GuestTables for Tables<'_, '_, H> {
    type Error = Unreachable;

    #[inline]
    fn read(&self, gpa: Gpa, size: EntrySize) -> Result<Option<u64>, Unreachable> {
        let gfn = Gfn::new(gpa.get() >> PAGE_SHIFT);
        let Some(slot) = self.locked.slot_at(self.space, gfn) else { return Ok(None) };
        let value = self.locked.shared.host.with_page(&slot, gfn, |table| entry_at(table, gpa, size));
        // A device has no memory that tables could be in.
        if value.is_none() && slot.hva().is_some() {
            Err(Unreachable { entry: gpa, slot })
        } else {
            Ok(value)
        }
    }

    fn exchange(&self, gpa: Gpa, size: EntrySize, old: u64, new: u64) -> Result<Exchange, Unreachable> {
        let gfn = Gfn::new(gpa.get() >> PAGE_SHIFT);
        let Some(slot) = self.locked.slot_at(self.space, gfn) else { return Ok(Exchange::NotWritable) };
        if slot.flags().contains(SlotFlags::READONLY) {
            return Ok(Exchange::NotWritable);
        }
        let shared = self.locked.shared;
        let result = shared.host.with_page(&slot, gfn, |table| {
            let (word, shift) = place(table, gpa);
            let mask = match size {
                EntrySize::Eight => u64::MAX,
                EntrySize::Four => 0xffff_ffff << shift,
            };
            let shift = if size == EntrySize::Eight { 0 } else { shift };
            let mut seen = word.load(Ordering::SeqCst);
            loop {
                if seen & mask != old << shift & mask {
                    return Exchange::Changed;
                }
                let next = seen & !mask | new << shift & mask;
                match word.compare_exchange(seen, next, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => return Exchange::Done,
                    // The other half of the word may have changed.
                    Err(now) => seen = now,
                }
            }
        });
        let result = match result {
            Some(result) => result,
            None if slot.hva().is_some() => return Err(Unreachable { entry: gpa, slot }),
            None => Exchange::NotWritable,
        };
        if result == Exchange::Done && shared.is_logged(&slot) {
            shared.mark(self.space, range(gfn.get(), gfn.get() + 1));
        }
        Ok(result)
    }
}
