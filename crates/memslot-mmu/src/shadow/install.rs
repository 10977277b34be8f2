//! The second half of a fault: from the root down, shadow pages are found or made and linked, and at last the leaf.

use memslot::{AddressSpaceId, Gfn, SlotFlags};

use super::fault::{Found, Neighbour, Way, block, largest_untracked};
use super::guest::{Entry, Mode, Rights};
use super::page::ShadowPage;
use super::reserve::Reserve;
use super::role::{Key, Role};
use super::shared::Locked;
use super::spte::{self, Leaf};
use super::stats::Counter;
use super::vcpu::{Loaded, ShadowFault};
use super::{ShadowHost, track};
use crate::format::Access;
use crate::host::{Frame, Pfn};
use crate::level::{Level, PAGE_SHIFT};
use crate::sync::Ordering;

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// Maps what was found. `None` where it does not hold any more.
    pub(super) fn install(
        &mut self,
        reserve: &mut Reserve,
        loaded: &Loaded,
        found: &Found,
        frame: &Frame,
    ) -> Option<ShadowFault> {
        if loaded.is_stale(self.shared) {
            return Some(ShadowFault::Retry);
        }
        let level = largest_untracked(self.shared, found, frame);
        if self.state.changes.since(found.change, loaded.space, block(level, found.gfn)) {
            return None;
        }
        let (page, index, gpte) = self.way_down(reserve, loaded, &found.way(), level)?;
        self.install_leaf(reserve, page, index, gpte, found, frame)
    }

    /// Finds or makes the shadow pages from the root to the one that has the leaf for an address, and links them. Returns
    /// that page, and which entry of it is made of which entry of the guest's. `None` where the walk does not hold any more.
    pub(super) fn way_down(
        &mut self,
        reserve: &mut Reserve,
        loaded: &Loaded,
        way: &Way<'_>,
        level: Level,
    ) -> Option<(&'g ShadowPage, usize, u64)> {
        self.make_room(super::reserve::PAGES);
        let mut page = self.root(loaded, way.va)?;
        let mut steps = way.walk.steps().iter();
        loop {
            page.writes.store(0, Ordering::Relaxed);
            let index = page.level().index(way.va >> PAGE_SHIFT);
            let step = if page.is_direct() { None } else { steps.next() };
            let mut gpte = 0;
            if let Some(step) = step {
                debug_assert_eq!((step.level, step.table), (page.level(), page.key.gfn));
                gpte = step.entry;
                let space = page.key.role.address_space;
                let now = self.read_guest(space, page.key.gfn, |table| page.guest_entry(table, index));
                if now != Some(gpte) {
                    // The guest has changed it meanwhile. What was made of what it was before does not stay.
                    self.sync_path(loaded, way.va);
                    return None;
                }
            }
            let next = step.and_then(|step| match loaded.paging.entry(step.level, step.entry) {
                Entry::Table(gfn) => Some((gfn, step.rights)),
                _ => None,
            });
            let key = match next {
                None if page.level() <= level => return Some((page, index, gpte)),
                Some((gfn, rights)) => self.table_key(page, gfn, rights, index),
                None => Self::direct_key(page, way),
            };
            page = self.step_down(reserve, page, index, gpte, key, loaded)?;
        }
    }

    /// What a page is found by that shadows a table which an entry leads to.
    fn table_key(&self, page: &ShadowPage, gfn: Gfn, rights: Rights, index: usize) -> Key {
        let role = page.key.role;
        let quadrant = if role.reading.mode == Mode::Bits32 { u8::from(index % 2 == 1) } else { 0 };
        Key { gfn, role: Role { level: role.level.down(), rights, quadrant, ..role } }
    }

    /// What a page is found by that maps a piece of a large page of the guest.
    fn direct_key(page: &ShadowPage, way: &Way<'_>) -> Key {
        let role = page.key.role;
        let gfn = Gfn::new(role.level.align_down(way.gfn.get()));
        let role = Role { level: role.level.down(), direct: true, rights: way.rights, quadrant: 0, ..role };
        Key { gfn, role }
    }

    /// The page with this key below an entry, linked.
    fn step_down(
        &mut self,
        reserve: &mut Reserve,
        page: &'g ShadowPage,
        index: usize,
        gpte: u64,
        key: Key,
        loaded: &Loaded,
    ) -> Option<&'g ShadowPage> {
        // What is linked already is used again, if it is the same in every respect.
        if let Some(child) = self.child(page, index).filter(|child| child.key == key) {
            page.gptes[index].store(gpte, Ordering::SeqCst);
            return Some(child);
        }
        self.drop_entry(page, index);
        let child = self.page_for(reserve, key, &loaded.paging)?;
        if page.is_zapped() {
            return None;
        }
        self.link(reserve, page, index, gpte, child).ok()?;
        Some(child)
    }

    fn install_leaf(
        &mut self,
        reserve: &mut Reserve,
        page: &'g ShadowPage,
        index: usize,
        gpte: u64,
        found: &Found,
        frame: &Frame,
    ) -> Option<ShadowFault> {
        let (level, gpa) = (page.level(), found.walk.gpa);
        let (slot, is_write) = (&found.slot, found.is_write());
        let first = Gfn::new(level.align_down(found.gfn.get()));
        let is_logged = self.shared.is_logged(slot);
        let host_writable =
            frame.access.contains(Access::WRITE) && !slot.flags().contains(SlotFlags::READONLY);
        let wants_write = host_writable && found.rights.contains(Rights::WRITE);
        let untracked = match (wants_write, level) {
            (false, _) => false,
            (true, Level::K4) => match self.may_write(found.gfn, is_write) {
                track::Verdict::Yes => true,
                track::Verdict::No => false,
                // Pages were given up, maybe this one.
                track::Verdict::Again => return None,
            },
            _ => true,
        };
        let within = found.gfn.get() - first.get();
        let leaf = Leaf {
            pfn: Pfn::new(frame.pfn.get() - within),
            level,
            rights: found.rights,
            memory: frame.memory,
            executable: frame.access.contains(Access::EXECUTE),
            host_writable,
            untracked,
            write: is_write || !is_logged,
        };
        let mut new = leaf.entry() | spte::ACCESSED;
        if is_write && new & spte::WRITE != 0 {
            new |= spte::DIRTY;
        }
        let at = (slot, first);
        let changed = self.map(reserve, page, index, gpte, at, new).ok()?;
        if new & spte::WRITE != 0 {
            self.granted(slot, first, level);
        }
        if is_write && new & spte::WRITE == 0 {
            return Some(if untracked { ShadowFault::Retry } else { ShadowFault::WriteTracked(gpa) });
        }
        self.install_neighbours(reserve, page, found);
        Some(if changed { ShadowFault::Mapped(level) } else { ShadowFault::AlreadyMapped })
    }

    /// The entries beside it, as far as they are not there yet.
    fn install_neighbours(&mut self, reserve: &mut Reserve, page: &'g ShadowPage, found: &Found) {
        if page.level() != Level::K4 {
            return;
        }
        for neighbour in found.neighbours.iter().flatten() {
            self.install_neighbour(reserve, page, neighbour, found.change);
        }
    }

    /// One of them, or one that was found otherwise: after the change with this number.
    pub(super) fn install_neighbour(
        &mut self,
        reserve: &mut Reserve,
        page: &'g ShadowPage,
        neighbour: &Neighbour,
        change: u64,
    ) {
        let &Neighbour { index, gpte, gfn, slot, frame: Some(frame) } = neighbour else { return };
        let space: AddressSpaceId = slot.address_space();
        if page.is_direct() != (gpte == 0)
            || page.is_direct() && page.leaf_gfn(index, 0) != Some(gfn)
            || spte::is_present(self.load(page, index))
            || self.state.changes.since(change, space, block(Level::K4, gfn))
        {
            return;
        }
        let mut rights = page.key.role.rights;
        if !page.is_direct() {
            let now = self.read_guest(space, page.key.gfn, |table| page.guest_entry(table, index));
            if now != Some(gpte) {
                return;
            }
            rights &= page.paging.rights_of(gpte);
            if gpte & spte::DIRTY == 0 {
                rights -= Rights::WRITE;
            }
        }
        let host_writable =
            frame.access.contains(Access::WRITE) && !slot.flags().contains(SlotFlags::READONLY);
        let may_write = host_writable && rights.contains(Rights::WRITE);
        let leaf = Leaf {
            pfn: frame.pfn,
            level: Level::K4,
            rights,
            memory: frame.memory,
            executable: frame.access.contains(Access::EXECUTE),
            host_writable,
            untracked: may_write && matches!(self.may_write(gfn, false), track::Verdict::Yes),
            write: !self.shared.is_logged(&slot),
        };
        if self.map(reserve, page, index, gpte, (&slot, gfn), leaf.entry()).is_ok() {
            self.count(Counter::Prefetched);
        }
    }
}
