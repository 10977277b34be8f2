//! Write-protect and harvest, beside the real kernel, where /dev/kvm opens.
//!
//! Both sides have a logged slot of which every page is mapped and write-protected, and then some are written. What is
//! timed is that these become clean again, with a bitmap of them:
//!
//! * The kernel: `KVM_GET_DIRTY_LOG` of a VM. It takes its bitmap word by word, write-protects the pages that it names,
//!   flushes, and copies all of the bitmap out. A guest of six instructions has written the pages before, untimed; the
//!   VM's only vCPU does not run meanwhile, so the flush interrupts nobody. Whether the pages are in second-stage tables or
//!   in shadow pages, found by the reverse map, depends on the machine: without EPT or NPT, as under PVM, they are shadow pages.
//!   That they are mapped at all is checked by the VM's own count of 4 KiB pages: what the kernel emulates,
//!   as PVM does a guest's kernel that was not written for it, it marks and never maps. So the guest is in ring 3.
//! * Ours: `DirtyRearm::harvest` over nested tables of as many pages, its words as a bitmap, and the commit. Faults for
//!   writing have marked the pages, untimed too. The flush is an empty function, and there is no system call.

use crate::Effort;
use crate::report::Report;

#[cfg(target_os = "linux")]
const NAME: &str = "harvest, mapped: ";

#[cfg(not(target_os = "linux"))]
pub(super) fn run(_: Effort, report: &mut Report) -> anyhow::Result<()> {
    report.skipped("write-protect and harvest beside the kernel: not Linux");
    Ok(())
}

#[cfg(target_os = "linux")]
pub(super) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let cases: &[(u64, usize)] = match effort {
        Effort::Smoke => &[(4, 1)],
        Effort::Normal => &[(64, 15), (1024, 5)],
        Effort::Long => &[(64, 101), (1024, 15)],
    };
    let names = ["64 pages", "1 %", "all"].map(|what| format!("{NAME}{what}"));
    if !names.iter().any(|name| report.wants(name)) {
        return Ok(());
    }
    match kvm_ioctls::Kvm::new() {
        Err(error) => {
            let why =
                format!("write-protect and harvest beside the kernel: /dev/kvm does not open ({error})");
            report.skipped(&why);
        }
        Ok(kvm) => {
            for &(mib, rounds) in cases {
                linux::run(&kvm, mib, rounds, &names, report)?;
            }
        }
    }
    Ok(())
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the kernel uses the memory it is given, which the benchmark maps")]
mod linux {
    use std::fs::File;
    use std::hint::black_box;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::fs::FileExt;
    use std::ptr;

    use anyhow::Context;
    use kvm_bindings::{
        KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment, kvm_userspace_memory_region,
    };
    use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
    use memslot::dirty::{Consumer, DirtyLog};
    use memslot::{AddressSpaceId, Backing, Hva, Limits, SlotFlags, SlotId, SlotSpec, SlotTable};
    use memslot_mmu::format::Npt;
    use memslot_mmu::{Config, DirtyRearm, Mmu};

    use super::super::pool::BenchHost;
    use super::super::{HVA, Vcpu, fault, gfns};
    use super::NAME;
    use crate::dirty::random_pages;
    use crate::measure::{time, versus};
    use crate::report::Report;

    const PAGE: usize = 4096;

    /// Memory of this process, in pages of 4 KiB.
    struct Mapping {
        start: *mut u8,
        bytes: usize,
    }

    impl Mapping {
        fn new(bytes: usize) -> anyhow::Result<Self> {
            let (access, kind) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new mapping, where nothing is.
            let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, -1, 0) };
            anyhow::ensure!(start != libc::MAP_FAILED, "no memory for the guest");
            // SAFETY: the mapping just made.
            unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
            Ok(Self { start: start.cast(), bytes })
        }

        fn write(&self, at: u64, bytes: &[u8]) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            assert!(at < self.bytes && bytes.len() <= self.bytes - at);
            // SAFETY: inside of the mapping, which nobody refers to; the vCPU does not run.
            unsafe { self.start.add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: mapped by `new`; who gave it to a VM drops that first.
            unsafe { libc::munmap(self.start.cast(), self.bytes) };
        }
    }

    /// The low memory: the program, its page tables, the list of pages to write.
    const LOW: usize = 4 << 20;
    const CODE: u64 = 0x1000;
    const TABLES: u64 = 0x2000;
    const LIST: u64 = 0x10_0000;
    /// Where the logged slot is.
    const RAM: u64 = 1 << 30;

    /// Where nothing is: a write there ends the program.
    const END: u64 = 1 << 28;

    /// `rsi` points to the list, `rcx` is its length, `rdx` where the slot is, `rbx` where nothing is.
    #[rustfmt::skip]
    const PROGRAM: &[u8] = &[
        0xad,                   // loop: lodsd
        0x48, 0xc1, 0xe0, 0x0c, //       shl rax, 12
        0x48, 0x89, 0x04, 0x10, //       mov [rax + rdx], rax
        0x48, 0xff, 0xc9,       //       dec rcx
        0x75, 0xf2,             //       jnz loop
        0x89, 0x03,             //       mov [rbx], eax
    ];

    struct Kernel {
        // In this order: the memory stays for as long as there is a VM.
        vcpu: VcpuFd,
        vm: VmFd,
        low: Mapping,
        _ram: Mapping,
        bytes: usize,
    }

    impl Kernel {
        fn new(kvm: &Kvm, bytes: usize) -> anyhow::Result<Self> {
            let (vm, low, ram) = (kvm.create_vm()?, Mapping::new(LOW)?, Mapping::new(bytes)?);
            for (slot, flags, gpa, memory) in [(0, 0, 0, &low), (1, KVM_MEM_LOG_DIRTY_PAGES, RAM, &ram)] {
                let region = kvm_userspace_memory_region {
                    slot,
                    flags,
                    guest_phys_addr: gpa,
                    memory_size: memory.bytes as u64,
                    userspace_addr: memory.start.expose_provenance() as u64,
                };
                // SAFETY: the memory is there for as long as the VM, and nobody else's.
                unsafe { vm.set_user_memory_region(region)? };
            }
            low.write(CODE, PROGRAM);
            // 2 GiB as they are: PML4, PDPT, two PDs of 2 MiB pages; present, writable and the user's, and large.
            low.write(TABLES, &(TABLES + 0x1007).to_le_bytes());
            for pd in 0..2 {
                low.write(TABLES + 0x1000 + 8 * pd, &(TABLES + 0x2007 + 0x1000 * pd).to_le_bytes());
            }
            for large in 0..1024 {
                low.write(TABLES + 0x2000 + 8 * large, &(large << 21 | 0x87).to_le_bytes());
            }
            let vcpu = vm.create_vcpu(0)?;
            vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
            let mut sregs = vcpu.get_sregs()?;
            let data = kvm_segment {
                limit: u32::MAX,
                selector: 0x2b,
                type_: 3,
                present: 1,
                dpl: 3,
                s: 1,
                db: 1,
                g: 1,
                ..kvm_segment::default()
            };
            sregs.cs = kvm_segment { selector: 0x33, type_: 11, db: 0, l: 1, ..data };
            (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
            // PE, MP, ET, NE, WP, PG; PAE; SCE, LME, LMA.
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0033, TABLES, 0x20, 0x501);
            vcpu.set_sregs(&sregs)?;
            Ok(Self { vcpu, vm, low, _ram: ram, bytes })
        }

        /// Has the guest write these pages.
        fn dirty(&mut self, pages: &[usize]) -> anyhow::Result<()> {
            let list: Vec<u8> = pages
                .iter()
                .flat_map(|&page| u32::try_from(page).unwrap_or(u32::MAX).to_le_bytes())
                .collect();
            self.low.write(LIST, &list);
            self.vcpu.set_regs(&kvm_regs {
                rip: CODE,
                rflags: 2,
                rsi: LIST,
                rcx: pages.len() as u64,
                rdx: RAM,
                rbx: END,
                ..kvm_regs::default()
            })?;
            loop {
                match self.vcpu.run() {
                    Ok(VcpuExit::MmioWrite(END, _)) => break,
                    Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                    other => anyhow::bail!("the guest stopped: {other:?}"),
                }
            }
            // Completes that write, so that nothing of it is left for the next time.
            self.vcpu.set_kvm_immediate_exit(1);
            let interrupted = self.vcpu.run().is_err_and(|error| error.errno() == libc::EINTR);
            self.vcpu.set_kvm_immediate_exit(0);
            anyhow::ensure!(interrupted, "the guest ran on");
            Ok(())
        }

        /// How many pages of 4 KiB the VM's tables map, if the kernel counts them.
        fn mapped(&self) -> anyhow::Result<Option<u64>> {
            const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
            // The layout of the statistics: a header of six words, then descriptors of 16 bytes, each with a name behind it.
            // SAFETY: the call takes no pointer, and returns a new file or -1.
            let fd = unsafe { libc::ioctl(self.vm.as_raw_fd(), KVM_GET_STATS_FD as _, 0) };
            if fd < 0 {
                return Ok(None);
            }
            // SAFETY: just made, and nobody else's.
            let file = unsafe { File::from_raw_fd(fd) };
            let word = |at: u64| -> std::io::Result<u64> {
                let mut bytes = [0; 4];
                file.read_exact_at(&mut bytes, at)?;
                Ok(u64::from(u32::from_le_bytes(bytes)))
            };
            let (name_size, count, first, data) = (word(4)?, word(8)?, word(16)?, word(20)?);
            for at in (0..count).map(|n| first + n * (16 + name_size)) {
                let mut name = [0; 9];
                file.read_exact_at(&mut name, at + 16)?;
                if &name == b"pages_4k\0" {
                    // All values are words of 64 bits; the offset is the descriptor's third word.
                    return Ok(Some(word(data + word(at + 8)?)?));
                }
            }
            Ok(None)
        }

        fn harvest(&self) -> anyhow::Result<Vec<u64>> {
            Ok(self.vm.get_dirty_log(1, self.bytes)?)
        }
    }

    struct Ours {
        // The tables and the log follow it.
        _table: SlotTable,
        vcpu: Vcpu,
        rearm: DirtyRearm<Npt, BenchHost>,
        consumer: Consumer,
        pages: usize,
        bitmap: Vec<u64>,
    }

    impl Ours {
        fn new(pages: usize) -> anyhow::Result<Self> {
            let mut table = SlotTable::new(Limits::default())?;
            let log = DirtyLog::attach(&mut table)?;
            let config = Config { log: Some(log.clone()), ..Config::default() };
            let mmu = Mmu::attach(&mut table, BenchHost, config)?;
            table.create(SlotSpec {
                address_space: AddressSpaceId::NORMAL,
                id: SlotId::new(0),
                gfns: gfns(RAM / PAGE as u64, pages as u64),
                backing: Backing::Host { hva: Hva::new(HVA) },
                flags: SlotFlags::LOG_DIRTY_PAGES,
            })?;
            let (vcpu, rearm, consumer) = (mmu.walker()?, mmu.dirty_rearm()?, log.consumer()?);
            Ok(Self { _table: table, vcpu, rearm, consumer, pages, bitmap: vec![0; pages / 64] })
        }

        fn dirty(&mut self, pages: &[usize]) {
            pages.iter().for_each(|&page| fault(&mut self.vcpu, RAM / PAGE as u64 + page as u64));
        }

        fn harvest(&mut self) {
            let harvest = self.rearm.harvest(&self.consumer).unwrap_or_else(|error| panic!("{error}"));
            let all = gfns(RAM / PAGE as u64, self.pages as u64);
            let _ = black_box(harvest.words(AddressSpaceId::NORMAL, all, &mut self.bitmap));
            harvest.commit();
        }
    }

    fn count(bitmap: &[u64]) -> usize {
        bitmap.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub(super) fn run(
        kvm: &Kvm,
        mib: u64,
        rounds: usize,
        names: &[String; 3],
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let bytes = usize::try_from(mib << 20)?;
        let pages = bytes / PAGE;
        let every: Vec<usize> = (0..pages).collect();
        let (mut kernel, mut ours) = (Kernel::new(kvm, bytes)?, Ours::new(pages)?);
        kernel.dirty(&every).context("the guest's first run")?;
        kernel.harvest()?;
        // Not quite all: the kernel may unmap pages to move them.
        let mapped = kernel.mapped()?;
        if mapped.is_none_or(|mapped| mapped < pages as u64 / 20 * 19) {
            report.skipped(&format!(
                "{NAME}{mib} MiB: of {pages} pages the kernel counts {mapped:?} as mapped"
            ));
            return Ok(());
        }
        ours.dirty(&every);
        ours.harvest();
        let sets = [random_pages(pages, 64), random_pages(pages, pages / 100), every];
        for (name, set) in names.iter().zip(sets) {
            if !report.wants(name) {
                continue;
            }
            let mine = || {
                ours.dirty(&set);
                let ns = time(1, || ours.harvest());
                assert_eq!(count(&ours.bitmap), set.len());
                ns
            };
            let theirs = || {
                kernel.dirty(&set).unwrap_or_else(|error| panic!("{error}"));
                let mut bitmap = Vec::new();
                let ns = time(1, || bitmap = kernel.harvest().unwrap_or_else(|error| panic!("{error}")));
                assert_eq!(count(&bitmap), set.len());
                ns
            };
            let ns = versus(rounds, mine, theirs);
            report.text_row(name, &format!("{mib} MiB"), "KVM_GET_DIRTY_LOG", ns, None);
        }
        Ok(())
    }
}
