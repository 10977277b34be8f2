//! A descriptor chain, as a device walks it: guard, available ring, eight descriptors, one read in each buffer.

use std::hint::black_box;

use anyhow::Context;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::host::Sides;
use super::{amount, target};
use crate::Effort;
use crate::measure::{time, versus};
use crate::report::Report;

/// Descriptors in a chain.
const LENGTH: usize = 8;

pub(crate) fn run(sides: &Sides, effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("descriptor chain of 8") {
        return Ok(());
    }
    let n = sides.pieces.len();
    let (rounds, count) = amount(effort);
    let memory = sides.ours.memory();
    let buffers = sides.addresses(4096);
    // The rings are in the first page of the first slot, and the buffers elsewhere in the memory.
    let queue = MockSplitQueue::create(&*memory, GuestAddress(sides.pieces[0].gpa), 16);
    let last = LENGTH - 1;
    let descriptors: Vec<RawDescriptor> = (0..LENGTH)
        .map(|i| {
            let (flags, next) = (u16::from(i < last), u16::try_from(i + 1).unwrap_or(0));
            Descriptor::new(buffers[i], 8, flags, next).into()
        })
        .collect();
    queue.build_desc_chain(&descriptors).map_err(|error| anyhow::anyhow!("{error:?}"))?;
    let (mut ours, mut device, mut theirs): (Queue, Queue, Queue) = (
        queue.create_queue().context("the queue is valid")?,
        queue.create_queue().context("the queue is valid")?,
        queue.create_queue().context("the queue is valid")?,
    );
    anyhow::ensure!(walk(&sides.ours, &mut ours) == LENGTH && walk(&sides.peer, &mut theirs) == LENGTH);
    let count = count / LENGTH;
    let mut peer = || walks(count, &sides.peer, &mut theirs);
    let times = versus(rounds, || walks(count, &sides.ours, &mut ours), &mut peer);
    report.times("descriptor chain of 8", n, "GuestMemoryAtomic", times, target(n));
    let space = sides.ours.for_devices();
    let times = versus(rounds, || walks(count, &space, &mut device), &mut peer);
    report.times("descriptor chain of 8, device", n, "GuestMemoryAtomic", times, target(n));
    Ok(())
}

fn walks<S: GuestAddressSpace>(count: usize, space: &S, queue: &mut Queue) -> f64 {
    time(count, || {
        for _ in 0..count {
            black_box(walk(space, queue));
        }
    })
}

/// Pops the chain and reads from each of its buffers; how many there were.
#[inline(never)]
fn walk<S: GuestAddressSpace>(space: &S, queue: &mut Queue) -> usize {
    queue.set_next_avail(0);
    let Some(chain) = queue.pop_descriptor_chain(space.memory()) else { return 0 };
    let memory = chain.memory();
    let mut sum = 0;
    let count = chain.clone().inspect(|d| sum += memory.read_obj::<u64>(d.addr()).unwrap_or(1)).count();
    black_box(sum);
    count
}
