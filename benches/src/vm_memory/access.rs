//! Accesses through a guard that is held: `read_obj`, `load` and `write_obj`.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory};

use super::host::{Logged, Sides, addresses};
use super::{amount, target};
use crate::Effort;
use crate::measure::{time, versus};
use crate::report::Report;

const PEER: &str = "GuestMemoryMmap";

pub(crate) fn run(sides: &Sides, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let n = sides.pieces.len();
    let (rounds, count) = amount(effort);
    let random = sides.addresses(count);
    let (ours, peer) = (sides.ours.memory(), sides.peer.memory());
    for (i, &address) in random.iter().enumerate() {
        peer.write_obj(i as u64, GuestAddress(address))?;
        anyhow::ensure!(ours.read_obj::<u64>(GuestAddress(address))? == i as u64, "the same memory");
        peer.write_obj(0u64, GuestAddress(address))?;
    }
    let device = sides.ours.for_devices().memory();
    let same = vec![random[0]; count];
    for (name, addresses, target) in
        [("read_obj, random", &random, target(n)), ("read_obj, one region", &same, Some(1.0))]
    {
        if report.wants(name) {
            let times = versus(rounds, || read(&*ours, addresses), || read(&*peer, addresses));
            report.times(name, n, PEER, times, target);
        }
    }
    if report.wants("read_obj, device") {
        let times = versus(rounds, || read(&*device, &random), || read(&*peer, &random));
        report.times("read_obj, device, random", n, PEER, times, target(n));
    }
    if report.wants("write_obj, device") {
        let times = versus(rounds, || write(&*device, &random), || write(&*peer, &random));
        report.times("write_obj, device, random", n, PEER, times, target(n));
    }
    if report.wants("load, random") {
        let times = versus(rounds, || load(&*ours, &random), || load(&*peer, &random));
        report.times("load, random", n, PEER, times, target(n));
    }
    if report.wants("load, device") {
        let times = versus(rounds, || load(&*device, &random), || load(&*peer, &random));
        report.times("load, device, random", n, PEER, times, target(n));
    }
    if report.wants("write_obj, random") {
        let times = versus(rounds, || write(&*ours, &random), || write(&*peer, &random));
        report.times("write_obj, random", n, PEER, times, target(n));
    }
    if report.wants("read 256 bytes, random") {
        let times = versus(rounds, || copy(&*ours, &random), || copy(&*peer, &random));
        report.times("read 256 bytes, random", n, PEER, times, None);
    }
    Ok(())
}

/// Writes that are logged, as they are during a migration.
pub(crate) fn logged(n: usize, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let (rounds, count) = amount(effort);
    if !report.wants("write_obj, logged") {
        return Ok(());
    }
    let sides = Logged::new(n)?;
    let addresses = addresses(&sides.pieces, count);
    let (ours, peer) = (sides.ours.memory(), sides.peer.memory());
    let times = versus(rounds, || write(&*ours, &addresses), || write(&*peer, &addresses));
    anyhow::ensure!(sides.log.bytes() > 0, "it is logged");
    report.times("write_obj, logged", n, "with AtomicBitmap", times, None);
    let device = sides.ours.for_devices().memory();
    let times = versus(rounds, || write(&*device, &addresses), || write(&*peer, &addresses));
    report.times("write_obj, logged, device", n, "with AtomicBitmap", times, None);
    Ok(())
}

/// Each address depends on what was read last (0, but the compiler does not know), as a guest's pointers do.
#[inline(never)]
fn read(memory: &impl GuestMemory, addresses: &[u64]) -> f64 {
    time(addresses.len(), || {
        let mut last = 0;
        for address in addresses {
            last = memory.read_obj::<u64>(GuestAddress(address + last)).unwrap_or(1);
        }
        black_box(last);
    })
}

#[inline(never)]
fn load(memory: &impl GuestMemory, addresses: &[u64]) -> f64 {
    time(addresses.len(), || {
        let mut last = 0;
        for address in addresses {
            last = memory.load::<u64>(GuestAddress(address + last), Ordering::Acquire).unwrap_or(1);
        }
        black_box(last);
    })
}

#[inline(never)]
fn write(memory: &impl GuestMemory, addresses: &[u64]) -> f64 {
    time(addresses.len(), || {
        for address in addresses {
            black_box(memory.write_obj(0u64, GuestAddress(*address)).is_ok());
        }
    })
}

#[inline(never)]
fn copy(memory: &impl GuestMemory, addresses: &[u64]) -> f64 {
    let mut buffer = [0u8; 256];
    time(addresses.len(), || {
        for address in addresses {
            black_box(memory.read(&mut buffer, GuestAddress(*address & !0xff)).is_ok());
        }
        black_box(&buffer);
    })
}
