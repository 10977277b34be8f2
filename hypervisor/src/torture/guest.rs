//! What the torture guest's steps are written with. It runs inside the guest: no heap, no console, no interrupts.

use core::arch::{asm, global_asm};

use super::{AREA, DATA, OTHER, ROOT, STEPS, TABLES, TABLES_END, USER, USER_STACK, call};
use crate::cpu::{self, EFER};
use crate::physical::pointer;

global_asm!(include_str!("guest.s"));

unsafe extern "sysv64" {
    fn torture_probe();
    fn torture_read();
    fn torture_write();
    fn torture_fetch();
    fn torture_after();
    pub(crate) fn torture_page_fault();
    pub(crate) fn torture_exception();
    pub(crate) fn torture_end();
    static torture_error: u64;
    static torture_address: u64;
}

/// Bits of the guest's table entries.
pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITE: u64 = 2;
pub(crate) const USERS: u64 = 4;
pub(crate) const ACCESSED: u64 = 0x20;
pub(crate) const DIRTY: u64 = 0x40;
pub(crate) const LARGE: u64 = 0x80;
pub(crate) const GLOBAL: u64 = 0x100;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
/// Present, writable, for everybody.
pub(crate) const ALL: u64 = PRESENT | WRITE | USERS;

/// Bits of page faults' error codes.
pub(crate) const BY_WRITE: u32 = 2;
pub(crate) const BY_USER: u32 = 4;
pub(crate) const RESERVED: u32 = 8;
pub(crate) const BY_FETCH: u32 = 16;
/// It was present, and did not allow it.
pub(crate) const REFUSED: u32 = 1;

/// Bits of control registers.
pub(crate) const CR0_WRITE_PROTECT: u64 = 1 << 16;
pub(crate) const CR4_GLOBAL: u64 = 1 << 7;
pub(crate) const CR4_EXECUTION: u64 = 1 << 20;
pub(crate) const CR4_ACCESS: u64 = 1 << 21;
pub(crate) const EFER_NO_EXECUTE: u64 = 1 << 11;

/// An expectation that was not met: the line, what was seen there, what should have been.
pub(crate) struct Failure(pub(crate) u32, pub(crate) u64, pub(crate) u64);

/// What became of an access.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was done; a read has this value.
    Done(u64),
    /// A page fault, at the address that was accessed, with this error code.
    Fault(u32),
    /// A page fault that names another address.
    Elsewhere(u64),
    /// Another exception.
    Exception,
    /// It came out of the guest: there is no memory.
    Nothing,
}

/// As a number, to be reported.
pub(crate) trait Word: Copy {
    fn word(self) -> u64;
}

impl Word for Outcome {
    fn word(self) -> u64 {
        match self {
            Self::Done(value) => value,
            Self::Fault(code) => 0xfa17_0000_0000_0000 | u64::from(code),
            Self::Elsewhere(address) => 0xfa18_0000_0000_0000 ^ address,
            Self::Exception => 0xfa19_0000_0000_0000,
            Self::Nothing => 0xfa1a_0000_0000_0000,
        }
    }
}

impl Word for bool {
    fn word(self) -> u64 {
        u64::from(self)
    }
}

impl Word for u64 {
    fn word(self) -> u64 {
        self
    }
}

/// Ends the step unless both are the same.
macro_rules! must {
    ($seen:expr, $right:expr) => {{
        let (seen, right) = ($seen, $right);
        if seen != right {
            return Err($crate::torture::guest::Failure(
                line!(),
                $crate::torture::guest::Word::word(seen),
                $crate::torture::guest::Word::word(right),
            ));
        }
    }};
}
pub(super) use must;

/// Who accesses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Kernel,
    User,
}

/// Calls the hypervisor.
pub(crate) fn host(number: u64, arguments: [u64; 4]) -> u64 {
    let answer;
    let [first, second, third, fourth] = arguments;
    // SAFETY: the call changes no register but RAX. The compiler keeps RBX for itself, so it is put back.
    unsafe {
        asm!("xchg rbx, {first}", "vmmcall", "xchg rbx, {first}", first = inout(reg) first => _,
            inout("rax") number => answer, in("rcx") second, in("rdx") third, in("rsi") fourth, options(nostack));
    }
    answer
}

/// Where the guest begins.
pub(crate) extern "sysv64" fn start() -> ! {
    for (number, step) in (0..).zip(STEPS) {
        host(call::BEGIN, [number, 0, 0, 0]);
        let mut machine = Machine::new();
        let failure = (step.run)(&mut machine).err().unwrap_or(Failure(0, 0, 0));
        machine.set_back();
        host(call::END, [number, u64::from(failure.0), failure.1, failure.2]);
    }
    loop {
        host(call::DONE, [0; 4]);
    }
}

/// The guest's processor and tables, as a step finds them: AREA and OTHER are empty.
pub(crate) struct Machine {
    next: u64,
    cr0: u64,
    cr4: u64,
    efer: u64,
}

impl Machine {
    fn new() -> Self {
        let (cr0, cr4): (u64, u64);
        // SAFETY: reading them changes nothing; EFER exists.
        let efer = unsafe {
            asm!("mov {}, cr0", "mov {}, cr4", out(reg) cr0, out(reg) cr4, options(nomem, nostack));
            cpu::read_msr(EFER)
        };
        Self { next: TABLES, cr0, cr4, efer }
    }

    /// What a step has changed is as it was.
    fn set_back(&mut self) {
        self.set_cr0(self.cr0);
        self.set_cr4(self.cr4);
        self.set_efer(self.efer);
        for entry in [AREA, OTHER].map(|area| ROOT + (area >> 39 & 0x1ff) * 8) {
            self.set(entry, 0);
        }
        self.load(ROOT);
        self.flush_all();
    }

    /// An empty table.
    pub(crate) fn table(&mut self) -> u64 {
        let table = self.next;
        assert!(table < TABLES_END, "the guest has no more tables");
        self.next += 4096;
        for entry in 0..512 {
            self.set(table + entry * 8, 0);
        }
        table
    }

    /// A word of memory, through the kernel's large pages.
    pub(crate) fn get(&self, gpa: u64) -> u64 {
        // SAFETY: the first GiB is mapped, and what lies there and is used by Rust is not written by devices.
        unsafe { pointer::<u64>(gpa).read_volatile() }
    }

    /// Writes a word of memory, through the kernel's large pages.
    pub(crate) fn set(&self, gpa: u64, value: u64) {
        // SAFETY: as `get`; steps write to tables and data only.
        unsafe { pointer::<u64>(gpa).write_volatile(value) }
    }

    /// Changes an entry, and flushes the address that it maps.
    pub(crate) fn change(&self, entry: u64, value: u64, va: u64) {
        self.set(entry, value);
        self.flush(va);
    }

    /// Where the entry of a level is that maps `va` from the root `root`; tables that are missing are made.
    pub(crate) fn entry_from(&mut self, root: u64, va: u64, level: u32) -> u64 {
        let mut table = root;
        for above in (level + 1..=4).rev() {
            let entry = table + (va >> (12 + 9 * (above - 1)) & 0x1ff) * 8;
            if self.get(entry) & PRESENT == 0 {
                let new = self.table();
                self.set(entry, new | ALL);
            }
            table = self.get(entry) & 0x000f_ffff_ffff_f000;
        }
        table + (va >> (12 + 9 * (level - 1)) & 0x1ff) * 8
    }

    /// Where the entry of a level is that maps `va`.
    pub(crate) fn entry(&mut self, va: u64, level: u32) -> u64 {
        self.entry_from(ROOT, va, level)
    }

    /// Maps a page of 4 KiB for everybody; returns where its entry is.
    pub(crate) fn map(&mut self, va: u64, gpa: u64) -> u64 {
        let entry = self.entry(va, 1);
        self.set(entry, gpa | ALL);
        entry
    }

    /// Maps a page of 2 MiB for everybody; returns where its entry is.
    pub(crate) fn map_large(&mut self, va: u64, gpa: u64) -> u64 {
        let entry = self.entry(va, 2);
        self.set(entry, gpa | ALL | LARGE);
        entry
    }

    /// Writes what tells a page from all others, and lets it be executed. Returns what a read must give.
    pub(crate) fn mark(&self, gpa: u64) -> Outcome {
        let word = gpa << 8 | 0xc3;
        self.set(gpa, word);
        Outcome::Done(word)
    }

    /// A page of data by its number, marked.
    pub(crate) fn data(&self, page: u64) -> (u64, Outcome) {
        let gpa = DATA + page * 4096;
        (gpa, self.mark(gpa))
    }

    fn access(&self, what: unsafe extern "sysv64" fn(), va: u64, value: u64, who: Who) -> Outcome {
        let (shift, stack) = if who == Who::User { (USER, USER + USER_STACK) } else { (0, 0) };
        let what = (what as *const ()).addr() as u64 + shift;
        let after = (torture_after as *const ()).addr() as u64 + shift;
        let (result, rest): (u64, u64);
        // SAFETY: whatever the access does to the guest's data, it comes back.
        unsafe {
            asm!("call {probe}", probe = sym torture_probe, in("rdi") what, in("rsi") va, in("rcx") stack, in("r8") after,
                lateout("rax") result, inlateout("rdx") value => rest, clobber_abi("sysv64"));
        }
        // SAFETY: nobody else runs in the guest.
        let (error, address) = unsafe {
            ((&raw const torture_error).read_volatile(), (&raw const torture_address).read_volatile())
        };
        match (rest, u32::try_from(error)) {
            (0, _) => Outcome::Nothing,
            (_, Err(_)) => Outcome::Done(result),
            (_, Ok(0x1_0000..)) => Outcome::Exception,
            // QEMU's processor leaves out the bit for "present" where a reserved bit is set; the manual does not.
            (_, Ok(code)) if address == va && code & RESERVED != 0 => Outcome::Fault(code | REFUSED),
            (_, Ok(code)) if address == va => Outcome::Fault(code),
            _ => Outcome::Elsewhere(address),
        }
    }

    /// Reads a word.
    pub(crate) fn read(&self, va: u64, who: Who) -> Outcome {
        self.access(torture_read, va, 0, who)
    }

    /// Writes a word behind the page's mark.
    pub(crate) fn write(&self, va: u64, value: u64, who: Who) -> Outcome {
        match self.access(torture_write, va, value, who) {
            Outcome::Done(_) => Outcome::Done(0),
            other => other,
        }
    }

    /// Executes the page's mark.
    pub(crate) fn execute(&self, va: u64, who: Who) -> Outcome {
        match self.access(torture_fetch, va, 0, who) {
            Outcome::Done(_) => Outcome::Done(0),
            other => other,
        }
    }

    /// INVLPG.
    pub(crate) fn flush(&self, va: u64) {
        // SAFETY: a flush changes nothing that Rust knows of.
        unsafe { asm!("invlpg [{}]", in(reg) va, options(nostack)) };
    }

    /// Loads CR3.
    pub(crate) fn load(&self, root: u64) {
        // SAFETY: all roots map the image.
        unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack)) };
    }

    /// Loads CR3 with what it has: flushes what is not global.
    pub(crate) fn flush_most(&self) {
        let root: u64;
        // SAFETY: as `load`.
        unsafe { asm!("mov {root}, cr3", "mov cr3, {root}", root = out(reg) root, options(nostack)) };
        debug_assert!(root & 0xfff == 0);
    }

    /// Flushes everything, by CR4.PGE.
    pub(crate) fn flush_all(&self) {
        self.flush_all_with(self.cr4);
    }

    /// The same, with other bits of CR4.
    pub(crate) fn flush_all_with(&self, cr4: u64) {
        self.set_cr4(cr4 ^ CR4_GLOBAL);
        self.set_cr4(cr4);
    }

    pub(crate) fn cr0(&self) -> u64 {
        self.cr0
    }

    pub(crate) fn cr4(&self) -> u64 {
        self.cr4
    }

    pub(crate) fn efer(&self) -> u64 {
        self.efer
    }

    pub(crate) fn set_cr0(&self, value: u64) {
        // SAFETY: steps change protections that Rust code does not run into.
        unsafe { asm!("mov cr0, {}", in(reg) value, options(nostack)) };
    }

    pub(crate) fn set_cr4(&self, value: u64) {
        // SAFETY: as `set_cr0`.
        unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack)) };
    }

    pub(crate) fn set_efer(&self, value: u64) {
        // SAFETY: as `set_cr0`.
        unsafe { cpu::write_msr(EFER, value) };
    }

    /// CR0 as the guest reads it.
    pub(crate) fn read_cr0(&self) -> u64 {
        let value;
        // SAFETY: reading it changes nothing.
        unsafe { asm!("mov {}, cr0", out(reg) value, options(nomem, nostack)) };
        value
    }

    /// CR3 as the guest reads it.
    pub(crate) fn read_cr3(&self) -> u64 {
        let value;
        // SAFETY: reading it changes nothing.
        unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack)) };
        value
    }
}
