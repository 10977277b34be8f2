//! Every allocation of an update fails once: the answer is an error, nothing has changed, nothing is leaked.
//!
//! The global allocator of this program can be told to fail the n-th allocation of a thread, and counts the bytes
//! that a thread has. (Node by node, past the table's own reserves, `src/table/tests.rs` does the same.)

use std::cell::Cell;

use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, LimitsError, Listener, ListenerError, OutOfMemory,
    Reason, Slot, SlotFlags, SlotId, SlotSpec, SlotTable, Transaction, TransactionError, Update,
};
use memslot_testing::{ALLOWED, Failing, bytes, failing};

#[global_allocator]
static ALLOCATOR: Failing = Failing;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;

fn spec(space: AddressSpaceId, id: u32, base: u64, pages: u64) -> SlotSpec {
    SlotSpec {
        address_space: space,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
        backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000 + (u64::from(id) << 22)) },
        flags: SlotFlags::empty(),
    }
}

fn some_slots() -> SlotTable {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    for id in 0..80 {
        table.create(spec(RAM, id, u64::from(id) * 64, 33)).unwrap();
    }
    table.reclaim();
    table
}

fn everything(tx: &mut Transaction<'_>) -> Result<(), TransactionError> {
    for id in 100..400 {
        tx.create(spec(RAM, id, 1 << 20 | u64::from(id) << 10, 1000))?;
        tx.create(spec(AddressSpaceId::SMM, id, u64::from(id) << 24, 7))?;
    }
    for id in 0..20 {
        tx.delete(RAM, SlotId::new(id))?;
        tx.move_to(RAM, SlotId::new(id + 20), Gfn::new(1 << 40 | u64::from(id) << 8))?;
        tx.split(RAM, SlotId::new(id + 40), Gfn::new(u64::from(id + 40) * 64 + 9), SlotId::new(500 + id))?;
        tx.resize(RAM, SlotId::new(id + 60), 64)?;
        tx.set_flags(RAM, SlotId::new(id + 60), SlotFlags::LOG_DIRTY_PAGES)?;
    }
    tx.merge(RAM, SlotId::new(40), SlotId::new(500))
}

type State = (u64, Vec<Slot>);

fn state(table: &SlotTable) -> State {
    let view = table.view();
    (view.generation(), view.address_spaces().flat_map(|space| view.slots(space).copied()).collect())
}

fn step() -> usize {
    if cfg!(miri) { 97 } else { 1 }
}

#[test]
fn a_transaction_fails_whole_at_every_allocation() {
    let start = bytes();
    let mut failures = 0;
    for allowed in (0..).step_by(step()) {
        let mut table = some_slots();
        let (before, nodes) = (state(&table), table.stats().nodes);
        let result = failing(allowed, || table.transaction(everything));
        let done = result.is_ok();
        if let Err(error) = result {
            failures += 1;
            assert!(matches!(error.reason, Reason::OutOfMemory), "{error}");
            assert_eq!(state(&table), before);
            table.reclaim();
            assert_eq!(table.stats().nodes, nodes);
            // And the table is as good as new.
            table.transaction(everything).unwrap();
        }
        drop(table);
        drop(before);
        assert_eq!(bytes(), start, "after {allowed} allocations");
        if done {
            break;
        }
    }
    assert!(failures > 10 / step(), "the transaction allocates, it failed {failures} times");
}

#[test]
fn single_changes_fail_whole_at_every_allocation() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let mut failures = 0;
    for id in 0..300 {
        for allowed in 0.. {
            let before = state(&table);
            match failing(allowed, || table.create(spec(RAM, id, u64::from(id) * 3000, 2000))) {
                Ok(_) => break,
                Err(error) => {
                    failures += 1;
                    assert!(matches!(error.reason, Reason::OutOfMemory), "{error}");
                    assert_eq!(state(&table), before);
                }
            }
        }
    }
    assert!(failures > 10);
    assert_eq!(table.view().len(RAM), 300);
}

#[test]
fn tables_readers_and_snapshots_are_made_or_not() {
    let start = bytes();
    let (mut tables, mut readers) = (0, 0);
    for allowed in 0.. {
        match failing(allowed, || SlotTable::new(Limits::default())) {
            Ok(_) => break,
            Err(error) => assert!(matches!(error, LimitsError::OutOfMemory(_)), "{error}"),
        }
        tables += 1;
        assert_eq!(bytes(), start);
    }
    let table = some_slots();
    let handle = table.handle();
    for allowed in 0.. {
        let Err(_) = failing(allowed, || handle.reader()) else { break };
        readers += 1;
    }
    for allowed in 0.. {
        // The cell of the reader before is free again.
        let Ok(snapshot) = failing(allowed, || handle.snapshot()) else { continue };
        assert_eq!(snapshot.len(RAM), 80);
        break;
    }
    drop((table, handle));
    assert!(tables > 0 && readers > 0);
    assert_eq!(bytes(), start);
}

/// Publishing again what was before must not need memory: it has been reserved.
#[test]
fn taking_back_needs_no_memory() {
    /// Is undone, and with that takes all memory away.
    struct Follows;
    impl Listener for Follows {
        fn name(&self) -> &str {
            "follows"
        }
        fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
            Ok(())
        }
        fn undo(&mut self, _: &Update<'_>) {
            ALLOWED.with(|cell| cell.set(0));
        }
    }
    struct Refuses;
    impl Listener for Refuses {
        fn name(&self) -> &str {
            "refuses"
        }
        fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
            Err("on purpose".into())
        }
        fn undo(&mut self, _: &Update<'_>) {}
    }
    let mut table = some_slots();
    let nodes = table.stats().nodes;
    table.add_listener(Box::new(Follows)).unwrap();
    table.add_listener(Box::new(Refuses)).unwrap();
    for _ in 0..3 {
        let before = state(&table);
        let held = table.snapshot();
        let error = table.transaction(everything).unwrap_err();
        ALLOWED.with(|cell| cell.set(-1));
        assert!(matches!(error.reason, Reason::Listener { .. }), "{error}");
        assert_eq!(state(&table).1, before.1);
        assert_eq!(held.len(RAM), 80);
    }
    table.reclaim();
    assert_eq!(table.stats().nodes, nodes);
}

/// The dirty log without memory: an error, or more pages than were written; never fewer, and nothing is leaked.
mod dirty {
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex};

    use memslot::dirty::{Consumer, DirtyLog, Harvest, Rearm, SoftwareOnly};

    use super::*;

    struct Guest {
        table: SlotTable,
        log: DirtyLog,
        consumers: [Consumer; 2],
        /// What each consumer must be told of, at least; by gfn.
        dirty: [BTreeSet<u64>; 2],
    }

    const LOW: u64 = 32768 - 50;
    const HIGH: u64 = 1 << 30;

    fn logged(id: u32, base: u64, pages: u64) -> SlotSpec {
        SlotSpec { flags: SlotFlags::LOG_DIRTY_PAGES, ..spec(RAM, id, base, pages) }
    }

    /// Some pages are in the bitmap, some are kept for the second consumer, some chunks wait for their turn.
    fn guest() -> Guest {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let consumers = [log.consumer().unwrap(), log.consumer_keeping_removed().unwrap()];
        table.create(logged(0, LOW, 300)).unwrap();
        table.create(logged(1, HIGH, 100_000)).unwrap();
        log.mark_range(RAM, range(LOW + 40, 20));
        log.mark_range(RAM, range(HIGH, 40_000));
        let first: BTreeSet<u64> = (LOW + 40..LOW + 60).chain(HIGH..HIGH + 40_000).collect();
        let harvest = consumers[0].harvest(&mut SoftwareOnly).unwrap();
        assert_eq!(harvest.pages(), 40_020);
        harvest.commit();
        let mut guest = Guest { table, log, consumers, dirty: [BTreeSet::new(), first] };
        guest.mark(LOW + 3);
        guest.mark(HIGH + 99_999);
        guest
    }

    fn range(first: u64, pages: u64) -> GfnRange {
        GfnRange::with_len(Gfn::new(first), pages).unwrap()
    }

    impl Guest {
        fn mark(&mut self, gfn: u64) {
            self.log.mark(RAM, Gfn::new(gfn));
            self.dirty.iter_mut().for_each(|dirty| _ = dirty.insert(gfn));
        }

        /// Everything dirty is reported to both.
        fn check(&self, what: &str) {
            for (at, (consumer, dirty)) in self.consumers.iter().zip(&self.dirty).enumerate() {
                let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
                let runs: Vec<GfnRange> = harvest.runs().map(|run| run.gfns).collect();
                let lost = dirty.iter().find(|&&gfn| !runs.iter().any(|run| run.contains(Gfn::new(gfn))));
                assert_eq!(lost, None, "{what}: lost for consumer {at}");
                drop(harvest);
            }
        }
    }

    /// Fails the allocation behind `allowed` in each of these, for every `allowed` until none fails.
    fn at_every_allocation(what: &str, work: impl Fn(&mut Guest, i64) -> bool) {
        for allowed in 0.. {
            let before = bytes();
            let mut guest = guest();
            let done = work(&mut guest, allowed);
            guest.check(&format!("{what}, {allowed} allocations"));
            drop(guest);
            assert_eq!(bytes(), before, "{what}, {allowed} allocations: leaked");
            if done {
                return;
            }
            assert!(allowed < 500, "{what} never succeeds");
        }
    }

    #[test]
    fn a_mark_without_memory_marks_more() {
        for gfn in [LOW + 100, HIGH + 70_000, 1 << 45] {
            at_every_allocation("mark", |guest, allowed| {
                // Where there is a slot; the last of them is far from all others.
                guest.table.create(logged(7, (1 << 45) - 5, 10)).unwrap();
                failing(allowed, || guest.log.mark(RAM, Gfn::new(gfn)));
                failing(allowed, || guest.log.mark_range(RAM, range(gfn + 1, 3)));
                guest.dirty.iter_mut().for_each(|dirty| dirty.extend(gfn..gfn + 4));
                allowed > 4
            });
        }
    }

    #[test]
    fn a_harvest_without_memory_is_an_error() {
        at_every_allocation("harvest", |guest, allowed| {
            let Guest { consumers, dirty, .. } = guest;
            failing(allowed, || match consumers[0].harvest(&mut SoftwareOnly) {
                Ok(harvest) => {
                    harvest.commit();
                    true
                }
                Err(_) => false,
            })
            .then(|| dirty[0].clear())
            .is_some()
        });
        at_every_allocation("harvest of a part", |guest, allowed| {
            let Guest { consumers, dirty, .. } = guest;
            let part = range(LOW + 50, HIGH);
            let result =
                failing(allowed, || match consumers[1].harvest_range(RAM, part, &mut SoftwareOnly) {
                    Ok(harvest) => {
                        harvest.commit();
                        true
                    }
                    Err(_) => false,
                });
            if result {
                dirty[1].retain(|&gfn| !part.contains(Gfn::new(gfn)));
            }
            result
        });
        at_every_allocation("harvest that is dropped", |guest, allowed| {
            failing(allowed, || guest.consumers[1].harvest(&mut SoftwareOnly).is_ok())
        });
    }

    #[test]
    fn a_clear_without_memory_is_an_error() {
        let mask = [u64::MAX; 700];
        at_every_allocation("clear", |guest, allowed| {
            let part = range(HIGH + 64, 64 * 700);
            let result =
                failing(allowed, || guest.consumers[1].clear(RAM, part, &mask, &mut SoftwareOnly).is_ok());
            if result {
                guest.dirty[1].retain(|&gfn| !part.contains(Gfn::new(gfn)));
            }
            result
        });
    }

    #[test]
    fn a_change_of_slots_without_memory_leaves_the_bits() {
        let id = SlotId::new;
        at_every_allocation("move", |guest, allowed| {
            let to = HIGH + 1_000_007;
            let result = failing(allowed, || guest.table.move_to(RAM, id(1), Gfn::new(to)).is_ok());
            if result {
                let there = |&gfn: &u64| if gfn >= HIGH { gfn - HIGH + to } else { gfn };
                guest.dirty = guest.dirty.each_ref().map(|dirty| dirty.iter().map(there).collect());
            }
            result
        });
        at_every_allocation("split and delete", |guest, allowed| {
            let result = failing(allowed, || {
                guest.table.transaction(|tx| {
                    tx.split(RAM, id(1), Gfn::new(HIGH + 33_000), id(2))?;
                    tx.delete(RAM, id(0))
                })
            });
            if result.is_ok() {
                guest.dirty.iter_mut().for_each(|dirty| dirty.retain(|&gfn| gfn >= HIGH));
                let removed = guest.consumers[1].take_removed().unwrap();
                let pages: u64 = removed.iter().flat_map(|it| it.runs()).map(|run| run.len()).sum();
                assert!(pages >= 21, "20 kept for it, 1 not yet harvested");
            }
            result.is_ok()
        });
        at_every_allocation("new log, consumer", |guest, allowed| {
            failing(allowed, || guest.log.consumer().is_ok())
        });
    }

    #[test]
    fn many_marks_without_memory_mark_more() {
        at_every_allocation("mark_range, merge", |guest, allowed| {
            let left = failing(allowed, || {
                guest.log.mark_range(RAM, range(HIGH + 5, 70_000));
                guest.log.merge(RAM, range(LOW + 1, 130), &[1 << 63, u64::MAX, 1]).unwrap();
                ALLOWED.with(Cell::get)
            });
            let marked = (HIGH + 5..HIGH + 70_005).chain(LOW + 64..LOW + 130);
            guest.dirty.iter_mut().for_each(|dirty| dirty.extend(marked.clone()));
            left > 0
        });
        at_every_allocation("mark_through", |guest, allowed| {
            let mut reader = guest.table.reader().unwrap();
            let pinned = reader.pin();
            guest.table.move_to(RAM, SlotId::new(0), Gfn::new((1 << 40) - 3)).unwrap();
            guest.dirty = guest.dirty.each_ref().map(|dirty| {
                dirty.iter().map(|&gfn| if gfn < HIGH { gfn - LOW + (1 << 40) - 3 } else { gfn }).collect()
            });
            let left = failing(allowed, || {
                guest.log.mark_through(&pinned, RAM, range(LOW + 70, 3));
                ALLOWED.with(Cell::get)
            });
            let marked = (1 << 40) + 67..(1 << 40) + 70;
            guest.dirty.iter_mut().for_each(|dirty| dirty.extend(marked.clone()));
            left > 0
        });
    }

    /// Needs pages, and no memory.
    struct Arms;

    impl Rearm for Arms {
        type Error = ();

        fn rearm(&mut self, _: AddressSpaceId, _: GfnRange) -> Result<(), ()> {
            Ok(())
        }

        fn flush(&mut self) -> Result<(), ()> {
            Ok(())
        }
    }

    /// All three consumers' ways at once: kept bits meet full chunks, parts, and words of a clear.
    #[test]
    fn consumers_without_memory_lose_nothing_of_each_other() {
        let mask = [u64::MAX; 20];
        at_every_allocation("a clear of a full chunk, parts of it", |guest, allowed| {
            guest.log.mark_range(RAM, range(HIGH, 100_000));
            // Some of them tell enough.
            guest.dirty.iter_mut().for_each(|dirty| dirty.extend((HIGH..HIGH + 100_000).step_by(13)));
            let (first, second) = (range(HIGH + 40_000, 1280), range(HIGH + 65_000, 1000));
            let Guest { consumers, dirty, .. } = guest;
            failing(allowed, || {
                let cleared = consumers[0].clear(RAM, first, &mask, &mut Arms).is_ok();
                if cleared {
                    dirty[0].retain(|&gfn| !first.contains(Gfn::new(gfn)));
                }
                let harvest = consumers[1].harvest_range(RAM, second, &mut Arms);
                let harvested = harvest.map(Harvest::commit).is_ok();
                if harvested {
                    dirty[1].retain(|&gfn| !second.contains(Gfn::new(gfn)));
                }
                cleared && harvested && ALLOWED.with(Cell::get) > 0
            })
        });
    }

    #[test]
    fn removed_bits_can_be_asked_for_again() {
        at_every_allocation("take_removed", |guest, allowed| {
            guest.table.delete(RAM, SlotId::new(0)).unwrap();
            guest.dirty.iter_mut().for_each(|dirty| dirty.retain(|&gfn| gfn >= HIGH));
            let result = failing(allowed, || guest.consumers[1].take_removed());
            let done = result.is_ok();
            let removed = result.unwrap_or_else(|_| guest.consumers[1].take_removed().unwrap());
            let pages: u64 = removed.iter().flat_map(|it| it.runs()).map(|run| run.len()).sum();
            assert_eq!(pages, 21, "20 kept for it, 1 not yet harvested");
            done
        });
    }

    const FAR: u64 = (1 << 44) + 3;

    /// Writes to a slot when its deletion is published and the log has not followed; then it leaves that much memory.
    struct WritesLate(Arc<Mutex<Option<(DirtyLog, i64)>>>);

    impl WritesLate {
        fn pages() -> impl Iterator<Item = u64> {
            (0..5).map(|chunk| FAR + 40_000 * chunk + 7)
        }
    }

    impl Listener for WritesLate {
        fn name(&self) -> &str {
            "writes late"
        }

        fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
            if let Some((log, allowed)) = self.0.lock().unwrap().take() {
                Self::pages().for_each(|gfn| log.mark(RAM, Gfn::new(gfn)));
                ALLOWED.with(|cell| cell.set(allowed));
            }
            Ok(())
        }

        fn undo(&mut self, _: &Update<'_>) {}
    }

    /// A slot is deleted, and there is no memory to find out what was written to it last: whoever keeps removed bits is
    /// told of more pages, never of fewer.
    #[test]
    fn late_writes_to_a_deleted_slot_are_handed_over_without_memory() {
        let mut inexact = 0;
        for allowed in 0.. {
            let before = bytes();
            let mut table = SlotTable::new(Limits::default()).unwrap();
            let late = Arc::default();
            table.add_listener(Box::new(WritesLate(Arc::clone(&late)))).unwrap();
            let log = DirtyLog::attach(&mut table).unwrap();
            let keepers = [0, 1].map(|_| log.consumer_keeping_removed().unwrap());
            let slot = logged(3, FAR, 200_000);
            table.create(slot).unwrap();
            log.mark(RAM, slot.gfns.start());
            *late.lock().unwrap() = Some((log.clone(), allowed));
            table.delete(RAM, slot.id).unwrap();
            let left = ALLOWED.with(|cell| cell.replace(i64::MAX));
            for keeper in &keepers {
                let removed = keeper.take_removed().unwrap();
                let runs: Vec<GfnRange> = removed.iter().flat_map(|it| it.runs()).collect();
                let lost = WritesLate::pages()
                    .chain([FAR])
                    .find(|&gfn| !runs.iter().any(|run| run.contains(Gfn::new(gfn))));
                assert_eq!(lost, None, "{allowed} allocations");
                assert!(runs.iter().all(|run| run.intersect(&slot.gfns) == Some(*run)));
                inexact += usize::from(runs.iter().map(GfnRange::len).sum::<u64>() > 6);
            }
            drop((keepers, log, table, late));
            assert_eq!(bytes(), before, "{allowed} allocations: leaked");
            if left > 0 {
                break;
            }
            assert!(allowed < 500, "it never succeeds");
        }
        assert!(inexact > 0, "memory was short");
    }

    /// Takes all memory away when the log has followed, and refuses; or refuses only.
    struct Refuses(bool);

    impl Listener for Refuses {
        fn name(&self) -> &str {
            "refuses"
        }

        fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
            if self.0 {
                ALLOWED.with(|cell| cell.set(0));
            }
            // A `Box` of nothing is no allocation.
            Err(Box::new(OutOfMemory))
        }

        fn undo(&mut self, _: &Update<'_>) {}
    }

    /// A change is taken back, and there is no memory for its bits: more pages are dirty than were, and none is lost.
    #[test]
    fn a_change_that_is_taken_back_without_memory_leaves_the_bits() {
        for at_undo in [true, false] {
            at_every_allocation("a refused change", |guest, allowed| {
                guest.table.add_listener(Box::new(Refuses(at_undo))).unwrap();
                let allowed = if at_undo { i64::MAX } else { allowed };
                let left = failing(allowed, || {
                    let changed = guest.table.transaction(|tx| {
                        tx.delete(RAM, SlotId::new(0))?;
                        tx.split(RAM, SlotId::new(1), Gfn::new(HIGH + 33_000), SlotId::new(2))?;
                        tx.move_to(RAM, SlotId::new(2), Gfn::new((1 << 42) + 11))
                    });
                    let left = ALLOWED.with(Cell::get);
                    drop(changed.unwrap_err());
                    left
                });
                assert!(guest.consumers[1].take_removed().unwrap().is_empty());
                at_undo || left > 0
            });
        }
    }

    #[test]
    fn logging_starts_or_does_not() {
        at_every_allocation("logging", |guest, allowed| {
            guest.log.set_initially_set(true);
            let far = SlotSpec { flags: SlotFlags::empty(), ..logged(5, 1 << 44, 40_000) };
            guest.table.create(far).unwrap();
            let flags = SlotFlags::LOG_DIRTY_PAGES;
            let on = failing(allowed, || guest.table.set_flags(RAM, SlotId::new(5), flags).is_ok());
            if on {
                let pages = far.gfns.start().get()..far.gfns.end().get();
                guest.dirty.iter_mut().for_each(|dirty| dirty.extend(pages.clone()));
            }
            on
        });
    }
}
