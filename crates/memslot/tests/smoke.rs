use memslot::*;
#[test]
fn smoke() {
    let mut t = SlotTable::new(Limits::default()).unwrap();
    let a = AddressSpaceId::NORMAL;
    for i in 0..5000u32 {
        let s = SlotSpec { address_space: a, id: SlotId::new(i), gfns: GfnRange::with_len(Gfn::new(u64::from(i) * 700), 1 + u64::from(i) % 600).unwrap(),
            backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000 + u64::from(i) * 0x1000 * 1000) }, flags: SlotFlags::empty() };
        t.create(s).unwrap();
    }
    assert_eq!(t.view().slots(a).count(), 5000);
    for i in 0..5000u32 {
        assert_eq!(t.view().slot_at(a, Gfn::new(u64::from(i) * 700)).unwrap().id().get(), i);
        assert_eq!(t.view().slot_ids_at_hva(a, Hva::new(0x7f00_0000_0000 + u64::from(i) * 0x1000 * 1000)).count(), 1);
    }
    println!("{:?}", t.stats());
    for i in 0..5000u32 { t.delete(a, SlotId::new((i * 7) % 5000)).unwrap(); }
    t.reclaim();
    println!("{:?}", t.stats());
    assert_eq!(t.stats().nodes, 0);
}
