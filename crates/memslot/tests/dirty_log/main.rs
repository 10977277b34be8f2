//! The dirty log, one named test for each rule: what its users rely on, marks at the worst moment, and the fence of those
//! that mark what is marked already.

mod fence;
mod late;
mod rules;
mod windows;

use memslot::dirty::{Consumer, Harvest, SoftwareOnly};
use memslot::{AddressSpaceId, Backing, Gfn, GfnRange, Hva, SlotFlags, SlotId, SlotSpec};

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;

fn gfns(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first), pages).unwrap()
}

/// A slot whose dirty log runs, with host memory of its own.
fn slot(id: u32, first: u64, pages: u64) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: gfns(first, pages),
        backing: Backing::Host { hva: Hva::new(0x7000_0000_0000 + (u64::from(id) << 32)) },
        flags: SlotFlags::LOG_DIRTY_PAGES,
    }
}

fn runs(harvest: &Harvest<'_>) -> Vec<(u64, u64)> {
    harvest.runs().map(|run| (run.gfns.start().get(), run.gfns.len())).collect()
}

/// Harvests, without page tables behind the log, and commits.
fn take(consumer: &Consumer) -> Vec<(u64, u64)> {
    let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
    let runs = runs(&harvest);
    harvest.commit();
    runs
}
