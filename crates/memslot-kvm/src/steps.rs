//! Issuing planned ioctls, and taking them back.

use memslot::View;
use memslot::dirty::DirtyLog;

use crate::error::KvmError;
use crate::kernel::Kernel;
use crate::plan::{Place, Plan, Step};
use crate::programmed::{KvmSlot, Programmed};
use crate::ring::Rings;

/// What there is to be in step with the table. Behind the lock of [`KvmSlots`](crate::KvmSlots).
pub(crate) struct State {
    pub(crate) programmed: Programmed,
    /// Where the kernel's dirty bits go.
    pub(crate) log: Option<DirtyLog>,
    pub(crate) rings: Rings,
    pub(crate) manual_protect: bool,
    /// For dirty bitmaps, used again and again.
    pub(crate) words: Vec<u64>,
    /// Frames where the kernel may have something else than the table says.
    pub(crate) out_of_step: Vec<Place>,
}

impl State {
    /// Nothing is programmed, and nothing is logged.
    pub(crate) fn new(programmed: Programmed) -> Self {
        Self {
            programmed,
            log: None,
            rings: Rings::default(),
            manual_protect: false,
            words: Vec::new(),
            out_of_step: Vec::new(),
        }
    }

    /// Issues all steps, or none: when one fails, those before it are taken back.
    pub(crate) fn issue<K: Kernel>(&mut self, kernel: &K, plan: &Plan) -> Result<(), KvmError> {
        for (done, step) in plan.steps.iter().enumerate() {
            if let Err(error) = self.step(kernel, step) {
                self.take_back(kernel, &plan.steps[..done]);
                return Err(KvmError::Ioctl { what: step.to_string(), error });
            }
        }
        Ok(())
    }

    /// Takes back steps that were issued, the last one first. What cannot be taken back is remembered as out of step.
    pub(crate) fn take_back<K: Kernel>(&mut self, kernel: &K, steps: &[Step]) {
        for step in steps.iter().rev() {
            let step = step.reversed();
            if self.is_in_the_way(&step) || self.step(kernel, &step).is_err() {
                self.out_of_step.extend(step.places());
            }
        }
    }

    /// Steps were taken back when the log had already gone back to the version before: bits that were fetched since lie
    /// where the memory was meanwhile. Where it is again, all of it counts as dirty.
    pub(crate) fn mark_where_it_was(&self, steps: &[Step], before: &View) {
        let Some(log) = &self.log else { return };
        for step in steps {
            let (Step::Create(slot) | Step::Move { to: slot, .. }) = step else { continue };
            let Some(hvas) = slot.hvas().filter(|_| slot.logs()) else { continue };
            for hit in before.slots_at_hva(slot.address_space, hvas) {
                let first = hit.gfns.start();
                let was_here = slot.backing_at(first).and_then(|backing| backing.hva());
                if was_here != hit.slot.hva_of(first) {
                    log.mark_range(slot.address_space, hit.gfns);
                }
            }
        }
    }

    /// Whether a slot that should have gone has the id or the frames of the one that this step makes.
    fn is_in_the_way(&self, step: &Step) -> bool {
        let (new, old) = match step {
            Step::Create(slot) => (slot, None),
            Step::Move { from, to } => (to, Some(from)),
            Step::Delete(_) | Step::Flags { .. } => return false,
        };
        let mut there = self.programmed.in_range(new.address_space, new.gfns);
        there.any(|there| Some(there) != old)
            || (old.is_none() && self.programmed.with_id(new.address_space, new.id).is_some())
    }

    fn step<K: Kernel>(&mut self, kernel: &K, step: &Step) -> std::io::Result<()> {
        if let Some(slot) = step.drops_bitmap() {
            self.fetch(kernel, slot);
        }
        let argument = match step {
            Step::Delete(slot) => slot.removal(),
            Step::Move { to, .. } | Step::Flags { to, .. } | Step::Create(to) => to.region(),
        };
        // SAFETY: whoever attached to the table has vouched for the memory of its slots.
        unsafe { kernel.set_user_memory_region(&argument) }?;
        match step {
            Step::Delete(slot) => self.programmed.remove(slot),
            Step::Create(slot) => self.programmed.insert(*slot),
            Step::Flags { to, .. } => self.programmed.insert(*to),
            Step::Move { from, to } => {
                self.programmed.remove(from);
                self.programmed.insert(*to);
            }
        }
        Ok(())
    }

    /// Fetches the dirty bits of a slot that is about to go. Where the kernel does not tell, all its pages are dirty.
    fn fetch<K: Kernel>(&mut self, kernel: &K, slot: &KvmSlot) {
        let Some(log) = self.log.clone() else { return };
        let fetched = if self.rings.is_enabled() {
            self.rings.collect(kernel, &log, &self.programmed).is_ok()
        } else {
            self.merge_bitmap(kernel, &log, slot).is_ok()
        };
        if !fetched {
            log.mark_range(slot.address_space, slot.gfns);
        }
    }

    /// Adds a slot's dirty bits to the log. Returns how many there were.
    pub(crate) fn merge_bitmap<K: Kernel>(
        &mut self,
        kernel: &K,
        log: &DirtyLog,
        slot: &KvmSlot,
    ) -> std::io::Result<u64> {
        let words = slot.words();
        if self.words.len() < words {
            let more = words - self.words.len();
            self.words.try_reserve_exact(more).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
            self.words.resize(words, 0);
        }
        let words = &mut self.words[..words];
        // SAFETY: this is a slot of the kernel's, with these pages.
        unsafe { kernel.get_dirty_log(slot.number(), words) }?;
        Ok(log.merge(slot.address_space, slot.gfns, words).unwrap_or_else(|_| {
            // Bits behind the end: the kernel has another slot than we think.
            log.mark_range(slot.address_space, slot.gfns);
            slot.gfns.len()
        }))
    }
}
