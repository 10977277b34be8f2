//! Finding a key among 16: the one step of a lookup that is not a load.
//!
//! Sorted keys are compared all at once, and the first that is above gives the answer. SSE2 is part of x86-64,
//! so nothing is detected at run time; elsewhere the compiler makes what it can of a loop. Where there are few keys,
//! counting them one by one is quicker than the way into a vector register and out again.

/// Keys that are compared; the last one is above everything, so that some key always is.
pub(super) const KEYS: usize = 16;

/// So many keys are counted one by one.
pub(super) const FEW: usize = 8;

/// A 32-bit offset as SSE2 can compare it, which knows signed numbers only: the order is kept.
#[inline]
pub(super) const fn key(offset: u32) -> i32 {
    i32::from_ne_bytes((offset ^ (1 << 31)).to_ne_bytes())
}

/// The offset of a key.
#[inline]
pub(super) const fn offset(key: i32) -> u32 {
    u32::from_ne_bytes(key.to_ne_bytes()) ^ (1 << 31)
}

/// Sixteen keys in ascending order, at an address that SSE2 can load from.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Keys(pub(super) [i32; KEYS]);

impl Keys {
    /// Puts a key before the one at `at`; the last one goes.
    pub(super) fn insert(&mut self, at: usize, key: i32) {
        self.0.copy_within(at..KEYS - 1, at + 1);
        self.0[at] = key;
    }

    /// Takes the key at `at` out and fills up with `rest`.
    pub(super) fn remove(&mut self, at: usize, rest: i32) {
        self.0.copy_within(at + 1.., at);
        self.0[KEYS - 1] = rest;
    }

    /// How many keys are not above `wanted`, where the last one is.
    #[inline]
    pub(super) fn not_above(&self, wanted: i32) -> usize {
        let above = self.above(wanted);
        debug_assert!(above != 0, "the last key is above everything");
        above.trailing_zeros() as usize
    }

    /// As [`not_above`](Self::not_above), where the first key is not above and those behind [`FEW`] are.
    ///
    /// One by one, without a branch: to put a number into a vector register and to get a mask out of one takes
    /// longer than so few comparisons.
    #[inline]
    pub(super) fn not_above_of_few(&self, wanted: i32) -> usize {
        let count = |i: usize| settled(usize::from(self.0[i] <= wanted));
        (1 + count(1)) + (count(2) + count(3)) + ((count(4) + count(5)) + (count(6) + count(7)))
    }

    /// Which keys are above `wanted`, a bit for each.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(super) fn above(&self, wanted: i32) -> u32 {
        use core::arch::x86_64::{_mm_movemask_epi8, _mm_set1_epi32};
        // SAFETY: SSE2 is part of x86-64.
        let above = unsafe { _mm_movemask_epi8(self.bytes_above(_mm_set1_epi32(wanted))) };
        u32::from_ne_bytes(above.to_ne_bytes())
    }

    /// Which of these starts are not above `wanted` while their ends are, a bit for each.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(super) fn covering(&self, ends: &Self, wanted: i32) -> u32 {
        use core::arch::x86_64::{_mm_andnot_si128, _mm_movemask_epi8, _mm_set1_epi32};
        // SAFETY: SSE2 is part of x86-64.
        let covering = unsafe {
            let wanted = _mm_set1_epi32(wanted);
            _mm_movemask_epi8(_mm_andnot_si128(self.bytes_above(wanted), ends.bytes_above(wanted)))
        };
        u32::from_ne_bytes(covering.to_ne_bytes())
    }

    /// A byte of ones for each key that is above those of `wanted`.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn bytes_above(&self, wanted: core::arch::x86_64::__m128i) -> core::arch::x86_64::__m128i {
        use core::arch::x86_64::{
            __m128i, _mm_cmpgt_epi32, _mm_load_si128, _mm_packs_epi16, _mm_packs_epi32,
        };
        let keys: *const __m128i = (&raw const self.0).cast();
        // SAFETY: SSE2 is part of x86-64; the loads are of the 64 bytes of `self`, aligned to 16.
        unsafe {
            let quarter = |i| _mm_cmpgt_epi32(_mm_load_si128(keys.add(i)), wanted);
            let low = _mm_packs_epi32(quarter(0), quarter(1));
            let high = _mm_packs_epi32(quarter(2), quarter(3));
            _mm_packs_epi16(low, high)
        }
    }

    /// Which keys are above `wanted`, a bit for each.
    #[cfg(not(target_arch = "x86_64"))]
    #[inline]
    pub(super) fn above(&self, wanted: i32) -> u32 {
        self.0.iter().enumerate().fold(0, |mask, (i, &key)| mask | u32::from(key > wanted) << i)
    }

    /// Which of these starts are not above `wanted` while their ends are, a bit for each.
    #[cfg(not(target_arch = "x86_64"))]
    #[inline]
    pub(super) fn covering(&self, ends: &Self, wanted: i32) -> u32 {
        !self.above(wanted) & ends.above(wanted)
    }
}

/// The same number, in a register, without the compiler knowing what it is: so it is computed as it was written,
/// not in a vector with others, and not merged into what follows.
#[inline(always)]
pub(super) fn settled(number: usize) -> usize {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let mut number = number;
        // SAFETY: there is no instruction.
        unsafe {
            core::arch::asm!("/* {} */", inout(reg) number, options(pure, nomem, nostack, preserves_flags));
        }
        number
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_is_the_number_of_keys_not_above() {
        let mut keys = [key(u32::MAX); KEYS];
        for (i, offset) in [0, 1, 5, 1 << 30, (1 << 31) - 1, 1 << 31, u32::MAX - 1].into_iter().enumerate() {
            keys[i] = key(offset);
        }
        let keys = Keys(keys);
        for wanted in [0, 1, 2, 4, 5, 6, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, u32::MAX - 1] {
            let expected = keys.0.iter().filter(|&&key| offset(key) <= wanted).count();
            let above: u32 =
                keys.0.iter().enumerate().map(|(i, &k)| u32::from(offset(k) > wanted) << i).sum();
            assert_eq!(keys.above(key(wanted)), above, "{wanted:#x}");
            assert_eq!(keys.not_above(key(wanted)), expected, "{wanted:#x}");
        }
    }
}
