//! Memory of `memslot-backing` behind a bridge: kept by old maps, with its file.
#![cfg(all(feature = "backing", feature = "bridge", target_os = "linux"))]

use std::os::fd::AsRawFd;
use std::sync::Arc;

use memslot::*;
use memslot_backing::{Backings, Memory};
use memslot_vm_memory::{Bridge, Native, backed};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;

#[test]
fn an_old_map_keeps_the_memory_and_the_last_one_lets_it_go() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let backings = Backings::attach(&mut table).unwrap();
    // SAFETY: slots stand on adopted memory, which each map keeps.
    let atomic: GuestMemoryAtomic<GuestMemoryMmap> =
        unsafe { Bridge::new(RAM).describe(backed(&backings)).attach(&mut table) }.unwrap();
    let memory = Arc::new(Memory::memfd("old", 1 << 20).map().unwrap());
    backings.adopt(&memory);
    table.create(backings.spec(SlotId::new(0), Gfn::new(0), &memory, ..).unwrap()).unwrap();
    let gone = Arc::downgrade(&memory);
    drop(memory);

    let guard = atomic.memory();
    guard.write_obj(0x77u32, GuestAddress(0x4000)).unwrap();
    table.delete(RAM, SlotId::new(0)).unwrap();
    table.reclaim();
    assert_eq!(guard.read_obj::<u32>(GuestAddress(0x4000)).unwrap(), 0x77);
    assert!(gone.upgrade().is_some());
    drop(guard);
    // The bridge looks with each change.
    let other = Arc::new(Memory::anonymous(1 << 20).map().unwrap());
    backings.adopt(&other);
    table.create(backings.spec(SlotId::new(1), Gfn::new(0), &other, ..).unwrap()).unwrap();
    table.delete(RAM, SlotId::new(1)).unwrap();
    table.reclaim();
    assert!(gone.upgrade().is_none());
}

#[test]
fn slots_on_one_file_share_its_descriptor() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let backings = Backings::attach(&mut table).unwrap();
    // SAFETY: slots stand on adopted memory, which each version keeps.
    let space = unsafe { Native::new(RAM).describe(backed(&backings)).attach(&mut table) }.unwrap();
    let memory = Arc::new(Memory::memfd("two", 1 << 20).map().unwrap());
    backings.adopt(&memory);
    table
        .transaction(|tx| {
            tx.create(backings.spec(SlotId::new(0), Gfn::new(0), &memory, ..0x8_0000).unwrap())?;
            tx.create(backings.spec(SlotId::new(1), Gfn::new(0x1000), &memory, 0x8_0000..).unwrap())
        })
        .unwrap();
    let guard = space.memory();
    let files: Vec<_> = guard
        .iter()
        .map(|region| {
            let file = region.file_offset().unwrap();
            assert_eq!(region.is_hugetlbfs(), Some(false));
            (file.file().as_raw_fd(), file.start())
        })
        .collect();
    assert_eq!(files.len(), 2);
    assert_eq!(files[0].0, files[1].0);
    assert_eq!((files[0].1, files[1].1), (0, 0x8_0000));
}
