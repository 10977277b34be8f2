//! The kernel's dirty rings: one for each vCPU, in memory that it shares with us.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_DIRTY_LOG_PAGE_OFFSET,
};
use memslot::dirty::ring::{ENTRY_BYTES, Entry, RingReader};
use memslot::{AddressSpaceId, GfnRange};

use crate::error::DirtyError;
use crate::kernel::Kernel;
use crate::marks::Marks;
use crate::programmed::Programmed;

/// So often the kernel is asked to reset what was read, before that counts as an error. Once is enough where no signal
/// comes.
const RESETS: u32 = 1000;

/// The rings that the kernel fills, if it does.
#[derive(Default)]
pub(crate) struct Rings {
    /// Entries of a ring; 0 where there are none.
    entries: u32,
    /// Writes that are no vCPU's are in bitmaps.
    with_bitmap: bool,
    /// By the vCPU's number.
    readers: Vec<(u32, RingReader<RingMemory>)>,
}

impl Rings {
    pub(crate) const fn is_enabled(&self) -> bool {
        self.entries > 0
    }

    pub(crate) const fn with_bitmap(&self) -> bool {
        self.with_bitmap
    }

    /// Has the kernel keep rings of so many entries.
    pub(crate) fn enable<K: Kernel>(
        &mut self,
        kernel: &K,
        entries: u32,
        programmed: &Programmed,
    ) -> Result<(), DirtyError> {
        let refused = |error| DirtyError::Ioctl { what: format!("dirty rings of {entries} entries"), error };
        // On x86 both are the same; elsewhere only the second is there.
        let caps = [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL];
        let cap = caps.into_iter().find(|&cap| kernel.check_extension(cap) > 0);
        let cap = cap.ok_or_else(|| refused(io::ErrorKind::Unsupported.into()))?;
        // Where the kernel writes guest memory for no vCPU (the interrupt tables of arm64), it must have somewhere to put
        // that; it wants to know before there is any slot, and rings that are on cannot be turned off again.
        let with_bitmap = kernel.check_extension(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) > 0;
        if with_bitmap && programmed.len() > 0 {
            return Err(DirtyError::RingsAfterSlots { slots: programmed.len() });
        }
        kernel.enable_cap(cap, u64::from(entries) * ENTRY_BYTES).map_err(refused)?;
        self.entries = entries;
        if with_bitmap {
            kernel
                .enable_cap(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0)
                .map_err(|error| DirtyError::Ioctl { what: "dirty rings with a bitmap".to_owned(), error })?;
        }
        self.with_bitmap = with_bitmap;
        Ok(())
    }

    /// Maps a vCPU's ring.
    pub(crate) fn add(&mut self, number: u32, vcpu: &impl AsRawFd) -> Result<(), DirtyError> {
        if !self.is_enabled() {
            return Err(DirtyError::NoRings);
        }
        if self.knows(number) {
            return Err(DirtyError::VcpuKnown { vcpu: number });
        }
        let reader = RingMemory::of(vcpu, self.entries)
            .and_then(|memory| RingReader::new(memory).map_err(io::Error::other));
        let reader = reader.map_err(|error| DirtyError::Ioctl {
            what: format!("map the dirty ring of vCPU {number}"),
            error,
        })?;
        self.readers.push((number, reader));
        Ok(())
    }

    pub(crate) fn knows(&self, number: u32) -> bool {
        self.readers.iter().any(|&(known, _)| known == number)
    }

    /// Unmaps a vCPU's ring.
    pub(crate) fn remove(&mut self, number: u32) {
        self.readers.retain(|&(known, _)| known != number);
    }

    /// Reads all rings into the log and has the kernel reset them. Returns how many pages were named.
    pub(crate) fn collect<K: Kernel>(
        &mut self,
        kernel: &K,
        marks: &Marks<'_>,
        programmed: &Programmed,
    ) -> io::Result<u64> {
        let mut pages = 0;
        for (_, reader) in &mut self.readers {
            for page in reader.collect() {
                pages += 1;
                // What is in a ring is not to be trusted: it is memory that the VMM can write.
                let slot = match (u8::try_from(page.address_space), u16::try_from(page.slot.get())) {
                    (Ok(space), Ok(id)) => programmed.with_id(AddressSpaceId::new(space), id),
                    _ => None,
                };
                let slot = slot.filter(|slot| page.offset < slot.gfns.len());
                let gfn = slot.and_then(|slot| slot.gfns.start().checked_add(page.offset));
                let gfns = gfn.and_then(|gfn| GfnRange::with_len(gfn, 1));
                if let Some((slot, gfns)) = slot.zip(gfns) {
                    marks.add(slot, gfns);
                }
            }
        }
        // A page that is read before its entry is reset may be written again unnoticed. A signal makes the kernel stop
        // early, and that is no error to it.
        for _ in 0..RESETS {
            if self.readers.iter().all(|(_, reader)| reader.is_reset()) {
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
