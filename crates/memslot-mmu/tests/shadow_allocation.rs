//! Shadow tables without memory: each allocation fails once, nothing has changed then that the tables' own check or a
//! later attempt would notice, and nothing is leaked.
#![cfg(not(loom))]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use memslot::dirty::DirtyLog;
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, HvaRange, Limits, SlotFlags, SlotId, SlotSpec, SlotTable,
};
use memslot_mmu::shadow::guest::{GuestAccess, GuestPaging, Processor, Registers};
use memslot_mmu::shadow::{Shadow, ShadowConfig, ShadowFault, SlotSet, SlotSetCache};
use memslot_mmu::user::UserHost;
use memslot_testing::{Failing, bytes, failing};

#[global_allocator]
static ALLOCATOR: Failing = Failing;

/// Tries with ever more allocations allowed, until it works; `failed` sees what each failure has left.
fn until_it_works<C, T, E>(
    context: &mut C,
    mut work: impl FnMut(&mut C) -> Result<T, E>,
    mut failed: impl FnMut(&mut C),
) -> (T, i64) {
    for allowed in 0..10_000 {
        let result = failing(allowed, || work(context));
        match result {
            Ok(result) => return (result, allowed),
            Err(_) => failed(context),
        }
    }
    panic!("no number of allocations is enough");
}

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
const HVA: u64 = 0x7f00_0000_0000;

fn slot(id: u32, first: u64, pages: u64) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(first), pages).unwrap(),
        backing: Backing::Host { hva: Hva::new(HVA + (first << 12)) },
        flags: SlotFlags::LOG_DIRTY_PAGES,
    }
}

#[test]
fn each_allocation_fails_once() {
    let start = bytes();
    {
        let host = Arc::new(UserHost::with_memory(Hva::new(HVA), 64));
        let set =
            |table: usize, index: usize, entry| host.memory()[table].0[index].store(entry, Ordering::SeqCst);
        // Root 1, then 2, 3, 4, and pages from 32 on; all levels through the entries 0 and 3.
        for (table, next) in [(1, 2), (2, 3), (3, 4)] {
            set(table, 0, next << 12 | 0x27);
            set(table, 3, next << 12 | 0x27);
        }
        for index in 0..16 {
            set(4, index, (32 + index as u64) << 12 | 0x27);
        }
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let config = ShadowConfig { log: Some(log.clone()), ..ShadowConfig::default() };
        let (shadow, failed) = until_it_works(
            &mut (&mut table, vec![Some((host.clone(), config)); 64]),
            |(table, arguments)| {
                let (host, config) =
                    arguments.iter_mut().find_map(Option::take).expect("64 allocations are enough");
                Shadow::attach(table, host, config)
            },
            |_| (),
        );
        assert!(failed > 5, "{failed}");

        // A listener's failure is the transaction's: no slot is there, and the next attempt finds nothing in the way.
        let create = |table: &mut SlotTable| table.create(slot(0, 0, 48));
        let (_, failed) = until_it_works(&mut table, create, |table| {
            assert!(table.view().slot(RAM, SlotId::new(0)).is_none());
            shadow.check().unwrap();
        });
        assert!(failed > 0);

        let (mut vcpu, _) = until_it_works(&mut (), |()| shadow.vcpu(), |()| ());
        let registers = Registers { cr0: 0x8001_0011, cr3: 0x1000, cr4: 0x20, efer: 0xd00 };
        let paging = GuestPaging::new(registers, Processor::default());
        let (_, failed) = until_it_works(
            &mut vcpu,
            |vcpu| vcpu.load(paging, RAM),
            |vcpu| {
                assert_eq!(vcpu.root(), None, "nothing was loaded before");
                shadow.check().unwrap();
            },
        );
        assert!(failed > 0);

        let mut failures = 0;
        for path in 0..16u64 {
            let at = |level: u64| if path >> level & 1 == 0 { 0 } else { 3 };
            let base = at(0) << 39 | at(1) << 30 | at(2) << 21;
            for page in 0..16 {
                let access = if page % 2 == 0 { GuestAccess::WRITE } else { GuestAccess::READ };
                let va = base | page << 12;
                let (fault, failed) =
                    until_it_works(&mut vcpu, |vcpu| vcpu.fault(va, access), |_| shadow.check().unwrap());
                assert!(matches!(fault, ShadowFault::Mapped(_) | ShadowFault::AlreadyMapped), "{fault:?}");
                failures += failed;
            }
        }
        assert!(failures > 0);

        let consumer = log.consumer().unwrap();
        let (mut rearm, failed) = until_it_works(&mut (), |()| shadow.dirty_rearm(), |()| ());
        assert!(failed > 0);
        consumer.harvest(&mut rearm).unwrap().commit();
        let (mut ager, failed) = until_it_works(&mut (), |()| shadow.ager(), |()| ());
        assert!(failed > 0);
        ager.age(RAM, GfnRange::with_len(Gfn::new(0), 48).unwrap());

        let all = HvaRange::with_len(Hva::new(HVA), 64 << 12).unwrap();
        let mut leaves = shadow.stats().leaves;
        let (invalidation, failed) = until_it_works(
            &mut leaves,
            |_| shadow.invalidate_hva(all),
            |leaves| assert_eq!(shadow.stats().leaves, *leaves, "nothing was invalidated"),
        );
        assert!(failed > 0);
        invalidation.end();
        assert_eq!(shadow.stats().leaves, 0);

        // Changes of slots that something is mapped in. What fails changes nothing.
        let _ = vcpu.fault(0, GuestAccess::WRITE).unwrap();
        let (_, failed) = until_it_works(
            &mut table,
            |table| table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(40), SlotId::new(1))),
            |_| shadow.check().unwrap(),
        );
        assert!(failed > 0);
        // With an id for which the pages' sets of slots need memory. What is mapped stays, whether it works or not.
        let leaves = shadow.stats().leaves;
        assert!(leaves > 0);
        for (at, new) in [(36, 100), (34, 200), (33, 300)] {
            let (_, failed) = until_it_works(
                &mut table,
                |table| table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(at), SlotId::new(new))),
                |_| shadow.check().unwrap(),
            );
            assert!(failed > 0);
            assert_eq!(shadow.stats().leaves, leaves);
        }
        for new in [300, 200, 100] {
            until_it_works(
                &mut table,
                |table| table.transaction(|tx| tx.merge(RAM, SlotId::new(0), SlotId::new(new))),
                |_| shadow.check().unwrap(),
            );
            assert_eq!(shadow.stats().leaves, leaves);
        }
        until_it_works(
            &mut table,
            |table| table.delete(RAM, SlotId::new(1)),
            |table| assert!(table.view().slot(RAM, SlotId::new(1)).is_some()),
        );
        shadow.check().unwrap();
        // Giving up and writing allocate nothing.
        failing(0, || {
            shadow.unprotect(Gfn::new(4));
            shadow.zap_gfn_range(RAM, GfnRange::with_len(Gfn::new(0), 48).unwrap());
            shadow.zap_all();
            vcpu.invlpg(0);
            vcpu.flush_guest();
        });
        shadow.check().unwrap();
    }
    assert_eq!(bytes(), start, "leaked");
}

#[test]
fn sets_of_slots_ask_for_memory_only_when_they_are_told_to() {
    let start = bytes();
    {
        let mut cache = SlotSetCache::default();
        let ((), failed) = until_it_works(&mut cache, |cache| cache.top_up(10), |_| ());
        assert!(failed > 0 && cache.len() == 10);
        let mut set = SlotSet::default();
        failing(0, || {
            for id in 0..41 {
                assert_eq!(set.insert(SlotId::new(id * 64), &mut cache), Ok(true));
            }
            assert!(cache.is_empty());
            assert!(set.insert(SlotId::new(41 * 64), &mut cache).is_err());
            for id in 0..41 {
                assert!(set.remove(SlotId::new(id * 64), &mut cache));
            }
        });
        assert_eq!((set.is_inline(), cache.len()), (true, 10));
        for id in 0..30 {
            set.insert(SlotId::new(id * 64), &mut cache).unwrap();
        }
    }
    assert_eq!(bytes(), start, "leaked");
}
