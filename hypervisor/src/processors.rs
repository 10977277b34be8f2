//! The processors: which of them are inside the guest, and how translations are flushed on all of them.
//!
//! A flush is a *request* with a number. A processor looks at the number each time before it enters the guest, and tells
//! VMRUN to flush where there is a new one. One that is inside the guest at the moment must come out: it gets an NMI, which the guest
//! does not see (it is intercepted), and whoever wants the flush waits until it has left.
//!
//! ```text
//!  processor                                   who flushes
//!  inside = true                               request += 1
//!  look at request (flush if it is new)        inside?  → NMI, wait until `exits` has changed
//!  VMRUN … #VMEXIT
//!  exits += 1, inside = false
//! ```
//!
//! Both sides write first and look at the other's word then, in one order for all (sequential consistency), so one of them sees the other.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::apic;

/// The most processors.
pub(crate) const MAX: usize = 4;

/// What others need to know of a processor.
pub(crate) struct Processor {
    inside: AtomicBool,
    exits: AtomicU64,
    /// Its interrupt controller's number.
    apic: AtomicU64,
}

static ALL: [Processor; MAX] = [const {
    Processor { inside: AtomicBool::new(false), exits: AtomicU64::new(0), apic: AtomicU64::new(0) }
}; MAX];
static REQUEST: AtomicU64 = AtomicU64::new(0);
static KICKS: AtomicU64 = AtomicU64::new(0);
/// Whether processors inside the guest are left alone: to show what that does.
static NEGLECT: AtomicBool = AtomicBool::new(false);

/// A processor, by its number.
pub(crate) fn get(number: usize) -> &'static Processor {
    &ALL[number]
}

/// Has all processors use nothing that they translated before. When this returns, none does.
pub(crate) fn flush() {
    REQUEST.fetch_add(1, Ordering::SeqCst);
    if NEGLECT.load(Ordering::SeqCst) {
        return;
    }
    for other in &ALL {
        let before = other.exits.load(Ordering::SeqCst);
        if other.inside.load(Ordering::SeqCst) {
            KICKS.fetch_add(1, Ordering::Relaxed);
            apic::send_nmi(other.apic.load(Ordering::SeqCst));
            while other.inside.load(Ordering::SeqCst) && other.exits.load(Ordering::SeqCst) == before {
                core::hint::spin_loop();
            }
        }
    }
}

/// Leaves processors that are inside the guest alone from now on.
pub(crate) fn neglect_others(on: bool) {
    NEGLECT.store(on, Ordering::SeqCst);
}

/// How often a processor was brought out of the guest.
pub(crate) fn kicks() -> u64 {
    KICKS.load(Ordering::Relaxed)
}

impl Processor {
    /// The processor's interrupt controller has this number.
    pub(crate) fn set_apic(&self, number: u64) {
        self.apic.store(number, Ordering::SeqCst);
    }

    /// Before VMRUN. Returns the number of the last request: all before it are fulfilled if VMRUN flushes where it has changed.
    pub(crate) fn enter(&self) -> u64 {
        self.inside.store(true, Ordering::SeqCst);
        REQUEST.load(Ordering::SeqCst)
    }

    /// After #VMEXIT.
    pub(crate) fn leave(&self) {
        self.exits.fetch_add(1, Ordering::SeqCst);
        self.inside.store(false, Ordering::SeqCst);
    }

    /// Whether it is in the guest.
    pub(crate) fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }
}
