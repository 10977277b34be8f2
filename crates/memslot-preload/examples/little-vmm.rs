//! A program that does to KVM what VMMs do, and some things they should not, and keeps its own account of it.
//!
//! The tests of `memslot record` run it and compare: each line it prints is a call as the trace must have it. It ends with
//! status 1 if a call did not leave `errno` and its memory as the kernel does.
//!
//! `little-vmm PART…` does only some parts; `little-vmm exec PART…` does them in a program started anew.

use std::ffi::{c_int, c_ulong, c_void};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::ptr;

use kvm_ioctls::{Kvm, VmFd};

const SET: u32 = 0x4020_ae46;
const SET2: u32 = 0x40a0_ae49;
const GET_DIRTY_LOG: u32 = 0x4010_ae42;
const CLEAR_DIRTY_LOG: u32 = 0xc018_aec0;
const ENABLE_CAP: u32 = 0x4068_aea3;
const RESET_RINGS: u32 = 0xaec7;
const CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;

const PAGE: u64 = 4096;
const LOG: u32 = 1;
const READONLY: u32 = 2;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "exec") {
        let ourselves = std::env::current_exe().expect("a path");
        let error = Command::new(ourselves).args(&arguments[1..]).exec();
        panic!("exec: {error}");
    }
    if arguments.is_empty() {
        let all = ["slots", "dirty", "wrong", "memfd", "copies", "fork", "threads", "closed"];
        arguments = all.map(str::to_owned).to_vec();
    }
    for part in &arguments {
        match part.as_str() {
            "slots" => slots(&new_vm()),
            "dirty" => dirty(&new_vm()),
            "wrong" => wrong(&new_vm()),
            "memfd" => memfd(&new_vm()),
            "copies" => copies(),
            "fork" => fork(),
            "threads" => threads(),
            "closed" => closed(),
            "many" => many(&new_vm()),
            "wait" => std::thread::sleep(std::time::Duration::from_secs(60)),
            other => panic!("{other}: no such part"),
        }
    }
    ExitCode::SUCCESS
}

/// Prints what the trace should say of a call.
fn account(fd: c_int, op: &str, fields: &str, (ret, errno): (c_int, c_int)) {
    let (pid, tid) = (std::process::id(), thread());
    println!(
        "{{\"pid\":{pid},\"tid\":{tid},\"fd\":{fd},\"op\":\"{op}\"{fields},\"ret\":{ret},\"errno\":{errno}}}"
    );
}

fn thread() -> libc::pid_t {
    // SAFETY: takes nothing.
    unsafe { libc::gettid() }
}

/// An ioctl as C programs make them that keep requests in an `int`. A success must not touch `errno`.
fn ioctl(fd: c_int, request: u32, argument: *mut c_void) -> (c_int, c_int) {
    const UNTOUCHED: c_int = 4321;
    let sign = if request >> 31 == 1 { 0xffff_ffff << 32 } else { 0 };
    let request = c_ulong::from(request) | sign;
    // SAFETY: errno is the thread's own; the arguments in this program are valid, or are meant to be refused.
    let (ret, errno) = unsafe {
        *libc::__errno_location() = UNTOUCHED;
        let ret = libc::ioctl(fd, request, argument);
        (ret, *libc::__errno_location())
    };
    assert!(ret < 0 || errno == UNTOUCHED, "errno became {errno} in a call that succeeded");
    (ret, if ret < 0 { errno } else { 0 })
}

fn new_vm() -> VmFd {
    let kvm = Kvm::new().expect("/dev/kvm");
    let vm = kvm.create_vm().expect("a VM");
    account(kvm.as_raw_fd(), "create_vm", ",\"type\":0", (vm.as_raw_fd(), 0));
    vm
}

/// Memory for guests: never written, so never there.
fn memory(pages: u64) -> u64 {
    let bytes = usize::try_from(pages * PAGE).expect("64 bits");
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping.
    let address = unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, -1, 0) };
    assert_ne!(address, libc::MAP_FAILED);
    u64::try_from(address.addr()).expect("64 bits")
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Region {
    slot: u32,
    flags: u32,
    gpa: u64,
    size: u64,
    hva: u64,
}

fn set(vm: c_int, slot: u32, flags: u32, gpa: u64, size: u64, hva: u64) -> c_int {
    let mut region = Region { slot, flags, gpa, size, hva };
    let answer = ioctl(vm, SET, (&raw mut region).cast());
    account(vm, "set", &fields(&region), answer);
    answer.1
}

fn fields(region: &Region) -> String {
    let Region { slot, flags, gpa, size, hva } = region;
    format!(
        ",\"slot\":{slot},\"flags\":{flags},\"gpa\":\"{gpa:#x}\",\"size\":\"{size:#x}\",\"hva\":\"{hva:#x}\""
    )
}

fn slots(vm: &VmFd) {
    let (fd, hva) = (vm.as_raw_fd(), memory(1024));
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 7,
        flags: 0,
        guest_phys_addr: 0x10_0000,
        memory_size: 16 * PAGE,
        userspace_addr: hva,
    };
    // SAFETY: the memory is mapped, and stays.
    unsafe { vm.set_user_memory_region(region) }.expect("a slot");
    let same = Region { slot: 7, flags: 0, gpa: 0x10_0000, size: 16 * PAGE, hva };
    account(fd, "set", &fields(&same), (0, 0));

    assert_eq!(set(fd, 0, 0, 0, 160 * PAGE, hva), 0);
    assert_eq!(set(fd, 1, READONLY, 0xffff_0000, 16 * PAGE, hva), 0);
    assert_eq!(set(fd, 2, 0, 0x1000, PAGE, hva), libc::EEXIST);
    assert_eq!(set(fd, 2, 0, 0x1001, PAGE, hva), libc::EINVAL);
    assert_eq!(set(fd, 2, 0, 0x20_0000, 0, hva), libc::EINVAL);
    assert_eq!(set(fd, 2, 0x8000_0000, 0x20_0000, PAGE, hva), libc::EINVAL);
    assert_eq!(set(fd, 7, 0, 0x4000_0000, 16 * PAGE, hva), 0);
    assert_eq!(set(fd, 0, LOG, 0, 160 * PAGE, hva), 0);
    assert_eq!(set(fd, 0, 0, 0, 160 * PAGE, hva), 0);
    assert_eq!(set(fd, 0, 0, 0, 0, hva), 0);
    assert_eq!(set(fd, 2, 0, 0x1000, PAGE, hva), 0);
}

/// Many lines, for disks that are too small.
fn many(vm: &VmFd) {
    let hva = memory(1);
    for _ in 0..200 {
        assert_eq!(set(vm.as_raw_fd(), 3, 0, 0, PAGE, hva), 0);
        assert_eq!(set(vm.as_raw_fd(), 3, 0, 0, 0, hva), 0);
    }
}

fn get_dirty_log(vm: c_int, slot: u32, pages: u64, expected: &str) {
    let mut words = vec![0_u64; usize::try_from(pages.div_ceil(64)).expect("small")];
    let mut argument = [u64::from(slot), u64::try_from(words.as_mut_ptr().addr()).expect("64 bits")];
    let answer = ioctl(vm, GET_DIRTY_LOG, argument.as_mut_ptr().cast());
    account(vm, "get_dirty", &format!(",\"slot\":{slot}{expected}"), answer);
}

fn clear_dirty_log(vm: c_int, slot: u32, first: u64, pages: u32, mask: &mut [u64], expected: &str) -> c_int {
    let address = u64::try_from(mask.as_mut_ptr().addr()).expect("64 bits");
    let mut argument = [u64::from(slot) | u64::from(pages) << 32, first, address];
    let answer = ioctl(vm, CLEAR_DIRTY_LOG, argument.as_mut_ptr().cast());
    account(
        vm,
        "clear_dirty",
        &format!(",\"slot\":{slot},\"first\":{first},\"num\":{pages}{expected}"),
        answer,
    );
    answer.1
}

fn enable_cap(vm: c_int, cap: u32, flags: u32, arg0: u64) -> c_int {
    let mut argument = [0_u64; 13];
    argument[0] = u64::from(cap) | u64::from(flags) << 32;
    argument[1] = arg0;
    let answer = ioctl(vm, ENABLE_CAP, argument.as_mut_ptr().cast());
    account(vm, "enable_cap", &format!(",\"cap\":{cap},\"flags\":{flags},\"arg0\":\"{arg0:#x}\""), answer);
    answer.1
}

/// The kernel itself writes to these pages of the guest, through the slots: the wall clock of its paravirtual clock.
#[cfg(target_arch = "x86_64")]
fn write_to(vcpu: &kvm_ioctls::VcpuFd, pages: &[u64]) {
    const WALL_CLOCK: u32 = 0x4b56_4d00;
    for page in pages {
        let entry =
            kvm_bindings::kvm_msr_entry { index: WALL_CLOCK, data: page * PAGE, ..Default::default() };
        let msrs = kvm_bindings::Msrs::from_entries(&[entry]).expect("one");
        assert_eq!(vcpu.set_msrs(&msrs).expect("the clock"), 1);
    }
}

#[cfg(target_arch = "x86_64")]
fn dirty(vm: &VmFd) {
    const MANUAL_PROTECT: u32 = 168;
    let (fd, hva) = (vm.as_raw_fd(), memory(80_000));
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    assert_eq!(set(fd, 0, LOG, 0, 70 * PAGE, hva), 0);
    get_dirty_log(fd, 0, 70, ",\"npages\":70,\"set\":0,\"runs\":[]");
    write_to(&vcpu, &[3, 4, 69]);
    get_dirty_log(fd, 0, 70, ",\"npages\":70,\"set\":3,\"runs\":[[3,2],[69,1]]");
    get_dirty_log(fd, 0, 70, ",\"npages\":70,\"set\":0,\"runs\":[]");
    get_dirty_log(fd, 9, 70, "");

    assert_eq!(enable_cap(fd, MANUAL_PROTECT, 0, 3), 0);
    assert_eq!(enable_cap(fd, MANUAL_PROTECT, 0, 4), libc::EINVAL);
    assert_eq!(enable_cap(fd, MANUAL_PROTECT, 1, 0), libc::EINVAL);
    assert_eq!(set(fd, 0, 0, 0, 70 * PAGE, hva), 0);
    assert_eq!(set(fd, 0, LOG, 0, 70 * PAGE, hva), 0);
    get_dirty_log(fd, 0, 70, ",\"npages\":70,\"set\":70,\"runs\":[[0,70]]");
    let mut mask = [u64::MAX; 2];
    assert_eq!(clear_dirty_log(fd, 0, 1, 69, &mut mask, ""), libc::EINVAL);
    // Bits of the mask beyond the pages mean nothing.
    assert_eq!(clear_dirty_log(fd, 0, 64, 6, &mut mask, ",\"set\":6,\"runs\":[[0,6]]"), 0);
    get_dirty_log(fd, 0, 70, ",\"npages\":70,\"set\":64,\"runs\":[[0,64]]");
    mask = [0x8000_0000_0000_0001, 0];
    assert_eq!(clear_dirty_log(fd, 0, 0, 64, &mut mask, ",\"set\":2,\"runs\":[[0,1],[63,1]]"), 0);
    write_to(&vcpu, &[63]);
    get_dirty_log(fd, 0, 70, ",\"npages\":70,\"set\":63,\"runs\":[[1,63]]");

    // A bitmap of many runs, for which there is no room on the stack.
    assert_eq!(set(fd, 1, LOG, 0x1000_0000, 80_000 * PAGE, hva), 0);
    let mut mask = vec![0x5555_5555_5555_5555; 80_000 / 64];
    let runs = (0..80_000).step_by(2).map(|page| format!("[{page},1]")).collect::<Vec<_>>().join(",");
    let expected = format!(",\"set\":40000,\"runs\":[{runs}]");
    assert_eq!(clear_dirty_log(fd, 1, 0, 80_000, &mut mask, &expected), 0);
    let runs = (1..80_000).step_by(2).map(|page| format!("[{page},1]")).collect::<Vec<_>>().join(",");
    get_dirty_log(fd, 1, 80_000, &format!(",\"npages\":80000,\"set\":40000,\"runs\":[{runs}]"));

    account(fd, "reset_rings", "", ioctl(fd, RESET_RINGS, ptr::null_mut()));
}

#[cfg(not(target_arch = "x86_64"))]
fn dirty(_: &VmFd) {}

/// Arguments that the kernel cannot read: neither can the recorder, and nobody may stumble over that.
fn wrong(vm: &VmFd) {
    let fd = vm.as_raw_fd();
    for (request, op) in
        [(SET, "req_46"), (SET2, "req_49"), (GET_DIRTY_LOG, "req_42"), (ENABLE_CAP, "req_a3")]
    {
        for pointer in [0, 1, usize::MAX] {
            let answer = ioctl(fd, request, ptr::without_provenance_mut(pointer));
            assert_eq!(answer.1, libc::EFAULT, "{op}");
            account(fd, op, "", answer);
        }
    }
    let hva = memory(64);
    assert_eq!(set(fd, 0, LOG, 0, 64 * PAGE, hva), 0);
    // The structure is readable, the bitmap it points to is not.
    let mut argument = [0_u64, 1];
    let answer = ioctl(fd, GET_DIRTY_LOG, argument.as_mut_ptr().cast());
    assert_eq!(answer.1, libc::EFAULT);
    account(fd, "get_dirty", ",\"slot\":0", answer);
    // What is no VM is not recorded, whatever is asked of it.
    let null = std::fs::File::open("/dev/null").expect("/dev/null");
    let mut region = Region { slot: 0, flags: 0, gpa: 0, size: PAGE, hva };
    assert_eq!(ioctl(null.as_raw_fd(), SET, (&raw mut region).cast()).1, libc::ENOTTY);
    assert_eq!(ioctl(-1, SET, (&raw mut region).cast()), (-1, libc::EBADF));
    account(-1, "set", &fields(&region), (-1, libc::EBADF));
}

/// guest_memfd files, one after the other with the same descriptor, where the kernel has them.
fn memfd(vm: &VmFd) {
    const GUEST_MEMFD: u32 = 4;
    let (fd, hva) = (vm.as_raw_fd(), memory(32));
    for round in 0..2_u64 {
        let mut argument = [0_u64; 8];
        argument[0] = 32 * PAGE;
        let answer = ioctl(fd, CREATE_GUEST_MEMFD, argument.as_mut_ptr().cast());
        account(fd, "create_guest_memfd", &format!(",\"size\":\"{:#x}\",\"flags\":0", 32 * PAGE), answer);
        let Ok(file) = u32::try_from(answer.0) else { return };
        let first = Region {
            slot: u32::try_from(round).expect("small"),
            flags: GUEST_MEMFD,
            gpa: round << 20,
            size: 16 * PAGE,
            hva,
        };
        let mut region = [0_u64; 20];
        region[0] = u64::from(first.slot) | u64::from(first.flags) << 32;
        (region[1], region[2], region[3], region[4]) = (first.gpa, first.size, first.hva, PAGE);
        region[5] = u64::from(file);
        let answer = ioctl(fd, SET2, region.as_mut_ptr().cast());
        let file_fields = format!(",\"guest_memfd\":{file},\"guest_memfd_offset\":\"0x1000\"");
        account(fd, "set2", &(fields(&first) + &file_fields), answer);
        assert_eq!(answer, (0, 0));
        // SAFETY: ours; the slot keeps the file.
        unsafe { libc::close(answer_fd(file)) };
    }
}

fn answer_fd(file: u32) -> c_int {
    c_int::try_from(file).expect("a descriptor")
}

/// A VM under two descriptors, and a descriptor that is one VM after the other.
fn copies() {
    let vm = new_vm();
    let hva = memory(8);
    // SAFETY: ours.
    let copy = unsafe { libc::dup(vm.as_raw_fd()) };
    assert_eq!(set(vm.as_raw_fd(), 0, 0, 0, 4 * PAGE, hva), 0);
    assert_eq!(set(copy, 1, 0, 0, 4 * PAGE, hva), libc::EEXIST);
    assert_eq!(set(copy, 0, 0, 0, 0, hva), 0);
    // SAFETY: ours.
    unsafe { libc::close(copy) };
    let old = vm.as_raw_fd();
    drop(vm);
    let vm = new_vm();
    assert_eq!(vm.as_raw_fd(), old);
    assert_eq!(set(old, 1, 0, 0, 4 * PAGE, hva), 0);
}

/// A child that may not use its parent's VM, and has one of its own; each with threads.
fn fork() {
    let vm = new_vm();
    let hva = memory(8);
    assert_eq!(set(vm.as_raw_fd(), 0, 0, 0, 4 * PAGE, hva), 0);
    // SAFETY: the child uses what it has, and there is no other thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        assert_eq!(set(vm.as_raw_fd(), 1, 0, 0x10_0000, 4 * PAGE, hva), libc::EIO);
        let own = new_vm();
        slots(&own);
        drop(own);
        threads();
        std::process::exit(0);
    }
    assert_eq!(set(vm.as_raw_fd(), 1, 0, 0x10_0000, 4 * PAGE, hva), 0);
    slots(&new_vm());
    let mut status = 0;
    // SAFETY: our child, our status.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed");
}

fn threads() {
    let work = || {
        let vm = new_vm();
        let hva = memory(64);
        for round in 0..40_u64 {
            let slot = u32::try_from(round % 8).expect("small");
            assert_eq!(set(vm.as_raw_fd(), slot, 0, round << 20, 8 * PAGE, hva), 0);
            assert_eq!(set(vm.as_raw_fd(), slot, 0, round << 20, 0, hva), 0);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(work);
        }
    });
}

/// What daemons do: leave the folder, close all descriptors. Then every number that was the trace's is a file of ours,
/// in which nothing of the trace may end up.
fn closed() {
    std::env::set_current_dir("/").expect("a root");
    let vm = new_vm();
    let above = libc::c_uint::try_from(vm.as_raw_fd() + 1).expect("a descriptor");
    // SAFETY: nothing above is ours. The trace is, so the next call is recorded only with errors on the way.
    assert_eq!(unsafe { libc::close_range(above, libc::c_uint::MAX, 0) }, 0);
    assert_eq!(set(vm.as_raw_fd(), 0, 0, 0, PAGE, memory(1)), 0);
    std::mem::forget(vm);
    // SAFETY: nothing that was open is used again; the name is a C string.
    let file = unsafe {
        assert_eq!(libc::close_range(3, libc::c_uint::MAX, 0), 0);
        libc::memfd_create(c"ours".as_ptr(), 0)
    };
    assert!(file >= 0);
    // SAFETY: ours. It ends where descriptors do, or beyond any that the recorder would choose.
    while unsafe { (0..4200).contains(&libc::fcntl(file, libc::F_DUPFD, 0)) } {}
    for some in 10..30 {
        // SAFETY: a copy of ours.
        unsafe { libc::close(some) };
    }
    slots(&new_vm());
    // SAFETY: ours.
    assert_eq!(unsafe { libc::lseek(file, 0, libc::SEEK_END) }, 0, "somebody wrote into our file");
}
