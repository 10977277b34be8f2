//! The reverse map without memory: each allocation fails once, nothing has changed then, and nothing is leaked.
//! And adding, removing and walking allocate nothing at all.

use std::num::NonZeroU64;

use memslot::{Gfn, GfnRange};
use memslot_mmu::Level;
use memslot_mmu::rmap::{Filed, Rmap, RmapError};
use memslot_testing::{Failing, bytes, failing};

#[global_allocator]
static ALLOCATOR: Failing = Failing;

/// Tries with ever more allocations allowed, until it works; how many attempts had failed.
fn until_it_works<T>(mut work: impl FnMut() -> Result<T, RmapError>) -> (T, i64) {
    for allowed in 0.. {
        match failing(allowed, &mut work) {
            Ok(result) => return (result, allowed),
            Err(error) => assert_eq!(error, RmapError::OutOfMemory),
        }
    }
    unreachable!("some number is enough")
}

fn entry(number: u64) -> NonZeroU64 {
    NonZeroU64::new((number + 1) << 3).unwrap()
}

#[test]
fn each_allocation_fails_once() {
    let start = bytes();
    {
        let ((rmap, mut writer), failed) = until_it_works(Rmap::<NonZeroU64>::new);
        assert!(failed > 0);
        let gfns = GfnRange::with_len(Gfn::new(0x10), 1 << 20).unwrap();
        let (slot, failed) = until_it_works(|| rmap.slot(gfns, Level::G1));
        assert!(failed > 0);
        for (level, gfn) in
            [(Level::K4, 0x10), (Level::K4, 0x8_0000), (Level::M2, 0x400), (Level::G1, 0x4_0000)]
        {
            let gfn = Gfn::new(gfn);
            let before = rmap.bytes();
            assert_eq!(failing(0, || slot.reserve(level, gfn).err()), Some(RmapError::OutOfMemory));
            assert!(slot.list(level, gfn).is_none());
            let (_, failed) = until_it_works(|| slot.reserve(level, gfn));
            assert!(failed > 0 && rmap.bytes() > before);
            // What is there needs no memory.
            assert!(failing(0, || slot.reserve(level, gfn).is_ok()));
        }
        let (parents, failed) = until_it_works(|| rmap.parents());
        assert!(failed > 0);
        let mut cache = rmap.cache();
        let ((), failed) = until_it_works(|| cache.reserve(500));
        assert!(failed > 0 && cache.len() == 500);
        assert_eq!(failing(0, || cache.reserve(500)), Ok(()));
        assert_eq!(failing(0, || cache.reserve(5000)), Err(RmapError::OutOfMemory));
        assert_eq!(writer.add(parents.list(), entry(0), &mut cache, |_, _| ()), Ok(0));
    }
    assert_eq!(bytes(), start, "leaked");
}

/// Under the lock, nothing asks for memory: whatever is needed was reserved.
#[test]
fn changes_and_walks_allocate_nothing() {
    let start = bytes();
    {
        let (rmap, mut writer) = Rmap::<NonZeroU64>::new().unwrap();
        let slot = rmap.slot(GfnRange::with_len(Gfn::new(0), 64).unwrap(), Level::K4).unwrap();
        let lists: Vec<_> = (0..4).map(|gfn| slot.reserve(Level::K4, Gfn::new(gfn)).unwrap()).collect();
        let (mut cache, mut walker) = (rmap.cache(), rmap.walker().unwrap());
        cache.reserve(4 * 80).unwrap();
        let mut records = vec![0; 4 * 1000];
        let place = |entry: NonZeroU64| usize::try_from(entry.get() >> 3).unwrap() - 1;
        failing(0, || {
            for round in 0..3u64 {
                for number in 0..4000u64 {
                    let list = lists[usize::try_from(number % 4).unwrap()];
                    let keep = |entry, filed: Filed| records[place(entry)] = filed.into_bits();
                    assert!(writer.add(list, entry(number), &mut cache, keep).is_ok());
                }
                assert_eq!(walker.enter().entries(lists[0]).count(), 1000);
                for step in 0..4000u64 {
                    let number = (step * 1237 + round) % 4000;
                    let filed = Filed::from_bits(records[place(entry(number))]).unwrap();
                    let keep = |entry, filed: Filed| records[place(entry)] = filed.into_bits();
                    assert!(writer.remove(filed, entry(number), keep).is_ok());
                }
                // What has left is there again for the next round: some with the writer, the rest for caches.
                assert!(writer.reclaim(1));
                assert_eq!(cache.reserve(80), Ok(()));
            }
        });
        assert!(lists.iter().all(|list| list.is_empty()));
    }
    assert_eq!(bytes(), start, "leaked");
}

/// Threads that walk come and go: nothing of them stays, and nobody waits for those that are gone.
#[test]
fn walkers_come_and_go() {
    let (rmap, mut writer) = Rmap::<NonZeroU64>::new().unwrap();
    drop([rmap.walker().unwrap(), rmap.walker().unwrap()]);
    let start = bytes();
    for _ in 0..100 {
        let mut walkers = [rmap.walker().unwrap(), rmap.walker().unwrap()];
        drop(walkers.each_mut().map(|walker| walker.enter()));
    }
    assert_eq!(bytes(), start, "leaked");
    assert!(writer.reclaim(1));
}

/// An empty cache is an error, and nothing has changed.
#[test]
fn nothing_is_reserved() {
    let (rmap, mut writer) = Rmap::<NonZeroU64>::new().unwrap();
    let (mut cache, parents) = (rmap.cache(), rmap.parents().unwrap());
    let list = parents.list();
    assert_eq!(writer.add(list, entry(0), &mut cache, |_, _| ()), Ok(0));
    for _ in 0..3 {
        let added = writer.add(list, entry(1), &mut cache, |_, _| unreachable!("no record changes"));
        assert_eq!(added, Err(RmapError::NotReserved));
        assert_eq!(writer.entries(list).collect::<Vec<_>>(), [entry(0)]);
    }
    cache.reserve(1).unwrap();
    for number in 1..14 {
        assert_eq!(
            writer.add(list, entry(number), &mut cache, |_, _| ()),
            Ok(usize::try_from(number).unwrap())
        );
    }
    let added = writer.add(list, entry(14), &mut cache, |_, _| unreachable!("no record changes"));
    assert_eq!(added, Err(RmapError::NotReserved));
    assert_eq!(writer.count(list), 14);
}
