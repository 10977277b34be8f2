//! A processor: walks the shadow tables as the manuals say, caches what it finds, and faults.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use memslot::AddressSpaceId;
use memslot_mmu::shadow::guest::{GuestPaging, Mode, Processor, Registers};
use memslot_mmu::shadow::{RootKind, ShadowRoot, ShadowVcpu};
use memslot_mmu::{Pfn, TableMemory};

use super::host::{Hardware, TestHost};
use crate::naive::{Found, Want};

/// A virtual processor, and the real one that it runs on.
pub struct Cpu {
    pub vcpu: ShadowVcpu<TestHost>,
    pub paging: GuestPaging,
    pub space: AddressSpaceId,
    pub tlb: usize,
    /// When everything was forgotten last, and single pages since.
    pub horizon: u64,
    pub forgotten: BTreeMap<u64, u64>,
}

impl Cpu {
    pub fn registers(&self) -> Registers {
        self.paging.registers()
    }

    pub fn processor(&self) -> Processor {
        self.paging.processor()
    }

    pub fn horizon_of(&self, address: u64) -> u64 {
        self.forgotten.get(&(address >> 12)).copied().unwrap_or(0).max(self.horizon)
    }

    /// Without long mode there are 32 bits.
    pub fn truncated(&self, address: u64) -> u64 {
        let is_long = matches!(self.paging.mode(), Mode::Level4 | Mode::Level5);
        if is_long { address } else { address & 0xffff_ffff }
    }

    /// What the processor's own registers are while the guest runs: write protection and no-execute are always on.
    fn hardware(&self) -> Registers {
        let guest = self.registers();
        let has_paging = self.paging.mode() != Mode::Off;
        let cr4 = if has_paging { guest.cr4 } else { guest.cr4 & !(3 << 20) };
        Registers { cr0: guest.cr0 | 1 << 31 | 1 << 16, cr4, ..guest }
    }

    /// Whether the processor lets this through where its tables say so.
    pub fn allows(&self, rights: Hardware, want: Want) -> bool {
        let Hardware { write, user, execute } = rights;
        let page = Found {
            gpa: 0,
            bytes: 0,
            user,
            writable: write,
            executable: execute,
            entries: vec![],
            dirty_at: 0,
        };
        page.allows(self.hardware(), want)
    }
}

/// A page in the shadow tables.
#[derive(Clone, Copy, Debug)]
pub struct HardwareLeaf {
    pub address: u64,
    pub bytes: u64,
    pub pfn: u64,
    pub rights: Hardware,
}

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

fn entry(host: &TestHost, table: u64, index: u64) -> &AtomicU64 {
    // SAFETY: the tables of a root that is not stale are not freed.
    #[allow(unsafe_code, reason = "reads tables as a processor does")]
    let table = unsafe { host.reach(Pfn::new(table)).as_ref() };
    &table.0[usize::try_from(index).unwrap()]
}

fn levels(root: ShadowRoot) -> u32 {
    match root.kind {
        RootKind::Level4 => 4,
        RootKind::Level5 => 5,
        RootKind::Pae => 3,
    }
}

/// How wide the processor's physical addresses are.
pub const PHYSICAL_ADDRESS_BITS: u8 = 48;

/// Whether a reserved bit is set in an entry that is present: an access through it faults and says so.
fn is_reserved(value: u64) -> bool {
    value & 1 != 0 && value >> PHYSICAL_ADDRESS_BITS & 0xf != 0
}

/// Reads one entry: `None` if it is not present, or broken; whether it leads to a table; what the three rights are.
fn read(value: u64, level: u32, kind: RootKind) -> Option<(bool, Hardware)> {
    if value & 1 == 0 || is_reserved(value) {
        assert!(value & 1 == 0 || level == 1, "reserved bits at level {level}: {value:#x}");
        return None;
    }
    if kind == RootKind::Pae && level == 3 {
        // A register of its own kind, where the bits that would be rights are reserved.
        assert_eq!(value & !(ADDRESS | 0xe19), 0, "PDPTE {value:#x}");
        return Some((true, Hardware { write: true, user: true, execute: true }));
    }
    let rights = Hardware { write: value & 2 != 0, user: value & 4 != 0, execute: value >> 63 == 0 };
    let is_table = level > 1 && value & 0x80 == 0;
    assert!(is_table || level <= 3, "no page is larger than 1 GiB: {value:#x}");
    assert!(kind != RootKind::Pae || value >> 52 & 0x7ff == 0, "reserved in PAE tables: {value:#x}");
    Some((is_table, rights))
}

fn both(a: Hardware, b: Hardware) -> Hardware {
    Hardware { write: a.write && b.write, user: a.user && b.user, execute: a.execute && b.execute }
}

const ALL: Hardware = Hardware { write: true, user: true, execute: true };

/// The processor's walk: `Err` where nothing is present, and whether that is so because of a reserved bit. Where what it finds is `allowed`, it sets the accessed bit, and the dirty bit for a `write`.
pub fn hardware_walk(
    host: &TestHost,
    root: ShadowRoot,
    address: u64,
    write: bool,
    allowed: impl Fn(Hardware) -> bool,
) -> Result<HardwareLeaf, bool> {
    let mut level = levels(root);
    let mut table = root.pfn.get();
    let mut rights = ALL;
    loop {
        let shift = 12 + 9 * (level - 1);
        let index = address >> shift & if level == 3 && root.kind == RootKind::Pae { 3 } else { 511 };
        let entry = entry(host, table, index);
        let value = entry.load(Ordering::SeqCst);
        let (is_table, own) = read(value, level, root.kind).ok_or_else(|| is_reserved(value))?;
        rights = both(rights, own);
        if !is_table {
            let bytes = 1u64 << shift;
            if allowed(rights) {
                entry.fetch_or(if write { 0x60 } else { 0x20 }, Ordering::SeqCst);
            }
            let base = value & ADDRESS;
            assert_eq!(base & (bytes - 1), 0, "{value:#x} is not aligned at level {level}");
            let pfn = (base + (address & (bytes - 1))) >> 12;
            return Ok(HardwareLeaf { address: address & !0xfff, bytes: 4096, pfn, rights });
        }
        table = (value & ADDRESS) >> 12;
        level -= 1;
    }
}

/// Every page that can be reached from a root.
pub fn all_leaves(host: &TestHost, root: ShadowRoot) -> Vec<HardwareLeaf> {
    let mut leaves = Vec::new();
    collect(host, root, (root.pfn.get(), levels(root)), 0, ALL, &mut leaves);
    leaves
}

fn collect(
    host: &TestHost,
    root: ShadowRoot,
    (table, level): (u64, u32),
    base: u64,
    rights: Hardware,
    leaves: &mut Vec<HardwareLeaf>,
) {
    let shift = 12 + 9 * (level - 1);
    let entries = if level == 3 && root.kind == RootKind::Pae { 4 } else { 512 };
    for index in 0..entries {
        let value = entry(host, table, index).load(Ordering::SeqCst);
        let Some((is_table, own)) = read(value, level, root.kind) else { continue };
        let mut address = base | index << shift;
        let top = 12 + 9 * levels(root);
        if root.kind != RootKind::Pae && address >> (top - 1) & 1 != 0 {
            address |= u64::MAX << top;
        }
        let rights = both(rights, own);
        if is_table {
            collect(host, root, ((value & ADDRESS) >> 12, level - 1), address, rights, leaves);
        } else {
            leaves.push(HardwareLeaf { address, bytes: 1 << shift, pfn: (value & ADDRESS) >> 12, rights });
        }
    }
}
