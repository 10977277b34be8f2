//! The little that is needed of the local interrupt controller. It belongs to the guest: what is changed here is put back.

use crate::physical;

const BASE: u64 = 0xfee0_0000;
const ID: u64 = 0x20;
const SPURIOUS: u64 = 0xf0;
const COMMAND: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;

fn read(register: u64) -> u32 {
    // SAFETY: the controller's registers are mapped where they are on every machine that QEMU has for this.
    unsafe { physical::pointer::<u32>(BASE + register).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: as `read`; a register write has no effect on Rust's memory.
    unsafe { physical::pointer::<u32>(BASE + register).write_volatile(value) }
}

/// This processor's number.
pub(crate) fn id() -> u64 {
    u64::from(read(ID) >> 24)
}

/// Turns this processor's controller on, or it would get no interrupt from others.
pub(crate) fn enable() {
    write(SPURIOUS, read(SPURIOUS) | 0x1ff);
}

/// Sends a command word to another processor. The guest may be between its writes of the two halves, so the high one is put back.
fn send(to: u64, command: u32) {
    let high = read(COMMAND_HIGH);
    #[expect(clippy::cast_possible_truncation, reason = "a number of 8 bits")]
    write(COMMAND_HIGH, (to << 24) as u32);
    write(COMMAND, command);
    while read(COMMAND) & 1 << 12 != 0 {
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, high);
}

/// Brings a processor out of its guest.
pub(crate) fn send_nmi(to: u64) {
    send(to, 0x4400);
}

/// Resets a processor.
pub(crate) fn send_init(to: u64) {
    send(to, 0xc500);
}

/// Starts a processor at a page below 1 MiB.
pub(crate) fn send_startup(to: u64, page: u8) {
    send(to, 0x4600 | u32::from(page));
}
