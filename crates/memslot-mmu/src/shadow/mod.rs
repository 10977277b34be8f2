//! Shadow paging: tables for the processor that are made of the guest's own page tables.
//!
//! Where the processor cannot walk two sets of tables (or is not to), it walks *shadow tables*: guest virtual address → host frame. They
//! are made, as faults come, of the guest's tables (guest virtual → guest physical) and of the slots (guest physical → host). The guest
//! knows nothing of them. Whatever it does to its own tables has to show in them no later than a processor would notice.
//!
//! ```text
//!   the guest's tables           shadow pages                        slots, host
//!   CR3 ─► PML4 ─ ─ ─ ─ ─ ─ ─ ►  (gfn, level 4)  ◄─ the processor's CR3
//!            ▼                        ▼
//!          PDPT ─ ─ ─ ─ ─ ─ ─ ►  (gfn, level 3)
//!            ▼                        ▼
//!           PD  ─ ─ ─ ─ ─ ─ ─ ►  (gfn, level 2) ───────────────┐
//!            ▼                        ▼                        ▼ a large page of the guest,
//!           PT  ─ ─ ─ ─ ─ ─ ─ ►  (gfn, level 1)          (gfn, level 1, direct) in pieces
//!            ▼                        │                        │
//!          a guest frame              └────────► host frame ◄──┘
//! ```
//!
//! # The parts
//!
//! * A **shadow page** is one table, made of one table of the guest's read in one way: its [`Key`] is the frame and the
//!   whole [`Role`]. It is kept when nothing leads to it any more, for the next time the guest loads that table. *Direct* pages
//!   map a piece of guest memory as it is.
//! * The [reverse map](crate::rmap) knows for each guest frame which entries map it, and for each shadow page which
//!   entries lead to it. Every entry's record says where it is filed, and it is removed from there.
//! * Each page also has the [set of slots](slot_set) that its leaves are of.
//! * **Write tracking** (`track`): frames with a shadowed table are write-protected, or the shadow page is *unsync*.
//! * **Unsync** (`sync`): a table that the guest is writing is left alone until the guest flushes.
//! * **The fault path** (`fault`, `install`, `fast`; `mmio` where there is no memory; `ahead` of it), and what takes away (`zap`, `find`).
//! * **Slots that change** (`follow`): entries whose frames keep their memory stay, whatever slot these are of; `collapse` lets large pages
//!   be made again when logging stops.
//! * [`check`](Shadow::check): what holds between two operations.
//!
//! # Who takes the lock
//!
//! There is one lock for the structure, as KVM's `mmu_lock`: finding, making, linking, comparing and giving up shadow pages. Entries are
//! atomic all the same, because of those that come without it.
//!
//! | who | what | takes the lock |
//! |---|---|---|
//! | [`ShadowVcpu::fault`] | a write that needs nothing but W | no |
//! | | one where an entry remembers that there is no memory | no |
//! | | anything else | twice, for a bounded time; the host is asked in between, without it |
//! | [`ShadowVcpu::load`], [`invlpg`](ShadowVcpu::invlpg), [`flush_guest`](ShadowVcpu::flush_guest) | find the root; compare what is unsync | in steps, mostly one; the latter two not at all if nothing is |
//! | [`ShadowVcpu::is_stale`] | before each entry of the guest | no |
//! | [`ShadowRearm`], the dirty log's | write-protects through the reverse map | to begin, and for the flush |
//! | [`ShadowAger`] | clears accessed bits through the reverse map | no |
//! | ranges, invalidations, the slot table's listener | zap and protect through the reverse map | in steps |
//!
//! A step is about [`ShadowConfig::hold`] entries, and before each those go who are waiting for the lock (`turns`). Nothing is without an end that a guest
//! can make long: a page of its memory is mapped by 1000 entries at most, and as many lead to a table ([`LONGEST_LIST`]).
//! [`ShadowStats::longest_hold`] says how long it was.
//!
//! # The protocol
//!
//! **1. What a fault has found still holds when it installs.** Changes of slots and memory are numbered under the lock, with their frames; a
//! fault notes the number before it asks the host, and starts again if anything about its frames has changed since. The guest's
//! entries are read again under the lock, each after the page that shadows its table is tracked or unsync.
//!
//! **2. In sync or unsync, never in between.** As long as a page is in sync, no entry is MMU-writable that maps its table, in any address space, in
//! a page of any size. A page becomes unsync before an entry becomes writable; it is write-protected and flushed before it is
//! compared for the last time.
//!
//! **3. Access is taken away in the entry.** Whoever takes write access away for the sake of shadow paging clears MMU-writable, and the fast path sets
//! W by a compare-exchange against an entry that has it.
//!
//! **4. What processors may still have is pending** until it is flushed. What a guest changes in its own tables is not flushed by us, the guest
//! does that; but whoever relies on no processor having an old translation (memory is taken away, a table is tracked, a page is
//! re-armed) flushes if anything pending is about its frames. One flush for an operation.
//!
//! **5. Tables are taken out, flushed, awaited, freed**, as in [`nested`](crate::nested), 4. A root that a virtual processor uses is taken
//! apart at once and freed when the processor has let go of it.
//!
//! **6. Nothing fails under the lock.** Shadow pages and descriptors of the reverse map come from a reserve that is topped up
//! before. Where the limit of pages is reached, the oldest are given up.
//!
//! # What it does not do
//!
//! * It does not emulate instructions: see [`ShadowFault::WriteTracked`] for what to do without an emulator.
//! * The guest's memory types (PAT, PWT, PCD) and global pages are not looked at. Nor are protection keys: a guest must not be told that it
//!   has them.
//! * Frames that two guest addresses share (aliases in the slots) are tracked by guest address: a table written through its alias is not
//!   noticed before [`wrote`](Shadow::wrote) tells. So it is in KVM.
//!
//! # Example
//!
//! The guest's tables map the address `0x5000` to the frame 9:
//!
//! ```
//! use std::sync::atomic::Ordering;
//! use memslot::*;
//! use memslot_mmu::shadow::guest::{GuestAccess, GuestPaging, Processor, Registers};
//! use memslot_mmu::shadow::{Shadow, ShadowConfig, ShadowFault};
//! use memslot_mmu::{Level, user::UserHost};
//!
//! let hva = Hva::new(0x7f00_0000_0000);
//! let mut table = SlotTable::new(Limits::default())?;
//! let shadow = Shadow::attach(&mut table, UserHost::with_memory(hva, 16), ShadowConfig::default())?;
//! table.create(SlotSpec {
//!     address_space: AddressSpaceId::NORMAL,
//!     id: SlotId::new(0),
//!     gfns: GfnRange::with_len(Gfn::new(0), 16).unwrap(),
//!     backing: Backing::Host { hva },
//!     flags: SlotFlags::empty(),
//! })?;
//! let memory = shadow.host().memory();
//! let set = |table: usize, index: usize, value| memory[table].0[index].store(value, Ordering::SeqCst);
//! // PML4 in frame 1, PDPT in 2, PD in 3, PT in 4.
//! set(1, 0, 0x2027);
//! set(2, 0, 0x3027);
//! set(3, 0, 0x4027);
//! set(4, 5, 0x9067);
//!
//! let mut vcpu = shadow.vcpu()?;
//! let registers = Registers { cr0: 0x8001_0011, cr3: 0x1000, cr4: 0x20, efer: 0x500 };
//! let root = vcpu.load(GuestPaging::new(registers, Processor::default()), AddressSpaceId::NORMAL)?;
//! // `root.pfn` goes into the processor's CR3. It faults:
//! assert_eq!(vcpu.fault(0x5000, GuestAccess::WRITE)?, ShadowFault::Mapped(Level::K4));
//! assert!(matches!(vcpu.fault(0x6000, GuestAccess::READ)?, ShadowFault::Inject(_)));
//!
//! // The guest maps another frame there, and says so.
//! set(4, 5, 0xa067);
//! shadow.wrote(AddressSpaceId::NORMAL, Gpa::new(0x4028), 8);
//! vcpu.invlpg(0x5000);
//! assert_eq!(vcpu.fault(0x5000, GuestAccess::READ)?, ShadowFault::Mapped(Level::K4));
//! shadow.check()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod guest;

mod ahead;
mod by_slot;
mod check;
mod collapse;
mod directory;
mod entry;
mod fast;
mod fault;
mod find;
mod follow;
mod host;
mod install;
mod mmio;
#[cfg(all(test, not(loom)))]
mod mmio_tests;
mod page;
mod pass;
mod rearm;
mod reserve;
mod role;
mod shared;
pub mod slot_set;
mod slots;
mod spte;
mod stats;
mod sync;
mod tables;
mod track;
mod turns;
mod vcpu;
mod zap;

#[cfg(all(test, loom))]
mod loom_tests;

use alloc::vec::Vec;

use memslot::dirty::DirtyLog;
use memslot::{AddressSpaceId, Gfn, Gpa, OutOfMemory, PageSize, SlotTable};

pub use self::entry::LONGEST_LIST;
use self::follow::Follower;

pub use self::host::{GuestMemory, ShadowHost};
pub use self::rearm::{ShadowAger, ShadowRearm};
pub use self::role::{Key, Reading, Role};
use self::shared::Shared;
pub use self::slot_set::{SlotSet, SlotSetCache};
pub use self::stats::{RMAP_CLASSES, ShadowStats};
pub use self::vcpu::{RootKind, ShadowFault, ShadowRoot, ShadowVcpu};
pub use self::zap::ShadowInvalidation;
use crate::counted::{Counted, try_box};
use crate::host::Context;
use crate::level::Level;
use crate::nested::{AttachError, TableError};

/// What shadow tables shall be like.
#[derive(Clone, Debug)]
pub struct ShadowConfig {
    /// What flushes are tagged with.
    pub context: Context,
    /// The largest page that is made.
    pub largest: Level,
    /// How wide physical addresses are on the processor that walks these tables (CPUID `8000_0008h`, EAX 7:0). Address bits from there to 51
    /// are reserved in entries, and where there are some, entries remember that there is no memory: accesses there
    /// fault with [`RESERVED`](guest::GuestAccess::RESERVED) and need no walk as long as the slots stay as they are. 52: nothing is remembered.
    pub physical_address_bits: u8,
    /// How many shadow pages there may be: when there are more, the oldest go. At least 64.
    pub pages: usize,
    /// Up to which level the guest may write its tables freely between two flushes of its own: such a table is *unsync*.
    /// KVM: [`Level::K4`]. Tables above stay write-protected, and writes to them are
    /// [`WriteTracked`](ShadowFault::WriteTracked).
    pub unsync: Level,
    /// How many entries are looked at under one hold of the lock, by what can be done in steps: what waits for the lock waits for about so
    /// many. At least one table, or one list, is done in each.
    pub hold: usize,
    /// Where pages of logged slots are marked. Without it, logged slots are treated as if they were not.
    pub log: Option<DirtyLog>,
}

impl Default for ShadowConfig {
    fn default() -> Self {
        Self {
            context: Context::default(),
            largest: Level::G1,
            physical_address_bits: 52,
            pages: 1 << 14,
            unsync: Level::new(5).unwrap_or(Level::K4),
            hold: 1 << 13,
            log: None,
        }
    }
}

/// Why something could not be done; nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShadowError<E> {
    /// There was no memory for a table or for what is kept beside it.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The host had no answer.
    #[error("the host cannot say what is behind the page: {0}")]
    Frames(E),
    /// Nothing has been loaded yet.
    #[error("no root was loaded")]
    NoRoot,
}

impl<E> From<OutOfMemory> for ShadowError<E> {
    fn from(_: OutOfMemory) -> Self {
        Self::Table(TableError::OutOfMemory)
    }
}

/// The shadow tables of one guest, all of its address spaces. See the [module documentation](self).
///
/// A handle: clones are the same tables, on any thread.
pub struct Shadow<H: ShadowHost> {
    shared: Counted<Shared<H>>,
}

impl<H: ShadowHost> Clone for Shadow<H> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<H: ShadowHost + Send + Sync + 'static> Shadow<H> {
    /// Tables for the slots of `table`, none at first. They follow every later change of the slots, as one of the table's
    /// listeners. A dirty log is attached before them.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(table: &mut SlotTable, host: H, config: ShadowConfig) -> Result<Self, AttachError> {
        Self::starting_at(table, host, config, 0)
    }

    /// With all counters at a value of the caller's choice, so that tests go through the wrap.
    #[doc(hidden)]
    pub fn starting_at(
        table: &mut SlotTable,
        host: H,
        config: ShadowConfig,
        counters: u64,
    ) -> Result<Self, AttachError> {
        let page = table.view().page_size();
        if page != PageSize::K4 {
            return Err(AttachError::PageSize(page));
        }
        let shared =
            Shared::starting_at(host, config, &table.snapshot(), counters).map_err(TableError::from)?;
        let shared = Counted::new(shared).map_err(TableError::from)?;
        let shadow = Self { shared };
        let follower = try_box(Follower::new(shadow.clone())).map_err(TableError::from)?;
        table.add_listener(follower).map_err(TableError::from)?;
        Ok(shadow)
    }
}

impl<H: ShadowHost> Shadow<H> {
    /// A virtual processor's access. Make one for each, and keep it.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn vcpu(&self) -> Result<ShadowVcpu<H>, OutOfMemory> {
        ShadowVcpu::new(self.clone())
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> &H {
        &self.shared.host
    }

    /// What the tables were made with.
    #[must_use]
    pub fn config(&self) -> &ShadowConfig {
        &self.shared.config
    }

    /// Somebody other than the guest's processors (a device, the VMM) has written `bytes` bytes of guest memory from `gpa` on,
    /// or the write that was [`WriteTracked`](ShadowFault::WriteTracked) has been emulated. To be called after the write. Shadow pages of
    /// all address spaces are looked at: they may have the same memory there.
    pub fn wrote(&self, space: AddressSpaceId, gpa: Gpa, bytes: u64) {
        let _ = space;
        /// So many bytes are looked at before others get the lock.
        const STEP: u64 = 64 << 12;
        let end = gpa.get().saturating_add(bytes);
        let mut at = gpa.get();
        while at < end {
            let next = end.min((at / STEP + 1).saturating_mul(STEP));
            self.shared.with_in_turn(|locked| locked.wrote(Gpa::new(at), next - at));
            at = next;
        }
    }

    /// Lets the guest write to this frame without being noticed until it flushes: the shadow pages of the table there become unsync,
    /// whatever [`ShadowConfig::unsync`] says. Returns whether there were any that were not.
    ///
    /// What a hypervisor without an instruction emulator does with [`WriteTracked`](ShadowFault::WriteTracked) before the guest
    /// tries again.
    pub fn unprotect(&self, gfn: Gfn) -> bool {
        self.shared.with(|locked| locked.unprotect(gfn))
    }

    /// What there is, and what was done so far. Looks at all shadow pages and lists, in steps: what changes meanwhile may be counted as it
    /// was or as it is.
    #[must_use]
    pub fn stats(&self) -> ShadowStats {
        self.shared.stats()
    }

    /// The shadow pages that there are, by role and number.
    #[must_use]
    pub fn roles(&self) -> Vec<(Role, usize)> {
        let mut roles: Vec<(Role, usize)> = Vec::new();
        self.shared.for_each_page(|page| match roles.iter_mut().find(|(role, _)| *role == page.key.role) {
            Some((_, count)) => *count += 1,
            None => roles.push((page.key.role, 1)),
        });
        roles
    }

    /// Frees every table that is out of use, those that are kept to be used again included: for when memory is short, and for the
    /// end of tests.
    pub fn reclaim(&self) {
        while self.shared.with_in_turn(|locked| locked.free_spare()) {}
    }
}
