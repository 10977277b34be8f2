//! The kernel's dirty rings: one for each vCPU, in memory that it shares with us.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET};
use memslot::AddressSpaceId;
use memslot::dirty::DirtyLog;
use memslot::dirty::ring::{ENTRY_BYTES, Entry, RingReader};

use crate::kernel::Kernel;
use crate::programmed::Programmed;

/// So often the kernel is asked to reset what was read, before that counts as an error. Once is enough where no signal
/// comes.
const RESETS: u32 = 1000;

/// The rings that the kernel fills, if it does.
#[derive(Default)]
pub(crate) struct Rings {
    /// Entries of a ring; 0 where there are none.
    entries: u32,
    readers: Vec<RingReader<RingMemory>>,
}

impl Rings {
    pub(crate) const fn is_enabled(&self) -> bool {
        self.entries > 0
    }

    /// Has the kernel keep rings of so many entries.
    pub(crate) fn enable<K: Kernel>(&mut self, kernel: &K, entries: u32) -> io::Result<()> {
        // On x86 both are the same; elsewhere only the second is there.
        let caps = [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL];
        let cap = caps.into_iter().find(|&cap| kernel.check_extension(cap) > 0);
        kernel.enable_cap(cap.ok_or(io::ErrorKind::Unsupported)?, u64::from(entries) * ENTRY_BYTES)?;
        self.entries = entries;
        Ok(())
    }

    /// Maps a vCPU's ring.
    pub(crate) fn add(&mut self, vcpu: &impl AsRawFd) -> io::Result<()> {
        let memory = RingMemory::of(vcpu, self.entries)?;
        self.readers.push(RingReader::new(memory).map_err(io::Error::other)?);
        Ok(())
    }

    /// Reads all rings into the log and has the kernel reset them. Returns how many pages were named.
    pub(crate) fn collect<K: Kernel>(
        &mut self,
        kernel: &K,
        log: &DirtyLog,
        programmed: &Programmed,
    ) -> io::Result<u64> {
        let mut pages = 0;
        for reader in &mut self.readers {
            for page in reader.collect() {
                pages += 1;
                // What is in a ring is not to be trusted: it is memory that the VMM can write.
                let slot = match (u8::try_from(page.address_space), u16::try_from(page.slot.get())) {
                    (Ok(space), Ok(id)) => programmed.with_id(AddressSpaceId::new(space), id),
                    _ => None,
                };
                let slot = slot.filter(|slot| page.offset < slot.gfns.len());
                if let Some((slot, gfn)) =
                    slot.and_then(|slot| Some((slot, slot.gfns.start().checked_add(page.offset)?)))
                {
                    log.mark(slot.address_space, gfn);
                }
            }
        }
        // A page that is read before its entry is reset may be written again unnoticed. A signal makes the kernel stop
        // early, and that is no error to it.
        for _ in 0..RESETS {
            if self.readers.iter().all(RingReader::is_reset) {
                return Ok(pages);
            }
            kernel.reset_dirty_rings()?;
        }
        Err(io::ErrorKind::Interrupted.into())
    }
}

/// A vCPU's ring, mapped.
struct RingMemory {
    entries: NonNull<Entry>,
    len: usize,
}

// SAFETY: the entries are atomics in memory that stays mapped as long as this lives.
unsafe impl Send for RingMemory {}

impl RingMemory {
    fn of(vcpu: &impl AsRawFd, entries: u32) -> io::Result<Self> {
        let len = entries as usize;
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "dirty rings are not enabled"));
        }
        // SAFETY: the call asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let offset = page * libc::c_long::from(u8::try_from(KVM_DIRTY_LOG_PAGE_OFFSET).unwrap_or(u8::MAX));
        let bytes = len * size_of::<Entry>();
        // SAFETY: a new mapping, wherever the kernel likes.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, vcpu.as_raw_fd(), offset) };
        match NonNull::new(start.cast()) {
            Some(entries) if start != libc::MAP_FAILED => Ok(Self { entries, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsRef<[Entry]> for RingMemory {
    fn as_ref(&self) -> &[Entry] {
        // SAFETY: the mapping has this many entries, which are atomics of any value; it lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.len) }
    }
}

impl Drop for RingMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody looks at it any more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.len * size_of::<Entry>()) };
    }
}
