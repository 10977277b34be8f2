//! Faults whose walkers announce themselves by plain stores, beside those who free (`epoch.rs`).
//!
//! A heavy fence is an exchange in a model, and each announcement has one behind it: the place in the walker's thread that the
//! fence is in front of or behind. Without the fence's exchange the model must fail.

use alloc::boxed::Box;

use loom::sync::atomic::Ordering;
use loom::thread;
use memslot::dirty::{FenceRefused, HeavyFence};

use super::epoch::CROSSING;
use super::fault::Fault;
use super::loom_tests::{Guest, range, write};
use crate::level::Level;

/// A heavy fence, or one that does nothing.
struct Fence {
    works: bool,
}

impl HeavyFence for Fence {
    fn fence(&self) -> Result<(), FenceRefused> {
        if self.works {
            CROSSING.fetch_add(0, Ordering::AcqRel);
        }
        Ok(())
    }
}

fn guest(works: bool) -> Guest {
    Guest::with_fence(Box::new(Fence { works }), !works)
}

/// What is left in the end.
fn check(guest: &Guest) {
    guest.mmu.zap(range(0, 2)).discharge();
    guest.mmu.reclaim();
    assert_eq!((guest.pfn(0), guest.pfn(1), guest.mmu.stats().tables), (None, None, 1));
}

/// A write to a page that is not mapped (0) or mapped (1), in a table that is taken out and freed meanwhile.
fn a_fault_beside_a_zap(works: bool, gfn: u64) {
    loom::model(move || {
        let guest = guest(works);
        let mut vcpu = guest.vcpu();
        let _ = write(&mut vcpu, 1);
        let other = thread::spawn(move || {
            let fault = write(&mut vcpu, gfn);
            assert!(fault == Fault::Mapped(Level::K4) || gfn == 1 && fault == Fault::AlreadyMapped);
        });
        guest.mmu.zap(range(0, 2)).discharge();
        guest.mmu.reclaim();
        other.join().unwrap();
        check(&guest);
    });
}

#[test]
fn loom_a_light_fault_beside_a_zap_that_frees_its_table() {
    a_fault_beside_a_zap(true, 0);
    a_fault_beside_a_zap(true, 1);
}

/// With a page that is mapped: a fault that installs has a fence behind that, and a fence orders more for loom than elsewhere.
#[test]
#[should_panic(expected = "Causality violation")]
fn loom_a_light_fault_without_the_fence_is_in_a_table_that_is_freed() {
    a_fault_beside_a_zap(false, 1);
}

/// One faults, one takes out, one frees.
#[test]
fn loom_a_light_fault_beside_a_zap_and_one_that_frees() {
    loom::model(|| {
        let guest = guest(true);
        let mut vcpu = guest.vcpu();
        let _ = write(&mut vcpu, 1);
        let faulting = thread::spawn(move || {
            let _ = write(&mut vcpu, 1);
        });
        let mmu = guest.mmu.clone();
        let zapping = thread::spawn(move || mmu.zap(range(0, 2)).discharge());
        guest.mmu.reclaim();
        faulting.join().unwrap();
        zapping.join().unwrap();
        check(&guest);
    });
}
