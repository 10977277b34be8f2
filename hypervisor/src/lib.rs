//! A small hypervisor for AMD's virtualization (SVM), without an operating system below it, that boots an unmodified Linux kernel on
//! guest memory from [`memslot`] and page tables from [`memslot_mmu`].
//!
//! It is an example and a test: what it is, what it is not and how it is run are in its `README.md`. This library has all of it but what
//! only a program can have (`bin/hypervisor.rs`), so that it is checked with the workspace. Read it in this order:
//!
//! * [`guest`] and [`pool`]: the guest's slots, and where its memory comes from;
//! * [`paging`] and [`processors`]: what the page tables need of a machine, and how translations are flushed;
//! * [`svm`] and [`vcpu`]: the switch into the guest, and why it comes out;
//! * [`maps`] and [`mod@shadow`]: nested or shadow tables, and what a guest on shadow tables comes out for; [`torture`]: a guest that
//!   edits its own;
//! * [`mod@linux`] and [`wakeup`]: the boot protocol, and how the other processors come up;
//! * [`running`] and [`scenario`]: the loop around the guest, and what is done to it meanwhile.
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
mod running;
mod scenario;
mod shadow;
mod start_info;
mod summary;
mod svm;
mod torture;
mod traps;
mod vcpu;
mod wakeup;

use alloc::boxed::Box;
use alloc::string::String;
use core::fmt::Display;

use memslot::SlotFlags;

use self::console::{report, say};
use self::guest::{FaultCounts, Guest};
pub use self::heap::Heap;
use self::linux::Boot;
use self::maps::Maps;
use self::options::{Options, Scenario};
use self::paging::Host;
use self::pool::{BLOCK, Pool, SPARE};
pub use self::processors::Trampoline;
use self::running::Running;
use self::scenario::Turn;
use self::start_info::StartInfo;
use self::vcpu::Vcpu;

/// Where things are in the machine's memory. The image lies at 1 MiB, modules and ACPI's tables at the top.
const HEAP: core::ops::Range<u64> = 8 << 20..136 << 20;
const TABLES: core::ops::Range<u64> = 136 << 20..184 << 20;
const POOL: u64 = 184 << 20;
/// Pages of the pool that are no RAM at first: the last ones.
const PLUGGED: u64 = 16 * BLOCK;

/// Runs what the command line says, and leaves QEMU: with status 33 if it passed.
///
/// # Safety
/// Called once, on the boot processor, in the state that `entry.s` makes, with the address that EBX had.
pub unsafe fn main(start_info: u64, heap: &'static Heap, trampoline: Trampoline) -> ! {
    console::start();
    processors::TRAMPOLINE.call_once(|| trampoline);
    // SAFETY: nothing else is there: the image ends below, modules are at the top of memory.
    unsafe { heap.give(cpu::index(HEAP.start), cpu::index(HEAP.end)) };
    traps::install();
    // SAFETY: the caller's promise.
    let info = unsafe { StartInfo::read(start_info) };
    let Some(info) = info else { give_up(&"not started by PVH") };
    let options = match Options::parse(info.command_line) {
        Ok(options) => options,
        Err(word) => give_up(&format_args!("the command line's {word:?} makes no sense")),
    };
    if options.processors == 1 {
        run_and_leave(&info, &options, heap)
    }
    let work = move || run_and_leave(&info, &options, heap);
    if let Err(why) = processors::start(processors::guests_apic(0, options.processors), Box::new(work)) {
        give_up(&why);
    }
    cpu::sleep()
}

fn run_and_leave(info: &StartInfo, options: &Options, heap: &Heap) -> ! {
    let result = run(info, options);
    report!("heap.bytes {}", heap.used());
    report!("ended {}", cpu::ticks());
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

fn run(info: &StartInfo, options: &Options) -> Result<(), String> {
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
    let mut guest = Guest::new(host, options)?;
    let mut vcpu = Vcpu::new(processors::get(0), guest.mmu.root().get());
    say!("memslot-hypervisor: {:?}, {} MiB for the guest", options.scenario, options.memory >> 20);
    let work = match options.scenario {
        Scenario::Trivial => scenario::trivial::run,
        Scenario::Shootdown => scenario::shootdown::run,
        Scenario::Torture => scenario::torture::run,
        _ => return linux(info, options, guest, vcpu, copy),
    };
    let result = work(&mut Turn { guest: &mut guest, vcpu: &mut vcpu });
    summary::report(&guest, &[(0, (vcpu.counts, FaultCounts::default()))]);
    if let Some(shadow) = vcpu.shadow.take() {
        shadow.report();
    }
    result.and_then(|()| guest.take_down())
}

fn linux(
    info: &StartInfo,
    options: &Options,
    mut guest: Guest,
    mut vcpu: Box<Vcpu>,
    copy: u64,
) -> Result<(), String> {
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
    let is_logged = options.scenario == Scenario::Dirty && !options.large_pages;
    let flags = if is_logged { SlotFlags::LOG_DIRTY_PAGES } else { SlotFlags::empty() };
    guest.add_memory(options.memory, top, flags).map_err(|error| alloc::format!("{error}"))?;
    let (rsdp, low_reserved) = if options.processors > 1 {
        // SAFETY: the address comes from the start information, and there are tables, as the port was in them.
        (unsafe { wakeup::prepare(&mut guest, info.rsdp) }?, Some(wakeup::RESERVED))
    } else {
        (info.rsdp, None)
    };
    let boot = Boot {
        kernel: linux::Image::read(file("kernel")?)?,
        initramfs: file("initramfs")?,
        command_line: core::str::from_utf8(file("command-line")?)
            .map_err(|_| "the guest's command line is no text")?,
        rsdp,
        reserved: low_reserved,
        acpi_end: reserved.map_or(top, |(range, _)| range.end),
    };
    let scenario: Box<dyn scenario::Scenario> = match options.scenario {
        Scenario::Dirty => Box::new(scenario::dirty::Dirty::new(&guest, copy, options.round, is_logged)?),
        Scenario::Storm => Box::new(scenario::storm::Storm::new(&guest)),
        Scenario::Hotplug => Box::new(scenario::hotplug::Hotplug::new(&guest)),
        _ => Box::new(scenario::boot::Boot),
    };
    linux::load(&mut guest, &boot)?;
    linux::start(&mut vcpu, &boot);
    if let Maps::Shadow(shadow) = guest.maps {
        vcpu.use_shadow(&guest, shadow)?;
    }
    processors::neglect_others(!options.has_shootdown);
    report!("started {}", cpu::ticks());
    let running = Running::new(guest, scenario, power, options.processors);
    let (mut state, verdict) = running.run(&mut vcpu);
    summary::report(&state.guest, &state.counted);
    if let Some(shadow) = vcpu.shadow.take() {
        shadow.report();
    }
    verdict.and_then(|()| state.guest.take_down())
}
