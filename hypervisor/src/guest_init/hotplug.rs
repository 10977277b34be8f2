//! Asks the hypervisor to plug memory in, change it and take it away, and looks at it through `/dev/mem` after each change.

use core::arch::asm;

use crate::system::{self, print};

const CHANGE: u64 = 0x6d65_6d10;
const EXPECTS_NOTHING: u64 = 0x6e6f_7468_696e_6721;
const PLACE: usize = 8 << 30;
/// From the place to the end of all places.
const ALL: usize = 64 << 20;
const OTHER: usize = 32 << 20;
const BYTES: usize = 8 << 20;
const NOTHING: u64 = u64::MAX;
/// A window to the firmware's ROM, which is also where it always was.
const WINDOW: usize = 48 << 20;
const OTHER_WINDOW: usize = 56 << 20;
const WINDOW_BYTES: usize = 64 << 10;
const FIRMWARE: usize = 0xf_0000;

/// Addresses at which there may be something.
struct Addresses {
    start: usize,
    /// The firmware's ROM.
    firmware: usize,
    wrong: u64,
}

impl Addresses {
    /// Reads a word: all ones where nothing is.
    fn read(&self, at: usize) -> u64 {
        let value;
        // SAFETY: the addresses are mapped for as long as the program runs; the hypervisor completes what goes nowhere.
        unsafe {
            asm!("lea r15, [rip + 2f]", "mov rax, [{at}]", "2:", at = in(reg) self.start + at, out("rax") value,
                in("r14") EXPECTS_NOTHING, out("r15") _, options(nostack));
        }
        value
    }

    /// Writes a word. Whether it arrived, as far as the hypervisor says.
    fn write(&mut self, at: usize, value: u64) -> bool {
        let lost: u64;
        // SAFETY: as `read`; nothing of this program lies there.
        unsafe {
            asm!("lea r15, [rip + 2f]", "mov [{at}], {value}", "2:", at = in(reg) self.start + at,
                value = in(reg) value, inout("rax") 0_u64 => lost, in("r14") EXPECTS_NOTHING, out("r15") _,
                options(nostack));
        }
        lost == 0
    }

    fn expect(&mut self, is_right: bool, what: &str, cycle: u64) {
        if !is_right {
            self.wrong += 1;
            print!("memslot-init: hotplug cycle {cycle}: {what}\n");
        }
    }

    /// Whether every page of a range has what was written when its memory was at `from - shift`.
    fn has(&self, from: usize, to: usize, shift: usize, cycle: u64) -> bool {
        (from..to).step_by(4096).all(|at| self.read(at) == value(cycle, at - shift))
    }

    /// Whether `bytes` of a window to the firmware's ROM are what they should be.
    fn has_firmware(&self, at: usize, bytes: usize) -> bool {
        (0..bytes).step_by(8).all(|offset| {
            let firmware = core::ptr::with_exposed_provenance::<u64>(self.firmware + offset);
            // SAFETY: the ROM is mapped for as long as the program runs.
            self.read(at + offset) == unsafe { firmware.read_volatile() }
        })
    }

    /// Whether there is nothing in a range.
    fn is_empty(&self, from: usize, to: usize) -> bool {
        (from..to).step_by(64 << 12).chain([to - 4096]).all(|at| self.read(at) == NOTHING)
    }
}

fn value(cycle: u64, at: usize) -> u64 {
    (cycle << 40 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & !1
}

fn change(what: u64) {
    system::call(CHANGE, what);
}

/// Runs `cycles` of all changes. Returns how often something else was seen than should be.
pub(crate) fn run(cycles: u64) -> u64 {
    let mapped = system::map_physical(PLACE, ALL).zip(system::map_physical(FIRMWARE, WINDOW_BYTES));
    let Some((start, firmware)) = mapped else {
        print!("memslot-init: /dev/mem cannot be mapped\n");
        return 1;
    };
    let mut all = Addresses { start, firmware, wrong: 0 };
    for cycle in 0..cycles {
        let is_empty = all.is_empty(0, ALL);
        all.expect(is_empty, "something is there before it is plugged in", cycle);

        change(0);
        let arrived = (0..BYTES).step_by(4096).all(|at| all.write(at, value(cycle, at)));
        all.expect(arrived, "a write to new memory was lost", cycle);
        let is_right = all.has(0, BYTES, 0, cycle) && all.is_empty(BYTES, ALL);
        all.expect(is_right, "new memory is wrong", cycle);

        change(1);
        let lost = (0..BYTES).step_by(512 << 12).all(|at| !all.write(at, 1));
        all.expect(lost, "a write to ROM was not lost", cycle);
        let is_right = all.has(0, BYTES, 0, cycle);
        all.expect(is_right, "ROM has changed", cycle);

        change(2);
        let arrived =
            all.write(0x3000, 5) && all.read(0x3000) == 5 && all.write(0x3000, value(cycle, 0x3000));
        all.expect(arrived, "memory that was ROM cannot be written", cycle);

        change(3);
        let is_right = all.is_empty(0, OTHER) && all.has(OTHER, OTHER + BYTES, OTHER, cycle);
        all.expect(is_right, "moved memory is wrong", cycle);

        change(4);
        let is_right = all.has(0, BYTES, 0, cycle) && all.is_empty(BYTES, ALL);
        all.expect(is_right, "memory that was moved back is wrong", cycle);

        change(5);
        let is_right = all.has(0, BYTES, 0, cycle);
        all.expect(is_right, "split memory is wrong", cycle);

        change(6);
        let is_right = all.has(0, BYTES / 2, 0, cycle) && all.is_empty(BYTES / 2, ALL);
        all.expect(is_right, "the rest after a deletion is wrong", cycle);

        change(7);
        let is_right = all.has(0, BYTES, 0, cycle);
        all.expect(is_right, "merged memory is wrong", cycle);

        change(8);
        let is_right = all.has(0, BYTES / 4, 0, cycle) && all.is_empty(BYTES / 4, ALL);
        all.expect(is_right, "shrunk memory is wrong", cycle);

        change(9);
        let is_right = all.has(0, BYTES, 0, cycle);
        all.expect(is_right, "grown memory is wrong", cycle);

        change(10);
        let is_empty = all.is_empty(0, ALL);
        all.expect(is_empty, "something is left of what was taken away", cycle);

        change(11);
        let is_right = all.has_firmware(WINDOW, WINDOW_BYTES)
            && all.is_empty(0, WINDOW)
            && all.is_empty(WINDOW + WINDOW_BYTES, ALL);
        all.expect(is_right, "a window is wrong", cycle);

        change(12);
        let is_right = all.has_firmware(OTHER_WINDOW, WINDOW_BYTES)
            && all.is_empty(0, OTHER_WINDOW)
            && all.is_empty(OTHER_WINDOW + WINDOW_BYTES, ALL);
        all.expect(is_right, "a window that was moved is wrong", cycle);

        change(13);
        let is_right = all.has_firmware(WINDOW, WINDOW_BYTES) && all.is_empty(OTHER_WINDOW, ALL);
        all.expect(is_right, "a window that was moved back is wrong", cycle);

        change(14);
        let is_right = all.has_firmware(WINDOW, WINDOW_BYTES);
        all.expect(is_right, "a window that was split is wrong", cycle);

        change(15);
        let is_right =
            all.has_firmware(WINDOW, WINDOW_BYTES / 2) && all.is_empty(WINDOW + WINDOW_BYTES / 2, ALL);
        all.expect(is_right, "the rest of a window is wrong", cycle);

        change(16);
        let is_right = all.has_firmware(WINDOW, WINDOW_BYTES);
        all.expect(is_right, "a window that was merged is wrong", cycle);

        change(17);
        let is_empty = all.is_empty(0, ALL);
        all.expect(is_empty, "something is left of a window", cycle);
    }
    print!("memslot-init: {cycles} hotplug cycles, {} wrong\n", all.wrong);
    all.wrong
}
