//! Random transactions programmed into the real kernel: where writes of the guest land, and which pages are dirty.
//!
//! Nothing runs in the VM. The kernel itself writes guest memory when a vCPU's wall-clock MSR is set: 12 bytes at an
//! address of the caller's choice, through the slots, and marks what it wrote. Needs /dev/kvm on x86-64; without it
//! it says `skipped`. `MEMSLOT_KVM_CHANGES` is how many transactions, `MEMSLOT_SEED` where they start.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memslot::dirty::{Consumer, DirtyLog};
use memslot::*;
use memslot_kvm::{Kernel, KvmSlots, NotRunning, Options, Vm};
use memslot_testing::{Random, number, seed};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::common::{PAGE, RAM, gfns, random_op, spec};

const FRAMES: u64 = 320;
const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;

/// Host memory for the guest, page-aligned.
struct Memory(Vec<AtomicU8>);

impl Memory {
    fn new() -> Self {
        Self((0..(FRAMES + 1) * PAGE).map(|_| AtomicU8::new(0)).collect())
    }

    fn hva(&self) -> u64 {
        (self.0.as_ptr() as u64).next_multiple_of(PAGE)
    }

    fn byte(&self, hva: u64) -> &AtomicU8 {
        &self.0[usize::try_from(hva - self.0.as_ptr() as u64).unwrap()]
    }
}

struct Rig {
    table: SlotTable,
    slots: KvmSlots,
    log: DirtyLog,
    consumer: Consumer,
    vcpu: VcpuFd,
    vm: VmFd,
    memory: Memory,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Mode {
    Auto,
    Manual,
    InitiallySet,
    Ring,
}

fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            memslot_testing::skipped(&format!("slots in the real kernel: no /dev/kvm ({error})"));
            None
        }
    }
}

impl Rig {
    fn new(kvm: &Kvm, mode: Mode, options: Options) -> Self {
        let memory = Memory::new();
        let vm = kvm.create_vm().unwrap();
        let mut table = SlotTable::new(Limits { address_spaces: 1, ..Limits::default() }).unwrap();
        // SAFETY: slots stand on `memory`, which lives longer than the VM and consists of atomics.
        let slots =
            unsafe { KvmSlots::attach(&mut table, Vm::of(&vm).unwrap(), NotRunning, options) }.unwrap();
        let log = slots.dirty_log(&mut table).unwrap();
        let consumer = log.consumer().unwrap();
        match mode {
            Mode::Auto => {}
            Mode::Manual => slots.enable_manual_protect(false).unwrap(),
            Mode::InitiallySet => slots.enable_manual_protect(true).unwrap(),
            Mode::Ring => slots.enable_rings(1024).unwrap(),
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        if mode == Mode::Ring {
            slots.add_vcpu(0, &vcpu).unwrap();
        }
        Self { table, slots, log, consumer, vcpu, vm, memory }
    }

    /// The guest writes a frame (not at address 0, which the MSR does not take). Returns whether that marks it.
    fn write(&self, gfn: u64) -> bool {
        let entry =
            kvm_msr_entry { index: MSR_KVM_WALL_CLOCK_NEW, data: gfn * PAGE + 8, ..Default::default() };
        let slot = self.table.view().slot_at(RAM, Gfn::new(gfn));
        let hva = slot.and_then(|slot| slot.hva_of(Gfn::new(gfn)));
        let everywhere = || (0..FRAMES).map(|page| self.memory.hva() + page * PAGE + 8);
        everywhere().for_each(|hva| self.memory.byte(hva).store(1, Ordering::Relaxed));
        assert_eq!(self.vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap(), 1);
        // The version in the first word is made even, and grows.
        let written: Vec<u64> =
            everywhere().filter(|&hva| self.memory.byte(hva).load(Ordering::Relaxed) != 1).collect();
        let writable = slot.filter(|slot| !slot.flags().contains(SlotFlags::READONLY));
        let expected: Vec<u64> =
            hva.filter(|_| writable.is_some()).map(|hva| hva.get() + 8).into_iter().collect();
        assert_eq!(written, expected, "where the guest's write of gfn {gfn} lands");
        hva.is_some() && writable.is_some_and(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES))
    }

    /// The guest writes these frames.
    fn touch(&self, gfns: &BTreeSet<u64>) {
        let entries: Vec<kvm_msr_entry> = gfns
            .iter()
            .map(|gfn| kvm_msr_entry {
                index: MSR_KVM_WALL_CLOCK_NEW,
                data: gfn * PAGE + 8,
                ..Default::default()
            })
            .collect();
        assert_eq!(self.vcpu.set_msrs(&Msrs::from_entries(&entries).unwrap()).unwrap(), entries.len());
    }

    fn harvested(&self) -> BTreeSet<u64> {
        let harvest = self.slots.harvest(&self.consumer).unwrap();
        let pages = harvest.runs().flat_map(|run| run.gfns.start().get()..run.gfns.end().get()).collect();
        harvest.commit();
        pages
    }

    fn is_logged(&self, gfn: u64) -> bool {
        let slot = self.table.view().slot_at(RAM, Gfn::new(gfn));
        slot.is_some_and(|slot| slot.hva().is_some() && slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES))
    }

    fn backing(view: &View, gfn: u64) -> Option<Hva> {
        view.slot_at(RAM, Gfn::new(gfn))?.hva_of(Gfn::new(gfn))
    }
}

#[test]
fn writes_land_where_the_table_says_and_are_reported() {
    let Some(kvm) = kvm() else { return };
    let (total, mut seed) = (number("MEMSLOT_KVM_CHANGES", 1200_u64), seed());
    let (mut changes, mut committed, mut reported) = (0, 0, 0);
    while changes < total {
        let random = &mut Random::new(seed);
        let mode =
            [Mode::Auto, Mode::Manual, Mode::InitiallySet, Mode::Ring][usize::try_from(seed % 4).unwrap()];
        let max_pages = random.pick(&[None, NonZeroU64::new(8)]);
        let mut rig = Rig::new(&kvm, mode, Options { max_pages, ids: None });
        for _ in 0..60 {
            let before = rig.table.snapshot();
            let mut expected = BTreeSet::new();
            let hva = rig.memory.hva();
            expected.extend((0..8).map(|_| random.below(FRAMES)).filter(|&gfn| rig.write(gfn)));
            let operations = 1 + random.below(3);
            let result = rig
                .table
                .transaction(|tx| (0..operations).try_for_each(|_| random_op(tx, random, 16, FRAMES, hva)));
            committed += u32::from(result.is_ok());
            changes += 1;
            expected.retain(|&gfn| {
                Rig::backing(&before, gfn) == Rig::backing(rig.table.view(), gfn) && rig.is_logged(gfn)
            });
            expected.extend((0..8).map(|_| random.below(FRAMES)).filter(|&gfn| rig.write(gfn)));
            let found = rig.harvested();
            assert!(expected.is_subset(&found), "{mode:?}, seed {seed}: {expected:?} of {found:?}");
            // Slots without memory may be logged, too, and all their pages dirty at first.
            let logs = |gfn: &u64| {
                let slot = rig.table.view().slot_at(RAM, Gfn::new(*gfn));
                slot.is_some_and(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES))
            };
            assert!(found.iter().all(logs));
            reported += found.len();
            // Without a change in between it is exact.
            let written: BTreeSet<u64> =
                (0..8).map(|_| random.below(FRAMES)).filter(|&gfn| rig.write(gfn)).collect();
            assert_eq!(rig.harvested(), written, "{mode:?}, seed {seed}");
            assert!(rig.slots.is_in_step());
        }
        seed += 1;
    }
    println!("{changes} changes ({committed} committed), {reported} dirty pages");
}

#[test]
fn what_the_kernel_refuses_is_undone() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::new(&kvm, Mode::Auto, Options::default());
    let hva = rig.memory.hva();
    rig.table.create(spec(0, 0, 16, hva, SlotFlags::empty())).unwrap();
    let before = rig.slots.slots();
    let error = rig
        .table
        .transaction(|tx| {
            tx.set_read_only(RAM, SlotId::new(0), true)?;
            tx.create(spec(1, 20, 4, hva + 20 * PAGE, SlotFlags::empty()))?;
            // Beyond any physical address that the processor has.
            tx.create(spec(2, 1 << 41, 4, hva + 30 * PAGE, SlotFlags::empty()))
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains("create KVM slot") && error.contains("os error 22"), "{error}");
    assert_eq!(rig.slots.slots(), before);
    assert!(rig.slots.is_in_step());
    assert!(!rig.write(3) && !rig.write(21));
}

#[test]
fn a_vm_lives_as_long_as_its_slots_are_followed() {
    let Some(kvm) = kvm() else { return };
    let Rig { mut table, slots, log, consumer, vcpu, vm, memory } =
        Rig::new(&kvm, Mode::Auto, Options::default());
    drop((vcpu, vm));
    table.create(spec(0, 0, 16, memory.hva(), SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert_eq!(slots.slots().len(), 1);
    assert_eq!(slots.fetch().unwrap(), 0);
    log.mark_range(RAM, gfns(3, 2));
    assert_eq!(slots.harvest(&consumer).unwrap().pages(), 2);
}

/// A ring is memory that user space can write: what stands there is not believed.
#[test]
fn an_entry_that_names_no_page_of_a_slot_is_ignored() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::new(&kvm, Mode::Ring, Options::default());
    let hva = rig.memory.hva();
    rig.table.create(spec(0, 0, 16, hva, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    rig.table.create(spec(1, 16, 16, hva + 16 * PAGE, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    assert!(rig.write(5));
    let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, rig.vcpu.as_raw_fd());
    // SAFETY: a new mapping of the vCPU's ring, of which we write one entry.
    unsafe {
        let ring = libc::mmap(std::ptr::null_mut(), 16384, protection, libc::MAP_SHARED, fd, 64 * 4096);
        assert_ne!(ring, libc::MAP_FAILED);
        // Flags and slot, then the page: the second entry says page 16 of slot 0.
        let entry = ring.cast::<u64>().add(2);
        entry.add(1).write_volatile(16);
        entry.write_volatile(1);
        // And the third one a slot that does not exist.
        entry.add(2).write_volatile(1 | 0x7777 << 32);
        libc::munmap(ring, 16384);
    }
    assert_eq!(rig.slots.fetch().unwrap(), 3);
    assert_eq!(rig.harvested(), BTreeSet::from([5]));
}

#[test]
fn rings_are_mapped_only_where_they_were_asked_for() {
    let Some(kvm) = kvm() else { return };
    let rig = Rig::new(&kvm, Mode::Auto, Options::default());
    let error = rig.slots.add_vcpu(0, &rig.vcpu).unwrap_err().to_string();
    assert_eq!(error, "dirty rings are not enabled: call KvmSlots::enable_rings first");
    // A vCPU is there already.
    assert!(
        rig.slots.enable_rings(1024).unwrap_err().to_string().starts_with("dirty rings of 1024 entries: ")
    );
}

/// A signal makes the kernel leave off resetting rings; it then says how far it came, and reports no error.
#[test]
fn signals_lose_no_page_of_a_ring() {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::new(&kvm, Mode::Ring, Options::default());
    let hva = rig.memory.hva();
    rig.table.create(spec(0, 0, FRAMES, hva, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    register_signal_handler(SIGRTMIN(), nothing).unwrap();
    // SAFETY: the call asks who we are.
    let (done, thread) = (AtomicBool::new(false), unsafe { libc::pthread_self() });
    let pages: BTreeSet<u64> = (1..200).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            while !done.load(Ordering::Relaxed) && start.elapsed() < Duration::from_secs(20) {
                // SAFETY: the thread waits for this one in the end.
                unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        let rounds: Vec<_> = (0..1000)
            .map(|_| {
                rig.touch(&pages);
                let fetched = rig.slots.fetch().unwrap_or_default();
                // What the kernel resets now it had not reset when the pages were said to be fetched.
                (fetched, rig.slots.kernel().reset_dirty_rings().unwrap_or_default())
            })
            .collect();
        done.store(true, Ordering::Relaxed);
        let left: Vec<_> = rounds.into_iter().filter(|&round| round != (3 * 199, 0)).collect();
        assert_eq!(left, [], "pages were fetched that the guest could still write unnoticed");
    });
}

/// A vCPU that goes is read to the end, and one that is added twice would have its entries shared out between two readers.
#[test]
fn vcpus_come_and_go() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::new(&kvm, Mode::Ring, Options::default());
    let hva = rig.memory.hva();
    rig.table.create(spec(0, 0, 64, hva, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    let known = rig.slots.add_vcpu(0, &rig.vcpu).unwrap_err().to_string();
    assert_eq!(known, "vCPU 0 is known already");
    assert!(rig.write(5));
    assert_eq!(rig.slots.remove_vcpu(0).unwrap(), 3, "the kernel writes three times");
    assert_eq!(rig.harvested(), BTreeSet::from([5]));
    let unknown = rig.slots.remove_vcpu(0).unwrap_err().to_string();
    assert_eq!(unknown, "vCPU 0 is not known: it was not added, or removed already");
    // Another one, under the same number; nobody holds the first one any more.
    rig.vcpu = rig.vm.create_vcpu(1).unwrap();
    rig.slots.add_vcpu(0, &rig.vcpu).unwrap();
    assert!(rig.write(7));
    assert_eq!(rig.harvested(), BTreeSet::from([7]));
}

/// What can be done wrong in safe code has an error, and no more.
#[test]
fn numbers_that_are_no_descriptors_and_bitmaps_that_are_too_short() {
    let error = Vm::of(&-1).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::new(&kvm, Mode::Manual, Options::default());
    let hva = rig.memory.hva();
    rig.table.create(spec(0, 0, 128, hva, SlotFlags::LOG_DIRTY_PAGES)).unwrap();
    let kernel = rig.slots.kernel();
    kernel.clear_dirty_log(0, 0, 128, &[0, 0]).unwrap();
    assert_eq!(kernel.clear_dirty_log(0, 0, 128, &[0]).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
}
