//! A mapping that fails leaves nothing behind. Alone in its program, because it counts the process's addresses and files.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod common;

use common::{MIB, PAGE, file};
use memslot::Gpa;
use memslot_backing::{HugePage, Memory, MemoryBuilder, MemoryError, Sharing};

fn address_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<u64>().unwrap() * PAGE
}

fn files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn nothing_is_left_behind() {
    let read_only = || std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let huge_has = HugePage::M2.available().unwrap_or(0);
    let failures: [(&str, &dyn Fn() -> MemoryBuilder); 6] = [
        // More than there are addresses: the reservation fails.
        ("reserve", &|| Memory::anonymous(1 << 47)),
        ("reserve a memfd", &|| Memory::memfd("nothing-left", 1 << 47)),
        // The reservation succeeds, the mapping does not.
        ("write to a read-only file", &|| {
            Memory::file(read_only(), 0, PAGE, Sharing::Shared).alignment(16 * MIB)
        }),
        ("huge pages", &|| Memory::huge(HugePage::M2, (huge_has + 1) << 21)),
        // The mapping succeeds, what follows does not.
        ("prefault", &|| Memory::huge(HugePage::M2, (huge_has + 1) << 21).no_reserve().prefault()),
        ("advice", &|| Memory::huge(HugePage::M2, 0x20_0000).no_reserve().huge_pages(true)),
    ];
    let has_pool = HugePage::M2.available().is_some();
    let (bytes, open) = (address_bytes(), files());
    for (what, builder) in failures {
        for _ in 0..100 {
            let error = builder().map().expect_err(what);
            assert!(!error.to_string().is_empty());
            let no_pages = matches!(error, MemoryError::NoHugePages { .. });
            assert_eq!(no_pages && has_pool, what == "huge pages" && has_pool, "{what}: {error}");
        }
        assert!(address_bytes() < bytes + 2 * MIB, "{what} left mappings");
        assert_eq!(files(), open, "{what} left files");
    }

    without_guards_nothing_is_around();

    // And success leaves nothing either, when it goes.
    for _ in 0..100 {
        let memory = Memory::file(file(&[0; 8192]), 0, 2 * PAGE, Sharing::Private).map().unwrap();
        memory.discard(PAGE..2 * PAGE).unwrap();
        Memory::memfd("nothing-left", MIB).alignment(64 * MIB).map().unwrap();
    }
    assert!(address_bytes() < bytes + 2 * MIB);
    assert_eq!(files(), open);
}

fn without_guards_nothing_is_around() {
    // Far from what the process has besides.
    let far = Memory::memfd("no-guards", 4 * PAGE).alignment(1 << 40).congruent_to(Gpa::new(1 << 39));
    let memory = far.guard_pages(false).map().unwrap();
    let (start, end) = (memory.hva().get(), memory.hvas().end().get());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.lines().any(|line| line.starts_with(&format!("{start:x}-{end:x} rw-s"))), "{maps}");
    let guard = |line: &&str| {
        line.contains("---p")
            && (line.contains(&format!("-{start:x} ")) || line.starts_with(&format!("{end:x}-")))
    };
    assert_eq!(maps.lines().find(guard), None);
}
