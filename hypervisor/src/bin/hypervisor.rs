//! The hypervisor as a program: what only a binary can have. Everything else is the library.
#![no_std]
#![no_main]

#[path = "../memory_functions.rs"]
mod memory_functions;

core::arch::global_asm!(include_str!("../entry.s"));

#[global_allocator]
static HEAP: hypervisor::Heap = hypervisor::Heap::new();

/// Called once by `entry.s`, with the address of the start information.
#[unsafe(no_mangle)]
extern "C" fn hypervisor_main(start_info: u64) -> ! {
    // SAFETY: this is the first and only call, on the boot processor.
    unsafe { hypervisor::main(start_info, &HEAP) }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    hypervisor::give_up(info)
}
