//! The allocator below `alloc`: blocks of powers of two, cut from one piece of memory, kept in a list per size when freed.
//!
//! Nothing is ever joined again, which wastes at most half; the hypervisor's needs are few and repeat themselves.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::null_mut;

use spin::Mutex;

/// The smallest block, as a power of two: one that has room for the list's pointer.
const SMALLEST: usize = 4;

struct Blocks {
    next: usize,
    end: usize,
    used: usize,
    /// The first free block of each size; each has the address of the next in its first word.
    free: [usize; 48],
}

/// The heap. Empty until it is given memory.
pub struct Heap(Mutex<Blocks>);

impl Heap {
    /// A heap without memory.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "made once, in a constant")]
    pub const fn new() -> Self {
        Self(Mutex::new(Blocks { next: 0, end: 0, used: 0, free: [0; 48] }))
    }

    /// Gives it memory, once.
    ///
    /// # Safety
    /// The range is memory that nobody else uses.
    pub(crate) unsafe fn give(&self, start: usize, end: usize) {
        let mut blocks = self.0.lock();
        (blocks.next, blocks.end) = (start, end);
    }

    /// How many bytes are in use, in whole blocks.
    pub(crate) fn used(&self) -> usize {
        self.0.lock().used
    }
}

/// log2 of the block for a layout.
fn class(layout: Layout) -> usize {
    let size = layout.size().max(layout.align()).max(1 << SMALLEST);
    size.next_power_of_two().trailing_zeros() as usize
}

// SAFETY: blocks are disjoint, aligned to their size, and each is in a list or with the caller.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let class = class(layout);
        let mut blocks = self.0.lock();
        let Some(&first) = blocks.free.get(class) else { return null_mut() };
        let block = if first == 0 {
            let start = blocks.next.next_multiple_of(1 << class);
            let end = start.saturating_add(1 << class);
            if end > blocks.end {
                return null_mut();
            }
            blocks.next = end;
            start
        } else {
            // SAFETY: a free block of this heap begins with the address of the next.
            blocks.free[class] = unsafe { *(first as *const usize) };
            first
        };
        blocks.used += 1 << class;
        block as *mut u8
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let class = class(layout);
        let mut blocks = self.0.lock();
        blocks.used -= 1 << class;
        // SAFETY: the block is the caller's until here, and at least as large as a pointer.
        unsafe { block.cast::<usize>().write(blocks.free[class]) };
        blocks.free[class] = block as usize;
    }
}
