//! A virtual processor: enters the guest, says why it came out, and sees that no event is lost on the way.
//!
//! # Interrupts
//!
//! Physical interrupts belong to the guest, and are delivered to it without an exit. Two things remain:
//!
//! * **Ticks.** A scenario that wants its turn regularly has physical interrupts intercepted. At the exit the interrupt stays where
//!   it is: the guest is entered without that intercept, takes the interrupt as always, and when it returns from its
//!   handler (IRET is intercepted until then), the intercept is back. No interrupt needs to be injected.
//! * **Cut-off deliveries.** To deliver an event the processor writes to the guest's stack. If that faults in the nested tables,
//!   the event comes with the exit, and is lost unless it is delivered again. Exceptions are, by event injection. Interrupts
//!   have been taken from the controller: they wait here, and are made pending as *virtual* interrupts. (QEMU
//!   delivers an interrupt that is injected directly a second time now and then.)
//!
//! # SVM itself
//!
//! The guest has the processor's registers for itself and sees that there is SVM. When Linux stops a processor it turns SVM off there, to
//! be sure. That would be ours: the register that says where the host's state is cannot be written, and the bit in EFER, without which VMRUN
//! refuses the guest, is set again before each entry.

use alloc::boxed::Box;

use memslot::Gpa;
use memslot_mmu::format::Access;

use crate::cpu;
use crate::processors::Processor;
use crate::shadow::{self, Event};
use crate::svm::{
    self, EVENT_ERROR_CODE, EVENT_VALID, Registers, Segment, V_IGNORE_TPR, V_IRQ, Vmcb, event, exit,
    intercept,
};

/// Why the guest came out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exit {
    /// The nested tables did not allow an access.
    Fault { gpa: Gpa, access: Access },
    /// With shadow tables, which are brought up to date without an exit: there is nothing, or nothing that may be written.
    Nothing { gpa: Gpa, access: Access },
    /// With shadow tables: something is changing there.
    Later,
    /// Shadow paging cannot go on.
    Stuck(&'static str),
    /// Shadow paging is at work; no one else sees this.
    Shadow(Event),
    /// A physical interrupt: the scenario's turn.
    Tick,
    /// The guest's interrupt handler has returned: ticks are on again.
    TickOver,
    /// Another processor wants this one out.
    Kick,
    /// The guest accessed a port that is watched.
    Port(Port),
    /// The guest calls the hypervisor.
    Call,
    /// The guest has written a register that is not its own, in vain.
    Register,
    /// The guest has stopped and waits for an interrupt.
    Halt,
    /// The guest crashed: a triple fault.
    Shutdown,
    /// VMRUN failed, or something that is not intercepted.
    Other(u64),
}

/// An access to a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Port {
    pub(crate) number: u16,
    pub(crate) bytes: u8,
    pub(crate) is_read: bool,
    /// Where the guest goes on.
    next: u64,
}

/// Kinds of exits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Fault,
    Tick,
    TickOver,
    Kick,
    Port,
    Call,
    PageFault,
    RootWrite,
    ControlWrite,
    ControlRead,
    Invalidate,
    Other,
}

impl Kind {
    /// All, with the names that they are reported by.
    pub(crate) const ALL: [(Self, &str); 12] = [
        (Self::Fault, "faults"),
        (Self::Tick, "ticks"),
        (Self::TickOver, "ticks_over"),
        (Self::Kick, "kicks"),
        (Self::Port, "ports"),
        (Self::Call, "calls"),
        (Self::PageFault, "page_faults"),
        (Self::RootWrite, "cr3_writes"),
        (Self::ControlWrite, "control_writes"),
        (Self::ControlRead, "control_reads"),
        (Self::Invalidate, "invlpgs"),
        (Self::Other, "others"),
    ];
}

/// Exits by kind, and time in ticks of the time stamp counter.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    exits: [u64; Kind::ALL.len()],
    /// Time between exits of a kind and the next entry.
    outside: [u64; Kind::ALL.len()],
    /// Time inside the guest, with what the processor itself does to get in and out.
    pub(crate) inside: u64,
    pub(crate) events_again: u64,
}

impl Counts {
    /// How many exits there were of a kind.
    pub(crate) fn exits(&self, kind: Kind) -> u64 {
        self.exits[kind as usize]
    }

    /// The time that the hypervisor took after them.
    pub(crate) fn outside(&self, kind: Kind) -> u64 {
        self.outside[kind as usize]
    }
}

/// See the [module documentation](self).
pub(crate) struct Vcpu {
    pub(crate) vmcb: &'static mut Vmcb,
    pub(crate) registers: Registers,
    pub(crate) counts: Counts,
    processor: &'static Processor,
    host: u64,
    /// Interrupts whose delivery was cut off.
    pending: [u64; 4],
    /// The last request for a flush that was fulfilled.
    flushed: u64,
    has_ticks: bool,
    /// How many numbers the processor has for address spaces, its own included.
    asids: u32,
    /// Without nested paging.
    pub(crate) shadow: Option<Box<shadow::Paging>>,
    /// Whether the guest's hidden segments are on the processor.
    is_loaded: bool,
    /// The last exit, and when it was.
    left: Option<(Kind, u64)>,
}

/// Whether shadow paging deals with an exit, and nothing else.
fn is_frequent(code: u64) -> bool {
    matches!(code, exit::PAGE_FAULT | exit::INVLPG)
        || (exit::READ_CONTROL_0..=exit::WRITE_CONTROL_15).contains(&code)
}

impl Vcpu {
    /// A virtual processor on this processor. Its state is all zeros. In a piece of memory of its own, not spread over the stacks of those who
    /// run it: each page that is touched for an exit costs a translation.
    pub(crate) fn new(processor: &'static Processor, nested_root: u64) -> Box<Self> {
        processor.set_apic(crate::apic::id());
        let vmcb = Vmcb::leak();
        // Nothing is intercepted but what is said further down: 12 KiB of ports, 8 KiB of registers.
        let pages: &'static mut [svm::Page; 5] = Box::leak(Box::new([const { svm::Page([0; 4096]) }; 5]));
        vmcb.control.io_permissions = pages[0].address();
        vmcb.control.msr_permissions = pages[3].address();
        // Two bits for each register, read and write; the third group begins with C001_0000.
        let write_bit = (cpu::VM_HSAVE_PA & 0x1fff) * 2 + 1;
        pages[4].0[cpu::index(u64::from(write_bit / 8))] |= 1 << (write_bit % 8);
        // The last one: so the first entry flushes whatever was there before, and begins anew.
        let asids = svm::asids();
        vmcb.control.asid = asids - 1;
        vmcb.control.nested_paging = 1;
        vmcb.control.nested_cr3 = nested_root << 12;
        vmcb.control.intercept_3 = intercept::PORTS | intercept::REGISTERS;
        vmcb.control.intercept_3 |= intercept::SHUTDOWN | intercept::NMI;
        vmcb.control.intercept_4 = intercept::VMRUN | intercept::VMMCALL;
        vmcb.save.page_attributes = 0x0007_0406_0007_0406;
        vmcb.save.dr6 = 0xffff_0ff0;
        vmcb.save.dr7 = 0x400;
        vmcb.save.rflags = 2;
        Box::new(Self {
            vmcb,
            registers: Registers::new(),
            counts: Counts::default(),
            processor,
            host: svm::save_host(),
            pending: [0; 4],
            flushed: u64::MAX,
            has_ticks: false,
            asids,
            shadow: None,
            is_loaded: false,
            left: None,
        })
    }

    /// Brings a new one into real mode, with all segments at 0, at an instruction.
    pub(crate) fn enter_real_mode(&mut self, rip: u64) {
        let save = &mut self.vmcb.save;
        save.cr0 = 0x10;
        let data = Segment { selector: 0, attributes: 0x93, limit: 0xffff, base: 0 };
        (save.ds, save.es, save.ss, save.fs, save.gs) = (data, data, data, data, data);
        save.cs = Segment { attributes: 0x9b, ..data };
        save.rip = rip;
    }

    /// Exits at accesses to a port.
    pub(crate) fn watch_port(&mut self, port: u16) {
        let map = self.vmcb.control.io_permissions + u64::from(port / 8);
        // SAFETY: the map is this processor's own, and has a bit for each port.
        unsafe { *crate::physical::pointer::<u8>(map) |= 1 << (port % 8) };
    }

    /// Exits at accesses to a model-specific register, one of C000_0000 to C000_1FFF.
    pub(crate) fn watch_register(&mut self, register: u32) {
        let register = u64::from(register & 0x1fff);
        // Two bits for each, read and write; the second group of registers has the second 2 KiB.
        let map = self.vmcb.control.msr_permissions + 0x800 + register / 4;
        // SAFETY: the map is this processor's own, and has bits for each register of the group.
        unsafe { *crate::physical::pointer::<u8>(map) |= 3 << (register % 4 * 2) };
    }

    /// Exits at physical interrupts, as [`Exit::Tick`].
    pub(crate) fn want_ticks(&mut self) {
        self.has_ticks = true;
        self.vmcb.control.intercept_3 |= intercept::INTERRUPT;
    }

    /// Runs the guest until something happens.
    pub(crate) fn run(&mut self) -> Exit {
        let Some(mut shadow) = self.shadow.take() else { return self.run_once(false) };
        let exit = loop {
            if let Err(why) = shadow.prepare(self.vmcb) {
                break Exit::Stuck(why);
            }
            match self.run_once(true) {
                Exit::Shadow(event) => match shadow.resolve(self, event) {
                    Ok(None) => {}
                    Ok(Some(exit)) => break exit,
                    Err(why) => break Exit::Stuck(why),
                },
                exit => break exit,
            }
        };
        self.unload();
        self.shadow = Some(shadow);
        exit
    }

    fn block(&self) -> u64 {
        core::ptr::from_ref(&*self.vmcb).addr() as u64
    }

    /// Brings the host's hidden segments back, if the guest's are there.
    fn unload(&mut self) {
        if self.is_loaded {
            // SAFETY: both are control blocks, and the host's was saved before.
            unsafe {
                svm::save_hidden(self.block());
                svm::load_hidden(self.host);
            }
            self.is_loaded = false;
        }
    }

    /// Whatever the processor has translated for the guest is not used any more: the guest's address space gets another number. All
    /// translations are flushed only when there is no other left. (This virtual processor is the only one on its processor.)
    fn forget_translations(&mut self) {
        let control = &mut self.vmcb.control;
        let next = control.asid + 1;
        (control.asid, control.tlb_control) = if next < self.asids { (next, 0) } else { (1, 1) };
    }

    /// `stays_loaded`: after frequent exits, which need nothing of the host's hidden segments, the guest's are left where they are.
    fn run_once(&mut self, stays_loaded: bool) -> Exit {
        self.make_pending();
        let request = self.processor.enter();
        // Whoever has set the bit, or the requests since the last entry, want a flush.
        if request != self.flushed || self.vmcb.control.tlb_control != 0 {
            self.forget_translations();
        }
        self.flushed = request;
        self.vmcb.save.efer |= svm::EFER_SVME;
        let entered = cpu::ticks();
        if !self.is_loaded {
            // SAFETY: the guest's own.
            unsafe { svm::load_hidden(self.block()) };
            self.is_loaded = true;
        }
        // SAFETY: the tables that the control block names have the guest's memory only.
        unsafe { svm::run(self.vmcb, &mut self.registers) };
        if !(stays_loaded && is_frequent(self.vmcb.control.exit_code)) {
            self.unload();
        }
        let now = cpu::ticks();
        self.processor.leave();
        self.vmcb.control.tlb_control = 0;
        if let Some((kind, left)) = self.left {
            self.counts.outside[kind as usize] += entered.wrapping_sub(left);
        }
        self.counts.inside += now.wrapping_sub(entered);
        self.take_back_event();
        let (kind, exit) = self.reason();
        self.counts.exits[kind as usize] += 1;
        self.left = Some((kind, now));
        exit
    }

    fn reason(&mut self) -> (Kind, Exit) {
        let control = &mut self.vmcb.control;
        let (code, info_1, info_2) = (control.exit_code, control.exit_info_1, control.exit_info_2);
        match code {
            exit::NESTED_PAGE_FAULT => {
                let access = match info_1 {
                    info if info & 2 != 0 => Access::WRITE,
                    info if info & 16 != 0 => Access::EXECUTE,
                    _ => Access::READ,
                };
                (Kind::Fault, Exit::Fault { gpa: Gpa::new(info_2), access })
            }
            exit::INTERRUPT => {
                control.intercept_3 &= !intercept::INTERRUPT;
                control.intercept_3 |= intercept::IRET;
                (Kind::Tick, Exit::Tick)
            }
            exit::IRET => {
                control.intercept_3 &= !intercept::IRET;
                if self.has_ticks {
                    control.intercept_3 |= intercept::INTERRUPT;
                }
                (Kind::TickOver, Exit::TickOver)
            }
            exit::NMI => {
                svm::take_nmi();
                (Kind::Kick, Exit::Kick)
            }
            exit::PORT => {
                #[expect(clippy::cast_possible_truncation, reason = "fields of 16 and 3 bits")]
                let (number, bytes) = ((info_1 >> 16) as u16, (info_1 >> 4 & 7) as u8);
                (Kind::Port, Exit::Port(Port { number, bytes, is_read: info_1 & 1 != 0, next: info_2 }))
            }
            exit::VMMCALL => {
                // Nothing tells the length of the instruction on a processor without NRIPS; it has three bytes.
                self.vmcb.save.rip += 3;
                (Kind::Call, Exit::Call)
            }
            #[expect(clippy::cast_possible_truncation, reason = "the number of a register")]
            exit::READ_CONTROL_0..=exit::READ_CONTROL_15 => {
                (Kind::ControlRead, Exit::Shadow(Event::Read((code - exit::READ_CONTROL_0) as u8)))
            }
            #[expect(clippy::cast_possible_truncation, reason = "the number of a register")]
            exit::WRITE_CONTROL_0..=exit::WRITE_CONTROL_15 => {
                let kind =
                    if code == exit::WRITE_CONTROL_0 + 3 { Kind::RootWrite } else { Kind::ControlWrite };
                (kind, Exit::Shadow(Event::Write((code - exit::WRITE_CONTROL_0) as u8)))
            }
            #[expect(clippy::cast_possible_truncation, reason = "an error code has 32 bits")]
            exit::PAGE_FAULT => {
                (Kind::PageFault, Exit::Shadow(Event::Fault { va: info_2, error_code: info_1 as u32 }))
            }
            exit::INVLPG => (Kind::Invalidate, Exit::Shadow(Event::Invalidate)),
            exit::REGISTER if self.registers.rcx & 0xffff_ffff == u64::from(cpu::EFER) => {
                (Kind::ControlWrite, Exit::Shadow(Event::Efer { is_write: info_1 & 1 != 0 }))
            }
            exit::REGISTER => {
                // WRMSR has two bytes.
                self.vmcb.save.rip += 2;
                (Kind::Other, Exit::Register)
            }
            exit::HALT => (Kind::Other, Exit::Halt),
            exit::SHUTDOWN => (Kind::Other, Exit::Shutdown),
            other => (Kind::Other, Exit::Other(other)),
        }
    }

    /// What was to be delivered when the guest came out.
    fn take_back_event(&mut self) {
        let control = &mut self.vmcb.control;
        control.event = 0;
        let info = control.exit_interrupt_info;
        let is_fault = matches!(control.exit_code, exit::NESTED_PAGE_FAULT | exit::PAGE_FAULT);
        if info & EVENT_VALID == 0 || !is_fault {
            return;
        }
        self.counts.events_again += 1;
        let (vector, kind) = (info & 0xff, info >> 8 & 7);
        // QEMU calls interrupts exceptions here; exceptions are numbered below 32.
        if kind == event::INTERRUPT || (kind == event::EXCEPTION && vector >= 32) {
            let is_pending =
                control.interrupt_control & V_IRQ != 0 && u64::from(control.interrupt_vector) == vector;
            if !is_pending {
                self.pending[cpu::index(vector / 64)] |= 1 << (vector % 64);
            }
        } else if kind == event::NMI || (kind == event::EXCEPTION && vector != 3 && vector != 4) {
            let error_code =
                if info & EVENT_ERROR_CODE == 0 { 0 } else { info >> 32 << 32 | EVENT_ERROR_CODE };
            control.event = EVENT_VALID | error_code | kind << 8 | vector;
        }
        // The rest are instructions that raise interrupts: the guest executes them again.
    }

    /// Makes the next interrupt that waits here pending, if none is.
    fn make_pending(&mut self) {
        let control = &mut self.vmcb.control;
        if control.interrupt_control & V_IRQ != 0 {
            return;
        }
        control.interrupt_control = 0;
        for word in (0..4).rev() {
            if self.pending[word] != 0 {
                let bit = 63 - self.pending[word].leading_zeros();
                self.pending[word] &= !(1 << bit);
                #[expect(clippy::cast_possible_truncation, reason = "0 to 3")]
                let vector = word as u32 * 64 + bit;
                control.interrupt_vector = vector;
                control.interrupt_control = V_IRQ | V_IGNORE_TPR;
                return;
            }
        }
    }

    /// What the guest writes to a port, if it writes.
    pub(crate) fn written(&self, port: Port) -> Option<u64> {
        let value = self.vmcb.save.rax & ((1 << (8 * u32::from(port.bytes))) - 1);
        (!port.is_read).then_some(value)
    }

    /// Does an access to a port for the guest.
    #[expect(clippy::cast_possible_truncation, reason = "as many bytes as the access has")]
    pub(crate) fn pass_port(&mut self, port: Port) {
        let rax = &mut self.vmcb.save.rax;
        match (port.is_read, port.bytes) {
            (true, 1) => *rax = *rax & !0xff | u64::from(cpu::in8(port.number)),
            (true, 2) => *rax = *rax & !0xffff | u64::from(cpu::in16(port.number)),
            (true, _) => *rax = u64::from(cpu::in32(port.number)),
            (false, 1) => cpu::out8(port.number, *rax as u8),
            (false, 2) => cpu::out16(port.number, *rax as u16),
            (false, _) => cpu::out32(port.number, *rax as u32),
        }
        self.vmcb.save.rip = port.next;
    }
}
