//! Runs operations.

use memslot::{AddressSpaceId, Gfn, Hva, HvaRange, SlotFlags, SlotId};

use memslot_mmu::Level;
use memslot_mmu::shadow::ShadowConfig;
use memslot_mmu::shadow::guest::Mode;

use super::host::HVA;
use super::layout::{END, LARGE, SMALL};
use super::op::{EntrySpec, Op};
use super::{RAM, SMM, World, page_of, range, slot};
use crate::naive::Want;

/// A guest and its program from any bytes: the first says what guest, eight more are an operation each. No more than so
/// many operations are run.
pub fn run_bytes(bytes: &[u8], most: usize) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let mode = [Mode::Level4, Mode::Bits32, Mode::Pae, Mode::Level4][usize::from(first & 3)];
    let unsync = [Level::K4, Level::M2, Level::G1, Level::new(5).unwrap()][usize::from(first >> 2 & 3)];
    let largest = [Level::K4, Level::G1][usize::from(first >> 4 & 1)];
    let hold = [ShadowConfig::default().hold, 1][usize::from(first >> 6 & 1)];
    let config = ShadowConfig { unsync, largest, hold, pages: 64, ..ShadowConfig::default() };
    let mut world = World::new(mode, config);
    world.emulates = first >> 5 & 1 != 0;
    let mut program = Op::program(rest);
    program.truncate(most);
    world.run(&program);
}

fn space(smm: bool) -> AddressSpaceId {
    if smm { SMM } else { RAM }
}

impl World {
    /// Runs a program; after each operation everything is checked.
    pub fn run(&mut self, program: &[Op]) {
        for op in program {
            self.step(op);
            self.check();
        }
    }

    /// One operation.
    pub fn step(&mut self, op: &Op) {
        self.now += 1;
        self.apply(op);
        self.note();
    }

    fn entry(&self, spec: EntrySpec) -> (u64, u64) {
        let size = self.layout.size().bytes();
        let index = match spec.index {
            255 => self.layout.kernel_index(),
            254 => spec.index / 8,
            other => self.layout.index(other),
        };
        ((spec.table() << 12) + index * size, spec.value(size))
    }

    /// Whether the operation takes no frame's backing away: what small pages map must stay.
    fn must_keep(op: &Op) -> bool {
        matches!(op, Op::SplitSlot { .. } | Op::MergeSlots { .. } | Op::RenameSlot { .. })
            || matches!(op, Op::SlotFlags { .. } | Op::CutSlot { flags: Some(_), .. })
    }

    /// A change of the slots.
    fn change(&mut self, op: &Op) {
        let is_small = self.shadow.config().largest == Level::K4 && !self.meanwhile.is_planned();
        let before = self.shadow.stats().leaves;
        let pages = self.total_pages();
        let slots = self.table.snapshot();
        self.change_slots(op);
        self.slots_changed();
        self.wrote_meanwhile(&slots);
        let grows = matches!(op, Op::ResizeSlot { .. }) && self.total_pages() >= pages;
        if is_small && (grows || Self::must_keep(op)) {
            assert_eq!(self.shadow.stats().leaves, before, "{op:?} has not kept what is mapped");
        }
    }

    fn total_pages(&self) -> u64 {
        let view = self.table.view();
        [RAM, SMM].into_iter().flat_map(|space| view.slots(space)).map(memslot::Slot::pages).sum()
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Touch { cpu, address, how } => {
                let bit = |bit: u8| how >> bit & 1 != 0;
                let want =
                    Want { write: bit(0) && !bit(2), user: bit(1), fetch: bit(2) && bit(3), ac: bit(4) };
                let address = if how >= 0xf0 { address << 12 } else { self.layout.address(address) };
                if let super::Touched::Emulated(gpa) = self.touch(cpu, address, want) {
                    // What is written is what is there.
                    let gpa = gpa & !7;
                    let space = self.cpus[cpu].space;
                    let value = self.peek(space, gpa).unwrap_or(0);
                    self.device_write(space, gpa, value);
                }
            }
            Op::Store { cpu, entry } => {
                let (gpa, value) = self.entry(entry);
                self.store(cpu, gpa, value);
            }
            Op::Device { entry } => {
                let (gpa, value) = self.entry(entry);
                self.device_write(RAM, gpa, value);
            }
            Op::Bytes { cpu, entry, offset, len } => {
                let (gpa, value) = self.entry(entry);
                // So that it lies over this entry and the next, where it is long enough.
                let bytes = [value.to_le_bytes(), value.to_le_bytes()].concat();
                let from = usize::try_from(offset).unwrap();
                let bytes = &bytes[from..from + usize::try_from(len).unwrap()];
                match cpu {
                    Some(cpu) => self.store_bytes(cpu, gpa + offset, bytes),
                    None => self.device_bytes(RAM, gpa + offset, bytes),
                }
            }
            Op::Invlpg { cpu, address } => self.invlpg(cpu, self.layout.address(address)),
            Op::Load { cpu, root, flags, smm, off } => {
                self.load(cpu, root, flags, space(smm), off);
            }
            Op::FlushGuest { cpu } => self.flush_guest(cpu),
            Op::Harvest => {
                self.harvest();
            }
            Op::FailHarvest { after, is_kept } => self.fail_harvest(after, is_kept),
            Op::Meanwhile { cpu, address, what } => self.plan(cpu, self.layout.address(address), what),
            Op::NoMemory { tables } => self.host.user.set_tables_left(tables),
            Op::MoveMemory { page, meanwhile, unreachable } => self.move_memory(page, meanwhile, unreachable),
            Op::HostReadOnly { page, on } => {
                let hva = HVA + (page << 12);
                let shadow = self.shadow.clone();
                let invalidation = shadow.invalidate_hva(page_of(hva)).unwrap();
                self.host.set_read_only(hva, on);
                invalidation.end();
            }
            Op::ZapRange { smm, first, pages } => self.shadow.zap_gfn_range(space(smm), range(first, pages)),
            Op::ZapAll => self.shadow.zap_all(),
            Op::Unprotect { gfn } => {
                self.shadow.unprotect(Gfn::new(gfn));
            }
            Op::Age => {
                self.shadow.ager().unwrap().age(RAM, range(0, END));
            }
            _ => self.change(op),
        }
    }

    /// The host moves a page, with an access in the middle.
    fn move_memory(&mut self, page: u64, meanwhile: u64, unreachable: bool) {
        let hva = HVA + (page << 12);
        let shadow = self.shadow.clone();
        let invalidation = shadow.invalidate_hva(page_of(hva)).unwrap();
        self.host.set_changing(hva, unreachable);
        let want = Want { write: meanwhile & 1 != 0, user: false, fetch: false, ac: true };
        self.touch(0, self.layout.address(meanwhile >> 1), want);
        // What it has mapped meanwhile is not of that page.
        let pfn = self.host.pfn(hva);
        for cpu in &self.cpus {
            assert!(self.host.tlb(cpu.tlb).values().all(|cached| cached.pfn != pfn), "{page:#x} is used");
        }
        self.host.move_page(hva);
        self.host.set_changing(hva, false);
        invalidation.end();
    }

    /// Whether memory would be at two places of the guest: nobody tracks tables through aliases. That it is at the same place in both address
    /// spaces is as it should be.
    fn would_be_aliased(&self, smm: bool, (first, pages): (u64, u64), hva: Hva) -> bool {
        let hvas = HvaRange::with_len(hva, pages << 12).unwrap();
        [RAM, SMM].into_iter().any(|other| {
            self.table.view().slots_at_hva(other, hvas).any(|hit| {
                let base = hit.slot.hva_of(hit.slot.base_gfn()).unwrap().get() >> 12;
                let offset = base.wrapping_sub(hit.slot.base_gfn().get());
                other == space(smm) || offset != (hva.get() >> 12).wrapping_sub(first)
            })
        })
    }

    /// Changes that the table refuses change nothing.
    fn change_slots(&mut self, op: &Op) {
        let id = SlotId::new;
        let flags = |bits: u32| SlotFlags::from_bits_truncate(bits);
        let _ = match *op {
            Op::CreateSlot { smm, id, shape, flags: bits } => {
                let (gfns, page) = match shape % 8 {
                    0 => (range(0, SMALL), 0),
                    1 => (range(0, 24), 0),
                    2 => (range(24, SMALL - 24), 24),
                    3 => (range(8, 20), 8),
                    4 => (range(LARGE, END - LARGE), LARGE),
                    5 => (range(LARGE + 3, 700), LARGE + 3),
                    6 => (range(24, 24), 2048),
                    // A guest's large page is none of the host's.
                    _ => (range(LARGE, END - LARGE), 4097),
                };
                let place = (gfns.start().get(), gfns.len());
                if self.would_be_aliased(smm, place, Hva::new(HVA + (page << 12))) {
                    return;
                }
                self.table.create(slot(space(smm), id, gfns, page, flags(bits)))
            }
            Op::DeleteSlot { smm, id: number } => self.table.delete(space(smm), id(number)),
            Op::MoveSlot { smm, id: number, to } => {
                let Some(slot) = self.table.view().slot(space(smm), id(number)) else { return };
                let to = if slot.pages() > SMALL { LARGE + to % 64 } else { to % SMALL };
                // In the other address space it would stay where it is.
                let page = slot.hva_of(slot.base_gfn()).unwrap().get();
                let hvas = HvaRange::with_len(Hva::new(page), slot.pages() << 12).unwrap();
                if self.table.view().slots_at_hva(space(!smm), hvas).next().is_some() {
                    return;
                }
                self.table.move_to(space(smm), id(number), Gfn::new(to))
            }
            Op::SlotFlags { smm, id: number, flags: bits } => self.table.transaction(|tx| {
                tx.set_read_only(space(smm), id(number), flags(bits).contains(SlotFlags::READONLY))?;
                tx.set_flags(space(smm), id(number), flags(bits))
            }),
            Op::SplitSlot { smm, id: number, at, new } => {
                self.table.transaction(|tx| tx.split(space(smm), id(number), Gfn::new(at), id(new)))
            }
            Op::MergeSlots { smm, low, high } => {
                self.table.transaction(|tx| tx.merge(space(smm), id(low), id(high)))
            }
            Op::ResizeSlot { smm, id: number, pages } => {
                let Some(slot) = self.table.view().slot(space(smm), id(number)) else { return };
                let (first, had) = (slot.base_gfn().get(), slot.pages());
                let pages = pages.min(if first < SMALL { SMALL } else { END } - first);
                let hva = slot.hva_of(slot.base_gfn()).unwrap();
                if let Some(more @ 1..) = pages.checked_sub(had) {
                    let hva = Hva::new(hva.get() + (had << 12));
                    if self.would_be_aliased(smm, (first + had, more), hva) {
                        return;
                    }
                }
                self.table.transaction(|tx| tx.resize(space(smm), id(number), pages))
            }
            Op::RenameSlot { smm, id: number, new } => {
                let Some(slot) = self.table.view().slot(space(smm), id(number)) else { return };
                let spec = memslot::SlotSpec { id: id(new), ..slot.spec() };
                self.table.transaction(|tx| {
                    tx.delete(space(smm), id(number))?;
                    tx.create(spec)
                })
            }
            Op::CutSlot { smm, id: number, at, pages, flags: bits } => {
                let (space, middle, right) = (space(smm), id(2), id(300));
                self.table.transaction(|tx| {
                    tx.split(space, id(number), Gfn::new(at), middle)?;
                    tx.split(space, middle, Gfn::new(at + pages), right)?;
                    match bits {
                        Some(bits) => {
                            let is_read_only = flags(bits).contains(SlotFlags::READONLY);
                            tx.set_read_only(space, middle, is_read_only)?;
                            tx.set_flags(space, middle, flags(bits))
                        }
                        None => tx.delete(space, middle),
                    }
                })
            }
            _ => unreachable!("{op:?} is about slots"),
        };
    }
}
