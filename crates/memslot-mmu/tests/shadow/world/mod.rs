//! A guest with shadow tables, and everything that is needed to see whether they are right.

pub mod check;
pub mod cpu;
pub mod history;
pub mod host;
pub mod layout;
pub mod meanwhile;
pub mod op;
pub mod run;

use std::collections::{BTreeMap, BTreeSet};

use memslot::dirty::{Consumer, DirtyLog};
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, Hva, HvaRange, Limits, Slot, SlotFlags, SlotId, SlotSpec,
    SlotTable,
};
use memslot_mmu::shadow::guest::{
    EntrySize, Exchange, GuestAccess, GuestPaging, GuestTables, Mode, Processor,
};
use memslot_mmu::shadow::{Shadow, ShadowConfig, ShadowFault};

use crate::naive::{Found, Source, Want, naive_walk};
use cpu::{Cpu, hardware_walk};
use history::History;
use host::{Cached, HVA, TestHost};
use layout::{END, LARGE, Layout, SMALL};
use meanwhile::{Meanwhile, Others};

pub const RAM: AddressSpaceId = AddressSpaceId::NORMAL;
pub const SMM: AddressSpaceId = AddressSpaceId::SMM;

/// What became of a use of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touched {
    /// It went to this frame of the host.
    Done(u64),
    /// The guest got a page fault with this error code.
    Fault(u32),
    /// One of its tables is in no memory; it may have a page fault with this error code.
    NoTable(u32),
    /// It is no memory, or read-only.
    Mmio(u64),
    /// The host has refused it.
    Denied,
    /// The write was emulated, to the guest's memory at this address.
    Emulated(u64),
    /// Something is changing, and goes on to.
    Retry,
}

pub struct World {
    pub meanwhile: Meanwhile,
    pub others: Others,
    pub layout: Layout,
    pub table: SlotTable,
    pub log: DirtyLog,
    pub consumer: Consumer,
    pub host: TestHost,
    pub shadow: Shadow<TestHost>,
    pub cpus: Vec<Cpu>,
    pub now: u64,
    pub history: History,
    /// Frames of logged slots that were written since the last harvest, with the host memory they were written in.
    pub written: BTreeMap<(AddressSpaceId, u64), Hva>,
    /// Frames that were read-only, or no memory, at any time: accessed and dirty bits of tables there may be missing.
    pub unmarked: BTreeSet<(AddressSpaceId, u64)>,
    /// Whether writes to tables that stay protected are emulated; else the tables are given up.
    pub emulates: bool,
}

/// Guest memory as it is now.
pub struct Now<'a> {
    world: &'a World,
    space: AddressSpaceId,
}

impl Source for Now<'_> {
    fn entry(&self, gpa: u64, size: EntrySize) -> Option<u64> {
        let (slot, pfn) = self.world.resolve(self.space, gpa >> 12)?;
        if self.world.host.is_mmio(slot.hva_of(Gfn::new(gpa >> 12))?.get()) {
            return None;
        }
        let word = self.world.host.read(pfn, usize::try_from(gpa % 4096 / 8).unwrap());
        Some(match size {
            EntrySize::Eight => word,
            EntrySize::Four => word >> (gpa % 8 * 8) & 0xffff_ffff,
        })
    }
}

impl GuestTables for Now<'_> {
    type Error = std::convert::Infallible;

    fn read(&self, gpa: Gpa, size: EntrySize) -> Result<Option<u64>, Self::Error> {
        Ok(self.entry(gpa.get(), size))
    }

    fn exchange(&self, _: Gpa, _: EntrySize, _: u64, _: u64) -> Result<Exchange, Self::Error> {
        unreachable!("only read")
    }
}

pub fn slot(space: AddressSpaceId, id: u32, gfns: GfnRange, page: u64, flags: SlotFlags) -> SlotSpec {
    SlotSpec {
        address_space: space,
        id: SlotId::new(id),
        gfns,
        backing: Backing::Host { hva: Hva::new(HVA + (page << 12)) },
        flags,
    }
}

pub fn range(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first), pages).unwrap()
}

/// A page of host memory.
pub fn page_of(hva: u64) -> HvaRange {
    HvaRange::with_len(Hva::new(hva), 4096).unwrap()
}

impl World {
    /// A guest with these tables, two processors, and memory in both address spaces.
    pub fn new(mode: Mode, config: ShadowConfig) -> Self {
        let mut world = Self::without_tables(mode, config);
        for (gpa, entry) in world.layout.tables() {
            world.poke(RAM, gpa, entry);
        }
        world.note();
        for cpu in 0..2 {
            world.load(cpu, cpu as u64, 0, RAM, false);
        }
        world
    }

    /// The same with memory that is all 0, and nothing loaded.
    #[expect(clippy::needless_pass_by_value, reason = "as `new`")]
    pub fn without_tables(mode: Mode, config: ShadowConfig) -> Self {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let consumer = log.consumer().unwrap();
        let others = Others::new(log.consumer().unwrap());
        let meanwhile = Meanwhile::default();
        table.add_listener(Box::new(meanwhile.clone())).unwrap();
        let host = TestHost::default();
        let physical_address_bits = cpu::PHYSICAL_ADDRESS_BITS;
        let config = ShadowConfig { log: Some(log.clone()), physical_address_bits, ..config };
        let shadow = Shadow::attach(&mut table, host.clone(), config).unwrap();
        let none = SlotFlags::empty();
        table.create(slot(RAM, 0, range(0, SMALL), 0, none)).unwrap();
        table.create(slot(RAM, 1, range(LARGE, END - LARGE), LARGE, none)).unwrap();
        table.create(slot(SMM, 0, range(0, SMALL), 0, none)).unwrap();
        let layout = Layout { mode };
        let paging = GuestPaging::new(layout.registers(0, 0), Processor::default());
        let cpus = (0..2).map(|_| Cpu {
            vcpu: shadow.vcpu().unwrap(),
            paging,
            space: RAM,
            tlb: host.add_tlb(),
            horizon: 0,
            forgotten: BTreeMap::new(),
        });
        let cpus = cpus.collect();
        let (now, history, written, unmarked) = (0, History::default(), BTreeMap::new(), BTreeSet::new());
        let mut world = Self {
            meanwhile,
            others,
            layout,
            table,
            log,
            consumer,
            host,
            shadow,
            cpus,
            now,
            history,
            written,
            unmarked,
            emulates: true,
        };
        world.note();
        world
    }

    /// The slot that has a frame, and the frame of the host behind it.
    pub fn resolve(&self, space: AddressSpaceId, gfn: u64) -> Option<(&Slot, u64)> {
        let slot = self.table.view().slot_at(space, Gfn::new(gfn))?;
        let hva = slot.hva_of(Gfn::new(gfn))?;
        Some((slot, self.host.pfn(hva.get())))
    }

    /// Takes down what guest memory is now.
    pub fn note(&mut self) {
        for space in [RAM, SMM] {
            // Where tables are, and a few frames of the large pages.
            for gfn in (0..SMALL).chain(LARGE..LARGE + 64) {
                let found = self.resolve(space, gfn);
                let pfn = found.map(|(_, pfn)| pfn);
                if found.is_none_or(|(slot, _)| slot.flags().contains(SlotFlags::READONLY)) {
                    self.unmarked.insert((space, gfn));
                }
                self.history.note_backing(space.get(), gfn, pfn, self.now);
            }
        }
        self.history.note_memory(&self.host, self.now);
    }

    pub fn peek(&self, space: AddressSpaceId, gpa: u64) -> Option<u64> {
        Now { world: self, space }.entry(gpa, self.layout.size())
    }

    /// Writes an entry into guest memory, if there is any.
    pub fn poke(&mut self, space: AddressSpaceId, gpa: u64, value: u64) -> bool {
        let Some((_, pfn)) = self.resolve(space, gpa >> 12) else { return false };
        self.write_entry(pfn, gpa, value);
        true
    }

    fn write_entry(&self, pfn: u64, gpa: u64, value: u64) {
        let word = usize::try_from(gpa % 4096 / 8).unwrap();
        let value = match self.layout.size() {
            EntrySize::Eight => value,
            EntrySize::Four => {
                let shift = gpa % 8 * 8;
                self.host.read(pfn, word) & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift
            }
        };
        self.host.write(pfn, word, value);
    }

    /// Loads registers; whether the processor has taken them.
    pub fn load(&mut self, cpu: usize, root: u64, flags: u64, space: AddressSpaceId, off: bool) -> bool {
        let layout = if off { Layout { mode: Mode::Off } } else { self.layout };
        let mut paging = GuestPaging::new(layout.registers(root, flags), Processor::default());
        if paging.load_pdptes(&Now { world: self, space }).unwrap().is_err() {
            return false;
        }
        self.with_memory(|world| world.cpus[cpu].vcpu.load(paging, space));
        let this = &mut self.cpus[cpu];
        (this.paging, this.space, this.horizon) = (paging, space, self.now);
        this.forgotten.clear();
        self.host.forget_all(this.tlb);
        true
    }

    pub fn invlpg(&mut self, cpu: usize, address: u64) {
        let this = &mut self.cpus[cpu];
        let address = this.truncated(address);
        this.vcpu.invlpg(address);
        this.forgotten.insert(address >> 12, self.now);
        self.host.forget(this.tlb, address >> 12);
    }

    pub fn flush_guest(&mut self, cpu: usize) {
        let this = &mut self.cpus[cpu];
        this.vcpu.flush_guest();
        this.horizon = self.now;
        this.forgotten.clear();
        self.host.forget_all(this.tlb);
    }

    /// What the guest's tables say now.
    pub fn naive(&self, cpu: usize, address: u64, want: Want) -> Result<Found, u32> {
        let cpu = &self.cpus[cpu];
        if cpu.paging.mode() == Mode::Off {
            return Ok(identity(address));
        }
        let source = Now { world: self, space: cpu.space };
        naive_walk(&source, cpu.registers(), cpu.processor(), cpu.paging.pdptes(), address, want)
    }

    /// The frames of the guest that are in a frame of the host.
    pub fn gfns_of(&self, space: AddressSpaceId, pfn: u64) -> Vec<u64> {
        let Some(hva) = self.host.hva(pfn) else { return vec![] };
        let hits = self.table.view().slots_at_hva(space, page_of(hva));
        hits.map(|hit| hit.gfns.start().get()).collect()
    }

    /// The processor writes to a frame of the host: what is logged must be found there.
    fn wrote_frame(&mut self, space: AddressSpaceId, pfn: u64) {
        for gfn in self.gfns_of(space, pfn) {
            if let Some((slot, _)) = self.resolve(space, gfn) {
                if slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) {
                    let hva = slot.hva_of(Gfn::new(gfn)).unwrap();
                    self.written.insert((space, gfn), hva);
                }
            }
        }
    }

    /// The processor uses an address, as often as it takes.
    pub fn touch(&mut self, cpu: usize, address: u64, want: Want) -> Touched {
        let address = self.cpus[cpu].truncated(address);
        let mut last = None;
        for _ in 0..12 {
            if self.cpus[cpu].vcpu.is_stale() {
                self.with_memory(|world| world.cpus[cpu].vcpu.reload());
                self.host.forget_all(self.cpus[cpu].tlb);
            }
            let is_reserved = match self.translate(cpu, address, want) {
                Ok(pfn) => {
                    if want.write {
                        self.wrote_frame(self.cpus[cpu].space, pfn);
                    }
                    return Touched::Done(pfn);
                }
                Err(is_reserved) => is_reserved,
            };
            let expected = self.naive(cpu, address, want);
            let space = self.cpus[cpu].space;
            let mut access = access(want);
            access.set(GuestAccess::RESERVED, is_reserved);
            let fault = self.with_memory(|world| world.cpus[cpu].vcpu.fault(address, access));
            // Accessed and dirty bits are writes of the guest's.
            for pfn in self.history.note_memory(&self.host, self.now) {
                self.wrote_frame(space, pfn);
            }
            match fault {
                // Maybe of what the tables said before: whether that is allowed is looked at with everything that is granted.
                ShadowFault::Mapped(_) | ShadowFault::AlreadyMapped => {}
                ShadowFault::Inject(fault) => {
                    assert_eq!(fault.address, address);
                    assert_eq!(Err(fault.error_code.bits()), expected, "{fault}");
                    return Touched::Fault(fault.error_code.bits());
                }
                ShadowFault::NoTable { entry, fault } => {
                    assert_eq!(fault.address, address);
                    assert_eq!(Err(fault.error_code.bits()), expected, "{fault}");
                    let what = self.resolve(space, entry.get() >> 12);
                    let is_there = what.is_some_and(|(slot, _)| {
                        !self.host.is_mmio(slot.hva_of(Gfn::new(entry.get() >> 12)).unwrap().get())
                    });
                    assert!(!is_there, "there is a table at {entry}");
                    return Touched::NoTable(fault.error_code.bits());
                }
                ShadowFault::Mmio(gpa) => {
                    let is_now = expected.as_ref().is_ok_and(|found| found.gpa == gpa.get());
                    let was = || {
                        is_reserved
                            && self
                                .pasts(cpu, address)
                                .iter()
                                .any(|past| self.was_marked(cpu, past, gpa.get(), want))
                    };
                    assert!(is_now || was(), "{gpa}, and the guest's tables say {expected:x?}");
                    let gfn = Gfn::new(gpa.get() >> 12);
                    let slot = self.table.view().slot_at(space, gfn);
                    let is_memory = |slot: &Slot| {
                        let is_read_only = slot.flags().contains(SlotFlags::READONLY);
                        !(want.write && is_read_only || self.host.is_mmio(slot.hva_of(gfn).unwrap().get()))
                    };
                    assert!(!slot.is_some_and(is_memory), "{gpa} is memory");
                    return Touched::Mmio(gpa.get());
                }
                ShadowFault::WriteTracked(gpa) => {
                    assert!(want.write);
                    assert_eq!(gpa.get(), expected.expect("it may write").gpa);
                    if self.emulates {
                        return Touched::Emulated(gpa.get());
                    }
                    assert!(self.shadow.unprotect(Gfn::new(gpa.get() >> 12)), "{gpa} is no table");
                }
                ShadowFault::Denied(gpa) => {
                    let found = expected.expect("the guest allows it");
                    assert_eq!(gpa.get(), found.gpa);
                    let (slot, _) = self.resolve(space, gpa.get() >> 12).expect("there is memory");
                    let hva = slot.hva_of(Gfn::new(gpa.get() >> 12)).unwrap();
                    assert!(want.write && self.host.is_read_only(hva.get()), "{gpa} is not denied");
                    return Touched::Denied;
                }
                ShadowFault::Retry => {}
            }
            last = Some(fault);
        }
        assert_eq!(last, Some(ShadowFault::Retry), "no progress at {address:#x} with {want:?}");
        Touched::Retry
    }

    /// What the processor does by itself: from what it has cached, or through the tables.
    /// Otherwise: whether the tables have a reserved bit there.
    fn translate(&mut self, cpu: usize, address: u64, want: Want) -> Result<u64, bool> {
        let this = &self.cpus[cpu];
        if let Some(cached) = self.host.cached(this.tlb, address >> 12) {
            if this.allows(cached.rights, want) {
                return Ok(cached.pfn);
            }
            self.host.forget(this.tlb, address >> 12);
        }
        let allowed = |rights| this.allows(rights, want);
        let found = hardware_walk(&self.host, this.vcpu.root().unwrap(), address, want.write, allowed);
        let leaf = found?;
        if !allowed(leaf.rights) {
            return Err(false);
        }
        let gfns = [RAM, SMM].iter().flat_map(|space| self.gfns_of(*space, leaf.pfn)).collect();
        self.host.cache(this.tlb, address >> 12, Cached { pfn: leaf.pfn, rights: leaf.rights, gfns });
        Ok(leaf.pfn)
    }

    /// The guest's kernel writes an entry of a table through its map.
    pub fn store(&mut self, cpu: usize, gpa: u64, value: u64) -> Touched {
        let address = self.layout.kernel_address(gpa);
        let address = if self.cpus[cpu].paging.mode() == Mode::Off { gpa } else { address };
        let touched = self.touch(cpu, address, WRITE);
        match touched {
            Touched::Done(pfn) => self.write_entry(pfn, gpa, value),
            Touched::Emulated(gpa) => self.device_write(self.cpus[cpu].space, gpa, value),
            _ => {}
        }
        touched
    }

    /// Somebody else writes an entry: marks it, writes it, and tells.
    pub fn device_write(&mut self, space: AddressSpaceId, gpa: u64, value: u64) {
        self.log.mark(space, Gfn::new(gpa >> 12));
        if self.poke(space, gpa, value) {
            self.shadow.wrote(space, Gpa::new(gpa), self.layout.size().bytes());
        }
    }

    /// Somebody else writes bytes anywhere: marks them, writes them, and tells.
    pub fn device_bytes(&mut self, space: AddressSpaceId, gpa: u64, bytes: &[u8]) {
        for (at, &byte) in (gpa..).zip(bytes) {
            self.log.mark(space, Gfn::new(at >> 12));
            if let Some((_, pfn)) = self.resolve(space, at >> 12) {
                self.write_byte(pfn, at, byte);
            }
        }
        self.shadow.wrote(space, Gpa::new(gpa), bytes.len() as u64);
    }

    fn write_byte(&self, pfn: u64, gpa: u64, byte: u8) {
        let word = usize::try_from(gpa % 4096 / 8).unwrap();
        let mut value = self.host.read(pfn, word).to_le_bytes();
        value[usize::try_from(gpa % 8).unwrap()] = byte;
        self.host.write(pfn, word, u64::from_le_bytes(value));
    }

    /// The guest's kernel writes bytes through its map, which may be in two pages: both must be writable before any is written.
    pub fn store_bytes(&mut self, cpu: usize, gpa: u64, bytes: &[u8]) {
        let address = |this: &Self, gpa| {
            if this.cpus[cpu].paging.mode() == Mode::Off { gpa } else { this.layout.kernel_address(gpa) }
        };
        let last = gpa + bytes.len() as u64 - 1;
        let mut emulated = None;
        for at in [gpa, last] {
            match self.touch(cpu, address(self, at), WRITE) {
                Touched::Done(_) => {}
                Touched::Emulated(_) => emulated = Some(self.cpus[cpu].space),
                _ => return,
            }
        }
        if let Some(space) = emulated {
            return self.device_bytes(space, gpa, bytes);
        }
        for (at, &byte) in (gpa..).zip(bytes) {
            // As the processor would: where the other page's fault has taken this one away again, it is done anew.
            let Touched::Done(pfn) = self.touch(cpu, address(self, at), WRITE) else { return };
            self.write_byte(pfn, at, byte);
        }
    }

    /// Harvests the dirty log; everything that was written must be in it.
    pub fn harvest(&mut self) -> Vec<(AddressSpaceId, u64)> {
        let mut rearm = self.shadow.dirty_rearm().unwrap();
        let harvest = self.consumer.harvest(&mut rearm).unwrap();
        let mut dirty = Vec::new();
        for run in harvest.runs() {
            let space = run.address_space;
            dirty.extend((run.gfns.start().get()..run.gfns.end().get()).map(|gfn| (space, gfn)));
        }
        harvest.commit();
        let missing: Vec<_> = self.written.keys().filter(|frame| !dirty.contains(frame)).collect();
        assert!(missing.is_empty(), "written and not harvested: {missing:?}");
        self.written.clear();
        dirty
    }

    /// The slots have changed: what is not logged any more need not be found, and what is elsewhere is to be found there.
    pub fn slots_changed(&mut self) {
        for ((space, _), hva) in std::mem::take(&mut self.written) {
            let hits = self.table.view().slots_at_hva(space, page_of(hva.get()));
            let logged = hits.filter(|hit| hit.slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES));
            self.written.extend(logged.map(|hit| ((space, hit.gfns.start().get()), hva)));
        }
    }
}

/// Without paging.
pub fn identity(address: u64) -> Found {
    let gpa = address & 0xffff_ffff;
    Found { gpa, bytes: 4096, user: true, writable: true, executable: true, entries: vec![], dirty_at: 0 }
}

pub const READ: Want = Want { write: false, user: false, fetch: false, ac: false };
pub const WRITE: Want = Want { write: true, ..READ };

pub fn access(want: Want) -> GuestAccess {
    let mut access = GuestAccess::empty();
    access.set(GuestAccess::WRITE, want.write);
    access.set(GuestAccess::USER, want.user);
    access.set(GuestAccess::FETCH, want.fetch);
    access.set(GuestAccess::AC, want.ac);
    access
}
