//! The dirty ring: KVM's layout, bugs that KVM's ring has had, and that no page is ever lost.
#![cfg_attr(
    all(target_os = "linux", target_arch = "x86_64"),
    expect(unsafe_code, reason = "a ring of the kernel's is shared memory")
)]

#[path = "../common/mod.rs"]
mod common;

mod coalesce;
mod collect;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kernel;
mod layout;
mod lost;
mod past_bugs;

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
use memslot_testing::{Random, programs};
use proptest::prelude::*;

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

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
#[test]
fn a_ring_of_the_kernels_is_read() {
    memslot_testing::skipped("dirty ring of the kernel: not Linux on x86-64");
}
