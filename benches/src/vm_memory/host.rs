//! Both sides, on the same host memory.

use memslot::dirty::DirtyLog;
use memslot::{SlotFlags, SlotSpec, SlotTable};
use memslot_vm_memory::{Native, SlotLog, Space};
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};

use crate::layout::{PAGE, Piece, Random, creation_order, layout};

pub(crate) type Peer<B> = GuestMemoryAtomic<GuestMemoryMmap<B>>;

/// A table of slots with real memory, and the same as vm-memory's own map.
pub(crate) struct Sides {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) table: SlotTable,
    pub(crate) ours: Space,
    pub(crate) peer: Peer<()>,
}

impl Sides {
    pub(crate) fn new(n: usize) -> anyhow::Result<Self> {
        let pieces = mapped(n)?;
        let mut table = table_of(&pieces, SlotFlags::empty())?;
        // SAFETY: the slots' memory is mapped for good.
        let ours = unsafe { Native::new(crate::layout::SPACE).attach(&mut table) }?;
        let peer = peer(&pieces)?;
        Ok(Self { pieces, table, ours, peer })
    }

    /// Addresses to access, in random order, one cache line in each region: what is measured is finding the region, not
    /// waiting for memory.
    pub(crate) fn addresses(&self, count: usize) -> Vec<u64> {
        addresses(&self.pieces, count)
    }
}

pub(crate) fn addresses(pieces: &[Piece], count: usize) -> Vec<u64> {
    let mut random = Random::new(777);
    let mut address = || {
        let at = random.below(pieces.len());
        // Not the same line of each page, which would be in the same set of the cache.
        pieces[at].gpa + 1024 + 64 * (at as u64 % 47) + 8 * random.below(8) as u64
    };
    (0..count).map(|_| address()).collect()
}

/// Both sides with a dirty log of their own kind.
pub(crate) struct Logged {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) _table: SlotTable,
    pub(crate) log: DirtyLog,
    pub(crate) ours: Space<SlotLog>,
    pub(crate) peer: Peer<AtomicBitmap>,
}

impl Logged {
    pub(crate) fn new(n: usize) -> anyhow::Result<Self> {
        let pieces = mapped(n)?;
        let mut table = table_of(&pieces, SlotFlags::LOG_DIRTY_PAGES)?;
        let log = DirtyLog::attach(&mut table)?;
        // SAFETY: the slots' memory is mapped for good.
        let ours = unsafe { Native::new(crate::layout::SPACE).with_log(&log).attach(&mut table) }?;
        let peer = peer(&pieces)?;
        Ok(Self { pieces, _table: table, log, ours, peer })
    }
}

fn table_of(pieces: &[Piece], flags: SlotFlags) -> anyhow::Result<SlotTable> {
    let mut table = SlotTable::new(memslot::Limits::default())?;
    for piece in creation_order(pieces) {
        table.create(SlotSpec { flags, ..piece.spec() })?;
    }
    Ok(table)
}

fn peer<B: NewBitmap>(pieces: &[Piece]) -> anyhow::Result<Peer<B>> {
    let mut regions = Vec::new();
    for piece in creation_order(pieces) {
        regions.push(std::sync::Arc::new(region(&piece)?));
    }
    regions.sort_by_key(|region| vm_memory::GuestMemoryRegion::start_addr(&**region));
    Ok(GuestMemoryAtomic::new(GuestMemoryMmap::from_arc_regions(regions)?))
}

pub(crate) fn region<B: NewBitmap>(piece: &Piece) -> anyhow::Result<GuestRegionMmap<B>> {
    let len = usize::try_from(piece.size)?;
    let host = std::ptr::with_exposed_provenance_mut(usize::try_from(piece.hva)?);
    let builder = MmapRegionBuilder::new_with_bitmap(len, B::with_len(len));
    // SAFETY: the piece is mapped for good.
    let mapping: MmapRegion<B> = unsafe { builder.with_raw_mmap_pointer(host) }
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()?;
    GuestRegionMmap::new(mapping, GuestAddress(piece.gpa)).ok_or_else(|| anyhow::anyhow!("does not fit"))
}

/// The usual layout, with memory that stays mapped until the process ends.
fn mapped(n: usize) -> anyhow::Result<Vec<Piece>> {
    let mut pieces = layout(n);
    let first = pieces.iter().map(|piece| piece.hva).min().unwrap_or(0);
    let end = pieces.iter().map(|piece| piece.hva + piece.size).max().unwrap_or(0);
    // SAFETY: a new anonymous mapping touches nothing that is there.
    let host = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            usize::try_from(end - first)?,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    anyhow::ensure!(host != libc::MAP_FAILED, "no memory for {n} regions");
    let host = host.expose_provenance() as u64;
    for piece in &mut pieces {
        piece.hva = host + (piece.hva - first);
        anyhow::ensure!(piece.hva % PAGE == 0, "not aligned");
    }
    Ok(pieces)
}
