//! Reading what a VMM passed to KVM, without ever following a pointer that the kernel has not followed.

use std::ffi::{c_int, c_void};

use crate::threads;

/// The kernel's verdict on a call: the value that `ioctl` returned, and `errno` if that is -1.
#[derive(Clone, Copy)]
pub(crate) struct Answer {
    pub(crate) ret: c_int,
    pub(crate) errno: c_int,
}

impl Answer {
    pub(crate) fn is_success(self) -> bool {
        self.ret >= 0
    }

    /// Whether KVM came so far that it had copied the argument. The errnos are those of its own rules, which it
    /// checks on the copy; any other may come from a pointer that leads nowhere, a kernel without the call, or a sandbox.
    fn argument_was_copied(self) -> bool {
        let of_the_rules = [libc::EINVAL, libc::EEXIST, libc::ENOENT, libc::ENXIO, libc::ENOMEM, libc::E2BIG];
        self.is_success() || of_the_rules.contains(&self.errno)
    }
}

/// The first bytes of an ioctl's argument.
pub(crate) struct Argument<const BYTES: usize>([u8; BYTES]);

impl<const BYTES: usize> Argument<BYTES> {
    /// Of a call that has returned. `None` if the pointer leads nowhere.
    pub(crate) fn copy(pointer: *const c_void, answer: Answer) -> Option<Self> {
        let mut bytes = [0; BYTES];
        if answer.argument_was_copied() {
            // SAFETY: the kernel has just read at least this much from there (no argument here is shorter), for the thread
            // that called us and is still inside its call.
            bytes = unsafe { pointer.cast::<[u8; BYTES]>().read_unaligned() };
            return Some(Argument(bytes));
        }
        let ours = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: BYTES };
        let theirs = libc::iovec { iov_base: pointer.cast_mut(), iov_len: BYTES };
        // SAFETY: the kernel copies into our bytes; from where, it checks itself.
        let copied = unsafe {
            libc::syscall(
                libc::SYS_process_vm_readv,
                threads::process(),
                &raw const ours,
                1_usize,
                &raw const theirs,
                1_usize,
                0_usize,
            )
        };
        usize::try_from(copied).is_ok_and(|copied| copied == BYTES).then_some(Argument(bytes))
    }

    /// The 32-bit field at this offset, 0 beyond the end.
    pub(crate) fn u32(&self, at: usize) -> u32 {
        self.field(at).map_or(0, u32::from_ne_bytes)
    }

    /// The 64-bit field at this offset, 0 beyond the end.
    pub(crate) fn u64(&self, at: usize) -> u64 {
        self.field(at).map_or(0, u64::from_ne_bytes)
    }

    fn field<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..)?.first_chunk().copied()
    }
}

/// A bitmap in the VMM's memory that the kernel has just read or written.
#[derive(Clone, Copy)]
pub(crate) struct UserBitmap {
    address: *const u8,
    words: u64,
}

impl UserBitmap {
    /// The bitmap of `pages` pages at an address.
    ///
    /// # Safety
    ///
    /// The kernel has read or written all its 64-bit words in the call that is being recorded.
    pub(crate) unsafe fn new(address: u64, pages: u64) -> Self {
        let address = std::ptr::with_exposed_provenance(usize::try_from(address).unwrap_or(0));
        UserBitmap { address, words: pages.div_ceil(64) }
    }

    /// Word number `nth`, 0 beyond the end.
    pub(crate) fn word(self, nth: u64) -> u64 {
        match usize::try_from(nth) {
            Ok(nth) if u64::try_from(nth).is_ok_and(|nth| nth < self.words) => {
                // SAFETY: below the end, so the kernel was there in this call. It need not be aligned.
                u64::from_le(unsafe { self.address.cast::<u64>().wrapping_add(nth).read_unaligned() })
            }
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSED: Answer = Answer { ret: -1, errno: libc::EIO };

    #[test]
    fn fields_of_both_widths() {
        let words = [1_u32, 2, 3, 4];
        for answer in [Answer { ret: 0, errno: 0 }, Answer { ret: -1, errno: libc::EINVAL }, REFUSED] {
            let argument = Argument::<16>::copy(words.as_ptr().cast(), answer).expect("readable");
            assert_eq!((argument.u32(0), argument.u32(12), argument.u32(13), argument.u32(16)), (1, 4, 0, 0));
            if cfg!(target_endian = "little") {
                assert_eq!((argument.u64(4), argument.u64(8)), (3 << 32 | 2, 4 << 32 | 3));
            }
        }
    }

    #[test]
    fn a_pointer_to_nowhere_is_not_followed() {
        for errno in [libc::EFAULT, libc::EIO, libc::ENOTTY, libc::EBADF] {
            for nowhere in [0, 1, usize::MAX - 7] {
                let nowhere = std::ptr::without_provenance(nowhere);
                assert!(Argument::<32>::copy(nowhere, Answer { ret: -1, errno }).is_none());
            }
        }
    }

    #[test]
    fn bitmaps_need_not_be_aligned() {
        let mut bytes = [0_u8; 24];
        bytes[1..17].copy_from_slice(&[0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80]);
        let address = u64::try_from(bytes.as_ptr().expose_provenance() + 1).expect("64 bits");
        // SAFETY: our own bytes.
        let bitmap = unsafe { UserBitmap::new(address, 70) };
        assert_eq!([bitmap.word(0), bitmap.word(1), bitmap.word(2)], [0xff, 0x8000_0000_0000_0001, 0]);
    }
}
