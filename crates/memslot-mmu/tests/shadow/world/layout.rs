//! Where things are in a guest's memory: a few frames for tables, a few for data, and a map of all of them for the
//! guest's kernel.
//!
//! | frames | what |
//! |---|---|
//! | 1 to 4 | roots (PAE: the registers' tables in the first 32 bytes of each) |
//! | 5 to 8, 9 to 12, 13 to 15 | tables of level 3, 2, 1 at first; programs link them as they like |
//! | 16 to 20 | the kernel's map of frames 0 to 47, through its own entry in every root |
//! | 24 to 47 | data |
//! | 512 to 1535 | data in large pages |

use memslot_mmu::shadow::guest::{EntrySize, Mode, Registers};

/// Frames that the kernel's map has, and that tables may be in.
pub const SMALL: u64 = 48;
pub const LARGE: u64 = 512;
pub const END: u64 = 1536;
const KERNEL: u64 = 16;

/// Present, writable, accessed, dirty.
const KERNELS: u64 = 0x63;
const USERS: u64 = 0x67;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    pub mode: Mode,
}

impl Layout {
    pub fn size(self) -> EntrySize {
        if self.mode == Mode::Bits32 { EntrySize::Four } else { EntrySize::Eight }
    }

    /// The levels that have tables, and the registers of PAE as one.
    pub fn levels(self) -> u32 {
        match self.mode {
            Mode::Off | Mode::Bits32 => 2,
            Mode::Pae => 3,
            Mode::Level4 => 4,
            Mode::Level5 => 5,
        }
    }

    fn shift(self, level: u32) -> u32 {
        12 + if self.size() == EntrySize::Four { 10 } else { 9 } * (level - 1)
    }

    /// The indexes that programs use, so that they meet again and again: in all parts of a table.
    pub fn index(self, choice: u64) -> u64 {
        let indexes = if self.size() == EntrySize::Four { [0, 1, 513, 1022] } else { [0, 1, 2, 511] };
        indexes[usize::try_from(choice % 4).unwrap()]
    }

    /// The kernel's own entry of a root.
    pub fn kernel_index(self) -> u64 {
        match self.mode {
            Mode::Off | Mode::Bits32 => 768,
            Mode::Pae => 3,
            _ => 300,
        }
    }

    fn canonical(self, address: u64) -> u64 {
        let top = self.shift(self.levels() + 1);
        let long = matches!(self.mode, Mode::Level4 | Mode::Level5);
        if long && address >> (top - 1) & 1 != 0 { address | u64::MAX << top } else { address }
    }

    /// An address of which each level has one of the indexes, two bits of `choice` for each.
    pub fn address(self, choice: u64) -> u64 {
        let index = |level: u32| {
            let choice = choice >> (2 * (level - 1)) & 3;
            if self.mode == Mode::Pae && level == 3 { choice % 3 } else { self.index(choice) }
        };
        self.canonical(
            (1..=self.levels()).map(|level| index(level) << self.shift(level)).sum::<u64>() | 0x678,
        )
    }

    /// Where the guest's kernel sees a guest physical address.
    pub fn kernel_address(self, gpa: u64) -> u64 {
        self.canonical(self.kernel_index() << self.shift(self.levels()) | gpa)
    }

    /// What the tables are at first: address and entry.
    pub fn tables(self) -> Vec<(u64, u64)> {
        let size = self.size();
        let at = |table: u64, index: u64| (table << 12) + index * size.bytes();
        let first_of = |level: u32| [13u64, 9, 5][usize::try_from(level - 1).unwrap()];
        let count_of = |level: u32| if level == 1 { 3 } else { 4 };
        let mut entries = Vec::new();
        let top = self.levels();
        for root in 1..=4 {
            for choice in 0..4 {
                let child = first_of((top - 1).min(3)) + (choice + root - 1) % count_of((top - 1).min(3));
                match self.mode {
                    Mode::Pae if choice == 3 => {}
                    Mode::Pae => entries.push((at(root, choice), child << 12 | 1)),
                    _ => entries.push((at(root, self.index(choice)), child << 12 | USERS)),
                }
            }
            let flags = if self.mode == Mode::Pae { 1 } else { KERNELS };
            entries.push((at(root, self.kernel_index()), (KERNEL + u64::from(top) - 2) << 12 | flags));
        }
        for level in 1..top.min(4) {
            for table in first_of(level)..first_of(level) + count_of(level) {
                for choice in 0..4 {
                    let target = match level {
                        1 => 24 + (table * 4 + choice) % 24,
                        _ => first_of(level - 1) + (table + choice) % count_of(level - 1),
                    };
                    entries.push((at(table, self.index(choice)), target << 12 | USERS));
                }
            }
        }
        // In frame 16 the last level; above it one entry each.
        entries.extend((0..SMALL).map(|frame| (at(KERNEL, frame), frame << 12 | KERNELS)));
        for level in 2..u64::from(top) {
            entries.push((at(KERNEL + level - 1, 0), (KERNEL + level - 2) << 12 | KERNELS));
        }
        entries
    }

    /// The registers with one of the roots; eight bits of `flags` switch features.
    pub fn registers(self, root: u64, flags: u64) -> Registers {
        let flag = |bit: u32, at: u32| (flags >> bit & 1) << at;
        let paging = u64::from(self.mode != Mode::Off) << 31;
        let mut registers = Registers {
            // Flags that are 0 mean what an operating system uses.
            cr0: 0x11 | paging | flag(0, 16) ^ 1 << 16,
            cr3: (1 + root % 4) << 12,
            cr4: flag(1, 20) | flag(2, 21) | flag(3, 7) | flag(4, 4) ^ 1 << 4,
            efer: flag(5, 11) ^ 1 << 11,
        };
        registers.cr4 |= match self.mode {
            Mode::Off | Mode::Bits32 => 0,
            Mode::Level5 => 0x1020,
            _ => 0x20,
        };
        if matches!(self.mode, Mode::Level4 | Mode::Level5) {
            registers.efer |= 0x500;
        }
        registers
    }
}
