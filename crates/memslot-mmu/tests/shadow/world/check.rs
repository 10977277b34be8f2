//! Whether what the processors may do is what the guest's tables and the slots allow.
//!
//! Everything that a processor could use is looked at: every leaf that can be reached from its root, and every translation
//! it has cached. For each kind of access that the processor lets through, there must be a page in the guest's tables that permits
//! it, in what they are or have been since the processor was told to forget that address; its frame must be in a slot
//! *now*, and the one that the processor would use must be behind it *now*.

use std::collections::BTreeMap;

use memslot::{Gfn, SlotFlags};
use memslot_mmu::shadow::guest::Mode;

use super::cpu::{Cpu, all_leaves};
use super::history::all_pasts;
use super::host::Hardware;
use super::{World, identity};
use crate::naive::{Found, Want};

impl World {
    /// Panics where something is granted that must not be, or the tables' own check finds something.
    pub fn check(&self) {
        if let Err(why) = self.shadow.check() {
            panic!("check: {why}");
        }
        self.check_grants();
    }

    /// Panics where something is granted that must not be.
    pub fn check_grants(&self) {
        for (number, cpu) in self.cpus.iter().enumerate() {
            // The guest does not run with a stale root.
            let root = cpu.vcpu.root().filter(|_| !cpu.vcpu.is_stale());
            let mut seen = BTreeMap::new();
            for leaf in root.map_or_else(Vec::new, |root| all_leaves(&self.host, root)) {
                let pages = leaf.bytes / 4096;
                for page in [0, 1, 17, pages / 2, pages - 1] {
                    if page < pages {
                        let address = leaf.address + page * 4096;
                        seen.entry(address).or_insert_with(|| {
                            self.check_one(
                                cpu,
                                address,
                                leaf.pfn + page,
                                leaf.rights,
                                &format!("cpu {number}"),
                            );
                        });
                    }
                }
            }
            for (page, cached) in self.host.tlb(cpu.tlb) {
                let what = format!("cached by cpu {number}");
                self.check_one(cpu, page << 12, cached.pfn, cached.rights, &what);
            }
        }
    }

    fn check_one(&self, cpu: &Cpu, address: u64, pfn: u64, rights: Hardware, what: &str) {
        let is_wide = cpu.paging.mode() == Mode::Off && address >> 32 != 0;
        assert!(!is_wide, "{what}: {address:#x} has more than 32 bits");
        let pasts = self.pasts_of(cpu, address);
        for kind in 0..12 {
            let (user, ac) = (kind & 1 != 0, kind & 2 != 0);
            let (write, fetch) = (kind / 4 == 1, kind / 4 == 2);
            let want = Want { write, user, fetch, ac };
            if !cpu.allows(rights, want) {
                continue;
            }
            let allows = |past: &Found| self.past_allows(cpu, past, pfn, want);
            assert!(
                pasts.iter().any(allows),
                "{what}: {want:?} at {address:#x} goes to frame {pfn:#x} with {rights:?}; \
                 the guest's tables say {pasts:x?} since {} (now {}), memory is {:x?}",
                cpu.horizon_of(address),
                self.now,
                pasts.iter().map(|past| self.resolve(cpu.space, past.gpa >> 12)).collect::<Vec<_>>(),
            );
            if write {
                for gfn in self.gfns_of(cpu.space, pfn) {
                    let is_logged = self
                        .resolve(cpu.space, gfn)
                        .is_some_and(|(slot, _)| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES));
                    assert!(
                        !is_logged || self.log.is_marked(cpu.space, Gfn::new(gfn)),
                        "{what}: {address:#x} is writable, gfn {gfn:#x} is logged and not marked",
                    );
                }
            }
        }
    }

    /// What the guest's tables have said since a processor was told to forget an address.
    fn pasts_of(&self, cpu: &Cpu, address: u64) -> Vec<Found> {
        if cpu.paging.mode() == Mode::Off {
            return vec![identity(address)];
        }
        let (registers, pdptes) = (cpu.registers(), cpu.paging.pdptes());
        let at = (cpu.space.get(), cpu.horizon_of(address));
        all_pasts(&self.history, at, registers, cpu.processor(), pdptes, address)
    }

    pub fn pasts(&self, cpu: usize, address: u64) -> Vec<Found> {
        self.pasts_of(&self.cpus[cpu], address)
    }

    /// Whether the guest's tables have led there and permitted that, with the bits set that a processor would have set.
    pub fn was_marked(&self, cpu: usize, past: &Found, gpa: u64, want: Want) -> bool {
        let cpu = &self.cpus[cpu];
        let is_permitted = cpu.paging.mode() == Mode::Off || past.allows(cpu.registers(), want);
        past.gpa == gpa && is_permitted && self.is_marked(cpu, past, want)
    }

    fn is_marked(&self, cpu: &Cpu, past: &Found, want: Want) -> bool {
        past.entries.iter().all(|(gpa, entry)| {
            // A table in a read-only slot is walked without its bits being set; what was mapped so may stay when the slot is writable.
            let cannot = self.unmarked.contains(&(cpu.space, gpa >> 12));
            let needed = if want.write && *gpa == past.dirty_at { 0x60 } else { 0x20 };
            cannot || entry & needed == needed
        })
    }

    fn past_allows(&self, cpu: &Cpu, past: &Found, pfn: u64, want: Want) -> bool {
        let registers = cpu.registers();
        // What a supervisor has written with CR0.WP clear is a supervisor's page for the processor: SMAP is not told any more whether
        // RFLAGS.AC is set. (As in KVM: there are no entries that say so.)
        let overrides = registers.cr0 >> 16 & 1 == 0 && registers.cr4 >> 21 & 1 != 0;
        let want = Want { ac: want.ac || overrides, ..want };
        let is_permitted = cpu.paging.mode() == Mode::Off || past.allows(registers, want);
        let gfn = past.gpa >> 12;
        let Some((slot, found)) = self.resolve(cpu.space, gfn) else { return false };
        let hva = slot.hva_of(Gfn::new(gfn)).unwrap().get();
        let is_writable = !slot.flags().contains(SlotFlags::READONLY) && !self.host.is_read_only(hva);
        let marked = self.is_marked(cpu, past, want);
        is_permitted && found == pfn && (!want.write || is_writable) && marked
    }
}
