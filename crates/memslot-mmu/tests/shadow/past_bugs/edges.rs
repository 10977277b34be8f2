//! Row 33: slots whose ends are inside large pages.

use memslot::SlotId;
use memslot_mmu::Level;
use memslot_mmu::shadow::{ShadowConfig, ShadowRoot};

use super::{ALL, Guest, NONE, PAGE_SIZE, PDPT, READONLY, USER, set_flags};
use crate::world::cpu::all_leaves;
use crate::world::{RAM, Touched, range, slot};

const SLOT: u32 = 7;

/// Row 33: CVE-2024-26991: what is kept for large pages was looked up beyond the ends of a slot that do not lie at the ends of large
/// pages. Ranges that lie across the head and the tail, at 2 MiB and 1 GiB.
#[test]
fn row_33_slots_whose_ends_are_inside_large_pages() {
    const G1: u64 = 1 << 18;
    let (first, end) = (G1 + 5, 3 * G1 + 519);
    // The pages of the host lie as the guest's, so that all sizes are possible.
    let levels = [
        (G1 + 4, None),
        (G1 + 5, Some(Level::K4)),
        (G1 + 511, Some(Level::K4)),
        (G1 + 512, Some(Level::M2)),
        (2 * G1 - 1, Some(Level::M2)),
        (2 * G1, Some(Level::G1)),
        (3 * G1 - 1, Some(Level::G1)),
        (3 * G1, Some(Level::M2)),
        (3 * G1 + 512, Some(Level::K4)),
        (3 * G1 + 518, Some(Level::K4)),
        (3 * G1 + 519, None),
    ];
    let ranges = [
        range(G1, 6),
        range(G1 + 4, 600),
        range(2 * G1 - 1, 2),
        range(3 * G1 - 1, 2),
        range(3 * G1 + 511, 100),
        range(end - 1, G1),
        range(0, 1 << 40),
    ];
    for zapped in ranges {
        for flags in [NONE, READONLY] {
            let mut guest = Guest::new(ShadowConfig::default());
            guest.change(|world| {
                world.table.create(slot(RAM, SLOT, range(first, end - first), first, NONE)).unwrap();
            });
            for index in 1..4 {
                guest.put(PDPT, index, index << 30 | ALL | PAGE_SIZE);
            }
            let use_all = |guest: &mut Guest| {
                for (gfn, level) in levels {
                    let found = guest.touch(0, gfn << 12, USER);
                    match level {
                        None => assert_eq!(found, Touched::Mmio(gfn << 12)),
                        Some(level) => {
                            guest.leads(0, gfn << 12, USER, gfn);
                            let root = guest.world.cpus[0].vcpu.root().unwrap();
                            assert_eq!(size_of_leaf(guest, root, gfn << 12), level.pages() << 12, "{gfn:#x}");
                        }
                    }
                }
            };
            use_all(&mut guest);
            let shadow = guest.world.shadow.clone();
            if flags == NONE {
                guest.step(|_| shadow.zap_gfn_range(RAM, zapped));
            } else {
                set_flags(&mut guest, SLOT, flags);
            }
            // Nothing of what was asked for is mapped, in a page of whatever size.
            let mut ager = shadow.ager().unwrap();
            assert!(flags == READONLY || ager.age(RAM, zapped) == 0, "{zapped:?}");
            use_all(&mut guest);
            guest.delete(SLOT);
            assert_eq!(guest.leaves(), 0, "{zapped:?}");
        }
    }
}

/// A page of 1 GiB of which a part is the guest's tables: what is not beside these is mapped in pages of 2 MiB. (Room for these was not
/// reserved where 1 GiB seemed possible: the fault started again for ever.)
#[test]
fn a_gigabyte_with_tables_in_it() {
    const G1: u64 = 1 << 18;
    let mut guest = Guest::new(ShadowConfig::default());
    guest.delete(1);
    guest.change(|world| _ = world.table.transaction(|tx| tx.resize(RAM, SlotId::new(0), G1)).unwrap());
    guest.put(PDPT, 1, ALL | PAGE_SIZE);
    for (gfn, level) in [(G1 - 1, Level::M2), (512, Level::M2), (100, Level::K4)] {
        let address = 1 << 30 | gfn << 12;
        guest.leads(0, address, USER, gfn);
        let root = guest.world.cpus[0].vcpu.root().unwrap();
        assert_eq!(size_of_leaf(&guest, root, address), level.pages() << 12, "{gfn:#x}");
    }
}

/// How large the page is that the processor's tables have at an address.
fn size_of_leaf(guest: &Guest, root: ShadowRoot, address: u64) -> u64 {
    let leaves = all_leaves(&guest.world.host, root);
    let has = |start: u64, bytes: u64| (start..start + bytes).contains(&address);
    leaves.iter().find(|leaf| has(leaf.address, leaf.bytes)).unwrap().bytes
}
