//! Addresses without memory, remembered in the entries: so that a device's register costs one walk and not one for each access.
//!
//! ```text
//!  63  62            52 51                    12  11   10          3   2   1   0
//! ┌───┬────────────────┬────────────────────────┬────┬──────────────┬───┬───┬───┐
//! │NX │ generation     │ 1 … 1, some reserved   │mark│ generation   │U/S│R/W│ P │
//! └───┴────────────────┴────────────────────────┴────┴──────────────┴───┴───┴───┘
//! ```
//!
//! Where the guest's tables lead to a frame that is in no slot, the entry is one that every processor takes for broken: it is present, and
//! address bits are set that the processor does not have. The fault says so ([`GuestAccess::RESERVED`]), the entry has what the
//! guest's tables permit, and the access is told to be [`Mmio`](super::ShadowFault::Mmio) without a lock and without a walk.
//!
//! * **The generation** is the number of the version of the slots, as far as there are bits for it. A fault believes an entry of the
//!   current version only, of whatever address space the change was. Before a number comes again, all shadow pages are made
//!   obsolete, if there are such entries: [`Locked::count_version`].
//! * **The frame** is not in the entry. It is that of the guest's entry that this one was made of, which is kept anyway for the
//!   comparison. A processor of those that look into their cache by an address before they look at the reserved bits (Intel's L1TF) finds
//!   the last frame there is, not one that the guest has chosen.
//! * **It is no mapping**: it is in no list of the reverse map, and nobody is flushed for it, as no processor keeps what is broken. Otherwise it is
//!   an entry as others are: it goes when the guest's entry is another one, with the same rules for when that has to be noticed.
//! * Of lowest-level entries only. What the host says of a frame *in* a slot is asked each time: it may say otherwise without telling.

use memslot::{Gfn, Gpa};

use super::ShadowHost;
use super::fast::{Pinned, descend};
use super::fault::Way;
use super::guest::{GuestAccess, Mode, Rights, Walk};
use super::reserve::Reserve;
use super::shared::{Locked, Shared};
use super::spte::{MARK, NO_EXECUTE, PRESENT, USER, WRITE};
use super::stats::Counter;
use super::vcpu::Loaded;
use crate::level::{Level, PAGE_SHIFT};
use crate::nested::epoch::Cell;
use crate::sync::Ordering;

/// How many bits of a generation are below the mark, and how many above the address.
const LOW_BITS: u32 = if cfg!(miri) { 3 } else { 8 };
const HIGH_BITS: u32 = if cfg!(miri) { 1 } else { 11 };
/// The generations that entries tell apart.
pub(super) const GENERATIONS: u64 = 1 << (LOW_BITS + HIGH_BITS);
/// All address bits.
const NOWHERE: u64 = (1 << 52) - (1 << PAGE_SHIFT);

/// An entry that remembers that there is no memory, in the version of the slots with this number.
pub(super) fn entry(rights: Rights, version: u64) -> u64 {
    let generation = version % GENERATIONS;
    let mut entry = PRESENT | MARK | NOWHERE;
    entry |= (generation & ((1 << LOW_BITS) - 1)) << 3 | (generation >> LOW_BITS) << 52;
    for (right, bit) in [(Rights::WRITE, WRITE), (Rights::USER, USER)] {
        entry |= if rights.contains(right) { bit } else { 0 };
    }
    entry | if rights.contains(Rights::EXECUTE) { 0 } else { NO_EXECUTE }
}

/// Whether an entry is such a one.
#[inline]
pub(super) const fn is_mmio(entry: u64) -> bool {
    entry & (PRESENT | MARK) == PRESENT | MARK
}

/// Whether it is of the version of the slots with this number.
#[inline]
pub(super) const fn is_of(entry: u64, version: u64) -> bool {
    let low = entry >> 3 & ((1 << LOW_BITS) - 1);
    let high = entry >> 52 & ((1 << HIGH_BITS) - 1);
    high << LOW_BITS | low == version % GENERATIONS
}

/// What the guest's tables permit there.
pub(super) fn rights(entry: u64) -> Rights {
    let mut rights = Rights::empty();
    rights.set(Rights::WRITE, entry & WRITE != 0);
    rights.set(Rights::USER, entry & USER != 0);
    rights.set(Rights::EXECUTE, entry & NO_EXECUTE == 0);
    rights
}

/// Resolves a fault of which the entry remembers that there is no memory; `None` where there is more to be done.
pub(super) fn remembered<H: ShadowHost>(
    shared: &Shared<H>,
    cell: &Cell,
    loaded: &Loaded,
    va: u64,
    access: GuestAccess,
) -> Option<Gpa> {
    if !access.contains(GuestAccess::RESERVED) {
        return None;
    }
    let version = shared.serial.load(Ordering::SeqCst);
    shared.epoch.enter(cell, false);
    let _pinned = Pinned(cell);
    let place = descend(shared, loaded, va)?;
    // SAFETY: pinned.
    let page = unsafe { shared.directory.page(place.table) }?;
    let filed = page.version.load(Ordering::SeqCst);
    let seen = place.entry.load(Ordering::SeqCst);
    if !is_mmio(seen) {
        return None;
    }
    if !is_of(seen, version) {
        shared.counters.add(Counter::MmioStale, 1);
        return None;
    }
    let rights = rights(seen);
    // A write that the entry does not permit has the guest's dirty bit to set, also where supervisors may write everywhere.
    let lacks_write = access.contains(GuestAccess::WRITE) && !rights.contains(Rights::WRITE);
    if lacks_write || !loaded.paging.permits(rights, access) {
        return None;
    }
    let gfn = page.leaf_gfn(place.index, page.gptes[place.index].load(Ordering::SeqCst))?;
    // If it is the same entry still, or one that looks the same, and none was filed in between, then the guest's entry was its own or the
    // other's. If the root is not stale now, it was not when the version was read: so its generation has not come a second time.
    let is_same = place.entry.load(Ordering::SeqCst) == seen && page.version.load(Ordering::SeqCst) == filed;
    if !is_same || loaded.is_stale(shared) {
        return None;
    }
    shared.counters.add(Counter::MmioHits, 1);
    Some(Gpa::new(gfn.get() << PAGE_SHIFT | va & ((1 << PAGE_SHIFT) - 1)))
}

impl<H: ShadowHost> Locked<'_, H> {
    /// There is no memory where a walk has led: the entry remembers it, if it can be made.
    pub(super) fn remember_mmio(&mut self, reserve: &mut Reserve, loaded: &Loaded, va: u64, walk: &Walk) {
        if self.shared.config.physical_address_bits >= 52 {
            return;
        }
        let mut rights = walk.rights;
        if loaded.paging.mode() == Mode::Off {
            rights = Rights::all();
        } else if !walk.dirty {
            rights -= Rights::WRITE;
        }
        let gfn = Gfn::new(walk.gpa.get() >> PAGE_SHIFT);
        let way = Way { va, walk, rights, gfn };
        let Some((page, index, gpte)) = self.way_down(reserve, loaded, &way, Level::K4) else { return };
        self.drop_entry(page, index);
        page.gptes[index].store(gpte, Ordering::SeqCst);
        let version = self.shared.serial.load(Ordering::SeqCst);
        self.table(page).0[index].store(entry(rights, version), Ordering::SeqCst);
        self.shared.counters.mmio.fetch_add(1, Ordering::Relaxed);
        self.count(Counter::MmioMade);
    }

    /// There is another version of the slots. Where its number has been an entry's before, as far as entries tell, all shadow pages
    /// become obsolete; returns whether that is so.
    pub(super) fn count_version(&mut self) -> bool {
        let shared = self.shared;
        let next = shared.serial.load(Ordering::SeqCst).wrapping_add(1);
        let comes_again = next % GENERATIONS == 0 && shared.counters.mmio.load(Ordering::Relaxed) > 0;
        if comes_again {
            // Before: see `remembered`.
            shared.generation.fetch_add(1, Ordering::SeqCst);
        }
        shared.serial.store(next, Ordering::SeqCst);
        comes_again
    }
}
