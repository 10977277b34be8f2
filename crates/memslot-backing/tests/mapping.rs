//! Where memory lies, what is around it, and what is asked of the kernel for it.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod common;

use std::os::fd::AsFd;

use common::{MIB, PAGE, file, get, is_mapped, set, signal_of_write, stored, vm_flags};
use memslot::Gpa;
use memslot_backing::{HugePage, Memory, MemoryBuilder, MemoryError, MemoryKind, Sharing};

fn each_kind(bytes: u64) -> Vec<MemoryBuilder> {
    let long = vec![0; usize::try_from(bytes).unwrap()];
    vec![
        Memory::anonymous(bytes),
        Memory::memfd("each-kind", bytes),
        Memory::file(file(&long), 0, bytes, Sharing::Shared),
        Memory::file(file(&long), 0, bytes, Sharing::Private),
    ]
}

#[test]
fn aligned_to_2_mib_and_new_memory_is_zero() {
    for builder in each_kind(3 * PAGE) {
        let memory = builder.map().unwrap();
        assert_eq!(memory.hva().get() % (2 * MIB), 0, "{memory:?}");
        assert_eq!((memory.bytes(), memory.page_size(), memory.is_hugetlb()), (3 * PAGE, PAGE, false));
        for offset in 0..memory.bytes() {
            assert_eq!(get(&memory, offset), 0);
        }
        set(&memory, 3 * PAGE - 1, 7);
        assert_eq!(get(&memory, 3 * PAGE - 1), 7);
    }
}

#[test]
fn congruent_to_a_guest_address() {
    for (gpa, alignment) in [
        (0, PAGE),
        (0xa_0000, 2 * MIB),
        (0x1_0000_0000, 1 << 30),
        (0x1_7fe0_1000, 1 << 30),
        (0xffff_ffff_ffff_f000, 4 * MIB),
    ] {
        // Several, so that the kernel puts them at different places.
        let all: Vec<Memory> = (1..9)
            .map(|pages| {
                Memory::anonymous(pages * PAGE)
                    .alignment(alignment)
                    .congruent_to(Gpa::new(gpa))
                    .map()
                    .unwrap()
            })
            .collect();
        for memory in all {
            assert_eq!(memory.hva().get() % alignment, gpa % alignment);
        }
    }
}

#[test]
fn guards_fault_and_the_memory_between_does_not() {
    for builder in each_kind(16 * PAGE) {
        let memory = builder.map().unwrap();
        let (start, end) = (memory.hva().get(), memory.hvas().end().get());
        for inside in [start, end - 1] {
            assert_eq!(signal_of_write(inside), 0, "{memory:?}");
        }
        for outside in [start - 1, start - 0x1_0000, end, end + 0xffff] {
            assert_eq!(signal_of_write(outside), libc::SIGSEGV, "{memory:?} at {outside:#x}");
        }
    }
}

#[test]
fn advice_reaches_the_kernel() {
    let plain = Memory::anonymous(4 * MIB).map().unwrap();
    let huge = Memory::anonymous(4 * MIB).huge_pages(true).exclude_from_dumps().no_reserve().map().unwrap();
    let small = Memory::anonymous(4 * MIB).huge_pages(false).map().unwrap();
    let has = |memory: &Memory, flag: &str| vm_flags(memory.hva().get()).iter().any(|is| is == flag);
    for (flag, who) in [("hg", &huge), ("dd", &huge), ("nr", &huge), ("nh", &small)] {
        for memory in [&plain, &huge, &small] {
            assert_eq!(has(memory, flag), std::ptr::eq(memory, who), "{flag}");
        }
    }
    plain.advise_huge(true).unwrap();
    assert!(has(&plain, "hg"));
}

/// What the alignment is for: 6 MiB that begin where the guest's do can be three huge pages; 4 KiB further on, two.
#[test]
fn aligned_memory_gets_huge_pages() {
    let huge = |builder: MemoryBuilder| -> u64 {
        let memory = builder.huge_pages(true).prefault().map().unwrap();
        common::smaps(memory.hva().get(), "AnonHugePages:")
    };
    let aligned = huge(Memory::anonymous(6 * MIB));
    if aligned == 0 {
        let path = "/sys/kernel/mm/transparent_hugepage/enabled";
        let enabled = std::fs::read_to_string(path).unwrap_or_default();
        return memslot_testing::skipped(&format!(
            "transparent huge pages: none were given; {path} is {enabled:?}"
        ));
    }
    assert_eq!(aligned, 6 * MIB);
    assert_eq!(huge(Memory::anonymous(6 * MIB).congruent_to(Gpa::new(PAGE))), 4 * MIB);
}

#[test]
fn prefault_makes_all_resident() {
    for builder in each_kind(64 * PAGE) {
        let memory = builder.map().unwrap();
        if memory.kind() == MemoryKind::Anonymous || memory.kind() == MemoryKind::Memfd {
            assert_eq!(memory.resident(..).unwrap(), 0, "{memory:?}");
        }
        memory.prefault(PAGE..3 * PAGE).unwrap();
        assert_eq!(memory.resident(PAGE..3 * PAGE).unwrap(), 2 * PAGE, "{memory:?}");
    }
    let memory = Memory::memfd("prefault", 40 * MIB).prefault().map().unwrap();
    assert_eq!(memory.resident(..).unwrap(), 40 * MIB);
    assert_eq!(memory.resident(PAGE..39 * MIB).unwrap(), 39 * MIB - PAGE);
    assert_eq!(stored(memory.file_offset().unwrap().0), 40 * MIB);
}

#[test]
fn a_file_from_an_offset_on() {
    let mut bytes = vec![1u8; 4 * 4096];
    bytes[2 * 4096..].fill(2);
    let source = file(&bytes);
    let memory = Memory::file(source.try_clone().unwrap(), 2 * PAGE, PAGE, Sharing::Private).map().unwrap();
    assert_eq!((get(&memory, 0), get(&memory, PAGE - 1)), (2, 2));
    assert_eq!(memory.file_offset().unwrap().1, 2 * PAGE);
    let shared =
        Memory::file(source.try_clone().unwrap(), 2 * PAGE, 2 * PAGE, Sharing::Shared).map().unwrap();
    set(&memory, 0, 9);
    assert_eq!(get(&shared, 0), 2, "private is private");
    set(&shared, PAGE, 5);
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&source, &mut byte, 3 * PAGE).unwrap();
    assert_eq!(byte, [5], "shared is the file");
}

#[test]
fn a_memfd_is_the_same_through_two_mappings_and_keeps_its_size() {
    let one = Memory::memfd("two-mappings", 8 * PAGE).map().unwrap();
    let (fd, offset) = one.file_offset().unwrap();
    let other =
        Memory::file(fd.try_clone_to_owned().unwrap(), offset, 8 * PAGE, Sharing::Shared).map().unwrap();
    assert_ne!(one.hva(), other.hva());
    set(&one, 3 * PAGE, 42);
    assert_eq!(get(&other, 3 * PAGE), 42);
    for size in [0, 4 * PAGE, 16 * PAGE] {
        assert_eq!(rustix::fs::ftruncate(fd.as_fd(), size), Err(rustix::io::Errno::PERM));
    }
}

#[test]
fn unmapped_with_the_last_arc() {
    let memory = std::sync::Arc::new(Memory::memfd("last-arc", PAGE).map().unwrap());
    let other = std::sync::Arc::clone(&memory);
    drop(memory);
    assert!(is_mapped("last-arc"));
    std::thread::spawn(move || drop(other)).join().unwrap();
    assert!(!is_mapped("last-arc"));
}

#[test]
fn errors_say_what_to_change() {
    let says = |builder: MemoryBuilder| builder.map().unwrap_err().to_string();
    assert_eq!(
        says(Memory::anonymous(0)),
        "memory of 0 bytes cannot be mapped; ask for at least one page of 4096 bytes"
    );
    assert_eq!(
        says(Memory::memfd("x", 4097)),
        "the size 0x1001 is not a multiple of 0x1000 bytes; the nearest are 0x1000 and 0x2000"
    );
    for alignment in [0, 2048, 3 * PAGE] {
        let error = Memory::anonymous(PAGE).alignment(alignment).map().unwrap_err();
        assert!(matches!(error, MemoryError::BadAlignment { asked, page: PAGE } if asked == alignment));
    }
    assert!(says(Memory::anonymous(PAGE).congruent_to(Gpa::new(0x1234))).contains("congruent"));
    assert!(says(Memory::huge(HugePage::M2, 3 * MIB)).contains("the nearest are 0x200000 and 0x400000"));
    let short = || file(&[0; 8192]);
    assert_eq!(
        says(Memory::file(short(), PAGE, 2 * PAGE, Sharing::Shared)),
        "the file has 0x2000 bytes and the memory would end at 0x3000 of it; make the file longer first"
    );
    assert!(says(Memory::file(short(), 1, PAGE, Sharing::Private)).contains("the offset in the file 0x1 "));
    let far = Memory::file(short(), u64::MAX - PAGE + 1, PAGE, Sharing::Private).map().unwrap_err();
    assert!(matches!(far, MemoryError::FileTooShort { needs: u64::MAX, .. }));

    let memory = Memory::anonymous(4 * PAGE).map().unwrap();
    let out = memory.discard(PAGE..5 * PAGE).unwrap_err();
    assert!(matches!(out, MemoryError::OutOfRange { start: PAGE, end: 0x5000, bytes: 0x4000 }));
    #[expect(clippy::reversed_empty_ranges, reason = "that is the point")]
    let inverted = memory.discard(2 * PAGE..PAGE).unwrap_err();
    assert!(matches!(inverted, MemoryError::OutOfRange { .. }));
    assert!(matches!(memory.discard(..=u64::MAX).unwrap_err(), MemoryError::OutOfRange { .. }));
    for range in [1..PAGE, 0..PAGE + 1] {
        for error in
            [memory.discard(range.clone()), memory.prefault(range.clone()), memory.resident(range).map(drop)]
        {
            assert!(matches!(error, Err(MemoryError::Unaligned { multiple: PAGE, .. })));
        }
    }
    memory.discard(PAGE..PAGE).unwrap();
    memory.discard(..=PAGE - 1).unwrap();
}
