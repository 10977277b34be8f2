//! The VMM itself.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kvm_ioctls::Kvm;
use memslot::dirty::{Consumer, DirtyLog};
use memslot::*;
use memslot_backing::{Backings, Memory};
use memslot_kvm::{KvmSlots, NotRunning, Options, Vm};

use crate::guest::{self, DIMM_PAGES, Mailbox, PROBED, RAM, RAM_PAGES};
use crate::vcpu::{Mmio, Pauser, Runner};

const SPACE: AddressSpaceId = AddressSpaceId::NORMAL;
const PAGE: u64 = 4096;
/// Ids of the table's slots; the kernel's own are not the VMM's business.
const LOW: SlotId = SlotId::new(0);
const MAIN: SlotId = SlotId::new(1);
const DIMM: SlotId = SlotId::new(2);
const DIMM_HIGH: SlotId = SlotId::new(3);
const FLASH: SlotId = SlotId::new(4);
const DIMM_GPA: u32 = 0x1000_0000;
const FLASH_GPA: u32 = 0x2000_0000;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Accesses to holes, and writes to read-only slots.
struct Bus {
    reader: Reader,
    log: DirtyLog,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Mmio for Bus {
    /// Nobody is there: all ones, as on a PC.
    fn read(&mut self, gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.seen.lock().unwrap().push(format!("read of {gpa:#x}: a hole"));
    }

    /// The upper half of the module is ours to write while it is read-only for the guest: what a VMM does that
    /// wants to see each write. It writes memory itself, so it marks it itself.
    ///
    /// By the time that we look, the slot may be writable again, and have another id: the write was let out before,
    /// and still has to be done. So what counts is the memory that is there now.
    fn write(&mut self, gpa: u64, data: &[u8]) {
        let view = self.reader.pin();
        match view.translate(SPACE, Gpa::new(gpa)) {
            Some(found) if found.slot != FLASH => {
                for (at, &byte) in (0..).zip(data) {
                    // SAFETY: the version says that this is memory, which stays mapped while it is pinned.
                    unsafe { AtomicU8::from_ptr((found.hva.get() + at) as *mut u8) }
                        .store(byte, Ordering::Relaxed);
                }
                self.log.mark_bytes(SPACE, Gpa::new(gpa), data.len() as u64, view.page_size());
            }
            found => {
                let what = if found.is_some() { "the flash" } else { "a hole" };
                self.seen.lock().unwrap().push(format!("write to {gpa:#x}: {what}"));
            }
        }
    }
}

/// The second copy of what is logged, made from harvests alone.
#[derive(Default)]
struct Copy {
    pages: BTreeMap<u64, Vec<u8>>,
    harvests: u32,
}

impl Copy {
    /// Takes all dirty pages and copies them. A harvest re-arms a page before it hands it out, so a write that
    /// comes while we copy is reported by the next one.
    fn update(&mut self, slots: &KvmSlots, consumer: &Consumer, view: &View) -> Outcome {
        let harvest = slots.harvest(consumer)?;
        for run in harvest.runs() {
            for gfn in run.gfns.start().get()..run.gfns.end().get() {
                self.pages.insert(gfn, page(view, gfn).ok_or("a dirty page without memory")?);
            }
        }
        harvest.commit();
        self.harvests += 1;
        Ok(())
    }

    /// Compares what was harvested from `first` on with the guest's journal, and the copy with the memory.
    fn check(&self, what: &str, view: &View, first: Gfn, journal: impl Iterator<Item = u64>) -> Outcome {
        let journal: BTreeSet<u64> = journal.map(|page| first.get() + page).collect();
        let end = view.slot_at(SPACE, first).ok_or("there is no slot")?.gfns().end().get();
        let harvested: BTreeSet<u64> = self.pages.range(first.get()..end).map(|(&gfn, _)| gfn).collect();
        let lost: Vec<_> = journal.difference(&harvested).collect();
        let invented: Vec<_> = harvested.difference(&journal).collect();
        if !lost.is_empty() || !invented.is_empty() {
            return Err(format!("{what}: writes lost {lost:x?}, invented {invented:x?}").into());
        }
        if let Some(gfn) = harvested.iter().find(|&&gfn| page(view, gfn).as_ref() != self.pages.get(&gfn)) {
            return Err(format!("{what}: the copy of gfn {gfn:#x} is stale").into());
        }
        println!("  {what}: {} pages written, the same harvested, all copies equal", journal.len());
        Ok(())
    }
}

/// The bytes of a guest page.
fn page(view: &View, gfn: u64) -> Option<Vec<u8>> {
    let found = view.translate(SPACE, Gpa::new(gfn * PAGE))?;
    let bytes = (0..PAGE).map(|at| {
        // SAFETY: the version says that this is memory, which stays mapped while we have the version.
        unsafe { AtomicU8::from_ptr((found.hva.get() + at) as *mut u8) }.load(Ordering::Relaxed)
    });
    Some(bytes.collect())
}

/// Memory as atomics: the guest writes it while we read.
fn atomics<T>(memory: &Memory) -> &[T] {
    let len = usize::try_from(memory.bytes()).unwrap() / size_of::<T>();
    // SAFETY: the memory is mapped as long as `memory` lives, and `T` is an atomic integer.
    unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), len) }
}

struct Vmm<'m> {
    table: SlotTable,
    backings: Backings,
    slots: KvmSlots,
    consumer: Consumer,
    mailbox: Mailbox<'m>,
    pauser: Pauser,
    copy: Copy,
}

impl Vmm<'_> {
    /// Lets the guest write for a while, and harvests all along.
    fn work(&mut self, rounds: u32) -> Outcome {
        let until = self.mailbox.rounds() + rounds;
        while self.mailbox.rounds() < until {
            self.copy.update(&self.slots, &self.consumer, self.table.view())?;
        }
        Ok(())
    }

    fn say(&self, what: &str) {
        let pauses = self.pauser.pauses.lock().unwrap();
        println!("round {:6}, {pauses} pauses: {what}", self.mailbox.rounds());
    }

    /// A memory module comes, is cut up and put together again under the guest's hands, and goes.
    fn module(&mut self, name: &str) -> Outcome {
        let dimm = Arc::new(Memory::memfd(name, DIMM_PAGES * PAGE).map()?);
        self.backings.adopt(&dimm);
        let gone = Arc::downgrade(&dimm);
        let first = Gfn::new(u64::from(DIMM_GPA) / PAGE);
        let spec = self.backings.spec(DIMM, first, &dimm, ..)?;
        self.table.create(SlotSpec { flags: SlotFlags::LOG_DIRTY_PAGES, ..spec })?;
        // From here on the table keeps the memory.
        drop(dimm);
        self.mailbox.forget_dimm();
        self.mailbox.set_window(DIMM_GPA);
        self.say(&format!("{name} is plugged"));
        self.work(1500)?;

        // The kernel's slot covers both halves: no ioctl, no pause.
        let middle = Gfn::new(first.get() + DIMM_PAGES / 2);
        self.table.transaction(|tx| tx.split(SPACE, DIMM, middle, DIMM_HIGH))?;
        self.say("  split in two slots");
        self.work(500)?;

        // The kernel has to delete its slot and make two; the guest must not see that.
        self.table.set_flags(SPACE, DIMM_HIGH, SlotFlags::all())?;
        self.say("  the upper half read-only, its writes emulated");
        self.work(1000)?;
        self.table.transaction(|tx| {
            tx.set_read_only(SPACE, DIMM_HIGH, false)?;
            tx.merge(SPACE, DIMM, DIMM_HIGH)
        })?;
        self.say("  writable again, and one slot");
        self.work(1500)?;

        // The guest gives it up; what it wrote last is harvested before it goes.
        self.mailbox.set_window(0);
        self.copy.update(&self.slots, &self.consumer, self.table.view())?;
        self.copy.check(name, self.table.view(), first, self.mailbox.dimm_journal())?;
        self.table.delete(SPACE, DIMM)?;
        self.copy.pages.retain(|&gfn, _| gfn < first.get());
        self.table.reclaim();
        let is_gone = gone.upgrade().is_none();
        self.say(&format!("{name} is unplugged, its memory {}", if is_gone { "unmapped" } else { "in use" }));
        if is_gone { Ok(()) } else { Err("nobody can reach the module's memory, and it is mapped".into()) }
    }

    /// A flash chip: read-only to the guest, then not, then gone.
    fn flash(&mut self) -> Outcome {
        let chip = Arc::new(Memory::anonymous(8 * PAGE).map()?);
        self.backings.adopt(&chip);
        let word = &atomics::<AtomicU32>(&chip)[0];
        word.store(0xcafe, Ordering::Relaxed);
        let spec = self.backings.spec(FLASH, Gfn::new(u64::from(FLASH_GPA) / PAGE), &chip, ..)?;
        self.table.create(SlotSpec { flags: SlotFlags::READONLY, ..spec })?;
        let seen = |what: &str, found: u32, expected: u32| {
            let holds = found == expected;
            if holds { Ok(()) } else { Err(format!("{what}: {found:#x} instead of {expected:#x}")) }
        };
        seen("a read of the flash", self.mailbox.probe(FLASH_GPA), 0xcafe)?;
        seen("the flash after a write", word.load(Ordering::Relaxed), 0xcafe)?;
        self.table.set_flags(SPACE, FLASH, SlotFlags::empty())?;
        seen("a read of the writable flash", self.mailbox.probe(FLASH_GPA), 0xcafe)?;
        seen("the writable flash after a write", word.load(Ordering::Relaxed), PROBED)?;
        self.table.delete(SPACE, FLASH)?;
        seen("a read of what is gone", self.mailbox.probe(FLASH_GPA), u32::MAX)?;
        self.say("the flash was read-only, writable and gone, and the guest saw just that");
        Ok(())
    }
}

pub(crate) fn run() -> Outcome {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped: no /dev/kvm ({error})");
            return Ok(());
        }
    };
    let vm = kvm.create_vm()?;

    // The map: a table, whose slots stand on memory that lives as long as anybody can reach it, programmed into the
    // VM, with a dirty log.
    let mut table = SlotTable::new(Limits { address_spaces: 1, ..Limits::default() })?;
    let backings = Backings::attach(&mut table)?;
    // No vCPU runs yet; `set_vcpus` below comes once one does.
    // SAFETY: `backings` refuses slots on anything but adopted memory, which is used for the guest only.
    let slots = unsafe { KvmSlots::attach(&mut table, Vm::of(&vm)?, NotRunning, Options::default()) }?;
    let log = slots.dirty_log(&mut table)?;
    let consumer = log.consumer()?;

    // 1 MiB of low memory with the program, which is not logged, and 1 MiB that is.
    let low = Arc::new(Memory::anonymous(RAM).map()?);
    let main = Arc::new(Memory::anonymous(RAM_PAGES * PAGE).map()?);
    backings.adopt(&low);
    backings.adopt(&main);
    guest::load(atomics(&low));
    let low_spec = backings.spec(LOW, Gfn::new(0), &low, ..)?;
    let main_spec = backings.spec(MAIN, Gfn::new(RAM / PAGE), &main, ..)?;
    table.transaction(|tx| {
        tx.create(low_spec)?;
        tx.create(SlotSpec { flags: SlotFlags::LOG_DIRTY_PAGES, ..main_spec })
    })?;

    let vcpu = vm.create_vcpu(0)?;
    guest::set_registers(&vcpu)?;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let bus = Bus { reader: table.reader()?, log: log.clone(), seen: Arc::clone(&seen) };
    let runner = Runner::start(vcpu, bus);
    let pauser = runner.pauser();
    slots.set_vcpus(pauser.clone());
    let mailbox = Mailbox::new(atomics(&low));
    let mut vmm = Vmm { table, backings, slots, consumer, mailbox, pauser, copy: Copy::default() };

    vmm.say("the guest runs");
    vmm.work(2000)?;
    vmm.module("module 1")?;
    vmm.flash()?;
    vmm.module("module 2")?;
    vmm.mailbox.stop();
    runner.join()?;
    vmm.copy.update(&vmm.slots, &vmm.consumer, vmm.table.view())?;
    vmm.copy.check("main memory", vmm.table.view(), Gfn::new(RAM / PAGE), vmm.mailbox.ram_journal())?;
    println!("accesses that were not memory's: {}", seen.lock().unwrap().join(", "));
    println!("PASS: {} harvests, no write lost, none invented", vmm.copy.harvests);
    Ok(())
}
