//! `trivial`: a guest of a few instructions, to show that nested paging works at all, without Linux.
//!
//! It writes to a page, reads it back through a second slot that has the same memory, and writes to a read-only slot, which must
//! come out.

use alloc::format;
use alloc::string::String;

use memslot::{Gfn, Gpa, SlotFlags};
use memslot_mmu::format::Access;

use super::Turn;
use crate::guest::{Resolved, frames, spec};
use crate::pool;
use crate::vcpu::{Exit, Kind};

/// Real mode, at 0x8000: `mov word [0x3000], 0x1234; mov ax, [0x4000]; vmmcall; mov [0x5000], ax; vmmcall`.
const CODE: [u8; 18] = [
    0xc7, 0x06, 0x00, 0x30, 0x34, 0x12, 0xa1, 0x00, 0x40, 0x0f, 0x01, 0xd9, 0xa3, 0x00, 0x50, 0x0f, 0x01,
    0xd9,
];

/// Runs it.
///
/// # Errors
/// What went wrong.
pub(crate) fn run(turn: &mut Turn<'_>) -> Result<(), String> {
    let Turn { guest, vcpu } = turn;
    let mut faults = guest.faults()?;
    let slot = |id, gpa, page, flags| spec(id, frames(gpa, gpa + 4096), pool::backing(page), flags);
    let slots = guest.table.transaction(|tx| {
        tx.create(slot(0, 0x8000, 700, SlotFlags::empty()))?;
        tx.create(slot(1, 0x3000, 701, SlotFlags::empty()))?;
        tx.create(slot(2, 0x4000, 701, SlotFlags::empty()))?;
        tx.create(slot(3, 0x5000, 702, SlotFlags::READONLY))
    });
    slots.map_err(|error| format!("{error}"))?;
    guest.write(0x8000, &CODE)?;
    vcpu.enter_real_mode(0x8000);
    loop {
        match vcpu.run() {
            Exit::Fault { gpa, access } => {
                if faults.resolve(gpa, access)? == Resolved::Nothing {
                    let is_right = gpa == Gpa::new(0x5000)
                        && access == Access::WRITE
                        && vcpu.counts.exits(Kind::Call) == 1;
                    return if is_right { Ok(()) } else { Err(format!("{gpa} came out for {access:?}")) };
                }
            }
            Exit::Call if vcpu.vmcb.save.rax & 0xffff == 0x1234 => {
                let mapped = faults.walker.translate(Gpa::new(0x3000)).map(|mapping| mapping.pfn.get());
                if mapped != guest.frame(Gfn::new(4)) {
                    return Err("two slots of the same memory map different frames".into());
                }
            }
            exit => return Err(format!("{exit:x?} at {:#x}", vcpu.vmcb.save.rip)),
        }
    }
}
