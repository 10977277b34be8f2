//! Marks, harvests and slot changes against sets of pages.
#![no_main]

use std::collections::BTreeSet;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use memslot::dirty::{Consumer, DirtyLog, SoftwareOnly};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable,
};

#[derive(Arbitrary, Debug)]
enum Step {
    Mark { page: u32 },
    MarkRange { first: u32, pages: u32 },
    Harvest { consumer: bool, commit: bool },
    HarvestRange { consumer: bool, commit: bool, first: u32, pages: u32 },
    Clear { consumer: bool, first: u32, mask: Vec<u64> },
    Split { at: u32 },
    Merge,
    Move { to: u32 },
}

const SPACE: AddressSpaceId = AddressSpaceId::NORMAL;
const PAGES: u64 = 2 * 32768 + 77;

fn range(first: u32, pages: u32) -> GfnRange {
    GfnRange::with_len(Gfn::new(u64::from(first) % (2 * PAGES)), u64::from(pages) % PAGES).unwrap()
}

fuzz_target!(|steps: Vec<Step>| {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    let consumers = [log.consumer().unwrap(), log.consumer().unwrap()];
    table
        .create(SlotSpec {
            address_space: SPACE,
            id: SlotId::new(0),
            gfns: GfnRange::with_len(Gfn::new(100), PAGES).unwrap(),
            backing: Backing::Host { hva: Hva::new(0x7000_0000_0000) },
            flags: SlotFlags::LOG_DIRTY_PAGES,
        })
        .unwrap();
    // What each consumer has not taken: pages of the memory, wherever it is in the guest.
    let mut models = [BTreeSet::new(), BTreeSet::new()];
    let mut base = 100;
    let inside = |base: u64, gfns: GfnRange| {
        let slot = GfnRange::with_len(Gfn::new(base), PAGES).unwrap();
        gfns.intersect(&slot).map_or(0..0, |gfns| gfns.start().get() - base..gfns.end().get() - base)
    };
    for step in steps.into_iter().take(64) {
        match step {
            Step::Mark { page } => {
                let page = u64::from(page) % PAGES;
                log.mark(SPACE, Gfn::new(base + page));
                models.iter_mut().for_each(|model| _ = model.insert(page));
            }
            Step::MarkRange { first, pages } => {
                let gfns = range(first, pages);
                log.mark_range(SPACE, gfns.intersect(&slots(base)).unwrap_or_default());
                models.iter_mut().for_each(|model| model.extend(inside(base, gfns)));
            }
            Step::Harvest { consumer, commit } => {
                let model = &mut models[usize::from(consumer)];
                take(&consumers[usize::from(consumer)], None, commit, base, model);
            }
            Step::HarvestRange { consumer, commit, first, pages } => {
                let model = &mut models[usize::from(consumer)];
                take(&consumers[usize::from(consumer)], Some(range(first, pages)), commit, base, model);
            }
            Step::Clear { consumer, first, mask } => {
                let pages = 64 * mask.len().min(100);
                let gfns = range(first, u32::try_from(pages).unwrap());
                let consumer = usize::from(consumer);
                let mask = &mask[..pages / 64];
                consumers[consumer].clear(SPACE, gfns, mask, &mut SoftwareOnly).unwrap();
                for at in 0..pages as u64 {
                    if let Some(page) = (gfns.start().get() + at).checked_sub(base) {
                        if mask[(at / 64) as usize] >> (at % 64) & 1 != 0 {
                            models[consumer].remove(&page);
                        }
                    }
                }
            }
            Step::Split { at } => {
                let at = Gfn::new(base + u64::from(at) % PAGES);
                let _ = table.transaction(|tx| tx.split(SPACE, SlotId::new(0), at, SlotId::new(1)));
            }
            Step::Merge => {
                let _ = table.transaction(|tx| tx.merge(SPACE, SlotId::new(0), SlotId::new(1)));
            }
            Step::Move { to } => {
                let to = u64::from(to) % (3 * PAGES);
                if table.move_to(SPACE, SlotId::new(0), Gfn::new(to)).is_ok() {
                    match table.view().slot(SPACE, SlotId::new(1)) {
                        // Half of the memory moved: the model knows one place only.
                        Some(_) => drop(table.move_to(SPACE, SlotId::new(0), Gfn::new(base)).unwrap()),
                        None => base = to,
                    }
                }
            }
        }
    }
    for (consumer, model) in consumers.iter().zip(&mut models) {
        take(consumer, None, true, base, model);
        assert!(model.is_empty());
    }
});

fn slots(base: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(base), PAGES).unwrap()
}

fn take(consumer: &Consumer, gfns: Option<GfnRange>, commit: bool, base: u64, model: &mut BTreeSet<u64>) {
    let harvest = match gfns {
        Some(gfns) => consumer.harvest_range(SPACE, gfns, &mut SoftwareOnly),
        None => consumer.harvest(&mut SoftwareOnly),
    }
    .unwrap();
    let gfns = gfns.unwrap_or_else(|| slots(base)).intersect(&slots(base)).unwrap_or_default();
    let wanted: Vec<u64> =
        model.iter().map(|page| base + page).filter(|&gfn| gfns.contains(Gfn::new(gfn))).collect();
    let got: Vec<u64> = harvest.runs().flat_map(|run| run.gfns.start().get()..run.gfns.end().get()).collect();
    assert_eq!(got, wanted);
    if commit {
        harvest.commit();
        wanted.iter().for_each(|gfn| _ = model.remove(&(gfn - base)));
    }
}
