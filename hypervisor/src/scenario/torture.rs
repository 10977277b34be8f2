//! `torture`: the host's half of the guest that edits its own page tables, see [`crate::torture`].
//!
//! The guest runs its steps and says what became of each. Here it gets what it cannot do itself: slots that come and go, frames
//! that move, devices that write, a second address space. After each step all slots are as they were, and all
//! invariants hold.

use alloc::format;
use alloc::string::{String, ToString};
use core::ops::Range;

use memslot::dirty::Consumer;
use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Gpa, HvaRange, Slot, SlotFlags, SlotId, SlotSpec,
    TransactionError,
};
use memslot_mmu::Config;
use memslot_mmu::format::Access;
use spin::Once;

use super::Turn;
use crate::console::{report, say};
use crate::guest::{Guest, Resolved, SPACE, frames, spec};
use crate::maps::{Log, Maps};
use crate::paging::{Mmu, Walker};
use crate::svm::{Page, Segment};
use crate::torture::guest::{torture_end, torture_exception, torture_page_fault};
use crate::torture::{
    DATA, DATA_END, EXCEPTION_STACK, EXPECTS_NOTHING, GATES, HOME, ROOT, SEGMENTS, STACK, STEPS, TASK, call,
    guest,
};
use crate::vcpu::{Exit, Vcpu};
use crate::{cpu, physical, pool};

/// Where the hypervisor's image is in memory. Set once, at the start.
pub(crate) static IMAGE: Once<Range<u64>> = Once::new();

/// The second address space.
const SECOND: AddressSpaceId = AddressSpaceId::SMM;
/// Memory that each space has its own of: where, pages, and the pages of the pool behind them.
const OVERLAY: u64 = 80 << 20;
const OVERLAY_BYTES: u64 = 64 << 12;
const OVERLAYS: [u64; 2] = [0x4000, 0x4200];
/// What a frame has that is nobody's any more.
const POISON: u64 = 0x6b6b_6b6b_6b6b_6b6b;

/// Runs it.
///
/// # Errors
/// What went wrong.
pub(crate) fn run(turn: &mut Turn<'_>) -> Result<(), String> {
    let mut host = Torture::new(turn.guest)?;
    prepare(turn.guest)?;
    start(turn.vcpu);
    if let Maps::Shadow(shadow) = turn.guest.maps {
        turn.vcpu.use_shadow(turn.guest, shadow)?;
    }
    let mut faults = turn.guest.faults()?;
    loop {
        match turn.vcpu.run() {
            Exit::Fault { gpa, access } => {
                let resolved = match &mut host.second {
                    Some(second) if host.is_in_second => second.fault(gpa, access)?,
                    _ => faults.resolve(gpa, access)?,
                };
                if resolved == Resolved::Nothing {
                    nothing(turn.vcpu, gpa, access).map_err(|why| host.in_step(&why))?;
                }
            }
            Exit::Call => {
                if !host.call(turn).map_err(|why| host.in_step(&why))? {
                    break;
                }
            }
            Exit::Nothing { gpa, access } => {
                nothing(turn.vcpu, gpa, access).map_err(|why| host.in_step(&why))?;
            }
            Exit::Kick | Exit::Later | Exit::Register => {}
            exit => {
                let rip = turn.vcpu.vmcb.save.rip;
                return Err(host.in_step(&format!("{exit:x?} at rip {rip:#x}")));
            }
        }
    }
    host.end(turn.guest)
}

/// The guest goes on where it wants to if it accesses nothing.
fn nothing(vcpu: &mut Vcpu, gpa: Gpa, access: Access) -> Result<(), String> {
    let save = &mut vcpu.vmcb.save;
    if vcpu.registers.r14 != EXPECTS_NOTHING {
        return Err(format!("the guest accesses {gpa} ({access:?}), rip {:#x}", save.rip));
    }
    save.rip = vcpu.registers.r15;
    vcpu.registers.r14 = 0;
    Ok(())
}

/// The memory that both spaces have from the start.
fn homes() -> [SlotSpec; 2] {
    [(0, 0..HOME, 0), (1, DATA..DATA_END, HOME >> 12)].map(|(id, gpas, page)| ram(id, gpas, page))
}

fn ram(id: u32, gpas: Range<u64>, page: u64) -> SlotSpec {
    spec(id, frames(gpas.start, gpas.end), pool::backing(page), SlotFlags::empty())
}

/// Nested page tables of the second address space. Shadow tables are for all spaces.
struct Second {
    mmu: Mmu,
    walker: Walker,
}

impl Second {
    fn fault(&mut self, gpa: Gpa, access: Access) -> Result<Resolved, &'static str> {
        match self.walker.fault(gpa, access) {
            Ok(memslot_mmu::Fault::Mmio) => Ok(Resolved::Nothing),
            Ok(_) => Ok(Resolved::Yes),
            Err(_) => Err("no memory for a page table"),
        }
    }
}

/// What the host keeps.
struct Torture {
    step: usize,
    failed: usize,
    done: usize,
    consumer: Consumer,
    log: Log,
    device: &'static mut Page,
    second: Option<Second>,
    is_in_second: bool,
}

impl Torture {
    fn new(guest: &mut Guest) -> Result<Self, String> {
        let no_memory = "no memory for the torture guest's host";
        let slots = guest.table.transaction(|tx| {
            for (space, page) in [SPACE, SECOND].into_iter().zip(OVERLAYS) {
                let overlay = ram(2, OVERLAY..OVERLAY + OVERLAY_BYTES, page);
                for slot in homes().into_iter().chain([overlay]) {
                    tx.create(SlotSpec { address_space: space, ..slot })?;
                }
            }
            Ok(())
        });
        slots.map_err(|error| error.to_string())?;
        let second = match guest.maps {
            Maps::Nested(first) => {
                let config = Config { address_space: SECOND, ..first.config().clone() };
                let mmu = Mmu::attach(&mut guest.table, guest.host, config).map_err(|_| no_memory)?;
                let walker = mmu.walker().map_err(|_| no_memory)?;
                Some(Second { mmu, walker })
            }
            Maps::Shadow(_) => None,
        };
        Ok(Self {
            step: 0,
            failed: 0,
            done: 0,
            consumer: guest.log.consumer().map_err(|_| no_memory)?,
            log: guest.maps.log().map_err(|_| no_memory)?,
            device: Page::leak(),
            second,
            is_in_second: false,
        })
    }

    fn in_step(&self, why: &str) -> String {
        format!("in {}: {why}", STEPS.get(self.step).map_or("no step", |step| step.name))
    }

    /// Does what the guest asks for. Whether it goes on.
    fn call(&mut self, turn: &mut Turn<'_>) -> Result<bool, String> {
        let Turn { guest, vcpu } = turn;
        let registers = &vcpu.registers;
        let (first, second) = (registers.rbx, registers.rcx);
        let (third, fourth) = (registers.rdx, registers.rsi);
        let id = |number: u64| SlotId::new(u32::try_from(number).unwrap_or(u32::MAX));
        let word = |guest: &Guest, gpa: u64| {
            let frame = guest.frame(Gfn::new(gpa >> 12)).ok_or("a device accesses nothing")?;
            Ok::<_, &str>(physical::pointer::<u64>((frame << 12) + (gpa & 0xff8)))
        };
        let changed = |result: Result<_, TransactionError>| match result {
            Ok(_) => Ok(0),
            Err(error) => Err(error.to_string()),
        };
        let answer = match vcpu.vmcb.save.rax {
            call::BEGIN => {
                self.step = cpu::index(first);
                0
            }
            call::END => {
                self.judge(guest, second, third, fourth)?;
                0
            }
            call::DONE => return Ok(false),
            call::WRITE => {
                let word = word(guest, first)?;
                // SAFETY: a word of a frame of the pool.
                unsafe { word.write_volatile(second) };
                guest.log.mark(SPACE, Gfn::new(first >> 12));
                0
            }
            // SAFETY: as above.
            call::READ => unsafe { word(guest, first)?.read_volatile() },
            call::TELL => {
                if let Maps::Shadow(shadow) = guest.maps {
                    shadow.wrote(SPACE, Gpa::new(first), second);
                }
                0
            }
            call::CREATE => {
                let start = second << 12;
                changed(guest.table.create(ram(id(first).get(), start..start + (third << 12), fourth)))?
            }
            call::DEVICE => {
                let backing = Backing::Device { token: self.device.address() };
                let gfns = frames(second << 12, (second + 1) << 12);
                changed(guest.table.create(spec(id(first).get(), gfns, backing, SlotFlags::empty())))?
            }
            // SAFETY: the page is the guest's device and nobody else's; no reference to it exists.
            call::LOOK => unsafe { physical::pointer::<u64>(self.device.address()).read_volatile() },
            call::DELETE => changed(guest.table.delete(SPACE, id(first)))?,
            call::FLAGS => {
                let flags = SlotFlags::from_bits_truncate(u32::try_from(second).unwrap_or(0));
                changed(guest.table.transaction(|tx| tx.set_flags(SPACE, id(first), flags)))?
            }
            call::SPLIT => changed(
                guest.table.transaction(|tx| tx.split(SPACE, id(first), Gfn::new(second), id(third))),
            )?,
            call::MERGE => changed(guest.table.transaction(|tx| tx.merge(SPACE, id(first), id(second))))?,
            call::MOVE => {
                move_pages(guest, Gfn::new(first >> 12), second)?;
                0
            }
            call::ZAP => {
                let gfns = GfnRange::with_len(Gfn::new(first), second).unwrap_or_default();
                guest.maps.zap(SPACE, gfns, cpu::index(third));
                0
            }
            call::DIRTY => u64::from(self.is_dirty(Gfn::new(first))?),
            call::CHECK => {
                guest.maps.check(first == 0)?;
                0
            }
            call::SPACE => {
                self.enter(guest, vcpu, first == 1)?;
                0
            }
            other => return Err(format!("the guest makes an unknown call, {other:#x}")),
        };
        vcpu.vmcb.save.rax = answer;
        Ok(true)
    }

    /// Whether a frame was written. Forgets all that were.
    fn is_dirty(&mut self, gfn: Gfn) -> Result<bool, String> {
        let harvest = self.log.harvest(&self.consumer);
        let harvest = harvest.map_err(|error| format!("a harvest failed: {error}"))?;
        let is_dirty = harvest.runs().any(|run| run.address_space == SPACE && run.gfns.contains(gfn));
        harvest.commit();
        Ok(is_dirty)
    }

    /// The processor goes to an address space.
    fn enter(&mut self, guest: &Guest, vcpu: &mut Vcpu, second: bool) -> Result<(), String> {
        self.is_in_second = second;
        match &self.second {
            Some(tables) => {
                let root = if second { tables.mmu.root() } else { guest.mmu.root() };
                vcpu.vmcb.control.nested_cr3 = root.get() << 12;
                crate::processors::flush();
            }
            None => vcpu.enter_space(if second { SECOND } else { SPACE })?,
        }
        Ok(())
    }

    /// The verdict about a step: the guest's own, whether all slots are as they were, and whether all invariants hold.
    fn judge(&mut self, guest: &Guest, line: u64, seen: u64, right: u64) -> Result<(), String> {
        let step = STEPS.get(self.step).ok_or("the guest ends a step that there is not")?;
        self.done += 1;
        let slots = guest.table.view().slots(SPACE).count();
        let verdict = if line > 0 {
            Err(format!("line {line}: {seen:#x} was seen, {right:#x} is right"))
        } else if slots != 3 {
            Err(format!("{slots} slots are left"))
        } else {
            guest.maps.check(true)
        };
        match verdict {
            Ok(()) => {
                say!("torture: {}: PASS", step.name);
                report!("torture.{} PASS", step.name);
                Ok(())
            }
            Err(why) => {
                say!("torture: {}: FAIL: {why} ({})", step.name, step.what);
                report!("torture.{} FAIL", step.name);
                self.failed += 1;
                // What is left of this step would be in the way of the next.
                if slots == 3 { Ok(()) } else { Err(why) }
            }
        }
    }

    fn end(mut self, guest: &mut Guest) -> Result<(), String> {
        report!("torture.steps {}", self.done);
        if self.done != STEPS.len() {
            return Err(format!("{} of {} steps were done", self.done, STEPS.len()));
        }
        let ids = guest.table.view().slots(SECOND).map(Slot::id).collect::<alloc::vec::Vec<_>>();
        let deleted = guest.table.transaction(|tx| ids.iter().try_for_each(|&id| tx.delete(SECOND, id)));
        deleted.map_err(|error| error.to_string())?;
        if let Some(Second { mmu, walker }) = self.second.take() {
            drop(walker);
            mmu.reclaim();
            guest.has_other_tables(mmu.stats().tables);
        }
        match self.failed {
            0 => Ok(()),
            failed => Err(format!("{failed} of {} steps failed", STEPS.len())),
        }
    }
}

/// Puts other frames behind pages, while nobody has a translation to them. The old ones are somebody else's from then on.
fn move_pages(guest: &Guest, gfn: Gfn, pages: u64) -> Result<(), String> {
    let slot = guest.table.view().slot_at(SPACE, gfn).ok_or("there is no such page")?;
    let hva = slot.hva_of(gfn).ok_or("there is no such page")?;
    let pool = guest.host.pool();
    let first = pool.page_at(hva).ok_or("there is no such page")?;
    let hvas = HvaRange::with_len(hva, pages << 12).unwrap_or_default();
    let held = guest.maps.invalidate(hvas).map_err(|_| "no memory for an invalidation")?;
    for page in first..first + pages {
        let old = pool.frame(page);
        // SAFETY: the page is invalidated until the end of this function.
        if !unsafe { pool.move_page(page) } {
            return Err("the pool has no frame to move to".into());
        }
        for word in 0..512 {
            // SAFETY: the old frame is spare now.
            unsafe { physical::pointer::<u64>((old << 12) + word * 8).write_volatile(POISON) };
        }
    }
    drop(held);
    Ok(())
}

/// Puts image, tables, descriptors and gates into the guest's memory.
fn prepare(guest: &mut Guest) -> Result<(), String> {
    let image = IMAGE.get().cloned().ok_or("nobody has said where the image is")?;
    for page in image.clone().step_by(4096) {
        let words = core::array::from_fn::<_, 512, _>(|word| {
            // SAFETY: the image is mapped. Some of its words change meanwhile, but none that the guest uses.
            unsafe { physical::pointer::<u64>(page + word as u64 * 8).read_volatile() }.to_le_bytes()
        });
        guest.write(page, words.as_flattened())?;
    }
    let mut put = |at: u64, value: u64| guest.write(at, &value.to_le_bytes());
    let [kernel, kernel_directory, user, user_directory] =
        core::array::from_fn(|table| ROOT + (table as u64 + 1) * 4096);
    put(ROOT, kernel | 3)?;
    put(ROOT + 8, user | 7)?;
    put(kernel, kernel_directory | 3)?;
    put(user, user_directory | 7)?;
    for page in 0..512 {
        put(kernel_directory + page * 8, page << 21 | 0x83)?;
        if page << 21 < HOME {
            put(user_directory + page * 8, page << 21 | 0x87)?;
        }
    }
    // Nothing, the kernel's code and data, the user's data and code.
    let descriptors =
        [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    for (at, descriptor) in (SEGMENTS..).step_by(8).zip(descriptors) {
        put(at, descriptor)?;
    }
    let gates: [(u64, unsafe extern "sysv64" fn()); 3] =
        [(13, torture_exception), (14, torture_page_fault), (0x80, torture_end)];
    for (vector, gate) in gates {
        let address = (gate as *const ()).addr() as u64;
        // The first stack of the table, for users as well.
        let low = address & 0xffff | 0x08 << 16 | 1 << 32 | 0xee << 40 | (address >> 16 & 0xffff) << 48;
        put(GATES + vector * 16, low)?;
        put(GATES + vector * 16 + 8, address >> 32)?;
    }
    // The stack pointers of the task state are at 4 and 36, which are no multiples of 8.
    guest.write(TASK + 4, &EXCEPTION_STACK.to_le_bytes())?;
    guest.write(TASK + 36, &EXCEPTION_STACK.to_le_bytes())?;
    Ok(())
}

fn start(vcpu: &mut Vcpu) {
    let save = &mut vcpu.vmcb.save;
    save.cr0 = 0x8001_0033;
    save.cr3 = ROOT;
    save.cr4 = 0x6a0;
    save.efer = 0x1d00;
    let data = Segment { selector: 0x10, attributes: 0xc93, limit: 0xffff_ffff, base: 0 };
    (save.ds, save.es, save.ss, save.fs, save.gs) = (data, data, data, data, data);
    save.cs = Segment { selector: 0x08, attributes: 0xa9b, ..data };
    save.gdtr = Segment { selector: 0, attributes: 0, limit: 39, base: SEGMENTS };
    save.idtr = Segment { limit: 0x81 * 16 - 1, base: GATES, ..save.gdtr };
    save.tr = Segment { selector: 0x28, attributes: 0x8b, limit: 0x67, base: TASK };
    save.ldtr = Segment { selector: 0, attributes: 0x82, limit: 0, base: 0 };
    save.rip = (guest::start as *const ()).addr() as u64;
    save.rsp = STACK - 8;
}
