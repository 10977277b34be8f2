//! KVM's layout and sizes, and what cannot be pushed.

use super::*;

#[test]
fn the_layout_is_kvms() {
    assert_eq!((size_of::<Entry>(), align_of::<Entry>()), (16, 16));
    let offsets = [
        std::mem::offset_of!(Entry, flags),
        std::mem::offset_of!(Entry, slot),
        std::mem::offset_of!(Entry, offset),
    ];
    assert_eq!(offsets, [0, 4, 8]);
    #[cfg(target_os = "linux")]
    {
        use kvm_bindings::kvm_dirty_gfn;
        assert_eq!(size_of::<kvm_dirty_gfn>(), size_of::<Entry>());
        let theirs = [
            std::mem::offset_of!(kvm_dirty_gfn, flags),
            std::mem::offset_of!(kvm_dirty_gfn, slot),
            std::mem::offset_of!(kvm_dirty_gfn, offset),
        ];
        assert_eq!(offsets, theirs);
    }
    assert_eq!((DIRTY, RESET), (1, 2));
    let mut table = SlotTable::new(Limits { address_spaces: 2, ..Limits::default() }).unwrap();
    let smm = SlotSpec { address_space: AddressSpaceId::SMM, ..spec(0x7abc, 0, 0x1000, 0x7000_0000, LOG) };
    table.create(smm).unwrap();
    let (mut ring, mut reader) = ring();
    push(&mut ring, table.view().slot(AddressSpaceId::SMM, SlotId::new(0x7abc)).unwrap(), 0x123);
    let entry = &ring.memory()[0];
    let words = |entry: &Entry| {
        let order = Ordering::Relaxed;
        (entry.flags.load(order), entry.slot.load(order), entry.offset.load(order))
    };
    assert_eq!(words(entry), (DIRTY, 0x1_7abc, 0x123));
    let page = reader.collect().next().unwrap();
    assert_eq!((page.address_space, page.slot.get(), page.offset), (1, 0x7abc, 0x123));
    assert_eq!(page.gfn(table.view()), Some((AddressSpaceId::SMM, Gfn::new(0x123))));
    assert_eq!(words(entry), (RESET, 0x1_7abc, 0x123));
    let mut mmu = Recording::default();
    let _ = ring.reset(table.view(), &mut mmu, || false).unwrap();
    assert_eq!(mmu.calls, [(1, 0x123, 0x124)]);
    assert_eq!(words(&ring.memory()[0]), (0, 0x1_7abc, 0x123));
}

#[test]
fn the_sizes_are_kvms() {
    let of = |bytes, reserved| RingSize::from_bytes(bytes, PageSize::K4, reserved);
    for bytes in [0, 1000, 4097, 12288, u64::MAX] {
        assert_eq!(of(bytes, 0), Err(RingError::NotPowerOfTwo { bytes }));
    }
    assert_eq!(of(2048, 0), Err(RingError::TooSmall { bytes: 2048, least: 4096 }));
    assert!(matches!(of(8192, PML_ENTRIES), Err(RingError::TooSmall { .. })), "512 entries, 576 reserved");
    assert_eq!(of(16384, PML_ENTRIES).unwrap().soft_limit(), 1024 - 576);
    assert!(matches!(RingSize::from_bytes(32768, PageSize::K64, 0), Err(RingError::TooSmall { .. })));
    assert_eq!(of(1 << 20, 0).unwrap().entries(), MAX_ENTRIES);
    let most = 1 << 20;
    for bytes in [1 << 21, 1 << 36, 1 << 63] {
        assert_eq!(of(bytes, PML_ENTRIES), Err(RingError::TooLarge { bytes, most }));
    }
    assert!(matches!(of(4096, u32::MAX), Err(RingError::TooSmall { .. })));
    assert!(of(1 << 63, u32::MAX).is_err());

    let memory = size().allocate().unwrap();
    let short = DirtyRing::with_memory(size(), &memory[1..]).err();
    assert_eq!(short, Some(RingError::WrongMemory { entries: 255, needed: 256 }));
    assert!(matches!(RingReader::new(&memory[1..]).err(), Some(RingError::NotPowerOfTwo { .. })));
    assert!(matches!(RingReader::new(&memory[..0]).err(), Some(RingError::NotPowerOfTwo { .. })));
    assert_eq!(DirtyRing::new(size()).unwrap().memory().len(), 256);

    // Whatever was in the memory before, a new ring is empty.
    memory.iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Relaxed));
    assert_eq!(DirtyRing::with_memory(size(), &memory).unwrap().used(), 0);
    assert_eq!(RingReader::new(&memory).unwrap().collect().count(), 0);
}

#[test]
fn what_cannot_be_pushed_is_not() {
    let mut table = SlotTable::new(Limits { slots: 100_000, ..Limits::default() }).unwrap();
    table.create(spec(0, BASE, 0x1_0000, 0x7000_0000, LOG)).unwrap();
    table.create(spec(65_535, 0x10_0000, 16, 0x5000_0000, LOG)).unwrap();
    table.create(spec(65_536, 0x10_0010, 16, 0x5000_0000, LOG)).unwrap();
    let (mut ring, mut reader) = ring();
    let outside = PushError::OutsideSlot { id: SlotId::new(0), offset: 0x1_0000, pages: 0x1_0000 };
    assert_eq!(ring.push(slot(&table, 0), 0x1_0000), Err(outside));
    assert!(ring.push(slot(&table, 0), u64::MAX).is_err());
    let too_high = PushError::IdTooHigh { id: SlotId::new(65_536) };
    assert_eq!(ring.push(slot(&table, 65_536), 0), Err(too_high));
    assert_eq!(ring.used(), 0);
    assert_eq!(ring.push(slot(&table, 65_535), 0), Ok(Pushed::Recorded));
    assert_eq!(reader.collect().map(|page| page.slot.get()).collect::<Vec<_>>(), [65_535]);
    table.set_flags(RAM, SlotId::new(0), SlotFlags::empty()).unwrap();
    assert_eq!(ring.push(slot(&table, 0), 0), Ok(Pushed::NotLogged));
    assert_eq!((ring.used(), reader.collect().count()), (1, 0));
}
