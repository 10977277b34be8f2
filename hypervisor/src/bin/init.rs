#![no_std]
#![no_main]
#[path = "../memory_functions.rs"]
mod memory_functions;
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! { loop {} }
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! { loop {} }
