//! `dirty`: a second copy of the guest's RAM, kept up to date from the dirty log alone, as a live migration does. At the end every
//! page is compared.
//!
//! With pages of 4 KiB the log runs from the start. With pages of 2 MiB it starts when the guest is up and has large pages:
//! then all of RAM is copied once, and what is written is split.
//!
//! With several processors the others go on while one harvests and copies. A page is copied after it was re-armed and all translations
//! were flushed: who writes to it during the copy faults first, and the page is in the next harvest. Without the flush (`--no-shootdown`)
//! another processor goes on writing through what it translated before, and those pages differ at the end.

use alloc::format;
use alloc::string::String;

use memslot::dirty::Consumer;
use memslot::{Gfn, GfnRange, SlotFlags, SlotId};

use super::{Scenario, Turn};
use crate::console::report;
use crate::guest::{Guest, SPACE};
use crate::maps::Log;
use crate::physical::{copy_page, same_page};

/// Rounds before the log starts, where it starts late.
const LATE: u64 = 4;

/// See the [module documentation](self).
pub(crate) struct Dirty {
    consumer: Consumer,
    log: Log,
    /// The first frame of the copy, which has a page for each of the pool.
    copy: u64,
    ticks: u64,
    is_on: bool,
    rounds: u64,
    harvests: u64,
    copied: u64,
}

impl Dirty {
    /// `is_on`: the guest's slots are logged already.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn new(guest: &Guest, copy: u64, ticks: u64, is_on: bool) -> Result<Self, &'static str> {
        let no_memory = "no memory for a consumer of the dirty log";
        let consumer = guest.log.consumer().map_err(|_| no_memory)?;
        let log = guest.maps.log().map_err(|_| no_memory)?;
        Ok(Self { consumer, log, copy, ticks, is_on, rounds: 0, harvests: 0, copied: 0 })
    }

    fn harvest(&mut self, guest: &Guest) -> Result<(), String> {
        let harvest = self.log.harvest(&self.consumer);
        let harvest = harvest.map_err(|error| format!("a harvest failed: {error}"))?;
        for run in harvest.runs() {
            self.copied += update(self.copy, guest, run.gfns);
        }
        harvest.commit();
        self.harvests += 1;
        Ok(())
    }

    /// Starts the log, then copies everything: what is written from now on is noticed.
    fn start(&mut self, guest: &mut Guest) -> Result<(), String> {
        let slots = guest.ram.len();
        let started = guest.table.transaction(|tx| {
            for id in (0..).take(slots) {
                tx.set_flags(SPACE, SlotId::new(id), SlotFlags::LOG_DIRTY_PAGES)?;
            }
            Ok(())
        });
        started.map_err(|error| format!("the log could not be started: {error}"))?;
        for ram in &guest.ram {
            self.copied += update(self.copy, guest, ram.gfns);
        }
        self.is_on = true;
        Ok(())
    }
}

/// Copies frames of RAM into the copy that begins at frame `copy`; returns how many.
fn update(copy: u64, guest: &Guest, gfns: GfnRange) -> u64 {
    let mut copied = 0;
    for gfn in (gfns.start().get()..gfns.end().get()).map(Gfn::new) {
        let (Some(frame), Some(copy)) = (guest.frame(gfn), place(copy, guest, gfn)) else { continue };
        // SAFETY: the copy is this scenario's own; what of the guest's memory is written meanwhile is copied again.
        unsafe { copy_page(frame << 12, copy << 12) };
        copied += 1;
    }
    copied
}

/// The frame of the copy that belongs to one of RAM.
fn place(copy: u64, guest: &Guest, gfn: Gfn) -> Option<u64> {
    let ram = guest.ram.iter().find(|ram| ram.gfns.contains(gfn))?;
    Some(copy + ram.page + (gfn.get() - ram.gfns.start().get()))
}

impl Scenario for Dirty {
    fn ticks(&self) -> u64 {
        self.ticks
    }

    fn round(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        self.rounds += 1;
        if self.is_on {
            return self.harvest(turn.guest);
        }
        if self.rounds == LATE {
            return self.start(turn.guest);
        }
        Ok(())
    }

    fn end(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        let guest = &*turn.guest;
        if !self.is_on {
            return Err("the run was over before the log started".into());
        }
        self.harvest(guest)?;
        let (mut compared, mut differ, mut first) = (0_u64, 0_u64, None);
        for ram in &guest.ram {
            for gfn in (ram.gfns.start().get()..ram.gfns.end().get()).map(Gfn::new) {
                let (Some(frame), Some(copy)) = (guest.frame(gfn), place(self.copy, guest, gfn)) else {
                    continue;
                };
                compared += 1;
                // SAFETY: nobody writes to the guest's memory any more.
                if !unsafe { same_page(frame << 12, copy << 12) } {
                    differ += 1;
                    first = first.or(Some(gfn));
                }
            }
        }
        report!("dirty.rounds {}", self.harvests);
        report!("dirty.copied {}", self.copied);
        report!("dirty.compared {compared}");
        report!("dirty.differ {differ}");
        match first {
            Some(gfn) => Err(format!("{differ} of {compared} pages differ, the first at frame {gfn}")),
            None if compared != guest.pages() => Err(format!("only {compared} pages were compared")),
            None => Ok(()),
        }
    }
}
