//! Frames for page tables, the same for all sides: a pool that hands out cleared frames.

use std::convert::Infallible;
use std::ptr::NonNull;
use std::sync::{Mutex, OnceLock, PoisonError};

use memslot::{Gfn, GfnRange, Slot};
use memslot_mmu::format::{Access, MemoryType};
use memslot_mmu::{Answer, Context, Frame, Frames, Pfn, Table, TableMemory, TlbFlush};

const FRAME: usize = 4096;

/// Frames of one piece of memory, used last in, first out.
pub(crate) struct Pool {
    free: Mutex<Vec<usize>>,
}

impl Pool {
    /// The one pool.
    pub(crate) fn get() -> &'static Self {
        static POOL: OnceLock<Pool> = OnceLock::new();
        POOL.get_or_init(|| {
            const FRAMES: usize = 8192;
            // One more to align. Written once, so that the kernel's page faults are not measured.
            let memory = vec![1u8; (FRAMES + 1) * FRAME].leak();
            let first = memory.as_mut_ptr().expose_provenance().next_multiple_of(FRAME);
            Self { free: Mutex::new((0..FRAMES).rev().map(|frame| first + frame * FRAME).collect()) }
        })
    }

    /// The address of a cleared frame.
    pub(crate) fn take(&self) -> Option<usize> {
        let frame = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        // SAFETY: a frame of the pool, which is nobody's.
        unsafe { std::ptr::with_exposed_provenance_mut::<u8>(frame).write_bytes(0, FRAME) };
        Some(frame)
    }

    pub(crate) fn give_back(&self, frame: usize) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(frame);
    }
}

/// A host whose guest memory is contiguous and never touched.
#[derive(Clone, Copy)]
pub(crate) struct BenchHost;

// SAFETY: frames of the pool are handed out once, and lie at their address.
unsafe impl TableMemory for BenchHost {
    fn allocate(&self, _: usize) -> Option<Pfn> {
        Pool::get().take().map(|frame| Pfn::new((frame / FRAME) as u64))
    }

    unsafe fn free(&self, first: Pfn, _: usize) {
        Pool::get().give_back(address(first));
    }

    #[inline]
    fn reach(&self, table: Pfn) -> NonNull<Table> {
        // SAFETY: no frame lies at address 0.
        unsafe { NonNull::new_unchecked(std::ptr::with_exposed_provenance_mut(address(table))) }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "made from an address of this process")]
fn address(frame: Pfn) -> usize {
    frame.get() as usize * FRAME
}

impl Frames for BenchHost {
    type Error = Infallible;

    #[inline]
    fn frame(&self, slot: &Slot, gfn: Gfn, _: Access) -> Result<Answer, Infallible> {
        let Some(hva) = slot.hva_of(gfn) else { return Ok(Answer::Mmio) };
        let pfn = Pfn::new(hva.get() / FRAME as u64);
        let frame = Frame { pfn, run: slot.gfns(), access: Access::all(), memory: MemoryType::WriteBack };
        Ok(Answer::Frame(frame))
    }
}

impl TlbFlush for BenchHost {
    fn flush(&self, _: Context, _: GfnRange) {}
}
