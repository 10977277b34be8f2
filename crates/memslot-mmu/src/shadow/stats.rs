//! What there is, and what was done so far.

/// Into how many classes [`ShadowStats::rmap_lengths`] sorts: 0, 1, 2, up to 4, up to 8 … up to 2^13, more.
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
    /// Faults that were resolved, and by the fast path alone.
    pub faults: u64,
    /// See `faults`.
    pub fast_faults: u64,
    /// Faults that the guest got.
    pub injected: u64,
    /// Entries that were made ahead of their fault.
    pub prefetched: u64,
    /// Shadow pages that were made.
    pub created: u64,
    /// Shadow pages that were given up, for whatever reason, and of these for want of room, and because they were written too often.
    pub zapped: u64,
    /// See `zapped`.
    pub reclaimed: u64,
    /// See `zapped`.
    pub flooded: u64,
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
    /// How many frames have so many entries that map them, by length: see [`RMAP_CLASSES`].
    pub rmap_lengths: [u64; RMAP_CLASSES],
}
