//! Nested paging: what the tables of [`memslot_mmu`] need of this machine, and a look at what they have become.
//!
//! * Tables are frames of a region of their own, reached where they are.
//! * Behind a slot's frame is a page of the [`Pool`], or, behind a device's slot, just that physical address.
//! * A flush is a request to every processor that runs the guest; see [`crate::processors`].

use alloc::vec::Vec;
use core::convert::Infallible;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use memslot::{Gfn, GfnRange, Slot};
use memslot_mmu::format::{Access, Format, MemoryType, Npt};
use memslot_mmu::shadow::GuestMemory;
use memslot_mmu::{Answer, Context, Frame, Frames, Level, Pfn, Table, TableMemory, TlbFlush};
use spin::Mutex;

use crate::cpu::index;
use crate::physical;
use crate::pool::Pool;
use crate::processors;

/// The guest's tables.
pub(crate) type Mmu = memslot_mmu::Mmu<Npt, &'static Host>;
/// A virtual processor's access to them.
pub(crate) type Walker = memslot_mmu::Walker<Npt, &'static Host>;

/// What the tables call. See the [module documentation](self).
pub(crate) struct Host {
    pool: Pool,
    tables: Mutex<TableFrames>,
}

/// Frames for tables: those never used, and those given back.
struct TableFrames {
    next: u64,
    end: u64,
    free: Vec<u64>,
    used: usize,
}

impl Host {
    /// The host of one guest. The frames of `tables` are for its tables alone.
    pub(crate) fn new(pool: Pool, tables: core::ops::Range<u64>) -> Self {
        let tables = TableFrames { next: tables.start, end: tables.end, free: Vec::new(), used: 0 };
        Self { pool, tables: Mutex::new(tables) }
    }

    /// The pool.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// How many frames are used for tables.
    pub(crate) fn table_frames(&self) -> usize {
        self.tables.lock().used
    }
}

// SAFETY: frames come from a region that only this type has, each to one caller at a time.
unsafe impl TableMemory for Host {
    fn allocate(&self, tables: usize) -> Option<Pfn> {
        if tables != 1 {
            return None;
        }
        let mut frames = self.tables.lock();
        let frame = match frames.free.pop() {
            Some(frame) => frame,
            None if frames.next < frames.end => {
                frames.next += 1;
                // Giving back must not need memory.
                let all = frames.used + 1;
                frames.free.try_reserve(all).ok()?;
                frames.next - 1
            }
            None => return None,
        };
        frames.used += 1;
        // SAFETY: the frame is nobody's.
        unsafe { physical::pointer::<Table>(frame << 12).write_bytes(0, 1) };
        Some(Pfn::new(frame))
    }

    unsafe fn free(&self, first: Pfn, _: usize) {
        let mut frames = self.tables.lock();
        frames.used -= 1;
        frames.free.push(first.get());
    }

    #[inline]
    fn reach(&self, table: Pfn) -> NonNull<Table> {
        // SAFETY: frames of the region are mapped where they are, and it does not begin at 0.
        unsafe { NonNull::new_unchecked(physical::pointer(table.get() << 12)) }
    }
}

impl Frames for Host {
    type Error = Infallible;

    fn frame(&self, slot: &Slot, gfn: Gfn, _: Access) -> Result<Answer, Infallible> {
        let (pfn, run, memory) = if let Some(address) = slot.token_at(gfn) {
            (address >> 12, slot.gfns(), MemoryType::Uncacheable)
        } else {
            let pool = self.pool();
            let Some(page) = slot.hva_of(gfn).and_then(|hva| pool.page_at(hva)) else {
                return Ok(Answer::Mmio);
            };
            (pool.frame(page), pool.run(gfn, page), MemoryType::WriteBack)
        };
        Ok(Answer::Frame(Frame { pfn: Pfn::new(pfn), run, access: Access::all(), memory }))
    }
}

impl GuestMemory for Host {
    fn with_page<R>(&self, slot: &Slot, gfn: Gfn, work: impl FnOnce(&Table) -> R) -> Option<R> {
        let page = slot.hva_of(gfn).and_then(|hva| self.pool.page_at(hva))?;
        self.pool.with_frame(page, |frame| {
            let table = physical::pointer::<Table>(frame << 12);
            // SAFETY: a frame of the pool is memory for as long as the program runs; nothing but atomic words is in it for Rust.
            work(unsafe { &*table })
        })
    }
}

impl TlbFlush for Host {
    fn flush(&self, _: Context, _: GfnRange) {
        processors::flush();
    }
}

/// What tables consist of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Census {
    /// Tables that are linked, the root included.
    pub(crate) tables: u64,
    /// Pages by size: 4 KiB, 2 MiB, 1 GiB.
    pub(crate) pages: [u64; 3],
}

/// Counts what is mapped. Nobody changes the tables meanwhile.
pub(crate) fn census(mmu: &Mmu) -> Census {
    let mut census = Census::default();
    count(mmu, mmu.root(), Npt::<4>::LEVELS, &mut census);
    census
}

fn count(mmu: &Mmu, table: Pfn, level: u8, census: &mut Census) {
    census.tables += 1;
    let Some(level) = Level::new(level) else { return };
    // SAFETY: linked tables exist; the guest's processors may set bits in them meanwhile.
    let table = unsafe { mmu.host().reach(table).as_ref() };
    for entry in &table.0 {
        let entry = entry.load(Ordering::Relaxed);
        if Npt::<4>::is_table(entry, level) {
            count(mmu, Npt::<4>::pfn(entry, level), level.get() - 1, census);
        } else if Npt::<4>::is_present(entry) {
            census.pages[index(u64::from(level.get())) - 1] += 1;
        }
    }
}
