//! What is done with the guest while it runs, and how it is judged.
//!
//! A [`Scenario`] has its turn at ticks (about every [`round`](crate::options::Options::round) timer interrupts), when the guest calls, when the
//! guest accesses what is not there, and when it turns the machine off. The loop around it is [`run`].

pub(crate) mod boot;
pub(crate) mod dirty;
pub(crate) mod hotplug;
pub(crate) mod shootdown;
pub(crate) mod storm;
pub(crate) mod torture;
pub(crate) mod trivial;

use alloc::format;
use alloc::string::String;

use memslot::Gpa;
use memslot_mmu::format::Access;

use crate::acpi;
use crate::guest::{Guest, Resolved};
use crate::vcpu::{Exit, Vcpu};

/// The guest calls with one of these in RAX: our own, nobody else's.
pub(crate) mod call {
    /// The guest's first program runs.
    pub(crate) const READY: u64 = 0x6d65_6d01;
    /// It has finished; RBX is 0 if it found nothing wrong.
    pub(crate) const RESULT: u64 = 0x6d65_6d02;
}

/// Everything that scenarios change.
pub(crate) struct Turn<'a> {
    pub(crate) guest: &'a mut Guest,
    pub(crate) vcpu: &'a mut Vcpu,
}

/// See the [module documentation](self). An error ends the run, and is the reason.
pub(crate) trait Scenario {
    /// How many ticks lie between two calls of [`round`](Self::round); 0 for no ticks at all.
    fn ticks(&self) -> u64 {
        0
    }

    /// A round, while the guest stands still.
    fn round(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        let _ = turn;
        Ok(())
    }

    /// A call that is not known to all scenarios.
    fn call(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        Err(format!("the guest makes an unknown call, {:#x}", turn.vcpu.vmcb.save.rax))
    }

    /// An access to nothing.
    fn hole(&mut self, turn: &mut Turn<'_>, gpa: Gpa, access: Access) -> Result<(), String> {
        let rip = turn.vcpu.vmcb.save.rip;
        Err(format!("the guest accesses {:#x}, where nothing is ({access:?}, rip {rip:#x})", gpa.get()))
    }

    /// A fault is to be tried again. A guest that has interrupts off comes out for nothing else, so there will be no tick meanwhile.
    fn later(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        let _ = turn;
        Ok(())
    }

    /// The guest has turned the machine off.
    fn end(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        let _ = turn;
        Ok(())
    }
}

/// Runs the guest until it turns the machine off by the port `power`, and judges it.
///
/// # Errors
/// Why the run has failed.
pub(crate) fn run(scenario: &mut dyn Scenario, turn: &mut Turn<'_>, power: u16) -> Result<(), String> {
    let mut result = None;
    let mut ticks = 0;
    turn.vcpu.watch_port(power);
    turn.vcpu.watch_port(power + 1);
    if scenario.ticks() > 0 {
        turn.vcpu.want_ticks();
    }
    loop {
        match turn.vcpu.run() {
            Exit::Fault { gpa, access } => match turn.guest.fault(gpa, access)? {
                Resolved::Yes => {}
                Resolved::Later => scenario.later(turn)?,
                Resolved::Nothing => scenario.hole(turn, gpa, access)?,
            },
            Exit::Nothing { gpa, access } => scenario.hole(turn, gpa, access)?,
            Exit::Later => scenario.later(turn)?,
            Exit::Tick => {
                ticks += 1;
                if ticks % scenario.ticks().max(1) == 0 {
                    scenario.round(turn)?;
                }
            }
            Exit::TickOver | Exit::Kick => {}
            Exit::Port(port) => {
                if turn.vcpu.written(port).is_some_and(|value| value & acpi::SLEEP != 0) {
                    break;
                }
                turn.vcpu.pass_port(port);
            }
            Exit::Call => match turn.vcpu.vmcb.save.rax {
                call::READY => crate::console::report!("ready {}", crate::cpu::ticks()),
                call::RESULT => result = Some(turn.vcpu.registers.rbx),
                _ => scenario.call(turn)?,
            },
            exit @ (Exit::Shutdown | Exit::Halt | Exit::Stuck(_) | Exit::Shadow(_) | Exit::Other(_)) => {
                let rip = turn.vcpu.vmcb.save.rip;
                return Err(format!("the guest came out with {exit:x?} at rip {rip:#x}"));
            }
        }
    }
    scenario.end(turn)?;
    match result {
        Some(0) => Ok(()),
        Some(wrong) => Err(format!("the guest's own checks found {wrong} errors")),
        None => Err("the guest turned the machine off without a result".into()),
    }
}
