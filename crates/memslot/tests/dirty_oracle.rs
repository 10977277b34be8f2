//! Random programs on the dirty log, to the real kernel and to ours: errno for errno, bit for bit.
//!
//! Nothing runs in the VM. The kernel itself writes guest memory when a vCPU's wall-clock MSR is set: 12 bytes at an address
//! of the caller's choice, through the slots, and marks what it wrote. Needs /dev/kvm; elsewhere it says `skipped`.
//! `MEMSLOT_ORACLE_OPS` and `MEMSLOT_SEED` are as in `oracle.rs`.

#[cfg(not(target_os = "linux"))]
#[test]
fn the_kernel_marks_and_clears_the_same_pages() {
    memslot_testing::skipped("comparison of dirty logs with the kernel: not Linux");
}

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::AsRawFd;

    use kvm_bindings::{Msrs, kvm_msr_entry};
    use kvm_ioctls::{Kvm, VcpuFd, VmFd};
    use memslot::dirty::kvm::{ClearDirtyLog, KvmDirtyLog};
    use memslot::dirty::{DirtyLog, SoftwareOnly};
    use memslot::rules::{Rules, UserMemoryRegion};
    use memslot::{AddressSpaceId, Gpa, Limits, PageSize, SlotFlags, SlotId, SlotTable};
    use memslot_testing::{Random, number, seed, skipped};

    const PAGE: u64 = 4096;
    /// Guest pages that anything happens in; as many are mapped in the host.
    const PAGES: u64 = 2048;
    const IDS: u64 = 5;
    const WORDS: usize = 4;
    /// Calls for each VM.
    const CALLS: u64 = 3000;

    const KVM_GET_DIRTY_LOG: libc::c_ulong = 0x4010_ae42;
    const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
    const KVM_ENABLE_CAP: libc::c_ulong = 0x4068_aea3;
    const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
    const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;

    #[repr(C)]
    struct GetArgument {
        slot: u32,
        padding: u32,
        bitmap: u64,
    }

    #[repr(C)]
    struct ClearArgument {
        slot: u32,
        num_pages: u32,
        first_page: u64,
        bitmap: u64,
    }

    #[repr(C)]
    struct EnableArgument {
        cap: u32,
        flags: u32,
        args: [u64; 4],
        padding: [u8; 64],
    }

    #[repr(C)]
    struct RegionArgument {
        slot: u32,
        flags: u32,
        guest_phys_addr: u64,
        memory_size: u64,
        userspace_addr: u64,
    }

    /// Host memory for the guest, unmapped at the end.
    struct Memory(u64);

    impl Memory {
        fn new() -> Self {
            let (protection, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let size = usize::try_from(PAGES * PAGE).unwrap();
            // SAFETY: a new mapping, wherever the kernel likes.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
            assert_ne!(start, libc::MAP_FAILED);
            Self(start as u64)
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            let size = usize::try_from(PAGES * PAGE).unwrap();
            // SAFETY: the mapping is ours, and the VM that used it is gone or writes no more.
            unsafe { libc::munmap(self.0 as *mut libc::c_void, size) };
        }
    }

    /// Both sides, and what their calls need.
    struct Pair {
        vm: VmFd,
        vcpu: VcpuFd,
        memory: Memory,
        table: SlotTable,
        log: DirtyLog,
        dirty: KvmDirtyLog,
        rules: Rules,
    }

    impl Pair {
        fn new(kvm: &Kvm) -> Self {
            let vm = kvm.create_vm().unwrap();
            let vcpu = vm.create_vcpu(0).unwrap();
            let slots = u32::try_from(kvm.get_nr_memslots()).unwrap();
            let mut table = SlotTable::new(Limits { slots, address_spaces: 1, ..Limits::default() }).unwrap();
            let log = DirtyLog::attach(&mut table).unwrap();
            let mut dirty = KvmDirtyLog::new(log.consumer().unwrap());
            dirty.vcpu_created();
            Self { vm, vcpu, memory: Memory::new(), table, log, dirty, rules: Rules::default() }
        }

        /// 0, or the errno.
        fn ioctl<T>(&self, request: libc::c_ulong, argument: &T) -> i32 {
            // SAFETY: the request's argument is a `T`; what it points to is alive and large enough.
            let result = unsafe { libc::ioctl(self.vm.as_raw_fd(), request, std::ptr::from_ref(argument)) };
            if result == -1 { std::io::Error::last_os_error().raw_os_error().unwrap() } else { 0 }
        }

        fn set(&mut self, random: &mut Random) -> (i32, i32, String) {
            let id = random.below(IDS);
            let mut region = UserMemoryRegion {
                slot: u32::try_from(id).unwrap(),
                flags: random.pick(&[0, 1, 1, 1, 1, 1, 3]),
                guest_phys_addr: random.below(PAGES - 200) * PAGE,
                memory_size: random.pick(&[1, 16, 63, 64, 65, 100, 128, 200]) * PAGE,
                userspace_addr: self.memory.0 + random.below(PAGES - 200) * PAGE,
            };
            if random.once_in(20) {
                region.userspace_addr = 0x2000_0000_0000;
            }
            let known = self.table.view().slot(AddressSpaceId::NORMAL, SlotId::new(region.slot)).copied();
            if let Some(slot) = known.filter(|_| !random.once_in(5)) {
                region.userspace_addr = slot.hva().unwrap().get();
                region.memory_size = slot.pages() * PAGE;
                let (here, flags) = (slot.base_gfn().get() * PAGE, slot.flags().bits());
                match random.below(6) {
                    0 => region.memory_size = 0,
                    1 => (region.guest_phys_addr, region.flags) = (here, flags),
                    2 => (region.guest_phys_addr, region.flags) = (here, flags ^ 1),
                    3 | 4 => region.flags = flags,
                    _ => region.flags = flags ^ 1,
                }
            }
            let UserMemoryRegion { slot, flags, guest_phys_addr, memory_size, userspace_addr } = region;
            let argument = RegionArgument { slot, flags, guest_phys_addr, memory_size, userspace_addr };
            let theirs = self.ioctl(KVM_SET_USER_MEMORY_REGION, &argument);
            let ours = self.rules.set_user_memory_region(&mut self.table, &region);
            (ours.map_or_else(|refusal| refusal.errno.raw(), |_| 0), theirs, format!("{region:x?}"))
        }

        /// The kernel writes 12 bytes, page by page until one cannot be written.
        fn write(&mut self, random: &mut Random) {
            let page = random.below(PAGES);
            let gpa = page * PAGE + random.pick(&[0, 4, 0x800, PAGE - 12, PAGE - 8]);
            let entry = kvm_msr_entry { index: MSR_KVM_WALL_CLOCK_NEW, data: gpa, ..Default::default() };
            assert_eq!(self.vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap(), 1);
            let mut pages = vec![gpa, gpa + 11];
            pages.dedup_by_key(|gpa| *gpa / PAGE);
            for gpa in pages.into_iter().map(Gpa::new) {
                let found = self.table.view().translate(AddressSpaceId::NORMAL, gpa);
                let is_mapped = |hva: u64| (self.memory.0..self.memory.0 + PAGES * PAGE).contains(&hva);
                match found.filter(|found| is_mapped(found.hva.get())).map(|found| found.flags) {
                    Some(SlotFlags::LOG_DIRTY_PAGES) => {
                        self.log.mark(AddressSpaceId::NORMAL, gpa.gfn(PageSize::K4));
                    }
                    Some(flags) if !flags.contains(SlotFlags::READONLY) => {}
                    _ => break,
                }
            }
        }

        fn slot(random: &mut Random) -> u32 {
            let any = u32::try_from(random.below(IDS)).unwrap();
            if random.once_in(30) { random.pick(&[5, 32763, 32764, 65535, 1 << 16, u32::MAX]) } else { any }
        }

        fn get(&mut self, random: &mut Random) -> (i32, i32, String) {
            let slot = Self::slot(random);
            let is_bad = random.once_in(15);
            let (mut theirs, mut ours) =
                ([0xaaaa_aaaa_aaaa_aaaau64; WORDS], [0xaaaa_aaaa_aaaa_aaaau64; WORDS]);
            let bitmap = if is_bad { 0 } else { theirs.as_mut_ptr() as u64 };
            let kernel = self.ioctl(KVM_GET_DIRTY_LOG, &GetArgument { slot, padding: 0, bitmap });
            let buffer = if is_bad { None } else { Some(&mut ours[..]) };
            let result = self.dirty.get_dirty_log(slot, buffer, &mut SoftwareOnly);
            assert_eq!(ours, theirs, "the bits of slot {slot}: ours, and the kernel's");
            (result.map_or_else(|errno| errno.raw(), |()| 0), kernel, format!("get {slot}"))
        }

        fn clear(&mut self, random: &mut Random) -> (i32, i32, String) {
            let slot = Self::slot(random);
            let first_page = random.pick(&[0, 0, 0, 64, 64, 128, 192, 1, 63, 200, 256, 1 << 63]);
            let pages = self
                .table
                .view()
                .slot(AddressSpaceId::NORMAL, SlotId::new(slot))
                .map_or(64, |slot| slot.pages());
            let to_end = pages.wrapping_sub(first_page) & 0xff;
            let num = random.pick(&[to_end, to_end, to_end, 64, 128, 0, 1, 63, to_end + 1]);
            let num_pages = u32::try_from(num).unwrap();
            let mut mask = [0u64; 5];
            mask.iter_mut().for_each(|word| {
                *word = random.pick(&[0, u64::MAX, 1, 1 << 63, 0xffff_0000]) ^ random.next();
            });
            let is_bad = random.once_in(15);
            let bitmap = if is_bad { 0 } else { mask.as_ptr() as u64 };
            let kernel =
                self.ioctl(KVM_CLEAR_DIRTY_LOG, &ClearArgument { slot, num_pages, first_page, bitmap });
            let clear = ClearDirtyLog { slot, num_pages, first_page };
            let result =
                self.dirty.clear_dirty_log(&clear, (!is_bad).then_some(&mask[..]), &mut SoftwareOnly);
            (result.map_or_else(|errno| errno.raw(), |()| 0), kernel, format!("{clear:?} of {pages} pages"))
        }

        fn enable(&mut self, random: &mut Random) -> (i32, i32, String) {
            let (arg, flags) = (random.below(6), u32::from(random.once_in(10)));
            let argument = EnableArgument { cap: 168, flags, args: [arg, 0, 0, 0], padding: [0; 64] };
            let kernel = self.ioctl(KVM_ENABLE_CAP, &argument);
            let result = self.dirty.enable_cap(168, flags, arg);
            (
                result.map_or_else(|errno| errno.raw(), |()| 0),
                kernel,
                format!("cap 168, {arg}, flags {flags}"),
            )
        }
    }

    #[test]
    fn the_kernel_marks_and_clears_the_same_pages() {
        let kvm = match Kvm::new() {
            Ok(kvm) if !cfg!(miri) && cfg!(target_arch = "x86_64") => kvm,
            Ok(_) => return skipped("comparison of dirty logs with the kernel: Miri, or not x86-64"),
            Err(error) => {
                let why = format!("comparison of dirty logs with the kernel: no /dev/kvm ({error})");
                return skipped(&why);
            }
        };
        let (total, seed): (u64, u64) = (number("MEMSLOT_ORACLE_OPS", 30_000), seed());
        let (mut done, mut answers) = (0, std::collections::BTreeMap::new());
        while done < total {
            let mut random = Random::new(seed.wrapping_add(done));
            let mut pair = Pair::new(&kvm);
            for call in 0..CALLS.min(total - done) {
                let (ours, theirs, what) = match random.below(20) {
                    0..4 => pair.set(&mut random),
                    4..13 => {
                        pair.write(&mut random);
                        continue;
                    }
                    13..17 => pair.get(&mut random),
                    17..19 => pair.clear(&mut random),
                    _ if random.once_in(4) => pair.enable(&mut random),
                    _ => continue,
                };
                assert_eq!(
                    ours,
                    theirs,
                    "call {call} of seed {}: {what}: ours, and the kernel's",
                    seed + done
                );
                *answers.entry(theirs).or_insert(0u64) += 1;
            }
            done += CALLS.min(total - done);
        }
        println!("{done} operations agree; answers by errno: {answers:?}");
        assert!(answers.len() > 3 || total < 1000, "too few kinds of answers");
    }
}
