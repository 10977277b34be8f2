//! Dirty rings: every vCPU lists the pages it writes, in order, in memory that it shares with user space.
//!
//! The layout is KVM's (`struct kvm_dirty_gfn`; `KVM_CAP_DIRTY_LOG_RING`, section 7.36 of the API), so a
//! [`RingReader`] reads a ring of the kernel's as well as a [`DirtyRing`]. An [`Entry`] goes round like this:
//!
//! ```text
//!          push (vCPU)               collect (user space)           reset
//!  free ───────────────► DIRTY ───────────────────────► RESET ─────────────────► free
//!  00     slot, offset,  01     acquire; read the       1x     acquire; re-arm,
//!         then release          entry; then release            flush, then release
//! ```
//!
//! # Who is trusted
//!
//! User space may write anything into the entries at any time. So nothing is ever read back from them but the
//! RESET flag, and that only of entries that were pushed and not yet reset. What was pushed stands a second
//! time in private memory: the slot with its generation, the page's frame and what stood behind it. Whatever user
//! space writes, a reset takes at most as many steps as the ring has entries, and re-arms only what was pushed.
//!
//! # What a reset guarantees
//!
//! * **No page is lost.** An entry is freed last, when its page is re-armed *and* the flush is done. So however
//!   a reset ends (all done, stopped, failed), every entry that it has freed is re-armed and flushed, and every
//!   other one is still there for the next reset. A page may be re-armed twice; that costs one fault.
//! * **Nobody returns too early.** All of it happens under `&mut`: a second resetter that waits for the lock
//!   around the ring finds nothing left, and the first one's flush in force.
//! * **Pages follow their frames.** Page tables keep their mappings when a slot is split, merged, renumbered or
//!   resized, so a page is re-armed where the frame that was written still has the same memory behind it and a
//!   slot that logs, whatever that slot's id is now. All other pages were unmapped, and nothing is to be done.
//! * **Reused ids are noticed.** An entry whose slot and offset no longer name the page that was written (the slot
//!   is gone, has become another one, is too short, or no longer logs) is counted as [`stale`](Reset::stale).
//!   KVM's layout has no room to tell the reader: it should collect and reset before it changes slots.
//!
//! # What is asked of the others
//!
//! * The vCPU's thread pushes, and leaves the guest while [`DirtyRing::is_soft_full`]; that is computed from the
//!   indexes each time and can not get lost. What the soft limit keeps back is for pages that are already in
//!   the processor's own buffer (PML) or on their way out. A [`full`](PushError::Full) ring is never overwritten.
//! * The lock around a ring is taken before those that [`Rearm`] takes: do not push while holding the latter.
//! * User space reads a page's contents *after* the reset: a page that is written again later is pushed again.
//! * [`Rearm::rearm`] hears of the pages in the order of the entries, not of the frames: neighbours come
//!   together (within 64 pages, upwards and downwards), each call in one slot and one chunk of 32768 frames, and
//!   a page may come twice.
//!
//! # Pages that start dirty
//!
//! `KVM_DIRTY_LOG_INITIALLY_SET` is about bitmaps: all pages count as dirty, and nothing is write-protected before
//! they were cleared once. With a ring there is no bitmap to say so, and pages that are never armed are never
//! pushed: guests were corrupted silently. Here the combination has one meaning: with a ring no page starts dirty,
//! and all pages are armed, and flushed, when logging is turned on.

mod batch;
mod layout;
mod reader;

use alloc::vec::Vec;
use core::ops::DerefMut;
use core::sync::atomic::Ordering;

use self::batch::Batch;
pub use self::layout::{
    DIRTY, ENTRY_BYTES, Entry, MAX_ENTRIES, PML_ENTRIES, RESERVED_ENTRIES, RESET, RingError, RingSize,
};
pub use self::reader::{DirtyPage, RingReader};
use super::rearm::Rearm;
use crate::addr::Gfn;
use crate::slot::{AddressSpaceId, Slot, SlotFlags, SlotId};
use crate::table::View;

/// What became of a page that was pushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "a vCPU whose ring is soft-full must leave the guest"]
pub enum Pushed {
    /// It is in the ring.
    Recorded,
    /// It is in the ring, which has reached its soft limit: the vCPU must leave the guest, and not enter it again
    /// while [`DirtyRing::is_soft_full`].
    SoftFull,
    /// The slot does not log; nothing was done.
    NotLogged,
}

/// Why a page is not in the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// All entries are in use. The write must not be let through before the page could be pushed.
    #[error("the dirty ring is full: none of its {entries} entries was reset")]
    Full {
        /// The ring's size.
        entries: u32,
    },
    /// The slot has no such page.
    #[error("slot {id} has {pages} pages, no page {offset}")]
    OutsideSlot {
        /// The slot.
        id: SlotId,
        /// The page asked for.
        offset: u64,
        /// The slot's pages.
        pages: u64,
    },
    /// An entry has 16 bits for the slot id.
    #[error("slot {id} has no place in a dirty ring: 65535 is the highest id there")]
    IdTooHigh {
        /// The slot.
        id: SlotId,
    },
}

/// What was pushed, where user space cannot change it.
#[derive(Clone, Copy, Default)]
struct Written {
    generation: u64,
    gfn: Gfn,
    /// The host address or token of the page.
    address: u64,
    offset: u32,
    id: u16,
    space: AddressSpaceId,
}

impl Written {
    /// Whether both were pushed for the same slot.
    fn same_slot(&self, other: &Self) -> bool {
        (self.generation, self.id, self.space) == (other.generation, other.id, other.space)
    }

    /// The slot that the entry was made for, if it is still there and logs.
    fn named<'v>(&self, view: &'v View) -> Option<&'v Slot> {
        let slot = view.slot(self.space, SlotId::new(self.id.into()))?;
        let logs = slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES);
        (slot.generation() == self.generation && logs).then_some(slot)
    }

    /// Whether `slot` logs the page that was written, at the frame where it was written.
    fn is_logged_in(&self, slot: &Slot) -> bool {
        slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
            && self
                .gfn
                .offset_from(slot.base_gfn())
                .is_some_and(|offset| offset < slot.pages() && page_address(slot, offset) == self.address)
    }
}

fn page_address(slot: &Slot, offset: u64) -> u64 {
    slot.address().wrapping_add(offset << slot.page_size().shift())
}

/// The producer's side of one vCPU's ring, and its reset. See the [module documentation](self).
///
/// `M` is where the entries are: a `Vec` of the ring's own, or memory that is shared with the reader, for example
/// `&[Entry]` or `Arc<[Entry]>`. For a ring that is shared between threads there is a lock around it.
///
/// ```
/// use memslot::dirty::ring::{DirtyRing, Pushed, RingReader, RingSize};
/// use memslot::dirty::SoftwareOnly;
/// use memslot::*;
///
/// let mut table = SlotTable::new(Limits::default())?;
/// table.create(SlotSpec {
///     address_space: AddressSpaceId::NORMAL,
///     id: SlotId::new(3),
///     gfns: GfnRange::with_len(Gfn::new(0x100), 16).unwrap(),
///     backing: Backing::Host { hva: Hva::new(0x7000_0000) },
///     flags: SlotFlags::LOG_DIRTY_PAGES,
/// })?;
/// let size = RingSize::from_bytes(4096, PageSize::K4, 0)?;
/// let memory = size.allocate()?;
/// let mut ring = DirtyRing::with_memory(size, &memory)?;
/// let mut reader = RingReader::new(&memory)?;
///
/// // The vCPU writes a page.
/// let slot = table.view().slot_at(AddressSpaceId::NORMAL, Gfn::new(0x105)).unwrap();
/// assert_eq!(ring.push(slot, 5)?, Pushed::Recorded);
///
/// // User space collects, resets, and only then reads the page.
/// let page = reader.collect().next().unwrap();
/// assert_eq!(page.gfn(table.view()), Some((AddressSpaceId::NORMAL, Gfn::new(0x105))));
/// let reset = ring.reset(table.view(), &mut SoftwareOnly, || false)?;
/// assert_eq!((reset.entries, reset.rearmed, ring.used()), (1, 1, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DirtyRing<M = Vec<Entry>> {
    memory: M,
    written: Vec<Written>,
    size: RingSize,
    /// Both run freely and wrap; between them lie the entries in use.
    dirty: u32,
    reset: u32,
    /// How many entries from `reset` on the reset that is under way has re-armed.
    consumed: u32,
}

impl DirtyRing {
    /// A ring with memory of its own.
    ///
    /// # Errors
    /// [`RingError::OutOfMemory`].
    pub fn new(size: RingSize) -> Result<Self, RingError> {
        Self::with_memory(size, size.allocate()?)
    }
}

impl<M: AsRef<[Entry]>> DirtyRing<M> {
    /// A ring in memory of the caller's, all of which is made free.
    ///
    /// # Errors
    /// [`RingError::WrongMemory`] if it is not [`RingSize::entries`] long, [`RingError::OutOfMemory`].
    pub fn with_memory(size: RingSize, memory: M) -> Result<Self, RingError> {
        let entries = memory.as_ref();
        if entries.len() != size.entries() as usize {
            return Err(RingError::WrongMemory { entries: entries.len(), needed: size.entries() });
        }
        let written = layout::filled(size.entries())?;
        entries.iter().for_each(|entry| entry.flags.store(0, Ordering::Release));
        Ok(Self { memory, written, size, dirty: 0, reset: 0, consumed: 0 })
    }

    /// The entries' memory.
    #[must_use]
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// The ring's size.
    #[must_use]
    pub const fn size(&self) -> RingSize {
        self.size
    }

    /// How many entries were pushed and not yet reset.
    #[must_use]
    pub const fn used(&self) -> u32 {
        self.dirty.wrapping_sub(self.reset)
    }

    /// Whether the soft limit is reached: the vCPU must leave the guest (`KVM_EXIT_DIRTY_RING_FULL`) and stay out
    /// until a reset has changed this.
    #[must_use]
    pub const fn is_soft_full(&self) -> bool {
        self.used() >= self.size.soft_limit()
    }

    /// Records that page `offset` of `slot` was, or is about to be, written. The slot is one of any version of
    /// the table that was current when the write was allowed.
    ///
    /// # Errors
    /// [`PushError`]; nothing was recorded. A full ring is left as it is.
    pub fn push(&mut self, slot: &Slot, offset: u64) -> Result<Pushed, PushError> {
        let id = slot.id();
        if !slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) {
            return Ok(Pushed::NotLogged);
        }
        let number = u16::try_from(id.get()).map_err(|_| PushError::IdTooHigh { id })?;
        let outside = PushError::OutsideSlot { id, offset, pages: slot.pages() };
        let gfn = slot.base_gfn().checked_add(offset).filter(|_| offset < slot.pages()).ok_or(outside)?;
        let full = PushError::Full { entries: self.size.entries() };
        if self.used() >= self.size.entries() {
            return Err(full);
        }
        let at = self.at(self.dirty);
        let (Some(entry), Some(written)) = (self.memory.as_ref().get(at), self.written.get_mut(at)) else {
            return Err(full);
        };
        let place = u32::from(slot.address_space().get()) << 16 | u32::from(number);
        *written = Written {
            generation: slot.generation(),
            gfn,
            address: page_address(slot, offset),
            offset: u32::try_from(offset).map_err(|_| outside)?,
            id: number,
            space: slot.address_space(),
        };
        entry.slot.store(place, Ordering::Relaxed);
        entry.offset.store(offset, Ordering::Relaxed);
        // Whoever sees the flag sees the rest.
        entry.flags.store(DIRTY, Ordering::Release);
        self.dirty = self.dirty.wrapping_add(1);
        Ok(if self.is_soft_full() { Pushed::SoftFull } else { Pushed::Recorded })
    }

    /// Frees the entries that user space has read, in order, and re-arms their pages. See
    /// [what a reset guarantees](self#what-a-reset-guarantees).
    ///
    /// `view` is the table's current version, looked up after the lock around the ring was taken: no entry is
    /// newer then. `stop` is asked before each entry. There is one flush, and none if nothing was re-armed.
    ///
    /// # Errors
    /// [`ResetError`], with the error of `rearm`; what could not be re-armed and flushed is still in the ring.
    pub fn reset<A: Rearm>(
        &mut self,
        view: &View,
        rearm: &mut A,
        stop: impl FnMut() -> bool,
    ) -> Result<Reset, ResetError<A::Error>> {
        Rings(&mut [self]).reset(view, rearm, stop)
    }

    const fn at(&self, index: u32) -> usize {
        (index & (self.size.entries() - 1)) as usize
    }

    /// Re-arms the pages of harvested entries, and counts in `consumed` those that can be freed after a flush.
    fn walk<A: Rearm>(&mut self, view: &View, pass: &mut Pass<'_, A>) -> Result<(), A::Error> {
        let mut batch = Batch::default();
        // The last entry and its slot, which is looked up once for all entries in a row.
        let mut last: Option<(Written, Option<&Slot>)> = None;
        // Of the entries that are not in `consumed` yet.
        let mut counts = Reset::default();
        for ahead in 0..self.used() {
            let at = self.at(self.reset.wrapping_add(ahead));
            let (Some(entry), Some(&written)) = (self.memory.as_ref().get(at), self.written.get(at)) else {
                break;
            };
            if entry.flags.load(Ordering::Acquire) & RESET == 0 {
                break;
            }
            if (pass.stop)() {
                pass.done.stopped = true;
                break;
            }
            let named = match last {
                Some((of, named)) if of.same_slot(&written) => named,
                _ => written.named(view),
            };
            last = Some((written, named));
            let here = || view.slot_at(written.space, written.gfn);
            let covering = named
                .filter(|slot| written.is_logged_in(slot))
                .or_else(|| here().filter(|slot| written.is_logged_in(slot)));
            if let Some(slot) = covering {
                if !batch.add(slot, written.gfn.get()) {
                    batch.rearm(pass.rearm, &mut pass.armed)?;
                    self.consumed = ahead;
                    pass.done.add(core::mem::take(&mut counts));
                    batch = Batch::default();
                    batch.add(slot, written.gfn.get());
                }
                counts.rearmed += 1;
            }
            let is_stale = named.is_none_or(|slot| u64::from(written.offset) >= slot.pages());
            counts.stale += usize::from(is_stale);
            counts.entries += 1;
        }
        batch.rearm(pass.rearm, &mut pass.armed)?;
        self.consumed += u32::try_from(counts.entries).unwrap_or_default();
        pass.done.add(counts);
        Ok(())
    }

    /// Gives back what `walk` has consumed.
    fn free(&mut self) {
        for _ in 0..core::mem::take(&mut self.consumed) {
            if let Some(entry) = self.memory.as_ref().get(self.at(self.reset)) {
                entry.flags.store(0, Ordering::Release);
            }
            self.reset = self.reset.wrapping_add(1);
        }
    }
}

/// What a reset has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[must_use = "a reset that was stopped has left entries"]
pub struct Reset {
    /// How many entries it freed: what `KVM_RESET_DIRTY_RINGS` returns.
    pub entries: usize,
    /// How many of them had their page re-armed.
    pub rearmed: usize,
    /// How many of them name, by slot id and offset, another page than the one that was written, or none that is
    /// logged. Their page may have been re-armed all the same: after a split, for example.
    pub stale: usize,
    /// Whether it was stopped before an entry that could have been freed.
    pub stopped: bool,
}

impl Reset {
    fn add(&mut self, more: Self) {
        self.entries += more.entries;
        self.rearmed += more.rearmed;
        self.stale += more.stale;
    }
}

/// A page could not be re-armed, or the flush failed.
#[derive(Debug, thiserror::Error)]
#[error("re-arming dirty pages failed after {} entries; the others are still in the ring", done.entries)]
pub struct ResetError<E> {
    /// What was done before: these entries are free, their pages re-armed and flushed.
    pub done: Reset,
    /// What went wrong.
    #[source]
    pub error: E,
}

/// The rings of several vCPUs, to be reset together with one flush, as `KVM_RESET_DIRTY_RINGS` does.
///
/// The rings come as whatever holds them: `&mut`, boxes, or the guards of their locks.
pub struct Rings<'r, R>(&'r mut [R]);

impl<'r, R: DerefMut<Target = DirtyRing<M>>, M: AsRef<[Entry]>> Rings<'r, R> {
    /// All of these rings; `None` where there is none (KVM: `EINVAL`).
    #[must_use]
    pub fn new(rings: &'r mut [R]) -> Option<Self> {
        (!rings.is_empty()).then_some(Self(rings))
    }

    /// Resets one ring after the other, as [`DirtyRing::reset`]; what it returns is of all rings together.
    ///
    /// # Errors
    /// [`ResetError`]; the rings behind the one concerned are as they were.
    pub fn reset<A: Rearm>(
        &mut self,
        view: &View,
        rearm: &mut A,
        mut stop: impl FnMut() -> bool,
    ) -> Result<Reset, ResetError<A::Error>> {
        let mut pass = Pass { rearm, stop: &mut stop, done: Reset::default(), armed: false };
        // Not zero only after a panic of `rearm` or `stop`.
        self.0.iter_mut().for_each(|ring| ring.consumed = 0);
        let mut outcome = Ok(());
        for ring in self.0.iter_mut() {
            outcome = ring.walk(view, &mut pass);
            if outcome.is_err() || pass.done.stopped {
                break;
            }
        }
        let Pass { rearm, done, armed, .. } = pass;
        if armed {
            if let Err(error) = rearm.flush() {
                return Err(ResetError { done: Reset::default(), error: outcome.err().unwrap_or(error) });
            }
        }
        self.0.iter_mut().for_each(|ring| ring.free());
        outcome.map(|()| done).map_err(|error| ResetError { done, error })
    }
}

/// One reset, through all rings.
struct Pass<'p, A> {
    rearm: &'p mut A,
    stop: &'p mut dyn FnMut() -> bool,
    done: Reset,
    /// Whether something was re-armed, so that a flush is needed.
    armed: bool,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::dirty::SoftwareOnly;
    use crate::{Backing, GfnRange, Hva, Limits, PageSize, SlotSpec, SlotTable};

    #[test]
    fn the_indexes_wrap() {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let space = AddressSpaceId::NORMAL;
        let gfns = GfnRange::with_len(Gfn::new(0), 1000).unwrap();
        let backing = Backing::Host { hva: Hva::new(0x7000_0000) };
        let flags = SlotFlags::LOG_DIRTY_PAGES;
        table.create(SlotSpec { address_space: space, id: SlotId::new(0), gfns, backing, flags }).unwrap();
        let slot = table.view().slot(space, SlotId::new(0)).unwrap();
        let size = RingSize::from_bytes(4096, PageSize::K4, 0).unwrap();
        let memory = size.allocate().unwrap();
        let mut ring = DirtyRing::with_memory(size, &memory).unwrap();
        let start = 100u32.wrapping_neg();
        (ring.dirty, ring.reset) = (start, start);
        let mut reader = RingReader::at(&memory, start).unwrap();
        for round in 0..3 {
            for page in 0..u64::from(size.entries()) {
                let soft_full = page + 1 >= u64::from(size.soft_limit());
                let expected = if soft_full { Pushed::SoftFull } else { Pushed::Recorded };
                assert_eq!(ring.push(slot, page + round), Ok(expected));
            }
            assert_eq!(ring.push(slot, 0), Err(PushError::Full { entries: 256 }));
            let pages: Vec<u64> = reader.collect().map(|page| page.offset).collect();
            assert_eq!(pages, (round..round + 256).collect::<Vec<_>>());
            let reset = ring.reset(table.view(), &mut SoftwareOnly, || false).unwrap();
            assert_eq!((reset.entries, reset.rearmed, ring.used()), (256, 256, 0));
        }
        assert_eq!((ring.dirty, ring.reset), (668, 668));
        assert_eq!(reader.position(), 668);
    }
}
