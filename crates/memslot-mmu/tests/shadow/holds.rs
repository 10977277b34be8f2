//! How long the lock is held: in entries, whatever a guest does.

use memslot::SlotId;
use memslot_mmu::shadow::ShadowConfig;

use crate::past_bugs::{ALL, Guest, NONE, PAGE_SIZE, PD, PDPT, PT, USER_WRITE, in_pd};
use crate::world::layout::LARGE;
use crate::world::{RAM, READ, Touched, range, slot};

/// KVM's figure, and ours.
const LONGEST: u64 = memslot_mmu::shadow::LONGEST_LIST as u64;
const _: () = assert!(LONGEST == 1000);

/// Twice what is asked for, as the last entry may be a whole table with all that leads there.
fn most() -> u64 {
    2 * ShadowConfig::default().hold as u64
}

#[track_caller]
fn check(guest: &mut Guest) {
    guest.step(|_| ());
    let stats = guest.world.shadow.stats();
    assert!(stats.longest_hold <= most(), "{} entries under one hold", stats.longest_hold);
}

/// Uses a page without looking at everything.
#[track_caller]
fn touch(guest: &mut Guest, address: u64) {
    assert!(matches!(guest.world.touch(0, address, USER_WRITE), Touched::Done(_)));
}

/// A slot in which something is mapped everywhere: zapped, protected, deleted, its places looked at for the statistics.
#[test]
fn a_large_slot() {
    const FIRST: u64 = 1 << 20;
    const REGIONS: u64 = 400;
    let mut guest = Guest::small();
    guest.change(|world| {
        world.table.create(slot(RAM, 7, range(FIRST, REGIONS * 512), 1 << 19, NONE)).unwrap();
    });
    for index in 0..REGIONS {
        guest.world.poke(RAM, (PD << 12) + index * 8, (FIRST + 512 * index) << 12 | ALL | PAGE_SIZE);
    }
    for round in 0..4 {
        (0..REGIONS).for_each(|index| touch(&mut guest, in_pd(index) | index << 12));
        match round {
            0 => guest.world.shadow.zap_gfn_range(RAM, range(FIRST, REGIONS * 512)),
            1 => guest.world.shadow.zap_all(),
            2 => {
                // Read-only, and writable again.
                for on in [true, false] {
                    guest.world.table.transaction(|tx| tx.set_read_only(RAM, SlotId::new(7), on)).unwrap();
                }
            }
            _ => {
                guest.world.table.delete(RAM, SlotId::new(7)).unwrap();
            }
        }
        check(&mut guest);
    }
    guest.world.shadow.reclaim();
    check(&mut guest);
    assert_eq!(guest.leaves(), 0);
}

/// One page of memory that the guest maps everywhere, and one table that it leads to from everywhere.
#[test]
fn lists_have_an_end() {
    const TABLES: u64 = 8;
    let mut guest = Guest::small();
    for table in 24..24 + TABLES {
        guest.world.poke(RAM, (PD << 12) + (table - 24) * 8, table << 12 | ALL);
        (0..512).for_each(|index| _ = guest.world.poke(RAM, (table << 12) + index * 8, LARGE << 12 | ALL));
    }
    for page in 0..TABLES * 512 {
        touch(&mut guest, page << 12);
    }
    let stats = guest.world.shadow.stats();
    assert!(stats.recycled + LONGEST + 16 >= 8 * 512, "{stats:?}");
    assert!(stats.leaves as u64 <= LONGEST + 16);
    // It becomes a table: all of them are write-protected.
    guest.world.poke(RAM, (PD << 12) + 100 * 8, LARGE << 12 | ALL);
    guest.world.touch(0, in_pd(100), READ);
    check(&mut guest);
    // The same for what leads to a table: from 4 directories, of which each has 512 entries for it.
    let mut guest = Guest::small();
    guest.world.poke(RAM, PT << 12, 30 << 12 | ALL);
    for directory in 0..4 {
        guest.world.poke(RAM, (PDPT << 12) + directory * 8, (PD + directory) << 12 | ALL);
        for index in 0..512 {
            guest.world.poke(RAM, ((PD + directory) << 12) + index * 8, PT << 12 | ALL);
        }
        (0..512).for_each(|index| touch(&mut guest, directory << 30 | in_pd(index)));
    }
    assert!(guest.world.shadow.stats().recycled + LONGEST + 16 >= 4 * 512);
    check(&mut guest);
    guest.world.shadow.zap_all();
    check(&mut guest);
}

/// All entries of three levels lead to the same table, which is unsync: a flush does not go every path.
#[test]
fn paths_are_many_and_tables_few() {
    let mut guest = Guest::small();
    for index in 0..256 {
        guest.world.poke(RAM, (1 << 12) + index * 8, PDPT << 12 | ALL);
    }
    for index in 0..512 {
        guest.world.poke(RAM, (PDPT << 12) + index * 8, PD << 12 | ALL);
        guest.world.poke(RAM, (PD << 12) + index * 8, PT << 12 | ALL);
    }
    guest.world.poke(RAM, PT << 12, 30 << 12 | ALL);
    (0..256).for_each(|index| touch(&mut guest, index << 39));
    (0..512).for_each(|index| touch(&mut guest, index << 30));
    (0..512).for_each(|index| touch(&mut guest, index << 21));
    for value in [31, 32, 33] {
        guest.world.now += 1;
        guest.world.store(0, PT << 12, value << 12 | ALL);
        guest.world.note();
        guest.world.load(0, 0, 0, RAM, false);
        guest.world.flush_guest(0);
        guest.world.invlpg(0, 0);
    }
    assert!(guest.world.shadow.stats().syncs < 100);
    let stats = guest.world.shadow.stats();
    assert!(stats.unsyncs > 0 && stats.longest_hold <= most(), "{stats:?}");
    assert!(guest.world.shadow.check().is_ok());
    let found = guest.world.touch(0, 7 << 39, USER_WRITE);
    assert_eq!(found, Touched::Done(guest.world.resolve(RAM, 33).unwrap().1));
}

/// More tables are unsync than are compared at once: the guest's flush sees what was written to each.
#[test]
fn a_flush_in_steps_sees_everything() {
    const TABLES: u64 = 22;
    for how in 0..3 {
        let mut guest = Guest::small();
        for table in 0..TABLES {
            guest.put(PD, table, (24 + table) << 12 | ALL);
            guest.put(24 + table, 1, (LARGE + table) << 12 | ALL);
            guest.leads(0, in_pd(table) | 0x1000, USER_WRITE, LARGE + table);
        }
        for round in 1..4 {
            // The same tables in between, or others: the flush that comes first finds them quiet, or not.
            for table in (0..TABLES).filter(|table| how < 2 || (table + round) % 3 == 0) {
                guest.store(1, 24 + table, 1, (LARGE + table + round) << 12 | ALL);
            }
            if how == 0 {
                guest.step(|world| world.flush_guest(0));
            } else {
                guest.load(0, 0);
            }
            for table in 0..TABLES {
                let (_, pfn) = guest.world.resolve(RAM, LARGE + table + round).unwrap();
                let is_new = how < 2 || (table + round) % 3 == 0;
                let found = guest.touch(0, in_pd(table) | 0x1000, USER_WRITE);
                assert!(!is_new || found == Touched::Done(pfn), "{table} in round {round}: {found:?}");
            }
        }
        check(&mut guest);
    }
}
