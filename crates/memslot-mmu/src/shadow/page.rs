//! A shadow page: a table that the processor walks, and what is known about it.

use alloc::boxed::Box;
use core::ptr;

use memslot::{Gfn, GfnRange};

use super::guest::{Entry, EntrySize, GuestPaging, Mode};
use super::role::Key;
use super::slot_set::{SlotSet, SlotSetCache};
use super::spte::SpteRef;
use crate::counted::try_box;
use crate::host::{Host, Pfn};
use crate::invalidate::range;
use crate::level::{ENTRIES, Level, Table};
use crate::nested::TableError;
use crate::rmap::{Parents, Rmap};
use crate::sync::{AtomicPtr, AtomicU64, AtomicUsize, Mutex, Ordering};

/// See the [module documentation](self).
///
/// Everything that changes while it can be found is atomic, and changed with the lock held; what is read without the lock says so.
///
/// In this order in memory: whoever is on the way down reads of each page a little of what stands first, and one of the guest's
/// entries. So both mostly lie in one page of memory.
#[repr(C)]
pub(super) struct ShadowPage {
    pub(super) key: Key,
    /// The table.
    pub(super) table: Pfn,
    /// How the guest's entries are read; agrees with the role.
    pub(super) paging: GuestPaging,
    /// That of all pages when it was made; another one makes it obsolete.
    pub(super) generation: u64,
    /// The entries that lead here.
    pub(super) parents: Parents<SpteRef>,
    /// Counts entries that were filed. Read by the fast path without the lock.
    pub(super) version: AtomicU64,
    /// Whether it was given up. Read by virtual processors whose root it is.
    zapped: AtomicUsize,
    /// Whether the guest may write the table that it shadows.
    unsync: AtomicUsize,
    /// Whether something unsync is below, by entry.
    unsync_below: [AtomicU64; ENTRIES.div_ceil(64)],
    /// How many virtual processors have it as root.
    pub(super) roots: AtomicUsize,
    /// Writes to the table since its translations were last used.
    pub(super) writes: AtomicUsize,
    /// What to do about it at the next flush of the guest's.
    pub(super) quiet: AtomicUsize,
    /// While it is unsync: the number of the guest's last flush that has seen what was written before.
    pub(super) synced: AtomicU64,
    /// The last search that came here, of those for what is unsync.
    pub(super) walked: AtomicU64,
    /// The slots that its leaves are of.
    pub(super) slots: Mutex<SlotSet>,
    pub(super) links: Links,
    /// Of each entry that is present, the guest's entry that it was made of; else 0. What an unsync table is compared
    /// with. Read by the fast path without the lock.
    pub(super) gptes: [AtomicU64; ENTRIES],
    /// Of each entry that is present, where it is filed in the reverse map; else 0.
    pub(super) filed: [AtomicU64; ENTRIES],
}

/// Where it is found.
pub(super) struct Links {
    /// The next one whose gfn has the same hash.
    pub(super) by_gfn: AtomicPtr<ShadowPage>,
    /// The next one whose table has the same hash. Read without the lock.
    pub(super) by_table: AtomicPtr<ShadowPage>,
    /// In the order of creation; then among those that wait to be freed.
    pub(super) newer: AtomicPtr<ShadowPage>,
    pub(super) older: AtomicPtr<ShadowPage>,
    /// When it was given up, while it waits.
    pub(super) stamp: AtomicU64,
}

impl Links {
    fn new() -> Self {
        let none = || AtomicPtr::new(ptr::null_mut());
        Self { by_gfn: none(), by_table: none(), newer: none(), older: none(), stamp: AtomicU64::new(0) }
    }
}

impl ShadowPage {
    /// A page that is nobody's yet, with a table.
    pub(super) fn allocate<H: Host>(
        host: &H,
        rmap: &Rmap<SpteRef>,
        key: Key,
        paging: GuestPaging,
    ) -> Result<Box<Self>, TableError> {
        let parents = rmap.parents().map_err(|_| TableError::OutOfMemory)?;
        let zeroes = || core::array::from_fn(|_| AtomicU64::new(0));
        let mut page = try_box(Self {
            key,
            table: Pfn::new(0),
            paging,
            generation: 0,
            parents,
            gptes: zeroes(),
            filed: zeroes(),
            version: AtomicU64::new(0),
            zapped: AtomicUsize::new(0),
            unsync: AtomicUsize::new(0),
            unsync_below: core::array::from_fn(|_| AtomicU64::new(0)),
            roots: AtomicUsize::new(0),
            writes: AtomicUsize::new(0),
            quiet: AtomicUsize::new(0),
            synced: AtomicU64::new(0),
            walked: AtomicU64::new(0),
            slots: Mutex::new(SlotSet::default()),
            links: Links::new(),
        })?;
        // Frame 0 cannot be named by the reverse map.
        page.table = host.allocate(1).filter(|table| table.get() != 0).ok_or(TableError::OutOfMemory)?;
        Ok(page)
    }

    /// Makes a page that was given up, and that nobody knows any more, one for something else.
    pub(super) fn become_page(
        &mut self,
        key: Key,
        paging: GuestPaging,
        generation: u64,
        nodes: &mut SlotSetCache,
    ) {
        self.slots.lock().clear(nodes);
        self.key = key;
        self.paging = paging;
        self.generation = generation;
        for flag in [&self.zapped, &self.unsync, &self.roots, &self.writes, &self.quiet] {
            flag.store(0, Ordering::Relaxed);
        }
        self.unsync_below.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        debug_assert!(self.gptes.iter().chain(&self.filed).all(|word| word.load(Ordering::Relaxed) == 0));
    }

    pub(super) fn level(&self) -> Level {
        self.key.role.level
    }

    pub(super) fn is_direct(&self) -> bool {
        self.key.role.direct
    }

    pub(super) fn is_zapped(&self) -> bool {
        self.zapped.load(Ordering::SeqCst) != 0
    }

    pub(super) fn set_zapped(&self) {
        self.zapped.store(1, Ordering::SeqCst);
    }

    pub(super) fn is_unsync(&self) -> bool {
        self.unsync.load(Ordering::SeqCst) != 0
    }

    pub(super) fn set_unsync(&self, unsync: bool) {
        self.unsync.store(usize::from(unsync), Ordering::SeqCst);
    }

    /// Whether it is unsync, or something below is.
    pub(super) fn needs_sync(&self) -> bool {
        self.is_unsync() || self.has_unsync_below()
    }

    pub(super) fn has_unsync_below(&self) -> bool {
        self.unsync_below.iter().any(|word| word.load(Ordering::SeqCst) != 0)
    }

    pub(super) fn is_unsync_below(&self, index: usize) -> bool {
        self.unsync_below[index / 64].load(Ordering::SeqCst) & 1 << (index % 64) != 0
    }

    /// Notes whether something below this entry is unsync; returns whether that was known.
    pub(super) fn set_unsync_below(&self, index: usize, unsync: bool) -> bool {
        let (word, bit) = (&self.unsync_below[index / 64], 1 << (index % 64));
        let old = if unsync {
            word.fetch_or(bit, Ordering::SeqCst)
        } else {
            word.fetch_and(!bit, Ordering::SeqCst)
        };
        (old & bit != 0) == unsync
    }

    /// The entries with something unsync below.
    pub(super) fn unsync_entries(&self) -> impl Iterator<Item = usize> {
        let words = self.unsync_below.iter().enumerate();
        words.flat_map(|(at, word)| {
            let mut left = word.load(Ordering::SeqCst);
            core::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                left &= left.wrapping_sub(1);
                (bit < 64).then_some(at * 64 + bit as usize)
            })
        })
    }

    /// How many entries of the guest's table the shadow table has room for.
    fn size(&self) -> EntrySize {
        match self.key.role.reading.mode {
            Mode::Off | Mode::Bits32 => EntrySize::Four,
            _ => EntrySize::Eight,
        }
    }

    /// Which entry of the guest's table an entry is made of.
    #[inline]
    pub(super) fn guest_index(&self, index: usize) -> usize {
        match (self.size(), self.level()) {
            (EntrySize::Eight, _) => index,
            (EntrySize::Four, Level::K4) => usize::from(self.key.role.quadrant) * ENTRIES + index,
            // 4 MiB each, and so two entries.
            (EntrySize::Four, _) => (usize::from(self.key.role.quadrant) * ENTRIES + index) / 2,
        }
    }

    /// The guest's entry that an entry is made of, out of the guest's table.
    #[inline]
    pub(super) fn guest_entry(&self, table: &Table, index: usize) -> u64 {
        let at = self.guest_index(index);
        match self.size() {
            EntrySize::Eight => table.0[at].load(Ordering::SeqCst),
            EntrySize::Four => {
                let both = table.0[at / 2].load(Ordering::SeqCst);
                both >> (32 * (at % 2)) & 0xffff_ffff
            }
        }
    }

    /// The first frame of what an entry maps, if the guest's entry maps a page.
    pub(super) fn leaf_gfn(&self, index: usize, gpte: u64) -> Option<Gfn> {
        let level = self.level();
        if self.is_direct() {
            return Some(Gfn::new(self.key.gfn.get() + index as u64 * level.pages()));
        }
        let Entry::Page(page) = self.paging.entry(level, gpte) else { return None };
        // A page of 4 MiB is mapped by two entries.
        let within = (index as u64 * level.pages()) & (page.len() - 1);
        Some(Gfn::new(page.start().get() + within))
    }

    /// The guest's table may be written again, before it is compared for the last time.
    pub(super) fn wake(&self) {
        self.quiet.store(0, Ordering::Relaxed);
    }

    /// The frames that a direct page maps when all entries are present.
    pub(super) fn direct_gfns(&self) -> GfnRange {
        let first = self.key.gfn.get();
        range(first, first.saturating_add(ENTRIES as u64 * self.level().pages()))
    }

    /// One of its entries, as the reverse map has it.
    pub(super) fn reference(&self, index: usize) -> SpteRef {
        SpteRef::new(self.table, index)
    }
}
