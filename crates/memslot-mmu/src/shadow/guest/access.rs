//! What an access wants, what entries permit, and what a page fault says.

use core::fmt;

use bitflags::bitflags;
use memslot::Gpa;

bitflags! {
    /// What the guest wants to do with an address. The bits are those of a page fault's error code, and that of
    /// `RFLAGS.AC`.
    ///
    /// No bit: a supervisor's read.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct GuestAccess: u32 {
        /// It writes.
        const WRITE = 1 << 1;
        /// It is a user's (the processor is at privilege level 3, and the access is not an implicit one to a
        /// descriptor table or a task state segment).
        const USER = 1 << 2;
        /// It fetches an instruction.
        const FETCH = 1 << 4;
        /// An explicit supervisor's access while `RFLAGS.AC` is set: SMAP does not apply. Means nothing for users.
        const AC = 1 << 18;
        /// The processor has met a reserved bit in its tables. Shadow tables have such entries where they remember that there is
        /// [no memory](crate::shadow::ShadowConfig::physical_address_bits). For a walk of the guest's tables it means nothing.
        const RESERVED = 1 << 3;
    }
}

impl GuestAccess {
    /// A supervisor's read.
    pub const READ: Self = Self::empty();

    /// The access that raised a page fault with this error code.
    ///
    /// `ac` is `RFLAGS.AC` if the processor was at privilege level 0, 1 or 2. A supervisor's access that level 3 makes
    /// is an implicit one, which SMAP forbids whatever the flag says: pass `false` then.
    ///
    /// ```
    /// use memslot_mmu::shadow::guest::GuestAccess;
    /// assert_eq!(GuestAccess::from_error_code(0x7, false), GuestAccess::WRITE | GuestAccess::USER);
    /// assert_eq!(GuestAccess::from_error_code(0, true), GuestAccess::AC);
    /// ```
    #[inline]
    #[must_use]
    pub const fn from_error_code(error_code: u32, ac: bool) -> Self {
        let bits = Self::WRITE.bits() | Self::USER.bits() | Self::FETCH.bits() | Self::RESERVED.bits();
        Self::from_bits_truncate(error_code & bits | if ac { Self::AC.bits() } else { 0 })
    }
}

bitflags! {
    /// What entries permit: those of a walk together, or one by itself. Reading is always permitted where something is
    /// present.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct Rights: u8 {
        /// Users may write, and supervisors while `CR0.WP` is set. `R/W` of all entries.
        const WRITE = 1;
        /// `U/S` of all entries: a user's page. Users have access to it; SMEP and SMAP keep supervisors away.
        const USER = 2;
        /// No entry has `NX` set, or `EFER.NXE` is not set.
        const EXECUTE = 4;
    }
}

bitflags! {
    /// The error code of a page fault.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct ErrorCode: u32 {
        /// All entries were present: it is about what they permit, or about a reserved bit.
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was a user's.
        const USER = 1 << 2;
        /// A reserved bit was set in an entry that is present.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch, and such faults are told apart (`EFER.NXE` with `CR4.PAE`, or
        /// `CR4.SMEP`).
        const FETCH = 1 << 4;
    }
}

/// A page fault that the guest is to get: `address` belongs into CR2, `error_code` on the stack.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageFault {
    /// The address that was accessed, all bits of it.
    pub address: u64,
    /// Exactly what the processor would have said.
    pub error_code: ErrorCode,
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page fault at {:#x}, error code {:#x}", self.address, self.error_code.bits())
    }
}

/// Why a walk has found no page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NoPage {
    /// The entries do not allow it: the processor raises this fault.
    Fault(PageFault),
    /// The walk came to a table that lies in no memory. A processor would read what nobody drives on its bus; KVM gives the
    /// guest `fault`, as for an entry that is not present.
    NoTable {
        /// The entry that would have been next.
        entry: Gpa,
        /// What the guest can be given.
        fault: PageFault,
    },
}

impl NoPage {
    /// What the guest gets, or can be given.
    #[inline]
    #[must_use]
    pub const fn fault(&self) -> PageFault {
        match *self {
            Self::Fault(fault) | Self::NoTable { fault, .. } => fault,
        }
    }
}
