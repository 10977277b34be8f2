//! Going round the ring: splits and merges, several rings, readers that stop or run beside the writer.

use super::*;

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

/// A reset that is stopped has not reset what was collected, and the reader can tell.
#[test]
fn a_reader_knows_when_its_entries_are_reset() {
    let table = table();
    let (mut ring, mut reader) = ring();
    let mut mmu = Recording::default();
    for _ in 0..2 * ENTRIES / 3 {
        assert!(reader.is_reset());
        (0..3).for_each(|page| push(&mut ring, slot(&table, 0), page));
        assert!(reader.is_reset(), "pushed, not collected");
        assert_eq!(reader.collect().count(), 3);
        assert!(!reader.is_reset());
        let mut steps = 0;
        let mut stop = || {
            steps += 1;
            steps > 2
        };
        assert_eq!(ring.reset(table.view(), &mut mmu, &mut stop).unwrap().entries, 2);
        assert!(!reader.is_reset());
        assert_eq!(ring.reset(table.view(), &mut mmu, || false).unwrap().entries, 1);
    }
    assert!(reader.is_reset());
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
