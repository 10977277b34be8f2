//! The guest's first and only program: fills most of RAM from several processes, checks every page, and turns the machine off.
//!
//! It needs no library and no other file. The kernel gives it the words of its command line that it does not know itself as
//! environment: `MEMSLOT_ROUNDS`, `MEMSLOT_PERCENT` and `MEMSLOT_HOTPLUG` say how much is done, `MEMSLOT_HYPERVISOR=1` that somebody listens to calls.
#![no_std]
#![no_main]

#[path = "../guest_init/hotplug.rs"]
mod hotplug;
#[path = "../memory_functions.rs"]
mod memory_functions;
#[path = "../guest_init/system.rs"]
mod system;
#[path = "../guest_init/workload.rs"]
mod workload;

use system::{Environment, call, print};

core::arch::global_asm!(
    ".global _start",
    "_start:",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {start}",
    "ud2",
    start = sym start,
);

/// The first number of a call: see the hypervisor's scenarios.
const READY: u64 = 0x6d65_6d01;
const RESULT: u64 = 0x6d65_6d02;

extern "sysv64" fn start(stack: *const usize) -> ! {
    // SAFETY: the kernel's stack layout: the number of arguments, them, 0, the environment, 0.
    let environment = unsafe { Environment::new(stack) };
    let is_guest = environment.number(b"MEMSLOT_HYPERVISOR=", 0) == 1;
    let (seconds, hundredths) = system::uptime();
    print!("memslot-init: userland after {seconds}.{hundredths:02} s\n");
    if is_guest {
        call(READY, 0);
    }
    let rounds = environment.number(b"MEMSLOT_ROUNDS=", 2);
    let percent = environment.number(b"MEMSLOT_PERCENT=", 70);
    let cycles = environment.number(b"MEMSLOT_HOTPLUG=", 0);
    let wrong = workload::run(rounds, percent, || if cycles > 0 { hotplug::run(cycles) } else { 0 });
    let (seconds, hundredths) = system::uptime();
    let verdict = if wrong == 0 { "PASS" } else { "FAIL" };
    print!("memslot-init: {verdict}, {wrong} errors, after {seconds}.{hundredths:02} s\n");
    if is_guest {
        call(RESULT, wrong);
    }
    system::power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    print!("memslot-init: {info}\n");
    system::power_off()
}
