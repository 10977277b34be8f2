//! What the caller chooses: how the kernel's slots are laid out, and who makes the vCPUs stand still.

use std::num::NonZeroU64;
use std::ops::Range;

/// How the kernel's slots are laid out.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The most pages that one slot of the kernel's has. Slots of the table that are larger are cut at multiples of
    /// this many frames, so that parts of them can come and go alone. `None`: they are not cut.
    pub max_pages: Option<NonZeroU64>,
    /// The ids that may be used; by default all that the VM has (`KVM_CAP_NR_MEMSLOTS`). Give another range where
    /// somebody else programs slots into the same VM.
    pub ids: Option<Range<u16>>,
}

/// Makes all vCPUs stand still.
pub trait Vcpus: Send {
    /// Makes all vCPUs leave the guest, does `work` while none is in it, and lets them go on.
    ///
    /// It is called from the thread that changes the table, during the change: a vCPU's thread that waits to change
    /// the table itself must count as paused.
    fn while_paused(&mut self, work: &mut dyn FnMut());
}

/// For a VM whose vCPUs do not run, or whose guest may see the gaps.
#[derive(Clone, Copy, Debug, Default)]
pub struct NotRunning;

impl Vcpus for NotRunning {
    fn while_paused(&mut self, work: &mut dyn FnMut()) {
        work();
    }
}
