//! A discard in every kind: the bytes are zero, and the host has its memory back.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod common;

use common::{MIB, PAGE, all, file, fill, get, set, stored, vm_flags};
use memslot::{AddressSpaceId, Gfn, GfnRange, Limits, SlotId, SlotTable};
use memslot_backing::{Backings, HugePage, Memory, MemoryError, Sharing};

const BYTES: u64 = 4 * MIB;

/// Fills, discards the second MiB, and looks.
fn discards(memory: &Memory) {
    fill(memory, 0..BYTES, 0xab);
    assert_eq!(memory.resident(..).unwrap(), BYTES);
    memory.discard(MIB..2 * MIB).unwrap();
    assert_eq!(memory.resident(MIB..2 * MIB).unwrap(), 0, "{memory:?}");
    assert_eq!(memory.resident(..).unwrap(), 3 * MIB, "{memory:?}: the rest stays");
    assert_eq!(all(memory, 0..MIB), Some(0xab));
    assert_eq!(all(memory, MIB..2 * MIB), Some(0), "{memory:?}");
    assert_eq!(all(memory, 2 * MIB..BYTES), Some(0xab));
    set(memory, MIB + 5, 1);
    assert_eq!((get(memory, MIB + 5), get(memory, MIB + 4)), (1, 0), "usable again");
}

#[test]
fn anonymous() {
    discards(&Memory::anonymous(BYTES).huge_pages(false).map().unwrap());
}

#[test]
fn anonymous_in_huge_pages() {
    let memory = Memory::anonymous(BYTES).huge_pages(true).map().unwrap();
    fill(&memory, 0..BYTES, 0xab);
    memory.discard(MIB..2 * MIB).unwrap();
    assert_eq!(all(&memory, MIB..2 * MIB), Some(0));
    assert_eq!(all(&memory, 0..MIB), Some(0xab));
}

#[test]
fn memfd() {
    let memory = Memory::memfd("discard", BYTES).map().unwrap();
    let (fd, _) = memory.file_offset().unwrap();
    let other = Memory::file(fd.try_clone_to_owned().unwrap(), 0, BYTES, Sharing::Shared).map().unwrap();
    fill(&memory, 0..BYTES, 0xcd);
    assert_eq!(stored(fd), BYTES);
    discards(&memory);
    memory.discard(MIB..2 * MIB).unwrap();
    assert_eq!(stored(fd), 3 * MIB, "the file is smaller by what was discarded");
    assert_eq!(all(&other, MIB..2 * MIB), Some(0), "for everybody");
    other.discard(..).unwrap();
    assert_eq!((stored(fd), all(&memory, 0..BYTES)), (0, Some(0)));
}

#[test]
fn shared_file_from_an_offset_on() {
    let source = file(&vec![0x11; 6 << 20]);
    let memory = Memory::file(source.try_clone().unwrap(), MIB, BYTES, Sharing::Shared).map().unwrap();
    source.sync_all().unwrap();
    let before = stored(&source);
    if let Err(MemoryError::Unsupported { instead, .. }) = memory.discard(MIB..2 * MIB) {
        return memslot_testing::skipped(&format!("discard of a shared file: {instead}"));
    }
    source.sync_all().unwrap();
    assert_eq!(before - stored(&source), MIB, "blocks are freed");
    discards(&memory);
    let mut bytes = [0; 2];
    for (at, want) in [
        (MIB - 1, [0x11, 0xab]),
        (2 * MIB - 1, [0xab, 0]),
        (3 * MIB - 1, [0, 0xab]),
        (5 * MIB - 1, [0xab, 0x11]),
    ] {
        std::os::unix::fs::FileExt::read_exact_at(&source, &mut bytes, at).unwrap();
        assert_eq!(bytes, want, "the file at {at:#x}");
    }
    assert_eq!(source.metadata().unwrap().len(), 6 * MIB, "the file keeps its length");
}

#[test]
fn private_file() {
    let source = file(&vec![0x22; 4 << 20]);
    let builder = Memory::file(source.try_clone().unwrap(), 0, BYTES, Sharing::Private);
    let memory = builder.exclude_from_dumps().map().unwrap();
    assert_eq!(all(&memory, 0..BYTES), Some(0x22));

    // Without a copy of its own the page is the file's; it is zero all the same afterwards.
    memory.discard(3 * MIB..3 * MIB + PAGE).unwrap();
    assert_eq!(all(&memory, 3 * MIB..3 * MIB + PAGE), Some(0));

    discards(&memory);
    assert!(vm_flags(memory.hva().get() + MIB).iter().any(|flag| flag == "dd"), "still not in dumps");

    // Back to the file: not where it was discarded.
    memory.revert(..).unwrap();
    assert_eq!(all(&memory, 0..MIB), Some(0x22));
    assert_eq!(all(&memory, MIB..2 * MIB), Some(0));
    assert_eq!(all(&memory, 2 * MIB..3 * MIB), Some(0x22));
    assert_eq!(all(&memory, 3 * MIB..3 * MIB + PAGE), Some(0));

    let mut bytes = vec![0; 4 << 20];
    std::os::unix::fs::FileExt::read_exact_at(&source, &mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0x22), "the file never changed");

    let anonymous = Memory::anonymous(PAGE).map().unwrap();
    assert!(matches!(anonymous.revert(..).unwrap_err(), MemoryError::Unsupported { .. }));
}

/// `MADV_DONTNEED` on shared memory does nothing and says so to nobody: firecracker #6167 and its followers.
#[test]
fn what_others_do_on_a_memfd_would_not_work() {
    let memory = Memory::memfd("dontneed", PAGE).map().unwrap();
    set(&memory, 0, 7);
    // SAFETY: the page is the memory's, and nobody else looks at it.
    unsafe { rustix::mm::madvise(memory.as_ptr().cast(), 4096, rustix::mm::Advice::LinuxDontNeed) }.unwrap();
    assert_eq!((get(&memory, 0), memory.resident(..).unwrap()), (7, PAGE));
    memory.discard(..).unwrap();
    assert_eq!(get(&memory, 0), 0);
}

#[test]
fn pages_of_a_pool() {
    let bytes = 4 << 21;
    let memory = match Memory::huge(HugePage::M2, bytes).map() {
        Ok(memory) => memory,
        Err(error @ MemoryError::NoHugePages { .. }) => {
            let says = error.to_string();
            assert!(
                says.contains("4 huge pages of 2 MiB are wanted") && says.contains("nr_hugepages"),
                "{says}"
            );
            return memslot_testing::skipped(&format!("memory in huge pages of a pool: {error}"));
        }
        Err(error) => panic!("{error}"),
    };
    assert_eq!((memory.page_size(), memory.is_hugetlb(), memory.hva().get() % (2 * MIB)), (2 * MIB, true, 0));
    let free = HugePage::M2.available().unwrap();
    fill(&memory, 0..bytes, 0xab);
    let (fd, _) = memory.file_offset().unwrap();
    assert_eq!(stored(fd), bytes);
    assert!(matches!(
        memory.discard(0..PAGE).unwrap_err(),
        MemoryError::Unaligned { multiple: 0x20_0000, .. }
    ));
    memory.discard(2 * MIB..4 * MIB).unwrap();
    assert_eq!(stored(fd), bytes - 2 * MIB);
    assert_eq!(all(&memory, 2 * MIB..4 * MIB), Some(0));
    assert_eq!(all(&memory, 0..2 * MIB), Some(0xab));
    assert_eq!(all(&memory, 4 * MIB..bytes), Some(0xab));
    assert!(memory.advise_huge(true).is_err());

    // The same file, as one of a hugetlbfs that somebody else opened.
    let clone = || fd.try_clone_to_owned().unwrap();
    let other = Memory::file(clone(), 2 * MIB, 4 * MIB, Sharing::Shared).map().unwrap();
    assert!(other.is_hugetlb() && all(&other, 2 * MIB..4 * MIB) == Some(0xab));
    let private = Memory::file(clone(), 0, 2 * MIB, Sharing::Private).map().unwrap_err();
    assert!(matches!(private, MemoryError::Unsupported { .. }));
    assert!(Memory::file(clone(), PAGE, 2 * MIB, Sharing::Shared).map().is_err());

    // Two slots share a huge page: discarded together, refused alone.
    let memory = std::sync::Arc::new(memory);
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let backings = Backings::attach(&mut table).unwrap();
    backings.adopt(&memory);
    table
        .transaction(|tx| {
            tx.create(backings.spec(SlotId::new(0), Gfn::new(0), &memory, ..MIB).unwrap())?;
            tx.create(backings.spec(SlotId::new(1), Gfn::new(0x100), &memory, MIB..).unwrap())
        })
        .unwrap();
    let discard = |gfns| backings.discard(table.view(), AddressSpaceId::NORMAL, gfns);
    let alone = discard(GfnRange::with_len(Gfn::new(0), 0x100).unwrap()).unwrap_err();
    assert!(alone.to_string().contains("0x100000 is not a multiple of 0x200000"), "{alone}");
    assert_eq!(discard(GfnRange::with_len(Gfn::new(0), 0x200).unwrap()).unwrap(), 2 * MIB);
    assert_eq!(all(&memory, 0..2 * MIB), Some(0));
    drop((backings, table));

    // Guards around huge pages, and all pages back at the end.
    assert_eq!(common::signal_of_write(memory.hvas().end().get()), libc::SIGSEGV);
    drop((memory, other));
    assert_eq!(HugePage::M2.available().unwrap(), free + 4);
}
