//! What the host provides: frames for tables, the frames behind guest memory, and the flush of translations.
//!
//! Three traits, usually on one type, which is then a [`Host`]. On bare metal it is a frame allocator with a direct
//! map, the pool that guests get their memory from, and an interrupt to the other processors. In a process it is
//! [`UserHost`](crate::user::UserHost). A reference to a host, or an [`Arc`] of it, is one, too.
//!
//! The tables call the host from the fault path and from range operations, some with a lock held: none of these
//! functions may call back into the tables that call it.

use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;

use memslot::{Gfn, GfnRange, Slot};

use crate::format::{Access, MemoryType};
use crate::level::Table;

/// A page frame number of the host: a host physical address divided by 4096.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Pfn(u64);

impl Pfn {
    /// Wraps a raw value.
    #[inline]
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The raw value.
    #[inline]
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pfn({:#x})", self.0)
    }
}

/// Hands out frames for page tables, and reaches them.
///
/// # Safety
/// Until it is freed, a table that was allocated belongs to the caller alone (and to the processors that walk it),
/// and [`reach`](Self::reach) returns the same valid pointer to it, from any thread.
pub unsafe trait TableMemory {
    /// `tables` tables side by side, aligned to their size together, all entries 0. `None` if there is no memory.
    ///
    /// More than one is asked for only for a root whose format wants that.
    fn allocate(&self, tables: usize) -> Option<Pfn>;

    /// Takes tables back.
    ///
    /// # Safety
    /// They were allocated together, are not freed yet, and nobody uses them: no thread, and no processor's walk.
    unsafe fn free(&self, first: Pfn, tables: usize);

    /// Where a table can be read and written: through the direct map on bare metal.
    fn reach(&self, table: Pfn) -> NonNull<Table>;
}

/// What stands behind a guest frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The host's frame.
    pub pfn: Pfn,
    /// The guest frames around the one asked for, that one included, whose host frames are contiguous with its own:
    /// all of the page that the host has there, or of its pool. Large pages are made within it only.
    pub run: GfnRange,
    /// What the host allows. Writing may be missing for pages that are shared until they are written.
    pub access: Access,
    /// How it is cached.
    pub memory: MemoryType,
}

/// The answer to "what is behind this guest frame?".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// This frame.
    Frame(Frame),
    /// Nothing that can be mapped: the access is emulated.
    Mmio,
    /// It is about to change; try again.
    Retry,
}

/// Answers slot + guest frame → host frame.
///
/// **The contract**: an answer stays right until the memory is [invalidated](crate::Mmu::invalidate_hva). Whoever
/// changes what the answer would be (another frame, or less access) has that done first, keeps the invalidation
/// while it changes, and uses the old frame for something else only then. More access needs no invalidation.
pub trait Frames {
    /// What can go wrong.
    type Error;

    /// What is behind `gfn`, a frame of `slot`, for this access. A page may be brought in, or unshared for a write.
    ///
    /// # Errors
    /// The fault fails with it.
    fn frame(&self, slot: &Slot, gfn: Gfn, access: Access) -> Result<Answer, Self::Error>;
}

/// Which translations a flush is about: an address space identifier, a virtual machine identifier, an EPT pointer.
/// The meaning is the host's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Context(pub u64);

/// Removes translations from the processors.
pub trait TlbFlush {
    /// Once this returns, no processor uses a translation of `gfns` that it had before, nor a table that it had
    /// found on the way there, also where it began its access before. May flush more.
    ///
    /// Virtual processors that do not run at the moment count, too: their processor may still have what they left
    /// behind.
    fn flush(&self, context: Context, gfns: GfnRange);
}

/// All that the tables need of the host.
pub trait Host: TableMemory + Frames + TlbFlush {}

impl<H: TableMemory + Frames + TlbFlush> Host for H {}

/// A host is one through its handles, too.
macro_rules! pass_on {
    ($($handle:ty),*) => {$(
        // SAFETY: as the host that is shared.
        unsafe impl<H: TableMemory> TableMemory for $handle {
            fn allocate(&self, tables: usize) -> Option<Pfn> {
                (**self).allocate(tables)
            }

            unsafe fn free(&self, first: Pfn, tables: usize) {
                // SAFETY: passed on.
                unsafe { (**self).free(first, tables) }
            }

            #[inline]
            fn reach(&self, table: Pfn) -> NonNull<Table> {
                (**self).reach(table)
            }
        }

        impl<H: Frames> Frames for $handle {
            type Error = H::Error;

            #[inline]
            fn frame(&self, slot: &Slot, gfn: Gfn, access: Access) -> Result<Answer, H::Error> {
                (**self).frame(slot, gfn, access)
            }
        }

        impl<H: TlbFlush> TlbFlush for $handle {
            fn flush(&self, context: Context, gfns: GfnRange) {
                (**self).flush(context, gfns);
            }
        }
    )*};
}
pass_on!(&H, Arc<H>);
