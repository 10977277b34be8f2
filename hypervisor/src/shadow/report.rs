//! The figures of a run on shadow tables, for `cargo xtask linux`.

use alloc::string::String;

use memslot_mmu::shadow::Role;
use memslot_mmu::shadow::guest::Rights;

use super::Paging;
use crate::console::report;

impl Paging {
    /// Reports everything that was counted, and what there is at the moment.
    pub(crate) fn report(&self) {
        let counts = &self.counts;
        for (size, count) in ["4k", "2m", "1g"].iter().zip(counts.mapped) {
            report!("faults.mapped_{size} {count}");
        }
        report!("faults.already_mapped {}", counts.already_mapped);
        report!("faults.guest's_own {}", counts.injected);
        report!("faults.spurious {}", counts.spurious);
        report!("faults.double {}", counts.double_faults);
        report!("faults.mmio {}", counts.mmio);
        report!("faults.retry {}", counts.retry);
        report!("shadow.unprotected {}", counts.write_tracked);
        report!("shadow.stale_roots {}", counts.stale_roots);
        let shadow = self.tables.shadow();
        let stats = shadow.stats();
        report!("shadow.pages {}", stats.pages);
        report!("shadow.direct {}", stats.direct);
        report!("shadow.unsync {}", stats.unsync);
        report!("shadow.leaves {}", stats.leaves);
        report!("shadow.tables {}", stats.tables);
        report!("shadow.created {}", stats.created);
        report!("shadow.zapped {}", stats.zapped);
        report!("shadow.reclaimed {}", stats.reclaimed);
        report!("shadow.flooded {}", stats.flooded);
        report!("shadow.fast_faults {}", stats.fast_faults);
        report!("shadow.prefetched {}", stats.prefetched);
        report!("shadow.write_track_hits {}", stats.write_track_hits);
        report!("shadow.unsyncs {}", stats.unsyncs);
        report!("shadow.syncs {}", stats.syncs);
        report!("shadow.synced_entries {}", stats.synced_entries);
        report!("shadow.loads {}", stats.loads);
        report!("shadow.flushes {}", stats.flushes);
        for (role, pages) in shadow.roles() {
            report!("roles.{} {pages}", name(&role));
        }
        for (class, frames) in stats.rmap_lengths.iter().enumerate() {
            report!("rmap.{} {frames}", 1_u64 << class);
        }
    }
}

/// What makes the roles of a 64-bit guest differ.
fn name(role: &Role) -> String {
    let mut name = alloc::format!("level_{}", role.level.get());
    for (is_so, word) in [
        (role.direct, "_direct"),
        (!role.rights.contains(Rights::WRITE), "_read_only"),
        (!role.rights.contains(Rights::USER), "_kernel"),
        (!role.rights.contains(Rights::EXECUTE), "_nx"),
        (!role.reading.write_protect, "_without_wp"),
        (!role.reading.no_execute, "_without_nxe"),
        (role.address_space.get() != 0, "_smm"),
    ] {
        if is_so {
            name += word;
        }
    }
    name
}
