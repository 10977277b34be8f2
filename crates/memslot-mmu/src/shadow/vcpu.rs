//! A virtual processor's access to the shadow tables.

use core::ptr::NonNull;

use memslot::{AddressSpaceId, Gfn, Gpa, OutOfMemory};

use super::fault::{Asked, Look, ask, ask_about_table};
use super::guest::{GuestAccess, GuestPaging, Mode, PageFault, Rights};
use super::page::ShadowPage;
use super::reserve::Reserve;
use super::role::{Key, Reading, Role};
use super::shared::{Locked, Shared};
use super::stats::Counter;
use super::{Shadow, ShadowError, ShadowHost, spte};
use crate::counted::Counted;
use crate::host::Pfn;
use crate::level::{ENTRIES, Level, PAGE_SHIFT};
use crate::nested::TableError;
use crate::nested::epoch::Cell;
use crate::sync::Ordering;

/// How the processor has to run the guest for a root.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RootKind {
    /// In long mode with four levels.
    Level4,
    /// In long mode with five levels.
    Level5,
    /// With PAE paging: the root is a page whose first four entries are the PDPTEs. For guests that are not in long mode, those
    /// without paging included; they run with `CR0.PG` and `CR4.PAE` set whatever they believe, and without paging with `CR4.SMEP`
    /// and `CR4.SMAP` clear. CR3 has 32 bits then, so the frame must lie below 4 GiB.
    Pae,
}

/// What belongs into the processor's CR3 (`VMCB.CR3`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ShadowRoot {
    /// The frame of the root table.
    pub pfn: Pfn,
    /// How it is to be walked.
    pub kind: RootKind,
}

/// What became of a page fault that the processor raised while the guest ran on shadow tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum ShadowFault {
    /// The access is allowed now, in a page of this size.
    Mapped(Level),
    /// It was allowed already: the processor had an old translation.
    AlreadyMapped,
    /// The guest's own tables do not allow it: the guest gets this fault.
    Inject(PageFault),
    /// One of the guest's tables is where no memory is, or a device's: its processor would read an entry at `entry`, and there is nobody to
    /// answer. KVM gives the guest `fault`, as for an entry that is not present; a VMM may think otherwise.
    NoTable {
        /// Where the entry would be.
        entry: Gpa,
        /// What the guest can be given.
        fault: PageFault,
    },
    /// No memory is to be mapped there, or the slot is read-only and this is a write: the access is emulated.
    Mmio(Gpa),
    /// A write to one of the guest's page tables, which stays write-protected: emulate it and tell with
    /// [`wrote`](Shadow::wrote), or [`unprotect`](Shadow::unprotect) it and let the guest try again.
    WriteTracked(Gpa),
    /// The host does not allow this access to the page.
    Denied(Gpa),
    /// Something is changing there, or the root is [stale](ShadowVcpu::is_stale): let the guest try again, after loading if it is.
    Retry,
}

/// A virtual processor's access to the shadow tables. Make one for each, and keep it.
///
/// A hypervisor calls [`load`](Self::load) whenever the guest changes CR0, CR3, CR4 or EFER, [`invlpg`](Self::invlpg) for that
/// instruction, [`flush_guest`](Self::flush_guest) for what else flushes (`CR4.PGE`, INVPCID), and [`fault`](Self::fault) for page faults.
/// After each but the last it flushes the processor's own TLB (or has VMRUN do so), as the guest's instruction would have.
/// Before each entry it asks [`is_stale`](Self::is_stale), and [loads again](Self::reload) if so.
///
/// The processor always runs with `CR0.WP` and `EFER.NXE` set: what the guest has there is in the tables.
pub struct ShadowVcpu<H: ShadowHost> {
    shadow: Shadow<H>,
    pub(super) cell: Counted<Cell>,
    reserve: Reserve,
    pub(super) loaded: Option<Loaded>,
    /// The table of a [`RootKind::Pae`].
    pae: Option<Pfn>,
}

/// What a virtual processor has loaded.
pub(super) struct Loaded {
    pub(super) paging: GuestPaging,
    pub(super) space: AddressSpaceId,
    kind: RootKind,
    /// One, or one for each GiB. Counted in the pages, so they are not freed.
    roots: [Option<NonNull<ShadowPage>>; 4],
}

// SAFETY: the pages belong to what is shared, and have nothing that is bound to a thread.
unsafe impl Send for Loaded {}
// SAFETY: pages are read through atomics.
unsafe impl Sync for Loaded {}

impl Loaded {
    fn roots(&self) -> impl Iterator<Item = &ShadowPage> {
        // SAFETY: counted as roots, and so not freed before `remove_root`.
        self.roots.iter().flatten().map(|page| unsafe { page.as_ref() })
    }

    /// Whether a root was given up, or all pages were.
    pub(super) fn is_stale<H: ShadowHost>(&self, shared: &Shared<H>) -> bool {
        let generation = shared.generation.load(Ordering::SeqCst);
        self.roots().any(|root| root.is_zapped() || root.generation != generation)
    }

    /// The root for an address.
    pub(super) fn root(&self, va: u64) -> Option<&ShadowPage> {
        let number = match self.kind {
            RootKind::Level4 | RootKind::Level5 => 0,
            RootKind::Pae => usize::try_from(va >> 30).unwrap_or(0) & 3,
        };
        // SAFETY: as in `roots`.
        self.roots[number].as_ref().map(|page| unsafe { page.as_ref() })
    }
}

/// How often a fault starts again by itself when it was overtaken.
const ATTEMPTS: usize = 16;

impl<H: ShadowHost> ShadowVcpu<H> {
    pub(super) fn new(shadow: Shadow<H>) -> Result<Self, OutOfMemory> {
        let cell = shadow.shared.with(|locked| locked.state.cells.add())?;
        let reserve = Reserve::new(shadow.shared.rmap.cache());
        Ok(Self { shadow, cell, reserve, loaded: None, pae: None })
    }

    /// The tables.
    #[must_use]
    pub fn shadow(&self) -> &Shadow<H> {
        &self.shadow
    }

    /// The guest's paging is now this, in this address space: finds or makes the root, brings everything below it that the guest
    /// may have changed up to date, and says what belongs into the processor's CR3.
    ///
    /// For PAE paging the PDPTEs are those of `paging`: load them before.
    ///
    /// # Errors
    /// [`ShadowError`]; the old root stays.
    pub fn load(
        &mut self,
        paging: GuestPaging,
        space: AddressSpaceId,
    ) -> Result<ShadowRoot, ShadowError<H::Error>> {
        let shared = &*self.shadow.shared;
        self.reserve.top_up(shared)?;
        let kind = match paging.mode() {
            Mode::Level4 => RootKind::Level4,
            Mode::Level5 => RootKind::Level5,
            Mode::Off | Mode::Bits32 | Mode::Pae => RootKind::Pae,
        };
        if kind == RootKind::Pae && self.pae.is_none() {
            let table = shared.host.allocate(1).ok_or(ShadowError::Table(TableError::OutOfMemory))?;
            self.pae = Some(table);
        }
        let old = self.loaded.take();
        let reserve = &mut self.reserve;
        let (loaded, sync, mut done) = shared.with(|locked| {
            locked.count(Counter::Loads);
            let sync = locked.begin_sync();
            locked.make_room(super::reserve::PAGES);
            let mut loaded = Loaded { paging, space, kind, roots: [None; 4] };
            for (number, key) in root_keys(&paging, space).into_iter().enumerate() {
                let Some(key) = key else { continue };
                // There are enough in reserve: one for each.
                let Some(page) = locked.page_with(reserve, key, &paging) else { continue };
                Locked::<H>::add_root(page);
                loaded.roots[number] = Some(NonNull::from(page));
            }
            if let Some(old) = old {
                locked.remove_roots(&old);
            }
            let done = locked.sync_roots(&loaded, Level::K4, sync).then(|| locked.has_hints());
            (loaded, sync, done)
        });
        let has_hints = loop {
            if let Some(has_hints) = done {
                break has_hints;
            }
            done = shared.with_in_turn(|locked| {
                locked.sync_roots(&loaded, Level::K4, sync).then(|| locked.has_hints())
            });
        };
        if has_hints {
            super::ahead::make(shared, &mut self.reserve);
        }
        if let Some(pae) = self.pae {
            // SAFETY: allocated by this processor, which frees it when it is dropped.
            let table = unsafe { shared.host.reach(pae).as_ref() };
            for (place, root) in table.0.iter().zip(&loaded.roots) {
                // SAFETY: counted as a root.
                let entry = root.map_or(0, |root| spte::pdpte(unsafe { root.as_ref() }.table));
                place.store(entry, Ordering::SeqCst);
            }
        }
        self.loaded = Some(loaded);
        self.root().ok_or(ShadowError::NoRoot)
    }

    /// The root, if one was loaded.
    #[must_use]
    pub fn root(&self) -> Option<ShadowRoot> {
        let loaded = self.loaded.as_ref()?;
        let pfn = match loaded.kind {
            RootKind::Level4 | RootKind::Level5 => loaded.root(0)?.table,
            RootKind::Pae => self.pae?,
        };
        Some(ShadowRoot { pfn, kind: loaded.kind })
    }

    /// The paging that was loaded.
    #[must_use]
    pub fn paging(&self) -> Option<&GuestPaging> {
        self.loaded.as_ref().map(|loaded| &loaded.paging)
    }

    /// Whether the root was given up meanwhile (its slot went, or all shadow pages did): the guest must not be entered before
    /// [`reload`](Self::reload). A few loads, without a lock.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.loaded.as_ref().is_none_or(|loaded| loaded.is_stale(&self.shadow.shared))
    }

    /// [Loads](Self::load) the same paging again.
    ///
    /// # Errors
    /// As `load`.
    pub fn reload(&mut self) -> Result<ShadowRoot, ShadowError<H::Error>> {
        let loaded = self.loaded.as_ref().ok_or(ShadowError::NoRoot)?;
        let (paging, space) = (loaded.paging, loaded.space);
        self.load(paging, space)
    }

    /// The processor raised a page fault at `va`: maps the page, or says what else to do.
    ///
    /// A page that is written in a logged slot is marked in the dirty log when this returns.
    ///
    /// # Errors
    /// [`ShadowError`]; nothing has changed.
    pub fn fault(&mut self, va: u64, access: GuestAccess) -> Result<ShadowFault, ShadowError<H::Error>> {
        let shared = &*self.shadow.shared;
        shared.counters.add(Counter::Faults, 1);
        let loaded = self.loaded.as_ref().ok_or(ShadowError::NoRoot)?;
        if let Some(gpa) = super::mmio::remembered(shared, &self.cell, loaded, va, access) {
            return Ok(ShadowFault::Mmio(gpa));
        }
        if let Some(done) = super::fast::fast_fault(shared, &self.cell, loaded, va, access) {
            shared.counters.add(Counter::FastFaults, 1);
            return Ok(done);
        }
        for _ in 0..ATTEMPTS {
            self.reserve.top_up(shared)?;
            let reserve = &mut self.reserve;
            let mut found = match shared.with(|locked| locked.look(reserve, loaded, va, access)) {
                Look::Done(fault) => return Ok(fault),
                Look::Unreachable(table) => return ask_about_table(shared, loaded, &table, (va, access)),
                Look::Found(found) => found,
            };
            let frame = match ask(shared, &mut found)? {
                Asked::Frame(frame) => frame,
                Asked::Done(fault) => return Ok(fault),
            };
            let reserve = &mut self.reserve;
            let done = shared.with(|locked| locked.install(reserve, loaded, &found, &frame));
            if let Some(done) = done {
                return Ok(done);
            }
        }
        Ok(ShadowFault::Retry)
    }

    /// The guest executes INVLPG: its entries for `va` are read again.
    ///
    /// As processors do, all that is known of tables above the lowest level is forgotten with it.
    pub fn invlpg(&mut self, va: u64) {
        let shared = &*self.shadow.shared;
        shared.counters.add(Counter::Invlpgs, 1);
        let Some(loaded) = self.loaded.as_ref().filter(|loaded| loaded.roots().any(ShadowPage::needs_sync))
        else {
            return;
        };
        let (sync, mut is_done) = shared.with(|locked| {
            let sync = locked.begin_sync();
            (sync, locked.sync_address(loaded, va, sync))
        });
        while !is_done {
            is_done = shared.with_in_turn(|locked| locked.sync_address(loaded, va, sync));
        }
    }

    /// The guest flushes everything: all that it may have changed is read again.
    pub fn flush_guest(&mut self) {
        let shared = &*self.shadow.shared;
        let Some(loaded) = self.loaded.as_ref().filter(|loaded| loaded.roots().any(ShadowPage::needs_sync))
        else {
            return;
        };
        let (sync, mut is_done) = shared.with(|locked| {
            let sync = locked.begin_sync();
            (sync, locked.sync_roots(loaded, Level::K4, sync))
        });
        while !is_done {
            is_done = shared.with_in_turn(|locked| locked.sync_roots(loaded, Level::K4, sync));
        }
    }
}

/// What the roots are found by.
fn root_keys(paging: &GuestPaging, space: AddressSpaceId) -> [Option<Key>; 4] {
    let key = |gfn, level, direct, quadrant| {
        let level = Level::new(level).unwrap_or(Level::M2);
        let reading = Reading::of(paging);
        let role = Role { level, direct, rights: Rights::all(), quadrant, address_space: space, reading };
        Some(Key { gfn: Gfn::new(gfn), role })
    };
    let gfn = paging.root().get() >> PAGE_SHIFT;
    match paging.mode() {
        Mode::Level4 => [key(gfn, 4, false, 0), None, None, None],
        Mode::Level5 => [key(gfn, 5, false, 0), None, None, None],
        Mode::Bits32 => [0, 1, 2, 3].map(|quadrant| key(gfn, 2, false, quadrant)),
        Mode::Pae => paging.pdptes().map(|pdpte| {
            let gfn = (pdpte & ((1 << 52) - 1)) >> PAGE_SHIFT;
            (pdpte & spte::PRESENT != 0).then(|| key(gfn, 2, false, 0)).flatten()
        }),
        Mode::Off => [0u64, 1, 2, 3].map(|number| {
            let pages = (ENTRIES * ENTRIES) as u64;
            key(number * pages, 2, true, 0)
        }),
    }
}

impl<'g, H: ShadowHost> Locked<'g, H> {
    /// The root for an address.
    pub(super) fn root(&self, loaded: &Loaded, va: u64) -> Option<&'g ShadowPage> {
        loaded.root(va).and_then(|root| self.page(root.table)).filter(|root| !root.is_zapped())
    }

    fn roots(&self, loaded: &Loaded) -> impl Iterator<Item = &'g ShadowPage> + use<'g, H> {
        let roots = loaded.roots;
        // SAFETY: counted as roots, and the lock is held for 'g.
        roots.into_iter().flatten().map(|root| unsafe { root.as_ref() })
    }

    /// A step of a flush of the guest's, of all that its processor can reach; returns whether that was the last.
    fn sync_roots(&mut self, loaded: &Loaded, lowest: Level, sync: u64) -> bool {
        self.roots(loaded).all(|root| self.sync_some(root, lowest, sync))
    }

    /// The same for one address, and tables above the lowest level.
    fn sync_address(&mut self, loaded: &Loaded, va: u64, sync: u64) -> bool {
        let is_done = self.sync_roots(loaded, Level::M2, sync);
        if is_done {
            self.sync_path(loaded, va);
        }
        is_done
    }

    fn remove_roots(&mut self, loaded: &Loaded) {
        for root in loaded.roots.into_iter().flatten() {
            // SAFETY: added when it was loaded, and removed once: what is loaded is given up.
            unsafe { self.remove_root(root) };
        }
    }
}

impl<H: ShadowHost> Drop for ShadowVcpu<H> {
    fn drop(&mut self) {
        let shared = &*self.shadow.shared;
        let (loaded, cell) = (self.loaded.take(), &self.cell);
        shared.with(|locked| {
            if let Some(loaded) = loaded {
                locked.remove_roots(&loaded);
            }
            locked.state.cells.remove(cell);
        });
        self.reserve.drain(shared);
        if let Some(pae) = self.pae {
            // SAFETY: allocated by this processor, which does not run any more.
            unsafe { shared.host.free(pae, 1) };
        }
    }
}
