//! memslot as vm-memory's memory, beside vm-memory's own `GuestMemoryAtomic<GuestMemoryMmap>`.
//!
//! Both sides have the same regions on the same host memory. A table of few slots and one of many differ in how long
//! the lookup takes; the rest of an access is vm-memory's own code on either side.

mod access;
mod chain;
mod guards;
mod host;
mod update;

use crate::Effort;
use crate::report::Report;

/// Slots; a VM has 1 to 8 mostly, a few dozen with hotplug, and vhost-user allows 509.
const SIZES: [usize; 4] = [1, 8, 64, 509];

pub(crate) fn run(effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    for n in SIZES {
        let sides = host::Sides::new(n)?;
        access::run(&sides, effort, report)?;
        guards::run(&sides, effort, report)?;
        chain::run(&sides, effort, report)?;
    }
    for n in SIZES {
        access::logged(n, effort, report)?;
        update::run(n, effort, report)?;
    }
    Ok(())
}

/// What a row at this size shall reach.
fn target(n: usize) -> Option<f64> {
    SIZES.iter().position(|&size| size == n).map(|at| [1.0, 1.0, 1.5, 2.5][at])
}

/// Rounds, and operations in each.
fn amount(effort: Effort) -> (usize, usize) {
    match effort {
        Effort::Smoke => (3, 1 << 10),
        Effort::Normal => (21, 1 << 14),
        Effort::Long => (101, 1 << 15),
    }
}
