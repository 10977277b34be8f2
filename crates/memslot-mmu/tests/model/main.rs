//! Random programs of faults, range operations and changes of slots, against a naive model.
//!
//! After every operation the tables are read back by a walker of the test's own and must be what the model says, page
//! by page; whatever a processor has cached must be what the tables say, as far as flushes are not owed; and what was
//! written in a logged slot must be in the next harvest.
#![allow(missing_docs, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;
mod naive;

use common::*;
use memslot::{Gfn, GfnRange, SlotFlags, SlotId};
use memslot_mmu::format::{Access, Ept, Format, Npt};
use memslot_mmu::{Config, DirtyMode, Flush, Level, Work};
use naive::{Leaf, Model};
use proptest::prelude::*;

/// All slots lie below this frame.
const END: u64 = 4096;

#[derive(Clone, Debug)]
enum Op {
    Fault(u64, bool),
    Prefault(u64, u64),
    /// The processor uses a page as it is mapped, and caches its translation.
    Use(u64, bool),
    Work(u8, u64, u64, usize, bool),
    Split(u64, u64),
    Invalidate(u64, u64),
    Create(u32, u64, u64, u64, u32),
    Delete(u32),
    Move(u32, u64),
    Flags(u32, u32),
    Resize(u32, u64),
    SplitSlot(u32, u64, u32),
    Merge(u32, u32),
    Run(u32),
    Harvest,
    /// Discharges what was kept.
    Discharge,
    Reclaim,
}

fn gfn() -> impl Strategy<Value = u64> {
    // Mostly near a border of large pages, and often the same ones.
    prop_oneof![1 => 0..END, 5 => (0..5u64, 0..4u64).prop_map(|(block, off)| (block * 512 + off).saturating_sub(2))]
}

fn len() -> impl Strategy<Value = u64> {
    prop_oneof![1..8u64, 1..1500u64, Just(512), Just(1024)]
}

fn op() -> impl Strategy<Value = Op> {
    let id = || 0..4u32;
    prop_oneof![
        8 => (gfn(), any::<bool>()).prop_map(|(gfn, write)| Op::Fault(gfn, write)),
        2 => (gfn(), len()).prop_map(|(gfn, len)| Op::Prefault(gfn, len)),
        4 => (gfn(), any::<bool>()).prop_map(|(gfn, write)| Op::Use(gfn, write)),
        4 => (0..4u8, gfn(), len(), prop_oneof![Just(1usize), 1..300usize, Just(usize::MAX)], any::<bool>())
            .prop_map(|(work, gfn, len, budget, keep)| Op::Work(work, gfn, len, budget, keep)),
        1 => (gfn(), len()).prop_map(|(gfn, len)| Op::Split(gfn, len)),
        1 => (0..END, len()).prop_map(|(page, len)| Op::Invalidate(page, len)),
        4 => (id(), gfn(), len(), prop_oneof![Just(0u64), Just(512), 0..2048u64], 0..4u32)
            .prop_map(|(id, base, len, page, flags)| Op::Create(id, base, len, page, flags)),
        1 => id().prop_map(Op::Delete),
        1 => (id(), gfn()).prop_map(|(id, to)| Op::Move(id, to)),
        2 => (id(), 0..4u32).prop_map(|(id, flags)| Op::Flags(id, flags)),
        1 => (id(), len()).prop_map(|(id, len)| Op::Resize(id, len)),
        1 => (id(), gfn(), id()).prop_map(|(id, at, new)| Op::SplitSlot(id, at, new)),
        1 => (id(), id()).prop_map(|(a, b)| Op::Merge(a, b)),
        1 => prop_oneof![Just(0u32), Just(3), Just(9), Just(20)].prop_map(Op::Run),
        2 => Just(Op::Harvest),
        1 => Just(Op::Discharge),
        1 => Just(Op::Reclaim),
    ]
}

fn run<F: Format>(mode: DirtyMode, program: &[Op]) {
    let mut guest = Guest::<F>::with(Config { largest: Level::M2, dirty: mode, ..Config::default() });
    let mmu = guest.mmu.clone();
    let mut model = Model { leaves: [].into(), dirty: [].into(), emptied: [].into(), mode, run: 20 };
    let mut kept: Option<Flush<'_, F, TestHost>> = None;
    guest.host.user.set_run(20);
    for op in program {
        match *op {
            Op::Fault(gfn, write) => {
                let access = if write { Access::WRITE } else { Access::READ };
                let expected = model.fault(guest.table.view(), gfn, write);
                assert_eq!(guest.fault(gfn, access), expected, "{op:?}");
            }
            Op::Prefault(gfn, len) => {
                let end = model.prefault(guest.table.view(), range(gfn, len));
                let done = guest.vcpu.prefault(range(gfn, len), usize::MAX).unwrap();
                assert_eq!(done.rest.end().get() - done.rest.len(), end, "{op:?}");
            }
            Op::Use(gfn, write) => {
                guest.host.touch(&mmu, gfn);
                if guest.processor_writes_if(gfn, write) && write {
                    let view = guest.table.view();
                    if view.slot_at(RAM, Gfn::new(gfn)).is_some_and(naive::is_logged) {
                        model.dirty.insert(gfn);
                    }
                }
            }
            Op::Work(work, gfn, len, budget, keep) => {
                let gfns = range(gfn, len);
                let work = match work {
                    0 => Work::Zap,
                    1 => Work::WriteProtect,
                    2 => Work::Collapse,
                    _ if F::DIRTY == 0 || mode == DirtyMode::Hardware => continue,
                    _ => Work::ClearDirty,
                };
                match work {
                    Work::Zap => model.zap(gfns),
                    Work::WriteProtect => model.write_protect(gfns),
                    Work::Collapse => model.collapse(guest.table.view(), gfns),
                    _ => {}
                }
                let mut operation = mmu.begin(work, gfns);
                while operation.step(budget) {}
                let flush = operation.finish();
                if keep {
                    match &mut kept {
                        Some(kept) => kept.merge(flush),
                        None => kept = Some(flush),
                    }
                } else {
                    flush.discharge();
                    // Whoever has zapped may use the memory for something else now; who has protected it, be sure that
                    // nobody writes.
                    let mut stale = guest.host.stale(&mmu, gfns);
                    stale.retain(|(_, leaf)| work == Work::Zap || work == Work::WriteProtect && leaf.write);
                    assert_eq!(stale, [], "{op:?}");
                }
            }
            Op::Split(gfn, len) => {
                assert_eq!(mmu.split(range(gfn, len), Level::K4), Ok(model.split(range(gfn, len))));
            }
            Op::Invalidate(page, len) => {
                let bytes = hvas(HVA + (page << 12), len << 12);
                let hits: Vec<GfnRange> =
                    guest.table.view().slots_at_hva(RAM, bytes).map(|hit| hit.gfns).collect();
                let invalidation = mmu.invalidate_hva(bytes).unwrap();
                for gfns in hits {
                    model.zap(gfns);
                    assert_eq!(guest.host.stale(&mmu, gfns), [], "{op:?}");
                }
                invalidation.end();
            }
            Op::Create(..)
            | Op::Delete(_)
            | Op::Move(..)
            | Op::Flags(..)
            | Op::Resize(..)
            | Op::SplitSlot(..)
            | Op::Merge(..) => {
                let before = guest.table.snapshot();
                change_slots(&mut guest, op);
                let after = guest.table.snapshot();
                model.slots_changed(&before, &after, END);
                for gfn in guest.host.stale_frames(&mmu) {
                    let hva = |view: &memslot::View| {
                        view.slot_at(RAM, Gfn::new(gfn)).and_then(|s| s.hva_of(Gfn::new(gfn)))
                    };
                    assert!(hva(&before).is_none() || hva(&before) == hva(&after), "{op:?}: {gfn} is used");
                }
            }
            Op::Run(run) => {
                model.run = run;
                guest.host.user.set_run(run);
            }
            Op::Harvest => {
                let harvested = guest.harvest();
                let missing: Vec<_> = model.dirty.iter().filter(|gfn| !harvested.contains(gfn)).collect();
                assert!(missing.is_empty(), "written and not harvested: {missing:?}");
                let view = guest.table.view();
                let stale = guest.host.stale_frames(&mmu);
                for &gfn in &harvested {
                    assert!(!stale.contains(&gfn), "the next write to {gfn} is not noticed");
                    assert!(view.slot_at(RAM, Gfn::new(gfn)).is_some_and(naive::is_logged));
                    model.arm(range(gfn, 1));
                }
                model.dirty.clear();
            }
            Op::Discharge => {
                if let Some(kept) = kept.take() {
                    kept.discharge();
                }
            }
            Op::Reclaim => mmu.reclaim(),
        }
        if kept.is_none() {
            // Faults owe no flush, but operations that come after them must know: they are asked above.
            let stale = guest.host.stale_frames(&mmu);
            assert_eq!(stale.difference(&model.emptied).next(), None, "{op:?}");
            model.emptied = stale;
        }
        let found: Vec<_> =
            guest.leaves().iter().map(|(&start, leaf)| (start, leaf.pages, leaf.pfn, leaf.write)).collect();
        let expected: Vec<_> = model
            .leaves
            .iter()
            .map(|(&start, leaf): (_, &Leaf)| (start, leaf.pages, leaf.pfn, leaf.write))
            .collect();
        if found != expected {
            let first = found.iter().zip(&expected).find(|(a, b)| a != b);
            panic!(
                "after {op:?}: {} leaves, {} expected; first that differs: {first:?}",
                found.len(),
                expected.len()
            );
        }
    }
    if let Some(kept) = kept {
        kept.discharge();
    }
    mmu.zap(range(0, END)).discharge();
    let Guest { vcpu, host, .. } = guest;
    drop(vcpu);
    mmu.reclaim();
    assert_eq!(host.user.tables(), 1, "only the root is left");
}

/// Changes that the table refuses change nothing.
fn change_slots<F: Format>(guest: &mut Guest<F>, op: &Op) {
    let id = SlotId::new;
    let flags = |flags| SlotFlags::from_bits_truncate(flags);
    let table = &mut guest.table;
    let fits = |base: u64, len: u64| base + len <= END;
    let _ = match *op {
        Op::Create(slot, base, len, page, bits) if fits(base, len) => {
            table.create(spec(slot, base, len, HVA + (page << 12), flags(bits)))
        }
        Op::Delete(slot) => table.delete(RAM, id(slot)),
        Op::Move(slot, to) if table.view().slot(RAM, id(slot)).is_some_and(|slot| fits(to, slot.pages())) => {
            table.move_to(RAM, id(slot), Gfn::new(to))
        }
        Op::Flags(slot, bits) => table.transaction(|tx| {
            let wanted = flags(bits);
            tx.set_read_only(RAM, id(slot), wanted.contains(SlotFlags::READONLY))?;
            tx.set_flags(RAM, id(slot), wanted)
        }),
        Op::Resize(slot, len)
            if table.view().slot(RAM, id(slot)).is_some_and(|slot| fits(slot.base_gfn().get(), len)) =>
        {
            table.transaction(|tx| tx.resize(RAM, id(slot), len))
        }
        Op::SplitSlot(slot, at, new) => {
            table.transaction(|tx| tx.split(RAM, id(slot), Gfn::new(at), id(new)))
        }
        Op::Merge(a, b) => table.transaction(|tx| tx.merge(RAM, id(a), id(b))),
        _ => return,
    };
}

fn program() -> impl Strategy<Value = Vec<Op>> {
    // There is memory from the start.
    let start = prop_oneof![
        Just(vec![Op::Create(0, 0, 4096, 0, 0)]),
        Just(vec![Op::Create(0, 0, 1500, 0, 1), Op::Create(1, 2000, 1500, 0, 0)]),
        Just(vec![]),
    ];
    (start, prop::collection::vec(op(), 1..50)).prop_map(|(mut start, rest)| {
        start.extend(rest);
        start
    })
}

proptest! {
    #![proptest_config(memslot_testing::proptest_config(64))]

    #[test]
    fn npt_by_write_protection(program in program()) { run::<Npt>(DirtyMode::WriteProtect, &program) }

    #[test]
    fn npt_by_dirty_bits(program in program()) { run::<Npt>(DirtyMode::Hardware, &program) }

    #[test]
    fn ept_by_write_protection(program in program()) { run::<Ept<5, false>>(DirtyMode::WriteProtect, &program) }

    #[test]
    fn ept_by_dirty_bits(program in program()) { run::<Ept>(DirtyMode::Hardware, &program) }
}
