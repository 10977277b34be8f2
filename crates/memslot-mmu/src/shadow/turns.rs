//! Who gets the lock: nobody waits for more than a step of what takes long.
//!
//! Whatever takes long goes in steps, and gives the lock back after each. That alone lets nobody in: a lock that is free is taken by
//! who asks first, and who has just given it back is the first to ask, while the others are still being woken. So before each step,
//! [`let_others_go`](Turns::let_others_go) looks how many wait, and does not ask before those have had the lock. They are waited for, not
//! looked for: nothing changes for who finds the lock free.
//!
//! A step waits for those who came before it, so a stream of others does not keep it waiting either.

use crate::sync::{AtomicU64, Guard, Mutex, Ordering, relax};

/// See the [module documentation](self).
pub(super) struct Turns {
    /// How many have had to wait, ever.
    came: AtomicU64,
    /// How many of them have got the lock.
    went: AtomicU64,
    /// How many steps there were.
    steps: AtomicU64,
}

impl Default for Turns {
    fn default() -> Self {
        Self { came: AtomicU64::new(0), went: AtomicU64::new(0), steps: AtomicU64::new(0) }
    }
}

impl Turns {
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
        self.came.fetch_add(1, Ordering::SeqCst);
        let guard = state.lock();
        self.went.fetch_add(1, Ordering::SeqCst);
        (guard, Some(self.steps.load(Ordering::SeqCst).wrapping_sub(before)))
    }

    /// Waits until those have had the lock who are waiting for it now. The caller does not have it.
    pub(super) fn let_others_go(&self) {
        if cfg!(loom) {
            return;
        }
        let came = self.came.load(Ordering::SeqCst);
        // By distance: the counters may wrap.
        while came.wrapping_sub(self.went.load(Ordering::SeqCst)).wrapping_sub(1) < 1 << 63 {
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
        turns.came.store(u64::MAX - 100, SeqCst);
        turns.went.store(u64::MAX - 100, SeqCst);
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
            // One that had begun when it was counted, and one that had looked just before.
            assert!(most <= 2, "overtaken {most} times");
        });
    }
}
