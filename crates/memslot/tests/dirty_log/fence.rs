//! Marks that leave alone what is marked, and the heavy fence that takers make for them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use memslot::dirty::kvm::KvmDirtyLog;
use memslot::dirty::{DirtyLog, FenceRefused, HeavyFence, Rearm};
use memslot::{AddressSpaceId, Gfn, GfnRange, Limits, SlotId, SlotTable};

use crate::{RAM, gfns, slot, take};

/// What happened, in order.
#[derive(Clone, Default)]
struct Record(Arc<Mutex<Vec<&'static str>>>);

impl Record {
    fn note(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }

    fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A fence that is made, or refused. It looks whether the page is taken by then.
struct Noted {
    record: Record,
    log: Arc<Mutex<Option<DirtyLog>>>,
    refuses: Arc<AtomicBool>,
}

impl HeavyFence for Noted {
    fn fence(&self) -> Result<(), FenceRefused> {
        if let Some(log) = &*self.log.lock().unwrap() {
            assert!(!log.is_marked(RAM, Gfn::new(0x105)), "a fence in front of the take");
        }
        self.record.note("fence");
        if self.refuses.load(Ordering::Relaxed) { Err(FenceRefused) } else { Ok(()) }
    }
}

impl Rearm for Record {
    type Error = ();

    fn rearm(&mut self, _: AddressSpaceId, _: GfnRange) -> Result<(), ()> {
        self.note("rearm");
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ()> {
        self.note("flush");
        Ok(())
    }
}

struct Guest {
    table: SlotTable,
    log: DirtyLog,
    record: Record,
    refuses: Arc<AtomicBool>,
    /// The log that its own fence looks at; not for ever, since it would keep itself alive.
    looked_at: Arc<Mutex<Option<DirtyLog>>>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.looked_at.lock().unwrap().take();
    }
}

fn guest() -> Guest {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let (record, refuses, looked_at) = (Record::default(), Arc::default(), Arc::default());
    let (noted, refused, looks_at) = (record.clone(), Arc::clone(&refuses), Arc::clone(&looked_at));
    let fence = Noted { record: noted, log: looks_at, refuses: refused };
    let log = DirtyLog::attach_with_fence(&mut table, Box::new(fence)).unwrap();
    table.create(slot(0, 0x100, 64)).unwrap();
    table.create(slot(1, 0x9000, 100_000)).unwrap();
    *looked_at.lock().unwrap() = Some(log.clone());
    Guest { table, log, record, refuses, looked_at }
}

/// One fence for each call that takes something from the bitmap: behind the take, in front of what follows.
#[test]
fn whoever_takes_bits_makes_one_fence() {
    let mut guest = guest();
    let (log, mut record) = (guest.log.clone(), guest.record.clone());
    let (consumer, other) = (log.consumer().unwrap(), log.consumer_keeping_removed().unwrap());
    let mark = || [0x105, 0x9003, 0x18_000].map(|gfn| log.mark(RAM, Gfn::new(gfn)));
    let all = ["fence", "rearm", "rearm", "rearm", "flush"];

    consumer.harvest(&mut record).unwrap().commit();
    assert_eq!(record.take(), [""; 0], "nothing is taken of a clean log");
    mark();
    consumer.harvest(&mut record.clone()).unwrap().commit();
    assert_eq!(record.take(), all);
    other.harvest(&mut record.clone()).unwrap().commit();
    assert_eq!(record.take(), [""; 0], "what another consumer has taken is behind its fence");

    mark();
    consumer.harvest_range(RAM, gfns(0x105, 3), &mut record.clone()).unwrap().commit();
    assert_eq!(record.take(), ["fence", "rearm", "flush"]);
    consumer.peek(RAM, gfns(0x100, 64), &mut [0]).unwrap();
    assert_eq!(record.take(), [""; 0], "nothing is taken");
    log.mark(RAM, Gfn::new(0x105));
    assert_eq!(consumer.clear(RAM, gfns(0x101, 100), &[u64::MAX; 2], &mut record.clone()), Ok(1));
    assert_eq!(record.take(), ["fence", "rearm", "flush"]);
    assert_eq!(consumer.clear(RAM, gfns(0x101, 100), &[u64::MAX; 2], &mut record.clone()), Ok(0));
    assert_eq!(record.take(), [""; 0]);

    let mut kvm = KvmDirtyLog::new(consumer);
    log.mark(RAM, Gfn::new(0x105));
    kvm.get_dirty_log(0, Some(&mut [0]), &mut record.clone()).unwrap();
    assert_eq!(record.take(), ["fence", "rearm", "flush"]);

    // Bits that go with their slot are taken without, and handed over behind one.
    log.mark(RAM, Gfn::new(0x105));
    guest.table.delete(RAM, SlotId::new(0)).unwrap();
    assert_eq!(record.take(), [""; 0]);
    assert_eq!(other.take_removed().unwrap().len(), 1);
    assert_eq!(record.take(), ["fence"]);
    assert!(other.take_removed().unwrap().is_empty());
    assert_eq!(record.take(), [""; 0]);
}

/// A fence that is refused: everything counts as dirty once more, and marks do without from then on.
#[test]
fn a_fence_that_is_refused_makes_all_dirty_once() {
    let guest = guest();
    let (log, record, refuses) = (&guest.log, &guest.record, &guest.refuses);
    let consumer = log.consumer().unwrap();
    log.mark(RAM, Gfn::new(0x105));
    refuses.store(true, Ordering::Relaxed);
    assert_eq!(take(&consumer), [(0x105, 1)]);
    assert_eq!(take(&consumer), [(0x100, 64), (0x9000, 100_000)]);
    log.mark(RAM, Gfn::new(0x9007));
    assert_eq!(take(&consumer), [(0x9007, 1)]);
    assert_eq!(record.take(), ["fence"], "it is not asked for again");
}

/// The fence of the system. The writer marks a page, writes to it, and marks it again, which only looks; the harvester
/// takes all the time, and has read the page before, so that the write stays in the store buffer for a while. What was
/// written is what a harvest copies, at the latest the first one after the mark.
///
/// With `MEMSLOT_NO_FENCE` the fence does nothing: then the test fails on an idle machine of more than one processor.
#[cfg(all(feature = "membarrier", target_os = "linux"))]
#[test]
fn a_write_before_a_mark_that_only_looks_is_seen() {
    use std::hint::spin_loop;
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    use memslot::dirty::Membarrier;

    struct Nothing;

    impl HeavyFence for Nothing {
        fn fence(&self) -> Result<(), FenceRefused> {
            Ok(())
        }
    }

    #[repr(align(128))]
    #[derive(Default)]
    struct Apart(AtomicU64);

    let fence: Box<dyn HeavyFence> = match Membarrier::new() {
        Ok(_) if std::env::var_os("MEMSLOT_NO_FENCE").is_some() => Box::new(Nothing),
        Ok(fence) => Box::new(fence),
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let rounds = if cfg!(miri) { 100 } else { 100_000u64 };
    // Beside other work the two threads rarely run at the same time, and wait for each other.
    let (begin, most) = (Instant::now(), Duration::from_secs(3));
    let stop = AtomicBool::new(false);
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = DirtyLog::attach_with_fence(&mut table, fence).unwrap();
    table.create(slot(0, 0, 64)).unwrap();
    let consumer = log.consumer().unwrap();
    // What the page holds; the round that is marked; the round that is harvested.
    let [page, marked, harvested] = [(); 3].map(|()| Apart::default());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=rounds {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                log.mark(RAM, Gfn::new(3));
                for _ in 0..round.wrapping_mul(0x9e37_79b9) >> 20 & 31 {
                    spin_loop();
                }
                page.0.store(round, Ordering::Relaxed);
                log.mark(RAM, Gfn::new(3));
                marked.0.store(round, Ordering::Release);
                while harvested.0.load(Ordering::Acquire) < round {
                    std::thread::yield_now();
                }
            }
        });
        let (mut copy, mut missed) = (0, 0);
        for round in 1..=rounds {
            let mut last = false;
            while !last {
                last = marked.0.load(Ordering::Acquire) >= round;
                if !take(&consumer).is_empty() {
                    copy = page.0.load(Ordering::Relaxed);
                }
            }
            missed += u64::from(copy < round);
            let is_late = begin.elapsed() > most;
            stop.store(is_late, Ordering::Relaxed);
            harvested.0.store(round, Ordering::Release);
            if is_late {
                break;
            }
        }
        assert_eq!(missed, 0, "writes that no harvest has seen, of {rounds}");
    });
}
