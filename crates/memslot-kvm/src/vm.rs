//! A VM's file descriptor, and the ioctls on it.
//!
//! They are our own thin calls rather than those of `kvm-ioctls`: the descriptor may belong to anybody, a dirty
//! bitmap goes into a buffer that is used again, and `KVM_CLEAR_DIRTY_LOG` and `KVM_RESET_DIRTY_RINGS` are not
//! there.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVMIO, kvm_clear_dirty_log, kvm_dirty_log, kvm_enable_cap,
    kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use memslot::rules::UserMemoryRegion2;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::kernel::Kernel;

ioctl_io_nr!(KVM_CHECK_EXTENSION, KVMIO, 0x03);
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iow_nr!(KVM_SET_USER_MEMORY_REGION, KVMIO, 0x46, kvm_userspace_memory_region);
ioctl_iow_nr!(KVM_SET_USER_MEMORY_REGION2, KVMIO, 0x49, kvm_userspace_memory_region2);
ioctl_iow_nr!(KVM_ENABLE_CAP, KVMIO, 0xa3, kvm_enable_cap);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// A VM of the kernel's, through a file descriptor of our own: the VM lives until this is gone, too.
#[derive(Debug)]
pub struct Vm(OwnedFd);

impl Vm {
    /// The VM that somebody else owns: `kvm_ioctls::VmFd`, a descriptor of a C library, …
    ///
    /// # Errors
    /// Of duplicating the descriptor.
    pub fn of(vm: &impl AsRawFd) -> io::Result<Self> {
        // A number is as good as `AsRawFd` goes: whether it is a descriptor, the kernel tells.
        // SAFETY: the call touches no memory.
        let copy = unsafe { libc::fcntl(vm.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
        check(copy)?;
        // SAFETY: a new descriptor, which nobody else knows of.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(copy) }))
    }
}

impl From<OwnedFd> for Vm {
    fn from(vm: OwnedFd) -> Self {
        Self(vm)
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Kernel for Vm {
    fn check_extension(&self, cap: u32) -> u32 {
        // SAFETY: the call takes a number and touches no memory.
        let found = unsafe { ioctl_with_val(&self.0, KVM_CHECK_EXTENSION(), cap.into()) };
        u32::try_from(found).unwrap_or(0)
    }

    fn enable_cap(&self, cap: u32, argument: u64) -> io::Result<()> {
        let enable = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
        // SAFETY: the kernel reads a `kvm_enable_cap`.
        check(unsafe { ioctl_with_ref(&self.0, KVM_ENABLE_CAP(), &enable) })
    }

    unsafe fn set_user_memory_region(&self, region: &UserMemoryRegion2) -> io::Result<()> {
        let UserMemoryRegion2 { region, guest_memfd, guest_memfd_offset } = *region;
        if region.flags & KVM_MEM_GUEST_MEMFD != 0 {
            let argument = kvm_userspace_memory_region2 {
                slot: region.slot,
                flags: region.flags,
                guest_phys_addr: region.guest_phys_addr,
                memory_size: region.memory_size,
                userspace_addr: region.userspace_addr,
                guest_memfd_offset,
                guest_memfd,
                ..Default::default()
            };
            // SAFETY: the kernel reads a `kvm_userspace_memory_region2`; that the guest gets at the memory is the
            // caller's wish.
            return check(unsafe { ioctl_with_ref(&self.0, KVM_SET_USER_MEMORY_REGION2(), &argument) });
        }
        let argument = kvm_userspace_memory_region {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
        };
        // SAFETY: as above, for a `kvm_userspace_memory_region`.
        check(unsafe { ioctl_with_ref(&self.0, KVM_SET_USER_MEMORY_REGION(), &argument) })
    }

    unsafe fn get_dirty_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
        let mut argument = kvm_dirty_log { slot, ..Default::default() };
        argument.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
        // SAFETY: the kernel reads a `kvm_dirty_log` and writes a bit for each page of the slot, in whole words;
        // the caller vouches that there is room.
        check(unsafe { ioctl_with_ref(&self.0, KVM_GET_DIRTY_LOG(), &argument) })
    }

    fn clear_dirty_log(&self, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()> {
        if (words.len() as u64) < u64::from(pages).div_ceil(64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut argument = kvm_clear_dirty_log { slot, num_pages: pages, first_page, ..Default::default() };
        argument.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
        // SAFETY: the kernel reads a `kvm_clear_dirty_log` and a bit for each of `pages` pages behind its pointer, where
        // there are as many.
        check(unsafe { ioctl_with_mut_ref(&self.0, KVM_CLEAR_DIRTY_LOG(), &mut argument) })
    }

    fn reset_dirty_rings(&self) -> io::Result<u32> {
        // SAFETY: the call takes no argument.
        let reset = unsafe { ioctl(&self.0, KVM_RESET_DIRTY_RINGS()) };
        u32::try_from(reset).map_err(|_| io::Error::last_os_error())
    }
}
