//! What must hold between two operations, written down a second time: KVM's invariants of the reverse map, shadow pages and write
//! tracking.

use alloc::format;
use alloc::string::String;
use alloc::vec;

use memslot::{Gfn, SlotFlags};

use super::guest::Rights;
use super::page::ShadowPage;
use super::shared::{Locked, everything};
use super::spte::{self, SpteRef};
use super::{Shadow, ShadowHost, mmio};
use crate::format::Access;
use crate::host::Answer;
use crate::level::{ENTRIES, Level};
use crate::rmap::{Filed, LEVELS, Under};
use crate::sync::Ordering;

type Checked = Result<(), String>;

fn require(holds: bool, rule: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(rule()) }
}

impl<H: ShadowHost> Shadow<H> {
    /// Looks whether everything is as it must be between two operations, and says what is not:
    ///
    /// * an entry leads somewhere exactly if it has a record, and the reverse map has it there, once, under the frame that it maps;
    /// * what a list or a page's parents have is an entry that leads there;
    /// * a leaf maps the frame that the host has, in a slot that is there, with an allowed combination of write bits, and nothing
    ///   writable of a large page in a logged slot, unless the log says that all pages are dirty at first;
    /// * what remembers that there is no memory is of frames in no slot, or of an older version of the slots;
    /// * no two pages have the same key; a page that is in sync agrees with the guest's table, which nobody may write;
    /// * what is unsync is known to all above it;
    /// * tables in large pages are counted; obsolete pages are the oldest.
    ///
    /// Nothing may be under way meanwhile: no fault, no write of the guest. Takes time proportional to all there is, under the lock.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn check(&self) -> Result<(), String> {
        self.shared.with(|locked| locked.check(true))
    }

    /// The same, without looking whether the guest's tables are still what the pages that are in sync were made of: for moments at
    /// which somebody has written to them and has not [told](Shadow::wrote) yet.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn check_maps(&self) -> Result<(), String> {
        self.shared.with(|locked| locked.check(false))
    }
}

impl<'g, H: ShadowHost> Locked<'g, H> {
    fn check(&self, with_guest: bool) -> Checked {
        if let Some(error) = &self.state.broken {
            return Err(format!("the reverse map has noticed: {error}"));
        }
        let mut count = 0;
        let mut leaves = 0;
        let mut mmio = 0;
        let mut was_current = false;
        let mut blocks = [0, 1].map(|size| vec![0; self.shared.blocks[size].len()]);
        for page in self.pages() {
            count += 1;
            let name = || format!("shadow page {:?}", page.key);
            require(!page.is_zapped(), || format!("{}: given up, and found", name()))?;
            require(!(was_current && self.is_obsolete(page)), || {
                format!("{}: obsolete, and behind one that is not", name())
            })?;
            was_current |= !self.is_obsolete(page);
            let same = self
                .pages_of(page.key.gfn)
                .filter(|other| other.key == page.key && self.is_obsolete(other) == self.is_obsolete(page));
            require(same.count() == 1, || format!("{}: there are several", name()))?;
            require(self.page(page.table).is_some_and(|found| core::ptr::eq(found, page)), || {
                format!("{}: not found by its table", name())
            })?;
            leaves += self.check_entries(page, with_guest, &mut mmio)?;
            self.check_parents(page)?;
            if !page.is_direct() {
                for (size, counts) in blocks.iter_mut().enumerate() {
                    let counter = self.shared.block(size, page.key.gfn);
                    let all = &self.shared.blocks[size];
                    if let Some(at) = all.iter().position(|other| core::ptr::eq(other, counter)) {
                        counts[at] += 1;
                    }
                }
            }
        }
        let counted = self.shared.counters.mmio.load(Ordering::Relaxed);
        require(counted == mmio, || {
            format!("{mmio} entries say that there is no memory, counted {counted}")
        })?;
        require(count == self.state.pages, || format!("{count} pages, counted {}", self.state.pages))?;
        for (counts, counters) in blocks.iter().zip(&self.shared.blocks) {
            let agree = counts.iter().zip(counters).all(|(&a, b)| a == b.load(Ordering::SeqCst));
            require(agree, || "the tables in large pages are not counted right".into())?;
        }
        self.check_lists(leaves)
    }

    fn record(&self, entry: SpteRef) -> Option<Filed> {
        let page = self.page(entry.table())?;
        Filed::from_bits(page.filed[entry.index()].load(Ordering::Relaxed))
    }

    /// All lists of the reverse map, which together have so many entries.
    fn check_lists(&self, leaves: u64) -> Checked {
        let slots = &self.state.slots;
        let writer = &self.state.writer;
        let mut filed = 0;
        for space in slots.spaces() {
            for rmap in slots.rmaps_in(space, everything()) {
                for level in LEVELS {
                    for (gfn, list) in rmap.lists(level, rmap.gfns()) {
                        let name = || format!("the list of gfn {gfn} ({level})");
                        writer
                            .check(list, |entry| self.record(entry))
                            .map_err(|rule| format!("{}: {rule}", name()))?;
                        for entry in writer.entries(list) {
                            filed += 1;
                            let page = self.page(entry.table());
                            let page = page.ok_or_else(|| format!("{}: an entry of no page", name()))?;
                            require(page.key.role.address_space == space && page.level() == level, || {
                                format!("{}: has an entry of another space or level", name())
                            })?;
                            require(spte::is_leaf(self.load(page, entry.index()), level), || {
                                format!("{}: has an entry that is no leaf", name())
                            })?;
                        }
                    }
                }
            }
        }
        require(filed == leaves, || format!("{leaves} leaves, and {filed} filed"))?;
        let counted = self.shared.counters.leaves.load(Ordering::Relaxed);
        require(counted == leaves, || format!("{leaves} leaves, counted {counted}"))
    }

    /// The entries of a page; returns how many are leaves.
    fn check_entries(&self, page: &'g ShadowPage, with_guest: bool, mmio: &mut u64) -> Result<u64, String> {
        let mut leaves = 0;
        for index in 0..ENTRIES {
            let name = || format!("entry {index} of {:?}", page.key);
            let entry = self.load(page, index);
            let (filed, gpte) =
                (page.filed[index].load(Ordering::Relaxed), page.gptes[index].load(Ordering::Relaxed));
            require(spte::is_present(entry) == (filed != 0), || {
                format!("{}: {entry:#x}, filed {filed:#x}", name())
            })?;
            if mmio::is_mmio(entry) {
                require(filed == 0, || format!("{}: {entry:#x} is no mapping, and filed", name()))?;
                require(page.is_direct() || gpte != 0, || format!("{}: made of nothing", name()))?;
                require(page.level() == Level::K4, || {
                    format!("{}: {entry:#x} above the lowest level", name())
                })?;
                self.check_mmio(page, index, entry).map_err(|rule| format!("{}: {rule}", name()))?;
                if with_guest {
                    self.check_snapshot(page, index, gpte)?;
                }
                *mmio += 1;
                continue;
            }
            if !spte::is_present(entry) {
                require(entry == 0 && gpte == 0, || format!("{}: leftovers {entry:#x} {gpte:#x}", name()))?;
                require(!page.is_unsync_below(index), || format!("{}: unsync below nothing", name()))?;
                continue;
            }
            require(page.is_direct() || gpte != 0, || format!("{}: made of nothing", name()))?;
            let record = Filed::from_bits(filed).ok_or_else(name)?;
            let writer = &self.state.writer;
            writer
                .check_filed(&record, page.reference(index))
                .map_err(|error| format!("{}: {error}", name()))?;
            if with_guest {
                self.check_snapshot(page, index, gpte)?;
            }
            match (writer.filed_under(&record), self.child(page, index)) {
                (Some(Under::Parents), Some(child)) => {
                    require(child.level() == page.level().down() && page.level() > Level::K4, || {
                        format!("{}: leads to a page of {}", name(), child.level())
                    })?;
                    require(
                        writer.entries(child.parents.list()).any(|parent| parent == page.reference(index)),
                        || format!("{}: its child does not know it", name()),
                    )?;
                    require(!child.needs_sync() || page.is_unsync_below(index), || {
                        format!("{}: does not know what is unsync below", name())
                    })?;
                    let (above, below) = (&page.key.role, &child.key.role);
                    require(
                        below.reading == above.reading && below.address_space == above.address_space,
                        || format!("{}: leads to a page of another role", name()),
                    )?;
                }
                (Some(Under::Gfn { gfn, level }), None) => {
                    require(level == page.level(), || format!("{}: filed as {level}", name()))?;
                    require(page.leaf_gfn(index, gpte) == Some(gfn), || {
                        format!("{}: filed under {gfn}, and the guest's entry is {gpte:#x}", name())
                    })?;
                    self.check_leaf(page, entry, gfn).map_err(|rule| format!("{}: {rule}", name()))?;
                    leaves += 1;
                }
                (under, child) => {
                    let child = child.map(|child| child.key);
                    return Err(format!("{}: {entry:#x} filed under {under:?}, child {child:?}", name()));
                }
            }
        }
        Ok(leaves)
    }

    /// What remembers that there is no memory, and is believed, is right, and permits no more than the guest's entries do.
    fn check_mmio(&self, page: &'g ShadowPage, index: usize, entry: u64) -> Checked {
        let gpte = page.gptes[index].load(Ordering::Relaxed);
        let gfn =
            page.leaf_gfn(index, gpte).ok_or_else(|| format!("the guest's entry {gpte:#x} is no page"))?;
        if !mmio::is_of(entry, self.shared.serial.load(Ordering::SeqCst)) {
            return Ok(());
        }
        let mut rights = page.key.role.rights;
        if !page.is_direct() {
            rights &= page.paging.rights_of(gpte);
        }
        require(rights.contains(mmio::rights(entry)), || format!("{entry:#x} permits more than {rights:?}"))?;
        match self.slot_at(page.key.role.address_space, gfn) {
            Some(slot) => Err(format!("says that there is no memory at gfn {gfn}, and there is {slot}")),
            None => Ok(()),
        }
    }

    /// A page in sync agrees with the guest's table, apart from accessed and dirty bits that a walk has set.
    fn check_snapshot(&self, page: &'g ShadowPage, index: usize, gpte: u64) -> Checked {
        if page.is_direct() || page.is_unsync() {
            return Ok(());
        }
        let (space, gfn) = (page.key.role.address_space, page.key.gfn);
        let now = self.read_guest(space, gfn, |table| page.guest_entry(table, index));
        let marks = spte::ACCESSED | spte::DIRTY;
        let agrees = now.is_some_and(|now| now & !marks == gpte & !marks && gpte & !now & marks == 0);
        require(agrees, || {
            format!("entry {index} of {:?}: in sync, of {gpte:#x}, and the guest has {now:x?}", page.key)
        })
    }

    fn check_leaf(&self, page: &'g ShadowPage, entry: u64, gfn: Gfn) -> Checked {
        let (level, space) = (page.level(), page.key.role.address_space);
        let has = |bit: u64| entry & bit != 0;
        let slot = self.slot_at(space, gfn).ok_or("maps a frame without a slot")?;
        require(page.slots.lock().contains(slot.id()), || {
            format!("its page does not know that it maps {slot}")
        })?;
        let block = level.block(gfn).ok_or("is too large")?;
        require(slot.gfns().contains_range(&block), || format!("maps more than {slot}"))?;
        let (host, mmu, write) = (has(spte::HOST_WRITABLE), has(spte::MMU_WRITABLE), has(spte::WRITE));
        require((host || !mmu) && (mmu || !write), || {
            format!("host-writable {host}, MMU-writable {mmu}, W {write}")
        })?;
        let read_only = slot.flags().contains(SlotFlags::READONLY);
        require(!(read_only && host), || "is writable in a read-only slot".into())?;
        // Where all pages are dirty at first, the first harvest is what takes W from large ones.
        let is_armed = self.shared.is_logged(&slot)
            && !self.shared.config.log.as_ref().is_some_and(|log| log.initially_set());
        require(!(write && is_armed && level > Level::K4), || {
            "is large and writable in a logged slot".into()
        })?;
        let rights = page.key.role.rights;
        require(!has(spte::USER) || rights.contains(Rights::USER), || "is a user's against its role".into())?;
        require(has(spte::NO_EXECUTE) || rights.contains(Rights::EXECUTE), || {
            "is executable against its role".into()
        })?;
        if mmu {
            for frame in block.start().get()..block.end().get() {
                let tracked =
                    self.pages_of(Gfn::new(frame)).find(|page| !page.is_direct() && !page.is_unsync());
                if let Some(page) = tracked {
                    return Err(format!("is MMU-writable, and {:?} is in sync", page.key));
                }
            }
        }
        if let Ok(Answer::Frame(frame)) = self.shared.host.frame(&slot, gfn, Access::READ) {
            require(frame.pfn == spte::pfn(entry), || {
                format!("maps host frame {}, the host has {}", spte::pfn(entry), frame.pfn)
            })?;
        }
        Ok(())
    }

    fn check_parents(&self, page: &'g ShadowPage) -> Checked {
        let list = page.parents.list();
        let name = || format!("the parents of {:?}", page.key);
        let writer = &self.state.writer;
        writer.check(list, |entry| self.record(entry)).map_err(|rule| format!("{}: {rule}", name()))?;
        for entry in writer.entries(list) {
            let parent = self.page(entry.table()).ok_or_else(|| format!("{}: one is gone", name()))?;
            let leads_here =
                self.child(parent, entry.index()).is_some_and(|child| core::ptr::eq(child, page));
            require(leads_here, || format!("{}: one leads elsewhere", name()))?;
        }
        Ok(())
    }
}
