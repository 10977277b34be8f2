//! The listener, and the handle to it.

use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_NR_MEMSLOTS};
use memslot::{
    AddressSpaceId, Gfn, GfnRange, Handle, Listener, ListenerError, PieceKind, SlotChange, SlotTable,
    Snapshot, Update, View,
};

use crate::error::{AttachError, KvmError};
use crate::ids::SlotIds;
use crate::kernel::Kernel;
use crate::kvm_slot::KvmSlot;
use crate::options::{Options, Vcpus};
use crate::plan::{Plan, plan};
use crate::programmed::Programmed;
use crate::single::single;
use crate::step::{Place, Step};
use crate::steps::State;
use crate::vm::Vm;

pub(crate) struct Shared<K> {
    pub(crate) kernel: K,
    /// Whose slots they are. While the kernel has them, their memory should be there: this keeps what the last version
    /// carries.
    pub(crate) table: Handle,
    options: Options,
    spaces: u8,
    /// Taken before `state`, and not while it is held: who pauses a vCPU waits for it.
    vcpus: Mutex<Box<dyn Vcpus>>,
    state: Mutex<State>,
}

impl<K> Shared<K> {
    /// Poison says nothing here: the state follows each ioctl at once.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a VM's memory slots in step with a table. See the [crate documentation](crate).
///
/// This is a handle; clones are the same. The listener itself belongs to the table.
pub struct KvmSlots<K = Vm> {
    pub(crate) shared: Arc<Shared<K>>,
}

impl<K> Clone for KvmSlots<K> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<K: Kernel + 'static> KvmSlots<K> {
    /// Programs the slots that `table` has into the VM and follows every change of the table from now on. Where a guest could
    /// see a change half done, `vcpus` makes it stand still meanwhile: [`NotRunning`](crate::NotRunning) as long as no
    /// vCPU runs, and [`set_vcpus`](Self::set_vcpus) before one does.
    ///
    /// # Errors
    /// [`AttachError`]; the VM has none of the slots then.
    ///
    /// # Safety
    /// The guest reads the host memory of every slot of the table, and writes that of every slot that is not
    /// read-only, from when the slot is created until its delete (or the table's drop, and the VM's) has returned:
    /// it must be memory of the VMM's that may be used so, mapped all the time.
    ///
    /// Nobody else programs slots with the same ids ([`Options::ids`]) into the VM, another `KvmSlots` included: the
    /// kernel writes as many dirty bits as its slot has pages, and reads a call about an id that it knows as a change.
    pub unsafe fn attach(
        table: &mut SlotTable,
        kernel: K,
        vcpus: impl Vcpus + 'static,
        options: Options,
    ) -> Result<Self, AttachError> {
        let (ours, kernels) = (table.view().page_size().bytes(), kernel.page_bytes());
        if ours != kernels {
            // The kernel would write a bit for each of its pages, wherever there are more of them.
            return Err(AttachError::PageSize { table: ours, kernel: kernels });
        }
        let most = kernel.check_extension(KVM_CAP_NR_MEMSLOTS);
        let spaces =
            u8::try_from(kernel.check_extension(KVM_CAP_MULTI_ADDRESS_SPACE)).unwrap_or(u8::MAX).max(1);
        let most = most.min(1 << 16);
        let ids = options.ids.clone().map_or(0..most, |ids| u32::from(ids.start)..most.min(ids.end.into()));
        let state = State::new(Programmed::new(spaces, &SlotIds::new(ids)));
        let shared = Arc::new(Shared {
            kernel,
            table: table.handle(),
            options,
            spaces,
            vcpus: Mutex::new(Box::new(vcpus)),
            state: Mutex::new(state),
        });
        let mut follower = Follower {
            shared: Arc::clone(&shared),
            plan: Plan::default(),
            places: Vec::new(),
            put_right: Vec::new(),
            fetches: 0,
            kept: Vec::new(),
        };
        let all = GfnRange::new(Gfn::new(0), Gfn::new(u64::MAX)).unwrap_or_default();
        follower.places.extend(table.view().address_spaces().map(|space| (space, all)));
        follower.plan(table.view(), table.view())?;
        follower.issue(table.view(), None)?;
        let issued = std::mem::take(&mut follower.plan);
        if let Err(error) = table.add_listener(Box::new(follower)) {
            shared.state().take_back(&shared.kernel, &issued.steps, table.view());
            return Err(error.into());
        }
        Ok(Self { shared })
    }

    /// Who makes the vCPUs stand still from now on, where that is needed.
    pub fn set_vcpus(&self, vcpus: impl Vcpus + 'static) {
        *self.shared.vcpus.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(vcpus);
    }

    /// The slots that the kernel has, in order of address space and gfn.
    #[must_use]
    pub fn slots(&self) -> Vec<KvmSlot> {
        self.shared.state().programmed.in_order().all().copied().collect()
    }

    /// The slot of the kernel's that covers a frame.
    #[must_use]
    pub fn slot_at(&self, space: AddressSpaceId, gfn: Gfn) -> Option<KvmSlot> {
        let gfns = GfnRange::with_len(gfn, 1)?;
        self.shared.state().programmed.in_order().in_range(space, gfns).next().copied()
    }

    /// The slot of the kernel's with this id.
    #[must_use]
    pub fn slot(&self, space: AddressSpaceId, id: u16) -> Option<KvmSlot> {
        self.shared.state().programmed.with_id(space, id).copied()
    }

    /// Whether the kernel has what the table says. It has not where ioctls failed and could not be taken back
    /// either; every later change of the table tries again.
    #[must_use]
    pub fn is_in_step(&self) -> bool {
        self.shared.state().out_of_step.is_empty()
    }

    /// The kernel's calls.
    #[must_use]
    pub fn kernel(&self) -> &K {
        &self.shared.kernel
    }
}

impl<K> fmt::Debug for KvmSlots<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.shared.state().programmed.in_order().all()).finish()
    }
}

struct Follower<K> {
    shared: Arc<Shared<K>>,
    plan: Plan,
    places: Vec<Place>,
    /// What was out of step before the change.
    put_right: Vec<Place>,
    /// How often bits had been fetched when the change was made.
    fetches: u64,
    /// Versions whose slots the kernel may still have, though the table has not: their memory has to stay.
    kept: Vec<Snapshot>,
}

impl<K: Kernel> Follower<K> {
    /// Plans a change of one slot, which most changes are. Returns whether it could: not where more than that slot of the
    /// kernel's has to change.
    fn plan_single(&mut self, change: &SlotChange) -> bool {
        let mut state = self.shared.state();
        if !state.out_of_step.is_empty() {
            return false;
        }
        self.plan.settle_ids(&mut state.programmed);
        self.plan.clear();
        let planned = single(&mut state.programmed, change, &self.shared.options, &mut self.plan);
        self.plan.needs_pause = self.plan.leaves_gap || (self.plan.ends_log && state.log.is_some());
        planned
    }

    fn plan(&mut self, before: &View, after: &View) -> Result<(), KvmError> {
        let Shared { options, spaces, .. } = &*self.shared;
        let beyond = (*spaces..after.limits().address_spaces).map(AddressSpaceId::new);
        if let Some(space) = beyond.into_iter().find(|&space| after.len(space) > 0) {
            return Err(KvmError::NoSuchAddressSpace { address_space: space.get(), spaces: *spaces });
        }
        let mut state = self.shared.state();
        self.places.extend_from_slice(&state.out_of_step);
        // Those of the plan before, which may not have come to be, however it ended.
        self.plan.settle_ids(&mut state.programmed);
        self.plan.clear();
        plan(&mut state.programmed, (before, after), &mut self.places, options, &mut self.plan)?;
        self.plan.needs_pause = self.plan.leaves_gap || (self.plan.ends_log && state.log.is_some());
        Ok(())
    }

    /// Has the kernel follow, from `before` on. `update` is `None` where the table changes nothing.
    fn issue(&mut self, before: &View, update: Option<&Update<'_>>) -> Result<(), KvmError> {
        let Self { shared, plan, put_right, fetches, kept, .. } = self;
        put_right.clear();
        let under_way = UnderWay { shared, plan, update, kept, has_begun: Cell::new(false) };
        let result = with_vcpus(shared, plan, |state| {
            under_way.has_begun.set(true);
            state.issue(&shared.kernel, plan, before)?;
            put_right.append(&mut state.out_of_step);
            *fetches = state.fetches;
            Ok(())
        });
        under_way.ends();
        let result = result.unwrap_or(Err(KvmError::NotPaused));
        if result.is_ok() {
            plan.is_done();
        } else {
            self.keep(update);
        }
        result
    }

    /// The kernel may have kept slots of a version that the table takes back.
    fn keep(&mut self, update: Option<&Update<'_>>) {
        if !self.shared.state().out_of_step.is_empty() {
            self.kept.extend(update.and_then(Update::snapshot));
        }
    }
}

/// A plan that is being carried out. A panic may end that anywhere: then nobody knows what the kernel has there, and the
/// memory of both versions has to stay. (That of the version before does, in the table, which goes back to it.)
struct UnderWay<'f, K> {
    shared: &'f Shared<K>,
    plan: &'f Plan,
    update: Option<&'f Update<'f>>,
    kept: &'f mut Vec<Snapshot>,
    has_begun: Cell<bool>,
}

impl<K> UnderWay<'_, K> {
    fn ends(self) {
        std::mem::forget(self);
    }
}

impl<K> Drop for UnderWay<'_, K> {
    fn drop(&mut self) {
        if self.has_begun.get() {
            self.shared.state().out_of_step.extend(self.plan.steps.iter().flat_map(Step::places));
            self.kept.extend(self.update.and_then(Update::snapshot));
        }
    }
}

/// Does the plan's work, while the vCPUs stand still if they have to; `None` if they could not be made to.
fn with_vcpus<K: Kernel, T>(
    shared: &Shared<K>,
    plan: &Plan,
    mut work: impl FnMut(&mut State) -> T,
) -> Option<T> {
    if !plan.needs_pause {
        return Some(work(&mut shared.state()));
    }
    let mut done = None;
    let mut vcpus = shared.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
    vcpus.while_paused(&mut || {
        if done.is_none() {
            done = Some(work(&mut shared.state()));
        }
    });
    done
}

impl<K: Kernel> Listener for Follower<K> {
    fn name(&self) -> &str {
        "/dev/kvm"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        if let [change] = update.slots {
            if self.plan_single(change) {
                return Ok(());
            }
        }
        self.places.clear();
        self.places.extend(update.pieces.iter().filter_map(|piece| match piece.kind {
            PieceKind::Changed { old, new } if old.flags() == new.flags() => None,
            _ => Some((piece.address_space, piece.gfns)),
        }));
        Ok(self.plan(update.before, update.after)?)
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        Ok(self.issue(update.before, Some(update))?)
    }

    fn undo(&mut self, update: &Update<'_>) {
        let Self { shared, plan, put_right, fetches, kept, .. } = self;
        let has_begun = Cell::new(true);
        let under_way = UnderWay { shared, plan, update: Some(update), kept, has_begun };
        let mut take_back = |state: &mut State| {
            state.take_back(&shared.kernel, &plan.steps, update.before);
            state.out_of_step.append(put_right);
            if state.fetches != *fetches {
                state.mark_where_it_was(&plan.steps, update.before);
            }
        };
        // The vCPUs do not matter more than being in step.
        if with_vcpus(shared, plan, &mut take_back).is_none() {
            take_back(&mut shared.state());
        }
        under_way.ends();
        plan.is_taken_back();
        self.keep(Some(update));
    }

    fn settled(&mut self, _: &Update<'_>) {
        if !self.kept.is_empty() && self.shared.state().out_of_step.is_empty() {
            self.kept.clear();
        }
    }
}
