//! A host in the memory of a process: for tests, benchmarks and simulators, whose "processors" are threads that walk
//! the tables themselves.
//!
//! The frame number of a table is its address divided by 4096. Behind guest memory are "frames" whose
//! number is the host address divided by 4096, contiguous through the whole slot; [`UserHost::set_run`] breaks them
//! up. Of guest memory only that is ever touched which a host is [made with](UserHost::with_memory).

use alloc::boxed::Box;
use core::convert::Infallible;
use core::ptr::NonNull;

use memslot::{Gfn, GfnRange, Hva, Slot};

use crate::format::{Access, MemoryType};
use crate::host::{Answer, Context, Frame, Frames, Pfn, TableMemory, TlbFlush};
use crate::level::{PAGE_SHIFT, Table};
use crate::shadow::GuestMemory;
use crate::sync::{AtomicU64, AtomicUsize, Ordering};

/// See the [module documentation](self).
pub struct UserHost {
    tables: AtomicUsize,
    /// How many more tables there are.
    left: AtomicUsize,
    flushes: AtomicU64,
    /// log2 of the pages that are contiguous.
    run: AtomicU64,
    /// Guest memory, and the host address that its first page stands for.
    memory: Box<[Table]>,
    hva: u64,
}

impl Default for UserHost {
    fn default() -> Self {
        Self {
            tables: AtomicUsize::new(0),
            left: AtomicUsize::new(usize::MAX),
            flushes: AtomicU64::new(0),
            run: AtomicU64::new(63),
            memory: Box::default(),
            hva: 0,
        }
    }
}

impl UserHost {
    /// A host with guest memory that can be reached, as shadow tables need it: so many pages of zeros, for the host
    /// addresses from `hva` on, whatever lies there in this process. A guest's tables are written through
    /// [`memory`](Self::memory).
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::sync::atomic::Ordering;
    /// use memslot::Hva;
    /// use memslot_mmu::user::UserHost;
    ///
    /// // Shared: tables are attached to one handle, and another one has the memory.
    /// let host = Arc::new(UserHost::with_memory(Hva::new(0x7f00_0000_0000), 16));
    /// host.memory()[1].0[0].store(0x2027, Ordering::SeqCst);
    /// ```
    #[must_use]
    pub fn with_memory(hva: Hva, pages: usize) -> Self {
        let page = || Table(core::array::from_fn(|_| AtomicU64::new(0)));
        Self { memory: (0..pages).map(|_| page()).collect(), hva: hva.get(), ..Self::default() }
    }

    /// The pages of guest memory that it was made with.
    #[must_use]
    pub fn memory(&self) -> &[Table] {
        &self.memory
    }

    /// How many tables are allocated.
    #[must_use]
    pub fn tables(&self) -> usize {
        self.tables.load(Ordering::SeqCst)
    }

    /// How many flushes there were.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }

    /// Has only so many more tables; the next allocation after them fails.
    pub fn set_tables_left(&self, tables: usize) {
        self.left.store(tables, Ordering::SeqCst);
    }

    /// Makes only `2^pages_log2` frames at a time contiguous, in units aligned to their size.
    pub fn set_run(&self, pages_log2: u32) {
        self.run.store(u64::from(pages_log2), Ordering::SeqCst);
    }
}

#[cfg(not(loom))]
fn new_tables(tables: usize) -> Option<NonNull<Table>> {
    // SAFETY: a table's size is not zero.
    NonNull::new(unsafe { alloc::alloc::alloc_zeroed(layout(tables)?) }.cast())
}

/// Of tables side by side, aligned to their size together.
#[cfg(not(loom))]
fn layout(tables: usize) -> Option<core::alloc::Layout> {
    let bytes = tables.checked_mul(size_of::<Table>()).filter(|&bytes| bytes > 0)?;
    core::alloc::Layout::from_size_align(bytes, bytes).ok()
}

#[cfg(loom)]
fn new_tables(_: usize) -> Option<NonNull<Table>> {
    NonNull::new(alloc::boxed::Box::into_raw(alloc::boxed::Box::new(Table(core::array::from_fn(|_| {
        AtomicU64::new(0)
    })))))
}

// SAFETY: tables come from the global allocator; their frame number is their address.
unsafe impl TableMemory for UserHost {
    fn allocate(&self, tables: usize) -> Option<Pfn> {
        let take = |left: usize| if left == usize::MAX { Some(left) } else { left.checked_sub(tables) };
        self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).ok()?;
        let table = new_tables(tables)?;
        self.tables.fetch_add(tables, Ordering::SeqCst);
        Some(Pfn::new((table.as_ptr().expose_provenance() >> PAGE_SHIFT) as u64))
    }

    unsafe fn free(&self, first: Pfn, tables: usize) {
        self.tables.fetch_sub(tables, Ordering::SeqCst);
        #[cfg(not(loom))]
        if let Some(layout) = layout(tables) {
            // SAFETY: allocated by `new_tables` with this layout.
            unsafe { alloc::alloc::dealloc(self.reach(first).as_ptr().cast(), layout) };
        }
        #[cfg(loom)]
        {
            // SAFETY: made from a box by `new_tables`.
            let mut table = unsafe { alloc::boxed::Box::from_raw(self.reach(first).as_ptr()) };
            // loom panics here if a walker might still be inside.
            table.0.iter_mut().for_each(|entry| entry.with_mut(|_| ()));
        }
    }

    #[inline]
    fn reach(&self, table: Pfn) -> NonNull<Table> {
        #[expect(clippy::cast_possible_truncation, reason = "made from an address of this process")]
        let address = (table.get() as usize) << PAGE_SHIFT;
        debug_assert_ne!(address, 0);
        // SAFETY: no table lies at address 0.
        unsafe { NonNull::new_unchecked(core::ptr::with_exposed_provenance_mut(address)) }
    }
}

impl Frames for UserHost {
    type Error = Infallible;

    #[inline]
    fn frame(&self, slot: &Slot, gfn: Gfn, _: Access) -> Result<Answer, Infallible> {
        let Some(hva) = slot.hva_of(gfn) else { return Ok(Answer::Mmio) };
        let pfn = hva.get() >> PAGE_SHIFT;
        let mut run = slot.gfns();
        let log2 = self.run.load(Ordering::Relaxed);
        if log2 < 63 {
            let pages = 1 << log2;
            let within = pfn & (pages - 1);
            let start = Gfn::new(gfn.get() - within.min(gfn.get() - run.start().get()));
            let end = Gfn::new(gfn.get() + (pages - within));
            run = GfnRange::new(start, end.min(run.end())).unwrap_or(run);
        }
        let memory = MemoryType::WriteBack;
        Ok(Answer::Frame(Frame { pfn: Pfn::new(pfn), run, access: Access::all(), memory }))
    }
}

impl TlbFlush for UserHost {
    fn flush(&self, _: Context, _: GfnRange) {
        self.flushes.fetch_add(1, Ordering::SeqCst);
    }
}

impl GuestMemory for UserHost {
    fn with_page<R>(&self, slot: &Slot, gfn: Gfn, work: impl FnOnce(&Table) -> R) -> Option<R> {
        let page = slot.hva_of(gfn)?.get().checked_sub(self.hva)? >> PAGE_SHIFT;
        self.memory.get(usize::try_from(page).ok()?).map(work)
    }
}
