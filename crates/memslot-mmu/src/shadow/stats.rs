//! What there is, and what was done so far.

use super::ShadowHost;
use super::directory::Directory;
use super::page::ShadowPage;
use super::shared::{Shared, everything};
use crate::invalidate::range;
use crate::rmap::LEVELS;
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
    /// Entries that were given up because too many lead to the same page.
    pub recycled: u64,
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
    /// The most entries that were looked at under one hold of the lock, and what costs as much.
    pub longest_hold: u64,
    /// How often somebody has waited for the lock.
    pub waits: u64,
    /// The most steps of operations in steps that went by for one who waited.
    pub longest_wait: u64,
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
    Recycled,
    TrackHits,
    Unsyncs,
    Syncs,
    SyncedEntries,
    Flushes,
    Waits
);

/// What was counted.
pub(super) struct Counters {
    counts: [AtomicU64; COUNTERS],
    /// How many entries map guest memory at the moment.
    pub(super) leaves: AtomicU64,
    /// How many remember that there is none.
    pub(super) mmio: AtomicU64,
    longest_hold: AtomicU64,
    longest_wait: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            counts: core::array::from_fn(|_| AtomicU64::new(0)),
            leaves: AtomicU64::new(0),
            mmio: AtomicU64::new(0),
            longest_hold: AtomicU64::new(0),
            longest_wait: AtomicU64::new(0),
        }
    }
}

impl Counters {
    pub(super) fn add(&self, counter: Counter, count: u64) {
        self.counts[counter as usize].fetch_add(count, Ordering::Relaxed);
    }

    /// So much was done under one hold of the lock; called with the lock held.
    pub(super) fn note_hold(&self, entries: usize, overtaken: Option<u64>) {
        let raise = |most: &AtomicU64, to: u64| {
            if to > most.load(Ordering::Relaxed) {
                most.store(to, Ordering::Relaxed);
            }
        };
        raise(&self.longest_hold, entries as u64);
        if let Some(overtaken) = overtaken {
            self.add(Counter::Waits, 1);
            raise(&self.longest_wait, overtaken);
        }
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
            recycled: self.get(Counter::Recycled),
            write_track_hits: self.get(Counter::TrackHits),
            unsyncs: self.get(Counter::Unsyncs),
            syncs: self.get(Counter::Syncs),
            synced_entries: self.get(Counter::SyncedEntries),
            flushes: self.get(Counter::Flushes),
            waits: self.get(Counter::Waits),
            longest_hold: self.longest_hold.load(Ordering::Relaxed),
            longest_wait: self.longest_wait.load(Ordering::Relaxed),
            ..ShadowStats::default()
        }
    }
}

/// So many chains of pages, and so many lists, are looked at under one hold of the lock.
const STEP: usize = 256;

impl<H: ShadowHost> Shared<H> {
    /// Looks at all pages, in steps. Pages that come and go meanwhile may be among them or not.
    pub(super) fn for_each_page(&self, mut look: impl FnMut(&ShadowPage)) {
        let mut chains = 0..Directory::CHAINS;
        while !chains.is_empty() {
            let some = chains.start..chains.end.min(chains.start + STEP);
            chains.start = some.end;
            self.with_in_turn(|locked| {
                for page in some.flat_map(|chain| locked.pages_in(chain)) {
                    locked.worked(1);
                    look(page);
                }
            });
        }
    }

    /// What there is, and what was done so far.
    pub(super) fn stats(&self) -> ShadowStats {
        let mut stats = self.counters.stats();
        let slots = self.with(|locked| {
            stats.pages = locked.state.pages;
            stats.tables = locked.state.tables;
            locked.state.slots.clone()
        });
        self.for_each_page(|page| {
            stats.direct += usize::from(page.is_direct());
            stats.unsync += usize::from(page.is_unsync());
            stats.levels[usize::from(page.level().get()) - 1] += 1;
        });
        for space in slots.spaces() {
            for rmap in slots.rmaps_in(space, everything()) {
                for level in LEVELS {
                    let mut left = rmap.gfns();
                    while !left.is_empty() {
                        left = self.with_in_turn(|locked| {
                            let mut lists = rmap.lists_within(level, left, 16 * STEP);
                            for (_, list) in lists.by_ref() {
                                let length = locked.state.writer.count(list);
                                let class = usize::try_from(length.next_power_of_two().trailing_zeros());
                                let class = class.unwrap_or(RMAP_CLASSES).min(RMAP_CLASSES - 1);
                                stats.rmap_lengths[class] += 1;
                            }
                            locked.worked(16 * STEP - lists.left());
                            let rest = lists.rest().map_or(left.end(), |rest| rest.max(left.start()));
                            range(rest.get(), left.end().get())
                        });
                    }
                }
            }
        }
        stats
    }
}
