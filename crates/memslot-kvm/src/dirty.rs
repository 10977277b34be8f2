//! The kernel's dirty bits, on their way into a dirty log.
//!
//! Three ways of the kernel's, one of ours: [`KvmSlots::harvest`] fetches what the kernel knows into the log, and has the
//! consumer take it from there.
//!
//! | the kernel | fetch | re-arm |
//! |---|---|---|
//! | bitmaps (the default) | `KVM_GET_DIRTY_LOG` takes the bits and write-protects the pages | done already |
//! | bitmaps, [manual protection](KvmSlots::enable_manual_protect) | `KVM_GET_DIRTY_LOG` copies the bits | `KVM_CLEAR_DIRTY_LOG`, for the pages that were taken |
//! | [rings](KvmSlots::enable_rings) | entries are read and marked, `KVM_RESET_DIRTY_RINGS` write-protects | done already |
//!
//! Where the kernel also writes guest memory for no vCPU (arm64, for its interrupt tables), it keeps a bitmap beside the rings; then a
//! fetch reads both, which costs what bitmaps cost.
//!
//! In each of them a page is write-protected after its bit was taken and before anybody reads the page: a write that
//! comes later is reported the next time.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::MutexGuard;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use memslot::dirty::{Consumer, DirtyLog, Harvest, Rearm};
use memslot::{AddressSpaceId, GfnRange, SlotTable};

use crate::error::DirtyError;
use crate::kernel::Kernel;
use crate::kvm_slot::KvmSlot;
use crate::marks::Marks;
use crate::slots::KvmSlots;
use crate::steps::State;

impl<K: Kernel + 'static> KvmSlots<K> {
    /// Gives the table a dirty log that the kernel's bits flow into; the same one each time.
    ///
    /// The log has to come after this crate's listener, so that it hears of a move after the bits of a slot that goes
    /// were fetched: therefore it is made here.
    ///
    /// # Errors
    /// [`DirtyError::OtherTable`], [`DirtyError::OutOfMemory`].
    pub fn dirty_log(&self, table: &mut SlotTable) -> Result<DirtyLog, DirtyError> {
        if !self.shared.table.same_table(&table.handle()) {
            return Err(DirtyError::OtherTable);
        }
        if let Some(log) = &self.shared.state().log {
            return Ok(log.clone());
        }
        let log = DirtyLog::attach(table)?;
        self.shared.state().log = Some(log.clone());
        Ok(log)
    }

    /// Turns `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` on: fetching bits no longer write-protects pages; only those that a
    /// consumer takes are. With `initially_set`, all pages of a slot count as dirty when its logging starts, which
    /// spares the kernel to write-protect them all at that moment.
    ///
    /// # Errors
    /// The kernel's, [`DirtyError::NoLog`] and [`DirtyError::RingsAndManualProtect`]; nothing has changed then.
    pub fn enable_manual_protect(&self, initially_set: bool) -> Result<(), DirtyError> {
        let mut state = self.shared.state();
        let log = state.log.clone().ok_or(DirtyError::NoLog)?;
        if state.rings.is_enabled() {
            return Err(DirtyError::RingsAndManualProtect);
        }
        let mut argument = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
        if initially_set {
            argument |= KVM_DIRTY_LOG_INITIALLY_SET;
        }
        self.shared
            .kernel
            .enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, argument.into())
            .map_err(|error| DirtyError::Ioctl { what: "manual dirty log protection".to_owned(), error })?;
        log.set_initially_set(initially_set);
        state.manual_protect = true;
        Ok(())
    }

    /// Has the kernel keep dirty rings of `entries` entries instead of bitmaps: a power of two, a page of them at least,
    /// and more than the processor needs for itself (1024 is enough everywhere with pages of 4 KiB). Before the first
    /// vCPU is made; each vCPU is then told with [`add_vcpu`](Self::add_vcpu), before it runs. On arm64 (wherever there is
    /// `KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`, which is turned on as well) also before there is any slot.
    ///
    /// All entries are read here, and those of slots that are not this table's are lost: rings are for a VM whose slots
    /// are all of one table.
    ///
    /// A vCPU whose ring is full leaves the guest with `KVM_EXIT_DIRTY_RING_FULL`; [`fetch`](Self::fetch) makes room.
    ///
    /// # Errors
    /// The kernel's, [`DirtyError::NoLog`], [`DirtyError::RingsAndManualProtect`] and [`DirtyError::RingsAfterSlots`].
    pub fn enable_rings(&self, entries: u32) -> Result<(), DirtyError> {
        let state = &mut *self.shared.state();
        if state.log.is_none() {
            return Err(DirtyError::NoLog);
        }
        if state.manual_protect {
            return Err(DirtyError::RingsAndManualProtect);
        }
        state.rings.enable(&self.shared.kernel, entries, &state.programmed)
    }

    /// Reads the ring of this vCPU from now on. `number` is the caller's name for it, the vCPU's id for instance.
    ///
    /// The ring lives, and with it the vCPU, until [`remove_vcpu`](Self::remove_vcpu). A vCPU is added once: two readers of
    /// one ring each get half of it.
    ///
    /// # Errors
    /// [`DirtyError::NoRings`], [`DirtyError::VcpuKnown`], and those of mapping the ring.
    pub fn add_vcpu(&self, number: u32, vcpu: &impl AsRawFd) -> Result<(), DirtyError> {
        self.shared.state().rings.add(number, vcpu)
    }

    /// Reads the ring of this vCPU once more and forgets it. What the vCPU writes after that is lost, so it must not run
    /// any more. Returns how many pages all rings named.
    ///
    /// # Errors
    /// [`DirtyError::NoSuchVcpu`], and those of [`fetch`](Self::fetch): the vCPU is still known then.
    pub fn remove_vcpu(&self, number: u32) -> Result<u64, DirtyError> {
        let mut state = self.shared.state();
        if !state.rings.knows(number) {
            return Err(DirtyError::NoSuchVcpu { vcpu: number });
        }
        let pages = fetch(&self.shared.kernel, &mut state)?;
        state.rings.remove(number);
        Ok(pages)
    }

    /// Fetches all dirty bits that the kernel has into the log. Returns how many pages it named.
    ///
    /// # Errors
    /// [`DirtyError`]; what was fetched before is in the log.
    pub fn fetch(&self) -> Result<u64, DirtyError> {
        let mut state = self.shared.state();
        fetch(&self.shared.kernel, &mut state)
    }

    /// Fetches all dirty bits, and has `consumer` take all that it has not seen.
    ///
    /// # Errors
    /// [`DirtyError`]; nothing is lost.
    pub fn harvest<'c>(&self, consumer: &'c Consumer) -> Result<Harvest<'c>, DirtyError> {
        self.fetch()?;
        Ok(consumer.harvest(&mut self.rearm())?)
    }

    /// What a consumer re-arms pages with, for harvests other than [`harvest`](Self::harvest). The kernel's slots do not
    /// change as long as it lives: changes of the table wait, and so does every other call of this handle and its clones.
    /// A thread that makes one while it has this waits for itself.
    #[must_use]
    pub fn rearm(&self) -> KvmRearm<'_, K> {
        KvmRearm { kernel: &self.shared.kernel, state: self.shared.state(), pending: None }
    }
}

fn fetch<K: Kernel>(kernel: &K, state: &mut State) -> Result<u64, DirtyError> {
    let log = state.log.clone().ok_or(DirtyError::NoLog)?;
    let marks = Marks { log: &log, back_to: None };
    state.fetches += 1;
    let mut pages = 0;
    if state.rings.is_enabled() {
        pages += state
            .rings
            .collect(kernel, &marks, &state.programmed)
            .map_err(|error| DirtyError::Ioctl { what: "reset dirty rings".to_owned(), error })?;
    }
    if state.has_bitmaps() {
        let logged: Vec<KvmSlot> =
            state.programmed.in_order().all().filter(|slot| slot.logs()).copied().collect();
        for slot in &logged {
            pages += state
                .merge_bitmap(kernel, &marks, slot)
                .map_err(|error| DirtyError::Ioctl { what: format!("get the dirty log of {slot}"), error })?;
        }
    }
    Ok(pages)
}

/// Re-arms pages with `KVM_CLEAR_DIRTY_LOG`, where the kernel wants that; made by [`KvmSlots::rearm`].
pub struct KvmRearm<'k, K: Kernel = crate::Vm> {
    kernel: &'k K,
    state: MutexGuard<'k, State>,
    pending: Option<Pending>,
}

/// Pages of one slot that will be cleared with one call.
struct Pending {
    slot: KvmSlot,
    /// The first page of `mask`, counted from the slot's; a multiple of 64.
    first_page: u64,
    mask: Vec<u64>,
}

/// Two harvested runs that are further apart than this many words are cleared by two calls.
const GAP: usize = 512;

impl<K: Kernel> KvmRearm<'_, K> {
    fn add(&mut self, slot: &KvmSlot, gfns: GfnRange) -> io::Result<()> {
        let Some(mut first) = gfns.start().offset_from(slot.gfns.start()) else { return Ok(()) };
        let end = first + gfns.len();
        let fits = self.pending.as_ref().is_some_and(|pending| {
            let ahead = first.checked_sub(pending.first_page).map(|pages| pages / 64);
            let near = ahead.is_some_and(|ahead| ahead <= (pending.mask.len() + GAP) as u64);
            pending.slot == *slot && near
        });
        if !fits {
            self.clear()?;
        }
        let first_page = first - first % 64;
        let pending =
            self.pending.get_or_insert_with(|| Pending { slot: *slot, first_page, mask: Vec::new() });
        let words = usize::try_from((end - pending.first_page).div_ceil(64)).unwrap_or(usize::MAX);
        if words > pending.mask.len() {
            let more = words - pending.mask.len();
            pending.mask.try_reserve(more).map_err(|_| io::ErrorKind::OutOfMemory)?;
            pending.mask.resize(words, 0);
        }
        while first < end {
            let at = first - pending.first_page;
            let in_word = (64 - at % 64).min(end - first);
            let bits = (u64::MAX >> (64 - in_word)) << (at % 64);
            pending.mask[(at / 64) as usize] |= bits.to_le();
            first += in_word;
        }
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        let Some(Pending { slot, first_page, mask }) = self.pending.take() else { return Ok(()) };
        let pages = (64 * mask.len() as u64).min(slot.gfns.len() - first_page);
        let pages = u32::try_from(pages).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.kernel.clear_dirty_log(slot.number(), first_page, pages, &mask)
    }
}

impl<K: Kernel> Rearm for KvmRearm<'_, K> {
    type Error = io::Error;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> io::Result<()> {
        if !self.state.manual_protect {
            return Ok(());
        }
        let mut from = gfns.start();
        while let Some(rest) = GfnRange::new(from, gfns.end()).filter(|rest| !rest.is_empty()) {
            let Some(slot) = self.state.programmed.in_order().in_range(space, rest).next().copied() else {
                break;
            };
            if let Some(here) = slot.gfns.intersect(&rest).filter(|_| slot.logs()) {
                self.add(&slot, here)?;
            }
            from = slot.gfns.end();
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        // The kernel flushes with each call.
        self.clear()
    }
}
