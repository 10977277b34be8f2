//! The dirty engine: marking, harvesting, memory; beside vm-memory's `AtomicBitmap` and the kernel's ioctls.
//!
//! A harvest of ours is everything a migration does with it: take, have it as runs, commit. The peer's is
//! `get_and_reset`, and a walk over the words where the row says "as runs". A row that only shows our best case has
//! its less good neighbour beside it: a range that was marked at once and one that was marked page by page.

mod harvest;
mod kernel;
mod mark;

use memslot::dirty::{Consumer, DirtyLog, Harvest, SoftwareOnly};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, OutOfMemory, SlotFlags, SlotId, SlotSpec, SlotTable,
};

use crate::Effort;
use crate::report::{Report, Row};

pub(crate) const PAGE: usize = 4096;
pub(crate) const GIB: usize = 1 << 30;

pub(crate) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    mark::run(effort, report);
    harvest::run(effort, report)?;
    kernel::run(effort, report)?;
    memory(report)
}

/// A table with one logged slot of so many bytes at 0.
pub(crate) struct Guest {
    // The log follows the table.
    _table: SlotTable,
    pub(crate) log: DirtyLog,
    pub(crate) consumer: Consumer,
    pub(crate) gfns: GfnRange,
}

impl Guest {
    pub(crate) fn new(bytes: usize) -> anyhow::Result<Self> {
        Self::with(bytes, DirtyLog::attach)
    }

    /// With marks that leave alone what is marked. `None` where the system does not give the fence for it.
    pub(crate) fn fenced(bytes: usize) -> anyhow::Result<Option<Self>> {
        #[cfg(target_os = "linux")]
        if let Ok(fence) = memslot::dirty::Membarrier::new() {
            return Self::with(bytes, |table| DirtyLog::attach_with_fence(table, Box::new(fence))).map(Some);
        }
        Ok(None)
    }

    fn with(
        bytes: usize,
        attach: impl FnOnce(&mut SlotTable) -> Result<DirtyLog, OutOfMemory>,
    ) -> anyhow::Result<Self> {
        let mut table = SlotTable::new(Limits::default())?;
        let log = attach(&mut table)?;
        let consumer = log.consumer()?;
        let gfns = gfns(0, bytes / PAGE);
        table.create(SlotSpec {
            address_space: AddressSpaceId::NORMAL,
            id: SlotId::new(0),
            gfns,
            backing: Backing::Host { hva: Hva::new(0x2000_0000_0000) },
            flags: SlotFlags::LOG_DIRTY_PAGES,
        })?;
        Ok(Self { _table: table, log, consumer, gfns })
    }

    pub(crate) fn mark(&self, page: usize) {
        self.log.mark(AddressSpaceId::NORMAL, Gfn::new(page as u64));
    }

    pub(crate) fn harvest(&self) -> Harvest<'_> {
        self.consumer.harvest(&mut SoftwareOnly).unwrap_or_else(|error| panic!("{error}"))
    }
}

pub(crate) fn gfns(first: usize, pages: usize) -> GfnRange {
    GfnRange::with_len(Gfn::new(first as u64), pages as u64).unwrap_or_default()
}

/// So many different pages below `pages`, in no order.
pub(crate) fn random_pages(pages: usize, count: usize) -> Vec<usize> {
    // A full cycle of a linear congruential generator: `pages` is a power of two.
    let mut at = 12345usize;
    (0..count)
        .map(|_| {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407) % pages;
            at
        })
        .collect()
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn memory(report: &mut Report) -> anyhow::Result<()> {
    for (name, marks, target) in
        [("bytes of a clean log", 0, Some(64.0)), ("bytes after 1000 scattered marks", 1000, None)]
    {
        if !report.wants(name) {
            continue;
        }
        let guest = Guest::new(1024 * GIB)?;
        let pages = 1024 * GIB / PAGE;
        (0..marks).for_each(|mark| guest.mark(mark * (pages / 1000)));
        let (ours, kernel) = (guest.log.bytes() as f64, 2.0 * pages as f64 / 8.0);
        let kib = |bytes: f64| format!("{:.1} KiB", bytes / 1024.0);
        let row = Row {
            bench: name.to_owned(),
            at: "1 TiB".to_owned(),
            ours_ns: ours,
            peer: "kernel: two bitmaps".to_owned(),
            peer_ns: Some(kernel),
            ratio: Some(kernel / ours),
            target,
        };
        report.add(row, &kib(ours), &kib(kernel));
    }
    Ok(())
}
