//! Second-stage tables: guest frame → host frame, driven by memory slots.
//!
//! [`Mmu`] has the tables of one address space of one guest. Any number of threads use it at the same time:
//!
//! | who | what | takes a lock |
//! |---|---|---|
//! | [`Walker`] (one per virtual processor) | faults, prefaults, ages, translates | no |
//! | [`Rearm`](crate::DirtyRearm) of the dirty log | write-protects pages, or clears their dirty bits | only for whole tables |
//! | the slot table, as its listener | follows changes of slots | one, in bounded steps |
//! | range operations, invalidations | zap, write-protect, split, collapse … | the same |
//!
//! # The protocol
//!
//! **1. An entry is the token of its range.** A fault walks down to the entry that is in its way and remembers its
//! value, *then* looks at the slots, *then* asks for the frame, and installs with one compare-exchange against the
//! remembered value. Whatever makes a fault's findings untrue (a slot deleted, moved or made read-only, memory
//! invalidated) happens in this order: first the change becomes visible, then **every entry of the range is changed,
//! empty ones too**: each gets the nonce of the operation, which is never used twice. So a fault that has looked at
//! the old state fails to install, and a fault that installs has looked at a state that holds. Nobody waits, and a
//! change elsewhere changes no entry here. Missing tables are built aside, leaf included, and linked by that one
//! exchange.
//!
//! **2. Write access given by mistake is noticed.** Starting the dirty log changes no empty entries, as a writable
//! page in a logged slot is not wrong, only to be marked: after a fault has granted write access, it looks whether
//! the slots have changed meanwhile, and marks what it granted if that is logged now. Either it sees the change, or
//! whoever starts the log sees the writable entry.
//!
//! **3. Write access comes back by itself only to pages that were never denied it.** A leaf with `MAY_WRITE` becomes
//! writable by one compare-exchange, which proves that the slot is not read-only and the host allows it: whoever
//! takes either away clears the bit first. Any other leaf is emptied (with a nonce of its own) and faulted in anew.
//!
//! **4. Tables are taken out, flushed, awaited, freed.** Taking out a table is one exchange in the entry above it,
//! whatever the table holds. A processor may go on through it until it is flushed; a fault may even install something
//! in it meanwhile, which is gone with the flush. After the flush the table waits until every walker that was inside
//! has left ([epochs](crate)), and only then is it freed, with all that is below it. No walker reads a freed table,
//! and none waits. That a walker is inside must be visible before it looks, which is much of what a fault costs; a heavy
//! fence takes that over to whoever frees ([`Mmu::attach_with_fence`]).
//!
//! **5. What one owes, others pay.** Between an operation's change and its flush, processors use what the tables no
//! longer say. Another operation that finds its range empty already must not believe that nobody uses it: if a flush
//! is owed somewhere in its range, it owes one, too. An empty entry that a fault left (3.) says so by itself
//! (`STALE`), and so do all entries of a table that takes its place. With dirty bits, what processors write until the
//! flush is in tables that are linked no more: whoever collects looks there, too.
//!
//! **6. Operations exclude each other, faults exclude nobody.** Range operations have one lock between them, for
//! bounded steps; it protects them from *collapsing*, which replaces a table that another might be working in. What
//! faults and the dirty log do needs no more than the compare-exchange of single entries.
//!
//! # Dirty pages
//!
//! With [`DirtyMode::WriteProtect`], a page of a logged slot is writable only while it is marked; it is marked right
//! after write access was granted, before the fault returns. With [`DirtyMode::Hardware`] all pages may be writable,
//! and the processor's dirty bits are collected before a harvest. In both, pages of a logged slot are 4 KiB as far as
//! they are writable; large ones are write-protected and split when they are written.

pub(crate) mod age;
pub(crate) mod collapse;
pub(crate) mod cursor;
pub(crate) mod epoch;
pub(crate) mod fault;
pub(crate) mod follow;
pub(crate) mod graves;
pub(crate) mod install;
pub(crate) mod operation;
pub(crate) mod place;
pub(crate) mod protect;
pub(crate) mod rearm;
pub(crate) mod shared;
pub(crate) mod split;
pub(crate) mod walker;
pub(crate) mod zap;

#[cfg(all(test, not(loom)))]
mod counter_tests;
#[cfg(all(test, loom))]
mod loom_light;
#[cfg(all(test, loom))]
mod loom_steps;
#[cfg(all(test, loom))]
mod loom_tests;

use alloc::boxed::Box;

use memslot::dirty::{DirtyLog, HeavyFence};
use memslot::{AddressSpaceId, OutOfMemory, PageSize, SlotTable};

use self::follow::Follower;
pub(crate) use self::shared::{Pin, Published, Shared};
pub use self::walker::Walker;
use crate::counted::{Counted, try_box};
use crate::format::Format;
use crate::host::{Context, Host, Pfn};
use crate::level::Level;

/// How writes to pages of logged slots are noticed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DirtyMode {
    /// Pages are write-protected; the fault of the first write marks them.
    #[default]
    WriteProtect,
    /// The processor sets dirty bits, which are [collected](crate::DirtyRearm::collect). Fewer faults, more to look
    /// through.
    Hardware,
}

/// What tables shall be like.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which address space of the slot table they are for.
    pub address_space: AddressSpaceId,
    /// What flushes are tagged with.
    pub context: Context,
    /// The largest page that is made.
    pub largest: Level,
    /// How many tables there may be, those in caches and those waiting to be freed included.
    pub tables: usize,
    /// Where pages of logged slots are marked. Without it, logged slots are treated as if they were not.
    pub log: Option<DirtyLog>,
    /// How writes to them are noticed.
    pub dirty: DirtyMode,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address_space: AddressSpaceId::NORMAL,
            context: Context::default(),
            largest: Level::G1,
            tables: usize::MAX,
            log: None,
            dirty: DirtyMode::default(),
        }
    }
}

/// Why tables cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Tables map pages of 4 KiB only.
    #[error("the slot table has pages of {} bytes, page tables have 4096", .0.bytes())]
    PageSize(PageSize),
    /// The processor's dirty bits were asked for, and the format has none.
    #[error("{format} entries have no dirty bit here")]
    NoDirtyBit {
        /// The format's name.
        format: &'static str,
    },
    /// No memory for the root.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// Why there was no table; nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// There was no memory.
    #[error("out of memory for a page table; nothing was changed")]
    OutOfMemory,
    /// There are as many as [`Config::tables`] allows.
    #[error("all {limit} page tables are in use; nothing was changed")]
    Limit {
        /// [`Config::tables`].
        limit: usize,
    },
}

impl From<OutOfMemory> for TableError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// What the tables cost, and what was done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Tables that exist: linked, in caches, and waiting to be freed.
    pub tables: usize,
    /// Flushes.
    pub flushes: u64,
    /// Frames covered by these flushes, in all.
    pub flushed_frames: u64,
    /// Obligations to flush that were dropped; the next flush covered them.
    pub forgotten_flushes: u64,
}

/// Second-stage tables of one address space. See the [module documentation](self).
///
/// A handle: clones are the same tables, on any thread.
///
/// ```
/// use memslot::*;
/// use memslot_mmu::format::{Access, Npt};
/// use memslot_mmu::{Config, Fault, Level, Mmu, user::UserHost};
///
/// let mut table = SlotTable::new(Limits::default())?;
/// let mmu = Mmu::<Npt, _>::attach(&mut table, UserHost::default(), Config::default())?;
/// table.create(SlotSpec {
///     address_space: AddressSpaceId::NORMAL,
///     id: SlotId::new(0),
///     gfns: GfnRange::with_len(Gfn::new(0), 1024).unwrap(),
///     backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000) },
///     flags: SlotFlags::empty(),
/// })?;
///
/// // A virtual processor faults. Where the tables are goes into its control block.
/// let mut vcpu = mmu.walker()?;
/// let _root = mmu.root();
/// assert_eq!(vcpu.fault(Gpa::new(0x12_3456), Access::WRITE)?, Fault::Mapped(Level::M2));
/// assert_eq!(vcpu.fault(Gpa::new(0x12_3456), Access::READ)?, Fault::AlreadyMapped);
/// assert_eq!(vcpu.fault(Gpa::new(0xfee0_0000), Access::READ)?, Fault::Mmio);
///
/// // The slot goes, and what mapped it with it: zapped and flushed once.
/// table.delete(AddressSpaceId::NORMAL, SlotId::new(0))?;
/// assert_eq!(vcpu.fault(Gpa::new(0x12_3456), Access::READ)?, Fault::Mmio);
/// assert_eq!(mmu.stats().flushes, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Mmu<F: Format, H: Host> {
    pub(crate) shared: Counted<Shared<F, H>>,
}

impl<F: Format, H: Host> Clone for Mmu<F, H> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<F: Format, H: Host + Send + Sync + 'static> Mmu<F, H> {
    /// Tables for the slots of `table`, empty at first. They follow every later change of the table, as one of its
    /// listeners. A dirty log is attached before them.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(table: &mut SlotTable, host: H, config: Config) -> Result<Self, AttachError> {
        Self::starting_at(table, host, config, None, 0)
    }

    /// The same, with a fence that makes every fault cheaper, and each freeing of tables and each change of slots dearer by
    /// its price.
    ///
    /// A walker announces itself before it looks at the tables, so that none is freed under it; without this by an atomic
    /// exchange. The fence must reach every thread that has a [`Walker`] or a [`DirtyRearm`](crate::DirtyRearm). It is called
    /// with the tables' lock held. For as long as it is refused, no table is freed that has been in use, and faults go on.
    ///
    /// On Linux, with the feature `membarrier` of the `memslot` crate, that is its `Membarrier`. A hypervisor sends an interrupt to
    /// the processors that run such threads, and waits until all have taken it.
    ///
    /// ```
    /// use memslot::dirty::{FenceRefused, HeavyFence};
    /// use memslot::{Limits, SlotTable};
    /// use memslot_mmu::{Config, Mmu, format::Npt, user::UserHost};
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
    /// let (host, config, fence) = (UserHost::default(), Config::default(), Box::new(OneProcessor));
    /// let mmu = Mmu::<Npt, _>::attach_with_fence(&mut table, host, config, fence)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach_with_fence(
        table: &mut SlotTable,
        host: H,
        config: Config,
        fence: Box<dyn HeavyFence>,
    ) -> Result<Self, AttachError> {
        Self::starting_at(table, host, config, Some(fence), 0)
    }

    /// With all counters at a value of the caller's choice, so that tests can go through the wrap.
    pub(crate) fn starting_at(
        table: &mut SlotTable,
        host: H,
        config: Config,
        heavy: Option<Box<dyn HeavyFence>>,
        counters: u64,
    ) -> Result<Self, AttachError> {
        let page = table.view().page_size();
        if page != PageSize::K4 {
            return Err(AttachError::PageSize(page));
        }
        if config.dirty == DirtyMode::Hardware && F::DIRTY == 0 {
            return Err(AttachError::NoDirtyBit { format: F::NAME });
        }
        let shared = Shared::starting_at(host, config, table.snapshot(), heavy, counters)?;
        let shared = Counted::new(shared).map_err(TableError::from)?;
        let mmu = Self { shared };
        let follower = try_box(Follower::new(mmu.clone())).map_err(TableError::from)?;
        table.add_listener(follower).map_err(TableError::from)?;
        Ok(mmu)
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// The frame of the root table, for the processor's register.
    #[must_use]
    pub fn root(&self) -> Pfn {
        self.shared.root
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> &H {
        &self.shared.host
    }

    /// What the tables were made with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Which address space they map.
    #[must_use]
    pub fn address_space(&self) -> AddressSpaceId {
        self.shared.config.address_space
    }

    /// A thread's own access: make one for each virtual processor, and keep it.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn walker(&self) -> Result<Walker<F, H>, OutOfMemory> {
        Walker::new(self.clone())
    }

    /// What the tables cost, and what was done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Frees every table that was taken out and that no walker is inside of any more. Operations do that for some
    /// tables each time; this call is for when memory is short, and for the end of tests.
    pub fn reclaim(&self) {
        self.shared.lock().reclaim(usize::MAX);
    }
}
