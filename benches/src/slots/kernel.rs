//! The kernel's own ioctl, where /dev/kvm opens. Slots are one page each, so that neither side's time depends on
//! the size of a slot; the figure includes the system call.

use crate::Effort;
use crate::report::Report;

#[cfg(not(target_os = "linux"))]
pub(crate) fn run(_: &[usize], _: Effort, report: &mut Report) -> anyhow::Result<()> {
    report.skipped("the kernel's ioctl: not Linux");
    Ok(())
}

#[cfg(target_os = "linux")]
pub(crate) fn run(sizes: &[usize], effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    match kvm_ioctls::Kvm::new() {
        Err(error) => report.skipped(&format!("the kernel's ioctl: /dev/kvm does not open ({error})")),
        Ok(kvm) => {
            for &n in sizes.iter().filter(|&&n| n <= 32764) {
                if report.wants("kernel") {
                    linux::run(&kvm, n, effort, report)?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the ioctl is unsafe: the kernel uses the memory it is given")]
mod linux {
    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::{Kvm, VmFd};
    use memslot::rules::{Rules, UserMemoryRegion};
    use memslot::{Limits, SlotTable};

    use super::super::target;
    use crate::Effort;
    use crate::measure::{median, time};
    use crate::report::Report;

    const PAGE: u64 = 4096;
    const HVA: u64 = 0x2000_0000_0000;

    fn region(id: usize, moved: bool, flags: u32, size: u64) -> UserMemoryRegion {
        let id64 = id as u64;
        UserMemoryRegion {
            slot: u32::try_from(id).unwrap_or(u32::MAX),
            flags,
            guest_phys_addr: (id64 * 4 + u64::from(moved)) * PAGE,
            memory_size: size,
            userspace_addr: HVA + id64 * PAGE,
        }
    }

    /// The two sides, called with the same arguments.
    enum Side<'a> {
        Ours(&'a Rules, &'a mut SlotTable),
        Kernel(&'a VmFd),
    }

    impl Side<'_> {
        fn call(&mut self, region: &UserMemoryRegion) -> bool {
            match self {
                Side::Ours(rules, table) => rules.set_user_memory_region(table, region).is_ok(),
                Side::Kernel(vm) => {
                    let region = kvm_userspace_memory_region {
                        slot: region.slot,
                        flags: region.flags,
                        guest_phys_addr: region.guest_phys_addr,
                        memory_size: region.memory_size,
                        userspace_addr: region.userspace_addr,
                    };
                    // SAFETY: nothing is mapped there and no vCPU runs: the kernel never touches the memory.
                    unsafe { vm.set_user_memory_region(region) }.is_ok()
                }
            }
        }
    }

    const NAMES: [&str; 4] = ["flags", "move", "delete", "create"];

    /// Times every kind of change on `ids`; ends as it began.
    fn round(side: &mut Side<'_>, ids: &[usize], ok: &mut bool) -> [f64; 4] {
        let mut each = |moved: bool, flags: u32, size: u64| {
            time(ids.len(), || {
                for &id in ids {
                    *ok &= side.call(&region(id, moved, flags, size));
                }
            })
        };
        let flags = each(false, 1, PAGE);
        each(false, 0, PAGE);
        let moved = each(true, 0, PAGE);
        each(false, 0, PAGE);
        let delete = each(false, 0, 0);
        let create = each(false, 0, PAGE);
        [flags, moved, delete, create]
    }

    pub(super) fn run(kvm: &Kvm, n: usize, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
        let vm = kvm.create_vm()?;
        let rules = Rules::default();
        let mut table = SlotTable::new(Limits::default())?;
        let mut all_ok = true;
        let mut fill = |side: &mut Side<'_>| {
            time(n, || {
                for id in 0..n {
                    all_ok &= side.call(&region(id, false, 0, PAGE));
                }
            })
        };
        let ours = fill(&mut Side::Ours(&rules, &mut table));
        let theirs = fill(&mut Side::Kernel(&vm));
        let goal = (n == 32764).then_some(20.0);
        report.times("kernel: create all, one by one", n, "KVM_SET_USER_MEMORY_REGION", (ours, theirs), goal);

        let count = 64.min(n);
        let ids: Vec<usize> = (0..count).map(|i| i * n / count).collect();
        let rounds = match effort {
            Effort::Smoke => 2,
            Effort::Normal => 9,
            Effort::Long => 41,
        };
        let mut times: [(Vec<f64>, Vec<f64>); 4] = Default::default();
        for i in 0..=rounds {
            let theirs = round(&mut Side::Kernel(&vm), &ids, &mut all_ok);
            let ours = round(&mut Side::Ours(&rules, &mut table), &ids, &mut all_ok);
            if i > 0 {
                for ((times, ours), theirs) in times.iter_mut().zip(ours).zip(theirs) {
                    times.0.push(ours);
                    times.1.push(theirs);
                }
            }
        }
        for (name, mut times) in NAMES.into_iter().zip(times) {
            let medians = (median(&mut times.0), median(&mut times.1));
            let goal = target(n, [8.0; 4]);
            report.times(&format!("kernel: {name}"), n, "KVM_SET_USER_MEMORY_REGION", medians, goal);
        }
        anyhow::ensure!(all_ok, "both sides must accept every call");
        Ok(())
    }
}
