//! The fence that lets marks leave alone what is marked already.
//!
//! Most marks hit pages that are dirty, and an atomic exchange that changes nothing is the greater part of what a mark
//! costs. It cannot just be left out: a processor may look at the bit before what the caller wrote has left its store
//! buffer. Whoever takes the bit in between copies the page without the write, and the bit is gone:
//!
//! ```text
//! marker     write the page ·············· look: marked already, done        (the write becomes visible here)
//! taker                        take the bit                     copy the page
//! ```
//!
//! A fence between the write and the look would cost the marker as much as the exchange did. But takers are few. So the
//! marker's half is *light*: it keeps the compiler from changing the order. The taker's half is *heavy*: after it has
//! taken bits, and before pages are re-armed or anybody copies them, it has every other thread go through a full fence
//! ([`HeavyFence`]). That fence falls somewhere in the marker's thread:
//!
//! * behind the write: then the write is visible to the taker when its fence is done, wherever the marker looked;
//! * in front of the write, hence of all the marker's looks: then these see everything that was taken.
//!
//! What is left to show is that a bit which is seen is taken, by a take whose heavy fence comes behind the write. It is
//! not one that was taken already: of the takes whose fences are in front of the write, all looks see the effect. A look
//! may find a chunk that has been replaced since. Its bit is set still, and that take has it: its fence is behind the
//! write, as the look did not see its effect. Only another late marker can have set the bit too late for that take;
//! then the turn is another one, and the marker, who looks at it behind the bit as always, marks once more. And the flags
//! that lead to a bit: a marker that leaves the bit alone looks at the summary and at `occupied` all the same, in this
//! order, and sets what is not set. Takers clear them in the other order. So it does not matter that whoever set the
//! bit may not have come to its flags yet.
//!
//! A take without a heavy fence (when slots change) loses nothing as long as its bits go back into a bitmap: they are
//! taken once more. Those that do not are handed over behind one ([`Consumer::take_removed`](super::Consumer::take_removed)).

/// A full memory barrier in every thread that may mark, so that a mark of what is marked already need only look at it.
///
/// A processor may look at the bit before what the caller wrote has left its store buffer; whoever takes the bit in between
/// would copy the page without the write. An atomic exchange for each mark prevents that. Here, whoever takes bits
/// sees to it instead, and there are few of those.
///
/// When [`fence`](Self::fence) returns, each of these threads has gone through a full barrier at some time during the
/// call: what it wrote before that is visible to the caller, and what it looks at afterwards is not older than the call.
/// On Linux that is `membarrier` (`Membarrier`, with the feature of this name); a hypervisor sends an interrupt
/// to the processors that run vCPUs, and waits until all have taken it.
///
/// What is asked of those who mark stays the same: **write first, then mark**, in one thread or in threads that
/// synchronize. A page-table backend that grants write access without a lock that its [`Rearm`](super::Rearm) takes, too,
/// grants first and marks then. What another process, or a device that is not coherent, has written must be visible to
/// the thread that marks it before it does.
///
/// ```
/// use memslot::dirty::{DirtyLog, FenceRefused, HeavyFence};
/// use memslot::{Limits, SlotTable};
///
/// /// A system of one processor: every interrupt, and so every change of threads, is a barrier.
/// struct OneProcessor;
///
/// impl HeavyFence for OneProcessor {
///     fn fence(&self) -> Result<(), FenceRefused> {
///         std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
///         Ok(())
///     }
/// }
///
/// let mut table = SlotTable::new(Limits::default())?;
/// let log = DirtyLog::attach_with_fence(&mut table, Box::new(OneProcessor))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait HeavyFence: Send + Sync {
    /// Has all threads that may mark go through a full barrier. Called with the log's lock held, after bits were taken.
    ///
    /// # Errors
    /// [`FenceRefused`]: the log goes on without the fence for ever, and all pages of all logged slots count as
    /// dirty once more, since writes may have been missed.
    fn fence(&self) -> Result<(), FenceRefused>;
}

/// The system does not give the fence, or no longer does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the system refuses a memory barrier in all threads")]
pub struct FenceRefused;

#[cfg(all(feature = "membarrier", target_os = "linux"))]
mod linux {
    use rustix::thread::{MembarrierCommand, membarrier};

    use super::{FenceRefused, HeavyFence};

    /// `membarrier(2)` with `PRIVATE_EXPEDITED`: an interrupt to those processors that run threads of this process.
    ///
    /// About 0.2 µs where no other thread runs, and 2 µs where one does. All threads that mark must be of this process.
    ///
    /// ```
    /// use memslot::dirty::{DirtyLog, Membarrier};
    /// use memslot::{Limits, SlotTable};
    ///
    /// let mut table = SlotTable::new(Limits::default())?;
    /// let log = match Membarrier::new() {
    ///     Ok(fence) => DirtyLog::attach_with_fence(&mut table, Box::new(fence))?,
    ///     // An old kernel, or a filter of system calls: marks cost what they do without.
    ///     Err(_) => DirtyLog::attach(&mut table)?,
    /// };
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[derive(Debug)]
    pub struct Membarrier(());

    impl Membarrier {
        /// Registers the process for the fence, and tries it.
        ///
        /// # Errors
        /// [`FenceRefused`] with kernels before 4.14, and where a filter does not let the call through.
        pub fn new() -> Result<Self, FenceRefused> {
            membarrier(MembarrierCommand::RegisterPrivateExpedited).map_err(|_| FenceRefused)?;
            let fence = Self(());
            fence.fence().map(|()| fence)
        }
    }

    impl HeavyFence for Membarrier {
        fn fence(&self) -> Result<(), FenceRefused> {
            membarrier(MembarrierCommand::PrivateExpedited).map_err(|_| FenceRefused)
        }
    }
}

#[cfg(all(feature = "membarrier", target_os = "linux"))]
pub use self::linux::Membarrier;
