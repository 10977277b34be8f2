//! Where there is nothing: accesses that lead to no memory, which entries remember, and tables of the guest's that lie in none.

use memslot::{Gfn, Gpa, SlotFlags, SlotId};
use memslot_mmu::Level;
use memslot_mmu::shadow::guest::{ErrorCode, GuestAccess, PageFault};
use memslot_mmu::shadow::{ShadowConfig, ShadowFault, ShadowStats};

use crate::naive::Want;
use crate::past_bugs::{ALL, Guest, NONE, PAGE_SIZE, PD, PDPT, PT, READONLY, USER, USER_WRITE, in_pd};
use crate::world::host::HVA;
use crate::world::layout::LARGE;
use crate::world::{RAM, READ, SMM, Touched, WRITE, range, slot};

/// Frames that are in no slot.
const HOLE: u64 = 0x1_0000;

/// A guest whose entry 1 of the table leads to a hole, with these bits.
fn guest(bits: u64) -> Guest {
    let mut guest = Guest::small();
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 1, HOLE << 12 | bits);
    guest
}

fn stats(guest: &Guest) -> ShadowStats {
    guest.world.shadow.stats()
}

/// Uses the address; whether an entry has remembered that there is nothing, and so no walk was made.
#[track_caller]
fn remembers(guest: &mut Guest, address: u64, want: Want) -> bool {
    let before = stats(guest);
    let found = guest.touch(0, address, want);
    assert_eq!(found, Touched::Mmio(HOLE << 12 | address & 0xfff));
    let after = stats(guest);
    assert_eq!(after.mmio, 1);
    after.mmio_hits > before.mmio_hits
}

#[test]
fn a_walk_is_made_once() {
    for is_large in [false, true] {
        let mut guest = guest(ALL);
        if is_large {
            guest.put(PD, 0, HOLE << 12 | ALL | PAGE_SIZE);
        }
        let address = if is_large { 0 } else { 0x1000 };
        let before = stats(&guest).flushes;
        assert!(!remembers(&mut guest, address | 0x18, USER));
        for want in [USER, READ, WRITE, USER_WRITE, Want { fetch: true, ..USER }] {
            assert!(remembers(&mut guest, address | 0x20, want), "{want:?}");
        }
        assert_eq!((stats(&guest).mmio_made, stats(&guest).leaves), (1, 0));
        // The other processor has the same root.
        let hits = stats(&guest).mmio_hits;
        assert_eq!(guest.touch(1, address, READ), Touched::Mmio(HOLE << 12));
        assert_eq!(stats(&guest).mmio_hits, hits + 1);
        // It goes with the table that it is in, and nobody is flushed for it alone.
        assert_eq!(stats(&guest).flushes, before);
        guest.world.shadow.zap_all();
        guest.step(|_| ());
        assert_eq!(stats(&guest).mmio, 0);
    }
}

/// Where all bits of an address may be one, no entry can be broken.
#[test]
fn nothing_is_remembered_without_reserved_bits() {
    let config = ShadowConfig { physical_address_bits: 52, ..ShadowConfig::default() };
    let host = crate::world::host::TestHost::default();
    let mut table = memslot::SlotTable::new(memslot::Limits::default()).unwrap();
    let shadow = memslot_mmu::shadow::Shadow::attach(&mut table, host, config).unwrap();
    let mut vcpu = shadow.vcpu().unwrap();
    let registers = memslot_mmu::shadow::guest::Registers { cr0: 0x11, ..Default::default() };
    let paging = memslot_mmu::shadow::guest::GuestPaging::new(registers, Default::default());
    vcpu.load(paging, RAM).unwrap();
    for _ in 0..3 {
        let fault = vcpu.fault(0x1018, GuestAccess::RESERVED).unwrap();
        assert_eq!(fault, ShadowFault::Mmio(Gpa::new(0x1018)));
    }
    assert_eq!((shadow.stats().mmio, shadow.stats().mmio_made, shadow.stats().mmio_hits), (0, 0, 0));
}

/// What the guest's tables do not permit is its own fault, exactly as without; and a write has the dirty bit set.
#[test]
fn what_is_remembered_permits_what_the_tables_permit() {
    let clean = ALL & !0x40;
    // A supervisor's page that is read-only and not executable, and dirty.
    let mut kernels = guest(0x61 | 1 << 63);
    assert!(!remembers(&mut kernels, 0x1000, READ));
    assert!(remembers(&mut kernels, 0x1000, READ));
    for (want, code) in [
        (USER, 5),
        (WRITE, 3),
        (USER_WRITE, 7),
        (Want { fetch: true, ..READ }, 0x11),
        (Want { fetch: true, ..USER }, 0x15),
    ] {
        assert_eq!(kernels.touch(0, 0x1000, want), Touched::Fault(code), "{want:?}");
    }
    let mut guest = guest(clean);
    assert!(!remembers(&mut guest, 0x1000, USER));
    assert!(remembers(&mut guest, 0x1000, USER));
    assert!(!remembers(&mut guest, 0x1000, WRITE), "the dirty bit has to be set");
    assert_eq!(guest.world.peek(RAM, (PT << 12) + 8), Some(HOLE << 12 | ALL));
    assert!(remembers(&mut guest, 0x1000, WRITE));
}

/// Without CR0.WP a supervisor writes to what is read-only, and the dirty bit is set all the same.
#[test]
fn a_write_without_protection_sets_the_dirty_bit() {
    for bits in [0x21, 0x25, 0x61] {
        let mut guest = guest(bits);
        guest.step(|world| assert!(world.load(0, 0, 1, RAM, false)));
        assert!(!remembers(&mut guest, 0x1000, READ));
        assert!(!remembers(&mut guest, 0x1000, WRITE));
        assert_eq!(guest.world.peek(RAM, (PT << 12) + 8), Some(HOLE << 12 | bits | 0x40));
    }
}

/// A change of the slots, anywhere, makes it out of date; memory that comes is found.
#[test]
fn a_change_of_the_slots() {
    let mut guest = guest(ALL);
    assert!(!remembers(&mut guest, 0x1000, USER));
    // In the other address space, and somewhere else.
    guest.change(|world| {
        world.table.create(slot(SMM, 5, range(HOLE, 16), 4096, NONE)).unwrap();
    });
    assert!(!remembers(&mut guest, 0x1000, USER));
    assert!(remembers(&mut guest, 0x1000, USER));
    assert_eq!(stats(&guest).mmio_stale, 1);
    guest.change(|world| {
        world.table.create(slot(RAM, 5, range(HOLE, 16), 4096, NONE)).unwrap();
    });
    guest.leads(0, 0x1000, USER_WRITE, HOLE);
    assert_eq!((stats(&guest).mmio, stats(&guest).leaves), (0, 1));
    guest.delete(5);
    assert!(!remembers(&mut guest, 0x1000, USER));
    assert!(remembers(&mut guest, 0x1000, USER_WRITE));
}

/// The same address in the two address spaces, in each of which it may be memory.
#[test]
fn the_two_address_spaces_remember_for_themselves() {
    let mut guest = guest(ALL);
    guest.change(|world| {
        world.table.create(slot(SMM, 5, range(HOLE, 16), 4096, NONE)).unwrap();
    });
    assert!(!remembers(&mut guest, 0x1000, USER));
    guest.step(|world| assert!(world.load(0, 0, 0, SMM, false)));
    guest.leads(0, 0x1000, USER_WRITE, HOLE);
    guest.load(0, 0);
    assert!(remembers(&mut guest, 0x1000, USER));
    guest.step(|world| assert!(world.load(1, 0, 0, SMM, false)));
    guest.leads(1, 0x1000, USER, HOLE);
}

/// The guest's entry becomes another one: by its own write, by a device's, and after a flush of what is unsync.
#[test]
fn the_guest_changes_the_entry() {
    for how in 0..3 {
        let mut guest = guest(ALL);
        assert!(!remembers(&mut guest, 0x1000, USER));
        match how {
            0 => guest.step(|world| world.device_write(RAM, (PT << 12) + 8, 30 << 12 | ALL)),
            _ => guest.store(1, PT, 1, 30 << 12 | ALL),
        }
        if how == 2 {
            guest.load(0, 0);
        } else {
            guest.step(|world| world.invlpg(0, 0x1000));
        }
        assert_eq!(stats(&guest).mmio, 0);
        guest.leads(0, 0x1000, USER, 30);
        guest.store(1, PT, 1, HOLE << 12 | ALL);
        guest.load(0, 0);
        assert!(!remembers(&mut guest, 0x1000, USER));
    }
}

/// A write to a read-only slot, and a page that the host says is none, may be otherwise the next time: they are asked for.
#[test]
fn only_what_is_in_no_slot_is_remembered() {
    let mut guest = guest(ALL);
    guest.change(|world| {
        world.table.create(slot(RAM, 5, range(HOLE, 16), 4096, READONLY)).unwrap();
    });
    assert_eq!(guest.touch(0, 0x1000, WRITE), Touched::Mmio(HOLE << 12));
    assert_eq!(stats(&guest).mmio, 0);
    guest.leads(0, 0x1000, USER, HOLE);
    let page = HVA + (4096 << 12);
    let set = |guest: &mut Guest, on: bool| {
        guest.step(|world| {
            let shadow = world.shadow.clone();
            let invalidation = shadow.invalidate_hva(crate::world::page_of(page)).unwrap();
            world.host.set_mmio(page, on);
            invalidation.end();
        });
    };
    set(&mut guest, true);
    for _ in 0..2 {
        assert_eq!(guest.touch(0, 0x1000, USER), Touched::Mmio(HOLE << 12));
        assert_eq!(stats(&guest).mmio, 0);
    }
    set(&mut guest, false);
    guest.leads(0, 0x1000, USER, HOLE);
}

/// One of the guest's tables is in no slot: the VMM is told which entry is missing, with the fault that KVM would give. Not so where the walk ends before,
/// nor where the page itself is missing.
#[test]
fn a_table_in_no_slot() {
    const TABLE: u64 = LARGE + 40;
    let mut guest = Guest::small();
    guest.delete(1);
    let missing = |at: u64, access: GuestAccess, code: u32| {
        let error_code = ErrorCode::from_bits_retain(code);
        let (entry, _) = (Gpa::new(at), access);
        ShadowFault::NoTable { entry, fault: PageFault { address: 0x20_1000, error_code } }
    };
    for (table, index, at) in [(PDPT, 0, TABLE << 12 | 8), (PD, 1, TABLE << 12 | 8)] {
        guest.put(PDPT, 0, PD << 12 | ALL);
        guest.put(table, index, TABLE << 12 | ALL);
        guest.load(0, 0);
        for (access, code) in
            [(GuestAccess::READ, 0), (GuestAccess::WRITE, 2), (GuestAccess::USER | GuestAccess::FETCH, 0x14)]
        {
            let before = stats(&guest);
            let fault = guest.step(|world| world.cpus[0].vcpu.fault(in_pd(1) | 0x1000, access).unwrap());
            assert_eq!(fault, missing(at, access, code));
            let after = stats(&guest);
            assert_eq!((after.no_table, after.injected), (before.no_table + 1, before.injected));
        }
        assert_eq!(guest.touch(0, in_pd(1) | 0x1000, USER), Touched::NoTable(4));
    }
    // An entry that is not present is the guest's own affair.
    guest.store(1, PD, 1, (TABLE << 12 | ALL) & !1);
    guest.load(0, 0);
    assert_eq!(guest.touch(0, in_pd(1) | 0x1000, USER), Touched::Fault(4));
    // Memory comes to where the table is.
    guest.store(1, PD, 1, TABLE << 12 | ALL);
    guest.load(0, 0);
    assert_eq!(guest.touch(0, in_pd(1) | 0x1000, USER), Touched::NoTable(4));
    guest.change(|world| {
        world.table.create(slot(RAM, 5, range(TABLE, 16), TABLE, NONE)).unwrap();
    });
    assert_eq!(guest.touch(0, in_pd(1) | 0x1000, USER), Touched::Fault(4));
    guest.put(TABLE, 1, 30 << 12 | ALL);
    guest.leads(0, in_pd(1) | 0x1000, USER, 30);
    // The table's slot goes while it is in use.
    guest.delete(5);
    assert_eq!(guest.touch(0, in_pd(1) | 0x1000, USER_WRITE), Touched::NoTable(6));
}

/// A table in a page that cannot be reached: the host says whether that is for now, or because it is a device's. (It went on trying for
/// ever.)
#[test]
fn a_table_in_a_devices_page() {
    let mut guest = Guest::small();
    guest.change(|world| {
        world.table.create(slot(RAM, 5, range(HOLE, 16), 4096, SlotFlags::empty())).unwrap();
    });
    guest.put(PD, 1, HOLE << 12 | ALL);
    let page = HVA + (4096 << 12);
    guest.world.host.set_mmio(page, true);
    guest.world.note();
    let fault = guest.world.cpus[0].vcpu.fault(in_pd(1), GuestAccess::WRITE).unwrap();
    let error_code = ErrorCode::WRITE;
    let entry = Gpa::new(HOLE << 12);
    assert_eq!(fault, ShadowFault::NoTable { entry, fault: PageFault { address: in_pd(1), error_code } });
    guest.world.host.set_mmio(page, false);
    guest.world.host.set_changing(page, true);
    assert_eq!(guest.world.cpus[0].vcpu.fault(in_pd(1), GuestAccess::WRITE).unwrap(), ShadowFault::Retry);
    guest.world.host.set_changing(page, false);
    assert_eq!(guest.touch(0, in_pd(1), USER), Touched::Fault(4));
    assert!(guest.world.table.view().slot(RAM, SlotId::new(5)).unwrap().gfns().contains(Gfn::new(HOLE)));
    assert_eq!(guest.world.shadow.config().largest, Level::K4);
}
