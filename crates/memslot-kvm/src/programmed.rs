//! What the kernel has: its slots, as this crate has programmed them.

use std::collections::BTreeMap;

use memslot::rules::{KVM_MEM_GUEST_MEMFD, UserMemoryRegion, UserMemoryRegion2};
use memslot::{AddressSpaceId, Backing, Gfn, GfnRange, HvaRange, PageSize, SlotFlags};

use crate::ids::SlotIds;
use crate::plan::Step;

/// One memory slot of the kernel's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct KvmSlot {
    /// The address space.
    pub address_space: AddressSpaceId,
    /// Its id there.
    pub id: u16,
    /// The frames it covers.
    pub gfns: GfnRange,
    /// What stands behind it; never a device.
    pub backing: Backing,
    /// Its flags.
    pub flags: SlotFlags,
    /// The size of its pages.
    pub page_size: PageSize,
}

impl KvmSlot {
    /// The slot as KVM's calls name it: the id in bits 0-15, the address space above.
    #[must_use]
    pub fn number(&self) -> u32 {
        u32::from(self.address_space.get()) << 16 | u32::from(self.id)
    }

    /// Whether the kernel logs writes to it.
    pub(crate) fn logs(&self) -> bool {
        self.flags.contains(SlotFlags::LOG_DIRTY_PAGES)
    }

    /// How many words its dirty bitmap has.
    pub(crate) fn words(&self) -> usize {
        usize::try_from(self.gfns.len().div_ceil(64)).unwrap_or(usize::MAX)
    }

    /// What stands behind one of its frames.
    pub(crate) fn backing_at(&self, gfn: Gfn) -> Option<Backing> {
        self.backing.advanced(self.page_size.bytes_of(gfn.offset_from(self.gfns.start())?)?)
    }

    /// The host addresses behind it.
    pub(crate) fn hvas(&self) -> Option<HvaRange> {
        HvaRange::with_len(self.backing.hva()?, self.page_size.bytes_of(self.gfns.len())?)
    }

    /// The argument that makes this slot, or changes one with its id into it.
    pub(crate) fn region(&self) -> UserMemoryRegion2 {
        let bytes = |pages| self.page_size.bytes_of(pages).unwrap_or(u64::MAX);
        let mut region = UserMemoryRegion {
            slot: self.number(),
            flags: self.flags.bits(),
            guest_phys_addr: bytes(self.gfns.start().get()),
            memory_size: bytes(self.gfns.len()),
            userspace_addr: self.backing.hva().map_or(0, memslot::Hva::get),
        };
        let (mut guest_memfd, mut guest_memfd_offset) = (0, 0);
        if let Backing::GuestMemfd { file, offset, .. } = self.backing {
            region.flags |= KVM_MEM_GUEST_MEMFD;
            (guest_memfd, guest_memfd_offset) = (file, offset);
        }
        UserMemoryRegion2 { region, guest_memfd, guest_memfd_offset }
    }

    /// The argument that deletes it.
    pub(crate) fn removal(&self) -> UserMemoryRegion2 {
        let slot = self.number();
        let region = UserMemoryRegion { slot, ..UserMemoryRegion::default() };
        UserMemoryRegion2 { region, ..UserMemoryRegion2::default() }
    }
}

impl std::fmt::Display for KvmSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let UserMemoryRegion { guest_phys_addr, memory_size, .. } = self.region().region;
        write!(f, "KVM slot {} at {guest_phys_addr:#x}, {memory_size:#x} bytes", self.id)?;
        match self.address_space.get() {
            0 => Ok(()),
            space => write!(f, " of address space {space}"),
        }
    }
}

/// The kernel's slots of one address space. The tree has ids only, so that its nodes are small: the kernel leaves
/// little in the caches.
#[derive(Debug)]
struct Space {
    by_gfn: BTreeMap<Gfn, u16>,
    by_id: Vec<Option<KvmSlot>>,
    ids: SlotIds,
}

impl Space {
    fn slot(&self, id: u16) -> Option<&KvmSlot> {
        self.by_id.get(usize::from(id))?.as_ref()
    }
}

/// The kernel's slots.
#[derive(Debug)]
pub(crate) struct Programmed {
    spaces: Vec<Space>,
}

impl Programmed {
    pub(crate) fn new(address_spaces: u8, ids: &SlotIds) -> Self {
        let space = |_| Space { by_gfn: BTreeMap::new(), by_id: Vec::new(), ids: ids.clone() };
        Self { spaces: (0..address_spaces).map(space).collect() }
    }

    fn space(&self, space: AddressSpaceId) -> Option<&Space> {
        self.spaces.get(usize::from(space.get()))
    }

    /// All slots, in order of address space and gfn.
    pub(crate) fn all(&self) -> impl Iterator<Item = &KvmSlot> {
        self.spaces.iter().flat_map(|space| space.by_gfn.values().filter_map(|&id| space.slot(id)))
    }

    /// The slots that cover a frame of `gfns`, in order.
    pub(crate) fn in_range(&self, space: AddressSpaceId, gfns: GfnRange) -> impl Iterator<Item = &KvmSlot> {
        let space = self.space(space).filter(|_| !gfns.is_empty());
        space.into_iter().flat_map(move |space| {
            // A slot that starts before the range may reach into it.
            let mut found = space.by_gfn.range(..gfns.end()).rev();
            let mut first = gfns.end();
            // Backwards to the first one: mostly there is none, or just one.
            while let Some(slot) = found.next().and_then(|(_, &id)| space.slot(id)) {
                if slot.gfns.end() <= gfns.start() {
                    break;
                }
                first = slot.gfns.start();
            }
            let slots = (first < gfns.end()).then(|| space.by_gfn.range(first..gfns.end()));
            slots.into_iter().flatten().filter_map(|(_, &id)| space.slot(id))
        })
    }

    /// The slot with this id.
    pub(crate) fn with_id(&self, space: AddressSpaceId, id: u16) -> Option<&KvmSlot> {
        self.space(space)?.slot(id)
    }

    /// Where ids of an address space come from.
    pub(crate) fn ids(&mut self, space: AddressSpaceId) -> Option<&mut SlotIds> {
        self.spaces.get_mut(usize::from(space.get())).map(|space| &mut space.ids)
    }

    /// Gives an id back, unless a slot has it.
    pub(crate) fn settle_id(&mut self, space: AddressSpaceId, id: u16) {
        let is_used = self.with_id(space, id).is_some();
        if let Some(ids) = self.ids(space) {
            if is_used {
                ids.take(id.into());
            } else {
                ids.free(id.into());
            }
        }
    }

    /// Does what the kernel does with this step.
    pub(crate) fn apply(&mut self, step: &Step) {
        match step {
            Step::Delete(slot) => self.remove(slot),
            Step::Create(slot) | Step::Flags { to: slot, .. } => self.insert(*slot),
            Step::Move { from, to } => {
                self.remove(from);
                self.insert(*to);
            }
        }
    }

    /// The kernel has this slot now. One with the same id, and the same first frame, is replaced.
    fn insert(&mut self, slot: KvmSlot) {
        let Some(space) = self.spaces.get_mut(usize::from(slot.address_space.get())) else { return };
        let id = usize::from(slot.id);
        if id >= space.by_id.len() {
            space.by_id.resize(id + 1, None);
        }
        let old = space.by_id[id].replace(slot);
        if old.is_none_or(|old| old.gfns.start() != slot.gfns.start()) {
            space.by_gfn.insert(slot.gfns.start(), slot.id);
        }
    }

    /// The kernel does not have this slot any more.
    fn remove(&mut self, slot: &KvmSlot) {
        let Some(space) = self.spaces.get_mut(usize::from(slot.address_space.get())) else { return };
        space.by_gfn.remove(&slot.gfns.start());
        if let Some(place) = space.by_id.get_mut(usize::from(slot.id)) {
            *place = None;
        }
    }
}
