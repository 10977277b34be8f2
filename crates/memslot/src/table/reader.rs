//! How readers hold a version: pinned, by a guard, or in a snapshot.

use core::cell::Cell;
use core::ops::Deref;
use core::ptr::NonNull;

use super::gfn_index::Found;
use super::versions::{Held, Seat, Version};
use super::view::{Translation, View, translation};
use super::{Shared, Writer};
use crate::addr::{Gfn, Gpa};
use crate::error::OutOfMemory;
use crate::slot::AddressSpaceId;

/// Makes readers and snapshots of a table, on any thread, whether or not the table still exists.
#[derive(Clone)]
pub struct Handle {
    shared: Shared,
}

impl Handle {
    pub(super) const fn new(shared: Shared) -> Self {
        Self { shared }
    }

    /// Whether both are handles of the same table.
    #[inline]
    #[must_use]
    pub fn same_table(&self, other: &Self) -> bool {
        self.shared.same(&other.shared)
    }

    /// A reader.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn reader(&self) -> Result<Reader, OutOfMemory> {
        Ok(Reader { seat: self.shared.reader()?, last_used: LastUsed::new() })
    }

    /// The current version, to be kept. A [`Reader`] does this without looking for a cell first.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn snapshot(&self) -> Result<Snapshot, OutOfMemory> {
        Ok(self.reader()?.snapshot())
    }
}

/// A thread's (a vCPU's) own access to the table. Make one per thread and keep it.
pub struct Reader {
    seat: Seat<View, Writer>,
    last_used: LastUsed,
}

/// What the last lookup found. Valid in its generation only; it holds values and no pointer.
///
/// Each field is a cell of its own: most are not looked at when the lookup misses.
struct LastUsed {
    generation: Cell<u64>,
    /// The slot's first frame.
    base: Cell<u64>,
    /// 0 before the first lookup: nothing lies in it, whatever the generation.
    pages: Cell<u32>,
    space: Cell<AddressSpaceId>,
    found: Cell<Found>,
}

impl LastUsed {
    const fn new() -> Self {
        Self {
            generation: Cell::new(0),
            base: Cell::new(0),
            pages: Cell::new(0),
            space: Cell::new(AddressSpaceId::NORMAL),
            found: Cell::new(Found::NONE),
        }
    }

    #[inline]
    fn find(&self, generation: u64, space: AddressSpaceId, gfn: Gfn) -> Option<Found> {
        let further = gfn.get().wrapping_sub(self.base.get());
        let hit = generation == self.generation.get()
            && further < u64::from(self.pages.get())
            && space == self.space.get();
        #[expect(clippy::cast_possible_truncation, reason = "below the slot's 32-bit number of pages")]
        hit.then(|| self.found.get().further(further as u32))
    }

    #[inline]
    fn remember(&self, generation: u64, space: AddressSpaceId, gfn: Gfn, found: &Found) {
        let whole = found.at_start();
        self.generation.set(generation);
        self.base.set(gfn.get() - u64::from(found.pages_before));
        self.pages.set(whole.pages_left);
        self.space.set(space);
        self.found.set(whole);
    }
}

impl Reader {
    /// Holds the current version until the result is dropped.
    #[inline]
    pub fn pin(&mut self) -> Pinned<'_> {
        let version = self.seat.enter();
        Pinned { reader: self, version }
    }

    /// The current version, to be kept.
    pub fn snapshot(&mut self) -> Snapshot {
        self.pin().snapshot()
    }

    /// Holds the current version with all of this reader: the result borrows nothing.
    ///
    /// As quick as [`pin`](Self::pin). Who needs guards often keeps readers in stock and gets each back with
    /// [`Guard::into_reader`], or makes guards of [`Holder`]s.
    ///
    /// ```
    /// use memslot::{Limits, SlotTable};
    /// let table = SlotTable::new(Limits::default())?;
    /// let guard = table.reader()?.into_guard();
    /// let generation = std::thread::spawn(move || guard.generation()).join().unwrap();
    /// assert_eq!(generation, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    #[must_use]
    pub fn into_guard(self) -> Guard {
        let mut seat = self.seat;
        let version = seat.enter();
        Guard { seat, version }
    }

    /// A reader that holds versions in place.
    #[must_use]
    pub fn into_holder(self) -> Holder {
        Holder { seat: self.seat }
    }

    /// Whether this is a reader of the table that `handle` is of.
    #[inline]
    #[must_use]
    pub fn reads(&self, handle: &Handle) -> bool {
        self.seat.owner().same(&handle.shared)
    }

    /// Pins, translates and leaves: for a single lookup.
    ///
    /// It does not remember the slot: where lookups jump about, that costs more than the pin. To look up the same
    /// slot again and again, [`pin`](Self::pin) once and ask [`Pinned::translate`].
    #[inline]
    pub fn translate(&mut self, space: AddressSpaceId, gpa: Gpa) -> Option<Translation> {
        View::translate(&self.pin(), space, gpa)
    }
}

/// A version that a [`Reader`] holds; dereferences to [`View`].
///
/// Its own [`translate`](Self::translate) remembers the slot that was used last.
pub struct Pinned<'a> {
    reader: &'a mut Reader,
    version: NonNull<Version<View>>,
}

impl Pinned<'_> {
    /// As [`View::translate`], quick when the same slot is asked for again.
    #[inline]
    #[must_use]
    pub fn translate(&self, space: AddressSpaceId, gpa: Gpa) -> Option<Translation> {
        let view: &View = self;
        let page = view.page_size();
        let gfn = gpa.gfn(page);
        let last_used = &self.reader.last_used;
        if let Some(found) = last_used.find(view.generation, space, gfn) {
            return translation(&found, gpa, page);
        }
        let found = view.find(space, gfn)?;
        last_used.remember(view.generation, space, gfn, &found);
        translation(&found, gpa, page)
    }

    /// Whether no newer version has been published.
    #[inline]
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.reader.seat.owner().is_current(self.version)
    }

    /// The newest version, to be kept.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn latest(&self) -> Result<Snapshot, OutOfMemory> {
        Handle::new(self.reader.seat.owner().clone()).snapshot()
    }

    /// The same version, to be kept.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        // SAFETY: the version is pinned, and belongs to the seat's owner.
        Snapshot { held: unsafe { Held::new(self.reader.seat.owner(), self.version) } }
    }
}

impl Deref for Pinned<'_> {
    type Target = View;

    #[inline]
    fn deref(&self) -> &View {
        // SAFETY: the version stays while it is announced, which is until the drop.
        unsafe { &self.version.as_ref().payload }
    }
}

impl Drop for Pinned<'_> {
    #[inline]
    fn drop(&mut self) {
        self.reader.seat.leave();
    }
}

/// A version held by a reader that went into it; dereferences to [`View`]. Made by [`Reader::into_guard`].
///
/// It may be kept, moved and shared as a [`Snapshot`] may, but taking it touches no cache line that other readers
/// write. It keeps its reader's cell as long as it lives.
pub struct Guard {
    seat: Seat<View, Writer>,
    version: NonNull<Version<View>>,
}

// SAFETY: the version is shared by reference, and the seat may move.
unsafe impl Send for Guard {}
// SAFETY: shared, a guard gives access to the version and to the seat's owner, which both may be shared.
unsafe impl Sync for Guard {}

impl Guard {
    /// Lets go of the version and gives the reader back.
    #[inline]
    #[must_use]
    pub fn into_reader(mut self) -> Reader {
        self.seat.leave();
        Reader { seat: self.seat, last_used: LastUsed::new() }
    }

    /// The same version, to be kept beside this guard.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        // SAFETY: the version is announced, and belongs to the seat's owner.
        Snapshot { held: unsafe { Held::new(self.seat.owner(), self.version) } }
    }

    /// Whether it holds a version of the table that `handle` is of.
    #[inline]
    #[must_use]
    pub fn reads(&self, handle: &Handle) -> bool {
        self.seat.owner().same(&handle.shared)
    }
}

/// A reader for those who make guards of their own: it holds a version in place, and says where it is.
///
/// A [`Guard`] that is taken and given back moves with its reader each time. Who keeps readers in a stock, and the
/// stock in boxes, need not move anything.
///
/// ```
/// use memslot::{Limits, SlotTable};
/// let table = SlotTable::new(Limits::default())?;
/// let mut holder = table.reader()?.into_holder();
/// for _ in 0..3 {
///     let view = holder.hold();
///     // SAFETY: the holder holds the version until it is told to let go.
///     assert_eq!(unsafe { view.as_ref() }.generation(), 0);
///     holder.release();
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Holder {
    seat: Seat<View, Writer>,
}

// SAFETY: shared, a holder gives access to what it has announced, which it alone changes, and to the seat's owner.
unsafe impl Sync for Holder {}

impl Holder {
    /// Holds the current version, instead of any other. The view stays until the next call, until
    /// [`release`](Self::release), or until the holder is dropped.
    #[inline]
    pub fn hold(&mut self) -> NonNull<View> {
        let version = self.seat.enter();
        // SAFETY: the version is announced.
        NonNull::from(unsafe { &version.as_ref().payload })
    }

    /// Lets go of the version.
    #[inline]
    pub fn release(&mut self) {
        self.seat.leave();
    }

    /// The version that is held, to be kept apart from the holder.
    #[must_use]
    pub fn snapshot(&self) -> Option<Snapshot> {
        // SAFETY: the version is announced, and belongs to the seat's owner.
        Some(Snapshot { held: unsafe { Held::new(self.seat.owner(), self.seat.announced()?) } })
    }
}

impl Deref for Guard {
    type Target = View;

    #[inline]
    fn deref(&self) -> &View {
        // SAFETY: the version stays while it is announced: until the seat leaves, or is dropped.
        unsafe { &self.version.as_ref().payload }
    }
}

impl core::fmt::Debug for Guard {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        View::fmt(self, f)
    }
}

/// A version kept for as long as one likes; dereferences to [`View`].
#[derive(Clone)]
pub struct Snapshot {
    held: Held<View, Writer>,
}

impl Snapshot {
    pub(super) const fn new(held: Held<View, Writer>) -> Self {
        Self { held }
    }
}

impl Deref for Snapshot {
    type Target = View;

    #[inline]
    fn deref(&self) -> &View {
        self.held.payload()
    }
}

impl core::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.held.payload().fmt(f)
    }
}
