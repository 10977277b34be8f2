//! A thread's own access to the tables.

use memslot::{Gfn, GfnRange, Gpa, OutOfMemory};

use super::epoch::Cell;
use super::fault::{Attempt, Fault, FaultError, LastSlot, Wish};
use super::{Mmu, Shared};
use crate::cache::Cache;
use crate::counted::Counted;
use crate::format::{Access, Format, MemoryType};
use crate::host::{Host, Pfn};
use crate::invalidate::ends;
use crate::level::{Level, PAGE_SHIFT};

/// A thread's (a virtual processor's) own access to the tables. Make one per thread and keep it.
///
/// Its calls take no lock, but for tables when its own few are used up, and wait for nobody.
pub struct Walker<F: Format, H: Host> {
    pub(super) mmu: Mmu<F, H>,
    pub(super) cell: Counted<Cell>,
    cache: Cache,
    last_slot: LastSlot,
}

/// What the tables say of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// The host frame of the 4 KiB page asked for.
    pub pfn: Pfn,
    /// The size of the page it is in.
    pub level: Level,
    /// What the processor may do.
    pub access: Access,
    /// How it is cached.
    pub memory: MemoryType,
    /// Whether the processor has used the page, and written to it, where the format says so.
    pub accessed: bool,
    /// See `accessed`.
    pub dirty: bool,
}

/// How far a prefault has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct Prefaulted {
    /// The frames that are left.
    pub rest: GfnRange,
    /// Why it went no further: for want of budget if there are frames left and this is
    /// [`AlreadyMapped`](Fault::AlreadyMapped) or [`Mapped`](Fault::Mapped).
    pub last: Fault,
}

impl<F: Format, H: Host> Walker<F, H> {
    pub(super) fn new(mmu: Mmu<F, H>) -> Result<Self, OutOfMemory> {
        let cell = mmu.shared.add_cell()?;
        Ok(Self { mmu, cell, cache: Cache::new(), last_slot: LastSlot::NONE })
    }

    /// The tables.
    #[must_use]
    pub fn mmu(&self) -> &Mmu<F, H> {
        &self.mmu
    }

    /// A processor could not do this access: maps the page, or says what else to do. After [`Mapped`](Fault::Mapped),
    /// [`AlreadyMapped`](Fault::AlreadyMapped) and [`Retry`](Fault::Retry), the guest goes on and tries again.
    ///
    /// A page that is written in a logged slot is marked in the dirty log when this returns.
    ///
    /// # Errors
    /// [`FaultError`]; nothing has changed.
    #[inline]
    pub fn fault(&mut self, gpa: Gpa, access: Access) -> Result<Fault, FaultError<H::Error>> {
        let gfn = gpa.get() >> PAGE_SHIFT;
        let wish = Wish { gfn, access, end: gfn + 1, prefault: false };
        // The first attempt stands alone: a fault that finds its table keeps nothing for a second one.
        let needed = if gfn < Shared::<F, H>::END {
            let pin = self.mmu.shared.pin(&self.cell);
            match pin.attempt(&mut self.cache, &mut self.last_slot, &wish)? {
                Some(Attempt::Done(fault, _)) => return Ok(fault),
                Some(Attempt::Tables(needed)) => needed,
                None => 0,
            }
        } else {
            0
        };
        self.resolve(&wish, needed).map(|(fault, _)| fault)
    }

    /// Maps frames before they are used, as a read would, until all are mapped or `budget` tries were made. A page
    /// that cannot be mapped ends it: `last` says why.
    ///
    /// ```
    /// # use memslot::*;
    /// # use memslot_mmu::{format::Npt, *};
    /// # let mut table = SlotTable::new(Limits::default())?;
    /// # let mmu = Mmu::<Npt, _>::attach(&mut table, user::UserHost::default(), Config::default())?;
    /// # table.create(SlotSpec { address_space: AddressSpaceId::NORMAL, id: SlotId::new(0),
    /// #     gfns: GfnRange::with_len(Gfn::new(0), 1000).unwrap(),
    /// #     backing: Backing::Host { hva: Hva::new(0x7000_1000) }, flags: SlotFlags::empty() })?;
    /// # let mut walker = mmu.walker()?;
    /// // A slot of 1000 pages at 0.
    /// let result = walker.prefault(GfnRange::with_len(Gfn::new(0), 2000).unwrap(), usize::MAX)?;
    /// assert_eq!((result.rest.start(), result.last), (Gfn::new(1000), Fault::Mmio));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`FaultError`]; what was mapped until then stays.
    pub fn prefault(&mut self, gfns: GfnRange, budget: usize) -> Result<Prefaulted, FaultError<H::Error>> {
        let (mut gfn, end) = ends(gfns);
        let mut last = Fault::AlreadyMapped;
        for _ in 0..budget {
            if gfn >= end {
                break;
            }
            let wish = Wish { gfn, access: Access::READ, end, prefault: true };
            let (fault, pages) = self.resolve(&wish, 0)?;
            last = fault;
            if !matches!(fault, Fault::Mapped(_) | Fault::AlreadyMapped) {
                break;
            }
            gfn = (gfn + pages).min(end);
        }
        Ok(Prefaulted { rest: crate::invalidate::range(gfn, end), last })
    }

    #[cfg(all(test, loom))]
    pub(super) fn top_up(&mut self) {
        self.cache.top_up(&self.mmu.shared, 1).expect("there is memory");
    }

    /// Resolves a fault, with so many tables to begin with.
    #[inline(never)]
    fn resolve(&mut self, wish: &Wish, mut needed: usize) -> Result<(Fault, u64), FaultError<H::Error>> {
        if wish.gfn >= Shared::<F, H>::END {
            let (gfn, end) = (Gfn::new(wish.gfn), Gfn::new(Shared::<F, H>::END));
            return Err(FaultError::BeyondTables { gfn, end });
        }
        loop {
            if needed > self.cache.len() {
                self.cache.top_up(&self.mmu.shared, needed)?;
            }
            let attempt = {
                let pin = self.mmu.shared.pin(&self.cell);
                pin.fault(&mut self.cache, &mut self.last_slot, wish)?
            };
            match attempt {
                Attempt::Done(fault, pages) => return Ok((fault, pages)),
                Attempt::Tables(tables) => needed = tables,
            }
        }
    }

    /// What the tables say of an address; `None` where nothing is mapped.
    #[must_use]
    pub fn translate(&mut self, gpa: Gpa) -> Option<Mapping> {
        let gfn = gpa.get() >> PAGE_SHIFT;
        if gfn >= Shared::<F, H>::END {
            return None;
        }
        let pin = self.mmu.shared.pin(&self.cell);
        let (entry, level) = pin.leaf(gfn)?;
        let within = gfn & (level.pages() - 1);
        Some(Mapping {
            pfn: Pfn::new(F::pfn(entry, level).get() + within),
            level,
            access: F::access(entry),
            memory: F::memory(entry),
            accessed: entry & F::ACCESSED != 0,
            dirty: entry & F::DIRTY != 0,
        })
    }
}

impl<F: Format, H: Host> Drop for Walker<F, H> {
    fn drop(&mut self) {
        self.cache.drain(&self.mmu.shared);
        self.mmu.shared.remove_cell(&self.cell);
    }
}
