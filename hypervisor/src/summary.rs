//! The figures of a run, for `cargo xtask linux`.

use crate::console::report;
use crate::paging::census;
use crate::processors;
use crate::scenario::Turn;

/// Reports everything that was counted.
pub(crate) fn report(turn: &Turn<'_>) {
    let counts = &turn.vcpu.counts;
    let exits = [
        ("faults", counts.faults),
        ("ticks", counts.ticks),
        ("ticks_over", counts.ticks_over),
        ("kicks", counts.kicks),
        ("ports", counts.ports),
        ("calls", counts.calls),
        ("others", counts.others),
    ];
    for (name, count) in exits {
        report!("exits.{name} {count}");
    }
    report!("events_delivered_again {}", counts.events_again);
    let faults = &turn.guest.faults;
    for (size, count) in ["4k", "2m", "1g"].iter().zip(faults.mapped) {
        report!("faults.mapped_{size} {count}");
    }
    report!("faults.already_mapped {}", faults.already_mapped);
    report!("faults.retry {}", faults.retry);
    report!("faults.mmio {}", faults.mmio);
    report!("faults.other {}", faults.other);
    let census = census(&turn.guest.mmu);
    report!("tables.linked {}", census.tables);
    for (size, count) in ["4k", "2m", "1g"].iter().zip(census.pages) {
        report!("pages.{size} {count}");
    }
    let stats = turn.guest.mmu.stats();
    report!("tables.all {}", stats.tables);
    report!("flushes.count {}", stats.flushes);
    report!("flushes.frames {}", stats.flushed_frames);
    report!("flushes.kicks {}", processors::kicks());
    report!("ticks.inside {}", counts.inside);
    report!("ticks.outside {}", counts.outside);
}
