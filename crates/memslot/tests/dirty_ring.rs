//! The dirty ring: KVM's layout, bugs that KVM's ring has had, and that no page is ever lost.
#![cfg_attr(
    all(target_os = "linux", target_arch = "x86_64"),
    expect(unsafe_code, reason = "a ring of the kernel's is shared memory")
)]

mod common;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use memslot::dirty::Rearm;
use memslot::dirty::ring::{
    DIRTY, DirtyRing, ENTRY_BYTES, Entry, MAX_ENTRIES, PML_ENTRIES, PushError, Pushed, RESET, RingError,
    RingReader, RingSize, Rings,
};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, Listener, ListenerError, PageSize, PieceKind, Slot,
    SlotFlags, SlotId, SlotSpec, SlotTable, Update,
};
use proptest::prelude::*;

use crate::common::Random;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const LOG: SlotFlags = SlotFlags::LOG_DIRTY_PAGES;
/// Entries of the smallest ring with pages of 4 KiB, and its soft limit.
const ENTRIES: u32 = 256;
const SOFT_LIMIT: u32 = ENTRIES - 64;

type Memory = Arc<[Entry]>;

#[derive(Debug, PartialEq, Eq)]
struct Refused;

/// Writes down what it is asked for, and refuses it when it is told to.
#[derive(Default)]
struct Recording {
    calls: Vec<(u8, u64, u64)>,
    /// Re-armed, but not in force yet.
    pending: Vec<u64>,
    /// Re-armed and flushed.
    flushed: Vec<u64>,
    flushes: usize,
    refuse_call: Option<usize>,
    refuse_flush: bool,
}

impl Rearm for Recording {
    type Error = Refused;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Refused> {
        let (start, end) = (gfns.start().get(), gfns.end().get());
        assert!(start < end && end - start <= 64, "{gfns} is nothing, or not from one window");
        assert_eq!(start >> 15, (end - 1) >> 15, "{gfns} is in two chunks");
        if self.refuse_call == Some(self.calls.len()) {
            return Err(Refused);
        }
        self.calls.push((space.get(), start, end));
        self.pending.extend(start..end);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Refused> {
        if self.refuse_flush {
            return Err(Refused);
        }
        self.flushes += 1;
        self.flushed.append(&mut self.pending);
        Ok(())
    }
}

impl Recording {
    fn flushed(&self) -> BTreeSet<u64> {
        assert!(self.pending.is_empty(), "re-armed and not flushed: {:x?}", self.pending);
        self.flushed.iter().copied().collect()
    }
}

fn spec(id: u32, base: u64, pages: u64, hva: u64, flags: SlotFlags) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
        backing: Backing::Host { hva: Hva::new(hva) },
        flags,
    }
}

/// Slot 0: the frames 0x7f00..0x17f00, across borders of chunks.
const BASE: u64 = 0x7f00;

fn table() -> SlotTable {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    table.create(spec(0, BASE, 0x1_0000, 0x7000_0000, LOG)).unwrap();
    table
}

fn slot(table: &SlotTable, id: u32) -> &Slot {
    table.view().slot(RAM, SlotId::new(id)).unwrap()
}

fn size() -> RingSize {
    let size = RingSize::from_bytes(u64::from(ENTRIES) * ENTRY_BYTES, PageSize::K4, 0).unwrap();
    assert_eq!((size.entries(), size.soft_limit()), (ENTRIES, SOFT_LIMIT));
    size
}

fn ring() -> (DirtyRing<Memory>, RingReader<Memory>) {
    let memory: Memory = size().allocate().unwrap().into();
    (DirtyRing::with_memory(size(), memory.clone()).unwrap(), RingReader::new(memory).unwrap())
}

fn push(ring: &mut DirtyRing<Memory>, slot: &Slot, offset: u64) {
    assert!(matches!(ring.push(slot, offset), Ok(Pushed::Recorded | Pushed::SoftFull)));
}

/// Pages that make many batches: neighbours upwards and downwards, jumps, the same page again, borders of chunks.
fn pages() -> Vec<u64> {
    let mut pages: Vec<u64> = (0..10).chain((100..110).rev()).collect();
    pages.extend([500, 500, 9000, 3, 564, 563, 500, 499, 0xf0, 0x110, 0xff, 0x100, 0x101, 0xffff]);
    pages.extend((0..30).map(|i| i * 70 % 1000));
    pages
}

fn gfns(pages: &[u64]) -> BTreeSet<u64> {
    pages.iter().map(|page| BASE + page).collect()
}

mod past_bugs {
    use super::*;

    /// Row 20: user space kept setting RESET again, and the kernel went round and round.
    #[test]
    fn row_20_a_writer_that_never_rests_cannot_keep_a_reset_busy() {
        let table = table();
        let (mut ring, _) = ring();
        let memory = ring.memory().clone();
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut random = Random::new(1);
                while !stop.load(Ordering::Relaxed) {
                    for entry in &*memory {
                        entry.slot.store(0xffff_ffff, Ordering::Relaxed);
                        entry.offset.store(random.next(), Ordering::Relaxed);
                        entry.flags.store(RESET, Ordering::Release);
                    }
                }
            })
        };
        let (mut pushed, mut freed) = (0, 0);
        for round in 0..500 {
            let used = (round * 7 + 1) % 200;
            while ring.used() < used {
                let page = u64::from(ring.used()) * 3;
                push(&mut ring, slot(&table, 0), page);
                pushed += 1;
            }
            let limit = ring.used();
            let mut steps = 0;
            let mut mmu = Recording::default();
            let reset = ring.reset(table.view(), &mut mmu, || {
                steps += 1;
                assert!(steps <= limit, "a reset has no more steps than there were entries");
                false
            });
            let reset = reset.unwrap();
            assert_eq!((reset.entries, reset.stale), (reset.rearmed, 0));
            assert!(mmu.flushed().iter().all(|gfn| (gfn - BASE) % 3 == 0), "only what was pushed");
            freed += reset.entries;
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        ring.memory().iter().for_each(|entry| entry.flags.store(RESET, Ordering::Release));
        freed += ring.reset(table.view(), &mut Recording::default(), || false).unwrap().entries;
        assert_eq!((freed, ring.used()), (pushed, 0));
    }

    /// Row 21, first half: a signal made the reset return without re-arming what it had freed already.
    #[test]
    fn row_21a_stopped_anywhere_what_was_freed_is_armed() {
        let (table, pages) = (table(), pages());
        for k in 0..=pages.len() {
            let (mut ring, mut reader) = ring();
            pages.iter().for_each(|&page| push(&mut ring, slot(&table, 0), page));
            assert_eq!(reader.collect().count(), pages.len());
            let mut mmu = Recording::default();
            let mut asked = 0;
            let reset = ring.reset(table.view(), &mut mmu, || {
                asked += 1;
                asked > k
            });
            let reset = reset.unwrap();
            assert_eq!((reset.entries, reset.rearmed, reset.stopped), (k, k, k < pages.len()));
            assert_eq!(mmu.flushed(), gfns(&pages[..k]), "stopped after {k}");
            assert_eq!(mmu.flushes, usize::from(k > 0));
            let rest = ring.reset(table.view(), &mut mmu, || false).unwrap();
            assert_eq!(rest.entries, pages.len() - k);
            assert_eq!(mmu.flushed(), gfns(&pages));
            assert!(ring.memory().iter().all(|entry| entry.flags.load(Ordering::Relaxed) == 0));
        }
    }

    /// The same for errors: what was not re-armed, or not flushed, stays in the ring.
    #[test]
    fn row_21a_where_rearming_fails_nothing_is_lost() {
        let (table, pages) = (table(), pages());
        let mut failures = 0;
        for call in 0.. {
            let (mut ring, mut reader) = ring();
            pages.iter().for_each(|&page| push(&mut ring, slot(&table, 0), page));
            assert_eq!(reader.collect().count(), pages.len());
            let mut mmu = Recording { refuse_call: Some(call), ..Recording::default() };
            let Err(error) = ring.reset(table.view(), &mut mmu, || false) else { break };
            failures += 1;
            let freed = error.done.entries;
            assert_eq!((error.error, ring.used() as usize), (Refused, pages.len() - freed));
            assert_eq!((error.done.rearmed, mmu.flushes), (freed, usize::from(call > 0)));
            assert!(mmu.flushed().is_superset(&gfns(&pages[..freed])), "refused call {call}");
            mmu.refuse_call = None;
            assert_eq!(ring.reset(table.view(), &mut mmu, || false).unwrap().entries, pages.len() - freed);
            assert_eq!(mmu.flushed(), gfns(&pages));
        }
        assert!(failures > 20, "{failures}");
        let (mut ring, mut reader) = ring();
        pages.iter().for_each(|&page| push(&mut ring, slot(&table, 0), page));
        assert_eq!(reader.collect().count(), pages.len());
        for refuse_call in [None, Some(7)] {
            let mut mmu = Recording { refuse_flush: true, refuse_call, ..Recording::default() };
            let error = ring.reset(table.view(), &mut mmu, || false).unwrap_err();
            assert_eq!((error.done.entries, ring.used() as usize), (0, pages.len()));
        }
    }

    /// Row 21, second half: a second resetter found nothing left, and returned before the first one had flushed.
    #[test]
    fn row_21b_nobody_returns_before_the_flush() {
        struct Slow {
            flushing: mpsc::Sender<()>,
            go_on: mpsc::Receiver<()>,
            flushed: Arc<AtomicBool>,
        }
        impl Rearm for Slow {
            type Error = Refused;

            fn rearm(&mut self, _: AddressSpaceId, _: GfnRange) -> Result<(), Refused> {
                Ok(())
            }

            fn flush(&mut self) -> Result<(), Refused> {
                self.flushing.send(()).unwrap();
                self.go_on.recv().unwrap();
                self.flushed.store(true, Ordering::SeqCst);
                Ok(())
            }
        }
        let table = table();
        let (mut ring, mut reader) = ring();
        push(&mut ring, slot(&table, 0), 5);
        assert_eq!(reader.collect().count(), 1);
        let (ring, flushed) = (Mutex::new(ring), Arc::new(AtomicBool::new(false)));
        let (flushing, is_flushing) = mpsc::channel();
        let (let_go_on, go_on) = mpsc::channel();
        let mut slow = Slow { flushing, go_on, flushed: Arc::clone(&flushed) };
        std::thread::scope(|scope| {
            let (ring, view, flushed) = (&ring, table.view(), &flushed);
            scope.spawn(move || {
                let reset = ring.lock().unwrap().reset(view, &mut slow, || false).unwrap();
                assert_eq!(reset.entries, 1);
                assert!(flushed.load(Ordering::SeqCst), "the first one flushes before it returns");
            });
            is_flushing.recv().unwrap();
            let second = scope.spawn(move || {
                let reset = ring.lock().unwrap().reset(view, &mut Recording::default(), || false);
                assert_eq!(reset.unwrap().entries, 0);
                assert!(flushed.load(Ordering::SeqCst), "and so does the second one");
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!second.is_finished());
            let_go_on.send(()).unwrap();
        });
    }

    /// Row 22: re-arming was called with an empty mask.
    #[test]
    fn row_22_nothing_to_rearm_is_no_call_and_no_flush() {
        let mut table = table();
        let (mut ring, mut reader) = ring();
        let mut mmu = Recording { refuse_call: Some(0), refuse_flush: true, ..Recording::default() };
        assert_eq!(ring.reset(table.view(), &mut mmu, || true).unwrap(), Default::default());
        push(&mut ring, slot(&table, 0), 1);
        let reset = ring.reset(table.view(), &mut mmu, || false).unwrap();
        assert_eq!(reset.entries, 0, "not collected yet");
        push(&mut ring, slot(&table, 0), 200);
        assert_eq!(reader.collect().count(), 2);
        table.delete(RAM, SlotId::new(0)).unwrap();
        let reset = ring.reset(table.view(), &mut mmu, || false).unwrap();
        assert_eq!((reset.entries, reset.rearmed, reset.stale), (2, 0, 2));
    }

    /// Row 23: the request to leave the guest got lost, and a full ring was overwritten.
    #[test]
    fn row_23_a_ring_that_is_soft_full_says_so_until_it_is_drained() {
        let table = table();
        let (mut ring, mut reader) = ring();
        let mut page = 0;
        for round in 0..5 {
            while !ring.is_soft_full() {
                let pushed = ring.push(slot(&table, 0), page).unwrap();
                assert_eq!(pushed == Pushed::SoftFull, ring.used() >= SOFT_LIMIT);
                page += 1;
            }
            assert_eq!(ring.used(), SOFT_LIMIT);
            // What is under way finds room, and not an entry more.
            for _ in SOFT_LIMIT..ENTRIES {
                assert_eq!(ring.push(slot(&table, 0), page), Ok(Pushed::SoftFull));
                page += 1;
            }
            let full = Err(PushError::Full { entries: ENTRIES });
            assert_eq!(ring.push(slot(&table, 0), 0xffff), full);
            // User space may free the entries in its own memory as often as it likes.
            ring.memory()[0].flags.fetch_and(!DIRTY, Ordering::Relaxed);
            assert_eq!(ring.push(slot(&table, 0), 0xffff), full);
            ring.memory()[0].flags.fetch_or(DIRTY, Ordering::Relaxed);
            // Drained bit by bit, in order: soft-full until one less than the limit is in use.
            let mut mmu = Recording::default();
            let mut expected = page - u64::from(ENTRIES);
            while ring.used() > 0 {
                let few = 1 + round * 5;
                for found in reader.collect().take(few) {
                    assert_eq!((found.slot, found.offset), (SlotId::new(0), expected), "none overwritten");
                    expected += 1;
                }
                let _ = ring.reset(table.view(), &mut mmu, || false).unwrap();
                assert_eq!(ring.is_soft_full(), ring.used() >= SOFT_LIMIT);
            }
            assert_eq!(mmu.flushed().len(), ENTRIES as usize);
        }
    }

    /// An entry names a slot by an id only, and ids are used again.
    #[test]
    fn a_reused_id_is_noticed() {
        let other_frames = spec(0, 0x100, 0x1_0000, 0x7000_0000, LOG);
        let other_memory = spec(0, BASE, 0x1_0000, 0x9000_0000, LOG);
        let not_logged = spec(0, BASE, 0x1_0000, 0x7000_0000, SlotFlags::empty());
        let other_id = spec(1, BASE, 0x1_0000, 0x9000_0000, LOG);
        // The same again: the page tables may have kept their mappings if it was one transaction.
        let alike = spec(0, BASE, 0x1_0000, 0x7000_0000, LOG);
        let cases = [(other_frames, 0), (other_memory, 0), (not_logged, 0), (other_id, 0), (alike, 2)];
        for (new, rearmed) in cases {
            let mut table = table();
            let (mut ring, mut reader) = ring();
            push(&mut ring, slot(&table, 0), 5);
            push(&mut ring, slot(&table, 0), 0xfff0);
            let recreate = |tx: &mut memslot::Transaction<'_>| {
                tx.delete(RAM, SlotId::new(0))?;
                tx.create(new)
            };
            table.transaction(recreate).unwrap();
            let pushed = ring.push(slot(&table, new.id.get()), 7).unwrap();
            let logged = usize::from(pushed != Pushed::NotLogged);
            assert_eq!(logged == 1, new.flags == LOG);
            assert_eq!(reader.collect().count(), 2 + logged);
            let mut mmu = Recording::default();
            let reset = ring.reset(table.view(), &mut mmu, || false).unwrap();
            assert_eq!((reset.entries, reset.stale), (2 + logged, 2), "{new:?}");
            assert_eq!(reset.rearmed, rearmed + logged, "{new:?}");
            assert_eq!(mmu.flushed().contains(&(new.gfns.start().get() + 7)), logged == 1);
        }
    }
}

#[test]
fn the_layout_is_kvms() {
    assert_eq!((size_of::<Entry>(), align_of::<Entry>()), (16, 16));
    let offsets = [
        std::mem::offset_of!(Entry, flags),
        std::mem::offset_of!(Entry, slot),
        std::mem::offset_of!(Entry, offset),
    ];
    assert_eq!(offsets, [0, 4, 8]);
    #[cfg(target_os = "linux")]
    {
        use kvm_bindings::kvm_dirty_gfn;
        assert_eq!(size_of::<kvm_dirty_gfn>(), size_of::<Entry>());
        let theirs = [
            std::mem::offset_of!(kvm_dirty_gfn, flags),
            std::mem::offset_of!(kvm_dirty_gfn, slot),
            std::mem::offset_of!(kvm_dirty_gfn, offset),
        ];
        assert_eq!(offsets, theirs);
    }
    assert_eq!((DIRTY, RESET), (1, 2));
    let mut table = SlotTable::new(Limits { address_spaces: 2, ..Limits::default() }).unwrap();
    let smm = SlotSpec { address_space: AddressSpaceId::SMM, ..spec(0x7abc, 0, 0x1000, 0x7000_0000, LOG) };
    table.create(smm).unwrap();
    let (mut ring, mut reader) = ring();
    push(&mut ring, table.view().slot(AddressSpaceId::SMM, SlotId::new(0x7abc)).unwrap(), 0x123);
    let entry = &ring.memory()[0];
    let words = |entry: &Entry| {
        let order = Ordering::Relaxed;
        (entry.flags.load(order), entry.slot.load(order), entry.offset.load(order))
    };
    assert_eq!(words(entry), (DIRTY, 0x1_7abc, 0x123));
    let page = reader.collect().next().unwrap();
    assert_eq!((page.address_space, page.slot.get(), page.offset), (1, 0x7abc, 0x123));
    assert_eq!(page.gfn(table.view()), Some((AddressSpaceId::SMM, Gfn::new(0x123))));
    assert_eq!(words(entry), (RESET, 0x1_7abc, 0x123));
    let mut mmu = Recording::default();
    let _ = ring.reset(table.view(), &mut mmu, || false).unwrap();
    assert_eq!(mmu.calls, [(1, 0x123, 0x124)]);
    assert_eq!(words(&ring.memory()[0]), (0, 0x1_7abc, 0x123));
}

#[test]
fn the_sizes_are_kvms() {
    let of = |bytes, reserved| RingSize::from_bytes(bytes, PageSize::K4, reserved);
    for bytes in [0, 1000, 4097, 12288, u64::MAX] {
        assert_eq!(of(bytes, 0), Err(RingError::NotPowerOfTwo { bytes }));
    }
    assert_eq!(of(2048, 0), Err(RingError::TooSmall { bytes: 2048, least: 4096 }));
    assert!(matches!(of(8192, PML_ENTRIES), Err(RingError::TooSmall { .. })), "512 entries, 576 reserved");
    assert_eq!(of(16384, PML_ENTRIES).unwrap().soft_limit(), 1024 - 576);
    assert!(matches!(RingSize::from_bytes(32768, PageSize::K64, 0), Err(RingError::TooSmall { .. })));
    assert_eq!(of(1 << 20, 0).unwrap().entries(), MAX_ENTRIES);
    let most = 1 << 20;
    for bytes in [1 << 21, 1 << 36, 1 << 63] {
        assert_eq!(of(bytes, PML_ENTRIES), Err(RingError::TooLarge { bytes, most }));
    }
    assert!(matches!(of(4096, u32::MAX), Err(RingError::TooSmall { .. })));
    assert!(of(1 << 63, u32::MAX).is_err());

    let memory = size().allocate().unwrap();
    let short = DirtyRing::with_memory(size(), &memory[1..]).err();
    assert_eq!(short, Some(RingError::WrongMemory { entries: 255, needed: 256 }));
    assert!(matches!(RingReader::new(&memory[1..]).err(), Some(RingError::NotPowerOfTwo { .. })));
    assert!(matches!(RingReader::new(&memory[..0]).err(), Some(RingError::NotPowerOfTwo { .. })));
    assert_eq!(DirtyRing::new(size()).unwrap().memory().len(), 256);

    // Whatever was in the memory before, a new ring is empty.
    memory.iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Relaxed));
    assert_eq!(DirtyRing::with_memory(size(), &memory).unwrap().used(), 0);
    assert_eq!(RingReader::new(&memory).unwrap().collect().count(), 0);
}

#[test]
fn what_cannot_be_pushed_is_not() {
    let mut table = SlotTable::new(Limits { slots: 100_000, ..Limits::default() }).unwrap();
    table.create(spec(0, BASE, 0x1_0000, 0x7000_0000, LOG)).unwrap();
    table.create(spec(65_535, 0x10_0000, 16, 0x5000_0000, LOG)).unwrap();
    table.create(spec(65_536, 0x10_0010, 16, 0x5000_0000, LOG)).unwrap();
    let (mut ring, mut reader) = ring();
    let outside = PushError::OutsideSlot { id: SlotId::new(0), offset: 0x1_0000, pages: 0x1_0000 };
    assert_eq!(ring.push(slot(&table, 0), 0x1_0000), Err(outside));
    assert!(ring.push(slot(&table, 0), u64::MAX).is_err());
    let too_high = PushError::IdTooHigh { id: SlotId::new(65_536) };
    assert_eq!(ring.push(slot(&table, 65_536), 0), Err(too_high));
    assert_eq!(ring.used(), 0);
    assert_eq!(ring.push(slot(&table, 65_535), 0), Ok(Pushed::Recorded));
    assert_eq!(reader.collect().map(|page| page.slot.get()).collect::<Vec<_>>(), [65_535]);
    table.set_flags(RAM, SlotId::new(0), SlotFlags::empty()).unwrap();
    assert_eq!(ring.push(slot(&table, 0), 0), Ok(Pushed::NotLogged));
    assert_eq!((ring.used(), reader.collect().count()), (1, 0));
}

/// Page tables keep what a split, merge or resize leaves where it was, so it must be re-armed there.
#[test]
fn pages_follow_their_frames_through_split_merge_and_resize() {
    let mut table = table();
    let (mut ring, mut reader) = ring();
    let mut mmu = Recording::default();
    let mut reset = |table: &SlotTable, ring: &mut DirtyRing<Memory>| {
        assert!(reader.collect().count() > 0);
        let reset = ring.reset(table.view(), &mut mmu, || false).unwrap();
        (reset.rearmed, reset.stale, std::mem::take(&mut mmu.flushed))
    };
    push(&mut ring, slot(&table, 0), 5);
    push(&mut ring, slot(&table, 0), 0x105);
    let (low, high, border) = (SlotId::new(0), SlotId::new(9), Gfn::new(BASE + 0x100));
    table.transaction(|tx| tx.split(RAM, low, border, high)).unwrap();
    assert_eq!(reset(&table, &mut ring), (2, 1, vec![BASE + 5, BASE + 0x105]));

    push(&mut ring, slot(&table, 9), 3);
    table.transaction(|tx| tx.merge(RAM, low, high)).unwrap();
    assert_eq!(reset(&table, &mut ring), (1, 1, vec![BASE + 0x103]));

    push(&mut ring, slot(&table, 0), 3);
    push(&mut ring, slot(&table, 0), 0x200);
    table.transaction(|tx| tx.resize(RAM, low, 0x200)).unwrap();
    assert_eq!(reset(&table, &mut ring), (1, 1, vec![BASE + 3]));

    // A moved slot is unmapped; its id and offset still name the page.
    push(&mut ring, slot(&table, 0), 3);
    table.move_to(RAM, SlotId::new(0), Gfn::new(BASE + 1)).unwrap();
    assert_eq!(reset(&table, &mut ring), (0, 0, vec![]));
}

/// Frames that are neighbours, but of two slots, or of two address spaces.
#[test]
fn each_call_is_about_one_slot() {
    let mut table = SlotTable::new(Limits { address_spaces: 2, ..Limits::default() }).unwrap();
    table.create(spec(0, 0x100, 0x10, 0x7000_0000, LOG)).unwrap();
    table.create(spec(1, 0x110, 0x10, 0x7001_0000, LOG)).unwrap();
    let smm = SlotSpec { address_space: AddressSpaceId::SMM, ..spec(1, 0x110, 0x10, 0x7001_0000, LOG) };
    table.create(smm).unwrap();
    let (mut ring, mut reader) = ring();
    push(&mut ring, slot(&table, 0), 0xf);
    push(&mut ring, slot(&table, 1), 0);
    push(&mut ring, table.view().slot(AddressSpaceId::SMM, SlotId::new(1)).unwrap(), 1);
    assert_eq!(reader.collect().count(), 3);
    let mut mmu = Recording::default();
    assert_eq!(ring.reset(table.view(), &mut mmu, || false).unwrap().rearmed, 3);
    assert_eq!(mmu.calls, [(0, 0x10f, 0x110), (0, 0x110, 0x111), (1, 0x111, 0x112)]);
}

/// One thread writes, another one reads, and both go round the ring many times.
#[test]
fn a_reader_in_another_thread_sees_every_page_once_and_in_order() {
    let table = table();
    let (mut ring, mut reader) = ring();
    let pages = if cfg!(miri) { 600 } else { 50_000 };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut expected = 0;
            while expected < pages {
                for page in reader.collect() {
                    assert_eq!((page.address_space, page.slot, page.offset), (0, SlotId::new(0), expected));
                    expected += 1;
                }
                std::thread::yield_now();
            }
        });
        let mut mmu = Recording::default();
        for page in 0..pages {
            push(&mut ring, slot(&table, 0), page);
            while ring.is_soft_full() {
                let _ = ring.reset(table.view(), &mut mmu, || false).unwrap();
                std::thread::yield_now();
            }
        }
    });
}

#[test]
fn several_rings_have_one_flush() {
    let table = table();
    let mut none: [&mut DirtyRing; 0] = [];
    assert!(Rings::new(&mut none).is_none());
    let (mut rings, mut readers): (Vec<_>, Vec<_>) =
        (0..4).map(|_| ring()).map(|(ring, reader)| (Mutex::new(ring), reader)).unzip();
    let fill = |rings: &mut [Mutex<DirtyRing<Memory>>], readers: &mut [RingReader<Memory>]| {
        for (vcpu, (ring, reader)) in (0..).zip(rings.iter_mut().zip(readers)) {
            // The second one has nothing.
            for page in (0..10).filter(|_| vcpu != 1) {
                push(ring.get_mut().unwrap(), slot(&table, 0), vcpu * 1000 + page);
            }
            assert_eq!(reader.collect().count(), if vcpu == 1 { 0 } else { 10 });
        }
    };
    fill(&mut rings, &mut readers);
    let mut mmu = Recording::default();
    let mut guards: Vec<_> = rings.iter().map(|ring| ring.lock().unwrap()).collect();
    let reset = Rings::new(&mut guards).unwrap().reset(table.view(), &mut mmu, || false).unwrap();
    drop(guards);
    assert_eq!((reset.entries, reset.rearmed, mmu.calls.len(), mmu.flushes), (30, 30, 3, 1));
    assert_eq!(mmu.flushed().len(), 30);

    // Stopped, and failed, in the third one.
    for (refuse_call, entries, flushes, used) in
        [(None, 13, 1, [0, 0, 7, 10]), (Some(1), 10, 1, [0, 0, 10, 10])]
    {
        fill(&mut rings, &mut readers);
        let mut mmu = Recording { refuse_call, ..Recording::default() };
        let mut guards: Vec<_> = rings.iter().map(|ring| ring.lock().unwrap()).collect();
        let mut asked = 0;
        let stop = || {
            asked += 1;
            asked > 13 && refuse_call.is_none()
        };
        let done = match Rings::new(&mut guards).unwrap().reset(table.view(), &mut mmu, stop) {
            Ok(reset) => reset,
            Err(error) => error.done,
        };
        assert_eq!((done.entries, mmu.flushes), (entries, flushes));
        assert_eq!(guards.iter().map(|ring| ring.used()).collect::<Vec<_>>(), used);
        let rest = Rings::new(&mut guards).unwrap().reset(table.view(), &mut Recording::default(), || false);
        assert_eq!(rest.unwrap().entries, 30 - entries);
    }
}

#[test]
fn a_reader_can_stop_and_go_on() {
    let table = table();
    let (mut ring, mut reader) = ring();
    (0..20).for_each(|page| push(&mut ring, slot(&table, 0), page));
    let offsets = |reader: &mut RingReader<Memory>, n| -> Vec<u64> {
        reader.collect().take(n).map(|page| page.offset).collect()
    };
    assert_eq!(offsets(&mut reader, 3), [0, 1, 2]);
    let mut mmu = Recording::default();
    assert_eq!(ring.reset(table.view(), &mut mmu, || false).unwrap().entries, 3);
    assert_eq!(ring.used(), 17);
    let mut reader = RingReader::at(ring.memory().clone(), reader.position()).unwrap();
    assert_eq!(offsets(&mut reader, 100), (3..20).collect::<Vec<_>>());
    assert_eq!(offsets(&mut reader, 100), []);
    // A writer that marks everything dirty again and again: one lap at a time.
    ring.memory().iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Relaxed));
    let memory = ring.memory().clone();
    let mark = |_: &_| memory.iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Relaxed));
    assert_eq!(reader.collect().inspect(mark).take(1000).count(), ENTRIES as usize);
}

/// What KVM's coalescing makes of pages, said naively: a window is a set of pages, none 64 from another.
fn naive_calls(pages: &[u64]) -> Vec<(u8, u64, u64)> {
    let mut windows: Vec<BTreeSet<u64>> = Vec::new();
    for &page in pages {
        let fits = |window: &&mut BTreeSet<u64>| window.iter().all(|other| other.abs_diff(page) < 64);
        match windows.last_mut().filter(fits) {
            Some(window) => drop(window.insert(page)),
            None => windows.push(BTreeSet::from([page])),
        }
    }
    let mut calls: Vec<(u8, u64, u64)> = Vec::new();
    for window in windows {
        let mut first = true;
        for gfn in window.iter().map(|page| BASE + page) {
            match calls.last_mut() {
                Some((_, _, end)) if !first && *end == gfn && gfn % 32768 != 0 => *end += 1,
                _ => calls.push((0, gfn, gfn + 1)),
            }
            first = false;
        }
    }
    calls
}

/// Pages as guests write them: runs up and down, and jumps.
fn walks() -> impl Strategy<Value = Vec<u64>> {
    let step = prop_oneof![4 => Just(1i64), 2 => Just(-1), 2 => -70..70i64, 1 => -5000..5000i64];
    (0..0x1000i64, prop::collection::vec(step, 0..ENTRIES as usize)).prop_map(|(start, steps)| {
        let at = steps.iter().scan(start, |at, step| {
            *at = (*at + step).rem_euclid(0x1_0000);
            Some(u64::try_from(*at).unwrap())
        });
        at.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn pages_are_coalesced_as_kvm_does(pages in walks(), read in 0..300usize) {
        let table = table();
        let (mut ring, mut reader) = ring();
        pages.iter().for_each(|&page| push(&mut ring, slot(&table, 0), page));
        let read = reader.collect().take(read).count();
        let mut mmu = Recording::default();
        let reset = ring.reset(table.view(), &mut mmu, || false).unwrap();
        prop_assert_eq!((reset.entries, reset.rearmed, reset.stale), (read, read, 0));
        prop_assert_eq!(&mmu.calls, &naive_calls(&pages[..read]));
        prop_assert_eq!(mmu.flushed(), gfns(&pages[..read]));
    }

    #[test]
    fn any_bytes_are_survived(
        words in prop::collection::vec((0..8u32, any::<u32>(), any::<u64>()), ENTRIES as usize),
        pages in prop::collection::vec(0..0x1_0000u64, 0..ENTRIES as usize),
        scribble_first: bool,
    ) {
        let table = table();
        let (mut ring, mut reader) = ring();
        let scribble = |memory: &Memory| for (entry, &(flags, slot, offset)) in memory.iter().zip(&words) {
            entry.flags.store(flags, Ordering::Relaxed);
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(offset, Ordering::Relaxed);
        };
        if scribble_first {
            scribble(ring.memory());
        }
        pages.iter().for_each(|&page| push(&mut ring, slot(&table, 0), page));
        scribble(ring.memory());
        // Up to the first entry that does not have RESET, and never beyond what was pushed.
        let marked = words.iter().take(pages.len()).take_while(|(flags, ..)| flags & RESET != 0).count();
        let mut mmu = Recording::default();
        let reset = ring.reset(table.view(), &mut mmu, || false).unwrap();
        prop_assert_eq!((reset.entries, reset.rearmed, reset.stale), (marked, marked, 0));
        prop_assert_eq!(mmu.flushed(), gfns(&pages[..marked]));
        scribble(ring.memory());
        let dirty = words.iter().take_while(|(flags, ..)| flags & (DIRTY | RESET) == DIRTY).count();
        let mut found = 0;
        for (page, &(_, slot, offset)) in reader.collect().zip(&words) {
            prop_assert_eq!(u32::from(page.address_space) << 16 | page.slot.get(), slot);
            prop_assert_eq!(page.offset, offset);
            if let Some((space, gfn)) = page.gfn(table.view()) {
                prop_assert!(table.view().slot_at(space, gfn).is_some());
            }
            found += 1;
        }
        prop_assert_eq!(found, dirty);
    }
}

/// Page tables that follow the slots: for each mapped frame, whether it can be written without a fault.
#[derive(Clone, Default)]
struct PageTables(Arc<Mutex<BTreeMap<u64, bool>>>);

impl Listener for PageTables {
    fn name(&self) -> &str {
        "page tables"
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let mut tables = self.0.lock().unwrap();
        for piece in update.pieces {
            let gfns = piece.gfns.start().get()..piece.gfns.end().get();
            match piece.kind {
                PieceKind::Changed { old, new } => {
                    // Logging is turned on: all pages are armed.
                    if new.flags().contains(LOG) && !old.flags().contains(LOG) {
                        tables.range_mut(gfns).for_each(|(_, writable)| *writable = false);
                    }
                }
                PieceKind::Removed { .. } | PieceKind::Added { .. } => {
                    tables.retain(|gfn, _| !gfns.contains(gfn));
                }
            }
        }
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// Write protection that is in force after the flush, and fails now and then.
struct Protection<'t> {
    tables: &'t PageTables,
    pending: Vec<u64>,
    random: &'t mut Random,
    fails: bool,
}

impl Rearm for Protection<'_> {
    type Error = Refused;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Refused> {
        assert_eq!(space, RAM);
        if self.fails && self.random.once_in(4) {
            return Err(Refused);
        }
        self.pending.extend(gfns.start().get()..gfns.end().get());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Refused> {
        if self.fails && self.random.once_in(2) {
            return Err(Refused);
        }
        let mut tables = self.tables.0.lock().unwrap();
        for gfn in self.pending.drain(..) {
            tables.entry(gfn).and_modify(|writable| *writable = false);
        }
        Ok(())
    }
}

/// What the dirty log is for: a page of a logged slot that can be written unseen is still in the ring.
#[test]
fn no_page_is_lost_whatever_becomes_of_the_slots() {
    for seed in 0..if cfg!(miri) { 1 } else { 60 } {
        let mut random = Random::new(seed);
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let tables = PageTables::default();
        table.add_listener(Box::new(tables.clone())).unwrap();
        let (mut ring, mut reader) = ring();
        // The frames in the ring, in order.
        let mut listed = VecDeque::new();
        let mut stale = 0;
        for _ in 0..1000 {
            let id = SlotId::new(u32::try_from(random.below(6)).unwrap());
            let other = SlotId::new(u32::try_from(random.below(6)).unwrap());
            let gfn = random.below(256);
            match random.below(24) {
                0 => {
                    // Few host addresses, so that memory often comes back to where it was.
                    let hva = 0x7000_0000 + ((gfn & !15) << 12);
                    let new = spec(id.get(), gfn & !15, 16 + 16 * random.below(4), hva, LOG);
                    drop(table.transaction(|tx| match tx.slot(RAM, id) {
                        Some(_) => tx.delete(RAM, id),
                        None => tx.create(new),
                    }));
                }
                1 => drop(table.transaction(|tx| tx.split(RAM, id, Gfn::new(gfn), other))),
                2 => drop(table.transaction(|tx| tx.merge(RAM, id, other))),
                3 => drop(table.transaction(|tx| tx.resize(RAM, id, 1 + gfn / 4))),
                4 => drop(table.transaction(|tx| tx.move_to(RAM, id, Gfn::new(gfn)))),
                5 => {
                    let flags = if random.once_in(3) { SlotFlags::empty() } else { LOG };
                    drop(table.transaction(|tx| tx.set_flags(RAM, id, flags)));
                }
                6 => {
                    // The same memory under another id, and under the same one as a new slot.
                    drop(table.transaction(|tx| {
                        if let Some(&slot) = tx.slot(RAM, id) {
                            tx.delete(RAM, id)?;
                            tx.create(SlotSpec { id: other, ..slot.spec() })?;
                        }
                        Ok(())
                    }));
                }
                7 => drop(reader.collect().take(usize::try_from(gfn).unwrap()).count()),
                8 => {
                    let stop_after = if random.once_in(2) { random.below(20) } else { u64::MAX };
                    let fails = random.once_in(3);
                    let mut asked = 0;
                    let mut mmu =
                        Protection { tables: &tables, pending: Vec::new(), random: &mut random, fails };
                    let reset = ring.reset(table.view(), &mut mmu, || {
                        asked += 1;
                        asked > stop_after
                    });
                    assert!(reset.is_err() || mmu.pending.is_empty(), "re-armed and not flushed");
                    let done = reset.unwrap_or_else(|error| error.done);
                    listed.drain(..done.entries);
                    stale += done.stale;
                    assert_eq!(listed.len(), ring.used() as usize);
                }
                _ => {
                    // The guest writes some neighbours.
                    for gfn in gfn..gfn + random.below(8) {
                        let Some(slot) = table.view().slot_at(RAM, Gfn::new(gfn)) else { continue };
                        let writable = tables.0.lock().unwrap().get(&gfn).copied();
                        if writable == Some(true) || ring.is_soft_full() {
                            continue;
                        }
                        let pushed = ring.push(slot, gfn - slot.base_gfn().get()).unwrap();
                        if pushed != Pushed::NotLogged {
                            listed.push_back(gfn);
                        }
                        tables.0.lock().unwrap().insert(gfn, true);
                    }
                }
            }
            for (&gfn, &writable) in &*tables.0.lock().unwrap() {
                let slot = table.view().slot_at(RAM, Gfn::new(gfn)).expect("a mapped frame has a slot");
                let unseen = writable && slot.flags().contains(LOG) && !listed.contains(&gfn);
                assert!(!unseen, "seed {seed}: the guest writes {gfn:#x} unseen");
            }
        }
        assert!(stale > 0 || cfg!(miri), "seed {seed} was too tame");
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
#[test]
fn a_ring_of_the_kernels_is_read() {
    common::skipped("dirty ring of the kernel: not Linux on x86-64");
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod linux {
    use std::os::fd::AsRawFd;
    use std::ptr;

    use kvm_bindings::{
        KVM_CAP_DIRTY_LOG_RING, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
        kvm_userspace_memory_region,
    };
    use kvm_ioctls::{Kvm, VcpuExit};

    use super::*;

    const PAGE: usize = 4096;
    /// Entries of the kernel's ring: more than PML needs.
    const KERNEL_ENTRIES: usize = 2048;
    /// `_IO(0xAE, 0xc7)`.
    const KVM_RESET_DIRTY_RINGS: libc::c_ulong = 0xaec7;

    /// Writes one byte in each of the pages 0x10..0x50, and halts. Real mode, at 0x1000.
    const GUEST: &[u8] = &[
        0xbb, 0x00, 0x10, // mov bx, 0x1000
        0x8e, 0xdb, // again: mov ds, bx
        0x88, 0x1e, 0x00, 0x00, // mov [0], bl
        0x81, 0xc3, 0x00, 0x01, // add bx, 0x100
        0x81, 0xfb, 0x00, 0x50, // cmp bx, 0x5000
        0x75, 0xf0, // jne again
        0xf4, // hlt
    ];

    /// Shared memory, never unmapped.
    fn map(bytes: usize, flags: i32, fd: i32, offset: usize) -> Option<*mut u8> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes it.
        let memory = unsafe {
            libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, i64::try_from(offset).unwrap())
        };
        (memory != libc::MAP_FAILED).then_some(memory.cast())
    }

    #[test]
    fn a_ring_of_the_kernels_is_read() {
        if let Err(why) = read_the_kernels_ring() {
            common::skipped(&format!("dirty ring of the kernel: {why}"));
        }
    }

    fn read_the_kernels_ring() -> Result<(), String> {
        if cfg!(miri) {
            return Err("Miri".into());
        }
        let kvm = Kvm::new().map_err(|error| format!("no /dev/kvm ({error})"))?;
        let vm = kvm.create_vm().unwrap();
        let mut cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
        cap.args[0] = (KERNEL_ENTRIES * PAGE / 256) as u64;
        assert_eq!(cap.args[0], KERNEL_ENTRIES as u64 * ENTRY_BYTES);
        vm.enable_cap(&cap).map_err(|error| format!("KVM_CAP_DIRTY_LOG_RING: {error}"))?;
        let ram = map(0x50 * PAGE, libc::MAP_ANONYMOUS | libc::MAP_PRIVATE, -1, 0).unwrap();
        // SAFETY: the code is much shorter than what was mapped.
        unsafe { ptr::copy_nonoverlapping(GUEST.as_ptr(), ram.add(PAGE), GUEST.len()) };
        let mut table = SlotTable::new(Limits::default()).unwrap();
        for (id, first, end, flags) in [(0, 0, 0x10, 0), (5, 0x10, 0x50, KVM_MEM_LOG_DIRTY_PAGES)] {
            let bytes = |pages| (pages * PAGE) as u64;
            let region = kvm_userspace_memory_region {
                slot: id,
                flags,
                guest_phys_addr: bytes(first),
                memory_size: bytes(end - first),
                userspace_addr: ram as u64 + bytes(first),
            };
            // SAFETY: the memory stays mapped.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
            let flags = SlotFlags::from_bits_truncate(flags);
            table.create(spec(id, first as u64, (end - first) as u64, region.userspace_addr, flags)).unwrap();
        }
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let at = KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE;
        let bytes = KERNEL_ENTRIES * size_of::<Entry>();
        let entries =
            map(bytes, libc::MAP_SHARED, vcpu.as_raw_fd(), at).ok_or("the ring cannot be mapped")?;
        // SAFETY: mapped for good, aligned to a page, and an entry is atomic: any bytes are valid.
        let entries: &[Entry] = unsafe { std::slice::from_raw_parts(entries.cast(), KERNEL_ENTRIES) };
        let mut reader = RingReader::new(entries).unwrap();
        // SAFETY: the call has no argument.
        let reset = || unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) };

        let expected: Vec<_> = (0x10..0x50).map(|gfn| Some((RAM, Gfn::new(gfn)))).collect();
        // More pages than the ring has entries: it wraps, and each page is armed again each time.
        for round in 0..40 {
            let mut sregs = vcpu.get_sregs().unwrap();
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            vcpu.set_sregs(&sregs).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rflags) = (PAGE as u64, 2);
            vcpu.set_regs(&regs).unwrap();
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => {}
                exit if round == 0 => return Err(format!("the guest does not run: {exit:?}")),
                exit => panic!("round {round}: {exit:?}"),
            }
            let mut found = Vec::new();
            for few in [10, 0, 1, usize::MAX] {
                let before = found.len();
                found.extend(reader.collect().take(few).map(|page| page.gfn(table.view())));
                assert_eq!(reset(), i32::try_from(found.len() - before).unwrap(), "round {round}");
            }
            assert_eq!(found, expected, "round {round}");
        }
        assert_eq!(reader.position(), 40 * 64);
        Ok(())
    }
}
