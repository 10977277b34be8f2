//! A call and its outcome in words: what was asked, what it would do, why an answer cannot be judged.

use crate::engine::{Capabilities, Change};
use crate::history::{GUEST_MEMFD, MapSlot, READONLY, flag_names, range};
use crate::trace::{Answer, Region};
use crate::units;

/// Slots that every kernel has; the oldest had no more.
const OLD_SLOT_LIMIT: u32 = 32;

/// The call as it is shown: the fields by KVM's names, addresses in hexadecimal.
pub(crate) fn describe(name: &str, region: &Region) -> String {
    let slot = match region.address_space() {
        0 => region.slot.to_string(),
        _ => format!("{:#x}", region.slot),
    };
    let flags = match region.flags {
        0 => "0".to_owned(),
        flags => flag_names(flags),
    };
    let size = match region.size {
        0 => "0 (delete)".to_owned(),
        size => format!("{size:#x} ({})", units::size(size)),
    };
    let memfd = region.second.map_or_else(String::new, |memfd| {
        format!(", guest_memfd={}, guest_memfd_offset={:#x}", memfd.file, memfd.offset)
    });
    format!(
        "{name} {{slot={slot}, flags={flags}, gpa={:#x}, size={size}, hva={:#x}{memfd}}}",
        region.gpa, region.hva
    )
}

/// What a change does, as in "it would …".
pub(crate) fn effect(change: Change, region: &Region, before: Option<&MapSlot>) -> String {
    let after = range(region.gpa, region.size);
    match (change, before) {
        (Change::Create, _) => format!("create slot {} {after}", region.id()),
        (Change::Delete, Some(slot)) => format!("delete {}", slot.describe()),
        (Change::Move, Some(slot)) => format!("move {} to {:#x}", slot.describe(), region.gpa),
        (Change::FlagsOnly, Some(slot)) => {
            format!(
                "change the flags of {} from {} to {}",
                slot.describe(),
                flag_names(slot.flags),
                flag_names(region.flags)
            )
        }
        _ => "change nothing".to_owned(),
    }
}

/// Why a refusal may be the kernel's lack of a feature: the region uses it, and the VMM never asked whether it is
/// there.
pub(crate) fn unasked(region: &Region, known: &Capabilities) -> Option<&'static str> {
    if region.address_space() > 0 && known.address_spaces.is_none() {
        return Some(
            "the trace does not say how many address spaces this kernel has (KVM_CAP_MULTI_ADDRESS_SPACE)",
        );
    }
    if region.flags & READONLY != 0 && known.readonly_mem.is_none() {
        return Some("the trace does not say whether this kernel has read-only slots (KVM_CAP_READONLY_MEM)");
    }
    if region.flags & GUEST_MEMFD != 0 {
        return Some("it depends on the guest_memfd file, of which the trace shows only the descriptor");
    }
    if region.id() >= OLD_SLOT_LIMIT && known.slots.is_none() {
        return Some("the trace does not say how many slots this kernel has (KVM_CAP_NR_MEMSLOTS)");
    }
    None
}

/// Why an answer other than success and the map's own errnos cannot be judged.
pub(crate) fn unknowable(answer: &Answer) -> &'static str {
    match answer {
        Answer::Unknown => "the process ended inside the call",
        Answer::Errno(name) => match name.as_ref() {
            "ENOMEM" => "it depends on the host's free memory",
            "EINTR" | "EAGAIN" => "it depends on signals and timing",
            "EFAULT" => "it depends on the VMM's own address space",
            "EBADF" => "it depends on which file descriptors are open",
            "EIO" => "KVM gives it when the VM is dead or bugged",
            "ENOTTY" | "ENOSYS" => "the kernel does not have this call",
            _ => "it depends on something other than the map",
        },
        Answer::Value(_) => "",
    }
}
