//! D8: operations that let others have their turn between two steps, run by loom.
//!
//! Whoever gives the lock back must not go on with anything it had: the tables it stood in may be gone, or be others; what it
//! has changed until then is in force for nobody yet, and others who find it changed must know that.

use loom::sync::atomic::Ordering;
use loom::thread;
use memslot::dirty::Rearm;
use memslot::{AddressSpaceId, Gfn, GfnRange, SlotFlags, SlotId};

use super::loom_tests::{Guest, Vcpu, gpa, processor_writes, range, write};
use super::operation::Work;
use super::{DirtyMode, Mmu};
use crate::format::{Access, Format};
use crate::host::Host;
use crate::level::Level;
use crate::loom_host::LoomHost;

/// Pages 0 and 1 are mapped and writable, in one table. With dirty bits, no table is copied: each page is a step.
fn guest() -> (Guest, Vcpu) {
    let guest = Guest::noticing(DirtyMode::Hardware, true, Level::K4, SlotFlags::empty());
    let mut vcpu = guest.vcpu();
    let _ = (write(&mut vcpu, 0), write(&mut vcpu, 1));
    (guest, vcpu)
}

fn is_writable(guest: &Guest, gfn: u64) -> bool {
    let mapping = guest.mmu.walker().unwrap().translate(gpa(gfn));
    mapping.is_some_and(|mapping| mapping.access.contains(Access::WRITE))
}

/// The smallest steps there are, and that each gets further.
fn in_steps<F: Format, H: Host>(mmu: &Mmu<F, H>, work: Work, gfns: GfnRange, mut between: impl FnMut()) {
    let mut operation = mmu.begin(work, gfns);
    let mut rest = operation.rest();
    while operation.step(1) {
        assert!(operation.rest().start() > rest.start(), "a step that gets nowhere");
        rest = operation.rest();
        between();
    }
    operation.finish().discharge();
}

/// Between two steps the table goes, is freed, and another one is there: the second step works on that one.
#[test]
fn loom_an_operation_that_yields_goes_on_in_the_tables_of_then() {
    for work in [Work::WriteProtect, Work::Zap] {
        loom::model(move || {
            let (guest, mut vcpu) = guest();
            let mmu = guest.mmu.clone();
            let mut other = Some(thread::spawn(move || {
                mmu.zap(range(0, 2)).discharge();
                mmu.reclaim();
                let _ = write(&mut vcpu, 1);
            }));
            // From page 1 on, for a zap of a table as a whole would be one step.
            let gfns = if work == Work::Zap { range(1, 3) } else { range(0, 2) };
            let mut joined_at = None;
            let mut steps = 0;
            in_steps(&guest.mmu, work, gfns, || {
                steps += 1;
                if let Some(other) = other.take() {
                    other.join().unwrap();
                    joined_at = Some(steps);
                }
            });
            if let Some(other) = other.take() {
                // It was over in one step: the table was gone then.
                other.join().unwrap();
            } else if work == Work::WriteProtect {
                assert!(!is_writable(&guest, 1), "what was there when the second step began is protected");
            }
            guest.mmu.zap(range(0, 4)).discharge();
            guest.mmu.reclaim();
            assert_eq!(guest.mmu.stats().tables, 1, "nothing is leaked");
        });
    }
}

/// The same with another operation and a fault at any time: tables are freed while nobody is inside, and pages that are
/// not faulted in again are gone or protected.
#[test]
fn loom_an_operation_that_yields_beside_one_that_frees_its_table() {
    for work in [Work::WriteProtect, Work::ClearDirty] {
        loom::model(move || {
            let (guest, mut vcpu) = guest();
            let mmu = guest.mmu.clone();
            let other = thread::spawn(move || {
                mmu.zap(range(0, 2)).discharge();
                let _ = write(&mut vcpu, 0);
                mmu.reclaim();
            });
            in_steps(&guest.mmu, work, range(0, 2), || ());
            other.join().unwrap();
            assert!(!is_writable(&guest, 1));
            assert!(guest.mmu.walker().unwrap().translate(gpa(1)).is_none(), "the zap came to it");
        });
    }
}

/// What a step has changed is not in force yet when the lock is given back; another operation that finds nothing to
/// change there must flush all the same before it says that nobody writes. And no step skips what it ended at.
#[test]
fn loom_what_a_step_has_not_flushed_another_operation_does() {
    // A zap of a table as a whole would be one step, so it begins in the middle.
    for (work, first, pages) in [(Work::WriteProtect, 0, 2), (Work::Zap, 1, 3)] {
        loom::model(move || {
            let (guest, mut vcpu) = guest();
            let host = guest.host.clone();
            let other = thread::spawn(move || {
                let _uses_translation = host.0.processor.lock().unwrap();
                let mapping = vcpu.translate(gpa(first));
                if mapping.is_some_and(|mapping| mapping.access.contains(Access::WRITE)) {
                    host.0.contents.store(1, Ordering::Relaxed);
                }
            });
            let mut contents = None;
            in_steps(&guest.mmu, work, range(first, pages), || {
                guest.mmu.write_protect(range(first, 1)).discharge();
                contents = Some(guest.host.0.contents.load(Ordering::Relaxed));
            });
            other.join().unwrap();
            let contents = contents.expect("there is a step behind that of the first page");
            assert_eq!(
                contents,
                guest.host.0.contents.load(Ordering::Relaxed),
                "written through what was protected"
            );
            assert!((first..2).all(|gfn| !is_writable(&guest, gfn)), "a step that skips something");
        });
    }
}

/// D4, of a whole table, which a harvest protects by a copy: a write that goes into the old one is in the next harvest.
#[test]
fn loom_a_write_beside_a_harvest_that_copies_its_table() {
    loom::model(|| {
        let guest = Guest::new(true, Level::K4, SlotFlags::LOG_DIRTY_PAGES);
        let consumer = guest.log.as_ref().unwrap().consumer().unwrap();
        let mut vcpu = guest.vcpu();
        let _ = write(&mut vcpu, 1);
        processor_writes(&mut vcpu, &guest.host, 1);
        let host = guest.host.clone();
        let other = thread::spawn(move || processor_writes(&mut vcpu, &host, 2));
        let mut rearm = guest.mmu.dirty_rearm().unwrap();
        let mut copy = || {
            let harvest = rearm.harvest(&consumer).unwrap();
            let copy = harvest.runs().find(|run| run.gfns.contains(Gfn::new(0)));
            let copy = copy.map(|_| guest.host.0.contents.load(Ordering::Relaxed));
            harvest.commit();
            copy
        };
        let first = copy();
        other.join().unwrap();
        let second = copy();
        assert_eq!(second.or(first), Some(2), "first {first:?}, second {second:?}");
    });
}

/// Whether a processor may write page 0, and writes.
fn processor_may_write(vcpu: &mut Vcpu, host: &LoomHost) -> bool {
    let _uses_translation = host.0.processor.lock().unwrap();
    let mapping = vcpu.translate(gpa(0));
    let may_write = mapping.is_some_and(|mapping| mapping.access.contains(Access::WRITE));
    if may_write {
        host.0.contents.store(1, Ordering::Relaxed);
    }
    may_write
}

/// A harvest takes write access away, and flushes later: who protects the same page meanwhile finds nothing to take, and pays.
#[test]
fn loom_write_protection_beside_a_harvest() {
    loom::model(|| {
        let guest = Guest::new(true, Level::K4, SlotFlags::LOG_DIRTY_PAGES);
        let mut vcpu = guest.vcpu();
        let _ = write(&mut vcpu, 0);
        let mut rearm = guest.mmu.dirty_rearm().unwrap();
        let harvest = thread::spawn(move || {
            rearm.rearm(AddressSpaceId::NORMAL, range(0, 1)).unwrap();
            rearm.flush().unwrap();
        });
        let host = guest.host.clone();
        let processor = thread::spawn(move || processor_may_write(&mut vcpu, &host));
        guest.mmu.write_protect(range(0, 1)).discharge();
        let found = guest.host.0.contents.load(Ordering::Relaxed);
        let _ = processor.join().unwrap();
        assert_eq!(found, guest.host.0.contents.load(Ordering::Relaxed), "nobody writes any more");
        harvest.join().unwrap();
    });
}

/// A fault grants write access, and marks behind that. Who writes in between is in the log, also where the memory moves and the
/// tables have followed before the mark.
#[test]
fn loom_a_page_that_was_just_granted_moves() {
    loom::model(|| {
        let guest = Guest::new(true, Level::K4, SlotFlags::LOG_DIRTY_PAGES);
        let (host, log) = (guest.host.clone(), guest.log.clone());
        let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
        let _ = a.fault(gpa(0), Access::READ).unwrap();
        let mut table = guest.table;
        let fault = thread::spawn(move || _ = write(&mut a, 0));
        let changes = thread::spawn(move || {
            let was_written = processor_may_write(&mut b, &host);
            table.move_to(AddressSpaceId::NORMAL, SlotId::new(0), Gfn::new(2)).unwrap();
            (was_written, table)
        });
        fault.join().unwrap();
        let (was_written, _table) = changes.join().unwrap();
        let is_marked = log.unwrap().is_marked(AddressSpaceId::NORMAL, Gfn::new(2));
        assert!(!was_written || is_marked);
    });
}
