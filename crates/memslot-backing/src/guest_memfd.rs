//! KVM's guest_memfd: memory that belongs to a guest, in a file.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use crate::discard::punch_hole;

/// The capabilities of KVM concerned (`KVM_CAP_GUEST_MEMFD`, `KVM_CAP_GUEST_MEMFD_FLAGS`).
const CAP_GUEST_MEMFD: usize = 234;
const CAP_GUEST_MEMFD_FLAGS: usize = 244;

/// What a guest_memfd shall be able to do; the values are KVM's `GUEST_MEMFD_FLAG_*`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct GuestMemfdFlags(u64);

impl GuestMemfdFlags {
    /// Nothing: pages of the guest alone.
    pub const NONE: Self = Self(0);
    /// The host may map it (Linux 6.18).
    pub const MMAP: Self = Self(1);
    /// Its pages are shared with the host from the beginning (Linux 6.18).
    pub const INIT_SHARED: Self = Self(2);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are among them.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// KVM's number.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// Why a guest_memfd was not made, or a part of it not discarded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMemfdError {
    /// The kernel has no guest_memfd for this type of VM.
    #[error(
        "this kernel offers no guest_memfd to this VM: it needs Linux 6.8 and a type of VM that has private memory, or Linux 6.18"
    )]
    NotOffered,
    /// The kernel does not know one of the flags.
    #[error("guest_memfd flags {asked:#x} are not offered to this VM; it has {offered:#x}")]
    FlagsNotOffered {
        /// What was asked for.
        asked: u64,
        /// What there is.
        offered: u64,
    },
    /// A size or the end of a range is no multiple of the page size, or there is nothing in between, or it ends behind
    /// the file.
    #[error(
        "{start:#x}..{end:#x} is no range of whole pages (of {page:#x} bytes) in a guest_memfd of {bytes:#x} bytes"
    )]
    BadRange {
        /// The first byte.
        start: u64,
        /// The byte behind the last.
        end: u64,
        /// The host's page size.
        page: u64,
        /// The file's size.
        bytes: u64,
    },
    /// A system call failed.
    #[error("{call} on a guest_memfd of {bytes:#x} bytes failed: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// The file's size.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A guest_memfd: the private memory of slots with
/// [`Backing::GuestMemfd`](memslot::Backing::GuestMemfd), whose `file` is its [`number`](Self::number).
///
/// The kernel keeps the pages as long as a slot of the VM is bound to them, also when this value is gone; but then its
/// number may soon be that of another file. [`Backings`](crate::Backings) keep it as long as a slot names it.
pub struct GuestMemfd {
    file: OwnedFd,
    bytes: u64,
    flags: GuestMemfdFlags,
}

impl GuestMemfd {
    /// The flags that the kernel offers for guest_memfds of this VM; `None` if it offers none at all.
    #[must_use]
    pub fn offered(vm: BorrowedFd<'_>) -> Option<GuestMemfdFlags> {
        if check_extension(vm, CAP_GUEST_MEMFD) <= 0 {
            return None;
        }
        Some(GuestMemfdFlags(u64::try_from(check_extension(vm, CAP_GUEST_MEMFD_FLAGS)).unwrap_or(0)))
    }

    /// A guest_memfd of a VM, which may be somebody else's. Its memory is not there before it is used.
    ///
    /// # Errors
    /// Any [`GuestMemfdError`].
    pub fn create(vm: BorrowedFd<'_>, bytes: u64, flags: GuestMemfdFlags) -> Result<Self, GuestMemfdError> {
        whole_pages(&(0..bytes), bytes)?;
        let offered = Self::offered(vm).ok_or(GuestMemfdError::NotOffered)?;
        if !offered.contains(flags) {
            return Err(GuestMemfdError::FlagsNotOffered { asked: flags.bits(), offered: offered.bits() });
        }
        let request = CreateGuestMemfd { size: bytes, flags: flags.bits(), reserved: [0; 6] };
        // SAFETY: the structure is the kernel's `kvm_create_guest_memfd`, which it only reads.
        let file = unsafe { ioctl(vm, request) }.map_err(|error| GuestMemfdError::Call {
            call: "KVM_CREATE_GUEST_MEMFD",
            bytes,
            source: error.into(),
        })?;
        Ok(Self { file, bytes, flags })
    }

    /// A guest_memfd that somebody else made, with its size in bytes and its flags.
    #[must_use]
    pub fn from_parts(file: OwnedFd, bytes: u64, flags: GuestMemfdFlags) -> Self {
        Self { file, bytes, flags }
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its flags.
    #[must_use]
    pub const fn flags(&self) -> GuestMemfdFlags {
        self.flags
    }

    /// Its number: the file descriptor, as KVM's slots name it.
    #[must_use]
    pub fn number(&self) -> u32 {
        u32::try_from(self.file.as_raw_fd()).unwrap_or(u32::MAX)
    }

    /// Gives the pages of a range of the file back to the host. The guest loses what was there; KVM maps new pages when
    /// it uses them again, zero unless the processor encrypts memory.
    ///
    /// # Errors
    /// [`GuestMemfdError::BadRange`], [`GuestMemfdError::Call`].
    pub fn discard(&self, range: Range<u64>) -> Result<(), GuestMemfdError> {
        whole_pages(&range, self.bytes)?;
        punch_hole(&self.file, range.start, range.end - range.start).map_err(|error| GuestMemfdError::Call {
            call: "fallocate(PUNCH_HOLE)",
            bytes: self.bytes,
            source: error.into(),
        })
    }
}

impl AsFd for GuestMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Debug for GuestMemfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "GuestMemfd(file {}, {:#x} bytes, flags {:#x})",
            self.number(),
            self.bytes,
            self.flags.bits()
        )
    }
}

fn whole_pages(range: &Range<u64>, bytes: u64) -> Result<(), GuestMemfdError> {
    let (start, end, page) = (range.start, range.end, rustix::param::page_size() as u64);
    if start < end && end <= bytes && start % page == 0 && end % page == 0 {
        Ok(())
    } else {
        Err(GuestMemfdError::BadRange { start, end, page, bytes })
    }
}

/// KVM's answer; 0 where it does not know the capability or the call.
fn check_extension(vm: BorrowedFd<'_>, capability: usize) -> i32 {
    // SAFETY: `KVM_CHECK_EXTENSION` takes a number.
    unsafe { ioctl(vm, CheckExtension(capability)) }.unwrap_or(0)
}

struct CheckExtension(usize);

// SAFETY: `KVM_CHECK_EXTENSION` takes a number instead of a pointer, writes nothing, and answers with its return value.
unsafe impl Ioctl for CheckExtension {
    type Output = i32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xAE, 0x03)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// KVM's `kvm_create_guest_memfd`.
#[repr(C)]
struct CreateGuestMemfd {
    size: u64,
    flags: u64,
    reserved: [u64; 6],
}

// SAFETY: the structure has the kernel's layout, and the answer is a new file descriptor that nobody else owns.
unsafe impl Ioctl for CreateGuestMemfd {
    type Output = OwnedFd;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<Self>(0xAE, 0xD4)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::from_mut(self).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: after success it is a descriptor that the call made.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}
