//! What is owed to processors that still have an old translation, and to the dirty log, whoever was the first to find nothing there.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use memslot::dirty::Rearm;
use memslot::{AddressSpaceId, GfnRange};
use memslot_mmu::shadow::{ShadowConfig, ShadowRearm};

use crate::past_bugs::{ALL, Guest, LOG, PAGE_SIZE, PD, PT, USER_WRITE};
use crate::world::host::TestHost;
use crate::world::layout::LARGE;
use crate::world::{RAM, World, range};

const SLOT: u32 = 1;

/// A guest that has written to a page of a logged slot, and has done so lately: its processor can write there by itself.
fn writes() -> Guest {
    let mut guest = Guest::small();
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 0, LARGE << 12 | ALL);
    guest.set_flags(SLOT, LOG);
    guest.leads(0, 0, USER_WRITE, LARGE);
    guest
}

/// Re-arms, and fails afterwards: as where pages are re-armed in several tables, and the second of them cannot.
struct Fails(ShadowRearm<TestHost>);

impl Rearm for Fails {
    type Error = &'static str;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Self::Error> {
        let Ok(()) = self.0.rearm(space, gfns);
        Err("not now")
    }

    fn flush(&mut self) -> Result<(), Self::Error> {
        unreachable!("it has failed")
    }
}

/// A harvest that fails has taken W away, and nobody was flushed. The next one finds no W, and owes a flush all the same: also where the first
/// one's re-arming is gone by then, and where it is not.
#[test]
fn a_harvest_that_fails_leaves_its_flush_to_the_next() {
    for is_kept in [false, true] {
        let mut guest = writes();
        let mut fails = Fails(guest.world.shadow.dirty_rearm().unwrap());
        assert!(guest.world.consumer.harvest(&mut fails).is_err());
        let kept = is_kept.then_some(fails);
        assert!(guest.step(World::harvest).contains(&(RAM, LARGE)));
        // If it needs no fault, nobody hears of it.
        guest.leads(0, 0, USER_WRITE, LARGE);
        assert!(guest.step(World::harvest).contains(&(RAM, LARGE)), "kept: {is_kept}");
        drop(kept);
    }
}

/// The same where logging stops and starts again.
#[test]
fn a_harvest_that_fails_leaves_its_flush_to_the_next_start_of_logging() {
    for is_kept in [false, true] {
        let mut guest = writes();
        let mut fails = Fails(guest.world.shadow.dirty_rearm().unwrap());
        assert!(guest.world.consumer.harvest(&mut fails).is_err());
        let kept = is_kept.then_some(fails);
        guest.set_flags(SLOT, memslot::SlotFlags::empty());
        guest.set_flags(SLOT, LOG);
        guest.leads(0, 0, USER_WRITE, LARGE);
        assert!(guest.step(World::harvest).contains(&(RAM, LARGE)), "kept: {is_kept}");
        drop(kept);
    }
}

/// Where all pages are dirty at first, large pages stay writable until they are harvested.
#[test]
fn large_pages_that_are_dirty_at_first() {
    let mut guest = Guest::new(ShadowConfig::default());
    guest.world.log.set_initially_set(true);
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    guest.leads(0, 0, USER_WRITE, LARGE);
    guest.set_flags(SLOT, LOG);
    guest.leads(0, 1 << 12, USER_WRITE, LARGE + 1);
    assert!(guest.step(World::harvest).contains(&(RAM, LARGE + 1)));
    guest.leads(0, 1 << 12, USER_WRITE, LARGE + 1);
    assert!(guest.step(World::harvest).contains(&(RAM, LARGE + 1)));
    guest.step(|world| world.shadow.zap_gfn_range(RAM, range(LARGE, 512)));
}
