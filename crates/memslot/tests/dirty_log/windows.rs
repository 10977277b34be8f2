//! Between what the log hears of a change and what its other listeners do: marks and harvests that come in there.

use std::sync::mpsc::{self, Receiver, Sender};

use memslot::dirty::{DirtyLog, SoftwareOnly};
use memslot::{Backing, Gfn, Hva, Limits, Listener, ListenerError, SlotFlags, SlotId, SlotTable, Update};

use crate::{RAM, gfns, runs, slot, take};

/// A listener behind the log: page tables that find out what was written while they unmap, or a kernel that is asked.
#[derive(Default)]
struct Behind {
    log: Option<DirtyLog>,
    marks: Vec<u64>,
    /// Somebody else does something in the middle of the change.
    other: Option<(Sender<()>, Receiver<()>)>,
    refuses: bool,
}

impl Listener for Behind {
    fn name(&self) -> &str {
        "behind"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if let Some(log) = &self.log {
            self.marks.iter().for_each(|&gfn| log.mark(RAM, Gfn::new(gfn)));
        }
        if let Some((ask, done)) = &self.other {
            ask.send(()).unwrap();
            done.recv().unwrap();
        }
        if self.refuses { Err("no".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

fn guest(slots: &[(u32, u64)]) -> (SlotTable, DirtyLog) {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    for &(id, first) in slots {
        table.create(slot(id, first, 64)).unwrap();
    }
    (table, log)
}

/// A harvest is put back while its slot is being deleted, which is refused then: the slot is back, and so are its bits.
#[test]
fn a_harvest_that_is_put_back_within_a_refused_change_is_not_lost() {
    let (mut table, log) = guest(&[(0, 0x100), (1, 0x200)]);
    let consumer = log.consumer().unwrap();
    log.mark(RAM, Gfn::new(0x103));
    let ((ask, asked), (tell, told)) = (mpsc::channel(), mpsc::channel());
    table
        .add_listener(Box::new(Behind { other: Some((ask, told)), refuses: true, ..Behind::default() }))
        .unwrap();
    std::thread::scope(|scope| {
        let consumer = &consumer;
        let (ready, is_ready) = mpsc::channel();
        scope.spawn(move || {
            let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
            assert_eq!(runs(&harvest), [(0x103, 1)]);
            ready.send(()).unwrap();
            asked.recv().unwrap();
            drop(harvest);
            tell.send(()).unwrap();
        });
        is_ready.recv().unwrap();
        assert!(table.delete(RAM, SlotId::new(0)).is_err());
    });
    let found = take(&consumer);
    assert!(found.iter().any(|&(first, pages)| (first..first + pages).contains(&0x103)), "{found:x?}");
    assert_eq!(take(&consumer), []);
}

/// What page tables find of a slot while they unmap it is dirty still when a listener behind them refuses the change, also
/// where other memory was to come.
#[test]
fn what_was_found_late_of_a_slot_that_stays_after_all_is_not_lost() {
    for deletes in [true, false] {
        let (mut table, log) = guest(&[(0, 0x100), (1, 0x200)]);
        let consumer = log.consumer().unwrap();
        table
            .add_listener(Box::new(Behind {
                log: Some(log.clone()),
                marks: vec![0x203],
                refuses: true,
                ..Behind::default()
            }))
            .unwrap();
        let result = table.transaction(|tx| {
            if deletes {
                tx.delete(RAM, SlotId::new(1))?;
            } else {
                tx.move_to(RAM, SlotId::new(1), Gfn::new(0x100))?;
            }
            tx.move_to(RAM, SlotId::new(0), Gfn::new(0x200))
        });
        assert!(result.is_err());
        let found = take(&consumer);
        assert!(found.contains(&(0x203, 1)), "{found:x?}");
    }
}

/// What page tables find of memory that moves, while they unmap it where it was, is dirty where it is now.
#[test]
fn what_was_found_late_of_memory_that_moves_goes_with_it() {
    let (mut table, log) = guest(&[(0, 0x100)]);
    let consumer = log.consumer().unwrap();
    table
        .add_listener(Box::new(Behind { log: Some(log.clone()), marks: vec![0x103], ..Behind::default() }))
        .unwrap();
    table.move_to(RAM, SlotId::new(0), Gfn::new(0x9000)).unwrap();
    assert_eq!(take(&consumer), [(0x9003, 1)]);
}

/// The same host memory at the same frames, in another kind of slot: its pages are as dirty as they were.
#[test]
fn memory_that_becomes_part_of_another_kind_of_slot_keeps_its_bits() {
    let (mut table, log) = guest(&[(0, 0x100)]);
    let consumer = log.consumer().unwrap();
    log.mark(RAM, Gfn::new(0x103));
    let hva = Hva::new(0x7000_0000_0000);
    let result = table.transaction(|tx| {
        tx.delete(RAM, SlotId::new(0))?;
        tx.create(memslot::SlotSpec {
            backing: Backing::GuestMemfd { hva, file: 7, offset: 0 },
            ..slot(0, 0x100, 64)
        })
    });
    result.unwrap();
    assert_eq!(take(&consumer), [(0x103, 1)]);
}

/// A mark of no logged slot is in no harvest, however that is read.
#[test]
fn the_words_of_a_harvest_are_of_logged_slots_only() {
    let (mut table, log) = guest(&[(0, 0x100)]);
    let consumer = log.consumer().unwrap();
    table.create(memslot::SlotSpec { flags: SlotFlags::empty(), ..slot(1, 0x200, 64) }).unwrap();
    log.mark_range(RAM, gfns(0, 32768));
    let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
    assert_eq!(runs(&harvest), [(0x100, 64)]);
    let mut words = [0; 16];
    assert_eq!(harvest.words(RAM, gfns(0, 1024), &mut words), Ok(64));
    let mut wanted = [0; 16];
    wanted[4] = u64::MAX;
    assert_eq!(words, wanted);
}

/// Pages that were taken, and are put back when their slot is gone, are handed over with the others of this slot.
#[test]
fn a_harvest_that_is_put_back_after_its_slot_is_removed() {
    let (mut table, log) = guest(&[(0, 0x100), (1, 0x200)]);
    let consumer = log.consumer_keeping_removed().unwrap();
    log.mark(RAM, Gfn::new(0x103));
    let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
    log.mark(RAM, Gfn::new(0x105));
    table.delete(RAM, SlotId::new(0)).unwrap();
    drop(harvest);
    let mut removed: Vec<_> =
        consumer.take_removed().unwrap().iter().flat_map(|it| it.runs().collect::<Vec<_>>()).collect();
    removed.sort_by_key(|gfns| gfns.start());
    assert_eq!(removed, [gfns(0x103, 1), gfns(0x105, 1)]);
}

/// Panics when nothing is taken back any more.
struct Panics;

impl Listener for Panics {
    fn name(&self) -> &str {
        "panics"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}

    fn settled(&mut self, update: &Update<'_>) {
        assert!(update.after.slot_at(RAM, Gfn::new(0x9000)).is_none(), "this listener panics");
    }
}

/// A listener panics when it hears that a change has settled; the log behind it hears so all the same.
#[test]
fn a_panic_when_a_change_has_settled_loses_nothing() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    table.add_listener(Box::new(Panics)).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    table.create(slot(0, 0x100, 64)).unwrap();
    let consumer = log.consumer().unwrap();
    log.mark(RAM, Gfn::new(0x103));
    let moving = std::panic::AssertUnwindSafe(|| table.move_to(RAM, SlotId::new(0), Gfn::new(0x9000)));
    assert!(std::panic::catch_unwind(moving).is_err());
    assert_eq!(take(&consumer), [(0x9003, 1)]);
}
