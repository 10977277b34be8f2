//! What goes on in the middle of things: in a change of the slots, of which the dirty log has heard and the shadow tables have not; in a harvest
//! that fails; and where there is no memory for tables.

use std::sync::{Arc, Mutex};

use memslot::dirty::{Consumer, Rearm};
use memslot::{AddressSpaceId, GfnRange, Gpa, HvaHit, Listener, ListenerError, SlotFlags, Snapshot, Update};
use memslot_mmu::shadow::guest::GuestAccess;
use memslot_mmu::shadow::{Shadow, ShadowFault, ShadowRearm, ShadowVcpu};

use super::cpu::hardware_walk;
use super::host::TestHost;
use super::layout::{END, SMALL};
use super::{World, page_of, range};

type Work = Box<dyn FnOnce() + Send>;

/// Does something in the middle of the next change of the slots.
#[derive(Clone, Default)]
pub struct Meanwhile(Arc<Mutex<Option<Work>>>);

impl Meanwhile {
    pub fn set(&self, work: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap() = Some(Box::new(work));
    }

    /// Whether it is still to be done.
    pub fn is_planned(&self) -> bool {
        self.0.lock().unwrap().is_some()
    }
}

impl Listener for Meanwhile {
    fn name(&self) -> &str {
        "between the dirty log and the shadow tables"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        let work = self.0.lock().unwrap().take();
        if let Some(work) = work {
            work();
        }
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// What random programs do meanwhile.
pub struct Others {
    /// The frames of the host that were written meanwhile, and in which address space.
    wrote: Arc<Mutex<Vec<(AddressSpaceId, u64)>>>,
    /// Takes dirty pages as well.
    display: Arc<Consumer>,
    /// A re-arm that has failed and not flushed.
    failed: Option<ShadowRearm<TestHost>>,
}

/// Another virtual processor, and all else that has no part in the rest of the program.
struct Other {
    vcpu: ShadowVcpu<TestHost>,
    space: AddressSpaceId,
    shadow: Shadow<TestHost>,
    host: TestHost,
    display: Arc<Consumer>,
    wrote: Arc<Mutex<Vec<(AddressSpaceId, u64)>>>,
}

impl Other {
    /// Writes what its tables allow, with whatever faults that takes.
    fn write(&mut self, address: u64) {
        if self.vcpu.is_stale() {
            self.with_memory(ShadowVcpu::reload);
        }
        let fault = self.with_memory(|vcpu| vcpu.fault(address, GuestAccess::WRITE | GuestAccess::AC));
        if matches!(fault, ShadowFault::Mapped(_) | ShadowFault::AlreadyMapped) {
            let root = self.vcpu.root().unwrap();
            if let Ok(leaf) = hardware_walk(&self.host, root, address, true, |rights| rights.write) {
                if leaf.rights.write {
                    self.wrote.lock().unwrap().push((self.space, leaf.pfn));
                }
            }
        }
    }

    /// Does it once more if there was no memory.
    fn with_memory<R, E: std::fmt::Debug>(
        &mut self,
        mut work: impl FnMut(&mut ShadowVcpu<TestHost>) -> Result<R, E>,
    ) -> R {
        let first = work(&mut self.vcpu);
        self.host.user.set_tables_left(usize::MAX);
        first.or_else(|_| work(&mut self.vcpu)).unwrap()
    }

    fn run(mut self, address: u64, what: u64) {
        let (gfn, has) = (what >> 8, |bit: u32| what >> bit & 1 != 0);
        if has(0) {
            self.write(address);
        }
        if has(1) {
            let mut rearm = self.shadow.dirty_rearm().unwrap();
            rearm.harvest(&self.display).unwrap().commit();
        }
        if has(2) {
            self.write(address ^ 1 << 12);
        }
        if has(3) {
            self.shadow.zap_gfn_range(self.space, range(gfn % END, 64));
        }
        if has(4) {
            self.shadow.wrote(self.space, Gpa::new((gfn % SMALL) << 12), 4096);
        }
        if has(5) {
            self.shadow.invalidate_hva(page_of(super::host::HVA + ((gfn % END) << 12))).unwrap().end();
        }
        if has(6) {
            self.shadow.ager().unwrap().age(self.space, range(0, END));
        }
        if has(7) {
            self.write(address);
        }
    }
}

/// Re-arms so many times, and fails then.
struct Fails(ShadowRearm<TestHost>, u64);

impl Rearm for Fails {
    type Error = ();

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), ()> {
        let Ok(()) = self.0.rearm(space, gfns);
        self.1 = self.1.checked_sub(1).ok_or(())?;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ()> {
        Err(())
    }
}

impl Others {
    pub fn new(display: Consumer) -> Self {
        Self { wrote: Arc::default(), display: Arc::new(display), failed: None }
    }
}

impl World {
    /// Plans something for the next change of the slots.
    pub fn plan(&mut self, cpu: usize, address: u64, what: u64) {
        let (paging, space) = (self.cpus[cpu].paging, self.cpus[cpu].space);
        let mut vcpu = self.shadow.vcpu().unwrap();
        self.host.user.set_tables_left(usize::MAX);
        vcpu.load(paging, space).unwrap();
        let (shadow, host) = (self.shadow.clone(), self.host.clone());
        let (display, wrote) = (self.others.display.clone(), self.others.wrote.clone());
        let other = Other { vcpu, space, shadow, host, display, wrote };
        self.meanwhile.set(move || other.run(address, what));
    }

    /// The slots have changed: what was written meanwhile, to memory that was logged and is, is dirty where it is now.
    pub fn wrote_meanwhile(&mut self, before: &Snapshot) {
        for (space, pfn) in std::mem::take(&mut *self.others.wrote.lock().unwrap()) {
            let Some(hva) = self.host.hva(pfn).map(page_of) else { continue };
            let is_logged = |hit: &HvaHit<'_>| hit.slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES);
            if before.slots_at_hva(space, hva).any(|hit| is_logged(&hit)) {
                let now: Vec<_> = self.table.view().slots_at_hva(space, hva).filter(is_logged).collect();
                let now: Vec<_> = now.iter().map(|hit| hit.gfns.start().get()).collect();
                self.written.extend(now.into_iter().map(|gfn| ((space, gfn), hva.start())));
            }
        }
    }

    /// A harvest that fails after some of its pages were re-armed, and whose re-arm is kept, or not.
    pub fn fail_harvest(&mut self, after: u64, is_kept: bool) {
        let mut fails = Fails(self.shadow.dirty_rearm().unwrap(), after);
        // Where nothing is dirty, nothing fails.
        drop(self.consumer.harvest(&mut fails));
        self.others.failed = is_kept.then_some(fails.0);
    }

    /// Does something for which there may be no memory at first: then nothing has changed, and it is done once more.
    pub fn with_memory<R, E: std::fmt::Debug>(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<R, E>,
    ) -> R {
        let first = work(self);
        self.host.user.set_tables_left(usize::MAX);
        match first {
            Ok(result) => result,
            Err(_) => {
                // But for bits that a walk has set in the guest's tables.
                self.note();
                // (Without a look at the guest's tables, which may be out of reach at the moment.)
                if let Err(why) = self.shadow.check_maps() {
                    panic!("check_maps: {why}");
                }
                self.check_grants();
                work(self).unwrap()
            }
        }
    }
}
