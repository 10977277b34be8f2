//! Guest memory for tests: mappings that stay until the process ends, so that every slot's promise holds.
#![allow(dead_code, reason = "each test uses a part")]

use memslot::dirty::{Consumer, SoftwareOnly};
use memslot::{AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable};
use memslot_vm_memory::{Native, Space};

pub(crate) const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
pub(crate) const PAGE: u64 = 4096;

/// Maps anonymous memory for good.
pub(crate) fn map(pages: u64) -> Hva {
    let len = usize::try_from(pages * PAGE).unwrap();
    // SAFETY: a new anonymous mapping touches nothing that is there.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    Hva::new(at.expose_provenance() as u64)
}

pub(crate) fn spec(id: u32, gfn: u64, pages: u64, hva: Hva) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(gfn), pages).unwrap(),
        backing: Backing::Host { hva },
        flags: SlotFlags::empty(),
    }
}

/// A slot with fresh memory.
pub(crate) fn fresh(id: u32, gfn: u64, pages: u64) -> SlotSpec {
    spec(id, gfn, pages, map(pages))
}

/// The same with its dirty log on.
pub(crate) fn logged(spec: SlotSpec) -> SlotSpec {
    SlotSpec { flags: SlotFlags::LOG_DIRTY_PAGES, ..spec }
}

pub(crate) fn table(slots: &[SlotSpec]) -> SlotTable {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    for slot in slots {
        table.create(*slot).unwrap();
    }
    table
}

pub(crate) fn space(table: &mut SlotTable) -> Space {
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    unsafe { Native::new(RAM).attach(table) }.unwrap()
}

/// Takes what was written since the last time: first frames and pages.
pub(crate) fn harvested(consumer: &Consumer) -> Vec<(u64, u64)> {
    let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
    let runs = harvest.runs().map(|run| (run.gfns.start().get(), run.gfns.len())).collect();
    harvest.commit();
    runs
}
