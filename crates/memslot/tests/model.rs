//! A naive model (maps only) against the engine, under random programs of operations and transactions.
//!
//! After every step everything that can be looked up is compared: by id, by frame, by range, holes, by host
//! address, with snapshots of earlier states among them.

mod common;

use std::collections::BTreeMap;

use common::Random;
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, HvaRange, Limits, Slot, SlotFlags, SlotId, SlotSpec,
    SlotTable, Snapshot, Transaction, TransactionError, View,
};
use proptest::prelude::*;

const PAGE: u64 = 4096;

/// The model: slots by (address space, id), and nothing else.
type Model = BTreeMap<(u8, u32), SlotSpec>;

#[derive(Clone, Debug)]
enum Op {
    Create(SlotSpec),
    Delete(u8, u32),
    Move(u8, u32, u64),
    Flags(u8, u32, SlotFlags),
    ReadOnly(u8, u32, bool),
    Resize(u8, u32, u64),
    Split(u8, u32, u64, u32),
    Merge(u8, u32, u32),
}

fn range(start: u64, pages: u64) -> Option<GfnRange> {
    GfnRange::with_len(Gfn::new(start), pages)
}

/// Whether there can be such a slot at all.
fn valid(spec: &SlotSpec, limits: &Limits) -> bool {
    let pages = spec.gfns.len();
    (1..=limits.pages_per_slot).contains(&pages)
        && spec.gfns.gpas(limits.page_size).is_some()
        && spec.backing.advanced(pages * PAGE).is_some()
        && spec.backing.hva().is_none_or(|hva| hva.get() % PAGE == 0)
}

/// What the operation does to the model, or `None` where it is refused. Overlap is for the end.
fn apply(model: &mut Model, op: &Op, limits: &Limits) -> Option<()> {
    let known = |space: u8, id: u32| space < limits.address_spaces && id < limits.slots;
    match *op {
        Op::Create(spec) => {
            let key = (spec.address_space.get(), spec.id.get());
            if !known(key.0, key.1) || model.contains_key(&key) || !valid(&spec, limits) {
                return None;
            }
            model.insert(key, spec);
        }
        Op::Delete(space, id) => drop(model.remove(&(space, id))?),
        Op::Move(space, id, to) => {
            let slot = model.get_mut(&(space, id))?;
            let moved = SlotSpec { gfns: range(to, slot.gfns.len())?, ..*slot };
            *slot = valid(&moved, limits).then_some(moved)?;
        }
        Op::Flags(space, id, flags) => model.get_mut(&(space, id))?.flags = flags,
        Op::ReadOnly(space, id, read_only) => {
            model.get_mut(&(space, id))?.flags.set(SlotFlags::READONLY, read_only);
        }
        Op::Resize(space, id, pages) => {
            let slot = model.get_mut(&(space, id))?;
            let resized = SlotSpec { gfns: range(slot.gfns.start().get(), pages)?, ..*slot };
            *slot = valid(&resized, limits).then_some(resized)?;
        }
        Op::Split(space, id, at, high) => {
            let slot = *model.get(&(space, id))?;
            let pages = at.checked_sub(slot.gfns.start().get()).filter(|&pages| pages > 0)?;
            if pages >= slot.gfns.len() || !known(space, high) || model.contains_key(&(space, high)) {
                return None;
            }
            let low = SlotSpec { gfns: range(slot.gfns.start().get(), pages)?, ..slot };
            let gfns = range(at, slot.gfns.len() - pages)?;
            let backing = slot.backing.advanced(pages * PAGE)?;
            model.insert((space, id), low);
            model.insert((space, high), SlotSpec { id: SlotId::new(high), gfns, backing, ..slot });
        }
        Op::Merge(space, low, high) => {
            let (a, b) = (*model.get(&(space, low))?, *model.get(&(space, high))?);
            let next = a.backing.advanced(a.gfns.len() * PAGE);
            let pages = a.gfns.len() + b.gfns.len();
            if a.gfns.end() != b.gfns.start()
                || a.flags != b.flags
                || next != Some(b.backing)
                || pages > limits.pages_per_slot
            {
                return None;
            }
            model.remove(&(space, high));
            model.insert((space, low), SlotSpec { gfns: range(a.gfns.start().get(), pages)?, ..a });
        }
    }
    Some(())
}

/// Whether no two slots of an address space cover the same frame.
fn disjoint(model: &Model) -> bool {
    let mut gfns: Vec<_> = model.values().map(|slot| (slot.address_space, slot.gfns)).collect();
    gfns.sort_unstable();
    gfns.windows(2).all(|pair| pair[0].0 != pair[1].0 || pair[0].1.end() <= pair[1].1.start())
}

fn submit(tx: &mut Transaction<'_>, op: &Op) -> Result<(), TransactionError> {
    let (space, id) = (AddressSpaceId::new, SlotId::new);
    match *op {
        Op::Create(spec) => tx.create(spec),
        Op::Delete(s, i) => tx.delete(space(s), id(i)),
        Op::Move(s, i, to) => tx.move_to(space(s), id(i), Gfn::new(to)),
        Op::Flags(s, i, flags) => tx.set_flags(space(s), id(i), flags),
        Op::ReadOnly(s, i, read_only) => tx.set_read_only(space(s), id(i), read_only),
        Op::Resize(s, i, pages) => tx.resize(space(s), id(i), pages),
        Op::Split(s, i, at, high) => tx.split(space(s), id(i), Gfn::new(at), id(high)),
        Op::Merge(s, low, high) => tx.merge(space(s), id(low), id(high)),
    }
}

/// Both sides together.
struct Pair {
    table: SlotTable,
    model: Model,
    limits: Limits,
    snapshots: Vec<(Snapshot, Model)>,
}

impl Pair {
    fn new(limits: Limits) -> Self {
        let table = SlotTable::new(limits).unwrap();
        Self { table, model: Model::new(), limits, snapshots: Vec::new() }
    }

    /// Runs the operations as one transaction on both sides, which must agree whether it comes to be.
    fn step(&mut self, ops: &[Op]) -> bool {
        let before = self.table.view().generation();
        let mut after = self.model.clone();
        let expected = ops.iter().all(|op| apply(&mut after, op, &self.limits).is_some()) && disjoint(&after);
        let result = self.table.transaction(|tx| ops.iter().try_for_each(|op| submit(tx, op)));
        assert_eq!(result.is_ok(), expected, "{ops:?}: {result:?}");
        let changed = expected && after != self.model;
        if expected {
            self.model = after;
        }
        let generation = self.table.view().generation();
        assert!(
            generation == before + u64::from(changed) || (expected && generation == before + 1),
            "{ops:?}"
        );
        expected
    }

    fn check(&self, random: &mut Random) {
        compare(self.table.view(), &self.model, random);
        if let Some((snapshot, model)) = self.snapshots.get(usize::try_from(random.below(4)).unwrap()) {
            compare(snapshot, model, random);
        }
    }

    /// Nothing is left when all is deleted.
    fn finish(mut self, random: &mut Random) {
        for (snapshot, model) in &self.snapshots {
            compare(snapshot, model, random);
        }
        self.snapshots.clear();
        let all: Vec<_> = self.model.keys().map(|&(space, id)| Op::Delete(space, id)).collect();
        assert!(self.step(&all));
        self.table.reclaim();
        let stats = self.table.stats();
        assert_eq!((stats.nodes, stats.versions, stats.dead_nodes), (0, 1, 0));
    }
}

fn sorted(model: &Model, space: u8) -> Vec<SlotSpec> {
    let mut slots: Vec<_> =
        model.values().filter(|slot| slot.address_space.get() == space).copied().collect();
    slots.sort_unstable_by_key(|slot| slot.gfns.start());
    slots
}

/// Every lookup.
fn compare(view: &View, model: &Model, random: &mut Random) {
    let pages: u64 = model.values().map(|slot| slot.gfns.len()).sum();
    assert_eq!(view.pages(), pages);
    for space in view.address_spaces() {
        let slots = sorted(model, space.get());
        assert_eq!(view.len(space), slots.len());
        let found: Vec<_> = view.slots(space).map(Slot::spec).collect();
        assert_eq!(found, slots, "in order of gfn");
        let mut probes: Vec<u64> = (0..4).map(|_| random.below(1 << 12)).collect();
        for slot in &slots {
            assert_eq!(view.slot(space, slot.id).map(Slot::spec), Some(*slot));
            let (start, end) = (slot.gfns.start().get(), slot.gfns.end().get());
            if slots.len() < 40 || random.once_in(slots.len() as u64 / 20) {
                probes.extend([start.saturating_sub(1), start, start + slot.gfns.len() / 2, end - 1, end]);
            }
        }
        for gfn in probes {
            check_frame(view, &slots, space, gfn);
        }
        let (from, len) = (random.below(1 << 11), random.below(1 << 11));
        check_range(view, &slots, space, range(from, len).unwrap());
        if !slots.is_empty() {
            let of = random.pick(&slots);
            let from = of.gfns.start().get().saturating_sub(random.below(9));
            check_range(view, &slots, space, range(from, of.gfns.len() + random.below(30)).unwrap());
            check_hva(view, &slots, space, of.backing.hva(), random);
        }
    }
}

fn check_frame(view: &View, slots: &[SlotSpec], space: AddressSpaceId, gfn: u64) {
    let at = slots.partition_point(|slot| slot.gfns.end().get() <= gfn);
    let wanted = slots.get(at).filter(|slot| slot.gfns.contains(Gfn::new(gfn)));
    assert_eq!(view.slot_at(space, Gfn::new(gfn)).map(Slot::spec).as_ref(), wanted, "gfn {gfn:#x}");
    let Some(gpa) = gfn.checked_mul(PAGE).map(|gpa| Gpa::new(gpa + 5)) else { return };
    let translated =
        view.translate(space, gpa).map(|found| (found.hva.get(), found.bytes_left, found.slot, found.flags));
    let wanted = wanted.and_then(|slot| {
        let into = gfn - slot.gfns.start().get();
        let left = (slot.gfns.len() - into) * PAGE - 5;
        Some((slot.backing.hva()?.get() + into * PAGE + 5, left, slot.id, slot.flags))
    });
    assert_eq!(translated, wanted, "gfn {gfn:#x}");
}

fn check_range(view: &View, slots: &[SlotSpec], space: AddressSpaceId, gfns: GfnRange) {
    let wanted: Vec<_> =
        slots.iter().filter_map(|slot| Some((slot.gfns.intersect(&gfns)?, slot.id))).collect();
    let found: Vec<_> = view.slots_in(space, gfns).map(|piece| (piece.gfns, piece.slot.id())).collect();
    assert_eq!(found, wanted, "{gfns}");
    let mut from = gfns.start();
    let mut holes = Vec::new();
    for (piece, _) in wanted {
        holes.extend(GfnRange::new(from, piece.start()).filter(|hole| !hole.is_empty()));
        from = piece.end();
    }
    holes.extend(GfnRange::new(from, gfns.end()).filter(|hole| !hole.is_empty()));
    assert_eq!(view.holes_in(space, gfns).collect::<Vec<_>>(), holes, "{gfns}");
}

fn check_hva(view: &View, slots: &[SlotSpec], space: AddressSpaceId, hva: Option<Hva>, random: &mut Random) {
    let Some(hva) = hva else { return };
    let start = Hva::new(hva.get().saturating_sub(random.below(3) * PAGE) + random.below(PAGE));
    let Some(wanted) = HvaRange::with_len(start, 1 + random.below(40 * PAGE)) else { return };
    let mut expected: Vec<_> = slots
        .iter()
        .filter_map(|slot| {
            let all = HvaRange::with_len(slot.backing.hva()?, slot.gfns.len() * PAGE)?;
            let pages = wanted.start().get() / PAGE..wanted.end().get().div_ceil(PAGE);
            let widened =
                HvaRange::new(Hva::new(pages.start * PAGE), Hva::new(pages.end.saturating_mul(PAGE)))?;
            let hvas = all.intersect(&widened)?;
            let first = slot.gfns.start().get() + (hvas.start().get() - all.start().get()) / PAGE;
            Some((all.start(), slot.id, hvas, range(first, hvas.len() / PAGE)?))
        })
        .collect();
    expected.sort_unstable();
    let expected: Vec<_> = expected.into_iter().map(|(_, id, hvas, gfns)| (id, hvas, gfns)).collect();
    let found: Vec<_> =
        view.slots_at_hva(space, wanted).map(|hit| (hit.slot.id(), hit.hvas, hit.gfns)).collect();
    assert_eq!(found, expected, "{wanted}");
    let ids: Vec<_> = view.slot_ids_at_hva(space, hva).collect();
    let page = HvaRange::with_len(hva, PAGE).unwrap();
    assert_eq!(ids, view.slots_at_hva(space, page).map(|hit| hit.slot.id()).collect::<Vec<_>>());
}

/// A random operation on a map of about `ids` slots.
fn random_op(random: &mut Random, model: &Model, ids: u64) -> Op {
    let space = u8::try_from(random.below(8) / 7).unwrap();
    let id = match random.below(20) {
        0 => u32::try_from(random.below(5_000_000)).unwrap(),
        _ => u32::try_from(random.below(ids)).unwrap(),
    };
    let existing = model.range((space, id)..).next().map_or((space, id), |(&key, _)| key);
    let base = match random.below(30) {
        0 => (1 << 52) - random.below(30),
        1 => random.below(1 << 52),
        2 => random.below(1 << 33),
        _ => random.below(ids * 12),
    };
    let pages = match random.below(40) {
        0 => (1 << 31) - random.below(3),
        1 => random.below(1 << 28),
        2 => 0,
        3..6 => random.below(200),
        _ => 1 + random.below(12),
    };
    let flags = random.pick(&[SlotFlags::empty(), SlotFlags::LOG_DIRTY_PAGES, SlotFlags::READONLY]);
    let (s, i) = existing;
    match random.below(16) {
        0..6 => {
            let hva = match random.below(12) {
                0 => u64::MAX - 0xfff - random.below(50) * PAGE,
                1 => 0x5555_0000_0000 + random.below(1 << 33) * PAGE,
                2 => random.below(1 << 51) * PAGE,
                _ => 0x7f00_0000_0000 + random.below(ids * 12) * PAGE,
            };
            let backing = match random.below(10) {
                0 => Backing::Device { token: random.next() >> 2 },
                1 => Backing::GuestMemfd { hva: Hva::new(hva), file: 7, offset: random.below(99) * PAGE },
                2 => Backing::Host { hva: Hva::new(hva + 1) },
                _ => Backing::Host { hva: Hva::new(hva) },
            };
            Op::Create(SlotSpec {
                address_space: AddressSpaceId::new(if random.once_in(50) { 9 } else { space }),
                id: SlotId::new(id),
                gfns: range(base, pages).unwrap(),
                backing,
                flags,
            })
        }
        6..9 => Op::Delete(s, i),
        9 => Op::Move(s, i, base),
        10 => Op::Flags(s, i, flags),
        11 => Op::ReadOnly(s, i, random.once_in(2)),
        12 => Op::Resize(s, i, pages),
        13 | 14 => {
            let slot = model.get(&existing);
            let inside =
                slot.map_or(base, |slot| slot.gfns.start().get() + random.below(slot.gfns.len() + 1));
            Op::Split(s, i, inside, id)
        }
        _ => {
            let slot = model.get(&existing);
            let next = slot.and_then(|slot| {
                let follows = |other: &&SlotSpec| {
                    other.gfns.start() == slot.gfns.end() && other.address_space == slot.address_space
                };
                model.values().find(follows)
            });
            Op::Merge(s, i, next.map_or(id, |next| next.id.get()))
        }
    }
}

fn run(seed: u64, steps: u64, ids: u64, check_every: u64) {
    let mut random = Random::new(seed);
    let mut pair = Pair::new(Limits { slots: 4_000_000, ..Limits::default() });
    for step in 0..steps {
        let count = if random.once_in(5) { 1 + random.below(12) } else { 1 };
        // Operations of a transaction see those before them.
        let mut model = pair.model.clone();
        let mut ops = Vec::new();
        for _ in 0..count {
            let op = random_op(&mut random, &model, ids);
            // Most transactions shall come to be.
            if count == 1 || random.once_in(20) || apply(&mut model.clone(), &op, &pair.limits).is_some() {
                let _ = apply(&mut model, &op, &pair.limits);
                ops.push(op);
            }
        }
        pair.step(&ops);
        if random.once_in(40) && pair.snapshots.len() < 12 {
            pair.snapshots.push((pair.table.snapshot(), pair.model.clone()));
        }
        if random.once_in(60) && !pair.snapshots.is_empty() {
            let at = usize::try_from(random.below(pair.snapshots.len() as u64)).unwrap();
            pair.snapshots.swap_remove(at);
        }
        if step % check_every == 0 {
            pair.check(&mut random);
        }
    }
    pair.check(&mut random);
    pair.finish(&mut random);
}

proptest! {
    #[test]
    fn small_maps(seed in any::<u64>(), steps in 1..150u64) {
        run(seed, if cfg!(miri) { steps % 20 } else { steps }, 12, 1);
    }

    #[test]
    fn maps_of_some_hundred_slots(seed in any::<u64>()) {
        run(seed, if cfg!(miri) { 30 } else { 400 }, 300, 7);
    }
}

#[test]
#[cfg_attr(miri, ignore = "too long for Miri")]
fn a_map_of_thousands_of_slots() {
    for seed in [1, 2] {
        run(seed, 5_000, 4_000, 450);
    }
}
