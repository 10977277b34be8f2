//! At the process's limit of mappings, a discard that needs one more fails and leaves its memory as it was, and memory
//! that goes is unmapped all the same. Alone in its program, which can hardly allocate meanwhile.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod common;

use common::{PAGE, get, is_mapped, set};
use memslot_backing::{Memory, MemoryError, Sharing};
use memslot_testing::skipped;

#[test]
fn nothing_is_lost_when_there_are_too_many() {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: u64 = limit.trim().parse().unwrap();
    if limit > 200_000 {
        return skipped(&format!("too many mappings: the limit of {limit} is too far away"));
    }
    let file = common::file(&[]);
    file.set_len((limit + 1000) * PAGE).unwrap();
    let names = ["too-many-0", "too-many-1", "too-many-2"];
    let others = names.map(|name| Memory::memfd(name, 16 * PAGE).alignment(PAGE).map().unwrap());
    // Nothing lies between these, so that the kernel may keep them as one mapping and not want to cut it.
    let bare = [0; 3]
        .map(|_| Memory::anonymous(16 * PAGE).alignment(PAGE).guard_pages(false).prefault().map().unwrap());
    let memory = Memory::file(file, 0, (limit + 1000) * PAGE, Sharing::Private).map().unwrap();

    // Each discarded page is a mapping of its own, and so is what lies between.
    let mut failed = None;
    for page in (1..limit + 1000).step_by(2) {
        set(&memory, page * PAGE, 9);
        if let Err(error) = memory.discard(page * PAGE..(page + 1) * PAGE) {
            failed = Some((page, error));
            break;
        }
    }
    let (page, error) = failed.expect("there is a limit");
    let kept = get(&memory, page * PAGE);
    let before = get(&memory, (page - 2) * PAGE);
    let more = Memory::anonymous(PAGE).map().map(drop);
    let [first, second, third] = bare;
    let place = second.as_ptr();
    drop(second);
    let (mut states, length) = ([0u8; 16], usize::try_from(16 * PAGE).unwrap());
    // SAFETY: the call writes one byte for each page.
    let mapped = unsafe { libc::mincore(place.cast(), length, states.as_mut_ptr()) } == 0;
    drop((first, third, others));
    drop(memory);

    let out_of_memory = |error: &MemoryError| matches!(error, MemoryError::Call { source, .. } if source.kind() == std::io::ErrorKind::OutOfMemory);
    assert!(out_of_memory(&error), "{error}");
    assert!(page > limit / 4);
    assert_eq!((kept, before), (9, 0));
    assert!(more.is_err_and(|error| out_of_memory(&error)));
    assert!(!mapped || states.iter().all(|state| state & 1 == 0), "the memory is free, if not the addresses");
    assert!(names.iter().all(|name| !is_mapped(name)));
    Memory::anonymous(PAGE).map().unwrap();
}
