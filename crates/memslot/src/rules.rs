//! KVM's rules: its arguments, the order of its checks, its errnos.
//!
//! [`Rules::set_user_memory_region`] does to a [`SlotTable`] what the ioctl `KVM_SET_USER_MEMORY_REGION` does to
//! a VM, so that a VMM's assumptions hold, a recorded trace replays, and the real kernel can be asked whether
//! we are right. One call is one of these *changes*:
//!
//! | the slot exists | the call | change |
//! |---|---|---|
//! | no | `memory_size` 0 | `EINVAL` |
//! | no | `memory_size` > 0 | [`Create`](Change::Create) |
//! | yes | `memory_size` 0 | [`Delete`](Change::Delete); the other arguments are still checked |
//! | yes | other `guest_phys_addr` | [`Move`](Change::Move), perhaps with `LOG_DIRTY_PAGES` toggled |
//! | yes | `LOG_DIRTY_PAGES` toggled | [`FlagsOnly`](Change::FlagsOnly) |
//! | yes | all the same | [`Nothing`](Change::Nothing) |
//! | yes | other size, host address, `READONLY` or `GUEST_MEMFD` | `EINVAL` |
//!
//! What KVM does not allow (resize, split, merge, read-only toggle, many changes at once) is there as
//! [`Transaction`](crate::Transaction) operations; the meaning of these calls is KVM's.
//!
//! The checks come in the order of `kvm_set_memory_region()`: flags, size, guest address, host address, file
//! offset, id, wrap of the guest address, number of pages, deletion of what is not there, change of what cannot
//! change, no change at all, overlap (`EEXIST`), the file, the highest gfn.

use core::fmt;

use crate::addr::{Gfn, GfnRange, Hva};
use crate::error::{Reason, TransactionError};
use crate::slot::{AddressSpaceId, Backing, Slot, SlotFlags, SlotId, SlotSpec};
use crate::table::SlotTable;

/// `KVM_MEM_LOG_DIRTY_PAGES`.
pub const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;
/// `KVM_MEM_READONLY`.
pub const KVM_MEM_READONLY: u32 = 1 << 1;
/// `KVM_MEM_GUEST_MEMFD`; for the second form of the call only.
pub const KVM_MEM_GUEST_MEMFD: u32 = 1 << 2;

/// The argument of `KVM_SET_USER_MEMORY_REGION`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UserMemoryRegion {
    /// Bits 0-15: the slot id; bits 16-31: the address space.
    pub slot: u32,
    /// `KVM_MEM_*`.
    pub flags: u32,
    /// Where the slot starts, in bytes.
    pub guest_phys_addr: u64,
    /// Its size in bytes; 0 deletes it.
    pub memory_size: u64,
    /// Where its memory starts in the VMM.
    pub userspace_addr: u64,
}

/// The argument of `KVM_SET_USER_MEMORY_REGION2`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UserMemoryRegion2 {
    /// The fields of the first form.
    pub region: UserMemoryRegion,
    /// The guest_memfd file, with `KVM_MEM_GUEST_MEMFD`.
    pub guest_memfd: u32,
    /// Where in the file the slot starts, in bytes.
    pub guest_memfd_offset: u64,
}

/// What the host allows; the default is x86-64 with 4-level paging.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostLimits {
    /// The first address that user space cannot have (`TASK_SIZE_MAX`).
    pub user_end: u64,
    /// The highest gfn that the host's MMU can map. Without second-level paging KVM allows 52-bit guest
    /// physical addresses; with it, the processor's physical address width counts.
    pub highest_gfn: u64,
    /// Whether `KVM_CAP_READONLY_MEM` is there.
    pub readonly_mem: bool,
    /// Whether `KVM_CAP_GUEST_MEMFD` is there.
    pub guest_memfd: bool,
}

impl Default for HostLimits {
    fn default() -> Self {
        Self { user_end: 0x7fff_ffff_f000, highest_gfn: (1 << 40) - 1, readonly_mem: true, guest_memfd: true }
    }
}

/// What a call did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// A slot was created.
    Create,
    /// A slot was deleted.
    Delete,
    /// A slot has another guest address, and perhaps other flags.
    Move,
    /// A slot has other flags.
    FlagsOnly,
    /// All was as asked already.
    Nothing,
}

/// The errnos that the memory ioctls answer with. Values are Linux's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
#[allow(clippy::upper_case_acronyms, missing_docs, reason = "these are their names")]
pub enum Errno {
    ENOENT = 2,
    EINTR = 4,
    EIO = 5,
    ENXIO = 6,
    E2BIG = 7,
    EBADF = 9,
    ENOMEM = 12,
    EFAULT = 14,
    EEXIST = 17,
    EINVAL = 22,
}

impl Errno {
    /// The number, as in `errno`.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self as i32
    }

    /// The name, as in the manual.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ENOENT => "ENOENT",
            Self::EINTR => "EINTR",
            Self::EIO => "EIO",
            Self::ENXIO => "ENXIO",
            Self::E2BIG => "E2BIG",
            Self::EBADF => "EBADF",
            Self::ENOMEM => "ENOMEM",
            Self::EFAULT => "EFAULT",
            Self::EEXIST => "EEXIST",
            Self::EINVAL => "EINVAL",
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A call that was refused: the errno, which is KVM's, and the reason in words, which KVM keeps to itself.
#[derive(Debug)]
pub struct Refusal {
    /// The errno.
    pub errno: Errno,
    /// Why.
    pub why: Why,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.errno, self.why)
    }
}

impl core::error::Error for Refusal {}

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Why {
    /// Flags that the call or the host does not know.
    #[error("flags {flags:#x} are not among those allowed here, {allowed:#x}")]
    Flags {
        /// The flags asked for.
        flags: u32,
        /// Those that would be allowed.
        allowed: u32,
    },
    /// The slot id is not below the limit.
    #[error("slot id {id} is not below the limit of {limit}")]
    SlotId {
        /// Bits 0-15 of `slot`.
        id: u32,
        /// The limit.
        limit: u32,
    },
    /// The address space does not exist.
    #[error("address space {asked} does not exist: there are {spaces}")]
    AddressSpace {
        /// Bits 16-31 of `slot`.
        asked: u32,
        /// How many there are.
        spaces: u8,
    },
    /// An argument is not a multiple of the page size.
    #[error("{field} {value:#x} is not a multiple of the page size")]
    Unaligned {
        /// Which argument.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The host memory does not lie in user space.
    #[error("host addresses {start:#x} + {size:#x} do not lie below the end of user space, {user_end:#x}")]
    NotUserMemory {
        /// `userspace_addr`.
        start: u64,
        /// `memory_size`.
        size: u64,
        /// [`HostLimits::user_end`].
        user_end: u64,
    },
    /// A sum passes 2^64.
    #[error("{field} {value:#x} + {size:#x} passes the end of the 64-bit space")]
    Wraps {
        /// Which argument.
        field: &'static str,
        /// Its value.
        value: u64,
        /// `memory_size`.
        size: u64,
    },
    /// More pages than a slot can have.
    #[error("{pages} pages are more than a slot can have, {limit}")]
    TooManyPages {
        /// The pages asked for.
        pages: u64,
        /// The limit.
        limit: u64,
    },
    /// Deletion of a slot that does not exist.
    #[error("slot {id} does not exist, so it cannot be deleted")]
    NothingToDelete {
        /// The slot id.
        id: SlotId,
    },
    /// KVM cannot change this of a slot that exists.
    #[error("the {what} of a slot cannot change: delete {slot} and create it again")]
    Immutable {
        /// What was to change.
        what: &'static str,
        /// The slot.
        slot: Slot,
    },
    /// Another slot of the address space covers some of the frames.
    #[error("gfns {gfns} overlap {with}")]
    Overlap {
        /// The frames asked for.
        gfns: GfnRange,
        /// The slot in the way.
        with: Slot,
    },
    /// The host's MMU cannot map frames that high.
    #[error("gfns {gfns} reach beyond the highest gfn of this host, {highest:#x}")]
    GfnTooHigh {
        /// The frames asked for.
        gfns: GfnRange,
        /// [`HostLimits::highest_gfn`].
        highest: u64,
    },
    /// The guest_memfd file could not be bound.
    #[error("guest_memfd {file} could not be bound at offset {offset:#x}")]
    GuestMemfd {
        /// The file.
        file: u32,
        /// Where.
        offset: u64,
    },
    /// The table refused for a reason of its own: no memory, or a listener.
    #[error(transparent)]
    Table(TransactionError),
}

/// Who knows the guest_memfd files. A VMM on `/dev/kvm` leaves this to the kernel; a hypervisor answers itself.
pub trait GuestMemfdFiles {
    /// Binds `[offset, offset + size)` of a file to a slot.
    ///
    /// # Errors
    /// `EBADF` where there is no such file, `EINVAL` where the range is not the file's or already bound.
    fn bind(&mut self, file: u32, offset: u64, size: u64) -> Result<(), Errno>;

    /// Takes a binding back.
    fn unbind(&mut self, file: u32, offset: u64, size: u64);
}

/// No guest_memfd file exists: every bind is `EBADF`.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoGuestMemfd;

impl GuestMemfdFiles for NoGuestMemfd {
    fn bind(&mut self, _: u32, _: u64, _: u64) -> Result<(), Errno> {
        Err(Errno::EBADF)
    }

    fn unbind(&mut self, _: u32, _: u64, _: u64) {}
}

/// KVM's rules on a host with these limits. See the [module documentation](self).
///
/// ```
/// use memslot::rules::{Change, Errno, Rules, UserMemoryRegion};
/// use memslot::{Limits, SlotTable};
///
/// let mut table = SlotTable::new(Limits::default())?;
/// let rules = Rules::default();
/// let ram = UserMemoryRegion {
///     slot: 0,
///     flags: 0,
///     guest_phys_addr: 0,
///     memory_size: 1 << 30,
///     userspace_addr: 0x7f00_0000_0000,
/// };
/// assert_eq!(rules.set_user_memory_region(&mut table, &ram)?, Change::Create);
///
/// let overlap = UserMemoryRegion { slot: 1, guest_phys_addr: 0xf_f000, ..ram };
/// let refused = rules.set_user_memory_region(&mut table, &overlap).unwrap_err();
/// assert_eq!(refused.errno, Errno::EEXIST);
/// assert_eq!(refused.to_string(), "EEXIST: gfns [0xff, 0x400ff) overlap slot 0 [0x0, +1 GiB)");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    /// What the host allows.
    pub host: HostLimits,
}

/// A call whose arguments are in order.
struct Request {
    address_space: AddressSpaceId,
    id: SlotId,
    gfns: GfnRange,
    hva: Hva,
    flags: SlotFlags,
    guest_memfd: Option<(u32, u64)>,
}

impl Rules {
    /// The rules on a host with these limits.
    #[must_use]
    pub const fn new(host: HostLimits) -> Self {
        Self { host }
    }

    /// `KVM_SET_USER_MEMORY_REGION`.
    ///
    /// As in KVM, this form can delete a slot that has a guest_memfd file. It has no way to tell anybody that the
    /// file's range is free again: whoever keeps [`GuestMemfdFiles`] deletes such slots with
    /// [`set_user_memory_region2`](Self::set_user_memory_region2).
    ///
    /// # Errors
    /// What KVM would answer, with the reason.
    pub fn set_user_memory_region(
        &self,
        table: &mut SlotTable,
        region: &UserMemoryRegion,
    ) -> Result<Change, Refusal> {
        let allowed = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;
        if region.flags & !allowed != 0 {
            return Err(invalid(Why::Flags { flags: region.flags, allowed }));
        }
        let region = UserMemoryRegion2 { region: *region, ..Default::default() };
        self.set_user_memory_region2(table, &region, &mut NoGuestMemfd)
    }

    /// `KVM_SET_USER_MEMORY_REGION2`.
    ///
    /// # Errors
    /// What KVM would answer, with the reason.
    pub fn set_user_memory_region2(
        &self,
        table: &mut SlotTable,
        region: &UserMemoryRegion2,
        files: &mut dyn GuestMemfdFiles,
    ) -> Result<Change, Refusal> {
        let request = self.check(table, region)?;
        let Request { address_space, id, gfns, .. } = request;
        let old = table.view().slot(address_space, id).copied();
        match old {
            None if gfns.is_empty() => Err(invalid(Why::NothingToDelete { id })),
            None => self.create(table, &request, files),
            Some(old) if gfns.is_empty() => {
                apply(table.delete(address_space, id))?;
                if let Backing::GuestMemfd { file, offset, .. } = old.backing() {
                    files.unbind(file, offset, old.page_size().bytes_of(old.pages()).unwrap_or(0));
                }
                Ok(Change::Delete)
            }
            Some(old) => self.modify(table, &request, &old),
        }
    }

    /// The checks that need no slot.
    fn check(&self, table: &SlotTable, region: &UserMemoryRegion2) -> Result<Request, Refusal> {
        let &UserMemoryRegion2 { region, guest_memfd, guest_memfd_offset } = region;
        let UserMemoryRegion { slot, flags, guest_phys_addr, memory_size, userspace_addr } = region;
        let limits = *table.view().limits();
        let page = limits.page_size;
        let (space, id) = (slot >> 16, slot & 0xffff);

        // KVM checks the id once before it takes the lock, and the address space later; both are EINVAL.
        if id >= limits.slots {
            return Err(invalid(Why::SlotId { id, limit: limits.slots }));
        }
        let with_file = flags & KVM_MEM_GUEST_MEMFD != 0 && self.host.guest_memfd;
        let mut allowed = if with_file { KVM_MEM_GUEST_MEMFD } else { KVM_MEM_LOG_DIRTY_PAGES };
        if self.host.readonly_mem && !with_file {
            allowed |= KVM_MEM_READONLY;
        }
        if flags & !allowed != 0 {
            return Err(invalid(Why::Flags { flags, allowed }));
        }
        for (field, value) in [
            ("memory_size", memory_size),
            ("guest_phys_addr", guest_phys_addr),
            ("userspace_addr", userspace_addr),
        ] {
            if !page.divides(value) {
                return Err(invalid(Why::Unaligned { field, value }));
            }
        }
        let user_end = self.host.user_end;
        if userspace_addr.checked_add(memory_size).is_none_or(|end| end > user_end) {
            return Err(invalid(Why::NotUserMemory { start: userspace_addr, size: memory_size, user_end }));
        }
        if with_file {
            let (field, value, size) = ("guest_memfd_offset", guest_memfd_offset, memory_size);
            if !page.divides(value) {
                return Err(invalid(Why::Unaligned { field, value }));
            }
            if value.checked_add(size).is_none() {
                return Err(invalid(Why::Wraps { field, value, size }));
            }
        }
        let address_space = match u8::try_from(space) {
            Ok(known) if known < limits.address_spaces => AddressSpaceId::new(known),
            _ => return Err(invalid(Why::AddressSpace { asked: space, spaces: limits.address_spaces })),
        };
        if guest_phys_addr.checked_add(memory_size).is_none() {
            let (field, value, size) = ("guest_phys_addr", guest_phys_addr, memory_size);
            return Err(invalid(Why::Wraps { field, value, size }));
        }
        let pages = memory_size / page.bytes();
        if pages > limits.pages_per_slot {
            return Err(invalid(Why::TooManyPages { pages, limit: limits.pages_per_slot }));
        }
        let base = Gfn::new(guest_phys_addr / page.bytes());
        let gfns = GfnRange::with_len(base, pages).unwrap_or_default();
        Ok(Request {
            address_space,
            id: SlotId::new(id),
            gfns,
            hva: Hva::new(userspace_addr),
            flags: SlotFlags::from_bits_truncate(flags),
            guest_memfd: with_file.then_some((guest_memfd, guest_memfd_offset)),
        })
    }

    fn create(
        &self,
        table: &mut SlotTable,
        request: &Request,
        files: &mut dyn GuestMemfdFiles,
    ) -> Result<Change, Refusal> {
        let &Request { address_space, id, gfns, hva, flags, guest_memfd } = request;
        check_free(table, request)?;
        let size = table.view().page_size().bytes_of(gfns.len()).unwrap_or(0);
        let mut backing = Backing::Host { hva };
        if let Some((file, offset)) = guest_memfd {
            let why = Why::GuestMemfd { file, offset };
            files.bind(file, offset, size).map_err(|errno| Refusal { errno, why })?;
            backing = Backing::GuestMemfd { hva, file, offset };
        }
        let spec = SlotSpec { address_space, id, gfns, backing, flags };
        let result = self.check_height(gfns).and_then(|()| apply(table.create(spec)));
        if let (Err(_), Some((file, offset))) = (&result, guest_memfd) {
            files.unbind(file, offset, size);
        }
        result.map(|()| Change::Create)
    }

    fn modify(&self, table: &mut SlotTable, request: &Request, old: &Slot) -> Result<Change, Refusal> {
        let &Request { address_space, id, gfns, hva, flags, guest_memfd } = request;
        let immutable = |what| Err(invalid(Why::Immutable { what, slot: *old }));
        if guest_memfd.is_some() || matches!(old.backing(), Backing::GuestMemfd { .. }) {
            return immutable("guest_memfd");
        }
        if old.hva() != Some(hva) {
            return immutable("userspace_addr");
        }
        if old.pages() != gfns.len() {
            return immutable("memory_size");
        }
        if (old.flags() ^ flags).contains(SlotFlags::READONLY) {
            return immutable("KVM_MEM_READONLY flag");
        }
        if old.base_gfn() != gfns.start() {
            check_free(table, request)?;
            self.check_height(gfns)?;
            apply(table.transaction(|tx| {
                tx.move_to(address_space, id, gfns.start())?;
                tx.set_flags(address_space, id, flags)
            }))?;
            return Ok(Change::Move);
        }
        if old.flags() != flags {
            apply(table.set_flags(address_space, id, flags))?;
            return Ok(Change::FlagsOnly);
        }
        Ok(Change::Nothing)
    }

    fn check_height(&self, gfns: GfnRange) -> Result<(), Refusal> {
        let highest = self.host.highest_gfn;
        if gfns.end().get() > highest.saturating_add(1) {
            return Err(invalid(Why::GfnTooHigh { gfns, highest }));
        }
        Ok(())
    }
}

/// `EEXIST` where another slot of the address space covers one of the frames.
fn check_free(table: &SlotTable, request: &Request) -> Result<(), Refusal> {
    let &Request { address_space, id, gfns, .. } = request;
    match table.view().slots_in(address_space, gfns).find(|piece| piece.slot.id() != id) {
        Some(piece) => Err(Refusal { errno: Errno::EEXIST, why: Why::Overlap { gfns, with: *piece.slot } }),
        None => Ok(()),
    }
}

fn invalid(why: Why) -> Refusal {
    Refusal { errno: Errno::EINVAL, why }
}

fn apply(result: Result<u64, TransactionError>) -> Result<(), Refusal> {
    result.map(|_| ()).map_err(|error| {
        let errno = match error.reason {
            Reason::OutOfMemory => Errno::ENOMEM,
            Reason::Overlap { .. } => Errno::EEXIST,
            Reason::Listener { .. } => Errno::EIO,
            _ => Errno::EINVAL,
        };
        Refusal { errno, why: Why::Table(error) }
    })
}
