//! Two ways out: the serial port for people, and a port of QEMU for `cargo xtask linux`.
//!
//! The serial port is the guest's console, too. While the guest runs it is the guest's alone: what the hypervisor has to say then
//! goes to the other one only (a line the guest's driver does not know of would cost it an interrupt).

use core::fmt::{self, Write};

use crate::cpu::{in8, out8};

const SERIAL: u16 = 0x3f8;
const DEBUG: u16 = 0xe9;

/// Sets the serial port to 115200 baud, 8 bits.
pub(crate) fn start() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7)] {
        out8(SERIAL + register, value);
    }
}

/// The serial port.
pub(crate) struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // Bit 5 of the line status: it takes another byte.
            while in8(SERIAL + 5) & 0x20 == 0 {
                core::hint::spin_loop();
            }
            out8(SERIAL, byte);
        }
        Ok(())
    }
}

/// QEMU's `isa-debugcon`: lines `name value`, read by `cargo xtask linux`.
pub(crate) struct Report;

impl Write for Report {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| out8(DEBUG, byte));
        Ok(())
    }
}

/// Prints a line on the serial port.
macro_rules! say {
    ($($text:tt)*) => {{
        use core::fmt::Write as _;
        let _ = write!($crate::console::Serial, $($text)*);
        let _ = $crate::console::Serial.write_str("\r\n");
    }};
}
pub(crate) use say;

/// Reports a line `name value`.
macro_rules! report {
    ($($text:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::console::Report, $($text)*);
    }};
}
pub(crate) use report;
