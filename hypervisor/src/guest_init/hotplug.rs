//! Asks the hypervisor to plug memory in, change it and take it away, and looks at it through `/dev/mem` after each change.

use core::arch::asm;

use crate::system::{self, print};

const CHANGE: u64 = 0x6d65_6d10;
const EXPECTS_NOTHING: u64 = 0x6e6f_7468_696e_6721;
const PLACE: usize = 8 << 30;
/// From the place to the other place and its end.
const ALL: usize = (32 + 8) << 20;
const OTHER: usize = 32 << 20;
const BYTES: usize = 8 << 20;
const NOTHING: u64 = u64::MAX;

/// Memory that may not be there.
struct Window {
    start: usize,
    wrong: u64,
}

impl Window {
    /// Reads a word: all ones where nothing is.
    fn read(&self, at: usize) -> u64 {
        let value;
        // SAFETY: the window is mapped for as long as the program runs; the hypervisor completes what goes nowhere.
        unsafe {
            asm!("lea r15, [rip + 2f]", "mov rax, [{at}]", "2:", at = in(reg) self.start + at, out("rax") value,
                in("r14") EXPECTS_NOTHING, out("r15") _, options(nostack));
        }
        value
    }

    /// Writes a word. Whether it arrived, as far as the hypervisor says.
    fn write(&mut self, at: usize, value: u64) -> bool {
        let lost: u64;
        // SAFETY: as `read`; nothing of this program lies in the window.
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
    let Some(start) = system::map_physical(PLACE, ALL) else {
        print!("memslot-init: /dev/mem cannot be mapped\n");
        return 1;
    };
    let mut window = Window { start, wrong: 0 };
    for cycle in 0..cycles {
        let is_empty = window.is_empty(0, ALL);
        window.expect(is_empty, "something is there before it is plugged in", cycle);

        change(0);
        let arrived = (0..BYTES).step_by(4096).all(|at| window.write(at, value(cycle, at)));
        window.expect(arrived, "a write to new memory was lost", cycle);
        let is_right = window.has(0, BYTES, 0, cycle) && window.is_empty(BYTES, ALL);
        window.expect(is_right, "new memory is wrong", cycle);

        change(1);
        let lost = (0..BYTES).step_by(512 << 12).all(|at| !window.write(at, 1));
        window.expect(lost, "a write to ROM was not lost", cycle);
        let is_right = window.has(0, BYTES, 0, cycle);
        window.expect(is_right, "ROM has changed", cycle);

        change(2);
        let arrived =
            window.write(0x3000, 5) && window.read(0x3000) == 5 && window.write(0x3000, value(cycle, 0x3000));
        window.expect(arrived, "memory that was ROM cannot be written", cycle);

        change(3);
        let is_right = window.is_empty(0, OTHER) && window.has(OTHER, OTHER + BYTES, OTHER, cycle);
        window.expect(is_right, "moved memory is wrong", cycle);

        change(4);
        let is_right = window.has(0, BYTES, 0, cycle) && window.is_empty(BYTES, ALL);
        window.expect(is_right, "memory that was moved back is wrong", cycle);

        change(5);
        let is_right = window.has(0, BYTES, 0, cycle);
        window.expect(is_right, "split memory is wrong", cycle);

        change(6);
        let is_right = window.has(0, BYTES / 2, 0, cycle) && window.is_empty(BYTES / 2, ALL);
        window.expect(is_right, "the rest after a deletion is wrong", cycle);

        change(7);
        let is_right = window.has(0, BYTES, 0, cycle);
        window.expect(is_right, "merged memory is wrong", cycle);

        change(8);
        let is_right = window.has(0, BYTES / 4, 0, cycle) && window.is_empty(BYTES / 4, ALL);
        window.expect(is_right, "shrunk memory is wrong", cycle);

        change(9);
        let is_right = window.has(0, BYTES, 0, cycle);
        window.expect(is_right, "grown memory is wrong", cycle);

        change(10);
        let is_empty = window.is_empty(0, ALL);
        window.expect(is_empty, "something is left of what was taken away", cycle);
    }
    print!("memslot-init: {cycles} hotplug cycles, {} wrong\n", window.wrong);
    window.wrong
}
