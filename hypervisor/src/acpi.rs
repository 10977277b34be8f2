//! The one thing wanted of ACPI's tables: the port that the guest turns the machine off by.

use crate::physical::{bytes, word32};

/// The sleep enable bit of that port's register.
pub(crate) const SLEEP: u64 = 1 << 13;

/// The port of the first power management control register (PM1a), from the fixed table (FADT).
///
/// # Safety
/// `rsdp` points to ACPI's root pointer, or is 0.
pub(crate) unsafe fn power_port(rsdp: u64) -> Option<u16> {
    if rsdp == 0 {
        return None;
    }
    // SAFETY: the firmware's tables are mapped where they are, and nobody writes them.
    unsafe {
        let root = word32(rsdp + 16);
        let entries = word32(root + 4).checked_sub(36)? / 4;
        let table = (0..entries).map(|entry| word32(root + 36 + 4 * entry));
        let fixed = table.into_iter().find(|&table| bytes(table..table + 4) == b"FACP")?;
        u16::try_from(word32(fixed + 64)).ok()
    }
}
