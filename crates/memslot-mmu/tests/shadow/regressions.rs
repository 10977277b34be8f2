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
