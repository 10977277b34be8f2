//! What one version says: every lookup.

use core::any::Any;

use super::attachment::{AttachmentKey, Attachments};
use super::gfn_index::{Found, GfnIndex, Walk};
use super::hva_index::{HvaIndex, Search};
use super::id_index::IdIndex;
use super::{Limits, MAX_ADDRESS_SPACES};
use crate::addr::{Gfn, GfnRange, Gpa, Hva, HvaRange, PageSize};
use crate::slot::{AddressSpaceId, Slot, SlotFlags, SlotId};

/// One address space in one version. Copying it copies three roots.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Space {
    pub(super) gfns: GfnIndex,
    pub(super) hvas: HvaIndex,
    pub(super) ids: IdIndex,
    pub(super) slots: usize,
}

/// One version of the table, complete and unchanging: what a [`Pinned`](crate::Pinned), a
/// [`Snapshot`](crate::Snapshot) and [`SlotTable::view`](crate::SlotTable::view) look at.
///
/// Lookups in an address space that the table does not have find nothing.
#[repr(C)]
pub struct View {
    pub(super) generation: u64,
    pub(super) limits: Limits,
    pub(super) pages: u64,
    pub(super) spaces: [Space; MAX_ADDRESS_SPACES],
    pub(super) attachments: Attachments,
}

// SAFETY: a published version is never written; the nodes its roots lead to are shared by reference only and
// freed by the writer when nobody holds the version.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

/// Where a guest physical address lies in the host, and what may be done there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The host address of the byte.
    pub hva: Hva,
    /// How many bytes follow in the same slot, this one included; at least 1.
    pub bytes_left: u64,
    /// The slot.
    pub slot: SlotId,
    /// Its flags: a write to a [`READONLY`](SlotFlags::READONLY) slot is MMIO.
    pub flags: SlotFlags,
}

/// The part of a slot that lies in the range that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotPiece<'a> {
    /// The frames, clipped to the range.
    pub gfns: GfnRange,
    /// The whole slot.
    pub slot: &'a Slot,
}

/// A slot that stands on some of the host memory that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HvaHit<'a> {
    /// The frames through which the guest sees it.
    pub gfns: GfnRange,
    /// The host memory, clipped to the range that was asked for (widened to whole pages).
    pub hvas: HvaRange,
    /// The whole slot.
    pub slot: &'a Slot,
}

impl View {
    pub(super) const fn empty(limits: Limits, generation: u64) -> Self {
        const NONE: Space =
            Space { gfns: GfnIndex::EMPTY, hvas: HvaIndex::EMPTY, ids: IdIndex::EMPTY, slots: 0 };
        Self {
            generation,
            limits,
            pages: 0,
            spaces: [NONE; MAX_ADDRESS_SPACES],
            attachments: Attachments::NONE,
        }
    }

    /// A copy of the roots, for the writer.
    pub(super) fn fork(&self, generation: u64) -> Self {
        let attachments = self.attachments.clone();
        Self { generation, limits: self.limits, pages: self.pages, spaces: self.spaces, attachments }
    }

    /// Which generation of the table this is. Every transaction that changes something makes the next one.
    #[inline]
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The table's limits.
    #[inline]
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The size of a page.
    #[inline]
    #[must_use]
    pub const fn page_size(&self) -> PageSize {
        self.limits.page_size
    }

    /// What a listener has attached to this version, or to one before it.
    #[inline]
    #[must_use]
    pub fn attachment<T: Any + Send + Sync>(&self, key: AttachmentKey<T>) -> Option<&T> {
        self.attachments.get(key)
    }

    /// How many slots an address space has.
    #[must_use]
    pub fn len(&self, space: AddressSpaceId) -> usize {
        self.spaces.get(usize::from(space.get())).map_or(0, |space| space.slots)
    }

    /// Whether no address space has a slot.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// How many pages all slots of all address spaces have together.
    #[inline]
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The address spaces that the table has, with or without slots.
    pub fn address_spaces(&self) -> impl Iterator<Item = AddressSpaceId> + use<> {
        (0..self.limits.address_spaces).map(AddressSpaceId::new)
    }

    #[inline]
    fn space(&self, space: AddressSpaceId) -> Option<&Space> {
        self.spaces.get(usize::from(space.get()))
    }

    /// Where `gpa` lies in the host. `None` in a hole, and for slots without host memory (devices).
    ///
    /// ```
    /// # use memslot::*;
    /// # let mut table = SlotTable::new(Limits::default())?;
    /// # let ram = AddressSpaceId::NORMAL;
    /// # table.create(SlotSpec { address_space: ram, id: SlotId::new(0),
    /// #     gfns: GfnRange::with_len(Gfn::new(0x100), 2).unwrap(),
    /// #     backing: Backing::Host { hva: Hva::new(0x7000_0000) }, flags: SlotFlags::empty() })?;
    /// // Slot 0 is [0x100000, +8 KiB), backed from 0x70000000 on.
    /// let found = table.view().translate(ram, Gpa::new(0x10_1ffc)).unwrap();
    /// assert_eq!((found.hva, found.bytes_left), (Hva::new(0x7000_1ffc), 4));
    /// assert_eq!(table.view().translate(ram, Gpa::new(0x10_2000)), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    #[must_use]
    pub fn translate(&self, space: AddressSpaceId, gpa: Gpa) -> Option<Translation> {
        // A shift by a constant is quicker, and the page size does not change under way.
        match self.page_size() {
            PageSize::K4 => self.translate_pages_of(PageSize::K4, space, gpa),
            PageSize::K16 => self.translate_pages_of(PageSize::K16, space, gpa),
            PageSize::K64 => self.translate_pages_of(PageSize::K64, space, gpa),
        }
    }

    #[inline(always)]
    fn translate_pages_of(&self, page: PageSize, space: AddressSpaceId, gpa: Gpa) -> Option<Translation> {
        translation(&self.find(space, gpa.gfn(page))?, gpa, page)
    }

    /// The gfn index's answer.
    #[inline]
    pub(super) fn find(&self, space: AddressSpaceId, gfn: Gfn) -> Option<Found> {
        // SAFETY: whoever has `&self` holds the version.
        unsafe { self.space(space)?.gfns.find(gfn.get()) }
    }

    /// The slot with this id.
    #[inline]
    #[must_use]
    pub fn slot(&self, space: AddressSpaceId, id: SlotId) -> Option<&Slot> {
        // SAFETY: whoever has `&self` holds the version.
        unsafe { self.space(space)?.ids.find(id.get()) }
    }

    /// The slot that covers a frame. To translate an address, [`translate`](Self::translate) is quicker.
    #[inline]
    #[must_use]
    pub fn slot_at(&self, space: AddressSpaceId, gfn: Gfn) -> Option<&Slot> {
        self.slot(space, SlotId::new(self.find(space, gfn)?.id()))
    }

    /// All slots of an address space, in order of gfn.
    pub fn slots(&self, space: AddressSpaceId) -> impl Iterator<Item = &Slot> {
        self.walk(space, 0, u64::MAX)
    }

    /// The slots that cover a frame of `gfns`, in order of gfn, each with the part that lies in the range.
    ///
    /// ```
    /// # use memslot::*;
    /// # let mut table = SlotTable::new(Limits::default())?;
    /// # let ram = AddressSpaceId::NORMAL;
    /// # for (id, base, pages) in [(0, 0, 16), (1, 32, 16)] {
    /// #     table.create(SlotSpec { address_space: ram, id: SlotId::new(id),
    /// #         gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
    /// #         backing: Backing::Device { token: 0 }, flags: SlotFlags::empty() })?;
    /// # }
    /// // Slot 0 covers the gfns 0..16, slot 1 the gfns 32..48.
    /// let range = GfnRange::new(Gfn::new(8), Gfn::new(40)).unwrap();
    /// let found: Vec<_> = table.view().slots_in(ram, range).map(|p| (p.slot.id().get(), p.gfns.len())).collect();
    /// assert_eq!(found, [(0, 8), (1, 8)]);
    /// let holes: Vec<_> = table.view().holes_in(ram, range).map(|hole| hole.len()).collect();
    /// assert_eq!(holes, [16]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn slots_in(&self, space: AddressSpaceId, gfns: GfnRange) -> impl Iterator<Item = SlotPiece<'_>> {
        let last = if gfns.is_empty() { None } else { gfns.end().checked_sub(1) };
        last.into_iter().flat_map(move |last| {
            self.walk(space, gfns.start().get(), last.get())
                .filter_map(move |slot| Some(SlotPiece { gfns: slot.gfns().intersect(&gfns)?, slot }))
        })
    }

    fn walk(&self, space: AddressSpaceId, from: u64, last: u64) -> impl Iterator<Item = &Slot> {
        self.space(space).into_iter().flat_map(move |space| {
            // SAFETY: whoever has `&self` holds the version; the iterator borrows it.
            let mut walk = unsafe { Walk::new(space.gfns, from, last) };
            core::iter::from_fn(move || {
                // SAFETY: as above.
                unsafe { space.ids.find(walk.next()?) }
            })
        })
    }

    /// The ranges of `gfns` that no slot covers, in order.
    pub fn holes_in(&self, space: AddressSpaceId, gfns: GfnRange) -> impl Iterator<Item = GfnRange> {
        let pieces = self.slots_in(space, gfns).map(|piece| piece.gfns);
        // An empty range at the end closes the last hole.
        let pieces = pieces.chain(GfnRange::with_len(gfns.end(), 0));
        let mut from = gfns.start();
        pieces.filter_map(move |piece| {
            let hole = GfnRange::new(from, piece.start())?;
            from = piece.end();
            (!hole.is_empty()).then_some(hole)
        })
    }

    /// The slots of an address space that stand on host memory of `hvas`: aliases are all there. Ordered by
    /// host address and id.
    ///
    /// ```
    /// # use memslot::*;
    /// # let mut table = SlotTable::new(Limits::default())?;
    /// # let ram = AddressSpaceId::NORMAL;
    /// # for (id, base) in [(0, 0xa0), (1, 0xfd000)] {
    /// #     table.create(SlotSpec { address_space: ram, id: SlotId::new(id),
    /// #         gfns: GfnRange::with_len(Gfn::new(base), 16).unwrap(),
    /// #         backing: Backing::Host { hva: Hva::new(0x7000_0000) }, flags: SlotFlags::empty() })?;
    /// # }
    /// // Both slots show the same 64 KiB of video memory.
    /// let page = HvaRange::with_len(Hva::new(0x7000_3000), 4096).unwrap();
    /// let gfns: Vec<_> = table.view().slots_at_hva(ram, page).map(|hit| hit.gfns.start().get()).collect();
    /// assert_eq!(gfns, [0xa3, 0xfd003]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn slots_at_hva(&self, space: AddressSpaceId, hvas: HvaRange) -> impl Iterator<Item = HvaHit<'_>> {
        let shift = self.page_size().shift();
        // An empty range overlaps nothing, wherever it lies.
        let (first, end) = if hvas.is_empty() {
            (0, 0)
        } else {
            (hvas.start().get() >> shift, ((hvas.end().get() - 1) >> shift) + 1)
        };
        self.ids_at_host_pages(space, first, end).filter_map(move |id| {
            let slot = self.slot(space, SlotId::new(id))?;
            let base = slot.hva()?.get() >> shift;
            let from = first.max(base) - base;
            let len = (end - base).min(slot.pages()) - from;
            let gfns = GfnRange::with_len(slot.base_gfn().checked_add(from)?, len)?;
            let hvas = HvaRange::with_len(Hva::new((base + from) << shift), len << shift)?;
            Some(HvaHit { gfns, hvas, slot })
        })
    }

    /// The ids of the slots that stand on the host page of `hva`; the quick form of
    /// [`slots_at_hva`](Self::slots_at_hva).
    #[inline]
    pub fn slot_ids_at_hva(&self, space: AddressSpaceId, hva: Hva) -> impl Iterator<Item = SlotId> {
        let page = hva.get() >> self.page_size().shift();
        self.ids_at_host_pages(space, page, page + 1).map(SlotId::new)
    }

    #[inline]
    fn ids_at_host_pages(&self, space: AddressSpaceId, first: u64, end: u64) -> impl Iterator<Item = u32> {
        let index = self.space(space).map_or(HvaIndex::EMPTY, |space| space.hvas);
        // SAFETY: whoever has `&self` holds the version; the iterator borrows it.
        let mut search = unsafe { Search::new(index, first, end) };
        // SAFETY: as above.
        core::iter::from_fn(move || unsafe { search.next() })
    }
}

#[inline]
pub(super) fn translation(found: &Found, gpa: Gpa, page: PageSize) -> Option<Translation> {
    let within = gpa.offset_in_page(page);
    Some(Translation {
        hva: Hva::new(found.hva(gpa.get())?),
        bytes_left: (u64::from(found.pages_left) << page.shift()) - within,
        slot: SlotId::new(found.id()),
        flags: found.flags(),
    })
}

impl core::fmt::Debug for View {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut map = f.debug_map();
        map.entry(&"generation", &self.generation);
        for space in self.address_spaces() {
            map.entries(self.slots(space).map(|slot| ((space, slot.id()), slot)));
        }
        map.finish()
    }
}
