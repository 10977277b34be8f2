//! The model's dirty rings: the kernel's side of them, in memory that the crate maps like the kernel's own.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memslot::dirty::ring::{DIRTY, Entry, RESERVED_ENTRIES, RESET};

/// All rings of a VM, as the kernel has them.
#[derive(Default)]
pub(crate) struct Rings {
    /// Of each ring; 0 where there are none.
    pub(crate) entries: u32,
    pub(crate) offers_bitmap: bool,
    pub(crate) with_bitmap: bool,
    pub(crate) vcpus: Vec<Ring>,
    /// Pages of slots (by id) that stand in a ring and are not reset: another write of them is noticed by nobody.
    pub(crate) writable: BTreeSet<(u32, u64)>,
    /// A signal comes after so many resets.
    pub(crate) resets_until_signal: Option<u32>,
    /// How often the kernel was asked to reset.
    pub(crate) reset_calls: u32,
}

/// A vCPU's ring, as the kernel has it.
pub(crate) struct Ring {
    pub(crate) pages: Arc<RingPages>,
    pub(crate) written: u32,
    pub(crate) reset: u32,
}

impl Rings {
    /// Whether the vCPU could write: not if its ring is full.
    pub(crate) fn push(&mut self, vcpu: usize, slot: u32, page: u64) -> bool {
        let count = self.vcpus.len();
        let ring = &mut self.vcpus[vcpu % count];
        if ring.written - ring.reset >= self.entries - RESERVED_ENTRIES {
            return false;
        }
        if self.writable.insert((slot, page)) {
            let entry = &ring.pages.entries()[(ring.written % self.entries) as usize];
            assert_eq!(entry.flags.load(Ordering::Acquire), 0, "an entry in use is written");
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(page, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            ring.written += 1;
        }
        true
    }

    pub(crate) fn reset(&mut self) -> u32 {
        self.reset_calls += 1;
        let (mut done, most) = (0, self.resets_until_signal.unwrap_or(u32::MAX));
        for ring in &mut self.vcpus {
            loop {
                let entry = &ring.pages.entries()[(ring.reset % self.entries) as usize];
                if entry.flags.load(Ordering::Acquire) & RESET == 0 || done == most {
                    break;
                }
                self.writable
                    .remove(&(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed)));
                entry.flags.store(0, Ordering::Release);
                ring.reset += 1;
                done += 1;
            }
        }
        done
    }
}

/// A vCPU's file descriptor.
pub(crate) struct Vcpu(pub(crate) Arc<RingPages>);

impl AsRawFd for Vcpu {
    fn as_raw_fd(&self) -> RawFd {
        self.0.file.as_raw_fd()
    }
}

/// A file with a ring where a vCPU's descriptor has it: at page 64.
pub(crate) struct RingPages {
    file: OwnedFd,
    start: *mut Entry,
    len: usize,
}

// SAFETY: the entries are atomics, mapped as long as this lives.
unsafe impl Send for RingPages {}
// SAFETY: as above.
unsafe impl Sync for RingPages {}

const OFFSET: i64 = 64 * 4096;

impl RingPages {
    pub(crate) fn new(entries: u32) -> Self {
        let len = entries as usize;
        let bytes = len * size_of::<Entry>();
        // SAFETY: a new file, its descriptor and a mapping of it, all ours.
        unsafe {
            let fd = libc::memfd_create(c"ring".as_ptr(), 0);
            assert!(fd >= 0 && libc::ftruncate(fd, OFFSET + i64::try_from(bytes).unwrap()) == 0);
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, OFFSET);
            assert_ne!(start, libc::MAP_FAILED);
            Self { file: OwnedFd::from_raw_fd(fd), start: start.cast(), len }
        }
    }

    fn entries(&self) -> &[Entry] {
        // SAFETY: the mapping has this many entries, which are atomics, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl Drop for RingPages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.start.cast(), self.len * size_of::<Entry>()) };
    }
}
