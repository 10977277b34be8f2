//! Row 31: an entry that is present becomes something else, without anybody having said that it goes.

use memslot::SlotFlags;
use memslot_mmu::Level;
use memslot_mmu::shadow::ShadowConfig;

use super::{ALL, Guest, LOG, NONE, PAGE_SIZE, PD, PT, READONLY, USER, USER_WRITE};
use crate::world::layout::LARGE;
use crate::world::{RAM, Touched, range, slot};

/// Not dirty yet: what is read is mapped, and a write faults although the entry is there.
const CLEAN: u64 = ALL & !0x40;

/// Row 31: CVE-2026-23401: what led to memory leads to a hole now; the entry was overwritten, and its record in the reverse map stayed.
#[test]
fn row_31_from_memory_to_a_hole_and_back() {
    let mut guest = Guest::small();
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 1, 30 << 12 | CLEAN);
    guest.leads(0, 0x1000, USER, 30);
    assert_eq!(guest.leaves(), 1);
    guest.behind_our_back(PT, 1, 200 << 12 | ALL);
    assert_eq!(guest.touch(0, 0x1000, USER_WRITE), Touched::Mmio(200 << 12));
    assert_eq!(guest.leaves(), 0, "the entry has gone, with its record");
    guest.tell();
    // A slot is made there: it is memory now.
    guest.change(|world| {
        world.table.create(slot(RAM, 7, range(190, 20), 4096, NONE)).unwrap();
    });
    guest.step(|world| world.invlpg(0, 0x1000));
    guest.leads(0, 0x1000, USER_WRITE, 200);
    guest.delete(7);
    assert_eq!(guest.touch(0, 0x1000, USER), Touched::Mmio(200 << 12));
    guest.world.shadow.zap_all();
    assert_eq!(guest.leaves(), 0);
}

/// What the entry of a table becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Becomes {
    Hole,
    /// Memory that is only read: a write is none of memory's.
    ReadOnly,
    OtherMemory,
    /// The same memory, from where it is logged.
    Logged,
    /// A table, where there was a large page; not present at the lowest level.
    Table,
}

/// Row 31, for all that an entry can become, at both levels that the test's memory has room for: what it was is not in the reverse map any
/// more, and what it is now is.
#[test]
fn row_31_a_present_entry_becomes_anything_else() {
    let all = [Becomes::Hole, Becomes::ReadOnly, Becomes::OtherMemory, Becomes::Logged, Becomes::Table];
    for level in [Level::K4, Level::M2] {
        for becomes in all {
            for is_told in [false, true] {
                overwrite(level, becomes, is_told);
            }
        }
    }
}

fn overwrite(level: Level, becomes: Becomes, is_told: bool) {
    let mut guest = Guest::new(ShadowConfig { largest: level, ..ShadowConfig::default() });
    let other = |id: u32, gfn: u64, flags: SlotFlags| slot(RAM, id, range(gfn, 512), gfn, flags);
    guest.change(|world| {
        world.table.create(other(7, 4096, READONLY)).unwrap();
        world.table.create(other(8, 8192, LOG)).unwrap();
    });
    let is_large = level == Level::M2;
    let (table, index, size) = if is_large { (PD, 0, PAGE_SIZE) } else { (PT, 1, 0) };
    let address = if is_large { 0 } else { 0x1000 };
    if !is_large {
        guest.put(PD, 0, PT << 12 | ALL);
    }
    // What the table maps that the large page becomes.
    guest.put(14, 0, 33 << 12 | ALL);
    guest.put(table, index, LARGE << 12 | CLEAN | size);
    guest.leads(0, address, USER, LARGE);
    assert_eq!(guest.leaves(), 1);

    let new = match becomes {
        Becomes::Hole => 16384 << 12 | ALL | size,
        Becomes::ReadOnly => 4096 << 12 | ALL | size,
        Becomes::OtherMemory => (LARGE + 512) << 12 | ALL | size,
        Becomes::Logged => 8192 << 12 | ALL | size,
        Becomes::Table => {
            if is_large {
                14 << 12 | ALL
            } else {
                0
            }
        }
    };
    guest.behind_our_back(table, index, new);
    if is_told {
        guest.tell();
        assert_eq!(guest.leaves(), 0, "{level} {becomes:?}");
    }
    let found = guest.touch(0, address, USER_WRITE);
    let frame = |guest: &Guest, gfn| Touched::Done(guest.world.resolve(RAM, gfn).unwrap().1);
    let (expected, leaves) = match becomes {
        Becomes::Hole => (Touched::Mmio(16384 << 12), 0),
        Becomes::ReadOnly => (Touched::Mmio(4096 << 12), 0),
        Becomes::OtherMemory => (frame(&guest, LARGE + 512), 1),
        Becomes::Logged => (frame(&guest, 8192), if is_large { 8 } else { 1 }),
        Becomes::Table if is_large => (frame(&guest, 33), 1),
        Becomes::Table => (Touched::Fault(6), 0),
    };
    assert_eq!((found, guest.leaves()), (expected, leaves), "{level} {becomes:?}, told: {is_told}");
    guest.tell();
    // The memory that it was of can be taken away, and what it is of now.
    guest.delete(1);
    guest.delete(8);
    guest.delete(7);
    let found = guest.touch(1, address, USER);
    let is_left = becomes == Becomes::Table && is_large;
    assert_eq!(guest.leaves(), usize::from(is_left), "{level} {becomes:?}: {found:?}");
    guest.world.shadow.zap_all();
    guest.step(|_| ());
    assert_eq!(guest.leaves(), 0);
}
