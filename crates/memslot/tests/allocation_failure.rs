//! Every allocation of an update fails once: the answer is an error, nothing has changed, nothing is leaked.
//!
//! The global allocator of this program can be told to fail the n-th allocation of a thread, and counts the bytes
//! that a thread has. (Node by node, past the table's own reserves, `src/table/tests.rs` does the same.)
#![expect(unsafe_code, reason = "a global allocator is unsafe to write")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, LimitsError, Listener, ListenerError, Reason, Slot,
    SlotFlags, SlotId, SlotSpec, SlotTable, Transaction, TransactionError, Update,
};

thread_local! {
    /// How many allocations succeed before one fails; negative: none fails.
    static ALLOWED: Cell<i64> = const { Cell::new(-1) };
    static BYTES: Cell<i64> = const { Cell::new(0) };
}

struct Failing;

/// Whether this allocation fails.
fn fails() -> bool {
    ALLOWED.with(|allowed| {
        let left = allowed.get();
        if left > 0 {
            allowed.set(left - 1);
        }
        left == 0
    })
}

fn count(bytes: usize, sign: i64) {
    BYTES.with(|total| total.set(total.get() + sign * i64::try_from(bytes).unwrap_or(0)));
}

// SAFETY: everything is passed on to the system's allocator, or null is returned, which is allowed.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if fails() {
            return std::ptr::null_mut();
        }
        count(layout.size(), 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(memory, layout) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if fails() {
            return std::ptr::null_mut();
        }
        count(layout.size(), -1);
        count(size, 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Failing = Failing;

/// Runs `work` with the allocation after `allowed` ones failing, and all after that.
fn failing<T>(allowed: i64, work: impl FnOnce() -> T) -> T {
    ALLOWED.with(|cell| cell.set(allowed));
    let result = work();
    ALLOWED.with(|cell| cell.set(-1));
    result
}

fn bytes() -> i64 {
    BYTES.with(Cell::get)
}

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
