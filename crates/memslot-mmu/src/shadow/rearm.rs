//! What is done through the reverse map without the lock: the dirty log's write protection, and aging.
//!
//! Whoever does it announces itself twice: to the reverse map, whose lists it walks, and to the shadow tables, whose entries it changes.
//! An entry that is seen in a list may have been dropped since, or be another one by now. It is a leaf's single bit that is taken,
//! by a compare-exchange against a leaf: the worst that can come of it is a fault too many.

use core::convert::Infallible;

use memslot::dirty::{Consumer, Harvest, HarvestError, Rearm};
use memslot::{AddressSpaceId, Gfn, GfnRange, OutOfMemory};

use super::shared::Shared;
use super::slots::Slots;
use super::spte::SpteRef;
use super::{Shadow, ShadowHost, spte};
use crate::counted::Counted;
use crate::invalidate::range;
use crate::level::Level;
use crate::nested::epoch::Cell;
use crate::nested::shared::hull;
use crate::rmap::{LEVELS, Walker};
use crate::sync::{AtomicU64, Ordering};

/// A thread's access to the reverse map without the lock.
struct Outside<H: ShadowHost> {
    shadow: Shadow<H>,
    cell: Counted<Cell>,
    walker: Walker<SpteRef>,
    /// The slots as they were at this serial.
    slots: Counted<Slots>,
    serial: u64,
}

impl<H: ShadowHost> Outside<H> {
    fn new(shadow: &Shadow<H>) -> Result<Self, OutOfMemory> {
        let shared = &*shadow.shared;
        let walker = shared.rmap.walker().map_err(|_| OutOfMemory)?;
        let (cell, slots, serial) = shared.with(|locked| {
            let serial = shared_serial(locked.shared);
            Ok::<_, OutOfMemory>((locked.state.cells.add()?, locked.state.slots.clone(), serial))
        })?;
        Ok(Self { shadow: shadow.clone(), cell, walker, slots, serial })
    }

    /// Changes leaves that map these frames: `change` says what an entry becomes, and `None` leaves it.
    fn for_each(
        &mut self,
        space: AddressSpaceId,
        gfns: GfnRange,
        mut change: impl FnMut(Gfn, Level, u64) -> Option<u64>,
    ) {
        let shared = &*self.shadow.shared;
        if shared_serial(shared) != self.serial {
            let (slots, serial) =
                shared.with(|locked| (locked.state.slots.clone(), shared_serial(locked.shared)));
            (self.slots, self.serial) = (slots, serial);
        }
        shared.epoch.enter(&self.cell, false);
        let inside = self.walker.enter();
        for level in LEVELS {
            for rmap in self.slots.rmaps_in(space, gfns) {
                for (gfn, list) in rmap.lists(level, gfns) {
                    for entry in inside.entries(list) {
                        let entry = reach(shared, entry);
                        let mut seen = entry.load(Ordering::SeqCst);
                        while spte::is_leaf(seen, level) {
                            let Some(new) = change(gfn, level, seen) else { break };
                            match entry.compare_exchange(seen, new, Ordering::SeqCst, Ordering::SeqCst) {
                                Ok(_) => break,
                                Err(now) => seen = now,
                            }
                        }
                    }
                }
            }
        }
        drop(inside);
        self.cell.leave();
    }
}

fn shared_serial<H: ShadowHost>(shared: &Shared<H>) -> u64 {
    shared.serial.load(Ordering::SeqCst)
}

/// An entry that was seen in a list, by somebody who is announced.
fn reach<H: ShadowHost>(shared: &Shared<H>, entry: SpteRef) -> &AtomicU64 {
    // SAFETY: the table was not freed when the entry was seen, after the announcement: it is freed when those inside have left.
    unsafe { &shared.host.reach(entry.table()).as_ref().0[entry.index()] }
}

impl<H: ShadowHost> Drop for Outside<H> {
    fn drop(&mut self) {
        let cell = &self.cell;
        self.shadow.shared.with(|locked| locked.state.cells.remove(cell));
    }
}

/// Re-arms pages for a [`Consumer`] by write protection. It takes the lock to say that it begins, and for its one flush a harvest; none while it
/// re-arms.
///
/// A harvest that fails in between (where a consumer re-arms in other tables as well) leaves pages without W that processors may write still. Until this
/// has flushed, with the next harvest or when it is dropped, others who must be sure flush as well.
pub struct ShadowRearm<H: ShadowHost> {
    outside: Outside<H>,
    /// What was re-armed since the last flush.
    armed: Option<GfnRange>,
    /// What of it processors must hear of.
    changed: Option<GfnRange>,
}

/// Looks which pages were used.
pub struct ShadowAger<H: ShadowHost> {
    outside: Outside<H>,
}

impl<H: ShadowHost> Shadow<H> {
    /// What a harvest of the dirty log needs of these tables.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn dirty_rearm(&self) -> Result<ShadowRearm<H>, OutOfMemory> {
        Ok(ShadowRearm { outside: Outside::new(self)?, armed: None, changed: None })
    }

    /// What aging needs of these tables: make one for each thread that does it, and keep it.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn ager(&self) -> Result<ShadowAger<H>, OutOfMemory> {
        Ok(ShadowAger { outside: Outside::new(self)? })
    }
}

impl<H: ShadowHost> ShadowAger<H> {
    /// How many of the entries that map these frames were used since they were aged last. Large pages count once.
    pub fn age(&mut self, space: AddressSpaceId, gfns: GfnRange) -> u64 {
        let mut young = 0;
        self.outside.for_each(space, gfns, |_, _, seen| {
            let is_young = seen & spte::ACCESSED != 0;
            young += u64::from(is_young);
            is_young.then_some(seen & !spte::ACCESSED)
        });
        young
    }

    /// Whether any of these pages was used since they were aged last. Changes nothing.
    pub fn is_young(&mut self, space: AddressSpaceId, gfns: GfnRange) -> bool {
        let mut is_young = false;
        self.outside.for_each(space, gfns, |_, _, seen| {
            is_young |= seen & spte::ACCESSED != 0;
            None
        });
        is_young
    }
}

impl<H: ShadowHost> ShadowRearm<H> {
    /// Takes all dirty pages.
    ///
    /// # Errors
    /// As [`Consumer::harvest`].
    pub fn harvest<'c>(&mut self, consumer: &'c Consumer) -> Result<Harvest<'c>, HarvestError<Infallible>> {
        consumer.harvest(self)
    }
}

impl<H: ShadowHost> Rearm for ShadowRearm<H> {
    type Error = Infallible;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Infallible> {
        if self.armed.is_none() {
            // Before the first W goes: whoever finds it gone has to know that nobody may have been flushed.
            self.outside.shadow.shared.with(|locked| locked.state.rearming += 1);
        }
        let mut changed = self.changed;
        self.outside.for_each(space, gfns, |gfn, level, seen| {
            if seen & spte::WRITE == 0 {
                return None;
            }
            changed = Some(hull(changed, range(gfn.get(), gfn.get() + level.pages())));
            Some(seen & !spte::WRITE)
        });
        self.changed = changed;
        self.armed = Some(hull(self.armed, gfns));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        let Some(armed) = self.armed.take() else { return Ok(()) };
        let changed = self.changed.take();
        self.outside.shadow.shared.with(|locked| {
            locked.state.rearming -= 1;
            if let Some(changed) = changed {
                locked.owe(changed);
            }
            // Whoever has dropped or protected such an entry before may not have flushed yet.
            locked.flush_later(armed);
        });
        Ok(())
    }
}

impl<H: ShadowHost> Drop for ShadowRearm<H> {
    fn drop(&mut self) {
        // What a harvest that failed has left.
        let Ok(()) = Rearm::flush(self);
    }
}
