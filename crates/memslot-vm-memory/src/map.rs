//! slot id → region, as a version carries it.
//!
//! A persistent table: chunks of neighbouring ids, each counted. A commit copies the chunks that have a changed slot
//! and the list of chunks; all others are shared with the version before.

use std::ptr::NonNull;
use std::sync::Arc;

use memslot::{AddressSpaceId, SlotId};

use crate::region::Region;

/// Ids in a chunk.
const IDS: u32 = 16;

type Chunk<B> = [Option<Region<B>>; IDS as usize];

/// The regions of one address space in one version.
pub(crate) struct Map<B> {
    /// Whose map it is: a number that no two spaces have.
    pub(crate) owner: u64,
    pub(crate) space: AddressSpaceId,
    regions: usize,
    /// The largest region, as of the last [`seal`](Self::seal): most accesses of most guests are there.
    main: Option<NonNull<Region<B>>>,
    chunks: Vec<Option<Arc<Chunk<B>>>>,
}

// SAFETY: `main` is a reference to something of the map's own.
unsafe impl<B: Send + Sync> Send for Map<B> {}
// SAFETY: as above.
unsafe impl<B: Send + Sync> Sync for Map<B> {}

const _: () = assert!(size_of::<Option<Region<()>>>() == 32, "an empty place costs no extra room");

impl<B> Clone for Map<B> {
    fn clone(&self) -> Self {
        Self {
            owner: self.owner,
            space: self.space,
            regions: self.regions,
            main: None,
            chunks: self.chunks.clone(),
        }
    }
}

impl<B> Map<B> {
    pub(crate) const fn empty(owner: u64, space: AddressSpaceId) -> Self {
        Self { owner, space, regions: 0, main: None, chunks: Vec::new() }
    }

    /// How many regions there are.
    pub(crate) const fn len(&self) -> usize {
        self.regions
    }

    /// The region of the slot with this id.
    #[inline]
    pub(crate) fn get(&self, id: SlotId) -> Option<&Region<B>> {
        let chunk = self.chunks.get((id.get() / IDS) as usize)?.as_ref()?;
        chunk[(id.get() % IDS) as usize].as_ref()
    }

    /// The largest region, if the map is sealed.
    #[inline]
    pub(crate) fn main(&self) -> Option<&Region<B>> {
        // SAFETY: it stands in a chunk that the map has, and is not changed as long as `main` is set.
        self.main.map(|main| unsafe { main.as_ref() })
    }

    /// Finds the largest region: the map is complete.
    pub(crate) fn seal(mut self) -> Self {
        let regions = self.chunks.iter().flatten().flat_map(|chunk| chunk.iter().flatten());
        self.main = regions.max_by_key(|region| region.slot().pages()).map(NonNull::from);
        self
    }

    /// Puts a region under an id, or takes away what is there.
    pub(crate) fn set(&mut self, id: SlotId, region: Option<Region<B>>) {
        let (at, within) = ((id.get() / IDS) as usize, (id.get() % IDS) as usize);
        if at >= self.chunks.len() {
            if region.is_none() {
                return;
            }
            self.chunks.resize_with(at + 1, || None);
        }
        self.main = None;
        let chunk = self.chunks[at].get_or_insert_with(|| Arc::new([const { None }; IDS as usize]));
        let chunk = Arc::make_mut(chunk);
        self.regions += usize::from(region.is_some());
        self.regions -= usize::from(chunk[within].is_some());
        chunk[within] = region;
        if chunk.iter().all(Option::is_none) {
            self.chunks[at] = None;
            while self.chunks.last().is_some_and(Option::is_none) {
                self.chunks.pop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use memslot::{Backing, Gfn, GfnRange, Hva, Limits, SlotFlags, SlotSpec, SlotTable};

    use super::*;
    use crate::host::HostMemory;

    fn region(id: u32) -> Region<()> {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let spec = SlotSpec {
            address_space: AddressSpaceId::NORMAL,
            id: SlotId::new(id),
            gfns: GfnRange::with_len(Gfn::new(u64::from(id)), 1).unwrap(),
            backing: Backing::Host { hva: Hva::new(0x1000) },
            flags: SlotFlags::empty(),
        };
        table.create(spec).unwrap();
        let slot = *table.view().slot(spec.address_space, spec.id).unwrap();
        Region::new(&slot, HostMemory::new(), ()).unwrap()
    }

    #[test]
    fn versions_share_the_chunks_that_did_not_change() {
        let mut map = Map::empty(1, AddressSpaceId::NORMAL);
        for id in [0, 1, IDS, 5 * IDS] {
            map.set(SlotId::new(id), Some(region(id)));
        }
        let before = map.clone();
        map.set(SlotId::new(1), None);
        map.set(SlotId::new(5 * IDS), None);
        map.set(SlotId::new(9 * IDS), None);
        assert_eq!((map.len(), before.len()), (2, 4));
        assert_eq!(map.chunks.len(), 2, "empty chunks at the end go");
        assert!(before.get(SlotId::new(1)).is_some() && map.get(SlotId::new(1)).is_none());
        let of = |map: &Map<()>, at: usize| map.chunks[at].as_ref().map(Arc::as_ptr);
        assert_ne!(of(&map, 0), of(&before, 0));
        assert_eq!(of(&map, 1), of(&before, 1));
        assert_eq!(map.get(SlotId::new(IDS)).unwrap().slot().id(), SlotId::new(IDS));
    }
}
