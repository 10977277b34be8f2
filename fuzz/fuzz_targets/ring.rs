//! A dirty ring whose memory anybody writes to.
#![no_main]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::atomic::Ordering;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use memslot::dirty::Rearm;
use memslot::dirty::ring::{DirtyRing, PushError, RingReader, RingSize};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, PageSize, SlotFlags, SlotId, SlotSpec, SlotTable,
};

#[derive(Arbitrary, Debug)]
enum Step {
    Push { slot: u8, offset: u16 },
    Collect { most: u8 },
    Reset { stop_after: u16 },
    Write { at: u16, flags: u32, slot: u32, offset: u64 },
    Delete { slot: u8 },
    Create { slot: u8 },
    Move { slot: u8, to: u16 },
}

/// What was re-armed, and how much of it was flushed.
#[derive(Default)]
struct Recording {
    armed: BTreeSet<u64>,
    flushed: BTreeSet<u64>,
    flushes: u32,
}

impl Rearm for Recording {
    type Error = Infallible;

    fn rearm(&mut self, _: AddressSpaceId, gfns: GfnRange) -> Result<(), Infallible> {
        assert!(!gfns.is_empty() && gfns.len() <= 64);
        self.armed.extend(gfns.start().get()..gfns.end().get());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        self.flushed.append(&mut self.armed);
        self.flushes += 1;
        Ok(())
    }
}

const SLOTS: u8 = 4;
const PAGES: u64 = 300;

fn create(table: &mut SlotTable, slot: u8) {
    let slot = slot % SLOTS;
    let _ = table.create(SlotSpec {
        address_space: AddressSpaceId::NORMAL,
        id: SlotId::new(slot.into()),
        gfns: GfnRange::with_len(Gfn::new(u64::from(slot) * 1000), PAGES).unwrap(),
        backing: Backing::Host { hva: Hva::new(0x7000_0000_0000 + (u64::from(slot) << 30)) },
        flags: SlotFlags::LOG_DIRTY_PAGES,
    });
}

fuzz_target!(|steps: Vec<Step>| {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    (0..SLOTS).for_each(|slot| create(&mut table, slot));
    let size = RingSize::from_bytes(4096, PageSize::K4, 0).unwrap();
    let memory = size.allocate().unwrap();
    let mut ring = DirtyRing::with_memory(size, &memory).unwrap();
    let mut reader = RingReader::new(&memory).unwrap();
    let entries = usize::try_from(size.entries()).unwrap();
    // The frames pushed, in order; those of a slot that was touched since need not be re-armed.
    let mut pushed = std::collections::VecDeque::new();
    let mut touched = BTreeSet::new();
    for step in steps {
        match step {
            Step::Push { slot, offset } => {
                let id = SlotId::new((slot % SLOTS).into());
                let Some(slot) = table.view().slot(AddressSpaceId::NORMAL, id).copied() else { continue };
                match ring.push(&slot, offset.into()) {
                    Ok(_) => pushed.push_back((id, slot.base_gfn().get() + u64::from(offset))),
                    Err(PushError::Full { .. }) => assert_eq!(pushed.len(), entries),
                    Err(_) => assert!(u64::from(offset) >= PAGES),
                }
            }
            Step::Collect { most } => assert!(reader.collect().take(most.into()).count() <= entries),
            Step::Reset { stop_after } => {
                let (mut recording, mut left) = (Recording::default(), stop_after);
                let stop = || {
                    let stop = left == 0;
                    left = left.saturating_sub(1);
                    stop
                };
                let reset = ring.reset(table.view(), &mut recording, stop).unwrap();
                assert!(reset.entries <= pushed.len() && reset.entries <= stop_after.into());
                assert!(recording.armed.is_empty() && recording.flushes <= 1, "all that was armed was flushed");
                for (id, gfn) in pushed.drain(..reset.entries) {
                    assert!(touched.contains(&id) || recording.flushed.contains(&gfn), "{gfn} is not armed");
                }
            }
            Step::Write { at, flags, slot, offset } => {
                let entry = &memory[usize::from(at) % entries];
                entry.flags.store(flags, Ordering::Relaxed);
                entry.slot.store(slot, Ordering::Relaxed);
                entry.offset.store(offset, Ordering::Relaxed);
            }
            Step::Delete { slot } => {
                let id = SlotId::new((slot % SLOTS).into());
                if table.delete(AddressSpaceId::NORMAL, id).is_ok() {
                    touched.insert(id);
                }
            }
            Step::Create { slot } => create(&mut table, slot),
            Step::Move { slot, to } => {
                let id = SlotId::new((slot % SLOTS).into());
                if table.move_to(AddressSpaceId::NORMAL, id, Gfn::new(10_000 + u64::from(to))).is_ok() {
                    touched.insert(id);
                }
            }
        }
    }
});
