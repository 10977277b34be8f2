//! The figures of a run, for `cargo xtask linux`.

use crate::console::report;
use crate::guest::Guest;
use crate::maps::Maps;
use crate::paging::census;
use crate::processors;
use crate::running::Counted;
use crate::vcpu::Kind;

/// Reports everything that was counted, by the guest's processors together and by each.
pub(crate) fn report(guest: &Guest, counted: &[(usize, Counted)]) {
    let sum = |of: &dyn Fn(&Counted) -> u64| counted.iter().map(|(_, counted)| of(counted)).sum::<u64>();
    for (kind, name) in Kind::ALL {
        report!("exits.{name} {}", sum(&|(counts, _)| counts.exits(kind)));
        report!("outside.{name} {}", sum(&|(counts, _)| counts.outside(kind)));
    }
    report!("inside {}", sum(&|(counts, _)| counts.inside));
    report!("events_delivered_again {}", sum(&|(counts, _)| counts.events_again));
    for (level, size) in ["4k", "2m", "1g"].iter().enumerate() {
        report!("faults.mapped_{size} {}", sum(&|(_, faults)| faults.mapped[level]));
    }
    report!("faults.mapped_around {}", sum(&|(_, faults)| faults.around));
    report!("faults.already_mapped {}", sum(&|(_, faults)| faults.already_mapped));
    report!("faults.retry {}", sum(&|(_, faults)| faults.retry));
    report!("faults.mmio {}", sum(&|(_, faults)| faults.mmio));
    report!("faults.other {}", sum(&|(_, faults)| faults.other));
    for (number, (counts, _)) in counted {
        report!("processor.{number}.faults {}", counts.exits(Kind::Fault));
        report!("processor.{number}.kicks {}", counts.exits(Kind::Kick));
        report!("processor.{number}.inside {}", counts.inside);
    }
    if let Maps::Shadow(_) = guest.maps {
        return;
    }
    let census = census(&guest.mmu);
    report!("tables.linked {}", census.tables);
    for (size, count) in ["4k", "2m", "1g"].iter().zip(census.pages) {
        report!("pages.{size} {count}");
    }
    let stats = guest.mmu.stats();
    report!("tables.all {}", stats.tables);
    report!("flushes.count {}", stats.flushes);
    report!("flushes.frames {}", stats.flushed_frames);
    report!("flushes.kicks {}", processors::kicks());
}
