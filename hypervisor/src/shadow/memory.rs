//! The guest's memory as its processor sees it: page-table entries, and the bytes of instructions.

use core::convert::Infallible;
use core::sync::atomic::Ordering;

use memslot::{AddressSpaceId, Gfn, Gpa, OutOfMemory, Pinned, Reader};
use memslot_mmu::Table;
use memslot_mmu::shadow::GuestMemory as _;
use memslot_mmu::shadow::guest::{EntrySize, Exchange, GuestAccess, GuestPaging, GuestTables, walk};

use super::decode::LONGEST;
use crate::cpu::index;
use crate::guest::Guest;
use crate::paging::Host;
use crate::physical;

/// See the [module documentation](self).
pub(super) struct Memory {
    slots: Reader,
    host: &'static Host,
}

impl Memory {
    pub(super) fn new(guest: &Guest) -> Result<Self, OutOfMemory> {
        Ok(Self { slots: guest.table.reader()?, host: guest.host })
    }

    /// The tables in an address space, as they are now.
    pub(super) fn tables(&mut self, space: AddressSpaceId) -> Tables<'_> {
        Tables { slots: self.slots.pin(), host: self.host, space }
    }

    /// Up to [`LONGEST`] bytes of the instruction that the guest came out at, and how many there are: those that its processor has
    /// executed, from where the shadow tables below `root` have them. What they do not have any more is looked up in the
    /// guest's.
    pub(super) fn instruction(
        &mut self,
        space: AddressSpaceId,
        paging: impl FnOnce() -> GuestPaging,
        root: u64,
        at: u64,
    ) -> ([u8; LONGEST], usize) {
        let (mut bytes, mut length) = ([0; LONGEST], 0);
        let paging = core::cell::LazyCell::new(paging);
        // It may go on in the next page.
        while length < LONGEST {
            let va = at.wrapping_add(length as u64);
            let from = index(va & 0xfff);
            let here = bytes[length..].iter_mut().zip(from..4096);
            let copy = |page: &Table| {
                here.map(|(byte, at)| *byte = page.0[at / 8].load(Ordering::SeqCst).to_le_bytes()[at % 8])
                    .count()
            };
            let copied = if let Some(frame) = translated(root, va) {
                // SAFETY: what is mapped for the guest is memory, which is never taken from it while it stands still here.
                Some(copy(unsafe { &*physical::pointer::<Table>(frame) }))
            } else {
                let tables = self.tables(space);
                let walked = walk(&tables, &paging, va, GuestAccess::FETCH);
                let Ok(Ok(walk)) = walked else { break };
                tables.with_page(walk.gpa, copy)
            };
            length += match copied {
                Some(copied) => copied,
                None => break,
            };
        }
        (bytes, length)
    }
}

/// The host's frame that four levels of tables lead to, as an address.
fn translated(root: u64, va: u64) -> Option<u64> {
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    let mut table = root & FRAME;
    for level in (1..=4_u32).rev() {
        let shift = 12 + 9 * (level - 1);
        // SAFETY: the processor has just walked these tables; they are not freed while it stands still here.
        let entry = unsafe { physical::pointer::<u64>(table + (va >> shift & 0x1ff) * 8).read_volatile() };
        if entry & 1 == 0 {
            return None;
        }
        if level == 1 || entry & 0x80 != 0 {
            let within = (1 << shift) - 1;
            return Some((entry & FRAME & !within) | va & within & FRAME);
        }
        table = entry & FRAME;
    }
    None
}

/// Entries of tables, read only.
pub(super) struct Tables<'a> {
    slots: Pinned<'a>,
    host: &'static Host,
    space: AddressSpaceId,
}

impl Tables<'_> {
    fn with_page<R>(&self, gpa: Gpa, work: impl FnOnce(&Table) -> R) -> Option<R> {
        let gfn = Gfn::new(gpa.get() >> 12);
        self.host.with_page(self.slots.slot_at(self.space, gfn)?, gfn, work)
    }
}

impl GuestTables for Tables<'_> {
    type Error = Infallible;

    fn read(&self, gpa: Gpa, size: EntrySize) -> Result<Option<u64>, Infallible> {
        let word = self.with_page(gpa, |page| page.0[index((gpa.get() & 0xfff) / 8)].load(Ordering::SeqCst));
        Ok(word.map(|word| match size {
            EntrySize::Eight => word,
            EntrySize::Four => word >> (8 * (gpa.get() & 4)) & 0xffff_ffff,
        }))
    }

    fn exchange(&self, _: Gpa, _: EntrySize, _: u64, _: u64) -> Result<Exchange, Infallible> {
        // Looking leaves no traces.
        Ok(Exchange::NotWritable)
    }
}
