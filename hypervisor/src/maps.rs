//! What maps the guest's memory: nested tables, or shadow tables. Both follow the slots by themselves; what scenarios do to them
//! besides is here, for either.

use alloc::boxed::Box;
use alloc::string::String;
use core::convert::Infallible;

use memslot::dirty::{Consumer, Harvest, HarvestError, Rearm};
use memslot::{AddressSpaceId, GfnRange, HvaRange, OutOfMemory};
use memslot_mmu::format::Npt;
use memslot_mmu::shadow::{Shadow, ShadowInvalidation, ShadowRearm};
use memslot_mmu::{DirtyRearm, Invalidation, Work};

use crate::guest::{Guest, SPACE};
use crate::paging::{Host, Mmu};

/// See the [module documentation](self). There is one guest, whose tables are never given up.
#[derive(Clone, Copy)]
pub(crate) enum Maps {
    Nested(&'static Mmu),
    Shadow(&'static Shadow<&'static Host>),
}

/// An invalidation, until it is dropped.
pub(crate) enum Held {
    Nested(#[expect(dead_code, reason = "held")] Invalidation<'static, Npt, &'static Host>),
    Shadow(#[expect(dead_code, reason = "held")] ShadowInvalidation<'static, &'static Host>),
}

/// The tables' half of the dirty log.
pub(crate) enum Log {
    Nested(DirtyRearm<Npt, &'static Host>),
    Shadow(ShadowRearm<&'static Host>),
}

impl Maps {
    pub(crate) fn nested(mmu: &Mmu) -> Self {
        Self::Nested(Box::leak(Box::new(mmu.clone())))
    }

    pub(crate) fn shadow(shadow: Shadow<&'static Host>) -> Self {
        Self::Shadow(Box::leak(Box::new(shadow)))
    }

    /// Does something to what is mapped there. Shadow tables collapse by themselves only, when logging stops: what is to be
    /// collapsed is zapped, and is made again as large as it can be.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn change(self, work: Work, gfns: GfnRange) -> Result<(), OutOfMemory> {
        match self {
            Self::Nested(mmu) => mmu.begin(work, gfns).run().discharge(),
            Self::Shadow(shadow) if matches!(work, Work::WriteProtect | Work::ClearDirty) => {
                let mut rearm = shadow.dirty_rearm()?;
                let Ok(()) = rearm.rearm(SPACE, gfns);
                let Ok(()) = rearm.flush();
            }
            Self::Shadow(shadow) => shadow.zap_gfn_range(SPACE, gfns),
        }
        Ok(())
    }

    /// Zaps frames, so many entries at a time as far as the tables can.
    pub(crate) fn zap(self, space: AddressSpaceId, gfns: GfnRange, entries: usize) {
        match self {
            Self::Nested(mmu) => {
                let mut zap = mmu.begin(Work::Zap, gfns);
                while zap.step(entries) {}
                zap.finish().discharge();
            }
            Self::Shadow(shadow) => shadow.zap_gfn_range(space, gfns),
        }
    }

    /// Memory whose frames are going to change.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn invalidate(self, hvas: HvaRange) -> Result<Held, OutOfMemory> {
        match self {
            Self::Nested(mmu) => mmu.invalidate_hva(hvas).map(Held::Nested),
            Self::Shadow(shadow) => shadow.invalidate_hva(hvas).map(Held::Shadow),
        }
    }

    /// The same for guest frames; with shadow tables only for those that have one slot.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn invalidate_frames(self, guest: &Guest, gfns: GfnRange) -> Result<Held, OutOfMemory> {
        if let Self::Nested(mmu) = self {
            return mmu.invalidate_gfns(gfns).map(Held::Nested);
        }
        let hvas = guest.table.view().slot_at(SPACE, gfns.start()).and_then(|slot| {
            let pages = gfns.len().min(slot.gfns().end().get() - gfns.start().get());
            HvaRange::with_len(slot.hva_of(gfns.start())?, pages << 12)
        });
        self.invalidate(hvas.unwrap_or_default())
    }

    /// What a harvest of the dirty log needs.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn log(self) -> Result<Log, OutOfMemory> {
        match self {
            Self::Nested(mmu) => mmu.dirty_rearm().map(Log::Nested),
            Self::Shadow(shadow) => shadow.dirty_rearm().map(Log::Shadow),
        }
    }

    /// Whether everything is as it must be; `with_guest`: and as the guest's tables say.
    ///
    /// # Errors
    /// What is not.
    pub(crate) fn check(self, with_guest: bool) -> Result<(), String> {
        match self {
            Self::Nested(_) => Ok(()),
            Self::Shadow(shadow) if with_guest => shadow.check(),
            Self::Shadow(shadow) => shadow.check_maps(),
        }
    }
}

impl Log {
    /// Takes what was written.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn harvest<'c>(
        &mut self,
        consumer: &'c Consumer,
    ) -> Result<Harvest<'c>, HarvestError<Infallible>> {
        match self {
            Self::Nested(rearm) => rearm.harvest(consumer),
            Self::Shadow(rearm) => consumer.harvest(rearm),
        }
    }
}
