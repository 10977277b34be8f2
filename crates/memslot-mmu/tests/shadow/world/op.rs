//! What can happen in a guest and to it, from bytes.

/// Eight bytes are one operation: any eight bytes.
pub const BYTES: usize = 8;

/// An entry of a table: where it leads and what it permits, as an operation says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EntrySpec {
    pub table: u64,
    pub index: u64,
    pub target: u64,
    pub flags: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// The guest uses an address: (write, user, fetch, AC) in the lower bits of `how`.
    Touch {
        cpu: usize,
        address: u64,
        how: u8,
    },
    /// The guest's kernel writes an entry of a table, through its map.
    Store {
        cpu: usize,
        entry: EntrySpec,
    },
    /// A device, or the VMM, writes one, and tells.
    Device {
        entry: EntrySpec,
    },
    /// A few bytes of an entry, or of two, in one page or in two: of the guest's kernel, or of a device.
    Bytes {
        cpu: Option<usize>,
        entry: EntrySpec,
        /// Where they begin, in the entry, and how many.
        offset: u64,
        len: u64,
    },
    Invlpg {
        cpu: usize,
        address: u64,
    },
    /// Registers are loaded: a root, features, an address space; without paging if that is set.
    Load {
        cpu: usize,
        root: u64,
        flags: u64,
        smm: bool,
        off: bool,
    },
    FlushGuest {
        cpu: usize,
    },
    CreateSlot {
        smm: bool,
        id: u32,
        shape: u8,
        flags: u32,
    },
    DeleteSlot {
        smm: bool,
        id: u32,
    },
    MoveSlot {
        smm: bool,
        id: u32,
        to: u64,
    },
    SlotFlags {
        smm: bool,
        id: u32,
        flags: u32,
    },
    SplitSlot {
        smm: bool,
        id: u32,
        at: u64,
        new: u32,
    },
    MergeSlots {
        smm: bool,
        low: u32,
        high: u32,
    },
    /// It grows or shrinks at its end.
    ResizeSlot {
        smm: bool,
        id: u32,
        pages: u64,
    },
    /// The same slot has another id.
    RenameSlot {
        smm: bool,
        id: u32,
        new: u32,
    },
    /// In one transaction: a slot is split in three, and the middle piece gets flags or goes.
    CutSlot {
        smm: bool,
        id: u32,
        at: u64,
        pages: u64,
        flags: Option<u32>,
    },
    Harvest,
    /// One that fails when it has re-armed some pages; what it owes is kept, or not.
    FailHarvest {
        after: u64,
        is_kept: bool,
    },
    /// In the middle of the next change of the slots, somebody else uses an address and does `what` else.
    Meanwhile {
        cpu: usize,
        address: u64,
        what: u64,
    },
    /// There is memory for so many tables until one is missing.
    NoMemory {
        tables: usize,
    },
    /// Host memory moves to another frame; with something going on meanwhile.
    MoveMemory {
        page: u64,
        meanwhile: u64,
        unreachable: bool,
    },
    HostReadOnly {
        page: u64,
        on: bool,
    },
    ZapRange {
        smm: bool,
        first: u64,
        pages: u64,
    },
    ZapAll,
    Unprotect {
        gfn: u64,
    },
    Age,
}

impl Op {
    /// What the bytes say. The commonest operations have the most values of the first byte.
    pub fn from_bytes(bytes: [u8; BYTES]) -> Self {
        let [_, a, b, c, d, e, f, g] = bytes.map(u64::from);
        let cpu = usize::from(bytes[1] & 1);
        let smm = b % 8 == 7;
        let id = |value: u64| u32::try_from([0, 1, 2, 300][usize::try_from(value % 4).unwrap()]).unwrap();
        let address = b | c << 8;
        let page = |value: u64| match value % 4 {
            0 => 512 + value / 4 * 4 % 512,
            _ => value % 48,
        };
        let flags = u32::from(bytes[4] & 3);
        let entry = EntrySpec { table: c, index: d, target: e, flags: f };
        let (offset, len) = (g >> 2 & 7, 1 + (g >> 5));
        match bytes[0] {
            80..=143 if g & 3 == 3 => {
                Self::Bytes { cpu: (bytes[0] < 112).then_some(cpu), entry, offset, len }
            }
            144..=163 if g & 3 == 3 => Self::Meanwhile { cpu, address, what: d | e << 8 | f << 16 },
            224..=230 if g & 3 == 3 => Self::FailHarvest { after: d % 3, is_kept: e & 1 != 0 },
            253..=255 if g & 1 == 1 => Self::NoMemory { tables: usize::from(bytes[4] % 6) },
            0..=79 => Self::Touch { cpu, address, how: bytes[4] },
            80..=127 => Self::Store { cpu, entry },
            128..=143 => Self::Device { entry },
            144..=163 => Self::Invlpg { cpu, address },
            164..=187 => Self::Load { cpu, root: c, flags: d & e, smm: b % 4 == 3, off: f % 16 == 15 },
            188..=191 => Self::FlushGuest { cpu },
            192..=203 => Self::CreateSlot { smm, id: id(a), shape: bytes[3], flags },
            204..=207 => Self::DeleteSlot { smm, id: id(a) },
            208..=210 => Self::MoveSlot { smm, id: id(a), to: c | d << 8 },
            211..=215 => Self::SlotFlags { smm, id: id(a), flags },
            216 => Self::RenameSlot { smm, id: id(a), new: id(a + 1 + d % 3) },
            217..=218 => Self::ResizeSlot { smm, id: id(a), pages: 1 + (c | d << 8) % 1100 },
            219..=221 => Self::SplitSlot { smm, id: id(a), at: page(c), new: id(a + 1 + d % 3) },
            222..=223 => Self::MergeSlots { smm, low: id(a), high: id(d) },
            224..=230 => Self::Harvest,
            231 => {
                let flags = (d % 5 < 4).then_some(flags);
                Self::CutSlot { smm, id: id(a), at: page(c), pages: 1 + e % 40, flags }
            }
            232..=237 => Self::MoveMemory { page: page(c), meanwhile: a | b << 8, unreachable: d % 2 == 1 },
            238..=240 => Self::HostReadOnly { page: page(c), on: a % 2 == 1 },
            241..=245 => Self::ZapRange { smm, first: page(c), pages: 1 + d },
            246..=247 => Self::ZapAll,
            248..=252 => Self::Unprotect { gfn: c % 24 },
            253..=255 => Self::Age,
        }
    }

    /// A whole program; what is left over at the end is ignored.
    pub fn program(bytes: &[u8]) -> Vec<Self> {
        let operations = bytes.chunks_exact(BYTES);
        operations.filter_map(|chunk| chunk.try_into().ok()).map(Self::from_bytes).collect()
    }
}

impl EntrySpec {
    /// The frame of the table: seldom the kernel's own.
    pub fn table(self) -> u64 {
        match self.table % 32 {
            31 => 16 + self.table / 32 % 5,
            other => 1 + other % 15,
        }
    }

    /// The entry's value, of which a page-size bit fits its address.
    pub fn value(self, size: u64) -> u64 {
        let flags = self.flags;
        // Most entries are present and permit everything.
        let mut value = 0x27 | (flags & 1) << 6;
        for (bit, at) in [(1, 0), (2, 1), (3, 2), (4, 5)] {
            // Two bits are asked, so that three of four are set.
            if flags >> bit & 1 != 0 && flags >> (bit + 1) & 1 != 0 {
                value &= !(1 << at);
            }
        }
        let target = self.target;
        if target >= 0xf0 {
            let large = [0, 0x200, 0x400, 0x400][usize::try_from(target % 4).unwrap()];
            return value | 0x80 | if size == 4 { large & 0x400 } else { large } << 12;
        }
        if target >= 0xe8 && size == 8 {
            value |= 1 << 63;
        }
        if target == 0xe7 {
            value |= if size == 8 { 1 << 51 } else { 0 };
        }
        let frame = match target % 8 {
            0..=3 => 5 + target / 4 % 11,
            4..=6 => 24 + target / 8 % 24,
            // Somewhere in the large pages, in a root, or nowhere.
            _ => [512 + target % 64, 1 + target % 4, 100 + target, 1536]
                [usize::try_from(target / 8 % 4).unwrap()],
        };
        value | frame << 12
    }
}
