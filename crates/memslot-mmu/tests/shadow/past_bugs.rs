//! The bugs of the past, one test each: of KVM's shadow MMU, with their numbers and dates, and what each would do here.
//!
//! All tests look at everything after each step: the shadow tables' own check, and every translation that a processor could use against the
//! guest's tables and the slots (`World::check`).

mod edges;
mod overwritten;
mod quiet;
mod steps;

use memslot::{Gfn, Gpa, Hva, HvaRange, SlotFlags, SlotId};
use memslot_mmu::Level;
use memslot_mmu::shadow::ShadowConfig;
use memslot_mmu::shadow::guest::Mode;

use crate::naive::Want;
use crate::world::host::HVA;
use crate::world::layout::{END, LARGE};
use crate::world::{RAM, READ, SMM, Touched, WRITE, World, access, range, slot};

pub const NONE: SlotFlags = SlotFlags::empty();
pub const LOG: SlotFlags = SlotFlags::LOG_DIRTY_PAGES;
pub const READONLY: SlotFlags = SlotFlags::READONLY;

/// Present, writable, a user's, accessed, dirty.
pub const ALL: u64 = 0x67;
pub const PAGE_SIZE: u64 = 0x80;
pub const USER: Want = Want { user: true, ..READ };
pub const USER_WRITE: Want = Want { user: true, ..WRITE };

/// Where the tables of these tests are. Entry 0 of the root leads to them.
const ROOT: u64 = 1;
pub const PDPT: u64 = 5;
pub const PD: u64 = 9;
pub const PT: u64 = 13;

/// The first page that an entry of the PD maps.
pub const fn in_pd(index: u64) -> u64 {
    index << 21
}

pub struct Guest {
    pub world: World,
    /// What was written without telling.
    untold: Vec<u64>,
}

impl Guest {
    pub fn new(config: ShadowConfig) -> Self {
        let mut world = World::without_tables(Mode::Level4, config);
        // The kernel's map, and the way down to the PD.
        for (gpa, entry) in world.layout.tables() {
            if gpa >> 12 >= 16 {
                world.poke(RAM, gpa, entry);
            }
        }
        for root in 1..=4 {
            world.poke(RAM, (root << 12) + 300 * 8, 18 << 12 | 0x63);
        }
        let mut guest = Self { world, untold: vec![] };
        guest.put(ROOT, 0, PDPT << 12 | ALL);
        guest.put(PDPT, 0, PD << 12 | ALL);
        guest.load(0, 0);
        guest.load(1, 0);
        guest
    }

    /// Nothing but small pages, as of a host that has its memory in those.
    pub fn small() -> Self {
        Self::new(ShadowConfig { largest: Level::K4, ..ShadowConfig::default() })
    }

    /// As KVM is: only tables of the lowest level can be written freely.
    pub fn as_kvm() -> Self {
        Self::new(ShadowConfig { unsync: Level::K4, ..ShadowConfig::default() })
    }

    #[track_caller]
    pub fn step<R>(&mut self, work: impl FnOnce(&mut World) -> R) -> R {
        self.world.now += 1;
        let result = work(&mut self.world);
        self.world.note();
        if self.untold.is_empty() {
            self.world.check();
        } else {
            // What is thought to be in sync is not.
            if let Err(why) = self.world.shadow.check_maps() {
                panic!("check_maps: {why}");
            }
            self.world.check_grants();
        }
        result
    }

    /// Writes an entry that is not used yet.
    pub fn put(&mut self, table: u64, index: u64, value: u64) {
        self.step(|world| assert!(world.poke(RAM, (table << 12) + index * 8, value)));
    }

    /// Somebody writes an entry without telling anybody: as a VMM does that does not keep to the rules.
    pub fn behind_our_back(&mut self, table: u64, index: u64, value: u64) {
        let gpa = (table << 12) + index * 8;
        self.untold.push(gpa);
        self.step(|world| assert!(world.poke(RAM, gpa, value)));
    }

    /// Tells at last.
    pub fn tell(&mut self) {
        let untold = std::mem::take(&mut self.untold);
        self.step(|world| untold.iter().for_each(|gpa| world.shadow.wrote(RAM, Gpa::new(*gpa), 8)));
    }

    /// The guest's kernel writes an entry.
    pub fn store(&mut self, cpu: usize, table: u64, index: u64, value: u64) {
        let touched = self.step(|world| world.store(cpu, (table << 12) + index * 8, value));
        assert!(matches!(touched, Touched::Done(_) | Touched::Emulated(_)), "{touched:?}");
    }

    #[track_caller]
    pub fn touch(&mut self, cpu: usize, address: u64, want: Want) -> Touched {
        self.step(|world| world.touch(cpu, address, want))
    }

    /// The address leads to this frame of the guest.
    #[track_caller]
    pub fn leads(&mut self, cpu: usize, address: u64, want: Want, gfn: u64) {
        let found = self.touch(cpu, address, want);
        let space = self.world.cpus[cpu].space;
        let (_, pfn) = self.world.resolve(space, gfn).expect("there is memory");
        assert_eq!(found, Touched::Done(pfn), "{address:#x} does not lead to gfn {gfn:#x}");
    }

    pub fn load(&mut self, cpu: usize, root: u64) {
        self.step(|world| assert!(world.load(cpu, root, 0, RAM, false)));
    }

    pub fn change(&mut self, change: impl FnOnce(&mut World)) {
        self.step(|world| {
            change(world);
            world.slots_changed();
        });
    }

    pub fn delete(&mut self, id: u32) {
        self.change(|world| {
            world.table.delete(RAM, SlotId::new(id)).unwrap();
        });
    }

    pub fn set_flags(&mut self, id: u32, flags: SlotFlags) {
        self.change(|world| {
            world.table.set_flags(RAM, SlotId::new(id), flags).unwrap();
        });
    }

    pub fn leaves(&self) -> usize {
        self.world.shadow.stats().leaves
    }
}

/// A slot becomes read-only, or writable, and what else these flags say.
pub fn set_flags(guest: &mut Guest, id: u32, flags: SlotFlags) {
    guest.change(|world| {
        let set = |tx: &mut memslot::Transaction<'_>| {
            tx.set_read_only(RAM, SlotId::new(id), flags.contains(READONLY))?;
            tx.set_flags(RAM, SlotId::new(id), flags)
        };
        world.table.transaction(set).unwrap();
    });
}

/// Row 29: CVE-2026-46113: a PDE was changed from outside, the pages below it went on being used for another gfn; removing its entries
/// from the reverse map looked in the wrong place, and deleting the slot left entries behind.
#[test]
fn row_29_a_large_page_changes_its_frame_behind_our_back() {
    // By the guest itself, whose table is unsync then, and by somebody who does not tell; another page of the same entry is used next,
    // by either processor.
    for order in 0..8 {
        let mut guest = Guest::small();
        let is_told = order & 4 != 0;
        let set = |guest: &mut Guest, gfn: u64| {
            let entry = gfn << 12 | ALL | PAGE_SIZE;
            if is_told { guest.store(0, PD, 0, entry) } else { guest.behind_our_back(PD, 0, entry) }
        };
        guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
        guest.leads(0, 0x1000, USER_WRITE, LARGE + 1);
        set(&mut guest, LARGE + 512);
        let (first, second) = (order & 1, order >> 1 & 1);
        guest.leads(first, 0x2_2000, USER_WRITE, LARGE + 512 + 34);
        guest.leads(second, 0x4_3000, USER, LARGE + 512 + 67);
        set(&mut guest, LARGE);
        guest.leads(first, 0x6_4000, USER, LARGE + 100);
        guest.tell();
        guest.delete(1);
        assert_eq!(guest.touch(0, 0x4000, USER), Touched::Mmio(0x20_4000));
        guest.world.shadow.zap_all();
        guest.step(|_| ());
        assert_eq!(guest.leaves(), 0);
    }
}

/// Row 30: CVE-2026-53359 ("Januscape"): the page below an entry was reused because its gfn was the same, although one mapped a
/// large page directly and the other shadowed a table.
#[test]
fn row_30_the_same_frame_as_a_large_page_and_as_a_table() {
    for order in 0..4 {
        let mut guest = Guest::small();
        let (large_first, is_told) = (order & 1 != 0, order & 2 != 0);
        let large = LARGE << 12 | ALL | PAGE_SIZE;
        let table = LARGE << 12 | ALL;
        // The table in the first frame of the large page maps data, far apart so that none is made with its neighbour.
        guest.put(LARGE, 201, 30 << 12 | ALL);
        guest.put(LARGE, 301, 31 << 12 | ALL);
        let entries = if large_first { [large, table, large] } else { [table, large, table] };
        guest.put(PD, 0, entries[0]);
        for (round, entry) in (0..).zip(entries) {
            if round > 0 {
                if is_told { guest.store(0, PD, 0, entry) } else { guest.behind_our_back(PD, 0, entry) }
            }
            // Not the page that the processor has cached: it may use that.
            let at = (50 * round, 50 * round + 100);
            let is_large = entry == large;
            if is_large {
                guest.leads(usize::from(round % 2 == 1), at.0 << 12, USER, LARGE + at.0);
                guest.leads(0, at.1 << 12, USER_WRITE, LARGE + at.1);
            } else {
                guest.leads(usize::from(round % 2 == 1), 201 << 12, USER, 30);
                guest.leads(0, 301 << 12, USER_WRITE, 31);
            }
            guest.tell();
            guest.load(0, 0);
            guest.load(1, 0);
        }
        guest.delete(1);
        guest.world.shadow.zap_all();
        guest.step(|_| ());
        assert_eq!(guest.leaves(), 0);
    }
}

/// Row 32, June 2026 ("hugepage is in by slot"): a guest's large page begins below the slot; when logging ended, the slot's arrays
/// were indexed with what lies before it.
#[test]
fn row_32_a_large_page_that_begins_below_its_slot() {
    let mut guest = Guest::new(ShadowConfig::default());
    guest.delete(1);
    guest.change(|world| {
        world.table.create(slot(RAM, 1, range(LARGE + 3, 600), LARGE + 3, NONE)).unwrap();
    });
    guest.behind_our_back(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    guest.behind_our_back(PD, 1, (LARGE + 512) << 12 | ALL | PAGE_SIZE);
    for flags in [NONE, LOG, NONE] {
        guest.set_flags(1, flags);
        assert_eq!(guest.touch(0, 0x2000, USER), Touched::Mmio(0x20_2000), "below the slot");
        guest.leads(0, 0x3000, USER_WRITE, LARGE + 3);
        guest.leads(0, in_pd(1), USER_WRITE, LARGE + 512);
        // The last frame, and the first behind.
        guest.leads(0, in_pd(1) | 90 << 12, USER_WRITE, LARGE + 602);
        assert_eq!(guest.touch(0, in_pd(1) | 91 << 12, USER), Touched::Mmio(0x45_b000));
    }
    guest.step(|world| world.shadow.zap_gfn_range(RAM, range(LARGE, 4)));
    guest.step(|world| world.shadow.ager().unwrap().age(RAM, range(0, END)));
    guest.delete(1);
    assert_eq!(guest.leaves(), 0);
}

/// Row 34: CVE-2021-38198: the access to a large page was that of its last entry; what the entries above forbid was lost.
#[test]
fn row_34_a_large_page_through_paths_that_permit_different_things() {
    // Entry 0 of the PDPT permits everything, 1 is read-only, 2 is the supervisor's, 3 must not be executed.
    let forbids = [0, 2, 4, 1 << 63];
    let paths = |first: usize| (0..4).map(move |path| (path + first) % 4);
    for first in 0..4 {
        for largest in [Level::K4, Level::G1] {
            let mut guest = Guest::new(ShadowConfig { largest, ..ShadowConfig::default() });
            guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
            guest.put(PD, 1, PT << 12 | ALL);
            guest.put(PT, 0, 30 << 12 | ALL);
            for (index, forbidden) in (0..).zip(forbids) {
                let entry = if forbidden == 1 << 63 {
                    PD << 12 | ALL | forbidden
                } else {
                    PD << 12 | ALL & !forbidden
                };
                guest.put(PDPT, index, entry);
            }
            for path in paths(first) {
                let base = (path as u64) << 30;
                for (address, gfn) in [(base | 0x5000, LARGE + 5), (base | in_pd(1), 30)] {
                    let mut expect = |want: Want, code: Option<u32>| match code {
                        None => guest.leads(0, address, want, gfn),
                        Some(code) => assert_eq!(guest.touch(0, address, want), Touched::Fault(code)),
                    };
                    expect(WRITE, (path == 1).then_some(3));
                    expect(USER, (path == 2).then_some(5));
                    expect(USER_WRITE, [None, Some(7), Some(7), None][path]);
                    let fetch = Want { fetch: true, ..USER };
                    expect(fetch, [None, None, Some(0x15), Some(0x15)][path]);
                }
            }
        }
    }
}

/// Row 35: CVE-2022-45869: making room for shadow pages while others used them.
#[test]
fn row_35_making_room_takes_nothing_from_under_the_others() {
    let config = ShadowConfig { pages: 64, largest: Level::K4, ..ShadowConfig::default() };
    let mut guest = Guest::new(config);
    guest.put(2, 0, PDPT << 12 | ALL);
    guest.load(1, 1);
    // The same 24 tables through three paths, which permit different things: so many pages are too many.
    guest.put(PDPT, 1, PD << 12 | ALL & !2);
    guest.put(PDPT, 2, PD << 12 | ALL & !4);
    for index in 0..24 {
        guest.put(PD, index, (24 + index) << 12 | ALL);
        guest.put(24 + index, 0, (LARGE + index) << 12 | ALL);
    }
    guest.leads(1, 0, USER_WRITE, LARGE);
    for round in 0..2 {
        for path in 0..3 {
            for index in 0..24 {
                guest.leads(0, path << 30 | in_pd(index), READ, LARGE + index);
                if (index + round) % 5 == 0 {
                    assert!(
                        !guest.world.cpus[1].vcpu.is_stale(),
                        "the root of another processor was given up"
                    );
                    guest.leads(1, in_pd(index), USER_WRITE, LARGE + index);
                }
            }
        }
    }
    let stats = guest.world.shadow.stats();
    assert!(stats.reclaimed > 0 && stats.pages <= 64, "{stats:?}");
}

/// Row 37: (65855ed8b034): a shadow page was linked first and brought up to date after; another processor used what it had
/// said before.
#[test]
fn row_37_what_changed_while_it_could_not_be_reached() {
    let mut guest = Guest::small();
    guest.behind_our_back(PD, 0, PT << 12 | ALL);
    guest.behind_our_back(PT, 1, 30 << 12 | ALL);
    guest.leads(0, 0x1000, USER, 30);
    // The guest writes the table, which is unsync from then on, and takes it out of its tables.
    guest.store(0, PT, 2, 31 << 12 | ALL);
    guest.store(0, PT, 2, 32 << 12 | ALL);
    guest.store(0, PD, 0, 0);
    guest.load(0, 0);
    guest.load(1, 0);
    // Meanwhile it changes, and is flushed for, while nothing leads to it.
    guest.store(0, PT, 1, 33 << 12 | ALL);
    guest.load(0, 0);
    guest.load(1, 0);
    guest.store(1, PD, 1, PT << 12 | ALL);
    guest.leads(0, in_pd(1) | 0x2000, USER, 32);
    guest.leads(0, in_pd(1) | 0x1000, USER, 33);
    guest.leads(1, in_pd(1) | 0x1000, USER, 33);
}

/// Row 37, a level above: the page that is linked is in sync, and one below it is not. A processor that has flushed meanwhile must not get
/// there before that is compared.
#[test]
fn row_37_what_changed_below_a_page_that_could_not_be_reached() {
    for unsync in [Level::K4, Level::M2] {
        let mut guest = Guest::new(ShadowConfig { largest: Level::K4, unsync, ..ShadowConfig::default() });
        guest.put(PD, 0, PT << 12 | ALL);
        guest.put(PT, 1, 30 << 12 | ALL);
        guest.put(PT, 101, 31 << 12 | ALL);
        guest.leads(0, 0x1000, USER, 30);
        guest.store(0, PT, 101, 32 << 12 | ALL);
        // Processor 1 loads a root from which nothing of that can be reached yet; the change is older than that.
        guest.store(0, PT, 1, 33 << 12 | ALL);
        guest.load(1, 1);
        guest.put(2, 0, PDPT << 12 | ALL);
        guest.leads(1, 101 << 12, USER, 32);
        guest.leads(1, 0x1000, USER, 33);
    }
}

/// Row 38: CVE-2022-1158: the accessed bit was set in a page that was computed from where the memory had once been.
#[test]
fn row_38_accessed_bits_are_set_where_the_memory_is_now() {
    let mut guest = Guest::small();
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 1, 30 << 12 | 7);
    guest.put(PT, 2, 31 << 12 | 7);
    guest.leads(0, 0x1000, USER, 30);
    let hva = HVA + (PT << 12);
    let before = guest.world.host.pfn(hva);
    guest.step(|world| {
        let page = HvaRange::with_len(Hva::new(hva), 4096).unwrap();
        let shadow = world.shadow.clone();
        let invalidation = shadow.invalidate_hva(page).unwrap();
        world.host.move_page(hva);
        invalidation.end();
    });
    let after = guest.world.host.pfn(hva);
    assert_ne!(before, after);
    let old = guest.world.host.read(before, 2);
    guest.leads(0, 0x2000, USER_WRITE, 31);
    assert_eq!(guest.world.host.read(after, 2), 31 << 12 | ALL);
    assert_eq!(guest.world.host.read(before, 2), old, "somebody else's memory");
}

/// Row 39: CVE-2021-22543: pages were used after whoever had lent them took them back.
#[test]
fn row_39_a_page_is_given_back_before_the_invalidation_begins_to_return() {
    let mut guest = Guest::small();
    guest.put(PD, 0, PT << 12 | ALL);
    guest.put(PT, 1, 30 << 12 | ALL);
    guest.leads(0, 0x1000, USER_WRITE, 30);
    guest.leads(1, 0x1000, USER, 30);
    let pfn = guest.world.host.pfn(HVA + (30 << 12));
    let page = HvaRange::with_len(Hva::new(HVA + (30 << 12)), 4096).unwrap();
    let shadow = guest.world.shadow.clone();
    let invalidation = shadow.invalidate_hva(page).unwrap();
    for cpu in 0..2 {
        assert!(guest.world.host.tlb(cpu).values().all(|cached| cached.pfn != pfn));
        assert_eq!(guest.touch(cpu, 0x1000, USER), Touched::Retry, "not before it is over");
    }
    guest.world.host.move_page(HVA + (30 << 12));
    invalidation.end();
    guest.leads(0, 0x1000, USER_WRITE, 30);
}

/// Row 40: (NX recovery, 6.4): the slot of a shadow page was looked up in the wrong address space.
#[test]
fn row_40_the_address_space_is_that_of_the_page() {
    let mut guest = Guest::small();
    // In system management mode, frame 600 is other memory.
    guest.change(|world| {
        world.table.create(slot(SMM, 1, range(600, 10), 4096, LOG)).unwrap();
    });
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    let address = (600 - LARGE) << 12;
    guest.leads(0, address, USER_WRITE, 600);
    guest.step(|world| assert!(world.load(1, 0, 0, SMM, false)));
    guest.leads(1, address, USER_WRITE, 600);
    let pfns: Vec<_> = [RAM, SMM].map(|space| guest.world.resolve(space, 600).unwrap().1).into();
    assert_ne!(pfns[0], pfns[1]);
    // Only what is logged was marked, only what is deleted goes.
    assert_eq!(guest.step(World::harvest).iter().filter(|(_, gfn)| *gfn == 600).count(), 1);
    guest.change(|world| {
        world.table.delete(SMM, SlotId::new(1)).unwrap();
    });
    assert_eq!(guest.touch(1, address, USER), Touched::Mmio(600 << 12));
    guest.leads(0, address, USER_WRITE, 600);
    // A table that is shadowed in one address space is protected in both.
    guest.step(|world| assert!(world.load(1, 0, 0, SMM, false)));
    guest.store(0, PD, 1, PT << 12 | ALL);
    guest.store(0, PT, 0, 30 << 12 | ALL);
    guest.step(|world| world.flush_guest(1));
    guest.leads(1, in_pd(1), READ, 30);
    guest.store(0, PT, 0, 31 << 12 | ALL);
    guest.step(|world| world.flush_guest(1));
    guest.leads(1, in_pd(1), READ, 31);
}

/// Row 40, write protection: the frame of a table is mapped writable in one address space, and shadowed in another (or the same). Whoever
/// writes it, through whichever address space, is noticed.
#[test]
fn row_40_a_table_is_protected_in_all_address_spaces() {
    for order in 0..8 {
        let (shadowed, written) = ([RAM, SMM][order & 1], [RAM, SMM][order >> 1 & 1]);
        let is_mapped_first = order & 4 != 0;
        let mut guest = Guest::small();
        guest.step(|world| assert!(world.load(0, 0, 0, shadowed, false)));
        guest.step(|world| assert!(world.load(1, 0, 0, written, false)));
        guest.put(PD, 0, PT << 12 | ALL);
        guest.put(PT, 1, 30 << 12 | ALL);
        if is_mapped_first {
            // Data so far, as far as anybody knows.
            guest.store(1, PT, 9, 0);
        }
        guest.leads(0, 0x1000, READ, 30);
        for gfn in [31, 32, 31] {
            // In sync again where the engine thinks so: it takes two flushes without a change.
            for _ in 0..3 {
                guest.step(|world| world.flush_guest(0));
                let now = guest.world.peek(RAM, (PT << 12) + 8).unwrap() >> 12;
                guest.leads(0, 0x1000, READ, now);
            }
            guest.store(1, PT, 1, gfn << 12 | ALL);
            guest.step(|world| world.flush_guest(0));
            guest.leads(0, 0x1000, READ, gfn);
        }
    }
}

/// Row 41: (7c8a4742c4ab, f81602958c11): a page that was read-only already, for the dirty log, was not taken the right to become
/// writable again when the guest made a table of it; and the other processors were not flushed.
#[test]
fn row_41_a_page_that_the_log_has_protected_becomes_a_table() {
    for harvests in [false, true] {
        let mut guest = Guest::as_kvm();
        guest.set_flags(0, LOG);
        guest.behind_our_back(PD, 0, PT << 12 | ALL);
        guest.behind_our_back(PT, 1, 14 << 12 | ALL);
        guest.behind_our_back(PT, 2, 15 << 12 | ALL);
        // Frame 14 is written by both processors, as data.
        guest.leads(0, 0x1000, USER_WRITE, 14);
        guest.leads(1, 0x1000, USER_WRITE, 14);
        if harvests {
            guest.step(World::harvest);
        }
        // It becomes a table of level 2, which must not be written freely, and maps something.
        guest.store(0, 14, 0, 15 << 12 | ALL);
        guest.behind_our_back(15, 0, 33 << 12 | ALL);
        if harvests {
            guest.step(World::harvest);
        }
        guest.store(0, PDPT, 1, 14 << 12 | ALL);
        guest.leads(0, 1 << 30, USER, 33);
        assert!(
            guest.world.host.cached(1, 1).is_none_or(|cached| !cached.rights.write),
            "stale and writable"
        );
        for cpu in 0..2 {
            let touched = guest.touch(cpu, 0x1000, USER_WRITE);
            assert_eq!(touched, Touched::Emulated(14 << 12), "cpu {cpu} writes a table unnoticed");
        }
    }
}

/// Row 45: (CVE-2022-39189): the translations of a virtual processor that did not run at the moment were not flushed.
#[test]
fn row_45_processors_that_do_not_run_are_flushed_too() {
    let mut guest = Guest::small();
    guest.put(PD, 0, LARGE << 12 | ALL | PAGE_SIZE);
    guest.leads(1, 0x1000, USER_WRITE, LARGE + 1);
    for index in 0..4 {
        guest.leads(0, index << 12, USER_WRITE, LARGE + index);
    }
    guest.change(|world| {
        world
            .table
            .transaction(|tx| {
                tx.set_read_only(RAM, SlotId::new(1), true)?;
                tx.set_flags(RAM, SlotId::new(1), READONLY)
            })
            .unwrap();
    });
    assert!(guest.world.host.cached(1, 1).is_none_or(|cached| !cached.rights.write));
    assert_eq!(guest.touch(1, 0x1000, USER_WRITE), Touched::Mmio(0x20_1000));
    guest.delete(1);
    assert!(guest.world.host.cached(1, 1).is_none());
    assert!(guest.world.table.view().slot_at(RAM, Gfn::new(LARGE)).is_none());
}

/// Row 46: CVE-2026-46317: what an invalidation walks was replaced under another lock. Processors come and go meanwhile.
#[test]
fn row_46_processors_come_and_go_beside_invalidations() {
    let guest = Guest::small();
    let shadow = guest.world.shadow.clone();
    let paging = guest.world.cpus[0].paging;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let all = HvaRange::with_len(Hva::new(HVA), 1 << 21).unwrap();
            for _ in 0..200 {
                shadow.invalidate_hva(all).unwrap().end();
                shadow.zap_all();
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let mut vcpu = shadow.vcpu().unwrap();
                    vcpu.load(paging, RAM).unwrap();
                    let _ = vcpu.fault(guest.world.layout.kernel_address(0x3000), access(WRITE)).unwrap();
                }
            });
        }
    });
    guest.world.shadow.check().unwrap();
}
