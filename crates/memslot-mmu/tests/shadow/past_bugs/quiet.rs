//! When a table that the guest has written is write-protected again: no bug, but a boot of Linux on shadow tables went through three
//! times as many shadow pages as it does now.

use super::{ALL, Guest, PD, PT, USER};

use crate::world::layout::LARGE;

/// A kernel patches its code through a table of its own: it writes an entry, loads the root that leads there, uses it, and loads another root.
/// The table stays writable: what is compared at a load must not have been brought up to date just before, or nothing has ever changed. When the
/// guest leaves it alone, it is write-protected after some loads.
#[test]
fn a_table_that_is_written_before_each_load_stays_writable() {
    let mut guest = Guest::small();
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 0, LARGE << 12 | ALL);
    guest.leads(0, 0, USER, LARGE);
    let hits = |guest: &Guest| guest.world.shadow.stats().write_track_hits;
    let patch = |guest: &mut Guest, gfn: u64| {
        guest.store(0, PT, 0, gfn << 12 | ALL);
        guest.load(0, 0);
        guest.leads(0, 0, USER, gfn);
        guest.load(0, 1);
    };
    patch(&mut guest, LARGE + 1);
    let before = hits(&guest);
    for number in 0..16 {
        patch(&mut guest, LARGE + number % 3);
    }
    assert_eq!(hits(&guest), before);
    for _ in 0..8 {
        guest.load(0, 0);
    }
    assert_eq!(guest.world.shadow.stats().unsync, 0);
    guest.store(0, PT, 0, (LARGE + 5) << 12 | ALL);
    assert_eq!(hits(&guest), before + 1);
}
