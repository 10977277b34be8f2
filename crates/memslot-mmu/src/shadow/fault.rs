//! The page fault: from the guest's tables to entries in ours.
//!
//! ```text
//!  fast path        no lock      the entry is there and lacks only W                          → fast
//!  top up           no lock      the only step that may run out of memory
//!  look             lock         walk the guest's tables: its own fault? no memory there?
//!  ask              no lock      which frame is behind it (that may take long), and behind its neighbours
//!  install          lock         do the findings still hold? then down from the root, a level at a time:
//!                                find or make the shadow page, link it; at last the leaf         → install
//! ```
//!
//! Between *look* and *install* anything may change. Slots and invalidations are numbered [changes](super::slots::Changes), compared
//! by their frames; the guest's entries are read again, each after the page that shadows its table is tracked or known to be unsync: so
//! either the entry is as the walk has found it, or the fault starts again, or the change comes later and is noticed.

use memslot::{Gfn, GfnRange, Gpa, HvaRange, Slot, SlotFlags};

use super::fast::descend;
use super::guest::{Entry, ErrorCode, GuestAccess, Mode, NoPage, Rights, Walk, WalkError, walk};
use super::page::ShadowPage;
use super::reserve::Reserve;
use super::shared::{Locked, Shared};
use super::slots::Slots;
use super::stats::Counter;
use super::tables::{Tables, Unreachable, entry_at};
use super::vcpu::{Loaded, ShadowFault};
use super::{ShadowHost, spte};
use crate::counted::Counted;
use crate::format::Access;
use crate::host::{Answer, Frame};
use crate::invalidate::{ends, range};
use crate::level::{ENTRIES, Level, PAGE_SHIFT};
use crate::rmap::LEVELS;
use crate::sync::Ordering;

/// So many entries side by side are made at once.
pub(super) const GROUP: usize = if ENTRIES < 8 { ENTRIES } else { 8 };

/// What a look at the guest's tables has found.
#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment, and most are the larger")]
pub(super) enum Look {
    /// There is nothing to be mapped.
    Done(ShadowFault),
    /// One of the guest's tables cannot be reached.
    Unreachable(Unreachable),
    /// The frame behind the page is needed.
    Found(Found),
}

/// Where the entry for an address is to be, and what the pages on the way there are found by.
pub(super) struct Way<'a> {
    pub(super) va: u64,
    pub(super) walk: &'a Walk,
    pub(super) rights: Rights,
    pub(super) gfn: Gfn,
}

/// What is to be mapped.
pub(super) struct Found {
    pub(super) va: u64,
    pub(super) access: GuestAccess,
    pub(super) walk: Walk,
    /// What the guest permits, with what `CR0.WP` and the dirty bit make of it.
    pub(super) rights: Rights,
    pub(super) gfn: Gfn,
    pub(super) slot: Slot,
    pub(super) slots: Counted<Slots>,
    /// The last change when this was found.
    pub(super) change: u64,
    /// Whether anything was being invalidated.
    pub(super) beside_invalidations: bool,
    pub(super) neighbours: [Option<Neighbour>; GROUP],
}

/// An entry beside the one that has faulted.
#[derive(Clone, Copy)]
pub(super) struct Neighbour {
    pub(super) index: usize,
    /// The guest's entry; 0 for one of a direct page.
    pub(super) gpte: u64,
    pub(super) gfn: Gfn,
    pub(super) slot: Slot,
    /// Found later.
    pub(super) frame: Option<Frame>,
}

impl Found {
    pub(super) fn way(&self) -> Way<'_> {
        Way { va: self.va, walk: &self.walk, rights: self.rights, gfn: self.gfn }
    }

    pub(super) fn is_write(&self) -> bool {
        self.access.contains(GuestAccess::WRITE)
    }
}

/// What the access is for the host.
fn host_access(access: GuestAccess) -> Access {
    let mut wanted = Access::READ;
    wanted.set(Access::WRITE, access.contains(GuestAccess::WRITE));
    wanted.set(Access::EXECUTE, access.contains(GuestAccess::FETCH));
    wanted
}

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// Walks the guest's tables.
    pub(super) fn look(
        &mut self,
        reserve: &mut Reserve,
        loaded: &Loaded,
        va: u64,
        access: GuestAccess,
    ) -> Look {
        if loaded.is_stale(self.shared) {
            return Look::Done(ShadowFault::Retry);
        }
        let (paging, space) = (&loaded.paging, loaded.space);
        let walk = match walk(&Tables { locked: self, space }, paging, va, access) {
            Ok(Ok(walk)) => walk,
            Ok(Err(why)) => {
                // The processor forgets what it knew of an address that faults: of one without an entry, nothing.
                if self.has_entry(loaded, va) {
                    self.sync_path(loaded, va);
                }
                let (counter, fault) = match why {
                    NoPage::Fault(fault) => (Counter::Injected, ShadowFault::Inject(fault)),
                    NoPage::NoTable { entry, fault } => {
                        (Counter::NoTable, ShadowFault::NoTable { entry, fault })
                    }
                };
                self.count(counter);
                return Look::Done(fault);
            }
            Err(WalkError::Tables(unreachable)) => return Look::Unreachable(unreachable),
            Err(WalkError::Busy { .. }) => return Look::Done(ShadowFault::Retry),
        };
        let (gpa, gfn) = (walk.gpa, Gfn::new(walk.gpa.get() >> PAGE_SHIFT));
        let is_write = access.contains(GuestAccess::WRITE);
        let slot = self.slot_at(space, gfn);
        if slot.is_none() {
            self.sync_path(loaded, va);
            self.remember_mmio(reserve, loaded, va, &walk);
            return Look::Done(ShadowFault::Mmio(gpa));
        }
        let Some(slot) = slot.filter(|slot| !(is_write && slot.flags().contains(SlotFlags::READONLY))) else {
            self.sync_path(loaded, va);
            return Look::Done(ShadowFault::Mmio(gpa));
        };
        let beside_invalidations = self.is_invalidating();
        if beside_invalidations {
            let one = range(gfn.get(), gfn.get() + 1);
            let is_closed = |(other, gfns): &(_, GfnRange)| *other == space && gfns.overlaps(&one);
            if self.state.closed.iter().any(is_closed) {
                return Look::Done(ShadowFault::Retry);
            }
            let hvas = slot.hva_of(gfn).and_then(|hva| HvaRange::with_len(hva, 1 << PAGE_SHIFT));
            if self.shared.invalidations.cover(one, hvas) {
                return Look::Done(ShadowFault::Retry);
            }
        }
        let mut rights = walk.rights;
        if paging.mode() == Mode::Off {
            // What the guest does not know of restricts nobody: pages are users' and supervisors'.
            rights = Rights::all();
        } else {
            let overrides =
                is_write && !access.contains(GuestAccess::USER) && !rights.contains(Rights::WRITE);
            if overrides && !paging.write_protect() {
                // The supervisor writes to a read-only page. The processor runs with CR0.WP set: the page becomes
                // writable, and is no user's, so that a user's next access faults and takes the writing away again.
                rights |= Rights::WRITE;
                rights -= Rights::USER;
                if paging.smep() {
                    rights -= Rights::EXECUTE;
                }
            } else if !walk.dirty {
                rights -= Rights::WRITE;
            }
        }
        let mut found = Found {
            va,
            access,
            walk,
            rights,
            gfn,
            slot,
            slots: self.state.slots.clone(),
            change: self.state.changes.number(),
            beside_invalidations,
            neighbours: [None; GROUP],
        };
        if !beside_invalidations {
            self.find_neighbours(loaded, &mut found);
        }
        Look::Found(found)
    }

    /// The entries beside a page of 4 KiB that the guest maps as such.
    fn find_neighbours(&self, loaded: &Loaded, found: &mut Found) {
        let Some(last) = found.walk.steps().last().filter(|step| step.level == Level::K4) else { return };
        let at = Level::K4.index(found.va >> PAGE_SHIFT);
        let first = at - at % GROUP;
        // Those that are there already are left alone.
        let page = self.leaf_page(loaded, found.va).filter(|page| page.level() == Level::K4);
        let (space, size) = (loaded.space, loaded.paging.entry_size());
        // They lie side by side, in one frame.
        let start = last.gpa.get() - (at - first) as u64 * size.bytes();
        let group = self.read_guest(space, Gfn::new(start >> PAGE_SHIFT), |table| {
            [(); GROUP].map({
                let mut gpa = start;
                move |()| {
                    let entry = entry_at(table, Gpa::new(gpa), size);
                    gpa += size.bytes();
                    entry
                }
            })
        });
        let Some(group) = group else { return };
        for ((number, place), gpte) in (0..).zip(&mut found.neighbours).zip(group) {
            let index = first + number;
            if index == at || gpte & spte::ACCESSED == 0 {
                continue;
            }
            if page.is_some_and(|page| spte::is_present(self.load(page, index))) {
                continue;
            }
            let Entry::Page(page) = loaded.paging.entry(Level::K4, gpte) else { continue };
            let Some(slot) = self.slot_at(space, page.start()) else { continue };
            *place = Some(Neighbour { index, gpte, gfn: page.start(), slot, frame: None });
        }
    }

    /// The table that has the leaf for an address, or the last one on the way there.
    fn leaf_page(&self, loaded: &Loaded, va: u64) -> Option<&'g ShadowPage> {
        let mut page = self.root(loaded, va)?;
        while let Some(child) = self.child(page, page.level().index(va >> PAGE_SHIFT)) {
            page = child;
        }
        Some(page)
    }

    /// Whether there is anything at the end of the way to an address. Looks at the tables alone.
    fn has_entry(&self, loaded: &Loaded, va: u64) -> bool {
        descend(self.shared, loaded, va).is_some_and(|bottom| bottom.entry.load(Ordering::SeqCst) != 0)
    }

    /// The entries for an address agree with the guest's, from the root down.
    pub(super) fn sync_path(&mut self, loaded: &Loaded, va: u64) {
        let Some(mut page) = self.root(loaded, va) else { return };
        loop {
            let index = page.level().index(va >> PAGE_SHIFT);
            let seen = page.gptes[index].load(Ordering::Relaxed);
            if seen != 0 && !page.is_direct() {
                let (space, gfn) = (page.key.role.address_space, page.key.gfn);
                match self.read_guest(space, gfn, |table| page.guest_entry(table, index)) {
                    Some(now) if now == seen => {}
                    Some(now) => self.sync_entry(page, index, now),
                    None => _ = self.drop_entry(page, index),
                }
            }
            match self.child(page, index) {
                Some(child) => page = child,
                None => return,
            }
        }
    }
}

/// Whether a fault can be resolved with this frame.
pub(super) enum Asked {
    Frame(Frame),
    Done(ShadowFault),
}

/// One of the guest's tables cannot be reached: asks the host what is there. Without the lock.
pub(super) fn ask_about_table<H: ShadowHost>(
    shared: &Shared<H>,
    loaded: &Loaded,
    unreachable: &Unreachable,
    (va, access): (u64, GuestAccess),
) -> Result<ShadowFault, super::ShadowError<H::Error>> {
    let Unreachable { entry, slot } = *unreachable;
    let gfn = Gfn::new(entry.get() >> PAGE_SHIFT);
    let answer = shared.host.frame(&slot, gfn, Access::READ).map_err(super::ShadowError::Frames)?;
    if answer != Answer::Mmio {
        return Ok(ShadowFault::Retry);
    }
    shared.counters.add(Counter::NoTable, 1);
    let fault = loaded.paging.page_fault(va, access, ErrorCode::empty());
    Ok(ShadowFault::NoTable { entry, fault })
}

/// Asks the host for the frame, and for those of the neighbours; makes room in the reverse map. Without the lock.
pub(super) fn ask<H: ShadowHost>(
    shared: &Shared<H>,
    found: &mut Found,
) -> Result<Asked, super::ShadowError<H::Error>> {
    let wanted = host_access(found.access);
    let gpa = found.walk.gpa;
    let answer = shared.host.frame(&found.slot, found.gfn, wanted).map_err(super::ShadowError::Frames)?;
    let frame = match answer {
        Answer::Frame(frame) => frame,
        Answer::Mmio => return Ok(Asked::Done(ShadowFault::Mmio(gpa))),
        Answer::Retry => return Ok(Asked::Done(ShadowFault::Retry)),
    };
    if !frame.access.contains(wanted) {
        return Ok(Asked::Done(ShadowFault::Denied(gpa)));
    }
    let largest = largest(shared, found, &frame);
    let no_memory = || super::ShadowError::Table(crate::nested::TableError::OutOfMemory);
    if let Some(rmap) = found.slots.rmap_at(found.slot.address_space(), found.gfn) {
        // Beside tables of the guest's it may become any of these.
        for level in LEVELS.into_iter().filter(|level| *level <= largest) {
            rmap.reserve(level, found.gfn).map_err(|_| no_memory())?;
        }
    }
    if largest == Level::K4 && found.walk.page.len() > 1 && !found.beside_invalidations {
        find_direct_neighbours(found);
    }
    for neighbour in found.neighbours.iter_mut().flatten() {
        ask_for_neighbour(shared, &found.slots, neighbour);
    }
    Ok(Asked::Frame(frame))
}

/// Asks the host for the frame of an entry that is made ahead of its fault; makes room for it. Whether it can be had is its own fault's
/// matter.
pub(super) fn ask_for_neighbour<H: ShadowHost>(shared: &Shared<H>, slots: &Slots, neighbour: &mut Neighbour) {
    let rmap = slots.rmap_at(neighbour.slot.address_space(), neighbour.gfn);
    let has_room = rmap.is_some_and(|rmap| rmap.reserve(Level::K4, neighbour.gfn).is_ok());
    neighbour.frame = match shared.host.frame(&neighbour.slot, neighbour.gfn, Access::READ) {
        Ok(Answer::Frame(frame)) if has_room => Some(frame),
        _ => None,
    };
}

/// The pages of 4 KiB beside the one that has faulted, of a larger page of the guest.
fn find_direct_neighbours(found: &mut Found) {
    let at = Level::K4.index(found.gfn.get());
    let first = found.gfn.get() - (at % GROUP) as u64;
    for (number, place) in (0..).zip(&mut found.neighbours) {
        let gfn = Gfn::new(first + number as u64);
        if gfn != found.gfn && found.walk.page.contains(gfn) && found.slot.gfns().contains(gfn) {
            let index = at - at % GROUP + number;
            *place = Some(Neighbour { index, gpte: 0, gfn, slot: found.slot, frame: None });
        }
    }
}

/// The largest page that the guest, the slot, the dirty log, and the host allow.
fn largest<H: ShadowHost>(shared: &Shared<H>, found: &Found, frame: &Frame) -> Level {
    if shared.is_logged(&found.slot) || found.beside_invalidations {
        return Level::K4;
    }
    let backed = found.slot.gfns().intersect(&frame.run).unwrap_or_default();
    let (start, end) = ends(found.walk.page.intersect(&backed).unwrap_or_default());
    let top = if found.walk.steps().is_empty() { Level::M2 } else { Level::G1 };
    let mut level = shared.config.largest.min(top);
    while level > Level::K4 {
        let first = level.align_down(found.gfn.get());
        let is_whole = start <= first && first + level.pages() <= end;
        if is_whole && level.is_aligned(found.gfn.get() ^ frame.pfn.get()) {
            break;
        }
        level = level.down();
    }
    level
}

/// As [`largest`], beside the tables of the guest's that are shadowed.
pub(super) fn largest_untracked<H: ShadowHost>(shared: &Shared<H>, found: &Found, frame: &Frame) -> Level {
    let mut level = largest(shared, found, frame);
    while level > Level::K4
        && shared.block(usize::from(level.get()) - 2, found.gfn).load(Ordering::SeqCst) > 0
    {
        level = level.down();
    }
    level
}

/// The frames that a page of this size has.
pub(super) fn block(level: Level, gfn: Gfn) -> GfnRange {
    let first = level.align_down(gfn.get());
    range(first, first + level.pages())
}
