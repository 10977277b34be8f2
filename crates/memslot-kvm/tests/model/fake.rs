//! A kernel without a kernel: the rules of `memslot`, which the real kernel has judged, a dirty bit for every page,
//! calls that fail on demand, and a witness of every state that a guest could have seen.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_NR_MEMSLOTS};
use memslot::rules::{Change, Errno, GuestMemfdFiles, Rules, UserMemoryRegion2};
use memslot::*;
use memslot_kvm::{Kernel, Vcpus};

use crate::common::{PAGE, RAM};

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
}

struct Files;

impl GuestMemfdFiles for Files {
    fn bind(&mut self, _: u32, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn unbind(&mut self, _: u32, _: u64, _: u64) {}
}

#[derive(Clone)]
pub(crate) struct Fake {
    inner: Arc<Mutex<Inner>>,
    slots: u32,
}

impl Fake {
    pub(crate) fn new(slots: u32) -> Self {
        let table = SlotTable::new(Limits { slots, address_spaces: 1, ..Limits::default() }).unwrap();
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
        };
        Self { inner: Arc::new(Mutex::new(inner)), slots }
    }

    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// The guest writes a frame, if it can.
    pub(crate) fn write(&self, gfn: u64) -> bool {
        let mut inner = self.inner();
        let Some(slot) = inner.table.view().slot_at(RAM, Gfn::new(gfn)).copied() else { return false };
        if slot.flags().contains(SlotFlags::READONLY) {
            return false;
        }
        if slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES) {
            let page = gfn - slot.base_gfn().get();
            inner.dirty.entry(slot.id().get()).or_default().insert(page);
        }
        true
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
            KVM_CAP_MULTI_ADDRESS_SPACE => 0,
            _ => 1,
        }
    }

    fn enable_cap(&self, _: u32, _: u64) -> io::Result<()> {
        self.inner().manual_protect = true;
        Ok(())
    }

    unsafe fn set_user_memory_region(&self, region: &UserMemoryRegion2) -> io::Result<()> {
        let mut inner = self.inner();
        match inner.fail_in {
            Some(0) if inner.failures > 0 => {
                inner.failures -= 1;
                return Err(io::Error::from_raw_os_error(Errno::ENOMEM.raw()));
            }
            Some(0) | None => {}
            Some(left) => inner.fail_in = Some(left - 1),
        }
        let before = inner.table.snapshot();
        let change = Rules::default()
            .set_user_memory_region2(&mut inner.table, region, &mut Files)
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
        Ok(0)
    }
}

/// vCPUs that write the given frames just before they stand still, and just after.
pub(crate) struct Writers {
    pub(crate) fake: Fake,
    pub(crate) frames: Vec<u64>,
    pub(crate) obey: bool,
}

impl Vcpus for Writers {
    fn while_paused(&mut self, work: &mut dyn FnMut()) {
        if !self.obey {
            return;
        }
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
    }
}
