//! The few instructions that shadow paging must understand: those that touch control registers, and INVLPG.
//!
//! The processor says which control register an exit is about, but not (without decode assists) which general register, nor how
//! long the instruction is, nor what INVLPG's operand comes to. So the bytes are read. It is 64-bit code always: only privilege
//! level 0 may execute these, and a 64-bit kernel runs there in 64-bit mode. (Encodings: AMD64 Architecture Programmer's
//! Manual, volume 3, chapter 1 and appendix A.)

/// The longest instruction.
pub(crate) const LONGEST: usize = 15;

/// What an instruction does. Registers are numbered as in encodings: 0 is RAX, 4 is RSP, 15 is R15.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    /// `mov crN, register`
    WriteControl { control: u8, register: u8 },
    /// `mov register, crN`
    ReadControl { control: u8, register: u8 },
    /// `clts`
    ClearTaskSwitched,
    /// `lmsw register`
    LoadStatusWord { register: u8 },
    /// `smsw register`; how many bytes of it are written: 2, 4 or 8, where 4 clear the upper ones
    StoreStatusWord { register: u8, bytes: u8 },
    /// `invlpg [address]`
    Invalidate(Address),
}

/// An instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Instruction {
    pub(crate) operation: Operation,
    /// In bytes.
    pub(crate) length: u8,
}

/// A segment whose base counts in 64-bit mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Base {
    Fs,
    Gs,
}

/// What an address is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Address {
    base: Option<u8>,
    /// A register, and how far its value is shifted.
    index: Option<(u8, u8)>,
    displacement: u64,
    /// Relative to the next instruction.
    is_relative: bool,
    segment: Option<Base>,
    /// Cut to 32 bits before the segment's base is added.
    is_narrow: bool,
}

impl Address {
    /// The linear address. `next` is where the next instruction is.
    pub(crate) fn linear(
        &self,
        next: u64,
        register: impl Fn(u8) -> u64,
        segment: impl Fn(Base) -> u64,
    ) -> u64 {
        let mut address = self.displacement;
        address = address.wrapping_add(self.base.map_or(0, &register));
        address = address.wrapping_add(self.index.map_or(0, |(index, shift)| register(index) << shift));
        if self.is_relative {
            address = address.wrapping_add(next);
        }
        if self.is_narrow {
            address &= 0xffff_ffff;
        }
        address.wrapping_add(self.segment.map_or(0, segment))
    }
}

/// Reads the instruction at the start of `bytes`. `None` if it is another one, or cut off.
pub(crate) fn decode(bytes: &[u8]) -> Option<Instruction> {
    let mut bytes = Bytes { all: bytes.get(..bytes.len().min(LONGEST))?, at: 0 };
    let (mut segment, mut is_narrow, mut is_short, mut rex) = (None, false, false, 0);
    let first = loop {
        match bytes.next()? {
            0x64 => segment = Some(Base::Fs),
            0x65 => segment = Some(Base::Gs),
            0x67 => is_narrow = true,
            0x66 => is_short = true,
            // Other segments and repetitions mean nothing here.
            0x26 | 0x2e | 0x36 | 0x3e | 0xf2 | 0xf3 => {}
            byte @ 0x40..=0x4f => {
                // REX counts only directly before the opcode.
                rex = byte;
                let byte = bytes.next()?;
                if byte == 0x0f {
                    break byte;
                }
                rex = 0;
                bytes.at -= 1;
            }
            byte => break byte,
        }
    };
    if first != 0x0f {
        return None;
    }
    let opcode = bytes.next()?;
    let operation = match opcode {
        0x06 => Operation::ClearTaskSwitched,
        0x20 | 0x22 => {
            // Both operands are registers whatever the mode field says.
            let byte = bytes.next()?;
            let (control, register) = (byte >> 3 & 7 | (rex & 4) << 1, byte & 7 | (rex & 1) << 3);
            match opcode {
                0x20 => Operation::ReadControl { control, register },
                _ => Operation::WriteControl { control, register },
            }
        }
        0x01 => {
            let byte = bytes.next()?;
            let (mode, what, register) = (byte >> 6, byte >> 3 & 7, byte & 7 | (rex & 1) << 3);
            match (mode, what) {
                (3, 4) => {
                    let bytes = match (rex & 8 != 0, is_short) {
                        (true, _) => 8,
                        (false, false) => 4,
                        (false, true) => 2,
                    };
                    Operation::StoreStatusWord { register, bytes }
                }
                (3, 6) => Operation::LoadStatusWord { register },
                (0..3, 7) => {
                    let address = address(&mut bytes, byte, rex)?;
                    Operation::Invalidate(Address { segment, is_narrow, ..address })
                }
                _ => return None,
            }
        }
        _ => return None,
    };
    let length = u8::try_from(bytes.at).ok()?;
    Some(Instruction { operation, length })
}

/// The operand in memory that a ModRM byte begins.
fn address(bytes: &mut Bytes<'_>, modrm: u8, rex: u8) -> Option<Address> {
    let (mode, low) = (modrm >> 6, modrm & 7);
    let mut address = Address::default();
    if low == 4 {
        let sib = bytes.next()?;
        let (shift, index, base) = (sib >> 6, sib >> 3 & 7 | (rex & 2) << 2, sib & 7);
        // RSP cannot be an index: no index.
        address.index = (index != 4).then_some((index, shift));
        if base == 5 && mode == 0 {
            address.displacement = bytes.signed(4)?;
            return Some(address);
        }
        address.base = Some(base | (rex & 1) << 3);
    } else if low == 5 && mode == 0 {
        address.is_relative = true;
        address.displacement = bytes.signed(4)?;
        return Some(address);
    } else {
        address.base = Some(low | (rex & 1) << 3);
    }
    address.displacement = match mode {
        1 => bytes.signed(1)?,
        2 => bytes.signed(4)?,
        _ => 0,
    };
    Some(address)
}

struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
}

impl Bytes<'_> {
    fn next(&mut self) -> Option<u8> {
        let byte = self.all.get(self.at).copied()?;
        self.at += 1;
        Some(byte)
    }

    /// A number of one or four bytes, its sign extended.
    fn signed(&mut self, bytes: u32) -> Option<u64> {
        let mut value = 0;
        for byte in 0..bytes {
            value |= u64::from(self.next()?) << (8 * byte);
        }
        let sign = 1 << (8 * bytes - 1);
        Some((value ^ sign).wrapping_sub(sign))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(bytes: &[u8]) -> Operation {
        let instruction = decode(bytes).unwrap();
        assert_eq!(usize::from(instruction.length), bytes.len());
        // What follows is not looked at, and what is missing is noticed.
        let mut longer = bytes.to_vec();
        longer.extend([0x90; 4]);
        assert_eq!(decode(&longer), Some(instruction));
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), None, "cut to {cut}");
        }
        instruction.operation
    }

    /// The address where register n has the value 0x1000 * 2^n, FS begins at 7 << 40 and GS at 9 << 40.
    fn linear(bytes: &[u8]) -> u64 {
        let Operation::Invalidate(address) = one(bytes) else { panic!("no INVLPG") };
        let segment = |base| if base == Base::Fs { 7 << 40 } else { 9 << 40 };
        address.linear(0x40_0000 + bytes.len() as u64, |register| 0x1000 << register, segment)
    }

    #[test]
    fn moves_name_both_registers() {
        // As the assembler writes them.
        assert_eq!(one(&[0x0f, 0x22, 0xd8]), Operation::WriteControl { control: 3, register: 0 });
        assert_eq!(one(&[0x0f, 0x22, 0xdf]), Operation::WriteControl { control: 3, register: 7 });
        assert_eq!(one(&[0x41, 0x0f, 0x22, 0xe4]), Operation::WriteControl { control: 4, register: 12 });
        assert_eq!(one(&[0x0f, 0x22, 0xc0]), Operation::WriteControl { control: 0, register: 0 });
        assert_eq!(one(&[0x0f, 0x20, 0xd8]), Operation::ReadControl { control: 3, register: 0 });
        assert_eq!(one(&[0x49, 0x0f, 0x20, 0xdf]), Operation::ReadControl { control: 3, register: 15 });
        assert_eq!(one(&[0x44, 0x0f, 0x22, 0xc1]), Operation::WriteControl { control: 8, register: 1 });
        // The mode field means nothing.
        assert_eq!(one(&[0x0f, 0x22, 0x18]), Operation::WriteControl { control: 3, register: 0 });
        // A REX that is not the last prefix means nothing either.
        assert_eq!(one(&[0x41, 0x66, 0x0f, 0x22, 0xd8]), Operation::WriteControl { control: 3, register: 0 });
    }

    #[test]
    fn the_rest_of_control_register_0() {
        assert_eq!(one(&[0x0f, 0x06]), Operation::ClearTaskSwitched);
        assert_eq!(one(&[0x0f, 0x01, 0xf3]), Operation::LoadStatusWord { register: 3 });
        assert_eq!(one(&[0x0f, 0x01, 0xe2]), Operation::StoreStatusWord { register: 2, bytes: 4 });
        assert_eq!(one(&[0x49, 0x0f, 0x01, 0xe2]), Operation::StoreStatusWord { register: 10, bytes: 8 });
        assert_eq!(one(&[0x66, 0x0f, 0x01, 0xe0]), Operation::StoreStatusWord { register: 0, bytes: 2 });
    }

    #[test]
    fn operands_of_invlpg() {
        // invlpg [rax], [rsp], [r12], [r13 + 0]
        assert_eq!(linear(&[0x0f, 0x01, 0x38]), 0x1000);
        assert_eq!(linear(&[0x0f, 0x01, 0x3c, 0x24]), 0x1000 << 4);
        assert_eq!(linear(&[0x41, 0x0f, 0x01, 0x3c, 0x24]), 0x1000 << 12);
        assert_eq!(linear(&[0x41, 0x0f, 0x01, 0x7d, 0x00]), 0x1000 << 13);
        // [rdi - 8], [rbp + 0x12345678], [rcx - 0x1000]
        assert_eq!(linear(&[0x0f, 0x01, 0x7f, 0xf8]), (0x1000 << 7) - 8);
        assert_eq!(linear(&[0x0f, 0x01, 0xbd, 0x78, 0x56, 0x34, 0x12]), (0x1000 << 5) + 0x1234_5678);
        assert_eq!(linear(&[0x0f, 0x01, 0xb9, 0x00, 0xf0, 0xff, 0xff]), 0x1000);
        // [rbx + rsi * 8 + 0x10], [r9 + r10 * 2], [rdx * 4 + 0x100], [0xffffffff80000000]
        assert_eq!(linear(&[0x0f, 0x01, 0x7c, 0xf3, 0x10]), (0x1000 << 3) + (0x1000 << 9) + 0x10);
        assert_eq!(linear(&[0x43, 0x0f, 0x01, 0x3c, 0x51]), (0x1000 << 9) + (0x1000 << 11));
        assert_eq!(linear(&[0x0f, 0x01, 0x3c, 0x95, 0, 1, 0, 0]), (0x1000 << 4) + 0x100);
        assert_eq!(linear(&[0x0f, 0x01, 0x3c, 0x25, 0, 0, 0, 0x80]), 0xffff_ffff_8000_0000);
        // [rip + 0x20], [r12 as an index]
        assert_eq!(linear(&[0x0f, 0x01, 0x3d, 0x20, 0, 0, 0]), 0x40_0007 + 0x20);
        assert_eq!(linear(&[0x42, 0x0f, 0x01, 0x3c, 0x20]), 0x1000 + (0x1000 << 12));
        // gs:[rax], fs:[rax], ds:[rax], [eax + edx] with an overflow
        assert_eq!(linear(&[0x65, 0x0f, 0x01, 0x38]), (9 << 40) + 0x1000);
        assert_eq!(linear(&[0x64, 0x0f, 0x01, 0x38]), (7 << 40) + 0x1000);
        assert_eq!(linear(&[0x3e, 0x0f, 0x01, 0x38]), 0x1000);
        assert_eq!(linear(&[0x67, 0x0f, 0x01, 0x78, 0xff]), 0xfff);
        assert_eq!(linear(&[0x67, 0x0f, 0x01, 0xb8, 0, 0, 0, 0xf0]), 0xf000_1000);
    }

    #[test]
    fn others_are_refused() {
        // swapgs, rdtscp, vmmcall, lgdt, nop, mov [rax], rcx, lock mov cr0, and prefixes without end
        for bytes in [
            &[0x0f, 0x01, 0xf8, 0x90][..],
            &[0x0f, 0x01, 0xf9, 0x90],
            &[0x0f, 0x01, 0xd9, 0x90],
            &[0x0f, 0x01, 0x10, 0x90],
            &[0x90, 0x90],
            &[0x48, 0x89, 0x08],
            &[0xf0, 0x0f, 0x20, 0xc0],
            &[0x66; 32],
        ] {
            assert_eq!(decode(bytes), None, "{bytes:x?}");
        }
    }
}
