//! Versions: who may still read what, and when the dead are buried.
//!
//! # Publishing
//!
//! One word, `current`, names the current version. The writer prepares a new version beside it and publishes it
//! with one store. It never waits for a reader.
//!
//! # Holding
//!
//! * A **pin** announces the version in a cell of the reader's own and then checks that it is still the current
//!   one (a hazard pointer, on the version instead of on every node). Announcing takes one exchange in a cache
//!   line nobody else writes; leaving takes one store.
//! * A **snapshot** counts on the version itself. It is taken while the version is pinned, or from another
//!   snapshot, so the count never rises from nothing.
//!
//! Both hold *exactly* their version, for as long as they like.
//!
//! # Burying
//!
//! A version is a set of nodes, and neighbouring versions share most of theirs. With each version we keep the
//! list of nodes that the step to it left behind: they are in the version before, not in this one. When nobody
//! holds an old version any more, it goes, and the two steps around it become one:
//!
//! ```text
//!     before ──dead(v)──▶ v ──dead(next)──▶ next          dead(next) born after `before`:  only v had them: free
//!     before ────────────────dead'(next)──▶ next          the rest, and dead(v):           `before` has them: keep
//! ```
//!
//! So a snapshot that is held for ever keeps its own nodes and no others, and no list is searched twice for the
//! same reason. (File systems free the blocks of deleted snapshots this way.) Births are compared by their
//! distance, so that a wrap of the 64-bit stamp does no harm.
//!
//! # The order that makes it safe
//!
//! A reader announces, then loads `current`; the writer stores `current`, then looks at the cells, with a
//! sequentially consistent fence between on both sides. Either the writer sees the announcement, or the reader
//! sees the new version and announces again. The writer looks at the cells *before* it looks at a version's
//! snapshot count: a reader that turns its pin into a snapshot raises the count before it leaves the cell.
//! `loom_*` tests below run these interleavings.

use alloc::alloc::{Layout, alloc, dealloc};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};

use crate::error::OutOfMemory;
use crate::sync::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};

/// A version and how many snapshots hold it. Starts a cache line, so that what a lookup needs of it is one line.
#[repr(C, align(64))]
pub(super) struct Version<P> {
    snapshots: AtomicUsize,
    pub(super) payload: P,
}

/// A reader's cell: the version it has announced. Alone in its cache lines (two: processors fetch pairs).
#[repr(align(128))]
struct Cell<P> {
    announced: AtomicPtr<Version<P>>,
    taken: AtomicBool,
    /// The next cell; fixed before the cell is shared.
    next: *mut Cell<P>,
}

/// What the writer and all readers share. `W` is the writer's own, kept here so that it lives as long as the
/// last snapshot.
///
/// What readers look at, what every clone of an owner counts and what the writer writes all the time are in cache
/// lines of their own.
#[repr(C)]
pub(super) struct Shared<P, W> {
    current: Apart<AtomicPtr<Version<P>>>,
    cells: AtomicPtr<Cell<P>>,
    owners: Apart<AtomicUsize>,
    writer: Apart<UnsafeCell<W>>,
}

/// Starts in cache lines that hold nothing else before it.
#[repr(align(128))]
struct Apart<T>(T);

/// A counted reference to what is shared.
pub(super) struct Owner<P, W> {
    shared: NonNull<Shared<P, W>>,
}

// SAFETY: payloads are shared between threads by reference (Sync) and dropped on any (Send); the writer's part
// is only reached by the one `Publisher` and by the last owner's drop, on any thread (Send).
unsafe impl<P: Send + Sync, W: Send> Send for Owner<P, W> {}
// SAFETY: as above; a shared `Owner` gives access to `current` and the cells only, which are atomics.
unsafe impl<P: Send + Sync, W: Send> Sync for Owner<P, W> {}

impl<P, W> Clone for Owner<P, W> {
    fn clone(&self) -> Self {
        self.shared().owners.0.fetch_add(1, Ordering::Relaxed);
        Self { shared: self.shared }
    }
}

impl<P, W> Drop for Owner<P, W> {
    fn drop(&mut self) {
        if self.shared().owners.0.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        fence(Ordering::Acquire);
        // SAFETY: this was the last owner: no reader, snapshot or writer is left. Everything was allocated by
        // `try_box`; every version is current or in the writer's list, which drops with `W`.
        unsafe {
            let mut cell = self.shared().cells.load(Ordering::Relaxed);
            while let Some(old) = NonNull::new(cell) {
                cell = old.as_ref().next;
                free_box(old);
            }
            free_box(self.shared);
        }
    }
}

impl<P, W> Owner<P, W> {
    fn shared(&self) -> &Shared<P, W> {
        // SAFETY: an owner keeps what is shared alive.
        unsafe { self.shared.as_ref() }
    }

    /// A reader of its own cell: a cell somebody left, or a new one.
    pub(super) fn reader(&self) -> Result<Seat<P, W>, OutOfMemory> {
        let shared = self.shared();
        let mut cell = shared.cells.load(Ordering::Acquire);
        while let Some(free) = NonNull::new(cell) {
            // SAFETY: cells are freed with what is shared, never before.
            let free_ref = unsafe { free.as_ref() };
            if !free_ref.taken.load(Ordering::Relaxed) && !free_ref.taken.swap(true, Ordering::Acquire) {
                return Ok(Seat { owner: self.clone(), cell: free });
            }
            cell = free_ref.next;
        }
        let mut first = shared.cells.load(Ordering::Acquire);
        let mut new = try_box(Cell {
            announced: AtomicPtr::new(ptr::null_mut()),
            taken: AtomicBool::new(true),
            next: first,
        })?;
        loop {
            // SAFETY: the cell is ours until the exchange succeeds.
            unsafe { new.as_mut().next = first };
            match shared.cells.compare_exchange(first, new.as_ptr(), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(Seat { owner: self.clone(), cell: new }),
                Err(other) => first = other,
            }
        }
    }
}

/// A reader's place: its cell.
pub(super) struct Seat<P, W> {
    owner: Owner<P, W>,
    cell: NonNull<Cell<P>>,
}

// SAFETY: the cell is an atomic that only its seat writes; the seat may move to another thread.
unsafe impl<P: Send + Sync, W: Send> Send for Seat<P, W> {}

impl<P, W> Drop for Seat<P, W> {
    fn drop(&mut self) {
        self.cell().announced.store(ptr::null_mut(), Ordering::Release);
        self.cell().taken.store(false, Ordering::Release);
    }
}

impl<P, W> Seat<P, W> {
    #[inline]
    fn cell(&self) -> &Cell<P> {
        // SAFETY: cells live as long as what is shared, which the seat owns a part of.
        unsafe { self.cell.as_ref() }
    }

    pub(super) fn owner(&self) -> &Owner<P, W> {
        &self.owner
    }

    /// Announces the current version and returns it. It stays until [`leave`](Self::leave).
    #[inline]
    pub(super) fn enter(&mut self) -> NonNull<Version<P>> {
        let shared = self.owner.shared();
        let mut seen = shared.current.0.load(Ordering::Relaxed);
        loop {
            announce(&self.cell().announced, seen);
            let now = shared.current.0.load(Ordering::SeqCst);
            if now == seen {
                // SAFETY: `current` is never null once the publisher exists.
                return unsafe { NonNull::new_unchecked(now) };
            }
            seen = now;
        }
    }

    /// The version that is announced. Only the seat changes that.
    pub(super) fn announced(&self) -> Option<NonNull<Version<P>>> {
        NonNull::new(self.cell().announced.load(Ordering::Relaxed))
    }

    /// Takes the announcement back.
    #[inline]
    pub(super) fn leave(&mut self) {
        self.cell().announced.store(ptr::null_mut(), Ordering::Release);
    }
}

/// Stores, with a full fence behind it.
#[inline]
fn announce<P>(cell: &AtomicPtr<Version<P>>, version: *mut Version<P>) {
    if cfg!(loom) {
        // loom knows sequential consistency of fences, not of single accesses.
        cell.store(version, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    } else {
        // One exchange is cheaper than a store and a fence.
        cell.swap(version, Ordering::SeqCst);
    }
}

/// A version held for as long as its owner likes.
pub(super) struct Held<P, W> {
    owner: Owner<P, W>,
    version: NonNull<Version<P>>,
}

// SAFETY: a held version is shared by reference and never changed.
unsafe impl<P: Send + Sync, W: Send> Send for Held<P, W> {}
// SAFETY: as above.
unsafe impl<P: Send + Sync, W: Send> Sync for Held<P, W> {}

impl<P, W> Held<P, W> {
    /// # Safety
    /// The version is held by somebody (a pin, a snapshot, or the writer that cannot publish meanwhile) during
    /// this call, and belongs to `owner`.
    pub(super) unsafe fn new(owner: &Owner<P, W>, version: NonNull<Version<P>>) -> Self {
        // SAFETY: held by the caller.
        unsafe { version.as_ref() }.snapshots.fetch_add(1, Ordering::Relaxed);
        Self { owner: owner.clone(), version }
    }

    #[inline]
    pub(super) fn payload(&self) -> &P {
        // SAFETY: counted, hence alive.
        unsafe { &self.version.as_ref().payload }
    }
}

impl<P, W> Clone for Held<P, W> {
    fn clone(&self) -> Self {
        // SAFETY: this snapshot holds the version.
        unsafe { Self::new(&self.owner, self.version) }
    }
}

impl<P, W> Drop for Held<P, W> {
    fn drop(&mut self) {
        // SAFETY: counted, hence alive. The writer looks at the count with Acquire.
        unsafe { self.version.as_ref() }.snapshots.fetch_sub(1, Ordering::Release);
    }
}

struct Live<P, D> {
    version: NonNull<Version<P>>,
    stamp: u64,
    /// Left behind by the step from the version before to this one.
    dead: Vec<D>,
    pinned: bool,
}

/// The writer's list of versions, oldest first; the last one is the current one.
pub(super) struct VersionList<P, D> {
    live: VecDeque<Live<P, D>>,
    /// Memory of versions that went.
    spare: Vec<NonNull<Version<P>>>,
    spare_dead: Vec<Vec<D>>,
}

// SAFETY: the list belongs to the writer; versions are Send as far as their payload is.
unsafe impl<P: Send + Sync, D: Send> Send for VersionList<P, D> {}

impl<P, D> Drop for VersionList<P, D> {
    fn drop(&mut self) {
        // SAFETY: dropped with what is shared, when nobody holds a version any more.
        unsafe {
            for live in &self.live {
                free_box(live.version);
            }
            for &version in &self.spare {
                free_memory(version);
            }
        }
    }
}

impl<P, D: Copy> VersionList<P, D> {
    pub(super) const fn new() -> Self {
        Self { live: VecDeque::new(), spare: Vec::new(), spare_dead: Vec::new() }
    }

    /// Makes sure that the next `n` calls of [`publish`](Self::publish) cannot fail.
    pub(super) fn reserve(&mut self, n: usize) -> Result<(), OutOfMemory> {
        self.live.try_reserve(n).map_err(|_| OutOfMemory)?;
        // Whatever is live may become spare.
        self.spare.try_reserve(self.live.len() + n).map_err(|_| OutOfMemory)?;
        self.spare_dead.try_reserve(self.live.len() + n).map_err(|_| OutOfMemory)?;
        while self.spare.len() < n {
            self.spare.push(try_memory()?);
        }
        Ok(())
    }

    /// Makes what `payload` makes the current version. `dead` are the nodes that it no longer has; the list comes back
    /// empty. Room has been [reserved](Self::reserve).
    #[inline]
    pub(super) fn publish<W>(
        &mut self,
        owner: &Owner<P, W>,
        payload: impl FnOnce() -> P,
        stamp: u64,
        dead: &mut Vec<D>,
    ) {
        let version = self.spare.pop().expect("room for a version is reserved");
        // SAFETY: the memory is ours, of the right size, and holds nothing that needs a drop.
        unsafe { version.write(Version { snapshots: AtomicUsize::new(0), payload: payload() }) };
        let left = core::mem::replace(dead, self.spare_dead.pop().unwrap_or_default());
        self.live.push_back(Live { version, stamp, dead: left, pinned: false });
        owner.shared().current.0.store(version.as_ptr(), Ordering::Release);
    }

    /// The version about to be published has again what the step to the last one left behind.
    ///
    /// Those nodes are then in the versions around the last one and not in it. Forgetting that it lacks them
    /// only means that they are kept for it, too.
    pub(super) fn revive_last(&mut self) {
        if let Some(last) = self.live.back_mut() {
            last.dead.clear();
        }
    }

    /// How many versions are kept, the current one included.
    pub(super) fn len(&self) -> usize {
        self.live.len()
    }

    /// How many nodes are dead and kept for somebody.
    pub(super) fn dead(&self) -> usize {
        self.live.iter().map(|live| live.dead.len()).sum()
    }

    /// Bytes of the list itself and of the memory of versions.
    pub(super) fn bytes(&self) -> usize {
        let versions = (self.live.len() + self.spare.len()) * size_of::<Version<P>>();
        let lists = self.live.iter().map(|live| live.dead.capacity() * size_of::<D>());
        let spare = self.spare_dead.iter().map(|dead| dead.capacity() * size_of::<D>());
        versions
            + lists.sum::<usize>()
            + spare.sum::<usize>()
            + self.live.capacity() * size_of::<Live<P, D>>()
    }

    /// Lets go of every version that nobody holds, and frees the nodes that only they had.
    pub(super) fn reclaim<W>(
        &mut self,
        owner: &Owner<P, W>,
        birth: impl Fn(D) -> u64,
        mut free: impl FnMut(D),
    ) {
        // Pairs with the fence in `announce`: who announces an old version after this looks at `current` later
        // still, and finds that it is not current.
        fence(Ordering::SeqCst);
        let mut cell = owner.shared().cells.load(Ordering::Acquire);
        while let Some(next) = NonNull::new(cell) {
            // SAFETY: cells are freed with what is shared.
            let next = unsafe { next.as_ref() };
            let announced = next.announced.load(Ordering::Acquire);
            if !announced.is_null() {
                // From the newest: that is where readers are.
                if let Some(live) = self.live.iter_mut().rev().find(|live| live.version.as_ptr() == announced)
                {
                    live.pinned = true;
                }
            }
            cell = next.next;
        }
        let mut at = 0;
        while at + 1 < self.live.len() {
            let live = &mut self.live[at];
            let pinned = core::mem::take(&mut live.pinned);
            // SAFETY: the version is in the list, hence alive.
            let held = pinned || unsafe { live.version.as_ref() }.snapshots.load(Ordering::Acquire) > 0;
            if held || !self.bury(at, &birth, &mut free) {
                at += 1;
            }
        }
        if let Some(current) = self.live.back_mut() {
            current.pinned = false;
        }
    }

    /// Takes the version at `at`, which nobody holds and which is not the last, out of the list.
    /// Returns whether there was memory for it.
    fn bury(&mut self, at: usize, birth: impl Fn(D) -> u64, free: &mut impl FnMut(D)) -> bool {
        let before = at.checked_sub(1).map(|before| self.live[before].stamp);
        let coming = self.live[at + 1].dead.len();
        if before.is_some() && self.live[at].dead.try_reserve(coming).is_err() {
            return false;
        }
        let mut kept = core::mem::take(&mut self.live[at].dead);
        let mut dead = core::mem::take(&mut self.live[at + 1].dead);
        for node in dead.drain(..) {
            match before {
                Some(before) if !is_after(birth(node), before) => kept.push(node),
                _ => free(node),
            }
        }
        self.live[at + 1].dead = kept;
        if let Some(gone) = self.live.remove(at) {
            // SAFETY: nobody holds the version; its memory goes to the spare ones.
            unsafe { ptr::drop_in_place(gone.version.as_ptr()) };
            // Room for both was reserved when the version was published.
            self.spare.push(gone.version);
            self.spare_dead.push(dead);
        }
        // A burst of versions does not keep its memory.
        while self.spare.len() > 64 {
            if let Some(version) = self.spare.pop() {
                // SAFETY: spare memory holds nothing.
                unsafe { free_memory(version) };
            }
        }
        self.spare_dead.truncate(64);
        true
    }
}

/// Whether stamp `a` was given after stamp `b`, also across a wrap.
fn is_after(a: u64, b: u64) -> bool {
    let distance = a.wrapping_sub(b);
    distance != 0 && distance < 1 << 63
}

/// Makes what is shared, with no version published yet: the caller publishes one before anybody reads.
pub(super) fn share<P, W>(writer: W) -> Result<Owner<P, W>, OutOfMemory> {
    let shared = try_box(Shared {
        current: Apart(AtomicPtr::new(ptr::null_mut())),
        cells: AtomicPtr::new(ptr::null_mut()),
        owners: Apart(AtomicUsize::new(1)),
        writer: Apart(UnsafeCell::new(writer)),
    })?;
    Ok(Owner { shared })
}

impl<P, W> Owner<P, W> {
    /// The writer's part.
    ///
    /// # Safety
    /// The caller is the one writer, and no other reference to it exists.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that it is the only one")]
    pub(super) unsafe fn writer(&self) -> &mut W {
        // SAFETY: passed on.
        unsafe { &mut *self.shared().writer.0.get() }
    }

    /// The writer's part, to look at.
    ///
    /// # Safety
    /// The caller is the one writer, and nobody has it mutably.
    pub(super) unsafe fn writer_ref(&self) -> &W {
        // SAFETY: passed on.
        unsafe { &*self.shared().writer.0.get() }
    }

    /// Whether both share the same.
    #[inline]
    pub(super) fn same(&self, other: &Self) -> bool {
        self.shared == other.shared
    }

    /// Whether a version is the current one.
    #[inline]
    pub(super) fn is_current(&self, version: NonNull<Version<P>>) -> bool {
        ptr::eq(self.shared().current.0.load(Ordering::SeqCst), version.as_ptr())
    }

    /// The current version.
    ///
    /// # Safety
    /// The caller is the one writer, and does not publish during `'a`.
    #[inline]
    pub(super) unsafe fn current<'a>(&self) -> &'a Version<P> {
        // SAFETY: the current version is never freed, and only the writer replaces it.
        unsafe { &*self.shared().current.0.load(Ordering::Relaxed) }
    }
}

fn try_memory<T>() -> Result<NonNull<T>, OutOfMemory> {
    const { assert!(size_of::<T>() > 0) };
    // SAFETY: the size is not zero.
    NonNull::new(unsafe { alloc(Layout::new::<T>()) }.cast()).ok_or(OutOfMemory)
}

/// `Box::new` that can fail.
fn try_box<T>(value: T) -> Result<NonNull<T>, OutOfMemory> {
    let memory = try_memory::<T>()?;
    // SAFETY: fresh memory for a `T`.
    unsafe { memory.write(value) };
    Ok(memory)
}

/// # Safety
/// From [`try_box`], alive, and nobody uses it again.
unsafe fn free_box<T>(memory: NonNull<T>) {
    // SAFETY: passed on.
    unsafe {
        ptr::drop_in_place(memory.as_ptr());
        free_memory(memory);
    }
}

/// # Safety
/// From [`try_memory`], holds nothing that needs a drop, and nobody uses it again.
unsafe fn free_memory<T>(memory: NonNull<T>) {
    // SAFETY: passed on.
    unsafe { dealloc(memory.as_ptr().cast(), Layout::new::<T>()) };
}

#[cfg(all(test, not(loom)))]
#[path = "versions_tests.rs"]
mod tests;

#[cfg(all(test, loom))]
#[path = "versions_loom.rs"]
mod loom_tests;
