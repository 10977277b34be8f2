//! What remembers that there is no memory, across the wrap of its generations.

use std::boxed::Box;

use memslot::{AddressSpaceId, Backing, Gpa, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable};

use super::guest::{GuestAccess, GuestPaging, Processor, Registers, Rights};
use super::mmio::{self, GENERATIONS};
use super::{Shadow, ShadowConfig, ShadowFault, ShadowVcpu};
use crate::invalidate::range;
use crate::level::ENTRIES;
use crate::sync::Ordering;
use crate::user::UserHost;

const HVA: u64 = 0x7000_0000_0000;
const DEVICE: u64 = 0x1_0000;
const RAM: AddressSpaceId = AddressSpaceId::NORMAL;

fn guest(counters: u64) -> (SlotTable, Shadow<UserHost>, ShadowVcpu<UserHost>) {
    // The guest's memory is its tables, one for each level, all in a row; and frames that nobody reads.
    let host = UserHost::with_memory(Hva::new(HVA), 4);
    for level in 0..3 {
        host.memory()[level].0[0].store((level as u64 + 1) << 12 | 0x27, Ordering::SeqCst);
    }
    host.memory()[3].0[1].store(DEVICE << 12 | 0x67, Ordering::SeqCst);
    host.memory()[3].0[2].store((DEVICE + 1) << 12 | 0x67, Ordering::SeqCst);
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let config = ShadowConfig { physical_address_bits: 48, ..ShadowConfig::default() };
    let shadow = Shadow::starting_at(&mut table, host, config, counters).unwrap();
    create(&mut table, 0, 0);
    let mut vcpu = shadow.vcpu().unwrap();
    let registers = Registers { cr0: 0x8001_0011, cr3: 0, cr4: 0x20, efer: 0xd00 };
    vcpu.load(GuestPaging::new(registers, Processor::default()), RAM).unwrap();
    (table, shadow, vcpu)
}

fn create(table: &mut SlotTable, id: u32, first: u64) {
    let slot = SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: range(first, first + ENTRIES.min(4) as u64),
        backing: Backing::Host { hva: Hva::new(HVA + (first << 12)) },
        flags: SlotFlags::empty(),
    };
    table.create(slot).unwrap();
}

/// A read of what the first entry, or the second, leads to, as the processor's fault for a reserved bit.
fn read(vcpu: &mut ShadowVcpu<UserHost>, page: u64) -> ShadowFault {
    if vcpu.is_stale() {
        vcpu.reload().unwrap();
    }
    vcpu.fault(page << 12 | 0x18, GuestAccess::RESERVED).unwrap()
}

/// The slots have changed, somewhere.
fn next_version(shadow: &Shadow<UserHost>) -> bool {
    shadow.shared.with(|locked| locked.count_version())
}

#[test]
fn entries_say_what_they_were_made_of_and_no_processor_uses_them() {
    let all = [Rights::empty(), Rights::WRITE, Rights::USER | Rights::EXECUTE, Rights::all()];
    for version in [0, 1, 0xff, 0x100, 0x7ff, GENERATIONS - 1, GENERATIONS, GENERATIONS + 1, u64::MAX] {
        for rights in all {
            let entry = mmio::entry(rights, version);
            assert!(mmio::is_mmio(entry) && !super::spte::is_present(entry));
            assert_eq!(mmio::rights(entry), rights);
            assert!(mmio::is_of(entry, version) && mmio::is_of(entry, version.wrapping_add(GENERATIONS)));
            for other in [1, 2, 0x80, 0x100, 0x400, GENERATIONS / 2] {
                assert!(!mmio::is_of(entry, version.wrapping_add(other)), "{version:#x} {other:#x}");
            }
            // Present, with an address that no processor has; not all it says is in the address bits of a frame.
            assert_eq!(entry & 1, 1);
            assert_eq!(entry >> 12 & 0xff_ffff_ffff, 0xff_ffff_ffff);
        }
    }
}

/// A generation comes a second time, with memory there by now: what remembers the first time is not believed. Whatever the counter starts
/// at, near its own wrap too.
#[test]
fn a_generation_that_comes_again() {
    for start in [0, GENERATIONS - 4, 2 * GENERATIONS - 3, u64::MAX - 2, (1 << 32) - 1] {
        let (mut table, shadow, mut vcpu) = guest(start);
        let nothing = |page: u64| ShadowFault::Mmio(Gpa::new((DEVICE + page - 1) << 12 | 0x18));
        assert_eq!(read(&mut vcpu, 1), nothing(1));
        assert_eq!(read(&mut vcpu, 1), nothing(1));
        assert_eq!(shadow.stats().mmio_hits, 1);
        // Memory comes.
        create(&mut table, 1, DEVICE);
        shadow.check().unwrap();
        // As many versions later as there are generations, the entry says what is current once more.
        let before = shadow.stats();
        assert_eq!(before.mmio, 1);
        let mut times = 0;
        for _ in 0..GENERATIONS - 1 {
            if next_version(&shadow) {
                shadow.zap_obsolete();
                times += 1;
            }
        }
        assert_eq!(times, 1, "once in a round, as long as there are such entries");
        assert!(matches!(read(&mut vcpu, 1), ShadowFault::Mapped(_)), "{start:#x}");
        assert_eq!(shadow.stats().mmio_hits, 1);
        shadow.check().unwrap();
        // Without such entries nothing is given up.
        let created = shadow.stats().created;
        for _ in 0..GENERATIONS {
            assert!(!next_version(&shadow));
        }
        assert!(!vcpu.is_stale());
        assert_eq!(shadow.stats().created, created);
        // What was made just before the wrap, and just behind it.
        table.delete(RAM, SlotId::new(1)).unwrap();
        for _ in 0..3 {
            assert_eq!((read(&mut vcpu, 1), read(&mut vcpu, 2)), (nothing(1), nothing(2)));
            shadow.check().unwrap();
            let _: bool = next_version(&shadow);
        }
        drop(Box::new(vcpu));
    }
}
