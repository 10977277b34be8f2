//! Invalidations: memory whose frames change, and the faults beside that.
//!
//! Two things keep a fault from installing what is no longer true:
//!
//! * **What has changed already** it notices by itself: every change of what a fault would find (slots, frames) also
//!   changes *every entry* it is about, those that are empty, too. A fault reads its entry first, then looks up what
//!   to put there, and installs with a compare-exchange against just what it has read. So the entry is the token, one
//!   per range, and a change elsewhere disturbs nobody.
//! * **What is changing right now** is listed here. A host that moves pages [begins](crate::Mmu::invalidate_hva) an
//!   invalidation, changes its own tables, and ends it. In between a fault must not ask for the frame, as the answer
//!   may still be the old one; it has [`Retry`](crate::Fault::Retry).
//!
//! An invalidation is a value, [`Invalidation`], which says itself what it covers: no lookup is done at its end that
//! could differ from that at its start, and none can end twice. Nobody waits for invalidations: a slot
//! that is created while one is under way is covered by it, because ranges of host memory are compared, not slots.

use alloc::vec::Vec;

use memslot::{Gfn, GfnRange, HvaRange, OutOfMemory};

use crate::format::Format;
use crate::host::Host;
use crate::nested::Mmu;
use crate::sync::{AtomicUsize, Mutex, Ordering};

/// What an invalidation is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Covered {
    Hva(HvaRange),
    Gfns(GfnRange),
}

/// The invalidations under way.
pub(crate) struct Invalidations {
    /// How many there are, for faults: without any, that is all they look at.
    count: AtomicUsize,
    list: Mutex<List>,
}

struct List {
    next: u64,
    under_way: Vec<(u64, Covered)>,
}

impl Invalidations {
    /// `first` is the number of the first one, so that tests can go through the wrap.
    pub(crate) fn starting_at(first: u64) -> Self {
        let list = List { next: first, under_way: Vec::new() };
        Self { count: AtomicUsize::new(0), list: Mutex::new(list) }
    }

    pub(crate) fn begin(&self, covered: Covered) -> Result<u64, OutOfMemory> {
        let mut list = self.list.lock();
        list.under_way.try_reserve(1).map_err(|_| OutOfMemory)?;
        let number = list.next;
        list.next = number.wrapping_add(1);
        list.under_way.push((number, covered));
        self.count.store(list.under_way.len(), Ordering::SeqCst);
        Ok(number)
    }

    pub(crate) fn end(&self, number: u64) {
        let mut list = self.list.lock();
        if let Some(at) = list.under_way.iter().position(|&(other, _)| other == number) {
            list.under_way.swap_remove(at);
        }
        self.count.store(list.under_way.len(), Ordering::SeqCst);
    }

    /// How many are under way.
    #[inline]
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Whether one covers any of these frames, or of the memory behind them.
    #[cold]
    pub(crate) fn cover(&self, gfns: GfnRange, hvas: Option<HvaRange>) -> bool {
        self.list.lock().under_way.iter().any(|&(_, covered)| match covered {
            Covered::Hva(range) => hvas.is_some_and(|hvas| hvas.overlaps(&range)),
            Covered::Gfns(range) => gfns.overlaps(&range),
        })
    }
}

/// An invalidation under way: nothing maps what it covers, and nothing will until it is dropped.
#[must_use = "faults retry for as long as this exists: keep it until the memory has changed"]
pub struct Invalidation<'m, F: Format, H: Host> {
    mmu: &'m Mmu<F, H>,
    number: u64,
}

impl<F: Format, H: Host> Invalidation<'_, F, H> {
    /// The memory has changed: faults find it as it is now. The same as dropping it.
    pub fn end(self) {}
}

impl<F: Format, H: Host> Drop for Invalidation<'_, F, H> {
    fn drop(&mut self) {
        self.mmu.shared.invalidations.end(self.number);
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Begins to invalidate host memory: when this returns, no processor has a translation to it (flushed already),
    /// and until the result is dropped no fault makes one. Slots are found through the hva index; aliases are all
    /// found.
    ///
    /// ```
    /// # use memslot::*;
    /// # use memslot_mmu::{format::{Access, Npt}, *};
    /// # let mut table = SlotTable::new(Limits::default())?;
    /// # let mmu = Mmu::<Npt, _>::attach(&mut table, user::UserHost::default(), Config::default())?;
    /// # let hva = Hva::new(0x7000_0000);
    /// # table.create(SlotSpec { address_space: AddressSpaceId::NORMAL, id: SlotId::new(0),
    /// #     gfns: GfnRange::with_len(Gfn::new(0), 16).unwrap(), backing: Backing::Host { hva }, flags: SlotFlags::empty() })?;
    /// # let mut walker = mmu.walker()?;
    /// walker.fault(Gpa::new(0x3000), Access::READ)?;
    /// let page = HvaRange::with_len(Hva::new(0x7000_3000), 4096).unwrap();
    ///
    /// let invalidation = mmu.invalidate_hva(page)?;
    /// assert_eq!(walker.translate(Gpa::new(0x3000)), None);
    /// assert_eq!(walker.fault(Gpa::new(0x3000), Access::READ)?, Fault::Retry);
    /// // ... the host puts another page there ...
    /// invalidation.end();
    /// assert!(matches!(walker.fault(Gpa::new(0x3000), Access::READ)?, Fault::Mapped(_)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing was invalidated.
    pub fn invalidate_hva(&self, hvas: HvaRange) -> Result<Invalidation<'_, F, H>, OutOfMemory> {
        let number = self.shared.invalidations.begin(Covered::Hva(hvas))?;
        let invalidation = Invalidation { mmu: self, number };
        // Taken after the invalidation is listed: a slot that this version lacks is published later, and whoever
        // faults there sees the list.
        let view = self.shared.current_view();
        let mut flush = self.nothing_owed();
        for hit in view.slots_at_hva(self.address_space(), hvas) {
            flush.merge(self.zap(hit.gfns));
        }
        flush.discharge();
        Ok(invalidation)
    }

    /// As [`invalidate_hva`](Self::invalidate_hva), for memory that has no host address, or that is named by its
    /// frames.
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing was invalidated.
    pub fn invalidate_gfns(&self, gfns: GfnRange) -> Result<Invalidation<'_, F, H>, OutOfMemory> {
        let number = self.shared.invalidations.begin(Covered::Gfns(gfns))?;
        let invalidation = Invalidation { mmu: self, number };
        self.zap(gfns).discharge();
        Ok(invalidation)
    }

    /// How many invalidations are under way.
    #[must_use]
    pub fn invalidations(&self) -> usize {
        self.shared.invalidations.count()
    }
}

/// The frames as numbers.
pub(crate) fn ends(gfns: GfnRange) -> (u64, u64) {
    (gfns.start().get(), gfns.end().get())
}

/// The frames that are so much further.
pub(crate) fn moved_by(gfns: GfnRange, further: u64) -> GfnRange {
    let (start, end) = ends(gfns);
    range(start.wrapping_add(further), end.wrapping_add(further))
}

/// The range between two frame numbers; empty where they are inverted.
pub(crate) fn range(from: u64, to: u64) -> GfnRange {
    GfnRange::new(Gfn::new(from), Gfn::new(to)).unwrap_or_default()
}
