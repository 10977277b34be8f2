//! The entries' layout in memory, and the sizes that a ring can have: both are KVM's.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::addr::PageSize;
use crate::error::OutOfMemory;

/// The bytes of an [`Entry`].
pub const ENTRY_BYTES: u64 = 16;
/// The most entries of a ring.
pub const MAX_ENTRIES: u32 = 65536;
/// How many entries the soft limit keeps back on every machine.
pub const RESERVED_ENTRIES: u32 = 64;
/// How many more it keeps back where the processor logs pages by itself (Intel's PML): its buffer's size.
pub const PML_ENTRIES: u32 = 512;

/// [`Entry::flags`]: the page was written.
pub const DIRTY: u32 = 1;
/// [`Entry::flags`]: user space has read the entry. Whether [`DIRTY`] is set as well does not matter then.
pub const RESET: u32 = 2;

/// One entry of a ring, as user space sees it: KVM's `struct kvm_dirty_gfn`.
///
/// Anybody who has the memory may write anything into it.
#[derive(Debug, Default)]
#[repr(C, align(16))]
pub struct Entry {
    /// [`DIRTY`] and [`RESET`]; all other bits are ignored.
    pub flags: AtomicU32,
    /// Bits 0-15: the slot id; bits 16-31: the address space.
    pub slot: AtomicU32,
    /// The page, counted from the slot's first one.
    pub offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() as u64 == ENTRY_BYTES);

/// Why there is no such ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The size is no power of two.
    #[error("a ring's size is a power of two, not {bytes} bytes")]
    NotPowerOfTwo {
        /// What was asked for.
        bytes: u64,
    },
    /// The ring would not hold a page, or not more than what is kept back.
    #[error("a ring of {bytes} bytes is too small: {least} bytes is the least here")]
    TooSmall {
        /// What was asked for.
        bytes: u64,
        /// What is needed, before it is rounded up to a power of two.
        least: u64,
    },
    /// The ring would have more than [`MAX_ENTRIES`].
    #[error("a ring of {bytes} bytes is too large: {most} bytes is the most")]
    TooLarge {
        /// What was asked for.
        bytes: u64,
        /// What is possible.
        most: u64,
    },
    /// The caller's memory has not the size that the ring shall have.
    #[error("the memory has room for {entries} entries, the ring has {needed}")]
    WrongMemory {
        /// How many entries the memory has.
        entries: usize,
        /// How many it should have.
        needed: u32,
    },
    /// No memory for the entries, or for what is kept beside them.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// A size that a ring can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingSize {
    entries: u32,
    kept_back: u32,
}

impl RingSize {
    /// A ring of `bytes` bytes of which the hardware needs `reserved` entries for itself: [`PML_ENTRIES`] or 0.
    ///
    /// # Errors
    /// In KVM's order: [`RingError::NotPowerOfTwo`]; [`RingError::TooSmall`] below a page, or where `reserved` and
    /// [`RESERVED_ENTRIES`] would be all the ring has; [`RingError::TooLarge`].
    ///
    /// ```
    /// use memslot::PageSize;
    /// use memslot::dirty::ring::{PML_ENTRIES, RingError, RingSize};
    /// let size = RingSize::from_bytes(64 << 10, PageSize::K4, PML_ENTRIES)?;
    /// assert_eq!((size.entries(), size.soft_limit()), (4096, 4096 - 64 - 512));
    /// assert!(matches!(RingSize::from_bytes(8192, PageSize::K4, PML_ENTRIES), Err(RingError::TooSmall { .. })));
    /// # Ok::<(), RingError>(())
    /// ```
    pub fn from_bytes(bytes: u64, page: PageSize, reserved: u32) -> Result<Self, RingError> {
        let kept_back = u64::from(RESERVED_ENTRIES) + u64::from(reserved);
        // One entry more than is kept back: a soft limit of 0 would never let a vCPU run. The sizes that are
        // powers of two are the same for every `reserved` that KVM has.
        let least = page.bytes().max((kept_back + 1) * ENTRY_BYTES);
        let most = u64::from(MAX_ENTRIES) * ENTRY_BYTES;
        if !bytes.is_power_of_two() {
            return Err(RingError::NotPowerOfTwo { bytes });
        }
        if bytes < least {
            return Err(RingError::TooSmall { bytes, least });
        }
        match (u32::try_from(bytes / ENTRY_BYTES), u32::try_from(kept_back)) {
            (Ok(entries), Ok(kept_back)) if entries <= MAX_ENTRIES => Ok(Self { entries, kept_back }),
            _ => Err(RingError::TooLarge { bytes, most }),
        }
    }

    /// How many entries the ring has.
    #[must_use]
    pub const fn entries(self) -> u32 {
        self.entries
    }

    /// With this many entries in use or more, a vCPU must not run.
    #[must_use]
    pub const fn soft_limit(self) -> u32 {
        self.entries - self.kept_back
    }

    /// Free entries for a ring of this size.
    ///
    /// # Errors
    /// [`RingError::OutOfMemory`].
    pub fn allocate(self) -> Result<Vec<Entry>, RingError> {
        filled(self.entries)
    }
}

pub(super) fn filled<T: Default>(entries: u32) -> Result<Vec<T>, RingError> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(entries as usize).map_err(|_| OutOfMemory)?;
    memory.resize_with(entries as usize, T::default);
    Ok(memory)
}
