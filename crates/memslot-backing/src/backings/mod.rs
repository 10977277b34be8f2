//! Memory that lives as long as somebody can reach a slot on it.
//!
//! # How
//!
//! Every version of the table carries the set of memories that its slots stand on, counted references all of them.
//! A version's slots and its set are published with one store, so whoever has a version, pinned, as a guard or as
//! a snapshot, has its memory. The listener makes the next set while the change is prepared:
//!
//! * a slot that comes brings its memory into the set, unless it is there already;
//! * after a slot went, its memory stays if the version's index by host address finds another slot on it.
//!
//! The set is persistent: the next one shares all but a path with the one before. The listener itself keeps nothing
//! about slots, so a change that is refused, taken back or torn off by a panic leaves nothing to repair.
//!
//! What was adopted is known by a weak reference. So no memory is kept because it was once adopted: it goes when the
//! caller's own `Arc`s are gone and no version that anybody holds has a slot on it.

mod discard;
mod registry;
mod tree;

use std::sync::Arc;

use memslot::{
    AddressSpaceId, AttachmentKey, Backing, Gfn, GfnRange, Hva, Listener, ListenerError, PageSize, Slot,
    SlotChange, SlotFlags, SlotId, SlotSpec, SlotTable, Update, View,
};

use self::registry::Registry;
use self::tree::Tree;
use crate::error::{AttachError, MemoryError, StandingError};
use crate::guest_memfd::GuestMemfd;
use crate::memory::Memory;

/// What becomes of a slot on host memory that was not adopted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Foreign {
    /// It is refused: every host address of the table is good as long as its version is held.
    #[default]
    Refuse,
    /// It is let through: its memory is kept alive by somebody else, or not at all. What overlaps an adopted memory
    /// must lie inside of it all the same.
    Allow,
}

/// Keeps the memory behind a table's slots alive, and refuses slots without. See the [module documentation](crate).
///
/// A handle; clones are of the same table.
///
/// ```
/// use std::sync::Arc;
/// use memslot::*;
/// use memslot_backing::{Backings, Memory};
///
/// let mut table = SlotTable::new(Limits::default())?;
/// let backings = Backings::attach(&mut table)?;
///
/// let memory = Arc::new(Memory::memfd("guest-ram", 4 << 20).map()?);
/// backings.adopt(&memory);
/// table.create(backings.spec(SlotId::new(0), Gfn::new(0), &memory, ..)?)?;
///
/// // The table keeps it now, and so does a snapshot.
/// let gone = Arc::downgrade(&memory);
/// drop(memory);
/// let snapshot = table.snapshot();
/// table.delete(AddressSpaceId::NORMAL, SlotId::new(0))?;
/// table.reclaim();
/// let hva = snapshot.translate(AddressSpaceId::NORMAL, Gpa::new(0x1000)).unwrap().hva;
/// assert!(backings.memory_in(&snapshot, hva).is_some());
/// drop(snapshot);
/// table.reclaim();
/// assert!(gone.upgrade().is_none());
///
/// // Nothing stands on memory that nobody vouches for.
/// let stray = SlotSpec {
///     address_space: AddressSpaceId::NORMAL,
///     id: SlotId::new(1),
///     gfns: GfnRange::with_len(Gfn::new(0), 16).unwrap(),
///     backing: Backing::Host { hva },
///     flags: SlotFlags::empty(),
/// };
/// assert!(table.create(stray).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Backings {
    registry: Arc<Registry>,
    key: AttachmentKey<Standing>,
    foreign: Foreign,
    page: PageSize,
}

/// What the slots of one version stand on.
struct Standing {
    /// By the address of the first byte.
    memories: Tree<Memory>,
    /// By number.
    files: Tree<GuestMemfd>,
}

impl Standing {
    const NOTHING: Self = Self { memories: Tree::EMPTY, files: Tree::EMPTY };

    /// The memory that has the byte at this address.
    fn memory(&self, hva: Hva) -> Option<&Arc<Memory>> {
        self.memories.at_or_below(hva.get()).filter(|memory| memory.hvas().contains(hva))
    }
}

impl Backings {
    /// Backings of a table whose slots all stand on memory that is adopted first.
    ///
    /// Uses one of the table's attachment keys.
    ///
    /// # Errors
    /// [`AttachError`]; a table that has slots already needs [`attach_to_slots`](Self::attach_to_slots).
    pub fn attach(table: &mut SlotTable) -> Result<Self, AttachError> {
        Self::attach_to_slots(table, &[], Foreign::Refuse)
    }

    /// The same for a table that may have slots already, on these memories, and with a choice about memory that is owned
    /// elsewhere.
    ///
    /// # Errors
    /// [`AttachError`]: also where a slot could not be created with these backings. The table is as it was.
    pub fn attach_to_slots(
        table: &mut SlotTable,
        memories: &[Arc<Memory>],
        foreign: Foreign,
    ) -> Result<Self, AttachError> {
        let key = table.attachment_key().ok_or(AttachError::NoKey)?;
        let backings = Self { registry: Arc::default(), key, foreign, page: table.view().page_size() };
        for memory in memories {
            backings.adopt(memory);
        }
        let view = table.view();
        let changes: Vec<SlotChange> = view
            .address_spaces()
            .flat_map(|space| view.slots(space))
            .map(|slot| SlotChange { old: None, new: Some(*slot) })
            .collect();
        let standing = backings.next(&Standing::NOTHING, view, &changes)?.unwrap_or(Standing::NOTHING);
        table.attach(key, Arc::new(standing))?;
        if let Err(error) = table.add_listener(Box::new(backings.clone())) {
            // Nobody would keep the set up to date: it must not keep anything alive.
            let _ = table.attach(key, Arc::new(Standing::NOTHING));
            return Err(error.into());
        }
        Ok(backings)
    }

    /// Makes a memory known: slots may stand on it from now on.
    ///
    /// This keeps no reference. Who wants to create another slot on it later, keeps one; a memory without slots whose
    /// last `Arc` is gone is unmapped and unknown.
    pub fn adopt(&self, memory: &Arc<Memory>) {
        self.registry.adopt(memory);
    }

    /// Makes a guest_memfd known: slots may have their private memory in it. Keeps no reference.
    pub fn adopt_file(&self, file: &Arc<GuestMemfd>) {
        self.registry.adopt_file(file);
    }

    /// The adopted memory that has the byte at this address, with slots or without.
    #[must_use]
    pub fn memory_at(&self, hva: Hva) -> Option<Arc<Memory>> {
        self.registry.memory(hva)
    }

    /// The memory at this address that slots of a version stand on. It lives as long as the version is held.
    #[must_use]
    pub fn memory_in<'v>(&self, view: &'v View, hva: Hva) -> Option<&'v Arc<Memory>> {
        self.standing(view)?.memory(hva)
    }

    /// All memories that slots of a version stand on, by address: what a vhost-user backend must be given, or what
    /// a snapshot of the guest must save.
    pub fn memories<'v>(&self, view: &'v View) -> impl Iterator<Item = &'v Arc<Memory>> + use<'v> {
        self.standing(view).into_iter().flat_map(|standing| standing.memories.iter())
    }

    /// The guest_memfd with this number that slots of a version name.
    #[must_use]
    pub fn file_in<'v>(&self, view: &'v View, number: u32) -> Option<&'v Arc<GuestMemfd>> {
        self.standing(view)?.files.get(u64::from(number))
    }

    /// What the memory's owner may say about a slot on memory that was not adopted.
    #[must_use]
    pub const fn foreign(&self) -> Foreign {
        self.foreign
    }

    /// The specification of a slot on a part of a memory (a range of bytes, `..` for all of it), in the normal address
    /// space and without flags: `SlotSpec { flags: …, ..backings.spec(…)? }` for others.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Unaligned`] if the range does not begin and end at a guest page;
    /// [`MemoryError::GfnsTooHigh`].
    pub fn spec(
        &self,
        id: SlotId,
        gfn: Gfn,
        memory: &Memory,
        range: impl std::ops::RangeBounds<u64>,
    ) -> Result<SlotSpec, MemoryError> {
        let part = memory.part(&range, self.page.bytes())?;
        let pages = part.bytes as u64 >> self.page.shift();
        let gfns = GfnRange::with_len(gfn, pages).ok_or(MemoryError::GfnsTooHigh { gfn, pages })?;
        let hva = Hva::new(memory.hva().get() + part.offset as u64);
        Ok(SlotSpec {
            address_space: AddressSpaceId::NORMAL,
            id,
            gfns,
            backing: Backing::Host { hva },
            flags: SlotFlags::empty(),
        })
    }

    fn standing<'v>(&self, view: &'v View) -> Option<&'v Standing> {
        view.attachment(self.key)
    }

    /// What the version after a change stands on; `None` if that is what the one before stood on.
    fn next(
        &self,
        before: &Standing,
        after: &View,
        changes: &[SlotChange],
    ) -> Result<Option<Standing>, StandingError> {
        let mut next = Standing { memories: before.memories.clone(), files: before.files.clone() };
        let mut changed = false;
        // First all that come: a memory that is known from a slot that goes in the same change is still there.
        for slot in changes.iter().filter_map(|change| change.new.as_ref()) {
            if let Some(memory) = self.memory_of(&next, slot)? {
                next.memories = next.memories.with(memory.hva().get(), &memory);
                changed = true;
            }
            if let Some(file) = self.file_of(&next, slot)? {
                next.files = next.files.with(u64::from(file.number()), &file);
                changed = true;
            }
        }
        let gone = || changes.iter().filter_map(|change| change.old.as_ref());
        for slot in gone() {
            let Some(memory) = slot.hva().and_then(|hva| next.memory(hva)) else { continue };
            if !is_stood_on(after, memory) {
                next.memories = next.memories.without(memory.hva().get());
                changed = true;
            }
        }
        let mut seen = None;
        for number in gone().filter_map(file_number) {
            // The slots of a file are often neighbours: look once.
            if seen == Some(number) || next.files.get(u64::from(number)).is_none() {
                continue;
            }
            seen = Some(number);
            if !is_named(after, number) {
                next.files = next.files.without(u64::from(number));
                changed = true;
            }
        }
        Ok(changed.then_some(next))
    }

    /// The memory that must come into the set for this slot, if it is not there. An error if the slot may not be.
    fn memory_of(&self, standing: &Standing, slot: &Slot) -> Result<Option<Arc<Memory>>, StandingError> {
        let Some(hvas) = slot.hvas() else { return Ok(None) };
        let inside = |memory: &Memory| {
            if memory.hvas().contains_range(&hvas) {
                return Ok(());
            }
            let (start, bytes) = (memory.hva().get(), memory.bytes());
            Err(StandingError::NotInside { slot: *slot, start, bytes })
        };
        if let Some(memory) = standing.memory(hvas.start()) {
            return inside(memory).map(|()| None);
        }
        if let Some(memory) = self.registry.memory(hvas.start()) {
            inside(&memory)?;
            return Ok(Some(memory));
        }
        match (self.foreign, self.registry.overlapping(&hvas)) {
            (_, Some(memory)) => inside(&memory).map(|()| None),
            (Foreign::Refuse, None) => Err(StandingError::Unknown { slot: *slot }),
            (Foreign::Allow, None) => Ok(None),
        }
    }

    /// The same for the slot's private memory.
    fn file_of(&self, standing: &Standing, slot: &Slot) -> Result<Option<Arc<GuestMemfd>>, StandingError> {
        let Backing::GuestMemfd { file, offset, .. } = slot.backing() else { return Ok(None) };
        let slot_bytes = slot.page_size().bytes_of(slot.pages()).unwrap_or(u64::MAX);
        let end = offset.saturating_add(slot_bytes);
        let inside = |known: &GuestMemfd| {
            let bytes = known.bytes();
            if end <= bytes {
                Ok(())
            } else {
                Err(StandingError::FileTooShort { slot: *slot, file, end, bytes })
            }
        };
        if let Some(known) = standing.files.get(u64::from(file)) {
            return inside(known).map(|()| None);
        }
        match (self.foreign, self.registry.file(file)) {
            (_, Some(known)) => inside(&known).map(|()| Some(known)),
            (Foreign::Refuse, None) => Err(StandingError::UnknownFile { slot: *slot, file }),
            (Foreign::Allow, None) => Ok(None),
        }
    }
}

impl Listener for Backings {
    fn name(&self) -> &str {
        "backings"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let before = self.standing(update.before).unwrap_or(&Standing::NOTHING);
        if let Some(next) = self.next(before, update.after, update.slots)? {
            update.attach(self.key, Arc::new(next));
        }
        Ok(())
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        Ok(())
    }

    /// The table publishes what the version before carried.
    fn undo(&mut self, _: &Update<'_>) {}
}

/// Whether a slot of any address space stands on the memory.
fn is_stood_on(view: &View, memory: &Memory) -> bool {
    view.address_spaces().any(|space| view.slots_at_hva(space, memory.hvas()).next().is_some())
}

/// Whether a slot of any address space has its private memory in the file with this number. There is no index for it,
/// so this looks at all slots; only the end of a slot with private memory asks.
fn is_named(view: &View, number: u32) -> bool {
    view.address_spaces().any(|space| view.slots(space).any(|slot| file_number(slot) == Some(number)))
}

fn file_number(slot: &Slot) -> Option<u32> {
    match slot.backing() {
        Backing::GuestMemfd { file, .. } => Some(file),
        _ => None,
    }
}
