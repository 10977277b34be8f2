//! The naive model: a map of leaves, and for each operation what it must do to it.

use std::collections::{BTreeMap, BTreeSet};

use memslot::{Gfn, GfnRange, Slot, SlotFlags, View};
use memslot_mmu::{DirtyMode, Fault, Level};

use crate::common::{RAM, range};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Leaf {
    pub(crate) pages: u64,
    pub(crate) pfn: u64,
    pub(crate) write: bool,
    /// Neither slot nor host deny writing.
    pub(crate) may: bool,
}

pub(crate) struct Model {
    pub(crate) leaves: BTreeMap<u64, Leaf>,
    /// Written in logged slots, and not harvested.
    pub(crate) dirty: BTreeSet<u64>,
    /// Frames of pages that a fault has replaced, as long as a processor has their translation.
    pub(crate) emptied: BTreeSet<u64>,
    pub(crate) mode: DirtyMode,
    /// log2 of how many frames of the host are contiguous.
    pub(crate) run: u32,
}

pub(crate) fn is_logged(slot: &Slot) -> bool {
    slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
}

fn is_read_only(slot: &Slot) -> bool {
    slot.flags().contains(SlotFlags::READONLY)
}

fn pfn(slot: &Slot, gfn: u64) -> u64 {
    slot.hva_of(Gfn::new(gfn)).unwrap().get() >> 12
}

impl Model {
    pub(crate) fn leaf_at(&self, gfn: u64) -> Option<(u64, Leaf)> {
        let (&start, &leaf) = self.leaves.range(..=gfn).next_back()?;
        (gfn - start < leaf.pages).then_some((start, leaf))
    }

    fn starts_in(&self, gfns: GfnRange) -> Vec<u64> {
        let overlaps = |start: u64, leaf: &Leaf| gfns.overlaps(&range(start, leaf.pages));
        self.leaves.iter().filter(|(start, leaf)| overlaps(**start, leaf)).map(|(start, _)| *start).collect()
    }

    fn change(&mut self, gfns: GfnRange, mut work: impl FnMut(&mut Leaf)) {
        for start in self.starts_in(gfns) {
            work(self.leaves.get_mut(&start).unwrap());
        }
    }

    pub(crate) fn fault(&mut self, view: &View, gfn: u64, write: bool) -> Fault {
        if self.leaf_at(gfn).is_some_and(|(_, leaf)| !write || leaf.write) {
            return Fault::AlreadyMapped;
        }
        let Some(slot) = view.slot_at(RAM, Gfn::new(gfn)) else { return Fault::Mmio };
        if write && is_read_only(slot) {
            return Fault::Mmio;
        }
        let level = match self.leaf_at(gfn) {
            Some((start, leaf)) if leaf.may => {
                if leaf.pages > 1 && is_logged(slot) {
                    self.split_one(start);
                }
                let (start, _) = self.leaf_at(gfn).unwrap();
                let leaf = self.leaves.get_mut(&start).unwrap();
                leaf.write = true;
                leaf.pages
            }
            other => {
                if let Some((start, leaf)) = other {
                    self.leaves.remove(&start);
                    self.emptied.extend(start..start + leaf.pages);
                }
                self.install(slot, gfn, write)
            }
        };
        if write && is_logged(slot) {
            self.dirty.insert(gfn);
        }
        Fault::Mapped(if level == 1 { Level::K4 } else { Level::M2 })
    }

    fn install(&mut self, slot: &Slot, gfn: u64, write: bool) -> u64 {
        let may = !is_read_only(slot);
        let block = range(gfn & !511, 512);
        let is_large = !is_logged(slot)
            && self.run >= 9
            && slot.gfns().contains_range(&block)
            && (pfn(slot, gfn) ^ gfn) % 512 == 0
            && self.starts_in(block).is_empty();
        let pages = if is_large { 512 } else { 1 };
        let start = gfn & !(pages - 1);
        let write = may && (write || !is_logged(slot) || self.mode == DirtyMode::Hardware);
        self.leaves.insert(start, Leaf { pages, pfn: pfn(slot, start), write, may });
        pages
    }

    pub(crate) fn prefault(&mut self, view: &View, gfns: GfnRange) -> u64 {
        let mut gfn = gfns.start().get();
        while gfn < gfns.end().get() {
            if !matches!(self.fault(view, gfn, false), Fault::Mapped(_) | Fault::AlreadyMapped) {
                break;
            }
            gfn += 1;
        }
        gfn
    }

    pub(crate) fn zap(&mut self, gfns: GfnRange) {
        for start in self.starts_in(gfns) {
            self.leaves.remove(&start);
        }
    }

    pub(crate) fn write_protect(&mut self, gfns: GfnRange) {
        self.change(gfns, |leaf| leaf.write = false);
    }

    /// What makes the next write noticed.
    pub(crate) fn arm(&mut self, gfns: GfnRange) {
        let by_protection = self.mode == DirtyMode::WriteProtect;
        self.change(gfns, |leaf| leaf.write &= !(by_protection || leaf.pages > 1));
    }

    fn split_one(&mut self, start: u64) {
        let leaf = self.leaves.remove(&start).unwrap();
        for page in 0..leaf.pages {
            self.leaves.insert(start + page, Leaf { pages: 1, pfn: leaf.pfn + page, ..leaf });
        }
    }

    pub(crate) fn split(&mut self, gfns: GfnRange) -> u64 {
        let large: Vec<_> =
            self.starts_in(gfns).into_iter().filter(|start| self.leaves[start].pages > 1).collect();
        large.iter().for_each(|&start| self.split_one(start));
        large.len() as u64
    }

    pub(crate) fn collapse(&mut self, view: &View, gfns: GfnRange) {
        if gfns.is_empty() {
            return;
        }
        for block in gfns.start().get() / 512..=(gfns.end().get() - 1) / 512 {
            let base = block * 512;
            let small: Vec<_> = self.leaves.range(base..base + 512).map(|(a, b)| (*a, *b)).collect();
            let is_allowed = view
                .slot_at(RAM, Gfn::new(base))
                .is_some_and(|slot| !is_logged(slot) && slot.gfns().contains_range(&range(base, 512)));
            let Some(&(start, first)) = small.first().filter(|(_, leaf)| leaf.pages == 1 && is_allowed)
            else {
                continue;
            };
            let pfn = first.pfn.wrapping_sub(start - base);
            let fits =
                |(start, leaf): &(u64, Leaf)| leaf.pfn == pfn + (start - base) && leaf.may == first.may;
            if pfn % 512 != 0 || !small.iter().all(fits) {
                continue;
            }
            small.iter().for_each(|(start, _)| _ = self.leaves.remove(start));
            if small.len() == 512 {
                let write = small.iter().all(|(_, leaf)| leaf.write || leaf.may);
                self.leaves.insert(base, Leaf { pages: 512, pfn, write, may: first.may });
            }
        }
    }

    /// Every frame for itself: whatever lost its memory is unmapped, and so on.
    pub(crate) fn slots_changed(&mut self, before: &View, after: &View, end: u64) {
        let slot = |view: &View, gfn| view.slot_at(RAM, Gfn::new(gfn)).copied();
        let mut stopped = Vec::new();
        let mut dirty = BTreeSet::new();
        for gfn in 0..end {
            let Some(old) = slot(before, gfn) else { continue };
            let page = range(gfn, 1);
            let new = slot(after, gfn).filter(|new| pfn(new, gfn) == pfn(&old, gfn));
            if self.dirty.contains(&gfn) {
                if let Some(now) = where_is(&old, gfn, new.as_ref(), after) {
                    dirty.insert(now);
                }
            }
            match new {
                None => self.zap(page),
                Some(new) => {
                    if is_read_only(&new) && !is_read_only(&old) {
                        self.change(page, |leaf| (leaf.write, leaf.may) = (false, false));
                    }
                    if is_logged(&new) && !is_logged(&old) {
                        self.arm(page);
                    }
                    if is_logged(&old) && !is_logged(&new) {
                        stopped.push(page);
                    }
                }
            }
        }
        self.dirty = dirty;
        let is_inside = |start: u64, leaf: &Leaf| {
            slot(after, start).is_some_and(|slot| slot.gfns().contains_range(&range(start, leaf.pages)))
        };
        self.leaves.retain(|start, leaf| is_inside(*start, leaf));
        for page in stopped {
            self.collapse(after, page);
        }
    }
}

/// The frame at which a dirty page counts after a change.
fn where_is(old: &Slot, gfn: u64, same: Option<&Slot>, after: &View) -> Option<u64> {
    if !is_logged(old) {
        return None;
    }
    if let Some(new) = same {
        return is_logged(new).then_some(gfn);
    }
    let new = after.slot(RAM, old.id()).filter(|new| is_logged(new))?;
    let page = pfn(old, gfn);
    let further = page.checked_sub(pfn(new, new.base_gfn().get()))?;
    (further < new.pages()).then(|| new.base_gfn().get() + further)
}
