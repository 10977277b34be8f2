//! Bugs that KVM's ring has had, by their rows in `past_bugs.rs` beside this folder.

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
