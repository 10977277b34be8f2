//! Large pages are made again when logging stops.

use memslot::{Gfn, SlotId};
use memslot_mmu::Level;
use memslot_mmu::shadow::ShadowConfig;
use memslot_mmu::shadow::guest::Mode;

use crate::past_bugs::{ALL, Guest, LOG, NONE, PAGE_SIZE, PD, USER, USER_WRITE, in_pd};
use crate::world::cpu::all_leaves;
use crate::world::host::HVA;
use crate::world::layout::LARGE;
use crate::world::{RAM, World, range, slot};

const SLOT: u32 = 1;

/// How large the page at an address is for the processor.
fn size(guest: &Guest, address: u64) -> u64 {
    let root = guest.world.cpus[0].vcpu.root().unwrap();
    let leaves = all_leaves(&guest.world.host, root);
    let leaf = leaves.iter().find(|leaf| (leaf.address..leaf.address + leaf.bytes).contains(&address));
    leaf.map_or(0, |leaf| leaf.bytes)
}

/// A guest with two large pages of its own in a slot that is logged: in pieces.
fn logged(config: ShadowConfig) -> Guest {
    let mut guest = Guest::new(config);
    guest.set_flags(SLOT, LOG);
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    guest.put(PD, 1, (LARGE + 512) << 12 | ALL | PAGE_SIZE);
    for page in [0u64, 3, 20, 511] {
        guest.leads(0, page << 12, USER_WRITE, LARGE + page);
        guest.leads(0, in_pd(1) | page << 12, USER, LARGE + 512 + page);
    }
    guest.step(World::harvest);
    guest
}

#[test]
fn large_pages_are_made_again_when_logging_stops() {
    let mut guest = logged(ShadowConfig::default());
    assert_eq!([0, in_pd(1)].map(|address| size(&guest, address)), [4096; 2]);
    let before = guest.world.shadow.stats();
    guest.set_flags(SLOT, NONE);
    let after = guest.world.shadow.stats();
    assert_eq!((after.collapsed, after.flushes - before.flushes), (2, 1), "one flush");
    assert_eq!(after.pages, before.pages - 2);
    // The next fault of each makes it, whether it is a read or a write.
    guest.leads(0, 5 << 12, USER_WRITE, LARGE + 5);
    guest.leads(0, in_pd(1) | 7 << 12, USER, LARGE + 512 + 7);
    assert_eq!([0, in_pd(1)].map(|address| size(&guest, address)), [1 << 21; 2]);
    let faults = guest.world.shadow.stats().faults;
    for page in (0..512).step_by(37) {
        guest.leads(0, page << 12, USER_WRITE, LARGE + page);
    }
    assert_eq!(guest.world.shadow.stats().faults, faults, "all of it");
}

/// Where there can be no large page, nothing is given up: the host's frames are apart, a guest's table lies there, a border.
#[test]
fn what_cannot_be_large_stays() {
    // A frame that is somewhere else.
    let mut guest = logged(ShadowConfig::default());
    let shadow = guest.world.shadow.clone();
    let hva = HVA + ((LARGE + 20) << 12);
    guest.step(|world| {
        let invalidation = shadow.invalidate_hva(crate::world::page_of(hva)).unwrap();
        world.host.move_page(hva);
        invalidation.end();
    });
    guest.leads(0, 20 << 12, USER_WRITE, LARGE + 20);
    guest.set_flags(SLOT, NONE);
    assert_eq!(guest.world.shadow.stats().collapsed, 1, "the other one");
    assert_eq!(size(&guest, 0), 4096);

    // A table that is shadowed.
    let mut guest = logged(ShadowConfig::default());
    guest.store(0, PD, 2, (LARGE + 9) << 12 | ALL);
    guest.put(LARGE + 9, 0, 30 << 12 | ALL);
    guest.leads(0, in_pd(2), USER, 30);
    guest.set_flags(SLOT, NONE);
    assert_eq!(guest.world.shadow.stats().collapsed, 1, "the other one");
    assert_eq!(size(&guest, 0), 4096);

    // The slot has not all of it, and is split at the same time; and small pages only.
    let mut guest = logged(ShadowConfig::default());
    guest.change(|world| {
        let change = world.table.transaction(|tx| {
            tx.split(RAM, SlotId::new(SLOT), Gfn::new(LARGE + 100), SlotId::new(5))?;
            tx.set_flags(RAM, SlotId::new(SLOT), NONE)?;
            tx.set_flags(RAM, SlotId::new(5), NONE)
        });
        change.unwrap();
    });
    assert_eq!(guest.world.shadow.stats().collapsed, 1, "the other one");
    let mut guest = logged(ShadowConfig { largest: Level::K4, ..ShadowConfig::default() });
    guest.set_flags(SLOT, NONE);
    assert_eq!(guest.world.shadow.stats().collapsed, 0);
}

/// One of two halves is not logged any more, and is merged with the other, which was not.
#[test]
fn a_merge_that_ends_logging_makes_large_pages_of_both() {
    let mut guest = Guest::new(ShadowConfig::default());
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    guest.change(|world| {
        let split = |tx: &mut memslot::Transaction<'_>| {
            tx.split(RAM, SlotId::new(SLOT), Gfn::new(LARGE + 256), SlotId::new(5))?;
            tx.set_flags(RAM, SlotId::new(5), LOG)
        };
        world.table.transaction(split).unwrap();
    });
    guest.leads(0, 0x5000, USER_WRITE, LARGE + 5);
    guest.leads(0, 300 << 12, USER_WRITE, LARGE + 300);
    guest.change(|world| {
        let merge = |tx: &mut memslot::Transaction<'_>| {
            tx.set_flags(RAM, SlotId::new(5), NONE)?;
            tx.merge(RAM, SlotId::new(SLOT), SlotId::new(5))
        };
        world.table.transaction(merge).unwrap();
    });
    guest.leads(0, 300 << 12, USER_WRITE, LARGE + 300);
    assert_eq!(size(&guest, 0), 1 << 21);
}

/// Pages of 1 GiB, in pieces of both sizes.
#[test]
fn pages_of_1_gib_are_made_again() {
    const G1: u64 = 1 << 18;
    let mut guest = Guest::new(ShadowConfig::default());
    guest.change(|world| {
        world.table.create(slot(RAM, 7, range(G1, G1), G1, LOG)).unwrap();
    });
    guest.put(5, 1, G1 << 12 | ALL | PAGE_SIZE);
    for page in [0, 511, 512, G1 - 1] {
        guest.leads(0, (G1 + page) << 12, USER_WRITE, G1 + page);
    }
    guest.set_flags(7, NONE);
    assert!(guest.world.shadow.stats().collapsed >= 3);
    guest.leads(0, (G1 + 4444) << 12, USER_WRITE, G1 + 4444);
    assert_eq!(size(&guest, G1 << 12), 1 << 30);
}

/// A guest without paging has no large pages, and its memory is mapped by large ones.
#[test]
fn without_paging_there_are_large_pages_again() {
    let mut guest = Guest::new(ShadowConfig::default());
    guest.set_flags(SLOT, LOG);
    guest.step(|world| assert!(world.load(0, 0, 0, RAM, true)));
    assert_eq!(guest.world.cpus[0].paging.mode(), Mode::Off);
    guest.leads(0, LARGE << 12, crate::world::WRITE, LARGE);
    assert_eq!(size(&guest, LARGE << 12), 4096);
    guest.set_flags(SLOT, NONE);
    guest.leads(0, (LARGE + 1) << 12, crate::world::WRITE, LARGE + 1);
    assert_eq!(size(&guest, LARGE << 12), 1 << 21);
}
