//! The hypervisor as a program: what only a binary can have. Everything else is the library.
#![no_std]
#![no_main]

#[path = "../memory_functions.rs"]
mod memory_functions;

core::arch::global_asm!(include_str!("../entry.s"));

#[global_allocator]
static HEAP: hypervisor::Heap = hypervisor::Heap::new();

unsafe extern "C" {
    static image_end: u8;
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static mut ap_stack: u64;
    static mut ap_entry: u64;
}

fn trampoline() -> hypervisor::Trampoline {
    let (start, end) = (&raw const ap_trampoline, &raw const ap_trampoline_end);
    // SAFETY: the two labels are around the code, which is never written.
    let code = unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) };
    hypervisor::Trampoline { code, stack: &raw mut ap_stack, entry: &raw mut ap_entry }
}

/// Called once by `entry.s`, with the address of the start information.
#[unsafe(no_mangle)]
extern "C" fn hypervisor_main(start_info: u64) -> ! {
    hypervisor::lies_at(0x10_0000..(&raw const image_end).addr() as u64);
    // SAFETY: this is the first and only call, on the boot processor.
    unsafe { hypervisor::main(start_info, &HEAP, trampoline()) }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    hypervisor::give_up(info)
}
