//! Bugs that KVM's memory slots have had, each as a test that fails where the same mistake is made here.
//!
//! Numbers are the rows of the project's list of past bugs. Of the rows on slot registration and indexes these are
//! elsewhere or not here yet:
//!
//! | row | bug | where |
//! |---|---|---|
//! | 10, 11 | a fault that raced with a delete installed its mapping | `memslot-mmu`, `tests/past_bugs.rs` |
//! | 12, 13 | unbalanced start and end of an invalidation | `memslot-mmu`, `tests/past_bugs.rs` |
//! | 14 | a cycle of locks | the core takes no lock: there is one writer, by `&mut` |
//! | 15 | leaks and early frees when an allocation fails | `allocation_failure.rs`, and `table/tests.rs` node by node |
//! | 18 | a page reference leaked | no pages are referenced: a slot names memory, it does not hold it |
//! | 19-28 | the dirty log and the dirty ring | `dirty_log/`, `dirty_ring/` |

mod common;

mod past_bugs {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    use memslot::rules::{Errno, GuestMemfdFiles, Rules, UserMemoryRegion, UserMemoryRegion2, Why};
    use memslot::{
        AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, Limits, Listener, ListenerError, Piece, PieceKind,
        Slot, SlotFlags, SlotId, SlotSpec, SlotTable, Update,
    };
    use memslot_testing::Random;

    const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
    const HVA: u64 = 0x7f00_0000_0000;

    fn table() -> SlotTable {
        SlotTable::new(Limits::default()).unwrap()
    }

    fn spec(id: u32, base: u64, pages: u64, hva: u64) -> SlotSpec {
        SlotSpec {
            address_space: RAM,
            id: SlotId::new(id),
            gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
            backing: Backing::Host { hva: Hva::new(hva) },
            flags: SlotFlags::empty(),
        }
    }

    fn page(gfn: u64) -> Gpa {
        Gpa::new(gfn << 12)
    }

    /// Row 1 (CVE-2013-1943): the host address was not checked, so a guest could reach kernel memory. Here the
    /// end of user space is a parameter of the rules, and no sum can wrap.
    #[test]
    fn row_1_host_memory_outside_of_user_space_is_refused() {
        let rules = Rules::default();
        let end = rules.host.user_end;
        let call = |userspace_addr, memory_size| {
            let region = UserMemoryRegion { userspace_addr, memory_size, ..Default::default() };
            rules.set_user_memory_region(&mut table(), &region)
        };
        assert!(call(end - 0x1000, 0x1000).is_ok(), "the last page of user space");
        for (userspace_addr, memory_size) in [
            (end, 0x1000),
            (end - 0x1000, 0x2000),
            (0xffff_8000_0000_0000, 0x1000),
            (u64::MAX - 0xfff, 0x1000),
            (u64::MAX - 0xfff, 0x2000),
            (HVA | 1 << 57, 0x1000),
            (1 << 47, 0x1000),
        ] {
            // The reason, too: the table refuses a backing that wraps by itself, and would hide a missing check.
            let refusal = call(userspace_addr, memory_size).unwrap_err();
            assert_eq!(refusal.errno, Errno::EINVAL, "{userspace_addr:#x}");
            assert!(matches!(refusal.why, Why::NotUserMemory { .. }), "{userspace_addr:#x}: {refusal}");
        }
    }

    /// An observer that maps and unmaps like an IOMMU, frame by frame.
    #[derive(Clone, Default)]
    struct Iommu(Arc<Mutex<BTreeMap<u64, u64>>>);

    impl Iommu {
        fn follow(&self, pieces: impl Iterator<Item = Piece>) {
            let mut maps = self.0.lock().unwrap();
            for piece in pieces {
                for gfn in piece.gfns.start().get()..piece.gfns.end().get() {
                    match piece.kind {
                        PieceKind::Removed { old } => {
                            assert_eq!(maps.remove(&gfn), old.hva_of(Gfn::new(gfn)).map(Hva::get));
                        }
                        PieceKind::Added { new } => {
                            let hva = new.hva_of(Gfn::new(gfn)).unwrap().get();
                            assert_eq!(maps.insert(gfn, hva), None, "mapped twice");
                        }
                        PieceKind::Changed { .. } => assert!(maps.contains_key(&gfn)),
                    }
                }
            }
        }

        fn maps(&self) -> BTreeMap<u64, u64> {
            self.0.lock().unwrap().clone()
        }
    }

    impl Listener for Iommu {
        fn name(&self) -> &str {
            "iommu"
        }

        fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
            self.follow(update.pieces.iter().copied());
            Ok(())
        }

        fn undo(&mut self, update: &Update<'_>) {
            let back = update.pieces.iter().rev().map(|&piece| {
                let kind = match piece.kind {
                    PieceKind::Removed { old } => PieceKind::Added { new: old },
                    PieceKind::Added { new } => PieceKind::Removed { old: new },
                    PieceKind::Changed { old, new } => PieceKind::Changed { old: new, new: old },
                };
                Piece { kind, ..piece }
            });
            self.follow(back);
        }
    }

    /// A listener that fails on demand.
    #[derive(Clone, Default)]
    struct Breaks(Arc<Mutex<bool>>);

    impl Listener for Breaks {
        fn name(&self) -> &str {
            "breaks"
        }

        fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
            if *self.0.lock().unwrap() { Err("on purpose".into()) } else { Ok(()) }
        }

        fn undo(&mut self, _: &Update<'_>) {}
    }

    fn followed() -> (SlotTable, Iommu, Breaks) {
        let (mut table, iommu, breaks) = (table(), Iommu::default(), Breaks::default());
        table.add_listener(Box::new(iommu.clone())).unwrap();
        table.add_listener(Box::new(breaks.clone())).unwrap();
        (table, iommu, breaks)
    }

    /// Row 2 (CVE-2013-4592): a moved slot stayed mapped in the IOMMU at its old place. Here listeners hear of a
    /// move as frames that go and frames that come, and a move that fails late is undone.
    #[test]
    fn row_2_a_move_unmaps_and_maps() {
        let (mut table, iommu, breaks) = followed();
        table.create(spec(0, 16, 4, HVA)).unwrap();
        // Onto itself by two pages, too.
        for to in [100, 102, 98, 16] {
            table.move_to(RAM, SlotId::new(0), Gfn::new(to)).unwrap();
            let wanted: BTreeMap<_, _> = (0..4).map(|i| (to + i, HVA + (i << 12))).collect();
            assert_eq!(iommu.maps(), wanted);
        }
        let before = iommu.maps();
        *breaks.0.lock().unwrap() = true;
        assert!(table.move_to(RAM, SlotId::new(0), Gfn::new(17)).is_err());
        assert_eq!(iommu.maps(), before, "undone");
        assert_eq!(table.view().slot(RAM, SlotId::new(0)).unwrap().base_gfn(), Gfn::new(16));
    }

    /// Row 3 (CVE-2012-2121 and its like): pins leaked, or too much was unpinned, when an update failed half-way.
    /// Here a failure undoes exactly what was done, listener by listener.
    #[test]
    fn row_3_pins_balance_over_failures() {
        let (mut table, iommu, breaks) = followed();
        let mut random = Random::new(3);
        for _ in 0..400 {
            *breaks.0.lock().unwrap() = random.once_in(3);
            let (id, base) = (u32::try_from(random.below(6)).unwrap(), random.below(60));
            let before = iommu.maps();
            let result = match random.below(3) {
                0 => table.create(spec(id, base, 1 + random.below(9), HVA + (random.below(99) << 12))),
                1 => table.move_to(RAM, SlotId::new(id), Gfn::new(base)),
                _ => table.delete(RAM, SlotId::new(id)),
            };
            if result.is_err() {
                assert_eq!(iommu.maps(), before);
            }
        }
        *breaks.0.lock().unwrap() = false;
        let ids: Vec<_> = table.view().slots(RAM).map(Slot::id).collect();
        for id in ids {
            table.delete(RAM, id).unwrap();
        }
        assert!(iommu.maps().is_empty());
    }

    /// Row 4 (CVE-2020-36313): the last-used index pointed beyond the array after the last slot was deleted. Here
    /// the last-used slot is a value that counts in its generation only.
    #[test]
    fn row_4_the_last_used_slot_is_forgotten_with_its_slot() {
        let mut table = table();
        let mut reader = table.reader().unwrap();
        assert_eq!(reader.translate(RAM, page(0)), None, "an empty table");
        for slots in [1, 2, 50] {
            for i in 0..slots {
                table.create(spec(i, u64::from(i) * 8, 8, HVA)).unwrap();
            }
            for i in (0..slots).rev() {
                let gpa = page(u64::from(i) * 8 + 3);
                assert_eq!(reader.translate(RAM, gpa).unwrap().slot, SlotId::new(i));
                table.delete(RAM, SlotId::new(i)).unwrap();
                assert_eq!(reader.translate(RAM, gpa), None);
            }
        }
    }

    /// Row 5: a slot at gfn 0 broke the order that lookups relied on. Here gfn 0 is a gfn like others.
    #[test]
    fn row_5_a_slot_at_gfn_0() {
        for order in [[0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 1, 0]] {
            let mut table = table();
            for id in order {
                table.create(spec(id, u64::from(id) * 10, 10, HVA)).unwrap();
            }
            let find = |table: &SlotTable, gfn| table.view().slot_at(RAM, Gfn::new(gfn)).map(Slot::id);
            assert_eq!(find(&table, 0), Some(SlotId::new(0)));
            table.delete(RAM, SlotId::new(0)).unwrap();
            assert_eq!((find(&table, 0), find(&table, 10)), (None, Some(SlotId::new(1))));
            table.create(spec(0, 0, 10, HVA)).unwrap();
            assert_eq!(find(&table, 9), Some(SlotId::new(0)));
            assert_eq!(table.view().slots(RAM).count(), 3);
        }
    }

    /// Row 6: the old slot's pointer went stale when the array was sorted again. Here a slot is a value, and what
    /// a snapshot refers to neither moves nor changes.
    #[test]
    fn row_6_what_was_looked_up_before_stays_what_it_was() {
        let mut table = table();
        for i in 0..40 {
            table.create(spec(i, u64::from(i) * 8, 8, HVA)).unwrap();
        }
        let snapshot = table.snapshot();
        let held: Vec<&Slot> = snapshot.slots(RAM).collect();
        let copies: Vec<Slot> = held.iter().map(|&slot| *slot).collect();
        for i in (0..40).rev() {
            table.move_to(RAM, SlotId::new(i), Gfn::new(1000 + u64::from(40 - i) * 8)).unwrap();
            table.delete(RAM, SlotId::new(i)).unwrap();
        }
        table.reclaim();
        assert!(held.iter().zip(&copies).all(|(held, copy)| *held == copy));
    }

    /// Row 7: shifting the array left the hash of ids pointing at the wrong slots. Here the id index holds the
    /// slots, and the others only name ids.
    #[test]
    fn row_7_ids_lead_to_their_slots_after_every_change() {
        let (mut table, mut model, mut random) = (table(), BTreeMap::new(), Random::new(7));
        for _ in 0..600 {
            let (id, base) = (u32::try_from(random.below(90)).unwrap(), random.below(2000));
            if let std::collections::btree_map::Entry::Occupied(entry) = model.entry(id) {
                table.delete(RAM, SlotId::new(id)).unwrap();
                entry.remove();
            } else if table.create(spec(id, base, 1 + random.below(20), HVA)).is_ok() {
                model.insert(id, base);
            }
            for id in 0..90 {
                let found = table.view().slot(RAM, SlotId::new(id)).map(|slot| slot.base_gfn().get());
                assert_eq!(found, model.get(&id).copied(), "slot {id}");
            }
        }
    }

    #[derive(Default)]
    struct Bindings(i32);

    impl GuestMemfdFiles for Bindings {
        fn bind(&mut self, _: u32, _: u64, _: u64) -> Result<(), Errno> {
            self.0 += 1;
            Ok(())
        }

        fn unbind(&mut self, _: u32, _: u64, _: u64) {
            self.0 -= 1;
        }
    }

    /// Row 8: `GUEST_MEMFD` could be switched off on a slot that had it, and its binding dangled. Here such a slot
    /// can only be deleted.
    #[test]
    fn row_8_guest_memfd_stays_as_it_was_created() {
        let (rules, mut table, mut files) = (Rules::default(), table(), Bindings::default());
        let mut call = |slot, flags, memory_size| {
            let region = UserMemoryRegion { slot, flags, memory_size, ..Default::default() };
            let guest_phys_addr = u64::from(slot) << 20;
            let region = UserMemoryRegion2 {
                region: UserMemoryRegion { guest_phys_addr, ..region },
                ..Default::default()
            };
            let result = rules.set_user_memory_region2(&mut table, &region, &mut files);
            (result.map_err(|refusal| refusal.errno).is_ok(), files.0)
        };
        assert_eq!(call(0, 4, 0x4000), (true, 1));
        for flags in [0, 1, 4, 5] {
            assert_eq!(call(0, flags, 0x4000), (false, 1), "flags {flags}");
        }
        assert_eq!(call(1, 0, 0x4000), (true, 1));
        assert_eq!(call(1, 4, 0x4000), (false, 1), "nor switched on");
        assert_eq!(call(0, 0, 0), (true, 0), "deleted and unbound");
    }

    /// Row 8, the other way to a dangling binding: one that stays when its slot did not come to be.
    #[test]
    fn row_8_a_create_that_fails_after_the_bind_unbinds() {
        let (rules, mut table, mut files) = (Rules::default(), table(), Bindings::default());
        let mut region = UserMemoryRegion2::default();
        region.region.flags = 4;
        region.region.memory_size = 0x4000;
        // The highest gfn is looked at behind the bind, as in KVM.
        region.region.guest_phys_addr = (rules.host.highest_gfn + 1) << 12;
        let refusal = rules.set_user_memory_region2(&mut table, &region, &mut files).unwrap_err();
        assert!(matches!(refusal.why, Why::GfnTooHigh { .. }), "{refusal}");
        assert_eq!(files.0, 0);
        // A listener's refusal comes even later.
        let breaks = Breaks(Arc::new(Mutex::new(true)));
        table.add_listener(Box::new(breaks.clone())).unwrap();
        region.region.guest_phys_addr = 0;
        let refusal = rules.set_user_memory_region2(&mut table, &region, &mut files).unwrap_err();
        assert_eq!((refusal.errno, files.0), (Errno::EIO, 0));
        *breaks.0.lock().unwrap() = false;
        assert!(rules.set_user_memory_region2(&mut table, &region, &mut files).is_ok());
        assert_eq!(files.0, 1);
    }

    /// Row 9: deleting one slot disturbed the memory of others. Here listeners hear of exactly its frames.
    #[test]
    fn row_9_deleting_a_slot_touches_no_other() {
        let (mut table, iommu, _) = followed();
        for i in 0..30 {
            table.create(spec(i, u64::from(i) * 5, 5, HVA + (u64::from(i) << 20))).unwrap();
        }
        let mut wanted = iommu.maps();
        for id in [7, 0, 29, 8, 6] {
            table.delete(RAM, SlotId::new(id)).unwrap();
            wanted.retain(|gfn, _| gfn / 5 != u64::from(id));
            assert_eq!(iommu.maps(), wanted);
            for gfn in 0..150 {
                let found = table.view().translate(RAM, page(gfn)).map(|found| found.hva.get());
                assert_eq!(found, wanted.get(&gfn).copied());
            }
        }
    }

    /// Row 11: a mapping was made again for a slot that was already on its way out. Here whoever pins after a
    /// delete has returned finds a version without the slot.
    #[test]
    fn row_11_after_a_delete_nobody_finds_the_slot() {
        let mut table = table();
        let handle = table.handle();
        let mut readers: Vec<_> = (0..5).map(|_| handle.reader().unwrap()).collect();
        for round in 0..50 {
            table.create(spec(1, round, 9, HVA)).unwrap();
            assert!(readers.iter_mut().all(|reader| reader.translate(RAM, page(round)).is_some()));
            table.delete(RAM, SlotId::new(1)).unwrap();
            assert!(readers.iter_mut().all(|reader| reader.pin().slot_at(RAM, Gfn::new(round)).is_none()));
            assert!(readers.iter_mut().all(|reader| reader.translate(RAM, page(round)).is_none()));
        }
    }

    /// Row 16: something cached while the slots were in flux was believed for ever. Here a cache entry counts in
    /// its own generation, also when the same id comes back at the same place.
    #[test]
    fn row_16_a_cached_translation_dies_with_its_generation() {
        let mut table = table();
        let mut reader = table.reader().unwrap();
        let mut generations = Vec::new();
        for round in 0..20 {
            let hva = HVA + (round << 30);
            table.create(spec(5, 64, 64, hva)).unwrap();
            for _ in 0..2 {
                assert_eq!(reader.translate(RAM, page(70)).unwrap().hva, Hva::new(hva + (6 << 12)));
            }
            generations.push(table.view().slot(RAM, SlotId::new(5)).unwrap().generation());
            table.delete(RAM, SlotId::new(5)).unwrap();
        }
        generations.dedup();
        assert_eq!(generations.len(), 20, "a slot that came back is another slot");
    }

    /// Row 16, for both address spaces: what was cached for one is no answer for the other.
    #[test]
    fn row_16_a_cached_translation_stays_in_its_address_space() {
        let mut table = table();
        let smm = AddressSpaceId::SMM;
        table.create(spec(0, 64, 8, HVA)).unwrap();
        let mut reader = table.reader().unwrap();
        for _ in 0..2 {
            assert!(reader.translate(RAM, page(65)).is_some());
            assert_eq!(reader.translate(smm, page(65)), None);
        }
        let other = HVA + (1 << 30);
        table.create(SlotSpec { address_space: smm, ..spec(0, 64, 8, other) }).unwrap();
        for _ in 0..2 {
            assert_eq!(reader.translate(RAM, page(65)).unwrap().hva.get(), HVA + 0x1000);
            assert_eq!(reader.translate(smm, page(65)).unwrap().hva.get(), other + 0x1000);
        }
    }

    /// Row 17 (CVE-2022-49882 and its like): caches that outlived their slots or crossed a border. Here a
    /// translation says how far it goes, and a reader outlives its table without harm.
    #[test]
    fn row_17_a_translation_ends_with_its_slot() {
        let mut table = table();
        table.create(spec(0, 0, 2, HVA)).unwrap();
        table.create(SlotSpec { flags: SlotFlags::READONLY, ..spec(1, 2, 2, HVA + 0x10_0000) }).unwrap();
        let mut reader = table.reader().unwrap();
        let snapshot = table.snapshot();
        for _ in 0..2 {
            let last = reader.translate(RAM, Gpa::new(0x1ffc)).unwrap();
            assert_eq!((last.bytes_left, last.flags), (4, SlotFlags::empty()));
            let first = reader.translate(RAM, Gpa::new(0x2000)).unwrap();
            assert_eq!((first.hva.get(), first.flags), (HVA + 0x10_0000, SlotFlags::READONLY));
            assert_eq!(first.bytes_left, 0x2000);
        }
        drop(table);
        assert_eq!(reader.translate(RAM, Gpa::new(0x1000)).unwrap().hva.get(), HVA + 0x1000);
        assert_eq!(snapshot.len(RAM), 2);
    }
}
