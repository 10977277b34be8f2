//! Marks at the worst moment: while a harvest takes and re-arms, while slots change, while a change is taken back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use memslot::dirty::{Consumer, DirtyLog, Rearm, SoftwareOnly};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, Listener, ListenerError, Reader, SlotId, SlotSpec,
    SlotTable, Update,
};

use crate::{RAM, gfns, slot, take};

/// Looks at the log at every call, and writes to pages that have just been re-armed.
struct Watching {
    log: DirtyLog,
    armed: Vec<GfnRange>,
    flushed: bool,
}

impl Rearm for Watching {
    type Error = &'static str;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), &'static str> {
        assert!(!self.flushed, "re-armed behind the flush");
        for page in 0..gfns.len() {
            let gfn = Gfn::new(gfns.start().get() + page);
            assert!(!self.log.is_marked(space, gfn), "frame {:#x} is armed before it is taken", gfn.get());
        }
        assert_eq!(gfns.start().get() / 32768, (gfns.end().get() - 1) / 32768, "in one chunk");
        assert!(self.armed.last().is_none_or(|last| last.end() <= gfns.start()), "in ascending order");
        self.armed.push(gfns);
        // The old translation is still in force, or the page faults at once: a mark comes either way.
        self.log.mark(space, gfns.start());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), &'static str> {
        assert!(!self.flushed && !self.armed.is_empty());
        self.flushed = true;
        let last = self.armed[self.armed.len() - 1];
        self.log.mark(RAM, Gfn::new(last.end().get() - 1));
        Ok(())
    }
}

/// Take, re-arm, flush: a page that is armed is no longer marked, and what is written meanwhile is in the next harvest.
#[test]
fn bits_are_taken_before_their_pages_are_armed() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    let (consumer, other) = (log.consumer().unwrap(), log.consumer().unwrap());
    table.create(slot(0, 100, 200_000)).unwrap();
    log.mark_range(RAM, gfns(150, 70_000));
    log.mark(RAM, Gfn::new(120_000));
    let watching = || Watching { log: log.clone(), armed: Vec::new(), flushed: false };

    let mut rearm = watching();
    let harvest = consumer.harvest(&mut rearm).unwrap();
    assert_eq!(harvest.pages(), 70_001);
    harvest.commit();
    assert!(rearm.flushed);
    let again = [(150, 1), (32768, 1), (65536, 1), (120_000, 1)];
    // A part of a chunk, and a part of a full chunk.
    let mut rearm = watching();
    consumer.harvest_range(RAM, gfns(32768, 1), &mut rearm).unwrap().commit();
    assert_eq!(rearm.armed, [gfns(32768, 1)]);
    assert_eq!(take(&consumer), again);

    // And words of a clear; the other consumer misses nothing of all this.
    log.mark_range(RAM, gfns(300, 130));
    let mut rearm = watching();
    assert_eq!(consumer.clear(RAM, gfns(301, 65), &[u64::MAX, 0], &mut rearm), Ok(64));
    assert_eq!(rearm.armed.iter().map(GfnRange::len).sum::<u64>(), 64);
    // Of the cleared ones those are left that were marked again: the first of each call, and the last of all.
    let left: Vec<u64> = rearm.armed.iter().map(|gfns| gfns.start().get()).chain([364]).collect();
    let pages: Vec<u64> =
        take(&consumer).into_iter().flat_map(|(first, pages)| first..first + pages).collect();
    let expected: Vec<u64> =
        (300..430).filter(|gfn| !(301..365).contains(gfn) || left.contains(gfn)).collect();
    assert_eq!(pages, expected);
    assert_eq!(take(&other), [(150, 70_000), (120_000, 1)]);
}

/// Row 24, at each harvest: a mark that had come back before the harvest began is reported by it, by the one under way,
/// or by the one before. Two harvesters of their own speed, whole and in parts, while slots are split, merged and changed.
#[test]
fn row_24_a_finished_mark_is_in_the_next_harvest() {
    const FIRST: u64 = 2 * 32768 - 64;
    const PAGES: u64 = 128;
    let rounds = if cfg!(miri) { 200 } else { 300_000u64 };
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    table.create(slot(0, FIRST - 5, PAGES + 10)).unwrap();
    // What was written to a page, and what was written and marked.
    let page = |_| (AtomicU64::new(0), AtomicU64::new(0));
    let memory: Vec<(AtomicU64, AtomicU64)> = (0..PAGES).map(page).collect();
    let done = AtomicBool::new(false);

    let harvester = |consumer: Consumer, whole: bool| {
        let mut copy = vec![0; memory.len()];
        let mut last = false;
        while !last {
            last = done.load(Ordering::SeqCst);
            let marked: Vec<u64> = memory.iter().map(|page| page.1.load(Ordering::SeqCst)).collect();
            let half = PAGES / 2 + 3;
            let parts = [gfns(FIRST - 5, half), gfns(FIRST - 5 + half, PAGES + 10 - half)];
            let ranges = if whole { vec![gfns(0, 1 << 20)] } else { parts.to_vec() };
            for range in ranges {
                let harvest = consumer.harvest_range(RAM, range, &mut SoftwareOnly).unwrap();
                for run in harvest.runs() {
                    for gfn in run.gfns.start().get()..run.gfns.end().get() {
                        if let Ok(at) = usize::try_from(gfn.wrapping_sub(FIRST)) {
                            if let Some(page) = memory.get(at) {
                                copy[at] = page.0.load(Ordering::Relaxed);
                            }
                        }
                    }
                }
                harvest.commit();
            }
            for (at, (&copied, &marked)) in copy.iter().zip(&marked).enumerate() {
                assert!(copied >= marked, "page {at}: {marked} was marked, {copied} is what a harvest found");
            }
        }
    };
    let consumers = [log.consumer().unwrap(), log.consumer().unwrap()];
    std::thread::scope(|scope| {
        for (consumer, whole) in consumers.into_iter().zip([true, false]) {
            scope.spawn(move || harvester(consumer, whole));
        }
        let writers: Vec<_> = (0..2u64)
            .map(|writer| {
                let (log, memory) = (&log, &memory);
                scope.spawn(move || {
                    for round in 1..=rounds {
                        let at = round.wrapping_mul(0x9e37_79b9) >> 7;
                        let at = at % (PAGES / 2) * 2 + writer;
                        let (written, marked) = &memory[usize::try_from(at).unwrap()];
                        written.store(round, Ordering::Relaxed);
                        match round % 64 {
                            0 => log.mark_range(RAM, gfns(FIRST - 5, PAGES + 10)),
                            1 => log.mark_range(RAM, gfns(FIRST + at, 1)),
                            2 => drop(log.merge(RAM, gfns(FIRST + at, 3), &[1])),
                            // A whole chunk, which is full then.
                            3 if round % 1024 == 3 => log.mark_range(RAM, gfns((FIRST + at) & !32767, 32768)),
                            _ => log.mark(RAM, Gfn::new(FIRST + at)),
                        }
                        marked.store(round, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        // Changes that leave every page logged where it is.
        let (low, high, middle) = (SlotId::new(0), SlotId::new(1), Gfn::new(FIRST + 31));
        while !writers.iter().all(|writer| writer.is_finished()) {
            table.transaction(|tx| tx.split(RAM, low, middle, high)).unwrap();
            table.transaction(|tx| tx.set_read_only(RAM, high, true)).unwrap();
            table.transaction(|tx| tx.set_read_only(RAM, high, false)).unwrap();
            table.transaction(|tx| tx.merge(RAM, low, high)).unwrap();
        }
        done.store(true, Ordering::SeqCst);
    });
}

/// A writer that takes turns between the steps of a change: at `commit`, and at `undo`. Then it may refuse.
struct Writer {
    log: DirtyLog,
    reader: Reader,
    at_commit: Option<u64>,
    at_undo: Option<u64>,
    refuses: bool,
    /// Somebody else writes in its place, through a version that is older.
    other: Option<(mpsc::Sender<u64>, mpsc::Receiver<()>)>,
}

impl Writer {
    /// Writes to a frame through the version that is published now.
    fn write(&mut self, gfn: u64) {
        if let Some((ask, done)) = &self.other {
            ask.send(gfn).unwrap();
            return done.recv().unwrap();
        }
        let pinned = self.reader.pin();
        assert!(pinned.slot_at(RAM, Gfn::new(gfn)).is_some(), "there is memory at {gfn:#x}");
        self.log.mark_through(&pinned, RAM, gfns(gfn, 1));
    }
}

struct Shared(Arc<Mutex<Writer>>);

impl Listener for Shared {
    fn name(&self) -> &str {
        "writer"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        let mut writer = self.0.lock().unwrap();
        if let Some(gfn) = writer.at_commit {
            writer.write(gfn);
        }
        if writer.refuses { Err("no".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &Update<'_>) {
        let mut writer = self.0.lock().unwrap();
        if let Some(gfn) = writer.at_undo {
            writer.write(gfn);
        }
    }
}

/// A table whose log stands between two writers.
fn guest() -> (SlotTable, DirtyLog, Consumer, [Arc<Mutex<Writer>>; 2]) {
    let mut elsewhere = SlotTable::new(Limits::default()).unwrap();
    let unused = DirtyLog::attach(&mut elsewhere).unwrap();
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let writer = |table: &SlotTable, log: &DirtyLog| {
        let (log, reader) = (log.clone(), table.reader().unwrap());
        Arc::new(Mutex::new(Writer {
            log,
            reader,
            at_commit: None,
            at_undo: None,
            refuses: false,
            other: None,
        }))
    };
    let before = writer(&table, &unused);
    table.add_listener(Box::new(Shared(Arc::clone(&before)))).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    before.lock().unwrap().log = log.clone();
    let behind = writer(&table, &log);
    table.add_listener(Box::new(Shared(Arc::clone(&behind)))).unwrap();
    let consumer = log.consumer().unwrap();
    (table, log, consumer, [before, behind])
}

/// The new version is published and the log has not heard of it yet, or has: a write through it is not lost.
#[test]
fn a_write_through_the_new_version_is_there() {
    for at in [0, 1] {
        let (mut table, _log, consumer, writers) = guest();
        table.create(slot(0, 0x100, 64)).unwrap();
        writers[at].lock().unwrap().at_commit = Some(0x9003);
        table.move_to(RAM, SlotId::new(0), Gfn::new(0x9000)).unwrap();
        assert_eq!(take(&consumer), [(0x9003, 1)]);
    }
}

/// A change is published, written through, and refused by a listener: what was written is where its memory is again.
/// The writer comes before the log has heard of the change, behind it, or when it has taken the change back already.
#[test]
fn a_write_through_a_version_that_is_taken_back_is_not_lost() {
    for (who, at_undo) in [(0, false), (1, false), (0, true)] {
        let (mut table, log, consumer, writers) = guest();
        table.create(slot(0, 0x100, 64)).unwrap();
        log.mark(RAM, Gfn::new(0x101));
        let refuser = if at_undo { 1 } else { who };
        writers[refuser].lock().unwrap().refuses = true;
        let mut writer = writers[who].lock().unwrap();
        (if at_undo { &mut writer.at_undo } else { &mut writer.at_commit }).replace(0x9003);
        drop(writer);
        assert!(table.move_to(RAM, SlotId::new(0), Gfn::new(0x9000)).is_err());
        // Behind the log's own undo nobody can tell which page it is.
        let wanted = if at_undo { vec![(0x100, 64)] } else { vec![(0x101, 1), (0x103, 1)] };
        assert_eq!(take(&consumer), wanted, "writer {who}, at undo: {at_undo}");
        // Marks through the version that is there now are exact again.
        writers[0].lock().unwrap().write(0x102);
        assert_eq!(take(&consumer), [(0x102, 1)]);
    }
}

/// Brings the marks of a late writer, or of a kernel that is asked while its slots change; and refuses the change.
#[derive(Clone)]
struct Late(Arc<Mutex<Option<DirtyLog>>>);

impl Listener for Late {
    fn name(&self) -> &str {
        "late"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        for log in self.0.lock().unwrap().iter() {
            log.mark(RAM, Gfn::new(0x101));
            log.mark(RAM, Gfn::new(0x203));
        }
        Err("refused".into())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// A slot moves to where another one was, and is taken back before the log has heard of it: marks of the version
/// before, which came late, are of both slots.
#[test]
fn a_late_mark_where_another_slot_was_to_come_is_not_lost() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    table.create(slot(0, 0x100, 16)).unwrap();
    table.create(slot(1, 0x200, 16)).unwrap();
    let late = Late(Arc::default());
    table.add_listener(Box::new(late.clone())).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    *late.0.lock().unwrap() = Some(log.clone());
    let consumer = log.consumer().unwrap();
    let swap = table.transaction(|tx| {
        tx.move_to(RAM, SlotId::new(0), Gfn::new(0x200))?;
        tx.move_to(RAM, SlotId::new(1), Gfn::new(0x100))
    });
    assert!(swap.is_err());
    let found = take(&consumer);
    let is_there = |gfn| found.iter().any(|&(first, pages)| (first..first + pages).contains(&gfn));
    assert!(is_there(0x101) && is_there(0x203), "{found:x?}");
}

/// The same with a writer whose version is older still: where the memory is now, it learns from the version that is
/// taken back.
#[test]
fn a_write_through_an_old_version_beside_one_that_is_taken_back_is_not_lost() {
    let (mut table, log, consumer, writers) = guest();
    table.create(slot(0, 0x100, 64)).unwrap();
    let mut reader = table.reader().unwrap();
    let ((ask, asked), (tell, told)) = (mpsc::channel(), mpsc::channel());
    std::thread::scope(|scope| {
        let log = &log;
        scope.spawn(move || {
            let pinned = reader.pin();
            tell.send(()).unwrap();
            for gfn in asked {
                log.mark_through(&pinned, RAM, gfns(gfn, 1));
                tell.send(()).unwrap();
            }
        });
        told.recv().unwrap();
        table.move_to(RAM, SlotId::new(0), Gfn::new(0x5000)).unwrap();
        let mut writer = writers[0].lock().unwrap();
        (writer.at_undo, writer.other) = (Some(0x103), Some((ask, told)));
        drop(writer);
        writers[1].lock().unwrap().refuses = true;
        assert!(table.move_to(RAM, SlotId::new(0), Gfn::new(0x9000)).is_err());
        writers[0].lock().unwrap().other = None;
    });
    assert_eq!(take(&consumer), [(0x5000, 64)]);
}

/// Memory that goes on under another id, after a split or a merge, is still found by a writer that comes late. An alias
/// that has not moved is left alone.
#[test]
fn a_late_write_finds_its_memory_under_another_id() {
    for backing in [Backing::Host { hva: Hva::new(1 << 40) }, Backing::Device { token: 0x7123 }] {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let consumer = log.consumer().unwrap();
        table.create(SlotSpec { backing, ..slot(0, 0x100, 64) }).unwrap();
        table.create(SlotSpec { backing, ..slot(7, 0x5000, 64) }).unwrap();
        let id = SlotId::new;
        let mut reader = table.reader().unwrap();

        let pinned = reader.pin();
        let split = table.transaction(|tx| {
            tx.split(RAM, id(0), Gfn::new(0x120), id(1))?;
            tx.move_to(RAM, id(1), Gfn::new(0x9020))
        });
        split.unwrap();
        log.mark_through(&pinned, RAM, gfns(0x11f, 2));
        drop(pinned);
        assert_eq!(take(&consumer), [(0x11f, 1), (0x9020, 1)]);

        let pinned = reader.pin();
        let merged = table.transaction(|tx| {
            tx.move_to(RAM, id(0), Gfn::new(0xa000))?;
            tx.move_to(RAM, id(1), Gfn::new(0xa020))?;
            tx.merge(RAM, id(0), id(1))
        });
        merged.unwrap();
        log.mark_through(&pinned, RAM, gfns(0x9021, 1));
        drop(pinned);
        assert_eq!(take(&consumer), [(0xa021, 1)]);
    }
}

/// Refuses every third change that it hears of.
struct Fickle(u32);

impl Listener for Fickle {
    fn name(&self) -> &str {
        "fickle"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        self.0 += 1;
        if self.0 % 3 == 0 { Err("not this time".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// A slot moves there and back again, while a page of it is written through whichever version was there: in the end the
/// page is dirty where it is.
#[test]
fn a_mark_is_not_lost_however_often_its_slot_moves_meanwhile() {
    const HOMES: [u64; 2] = [0x100, 0x9000];
    const PAGE: u64 = 5;
    let rounds = if cfg!(miri) { 100 } else { 6_000u64 };
    let mut table = SlotTable::new(Limits::default()).unwrap();
    table.add_listener(Box::new(Fickle(0))).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    table.add_listener(Box::new(Fickle(1))).unwrap();
    let consumer = log.consumer().unwrap();
    let id = SlotId::new(0);
    table.create(slot(0, HOMES[0], 64)).unwrap();
    let mut reader = table.reader().unwrap();
    // The round that is under way, and the last one that is written.
    let (started, written) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=rounds {
                while started.load(Ordering::SeqCst) < round {
                    std::thread::yield_now();
                }
                let pinned = reader.pin();
                for _ in 0..round.wrapping_mul(0x9e37_79b9) >> 20 & 63 {
                    std::hint::spin_loop();
                }
                let page = pinned.slot(RAM, id).unwrap().base_gfn().get() + PAGE;
                log.mark_through(&pinned, RAM, gfns(page, 1));
                drop(pinned);
                written.store(round, Ordering::SeqCst);
            }
        });
        let mut lost = None;
        for round in 1..=rounds {
            started.store(round, Ordering::SeqCst);
            let mut moves = 0;
            while moves < 4 || written.load(Ordering::SeqCst) < round {
                let now = table.view().slot(RAM, id).unwrap().base_gfn().get();
                let to = if now == HOMES[0] { HOMES[1] } else { HOMES[0] };
                // Refused or not.
                _ = table.move_to(RAM, id, Gfn::new(to));
                moves += 1;
                if moves % 8 == 7 {
                    std::thread::yield_now();
                }
            }
            let page = table.view().slot(RAM, id).unwrap().base_gfn().get() + PAGE;
            let dirty = take(&consumer);
            let is_dirty = dirty.iter().any(|&(first, pages)| (first..first + pages).contains(&page));
            if !is_dirty && lost.is_none() {
                lost = Some(format!("round {round}: {page:#x} was written, and these are dirty: {dirty:x?}"));
            }
        }
        assert_eq!(lost, None);
    });
}
