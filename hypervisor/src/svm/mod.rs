//! AMD's virtualization: turning it on, the control block, the switch into the guest and back.
//!
//! The hypervisor never takes an interrupt: it runs with interrupts off and with the global interrupt flag cleared, and
//! what arrives waits for the guest. So nothing of the host's state but what VMRUN does not switch needs care:
//! general registers, SSE registers (compiled Rust uses them), and the hidden parts of segments (VMSAVE, VMLOAD).

mod vmcb;

use alloc::boxed::Box;
use core::arch::{asm, global_asm};

pub(crate) use self::vmcb::{
    EVENT_ERROR_CODE, EVENT_VALID, Segment, V_IGNORE_TPR, V_IRQ, Vmcb, event, exit, intercept,
};
use crate::cpu;

/// EFER's bit that turns SVM on.
pub(crate) const EFER_SVME: u64 = 1 << 12;

/// A page for the processor.
#[repr(C, align(4096))]
pub(crate) struct Page(pub(crate) [u8; 4096]);

impl Page {
    /// A new page of zeros, for ever.
    pub(crate) fn leak() -> &'static mut Self {
        Box::leak(Box::new(Self([0; 4096])))
    }

    /// Where it is.
    pub(crate) fn address(&self) -> u64 {
        core::ptr::from_ref(self).addr() as u64
    }
}

/// What VMRUN does not switch.
#[repr(C, align(16))]
#[derive(Default)]
pub(crate) struct Registers {
    pub(crate) rbx: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) rbp: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) r10: u64,
    pub(crate) r11: u64,
    pub(crate) r12: u64,
    pub(crate) r13: u64,
    pub(crate) r14: u64,
    pub(crate) r15: u64,
    mxcsr: u64,
    unused: u64,
    xmm: [[u64; 2]; 16],
}

impl Registers {
    /// As they are after a reset.
    pub(crate) fn new() -> Self {
        Self { mxcsr: 0x1f80, ..Self::default() }
    }
}

/// CR4: large pages, global pages; execution and access prevention for the supervisor.
const CR4_PAGES: u64 = 1 << 4 | 1 << 7;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;

/// Turns SVM on, on this processor, and has CR4 say of paging what Linux's says: a switch that changes how tables are read costs a
/// flush more, in QEMU each way. It means nothing for the host's own tables, which have no global and no user's pages.
///
/// # Errors
/// Why it cannot be used.
pub(crate) fn enable() -> Result<(), &'static str> {
    let features = core::arch::x86_64::__cpuid(0x8000_0001);
    if features.ecx & 1 << 2 == 0 {
        return Err("this processor has no SVM (QEMU: -cpu max)");
    }
    if core::arch::x86_64::__cpuid(0x8000_000a).edx & 1 == 0 {
        return Err("this processor has no nested paging");
    }
    // SAFETY: the registers exist where SVM does; the page is for the processor alone.
    unsafe {
        cpu::write_msr(cpu::EFER, cpu::read_msr(cpu::EFER) | EFER_SVME);
        cpu::write_msr(cpu::VM_HSAVE_PA, Page::leak().address());
        asm!("clgi", options(nomem, nostack));
    }
    let (mut control, leaf) = (CR4_PAGES, core::arch::x86_64::__cpuid_count(7, 0).ebx);
    for (bit, feature) in [(CR4_SMEP, 1 << 7), (CR4_SMAP, 1 << 20)] {
        control |= if leaf & feature != 0 { bit } else { 0 };
    }
    // SAFETY: the bits exist, and take away nothing that the host's tables, all the supervisor's, have.
    unsafe {
        let old: u64;
        asm!("mov {}, cr4", out(reg) old, options(nomem, nostack, preserves_flags));
        asm!("mov cr4, {}", in(reg) old | control, options(nostack, preserves_flags));
    }
    Ok(())
}

/// How many address spaces the processor can tell apart: that of the host, which is number 0, and those of guests.
pub(crate) fn asids() -> u32 {
    // One of a guest's there is at least.
    core::arch::x86_64::__cpuid(0x8000_000a).ebx.max(2)
}

/// Saves what VMLOAD brings back after the guest: once for each processor.
pub(crate) fn save_host() -> u64 {
    let page = Page::leak().address();
    // SAFETY: the page is a control block that VMSAVE may write to.
    unsafe { asm!("vmsave rax", in("rax") page, options(nostack)) };
    page
}

/// Lets an NMI in that has brought the processor out of the guest.
pub(crate) fn take_nmi() {
    // SAFETY: the handler returns at once; interrupts are off.
    unsafe { asm!("stgi", "nop", "clgi", options(nostack)) };
}

/// Brings the hidden segments and system registers of a control block to the processor (VMLOAD).
///
/// # Safety
/// The address is that of a control block. Without the host's own there, the next exception finds no stack.
pub(crate) unsafe fn load_hidden(block: u64) {
    // SAFETY: the caller's promise; Rust uses none of these registers.
    unsafe { asm!("vmload rax", in("rax") block, options(nostack)) };
}

/// Saves them (VMSAVE).
///
/// # Safety
/// As [`load_hidden`].
pub(crate) unsafe fn save_hidden(block: u64) {
    // SAFETY: the caller's promise.
    unsafe { asm!("vmsave rax", in("rax") block, options(nostack)) };
}

/// Runs the guest until the next exit. Its hidden segments are loaded before, and are still there after.
///
/// # Safety
/// The control block is sound: it lets the guest reach its own memory only.
pub(crate) unsafe fn run(vmcb: &mut Vmcb, registers: &mut Registers) {
    // SAFETY: the caller's promise. All that the guest changes is saved and brought back, here or by the caller.
    unsafe { svm_run(vmcb, registers) };
}

unsafe extern "sysv64" {
    fn svm_run(vmcb: *mut Vmcb, registers: *mut Registers);
}

global_asm!(include_str!("run.s"));
