//! The machine's memory by its physical address: the first 512 GiB are mapped where they are.

use core::ops::Range;

use crate::cpu::index;

/// A pointer to physical memory.
pub(crate) fn pointer<T>(address: u64) -> *mut T {
    core::ptr::with_exposed_provenance_mut(index(address))
}

/// # Safety
/// The range is mapped, and nobody writes to it for as long as the result is used.
pub(crate) unsafe fn bytes(range: Range<u64>) -> &'static [u8] {
    let length = index(range.end.saturating_sub(range.start));
    // SAFETY: the caller's promise.
    unsafe { core::slice::from_raw_parts(pointer(range.start), length) }
}

/// Reads 32 bits, at any alignment.
///
/// # Safety
/// They are mapped.
pub(crate) unsafe fn word32(address: u64) -> u64 {
    // SAFETY: the caller's promise.
    u64::from(unsafe { pointer::<u32>(address).read_unaligned() })
}

/// Reads 64 bits, at any alignment.
///
/// # Safety
/// They are mapped.
pub(crate) unsafe fn word64(address: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { pointer::<u64>(address).read_unaligned() }
}

/// Copies one page to another.
///
/// # Safety
/// Both are pages of memory that the hypervisor owns, and differ. A guest may be writing to `from`: then the copy has some of it.
pub(crate) unsafe fn copy_page(from: u64, to: u64) {
    // SAFETY: the caller's promise. Not by Rust's own copy, as the memory may change underneath; and not by a string instruction, which
    // QEMU takes several times as long for. The loop lies within a page of code: else QEMU looks for its way at each turn, which takes
    // longer than the turn.
    unsafe {
        core::arch::asm!(
            ".p2align 7",
            "2:",
            "mov {a}, [{from}]", "mov {b}, [{from} + 8]", "mov {c}, [{from} + 16]", "mov {d}, [{from} + 24]",
            "mov [{to}], {a}", "mov [{to} + 8], {b}", "mov [{to} + 16], {c}", "mov [{to} + 24], {d}",
            "mov {a}, [{from} + 32]", "mov {b}, [{from} + 40]", "mov {c}, [{from} + 48]", "mov {d}, [{from} + 56]",
            "mov [{to} + 32], {a}", "mov [{to} + 40], {b}", "mov [{to} + 48], {c}", "mov [{to} + 56], {d}",
            "add {from}, 64", "add {to}, 64", "dec {n}", "jnz 2b",
            from = inout(reg) from => _, to = inout(reg) to => _, n = inout(reg) 64_u64 => _,
            a = out(reg) _, b = out(reg) _, c = out(reg) _, d = out(reg) _,
            options(nostack),
        );
    }
}

/// Whether two pages have the same contents.
///
/// # Safety
/// Both are pages of memory that nobody writes at the moment.
pub(crate) unsafe fn same_page(a: u64, b: u64) -> bool {
    // SAFETY: the caller's promise; pages are aligned.
    let (a, b) = unsafe { (&*pointer::<[u64; 512]>(a), &*pointer::<[u64; 512]>(b)) };
    a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}
