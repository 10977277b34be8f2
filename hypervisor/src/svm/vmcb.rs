//! The control block of a virtual processor, as the manual lays it out (AMD64 Architecture Programmer's Manual, volume 2, appendix B).

use alloc::boxed::Box;
use core::mem::offset_of;

/// A segment register.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) selector: u16,
    /// The descriptor's bits 40-47 and 52-55.
    pub(crate) attributes: u16,
    pub(crate) limit: u32,
    pub(crate) base: u64,
}

/// What the hypervisor says, and why the guest came out.
#[repr(C)]
pub(crate) struct Control {
    pub(crate) intercept_control_registers: u32,
    pub(crate) intercept_debug_registers: u32,
    pub(crate) intercept_exceptions: u32,
    /// See [`intercept`].
    pub(crate) intercept_3: u32,
    /// See [`intercept`].
    pub(crate) intercept_4: u32,
    unused_14: [u32; 11],
    pub(crate) io_permissions: u64,
    pub(crate) msr_permissions: u64,
    pub(crate) tsc_offset: u64,
    pub(crate) asid: u32,
    /// 1 flushes all translations at VMRUN.
    pub(crate) tlb_control: u32,
    /// See [`V_IRQ`].
    pub(crate) interrupt_control: u32,
    pub(crate) interrupt_vector: u32,
    pub(crate) interrupt_shadow: u64,
    /// See [`exit`].
    pub(crate) exit_code: u64,
    pub(crate) exit_info_1: u64,
    pub(crate) exit_info_2: u64,
    /// The event whose delivery was cut off.
    pub(crate) exit_interrupt_info: u64,
    pub(crate) nested_paging: u64,
    unused_98: [u64; 2],
    /// The event that VMRUN delivers.
    pub(crate) event: u64,
    pub(crate) nested_cr3: u64,
    unused_b8: [u64; 105],
}

impl Control {
    /// At the next entry the guest has no translations from before.
    pub(crate) fn flush(&mut self) {
        self.tlb_control = 1;
    }
}

/// The guest's state.
#[repr(C)]
pub(crate) struct Save {
    pub(crate) es: Segment,
    pub(crate) cs: Segment,
    pub(crate) ss: Segment,
    pub(crate) ds: Segment,
    pub(crate) fs: Segment,
    pub(crate) gs: Segment,
    pub(crate) gdtr: Segment,
    pub(crate) ldtr: Segment,
    pub(crate) idtr: Segment,
    pub(crate) tr: Segment,
    unused_a0: [u8; 43],
    pub(crate) cpl: u8,
    unused_cc: u32,
    pub(crate) efer: u64,
    unused_d8: [u64; 14],
    pub(crate) cr4: u64,
    pub(crate) cr3: u64,
    pub(crate) cr0: u64,
    pub(crate) dr7: u64,
    pub(crate) dr6: u64,
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
    unused_180: [u64; 11],
    pub(crate) rsp: u64,
    unused_1e0: [u64; 3],
    pub(crate) rax: u64,
    unused_200: [u64; 8],
    pub(crate) cr2: u64,
    unused_248: [u64; 4],
    pub(crate) page_attributes: u64,
    unused_270: [u64; 306],
}

/// The control block.
#[repr(C, align(4096))]
pub(crate) struct Vmcb {
    pub(crate) control: Control,
    pub(crate) save: Save,
}

const _: () = {
    assert!(offset_of!(Control, io_permissions) == 0x40);
    assert!(offset_of!(Control, interrupt_control) == 0x60);
    assert!(offset_of!(Control, exit_code) == 0x70);
    assert!(offset_of!(Control, nested_paging) == 0x90);
    assert!(offset_of!(Control, event) == 0xa8);
    assert!(offset_of!(Save, cpl) == 0xcb);
    assert!(offset_of!(Save, efer) == 0xd0);
    assert!(offset_of!(Save, cr4) == 0x148);
    assert!(offset_of!(Save, rsp) == 0x1d8);
    assert!(offset_of!(Save, rax) == 0x1f8);
    assert!(offset_of!(Save, cr2) == 0x240);
    assert!(offset_of!(Save, page_attributes) == 0x268);
    assert!(offset_of!(Vmcb, save) == 0x400);
    assert!(size_of::<Vmcb>() == 0x1000);
};

impl Vmcb {
    /// A new one, all zeros, for ever.
    pub(crate) fn leak() -> &'static mut Self {
        let mut block = Box::<Self>::new_uninit();
        // SAFETY: the memory is the block's, and it consists of numbers, for which zero is a value.
        Box::leak(unsafe {
            block.as_mut_ptr().write_bytes(0, 1);
            block.assume_init()
        })
    }
}

/// Bits of the intercept words.
pub(crate) mod intercept {
    /// Word 3: a physical interrupt that the guest would take.
    pub(crate) const INTERRUPT: u32 = 1 << 0;
    /// Word 3: an NMI.
    pub(crate) const NMI: u32 = 1 << 1;
    /// Word 3: the return from an interrupt.
    pub(crate) const IRET: u32 = 1 << 20;
    /// Word 3: INVLPG.
    pub(crate) const INVLPG: u32 = 1 << 25;
    /// Word 3: ports, as the permission map says.
    pub(crate) const PORTS: u32 = 1 << 27;
    /// Word 3: model-specific registers, as the permission map says.
    pub(crate) const REGISTERS: u32 = 1 << 28;
    /// Word 3: a triple fault.
    pub(crate) const SHUTDOWN: u32 = 1 << 31;
    /// Word 4: must be set.
    pub(crate) const VMRUN: u32 = 1 << 0;
    /// Word 4: the guest's call of the hypervisor.
    pub(crate) const VMMCALL: u32 = 1 << 1;
}

/// Exit codes.
pub(crate) mod exit {
    pub(crate) const READ_CONTROL_0: u64 = 0x00;
    pub(crate) const READ_CONTROL_15: u64 = 0x0f;
    pub(crate) const WRITE_CONTROL_0: u64 = 0x10;
    pub(crate) const WRITE_CONTROL_15: u64 = 0x1f;
    pub(crate) const PAGE_FAULT: u64 = 0x4e;
    pub(crate) const INTERRUPT: u64 = 0x60;
    pub(crate) const NMI: u64 = 0x61;
    pub(crate) const IRET: u64 = 0x74;
    pub(crate) const HALT: u64 = 0x78;
    pub(crate) const INVLPG: u64 = 0x79;
    pub(crate) const PORT: u64 = 0x7b;
    pub(crate) const REGISTER: u64 = 0x7c;
    pub(crate) const SHUTDOWN: u64 = 0x7f;
    pub(crate) const VMMCALL: u64 = 0x81;
    pub(crate) const NESTED_PAGE_FAULT: u64 = 0x400;
}

/// Kinds of events, as EVENTINJ and EXITINTINFO have them.
pub(crate) mod event {
    pub(crate) const INTERRUPT: u64 = 0;
    pub(crate) const NMI: u64 = 2;
    pub(crate) const EXCEPTION: u64 = 3;
}

/// An event's bit: there is one.
pub(crate) const EVENT_VALID: u64 = 1 << 31;
/// An event's bit: its upper half is an error code.
pub(crate) const EVENT_ERROR_CODE: u64 = 1 << 11;
/// In the interrupt control word: the guest takes the interrupt named beside it as soon as it can.
pub(crate) const V_IRQ: u32 = 1 << 8;
/// In the interrupt control word: whatever its task priority is.
pub(crate) const V_IGNORE_TPR: u32 = 1 << 20;
