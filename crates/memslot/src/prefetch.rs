//! Asking for memory before it is needed.

use core::ops::Range;
use core::ptr::NonNull;

/// Asks the processor to fetch the cache lines behind an address before it is known which of them is needed.
#[inline]
pub(crate) fn prefetch(start: NonNull<u8>, lines: Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    for line in lines {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; a prefetch reads nothing and may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.as_ptr().wrapping_add(line * 64).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, lines);
}
