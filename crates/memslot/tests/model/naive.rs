//! The model: one map, and every operation in the most obvious way.

use std::collections::BTreeMap;

use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Limits, PageSize, SlotFlags, SlotId, SlotSpec, Transaction,
    TransactionError,
};

#[derive(Clone, Debug)]
pub enum Op {
    Create(SlotSpec),
    Delete(u8, u32),
    Move(u8, u32, u64),
    Flags(u8, u32, SlotFlags),
    ReadOnly(u8, u32, bool),
    Resize(u8, u32, u64),
    Split(u8, u32, u64, u32),
    Merge(u8, u32, u32),
}

/// Address space and id.
pub type Key = (u8, u32);

/// What the model knows of a slot: what it is, and the generation that created it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Known {
    pub spec: SlotSpec,
    pub generation: u64,
}

impl Known {
    pub fn start(&self) -> u64 {
        self.spec.gfns.start().get()
    }

    pub fn pages(&self) -> u64 {
        self.spec.gfns.len()
    }
}

pub type Slots = BTreeMap<Key, Known>;

/// The slots, and what the operations since the last [`keep`](Self::keep) have replaced.
pub struct Model {
    pub slots: Slots,
    pub limits: Limits,
    generation: u64,
    replaced: Vec<(Key, Option<Known>)>,
}

pub fn range(start: u64, pages: u64) -> Option<GfnRange> {
    GfnRange::with_len(Gfn::new(start), pages)
}

impl Model {
    pub fn new(limits: Limits) -> Self {
        Self { slots: Slots::new(), limits, generation: 0, replaced: Vec::new() }
    }

    fn page(&self) -> PageSize {
        self.limits.page_size
    }

    fn get(&self, space: u8, id: u32) -> Option<Known> {
        self.slots.get(&(space, id)).copied()
    }

    fn set(&mut self, key: Key, slot: Option<Known>) {
        let old = match slot {
            Some(slot) => self.slots.insert(key, slot),
            None => self.slots.remove(&key),
        };
        self.replaced.push((key, old));
    }

    /// Puts a slot where `old` was, if there can be such a slot.
    fn replace(&mut self, old: Known, spec: SlotSpec) -> Option<()> {
        self.valid(&spec)?;
        self.set((spec.address_space.get(), spec.id.get()), Some(Known { spec, ..old }));
        Some(())
    }

    /// The slot that a create makes, if there can be such a slot and its id is free.
    fn add(&mut self, spec: SlotSpec) -> Option<()> {
        let key = (spec.address_space.get(), spec.id.get());
        let free =
            key.0 < self.limits.address_spaces && key.1 < self.limits.slots && !self.slots.contains_key(&key);
        free.then_some(())?;
        self.valid(&spec)?;
        self.set(key, Some(Known { spec, generation: self.generation + 1 }));
        Some(())
    }

    fn valid(&self, spec: &SlotSpec) -> Option<()> {
        let (page, pages) = (self.page(), spec.gfns.len());
        let aligned = match spec.backing {
            Backing::Host { hva } => page.divides(hva.get()),
            Backing::GuestMemfd { hva, offset, .. } => page.divides(hva.get()) && page.divides(offset),
            _ => true,
        };
        let ok = (1..=self.limits.pages_per_slot).contains(&pages)
            && spec.gfns.gpas(page).is_some()
            && spec.backing.advanced(pages * page.bytes()).is_some();
        (aligned && ok).then_some(())
    }

    /// Does the operation, or nothing and `None` where it is refused. Overlap is for the end.
    pub fn apply(&mut self, op: &Op) -> Option<()> {
        match *op {
            Op::Create(spec) => self.add(spec),
            Op::Delete(space, id) => {
                self.get(space, id)?;
                self.set((space, id), None);
                Some(())
            }
            Op::Move(space, id, to) => {
                let slot = self.get(space, id)?;
                self.replace(slot, SlotSpec { gfns: range(to, slot.pages())?, ..slot.spec })
            }
            Op::Flags(space, id, flags) => {
                let slot = self.get(space, id)?;
                self.replace(slot, SlotSpec { flags, ..slot.spec })
            }
            Op::ReadOnly(space, id, read_only) => {
                let slot = self.get(space, id)?;
                let mut flags = slot.spec.flags;
                flags.set(SlotFlags::READONLY, read_only);
                self.replace(slot, SlotSpec { flags, ..slot.spec })
            }
            Op::Resize(space, id, pages) => {
                let slot = self.get(space, id)?;
                self.replace(slot, SlotSpec { gfns: range(slot.start(), pages)?, ..slot.spec })
            }
            Op::Split(space, id, at, high) => {
                let slot = self.get(space, id)?;
                let low = at.checked_sub(slot.start()).filter(|low| (1..slot.pages()).contains(low))?;
                let backing = slot.spec.backing.advanced(low * self.page().bytes())?;
                let gfns = range(at, slot.pages() - low)?;
                self.add(SlotSpec { id: SlotId::new(high), gfns, backing, ..slot.spec })?;
                self.replace(slot, SlotSpec { gfns: range(slot.start(), low)?, ..slot.spec })
            }
            Op::Merge(space, low, high) => {
                let (a, b) = (self.get(space, low)?, self.get(space, high)?);
                let next = a.spec.backing.advanced(a.pages() * self.page().bytes());
                let alike = a.spec.flags == b.spec.flags && next == Some(b.spec.backing);
                let neighbours = a.spec.gfns.end() == b.spec.gfns.start();
                (alike && neighbours).then_some(())?;
                self.replace(a, SlotSpec { gfns: range(a.start(), a.pages() + b.pages())?, ..a.spec })?;
                self.set((space, high), None);
                Some(())
            }
        }
    }

    /// Whether none of the slots that the operations left behind covers a frame of another one.
    pub fn disjoint(&self) -> bool {
        self.replaced.iter().filter_map(|&((space, id), _)| self.get(space, id)).all(|slot| {
            let Known { spec, .. } = slot;
            let of_space =
                self.slots.range((spec.address_space.get(), 0)..=(spec.address_space.get(), u32::MAX));
            of_space.filter(|(_, other)| other.spec.gfns.overlaps(&spec.gfns)).count() == 1
        })
    }

    /// Makes a generation of the operations since the last time; returns it.
    pub fn keep(&mut self) -> u64 {
        self.replaced.reverse();
        // Of several changes of a slot, the first one knows what was there before.
        let before: BTreeMap<Key, Option<Known>> = self.replaced.drain(..).collect();
        let changed = before.iter().any(|(key, old)| self.slots.get(key) != old.as_ref());
        self.generation += u64::from(changed);
        self.generation
    }

    /// Takes the operations back.
    pub fn forget(&mut self) {
        while let Some((key, old)) = self.replaced.pop() {
            match old {
                Some(old) => drop(self.slots.insert(key, old)),
                None => drop(self.slots.remove(&key)),
            }
        }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl Op {
    /// The same operation for the engine.
    pub fn submit(&self, tx: &mut Transaction<'_>) -> Result<(), TransactionError> {
        let (space, id) = (AddressSpaceId::new, SlotId::new);
        match *self {
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

    /// The slots that it is about.
    pub fn keys(&self) -> Vec<Key> {
        match *self {
            Op::Create(spec) => vec![(spec.address_space.get(), spec.id.get())],
            Op::Delete(s, i) | Op::Move(s, i, _) | Op::Flags(s, i, _) => vec![(s, i)],
            Op::ReadOnly(s, i, _) | Op::Resize(s, i, _) => vec![(s, i)],
            Op::Split(s, a, _, b) | Op::Merge(s, a, b) => vec![(s, a), (s, b)],
        }
    }
}
