//! The dirty log's other half: noticing the next write to a page again, and what the processor's dirty bits say.

use core::convert::Infallible;
use core::marker::PhantomData;

use memslot::dirty::{Consumer, Harvest, HarvestError, Rearm};
use memslot::{AddressSpaceId, GfnRange, OutOfMemory};

use super::cursor::{At, Cursor, Next, Visit};
use super::epoch::Cell;
use super::operation::Task;
use super::protect::{Protect, Take};
use super::shared::hull;
use super::{Mmu, Pin, Shared};
use crate::counted::Counted;
use crate::flush::{Flush, Owed};
use crate::format::Format;
use crate::host::Host;
use crate::invalidate::{ends, range};
use crate::level::Level;

/// Re-arms pages for a [`Consumer`]: by write protection, or by clearing the processor's dirty bits, and asks for one flush
/// a harvest. It takes the lock of the [range operations](crate::Operation) where all pages of tables are write-protected, as they
/// do, in bounded steps; else only once a harvest, to say that it owes a flush.
///
/// ```
/// use memslot::dirty::DirtyLog;
/// use memslot::*;
/// use memslot_mmu::format::{Access, Npt};
/// use memslot_mmu::{Config, Fault, Level, Mmu, user::UserHost};
///
/// let mut table = SlotTable::new(Limits::default())?;
/// let log = DirtyLog::attach(&mut table)?;
/// let config = Config { log: Some(log.clone()), ..Config::default() };
/// let mmu = Mmu::<Npt, _>::attach(&mut table, UserHost::default(), config)?;
/// table.create(SlotSpec {
///     address_space: AddressSpaceId::NORMAL,
///     id: SlotId::new(0),
///     gfns: GfnRange::with_len(Gfn::new(0), 512).unwrap(),
///     backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000) },
///     flags: SlotFlags::LOG_DIRTY_PAGES,
/// })?;
/// let (mut vcpu, consumer) = (mmu.walker()?, log.consumer()?);
/// let mut rearm = mmu.dirty_rearm()?;
///
/// assert_eq!(vcpu.fault(Gpa::new(0x5000), Access::WRITE)?, Fault::Mapped(Level::K4));
/// assert_eq!(rearm.harvest(&consumer)?.pages(), 1);
/// // The page is mapped still; its next write faults and is marked.
/// assert_eq!(vcpu.fault(Gpa::new(0x5000), Access::READ)?, Fault::AlreadyMapped);
/// assert_eq!(vcpu.fault(Gpa::new(0x5000), Access::WRITE)?, Fault::Mapped(Level::K4));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DirtyRearm<F: Format, H: Host> {
    mmu: Mmu<F, H>,
    cell: Counted<Cell>,
    /// What copies of tables owe, see [`Rearm::rearm`] below.
    copied: Owed,
    /// What was re-armed since the last flush.
    armed: Option<GfnRange>,
    /// What of it processors must hear of.
    changed: Option<GfnRange>,
    /// Whether operations know that a flush is owed. They do from before the first entry changes: who finds one changed
    /// already must pay, also if the harvest fails before it asks for its flush.
    owes: bool,
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// What a harvest of the dirty log needs of these tables.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn dirty_rearm(&self) -> Result<DirtyRearm<F, H>, OutOfMemory> {
        let cell = self.shared.add_cell()?;
        Ok(DirtyRearm {
            mmu: self.clone(),
            cell,
            copied: Owed::NOTHING,
            armed: None,
            changed: None,
            owes: false,
        })
    }
}

/// Marks what the processor's dirty bits say.
struct Collect<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    format: PhantomData<F>,
}

impl<F: Format, H: Host> Visit for Collect<'_, F, H> {
    #[inline]
    fn leaf(&mut self, at: &At<'_>) -> Next {
        if at.seen & F::DIRTY != 0 {
            self.shared.mark(range(at.base, at.end()));
        }
        Next::Done
    }
}

/// Marks pages whose dirty bits are set, of frames that are logged, from `from` to `end`. Returns where it stopped after
/// `budget` entries.
pub(crate) fn collect_dirty_bits<F: Format, H: Host>(
    pin: &Pin<'_, F, H>,
    from: u64,
    end: u64,
    budget: usize,
) -> u64 {
    let mut collect = Collect::<F, H> { shared: pin.shared, format: PhantomData };
    Cursor::new(pin, from, end, budget).run(from, &mut collect)
}

impl<F: Format, H: Host> DirtyRearm<F, H> {
    /// With [`DirtyMode::Hardware`](crate::DirtyMode::Hardware), marks the pages of logged slots whose dirty bits are
    /// set. To be called before each harvest; with write protection there is nothing to do.
    ///
    /// What was zapped, and is not flushed yet, is marked, too; and once more when the flush is discharged, as processors may
    /// write until then.
    pub fn collect(&mut self) {
        let shared = &*self.mmu.shared;
        if !shared.uses_dirty_bits() {
            return;
        }
        let pin = shared.pin(&self.cell);
        let view = &pin.published().view;
        for slot in view.slots(shared.space()).filter(|slot| shared.is_logged(slot)) {
            let (start, end) = ends(slot.gfns());
            collect_dirty_bits(&pin, start, end, usize::MAX);
        }
        // After the linked tables: a table that was not found there any more is here, or its flush was discharged. The
        // lock also waits for whoever has just emptied an entry, and has not marked it yet.
        shared.lock().collect_owed();
    }

    /// Collects, and takes all dirty pages.
    ///
    /// # Errors
    /// As [`Consumer::harvest`].
    pub fn harvest<'c>(&mut self, consumer: &'c Consumer) -> Result<Harvest<'c>, HarvestError<Infallible>> {
        self.collect();
        consumer.harvest(self)
    }
}

impl<F: Format, H: Host> Rearm for DirtyRearm<F, H> {
    type Error = Infallible;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Infallible> {
        let shared = &*self.mmu.shared;
        if space != shared.space() {
            return Ok(());
        }
        let take = if shared.uses_dirty_bits() { Take::DirtyOrLarge } else { Take::Writing };
        let mut protect = Protect::<F, false>::new(take, 0);
        let (start, end) = ends(gfns);
        let end = end.min(Shared::<F, H>::END);
        let whole = Level::M2.align_down(end);
        let mut at = start;
        while at < end {
            if take == Take::Writing && Level::M2.is_aligned(at) && at < whole {
                // All pages of tables: copies are quicker, and are made with the lock held, in steps.
                let flush = self.mmu.start(Task::Protect(take), range(at, whole)).run();
                self.copied.add(shared, &flush.into_owed());
                at = whole;
                continue;
            }
            if !self.owes {
                // Once a harvest: of all frames, as it is not known which there will be.
                shared.lock().owe(range(0, Shared::<F, H>::END), true);
                self.owes = true;
            }
            let pin = shared.pin(&self.cell);
            let stop = end.min(Level::M2.align_down(at) + Level::M2.pages());
            match pin.leaf_table(at) {
                Some(table) => protect.small_pages(table, at, stop),
                None => {
                    Cursor::new(&pin, at, stop, usize::MAX).run(at, &mut protect);
                }
            }
            at = stop;
        }
        self.armed = Some(hull(self.armed, gfns));
        if let Some(gfns) = protect.changed {
            self.changed = Some(hull(self.changed, gfns));
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        let shared = &*self.mmu.shared;
        let Some(armed) = self.armed.take() else { return Ok(()) };
        let mut changed = self.changed.take();
        let mut owed = core::mem::replace(&mut self.copied, Owed::NOTHING);
        owed.count += usize::from(core::mem::take(&mut self.owes));
        let own = owed.count;
        // Whoever has protected or zapped such a page before may not have flushed yet.
        let mut locked = shared.lock();
        if locked.is_owed_beside(own, armed) {
            changed = Some(hull(changed, armed));
        }
        owed.gfns = changed.map(|gfns| hull(owed.gfns, gfns)).or(owed.gfns);
        if owed.gfns.is_none() {
            // Nothing has changed, and others have been told of a flush for nothing.
            locked.discharged(own);
            return Ok(());
        }
        drop(locked);
        if own > 0 {
            Flush::of(&self.mmu, owed).discharge();
        } else if let Some(gfns) = changed {
            shared.flush(gfns);
        }
        Ok(())
    }
}

impl<F: Format, H: Host> Drop for DirtyRearm<F, H> {
    fn drop(&mut self) {
        // What a harvest that failed has left.
        let Ok(()) = Rearm::flush(self);
        self.mmu.shared.remove_cell(&self.cell);
    }
}
