//! Linux's system calls, as far as they are needed, and calls of the hypervisor.

use core::arch::asm;
use core::fmt::{self, Write};

const WRITE: usize = 1;
const OPEN: usize = 2;
const MMAP: usize = 9;
const MUNMAP: usize = 11;
const MADVISE: usize = 28;
const FORK: usize = 57;
const EXIT: usize = 60;
const WAIT: usize = 61;
const SYSINFO: usize = 99;
const REBOOT: usize = 169;
const CLOCK_GETTIME: usize = 228;

/// # Safety
/// As the system call.
unsafe fn system_call(number: usize, a: [usize; 6]) -> isize {
    let result;
    // SAFETY: the caller's promise; the kernel keeps all other registers.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], in("r9") a[5], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// Calls the hypervisor. Without one the processor refuses the instruction.
pub(crate) fn call(number: u64, value: u64) {
    // SAFETY: the hypervisor changes no register.
    unsafe {
        asm!("xchg rbx, {value}", "vmmcall", "xchg rbx, {value}", value = inout(reg) value => _,
            inout("rax") number => _, options(nostack));
    }
}

/// The standard output: the console.
pub(crate) struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: the text is readable.
        unsafe { system_call(WRITE, [1, text.as_ptr().addr(), text.len(), 0, 0, 0]) };
        Ok(())
    }
}

macro_rules! print {
    ($($text:tt)*) => {{
        use core::fmt::Write as _;
        let _ = write!($crate::system::Console, $($text)*);
    }};
}
pub(crate) use print;

/// The words `NAME=value` that the program was started with.
#[derive(Clone, Copy)]
pub(crate) struct Environment(*const *const u8);

impl Environment {
    /// # Safety
    /// `stack` is the stack pointer at the start.
    pub(crate) unsafe fn new(stack: *const usize) -> Self {
        // SAFETY: the first word is the number of arguments, which are followed by a 0.
        Self(unsafe { stack.add(*stack + 2) }.cast())
    }

    /// The number behind a word such as `b"NAME="`.
    pub(crate) fn number(self, word: &[u8], otherwise: u64) -> u64 {
        let mut at = self.0;
        // SAFETY: a list of texts that ends with 0; each text ends with a 0 byte.
        unsafe {
            while !(*at).is_null() {
                let text = *at;
                let is_it = (0..word.len()).all(|byte| *text.add(byte) == word[byte]);
                if is_it {
                    let mut number = 0;
                    let mut digit = text.add(word.len());
                    while (*digit).is_ascii_digit() {
                        number = number * 10 + u64::from(*digit - b'0');
                        digit = digit.add(1);
                    }
                    return number;
                }
                at = at.add(1);
            }
        }
        otherwise
    }
}

/// Time since the kernel started: seconds and hundredths.
pub(crate) fn uptime() -> (u64, u64) {
    let mut time = [0_u64; 2];
    // SAFETY: room for the two numbers.
    unsafe { system_call(CLOCK_GETTIME, [1, time.as_mut_ptr().addr(), 0, 0, 0, 0]) };
    (time[0], time[1] / 10_000_000)
}

/// Free memory in bytes.
pub(crate) fn free_memory() -> usize {
    let mut info = [0_usize; 16];
    // SAFETY: the structure has 112 bytes.
    unsafe { system_call(SYSINFO, [info.as_mut_ptr().addr(), 0, 0, 0, 0, 0]) };
    info[5]
}

/// New memory, with or without large pages.
pub(crate) fn map(bytes: usize, large: bool) -> Option<&'static mut [u64]> {
    const READ_WRITE: usize = 3;
    const PRIVATE_ANONYMOUS: usize = 0x22;
    // SAFETY: new memory, which belongs to the result alone.
    unsafe {
        let start = system_call(MMAP, [0, bytes, READ_WRITE, PRIVATE_ANONYMOUS, usize::MAX, 0]);
        let start = usize::try_from(start).ok()?;
        system_call(MADVISE, [start, bytes, if large { 14 } else { 15 }, 0, 0, 0]);
        Some(core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(start), bytes / 8))
    }
}

/// Physical memory, through `/dev/mem`, for ever.
pub(crate) fn map_physical(start: usize, bytes: usize) -> Option<usize> {
    const READ_WRITE: usize = 3;
    const SHARED: usize = 1;
    // `O_RDWR | O_SYNC`: not cached.
    const FLAGS: usize = 0o4_010_002;
    // SAFETY: the mapping is new.
    unsafe {
        let file = system_call(OPEN, [c"/dev/mem".as_ptr().addr(), FLAGS, 0, 0, 0, 0]);
        let file = usize::try_from(file).ok()?;
        usize::try_from(system_call(MMAP, [0, bytes, READ_WRITE, SHARED, file, start])).ok()
    }
}

/// Gives memory back.
pub(crate) fn unmap(memory: &'static mut [u64]) {
    // SAFETY: it was mapped by `map`, and nobody has it any more.
    unsafe { system_call(MUNMAP, [memory.as_ptr().addr(), memory.len() * 8, 0, 0, 0, 0]) };
}

/// Runs `work` in a process of its own, which ends with what it returns. Whether there is one.
pub(crate) fn fork(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: there are no threads.
    let process = unsafe { system_call(FORK, [0; 6]) };
    if process == 0 {
        let status = usize::from(!work());
        // SAFETY: ends the process.
        unsafe { system_call(EXIT, [status, 0, 0, 0, 0, 0]) };
    }
    process > 0
}

/// Waits for one process; whether it was content.
pub(crate) fn wait() -> bool {
    let mut status = 0_u32;
    // SAFETY: room for the status.
    let process = unsafe { system_call(WAIT, [usize::MAX, (&raw mut status).addr(), 0, 0, 0, 0]) };
    process > 0 && status == 0
}

/// Turns the machine off.
pub(crate) fn power_off() -> ! {
    loop {
        // SAFETY: nothing is to be written to disk.
        unsafe { system_call(REBOOT, [0xfee1_dead, 0x2812_1969, 0x4321_fedc, 0, 0, 0]) };
    }
}
