//! Names and numbers of KVM's ioctls, capabilities and the errnos they answer with.
//!
//! Recorders disagree on how to write a request: by name, by number (`req_47`) or as strace's `_IOC(…)` where
//! its own table ends. All become one name here, so that the same call is counted once.

use std::borrow::Cow;

/// The letter of KVM's ioctls: the second byte of a request number.
pub(super) const KVMIO: u64 = 0xae;

/// Low byte of the request number, name. Those on the system and the VM, and the ones everyone issues on a vCPU.
const NAMES: &[(u8, &str)] = &[
    (0x00, "KVM_GET_API_VERSION"),
    (0x01, "KVM_CREATE_VM"),
    (0x02, "KVM_GET_MSR_INDEX_LIST"),
    (0x03, "KVM_CHECK_EXTENSION"),
    (0x04, "KVM_GET_VCPU_MMAP_SIZE"),
    (0x05, "KVM_GET_SUPPORTED_CPUID"),
    (0x0a, "KVM_GET_MSR_FEATURE_INDEX_LIST"),
    (0x41, "KVM_CREATE_VCPU"),
    (0x42, "KVM_GET_DIRTY_LOG"),
    (0x44, "KVM_SET_NR_MMU_PAGES"),
    (0x46, "KVM_SET_USER_MEMORY_REGION"),
    (0x47, "KVM_SET_TSS_ADDR"),
    (0x48, "KVM_SET_IDENTITY_MAP_ADDR"),
    (0x49, "KVM_SET_USER_MEMORY_REGION2"),
    (0x60, "KVM_CREATE_IRQCHIP"),
    (0x61, "KVM_IRQ_LINE"),
    (0x62, "KVM_GET_IRQCHIP"),
    (0x63, "KVM_SET_IRQCHIP"),
    (0x67, "KVM_REGISTER_COALESCED_MMIO"),
    (0x68, "KVM_UNREGISTER_COALESCED_MMIO"),
    (0x6a, "KVM_SET_GSI_ROUTING"),
    (0x76, "KVM_IRQFD"),
    (0x77, "KVM_CREATE_PIT2"),
    (0x79, "KVM_IOEVENTFD"),
    (0x7b, "KVM_SET_CLOCK"),
    (0x7c, "KVM_GET_CLOCK"),
    (0x80, "KVM_RUN"),
    (0xa3, "KVM_ENABLE_CAP"),
    (0xa5, "KVM_SIGNAL_MSI"),
    (0xc0, "KVM_CLEAR_DIRTY_LOG"),
    (0xc7, "KVM_RESET_DIRTY_RINGS"),
    (0xd2, "KVM_SET_MEMORY_ATTRIBUTES"),
    (0xd4, "KVM_CREATE_GUEST_MEMFD"),
    (0xd5, "KVM_PRE_FAULT_MEMORY"),
    (0xe0, "KVM_CREATE_DEVICE"),
];

/// The name of the KVM request whose low byte is `number`.
pub(super) fn name(number: u8) -> Cow<'static, str> {
    match NAMES.iter().find(|(known, _)| *known == number) {
        Some((_, name)) => Cow::Borrowed(name),
        None => Cow::Owned(format!("KVM request 0x{number:02x}")),
    }
}

/// A name that is in the table is not copied.
pub(super) fn intern(text: &str) -> Cow<'static, str> {
    match NAMES.iter().find(|(_, name)| *name == text) {
        Some((_, name)) => Cow::Borrowed(name),
        None => Cow::Owned(text.to_owned()),
    }
}

/// `KVM_CAP_NR_MEMSLOTS`: slots of one address space.
pub(crate) const CAP_NR_MEMSLOTS: u32 = 10;
/// `KVM_CAP_READONLY_MEM`.
pub(crate) const CAP_READONLY_MEM: u32 = 81;
/// `KVM_CAP_MULTI_ADDRESS_SPACE`.
pub(crate) const CAP_MULTI_ADDRESS_SPACE: u32 = 118;
/// `KVM_CAP_GUEST_MEMFD`.
pub(crate) const CAP_GUEST_MEMFD: u32 = 234;

/// The number of a capability the rules depend on, by its name.
pub(super) fn capability(name: &str) -> Option<u32> {
    match name {
        "KVM_CAP_NR_MEMSLOTS" => Some(CAP_NR_MEMSLOTS),
        "KVM_CAP_READONLY_MEM" => Some(CAP_READONLY_MEM),
        "KVM_CAP_MULTI_ADDRESS_SPACE" => Some(CAP_MULTI_ADDRESS_SPACE),
        "KVM_CAP_GUEST_MEMFD" => Some(CAP_GUEST_MEMFD),
        number => super::number(number).and_then(|number| u32::try_from(number).ok()),
    }
}

/// An errno's name on Linux (the numbers that x86, arm64 and riscv share).
pub(super) fn errno(number: u64) -> Cow<'static, str> {
    Cow::Borrowed(match number {
        1 => "EPERM",
        2 => "ENOENT",
        4 => "EINTR",
        5 => "EIO",
        6 => "ENXIO",
        7 => "E2BIG",
        9 => "EBADF",
        11 => "EAGAIN",
        12 => "ENOMEM",
        13 => "EACCES",
        14 => "EFAULT",
        16 => "EBUSY",
        17 => "EEXIST",
        19 => "ENODEV",
        22 => "EINVAL",
        25 => "ENOTTY",
        28 => "ENOSPC",
        34 => "ERANGE",
        38 => "ENOSYS",
        75 => "EOVERFLOW",
        95 => "EOPNOTSUPP",
        other => return Cow::Owned(format!("errno {other}")),
    })
}
