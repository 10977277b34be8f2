//! What can go wrong.

use std::io;

use memslot::OutOfMemory;
use memslot::dirty::HarvestError;

/// Why the kernel's slots could not follow a change of the table. The table is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The kernel has too few ids for the slots that the change creates, also when slots that could be one are made one.
    #[error(
        "the change creates {needed} KVM slots in address space {address_space}, where {available} ids are free, \
         those of the slots that it deletes included"
    )]
    NoSlots {
        /// The address space. (Where several have too few, the first.)
        address_space: u8,
        /// How many slots the change creates there.
        needed: usize,
        /// How many ids are free there once the slots that the change deletes are gone.
        available: u32,
    },
    /// The table has an address space that the VM does not have (`KVM_CAP_MULTI_ADDRESS_SPACE`).
    #[error("the VM has {spaces} address spaces, so no slot can be in address space {address_space}")]
    NoSuchAddressSpace {
        /// The slot's.
        address_space: u8,
        /// How many the VM has.
        spaces: u8,
    },
    /// KVM neither logs a slot with a guest_memfd nor makes it read-only.
    #[error(
        "slot {slot} has a guest_memfd, and KVM allows such a slot neither a dirty log nor to be read-only"
    )]
    GuestMemfdFlags {
        /// The slot of the table.
        slot: u32,
    },
    /// An ioctl failed, and those before it were undone.
    #[error("{what}: {error}")]
    Ioctl {
        /// What was to be done, to which slot of the kernel's.
        what: String,
        /// The kernel's error.
        error: io::Error,
    },
    /// [`Vcpus::while_paused`](crate::Vcpus::while_paused) returned without having done the work.
    #[error("the vCPUs could not be paused, so nothing was done")]
    NotPaused,
}

/// Why [`KvmSlots`](crate::KvmSlots) could not be attached to a table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The table's slots could not be programmed; those that were are deleted again.
    #[error(transparent)]
    Program(#[from] KvmError),
    /// The table's pages are not the host's, which KVM counts in.
    #[error("the table has pages of {table} bytes, and KVM's are of {kernel} bytes here")]
    PageSize {
        /// A page of the table ([`Limits::page_size`](memslot::Limits)).
        table: u64,
        /// A page of the host.
        kernel: u64,
    },
    /// The table's own.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// Why dirty pages could not be had. Nothing is lost: they are reported the next time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// [`KvmSlots::dirty_log`](crate::KvmSlots::dirty_log) was not called, so there is no log for the bits.
    #[error("there is no dirty log: call KvmSlots::dirty_log first")]
    NoLog,
    /// The log was asked for of a table whose slots these are not.
    #[error("the table is not the one that these slots follow")]
    OtherTable,
    /// No memory for the log.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// Dirty rings were asked for together with manual protection, which is of bitmaps. The kernel takes both, and with
    /// pages initially set it then never arms them: writes go unnoticed.
    #[error("dirty rings and manual dirty log protection exclude each other")]
    RingsAndManualProtect,
    /// Dirty rings were asked for when the kernel had slots already. Where it keeps a bitmap beside them
    /// (`KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`: arm64), it has to be told before the first one.
    #[error("dirty rings with a bitmap have to be enabled before there are slots, and KVM has {slots} now")]
    RingsAfterSlots {
        /// How many slots the kernel has.
        slots: usize,
    },
    /// A vCPU was named, and [`enable_rings`](crate::KvmSlots::enable_rings) was not called.
    #[error("dirty rings are not enabled: call KvmSlots::enable_rings first")]
    NoRings,
    /// The ring of a vCPU with this number is read already.
    #[error("vCPU {vcpu} is known already")]
    VcpuKnown {
        /// The vCPU's number.
        vcpu: u32,
    },
    /// No ring of a vCPU with this number is read.
    #[error("vCPU {vcpu} is not known: it was not added, or removed already")]
    NoSuchVcpu {
        /// The vCPU's number.
        vcpu: u32,
    },
    /// An ioctl failed.
    #[error("{what}: {error}")]
    Ioctl {
        /// What was to be done.
        what: String,
        /// The kernel's error.
        error: io::Error,
    },
    /// The log's own.
    #[error(transparent)]
    Harvest(#[from] HarvestError<io::Error>),
}
