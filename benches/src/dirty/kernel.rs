//! `KVM_GET_DIRTY_LOG`, where /dev/kvm opens. Nothing runs in the VM, so its bits are those that it sets itself:
//! all of them at first (`INITIALLY_SET`), then none.

use crate::Effort;
use crate::report::Report;

#[cfg(not(target_os = "linux"))]
pub(crate) fn run(_: Effort, report: &mut Report) -> anyhow::Result<()> {
    report.skipped("the kernel's dirty log: not Linux");
    Ok(())
}

#[cfg(target_os = "linux")]
pub(crate) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("kernel: harvest, clean") {
        return Ok(());
    }
    match kvm_ioctls::Kvm::new() {
        Err(error) => report.skipped(&format!("the kernel's dirty log: /dev/kvm does not open ({error})")),
        Ok(kvm) => linux::run(&kvm, effort, report)?,
    }
    Ok(())
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the ioctl is unsafe: the kernel uses the memory it is given")]
mod linux {
    use std::hint::black_box;

    use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
    use kvm_ioctls::Kvm;
    use memslot::dirty::SoftwareOnly;
    use memslot::dirty::kvm::KvmDirtyLog;

    use super::super::harvest::beside_a_thread;
    use super::super::{GIB, Guest, random_pages};
    use crate::Effort;
    use crate::measure::{median, time, versus};
    use crate::report::Report;

    pub(super) fn run(kvm: &Kvm, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
        let (rounds, bytes) = match effort {
            Effort::Smoke => (1, GIB),
            Effort::Normal => (11, 64 * GIB),
            Effort::Long => (51, 64 * GIB),
        };
        let vm = kvm.create_vm()?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: 0,
            memory_size: bytes as u64,
            userspace_addr: 0x2000_0000_0000,
        };
        // SAFETY: no vCPU runs, so the kernel uses none of that memory.
        unsafe { vm.set_user_memory_region(region)? };
        let get = || time(1, || drop(black_box(vm.get_dirty_log(0, bytes))));
        let at = format!("{} GiB", bytes / GIB);

        let guest = Guest::new(bytes)?;
        let take = |guest: &Guest| time(1, || guest.harvest().commit());
        let ns = versus(rounds, || take(&guest), get);
        report.text_row("kernel: harvest, clean", &at, "KVM_GET_DIRTY_LOG", ns, Some(100.0));
        // The kernel's clean log costs it no less than one with 64 dirty pages.
        let pages = random_pages(bytes / 4096, 64);
        let mut dirty = |guest: &Guest, with: &str| {
            let mut mine = Vec::new();
            for _ in 0..rounds {
                pages.iter().for_each(|&page| guest.mark(page));
                mine.push(take(guest));
            }
            let (name, ns) = (format!("kernel: harvest, 64 dirty pages{with}"), (median(&mut mine), ns.1));
            report.text_row(&name, &at, "KVM_GET_DIRTY_LOG, clean", ns, Some(100.0));
        };
        dirty(&guest, "");
        if let Some(guest) = Guest::fenced(bytes)? {
            dirty(&guest, ", with a fence");
            beside_a_thread(|| dirty(&guest, ", with a fence, beside a thread"));
        }
        // Its form of the call has to write every word of the bitmap.
        let guest = Guest::new(bytes)?;
        let mut abi = KvmDirtyLog::new(guest.log.consumer()?);
        let mut bitmap = vec![0; bytes / 4096 / 64];
        let ours = || time(1, || assert!(abi.get_dirty_log(0, Some(&mut bitmap), &mut SoftwareOnly).is_ok()));
        let ns = versus(rounds, ours, get);
        report.text_row("kernel: the same call of ours, clean", &at, "KVM_GET_DIRTY_LOG", ns, None);
        Ok(())
    }
}
