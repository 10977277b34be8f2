//! A virtual processor's access to the shadow tables.

use memslot::{AddressSpaceId, Gpa};

use super::guest::{GuestAccess, GuestPaging, PageFault};
use super::{Shadow, ShadowError, ShadowHost};
use crate::host::Pfn;
use crate::level::Level;

/// How the processor has to run the guest for a root.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RootKind {
    /// In long mode with four levels.
    Level4,
    /// In long mode with five levels.
    Level5,
    /// With PAE paging: the root is a page whose first four entries are the PDPTEs. For guests that are not in long mode, those
    /// without paging included.
    Pae,
}

/// What belongs into the processor's CR3 (`VMCB.CR3`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ShadowRoot {
    /// The frame of the root table.
    pub pfn: Pfn,
    /// How it is to be walked.
    pub kind: RootKind,
}

/// What became of a page fault that the processor raised while the guest ran on shadow tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum ShadowFault {
    /// The access is allowed now, in a page of this size.
    Mapped(Level),
    /// It was allowed already: the processor had an old translation.
    AlreadyMapped,
    /// The guest's own tables do not allow it: the guest gets this fault.
    Inject(PageFault),
    /// No memory is to be mapped there, or the slot is read-only and this is a write: the access is emulated.
    Mmio(Gpa),
    /// A write to one of the guest's page tables, which stays write-protected: emulate it and tell with
    /// [`wrote`](Shadow::wrote), or [`unprotect`](Shadow::unprotect) it and let the guest try again.
    WriteTracked(Gpa),
    /// The host does not allow this access to the page.
    Denied(Gpa),
    /// Something is changing there, or the root is [stale](ShadowVcpu::is_stale): let the guest try again, after loading if it is.
    Retry,
}

/// A virtual processor's access to the shadow tables. Make one for each, and keep it.
///
/// A hypervisor calls [`load`](Self::load) whenever the guest changes CR0, CR3, CR4 or EFER, [`invlpg`](Self::invlpg) for the
/// instruction, [`flush_guest`](Self::flush_guest) for what else flushes (such as toggling `CR4.PGE`), and [`fault`](Self::fault) for page faults. After each but the last it
/// flushes the processor's own TLB (or has VMRUN do so), as the guest's instruction would have.
/// Before each entry it asks [`is_stale`](Self::is_stale), and loads the same registers again if so.
pub struct ShadowVcpu<H: ShadowHost> {
    shadow: Shadow<H>,
}

impl<H: ShadowHost> ShadowVcpu<H> {
    /// The tables.
    #[must_use]
    pub fn shadow(&self) -> &Shadow<H> {
        &self.shadow
    }

    /// The guest's paging is now this, in this address space: finds or makes the root, brings everything below it that the guest
    /// may have changed behind our back up to date, and says what belongs into the processor's CR3.
    ///
    /// For PAE paging the PDPTEs are those of `paging`: load them before.
    ///
    /// # Errors
    /// [`ShadowError`]; the old root stays.
    pub fn load(
        &mut self,
        paging: GuestPaging,
        space: AddressSpaceId,
    ) -> Result<ShadowRoot, ShadowError<H::Error>> {
        let _ = (paging, space);
        todo!()
    }

    /// The root, if one was loaded.
    #[must_use]
    pub fn root(&self) -> Option<ShadowRoot> {
        todo!()
    }

    /// Whether the root was given up meanwhile (its slot went, or all shadow pages did): the guest must not be entered before
    /// [`reload`](Self::reload). One load.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        todo!()
    }

    /// [Loads](Self::load) the same paging again.
    ///
    /// # Errors
    /// As `load`.
    pub fn reload(&mut self) -> Result<ShadowRoot, ShadowError<H::Error>> {
        todo!()
    }

    /// The processor raised a page fault at `va`.
    ///
    /// # Errors
    /// [`ShadowError`]; nothing has changed.
    pub fn fault(&mut self, va: u64, access: GuestAccess) -> Result<ShadowFault, ShadowError<H::Error>> {
        let _ = (va, access);
        todo!()
    }

    /// The guest executes INVLPG: its entries for `va` are read again.
    pub fn invlpg(&mut self, va: u64) {
        let _ = va;
        todo!()
    }

    /// The guest flushes everything: all that it may have changed is read again.
    pub fn flush_guest(&mut self) {
        todo!()
    }
}
