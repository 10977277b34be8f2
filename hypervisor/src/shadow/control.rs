//! Instructions of the guest that touch control registers, and what they do.

use memslot_mmu::shadow::guest::GuestPaging;

use super::decode::{Base, Operation, decode};
use super::{
    CR0_PAGING, CR0_TASK_SWITCHED, CR4_GLOBAL, EFER_LONG_MODE, EFER_LONG_MODE_ACTIVE, EFER_SVM, Event,
    PROTECTION, Paging, raise,
};
use crate::cpu;
use crate::svm::Vmcb;
use crate::vcpu::Vcpu;

/// Bits of CR0 that decide about paging.
const CR0_PAGING_BITS: u64 = CR0_PAGING | 1 << 16 | 1;
/// Bits of CR4 that do: page sizes, global pages, five levels, SMEP, SMAP.
const CR4_PAGING_BITS: u64 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 12 | 3 << 20;

impl Paging {
    /// Executes the instruction that the guest came out at.
    pub(super) fn instruction(&mut self, vcpu: &mut Vcpu, event: Event) -> Result<(), &'static str> {
        let save = &vcpu.vmcb.save;
        let (guest, processor) = (self.guest, self.processor);
        let paging = || GuestPaging::new(guest, processor);
        let at = save.cs.base.wrapping_add(save.rip);
        let (bytes, length) = self.memory.instruction(self.space, paging, save.cr3, at);
        let decoded = bytes.get(..length).and_then(decode);
        let decoded = decoded.ok_or("the guest's access to a control register cannot be decoded")?;
        let next = save.rip.wrapping_add(u64::from(decoded.length));
        let is_done = match (event, decoded.operation) {
            (Event::Write(number), Operation::WriteControl { control, register }) if number == control => {
                let value = vcpu.register(register);
                self.write(vcpu.vmcb, control, value)?
            }
            (Event::Write(0), Operation::ClearTaskSwitched) => {
                self.write(vcpu.vmcb, 0, self.guest.cr0 & !CR0_TASK_SWITCHED)?
            }
            (Event::Write(0), Operation::LoadStatusWord { register }) => {
                // The lower four bits; protection cannot be turned off by it.
                let value = vcpu.register(register) & 0xf | self.guest.cr0 & 1;
                self.write(vcpu.vmcb, 0, self.guest.cr0 & !0xf | value)?
            }
            (Event::Read(number), Operation::ReadControl { control, register }) if number == control => {
                vcpu.set_register(register, self.read(control)?);
                true
            }
            (Event::Read(0), Operation::StoreStatusWord { register, bytes }) => {
                self.counts.control_reads += 1;
                let old = vcpu.register(register);
                let value = match bytes {
                    2 => old & !0xffff | self.guest.cr0 & 0xffff,
                    4 => self.guest.cr0 & 0xffff_ffff,
                    _ => self.guest.cr0,
                };
                vcpu.set_register(register, value);
                true
            }
            (Event::Invalidate, Operation::Invalidate(address)) => {
                // They are still on the processor.
                let base = |segment| {
                    let register = if segment == Base::Fs { cpu::FS_BASE } else { cpu::GS_BASE };
                    // SAFETY: the register exists on every processor that runs 64-bit code.
                    unsafe { cpu::read_msr(register) }
                };
                let va = address.linear(next, |number| vcpu.register(number), base);
                self.counts.invalidations += 1;
                self.tables.invlpg(va);
                vcpu.vmcb.control.flush();
                true
            }
            _ => return Err("the guest came out at another instruction than it said"),
        };
        if is_done {
            vcpu.vmcb.save.rip = next;
        }
        Ok(())
    }

    fn read(&mut self, control: u8) -> Result<u64, &'static str> {
        match control {
            0 => self.counts.control_reads += 1,
            3 => self.counts.root_reads += 1,
            4 => self.counts.control_reads += 1,
            _ => return Err("a control register is read that is not watched"),
        }
        Ok(match control {
            0 => self.guest.cr0,
            3 => self.guest.cr3,
            _ => self.guest.cr4,
        })
    }

    /// Writes a control register. Returns whether it was done; not if the guest got a protection fault.
    fn write(&mut self, vmcb: &mut Vmcb, control: u8, value: u64) -> Result<bool, &'static str> {
        let old = self.guest;
        match control {
            0 => {
                self.counts.control_writes += 1;
                let without_protection = value & CR0_PAGING != 0 && value & 1 == 0;
                let without_extension = value & !old.cr0 & CR0_PAGING != 0
                    && old.efer & EFER_LONG_MODE != 0
                    && old.cr4 & 1 << 5 == 0;
                if value >> 32 != 0 || without_protection || without_extension {
                    raise(vmcb, PROTECTION, 0);
                    return Ok(false);
                }
                self.guest.cr0 = value | 1 << 4;
                self.guest.efer &= !EFER_LONG_MODE_ACTIVE;
                if value & CR0_PAGING != 0 && old.efer & EFER_LONG_MODE != 0 {
                    self.guest.efer |= EFER_LONG_MODE_ACTIVE;
                }
                if (value ^ old.cr0) & CR0_PAGING_BITS != 0 { self.load(vmcb)? } else { self.use_root(vmcb)? }
            }
            3 => {
                self.counts.root_writes += 1;
                self.guest.cr3 = value;
                self.load(vmcb)?;
            }
            4 => {
                self.counts.control_writes += 1;
                // Long mode needs the extension.
                if value & 1 << 5 == 0 && old.efer & EFER_LONG_MODE_ACTIVE != 0 {
                    raise(vmcb, PROTECTION, 0);
                    return Ok(false);
                }
                self.guest.cr4 = value;
                if (value ^ old.cr4) & CR4_PAGING_BITS != 0 {
                    self.load(vmcb)?;
                } else {
                    self.use_root(vmcb)?;
                }
                if (value ^ old.cr4) & CR4_GLOBAL != 0 {
                    self.tables.flush_guest();
                    vmcb.control.flush();
                }
            }
            _ => return Err("a control register is written that is not watched"),
        }
        Ok(true)
    }

    /// RDMSR or WRMSR of EFER, two bytes long.
    pub(super) fn efer(&mut self, vcpu: &mut Vcpu, is_write: bool) -> Result<(), &'static str> {
        let (low, high) = (vcpu.register(0) & 0xffff_ffff, vcpu.register(2) & 0xffff_ffff);
        vcpu.vmcb.save.rip += 2;
        if !is_write {
            let value = self.guest.efer | EFER_SVM;
            vcpu.set_register(0, value & 0xffff_ffff);
            vcpu.set_register(2, value >> 32);
            return Ok(());
        }
        self.counts.control_writes += 1;
        let kept = EFER_LONG_MODE_ACTIVE;
        self.guest.efer = (high << 32 | low) & !kept | self.guest.efer & kept;
        self.load(vcpu.vmcb)
    }
}
