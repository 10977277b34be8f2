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
//!
//! # The machine's first processor
//!
//! A guest with one processor runs on the machine's only one. A guest with more does not run on the machine's first, which only starts
//! the second and sleeps then: in QEMU 7.2 every processor's FXRSTOR and XRSTOR change a word of the *first* one's state without
//! care for what that does at the same time, and now and then it loses, or keeps, its being inside a guest.

use alloc::boxed::Box;
use alloc::vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use spin::{Mutex, Once};

use crate::{apic, cpu, physical};

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

/// How another processor is started: the code that is copied below 1 MiB, and the two words that it takes its stack and what it
/// calls from.
#[derive(Clone, Copy)]
pub struct Trampoline {
    /// The code.
    pub code: &'static [u8],
    /// Where the end of the stack is written to.
    pub stack: *mut u64,
    /// Where the function is written to.
    pub entry: *mut u64,
}

// SAFETY: only `start` uses the pointers, one call at a time.
unsafe impl Send for Trampoline {}
// SAFETY: as above.
unsafe impl Sync for Trampoline {}

/// Set once, at the start.
pub(crate) static TRAMPOLINE: Once<Trampoline> = Once::new();
/// Where its code is copied to.
const TRAMPOLINE_PAGE: u8 = 8;

type Work = Box<dyn FnOnce() + Send>;
static WORK: Mutex<Option<Work>> = Mutex::new(None);

/// Has another processor, by the number of its interrupt controller, do some work and then sleep. Returns when it has begun.
///
/// # Errors
/// It does not come.
pub(crate) fn start(apic: u64, work: Work) -> Result<(), &'static str> {
    let trampoline = TRAMPOLINE.get().ok_or("there is no code for other processors to start with")?;
    *WORK.lock() = Some(work);
    // As large as the first processor's.
    let stack = vec![0_u128; 0x80000 / 16].leak();
    let entry = (begin as *const ()).addr() as u64;
    // SAFETY: the words are for this, and the page below 1 MiB is free memory that nothing else is in.
    unsafe {
        trampoline.stack.write_volatile(stack.as_ptr_range().end.addr() as u64);
        trampoline.entry.write_volatile(entry);
        let to = physical::pointer::<u8>(u64::from(TRAMPOLINE_PAGE) << 12);
        core::ptr::copy_nonoverlapping(trampoline.code.as_ptr(), to, trampoline.code.len());
    }
    let before = cpu::ticks();
    apic::send_init(apic);
    apic::send_startup(apic, TRAMPOLINE_PAGE);
    while WORK.lock().is_some() {
        core::hint::spin_loop();
        if cpu::ticks() - before > 40_000_000_000 {
            return Err("another processor does not start (QEMU: -smp)");
        }
    }
    Ok(())
}

/// Where another processor gets into Rust.
extern "sysv64" fn begin() -> ! {
    crate::traps::install();
    apic::enable();
    let work = WORK.lock().take();
    if let Some(work) = work {
        work();
    }
    cpu::sleep()
}

/// The number of the interrupt controller of the guest's processor `number`, of `processors`: see the [module documentation](self).
pub(crate) fn guests_apic(number: usize, processors: usize) -> u64 {
    number as u64 + u64::from(processors > 1)
}

/// A processor of the guest, by its number.
pub(crate) fn get(number: usize) -> &'static Processor {
    &ALL[number]
}

/// Has all processors use nothing that they translated before. When this returns, none does.
pub(crate) fn flush() {
    REQUEST.fetch_add(1, Ordering::SeqCst);
    if !NEGLECT.load(Ordering::SeqCst) {
        bring_out();
    }
}

/// Brings all processors out of the guest.
pub(crate) fn bring_out() {
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
}
