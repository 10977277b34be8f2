//! What QEMU tells at the start (PVH, "HVM start information"): memory map, modules, command line, ACPI.

use alloc::vec::Vec;
use core::ops::Range;

use crate::cpu::index;
use crate::physical;

const MAGIC: u64 = 0x336e_c578;

/// See the [module documentation](self). Addresses are physical.
pub(crate) struct StartInfo {
    /// The words after `-append`.
    pub(crate) command_line: &'static str,
    /// The file after `-initrd`.
    pub(crate) module: Range<u64>,
    /// The root pointer of ACPI's tables.
    pub(crate) rsdp: u64,
    /// The machine's memory: range, and whether it is free memory.
    pub(crate) memory: Vec<(Range<u64>, bool)>,
}

impl StartInfo {
    /// Reads it; `None` if this was no PVH start.
    ///
    /// # Safety
    /// `at` is what EBX was at the start.
    pub(crate) unsafe fn read(at: u64) -> Option<Self> {
        // SAFETY: QEMU has put the structures into memory that is mapped and that nobody writes.
        unsafe {
            if physical::word32(at) != MAGIC {
                return None;
            }
            let modules = physical::word64(at + 16);
            let module = match physical::word32(at + 12) {
                0 => 0..0,
                _ => physical::word64(modules)..physical::word64(modules) + physical::word64(modules + 8),
            };
            let entries = physical::word64(at + 40);
            let memory = (0..physical::word32(at + 48)).map(|entry| {
                let entry = entries + entry * 24;
                let start = physical::word64(entry);
                (start..start + physical::word64(entry + 8), physical::word32(entry + 16) == 1)
            });
            Some(Self {
                command_line: command_line(physical::word64(at + 24)),
                module,
                rsdp: physical::word64(at + 32),
                memory: memory.collect(),
            })
        }
    }

    /// Where free memory that starts at or below 1 MiB and goes on from there ends: the top of low memory.
    pub(crate) fn low_end(&self) -> u64 {
        let free = self.memory.iter().filter(|(range, is_free)| *is_free && range.contains(&0x10_0000));
        free.map(|(range, _)| range.end).next().unwrap_or(0)
    }
}

/// # Safety
/// There is a text there that ends with a 0, or `at` is 0.
unsafe fn command_line(at: u64) -> &'static str {
    if at == 0 {
        return "";
    }
    // SAFETY: the caller's promise.
    unsafe {
        let length = (0..4096).find(|&byte| physical::bytes(at + byte..at + byte + 1)[0] == 0).unwrap_or(0);
        core::str::from_utf8(&physical::bytes(at..at + length)[..index(length)]).unwrap_or("")
    }
}
