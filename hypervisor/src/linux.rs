//! Linux's boot protocol for x86 (64-bit entry), as the kernel documents it in `Documentation/x86/boot.rst`.
//!
//! Of a bzImage the part behind the real-mode code is put where it wants to be; the processor starts 0x200 bytes into it, in long mode, with
//! identity page tables and the address of the *zero page* in RSI: the image's own header, the memory map, and where
//! initramfs, command line and ACPI's tables are.

use crate::guest::Guest;
use crate::svm::Segment;
use crate::vcpu::Vcpu;

const ZERO_PAGE: u64 = 0x1_0000;
/// Identity page tables and segment descriptors: [`LONG_MODE_BYTES`].
const LONG_MODE: u64 = 0x1_1000;
/// What [`prepare_long_mode`] fills.
pub(crate) const LONG_MODE_BYTES: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;

/// A kernel image.
#[derive(Clone, Copy)]
pub(crate) struct Image<'a> {
    bytes: &'a [u8],
    code: &'a [u8],
    address: u64,
    needs: u64,
}

impl<'a> Image<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, &'static str> {
        let header = bytes.get(..0x268).ok_or("the kernel image is too short")?;
        let number = |at: usize, size: usize| {
            header[at..at + size].iter().rev().fold(0, |number: u64, &byte| number << 8 | u64::from(byte))
        };
        if header[0x202..0x206] != *b"HdrS" || number(0x206, 2) < 0x20c {
            return Err("not a bzImage of boot protocol 2.12 or later");
        }
        if number(0x236, 2) & 1 == 0 {
            return Err("the kernel has no 64-bit entry point");
        }
        let sectors = if header[0x1f1] == 0 { 4 } else { usize::from(header[0x1f1]) };
        let code = bytes.get((sectors + 1) * 512..).ok_or("the kernel image is too short")?;
        Ok(Self { bytes, code, address: number(0x258, 8), needs: number(0x260, 4) })
    }
}

/// What is to be booted.
pub(crate) struct Boot<'a> {
    pub(crate) kernel: Image<'a>,
    pub(crate) initramfs: &'a [u8],
    pub(crate) command_line: &'a str,
    /// ACPI's root pointer, in a window.
    pub(crate) rsdp: u64,
    /// Low RAM that the guest must leave alone, if any.
    pub(crate) reserved: Option<core::ops::Range<u64>>,
    /// Where the second window's ACPI tables end.
    pub(crate) acpi_end: u64,
}

/// Puts everything into the guest's memory.
///
/// # Errors
/// It does not fit.
pub(crate) fn load(guest: &mut Guest, boot: &Boot<'_>) -> Result<(), &'static str> {
    let kernel = &boot.kernel;
    let low = guest.ram.get(1).ok_or("the guest has no memory")?.gfns.end().get() << 12;
    let initramfs = (low - boot.initramfs.len() as u64) & !0xfff;
    if kernel.address + kernel.needs > initramfs {
        return Err("the guest has too little memory for kernel and initramfs");
    }
    guest.write(kernel.address, kernel.code)?;
    guest.write(initramfs, boot.initramfs)?;
    guest.write(COMMAND_LINE, boot.command_line.as_bytes())?;
    guest.write(COMMAND_LINE + boot.command_line.len() as u64, &[0])?;

    let mut zero_page = [0; 4096];
    let mut put = |at: usize, bytes: &[u8]| zero_page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &kernel.bytes[0x1f1..0x202 + usize::from(kernel.bytes[0x201])]);
    put(0x070, &boot.rsdp.to_le_bytes());
    put(0x210, &[0xff]);
    put(0x218, &low_32(initramfs));
    put(0x21c, &low_32(boot.initramfs.len() as u64));
    put(0x228, &low_32(COMMAND_LINE));
    let mut count = 0;
    memory_map(guest, boot, |start, end, kind| {
        let at = 0x2d0 + 20 * usize::from(count);
        put(at, &start.to_le_bytes());
        put(at + 8, &(end - start).to_le_bytes());
        put(at + 16, &[kind]);
        count += 1;
    });
    put(0x1e8, &[count]);
    guest.write(ZERO_PAGE, &zero_page)?;

    prepare_long_mode(guest, LONG_MODE)
}

/// Puts page tables that map 4 GiB where they are, and segment descriptors, into the guest's memory.
///
/// # Errors
/// There is no RAM.
pub(crate) fn prepare_long_mode(guest: &mut Guest, at: u64) -> Result<(), &'static str> {
    // In pages of 2 MiB: the root, a table of 1 GiB entries, four of 2 MiB entries.
    let entry = |number: u64| match number {
        0 => at + 0x1003,
        512..516 => at + (number - 512 + 2) * 0x1000 + 3,
        1024..3072 => (number - 1024) << 21 | 0x83,
        _ => 0,
    };
    for number in (0..3072).filter(|&number| entry(number) != 0) {
        guest.write(at + 8 * number, &entry(number).to_le_bytes())?;
    }
    for (number, descriptor) in [(2, 0x00af_9b00_0000_ffff_u64), (3, 0x00cf_9300_0000_ffff)] {
        guest.write(gdt(at) + 8 * number, &descriptor.to_le_bytes())?;
    }
    Ok(())
}

/// Where the segment descriptors are.
fn gdt(at: u64) -> u64 {
    at + LONG_MODE_BYTES - 0x1000
}

#[expect(clippy::cast_possible_truncation, reason = "low memory ends below 4 GiB")]
fn low_32(value: u64) -> [u8; 4] {
    (value as u32).to_le_bytes()
}

/// The guest's memory map: start, end, and 1 for RAM, 2 for what is reserved, 3 for ACPI's tables.
fn memory_map(guest: &Guest, boot: &Boot<'_>, mut add: impl FnMut(u64, u64, u8)) {
    for ram in &guest.ram {
        let (start, end) = (ram.gfns.start().get() << 12, ram.gfns.end().get() << 12);
        match &boot.reserved {
            Some(reserved) if start < reserved.start && reserved.end <= end => {
                add(start, reserved.start, 1);
                add(reserved.start, reserved.end, 2);
                if reserved.end < end {
                    add(reserved.end, end, 1);
                }
            }
            _ => add(start, end, 1),
        }
    }
    add(0xf_0000, 0x10_0000, 2);
    if let Some(window) = guest.windows.get(1) {
        add(window.start().get() << 12, boot.acpi_end, 3);
    }
}

/// Brings a virtual processor to the kernel's entry point.
pub(crate) fn start(vcpu: &mut Vcpu, boot: &Boot<'_>) {
    enter_long_mode(vcpu, LONG_MODE, boot.kernel.address + 0x200);
    vcpu.registers.rsi = ZERO_PAGE;
}

/// Brings a virtual processor into long mode, with what was prepared `at` some address, at an instruction.
pub(crate) fn enter_long_mode(vcpu: &mut Vcpu, at: u64, rip: u64) {
    let save = &mut vcpu.vmcb.save;
    save.cr0 = 0x8000_0031;
    save.cr3 = at;
    save.cr4 = 0x20;
    save.efer = 0x1500;
    let data = Segment { selector: 0x18, attributes: 0xc93, limit: 0xffff_ffff, base: 0 };
    (save.ds, save.es, save.ss, save.fs, save.gs) = (data, data, data, data, data);
    save.cs = Segment { selector: 0x10, attributes: 0xa9b, ..data };
    save.gdtr = Segment { selector: 0, attributes: 0, limit: 31, base: gdt(at) };
    save.idtr = Segment { limit: 0, base: 0, ..save.gdtr };
    save.tr = Segment { selector: 0, attributes: 0x8b, limit: 0x67, base: 0 };
    save.ldtr = Segment { attributes: 0x82, ..save.tr };
    save.rip = rip;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_checked() {
        let mut bytes = [0_u8; 4096];
        bytes[0x1f1] = 2;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
        bytes[0x236] = 1;
        bytes[0x258..0x25c].copy_from_slice(&0x100_0000_u32.to_le_bytes());
        bytes[0x260..0x264].copy_from_slice(&0x330_0000_u32.to_le_bytes());
        let image = Image::read(&bytes).unwrap();
        assert_eq!((image.address, image.needs, image.code.len()), (0x100_0000, 0x330_0000, 4096 - 3 * 512));
        bytes[0x236] = 0;
        assert!(Image::read(&bytes).is_err());
        assert!(Image::read(&bytes[..600]).is_err());
    }
}
