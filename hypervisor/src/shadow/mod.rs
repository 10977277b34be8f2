//! Shadow paging: the guest runs on tables that are made of its own, without nested paging.
//!
//! The processor walks shadow tables, and the guest must not notice. So what touches paging comes out:
//!
//! | exit | what is done |
//! |---|---|
//! | write to CR0, CR3, CR4, EFER | the guest's register is kept here, its tables are loaded, the processor gets the shadow root |
//! | read of CR3; of the others where the processor has something else | the guest's own |
//! | INVLPG | the guest's entries for the address are read again |
//! | page fault | resolved in the shadow tables; or the guest's own tables forbid it, and the guest gets the fault |
//!
//! Everything in here ends with entering the guest again, except that there is no memory where the guest accesses it
//! ([`Exit::Nothing`]), or that something is changing there ([`Exit::Later`]). The tables themselves are
//! [`memslot_mmu::shadow`].
//!
//! The guest may turn paging off and on and use any of its shapes as far as the tables are concerned; it runs 64-bit code
//! whenever it executes one of these instructions.

mod control;
mod decode;
mod memory;
mod report;

use alloc::boxed::Box;
use core::convert::Infallible;

use memslot::{AddressSpaceId, Gfn};
use memslot_mmu::Level;
use memslot_mmu::TableError;
use memslot_mmu::format::Access;
use memslot_mmu::shadow::guest::{
    ErrorCode, GuestAccess, GuestPaging, Mode, PageFault, Processor, Registers,
};
use memslot_mmu::shadow::{RootKind, Shadow, ShadowError, ShadowFault, ShadowVcpu};

use self::memory::Memory;
use crate::cpu;
use crate::guest::Guest;
use crate::paging::Host;
use crate::svm::{EVENT_ERROR_CODE, EVENT_VALID, Vmcb, event, intercept};
use crate::vcpu::{Exit, Vcpu};

/// Bits of control registers.
const CR0_TASK_SWITCHED: u64 = 1 << 3;
const CR0_WRITE_PROTECT: u64 = 1 << 16;
const CR0_PAGING: u64 = 1 << 31;
const CR4_ADDRESS_EXTENSION: u64 = 1 << 5;
const CR4_GLOBAL: u64 = 1 << 7;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const CR4_PREVENTION: u64 = 3 << 20;
const EFER_LONG_MODE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const EFER_NO_EXECUTE: u64 = 1 << 11;
const EFER_SVM: u64 = 1 << 12;
const FLAGS_ALIGNMENT_CHECK: u64 = 1 << 18;

const DOUBLE_FAULT: u64 = 8;
const PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;

/// How often the same fault may find that its access is allowed already, before the guest gets it.
const PATIENCE: u32 = 16;

/// What came out of a guest that runs on shadow tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// A page fault.
    Fault { va: u64, error_code: u32 },
    /// A control register is read.
    Read(u8),
    /// A control register is written.
    Write(u8),
    /// INVLPG.
    Invalidate,
    /// EFER is read or written.
    Efer { is_write: bool },
}

/// What was done, and how often.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) faults: u64,
    pub(crate) mapped: [u64; 3],
    pub(crate) already_mapped: u64,
    pub(crate) injected: u64,
    /// Faults that the guest got because nothing else ended them.
    pub(crate) spurious: u64,
    pub(crate) mmio: u64,
    pub(crate) write_tracked: u64,
    pub(crate) retry: u64,
    pub(crate) root_writes: u64,
    pub(crate) root_reads: u64,
    pub(crate) control_writes: u64,
    pub(crate) control_reads: u64,
    pub(crate) invalidations: u64,
    pub(crate) stale_roots: u64,
    pub(crate) double_faults: u64,
}

/// A virtual processor's shadow paging.
pub(crate) struct Paging {
    tables: ShadowVcpu<&'static Host>,
    memory: Memory,
    space: AddressSpaceId,
    processor: Processor,
    /// The guest's registers as the guest sees them.
    guest: Registers,
    /// The last fault that was allowed already, and how often it came.
    again: (u64, u32, u32),
    pub(crate) counts: Counts,
}

impl Paging {
    /// For a virtual processor whose control block has the guest's own registers.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn new(
        guest: &Guest,
        shadow: &Shadow<&'static Host>,
        vcpu: &mut Vcpu,
    ) -> Result<Self, &'static str> {
        let no_memory = "no memory for a virtual processor's shadow paging";
        vcpu.watch_register(cpu::EFER);
        let vmcb = &mut *vcpu.vmcb;
        let save = &vmcb.save;
        let registers = Registers { cr0: save.cr0, cr3: save.cr3, cr4: save.cr4, efer: save.efer };
        let mut this = Self {
            tables: shadow.vcpu().map_err(|_| no_memory)?,
            memory: Memory::new(guest).map_err(|_| no_memory)?,
            space: crate::guest::SPACE,
            processor: processor(),
            guest: registers,
            again: (0, 0, 0),
            counts: Counts::default(),
        };
        let control = &mut vmcb.control;
        control.nested_paging = 0;
        control.intercept_exceptions |= 1 << PAGE_FAULT;
        control.intercept_3 |= intercept::INVLPG | intercept::REGISTERS;
        // Writes are in the upper half.
        control.intercept_control_registers |= 1 << 3 | (1 << 0 | 1 << 3 | 1 << 4) << 16;
        this.load(vmcb)?;
        Ok(this)
    }

    /// How the guest's tables are read.
    fn paging(&mut self) -> GuestPaging {
        let mut paging = GuestPaging::new(self.guest, self.processor);
        if paging.mode() == Mode::Pae {
            // A bad register is as good as none: the guest would have had a protection fault.
            let Ok(_) = paging.load_pdptes(&self.memory.tables(self.space));
        }
        paging
    }

    /// The guest's registers or the address space have changed: finds the root for them.
    fn load(&mut self, vmcb: &mut Vmcb) -> Result<(), &'static str> {
        let paging = self.paging();
        let loaded = self.tables.load(paging, self.space);
        loaded.map_err(|error| why(&error))?;
        self.use_root(vmcb)
    }

    /// Brings the processor to the root that was loaded last.
    fn use_root(&self, vmcb: &mut Vmcb) -> Result<(), &'static str> {
        let root = self.tables.root().ok_or("there is no root")?;
        let (guest, save) = (&self.guest, &mut vmcb.save);
        save.cr3 = root.pfn.get() << 12;
        // Paging is always on, and the shadow tables' own protection holds for the kernel, too.
        save.cr0 = guest.cr0 | CR0_PAGING | CR0_WRITE_PROTECT;
        save.cr4 = guest.cr4 & !CR4_FIVE_LEVELS | CR4_ADDRESS_EXTENSION;
        save.efer = guest.efer | EFER_SVM | EFER_NO_EXECUTE;
        if guest.cr0 & CR0_PAGING == 0 {
            save.cr4 &= !CR4_PREVENTION;
        }
        match root.kind {
            RootKind::Level4 => {}
            RootKind::Level5 => save.cr4 |= CR4_FIVE_LEVELS,
            RootKind::Pae => save.efer &= !(EFER_LONG_MODE | EFER_LONG_MODE_ACTIVE),
        }
        // What the processor has need not come out when it is read.
        let differ = u32::from(save.cr0 != guest.cr0) | u32::from(save.cr4 != guest.cr4) << 4;
        let intercepts = &mut vmcb.control.intercept_control_registers;
        *intercepts = *intercepts & !(1 | 1 << 4) | differ;
        vmcb.control.flush();
        Ok(())
    }

    /// The processor enters an address space.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn enter(&mut self, vmcb: &mut Vmcb, space: AddressSpaceId) -> Result<(), &'static str> {
        self.space = space;
        self.load(vmcb)
    }

    /// Before the guest is entered: its root may be gone.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn prepare(&mut self, vmcb: &mut Vmcb) -> Result<(), &'static str> {
        while self.tables.is_stale() {
            self.counts.stale_roots += 1;
            self.tables.reload().map_err(|error| why(&error))?;
            self.use_root(vmcb)?;
        }
        Ok(())
    }

    /// Does what the guest came out for. `None`: it goes on.
    ///
    /// # Errors
    /// What cannot be done.
    pub(crate) fn resolve(&mut self, vcpu: &mut Vcpu, event: Event) -> Result<Option<Exit>, &'static str> {
        match event {
            Event::Fault { va, error_code } => return self.fault(vcpu.vmcb, va, error_code),
            Event::Efer { is_write } => self.efer(vcpu, is_write)?,
            Event::Read(_) | Event::Write(_) | Event::Invalidate => self.instruction(vcpu, event)?,
        }
        Ok(None)
    }

    fn fault(&mut self, vmcb: &mut Vmcb, va: u64, error_code: u32) -> Result<Option<Exit>, &'static str> {
        self.counts.faults += 1;
        let is_ac = vmcb.save.rflags & FLAGS_ALIGNMENT_CHECK != 0 && vmcb.save.cpl < 3;
        let access = GuestAccess::from_error_code(error_code, is_ac);
        let fault = self.tables.fault(va, access).map_err(|error| why(&error))?;
        match fault {
            ShadowFault::Mapped(level) => {
                self.counts.mapped[usize::from(level.min(Level::G1).get()) - 1] += 1;
            }
            ShadowFault::AlreadyMapped => {
                self.counts.already_mapped += 1;
                vmcb.control.flush();
                let times =
                    if (self.again.0, self.again.1) == (va, error_code) { self.again.2 + 1 } else { 1 };
                self.again = (va, error_code, times);
                if times > PATIENCE {
                    // Something forbids it that is in no table. The guest knows better.
                    self.counts.spurious += 1;
                    self.again.2 = 0;
                    // Of reserved bits in our tables the guest knows nothing.
                    let error_code = ErrorCode::from_bits_retain(error_code) - ErrorCode::RESERVED;
                    return Ok(self.inject(vmcb, PageFault { address: va, error_code }));
                }
            }
            // Its tables are where it has no memory any more.
            ShadowFault::NoTable { entry, .. } => {
                self.counts.mmio += 1;
                return Ok(Some(Exit::Nothing { gpa: entry, access: Access::READ }));
            }
            ShadowFault::Inject(fault) => {
                self.counts.injected += 1;
                return Ok(self.inject(vmcb, fault));
            }
            ShadowFault::Mmio(gpa) | ShadowFault::Denied(gpa) => {
                self.counts.mmio += 1;
                let access = match access {
                    access if access.contains(GuestAccess::WRITE) => Access::WRITE,
                    access if access.contains(GuestAccess::FETCH) => Access::EXECUTE,
                    _ => Access::READ,
                };
                return Ok(Some(Exit::Nothing { gpa, access }));
            }
            ShadowFault::WriteTracked(gpa) => {
                // There is nobody to emulate the write, so the guest does it itself.
                self.counts.write_tracked += 1;
                self.tables.shadow().unprotect(Gfn::new(gpa.get() >> 12));
                vmcb.control.flush();
            }
            ShadowFault::Retry => {
                self.counts.retry += 1;
                if !self.tables.is_stale() {
                    return Ok(Some(Exit::Later));
                }
            }
        }
        Ok(None)
    }

    /// The guest gets a page fault. What was to be delivered when it happened is taken into account.
    fn inject(&mut self, vmcb: &mut Vmcb, fault: PageFault) -> Option<Exit> {
        let (vector, error_code) = match pending_exception(vmcb) {
            Some(DOUBLE_FAULT) => return Some(Exit::Shutdown),
            Some(PAGE_FAULT) => {
                self.counts.double_faults += 1;
                (DOUBLE_FAULT, 0)
            }
            _ => {
                vmcb.save.cr2 = fault.address;
                (PAGE_FAULT, fault.error_code.bits())
            }
        };
        raise(vmcb, vector, error_code);
        None
    }
}

impl Vcpu {
    /// The guest runs on shadow tables from now on. Its control block has the guest's own registers.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn use_shadow(
        &mut self,
        guest: &Guest,
        shadow: &Shadow<&'static Host>,
    ) -> Result<(), &'static str> {
        let paging = Paging::new(guest, shadow, self)?;
        self.shadow = Some(Box::new(paging));
        Ok(())
    }

    /// The guest goes to an address space.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn enter_space(&mut self, space: AddressSpaceId) -> Result<(), &'static str> {
        let shadow = self.shadow.as_mut().ok_or("there are no shadow tables")?;
        shadow.enter(self.vmcb, space)
    }

    /// A general register, by the number that it has in instructions.
    fn register(&self, number: u8) -> u64 {
        let (registers, save) = (&self.registers, &self.vmcb.save);
        match number {
            0 => save.rax,
            1 => registers.rcx,
            2 => registers.rdx,
            3 => registers.rbx,
            4 => save.rsp,
            5 => registers.rbp,
            6 => registers.rsi,
            7 => registers.rdi,
            8 => registers.r8,
            9 => registers.r9,
            10 => registers.r10,
            11 => registers.r11,
            12 => registers.r12,
            13 => registers.r13,
            14 => registers.r14,
            _ => registers.r15,
        }
    }

    fn set_register(&mut self, number: u8, value: u64) {
        let (registers, save) = (&mut self.registers, &mut self.vmcb.save);
        let register = match number {
            0 => &mut save.rax,
            1 => &mut registers.rcx,
            2 => &mut registers.rdx,
            3 => &mut registers.rbx,
            4 => &mut save.rsp,
            5 => &mut registers.rbp,
            6 => &mut registers.rsi,
            7 => &mut registers.rdi,
            8 => &mut registers.r8,
            9 => &mut registers.r9,
            10 => &mut registers.r10,
            11 => &mut registers.r11,
            12 => &mut registers.r12,
            13 => &mut registers.r13,
            14 => &mut registers.r14,
            _ => &mut registers.r15,
        };
        *register = value;
    }
}

/// The exception that was being delivered when the guest came out.
fn pending_exception(vmcb: &Vmcb) -> Option<u64> {
    let event = vmcb.control.event;
    (event & EVENT_VALID != 0 && event >> 8 & 7 == event::EXCEPTION).then_some(event & 0xff)
}

/// The guest gets an exception with an error code.
fn raise(vmcb: &mut Vmcb, vector: u64, error_code: u32) {
    let kind = EVENT_VALID | EVENT_ERROR_CODE | event::EXCEPTION << 8;
    vmcb.control.event = u64::from(error_code) << 32 | kind | vector;
}

/// What the tables could not do.
fn why(error: &ShadowError<Infallible>) -> &'static str {
    match error {
        ShadowError::Table(TableError::OutOfMemory) => "no memory for a shadow table",
        ShadowError::Table(TableError::Limit { .. }) => "there are as many shadow tables as there may be",
        ShadowError::NoRoot => "no root was loaded",
        _ => "the shadow tables fail",
    }
}

/// This processor, which the guest sees as it is.
pub(crate) fn processor() -> Processor {
    let basic = core::arch::x86_64::__cpuid(0);
    let features = core::arch::x86_64::__cpuid(1);
    let more = core::arch::x86_64::__cpuid(0x8000_0001);
    let widths = core::arch::x86_64::__cpuid(0x8000_0008);
    Processor {
        physical_address_bits: widths.eax.to_le_bytes()[0],
        gigabyte_pages: more.edx & 1 << 26 != 0,
        pse36: features.edx & 1 << 17 != 0,
        amd: basic.ebx.to_le_bytes() == *b"Auth",
    }
}
