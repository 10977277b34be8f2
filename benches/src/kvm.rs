//! What it costs to program /dev/kvm through a table: the same changes, through `memslot-kvm` and by the bare ioctl.
//!
//! Two VMs with the same slots take turns. The target is that ours takes at most 1.1 times as long, a ratio of 0.91.
//! The kernel's time grows with a slot's size, ours does not: so there are slots of one page, where the kernel is at its
//! quickest, and of 128 MiB, as a memory module has.

use crate::Effort;
use crate::report::Report;

#[cfg(not(target_os = "linux"))]
pub(crate) fn run(_: Effort, report: &mut Report) -> anyhow::Result<()> {
    report.skipped("programming /dev/kvm: not Linux");
    Ok(())
}

#[cfg(target_os = "linux")]
pub(crate) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    match kvm_ioctls::Kvm::new() {
        Err(error) => {
            report.skipped(&format!("programming /dev/kvm: it does not open ({error})"));
            Ok(())
        }
        Ok(kvm) => linux::run(&kvm, effort, report),
    }
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the ioctl is unsafe: the kernel uses the memory it is given")]
mod linux {
    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::{Kvm, VmFd};
    use memslot::{
        AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable,
    };
    use memslot_kvm::{KvmSlots, NotRunning, Options, Vm};

    use crate::Effort;
    use crate::measure::{median, time};
    use crate::report::Report;

    const PAGE: u64 = 4096;
    const HVA: u64 = 0x2000_0000_0000;
    const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
    /// At most 1.1 times as long.
    const TARGET: f64 = 0.91;

    /// Slot `id` of `pages` pages; there is room for as many behind it, and as many again.
    fn spec(id: usize, pages: u64) -> SlotSpec {
        let first = 4 * pages * id as u64;
        SlotSpec {
            address_space: RAM,
            id: SlotId::new(u32::try_from(id).unwrap_or(u32::MAX)),
            gfns: GfnRange::with_len(Gfn::new(first), pages).unwrap_or_default(),
            backing: Backing::Host { hva: Hva::new(HVA + id as u64 * pages * PAGE) },
            flags: SlotFlags::empty(),
        }
    }

    fn moved(spec: &SlotSpec, away: bool) -> Gfn {
        let by = if away { 2 * spec.gfns.len() } else { 0 };
        Gfn::new(spec.gfns.start().get() + by)
    }

    #[derive(Clone, Copy)]
    enum Change {
        Create,
        Delete,
        Log(bool),
        /// By twice its pages, or back.
        Move(bool),
    }

    trait Side {
        fn change(&mut self, spec: &SlotSpec, change: Change) -> bool;
    }

    impl Side for SlotTable {
        fn change(&mut self, spec: &SlotSpec, change: Change) -> bool {
            match change {
                Change::Create => self.create(*spec),
                Change::Delete => self.delete(RAM, spec.id),
                Change::Log(on) => self.set_flags(
                    RAM,
                    spec.id,
                    if on { SlotFlags::LOG_DIRTY_PAGES } else { SlotFlags::empty() },
                ),
                Change::Move(away) => self.move_to(RAM, spec.id, moved(spec, away)),
            }
            .is_ok()
        }
    }

    impl Side for VmFd {
        fn change(&mut self, spec: &SlotSpec, change: Change) -> bool {
            let mut region = kvm_userspace_memory_region {
                slot: spec.id.get(),
                flags: 0,
                guest_phys_addr: spec.gfns.start().get() * PAGE,
                memory_size: spec.gfns.len() * PAGE,
                userspace_addr: spec.backing.hva().map_or(0, Hva::get),
            };
            match change {
                Change::Create => {}
                Change::Delete => region.memory_size = 0,
                Change::Log(on) => region.flags = u32::from(on),
                Change::Move(away) => region.guest_phys_addr = moved(spec, away).get() * PAGE,
            }
            // SAFETY: nothing is mapped there and no vCPU runs: the kernel never touches the memory.
            unsafe { self.set_user_memory_region(region) }.is_ok()
        }
    }

    const CHANGES: [(&str, Change); 6] = [
        ("log on", Change::Log(true)),
        ("log off", Change::Log(false)),
        ("move", Change::Move(true)),
        ("move back", Change::Move(false)),
        ("delete", Change::Delete),
        ("create", Change::Create),
    ];

    fn round(side: &mut dyn Side, specs: &[SlotSpec], ok: &mut bool) -> [f64; 6] {
        CHANGES.map(|(_, change)| {
            time(specs.len(), || specs.iter().for_each(|spec| *ok &= side.change(spec, change)))
        })
    }

    pub(super) fn run(kvm: &Kvm, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
        const DIMM: u64 = 32768;
        let (sizes, rounds): (&[(usize, u64)], _) = match effort {
            Effort::Smoke => (&[(8, 1)], 2),
            Effort::Normal => (&[(8, 1), (509, 1), (4096, 1), (8, DIMM), (253, DIMM)], 25),
            Effort::Long => (&[(8, 1), (509, 1), (4096, 1), (32700, 1), (8, DIMM), (253, DIMM)], 101),
        };
        for &(n, pages) in sizes {
            if report.wants("through the table") {
                slots(kvm, n, pages, rounds, report)?;
            }
        }
        Ok(())
    }

    fn slots(kvm: &Kvm, n: usize, pages: u64, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
        let (vm, mut peer) = (kvm.create_vm()?, kvm.create_vm()?);
        let mut table = SlotTable::new(Limits { address_spaces: 1, ..Limits::default() })?;
        // SAFETY: as for the peer: the memory is never touched.
        let slots = unsafe { KvmSlots::attach(&mut table, Vm::of(&vm)?, NotRunning, Options::default()) }?;
        let mut ok = true;
        for spec in (0..n).map(|id| spec(id, pages)) {
            ok &= table.change(&spec, Change::Create) && peer.change(&spec, Change::Create);
        }
        let count = if pages == 1 { 64 } else { 8 }.min(n);
        let specs: Vec<_> = (0..count).map(|i| spec(i * n / count, pages)).collect();
        let mut times: [(Vec<f64>, Vec<f64>); 6] = Default::default();
        for i in 0..=rounds {
            let (ours, theirs);
            if i % 2 == 0 {
                theirs = round(&mut peer, &specs, &mut ok);
                ours = round(&mut table, &specs, &mut ok);
            } else {
                ours = round(&mut table, &specs, &mut ok);
                theirs = round(&mut peer, &specs, &mut ok);
            }
            if i > 0 {
                for ((times, ours), theirs) in times.iter_mut().zip(ours).zip(theirs) {
                    times.0.push(ours);
                    times.1.push(theirs);
                }
            }
        }
        anyhow::ensure!(ok && slots.slots().len() == n, "both sides must accept every call");
        let at = if pages == 1 { n.to_string() } else { format!("{n} DIMMs") };
        for ((name, _), mut times) in CHANGES.into_iter().zip(times) {
            let medians = (median(&mut times.0), median(&mut times.1));
            let name = format!("through the table: {name}");
            report.text_row(&name, &at, "KVM_SET_USER_MEMORY_REGION", medians, Some(TARGET));
        }
        Ok(())
    }
}
