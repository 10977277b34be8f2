//! What is done with the guest while it runs, and how it is judged.
//!
//! A [`Scenario`] has its turn at ticks (about every [`round`](crate::options::Options::round) timer interrupts), when the guest calls, when the
//! guest accesses what is not there, and when it turns the machine off. The loop around it is in [`running`](crate::running).

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

use crate::guest::Guest;
use crate::vcpu::Vcpu;

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
pub(crate) trait Scenario: Send {
    /// How many ticks lie between two calls of [`round`](Self::round); 0 for no ticks at all.
    fn ticks(&self) -> u64 {
        0
    }

    /// A round. The processor whose turn it is stands still; others may run.
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

    /// The guest has turned the machine off. None of its processors runs any more.
    fn end(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        let _ = turn;
        Ok(())
    }
}
