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
use core::num::NonZeroU32;

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
    /// Below [`GFN_BITS`] the first guest frame, above it a [`Tag`], in the highest [`FILE_TOP`] a part of the file.
    base_and_tag: u64,
    /// The host address, with a part of the file in the bits that are 0 in a page's address; or a device's token.
    address: u64,
    /// Where in the `guest_memfd` file the slot starts, again with a part of the file.
    file_offset: u64,
    generation: u64,
    pages: NonZeroU32,
    /// The id, and above [`MAX_SLOTS`] the last part of the file.
    id_and_file: u32,
}

// A table has a slot's 40 bytes for each id, so every bit is used: a gfn has 52 bits (a guest physical address has
// 64), a page's address and offset have 12 low ones that are 0, an id has 28. A `guest_memfd`'s number, which most
// slots do not have, lies where those leave room.
const _: () = assert!(size_of::<Option<Slot>>() == 40, "id leaves are sized for 40-byte slots");

/// Bits of a gfn.
const GFN_BITS: u32 = 52;
/// The bits of an address or offset that are 0 where a page begins, whatever its size.
const IN_PAGE_BITS: u32 = 12;
/// Bits of the file's number above those in the address and in the offset; as many lie above the id.
const FILE_TOP: u32 = 4;
const FILE_AT_BASE: u32 = 64 - FILE_TOP;

const _: () = assert!(MAX_SLOTS == 1 << (32 - FILE_TOP) && 2 * (IN_PAGE_BITS + FILE_TOP) == 32);

/// The small things, two bits each.
struct Tag;

impl Tag {
    const ADDRESS_SPACE: u32 = GFN_BITS;
    const FLAGS: u32 = GFN_BITS + 2;
    const KIND: u32 = GFN_BITS + 4;
    const PAGE: u32 = GFN_BITS + 6;
}

const _: () = assert!(Tag::PAGE + 2 == FILE_AT_BASE);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host,
    GuestMemfd,
    Device,
}

/// The lowest bits of a word.
const fn low(word: u64, bits: u32) -> u64 {
    word & ((1 << bits) - 1)
}

impl Slot {
    /// The slot that `spec` describes. The table has checked it: pages fit, addresses are aligned and do not wrap, id and
    /// address space are such as a table can have.
    pub(crate) fn from_spec(spec: &SlotSpec, generation: u64, page: PageSize) -> Self {
        let (kind, address, file, file_offset) = match spec.backing {
            Backing::Host { hva } => (Kind::Host, hva.get(), 0, 0),
            Backing::GuestMemfd { hva, file, offset } => (Kind::GuestMemfd, hva.get(), file, offset),
            Backing::Device { token } => (Kind::Device, token, 0, 0),
        };
        let (base, space) = (spec.gfns.start().get(), spec.address_space.get());
        let id = spec.id.get();
        debug_assert!(base >> GFN_BITS == 0 && space < 4 && id < MAX_SLOTS && spec.flags.bits() < 4);
        debug_assert!(kind == Kind::Device || low(address | file_offset, IN_PAGE_BITS) == 0);
        let page = match page {
            PageSize::K4 => 0,
            PageSize::K16 => 1,
            PageSize::K64 => 2,
        };
        let tag = u64::from(space) << Tag::ADDRESS_SPACE
            | u64::from(spec.flags.bits()) << Tag::FLAGS
            | (kind as u64) << Tag::KIND
            | page << Tag::PAGE;
        let part = |at| low(u64::from(file >> at), IN_PAGE_BITS);
        let top = file >> (2 * IN_PAGE_BITS);
        Self {
            base_and_tag: base | tag | u64::from(top) << FILE_AT_BASE,
            address: address | part(0),
            file_offset: file_offset | part(IN_PAGE_BITS),
            generation,
            pages: u32::try_from(spec.gfns.len()).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MAX),
            id_and_file: id | top >> FILE_TOP << (32 - FILE_TOP),
        }
    }

    /// Two bits of the tag.
    #[inline]
    const fn tag(&self, at: u32) -> u64 {
        low(self.base_and_tag >> at, 2)
    }

    #[inline]
    const fn kind(&self) -> Kind {
        match self.tag(Tag::KIND) {
            0 => Kind::Host,
            1 => Kind::GuestMemfd,
            _ => Kind::Device,
        }
    }

    /// The number of the `guest_memfd` file; 0 for other backings.
    #[expect(clippy::cast_possible_truncation, reason = "each part has few bits")]
    const fn file(&self) -> u32 {
        match self.kind() {
            Kind::GuestMemfd => {
                low(self.address, IN_PAGE_BITS) as u32
                    | (low(self.file_offset, IN_PAGE_BITS) as u32) << IN_PAGE_BITS
                    | ((self.base_and_tag >> FILE_AT_BASE) as u32) << (2 * IN_PAGE_BITS)
                    | self.id_and_file >> (32 - FILE_TOP) << (32 - FILE_TOP)
            }
            Kind::Host | Kind::Device => 0,
        }
    }

    /// Where in its file the slot starts.
    const fn file_offset(&self) -> u64 {
        self.file_offset & !low(u64::MAX, IN_PAGE_BITS)
    }

    /// The slot's number.
    #[inline]
    #[must_use]
    pub const fn id(&self) -> SlotId {
        SlotId::new(self.id_and_file & (MAX_SLOTS - 1))
    }

    /// The address space it belongs to.
    #[inline]
    #[must_use]
    pub const fn address_space(&self) -> AddressSpaceId {
        #[expect(clippy::cast_possible_truncation, reason = "two bits")]
        let number = self.tag(Tag::ADDRESS_SPACE) as u8;
        AddressSpaceId::new(number)
    }

    /// Its first guest frame.
    #[inline]
    #[must_use]
    pub const fn base_gfn(&self) -> Gfn {
        Gfn::new(low(self.base_and_tag, GFN_BITS))
    }

    /// How many pages it has; at least 1, at most [`MAX_PAGES_PER_SLOT`].
    #[inline]
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages.get() as u64
    }

    /// The frames it covers.
    #[inline]
    #[must_use]
    pub const fn gfns(&self) -> GfnRange {
        match GfnRange::with_len(self.base_gfn(), self.pages()) {
            Some(range) => range,
            None => unreachable!(),
        }
    }

    /// What stands behind it.
    #[inline]
    #[must_use]
    pub const fn backing(&self) -> Backing {
        let address = self.address();
        match self.kind() {
            Kind::Host => Backing::Host { hva: Hva::new(address) },
            Kind::GuestMemfd => {
                Backing::GuestMemfd { hva: Hva::new(address), file: self.file(), offset: self.file_offset() }
            }
            Kind::Device => Backing::Device { token: address },
        }
    }

    /// The host address of its first byte, for backings that have one.
    #[inline]
    #[must_use]
    pub const fn hva(&self) -> Option<Hva> {
        match self.kind() {
            Kind::Host | Kind::GuestMemfd => Some(Hva::new(self.address())),
            Kind::Device => None,
        }
    }

    /// The host addresses behind it, for backings that have some.
    #[must_use]
    pub fn hvas(&self) -> Option<HvaRange> {
        HvaRange::with_len(self.hva()?, self.page_size().bytes_of(self.pages())?)
    }

    /// The host address of a frame, or `None` outside the slot and for devices.
    #[must_use]
    pub fn hva_of(&self, gfn: Gfn) -> Option<Hva> {
        let offset = gfn.offset_from(self.base_gfn()).filter(|&offset| offset < self.pages())?;
        self.hva()?.checked_add(self.page_size().bytes_of(offset)?)
    }

    /// A device's token for a frame (its token plus the offset in bytes); `None` outside and for memory.
    #[must_use]
    pub fn token_at(&self, gfn: Gfn) -> Option<u64> {
        let offset = gfn.offset_from(self.base_gfn()).filter(|&offset| offset < self.pages())?;
        match self.kind() {
            Kind::Device => self.address.checked_add(self.page_size().bytes_of(offset)?),
            Kind::Host | Kind::GuestMemfd => None,
        }
    }

    /// Its flags.
    #[inline]
    #[must_use]
    pub const fn flags(&self) -> SlotFlags {
        #[expect(clippy::cast_possible_truncation, reason = "two bits")]
        let bits = self.tag(Tag::FLAGS) as u32;
        SlotFlags::from_bits_truncate(bits)
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
        match self.tag(Tag::PAGE) {
            0 => PageSize::K4,
            1 => PageSize::K16,
            _ => PageSize::K64,
        }
    }

    /// What `create` would need to make this slot again.
    #[must_use]
    pub const fn spec(&self) -> SlotSpec {
        SlotSpec {
            address_space: self.address_space(),
            id: self.id(),
            gfns: self.gfns(),
            backing: self.backing(),
            flags: self.flags(),
        }
    }

    /// The raw host address or token, as the indexes keep it.
    #[inline]
    pub(crate) const fn address(&self) -> u64 {
        match self.kind() {
            Kind::Device => self.address,
            Kind::Host | Kind::GuestMemfd => self.address & !low(u64::MAX, IN_PAGE_BITS),
        }
    }

    /// The number of pages as the indexes keep it.
    #[inline]
    pub(crate) const fn pages32(&self) -> u32 {
        self.pages.get()
    }

    /// Whether both slots put the same thing behind the same frame, wherever both cover a frame.
    pub(crate) fn same_backing_at_same_gfn(&self, other: &Self) -> bool {
        let delta = other.base_gfn().get().wrapping_sub(self.base_gfn().get()) << self.page_size().shift();
        self.kind() == other.kind()
            && self.file() == other.file()
            && self.address().wrapping_add(delta) == other.address()
            && (self.kind() != Kind::GuestMemfd
                || self.file_offset().wrapping_add(delta) == other.file_offset())
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {} ", self.id())?;
        if self.address_space() != AddressSpaceId::NORMAL {
            write!(f, "(address space {}) ", self.address_space())?;
        }
        write!(f, "{}", ByteExtent { gfns: self.gfns(), page: self.page_size() })
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("id", &self.id())
            .field("address_space", &self.address_space())
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Every field at its smallest, its largest and something between, with all others at each end.
    #[test]
    fn a_slot_is_what_it_was_made_of() {
        for page in [PageSize::K4, PageSize::K16, PageSize::K64] {
            let last_page = u64::MAX << page.shift();
            let mut backings = [0, 1, u64::MAX].map(|token| Backing::Device { token }).to_vec();
            for hva in [0, page.bytes(), last_page].map(Hva::new) {
                backings.push(Backing::Host { hva });
                for file in [0, 1, 0xabc, 0xdef_abc, 0x1234_5678, u32::MAX, 1 << 31, 0xf << 24] {
                    for offset in [0, page.bytes(), last_page] {
                        backings.push(Backing::GuestMemfd { hva, file, offset });
                    }
                }
            }
            for backing in backings {
                for (space, id, flags) in [(0, 0, 0), (1, 5, 1), (3, MAX_SLOTS - 1, 3)] {
                    for (base, pages) in
                        [(0, 1), (7, MAX_PAGES_PER_SLOT), ((1 << (64 - page.shift())) - 1, 1)]
                    {
                        let spec = SlotSpec {
                            address_space: AddressSpaceId::new(space),
                            id: SlotId::new(id),
                            gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
                            backing,
                            flags: SlotFlags::from_bits_truncate(flags),
                        };
                        let slot = Slot::from_spec(&spec, u64::MAX - 1, page);
                        assert_eq!(slot.spec(), spec);
                        assert_eq!((slot.generation(), slot.page_size()), (u64::MAX - 1, page));
                        assert_eq!(slot.hva(), backing.hva());
                        assert!(slot.same_backing_at_same_gfn(&slot));
                    }
                }
            }
        }
    }
}
