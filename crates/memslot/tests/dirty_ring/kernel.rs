//! A ring that the real kernel fills.

use std::os::fd::AsRawFd;
use std::ptr;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit};

use super::*;

const PAGE: usize = 4096;
/// Entries of the kernel's ring: more than PML needs.
const KERNEL_ENTRIES: usize = 2048;
/// `_IO(0xAE, 0xc7)`.
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = 0xaec7;

/// Writes one byte in each of the pages 0x10..0x50, and halts. Real mode, at 0x1000.
const GUEST: &[u8] = &[
    0xbb, 0x00, 0x10, // mov bx, 0x1000
    0x8e, 0xdb, // again: mov ds, bx
    0x88, 0x1e, 0x00, 0x00, // mov [0], bl
    0x81, 0xc3, 0x00, 0x01, // add bx, 0x100
    0x81, 0xfb, 0x00, 0x50, // cmp bx, 0x5000
    0x75, 0xf0, // jne again
    0xf4, // hlt
];

/// Shared memory, never unmapped.
fn map(bytes: usize, flags: i32, fd: i32, offset: usize) -> Option<*mut u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping where the kernel likes it.
    let memory =
        unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, i64::try_from(offset).unwrap()) };
    (memory != libc::MAP_FAILED).then_some(memory.cast())
}

#[test]
fn a_ring_of_the_kernels_is_read() {
    if let Err(why) = read_the_kernels_ring() {
        memslot_testing::skipped(&format!("dirty ring of the kernel: {why}"));
    }
}

fn read_the_kernels_ring() -> Result<(), String> {
    if cfg!(miri) {
        return Err("Miri".into());
    }
    let kvm = Kvm::new().map_err(|error| format!("no /dev/kvm ({error})"))?;
    let vm = kvm.create_vm().unwrap();
    let mut cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
    cap.args[0] = (KERNEL_ENTRIES * PAGE / 256) as u64;
    assert_eq!(cap.args[0], KERNEL_ENTRIES as u64 * ENTRY_BYTES);
    vm.enable_cap(&cap).map_err(|error| format!("KVM_CAP_DIRTY_LOG_RING: {error}"))?;
    let ram = map(0x50 * PAGE, libc::MAP_ANONYMOUS | libc::MAP_PRIVATE, -1, 0).unwrap();
    // SAFETY: the code is much shorter than what was mapped.
    unsafe { ptr::copy_nonoverlapping(GUEST.as_ptr(), ram.add(PAGE), GUEST.len()) };
    let mut table = SlotTable::new(Limits::default()).unwrap();
    for (id, first, end, flags) in [(0, 0, 0x10, 0), (5, 0x10, 0x50, KVM_MEM_LOG_DIRTY_PAGES)] {
        let bytes = |pages| (pages * PAGE) as u64;
        let region = kvm_userspace_memory_region {
            slot: id,
            flags,
            guest_phys_addr: bytes(first),
            memory_size: bytes(end - first),
            userspace_addr: ram as u64 + bytes(first),
        };
        // SAFETY: the memory stays mapped.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let flags = SlotFlags::from_bits_truncate(flags);
        table.create(spec(id, first as u64, (end - first) as u64, region.userspace_addr, flags)).unwrap();
    }
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let at = KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE;
    let bytes = KERNEL_ENTRIES * size_of::<Entry>();
    let entries = map(bytes, libc::MAP_SHARED, vcpu.as_raw_fd(), at).ok_or("the ring cannot be mapped")?;
    // SAFETY: mapped for good, aligned to a page, and an entry is atomic: any bytes are valid.
    let entries: &[Entry] = unsafe { std::slice::from_raw_parts(entries.cast(), KERNEL_ENTRIES) };
    let mut reader = RingReader::new(entries).unwrap();
    // SAFETY: the call has no argument.
    let reset = || unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) };

    let expected: Vec<_> = (0x10..0x50).map(|gfn| Some((RAM, Gfn::new(gfn)))).collect();
    // More pages than the ring has entries: it wraps, and each page is armed again each time.
    for round in 0..40 {
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (PAGE as u64, 2);
        vcpu.set_regs(&regs).unwrap();
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => {}
            exit if round == 0 => return Err(format!("the guest does not run: {exit:?}")),
            exit => panic!("round {round}: {exit:?}"),
        }
        let mut found = Vec::new();
        for few in [10, 0, 1, usize::MAX] {
            let before = found.len();
            found.extend(reader.collect().take(few).map(|page| page.gfn(table.view())));
            assert_eq!(reset(), i32::try_from(found.len() - before).unwrap(), "round {round}");
        }
        assert_eq!(found, expected, "round {round}");
    }
    assert_eq!(reader.position(), 40 * 64);
    Ok(())
}
