//! KVM's dirty-log calls: their arguments, the order of their checks, their errnos.
//!
//! [`KvmDirtyLog`] is to the dirty log what [`rules`](crate::rules) is to the slots. One [`Consumer`] stands behind
//! it, since a VM of KVM has one dirty log:
//!
//! | call | does |
//! |---|---|
//! | `KVM_GET_DIRTY_LOG` | copies a slot's bits out and takes them; with manual protection it only copies |
//! | `KVM_CLEAR_DIRTY_LOG` | takes the bits of a mask, with or without manual protection |
//! | `KVM_RESET_DIRTY_RINGS` | re-arms and frees what was collected from the rings |
//! | `KVM_ENABLE_CAP` | manual protection, pages initially set, the dirty ring |
//!
//! The checks come in this order. GET: a ring in use (`ENXIO`), address space and id (`EINVAL`), a slot that is
//! logged (`ENOENT`), the caller's memory (`EFAULT`). CLEAR: the same, with the first page's alignment (`EINVAL`)
//! before the slot and the bounds (`EINVAL`) behind it.
//!
//! As in KVM, a GET without manual protection whose copy fails has lost the bits. [`Consumer::harvest`] loses
//! nothing; this front end is for those who need KVM's own answers.

use core::ops::DerefMut;

use crate::addr::{GfnRange, PageSize};
use crate::rules::Errno;
use crate::slot::{AddressSpaceId, Slot, SlotFlags, SlotId};

use super::consumer::{Consumer, HarvestError};
use super::rearm::Rearm;
use super::ring::{DirtyRing, Entry, RingError, RingSize, Rings};

/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
pub const KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
/// `KVM_CAP_DIRTY_LOG_RING`.
pub const KVM_CAP_DIRTY_LOG_RING: u32 = 192;
/// `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.
pub const KVM_CAP_DIRTY_LOG_RING_ACQ_REL: u32 = 223;
/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`.
pub const KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: u64 = 1 << 0;
/// `KVM_DIRTY_LOG_INITIALLY_SET`; only together with `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`.
pub const KVM_DIRTY_LOG_INITIALLY_SET: u64 = 1 << 1;

/// The argument of `KVM_CLEAR_DIRTY_LOG`, but for the bitmap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ClearDirtyLog {
    /// Bits 0-15: the slot id; bits 16-31: the address space.
    pub slot: u32,
    /// How many pages the bitmap is of: a multiple of 64, or up to the slot's end.
    pub num_pages: u32,
    /// The slot's page that bit 0 stands for: a multiple of 64.
    pub first_page: u64,
}

/// A VM's dirty log, as its ioctls show it. See the [module documentation](self).
///
/// ```
/// use memslot::dirty::{DirtyLog, SoftwareOnly, kvm::KvmDirtyLog};
/// use memslot::rules::Errno;
/// use memslot::*;
///
/// let mut table = SlotTable::new(Limits::default())?;
/// let log = DirtyLog::attach(&mut table)?;
/// let mut kvm = KvmDirtyLog::new(log.consumer()?);
/// table.create(SlotSpec {
///     address_space: AddressSpaceId::NORMAL,
///     id: SlotId::new(3),
///     gfns: GfnRange::with_len(Gfn::new(0x100), 70).unwrap(),
///     backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000) },
///     flags: SlotFlags::LOG_DIRTY_PAGES,
/// })?;
/// log.mark(AddressSpaceId::NORMAL, Gfn::new(0x100 + 65));
///
/// let mut bitmap = [0; 2];
/// kvm.get_dirty_log(3, Some(&mut bitmap), &mut SoftwareOnly).unwrap();
/// assert_eq!(bitmap, [0, 2]);
/// assert_eq!(kvm.get_dirty_log(4, Some(&mut bitmap), &mut SoftwareOnly), Err(Errno::ENOENT));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KvmDirtyLog {
    consumer: Consumer,
    manual_protect: bool,
    ring: Option<RingSize>,
    ring_reserve: u32,
    vcpus: bool,
    page: PageSize,
}

impl KvmDirtyLog {
    /// The calls on what this consumer sees.
    #[must_use]
    pub fn new(consumer: Consumer) -> Self {
        let page = consumer.view().page_size();
        Self { consumer, manual_protect: false, ring: None, ring_reserve: 0, vcpus: false, page }
    }

    /// The consumer.
    #[must_use]
    pub fn consumer(&self) -> &Consumer {
        &self.consumer
    }

    /// Whether a GET leaves the bits to `KVM_CLEAR_DIRTY_LOG`.
    #[must_use]
    pub fn manual_protect(&self) -> bool {
        self.manual_protect
    }

    /// The size of a vCPU's dirty ring, where rings are used in place of the bitmaps.
    #[must_use]
    pub fn ring(&self) -> Option<RingSize> {
        self.ring
    }

    /// How many entries of a ring the hardware needs for itself: [`PML_ENTRIES`](super::ring::PML_ENTRIES) or, as at
    /// first, none.
    pub fn set_ring_reserve(&mut self, entries: u32) {
        self.ring_reserve = entries;
    }

    /// `KVM_RESET_DIRTY_RINGS`: resets the rings of all vCPUs. Returns how many entries were reset.
    ///
    /// # Errors
    /// `EINVAL` without a ring, `EINTR` where `stop` said so before the first entry, `EIO` where pages could not be
    /// re-armed.
    pub fn reset_dirty_rings<G, M, R>(
        &self,
        rings: &mut [G],
        rearm: &mut R,
        stop: impl FnMut() -> bool,
    ) -> Result<usize, Errno>
    where
        G: DerefMut<Target = DirtyRing<M>>,
        M: AsRef<[Entry]>,
        R: Rearm,
    {
        if self.ring.is_none() {
            return Err(Errno::EINVAL);
        }
        let view = self.consumer.view();
        let Some(mut rings) = Rings::new(rings) else { return Ok(0) };
        match rings.reset(&view, rearm, stop) {
            Ok(reset) if reset.stopped && reset.entries == 0 => Err(Errno::EINTR),
            Ok(reset) => Ok(reset.entries),
            Err(_) => Err(Errno::EIO),
        }
    }

    /// A vCPU was created: from now on it is too late for a dirty ring.
    pub fn vcpu_created(&mut self) {
        self.vcpus = true;
    }

    /// `KVM_ENABLE_CAP` of the capabilities that are the dirty log's.
    ///
    /// With a ring there is no bitmap that pages could be set in initially: `INITIALLY_SET` has no effect then, so
    /// that no page goes unnoticed because it counts as dirty already.
    ///
    /// # Errors
    /// `EINVAL`, or `E2BIG` for a ring of more than 65536 entries.
    pub fn enable_cap(&mut self, cap: u32, flags: u32, arg: u64) -> Result<(), Errno> {
        match cap {
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => {
                let enable = arg & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
                let initially_set = arg & KVM_DIRTY_LOG_INITIALLY_SET != 0;
                let known = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
                if flags != 0 || arg & !known != 0 || (initially_set && !enable) {
                    return Err(Errno::EINVAL);
                }
                self.manual_protect = enable;
                self.consumer.log().set_initially_set(initially_set && self.ring.is_none());
                Ok(())
            }
            KVM_CAP_DIRTY_LOG_RING | KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
                if flags != 0 {
                    return Err(Errno::EINVAL);
                }
                let size =
                    RingSize::from_bytes(arg, self.page, self.ring_reserve).map_err(|error| match error {
                        RingError::TooLarge { .. } => Errno::E2BIG,
                        RingError::OutOfMemory(_) => Errno::ENOMEM,
                        _ => Errno::EINVAL,
                    })?;
                if self.ring.is_some() || self.vcpus {
                    return Err(Errno::EINVAL);
                }
                self.ring = Some(size);
                self.consumer.log().set_initially_set(false);
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// `KVM_GET_DIRTY_LOG`: writes the slot's bits to `bitmap`, a word for every 64 pages, little-endian, 0 behind the
    /// slot's end; further words are left as they are. `None` stands for memory that cannot be written, and so
    /// does a bitmap that is too short.
    ///
    /// # Errors
    /// `ENXIO`, `EINVAL`, `ENOENT`, `EFAULT` (see the [module documentation](self)), `ENOMEM`, and `EIO` where pages
    /// could not be re-armed. The last two take nothing.
    pub fn get_dirty_log<R: Rearm>(
        &mut self,
        slot: u32,
        bitmap: Option<&mut [u64]>,
        rearm: &mut R,
    ) -> Result<(), Errno> {
        let (space, id) = self.check_slot(slot)?;
        let slot = self.logged_slot(space, id)?;
        let words = usize::try_from(slot.pages().div_ceil(64)).map_err(|_| Errno::ENOMEM)?;
        let bitmap = bitmap.and_then(|bitmap| bitmap.get_mut(..words)).ok_or(Errno::EFAULT);
        if self.manual_protect {
            self.consumer.peek(space, slot.gfns(), bitmap?).map_err(|_| Errno::EFAULT)?;
            return Ok(());
        }
        let harvest = self.consumer.harvest_range(space, slot.gfns(), rearm).map_err(errno)?;
        if harvest.view().slot(space, id) != Some(&slot) {
            // Another thread has changed the slot since it was looked up: these bits may be another's.
            harvest.merge_back();
            return self.get_dirty_log(u32::from(space.get()) << 16 | id.get(), bitmap.ok(), rearm);
        }
        let copied = bitmap.and_then(|bitmap| {
            harvest.words(space, slot.gfns(), bitmap).map(|_| ()).map_err(|_| Errno::EFAULT)
        });
        harvest.commit();
        copied
    }

    /// `KVM_CLEAR_DIRTY_LOG`: takes the bits that are set in `bitmap`. The caller sees to it that the slot does not move
    /// meanwhile, as KVM does with its lock. Bits of clean pages, and bits behind the slot's
    /// end, do no harm. `None` stands for memory that cannot be read, and so does a bitmap that is too short; for 0
    /// pages it is not looked at.
    ///
    /// # Errors
    /// As [`get_dirty_log`](Self::get_dirty_log).
    pub fn clear_dirty_log<R: Rearm>(
        &mut self,
        clear: &ClearDirtyLog,
        bitmap: Option<&[u64]>,
        rearm: &mut R,
    ) -> Result<(), Errno> {
        let &ClearDirtyLog { slot, num_pages, first_page } = clear;
        let num_pages = u64::from(num_pages);
        let (space, id) = self.check_slot(slot)?;
        if first_page % 64 != 0 {
            return Err(Errno::EINVAL);
        }
        let slot = self.logged_slot(space, id)?;
        let left = slot.pages().checked_sub(first_page).ok_or(Errno::EINVAL)?;
        if num_pages > left || (num_pages < left && num_pages % 64 != 0) {
            return Err(Errno::EINVAL);
        }
        let first = slot.base_gfn().checked_add(first_page).ok_or(Errno::EINVAL)?;
        let gfns = GfnRange::with_len(first, num_pages).ok_or(Errno::EINVAL)?;
        if gfns.is_empty() {
            return Ok(());
        }
        let words = usize::try_from(num_pages.div_ceil(64)).map_err(|_| Errno::EFAULT)?;
        let bitmap = bitmap.and_then(|bitmap| bitmap.get(..words)).ok_or(Errno::EFAULT)?;
        self.consumer.clear(space, gfns, bitmap, rearm).map(|_| ()).map_err(errno)
    }

    fn check_slot(&self, slot: u32) -> Result<(AddressSpaceId, SlotId), Errno> {
        if self.ring.is_some() {
            return Err(Errno::ENXIO);
        }
        let view = self.consumer.view();
        let limits = view.limits();
        match u8::try_from(slot >> 16) {
            Ok(space) if space < limits.address_spaces && slot & 0xffff < limits.slots => {
                Ok((AddressSpaceId::new(space), SlotId::new(slot & 0xffff)))
            }
            _ => Err(Errno::EINVAL),
        }
    }

    fn logged_slot(&self, space: AddressSpaceId, id: SlotId) -> Result<Slot, Errno> {
        let slot = self.consumer.view().slot(space, id).copied();
        slot.filter(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)).ok_or(Errno::ENOENT)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what `map_err` passes")]
fn errno<E>(error: HarvestError<E>) -> Errno {
    match error {
        HarvestError::OutOfMemory => Errno::ENOMEM,
        HarvestError::Rearm(_) => Errno::EIO,
        HarvestError::Bitmap(_) => Errno::EFAULT,
    }
}
