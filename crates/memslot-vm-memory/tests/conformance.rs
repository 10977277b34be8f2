//! vm-memory's behaviour at the edges: the same cases on `GuestMemoryMmap` and on ours, and the same answers.

mod common;

use std::fmt::Write;
use std::sync::atomic::Ordering;

use common::{PAGE, RAM, map, spec, table};
use memslot::dirty::DirtyLog;
use memslot::{SlotFlags, SlotSpec};
use memslot_vm_memory::{Bridge, Native};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress, Permissions, VolatileMemory,
};

/// gpa and pages: neighbours, a hole, a lone page, the highest page that a slot can have.
const LAYOUT: [(u64, u64); 5] =
    [(0x1000, 2), (0x3000, 1), (0x8000, 4), (0x1_0000_0000, 1), (u64::MAX - 0x1fff, 1)];

/// Addresses at and around every edge.
fn addresses() -> Vec<u64> {
    let edges = LAYOUT.iter().flat_map(|&(gpa, pages)| [gpa, gpa + pages * PAGE]);
    let mut all: Vec<u64> = edges
        .flat_map(|edge| [-8i64, -4, -1, 0, 1, 5, 0x800].map(|by| edge.wrapping_add_signed(by)))
        .chain([0, 1, 0x7fff_ffff, u64::MAX - 0x1000, u64::MAX - 0xfff, u64::MAX])
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

const LENGTHS: [usize; 10] = [0, 1, 3, 4, 8, 9, 0x1000, 0x1801, 0x3000, 0x8000];

fn show<T: std::fmt::Debug>(result: Result<T, GuestMemoryError>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => format!("{error:?}"),
    }
}

/// Everything that `GuestMemory` and the blanket `Bytes` answer.
fn ask_memory<M: GuestMemory>(memory: &M) -> Vec<String> {
    let mut said = Vec::new();
    let fill: Vec<u8> = (0..0x8000).map(|i| u8::try_from(i % 251).unwrap()).collect();
    for at in addresses() {
        let addr = GuestAddress(at);
        let mut line = format!("{at:#x}:");
        for len in LENGTHS {
            for access in [Permissions::No, Permissions::Read, Permissions::Write, Permissions::ReadWrite] {
                write!(line, " {}", u8::from(memory.check_range(addr, len, access))).unwrap();
            }
            let slices = memory.get_slices(addr, len, Permissions::Read).unwrap();
            let slices: Vec<_> = slices.map(|slice| show(slice.map(|slice| slice.len()))).collect();
            write!(line, " {slices:?}").unwrap();
            let slices = memory.get_slices(addr, len, Permissions::Write).unwrap().stop_on_error();
            let slices = slices.map(|slices| slices.map(|slice| slice.len()).collect::<Vec<_>>());
            write!(line, " {}", show(slices)).unwrap();
            let mut buffer = vec![0; len];
            write!(line, " w{}", show(memory.write(&fill[..len], addr))).unwrap();
            write!(line, " r{} {}", show(memory.read(&mut buffer, addr)), sum(&buffer)).unwrap();
            write!(line, " ws{}", show(memory.write_slice(&fill[..len], addr))).unwrap();
            write!(line, " rs{} {}", show(memory.read_slice(&mut buffer, addr)), sum(&buffer)).unwrap();
            let mut source = &fill[..len / 2];
            write!(line, " vf{}", show(memory.read_volatile_from(addr, &mut source, len))).unwrap();
            let mut source = &fill[..];
            write!(line, " vx{}", show(memory.read_exact_volatile_from(addr, &mut source, len))).unwrap();
            let mut sink = Vec::new();
            write!(line, " vt{} {}", show(memory.write_volatile_to(addr, &mut sink, len)), sum(&sink))
                .unwrap();
            write!(line, " va{}", show(memory.write_all_volatile_to(addr, &mut sink, len))).unwrap();
        }
        write!(line, " {}", show(memory.write_obj(at ^ 0x5a5a, addr))).unwrap();
        write!(line, " {}", show(memory.read_obj::<u64>(addr))).unwrap();
        write!(line, " {}", show(memory.store(7u32, addr, Ordering::SeqCst))).unwrap();
        write!(line, " {}", show(memory.load::<u32>(addr, Ordering::SeqCst))).unwrap();
        write!(line, " {}", show(memory.load::<u64>(addr, Ordering::Relaxed))).unwrap();
        write!(line, " {}", show(memory.load::<u8>(addr, Ordering::Acquire))).unwrap();
        said.push(line);
    }
    said
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().zip(1..).map(|(&byte, place): (&u8, u64)| u64::from(byte) * place).sum()
}

/// Everything that `GuestMemoryBackend` and `GuestMemoryRegion` answer.
fn ask_backend<M: GuestMemoryBackend>(memory: &M) -> Vec<String> {
    let mut said = vec![format!("{} {:?}", memory.num_regions(), memory.last_addr())];
    for at in addresses() {
        let addr = GuestAddress(at);
        let mut line = format!("{at:#x}:");
        let region = memory.find_region(addr);
        write!(line, " {:?}", region.map(|region| (region.start_addr(), region.len()))).unwrap();
        let found = memory.to_region_addr(addr);
        write!(line, " {:?}", found.map(|(region, offset)| (region.last_addr(), offset))).unwrap();
        write!(line, " {} {:?}", memory.address_in_range(addr), memory.check_address(addr)).unwrap();
        for len in LENGTHS.into_iter().chain([usize::MAX, 1 << 63]) {
            write!(line, " {:?}", memory.checked_offset(addr, len)).unwrap();
            write!(line, " {}", show(memory.get_slice(addr, len).map(|slice| slice.len()))).unwrap();
        }
        for len in LENGTHS {
            write!(line, " {}", GuestMemoryBackend::check_range(memory, addr, len)).unwrap();
            #[expect(deprecated, reason = "what there is must work")]
            let accessed = memory.try_access(len, addr, |done, len, offset, region| {
                write!(line, " ({done} {len} {offset:?} {:?})", region.start_addr()).unwrap();
                Ok(len)
            });
            write!(line, " {}", show(accessed)).unwrap();
        }
        write!(line, " {}", memory.get_host_address(addr).is_ok()).unwrap();
        said.push(line);
    }
    for region in memory.iter() {
        let mut line = format!("{:?}", region.start_addr());
        for offset in [0, 1, 0xffc, 0xfff, 0x1000, 0x1fff, 0x4000, u64::MAX] {
            let addr = MemoryRegionAddress(offset);
            write!(line, " {:?}", region.check_address(addr)).unwrap();
            write!(line, " {:?}", region.checked_offset(addr, 0x1000)).unwrap();
            for len in [0, 1, 8, 0x1000, usize::MAX] {
                write!(line, " {}", show(region.get_slice(addr, len).map(|slice| slice.len()))).unwrap();
            }
            write!(line, " {}", show(region.write(&[1, 2, 3, 4, 5], addr))).unwrap();
            write!(line, " {}", show(region.read_obj::<u32>(addr))).unwrap();
            write!(line, " {}", show(region.store(3u16, addr, Ordering::SeqCst))).unwrap();
            write!(line, " {}", show(region.load::<u16>(addr, Ordering::SeqCst))).unwrap();
            write!(line, " {:?}", region.get_host_address(addr).map(|_| ()).map_err(|e| e.to_string()))
                .unwrap();
        }
        write!(line, " {:?} {:?}", region.file_offset().is_some(), region.is_hugetlbfs()).unwrap();
        write!(line, " {}", show(region.as_volatile_slice().map(|slice| slice.len()))).unwrap();
        let slice = region.as_volatile_slice().unwrap();
        write!(line, " {:?}", slice.get_ref::<u64>(0x100).map(|it| it.load()).map_err(|e| e.to_string()))
            .unwrap();
        said.push(line);
    }
    said
}

/// Compares line by line, so that a difference can be read.
fn same(ours: Vec<String>, theirs: Vec<String>) {
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.into_iter().zip(theirs) {
        assert_eq!(ours, theirs);
    }
}

fn theirs() -> GuestMemoryMmap {
    let ranges = LAYOUT.map(|(gpa, pages)| (GuestAddress(gpa), usize::try_from(pages * PAGE).unwrap()));
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn slots(flags: SlotFlags) -> Vec<SlotSpec> {
    // Ids in another order than addresses.
    let id = |i: usize| u32::try_from(LAYOUT.len() - i).unwrap() * 37;
    let slot = |(i, &(gpa, pages)): (usize, &(u64, u64))| spec(id(i), gpa / PAGE, pages, map(pages));
    LAYOUT.iter().enumerate().map(slot).map(|slot| SlotSpec { flags, ..slot }).collect()
}

#[test]
fn the_native_mode_answers_as_guest_memory_mmap_does() {
    let mut table = table(&slots(SlotFlags::empty()));
    let memory = common::space(&mut table).memory();
    let theirs = theirs();
    same(ask_memory(&*memory), ask_memory(&theirs));
    same(ask_backend(&*memory), ask_backend(&theirs));
}

#[test]
fn so_it_does_with_a_dirty_log() {
    let mut table = table(&slots(SlotFlags::LOG_DIRTY_PAGES));
    let log = DirtyLog::attach(&mut table).unwrap();
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space = unsafe { Native::new(RAM).with_log(&log).attach(&mut table) }.unwrap();
    let theirs = theirs();
    same(ask_memory(&*space.memory()), ask_memory(&theirs));
    same(ask_backend(&*space.memory()), ask_backend(&theirs));
    same(ask_memory(&*space.for_devices().memory()), ask_memory(&theirs));
}

#[test]
fn so_do_devices() {
    let mut table = table(&slots(SlotFlags::empty()));
    let memory = common::space(&mut table).for_devices().memory();
    let theirs = theirs();
    same(ask_memory(&*memory), ask_memory(&theirs));
    assert!(memory.physical_memory().is_some());
}

#[test]
fn and_so_does_the_bridge() {
    let mut table = table(&slots(SlotFlags::empty()));
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let memory = unsafe { Bridge::new(RAM).attach(&mut table) }.unwrap();
    let theirs = theirs();
    same(ask_memory(&*memory.memory()), ask_memory(&theirs));
    same(ask_backend(&*memory.memory()), ask_backend(&theirs));
}

#[test]
fn devices_cannot_write_to_read_only_slots() {
    let rom = SlotSpec { flags: SlotFlags::READONLY, ..common::fresh(1, 1, 1) };
    let mut table = table(&[common::fresh(0, 0, 1), rom, common::fresh(2, 2, 1)]);
    let space = common::space(&mut table);
    let (all, device) = (space.memory(), space.for_devices().memory());
    // The VMM may: that is how firmware gets there.
    all.write_obj(0x1234_5678u32, GuestAddress(0x1000)).unwrap();
    assert_eq!(device.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 0x1234_5678);
    let denied = |result: Result<(), GuestMemoryError>| match result {
        Err(GuestMemoryError::IOError(error)) => error.kind() == std::io::ErrorKind::PermissionDenied,
        _ => false,
    };
    assert!(denied(device.write_obj(1u32, GuestAddress(0x1000))));
    assert!(denied(device.store(1u32, GuestAddress(0x1ffc), Ordering::SeqCst)));
    assert_eq!(device.write(&[1; 16], GuestAddress(0xff8)).unwrap(), 8);
    assert_eq!(device.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 0x1234_5678);
    device.write_obj(1u32, GuestAddress(0x2000)).unwrap();
    let check = |access| device.check_range(GuestAddress(0), 0x3000, access);
    assert!(check(Permissions::Read) && !check(Permissions::Write) && !check(Permissions::ReadWrite));
    // The largest region is looked at first: it may be the ROM.
    let mut table = common::table(&[rom]);
    let device = common::space(&mut table).for_devices().memory();
    assert!(denied(device.write_obj(1u32, GuestAddress(0x1000))));
    assert_eq!(device.clone().into_unchecked().num_regions(), 1);
}
