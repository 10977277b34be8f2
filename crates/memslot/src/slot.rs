//! A memory slot: one immutable piece of guest memory.
//!
//! A slot says that the guest frames `[base_gfn, base_gfn + pages)` of an address space are backed by one
//! contiguous piece of something. It never changes: an update publishes a *new* slot under the same id, in a
//! new version of the table. So nobody ever holds a slot that changes or moves under their hands.
//!
//! Ids are reused (VMMs take the lowest free one), so an id alone does not name a slot for long. A slot's
//! [`generation`](Slot::generation) is the table generation that created it; id and generation together are
//! never used twice.

use core::fmt;

use bitflags::bitflags;

use crate::addr::{Gfn, GfnRange, Hva, HvaRange, PageSize};

/// The most pages one slot can have: 2^31 - 1, KVM's `KVM_MEM_MAX_NR_PAGES`.
///
/// The gfn index keeps page offsets in 32 bits because of it (`table/gfn_index`).
pub const MAX_PAGES_PER_SLOT: u64 = (1 << 31) - 1;

/// The most slots an address space can have: 2^28; their ids are below it.
///
/// The gfn index keeps a slot's flags in the bits above.
pub const MAX_SLOTS: u32 = 1 << 28;

/// Which of a guest's address spaces a slot belongs to; KVM calls it `as_id`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct AddressSpaceId(u8);

impl AddressSpaceId {
    /// The ordinary address space, 0.
    pub const NORMAL: Self = Self(0);
    /// What an x86 processor sees in system management mode, 1.
    pub const SMM: Self = Self(1);

    /// The address space with this number.
    #[inline]
    #[must_use]
    pub const fn new(number: u8) -> Self {
        Self(number)
    }

    /// The number.
    #[inline]
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for AddressSpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for AddressSpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressSpaceId({})", self.0)
    }
}

/// A slot's number within its address space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SlotId(u32);

impl SlotId {
    /// The slot id with this number.
    #[inline]
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number.
    #[inline]
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotId({})", self.0)
    }
}

bitflags! {
    /// What a slot asks of its memory; the values are KVM's `KVM_MEM_*`.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct SlotFlags: u32 {
        /// Guest writes are recorded in the dirty log (`KVM_MEM_LOG_DIRTY_PAGES`).
        const LOG_DIRTY_PAGES = 1;
        /// The guest reads the memory but its writes go to the VMM as MMIO (`KVM_MEM_READONLY`).
        const READONLY = 2;
    }
}

/// What stands behind a slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Backing {
    /// Memory of the host at this address; `pages` pages from here on.
    Host {
        /// Where the first byte of the slot lies.
        hva: Hva,
    },
    /// Private memory of a `guest_memfd` file, with shared memory at `hva` beside it.
    GuestMemfd {
        /// Where the shared half lies.
        hva: Hva,
        /// Which file: a number of the caller's choice (KVM: the file descriptor).
        file: u32,
        /// Where in the file the slot starts, in bytes; a multiple of the page size.
        offset: u64,
    },
    /// Not memory of the host: a device's own, reached by whoever understands the token.
    Device {
        /// The caller's name for it; [`Slot::token_at`] adds the offset in bytes.
        token: u64,
    },
}

impl Backing {
    /// The host address of the slot's first byte, for backings that have one.
    #[inline]
    #[must_use]
    pub const fn hva(&self) -> Option<Hva> {
        match *self {
            Self::Host { hva } | Self::GuestMemfd { hva, .. } => Some(hva),
            Self::Device { .. } => None,
        }
    }

    /// The same backing, `bytes` further on: what stands behind the second half of a split slot.
    ///
    /// `None` where an address or offset would pass 2^64.
    #[must_use]
    pub fn advanced(&self, bytes: u64) -> Option<Self> {
        Some(match *self {
            Self::Host { hva } => Self::Host { hva: hva.checked_add(bytes)? },
            Self::GuestMemfd { hva, file, offset } => {
                Self::GuestMemfd { hva: hva.checked_add(bytes)?, file, offset: offset.checked_add(bytes)? }
            }
            Self::Device { token } => Self::Device { token: token.checked_add(bytes)? },
        })
    }
}

/// What a new slot shall be: the argument of `create`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotSpec {
    /// The address space it belongs to.
    pub address_space: AddressSpaceId,
    /// Its number; must be free.
    pub id: SlotId,
    /// The guest frames it covers; must be free.
    pub gfns: GfnRange,
    /// What stands behind them.
    pub backing: Backing,
    /// Its flags.
    pub flags: SlotFlags,
}

/// One immutable piece of guest memory. See the [module documentation](self).
///
/// ```
/// use memslot::*;
/// let mut table = SlotTable::new(Limits::default())?;
/// table.create(SlotSpec {
///     address_space: AddressSpaceId::NORMAL,
///     id: SlotId::new(3),
///     gfns: GfnRange::with_len(Gfn::new(0x100), 16).unwrap(),
///     backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000) },
///     flags: SlotFlags::empty(),
/// })?;
/// let slot = *table.view().slot(AddressSpaceId::NORMAL, SlotId::new(3)).unwrap();
/// assert_eq!(slot.pages(), 16);
/// assert_eq!(slot.hva_of(Gfn::new(0x101)), Some(Hva::new(0x7f00_0000_1000)));
/// assert_eq!(slot.hva_of(Gfn::new(0x110)), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    base_gfn: u64,
    /// The host address, or a device's token.
    address: u64,
    /// Where in the guest_memfd file the slot starts.
    file_offset: u64,
    generation: u64,
    pages: u32,
    id: SlotId,
    file: u32,
    address_space: AddressSpaceId,
    flags: u8,
    kind: Kind,
    page: PageSize,
}

const _: () = assert!(size_of::<Slot>() == 48, "id leaves are sized for 48-byte slots");

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host,
    GuestMemfd,
    Device,
}

impl Slot {
    /// The slot that `spec` describes. The table has checked it: pages fit, addresses do not wrap.
    pub(crate) fn from_spec(spec: &SlotSpec, generation: u64, page: PageSize) -> Self {
        let (kind, address, file, file_offset) = match spec.backing {
            Backing::Host { hva } => (Kind::Host, hva.get(), 0, 0),
            Backing::GuestMemfd { hva, file, offset } => (Kind::GuestMemfd, hva.get(), file, offset),
            Backing::Device { token } => (Kind::Device, token, 0, 0),
        };
        Self {
            base_gfn: spec.gfns.start().get(),
            address,
            file_offset,
            generation,
            pages: u32::try_from(spec.gfns.len()).unwrap_or(u32::MAX),
            id: spec.id,
            file,
            address_space: spec.address_space,
            flags: u8::try_from(spec.flags.bits()).unwrap_or(0),
            kind,
            page,
        }
    }

    /// The slot's number.
    #[inline]
    #[must_use]
    pub const fn id(&self) -> SlotId {
        self.id
    }

    /// The address space it belongs to.
    #[inline]
    #[must_use]
    pub const fn address_space(&self) -> AddressSpaceId {
        self.address_space
    }

    /// Its first guest frame.
    #[inline]
    #[must_use]
    pub const fn base_gfn(&self) -> Gfn {
        Gfn::new(self.base_gfn)
    }

    /// How many pages it has; at least 1, at most [`MAX_PAGES_PER_SLOT`].
    #[inline]
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages as u64
    }

    /// The frames it covers.
    #[inline]
    #[must_use]
    pub const fn gfns(&self) -> GfnRange {
        match GfnRange::with_len(Gfn::new(self.base_gfn), self.pages as u64) {
            Some(range) => range,
            None => unreachable!(),
        }
    }

    /// What stands behind it.
    #[inline]
    #[must_use]
    pub const fn backing(&self) -> Backing {
        let hva = Hva::new(self.address);
        match self.kind {
            Kind::Host => Backing::Host { hva },
            Kind::GuestMemfd => Backing::GuestMemfd { hva, file: self.file, offset: self.file_offset },
            Kind::Device => Backing::Device { token: self.address },
        }
    }

    /// The host address of its first byte, for backings that have one.
    #[inline]
    #[must_use]
    pub const fn hva(&self) -> Option<Hva> {
        match self.kind {
            Kind::Host | Kind::GuestMemfd => Some(Hva::new(self.address)),
            Kind::Device => None,
        }
    }

    /// The host addresses behind it, for backings that have some.
    #[must_use]
    pub fn hvas(&self) -> Option<HvaRange> {
        HvaRange::with_len(self.hva()?, self.page.bytes_of(self.pages())?)
    }

    /// The host address of a frame, or `None` outside the slot and for devices.
    #[must_use]
    pub fn hva_of(&self, gfn: Gfn) -> Option<Hva> {
        let offset = gfn.offset_from(self.base_gfn()).filter(|&offset| offset < self.pages())?;
        self.hva()?.checked_add(self.page.bytes_of(offset)?)
    }

    /// A device's token for a frame (its token plus the offset in bytes); `None` outside and for memory.
    #[must_use]
    pub fn token_at(&self, gfn: Gfn) -> Option<u64> {
        let offset = gfn.offset_from(self.base_gfn()).filter(|&offset| offset < self.pages())?;
        match self.kind {
            Kind::Device => self.address.checked_add(self.page.bytes_of(offset)?),
            Kind::Host | Kind::GuestMemfd => None,
        }
    }

    /// Its flags.
    #[inline]
    #[must_use]
    pub const fn flags(&self) -> SlotFlags {
        SlotFlags::from_bits_truncate(self.flags as u32)
    }

    /// The generation that created this slot. Kept while the slot is moved, resized or given other flags;
    /// a slot deleted and created again under the same id has another one.
    #[inline]
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The size of its pages.
    #[inline]
    #[must_use]
    pub const fn page_size(&self) -> PageSize {
        self.page
    }

    /// What `create` would need to make this slot again.
    #[must_use]
    pub const fn spec(&self) -> SlotSpec {
        SlotSpec {
            address_space: self.address_space,
            id: self.id,
            gfns: self.gfns(),
            backing: self.backing(),
            flags: self.flags(),
        }
    }

    /// The raw host address or token, as the indexes keep it.
    #[inline]
    pub(crate) const fn address(&self) -> u64 {
        self.address
    }

    /// The number of pages as the indexes keep it.
    #[inline]
    pub(crate) const fn pages32(&self) -> u32 {
        self.pages
    }

    /// Whether both slots put the same thing behind the same frame, wherever both cover a frame.
    pub(crate) fn same_backing_at_same_gfn(&self, other: &Self) -> bool {
        let delta = other.base_gfn.wrapping_sub(self.base_gfn) << self.page.shift();
        self.kind == other.kind
            && self.file == other.file
            && self.address.wrapping_add(delta) == other.address
            && (self.kind != Kind::GuestMemfd || self.file_offset.wrapping_add(delta) == other.file_offset)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {} ", self.id)?;
        if self.address_space != AddressSpaceId::NORMAL {
            write!(f, "(address space {}) ", self.address_space)?;
        }
        write!(f, "{}", ByteExtent { gfns: self.gfns(), page: self.page })
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("id", &self.id)
            .field("address_space", &self.address_space)
            .field("gfns", &self.gfns())
            .field("backing", &self.backing())
            .field("flags", &self.flags())
            .field("generation", &self.generation)
            .finish()
    }
}

/// Frames as a person reads them: `[0x100000000, +1 GiB)`.
pub(crate) struct ByteExtent {
    pub(crate) gfns: GfnRange,
    pub(crate) page: PageSize,
}

impl fmt::Display for ByteExtent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = u128::from(self.gfns.start().get()) << self.page.shift();
        let mut size = u128::from(self.gfns.len()) << self.page.shift();
        let mut unit = 0;
        const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        while size >= 1024 && size % 1024 == 0 && unit + 1 < UNITS.len() {
            size /= 1024;
            unit += 1;
        }
        write!(f, "[{start:#x}, +{size} {})", UNITS[unit])
    }
}
