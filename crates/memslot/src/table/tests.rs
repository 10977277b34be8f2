//! What only the inside can show: nodes counted, allocations failed one by one, the wrap of the generation.

use std::vec::Vec;

use super::*;
use crate::addr::Gpa;
use crate::addr::{GfnRange, Hva};
use crate::slot::Backing;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;

fn spec(id: u32, base: u64, pages: u64, hva_page: u64) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
        backing: Backing::Host { hva: Hva::new(hva_page << 12) },
        flags: SlotFlags::empty(),
    }
}

fn dump(view: &View) -> Vec<crate::Slot> {
    view.address_spaces().flat_map(|space| view.slots(space).copied().collect::<Vec<_>>()).collect()
}

/// Every kind of operation on a table that has some slots.
fn everything(tx: &mut Transaction<'_>) -> Result<(), TransactionError> {
    for i in 0..60 {
        tx.create(spec(1000 + i, 1 << 20 | u64::from(i) << 12, 3000, 1 << 30 | u64::from(i) << 13))?;
    }
    for i in 0..20 {
        tx.delete(RAM, SlotId::new(i))?;
    }
    for i in 20..30 {
        tx.move_to(RAM, SlotId::new(i), Gfn::new(1 << 30 | u64::from(i) << 20))?;
        tx.split(RAM, SlotId::new(i + 10), Gfn::new(u64::from(i + 10) * 64 + 7), SlotId::new(2000 + i))?;
        tx.resize(RAM, SlotId::new(i + 20), 3)?;
        tx.set_read_only(RAM, SlotId::new(i + 30), true)?;
    }
    tx.split(RAM, SlotId::new(70), Gfn::new(70 * 64 + 5), SlotId::new(3000))?;
    tx.merge(RAM, SlotId::new(70), SlotId::new(3000))
}

fn some_slots(generation: u64) -> SlotTable {
    let mut table = SlotTable::starting_at(Limits::default(), generation).unwrap();
    for i in 0..100 {
        table.create(spec(i, u64::from(i) * 64, 33, u64::from(i) * 40)).unwrap();
    }
    table
}

#[test]
fn a_failed_node_allocation_changes_nothing_wherever_it_is() {
    let mut table = some_slots(0);
    table.reclaim();
    let (before, nodes) = (dump(table.view()), table.stats().nodes);
    for allowed in 0.. {
        split(&mut table.shared).1.arena.pool.fail_after = Some(allowed);
        let result = table.transaction(everything);
        split(&mut table.shared).1.arena.pool.fail_after = None;
        match result {
            Ok(_) => {
                assert!(allowed > 50, "the transaction makes many nodes, it made {allowed}");
                break;
            }
            Err(error) => {
                assert!(matches!(error.reason, Reason::OutOfMemory), "{error}");
                assert_eq!(dump(table.view()), before);
                table.reclaim();
                assert_eq!(table.stats().nodes, nodes, "after {allowed} allocations");
            }
        }
    }
    assert_ne!(dump(table.view()), before);
}

#[test]
fn a_panic_in_the_closure_leaks_nothing() {
    let mut table = some_slots(0);
    table.reclaim();
    let (before, nodes) = (dump(table.view()), table.stats().nodes);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        table.transaction(|tx| {
            everything(tx)?;
            panic!("on purpose")
        })
    }));
    assert!(caught.is_err());
    assert_eq!((dump(table.view()), table.stats().nodes), (before, nodes));
    table.transaction(everything).unwrap();
}

#[test]
fn the_generation_wraps_unharmed() {
    let mut table = some_slots(u64::MAX - 150);
    let mut reader = table.reader().unwrap();
    let mut held = Vec::new();
    for i in 0..100 {
        held.push((table.snapshot(), dump(table.view())));
        let id = SlotId::new(i);
        assert!(reader.translate(RAM, Gpa::new(u64::from(i) << 18)).is_some());
        table.delete(RAM, id).unwrap();
        assert!(reader.translate(RAM, Gpa::new(u64::from(i) << 18)).is_none());
    }
    assert!(table.view().generation() < 150, "it went through 0");
    for (snapshot, slots) in &held {
        assert_eq!(&dump(snapshot), slots);
    }
    drop(held);
    table.reclaim();
    assert_eq!(table.stats().nodes, 0);
    assert_eq!(table.stats().versions, 1);
}

#[test]
fn memory_goes_back_when_slots_go() {
    let mut table = SlotTable::new(Limits { slots: 1 << 20, ..Limits::default() }).unwrap();
    let empty = table.stats().bytes;
    let ids = 0..if cfg!(miri) { 300 } else { 30_000 };
    for i in ids.clone() {
        table.create(spec(i, u64::from(i) * 64, 33, u64::from(i) * 40)).unwrap();
    }
    let full = table.stats().bytes;
    for i in ids {
        table.delete(RAM, SlotId::new(i)).unwrap();
    }
    table.reclaim();
    let after = table.stats();
    assert_eq!((after.nodes, after.dead_nodes, after.versions), (0, 0, 1));
    assert!(after.bytes < empty + full / 10 + (200 << 10), "{empty} → {full} → {} bytes", after.bytes);
}

#[test]
fn a_failed_commit_publishes_what_was_before() {
    struct Refuses;
    impl Listener for Refuses {
        fn name(&self) -> &str {
            "refuses"
        }
        fn commit(&mut self, _: &Update<'_>) -> Result<(), crate::ListenerError> {
            Err("on purpose".into())
        }
        fn undo(&mut self, _: &Update<'_>) {}
    }
    let mut table = some_slots(0);
    table.reclaim();
    let (before, nodes, generation) = (dump(table.view()), table.stats().nodes, table.view().generation());
    table.add_listener(Box::new(Refuses)).unwrap();
    for i in 1..=40 {
        let held = table.snapshot();
        let error = table.transaction(everything).unwrap_err();
        assert_eq!(std::string::ToString::to_string(&error), "listener refuses refused: on purpose");
        assert_eq!(dump(table.view()), before);
        assert_eq!(dump(&held), before);
        assert_eq!(table.view().generation(), generation + 2 * i, "the change and its undoing");
    }
    table.reclaim();
    assert_eq!(table.stats().nodes, nodes);
}

/// Panics while it prepares.
struct Panics;

impl Listener for Panics {
    fn name(&self) -> &str {
        "panics"
    }

    fn prepare(&mut self, _: &Update<'_>) -> Result<(), crate::ListenerError> {
        panic!("on purpose")
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), crate::ListenerError> {
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

#[test]
fn a_panic_of_a_listener_leaks_nothing_and_frees_nothing() {
    let mut table = some_slots(0);
    table.reclaim();
    let (before, nodes) = (dump(table.view()), table.stats().nodes);
    table.add_listener(Box::new(Panics)).unwrap();
    for _ in 0..3 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| table.transaction(everything)));
        assert!(result.is_err());
        table.reclaim();
        assert_eq!((dump(table.view()), table.stats().nodes), (before.clone(), nodes));
    }
    table.listeners.clear();
    table.transaction(everything).unwrap();
    for i in 40..90 {
        let _ = table.delete(RAM, SlotId::new(i));
    }
    table.reclaim();
    assert_eq!(table.view().slots(RAM).count(), table.view().len(RAM));
}

#[test]
fn an_empty_range_of_host_memory_hits_nothing() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    table.create(spec(0, 16, 10, 100)).unwrap();
    for at in [100 << 12, (105 << 12) + 7, 110 << 12] {
        let empty = crate::HvaRange::with_len(Hva::new(at), 0).unwrap();
        assert_eq!(table.view().slots_at_hva(RAM, empty).count(), 0);
    }
}

/// Keys are 32 bits of a gfn: around a multiple of 2^32 every frame is found, and so is every hole.
#[test]
fn lookups_around_a_multiple_of_two_to_the_32() {
    const LAYOUTS: [&[(i64, u64)]; 7] = [
        &[(-40, 8), (-20, 10), (-10, 9)],
        &[(-40, 8), (-20, 10), (-10, 10)],
        &[(-40, 8), (-1, 1), (0, 1), (1, 3)],
        &[(-40, 8), (-3, 9), (10, 20)],
        &[(0, 1), (3, 7), (20, 1)],
        &[(-(1 << 31), 9), (-30, 15), (1 << 30, 7)],
        &[(-(1 << 31) + 5, (1 << 31) - 1), (7, (1 << 31) - 1)],
    ];
    for border in [1_u64 << 32, 5 << 32] {
        for (layout, backwards) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
            let place = |&(from, pages): &(i64, u64)| (border.wrapping_add_signed(from), pages);
            let mut places: Vec<_> = layout.iter().map(place).collect();
            if backwards {
                places.reverse();
            }
            let mut table = SlotTable::new(Limits::default()).unwrap();
            for (id, &(base, pages)) in (0..).zip(&places) {
                table.create(spec(id, base, pages, 1 << 32 | base)).unwrap();
            }
            let ends = places.iter().flat_map(|&(base, pages)| [base, base + pages]);
            for gfn in ends.chain([border, border - (1 << 32), border + (1 << 31)]) {
                for gfn in gfn.saturating_sub(3)..gfn + 3 {
                    let expected =
                        places.iter().position(|&(base, pages)| (base..base + pages).contains(&gfn));
                    let found = table.view().translate(RAM, Gpa::new(gfn << 12));
                    assert_eq!(
                        found.map(|found| found.slot.get() as usize),
                        expected,
                        "{gfn:#x} of {layout:?}"
                    );
                    if let (Some(found), Some(slot)) = (found, expected) {
                        let (base, pages) = places[slot];
                        assert_eq!(found.hva.get() >> 12, (1 << 32 | base) + (gfn - base));
                        assert_eq!(found.bytes_left >> 12, base + pages - gfn);
                    }
                }
            }
            let mut sorted = places.clone();
            sorted.sort_unstable();
            let slots = table.view().slots(RAM).map(|slot| (slot.base_gfn().get(), slot.pages()));
            assert_eq!(slots.collect::<Vec<_>>(), sorted);
            // In one transaction the leaf is private, so it changes where it stands.
            table
                .transaction(|tx| {
                    tx.set_read_only(RAM, SlotId::new(0), true)?;
                    tx.delete(RAM, SlotId::new(1))?;
                    let (base, pages) = places[1];
                    tx.create(spec(1, base, pages, 1 << 33 | base))
                })
                .unwrap();
            for (id, &(base, _)) in (0..).zip(&places) {
                let found = table.view().translate(RAM, Gpa::new(base << 12)).unwrap();
                assert_eq!(found.slot.get(), id);
            }
        }
    }
}
