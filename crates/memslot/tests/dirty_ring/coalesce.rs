//! What a reset makes of the entries, against a naive reading of KVM's rule, also with entries that nobody would write.

use super::*;

/// What KVM's coalescing makes of pages, said naively: a window is a set of pages, none 64 from another.
fn naive_calls(pages: &[u64]) -> Vec<(u8, u64, u64)> {
    let mut windows: Vec<BTreeSet<u64>> = Vec::new();
    for &page in pages {
        let fits = |window: &&mut BTreeSet<u64>| window.iter().all(|other| other.abs_diff(page) < 64);
        match windows.last_mut().filter(fits) {
            Some(window) => drop(window.insert(page)),
            None => windows.push(BTreeSet::from([page])),
        }
    }
    let mut calls: Vec<(u8, u64, u64)> = Vec::new();
    for window in windows {
        let mut first = true;
        for gfn in window.iter().map(|page| BASE + page) {
            match calls.last_mut() {
                Some((_, _, end)) if !first && *end == gfn && gfn % 32768 != 0 => *end += 1,
                _ => calls.push((0, gfn, gfn + 1)),
            }
            first = false;
        }
    }
    calls
}

/// Pages as guests write them: runs up and down, and jumps.
fn walks() -> impl Strategy<Value = Vec<u64>> {
    let step = prop_oneof![4 => Just(1i64), 2 => Just(-1), 2 => -70..70i64, 1 => -5000..5000i64];
    (0..0x1000i64, prop::collection::vec(step, 0..ENTRIES as usize)).prop_map(|(start, steps)| {
        let at = steps.iter().scan(start, |at, step| {
            *at = (*at + step).rem_euclid(0x1_0000);
            Some(u64::try_from(*at).unwrap())
        });
        at.collect()
    })
}

proptest! {
    #![proptest_config(memslot_testing::proptest_config(256))]

    #[test]
    fn pages_are_coalesced_as_kvm_does(pages in walks(), read in 0..300usize) {
        let table = table();
        let (mut ring, mut reader) = ring();
        pages.iter().for_each(|&page| push(&mut ring, slot(&table, 0), page));
        let read = reader.collect().take(read).count();
        let mut mmu = Recording::default();
        let reset = ring.reset(table.view(), &mut mmu, || false).unwrap();
        prop_assert_eq!((reset.entries, reset.rearmed, reset.stale), (read, read, 0));
        prop_assert_eq!(&mmu.calls, &naive_calls(&pages[..read]));
        prop_assert_eq!(mmu.flushed(), gfns(&pages[..read]));
    }

    #[test]
    fn any_bytes_are_survived(
        words in prop::collection::vec((0..8u32, any::<u32>(), any::<u64>()), ENTRIES as usize),
        pages in prop::collection::vec(0..0x1_0000u64, 0..ENTRIES as usize),
        scribble_first: bool,
    ) {
        let table = table();
        let (mut ring, mut reader) = ring();
        let scribble = |memory: &Memory| for (entry, &(flags, slot, offset)) in memory.iter().zip(&words) {
            entry.flags.store(flags, Ordering::Relaxed);
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(offset, Ordering::Relaxed);
        };
        if scribble_first {
            scribble(ring.memory());
        }
        pages.iter().for_each(|&page| push(&mut ring, slot(&table, 0), page));
        scribble(ring.memory());
        // Up to the first entry that does not have RESET, and never beyond what was pushed.
        let marked = words.iter().take(pages.len()).take_while(|(flags, ..)| flags & RESET != 0).count();
        let mut mmu = Recording::default();
        let reset = ring.reset(table.view(), &mut mmu, || false).unwrap();
        prop_assert_eq!((reset.entries, reset.rearmed, reset.stale), (marked, marked, 0));
        prop_assert_eq!(mmu.flushed(), gfns(&pages[..marked]));
        scribble(ring.memory());
        let dirty = words.iter().take_while(|(flags, ..)| flags & (DIRTY | RESET) == DIRTY).count();
        let mut found = 0;
        for (page, &(_, slot, offset)) in reader.collect().zip(&words) {
            prop_assert_eq!(u32::from(page.address_space) << 16 | page.slot.get(), slot);
            prop_assert_eq!(page.offset, offset);
            if let Some((space, gfn)) = page.gfn(table.view()) {
                prop_assert!(table.view().slot_at(space, gfn).is_some());
            }
            found += 1;
        }
        prop_assert_eq!(found, dirty);
    }
}
