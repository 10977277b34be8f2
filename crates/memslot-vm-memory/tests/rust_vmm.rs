//! The crates of rust-vmm, unchanged, on memslot's memory.

mod common;

use std::io::{Cursor, Read};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use common::{PAGE, RAM, fresh, map, space, spec, table};
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{BzImage, Elf, KernelLoader, load_cmdline};
use memslot::{Gfn, SlotFlags, SlotId, SlotSpec, SlotTable};
use memslot_vm_memory::{Bridge, MemoryGuard, Space};
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vsock::Vsock;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap,
};

/// A table whose RAM is cut into slots at odd places, in no order of the host's.
fn cut_table() -> SlotTable {
    table(&[fresh(4, 0, 0x101), fresh(0, 0x101, 0x3), fresh(9, 0x104, 0x200), fresh(2, 0x304, 0xfc)])
}

/// An ELF image for x86-64 with two segments.
fn elf(segments: [(u64, &[u8]); 2]) -> Vec<u8> {
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    image.extend([2, 0, 0x3e, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    for word in [segments[0].0, 64, 0] {
        image.extend(word.to_le_bytes()); // entry, program headers, no sections
    }
    for half in [0u16, 0, 64, 56, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes()); // flags (two halves), sizes and numbers of headers
    }
    let mut at = 64 + 2 * 56;
    for (address, bytes) in segments {
        image.extend([1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, readable, writable, executable
        for word in [at, address, address, bytes.len() as u64, bytes.len() as u64 + 64, 0x1000] {
            image.extend(word.to_le_bytes());
        }
        at += bytes.len() as u64;
    }
    segments.iter().for_each(|(_, bytes)| image.extend_from_slice(bytes));
    image
}

/// A bzImage: one sector and four of setup code, then the kernel.
fn bzimage(kernel: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 5 * 512];
    image[0x1f1] = 4; // setup sectors
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes()); // protocol 2.15
    image[0x211] = 1; // loaded high
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image.extend_from_slice(kernel);
    image
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + usize::from(seed)) % 253).unwrap()).collect()
}

fn load_everything<M: GuestMemoryBackend>(memory: &M) {
    let (text, data) = (pattern(1, 0x3210), pattern(2, 0x777));
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    };
    // The first segment lies across three slots.
    let mut image = Cursor::new(elf([(0x10_0010, &text), (0x30_3ff0, &data)]));
    let loaded = Elf::load(memory, None, &mut image, Some(GuestAddress(0x10_0000))).unwrap();
    assert_eq!((loaded.kernel_load, loaded.kernel_end), (GuestAddress(0x10_0010), 0x30_3ff0 + 0x777 + 64));
    assert_eq!((read(0x10_0010, text.len()), read(0x30_3ff0, data.len())), (text, data));

    let kernel = pattern(3, 0x20_5001);
    let mut image = Cursor::new(bzimage(&kernel));
    let loaded = BzImage::load(memory, None, &mut image, Some(GuestAddress(0x10_0000))).unwrap();
    assert_eq!((loaded.kernel_load, loaded.kernel_end), (GuestAddress(0x10_0000), 0x30_5001));
    assert_eq!(read(0x10_0000, kernel.len()), kernel);
    // Beyond the end of memory.
    assert!(BzImage::load(memory, Some(GuestAddress(0x3f_0000)), &mut image, None).is_err());

    let mut cmdline = Cmdline::new(64).unwrap();
    cmdline.insert_str("console=ttyS0 panic=1").unwrap();
    load_cmdline(memory, GuestAddress(0x10_0ff8), &cmdline).unwrap();
    assert_eq!(read(0x10_0ff8, 22), b"console=ttyS0 panic=1\0");
    assert!(load_cmdline(memory, GuestAddress(0x3f_fff0), &cmdline).is_err());
}

#[test]
fn linux_loader_loads_kernels_and_a_command_line() {
    let mut table = cut_table();
    load_everything(&*space(&mut table).memory());
    let mut table = cut_table();
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let bridge: GuestMemoryAtomic<GuestMemoryMmap> = unsafe { Bridge::new(RAM).attach(&mut table) }.unwrap();
    load_everything(&*bridge.memory());
}

/// The pages of RAM in the tests below, each filled with its number.
const PAGES: u64 = 256;
/// Where a pair of slots is plugged and unplugged, in one transaction each.
const PAIR: [u64; 2] = [0x1000, 0x2000];

/// RAM with a queue in each of the first pages, and buffers that lie across pages.
fn ram(table: &mut SlotTable, space: &Space, queues: u64) -> Vec<u64> {
    table.create(spec(0, 0, PAGES, map(PAGES))).unwrap();
    let memory = space.memory();
    for page in 0..PAGES {
        memory.write_slice(&[u8::try_from(page % 251).unwrap(); 4096], GuestAddress(page * PAGE)).unwrap();
    }
    (0..queues)
        .map(|queue| {
            let at = queue * PAGE;
            let mock = MockSplitQueue::create(&*memory, GuestAddress(at), 16);
            let descriptors: Vec<RawDescriptor> = (0..4)
                .map(|i| Descriptor::new(buffer(queue, i), 3 * 4096, u16::from(i < 3), i + 1).into())
                .collect();
            mock.build_desc_chain(&descriptors).unwrap();
            at
        })
        .collect()
}

fn buffer(queue: u64, i: u16) -> u64 {
    (20 + 40 * queue % 200 + 7 * u64::from(i)) * PAGE + 0x800
}

/// What a reader of the chain must find: three pages from each buffer on.
fn expected(queue: u64) -> Vec<u8> {
    let bytes = (0..4).flat_map(|i| {
        let start = buffer(queue, i);
        (start..start + 3 * PAGE).map(|at| u8::try_from(at / PAGE % 251).unwrap())
    });
    bytes.collect()
}

fn queue_at<M: GuestMemory>(memory: &M, at: u64) -> Queue {
    // Only the addresses are wanted; what is in memory was written by `ram`.
    let mut queue = Queue::new(16).unwrap();
    queue.set_size(16);
    queue.set_ready(true);
    let low = |at: u64| Some(u32::try_from(at).unwrap());
    queue.set_desc_table_address(low(at), Some(0));
    queue.set_avail_ring_address(low(at + 256), Some(0));
    queue.set_used_ring_address(low(at + 256 + 40), Some(0));
    assert!(queue.is_valid(memory));
    queue
}

/// Splits and merges RAM, moves nothing that is in use, plugs and unplugs the pair.
fn churn(table: &mut SlotTable, turn: u64) {
    let slots: Vec<_> = table.view().slots(RAM).map(|slot| (slot.id(), slot.gfns())).collect();
    let ram: Vec<_> = slots.iter().filter(|(_, gfns)| gfns.end().get() <= PAGES).copied().collect();
    let random = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    let (id, gfns) = ram[usize::try_from(random).unwrap() % ram.len()];
    match random % 4 {
        0 if gfns.len() > 1 && ram.len() < 40 => {
            let at = gfns.start().get() + 1 + random % (gfns.len() - 1);
            let free = (1..).map(SlotId::new).find(|id| table.view().slot(RAM, *id).is_none()).unwrap();
            table.transaction(|tx| tx.split(RAM, id, Gfn::new(at), free)).unwrap();
        }
        1 => {
            if let Some((next, _)) = ram.iter().find(|(_, other)| other.start() == gfns.end()) {
                table.transaction(|tx| tx.merge(RAM, id, *next)).unwrap();
            }
        }
        2 => {
            let id = |at: usize| SlotId::new(1000 + u32::try_from(at).unwrap());
            let there = table.view().slot(RAM, id(0)).is_some();
            table
                .transaction(|tx| {
                    PAIR.iter().enumerate().try_for_each(|(at, &gfn)| {
                        if there {
                            tx.delete(RAM, id(at))
                        } else {
                            tx.create(spec(id(at).get(), gfn, 1, PLUG.get(at)))
                        }
                    })
                })
                .unwrap();
        }
        _ => {
            let flags = if random % 8 == 3 { SlotFlags::LOG_DIRTY_PAGES } else { SlotFlags::empty() };
            table.set_flags(RAM, id, flags).unwrap();
        }
    }
}

/// Memory for the pair, mapped once.
struct Plug(std::sync::OnceLock<memslot::Hva>);
static PLUG: Plug = Plug(std::sync::OnceLock::new());

impl Plug {
    fn get(&self, at: usize) -> memslot::Hva {
        let first = *self.0.get_or_init(|| map(2));
        first.checked_add(at as u64 * PAGE).unwrap()
    }
}

/// The slots that a version has must be those of one moment.
fn whole<M: GuestMemory>(memory: &M) {
    let there =
        PAIR.map(|gfn| memory.check_range(GuestAddress(gfn * PAGE), 4096, vm_memory::Permissions::Read));
    assert_eq!(there[0], there[1], "a transaction was seen in part");
    assert!(memory.check_range(
        GuestAddress(0),
        usize::try_from(PAGES * PAGE).unwrap(),
        vm_memory::Permissions::Read
    ));
}

#[test]
fn virtio_queues_are_walked_while_slots_split_merge_and_come_and_go() {
    let mut table = table(&[]);
    let space = space(&mut table);
    let queues = ram(&mut table, &space, 2);
    let (stop, walked) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for (number, &at) in queues.iter().enumerate() {
            let (space, stop, walked) = (space.clone(), &stop, &walked);
            scope.spawn(move || {
                let expected = expected(number as u64);
                let mut queue = queue_at(&*space.memory(), at);
                let device = space.for_devices();
                while !stop.load(Ordering::Relaxed) {
                    // As a device does that knows `GuestMemoryBackend`, and as one that knows `GuestMemory` only.
                    let memory = space.memory();
                    queue.set_next_avail(0);
                    let chain = queue.pop_descriptor_chain(memory.clone()).unwrap();
                    assert_eq!(chain.clone().count(), 4);
                    let mut read = Vec::new();
                    chain.reader(&*memory).unwrap().read_to_end(&mut read).unwrap();
                    assert!(read == expected, "a buffer was not what it is");
                    whole(&*memory);
                    let memory = device.memory();
                    queue.set_next_avail(0);
                    let chain = queue.pop_descriptor_chain(memory.clone()).unwrap();
                    read.clear();
                    chain.reader(&*memory).unwrap().read_to_end(&mut read).unwrap();
                    assert!(read == expected, "a buffer was not what it is");
                    whole(&*memory);
                    walked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut turn = 0;
        while turn < 3000 || walked.load(Ordering::Relaxed) < 200 {
            churn(&mut table, turn);
            turn += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn chains_are_worked_on_by_other_threads_and_outlive_the_table() {
    fn sendable<T: Send + 'static>(_: &T) {}
    let mut table = table(&[]);
    let space = space(&mut table);
    let queues = ram(&mut table, &space, 1);
    let mut queue = queue_at(&*space.memory(), queues[0]);
    let (sender, receiver) = mpsc::channel::<DescriptorChain<MemoryGuard<()>>>();
    let receiver = std::sync::Arc::new(std::sync::Mutex::new(receiver));
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let receiver = receiver.clone();
            std::thread::spawn(move || {
                let (expected, mut done) = (expected(0), 0);
                loop {
                    let Ok(chain) = receiver.lock().unwrap().recv() else { return done };
                    let mut read = Vec::new();
                    for descriptor in chain.clone() {
                        let mut bytes = vec![0; descriptor.len() as usize];
                        chain.memory().read_slice(&mut bytes, descriptor.addr()).unwrap();
                        read.extend(bytes);
                    }
                    assert!(read == expected);
                    done += 1;
                }
            })
        })
        .collect();
    for turn in 0..400 {
        queue.set_next_avail(0);
        let chain = queue.pop_descriptor_chain(space.memory()).unwrap();
        sendable(&chain);
        sender.send(chain).unwrap();
        churn(&mut table, turn);
    }
    drop((table, space));
    drop(sender);
    assert_eq!(workers.into_iter().map(|worker| worker.join().unwrap()).sum::<i32>(), 400);
}

#[test]
fn the_bridge_is_walked_while_slots_change() {
    let mut table = table(&[]);
    let native = space(&mut table);
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space: GuestMemoryAtomic<GuestMemoryMmap> = unsafe { Bridge::new(RAM).attach(&mut table) }.unwrap();
    let queues = ram(&mut table, &native, 1);
    let (stop, walked) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (space, stop, walked) = (space.clone(), &stop, &walked);
        scope.spawn(move || {
            let expected = expected(0);
            let mut queue = queue_at(&*space.memory(), queues[0]);
            while !stop.load(Ordering::Relaxed) {
                let memory = space.memory();
                queue.set_next_avail(0);
                let chain = queue.pop_descriptor_chain(memory.clone()).unwrap();
                let mut read = Vec::new();
                chain.reader(&*memory).unwrap().read_to_end(&mut read).unwrap();
                assert!(read == expected, "a buffer was not what it is");
                whole(&*memory);
                walked.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut turn = 0;
        while turn < 1000 || walked.load(Ordering::Relaxed) < 100 {
            churn(&mut table, turn);
            turn += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn vhost_kern_takes_the_address_space() {
    fn accepted<B: VhostKernBackend>(_: Result<B, vhost::Error>) -> Option<()> {
        None
    }
    let mut table = table(&[fresh(0, 0, 16)]);
    let space = space(&mut table);
    // What matters is that this compiles; the device need not be there.
    match Vsock::new(space.clone()) {
        Ok(vsock) => assert_eq!(vsock.mem().memory().num_regions(), 1),
        Err(error) => println!("skipped: /dev/vhost-vsock cannot be opened: {error}"),
    }
    assert!(accepted::<Vsock<Space>>(Err(vhost::Error::InvalidQueue)).is_none());
}

/// A read-only slot is as good as any other to who reads it.
#[test]
fn read_only_slots_are_regions() {
    let rom = SlotSpec { flags: SlotFlags::READONLY, ..fresh(1, 16, 1) };
    let mut table = table(&[fresh(0, 0, 16), rom]);
    let memory = space(&mut table).memory();
    assert_eq!(memory.num_regions(), 2);
    assert!(memory.find_region(GuestAddress(16 * PAGE)).unwrap().is_read_only());
    memory.write_slice(&[0xea; 8], GuestAddress(17 * PAGE - 8)).unwrap();
}
