//! A kernel without a kernel: the rules of `memslot`, which the real kernel has judged, a dirty bit for every page,
//! calls that fail on demand, and a witness of every state that a guest could have seen.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_NR_MEMSLOTS,
};
use memslot::dirty::ring::ENTRY_BYTES;
use memslot::rules::{Change, Errno, GuestMemfdFiles, Rules, UserMemoryRegion2};
use memslot::*;
use memslot_kvm::{Kernel, Vcpus};

use crate::common::{PAGE, RAM};
use crate::ring::{Ring, RingPages, Rings, Vcpu};

/// What a guest sees at a frame: the memory behind it, and whether it may write.
pub(crate) type Frame = (Backing, bool);
pub(crate) type Frames = BTreeMap<u64, Frame>;

pub(crate) struct Inner {
    pub(crate) table: SlotTable,
    /// Pages of slots (by id) that were written and not yet fetched.
    pub(crate) dirty: BTreeMap<u32, BTreeSet<u64>>,
    /// Calls of each kind.
    pub(crate) calls: BTreeMap<&'static str, u32>,
    /// From this call on (counted down), calls fail; this many of them.
    pub(crate) fail_in: Option<u32>,
    pub(crate) failures: u32,
    pub(crate) paused: bool,
    pub(crate) pauses: u32,
    /// What the guest could see after each call outside of a pause.
    pub(crate) seen: Vec<Frames>,
    pub(crate) manual_protect: bool,
    /// `KVM_GET_DIRTY_LOG` fails.
    pub(crate) no_dirty_log: bool,
    /// What the last call that failed on demand would have done.
    pub(crate) failed: Option<&'static str>,
    /// Ranges of guest_memfds that slots have; `None` where anything goes.
    pub(crate) bound: Option<BTreeSet<(u32, u64, u64)>>,
    pub(crate) rings: Rings,
}

struct Files<'b>(&'b mut Option<BTreeSet<(u32, u64, u64)>>);

impl GuestMemfdFiles for Files<'_> {
    fn bind(&mut self, file: u32, offset: u64, bytes: u64) -> Result<(), Errno> {
        let Some(bound) = self.0 else { return Ok(()) };
        let overlaps = |&(other, start, len): &(u32, u64, u64)| {
            other == file && offset < start + len && start < offset + bytes
        };
        if bound.iter().any(overlaps) {
            return Err(Errno::EINVAL);
        }
        bound.insert((file, offset, bytes));
        Ok(())
    }

    fn unbind(&mut self, file: u32, offset: u64, bytes: u64) {
        self.0.iter_mut().for_each(|bound| {
            bound.remove(&(file, offset, bytes));
        });
    }
}

#[derive(Clone)]
pub(crate) struct Fake {
    inner: Arc<Mutex<Inner>>,
    slots: u32,
    spaces: u8,
}

impl Fake {
    pub(crate) fn new(slots: u32) -> Self {
        Self::with_spaces(slots, 1)
    }

    pub(crate) fn with_spaces(slots: u32, spaces: u8) -> Self {
        let table = SlotTable::new(Limits { slots, address_spaces: spaces, ..Limits::default() }).unwrap();
        let inner = Inner {
            table,
            dirty: BTreeMap::new(),
            calls: BTreeMap::new(),
            fail_in: None,
            failures: 0,
            paused: false,
            pauses: 0,
            seen: Vec::new(),
            manual_protect: false,
            no_dirty_log: false,
            failed: None,
            bound: None,
            rings: Rings::default(),
        };
        Self { inner: Arc::new(Mutex::new(inner)), slots, spaces }
    }

    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// The guest writes a frame, if it can. With rings a vCPU whose ring is full cannot.
    pub(crate) fn write(&self, gfn: u64) -> bool {
        self.write_by(gfn, usize::try_from(gfn).unwrap())
    }

    /// A vCPU of the guest's writes a frame, if it can. (Of as many as there are.)
    pub(crate) fn write_by(&self, gfn: u64, vcpu: usize) -> bool {
        let mut inner = self.inner();
        let Some(slot) = inner.writable(gfn) else { return false };
        if slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) {
            let page = gfn - slot.base_gfn().get();
            if inner.rings.entries > 0 {
                return inner.rings.push(vcpu, slot.id().get(), page);
            }
            inner.dirty.entry(slot.id().get()).or_default().insert(page);
        }
        true
    }

    /// The kernel writes a frame for itself.
    pub(crate) fn write_by_kernel(&self, gfn: u64) -> bool {
        let mut inner = self.inner();
        let Some(slot) = inner.writable(gfn) else { return false };
        if slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) {
            assert!(inner.rings.entries == 0 || inner.rings.with_bitmap, "a write that no ring can take");
            inner.dirty.entry(slot.id().get()).or_default().insert(gfn - slot.base_gfn().get());
        }
        true
    }

    /// A new vCPU, with its ring.
    pub(crate) fn vcpu(&self) -> Vcpu {
        let mut inner = self.inner();
        let vcpu = Vcpu(Arc::new(RingPages::new(inner.rings.entries)));
        let pages = Arc::clone(&vcpu.0);
        inner.rings.vcpus.push(Ring { pages, written: 0, reset: 0 });
        vcpu
    }
}

impl Inner {
    fn writable(&self, gfn: u64) -> Option<Slot> {
        let slot = self.table.view().slot_at(RAM, Gfn::new(gfn)).copied();
        slot.filter(|slot| !slot.flags().contains(SlotFlags::READONLY))
    }
}

/// What each frame shows.
pub(crate) fn frames(view: &View) -> Frames {
    let slots = view.slots(RAM).filter(|slot| slot.hva().is_some());
    slots
        .flat_map(|slot| {
            let writable = !slot.flags().contains(SlotFlags::READONLY);
            (0..slot.pages()).map(move |page| {
                let backing = slot.backing().advanced(page * 4096).unwrap();
                (slot.base_gfn().get() + page, (backing, writable))
            })
        })
        .collect()
}

impl Kernel for Fake {
    fn page_bytes(&self) -> u64 {
        PAGE
    }

    fn check_extension(&self, cap: u32) -> u32 {
        match cap {
            KVM_CAP_NR_MEMSLOTS => self.slots,
            KVM_CAP_MULTI_ADDRESS_SPACE => self.spaces.into(),
            KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP => self.inner().rings.offers_bitmap.into(),
            _ => 1,
        }
    }

    fn enable_cap(&self, cap: u32, argument: u64) -> io::Result<()> {
        let mut inner = self.inner();
        match cap {
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => inner.manual_protect = true,
            KVM_CAP_DIRTY_LOG_RING => inner.rings.entries = u32::try_from(argument / ENTRY_BYTES).unwrap(),
            KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP => {
                assert!(inner.rings.entries > 0 && inner.table.view().is_empty());
                inner.rings.with_bitmap = true;
            }
            _ => panic!("capability {cap}"),
        }
        Ok(())
    }

    unsafe fn set_user_memory_region(&self, region: &UserMemoryRegion2) -> io::Result<()> {
        let mut inner = self.inner();
        let known = inner.table.view().slot(RAM, SlotId::new(region.region.slot & 0xffff)).is_some();
        match inner.fail_in {
            Some(0) if inner.failures > 0 => {
                inner.failures -= 1;
                inner.failed = Some(match (known, region.region.memory_size) {
                    (_, 0) => "delete",
                    (true, _) => "change",
                    (false, _) => "create",
                });
                return Err(io::Error::from_raw_os_error(Errno::ENOMEM.raw()));
            }
            Some(0) | None => {}
            Some(left) => inner.fail_in = Some(left - 1),
        }
        let before = inner.table.snapshot();
        let Inner { table, bound, .. } = &mut *inner;
        let change = Rules::default()
            .set_user_memory_region2(table, region, &mut Files(bound))
            .map_err(|refusal| {
                // The plan is ours: the kernel has no reason to refuse it.
                panic!("{region:x?} was refused: {refusal}");
            })
            .unwrap();
        let (id, logs) = (region.region.slot & 0xffff, region.region.flags & 1 != 0);
        let name = match change {
            Change::Create => "create",
            Change::Delete => "delete",
            Change::Move => "move",
            Change::FlagsOnly => "flags",
            Change::Nothing => panic!("{region:x?} changed nothing"),
        };
        *inner.calls.entry(name).or_default() += 1;
        if change == Change::Delete || !logs {
            inner.dirty.remove(&id);
            inner.rings.writable.retain(|&(slot, _)| slot != id);
        }
        if !inner.paused {
            if change == Change::Move {
                // The kernel takes the slot out before it puts it in again.
                let mut without = frames(&before);
                let gone = before.slot(RAM, SlotId::new(id)).unwrap().gfns();
                without.retain(|&gfn, _| !gone.contains(Gfn::new(gfn)));
                inner.seen.push(without);
            }
            let frames = frames(inner.table.view());
            inner.seen.push(frames);
        }
        Ok(())
    }

    unsafe fn get_dirty_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
        let mut inner = self.inner();
        let known = inner.table.view().slot(RAM, SlotId::new(slot)).copied();
        let logged = known.filter(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES));
        let logged = logged.ok_or_else(|| io::Error::from_raw_os_error(Errno::ENOENT.raw()))?;
        if inner.rings.entries > 0 && !inner.rings.with_bitmap {
            return Err(io::Error::from_raw_os_error(Errno::ENXIO.raw()));
        }
        if inner.no_dirty_log {
            return Err(io::Error::from_raw_os_error(Errno::EFAULT.raw()));
        }
        assert_eq!(words.len() as u64, logged.pages().div_ceil(64));
        words.fill(0);
        for page in inner.dirty.get(&slot).into_iter().flatten() {
            words[usize::try_from(page / 64).unwrap()] |= (1u64 << (page % 64)).to_le();
        }
        if !inner.manual_protect {
            inner.dirty.remove(&slot);
        }
        Ok(())
    }

    fn clear_dirty_log(&self, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()> {
        let mut inner = self.inner();
        let slot_pages = inner.table.view().slot(RAM, SlotId::new(slot)).unwrap().pages();
        let end = first_page + u64::from(pages);
        assert!(first_page % 64 == 0 && end <= slot_pages && (pages % 64 == 0 || end == slot_pages));
        let dirty = inner.dirty.entry(slot).or_default();
        dirty.retain(|&page| {
            let at = page.wrapping_sub(first_page);
            at >= u64::from(pages)
                || u64::from_le(words[usize::try_from(at / 64).unwrap()]) >> (at % 64) & 1 == 0
        });
        *inner.calls.entry("clear").or_default() += 1;
        Ok(())
    }

    fn reset_dirty_rings(&self) -> io::Result<u32> {
        Ok(self.inner().rings.reset())
    }
}

/// vCPUs that write the given frames just before they stand still, and just after.
pub(crate) struct Writers {
    pub(crate) fake: Fake,
    pub(crate) frames: Vec<u64>,
    pub(crate) obey: bool,
    /// Called when they are asked to stand still, and after the work.
    pub(crate) hook: Hook,
}

/// Is told the step, and the update at those of a listener.
type Work = dyn FnMut(&str, Option<&Update<'_>>) + Send;

/// What happens at each step of a change.
#[derive(Clone, Default)]
pub(crate) struct Hook(Arc<Mutex<Option<Box<Work>>>>);

impl Hook {
    pub(crate) fn set(&self, work: impl FnMut(&str, Option<&Update<'_>>) + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(work));
    }

    pub(crate) fn call(&self, step: &str, update: Option<&Update<'_>>) {
        // A hook may panic on purpose.
        if let Some(work) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            work(step, update);
        }
    }
}

/// Calls the hook where it stands among the listeners.
pub(crate) struct Hooked(pub(crate) Hook);

impl Listener for Hooked {
    fn name(&self) -> &str {
        "hooked"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        self.0.call("prepare", Some(update));
        Ok(())
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        self.0.call("commit", Some(update));
        Ok(())
    }

    fn undo(&mut self, update: &Update<'_>) {
        self.0.call("undo", Some(update));
    }

    fn settled(&mut self, update: &Update<'_>) {
        self.0.call("settled", Some(update));
    }

    fn abort(&mut self, update: &Update<'_>) {
        self.0.call("abort", Some(update));
    }
}

impl Writers {
    /// They do as they are told, and write these frames.
    pub(crate) fn of(fake: &Fake, frames: &[u64]) -> Self {
        Self { fake: fake.clone(), frames: frames.to_vec(), obey: true, hook: Hook::default() }
    }
}

impl Vcpus for Writers {
    fn while_paused(&mut self, work: &mut dyn FnMut()) {
        if !self.obey {
            return;
        }
        self.hook.call("pause", None);
        for &frame in &self.frames {
            self.fake.write(frame);
        }
        {
            let mut inner = self.fake.inner();
            inner.paused = true;
            inner.pauses += 1;
        }
        work();
        let mut inner = self.fake.inner();
        inner.paused = false;
        let frames = frames(inner.table.view());
        inner.seen.push(frames);
        drop(inner);
        self.hook.call("resume", None);
    }
}
