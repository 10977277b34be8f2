//! The dirty log's rules, one named test each: what went wrong in KVM and its users (the rows of the list of past bugs
//! are named in the tests' documentation), and what KVM does not have.

use std::sync::atomic::{AtomicU64, Ordering};

use memslot::dirty::kvm::{ClearDirtyLog, KvmDirtyLog};
use memslot::dirty::{BitmapError, Consumer, DirtyLog, Rearm, SoftwareOnly};
use memslot::rules::Errno;
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, Limits, Listener, ListenerError, PageSize, SlotFlags,
    SlotId, SlotSpec, SlotTable, Update,
};

use crate::{RAM, gfns, runs, slot, take};

fn guest(slots: &[SlotSpec]) -> (SlotTable, DirtyLog, Consumer) {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    let consumer = log.consumer().unwrap();
    for slot in slots {
        table.create(*slot).unwrap();
    }
    (table, log, consumer)
}

/// Row 19: every edge of `KVM_CLEAR_DIRTY_LOG`'s first page and number of pages, against the rule in its own words.
#[test]
fn row_19_clear_checks_its_bounds() {
    for pages in [64u64, 100, 128, 200] {
        let (_table, _log, consumer) = guest(&[slot(0, 0x1000, pages)]);
        let mut kvm = KvmDirtyLog::new(consumer);
        let mask = [u64::MAX; 8];
        for first_page in [0, 63, 64, 128, pages - 1, pages, pages + 1, u64::MAX, u64::MAX - 63, 1 << 63] {
            let to_end = pages.wrapping_sub(first_page);
            for num in [0, 1, 63, 64, 65, 128, to_end, to_end.wrapping_add(1), u64::from(u32::MAX)] {
                let Ok(num_pages) = u32::try_from(num) else { continue };
                let end = u128::from(first_page) + u128::from(num);
                let fits = end <= u128::from(pages) && (num % 64 == 0 || end == u128::from(pages));
                let expected = if first_page % 64 == 0 && fits { Ok(()) } else { Err(Errno::EINVAL) };
                let clear = ClearDirtyLog { slot: 0, num_pages, first_page };
                let got = kvm.clear_dirty_log(&clear, Some(&mask), &mut SoftwareOnly);
                assert_eq!(got, expected, "{num_pages} pages from {first_page} of {pages}");
            }
        }
    }
}

/// Counts what it is asked to do.
#[derive(Default)]
struct Counting {
    pages: u64,
    flushes: u32,
    fails: bool,
}

impl Rearm for Counting {
    type Error = &'static str;

    fn rearm(&mut self, _: AddressSpaceId, gfns: GfnRange) -> Result<(), &'static str> {
        assert!(!gfns.is_empty());
        self.pages += gfns.len();
        Ok(())
    }

    fn flush(&mut self) -> Result<(), &'static str> {
        self.flushes += 1;
        if self.fails { Err("the flush failed") } else { Ok(()) }
    }
}

/// Row 22: nothing to re-arm is nothing to do: no call with an empty range, no flush.
#[test]
fn row_22_an_empty_mask_does_nothing() {
    let (_table, log, consumer) = guest(&[slot(0, 0, 1000)]);
    log.mark(RAM, Gfn::new(70));
    let mut counting = Counting::default();
    assert_eq!(consumer.clear(RAM, gfns(0, 128), &[u64::MAX, 0], &mut counting), Ok(0));
    assert_eq!(consumer.clear(RAM, gfns(64, 64), &[!(1 << 6)], &mut counting), Ok(0));
    assert_eq!((counting.pages, counting.flushes), (0, 0));
    assert_eq!(consumer.clear(RAM, gfns(64, 64), &[1 << 6], &mut counting), Ok(1));
    assert_eq!((counting.pages, counting.flushes), (1, 1));
    consumer.harvest(&mut counting).unwrap().commit();
    assert_eq!((counting.pages, counting.flushes), (1, 1));
}

/// Row 24: writers and a harvester. A page that a harvest does not report has not changed since the last look at it.
#[test]
fn row_24_an_unreported_page_has_not_changed() {
    const PAGES: usize = 200;
    const FIRST: u64 = 32768 - 100;
    let (_table, log, consumer) = guest(&[slot(0, FIRST, PAGES as u64)]);
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let mut copy = vec![0; PAGES];
    let done = std::sync::atomic::AtomicUsize::new(0);
    let look = |copy: &mut Vec<u64>| {
        let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
        // What is clean has the value of the last copy, or is being written just now and will be in the next harvest.
        for (first, pages) in runs(&harvest) {
            for page in first - FIRST..first - FIRST + pages {
                let page = usize::try_from(page).unwrap();
                copy[page] = memory[page].load(Ordering::Relaxed);
            }
        }
        harvest.commit();
    };
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let (log, memory, done) = (log.clone(), &memory, &done);
            scope.spawn(move || {
                for round in 1..20_000u64 {
                    let page = (round.wrapping_mul(0x9e37_79b9) >> 7) as usize % (PAGES / 2) * 2 + writer;
                    memory[page].store(round, Ordering::Relaxed);
                    if round % 64 == 0 {
                        let page = GfnRange::with_len(Gfn::new(FIRST + page as u64), 1).unwrap();
                        log.mark_range(RAM, page);
                    } else {
                        log.mark(RAM, Gfn::new(FIRST + page as u64));
                    }
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        while done.load(Ordering::SeqCst) < 2 {
            look(&mut copy);
        }
    });
    look(&mut copy);
    let now: Vec<u64> = memory.iter().map(|page| page.load(Ordering::Relaxed)).collect();
    assert_eq!(copy, now, "the last harvest left a page behind");
}

/// Rows 25 and 26 are page tables' (which pages are armed how); what the log owes them is that every page that it takes
/// is named to the backend, at 4 KiB granularity, whatever was marked at once.
#[test]
fn rows_25_and_26_every_page_is_named_to_the_backend() {
    let (_table, log, consumer) = guest(&[slot(0, 0, 4 * 32768)]);
    log.mark_range(RAM, gfns(512, 3 * 32768));
    log.mark(RAM, Gfn::new(0));
    let mut counting = Counting::default();
    consumer.harvest(&mut counting).unwrap().commit();
    assert_eq!((counting.pages, counting.flushes), (3 * 32768 + 1, 1));
}

/// Row 27: pages that start dirty and a ring together corrupted guests silently. Here a ring turns it off, whichever of
/// the two was asked for first: the backend arms all pages when logging starts, and nothing goes unnoticed.
#[test]
fn row_27_with_a_ring_no_page_starts_dirty() {
    for ring_first in [true, false] {
        let (mut table, log, consumer) = guest(&[]);
        let mut kvm = KvmDirtyLog::new(consumer);
        let calls = [(192, 65536), (168, 3)];
        for (cap, arg) in if ring_first { calls } else { [calls[1], calls[0]] } {
            assert_eq!(kvm.enable_cap(cap, 0, arg), Ok(()));
        }
        assert!(!log.initially_set());
        table.create(slot(0, 0, 100)).unwrap();
        assert_eq!(take(kvm.consumer()), []);
    }
}

/// Row 28: many slots, the last page of each clean. Firecracker's cursor lost its place there.
#[test]
fn row_28_clean_tails_do_not_shift_what_follows() {
    let slots = [slot(0, 0, 65), slot(1, 100, 64), slot(2, 32768 - 3, 6), slot(3, 1 << 30, 130)];
    let (_table, log, consumer) = guest(&slots);
    for first in [0, 100, 32768 - 3, 1 << 30] {
        log.mark_range(RAM, gfns(first + 1, 3));
    }
    let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
    let spans: Vec<_> = harvest
        .spans()
        .map(|span| (span.run.slot.get(), span.run.gfns.start().get(), span.run.gfns.len(), span.dirty))
        .collect();
    let mut expected = Vec::new();
    for (id, slot) in (0..).zip(&slots) {
        let (first, pages) = (slot.gfns.start().get(), slot.gfns.len());
        expected.extend([(id, first, 1, false), (id, first + 1, 3, true), (id, first + 4, pages - 4, false)]);
    }
    assert_eq!(spans, expected);
    assert_eq!(runs(&harvest), [(1, 3), (101, 3), (32768 - 2, 3), ((1 << 30) + 1, 3)]);
}

/// A harvest that fails at its flush has taken nothing.
#[test]
fn a_failed_flush_loses_nothing() {
    let (_table, log, consumer) = guest(&[slot(0, 0, 100_000)]);
    log.mark_range(RAM, gfns(0, 40_000));
    log.mark(RAM, Gfn::new(70_000));
    let mut counting = Counting { fails: true, ..Counting::default() };
    assert!(consumer.harvest(&mut counting).is_err());
    assert!(consumer.clear(RAM, gfns(69_952, 64), &[u64::MAX], &mut counting).is_err());
    assert_eq!(take(&consumer), [(0, 40_000), (70_000, 1)]);
}

/// Panics at its first call, or at its flush.
struct Panics(bool);

impl Rearm for Panics {
    type Error = ();

    fn rearm(&mut self, _: AddressSpaceId, _: GfnRange) -> Result<(), ()> {
        assert!(!self.0, "on purpose");
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ()> {
        panic!("on purpose")
    }
}

/// A backend that panics takes no page with it, and the log goes on.
#[test]
fn a_panic_of_the_backend_loses_nothing() {
    let (_table, log, consumer) = guest(&[slot(0, 0, 100_000)]);
    log.mark_range(RAM, gfns(100, 40_000));
    for early in [true, false] {
        let unwound = std::panic::AssertUnwindSafe(|| consumer.harvest(&mut Panics(early)).map(drop));
        assert!(std::panic::catch_unwind(unwound).is_err());
        let mask = [u64::MAX; 2];
        let unwound =
            std::panic::AssertUnwindSafe(|| consumer.clear(RAM, gfns(90, 100), &mask, &mut Panics(early)));
        assert!(std::panic::catch_unwind(unwound).is_err());
    }
    assert_eq!(take(&consumer), [(100, 40_000)]);
}

/// Ranges and gfns that no address can have: nothing is there, and nothing panics.
#[test]
fn the_far_end_of_the_gfns() {
    let (_table, log, consumer) = guest(&[slot(0, 0, 100)]);
    for gfn in [1 << 52, u64::MAX - 70, u64::MAX - 1, u64::MAX] {
        log.mark(RAM, Gfn::new(gfn));
        assert!(!log.is_marked(RAM, Gfn::new(gfn)));
        let pages = (u64::MAX - gfn).min(70);
        let words = usize::try_from(pages.div_ceil(64)).unwrap();
        let range = gfns(gfn, pages);
        log.mark_range(RAM, range);
        let all = vec![u64::MAX >> (64 - pages.clamp(1, 64)); words.min(1)];
        if words == 1 {
            log.merge(RAM, range, &all).unwrap();
        }
        let mut seen = vec![0; words];
        assert_eq!(consumer.peek(RAM, range, &mut seen), Ok(0));
        assert_eq!(consumer.clear(RAM, range, &vec![u64::MAX; words], &mut SoftwareOnly), Ok(0));
        let harvest = consumer.harvest_range(RAM, range, &mut SoftwareOnly).unwrap();
        assert_eq!((harvest.pages(), harvest.words(RAM, range, &mut seen)), (0, Ok(0)));
    }
    // Nothing is done, and no memory taken, for frames that no slot has.
    log.mark_range(RAM, GfnRange::new(Gfn::new(99), Gfn::new(u64::MAX)).unwrap());
    assert!(log.bytes() < 1 << 20);
    log.mark(AddressSpaceId::new(77), Gfn::new(1));
    log.mark_bytes(RAM, Gpa::new(u64::MAX), 5, PageSize::K4);
    assert_eq!(take(&consumer), [(99, 1)]);
}

/// Fails every commit.
struct Refuser;

impl Listener for Refuser {
    fn name(&self) -> &str {
        "refuser"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        Err("no".into())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// A change that is taken back leaves every bit where it was: taken by others, and not taken by anybody.
#[test]
fn a_change_that_is_taken_back_leaves_the_bits() {
    let (mut table, log, consumer) = guest(&[slot(0, 0, 100), slot(1, 40_000, 40_000), slot(2, 100, 50)]);
    let other = log.consumer_keeping_removed().unwrap();
    table.add_listener(Box::new(Refuser)).unwrap();
    log.mark(RAM, Gfn::new(3));
    log.mark_range(RAM, gfns(40_001, 39_000));
    assert_eq!(take(&other), [(3, 1), (40_001, 39_000)]);
    log.mark(RAM, Gfn::new(103));
    let id = SlotId::new;
    assert!(table.delete(RAM, id(0)).is_err());
    assert!(table.move_to(RAM, id(1), Gfn::new(40_007)).is_err());
    // Two slots swap their places.
    let swapped = table.transaction(|tx| {
        tx.resize(RAM, id(0), 50)?;
        tx.move_to(RAM, id(0), Gfn::new(100))?;
        tx.move_to(RAM, id(2), Gfn::new(0))
    });
    assert!(swapped.is_err());
    assert_eq!(take(&consumer), [(3, 1), (103, 1), (40_001, 39_000)]);
    assert_eq!(take(&other), [(103, 1)]);
    assert!(other.take_removed().unwrap().is_empty());
}

/// While logging was off nobody had to mark: a change back makes all pages dirty, not only those from before.
#[test]
fn logging_that_stopped_for_a_moment_makes_all_dirty() {
    let (mut table, log, consumer) = guest(&[slot(0, 0, 100), slot(1, 200, 100)]);
    log.mark(RAM, Gfn::new(3));
    table.add_listener(Box::new(Refuser)).unwrap();
    assert!(table.set_flags(RAM, SlotId::new(1), SlotFlags::empty()).is_err());
    assert_eq!(take(&consumer), [(3, 1), (200, 100)]);
}

/// A place that is full meets bits that a consumer has kept of it.
#[test]
fn all_pages_swallow_some() {
    let (_table, log, consumer) = guest(&[slot(0, 0, 3 * 32768)]);
    let other = log.consumer().unwrap();
    log.mark(RAM, Gfn::new(32768 + 5));
    assert_eq!(take(&other), [(32768 + 5, 1)]);
    log.mark_range(RAM, gfns(32768, 32768));
    assert_eq!(take(&other), [(32768, 32768)]);
    log.mark(RAM, Gfn::new(32768 + 9));
    assert_eq!(take(&other), [(32768 + 9, 1)]);
    assert_eq!(take(&consumer), [(32768, 32768)]);
    assert_eq!(take(&consumer), []);
}

/// Who deletes a slot may ask for its bits, and nobody else's business is touched.
#[test]
fn a_deleted_slot_hands_over_its_bits() {
    let (mut table, log, consumer) = guest(&[slot(0, 0x100, 200), slot(1, 0x1000, 200)]);
    let keeper = log.consumer_keeping_removed().unwrap();
    log.mark(RAM, Gfn::new(0x101));
    log.mark_range(RAM, gfns(0x1003, 100));
    assert_eq!(take(&consumer), [(0x101, 1), (0x1003, 100)]);
    log.mark(RAM, Gfn::new(0x110));
    table.delete(RAM, SlotId::new(0)).unwrap();
    let removed = keeper.take_removed().unwrap();
    assert_eq!(removed.len(), 1);
    assert_eq!((removed[0].slot().id().get(), removed[0].gfns()), (0, gfns(0x100, 200)));
    assert_eq!(removed[0].runs().collect::<Vec<_>>(), [gfns(0x101, 1), gfns(0x110, 1)]);
    assert_eq!(take(&keeper), [(0x1003, 100)]);
    assert!(keeper.take_removed().unwrap().is_empty());
    assert_eq!(take(&consumer), []);
    // A new slot there starts clean.
    table.create(slot(0, 0x100, 200)).unwrap();
    assert_eq!(take(&consumer), []);
}

/// Bits of several sources: exactly as long as the range, nothing behind it.
#[test]
fn a_bitmap_of_another_length_is_an_error() {
    let (_table, log, consumer) = guest(&[slot(0, 0, 200)]);
    let length = |needed, words| Err(BitmapError::Length { pages: 70, needed, words });
    assert_eq!(log.merge(RAM, gfns(3, 70), &[1]), length(2, 1));
    assert_eq!(log.merge(RAM, gfns(3, 70), &[1, 1, 0]), length(2, 3));
    assert_eq!(log.merge(RAM, gfns(3, 70), &[1, 1 << 6]), Err(BitmapError::BitsBehindTheEnd { pages: 70 }));
    assert_eq!(take(&consumer), [], "an error merges nothing");
    assert_eq!(log.merge(RAM, gfns(3, 70), &[u64::MAX, 1 << 5]), Ok(65));
    assert_eq!(log.merge(RAM, gfns(3, 0), &[]), Ok(0));
    assert_eq!(take(&consumer), [(3, 64), (72, 1)]);
    assert!(consumer.peek(RAM, gfns(0, 65), &mut [0]).is_err());
    assert!(consumer.clear(RAM, gfns(0, 65), &[0], &mut SoftwareOnly).is_err());
}

/// Bytes become pages of the host's size.
#[test]
fn the_page_size_is_a_parameter() {
    for (page, shift) in [(PageSize::K4, 12), (PageSize::K16, 14), (PageSize::K64, 16)] {
        let mut table = SlotTable::new(Limits { page_size: page, ..Limits::default() }).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let consumer = log.consumer().unwrap();
        table
            .create(SlotSpec { backing: Backing::Host { hva: Hva::new(1 << 40) }, ..slot(0, 0, 100) })
            .unwrap();
        log.mark_bytes(RAM, Gpa::new((3 << shift) - 1), 2, page);
        log.mark_bytes(RAM, Gpa::new(10 << shift), 1 << shift, page);
        log.mark_bytes(RAM, Gpa::new(20 << shift), 0, page);
        log.mark_bytes(RAM, Gpa::new((30 << shift) + 5), (1 << shift) - 5, page);
        let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
        assert_eq!(runs(&harvest), [(2, 2), (10, 1), (30, 1)]);
        let bytes: Vec<_> = harvest.runs().map(|run| run.gfns.gpas(page).unwrap().len()).collect();
        assert_eq!(bytes, [2 << shift, 1 << shift, 1 << shift]);
    }
}

/// Two slots show the same memory: only the frame that was written through is marked.
#[test]
fn an_alias_is_not_marked() {
    let alias = SlotSpec { gfns: gfns(0x8000, 64), id: SlotId::new(1), ..slot(0, 0x100, 64) };
    let (_table, log, consumer) = guest(&[slot(0, 0x100, 64), alias]);
    log.mark(RAM, Gfn::new(0x8003));
    assert_eq!(take(&consumer), [(0x8003, 1)]);
}

/// A thread writes through a version that a move has replaced: the page is dirty where it is now.
#[test]
fn a_late_mark_finds_the_moved_slot() {
    let (mut table, log, consumer) = guest(&[slot(0, 0x100, 64)]);
    let mut reader = table.reader().unwrap();
    let pinned = reader.pin();
    table.move_to(RAM, SlotId::new(0), Gfn::new(0x9000)).unwrap();
    log.mark_through(&pinned, RAM, gfns(0x103, 2));
    drop(pinned);
    assert_eq!(take(&consumer), [(0x9003, 2)]);
}

/// Harvests, and clears, while the table is in the middle of a change: the new version is published, and the log has
/// not followed yet.
struct Harvests(std::sync::Arc<std::sync::Mutex<Option<(DirtyLog, Consumer)>>>);

impl Listener for Harvests {
    fn name(&self) -> &str {
        "harvests"
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        if let Some((log, consumer)) = &*self.0.lock().unwrap() {
            // Somebody writes to what is new already.
            for slot in update.after.slots(RAM) {
                log.mark(RAM, slot.base_gfn().checked_add(7).unwrap());
            }
            consumer.harvest(&mut SoftwareOnly).unwrap().commit();
            consumer.clear(RAM, gfns(0, 64 * 400), &[u64::MAX; 400], &mut SoftwareOnly).unwrap();
        }
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// What is marked between the publication and the log's own commit is in a later harvest, at the right slot.
#[test]
fn a_harvest_in_the_middle_of_a_change_takes_nothing_of_it() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let hook = std::sync::Arc::new(std::sync::Mutex::new(None));
    table.add_listener(Box::new(Harvests(std::sync::Arc::clone(&hook)))).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    let consumer = log.consumer().unwrap();
    table.create(slot(1, 0x1000, 64)).unwrap();
    log.mark(RAM, Gfn::new(0x1003));
    *hook.lock().unwrap() = Some((log.clone(), log.consumer().unwrap()));
    table.create(slot(0, 0x100, 64)).unwrap();
    table
        .transaction(|tx| {
            tx.move_to(RAM, SlotId::new(0), Gfn::new(0x1000))?;
            tx.move_to(RAM, SlotId::new(1), Gfn::new(0x100))
        })
        .unwrap();
    let (_, other) = hook.lock().unwrap().take().unwrap();
    // Nothing that was written to either slot is missing; what came in the middle of the swap may count for both.
    for (consumer, least) in [(&consumer, vec![0x103, 0x107, 0x1007]), (&other, vec![0x107, 0x1007])] {
        let got: Vec<u64> = take(consumer).iter().flat_map(|&(first, pages)| first..first + pages).collect();
        assert!(least.iter().all(|gfn| got.contains(gfn)), "{got:x?}");
    }
}

/// A harvest that is put back after the slot has moved, been split, or lost its logging. An alias is left alone.
#[test]
fn a_harvest_is_put_back_where_the_memory_is_now() {
    for backing in [Backing::Host { hva: Hva::new(1 << 40) }, Backing::Device { token: 0x7123 }] {
        let of = |id, first| SlotSpec { backing, ..slot(id, first, 64) };
        let (mut table, log, consumer) = guest(&[of(0, 0x100), slot(1, 0x1000, 64), of(2, 0x2000)]);
        log.mark_range(RAM, gfns(0x105, 40));
        log.mark(RAM, Gfn::new(0x1005));
        let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
        let (low, high) = (SlotId::new(0), SlotId::new(9));
        table
            .transaction(|tx| {
                tx.split(RAM, low, Gfn::new(0x120), high)?;
                tx.move_to(RAM, high, Gfn::new(0x9020))
            })
            .unwrap();
        table.set_flags(RAM, SlotId::new(1), SlotFlags::empty()).unwrap();
        harvest.merge_back();
        assert_eq!(take(&consumer), [(0x105, 0x1b), (0x9020, 13)], "{backing:?}");
    }
}

/// A clean log costs next to nothing, and a harvest of it, too.
#[test]
fn clean_memory_costs_nothing() {
    let (_table, log, consumer) = guest(&[slot(0, 0, 1 << 28)]);
    assert!(log.bytes() <= 1 << 20, "{} bytes for a clean TiB", log.bytes());
    log.mark_range(RAM, gfns(0, 1 << 28));
    assert!(log.bytes() <= 1 << 20, "{} bytes for a dirty TiB, marked at once", log.bytes());
    assert_eq!(take(&consumer), [(0, 1 << 28)]);
    // Harvests do not pile up memory.
    let mut before = 0;
    for round in 0..10 {
        for page in (0..1 << 20).step_by(5000) {
            log.mark(RAM, Gfn::new(page));
        }
        log.mark_range(RAM, gfns(0, 1 << 20));
        assert_eq!(take(&consumer), [(0, 1 << 20)]);
        if round == 1 {
            before = log.bytes();
        }
    }
    assert_eq!(log.bytes(), before);
}

/// A device's pages go with it, as memory does: it has a token in place of a host address.
#[test]
fn a_moved_device_keeps_its_bits() {
    let device = |id, first, token| SlotSpec { backing: Backing::Device { token }, ..slot(id, first, 100) };
    let (mut table, log, consumer) = guest(&[device(0, 0x100, 0x7000), device(1, 0x500, 1 << 40)]);
    let other = log.consumer().unwrap();
    log.mark_range(RAM, gfns(0x103, 2));
    assert_eq!(take(&other), [(0x103, 2)]);
    log.mark(RAM, Gfn::new(0x110));
    log.mark(RAM, Gfn::new(0x501));
    table.move_to(RAM, SlotId::new(0), Gfn::new(0x9000)).unwrap();
    assert_eq!(take(&consumer), [(0x501, 1), (0x9003, 2), (0x9010, 1)]);
    assert_eq!(take(&other), [(0x501, 1), (0x9010, 1)]);
}

/// Pages that start dirty: all of the slot's, and none behind its end, however it is asked for.
#[test]
fn a_slot_that_starts_dirty_has_a_clean_tail() {
    let (mut table, log, consumer) = guest(&[]);
    let mut kvm = KvmDirtyLog::new(consumer);
    kvm.enable_cap(168, 0, 3).unwrap();
    table.create(slot(0, 32768 - 7, 70)).unwrap();
    table.create(slot(1, 32768 + 63, 1)).unwrap();
    let mut words = [0xaaaa_aaaa_aaaa_aaaa; 3];
    let get = |kvm: &mut KvmDirtyLog, words: &mut [u64]| {
        kvm.get_dirty_log(0, Some(words), &mut SoftwareOnly).unwrap();
    };
    get(&mut kvm, &mut words);
    assert_eq!(words, [u64::MAX, 0x3f, 0xaaaa_aaaa_aaaa_aaaa]);
    // Bits behind the end in a mask do not reach the slot that follows.
    let clear = ClearDirtyLog { slot: 0, num_pages: 6, first_page: 64 };
    kvm.clear_dirty_log(&clear, Some(&[u64::MAX]), &mut SoftwareOnly).unwrap();
    get(&mut kvm, &mut words);
    assert_eq!(words[..2], [u64::MAX, 0]);
    kvm.get_dirty_log(1, Some(&mut words), &mut SoftwareOnly).unwrap();
    assert_eq!(words[0], 1);
    // Without manual protection, too: the harvest cuts the chunk at the slot's end.
    kvm.enable_cap(168, 0, 0).unwrap();
    get(&mut kvm, &mut words);
    assert_eq!(words[..2], [u64::MAX, 0]);
    get(&mut kvm, &mut words);
    assert_eq!(words[..2], [0, 0]);
    assert!(log.is_marked(RAM, Gfn::new(32768 + 63)));
}
