//! vm-memory's own region collection with regions that have no real memory behind them.

use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize};

use crate::layout::{Piece, creation_order};

/// As large as a `GuestRegionMmap`, and what a lookup wants from it.
pub(crate) struct Region {
    start: u64,
    len: u64,
    pub(crate) hva: u64,
    _rest: [u64; 5],
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, ()> {}
}

impl GuestMemoryRegionBytes for Region {}

pub(crate) type Collection = GuestRegionCollection<Region>;

pub(crate) fn region(piece: &Piece) -> Arc<Region> {
    Arc::new(Region { start: piece.gpa, len: piece.size, hva: piece.hva, _rest: [0; 5] })
}

/// The collection with these regions, allocated in the order in which they were created.
pub(crate) fn collection(pieces: &[Piece]) -> anyhow::Result<Collection> {
    let mut regions: Vec<_> = creation_order(pieces).iter().map(region).collect();
    regions.sort_by_key(|region| region.start);
    Ok(GuestRegionCollection::from_arc_regions(regions)?)
}
