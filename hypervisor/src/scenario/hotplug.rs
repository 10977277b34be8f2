//! `hotplug`: memory comes and goes while Linux runs, and a program in the guest looks whether it sees just what it should.
//!
//! Debian's kernel has no probe file for memory (`# CONFIG_ARCH_MEMORY_PROBE is not set`), and there is no driver for ours. So the memory
//! that is plugged in lies above all that the kernel knows, and the guest's program maps it through `/dev/mem`. It calls for each change and
//! then looks. While it does, other processes of the guest fill and check ordinary memory.
//!
//! The same happens to a *window*, a slot of the machine's own addresses: the firmware's ROM at the end of the first megabyte, which the
//! guest sees there as well, and can compare.
//!
//! An access to nothing (or a write to ROM) comes out and is completed as the bus of a PC would: reads are all ones, writes
//! are lost. Not to have to decode the instruction, the hypervisor lets the program say where it goes on.

use alloc::format;
use alloc::string::String;

use memslot::{Backing, Gfn, Gpa, SlotFlags, SlotId, TransactionError};
use memslot_mmu::format::Access;

use super::{Scenario, Turn};
use crate::PLUGGED;
use crate::console::report;
use crate::guest::{Guest, SPACE, frames, spec};
use crate::pool;

/// The call; RBX says what to do.
const CHANGE: u64 = 0x6d65_6d10;
/// In R14: R15 is where the program goes on.
const EXPECTS_NOTHING: u64 = 0x6e6f_7468_696e_6721;
/// Where memory is plugged in: 8 GiB, and where it is moved to.
const PLACE: u64 = 8 << 30;
const OTHER_PLACE: u64 = PLACE + (32 << 20);
const BYTES: u64 = 8 << 20;
const ID: SlotId = SlotId::new(50);
const UPPER: SlotId = SlotId::new(51);
/// Where the window is, where it is moved to, and what is behind it.
const WINDOW: u64 = PLACE + (48 << 20);
const OTHER_WINDOW: u64 = PLACE + (56 << 20);
const WINDOW_BYTES: u64 = 64 << 10;
const FIRMWARE: u64 = 0xf_0000;
const WINDOW_ID: SlotId = SlotId::new(52);
const UPPER_WINDOW: SlotId = SlotId::new(53);
/// The end of all this.
const END: u64 = PLACE + (64 << 20);

/// See the [module documentation](self).
pub(crate) struct Hotplug {
    /// The first page of the pool that is plugged in.
    page: u64,
    changes: u64,
    reads_of_nothing: u64,
    lost_writes: u64,
}

impl Hotplug {
    /// For a guest that has its memory.
    pub(crate) fn new(guest: &Guest) -> Self {
        let page = guest.host.pool().pages() - PLUGGED;
        Self { page, changes: 0, reads_of_nothing: 0, lost_writes: 0 }
    }

    fn change(&self, guest: &mut Guest, what: u64) -> Result<u64, TransactionError> {
        let slot = |id: SlotId, from: u64, to: u64| {
            let backing = pool::backing(self.page + (from >> 12));
            spec(id.get(), frames(PLACE + from, PLACE + to), backing, SlotFlags::empty())
        };
        let window = |id: SlotId, from: u64| {
            let backing = Backing::Device { token: FIRMWARE + from };
            spec(id.get(), frames(WINDOW + from, WINDOW + WINDOW_BYTES), backing, SlotFlags::empty())
        };
        let middle = Gfn::new((PLACE + BYTES / 2) >> 12);
        guest.table.transaction(|tx| match what {
            0 => tx.create(slot(ID, 0, BYTES)),
            1 => tx.set_read_only(SPACE, ID, true),
            2 => tx.set_read_only(SPACE, ID, false),
            3 => tx.move_to(SPACE, ID, Gfn::new(OTHER_PLACE >> 12)),
            4 => tx.move_to(SPACE, ID, Gfn::new(PLACE >> 12)),
            5 => tx.split(SPACE, ID, middle, UPPER),
            6 => tx.delete(SPACE, UPPER),
            7 => {
                tx.create(slot(UPPER, BYTES / 2, BYTES))?;
                tx.merge(SPACE, ID, UPPER)
            }
            8 => tx.resize(SPACE, ID, (BYTES / 4) >> 12),
            9 => tx.resize(SPACE, ID, BYTES >> 12),
            10 => tx.delete(SPACE, ID),
            11 => tx.create(window(WINDOW_ID, 0)),
            12 => tx.move_to(SPACE, WINDOW_ID, Gfn::new(OTHER_WINDOW >> 12)),
            13 => tx.move_to(SPACE, WINDOW_ID, Gfn::new(WINDOW >> 12)),
            14 => tx.split(SPACE, WINDOW_ID, Gfn::new((WINDOW + WINDOW_BYTES / 2) >> 12), UPPER_WINDOW),
            15 => tx.delete(SPACE, UPPER_WINDOW),
            16 => {
                tx.create(window(UPPER_WINDOW, WINDOW_BYTES / 2))?;
                tx.merge(SPACE, WINDOW_ID, UPPER_WINDOW)
            }
            _ => tx.delete(SPACE, WINDOW_ID),
        })
    }
}

impl Scenario for Hotplug {
    fn call(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        let (call, what) = (turn.vcpu.vmcb.save.rax, turn.vcpu.registers.rbx);
        if call != CHANGE {
            return Err(format!("the guest makes an unknown call, {call:#x}"));
        }
        self.changes += 1;
        self.change(turn.guest, what).map_err(|error| format!("change {what}: {error}"))?;
        Ok(())
    }

    fn hole(&mut self, turn: &mut Turn<'_>, gpa: Gpa, access: Access) -> Result<(), String> {
        let vcpu = &mut *turn.vcpu;
        let is_there = (PLACE..END).contains(&gpa.get());
        if !is_there || vcpu.vmcb.save.cpl != 3 || vcpu.registers.r14 != EXPECTS_NOTHING {
            return Err(format!("the guest accesses {gpa} ({access:?}), rip {:#x}", vcpu.vmcb.save.rip));
        }
        if access.contains(Access::WRITE) {
            self.lost_writes += 1;
        } else {
            self.reads_of_nothing += 1;
        }
        vcpu.vmcb.save.rax = u64::MAX;
        vcpu.vmcb.save.rip = vcpu.registers.r15;
        Ok(())
    }

    fn end(&mut self, _: &mut Turn<'_>) -> Result<(), String> {
        report!("hotplug.changes {}", self.changes);
        report!("hotplug.reads_of_nothing {}", self.reads_of_nothing);
        report!("hotplug.lost_writes {}", self.lost_writes);
        if self.changes == 0 { Err("the guest asked for no change".into()) } else { Ok(()) }
    }
}
