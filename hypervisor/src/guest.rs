//! The guest's memory: its slots, and the tables that follow them.
//!
//! ```text
//!  0          640 KiB   1 MiB              low end                   top of the machine   4 GiB
//!  ├── RAM ──────┼─ window ─┼────── RAM ──────┤        hole           ├──── window ────────┼── RAM ──┤
//! ```
//!
//! RAM is backed by pages of the pool, in this order. The windows are the machine's own addresses: the first megabyte's ROM, then ACPI's
//! tables, interrupt controllers, timers. Nothing is in the hole.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use memslot::dirty::DirtyLog;
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Limits, Slot, SlotFlags, SlotId, SlotSpec, SlotTable,
    TransactionError,
};
use memslot_mmu::format::Access;
use memslot_mmu::shadow::{Shadow, ShadowConfig};
use memslot_mmu::{Config, DirtyMode, Fault, Level};

use crate::cpu::index;
use crate::maps::Maps;
use crate::options::Options;
use crate::paging::{Host, Mmu, Walker, census};
use crate::physical;
use crate::pool;

/// The one address space.
pub(crate) const SPACE: AddressSpaceId = AddressSpaceId::NORMAL;
/// Where high memory begins: 4 GiB, as a frame.
const HIGH: u64 = 1 << 20;
/// Frames below it are mapped one by one: among them is the page by which Linux starts its other processors, whose first use is
/// waited for.
const FIRST_AROUND: u64 = 0x100;
/// Where a page of 4 KiB is mapped, those beside it are, in groups of so many: that costs some microseconds, their own faults a
/// hundred each.
const AROUND: u64 = 16;
/// Ids of RAM slots are below this one.
pub(crate) const WINDOWS: u32 = 16;

/// A piece of RAM and the page of the pool behind its first frame.
#[derive(Clone, Copy)]
pub(crate) struct Ram {
    pub(crate) gfns: GfnRange,
    pub(crate) page: u64,
}

/// Faults by what became of them.
#[derive(Clone, Copy, Default)]
pub(crate) struct FaultCounts {
    pub(crate) mapped: [u64; 3],
    /// Pages of 4 KiB that were mapped beside one that was used.
    pub(crate) around: u64,
    pub(crate) already_mapped: u64,
    pub(crate) retry: u64,
    pub(crate) mmio: u64,
    pub(crate) other: u64,
}

/// A virtual processor's access to the tables, and what became of its faults.
pub(crate) struct Faults {
    pub(crate) walker: Walker,
    pub(crate) counts: FaultCounts,
}

/// Whether the guest can go on after a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resolved {
    /// It can.
    Yes,
    /// It tries again, and finds the same until what is changing there has changed.
    Later,
    /// There is nothing, or nothing that may be written.
    Nothing,
}

/// See the [module documentation](self).
pub(crate) struct Guest {
    pub(crate) table: SlotTable,
    pub(crate) log: DirtyLog,
    pub(crate) mmu: Mmu,
    /// What the guest's processors run on: these tables, or shadow tables beside them.
    pub(crate) maps: Maps,
    pub(crate) host: &'static Host,
    pub(crate) ram: Vec<Ram>,
    pub(crate) windows: Vec<GfnRange>,
    /// How many tables there were at first.
    tables: usize,
    /// See [`has_other_tables`](Self::has_other_tables).
    other_tables: usize,
}

/// Frames from an address up to another.
pub(crate) fn frames(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start >> 12), Gfn::new(end >> 12)).unwrap_or_default()
}

impl Guest {
    /// A guest without memory.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn new(host: &'static Host, options: &Options) -> Result<Self, &'static str> {
        let no_memory = "no memory for the guest's slot table";
        let mut table = SlotTable::new(Limits::default()).map_err(|_| no_memory)?;
        let log = DirtyLog::attach(&mut table).map_err(|_| no_memory)?;
        let config = Config {
            largest: if options.large_pages { Level::M2 } else { Level::K4 },
            log: Some(log.clone()),
            dirty: if options.dirty_bits { DirtyMode::Hardware } else { DirtyMode::WriteProtect },
            ..Config::default()
        };
        let mmu =
            Mmu::attach(&mut table, host, config).map_err(|_| "no memory for the guest's page tables")?;
        let maps = if options.shadow {
            let config = ShadowConfig {
                largest: if options.large_pages { Level::M2 } else { Level::K4 },
                pages: options.shadow_pages,
                physical_address_bits: crate::shadow::processor().physical_address_bits,
                unsync: Level::new(options.unsync).unwrap_or(Level::K4),
                log: Some(log.clone()),
                ..ShadowConfig::default()
            };
            let shadow = Shadow::attach(&mut table, host, config);
            Maps::shadow(shadow.map_err(|_| "no memory for the guest's shadow tables")?)
        } else {
            Maps::nested(&mmu)
        };
        let tables = mmu.stats().tables;
        Ok(Self {
            table,
            log,
            mmu,
            maps,
            host,
            ram: Vec::new(),
            windows: Vec::new(),
            tables,
            other_tables: 0,
        })
    }

    /// Gives it the memory of a PC: `bytes` of RAM, of which a quarter is high, and windows to the machine from `top` on.
    ///
    /// # Errors
    /// What the slot table says.
    pub(crate) fn add_memory(
        &mut self,
        bytes: u64,
        top: u64,
        flags: SlotFlags,
    ) -> Result<(), TransactionError> {
        let low_end = (bytes / 4 * 3) >> 21 << 21;
        let pieces = [
            (0, 0xa_0000, 0),
            (0x10_0000, low_end, 0x100),
            (HIGH << 12, (HIGH << 12) + bytes - low_end, low_end >> 12),
        ];
        self.ram = pieces.map(|(start, end, page)| Ram { gfns: frames(start, end), page }).into();
        self.windows = [frames(0xa_0000, 0x10_0000), frames(top, HIGH << 12)].into();
        let (ram, windows) = (&self.ram, &self.windows);
        self.table.transaction(|tx| {
            for (id, ram) in (0..).zip(ram) {
                tx.create(spec(id, ram.gfns, pool::backing(ram.page), flags))?;
            }
            for (id, &window) in (WINDOWS..).zip(windows) {
                let backing = Backing::Device { token: window.start().get() << 12 };
                tx.create(spec(id, window, backing, SlotFlags::empty()))?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// A virtual processor's own access to the tables.
    ///
    /// # Errors
    /// For want of memory.
    pub(crate) fn faults(&self) -> Result<Faults, &'static str> {
        let walker = self.mmu.walker().map_err(|_| "no memory for a walker of the guest's page tables")?;
        Ok(Faults { walker, counts: FaultCounts::default() })
    }

    /// Takes all memory away again, and looks whether anything is left behind: page tables, or frames of the pool. No
    /// [`Faults`] are left, as they have tables in reserve.
    ///
    /// # Errors
    /// What is.
    pub(crate) fn take_down(&mut self) -> Result<(), String> {
        let ids: Vec<_> = self.table.view().slots(SPACE).map(Slot::id).collect();
        let deleted = self.table.transaction(|tx| ids.iter().try_for_each(|&id| tx.delete(SPACE, id)));
        deleted.map_err(|error| format!("slots could not be deleted: {error}"))?;
        self.mmu.reclaim();
        let shadow = match self.maps {
            Maps::Nested(_) => 0,
            Maps::Shadow(shadow) => {
                shadow.check()?;
                shadow.zap_all();
                let stats = shadow.stats();
                if (stats.pages, stats.leaves) != (0, 0) {
                    return Err(format!(
                        "{} shadow pages and {} entries are left",
                        stats.pages, stats.leaves
                    ));
                }
                stats.tables
            }
        };
        let (tables, frames) = (self.mmu.stats().tables, self.host.table_frames());
        if tables != self.tables || frames != self.tables + self.other_tables + shadow {
            return Err(format!(
                "{tables} page tables are left in {frames} frames, {shadow} of them shadow tables, at first there were {}",
                self.tables
            ));
        }
        let left = census(&self.mmu).pages;
        if left != [0; 3] {
            return Err(format!("{left:?} pages are mapped without a slot"));
        }
        if !self.host.pool().is_sound() {
            return Err("a frame of the pool is lost, or in two places".into());
        }
        Ok(())
    }

    /// There are so many tables besides, for another address space, which go with the program only.
    pub(crate) fn has_other_tables(&mut self, tables: usize) {
        self.other_tables = tables;
    }

    /// How many pages of RAM it has.
    pub(crate) fn pages(&self) -> u64 {
        self.ram.iter().map(|ram| ram.gfns.len()).sum()
    }

    /// The frame behind one of RAM, as the slots and the pool say.
    pub(crate) fn frame(&self, gfn: Gfn) -> Option<u64> {
        let slot = self.table.view().slot_at(SPACE, gfn)?;
        let page = self.host.pool().page_at(slot.hva_of(gfn)?)?;
        Some(self.host.pool().frame(page))
    }

    /// Writes to the guest's memory, and marks what was written.
    ///
    /// # Errors
    /// There is no RAM.
    pub(crate) fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), &'static str> {
        let (mut at, mut rest) = (gpa, bytes);
        while !rest.is_empty() {
            let frame = self.frame(Gfn::new(at >> 12)).ok_or("this does not fit into the guest's RAM")?;
            let within = at & 0xfff;
            let (now, later) = rest.split_at(rest.len().min(index(4096 - within)));
            let to = physical::pointer::<u8>((frame << 12) + within);
            // SAFETY: a frame of the pool, which no Rust object is in; `now` ends within it.
            unsafe { core::ptr::copy_nonoverlapping(now.as_ptr(), to, now.len()) };
            self.log.mark(SPACE, Gfn::new(at >> 12));
            (at, rest) = (at + now.len() as u64, later);
        }
        Ok(())
    }
}

impl Faults {
    /// Resolves a fault, or says why not. Takes no lock: any number of virtual processors do this at the same time.
    ///
    /// # Errors
    /// For want of page tables.
    pub(crate) fn resolve(&mut self, gpa: Gpa, access: Access) -> Result<Resolved, &'static str> {
        let counts = &mut self.counts;
        match self.walker.fault(gpa, access) {
            Ok(Fault::Mapped(level)) => {
                counts.mapped[usize::from(level.get()) - 1] += 1;
                if level == Level::K4 {
                    self.map_around(gpa);
                }
            }
            Ok(Fault::AlreadyMapped) => counts.already_mapped += 1,
            Ok(Fault::Retry) => {
                counts.retry += 1;
                return Ok(Resolved::Later);
            }
            Ok(Fault::Mmio) => {
                counts.mmio += 1;
                return Ok(Resolved::Nothing);
            }
            Ok(_) => {
                counts.other += 1;
                return Ok(Resolved::Nothing);
            }
            Err(_) => return Err("no memory for a page table"),
        }
        Ok(Resolved::Yes)
    }

    /// Maps the pages beside one that was mapped just now, as far as there is memory. What cannot be had is its own fault's matter.
    fn map_around(&mut self, gpa: Gpa) {
        let first = (gpa.get() >> 12) / AROUND * AROUND;
        if first < FIRST_AROUND {
            return;
        }
        for gfn in first..first + AROUND {
            let one = GfnRange::with_len(Gfn::new(gfn), 1).unwrap_or_default();
            match self.walker.prefault(one, 1).map(|done| done.last) {
                Ok(Fault::Mapped(_)) => self.counts.around += 1,
                Ok(Fault::AlreadyMapped) => {}
                _ => return,
            }
        }
    }
}

/// A slot.
pub(crate) fn spec(id: u32, gfns: GfnRange, backing: Backing, flags: SlotFlags) -> SlotSpec {
    SlotSpec { address_space: SPACE, id: SlotId::new(id), gfns, backing, flags }
}
