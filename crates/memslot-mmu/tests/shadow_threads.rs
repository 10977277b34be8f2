//! Shadow tables used by many threads at once, and without memory. The threads are virtual processors that fault, load, and write their
//! tables as a device does, and a VMM that changes slots, moves memory, harvests the dirty log, ages and zaps: at the end, and now and
//! then, everything must be as it must be.
#![cfg(not(loom))]
#![allow(missing_docs, unreachable_pub, reason = "a test program")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;

use memslot::dirty::DirtyLog;
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, HvaRange, Limits, SlotFlags, SlotId, SlotSpec,
    SlotTable,
};
use memslot_mmu::format::{Access, Npt};
use memslot_mmu::shadow::guest::{GuestAccess, GuestPaging, Processor, Registers};
use memslot_mmu::shadow::{Shadow, ShadowConfig, ShadowError, ShadowFault};
use memslot_mmu::user::UserHost;
use memslot_mmu::{Config, Fault, Level, Mmu, TableError};
use memslot_testing::{Random, seed, times};

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const HVA: u64 = 0x7f00_0000_0000;
/// Tables are in the first frames, a slot of their own; data behind.
const TABLES: u64 = 32;
const PAGES: u64 = 2048;
/// How much each virtual processor does, as often as `MEMSLOT_TIMES` says.
const STEPS: u64 = if cfg!(miri) { 60 } else { 20_000 };
/// The page tables, each level's, and the roots.
const PT: u64 = 16;
const PD: u64 = 8;
const PDPT: u64 = 4;

fn new_host() -> Arc<UserHost> {
    Arc::new(UserHost::with_memory(Hva::new(HVA), usize::try_from(PAGES).unwrap()))
}

/// An entry of a table of the guest's.
fn place(host: &UserHost, gfn: u64, index: u64) -> &AtomicU64 {
    &host.memory()[usize::try_from(gfn).unwrap()].0[usize::try_from(index).unwrap()]
}

fn slot(id: u32, gfns: (u64, u64), flags: SlotFlags) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(gfns.0), gfns.1).unwrap(),
        backing: Backing::Host { hva: Hva::new(HVA + (gfns.0 << 12)) },
        flags,
    }
}

fn paging(root: u64) -> GuestPaging {
    let registers = Registers { cr0: 0x8001_0011, cr3: root << 12, cr4: 0x20, efer: 0xd00 };
    GuestPaging::new(registers, Processor::default())
}

/// What an entry of this table may be.
fn entry(random: &mut Random, table: u64) -> u64 {
    let flags = random.pick(&[0x27, 0x67, 0x67, 0x25, 0x65, 0x61, 0x26]);
    match table {
        _ if table < PDPT => (PDPT + random.below(PD - PDPT)) << 12 | 0x27,
        _ if table < PD => (PD + random.below(PT - PD)) << 12 | 0x27,
        _ if table < PT && random.below(4) == 0 => random.pick(&[512, 1024]) << 12 | 0x80 | flags,
        _ if table < PT => (PT + random.below(TABLES - PT)) << 12 | flags,
        // Data, and now and then a table.
        _ => {
            let end = if random.below(8) == 0 { PAGES } else { 256 };
            random.below(end) << 12 | flags
        }
    }
}

fn address(random: &mut Random) -> u64 {
    random.below(2) << 39 | random.below(2) << 30 | random.below(3) << 21 | random.below(20) << 12
}

/// The slots that have the data: one, or what has become of it.
const DATA: [u32; 3] = [1, 2, 300];

/// The data is one slot again, wherever it was cut, shrunk or renamed.
fn make_one(table: &mut SlotTable, flags: SlotFlags) {
    let change = table.transaction(|tx| {
        for id in DATA.map(SlotId::new) {
            if tx.slot(RAM, id).is_some() {
                tx.delete(RAM, id)?;
            }
        }
        tx.create(slot(1, (TABLES, PAGES - TABLES), flags))
    });
    change.unwrap();
}

/// The slot of the data is split, cut, shrunk, renamed, or made one again; what stays keeps what is mapped.
fn change_borders(table: &mut SlotTable, random: &mut Random) {
    let Some(slot) = table.view().slot(RAM, SlotId::new(1)).copied() else {
        return make_one(table, SlotFlags::LOG_DIRTY_PAGES);
    };
    let ids = DATA.map(SlotId::new);
    let new = ids[1 + usize::from(random.below(2) == 1)];
    let at = TABLES + 1 + random.below(PAGES - TABLES - 2);
    let flags = SlotFlags::from_bits_truncate(u32::try_from(random.below(4)).unwrap());
    // Where that cannot be, as it is split already, nothing changes.
    let change = match random.below(6) {
        0 => table.transaction(|tx| {
            tx.split(RAM, ids[0], Gfn::new(at), new)?;
            tx.set_flags(RAM, new, flags)
        }),
        1 => table.transaction(|tx| {
            tx.split(RAM, ids[0], Gfn::new(at), ids[1])?;
            tx.split(RAM, ids[1], Gfn::new(at + 1 + random.below(600)), ids[2])?;
            if flags.is_empty() { tx.delete(RAM, ids[1]) } else { tx.set_flags(RAM, ids[1], flags) }
        }),
        2 => table.transaction(|tx| tx.resize(RAM, ids[0], at - TABLES)),
        3 => table.transaction(|tx| {
            tx.delete(RAM, ids[0])?;
            tx.create(SlotSpec { id: new, ..slot.spec() })
        }),
        _ => {
            make_one(table, slot.flags());
            return;
        }
    };
    drop(change);
}

fn run(unsync: u8, pages: usize, seed: u64, steps: u64) {
    let host = new_host();
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    let config = ShadowConfig {
        unsync: Level::new(unsync).unwrap(),
        pages,
        log: Some(log.clone()),
        ..ShadowConfig::default()
    };
    let shadow = Shadow::attach(&mut table, host.clone(), config).unwrap();
    table.create(slot(0, (0, TABLES), SlotFlags::empty())).unwrap();
    table.create(slot(1, (TABLES, PAGES - TABLES), SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    let mut random = Random::new(seed);
    for gfn in 0..TABLES {
        for index in 0..20 {
            place(&host, gfn, index).store(entry(&mut random, gfn), Ordering::SeqCst);
        }
    }
    // Whoever changes something holds it for reading; who checks everything, for writing.
    let quiet = RwLock::new(());
    let done = AtomicBool::new(false);
    let (mapped, finished, changes) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for number in 0..3 {
            let (shadow, quiet, mapped, finished, host) = (&shadow, &quiet, &mapped, &finished, &host);
            let changes = &changes;
            let mut random = Random::new(seed.wrapping_mul(31).wrapping_add(number));
            scope.spawn(move || {
                let mut vcpu = shadow.vcpu().unwrap();
                vcpu.load(paging(random.below(PDPT)), RAM).unwrap();
                let mut step = 0;
                // However the threads' turns are: so many steps, beside so many changes.
                while step < steps || changes.load(Ordering::Relaxed) < steps / 20 {
                    step += 1;
                    let _working = quiet.read().unwrap();
                    if vcpu.is_stale() || random.below(40) == 0 {
                        vcpu.load(paging(random.below(PDPT)), RAM).unwrap();
                    }
                    let at = address(&mut random);
                    match random.below(16) {
                        0 => vcpu.invlpg(at),
                        1 => vcpu.flush_guest(),
                        2 => {
                            let (gfn, index) = (random.below(TABLES), random.below(20));
                            place(host, gfn, index).store(entry(&mut random, gfn), Ordering::SeqCst);
                            shadow.wrote(RAM, Gpa::new(gfn << 12 | index << 3), 8);
                        }
                        _ => {
                            let bits = random.pick(&[0, 2, 2, 4, 6]);
                            match vcpu.fault(at, GuestAccess::from_error_code(bits, false)).unwrap() {
                                ShadowFault::Mapped(_) => _ = mapped.fetch_add(1, Ordering::Relaxed),
                                ShadowFault::WriteTracked(gpa) => {
                                    shadow.unprotect(Gfn::new(gpa.get() >> 12));
                                }
                                _ => {}
                            }
                        }
                    }
                }
                finished.fetch_add(1, Ordering::SeqCst);
            });
        }
        {
            let (shadow, quiet, done, table) = (&shadow, &quiet, &done, &mut table);
            let changes = &changes;
            let mut random = Random::new(seed.wrapping_mul(97));
            let consumer = log.consumer().unwrap();
            scope.spawn(move || {
                let mut rearm = shadow.dirty_rearm().unwrap();
                let mut ager = shadow.ager().unwrap();
                while !done.load(Ordering::SeqCst) {
                    let _working = quiet.read().unwrap();
                    changes.fetch_add(1, Ordering::Relaxed);
                    let gfns =
                        GfnRange::with_len(Gfn::new(random.below(PAGES)), 1 + random.below(64)).unwrap();
                    match random.below(32) {
                        0..=5 => rearm.harvest(&consumer).unwrap().commit(),
                        6..=9 => _ = ager.age(RAM, gfns),
                        10..=12 => shadow.zap_gfn_range(RAM, gfns),
                        13..=15 => {
                            let hvas = HvaRange::with_len(Hva::new(HVA + (gfns.start().get() << 12)), 4096);
                            shadow.invalidate_hva(hvas.unwrap()).unwrap().end();
                        }
                        16 => shadow.zap_all(),
                        17 | 18 => {
                            make_one(table, SlotFlags::LOG_DIRTY_PAGES);
                            table.delete(RAM, SlotId::new(1)).unwrap();
                            let flags =
                                SlotFlags::from_bits_truncate(u32::try_from(random.below(4)).unwrap());
                            table.create(slot(1, (TABLES, PAGES - TABLES), flags)).unwrap();
                        }
                        19 => {
                            table.delete(RAM, SlotId::new(0)).unwrap();
                            table.create(slot(0, (0, TABLES), SlotFlags::empty())).unwrap();
                        }
                        20..=23 => {
                            let flags =
                                SlotFlags::from_bits_truncate(u32::try_from(random.below(2)).unwrap());
                            table.set_flags(RAM, SlotId::new(1), flags).ok();
                        }
                        _ => change_borders(table, &mut random),
                    }
                }
            });
        }
        let (shadow, quiet, done, finished) = (&shadow, &quiet, &done, &finished);
        scope.spawn(move || {
            while finished.load(Ordering::SeqCst) < 3 {
                thread::sleep(std::time::Duration::from_millis(20));
                let _alone = quiet.write().unwrap();
                if let Err(why) = shadow.check() {
                    done.store(true, Ordering::SeqCst);
                    panic!("{why}");
                }
            }
            done.store(true, Ordering::SeqCst);
        });
    });
    shadow.check().unwrap();
    // How much it is depends on the threads' turns: between changes, everything is mapped already.
    assert!(mapped.load(Ordering::Relaxed) > steps / 100, "hardly anything was mapped");
    println!("{} mapped, {:?}", mapped.load(Ordering::Relaxed), shadow.stats());
    shadow.zap_all();
    shadow.reclaim();
    assert_eq!(shadow.stats().tables, 0);
    drop((table, shadow));
    assert_eq!(host.tables(), 0);
}

#[test]
fn threads_with_all_tables_unsync() {
    run(5, 1 << 14, seed(), STEPS * times());
}

#[test]
fn threads_as_in_kvm_and_with_little_room() {
    run(1, 64, !seed(), STEPS * times());
}

/// Everything that needs a table runs out of them, at every step: an error, nothing changed, and the next try goes on.
#[test]
fn tables_run_out_at_every_step() {
    for left in (0..16).step_by(if cfg!(miri) { 5 } else { 1 }) {
        let host = new_host();
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let shadow = Shadow::attach(&mut table, host.clone(), ShadowConfig::default()).unwrap();
        table.create(slot(0, (0, PAGES), SlotFlags::empty())).unwrap();
        for (table, below) in [(1, PDPT), (PDPT, PD), (PD, PT), (PT, 100)] {
            place(&host, table, 0).store(below << 12 | 0x67, Ordering::SeqCst);
        }
        let mut vcpu = shadow.vcpu().unwrap();
        host.set_tables_left(left);
        if vcpu.load(paging(1), RAM).is_err() {
            assert!(vcpu.root().is_none() && left < 6, "{left}");
            assert_eq!(vcpu.fault(0, GuestAccess::READ), Err(ShadowError::NoRoot));
        } else {
            let before = shadow.stats();
            match vcpu.fault(0, GuestAccess::WRITE) {
                Ok(done) => assert_eq!(done, ShadowFault::Mapped(Level::K4)),
                Err(error) => {
                    assert_eq!(error, ShadowError::Table(TableError::OutOfMemory));
                    assert_eq!((shadow.stats().pages, shadow.stats().leaves), (before.pages, before.leaves));
                }
            }
        }
        shadow.check().unwrap();
        host.set_tables_left(usize::MAX);
        vcpu.load(paging(1), RAM).unwrap();
        let done = vcpu.fault(0, GuestAccess::WRITE).unwrap();
        assert!(
            matches!(done, ShadowFault::Mapped(Level::K4) | ShadowFault::AlreadyMapped),
            "{left}: {done:?}"
        );
        shadow.check().unwrap();
        drop((vcpu, table, shadow));
        assert_eq!(host.tables(), 0);
    }
}

/// Far more tables than there may be shadow pages: the oldest go, what is used stays usable.
#[test]
fn the_limit_lets_go_of_the_oldest() {
    let host = new_host();
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let config = ShadowConfig { pages: 64, ..ShadowConfig::default() };
    let shadow = Shadow::attach(&mut table, host.clone(), config).unwrap();
    table.create(slot(0, (0, PAGES), SlotFlags::empty())).unwrap();
    place(&host, 1, 0).store(PDPT << 12 | 0x67, Ordering::SeqCst);
    place(&host, PDPT, 0).store(PD << 12 | 0x67, Ordering::SeqCst);
    for index in 0..400 {
        place(&host, PD, index).store((100 + index) << 12 | 0x67, Ordering::SeqCst);
        place(&host, 100 + index, 0).store((1000 + index) << 12 | 0x67, Ordering::SeqCst);
    }
    let mut vcpu = shadow.vcpu().unwrap();
    vcpu.load(paging(1), RAM).unwrap();
    for round in 0..if cfg!(miri) { 1 } else { 3 } {
        for index in 0..400 {
            assert_eq!(vcpu.fault(index << 21, GuestAccess::WRITE).unwrap(), ShadowFault::Mapped(Level::K4));
            assert!(shadow.stats().pages <= 64);
        }
        assert!(!vcpu.is_stale(), "the root is in use");
        shadow.check().unwrap();
        assert!(shadow.stats().reclaimed >= 300 * (round + 1));
    }
    // Everything at once: the root is stale, and loading again is all it takes.
    shadow.zap_all();
    assert!(vcpu.is_stale());
    assert_eq!(shadow.stats().pages, 0);
    assert_eq!(vcpu.fault(0, GuestAccess::READ).unwrap(), ShadowFault::Retry);
    vcpu.reload().unwrap();
    assert_eq!(vcpu.fault(0, GuestAccess::READ).unwrap(), ShadowFault::Mapped(Level::K4));
    shadow.check().unwrap();
}

/// Somebody takes away all the time what takes long, in steps: those who fault meanwhile wait for one of these steps, and not for all.
#[test]
fn a_fault_gets_in_while_a_large_slot_is_zapped() {
    const FIRST: u64 = 1 << 20;
    const REGIONS: u64 = if cfg!(miri) { 8 } else { 480 };
    let host = new_host();
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let config = ShadowConfig { largest: Level::K4, ..ShadowConfig::default() };
    let shadow = Shadow::attach(&mut table, host.clone(), config).unwrap();
    table.create(slot(0, (0, PAGES), SlotFlags::empty())).unwrap();
    table.create(slot(1, (FIRST, REGIONS * 512), SlotFlags::empty())).unwrap();
    for (table, below) in [(1, PDPT), (PDPT, PD)] {
        place(&host, table, 0).store(below << 12 | 0x67, Ordering::SeqCst);
    }
    for region in 0..REGIONS {
        place(&host, PD, region).store((FIRST + region * 512) << 12 | 0xe7, Ordering::SeqCst);
    }
    place(&host, PD, 500).store(PT << 12 | 0x67, Ordering::SeqCst);
    place(&host, PT, 0).store(100 << 12 | 0x67, Ordering::SeqCst);
    let mut vcpu = shadow.vcpu().unwrap();
    vcpu.load(paging(1), RAM).unwrap();
    // Places in all of the slot, of which most are empty.
    for region in 0..REGIONS {
        assert!(matches!(vcpu.fault(region << 21, GuestAccess::WRITE).unwrap(), ShadowFault::Mapped(_)));
    }
    let done = AtomicBool::new(false);
    let faults = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut vcpu = shadow.vcpu().unwrap();
                vcpu.load(paging(1), RAM).unwrap();
                while !done.load(Ordering::SeqCst) {
                    // Allowed already, most of the time: which is found out with the lock held.
                    let fault = vcpu.fault(500 << 21, GuestAccess::READ).unwrap();
                    assert!(matches!(fault, ShadowFault::Mapped(_) | ShadowFault::AlreadyMapped));
                    faults.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let all = GfnRange::with_len(Gfn::new(FIRST), REGIONS * 512).unwrap();
        let start = std::time::Instant::now();
        let is_enough = || shadow.stats().waits > if cfg!(miri) { 0 } else { 200 };
        while !is_enough() && start.elapsed().as_secs() < 30 {
            for _ in 0..20 {
                shadow.zap_gfn_range(RAM, all);
            }
        }
        done.store(true, Ordering::SeqCst);
    });
    let stats = shadow.stats();
    assert!(stats.waits > 0 && faults.load(Ordering::SeqCst) > 0, "{stats:?}");
    assert!(stats.longest_wait <= 3, "somebody was overtaken {} times", stats.longest_wait);
    shadow.check().unwrap();
}

/// A guest with nested tables and shadow tables: both are zapped, one flush.
#[test]
fn both_kinds_of_table_and_one_flush() {
    let host = new_host();
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let shadow = Shadow::attach(&mut table, host.clone(), ShadowConfig::default()).unwrap();
    let mmu = Mmu::<Npt, _>::attach(&mut table, host.clone(), Config::default()).unwrap();
    table.create(slot(0, (0, PAGES), SlotFlags::empty())).unwrap();
    for (table, below) in [(1, PDPT), (PDPT, PD), (PD, PT), (PT, 100)] {
        place(&host, table, 0).store(below << 12 | 0x67, Ordering::SeqCst);
    }
    let (mut vcpu, mut walker) = (shadow.vcpu().unwrap(), mmu.walker().unwrap());
    vcpu.load(paging(1), RAM).unwrap();
    let gfns = GfnRange::with_len(Gfn::new(100), 1).unwrap();
    for both in [(true, true), (true, false), (false, true), (false, false)] {
        if both.0 {
            assert!(matches!(vcpu.fault(0, GuestAccess::WRITE).unwrap(), ShadowFault::Mapped(_)));
        }
        if both.1 {
            assert!(matches!(walker.fault(Gpa::new(100 << 12), Access::WRITE).unwrap(), Fault::Mapped(_)));
        }
        let before = host.flushes();
        shadow.zap_gfn_range_with(RAM, gfns, mmu.zap(gfns));
        let is_mapped = both.0 || both.1;
        assert_eq!(host.flushes() - before, u64::from(is_mapped), "{both:?}");
        assert_eq!((shadow.stats().leaves, walker.translate(Gpa::new(100 << 12))), (0, None));
        shadow.check().unwrap();
    }
}
