//! Taking a guard, and what it costs to hold many.

use std::hint::black_box;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::host::Sides;
use super::{amount, target};
use crate::Effort;
use crate::measure::{time, versus};
use crate::report::Report;

const PEER: &str = "GuestMemoryAtomic";

pub(crate) fn run(sides: &Sides, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let n = sides.pieces.len();
    let (rounds, count) = amount(effort);
    let addresses = sides.addresses(count);
    for (name, held) in
        [("memory() + read_obj", 0), ("… with 8 guards held", 8), ("… with 20 guards held", 20)]
    {
        if report.wants(name) || report.wants("memory() + read_obj") {
            let times = versus(
                rounds,
                || enter(&sides.ours, held, &addresses),
                || enter(&sides.peer, held, &addresses),
            );
            report.times(name, n, PEER, times, target(n));
        }
    }
    if report.wants("guard clone") {
        let times = versus(rounds, || clone(&sides.ours, count), || clone(&sides.peer, count));
        report.times("guard clone + drop", n, PEER, times, Some(1.0));
    }
    if report.wants("memory() alone") {
        let times = versus(rounds, || alone(&sides.ours, count), || alone(&sides.peer, count));
        report.times("memory() alone", n, PEER, times, Some(1.0));
    }
    if report.wants("500 guards") {
        let times = versus(rounds, || many(&sides.ours, count), || many(&sides.peer, count));
        report.times("500 guards, taken and dropped", n, PEER, times, Some(1.0));
    }
    Ok(())
}

#[inline(never)]
fn enter<S: GuestAddressSpace>(space: &S, held: usize, addresses: &[u64]) -> f64 {
    let held: Vec<_> = (0..held).map(|_| space.memory()).collect();
    let ns = time(addresses.len(), || {
        let mut last = 0;
        for address in addresses {
            last = space.memory().read_obj::<u64>(GuestAddress(address + last)).unwrap_or(1);
        }
        black_box(last);
    });
    drop(held);
    ns
}

#[inline(never)]
fn clone<S: GuestAddressSpace>(space: &S, count: usize) -> f64 {
    let guard = space.memory();
    time(count, || {
        for _ in 0..count {
            black_box(&black_box(&guard).clone());
        }
    })
}

#[inline(never)]
fn alone<S: GuestAddressSpace>(space: &S, count: usize) -> f64 {
    time(count, || {
        for _ in 0..count {
            black_box(&black_box(space).memory());
        }
    })
}

#[inline(never)]
fn many<S: GuestAddressSpace>(space: &S, count: usize) -> f64 {
    let mut guards = Vec::with_capacity(500);
    time(count / 500 * 500, || {
        for _ in 0..count / 500 {
            guards.extend((0..500).map(|_| space.memory()));
            black_box(&guards);
            guards.clear();
        }
    })
}
