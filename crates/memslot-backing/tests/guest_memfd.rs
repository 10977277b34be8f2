//! guest_memfd on the real kernel, where it has it.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod common;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use common::{MIB, PAGE, all, fill, signal_of_write};
use kvm_ioctls::{Kvm, VmFd};
use memslot::*;
use memslot_backing::{Backings, GuestMemfd, GuestMemfdError, GuestMemfdFlags, Memory, MemoryKind};
use memslot_testing::skipped;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;

fn vm() -> Option<VmFd> {
    match Kvm::new().and_then(|kvm| kvm.create_vm()) {
        Ok(vm) => Some(vm),
        Err(error) => {
            skipped(&format!("guest_memfd: no VM on /dev/kvm: {error}"));
            None
        }
    }
}

fn borrowed(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: the VM's file is open as long as the VM is.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}

/// How many bytes of the file the host has pages for: `cachestat(2)`, for a guest_memfd does not count its blocks.
fn present(file: &GuestMemfd) -> u64 {
    const CACHESTAT: i64 = 451;
    let (range, mut counts) = ([0u64, 0], [0u64; 5]);
    // SAFETY: the call reads two numbers and writes five.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_fd().as_raw_fd(), &range, &mut counts, 0) };
    assert_eq!(result, 0, "cachestat: {}", std::io::Error::last_os_error());
    counts[0] * PAGE
}

/// A guest_memfd with these flags, or why there is none.
fn guest_memfd(vm: &VmFd, bytes: u64, flags: GuestMemfdFlags) -> Option<GuestMemfd> {
    match GuestMemfd::create(borrowed(vm), bytes, flags) {
        Ok(file) => Some(file),
        Err(error @ (GuestMemfdError::NotOffered | GuestMemfdError::FlagsNotOffered { .. })) => {
            skipped(&format!("guest_memfd with flags {:#x}: {error}", flags.bits()));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn made_and_discarded() {
    let Some(vm) = vm() else { return };
    let Some(file) = guest_memfd(&vm, 4 * MIB, GuestMemfdFlags::NONE) else { return };
    assert_eq!(rustix::fs::fstat(file.as_fd()).unwrap().st_size, 4 << 20);
    // The host can make pages present, and take them back.
    rustix::fs::fallocate(file.as_fd(), rustix::fs::FallocateFlags::KEEP_SIZE, 0, 4 * MIB).unwrap();
    assert_eq!(present(&file), 4 * MIB);
    file.discard(MIB..2 * MIB).unwrap();
    assert_eq!(present(&file), 3 * MIB);
    #[expect(clippy::reversed_empty_ranges, reason = "that is the point")]
    for range in [1..PAGE, 0..PAGE - 1, 0..5 * MIB, PAGE..PAGE, 2 * PAGE..PAGE] {
        assert!(matches!(file.discard(range), Err(GuestMemfdError::BadRange { .. })));
    }
    // Not for the host: neither to map, as long as the kernel can tell, nor to use.
    assert!(Memory::guest_memfd(&file, 0, MIB).map().is_err());
    for bytes in [0, 1, PAGE + 1] {
        let refused = GuestMemfd::create(borrowed(&vm), bytes, GuestMemfdFlags::NONE);
        assert!(matches!(refused, Err(GuestMemfdError::BadRange { .. })));
    }
}

#[test]
fn flags_that_are_not_offered_are_an_error() {
    let Some(vm) = vm() else { return };
    let Some(offered) = GuestMemfd::offered(borrowed(&vm)) else {
        return skipped("guest_memfd: not offered");
    };
    if offered.contains(GuestMemfdFlags::MMAP) && offered.contains(GuestMemfdFlags::INIT_SHARED) {
        return skipped("guest_memfd: refusal of flags: this kernel offers all that we know");
    }
    let all = GuestMemfdFlags::MMAP.with(GuestMemfdFlags::INIT_SHARED);
    let refused = GuestMemfd::create(borrowed(&vm), PAGE, all);
    assert!(matches!(refused, Err(GuestMemfdError::FlagsNotOffered { .. })));
}

#[test]
fn what_is_no_vm_offers_nothing() {
    let file = common::file(&[]);
    assert_eq!(GuestMemfd::offered(file.as_fd()), None);
    let refused = GuestMemfd::create(file.as_fd(), PAGE, GuestMemfdFlags::NONE);
    assert!(matches!(refused, Err(GuestMemfdError::NotOffered)));
}

#[test]
fn mapped_for_the_host() {
    let Some(vm) = vm() else { return };
    let flags = GuestMemfdFlags::MMAP.with(GuestMemfdFlags::INIT_SHARED);
    let Some(file) = guest_memfd(&vm, 4 * MIB, flags) else { return };
    let memory = Memory::guest_memfd(&file, MIB, 2 * MIB).map().unwrap();
    assert_eq!(
        (memory.kind(), memory.bytes(), memory.hva().get() % (2 * MIB)),
        (MemoryKind::GuestMemfd, 2 * MIB, 0)
    );
    fill(&memory, 0..2 * MIB, 0x77);
    assert_eq!(present(&file), 2 * MIB);
    memory.discard(MIB..).unwrap();
    assert_eq!(
        (present(&file), all(&memory, MIB..2 * MIB), all(&memory, 0..MIB)),
        (MIB, Some(0), Some(0x77))
    );
    file.discard(MIB..2 * MIB).unwrap();
    assert_eq!(all(&memory, 0..MIB), Some(0));
    assert_eq!(signal_of_write(memory.hvas().end().get()), libc::SIGSEGV);

    // Mappable, but private from the beginning: an access is a SIGBUS, as the documentation says.
    let private = GuestMemfd::create(borrowed(&vm), MIB, GuestMemfdFlags::MMAP).unwrap();
    let memory = Memory::guest_memfd(&private, 0, MIB).map().unwrap();
    assert_eq!(signal_of_write(memory.hva().get()), libc::SIGBUS);
}

#[test]
fn kept_while_a_slot_names_it() {
    let Some(vm) = vm() else { return };
    let Some(file) = guest_memfd(&vm, 4 * MIB, GuestMemfdFlags::NONE) else { return };
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let backings = Backings::attach(&mut table).unwrap();
    let shared = Arc::new(Memory::anonymous(4 * MIB).map().unwrap());
    let file = Arc::new(file);
    let number = file.number();
    let spec = |id, first: u64, offset| SlotSpec {
        backing: Backing::GuestMemfd { hva: Hva::new(shared.hva().get() + first), file: number, offset },
        ..backings.spec(SlotId::new(id), Gfn::new(first >> 12), &shared, ..2 * MIB).unwrap()
    };
    backings.adopt(&shared);
    let unknown = table.create(spec(0, 0, 0)).unwrap_err().to_string();
    assert!(unknown.contains(&format!("in file {number}, which was not adopted")), "{unknown}");
    backings.adopt_file(&file);
    let long = table.create(spec(0, 0, 3 * MIB)).unwrap_err().to_string();
    assert!(long.contains("ends at 0x500000 of the guest_memfd"), "{long}");
    table.create(spec(0, 0, 0)).unwrap();
    table.create(spec(1, 2 * MIB, 2 * MIB)).unwrap();

    // Each half is discarded by itself.
    fill(&shared, 0..4 * MIB, 0x33);
    rustix::fs::fallocate(file.as_fd(), rustix::fs::FallocateFlags::KEEP_SIZE, 0, 4 * MIB).unwrap();
    let across = GfnRange::with_len(Gfn::new(0x180), 0x100).unwrap();
    assert_eq!(backings.discard_private(table.view(), RAM, across).unwrap(), MIB);
    assert_eq!((present(&file), all(&shared, 0..4 * MIB)), (3 * MIB, Some(0x33)));
    assert_eq!(backings.discard(table.view(), RAM, across).unwrap(), MIB);
    assert_eq!(all(&shared, 3 * MIB / 2..5 * MIB / 2), Some(0));

    let gone = Arc::downgrade(&file);
    drop(file);
    table.delete(RAM, SlotId::new(0)).unwrap();
    table.reclaim();
    assert!(backings.file_in(table.view(), number).is_some());
    let snapshot = table.snapshot();
    table.delete(RAM, SlotId::new(1)).unwrap();
    table.reclaim();
    assert!(gone.strong_count() == 1 && backings.file_in(table.view(), number).is_none());
    drop(snapshot);
    table.reclaim();
    assert_eq!(gone.strong_count(), 0);
}
