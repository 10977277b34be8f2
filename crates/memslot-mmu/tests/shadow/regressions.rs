//! What the checker has found in this engine: the shortest program for each.

use memslot_mmu::Level;
use memslot_mmu::shadow::ShadowConfig;
use memslot_mmu::shadow::guest::Mode;

use crate::world::World;
use crate::world::op::Op;

fn run(mode: Mode, unsync: Level, program: &[Op]) -> World {
    let mut world = World::new(mode, ShadowConfig { unsync, pages: 64, ..ShadowConfig::default() });
    world.run(program);
    world
}

const LOG: Op = Op::SlotFlags { smm: false, id: 0, flags: 1 };

/// Two virtual processors that were told different widths of physical addresses: what is an address bit for one is reserved for the other,
/// which must not use what was made of the table for the first.
#[test]
fn processors_that_reserve_different_bits() {
    use memslot::{AddressSpaceId, SlotFlags};
    use memslot_mmu::shadow::ShadowFault;
    use memslot_mmu::shadow::guest::{GuestAccess, GuestPaging, Processor};

    use crate::world::{RAM, range, slot};

    const FAR: u64 = 1 << 30;
    let space: AddressSpaceId = RAM;
    for first in [40, 48] {
        let mut world = World::new(Mode::Level4, ShadowConfig::default());
        // Bit 42 of the address, as far as there is one.
        world.table.create(slot(space, 7, range(FAR, 16), 4096, SlotFlags::empty())).unwrap();
        let address = world.layout.address(0);
        let found = world.naive(0, address, crate::world::READ).unwrap();
        let (leaf, _) = *found.entries.last().unwrap();
        assert!(world.poke(space, leaf, FAR << 12 | 0x67));
        world.shadow.wrote(space, memslot::Gpa::new(leaf), 8);
        let registers = world.cpus[0].registers();
        for width in [first, 88 - first, first] {
            let processor = Processor { physical_address_bits: width, ..Processor::default() };
            let vcpu = &mut world.cpus[usize::from(width == 40)].vcpu;
            vcpu.load(GuestPaging::new(registers, processor), space).unwrap();
            let root = vcpu.root().unwrap();
            let fault = vcpu.fault(address, GuestAccess::READ).unwrap();
            let walked = crate::world::cpu::hardware_walk(&world.host, root, address, false, |_| true);
            if width == 40 {
                let ShadowFault::Inject(fault) = fault else { panic!("{fault:?}") };
                assert_eq!(fault.error_code.bits(), 9);
                assert!(walked.is_err(), "it needs no fault to get there: {walked:?}");
            } else {
                assert!(matches!(fault, ShadowFault::Mapped(_) | ShadowFault::AlreadyMapped), "{fault:?}");
                assert!(walked.is_ok());
            }
        }
    }
}

/// A table of the guest's reached on two paths: one processor writes a page, a read on the other path finds the entry and made it
/// read-only without a word. The harvest saw nothing to take away, and did not flush the translation that could write.
#[test]
fn a_read_on_another_path_hides_a_writable_translation_from_the_harvest() {
    let program = [
        LOG,
        Op::Touch { cpu: 0, address: 75, how: 25 },
        Op::Touch { cpu: 0, address: 215, how: 100 },
        Op::Harvest,
        Op::Touch { cpu: 0, address: 75, how: 25 },
        Op::Harvest,
    ];
    run(Mode::Pae, Level::M2, &program);
}
