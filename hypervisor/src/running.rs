//! The loop around the guest, one for each of its processors, and what they share.
//!
//! Faults are resolved by each processor for itself, with no lock: each has its own access to the tables ([`Faults`]), and the tables
//! are for all. Whatever the scenario has to do with (rounds, calls, accesses to nothing) goes through one lock, while the other
//! processors run on, until they need it, too.
//!
//! The run is over when the guest turns the machine off, or something is wrong. Whoever notices brings the others out; the first
//! processor then judges.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use spin::{Mutex, MutexGuard};

use crate::console::report;
use crate::guest::{FaultCounts, Faults, Guest, Resolved};
use crate::processors;
use crate::scenario::{Scenario, Turn, call};
use crate::vcpu::{Counts, Exit, Vcpu};
use crate::{acpi, cpu, svm, wakeup};

/// What a processor has counted.
pub(crate) type Counted = (Counts, FaultCounts);

/// What is behind the lock.
pub(crate) struct State {
    pub(crate) guest: Guest,
    scenario: Box<dyn Scenario>,
    /// What each processor has counted, when it has ended.
    pub(crate) counted: Vec<(usize, Counted)>,
    ticks: u64,
    /// What the guest's program found.
    found: Option<u64>,
    /// Why the run is over.
    why: Option<Result<(), String>>,
}

impl State {
    /// Something that the scenario hears of.
    fn turn<T>(
        &mut self,
        vcpu: &mut Vcpu,
        work: impl FnOnce(&mut dyn Scenario, &mut Turn<'_>) -> Result<T, String>,
    ) -> Result<T, String> {
        work(&mut *self.scenario, &mut Turn { guest: &mut self.guest, vcpu })
    }

    fn tick(&mut self, vcpu: &mut Vcpu) -> Result<(), String> {
        self.ticks += 1;
        if self.ticks % self.scenario.ticks().max(1) == 0 {
            self.turn(vcpu, |scenario, turn| scenario.round(turn))?;
        }
        Ok(())
    }

    fn call(&mut self, vcpu: &mut Vcpu) -> Result<(), String> {
        match vcpu.vmcb.save.rax {
            call::READY => report!("ready {}", cpu::ticks()),
            call::RESULT => self.found = Some(vcpu.registers.rbx),
            _ => self.turn(vcpu, |scenario, turn| scenario.call(turn))?,
        }
        Ok(())
    }

    /// The verdict, when no processor runs any more.
    fn judge(&mut self, vcpu: &mut Vcpu) -> Result<(), String> {
        self.why.take().unwrap_or(Ok(()))?;
        self.turn(vcpu, |scenario, turn| scenario.end(turn))?;
        match self.found {
            Some(0) => Ok(()),
            Some(wrong) => Err(format!("the guest's own checks found {wrong} errors")),
            None => Err("the guest turned the machine off without a result".into()),
        }
    }
}

/// A guest that runs. See the [module documentation](self).
pub(crate) struct Running {
    state: Mutex<State>,
    is_over: AtomicBool,
    /// How many processors are in the loop.
    inside: AtomicUsize,
    /// How many the guest has.
    processors: usize,
    /// Whether the others are on their way.
    are_others_started: AtomicBool,
    /// The port that the guest turns the machine off by.
    power: u16,
}

impl Running {
    /// A guest that is ready to start, for ever.
    pub(crate) fn new(
        guest: Guest,
        scenario: Box<dyn Scenario>,
        power: u16,
        processors: usize,
    ) -> &'static Self {
        let counted = Vec::with_capacity(processors);
        let state = State { guest, scenario, counted, ticks: 0, found: None, why: None };
        Box::leak(Box::new(Self {
            state: Mutex::new(state),
            is_over: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            processors,
            are_others_started: AtomicBool::new(processors == 1),
            power,
        }))
    }

    /// Runs it on this processor, its first, until it turns the machine off, and judges it. Returns the guest as well.
    pub(crate) fn run(&'static self, vcpu: &mut Vcpu) -> (MutexGuard<'static, State>, Result<(), String>) {
        self.inside.fetch_add(1, Ordering::SeqCst);
        self.processor(0, vcpu);
        let mut state = self.state.lock();
        let verdict = state.judge(vcpu);
        (state, verdict)
    }

    /// One processor, from its start to the end of the run. When this returns, all have ended.
    fn processor(&'static self, number: usize, vcpu: &mut Vcpu) {
        let faults = self.state.lock().guest.faults();
        let (why, counted) = match faults {
            Ok(mut faults) => (self.until_the_end(vcpu, &mut faults), faults.counts),
            Err(why) => (Err(why.into()), FaultCounts::default()),
        };
        {
            let mut state = self.state.lock();
            state.counted.push((number, (vcpu.counts, counted)));
            state.why.get_or_insert(why);
        }
        self.is_over.store(true, Ordering::SeqCst);
        self.inside.fetch_sub(1, Ordering::SeqCst);
        // Again and again: one that has looked whether the run is over, and is not inside the guest yet, is not brought out by this.
        while self.inside.load(Ordering::SeqCst) > 0 {
            processors::bring_out();
            core::hint::spin_loop();
        }
    }

    fn until_the_end(&'static self, vcpu: &mut Vcpu, faults: &mut Faults) -> Result<(), String> {
        vcpu.watch_port(self.power);
        vcpu.watch_port(self.power + 1);
        if self.state.lock().scenario.ticks() > 0 {
            vcpu.want_ticks();
        }
        while !self.is_over.load(Ordering::SeqCst) {
            match vcpu.run() {
                Exit::Fault { gpa, access } => {
                    match faults.resolve(gpa, access)? {
                        Resolved::Yes => {}
                        Resolved::Later => {
                            self.state.lock().turn(vcpu, |scenario, turn| scenario.later(turn))?;
                        }
                        Resolved::Nothing => {
                            self.state
                                .lock()
                                .turn(vcpu, |scenario, turn| scenario.hole(turn, gpa, access))?;
                        }
                    }
                    if wakeup::is_mailbox(gpa) {
                        self.start_others()?;
                    }
                }
                Exit::Nothing { gpa, access } => {
                    self.state.lock().turn(vcpu, |scenario, turn| scenario.hole(turn, gpa, access))?;
                }
                Exit::Later => self.state.lock().turn(vcpu, |scenario, turn| scenario.later(turn))?,
                Exit::Tick => self.state.lock().tick(vcpu)?,
                Exit::TickOver | Exit::Kick | Exit::Register => {}
                Exit::Port(port) => {
                    if vcpu.written(port).is_some_and(|value| value & acpi::SLEEP != 0) {
                        return Ok(());
                    }
                    vcpu.pass_port(port);
                }
                Exit::Call => self.state.lock().call(vcpu)?,
                exit @ (Exit::Shutdown | Exit::Halt | Exit::Stuck(_) | Exit::Shadow(_) | Exit::Other(_)) => {
                    let rip = vcpu.vmcb.save.rip;
                    return Err(format!("the guest came out with {exit:x?} at rip {rip:#x}"));
                }
            }
        }
        Ok(())
    }

    /// Starts the guest's other processors, once.
    fn start_others(&'static self) -> Result<(), &'static str> {
        if self.are_others_started.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        for number in 1..self.processors {
            self.inside.fetch_add(1, Ordering::SeqCst);
            let apic = processors::guests_apic(number, self.processors);
            processors::start(apic, Box::new(move || self.other(number)))?;
        }
        Ok(())
    }

    /// Another processor of the guest.
    fn other(&'static self, number: usize) {
        if let Err(why) = svm::enable() {
            crate::give_up(&why);
        }
        let root = self.state.lock().guest.mmu.root().get();
        let mut vcpu = Vcpu::new(processors::get(number), root);
        wakeup::wait_for_linux(&mut vcpu, processors::guests_apic(number, self.processors));
        self.processor(number, &mut vcpu);
    }
}
