//! Who gets the lock: nobody waits for more than a few steps of what takes long.
//!
//! Whatever takes long goes in steps, and gives the lock back after each. That alone lets nobody in: a lock that is free is taken by
//! who asks first, and who has just given it back is the first to ask, while the others are still being woken. So before each step,
//! [`let_others_go`](Turns::let_others_go) waits until those have had the lock who are waiting for it. Nothing changes for who finds the lock free.
//!
//! Those who wait are counted in one of two places, by *phase*. A step begins the other phase, and waits until the place of the one before is empty.
//! So it waits for those who came before it and for no others: a stream of them does not keep it waiting, and one of them who comes again and
//! again is not taken for another who is still there. (Who looks at the phase just before it changes, and counts himself after, is waited for
//! by the step after the next.)

use crate::sync::{AtomicU64, Guard, Mutex, Ordering, relax};

/// See the [module documentation](self).
pub(super) struct Turns {
    /// Counts phases.
    phase: AtomicU64,
    /// How many wait who came in an even phase, and in an odd one.
    waiting: [AtomicU64; 2],
    /// How many steps there were.
    steps: AtomicU64,
}

impl Default for Turns {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self { phase: zero(), waiting: [zero(), zero()], steps: zero() }
    }
}

impl Turns {
    fn waiting_in(&self, phase: u64) -> &AtomicU64 {
        &self.waiting[usize::from(phase % 2 == 1)]
    }

    /// Takes the lock. Also how many steps of others have gone by for it: `None` if the lock was free.
    pub(super) fn lock<'a, T>(&self, state: &'a Mutex<T>) -> (Guard<'a, T>, Option<u64>) {
        // loom has enough to do.
        if cfg!(loom) {
            return (state.lock(), None);
        }
        if let Some(guard) = state.try_lock() {
            return (guard, None);
        }
        let before = self.steps.load(Ordering::SeqCst);
        let waiting = self.waiting_in(self.phase.load(Ordering::SeqCst));
        waiting.fetch_add(1, Ordering::SeqCst);
        let guard = state.lock();
        waiting.fetch_sub(1, Ordering::SeqCst);
        (guard, Some(self.steps.load(Ordering::SeqCst).wrapping_sub(before)))
    }

    /// Waits until those have had the lock who are waiting for it now. The caller does not have it.
    pub(super) fn let_others_go(&self) {
        if cfg!(loom) {
            return;
        }
        let waiting = self.waiting_in(self.phase.fetch_add(1, Ordering::SeqCst));
        while waiting.load(Ordering::SeqCst) > 0 {
            relax();
        }
        self.steps.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::thread;

    use super::*;

    /// Somebody who waits is overtaken by no step that begins later.
    #[test]
    fn who_waits_goes_before_the_next_step() {
        let (turns, state) = (Turns::default(), Mutex::new(0_u64));
        turns.phase.store(u64::MAX - 100, SeqCst);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let (turns, state, done) = (&turns, &state, &done);
            scope.spawn(move || {
                while !done.load(SeqCst) {
                    turns.let_others_go();
                    let (mut guard, _) = turns.lock(state);
                    // A step takes longer than anybody needs to come.
                    for _ in 0..if cfg!(miri) { 10 } else { 20_000 } {
                        *guard = std::hint::black_box(guard.wrapping_add(1));
                    }
                }
            });
            let (mut waits, mut most) = (0, 0);
            while waits < if cfg!(miri) { 3 } else { 300 } {
                let (guard, overtaken) = turns.lock(state);
                drop(guard);
                if let Some(overtaken) = overtaken {
                    (waits, most) = (waits + 1, most.max(overtaken));
                }
                thread::yield_now();
            }
            done.store(true, SeqCst);
            // One that had begun when it was counted, and two if the phase has changed just then.
            assert!(most <= 3, "overtaken {most} times");
        });
    }
}
