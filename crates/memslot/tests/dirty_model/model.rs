//! What a dirty log is: for each consumer, a set of pages.

use std::collections::BTreeSet;
use std::ops::Range;

use memslot::{AddressSpaceId, Gfn, GfnRange, Slot, SlotFlags, View};

type Page = (u8, u64);

/// What is dirty for a consumer.
#[derive(Clone, Default)]
struct Seen {
    dirty: BTreeSet<Page>,
}

impl Seen {
    fn mark(&mut self, page: Page) {
        self.dirty.insert(page);
    }
}

pub(crate) struct Model {
    consumers: Vec<Seen>,
    /// Marked and not harvested by anybody: not armed.
    fresh: BTreeSet<Page>,
    removed: Vec<Page>,
    pub(crate) initially_set: bool,
}

fn logs(slot: &Slot) -> bool {
    slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
}

impl Model {
    pub(crate) fn new(consumers: usize) -> Self {
        Self {
            consumers: vec![Seen::default(); consumers],
            fresh: BTreeSet::new(),
            removed: Vec::new(),
            initially_set: false,
        }
    }

    pub(crate) fn add_consumer(&mut self) {
        self.consumers.push(Seen { dirty: self.fresh.clone() });
    }

    pub(crate) fn drop_consumer(&mut self, at: usize) {
        self.consumers.remove(at);
    }

    pub(crate) fn mark(&mut self, view: &View, space: u8, gfns: Range<u64>) {
        for gfn in gfns {
            let slot = view.slot_at(AddressSpaceId::new(space), Gfn::new(gfn));
            if slot.is_some_and(logs) {
                self.fresh.insert((space, gfn));
                self.consumers.iter_mut().for_each(|it| it.mark((space, gfn)));
            }
        }
    }

    /// The pages a consumer would harvest.
    pub(crate) fn pages(&self, at: usize, range: Option<(AddressSpaceId, GfnRange)>) -> Vec<Page> {
        let is_in = |&(space, gfn): &Page| {
            range.is_none_or(|(of, gfns)| of.get() == space && gfns.contains(Gfn::new(gfn)))
        };
        self.consumers[at].dirty.iter().copied().filter(|page| is_in(page)).collect()
    }

    pub(crate) fn take(&mut self, at: usize, pages: &[Page]) {
        let pages: BTreeSet<&Page> = pages.iter().collect();
        self.consumers[at].dirty.retain(|page| !pages.contains(page));
    }

    /// Every page that came from marks was armed; they are armed for everybody now.
    pub(crate) fn check_armed(
        &mut self,
        at: usize,
        range: Option<(AddressSpaceId, GfnRange)>,
        armed: &[(AddressSpaceId, GfnRange)],
    ) {
        self.check_armed_pages(at, &self.pages(at, range), armed);
    }

    pub(crate) fn check_armed_pages(
        &mut self,
        _: usize,
        pages: &[Page],
        armed: &[(AddressSpaceId, GfnRange)],
    ) {
        for page in pages {
            if self.fresh.remove(page) {
                let is_armed = |(space, gfns): &(AddressSpaceId, GfnRange)| {
                    space.get() == page.0 && gfns.contains(Gfn::new(page.1))
                };
                assert!(armed.iter().any(is_armed), "{page:?} was marked, taken, and not armed");
            }
        }
    }

    /// A clear that failed has put back what it had taken, for everybody: so others may see pages again.
    pub(crate) fn put_back(&mut self, at: usize, pages: &[Page], sees: impl Fn(usize, Page) -> bool) {
        for (other, seen) in self.consumers.iter_mut().enumerate().filter(|&(other, _)| other != at) {
            seen.dirty.extend(pages.iter().copied().filter(|&page| sees(other, page)));
        }
    }

    /// A page is marked, and not armed.
    pub(crate) fn add_fresh(&mut self, page: Page) {
        self.fresh.insert(page);
    }

    pub(crate) fn take_removed(&mut self) -> Vec<Page> {
        std::mem::take(&mut self.removed)
    }

    /// The table changed: every page goes where its memory goes.
    pub(crate) fn change(&mut self, before: &View, after: &View) {
        let spaces = || before.address_spaces();
        let changed: Vec<Slot> = spaces()
            .flat_map(|space| {
                after.slots(space).filter(move |slot| before.slot(space, slot.id()) != Some(*slot))
            })
            .copied()
            .collect();
        let go = |&(space, gfn): &Page| -> (Vec<Page>, bool) {
            let (id, frame) = (AddressSpaceId::new(space), Gfn::new(gfn));
            let hva = before.slot_at(id, frame).and_then(|slot| slot.hva_of(frame)).unwrap();
            if let Some(slot) = after.slot_at(id, frame).filter(|slot| slot.hva_of(frame) == Some(hva)) {
                return (if logs(slot) { vec![(space, gfn)] } else { Vec::new() }, false);
            }
            let there: Vec<Page> = changed
                .iter()
                .filter(|slot| slot.address_space() == id && logs(slot))
                .filter(|slot| slot.hvas().is_some_and(|hvas| hvas.contains(hva)))
                .map(|slot| {
                    let pages = (hva.get() - slot.hva().unwrap().get()) >> slot.page_size().shift();
                    (space, slot.base_gfn().get() + pages)
                })
                .collect();
            let gone = there.is_empty();
            (there, gone)
        };
        let mut gone = Vec::new();
        for (at, seen) in self.consumers.iter_mut().enumerate() {
            let old = std::mem::take(&mut seen.dirty);
            for page in &old {
                let (there, is_gone) = go(page);
                seen.dirty.extend(there);
                if is_gone && at == 1 {
                    gone.push(*page);
                }
            }
        }
        self.removed.extend(gone);
        let fresh = std::mem::take(&mut self.fresh);
        self.fresh.extend(fresh.iter().flat_map(|page| go(page).0));
        if self.initially_set {
            for slot in spaces().flat_map(|space| after.slots(space)).filter(|slot| logs(slot)) {
                for gfn in slot.gfns().start().get()..slot.gfns().end().get() {
                    let frame = Gfn::new(gfn);
                    let was = before.slot_at(slot.address_space(), frame);
                    let stayed = was.is_some_and(|was| logs(was) && was.hva_of(frame) == slot.hva_of(frame));
                    // Memory that was logged at a frame where it no longer is has moved here.
                    let hva = slot.hva_of(frame).unwrap();
                    let moved = before.slots(slot.address_space()).filter(|old| logs(old)).any(|old| {
                        let from = old.hvas().filter(|hvas| hvas.contains(hva)).and_then(|hvas| {
                            let pages = (hva.get() - hvas.start().get()) >> old.page_size().shift();
                            old.base_gfn().checked_add(pages)
                        });
                        from.is_some_and(|from| {
                            let now = after.slot_at(slot.address_space(), from);
                            now.and_then(|now| now.hva_of(from)) != Some(hva)
                        })
                    });
                    if !(stayed || moved && changed.contains(slot)) {
                        let page = (slot.address_space().get(), gfn);
                        self.fresh.insert(page);
                        self.consumers.iter_mut().for_each(|it| it.mark(page));
                    }
                }
            }
        }
    }
}
