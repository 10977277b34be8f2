//! A memory slot of the kernel's.

use memslot::rules::{KVM_MEM_GUEST_MEMFD, UserMemoryRegion, UserMemoryRegion2};
use memslot::{AddressSpaceId, Backing, Gfn, GfnRange, HvaRange, PageSize, SlotFlags};

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
