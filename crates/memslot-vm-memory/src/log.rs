//! The dirty log as vm-memory's bitmap.
//!
//! vm-memory marks through the slice that it wrote: an offset into a region, of whatever version the writer holds.
//! The log wants guest frames of the version that is current. Three things can lie between, because a guard may be
//! held for as long as its owner likes:
//!
//! * The slot has **moved**. A mark is followed by a look at the last generation that took memory away from frames;
//!   a region that is not known to be in place since then is looked up in the newest version, by its host addresses,
//!   and marked where they are now. (`DirtyLog::mark_through` does the same for a pinned reader, by slot id. Here the
//!   slot may have been split before it moved, so that its id says nothing.)
//! * **Logging has begun** since. A region of a slot that was not logged marks all the same while any slot of the
//!   address space is logged. The log forgets marks of pages that are not.
//! * **Logging has ended**. The mark is forgotten.
//!
//! # The order
//!
//! Writer: write, mark, look. Table: note that something moves, publish, settle the marks that have come in (the log's
//! part). A mark is a read-modify-write, and it, the look, the note and what the log does to settle are sequentially
//! consistent: if the log does not see the mark, the writer sees the note. It may be early: noted and
//! not published yet. Then the newest version the writer finds is still the old one, and its mark is older than
//! the publication, so that the log sees it. A region is known to be in place *as of the generation in which it
//! was found there*, so that an early note is looked at again. A change that is taken back settles its marks *before* the
//! version of before is published again: whoever finds the version that goes marks everything.
//!
//! The start of logging goes the same way: write, *fence*, look whether anything is logged, on the one side; note it,
//! publish, *fence*, copy the memory for the first time on the other.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use memslot::dirty::DirtyLog;
use memslot::{
    AddressSpaceId, Gfn, GfnRange, Gpa, Handle, HvaRange, PieceKind, Slot, SlotFlags, Snapshot, Update, View,
};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// No guest physical address lies in this frame or behind it.
const GFN_END: u64 = 1 << 52;

/// What all regions of an address space need to mark.
pub(crate) struct Marks {
    log: DirtyLog,
    /// For the newest version.
    handle: Handle,
    space: AddressSpaceId,
    /// The last generation, published or about to be, that took memory away from frames.
    moved_at: AtomicU64,
    /// The generation that was taken back last, or is about to be; no generation at first.
    withdrawn: AtomicU64,
    /// Whether any slot of the address space is logged, or is about to be.
    logging: AtomicBool,
}

impl Marks {
    pub(crate) fn new(log: DirtyLog, handle: Handle, space: AddressSpaceId, view: &View) -> Self {
        let moved_at = AtomicU64::new(view.generation());
        let logging = AtomicBool::new(view.slots(space).any(is_logged));
        let withdrawn = AtomicU64::new(u64::MAX);
        Self { log, handle, space, moved_at, withdrawn, logging }
    }

    fn mark(&self, place: &Place, offset: usize, len: usize) {
        let Some(left) = place.len.checked_sub(offset as u64) else { return };
        let len = left.min(len as u64);
        if len == 0 {
            return;
        }
        if !is_logged(&place.slot) {
            // See the module's documentation.
            fence(Ordering::SeqCst);
            if !self.logging.load(Ordering::Relaxed) {
                return;
            }
        }
        let page = place.slot.page_size();
        self.log.mark_bytes(self.space, Gpa::new(place.start + offset as u64), len, page);
        // See the module's documentation.
        if !reached(place.in_place_at.load(Ordering::Relaxed), self.moved_at.load(Ordering::SeqCst)) {
            self.follow(place, offset as u64, len);
        }
    }

    /// Marks the memory where it is now, if that is elsewhere.
    #[cold]
    fn follow(&self, place: &Place, offset: u64, len: u64) {
        let mut marked_by = None;
        loop {
            // Where a version is being taken back, the log may have looked for marks through it already.
            let is_to_stay = |now: &Snapshot| now.generation() != self.withdrawn.load(Ordering::SeqCst);
            let Some(now) = self.handle.snapshot().ok().filter(is_to_stay) else {
                // Too much, never too little.
                let all = GfnRange::new(Gfn::new(0), Gfn::new(GFN_END));
                return all.into_iter().for_each(|all| self.log.mark_range(self.space, all));
            };
            if is_in_place(&place.slot, &now) {
                place.in_place_at.store(now.generation(), Ordering::Relaxed);
                return;
            }
            if marked_by.replace(now.generation()) == Some(now.generation()) {
                return;
            }
            let start = place.slot.hva().and_then(|hva| hva.checked_add(offset));
            if let Some(hvas) = start.and_then(|start| HvaRange::with_len(start, len)) {
                for hit in now.slots_at_hva(self.space, hvas) {
                    self.log.mark_range(self.space, hit.gfns);
                }
            }
            fence(Ordering::SeqCst);
        }
    }

    fn is_marked(&self, place: &Place, offset: usize) -> bool {
        if !is_logged(&place.slot) || offset as u64 >= place.len {
            return false;
        }
        let gpa = Gpa::new(place.start + offset as u64);
        self.log.is_marked(self.space, gpa.gfn(place.slot.page_size()))
    }
}

/// Whether generation `at` is not before `needed`; they may have wrapped.
fn reached(at: u64, needed: u64) -> bool {
    at.wrapping_sub(needed) < 1 << 63
}

fn is_logged(slot: &Slot) -> bool {
    slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
}

/// Whether each of the slot's frames has the same memory in `now`.
fn is_in_place(slot: &Slot, now: &View) -> bool {
    let mut at = slot.base_gfn();
    for piece in now.slots_in(slot.address_space(), slot.gfns()) {
        let same = piece.gfns.start() == at && piece.slot.hva_of(at) == slot.hva_of(at);
        if !same {
            return false;
        }
        at = piece.gfns.end();
    }
    at == slot.gfns().end()
}

/// Follows the table on behalf of the marks; part of the listener that makes the regions.
pub(crate) struct MarksFollower {
    marks: Arc<Marks>,
    logged: usize,
    /// What `moved_at` was before the change.
    moved_at: u64,
}

impl MarksFollower {
    pub(crate) fn new(marks: Arc<Marks>, view: &View) -> Self {
        let logged = view.slots(marks.space).filter(|slot| is_logged(slot)).count();
        let moved_at = marks.moved_at.load(Ordering::Relaxed);
        Self { marks, logged, moved_at }
    }

    pub(crate) fn prepare(&mut self, update: &Update<'_>) {
        let marks = &*self.marks;
        self.moved_at = marks.moved_at.load(Ordering::Relaxed);
        self.logged = self.counted(update, false);
        if self.logged > 0 {
            marks.logging.store(true, Ordering::SeqCst);
        }
        let mut pieces = update.pieces.iter().filter(|piece| piece.address_space == marks.space);
        if pieces.any(|piece| matches!(piece.kind, PieceKind::Removed { .. })) {
            marks.moved_at.store(update.after.generation(), Ordering::SeqCst);
        }
        // What was noted is seen by whoever sees the new version.
        fence(Ordering::SeqCst);
    }

    pub(crate) fn commit(&self) {
        self.marks.logging.store(self.logged > 0, Ordering::SeqCst);
    }

    /// The change did not come to be, or is about to be taken back.
    pub(crate) fn take_back(&mut self, update: &Update<'_>) {
        self.logged = self.counted(update, true);
        let was_published = update.snapshot().is_some();
        if was_published {
            self.marks.withdrawn.store(update.after.generation(), Ordering::SeqCst);
            // What was before is published again, as the next generation.
            let again = update.after.generation().wrapping_add(1);
            self.marks.moved_at.store(again, Ordering::SeqCst);
        } else {
            self.marks.moved_at.store(self.moved_at, Ordering::SeqCst);
        }
        self.marks.logging.store(self.logged > 0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// How many slots are logged after the change, or before it where it is taken back.
    fn counted(&self, update: &Update<'_>, back: bool) -> usize {
        let counts = |slot: &Option<Slot>| {
            usize::from(slot.is_some_and(|s| s.address_space() == self.marks.space && is_logged(&s)))
        };
        let (old, new) = update
            .slots
            .iter()
            .fold((0, 0), |(old, new), change| (old + counts(&change.old), new + counts(&change.new)));
        if back { self.logged + old - new } else { self.logged + new - old }
    }
}

/// Where a region lies.
struct Place {
    start: u64,
    len: u64,
    slot: Slot,
    /// The newest generation in which it is known to lie there.
    in_place_at: AtomicU64,
}

impl Place {
    fn new(slot: &Slot, generation: u64) -> Self {
        let page = slot.page_size();
        Self {
            start: slot.base_gfn().get() << page.shift(),
            len: slot.pages() << page.shift(),
            slot: *slot,
            in_place_at: AtomicU64::new(generation),
        }
    }
}

/// The dirty log, seen from one slot: the bitmap of a [`Region`](crate::Region) whose writes are logged.
///
/// Writes mark; what is marked belongs to the log's [consumers](memslot::dirty::Consumer). `dirty_at` tells whether
/// the page of an offset is marked and nobody has harvested it since, as it does for a bitmap that is reset when it
/// is read. Of a slot that is not logged no page is dirty.
pub struct SlotLog {
    /// Kept alive by the guard through which the region was reached: the log keeps a version of the table, so
    /// that a version must not keep the log.
    marks: NonNull<Marks>,
    place: Place,
}

// SAFETY: the pointer is to what is shared by reference (`Marks` is `Sync`).
unsafe impl Send for SlotLog {}
// SAFETY: as above.
unsafe impl Sync for SlotLog {}

impl SlotLog {
    /// # Safety
    /// `marks` is alive whenever the result is used.
    pub(crate) unsafe fn new(marks: &Arc<Marks>, slot: &Slot, generation: u64) -> Self {
        Self { marks: NonNull::from(&**marks), place: Place::new(slot, generation) }
    }

    #[inline]
    fn marks(&self) -> &Marks {
        // SAFETY: the promise of `new`.
        unsafe { self.marks.as_ref() }
    }
}

impl<'a> WithBitmapSlice<'a> for SlotLog {
    type S = LogSlice<'a>;
}

impl Bitmap for SlotLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.marks().mark(&self.place, offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.marks().is_marked(&self.place, offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        LogSlice { marks: self.marks(), place: &self.place, offset }
    }
}

/// As [`SlotLog`], for regions that live apart from the table's versions: those of the [bridge](crate::Bridge).
#[cfg(feature = "bridge")]
pub struct BridgedLog {
    marks: Arc<Marks>,
    place: Place,
}

#[cfg(feature = "bridge")]
impl BridgedLog {
    pub(crate) fn new(marks: Arc<Marks>, slot: &Slot, generation: u64) -> Self {
        Self { marks, place: Place::new(slot, generation) }
    }
}

#[cfg(feature = "bridge")]
impl<'a> WithBitmapSlice<'a> for BridgedLog {
    type S = LogSlice<'a>;
}

#[cfg(feature = "bridge")]
impl Bitmap for BridgedLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.marks.mark(&self.place, offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.marks.is_marked(&self.place, offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        LogSlice { marks: &self.marks, place: &self.place, offset }
    }
}

#[cfg(feature = "bridge")]
impl std::fmt::Debug for BridgedLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BridgedLog({})", self.place.slot)
    }
}

/// A part of a slot's view of the dirty log: what a volatile slice of logged memory marks.
#[derive(Clone, Copy)]
pub struct LogSlice<'a> {
    marks: &'a Marks,
    place: &'a Place,
    offset: usize,
}

impl WithBitmapSlice<'_> for LogSlice<'_> {
    type S = Self;
}

impl BitmapSlice for LogSlice<'_> {}

impl Bitmap for LogSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.marks.mark(self.place, self.offset.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.marks.is_marked(self.place, self.offset.saturating_add(offset))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Self {
        Self { offset: self.offset.saturating_add(offset), ..*self }
    }
}

impl std::fmt::Debug for LogSlice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LogSlice({} from {:#x} on)", self.place.slot, self.offset)
    }
}

impl std::fmt::Debug for SlotLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SlotLog({})", self.place.slot)
    }
}
