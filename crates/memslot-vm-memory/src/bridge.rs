//! The bridge: an ordinary `GuestMemoryAtomic<GuestMemoryMmap<B>>` that follows the table.
//!
//! Much of a VMM names vm-memory's own types, and some crates take no others (vhost-user-backend). Here the table
//! owns the truth and publishes it in their form after each commit; devices, loaders and backends stay as they are.
//!
//! A region is made when its slot is, over the mapping that the VMM has made, and shared by every map until the slot
//! changes. A map is vm-memory's vector of regions, so each commit costs time in proportion to the number of slots,
//! and a lookup a binary search: what the [native mode](crate::Space) is spared.
//!
//! Two versions of the truth are published one after the other: a reader of the table sees a change a moment before
//! a reader of the map. When a later listener fails, the map goes back to what it was.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use memslot::dirty::DirtyLog;
use memslot::{AddressSpaceId, HvaRange, Listener, ListenerError, Slot, SlotId, SlotTable, Update, View};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionCollectionError,
    GuestRegionMmap,
};

use crate::host::{Describe, HostMemory};
use crate::log::{BridgedLog, Marks, MarksFollower};
use crate::region::to_usize;
use crate::space::{AttachError, NativeError};

/// Makes the bitmap of a region that is new, from those of the regions that had its memory before.
type MakeBitmap<B> = Box<dyn FnMut(&Slot, u64, &[Origin<'_, B>]) -> B + Send>;

/// Makes a `GuestMemoryAtomic<GuestMemoryMmap<B>>` that follows one of a table's address spaces.
///
/// ```
/// # use memslot::*;
/// use memslot_vm_memory::Bridge;
/// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
///
/// let mut table = SlotTable::new(Limits::default())?;
/// // SAFETY: the table has no slots yet; those below stand on memory that stays mapped.
/// let memory: GuestMemoryAtomic<GuestMemoryMmap> =
///     unsafe { Bridge::new(AddressSpaceId::NORMAL).attach(&mut table)? };
///
/// # let mapping: vm_memory::MmapRegion = vm_memory::MmapRegion::new(0x10_0000)?;
/// # let hva = Hva::new(mapping.as_ptr().expose_provenance() as u64);
/// # let ram = AddressSpaceId::NORMAL;
/// // 1 MiB at `hva`, which the VMM has mapped. The last page becomes a slot of its own.
/// table.create(SlotSpec {
///     address_space: ram,
///     id: SlotId::new(0),
///     gfns: GfnRange::with_len(Gfn::new(0), 256).unwrap(),
///     backing: Backing::Host { hva },
///     flags: SlotFlags::empty(),
/// })?;
/// memory.memory().write_obj(0x1122_u16, GuestAddress(0xf_efff))?;
/// table.transaction(|tx| tx.split(ram, SlotId::new(0), Gfn::new(255), SlotId::new(1)))?;
/// assert_eq!(memory.memory().read_obj::<u16>(GuestAddress(0xf_efff))?, 0x1122);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Bridge<B = ()> {
    space: AddressSpaceId,
    describe: Describe,
    make: Make<B>,
}

enum Make<B> {
    Bitmap(MakeBitmap<B>),
    Log(DirtyLog, fn(Arc<Marks>, &Slot, u64) -> B),
}

/// A region that had some of a new region's memory before.
///
/// What it marked must not be lost with it. A bitmap that is a slice of something larger (`ArcSlice`) gives the new
/// region a slice of the same; others are read with [`carry_to`](Self::carry_to). A device that holds an older guard
/// still marks the old bitmap, so only the first way misses nothing. [`BridgedLog`] has no such trouble.
#[derive(Debug)]
pub struct Origin<'a, B> {
    /// The slot as it was.
    pub slot: &'a Slot,
    /// Its region's bitmap.
    pub bitmap: &'a B,
    /// Where the common memory begins in the old region, in bytes.
    pub offset: usize,
    /// Where it begins in the new region.
    pub at: usize,
    /// How long it is, in bytes.
    pub len: usize,
}

impl<B: Bitmap> Origin<'_, B> {
    /// Marks in the new region's bitmap what is dirty in the old one's; looks at each page.
    pub fn carry_to(&self, bitmap: &B) {
        let page = to_usize(self.slot.page_size().bytes());
        for further in (0..self.len).step_by(page) {
            if self.bitmap.dirty_at(self.offset + further) {
                bitmap.mark_dirty(self.at + further, page);
            }
        }
    }
}

/// A slot that vm-memory cannot have as a region.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BridgeError {
    /// A region must end before the end of the address space.
    #[error("{0} ends where a region cannot")]
    AddressSpaceEnd(Slot),
    /// vm-memory does not take the mapping.
    #[error("{0}: {1}")]
    Mapping(Slot, #[source] MmapRegionError),
    /// vm-memory does not take the map.
    #[error(transparent)]
    Map(#[from] GuestRegionCollectionError),
}

impl Bridge {
    /// Of this address space, without bitmaps.
    #[must_use]
    pub fn new(space: AddressSpaceId) -> Self {
        Self {
            space,
            describe: Box::new(|_| Ok(HostMemory::new())),
            make: Make::Bitmap(Box::new(|_, _, _| ())),
        }
    }

    /// Writes through the regions mark `log`, which is a log of the same table.
    #[must_use]
    pub fn with_log(self, log: &DirtyLog) -> Bridge<BridgedLog> {
        Bridge { space: self.space, describe: self.describe, make: Make::Log(log.clone(), BridgedLog::new) }
    }

    /// Each region gets the bitmap that `make` makes for its slot, from what had its memory before.
    #[must_use]
    pub fn with_bitmaps<B: Bitmap + Send + Sync + 'static>(
        self,
        mut make: impl FnMut(&Slot, &[Origin<'_, B>]) -> B + Send + 'static,
    ) -> Bridge<B> {
        let make: MakeBitmap<B> = Box::new(move |slot, _, origins| make(slot, origins));
        Bridge { space: self.space, describe: self.describe, make: Make::Bitmap(make) }
    }
}

impl<B: Bitmap + Send + Sync + 'static> Bridge<B> {
    /// Asks `describe` what stands behind each slot, once for every slot that is new or has changed.
    ///
    /// What it [keeps](HostMemory::keeping) is kept until no map and no guard has the region; it is looked at with
    /// each change. An error stops the transaction.
    #[must_use]
    pub fn describe(
        mut self,
        describe: impl FnMut(&Slot) -> Result<HostMemory, ListenerError> + Send + 'static,
    ) -> Self {
        self.describe = Box::new(describe);
        self
    }

    /// Makes the map, of the slots that the table has, and follows the table from now on.
    ///
    /// # Errors
    /// [`NativeError`]; the table is as it was.
    ///
    /// # Safety
    /// As [`Native::attach`](crate::Native::attach); and what is mapped stays as long as anybody has a map with a
    /// region of the slot.
    pub unsafe fn attach(
        self,
        table: &mut SlotTable,
    ) -> Result<GuestMemoryAtomic<GuestMemoryMmap<B>>, NativeError> {
        let Self { space, describe, make } = self;
        if !table.view().address_spaces().any(|known| known == space) {
            return Err(AttachError::NoSuchAddressSpace(space).into());
        }
        let mut marks = None;
        let make = match make {
            Make::Bitmap(make) => make,
            Make::Log(log, make) => {
                let of_all = Arc::new(Marks::new(log, table.handle(), space, table.view()));
                marks = Some(MarksFollower::new(of_all.clone(), table.view()));
                Box::new(move |slot: &Slot, generation, _: &[Origin<'_, B>]| {
                    make(of_all.clone(), slot, generation)
                })
            }
        };
        let atomic = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut follower = Follower {
            space,
            describe,
            make,
            marks,
            atomic: Some(atomic.clone()),
            regions: HashMap::new(),
            prepared: None,
            before: None,
            retired: Vec::new(),
        };
        for slot in table.view().slots(space) {
            let region = follower.region(slot, table.view(), None);
            if let Some(region) = region.map_err(|error| NativeError::Describe { slot: *slot, error })? {
                follower.regions.insert(slot.id(), region);
            }
        }
        let map = follower.map(table.view(), &HashMap::new());
        let map = map.map_err(|error| AttachError::Map(error.to_string()))?;
        follower.publish(map);
        table.add_listener(Box::new(follower)).map_err(AttachError::from)?;
        Ok(atomic)
    }
}

type Map<B> = GuestMemoryMmap<B>;
/// The regions of slots that changed; `None` for those that went.
type Changed<B> = HashMap<SlotId, Option<Kept<B>>>;

/// A region, and what it stands on.
struct Kept<B> {
    slot: Slot,
    region: Arc<GuestRegionMmap<B>>,
    keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl<B: Bitmap> Kept<B> {
    fn is_used_elsewhere(&self) -> bool {
        // The region has its mapping, and so does what asks for it.
        Arc::strong_count(&self.region) > 1 || Arc::strong_count(&self.region.get_mmap()) > 2
    }
}

/// The listener behind a bridge.
struct Follower<B: Bitmap> {
    space: AddressSpaceId,
    describe: Describe,
    make: MakeBitmap<B>,
    marks: Option<MarksFollower>,
    /// `None` while it is dropped.
    atomic: Option<GuestMemoryAtomic<Map<B>>>,
    regions: HashMap<SlotId, Kept<B>>,
    prepared: Option<(Changed<B>, Map<B>)>,
    /// What the last commit replaced.
    before: Option<(Changed<B>, Map<B>)>,
    /// Regions that some map may have still.
    retired: Vec<Kept<B>>,
}

impl<B: Bitmap> Follower<B> {
    fn region(
        &mut self,
        slot: &Slot,
        after: &View,
        before: Option<&View>,
    ) -> Result<Option<Kept<B>>, ListenerError> {
        let Some(hvas) = slot.hvas() else { return Ok(None) };
        let HostMemory { file_offset, hugetlbfs, keep } = (self.describe)(slot)?;
        let len = to_usize(hvas.len());
        let mut origins = Vec::new();
        for hit in before.into_iter().flat_map(|before| before.slots_at_hva(self.space, hvas)) {
            if let Some(kept) = self.regions.get(&hit.slot.id()) {
                origins.extend(Origin::new(kept, &hit.hvas, &hvas));
            }
        }
        let bitmap = (self.make)(slot, after.generation(), &origins);
        let host = std::ptr::with_exposed_provenance_mut(to_usize(hvas.start().get()));
        let flags = match file_offset {
            Some(_) => libc::MAP_SHARED,
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        };
        let builder = MmapRegionBuilder::new_with_bitmap(len, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags | libc::MAP_NORESERVE);
        let builder = file_offset.into_iter().fold(builder, MmapRegionBuilder::with_file_offset);
        let builder = hugetlbfs.into_iter().fold(builder, MmapRegionBuilder::with_hugetlbfs);
        // SAFETY: by the promise of `Bridge::attach` the slot's host memory is mapped.
        let builder = unsafe { builder.with_raw_mmap_pointer(host) };
        let mapping = builder.build().map_err(|error| BridgeError::Mapping(*slot, error))?;
        let start = GuestAddress(slot.base_gfn().get() << slot.page_size().shift());
        let region = GuestRegionMmap::new(mapping, start).ok_or(BridgeError::AddressSpaceEnd(*slot))?;
        Ok(Some(Kept { slot: *slot, region: Arc::new(region), keep }))
    }

    /// The map of a version, with changes that are not in `regions` yet.
    fn map(&self, view: &View, changed: &Changed<B>) -> Result<Map<B>, BridgeError> {
        let find = |slot: &Slot| match changed.get(&slot.id()) {
            Some(changed) => changed.as_ref(),
            None => self.regions.get(&slot.id()),
        };
        let regions: Vec<_> =
            view.slots(self.space).filter_map(|slot| Some(find(slot)?.region.clone())).collect();
        // vm-memory makes an empty map in another way.
        if regions.is_empty() { Ok(Map::new()) } else { Ok(Map::from_arc_regions(regions)?) }
    }

    /// Publishes a map and returns the one before.
    fn publish(&self, map: Map<B>) -> Map<B> {
        let Some(atomic) = &self.atomic else { return map };
        // Nobody else replaces the map, but anybody may take the lock.
        let lock = atomic.lock().unwrap_or_else(PoisonError::into_inner);
        let before = (*atomic.memory()).clone();
        lock.replace(map);
        before
    }

    /// Puts changes into `regions`; returns what was there.
    fn apply(&mut self, changed: Changed<B>) -> Changed<B> {
        let regions = &mut self.regions;
        let swap = |(id, new)| match new {
            Some(new) => (id, regions.insert(id, new)),
            None => (id, regions.remove(&id)),
        };
        changed.into_iter().map(swap).collect()
    }

    /// Lets go of what no map has any more.
    fn sweep(&mut self) {
        if let Some((changed, map)) = self.before.take() {
            drop(map);
            self.retired.extend(changed.into_values().flatten());
        }
        self.retired.retain(|kept| kept.keep.is_some() && kept.is_used_elsewhere());
    }
}

impl<'a, B: Bitmap> Origin<'a, B> {
    /// The part of an old region's memory that lies in `new`.
    fn new(kept: &'a Kept<B>, common: &HvaRange, new: &HvaRange) -> Option<Self> {
        let old = kept.slot.hvas()?;
        Some(Self {
            slot: &kept.slot,
            bitmap: (**kept.region).bitmap(),
            offset: to_usize(common.start().get() - old.start().get()),
            at: to_usize(common.start().get() - new.start().get()),
            len: to_usize(common.len()),
        })
    }
}

impl<B: Bitmap + Send + Sync> Listener for Follower<B> {
    fn name(&self) -> &str {
        "vm-memory bridge"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        self.sweep();
        let space = self.space;
        let mut changed = HashMap::new();
        for change in update.slots {
            let Some(slot) = change.new.or(change.old).filter(|slot| slot.address_space() == space) else {
                continue;
            };
            let region = match change.new {
                Some(new) => self.region(&new, update.after, Some(update.before))?,
                None => None,
            };
            changed.insert(slot.id(), region);
        }
        if !changed.is_empty() {
            let map = self.map(update.after, &changed)?;
            self.prepared = Some((changed, map));
        }
        if let Some(marks) = &mut self.marks {
            marks.prepare(update);
        }
        Ok(())
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if let Some((changed, map)) = self.prepared.take() {
            let map = self.publish(map);
            self.before = Some((self.apply(changed), map));
        }
        if let Some(marks) = &self.marks {
            marks.commit();
        }
        Ok(())
    }

    fn undo(&mut self, update: &Update<'_>) {
        if let Some(marks) = &mut self.marks {
            marks.take_back(update);
        }
        if let Some((changed, map)) = self.before.take() {
            drop(self.publish(map));
            let undone = self.apply(changed);
            self.retired.extend(undone.into_values().flatten());
        }
    }

    fn abort(&mut self, update: &Update<'_>) {
        if let Some(marks) = &mut self.marks {
            marks.take_back(update);
        }
        self.prepared = None;
    }
}

impl<B: Bitmap> Drop for Follower<B> {
    /// The table goes, the map may stay: what its memory stands on is left where it is.
    fn drop(&mut self) {
        self.atomic = None;
        self.prepared = None;
        self.sweep();
        let regions = self.regions.drain().map(|(_, kept)| kept);
        for kept in regions.chain(self.retired.drain(..)).filter(Kept::is_used_elsewhere) {
            std::mem::forget(kept.keep);
        }
    }
}
