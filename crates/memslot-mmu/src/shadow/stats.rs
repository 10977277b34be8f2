//! What there is, and what was done so far.

use super::ShadowHost;
use super::shared::{Locked, everything};
use crate::level::Level;
use crate::sync::{AtomicU64, Ordering};

/// Into how many classes [`ShadowStats::rmap_lengths`] sorts: of 1, 2, up to 4, up to 8 … entries.
pub const RMAP_CLASSES: usize = 16;

/// What shadow tables cost, and what was done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct ShadowStats {
    /// Shadow pages that can be found: linked, or kept for later.
    pub pages: usize,
    /// Of these, those that map guest memory as it is and shadow no table.
    pub direct: usize,
    /// Shadow pages by level.
    pub levels: [usize; 5],
    /// Those that are unsync at the moment.
    pub unsync: usize,
    /// Entries that map guest memory.
    pub leaves: usize,
    /// Tables that exist: those of shadow pages, in caches, and waiting to be freed.
    pub tables: usize,
    /// Roots that were loaded.
    pub loads: u64,
    /// INVLPGs.
    pub invlpgs: u64,
    /// Faults, those included that needed the fast path only.
    pub faults: u64,
    /// Faults that needed the fast path only.
    pub fast_faults: u64,
    /// Faults that the guest got.
    pub injected: u64,
    /// Faults that came to a table of the guest's in no memory.
    pub no_table: u64,
    /// Entries that remember, at the moment, that there is no memory.
    pub mmio: usize,
    /// How many of them were made.
    pub mmio_made: u64,
    /// Faults that were resolved by one of them, without a walk.
    pub mmio_hits: u64,
    /// Faults that came to one that was of another version of the slots.
    pub mmio_stale: u64,
    /// Entries that were made ahead of their fault.
    pub prefetched: u64,
    /// Shadow pages that were made.
    pub created: u64,
    /// Shadow pages that were given up, for whatever reason.
    pub zapped: u64,
    /// Of these, for want of room.
    pub reclaimed: u64,
    /// Of these, because they were written too often.
    pub flooded: u64,
    /// Of these, for a large page to take their place.
    pub collapsed: u64,
    /// Writes to write-protected tables of the guest.
    pub write_track_hits: u64,
    /// How often a table became unsync.
    pub unsyncs: u64,
    /// How often one was compared with the guest's.
    pub syncs: u64,
    /// Entries that were given up or changed by that.
    pub synced_entries: u64,
    /// Flushes.
    pub flushes: u64,
    /// How many pages of guest memory have so many entries that map them, by length: see [`RMAP_CLASSES`].
    pub rmap_lengths: [u64; RMAP_CLASSES],
}

macro_rules! counters {
    ($($name:ident),*) => {
        /// What is counted.
        #[derive(Clone, Copy)]
        pub(super) enum Counter {
            $($name,)*
        }

        const COUNTERS: usize = [$(Counter::$name as usize),*].len();
    };
}

counters!(
    Loads,
    Invlpgs,
    Faults,
    FastFaults,
    Injected,
    NoTable,
    MmioMade,
    MmioHits,
    MmioStale,
    Prefetched,
    Created,
    Zapped,
    Reclaimed,
    Flooded,
    Collapsed,
    TrackHits,
    Unsyncs,
    Syncs,
    SyncedEntries,
    Flushes
);

/// What was counted.
pub(super) struct Counters {
    counts: [AtomicU64; COUNTERS],
    /// How many entries map guest memory at the moment.
    pub(super) leaves: AtomicU64,
    /// How many remember that there is none.
    pub(super) mmio: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            counts: core::array::from_fn(|_| AtomicU64::new(0)),
            leaves: AtomicU64::new(0),
            mmio: AtomicU64::new(0),
        }
    }
}

impl Counters {
    pub(super) fn add(&self, counter: Counter, count: u64) {
        self.counts[counter as usize].fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self, counter: Counter) -> u64 {
        self.counts[counter as usize].load(Ordering::Relaxed)
    }

    /// The counters; the rest is 0.
    pub(super) fn stats(&self) -> ShadowStats {
        ShadowStats {
            leaves: usize::try_from(self.leaves.load(Ordering::Relaxed)).unwrap_or(usize::MAX),
            loads: self.get(Counter::Loads),
            invlpgs: self.get(Counter::Invlpgs),
            faults: self.get(Counter::Faults),
            fast_faults: self.get(Counter::FastFaults),
            injected: self.get(Counter::Injected),
            no_table: self.get(Counter::NoTable),
            mmio: usize::try_from(self.mmio.load(Ordering::Relaxed)).unwrap_or(usize::MAX),
            mmio_made: self.get(Counter::MmioMade),
            mmio_hits: self.get(Counter::MmioHits),
            mmio_stale: self.get(Counter::MmioStale),
            prefetched: self.get(Counter::Prefetched),
            created: self.get(Counter::Created),
            zapped: self.get(Counter::Zapped),
            reclaimed: self.get(Counter::Reclaimed),
            flooded: self.get(Counter::Flooded),
            collapsed: self.get(Counter::Collapsed),
            write_track_hits: self.get(Counter::TrackHits),
            unsyncs: self.get(Counter::Unsyncs),
            syncs: self.get(Counter::Syncs),
            synced_entries: self.get(Counter::SyncedEntries),
            flushes: self.get(Counter::Flushes),
            ..ShadowStats::default()
        }
    }
}

impl<H: ShadowHost> Locked<'_, H> {
    pub(super) fn stats(&self) -> ShadowStats {
        let mut stats = self.shared.counters.stats();
        stats.pages = self.state.pages;
        stats.tables = self.state.tables;
        for page in self.pages() {
            stats.direct += usize::from(page.is_direct());
            stats.unsync += usize::from(page.is_unsync());
            stats.levels[usize::from(page.level().get()) - 1] += 1;
        }
        let slots = &self.state.slots;
        for space in slots.spaces() {
            for rmap in slots.rmaps_in(space, everything()) {
                for level in [Level::K4, Level::M2, Level::G1] {
                    for (_, list) in rmap.lists(level, rmap.gfns()) {
                        let length = self.state.writer.count(list);
                        let class = usize::try_from(length.next_power_of_two().trailing_zeros());
                        stats.rmap_lengths[class.unwrap_or(RMAP_CLASSES).min(RMAP_CLASSES - 1)] += 1;
                    }
                }
            }
        }
        stats
    }
}
