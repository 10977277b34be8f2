//! A small hypervisor for AMD's virtualization (SVM), without an operating system below it, that boots an unmodified Linux kernel on
//! guest memory from [`memslot`] and page tables from [`memslot_mmu`].
//!
//! It is an example and a test: what it is, what it is not and how it is run are in its `README.md`. This library has all of it but what
//! only a program can have (`bin/hypervisor.rs`), so that it is checked with the workspace. Read it in this order:
//!
//! * [`guest`] and [`pool`]: the guest's slots, and where its memory comes from;
//! * [`paging`] and [`processors`]: what the page tables need of a machine, and how translations are flushed;
//! * [`svm`] and [`vcpu`]: the switch into the guest, and why it comes out;
//! * [`mod@linux`]: the boot protocol; [`scenario`]: what is done to the guest meanwhile.
#![cfg(target_arch = "x86_64")]
#![cfg_attr(not(test), no_std)]
#![expect(
    rustdoc::private_intra_doc_links,
    reason = "the library is for one program, and for people who read it"
)]

extern crate alloc;

mod acpi;
mod apic;
mod archive;
mod console;
mod cpu;
mod guest;
mod heap;
mod linux;
mod maps;
mod options;
mod paging;
mod physical;
mod pool;
mod processors;
mod scenario;
mod shadow;
mod start_info;
mod summary;
mod svm;
mod torture;
mod traps;
mod vcpu;

use alloc::boxed::Box;
use alloc::string::String;
use core::fmt::Display;

use memslot::SlotFlags;

use self::console::{report, say};
use self::guest::Guest;
pub use self::heap::Heap;
use self::linux::Boot;
use self::maps::Maps;
use self::options::{Options, Scenario};
use self::paging::Host;
use self::pool::{BLOCK, Pool, SPARE};
pub use self::processors::Trampoline;
use self::scenario::Turn;
use self::start_info::StartInfo;
use self::vcpu::Vcpu;

/// Where things are in the machine's memory. The image lies at 1 MiB, modules and ACPI's tables at the top.
const HEAP: core::ops::Range<u64> = 8 << 20..40 << 20;
const TABLES: core::ops::Range<u64> = 40 << 20..72 << 20;
const POOL: u64 = 72 << 20;
/// Pages of the pool that are no RAM at first: the last ones.
const PLUGGED: u64 = 16 * BLOCK;

/// Runs what the command line says, and leaves QEMU: with status 33 if it passed.
///
/// # Safety
/// Called once, on the boot processor, in the state that `entry.s` makes, with the address that EBX had.
pub unsafe fn main(start_info: u64, heap: &Heap, trampoline: Trampoline) -> ! {
    console::start();
    processors::TRAMPOLINE.call_once(|| trampoline);
    // SAFETY: nothing else is there: the image ends below, modules are at the top of memory.
    unsafe { heap.give(cpu::index(HEAP.start), cpu::index(HEAP.end)) };
    traps::install();
    // SAFETY: the caller's promise.
    let info = unsafe { StartInfo::read(start_info) };
    let result = info.ok_or_else(|| "not started by PVH".into()).and_then(|info| run(&info));
    report!("heap.bytes {}", heap.used());
    match result {
        Ok(()) => {
            say!("memslot-hypervisor: PASS");
            report!("result PASS");
            cpu::leave(0x10)
        }
        Err(why) => {
            say!("memslot-hypervisor: FAIL: {why}");
            report!("result {why}");
            cpu::leave(0x11)
        }
    }
}

/// Says where this program is in memory, for the guest that is a copy of it.
pub fn lies_at(image: core::ops::Range<u64>) {
    scenario::torture::IMAGE.call_once(|| image);
}

/// Ends the run because of the hypervisor itself.
pub fn give_up(why: &dyn Display) -> ! {
    say!("memslot-hypervisor: {why}");
    report!("result {why}");
    cpu::leave(3)
}

fn run(info: &StartInfo) -> Result<(), String> {
    let options = Options::parse(info.command_line)
        .map_err(|word| alloc::format!("the command line's {word:?} makes no sense"))?;
    svm::enable()?;
    // Besides RAM there is some for what is plugged in later.
    let pages = (options.memory >> 12).next_multiple_of(BLOCK) + PLUGGED;
    let copy = (POOL >> 12) + pages + SPARE;
    let end = match options.scenario {
        Scenario::Dirty => copy + pages,
        _ => copy,
    };
    if end << 12 > info.module.start.min(info.low_end()) && options.scenario != Scenario::Trivial {
        return Err("the machine has too little memory for this guest (QEMU: -m)".into());
    }
    let pool = Pool::new(POOL >> 12, pages, options.large_pages);
    let host: &'static Host = Box::leak(Box::new(Host::new(pool, TABLES.start >> 12..TABLES.end >> 12)));
    let mut guest = Guest::new(host, &options)?;
    let mut vcpu = Vcpu::new(processors::get(0), guest.mmu.root().get());
    let mut turn = Turn { guest: &mut guest, vcpu: &mut vcpu };
    say!("memslot-hypervisor: {:?}, {} MiB for the guest", options.scenario, options.memory >> 20);
    let result = match options.scenario {
        Scenario::Trivial => scenario::trivial::run(&mut turn),
        Scenario::Shootdown => scenario::shootdown::run(&mut turn),
        Scenario::Torture => scenario::torture::run(&mut turn),
        _ => linux(info, &options, &mut turn, copy),
    };
    summary::report(&turn);
    vcpu.shadow = None;
    result.and_then(|()| guest.take_down())
}

fn linux(info: &StartInfo, options: &Options, turn: &mut Turn<'_>, copy: u64) -> Result<(), String> {
    // SAFETY: the module lies in memory that nobody writes.
    let archive = unsafe { physical::bytes(info.module.clone()) };
    let file = |name: &'static str| {
        archive::find(archive, name).ok_or_else(|| alloc::format!("the module has no file {name:?}"))
    };
    // SAFETY: the address comes from the start information.
    let power =
        unsafe { acpi::power_port(info.rsdp) }.ok_or("ACPI's tables have no power management port")?;
    let top = info.low_end();
    let reserved = info.memory.iter().find(|(range, is_free)| !is_free && range.start == top);
    let boot = Boot {
        kernel: linux::Image::read(file("kernel")?)?,
        initramfs: file("initramfs")?,
        command_line: core::str::from_utf8(file("command-line")?)
            .map_err(|_| "the guest's command line is no text")?,
        rsdp: info.rsdp,
        acpi_end: reserved.map_or(top, |(range, _)| range.end),
    };
    let is_logged = options.scenario == Scenario::Dirty && !options.large_pages;
    let flags = if is_logged { SlotFlags::LOG_DIRTY_PAGES } else { SlotFlags::empty() };
    turn.guest.add_memory(options.memory, top, flags).map_err(|error| alloc::format!("{error}"))?;
    let mut scenario: Box<dyn scenario::Scenario> = match options.scenario {
        Scenario::Dirty => Box::new(scenario::dirty::Dirty::new(turn.guest, copy, options.round, is_logged)?),
        Scenario::Storm => Box::new(scenario::storm::Storm::new(turn.guest)),
        Scenario::Hotplug => Box::new(scenario::hotplug::Hotplug::new(turn.guest)),
        _ => Box::new(scenario::boot::Boot),
    };
    linux::load(turn.guest, &boot)?;
    linux::start(turn.vcpu, &boot);
    if let Maps::Shadow(shadow) = turn.guest.maps {
        turn.vcpu.use_shadow(turn.guest, shadow)?;
    }
    report!("started {}", cpu::ticks());
    scenario::run(&mut *scenario, turn, power)
}
