//! Exceptions of the hypervisor itself. None is expected: each says what it was and ends the run. The one exception to this is the
//! NMI that brings a processor out of its guest, which has done its work when it arrives.
//!
//! All handlers have a stack of their own (the interrupt stack table): precompiled code may use memory below the stack pointer.

use alloc::boxed::Box;
use core::arch::{asm, global_asm};

#[repr(C, align(16))]
struct Stack([u8; 16384]);

#[repr(C, packed)]
struct TaskState {
    unused_0: u32,
    stacks: [u64; 3],
    unused_1: u64,
    interrupt_stacks: [u64; 7],
    unused_2: [u16; 5],
    ports: u16,
}

/// What the stubs push.
#[repr(C)]
struct TrapFrame {
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Prepares this processor.
pub(crate) fn install() {
    let stack: &'static Stack = Box::leak(Box::new(Stack([0; 16384])));
    let top = core::ptr::from_ref(stack).addr() as u64 + 16384;
    let task: &'static TaskState = Box::leak(Box::new(TaskState {
        unused_0: 0,
        stacks: [top; 3],
        unused_1: 0,
        interrupt_stacks: [top; 7],
        unused_2: [0; 5],
        ports: 104,
    }));
    let task = core::ptr::from_ref(task).addr() as u64;
    let gdt: &'static [u64; 6] = Box::leak(Box::new([
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0,
        103 | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24 & 0xff) << 56,
        task >> 32,
    ]));
    // SAFETY: the label is that of the stubs below.
    let stubs = unsafe {
        let stubs: u64;
        asm!("lea {}, [rip + trap_stubs]", out(reg) stubs, options(nomem, nostack));
        stubs
    };
    let gates: [[u64; 2]; 32] = core::array::from_fn(|vector| {
        let stub = stubs + 16 * vector as u64;
        [stub & 0xffff | 0x08 << 16 | 1 << 32 | 0x8e << 40 | (stub >> 16 & 0xffff) << 48, stub >> 32]
    });
    let gates: &'static [[u64; 2]; 32] = Box::leak(Box::new(gates));
    let pointer = |table: *const u8, bytes: usize| {
        let (base, limit) = (table.addr() as u64, bytes as u64 - 1);
        [limit | base << 16, base >> 48]
    };
    let gdt = pointer(gdt.as_ptr().cast(), size_of_val(gdt));
    let idt = pointer(gates.as_ptr().cast(), size_of_val(gates));
    // SAFETY: the tables are never freed; code and data segments are where they were.
    unsafe {
        asm!("lgdt [{}]", "lidt [{}]", "ltr {:x}", in(reg) &gdt, in(reg) &idt, in(reg) 0x20_u64, options(nostack));
    }
}

extern "sysv64" fn trap(frame: &TrapFrame) -> ! {
    let fault_address: u64;
    // SAFETY: reading it changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) fault_address, options(nomem, nostack)) };
    crate::give_up(&format_args!(
        "exception {} (error code {:#x}) of the hypervisor at {:#x}, stack {:#x}, cr2 {fault_address:#x}",
        frame.vector, frame.error_code, frame.rip, frame.rsp
    ))
}

global_asm!(
    ".text",
    ".balign 16",
    "trap_stubs:",
    ".set vector, 0",
    ".rept 32",
    ".balign 16",
    ".if vector == 2",
    "iretq",
    ".else",
    ".if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)",
    "push 0",
    ".endif",
    "push vector",
    "jmp trap_common",
    ".endif",
    ".set vector, vector + 1",
    ".endr",
    "trap_common:",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {trap}",
    trap = sym trap,
);
