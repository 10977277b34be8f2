//! Issuing planned ioctls, and taking them back.

use memslot::View;
use memslot::dirty::DirtyLog;

use crate::error::KvmError;
use crate::kernel::Kernel;
use crate::kvm_slot::KvmSlot;
use crate::marks::Marks;
use crate::plan::Plan;
use crate::programmed::Programmed;
use crate::ring::Rings;
use crate::step::{Place, Step};

/// What there is to be in step with the table. Behind the lock of [`KvmSlots`](crate::KvmSlots).
pub(crate) struct State {
    pub(crate) programmed: Programmed,
    /// Where the kernel's dirty bits go.
    pub(crate) log: Option<DirtyLog>,
    pub(crate) rings: Rings,
    pub(crate) manual_protect: bool,
    /// How often bits were fetched other than for a change.
    pub(crate) fetches: u64,
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
            fetches: 0,
            words: Vec::new(),
            out_of_step: Vec::new(),
        }
    }

    /// Issues all steps, or none: when one fails, those before it are taken back.
    pub(crate) fn issue<K: Kernel>(
        &mut self,
        kernel: &K,
        plan: &Plan,
        before: &View,
    ) -> Result<(), KvmError> {
        for (done, step) in plan.steps.iter().enumerate() {
            if let Err(error) = self.step(kernel, step, None) {
                self.take_back(kernel, &plan.steps[..done], before);
                return Err(KvmError::Ioctl { what: step.to_string(), error });
            }
        }
        Ok(())
    }

    /// Takes back steps that were issued, the last one first. What cannot be taken back is remembered as out of step.
    pub(crate) fn take_back<K: Kernel>(&mut self, kernel: &K, steps: &[Step], before: &View) {
        for step in steps.iter().rev() {
            let step = step.reversed();
            if self.is_in_the_way(&step) || self.step(kernel, &step, Some(before)).is_err() {
                self.out_of_step.extend(step.places());
            }
        }
    }

    /// Somebody fetched bits between a change and its taking back, when the log may have gone back to the version before
    /// already: then they lie where the memory was meanwhile. Where it is again, all of it counts as dirty.
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
    fn is_in_the_way(&mut self, step: &Step) -> bool {
        let (new, old) = match step {
            Step::Create(slot) => (slot, None),
            Step::Move { from, to } => (to, Some(from)),
            Step::Delete(_) | Step::Flags { .. } => return false,
        };
        let has_id = self.programmed.with_id(new.address_space, new.id).is_some();
        let mut there = self.programmed.in_order().in_range(new.address_space, new.gfns);
        there.any(|there| Some(there) != old) || (old.is_none() && has_id)
    }

    /// Issues a step. `back_to` is the version that it is a step back to.
    fn step<K: Kernel>(&mut self, kernel: &K, step: &Step, back_to: Option<&View>) -> std::io::Result<()> {
        if let Some(slot) = step.drops_bitmap() {
            self.fetch_last(kernel, slot, back_to);
        }
        let argument = match step {
            Step::Delete(slot) => slot.removal(),
            Step::Move { to, .. } | Step::Flags { to, .. } | Step::Create(to) => to.region(),
        };
        // Before the call, not after it: what the plan has just looked at is in the caches still, and the kernel leaves
        // little there.
        self.programmed.apply(step);
        // SAFETY: whoever attached to the table has vouched for the memory of its slots.
        let result = unsafe { kernel.set_user_memory_region(&argument) };
        match step {
            _ if result.is_err() => self.programmed.apply(&step.reversed()),
            // Entries that are left would count for the next slot with this id.
            Step::Flags { from, to } if from.logs() && !to.logs() && self.rings.is_enabled() => {
                self.fetch_last(kernel, from, back_to);
            }
            _ => {}
        }
        result
    }

    /// Fetches the dirty bits of a slot that is about to go. Where the kernel does not tell, all its pages are dirty.
    fn fetch_last<K: Kernel>(&mut self, kernel: &K, slot: &KvmSlot, back_to: Option<&View>) {
        let Some(log) = self.log.clone() else { return };
        let marks = Marks { log: &log, back_to };
        let mut fetched = true;
        if self.rings.is_enabled() {
            fetched = self.rings.collect(kernel, &marks, &self.programmed).is_ok();
        }
        if fetched && self.has_bitmaps() {
            fetched = self.merge_bitmap(kernel, &marks, slot).is_ok();
        }
        if !fetched {
            marks.add(slot, slot.gfns);
        }
    }

    /// Whether there are dirty bits in bitmaps: always, but with rings where every write is a vCPU's.
    pub(crate) fn has_bitmaps(&self) -> bool {
        !self.rings.is_enabled() || self.rings.with_bitmap()
    }

    /// Adds a slot's dirty bits to the log. Returns how many there were.
    pub(crate) fn merge_bitmap<K: Kernel>(
        &mut self,
        kernel: &K,
        marks: &Marks<'_>,
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
        Ok(marks.merge(slot, words).unwrap_or_else(|| {
            // Bits behind the end: the kernel has another slot than we think.
            marks.add(slot, slot.gfns);
            slot.gfns.len()
        }))
    }
}
