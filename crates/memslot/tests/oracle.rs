//! Random calls, to the real kernel and to the rules: errno for errno.
//!
//! Needs /dev/kvm; elsewhere it says `skipped`. `MEMSLOT_ORACLE_OPS` sets the number of calls (some thousands by
//! default, a million and more in the full run), `MEMSLOT_SEED` the seed.

#[cfg(not(target_os = "linux"))]
#[test]
fn the_kernel_agrees() {
    memslot_testing::skipped("comparison with the kernel: not Linux");
}

#[cfg(target_os = "linux")]
mod linux {
    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::{Cap, Kvm, VmFd};
    use memslot::rules::{HostLimits, Rules, UserMemoryRegion};
    use memslot::{AddressSpaceId, Limits, SlotTable};
    use memslot_testing::{Random, number, seed, skipped};

    const PAGE: u64 = 4096;
    const USER_END: u64 = 0x7fff_ffff_f000;
    /// Nothing is mapped there; the kernel does not look.
    const HVA: u64 = 0x2000_0000_0000;
    /// Calls for each VM.
    const CALLS: u64 = 5000;

    /// 0, or the errno.
    fn kernel(vm: &VmFd, region: &UserMemoryRegion) -> i32 {
        let region = kvm_userspace_memory_region {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
        };
        // SAFETY: the VM has no vCPU, so nothing ever touches the memory behind its slots.
        unsafe { vm.set_user_memory_region(region) }.map_or_else(|error| error.errno(), |()| 0)
    }

    fn ours(rules: &Rules, table: &mut SlotTable, region: &UserMemoryRegion) -> i32 {
        rules.set_user_memory_region(table, region).map_or_else(|refusal| refusal.errno.raw(), |_| 0)
    }

    /// Which limits this host has: they differ with its processor and its KVM.
    fn host(kvm: &Kvm) -> (Rules, Limits) {
        let vm = kvm.create_vm().unwrap();
        let spaces = vm.check_extension_raw(kvm_bindings::KVM_CAP_MULTI_ADDRESS_SPACE.into()).max(1);
        let highest_gfn = (20..52)
            .rev()
            .map(|bits| (1u64 << bits) - 1)
            .find(|&gfn| {
                let slot = UserMemoryRegion {
                    guest_phys_addr: gfn * PAGE,
                    memory_size: PAGE,
                    userspace_addr: HVA,
                    ..Default::default()
                };
                kernel(&vm, &slot) == 0
            })
            .unwrap();
        let readonly_mem = vm.check_extension(Cap::ReadonlyMem);
        let host = HostLimits { user_end: USER_END, highest_gfn, readonly_mem, guest_memfd: false };
        let slots = u32::try_from(kvm.get_nr_memslots()).unwrap();
        let limits = Limits { address_spaces: u8::try_from(spaces).unwrap(), slots, ..Limits::default() };
        (Rules::new(host), limits)
    }

    /// A call: mostly sensible, with every edge that KVM checks now and then.
    fn call(random: &mut Random, table: &SlotTable, highest: u64, ids: u64) -> UserMemoryRegion {
        let id = match random.below(60) {
            0 => random.pick(&[32763, 32764, 32766, 32767, 32768, 65535]),
            1 => 1 << 16 | random.below(4),
            2 => random.next() & 0xffff_ffff,
            _ => random.below(ids),
        };
        let mut region = UserMemoryRegion {
            slot: u32::try_from(id).unwrap(),
            flags: random.pick(&[0, 0, 0, 0, 1, 1, 2, 3]),
            guest_phys_addr: random.below(4 * ids) * 16 * PAGE + random.below(3) * PAGE,
            memory_size: random.pick(&[1, 1, 2, 7, 16, 16, 33]) * PAGE,
            userspace_addr: HVA + random.below(1 << 12) * PAGE,
        };
        // Often about a slot that exists: delete, move, flags, or nothing at all.
        let known = memslot::SlotId::new(region.slot);
        if let Some(slot) = table.view().slot(AddressSpaceId::NORMAL, known).filter(|_| !random.once_in(6)) {
            let flags = slot.flags().bits();
            let same = UserMemoryRegion {
                flags,
                guest_phys_addr: slot.base_gfn().get() * PAGE,
                memory_size: slot.pages() * PAGE,
                userspace_addr: slot.hva().unwrap().get(),
                ..region
            };
            let to = region.guest_phys_addr;
            region = match random.below(10) {
                0..3 => UserMemoryRegion { memory_size: 0, ..region },
                3 => same,
                4 => UserMemoryRegion { flags: flags ^ 1, ..same },
                5 => UserMemoryRegion { guest_phys_addr: to, ..same },
                6 => UserMemoryRegion { guest_phys_addr: to, flags: flags ^ 1, ..same },
                7 => UserMemoryRegion { guest_phys_addr: same.guest_phys_addr.wrapping_add(PAGE), ..same },
                8 => UserMemoryRegion { flags: flags ^ 2, ..same },
                _ => UserMemoryRegion { memory_size: same.memory_size + PAGE, ..same },
            };
        }
        // Sizes and addresses at every limit, sometimes two at once.
        while random.once_in(12) {
            match random.below(12) {
                0 => region.flags = random.pick(&[4, 5, 7, 8, 1 << 16, 1 << 31, u32::MAX]),
                1 => region.memory_size |= random.pick(&[1, 0x800, 0xfff]),
                2 => region.guest_phys_addr |= random.pick(&[1, 0x800, 0xfff]),
                3 => region.userspace_addr |= random.pick(&[1, 0x800, 0xfff]),
                4 => {
                    let end =
                        USER_END.wrapping_add(random.pick(&[0, PAGE, 2 * PAGE, 0u64.wrapping_sub(PAGE)]));
                    region.userspace_addr = end.wrapping_sub(region.memory_size);
                }
                5 => {
                    region.userspace_addr =
                        random.pick(&[0, 1 << 47, 1 << 48, 1 << 63, u64::MAX - 0xfff, HVA | 1 << 57]);
                }
                // One page less would be allowed, and a kernel without second-level paging would then allocate 16 GiB.
                6 => region.memory_size = random.pick(&[1 << 31, 1 << 32, 1 << 40]) * PAGE,
                7 => region.memory_size = random.pick(&[0, u64::MAX - 0xfff, 1 << 63]),
                8 => region.guest_phys_addr = 0u64.wrapping_sub(random.pick(&[1, 16, 40]) * PAGE),
                9 => region.guest_phys_addr = (highest + 1 - random.below(40)) * PAGE,
                10 => region.guest_phys_addr = random.pick(&[0, 1 << 51, 1 << 52, 1 << 63]),
                _ => (region.userspace_addr, region.memory_size) = (0, USER_END - random.below(3) * PAGE),
            }
        }
        region
    }

    #[test]
    fn the_kernel_agrees() {
        let kvm = match Kvm::new() {
            Ok(kvm) if !cfg!(miri) => kvm,
            Ok(_) => return skipped("comparison with the kernel: Miri"),
            Err(error) => {
                return skipped(&format!("comparison with the kernel: no /dev/kvm ({error})"));
            }
        };
        let (total, seed): (u64, _) = (number("MEMSLOT_ORACLE_OPS", 30_000), seed());
        let (rules, limits) = host(&kvm);
        let (mut done, mut answers) = (0, std::collections::BTreeMap::new());
        for round in 0.. {
            if done >= total {
                break;
            }
            let vm = kvm.create_vm().unwrap();
            let mut table = SlotTable::new(limits).unwrap();
            let mut random = Random::new(seed + round);
            // Few ids collide more; many make deep trees.
            let ids = [4, 16, 100, 1000][usize::try_from(round % 4).unwrap()];
            let mut tail = std::collections::VecDeque::new();
            for _ in 0..CALLS {
                let region = call(&mut random, &table, rules.host.highest_gfn, ids);
                let (theirs, ours) = (kernel(&vm, &region), ours(&rules, &mut table, &region));
                tail.push_back((region, theirs, ours));
                if tail.len() > 20 {
                    tail.pop_front();
                }
                assert_eq!(theirs, ours, "seed {}, last calls (kernel, rules): {tail:#x?}", seed + round);
                *answers.entry(theirs).or_insert(0u64) += 1;
                done += 1;
            }
        }
        println!("{done} calls, all answered alike; by errno: {answers:?}");
        assert!(answers.len() >= 3, "success, EINVAL and EEXIST all occur");
    }
}
