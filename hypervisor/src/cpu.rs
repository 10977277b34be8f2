//! Single instructions of the processor: ports, model-specific registers, the time stamp counter.

use core::arch::asm;

/// The register with the bit that turns SVM on, among others.
pub(crate) const EFER: u32 = 0xc000_0080;
/// Where the segments FS and GS begin.
pub(crate) const FS_BASE: u32 = 0xc000_0100;
pub(crate) const GS_BASE: u32 = 0xc000_0101;
/// Where VMRUN may keep the host's state.
pub(crate) const VM_HSAVE_PA: u32 = 0xc001_0117;

/// Writes a byte to a port.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: ports of this machine that the hypervisor uses have no effect on Rust's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes two bytes to a port.
pub(crate) fn out16(port: u16, value: u16) {
    // SAFETY: as `out8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes four bytes to a port.
pub(crate) fn out32(port: u16, value: u32) {
    // SAFETY: as `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a byte from a port.
pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads two bytes from a port.
pub(crate) fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: as `out8`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads four bytes from a port.
pub(crate) fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as `out8`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads a model-specific register.
///
/// # Safety
/// The register exists.
pub(crate) unsafe fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe { asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The register exists, and the value does no harm to Rust's memory.
pub(crate) unsafe fn write_msr(register: u32, value: u64) {
    #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the caller's promise.
    unsafe { asm!("wrmsr", in("ecx") register, in("eax") low, in("edx") high, options(nostack)) };
}

/// The time stamp counter.
pub(crate) fn ticks() -> u64 {
    // SAFETY: every 64-bit processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A length or an offset as Rust wants it: 64 bits, here.
#[expect(clippy::cast_possible_truncation, reason = "this crate is for 64-bit processors only")]
pub(crate) const fn index(value: u64) -> usize {
    value as usize
}

/// Stops this processor for good.
pub(crate) fn sleep() -> ! {
    loop {
        // SAFETY: nothing wakes it that matters.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Leaves QEMU (its device `isa-debug-exit`): its exit status is `2 * code + 1`.
pub(crate) fn leave(code: u32) -> ! {
    loop {
        out32(0xf4, code);
        // SAFETY: where there is no such device, the processor sleeps for ever.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
