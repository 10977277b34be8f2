//! Descriptors on their way: from use, past the walkers, to use again.
//!
//! ```text
//!  in a list ──► taken out ──► waiting (stamped) ──► free ──► in a list
//!                 BATCH          walkers inside at the stamp leave
//! ```
//!
//! The stamp is made for a batch, after all of it was taken out: that is later than need be, and costs next to nothing
//! for each. There are two batches at a time, one that fills and one that waits; so nothing has to be allocated to
//! remember them, and a walker that stays for long makes the first grow and nobody wait.

use super::RmapError;
use super::descriptor::{Chain, Descriptor, Head};
use super::shared::{Cache, Shared};
use crate::sync::{AtomicU64, Ordering};

/// So many descriptors are taken out before the writer looks whether walkers have left.
const BATCH: usize = if cfg!(loom) { 1 } else { 64 };
/// So many the writer keeps for itself; it leaves further ones to the caches.
const ENOUGH: usize = 4 * BATCH;
/// How many chunks whose owner was dropped are freed with each batch.
const CHUNKS_PER_BATCH: usize = 8;

/// A few numbers of descriptors, side by side.
struct Few<const N: usize> {
    numbers: [u32; N],
    len: usize,
}

impl<const N: usize> Few<N> {
    const fn new() -> Self {
        Self { numbers: [0; N], len: 0 }
    }

    #[inline]
    fn push(&mut self, number: u32) -> bool {
        match self.numbers.get_mut(self.len) {
            Some(place) => {
                *place = number;
                self.len += 1;
                true
            }
            None => false,
        }
    }

    #[inline]
    fn pop(&mut self) -> Option<u32> {
        self.len = self.len.checked_sub(1)?;
        self.numbers.get(self.len).copied()
    }
}

/// Descriptors that left at about the same time. There are more than a few only where walkers stay for long.
struct Batch {
    few: Few<BATCH>,
    more: Chain,
}

impl Batch {
    fn new() -> Self {
        Self { few: Few::new(), more: Chain::default() }
    }

    const fn is_empty(&self) -> bool {
        self.few.len == 0 && self.more.len() == 0
    }

    #[inline]
    fn push(&mut self, shared: &Shared, number: u32) {
        if !self.few.push(number) {
            self.more.push(&shared.descriptors, number);
        }
    }
}

/// The writer's descriptors that are not in use.
pub(super) struct Pool {
    free: Few<ENOUGH>,
    /// Taken out before `stamp`.
    waiting: Batch,
    stamp: u64,
    taken_out: Batch,
    /// At how many that were taken out to look again.
    enough: usize,
}

impl Pool {
    pub(super) fn new() -> Self {
        Self { free: Few::new(), waiting: Batch::new(), stamp: 0, taken_out: Batch::new(), enough: BATCH }
    }

    /// A descriptor that no walker is in, and its number.
    #[inline]
    pub(super) fn take<'a>(
        &mut self,
        shared: &'a Shared,
        cache: &mut Cache,
    ) -> Result<(&'a Descriptor, u32), RmapError> {
        let number = match self.free.pop() {
            Some(number) => number,
            None if !core::ptr::eq(&*cache.shared, shared) => return Err(RmapError::Foreign),
            None => cache.numbers.pop().ok_or(RmapError::NotReserved)?,
        };
        Ok((shared.descriptors.all.get(number).ok_or(RmapError::NotReserved)?, number))
    }

    /// A descriptor is out of its list: no walker that comes from now on finds it. Goes on with what waits, if there is enough.
    #[inline]
    pub(super) fn take_out(&mut self, shared: &Shared, number: u32) {
        self.taken_out.push(shared, number);
        if self.taken_out.few.len + self.taken_out.more.len() >= self.enough {
            self.go_on(shared);
        }
    }

    /// Not inlined: where descriptors leave is quicker without it.
    #[inline(never)]
    fn go_on(&mut self, shared: &Shared) {
        self.turn(shared, 1);
        self.sweep(shared, CHUNKS_PER_BATCH);
        // If walkers stay for long, not each time.
        self.enough = self.taken_out.few.len + self.taken_out.more.len() + BATCH;
    }

    /// Frees what walkers have left, and stamps what was taken out since. In a second round that is freed, too, if nobody
    /// is inside.
    pub(super) fn turn(&mut self, shared: &Shared, rounds: usize) {
        let mut central = shared.central.lock();
        let central = &mut *central;
        for _ in 0..rounds {
            if !self.waiting.is_empty() {
                if !central.cells.have_passed(self.stamp, None) {
                    return;
                }
                while let Some(number) = self.waiting.few.pop() {
                    if !self.free.push(number) {
                        central.free.push(&shared.descriptors, number);
                    }
                }
                central.free.append(&shared.descriptors, &mut self.waiting.more);
            }
            if !self.taken_out.is_empty() {
                core::mem::swap(&mut self.waiting, &mut self.taken_out);
                self.stamp = shared.epoch.stamp();
            }
        }
    }

    /// Frees up to so many chunks whose owner was dropped. Whether all are freed.
    pub(super) fn sweep(&mut self, shared: &Shared, chunks: usize) -> bool {
        for _ in 0..chunks {
            let Some(chunk) = shared.central.lock().dropped.pop() else { return true };
            // SAFETY: dropped by its owner, and freed below.
            let len = unsafe { chunk.header() }.len();
            for place in 0..len {
                // SAFETY: as above.
                let head: Option<&AtomicU64> = unsafe { chunk.head(place) };
                let word = head.map_or(0, |head| head.load(Ordering::Relaxed));
                // SAFETY: read from a head of this reverse map.
                let Head::Many(first) = (unsafe { Head::new(word) }) else { continue };
                let mut next = Some(first);
                while let Some(descriptor) = next {
                    // SAFETY: read from a descriptor of this reverse map.
                    next = unsafe { descriptor.next() };
                    // No record leads here any more, should another list get the number of this one. Nobody counts: the
                    // list cannot be found.
                    descriptor.uncover(0);
                    self.taken_out.push(shared, descriptor.place().index());
                }
            }
            // SAFETY: its owner is gone, with all that was borrowed from it; and the pool is the writer's.
            unsafe { shared.free_chunk(chunk) };
        }
        false
    }

    /// Whether nothing waits.
    pub(super) const fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.taken_out.is_empty()
    }
}
