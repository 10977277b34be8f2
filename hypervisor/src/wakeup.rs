//! How Linux starts its other processors.
//!
//! On a PC it sends them interrupts of a special kind (INIT, start-up), which a hypervisor would have to catch in the
//! interrupt controller. ACPI has another way, the *multiprocessor wake-up structure* (ACPI 6.4, 5.2.12.19): the firmware
//! has the processors already, in long mode, waiting in a loop in which each looks at a *mailbox* in memory; the operating system
//! writes there which one is to go on, and where.
//!
//! So a page of low RAM is the mailbox, the next one has the loop, and the guest gets a copy of ACPI's list of interrupt controllers (MADT)
//! with that structure at its end. As the list is found through other tables, those have to be copied, too.
//!
//! A processor that waits in a loop takes time from the one that works, where both are threads of QEMU. So the others are started
//! only when the guest touches the mailbox for the first time, which is a page that nobody has mapped before.
//!
//! The machine's first processor is not for the guest, and the list says so: see [`processors`](crate::processors).

use alloc::vec::Vec;
use core::ops::Range;

use memslot::Gpa;

use crate::guest::Guest;
use crate::linux::{LONG_MODE_BYTES, enter_long_mode, prepare_long_mode};
use crate::physical::{bytes, word32};
use crate::vcpu::Vcpu;

/// Low RAM for all of this: Linux is told that it is reserved.
pub(crate) const RESERVED: Range<u64> = 0x9_0000..0xa_0000;
const MAILBOX: u64 = RESERVED.start;
const CODE_AT: u64 = MAILBOX + 0x1000;
const TABLES: u64 = CODE_AT + 0x1000;
const LONG_MODE: u64 = RESERVED.end - LONG_MODE_BYTES;

/// ```text
/// again: pause
///        cmp word [rdi], 1       ; command: wake up
///        jne again
///        cmp [rdi + 4], esi      ; which processor
///        jne again
///        mov rax, [rdi + 8]      ; where to
///        mov word [rdi], 0       ; understood
///        jmp rax
/// ```
const CODE: [u8; 26] = [
    0xf3, 0x90, 0x66, 0x83, 0x3f, 0x01, 0x75, 0xf8, 0x39, 0x77, 0x04, 0x75, 0xf3, 0x48, 0x8b, 0x47, 0x08,
    0x66, 0xc7, 0x07, 0x00, 0x00, 0xff, 0xe0, 0x0f, 0x0b,
];

/// Prepares the mailbox, the loop and the tables. Returns where the guest's root pointer of ACPI is.
///
/// # Errors
/// The machine has no such tables.
///
/// # Safety
/// `rsdp` points to the machine's root pointer of ACPI.
pub(crate) unsafe fn prepare(guest: &mut Guest, rsdp: u64) -> Result<u64, &'static str> {
    // SAFETY: the caller's promise.
    let tables = unsafe { tables(rsdp) }.ok_or("ACPI's tables have no list of interrupt controllers")?;
    guest.write(TABLES, &tables)?;
    guest.write(CODE_AT, &CODE)?;
    prepare_long_mode(guest, LONG_MODE)?;
    Ok(TABLES)
}

/// Whether an address is in the mailbox's page.
pub(crate) fn is_mailbox(gpa: Gpa) -> bool {
    gpa.get() >> 12 == MAILBOX >> 12
}

/// Brings a virtual processor into the loop.
pub(crate) fn wait_for_linux(vcpu: &mut Vcpu, apic: u64) {
    enter_long_mode(vcpu, LONG_MODE, CODE_AT);
    vcpu.registers.rdi = MAILBOX;
    vcpu.registers.rsi = apic;
}

/// The guest's tables, one after the other: root pointer, root table, list of interrupt controllers.
///
/// # Safety
/// `rsdp` points to the machine's root pointer of ACPI.
unsafe fn tables(rsdp: u64) -> Option<Vec<u8>> {
    // SAFETY: the firmware's tables are mapped where they are, and nobody writes them.
    let (mut pointer, mut root, mut madt) = unsafe {
        let table = |at: u64| bytes(at..at + word32(at + 4)).to_vec();
        let root = table(word32(rsdp + 16));
        let entries = root.get(36..)?.chunks_exact(4).map(number);
        let madt = entries.into_iter().find(|&at| bytes(at..at + 4) == b"APIC").map(table)?;
        (bytes(rsdp..rsdp + 20).to_vec(), root, madt)
    };
    let root_at = TABLES + 64;
    let madt_at = (root_at + root.len() as u64).next_multiple_of(64);

    change_madt(&mut madt);
    finish(&mut madt)?;
    for entry in root.get_mut(36..)?.chunks_exact_mut(4) {
        // SAFETY: as above.
        if unsafe { bytes(number(entry)..number(entry) + 4) } == b"APIC" {
            entry.copy_from_slice(&u32::try_from(madt_at).ok()?.to_le_bytes());
        }
    }
    finish(&mut root)?;
    pointer[15] = 0;
    pointer[16..20].copy_from_slice(&u32::try_from(root_at).ok()?.to_le_bytes());
    pointer[8] = 0;
    pointer[8] = checksum(&pointer);

    let mut all = pointer;
    all.resize(crate::cpu::index(root_at - TABLES), 0);
    all.extend(root);
    all.resize(crate::cpu::index(madt_at - TABLES), 0);
    all.extend(madt);
    (all.len() as u64 <= LONG_MODE - TABLES).then_some(all)
}

fn number(entry: &[u8]) -> u64 {
    entry.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Takes the first processor out of the list and adds the mailbox. Length and checksum are wrong then.
fn change_madt(madt: &mut Vec<u8>) {
    let mut at = 44;
    while let Some(&[kind, length]) = madt.get(at..at + 2) {
        // A local interrupt controller: number of the processor, number of the controller, flags (bit 0: it is there).
        if let (0, Some(entry)) = (kind, madt.get_mut(at..at + 8)) {
            if entry[3] == 0 {
                entry[4] &= !1;
            }
        }
        at += usize::from(length).max(2);
    }
    madt.extend([0x10, 16, 0, 0, 0, 0, 0, 0]);
    madt.extend(MAILBOX.to_le_bytes());
}

/// Writes length and checksum.
fn finish(table: &mut [u8]) -> Option<()> {
    let length = u32::try_from(table.len()).ok()?;
    table.get_mut(4..8)?.copy_from_slice(&length.to_le_bytes());
    table[9] = 0;
    table[9] = checksum(table);
    Some(())
}

/// What makes the sum of all bytes 0.
fn checksum(table: &[u8]) -> u8 {
    table.iter().fold(0_u8, |sum, &byte| sum.wrapping_sub(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_loses_its_first_processor_and_gets_a_mailbox() {
        let mut madt = vec![0_u8; 44];
        for (processor, apic) in [(0, 0), (1, 1)] {
            madt.extend([0, 8, processor, apic, 1, 0, 0, 0]);
        }
        madt.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        change_madt(&mut madt);
        finish(&mut madt).unwrap();
        assert_eq!((madt[48], madt[56]), (0, 1));
        assert_eq!(madt[72..], [0x10, 16, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0]);
        assert_eq!(madt[4..8], [88, 0, 0, 0]);
        assert_eq!(madt.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte)), 0);
    }
}
