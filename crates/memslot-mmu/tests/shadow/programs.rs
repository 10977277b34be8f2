//! Random programs of a guest, its devices and its VMM; after each step everything that is granted is held against the
//! guest's own tables.

use memslot_mmu::Level;
use memslot_mmu::shadow::ShadowConfig;
use memslot_mmu::shadow::guest::Mode;
use memslot_testing::proptest_config;
use proptest::prelude::*;

use crate::world::World;
use crate::world::op::{BYTES, Op};
use crate::world::run::run_bytes;

fn run(mode: Mode, unsync: Level, emulates: bool, program: &[Op]) {
    // The lock is given back wherever it can be, for every second program.
    let hold = if program.len() % 2 == 0 { 1 } else { ShadowConfig::default().hold };
    let config = ShadowConfig { unsync, hold, pages: 64, ..ShadowConfig::default() };
    let mut world = World::new(mode, config);
    world.emulates = emulates;
    world.check();
    world.run(program);
}

fn program() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(any::<[u8; BYTES]>().prop_map(Op::from_bytes), 1..60)
}

fn unsync() -> impl Strategy<Value = Level> {
    prop_oneof![Just(Level::K4), Just(Level::M2), Just(Level::new(5).unwrap())]
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4000, ..proptest_config(64) })]

    #[test]
    fn four_levels(unsync in unsync(), emulates: bool, program in program()) {
        run(Mode::Level4, unsync, emulates, &program);
    }

    #[test]
    fn tables_of_32_bits(unsync in unsync(), emulates: bool, program in program()) {
        run(Mode::Bits32, unsync, emulates, &program);
    }

    #[test]
    fn five_levels(unsync in unsync(), emulates: bool, program in program()) {
        run(Mode::Level5, unsync, emulates, &program);
    }

    #[test]
    fn pae(unsync in unsync(), emulates: bool, program in program()) {
        run(Mode::Pae, unsync, emulates, &program);
    }
}

/// The start of the fuzz target's corpus, and what it has found.
#[test]
fn seeds_of_the_fuzz_target() {
    let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/shadow");
    let mut count = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        run_bytes(&std::fs::read(seed.unwrap().path()).unwrap(), usize::MAX);
        count += 1;
    }
    assert!(count > 0);
}
