//! Random programs against a model of what must be mapped: what the program holds itself, and what slots of a version
//! that it holds stand on. Nothing else.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod common;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use common::{PAGE, Refuser, is_mapped};
use memslot::*;
use memslot_backing::{Backings, Foreign, Memory};
use proptest::prelude::*;

const SPACES: u8 = 2;
const IDS: u32 = 6;
const PAGES: u64 = 4;

#[derive(Clone, Debug)]
enum Step {
    /// Makes a memory and adopts it, or gives up the program's own reference to one.
    Map,
    Drop(usize),
    /// One transaction; what it would do wrong is left out.
    Change(Vec<Operation>, Refusal),
    Snapshot,
    DropSnapshot(usize),
}

#[derive(Clone, Debug)]
enum Operation {
    Create {
        space: u8,
        id: u32,
        gfn: u64,
        memory: usize,
        first: u64,
        pages: u64,
    },
    /// A slot on an address that is nobody's.
    Stray {
        space: u8,
        id: u32,
        gfn: u64,
    },
    Delete {
        space: u8,
        id: u32,
    },
    Move {
        space: u8,
        id: u32,
        gfn: u64,
    },
    Flags {
        space: u8,
        id: u32,
    },
    Split {
        space: u8,
        id: u32,
        new: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Refusal {
    None,
    Prepare,
    Commit,
}

fn operation() -> impl Strategy<Value = Operation> {
    let (space, id, gfn) = (0..SPACES, 0..IDS, 0..24u64);
    let create = (space.clone(), id.clone(), gfn.clone(), 0..8usize, 0..PAGES, 1..=PAGES);
    prop_oneof![
        6 => create.prop_map(|(space, id, gfn, memory, first, pages)| {
            Operation::Create { space, id, gfn, memory, first, pages: pages.min(PAGES - first) }
        }),
        1 => (space.clone(), id.clone(), gfn.clone()).prop_map(|(space, id, gfn)| Operation::Stray { space, id, gfn }),
        4 => (space.clone(), id.clone()).prop_map(|(space, id)| Operation::Delete { space, id }),
        1 => (space.clone(), id.clone(), gfn).prop_map(|(space, id, gfn)| Operation::Move { space, id, gfn }),
        1 => (space.clone(), id.clone()).prop_map(|(space, id)| Operation::Flags { space, id }),
        1 => (space, id.clone(), id).prop_map(|(space, id, new)| Operation::Split { space, id, new }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let refusal =
        prop_oneof![6 => Just(Refusal::None), 1 => Just(Refusal::Prepare), 1 => Just(Refusal::Commit)];
    prop_oneof![
        3 => Just(Step::Map),
        3 => (0..8usize).prop_map(Step::Drop),
        8 => (prop::collection::vec(operation(), 1..4), refusal).prop_map(|(all, refusal)| Step::Change(all, refusal)),
        2 => Just(Step::Snapshot),
        2 => (0..8usize).prop_map(Step::DropSnapshot),
    ]
}

/// A memory of the program: where it lies, its own reference if it still has it, and what tells whether it is mapped.
struct Made {
    name: String,
    hvas: HvaRange,
    own: Option<Arc<Memory>>,
    weak: Weak<Memory>,
}

struct Program {
    table: SlotTable,
    backings: Backings,
    refuse: Arc<AtomicU8>,
    made: Vec<Made>,
    snapshots: Vec<Snapshot>,
}

static NUMBER: AtomicUsize = AtomicUsize::new(0);

impl Program {
    fn new(foreign: Foreign) -> Self {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let refuse = Arc::new(AtomicU8::new(0));
        let backings = Backings::attach_to_slots(&mut table, &[], foreign).unwrap();
        table.add_listener(Box::new(Refuser(Arc::clone(&refuse)))).unwrap();
        Self { table, backings, refuse, made: Vec::new(), snapshots: Vec::new() }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Map => {
                let name = format!("model-{}", NUMBER.fetch_add(1, Relaxed));
                let memory = Memory::memfd(&name, PAGES * PAGE).alignment(PAGE).map().unwrap();
                let memory = Arc::new(memory);
                self.backings.adopt(&memory);
                let (hvas, weak) = (memory.hvas(), Arc::downgrade(&memory));
                self.made.push(Made { name, hvas, own: Some(memory), weak });
            }
            Step::Drop(which) => {
                let mut owned: Vec<_> = self.made.iter_mut().filter(|made| made.own.is_some()).collect();
                if !owned.is_empty() {
                    let which = which % owned.len();
                    owned[which].own = None;
                }
            }
            Step::Change(operations, refusal) => self.change(operations, *refusal),
            Step::Snapshot => self.snapshots.push(self.table.snapshot()),
            Step::DropSnapshot(which) => {
                if !self.snapshots.is_empty() {
                    self.snapshots.swap_remove(which % self.snapshots.len());
                }
            }
        }
    }

    fn change(&mut self, operations: &[Operation], refusal: Refusal) {
        self.refuse.store(refusal as u8, Relaxed);
        let before: Vec<Slot> = slots(self.table.view());
        let (backings, made) = (&self.backings, &self.made);
        let mut strays = false;
        let result = self.table.transaction(|tx| {
            for operation in operations {
                apply(operation, tx, backings, made, &mut strays)?;
            }
            Ok(())
        });
        match result {
            Ok(_) => assert!(refusal == Refusal::None || slots(self.table.view()) == before),
            Err(error) => {
                let ours =
                    matches!(&error.reason, Reason::Listener { listener, .. } if listener == "backings");
                assert!(!ours || (strays && backings.foreign() == Foreign::Refuse), "{error}");
                assert_eq!(slots(self.table.view()), before);
            }
        }
        self.refuse.store(0, Relaxed);
    }

    /// Compares everything with what must be.
    fn check(&mut self) {
        self.table.reclaim();
        let versions = || self.snapshots.iter().map(|snapshot| &**snapshot).chain([self.table.view()]);
        let mut reachable = BTreeSet::new();
        for view in versions() {
            let stand: BTreeSet<usize> = slots(view).iter().filter_map(|slot| self.below(slot)).collect();
            let says: Vec<u64> = self.backings.memories(view).map(|memory| memory.hva().get()).collect();
            let mut want: Vec<u64> = stand.iter().map(|&which| self.made[which].hvas.start().get()).collect();
            want.sort_unstable();
            assert_eq!(says, want, "generation {}", view.generation());
            reachable.extend(stand);
        }
        for (which, made) in self.made.iter().enumerate() {
            let must_live = made.own.is_some() || reachable.contains(&which);
            assert_eq!(made.weak.strong_count() > 0, must_live, "{}", made.name);
        }
    }

    /// Which memory a slot stands on: the last one made there, for addresses are used again.
    fn below(&self, slot: &Slot) -> Option<usize> {
        let hvas = slot.hvas()?;
        self.made.iter().rposition(|made| made.hvas.contains_range(&hvas))
    }
}

fn slots(view: &View) -> Vec<Slot> {
    view.address_spaces().flat_map(|space| view.slots(space)).copied().collect()
}

fn apply(
    operation: &Operation,
    tx: &mut Transaction<'_>,
    backings: &Backings,
    made: &[Made],
    strays: &mut bool,
) -> Result<(), TransactionError> {
    let (as_space, as_id) = (AddressSpaceId::new, SlotId::new);
    let there = |tx: &Transaction<'_>, space, id| tx.slot(as_space(space), as_id(id)).copied();
    match *operation {
        Operation::Create { space, id, gfn, memory, first, pages } if there(tx, space, id).is_none() => {
            // Whatever still lives will do, whether or not the program has a reference of its own.
            let alive: Vec<Arc<Memory>> = made.iter().filter_map(|made| made.weak.upgrade()).collect();
            let Some(memory) = alive.get(memory % alive.len().max(1)) else { return Ok(()) };
            let range = first * PAGE..(first + pages) * PAGE;
            let spec = backings.spec(as_id(id), Gfn::new(gfn), memory, range).unwrap();
            tx.create(SlotSpec { address_space: as_space(space), ..spec })
        }
        Operation::Stray { space, id, gfn } if there(tx, space, id).is_none() => {
            *strays = true;
            tx.create(SlotSpec {
                address_space: as_space(space),
                id: as_id(id),
                gfns: GfnRange::with_len(Gfn::new(gfn), 2).unwrap(),
                backing: Backing::Host { hva: Hva::new(0x1_0000) },
                flags: SlotFlags::empty(),
            })
        }
        Operation::Delete { space, id } if there(tx, space, id).is_some() => {
            tx.delete(as_space(space), as_id(id))
        }
        Operation::Move { space, id, gfn } if there(tx, space, id).is_some() => {
            tx.move_to(as_space(space), as_id(id), Gfn::new(gfn))
        }
        Operation::Flags { space, id } if there(tx, space, id).is_some() => {
            tx.set_flags(as_space(space), as_id(id), SlotFlags::LOG_DIRTY_PAGES)
        }
        Operation::Split { space, id, new } => match there(tx, space, id) {
            Some(slot) if slot.pages() > 1 && there(tx, space, new).is_none() => {
                tx.split(as_space(space), as_id(id), Gfn::new(slot.base_gfn().get() + 1), as_id(new))
            }
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

fn run_program(foreign: Foreign, steps: &[Step]) {
    let mut program = Program::new(foreign);
    for step in steps {
        program.run(step);
        program.check();
    }
    for made in &program.made {
        assert_eq!(
            is_mapped(&made.name),
            made.weak.strong_count() > 0,
            "what lives is mapped, the rest is not"
        );
    }
    let Program { table, backings, mut made, mut snapshots, .. } = program;
    // What is left goes with whoever is last, and nothing stays.
    made.iter_mut().for_each(|made| made.own = None);
    let last = snapshots.pop();
    drop((table, snapshots));
    if let Some(last) = last {
        let standing = backings.memories(&last).count();
        assert!(made.iter().filter(|made| made.weak.strong_count() > 0).count() >= standing);
        drop(last);
    }
    assert!(made.iter().all(|made| made.weak.strong_count() == 0 && !is_mapped(&made.name)));
}

proptest! {
    #![proptest_config(memslot_testing::proptest_config(256))]

    #[test]
    fn what_must_be_mapped_is_and_nothing_else(steps in prop::collection::vec(step(), 1..40)) {
        run_program(Foreign::Refuse, &steps);
    }

    #[test]
    fn also_beside_memory_that_is_owned_elsewhere(steps in prop::collection::vec(step(), 1..40)) {
        run_program(Foreign::Allow, &steps);
    }
}
