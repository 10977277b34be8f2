//! What processors write until a page is unmapped is never lost: it is harvested, or handed over with the slot that it
//! was written to.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use memslot::dirty::{Consumer, Removed, SoftwareOnly};
use memslot::{Gfn, GfnRange, Gpa, Listener, ListenerError, SlotId, SlotTable, Update};
use memslot_mmu::format::{Access, Format};
use memslot_mmu::{Config, DirtyMode};

for_every_format! {
    what_the_processor_wrote_is_not_lost_when_it_is_zapped
    what_was_zapped_and_not_flushed_is_harvested
    what_was_zapped_and_not_flushed_goes_with_its_slot
    what_was_written_to_a_deleted_slot_is_handed_over
    what_was_written_between_publication_and_zap_is_handed_over
    what_was_written_to_a_slot_is_dirty_when_its_deletion_is_taken_back
}

fn what_the_processor_wrote_is_not_lost_when_it_is_zapped<F: Format>(dirty: DirtyMode) {
    if dirty == DirtyMode::WriteProtect {
        return;
    }
    // One by one, a whole table, all; by hand and by an invalidation.
    for gfns in [range(5, 1), range(0, 300), range(0, 512), range(0, 1 << 20)] {
        for by_hva in [false, true] {
            let mut guest = Guest::<F>::new(dirty);
            guest.create(0, 0, 2048, HVA, LOG);
            let _ = guest.vcpu.prefault(range(0, 2048), usize::MAX).unwrap();
            assert!(guest.processor_writes(5) && guest.processor_writes(700));
            if by_hva {
                guest.mmu.invalidate_hva(hvas(HVA, gfns.len() << 12)).unwrap().end();
            } else {
                guest.mmu.zap(gfns).discharge();
            }
            assert_eq!(guest.harvest(), [5, 700], "{gfns}");
        }
    }
}

/// Frames 0 to 2047 in small pages, of which some were written; all but the first 512 are zapped, and not flushed.
fn with_a_flush_owed<F: Format>(
    dirty: DirtyMode,
    work: impl FnOnce(&mut Guest<F>, &mut dyn FnMut(&mut Guest<F>)),
) {
    let mut guest = Guest::<F>::new(dirty);
    guest.create(0, 0, 2048, HVA, LOG);
    let _ = guest.vcpu.prefault(range(0, 2048), usize::MAX).unwrap();
    for gfn in [5, 700, 2047] {
        let _ = guest.write(gfn);
        assert!(guest.processor_writes(gfn));
        guest.host.touch(&guest.mmu, gfn);
    }
    let mmu = guest.mmu.clone();
    let mut owed = Some(mmu.zap(range(512, 1 << 20)));
    work(&mut guest, &mut |_| owed.take().unwrap().discharge());
}

fn what_was_zapped_and_not_flushed_is_harvested<F: Format>(dirty: DirtyMode) {
    with_a_flush_owed::<F>(dirty, |guest, discharge| {
        // Whoever copies the memory now, with all processors stopped, must hear of every page.
        assert_eq!(guest.harvest(), [5, 700, 2047]);
        assert_eq!(guest.host.stale(&guest.mmu, range(700, 1)), [], "and of the next write to it");
        discharge(guest);
        assert!(guest.harvest().iter().all(|gfn| [700, 2047].contains(gfn)), "again at most");
        assert_eq!(guest.harvest(), []);
    });
}

fn what_was_zapped_and_not_flushed_goes_with_its_slot<F: Format>(dirty: DirtyMode) {
    with_a_flush_owed::<F>(dirty, |guest, discharge| {
        let other = GfnRange::with_len(Gfn::new(0), 2048).unwrap();
        guest.table.move_to(RAM, SlotId::new(0), Gfn::new(4096)).unwrap();
        assert_eq!(guest.host.stale(&guest.mmu, other), []);
        assert_eq!(guest.harvest(), [4096 + 5, 4096 + 700, 4096 + 2047]);
        discharge(guest);
        assert_eq!(guest.harvest(), []);
    });
    for replaced in [false, true] {
        with_a_flush_owed::<F>(dirty, |guest, discharge| {
            let keeper = guest.log.consumer_keeping_removed().unwrap();
            drop(keeper.harvest(&mut SoftwareOnly).unwrap());
            let change = guest.table.transaction(|tx| {
                tx.delete(RAM, SlotId::new(0))?;
                if replaced {
                    tx.create(spec(1, 0, 2048, HVA + (1 << 30), LOG))?;
                }
                Ok(())
            });
            change.unwrap();
            assert_eq!(removed(&keeper), [5, 700, 2047]);
            discharge(guest);
        });
    }
}

fn removed(consumer: &Consumer) -> Vec<u64> {
    let removed = consumer.take_removed().unwrap();
    let runs = removed.iter().flat_map(Removed::runs);
    runs.flat_map(|gfns| gfns.start().get()..gfns.end().get()).collect()
}

fn what_was_written_to_a_deleted_slot_is_handed_over<F: Format>(dirty: DirtyMode) {
    for (keeps, replaced) in [(true, false), (true, true), (false, false)] {
        let mut guest = Guest::<F>::new(dirty);
        let keeper = if keeps { guest.log.consumer_keeping_removed() } else { guest.log.consumer() }.unwrap();
        guest.create(0, 0, 2048, HVA, LOG);
        let _ = guest.vcpu.prefault(range(0, 2048), usize::MAX).unwrap();
        for gfn in [5, 700, 2047] {
            let _ = guest.write(gfn);
            assert!(guest.processor_writes(gfn));
        }
        guest.harvest();
        drop(keeper.harvest(&mut SoftwareOnly).unwrap());
        keeper.harvest(&mut SoftwareOnly).unwrap().commit();
        for gfn in [6, 1500] {
            let _ = guest.write(gfn);
            assert!(guest.processor_writes(gfn));
        }
        if replaced {
            let change = guest.table.transaction(|tx| {
                tx.delete(RAM, SlotId::new(0))?;
                tx.create(spec(1, 0, 2048, HVA + (1 << 30), LOG))
            });
            change.unwrap();
        } else {
            guest.table.delete(RAM, SlotId::new(0)).unwrap();
        }
        assert_eq!(removed(&keeper), if keeps { vec![6, 1500] } else { vec![] });
        if replaced {
            continue;
        }
        // Another slot there is clean.
        guest.create(1, 0, 2048, HVA + (1 << 30), LOG);
        assert_eq!((guest.harvest(), removed(&keeper)), (vec![], vec![]));
    }
}

/// Runs something when a change is committed: behind the dirty log, and before the tables.
struct Between(Arc<Mutex<Option<InCommit>>>);

type InCommit = Box<dyn FnMut() + Send>;

impl Listener for Between {
    fn name(&self) -> &str {
        "between"
    }
    fn prepare(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        Ok(())
    }
    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if let Some(hook) = &mut *self.0.lock().unwrap() {
            hook();
        }
        Ok(())
    }
    fn undo(&mut self, _: &Update<'_>) {}
}

fn what_was_written_between_publication_and_zap_is_handed_over<F: Format>(dirty: DirtyMode) {
    // Alone, and with another consumer that harvests at just that time.
    for harvests in [false, true] {
        let mut table = SlotTable::new(memslot::Limits::default()).unwrap();
        let log = memslot::dirty::DirtyLog::attach(&mut table).unwrap();
        let hook = Arc::new(Mutex::new(None));
        table.add_listener(Box::new(Between(hook.clone()))).unwrap();
        let host = TestHost::default();
        let config = Config { dirty, log: Some(log.clone()), ..Config::default() };
        let mmu = memslot_mmu::Mmu::<F, _>::attach(&mut table, host.clone(), config).unwrap();
        table.create(spec(0, 0, 64, HVA, LOG)).unwrap();
        let (keeper, other) = (log.consumer_keeping_removed().unwrap(), log.consumer().unwrap());
        let mut vcpu = mmu.walker().unwrap();
        let _ = vcpu.fault(Gpa::new(0x9000), Access::WRITE).unwrap();
        let (inner, log) = (mmu.clone(), log.clone());
        *hook.lock().unwrap() = Some(Box::new(move || {
            // The slot is gone for everybody who looks now, and the processors go on.
            let _ = vcpu.fault(Gpa::new(0x5000), Access::WRITE).unwrap();
            assert!(processor(&inner, 5, true) && processor(&inner, 9, true));
            assert!(dirty == DirtyMode::Hardware || log.is_marked(RAM, Gfn::new(5)));
            if harvests {
                let mut rearm = inner.dirty_rearm().unwrap();
                rearm.harvest(&other).unwrap().commit();
            }
        }) as InCommit);
        table.delete(RAM, SlotId::new(0)).unwrap();
        let mut found = removed(&keeper);
        found.sort_unstable();
        found.dedup();
        assert_eq!(found, [5, 9], "{harvests}");
        *hook.lock().unwrap() = None;
    }
}

/// A listener that refuses a change.
struct Refuses;

impl Listener for Refuses {
    fn name(&self) -> &str {
        "refuses"
    }
    fn prepare(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        Ok(())
    }
    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        Err(Box::new(std::fmt::Error))
    }
    fn undo(&mut self, _: &Update<'_>) {}
}

fn what_was_written_to_a_slot_is_dirty_when_its_deletion_is_taken_back<F: Format>(dirty: DirtyMode) {
    for keeps in [false, true] {
        let mut guest = Guest::<F>::new(dirty);
        let keeper = keeps.then(|| guest.log.consumer_keeping_removed().unwrap());
        guest.create(0, 0, 2048, HVA, LOG);
        let _ = guest.vcpu.prefault(range(0, 2048), usize::MAX).unwrap();
        for gfn in [5, 700] {
            let _ = guest.write(gfn);
            assert!(guest.processor_writes(gfn));
        }
        guest.table.add_listener(Box::new(Refuses)).unwrap();
        assert!(guest.table.delete(RAM, SlotId::new(0)).is_err());
        assert!(keeper.is_none_or(|keeper| removed(&keeper).is_empty()));
        let harvest = guest.harvest();
        assert!(harvest.contains(&5) && harvest.contains(&700), "{harvest:?}");
    }
}
