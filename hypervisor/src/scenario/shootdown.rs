//! `shootdown`: a page is write-protected, moved and taken away while another processor writes to it without pause.
//!
//! The guest is a loop of three instructions on the second processor, which counts in a page of memory and never comes out by
//! itself. The first processor changes the tables. First it leaves the other one alone, as a hypervisor would that forgets to flush
//! it: the test must see writes that should not be. Then it flushes, and must see none.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use memslot::{SlotFlags, SlotId};
use memslot_mmu::Fault;

use super::Turn;
use crate::console::report;
use crate::guest::{SPACE, frames, spec};
use crate::paging::Walker;
use crate::vcpu::{Exit, Vcpu};
use crate::{cpu, physical, pool, processors};

/// Real mode: `again: inc dword [0x3000]; pause; jmp again`.
const CODE: [u8; 9] = [0x66, 0xff, 0x06, 0x00, 0x30, 0xf3, 0x90, 0xeb, 0xf7];
const CODE_AT: u64 = 0x8000;
const COUNTER_AT: u64 = 0x3000;
const POISON: u32 = 0xdead_0000;
/// How long stale writes are waited for, in ticks of the time stamp counter: about a millisecond.
const WAIT: u64 = 2_000_000;

/// Faults of the other processor wait while this is set.
static GATE: AtomicBool = AtomicBool::new(false);
/// The other processor is to end.
static STOP: AtomicBool = AtomicBool::new(false);
/// Why it has ended: an exit code.
static ENDED: AtomicU64 = AtomicU64::new(0);

/// Writes that were seen and should not have been, by what was done before.
#[derive(Clone, Copy, Default)]
struct Stale {
    protected: u64,
    moved: u64,
    deleted: u64,
}

/// Runs it.
///
/// # Errors
/// What went wrong.
pub(crate) fn run(turn: &mut Turn<'_>) -> Result<(), String> {
    let guest = &mut *turn.guest;
    let slot = |id, gpa, page| spec(id, frames(gpa, gpa + 4096), pool::backing(page), SlotFlags::empty());
    let slots = guest.table.transaction(|tx| {
        tx.create(slot(0, CODE_AT, 700))?;
        tx.create(slot(1, COUNTER_AT, 701))
    });
    slots.map_err(|error| format!("{error}"))?;
    guest.write(CODE_AT, &CODE)?;
    let walker = guest.mmu.walker().map_err(|_| "no memory")?;
    let root = guest.mmu.root().get();
    processors::start(1, Box::new(move || second_processor(walker, root)))?;

    let mut without = Stale::default();
    // The other processor may not get its turn at the very moment, on a machine that does something else.
    for _ in 0..100 {
        let stale = rounds(turn, 10, true)?;
        without.protected += stale.protected;
        without.moved += stale.moved;
        without.deleted += stale.deleted;
        if without.protected > 0 && without.moved > 0 && without.deleted > 0 {
            break;
        }
    }
    let with = rounds(turn, 300, false)?;
    STOP.store(true, Ordering::SeqCst);
    while ENDED.load(Ordering::SeqCst) == 0 {
        processors::flush();
    }

    for (name, stale) in [("without_flush", without), ("with_flush", with)] {
        report!("shootdown.{name}_after_protecting {}", stale.protected);
        report!("shootdown.{name}_after_moving {}", stale.moved);
        report!("shootdown.{name}_after_deleting {}", stale.deleted);
    }
    if with.protected + with.moved + with.deleted > 0 {
        return Err("the other processor wrote through translations that had been flushed".into());
    }
    if without.protected == 0 || without.moved == 0 || without.deleted == 0 {
        return Err("without a flush no stale write was seen, so the test proves nothing".into());
    }
    Ok(())
}

/// The counter in a frame.
fn counter(frame: u64) -> &'static AtomicU32 {
    // SAFETY: a frame of the pool, whose words only the guest and this scenario use, atomically.
    unsafe { &*physical::pointer::<AtomicU32>(frame << 12) }
}

fn pause() {
    let before = cpu::ticks();
    while cpu::ticks() - before < WAIT {
        core::hint::spin_loop();
    }
}

/// Waits until the guest counts in this frame.
fn counts(frame: u64) -> Result<(), String> {
    let (before, started) = (counter(frame).load(Ordering::SeqCst), cpu::ticks());
    while counter(frame).load(Ordering::SeqCst) == before {
        core::hint::spin_loop();
        let ended = ENDED.load(Ordering::SeqCst);
        if ended != 0 || cpu::ticks() - started > 20_000_000_000 {
            return Err(format!(
                "the guest does not count any more (exit {:#x})",
                ended - u64::from(ended != 0)
            ));
        }
    }
    Ok(())
}

fn rounds(turn: &mut Turn<'_>, rounds: u64, neglect: bool) -> Result<Stale, String> {
    let guest = &mut *turn.guest;
    let gfns = frames(COUNTER_AT, COUNTER_AT + 4096);
    let mut stale = Stale::default();
    let frame = |guest: &crate::guest::Guest| guest.frame(gfns.start()).ok_or("the counter's page is gone");
    for _ in 0..rounds {
        let change = |work: &mut dyn FnMut()| {
            processors::neglect_others(neglect);
            work();
            processors::neglect_others(false);
        };
        // Write-protected: until the fault is resolved nothing is written.
        let at = frame(guest)?;
        counts(at)?;
        GATE.store(true, Ordering::SeqCst);
        change(&mut || guest.mmu.write_protect(gfns).discharge());
        stale.protected += u64::from(is_written(at));
        processors::flush();
        GATE.store(false, Ordering::SeqCst);

        // Moved: the old frame is somebody else's now.
        counts(at)?;
        let mut invalidation = None;
        change(&mut || invalidation = guest.mmu.invalidate_gfns(gfns).ok());
        let page = guest.table.view().slot_at(SPACE, gfns.start()).and_then(|slot| slot.hva_of(gfns.start()));
        let page = page.and_then(|hva| guest.host.pool().page_at(hva)).ok_or("the counter's page is gone")?;
        // SAFETY: invalidated; where the flush is left out on purpose, the frames' words are only counters.
        if !unsafe { guest.host.pool().move_page(page) } {
            return Err("the pool has no frame to move to".into());
        }
        let before = counter(frame(guest)?).load(Ordering::SeqCst);
        counter(at).store(POISON, Ordering::SeqCst);
        drop(invalidation.ok_or("no memory for an invalidation")?);
        pause();
        stale.moved += u64::from(counter(at).load(Ordering::SeqCst) != POISON);
        processors::flush();
        let at = frame(guest)?;
        counts(at)?;
        if counter(at).load(Ordering::SeqCst) < before {
            return Err("the guest's counter went backwards".into());
        }

        // Taken away: nothing is written until it is back.
        let slot = *guest.table.view().slot_at(SPACE, gfns.start()).ok_or("the counter's slot is gone")?;
        let mut deleted = Ok(0);
        change(&mut || deleted = guest.table.delete(SPACE, SlotId::new(1)));
        deleted.map_err(|error| format!("{error}"))?;
        stale.deleted += u64::from(is_written(at));
        processors::flush();
        guest.table.create(slot.spec()).map_err(|error| format!("{error}"))?;
    }
    Ok(stale)
}

/// Whether the guest counts on although it must not.
fn is_written(frame: u64) -> bool {
    let before = counter(frame).load(Ordering::SeqCst);
    pause();
    counter(frame).load(Ordering::SeqCst) != before
}

/// The guest's processor.
fn second_processor(mut walker: Walker, root: u64) {
    let mut run = || -> u64 {
        if crate::svm::enable().is_err() {
            return 1;
        }
        let mut vcpu = Vcpu::new(processors::get(1), root);
        vcpu.enter_real_mode(CODE_AT);
        loop {
            let exit = vcpu.run();
            if STOP.load(Ordering::SeqCst) {
                return 1;
            }
            match exit {
                Exit::Fault { gpa, access } => {
                    while GATE.load(Ordering::SeqCst) {
                        core::hint::spin_loop();
                    }
                    match walker.fault(gpa, access) {
                        // Where there is no slot at the moment, there will be one again.
                        Ok(Fault::Mapped(_) | Fault::AlreadyMapped | Fault::Retry | Fault::Mmio) => {}
                        _ => return 2,
                    }
                }
                Exit::Kick => {}
                _ => return vcpu.vmcb.control.exit_code.wrapping_add(1).max(3),
            }
        }
    };
    let why = run();
    drop(walker);
    ENDED.store(why, Ordering::SeqCst);
}
