//! The slot engine and the dirty log behind a VM of the trace. The one module that knows the core's types.
//!
//! A call goes through [`memslot::rules`], KVM's own order of checks; what came of it is then asked of the
//! table's view, so that what the program shows is what the engine holds.

use std::collections::HashSet;

use memslot::dirty::kvm::{
    ClearDirtyLog, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KvmDirtyLog,
};
use memslot::dirty::{DirtyLog, SoftwareOnly};
use memslot::rules::{GuestMemfdFiles, HostLimits, Rules, UserMemoryRegion, UserMemoryRegion2};
use memslot::{AddressSpaceId, Backing, Gfn, GfnRange, HvaRange, Limits, PageSize, Slot, SlotId, SlotTable};

pub(crate) use memslot::rules::Change;

use crate::history::{GUEST_MEMFD, LOG_DIRTY_PAGES, MOST_ALIASES, MapSlot};
use crate::trace::{Bits, GuestMemfd, Region};

/// A refusal: the errno's name and the reason in words.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) errno: &'static str,
    pub(crate) why: String,
}

/// What the trace tells about the kernel it was recorded on; `None` leaves the default, a current x86-64 one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Slots of one address space.
    pub(crate) slots: Option<u32>,
    pub(crate) address_spaces: Option<u32>,
    pub(crate) readonly_mem: Option<bool>,
    pub(crate) guest_memfd: Option<bool>,
}

/// One VM's slot table, driven as KVM's ioctls drive it.
pub(crate) struct Engine {
    table: SlotTable,
    rules: Rules,
    files: Bindings,
    log: DirtyLog,
    dirty: KvmDirtyLog,
    /// The capabilities that were enabled, with their arguments.
    enabled: Vec<(u32, u64)>,
    vcpus: bool,
    /// Slots that the kernel began to log with all bits set, and that nobody has asked about or cleared since.
    whole: HashSet<(u32, u32)>,
}

/// The guest_memfd files of a trace: any descriptor is one, but no part of a file is bound twice.
#[derive(Default)]
struct Bindings(Vec<(u32, u64, u64)>);

impl GuestMemfdFiles for Bindings {
    fn bind(&mut self, file: u32, offset: u64, size: u64) -> Result<(), memslot::rules::Errno> {
        let end = offset.checked_add(size).ok_or(memslot::rules::Errno::EINVAL)?;
        if self.0.iter().any(|&(other, from, len)| other == file && from < end && offset < from + len) {
            return Err(memslot::rules::Errno::EINVAL);
        }
        self.0.push((file, offset, size));
        Ok(())
    }

    fn unbind(&mut self, file: u32, offset: u64, size: u64) {
        self.0.retain(|bound| *bound != (file, offset, size));
    }
}

impl Engine {
    /// An empty VM on a kernel with these capabilities. The error is in words.
    pub(crate) fn new(capabilities: Capabilities) -> Result<Self, String> {
        let mut limits = Limits::default();
        if let Some(slots) = capabilities.slots {
            limits.slots = slots;
        }
        if let Some(spaces) = capabilities.address_spaces {
            limits.address_spaces =
                u8::try_from(spaces).map_err(|_| format!("the trace claims {spaces} address spaces"))?;
        }
        let mut host = HostLimits::default();
        host.readonly_mem = capabilities.readonly_mem.unwrap_or(host.readonly_mem);
        host.guest_memfd = capabilities.guest_memfd.unwrap_or(host.guest_memfd);
        let mut table = SlotTable::new(limits).map_err(|error| error.to_string())?;
        let log = DirtyLog::attach(&mut table).map_err(|error| error.to_string())?;
        let dirty = KvmDirtyLog::new(log.consumer().map_err(|error| error.to_string())?);
        Ok(Engine {
            table,
            rules: Rules::new(host),
            files: Bindings::default(),
            log,
            dirty,
            enabled: Vec::new(),
            vcpus: false,
            whole: HashSet::new(),
        })
    }

    /// The same VM, still empty, on a kernel with these capabilities.
    pub(crate) fn anew(&self, capabilities: Capabilities) -> Result<Self, String> {
        let mut new = Self::new(capabilities)?;
        for &(cap, arg) in &self.enabled {
            _ = new.enable_cap(cap, 0, arg);
        }
        if self.vcpus {
            new.vcpu_created();
        }
        Ok(new)
    }

    /// Applies a `KVM_SET_USER_MEMORY_REGION` or `…REGION2`.
    pub(crate) fn set(&mut self, region: &Region) -> Result<Change, Refusal> {
        let first = UserMemoryRegion {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.gpa,
            memory_size: region.size,
            userspace_addr: region.hva,
        };
        let (file, offset) = region.second.map_or((0, 0), |memfd| (memfd.file, memfd.offset));
        let result = match region.second {
            // A delete may be of a slot whose file is to be released, and the first form knows no files.
            None if region.size != 0 => self.rules.set_user_memory_region(&mut self.table, &first),
            None if region.flags & GUEST_MEMFD != 0 => {
                self.rules.set_user_memory_region(&mut self.table, &first)
            }
            _ => {
                let second =
                    UserMemoryRegion2 { region: first, guest_memfd: file, guest_memfd_offset: offset };
                self.rules.set_user_memory_region2(&mut self.table, &second, &mut self.files)
            }
        };
        let change = result
            .map_err(|refusal| Refusal { errno: refusal.errno.name(), why: refusal.why.to_string() })?;
        if change != Change::Nothing {
            let key = (region.address_space(), region.id());
            self.whole.remove(&key);
            let begins = matches!(change, Change::Create | Change::FlagsOnly);
            if begins && region.flags & LOG_DIRTY_PAGES != 0 && self.starts_whole() {
                self.whole.insert(key);
            }
        }
        Ok(change)
    }

    /// Enables a capability if it is the dirty log's; `None` if it is not.
    pub(crate) fn enable_cap(&mut self, cap: u32, flags: u32, arg: u64) -> Option<Result<(), &'static str>> {
        const OURS: [u32; 3] =
            [KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL];
        OURS.contains(&cap).then(|| {
            self.dirty.enable_cap(cap, flags, arg).map_err(|errno| errno.name())?;
            self.enabled.push((cap, arg));
            Ok(())
        })
    }

    /// Whether a slot's bits are all set when its logging starts. It follows from the capabilities that the trace
    /// enables, and is not asked of the log: that is what is judged by it.
    fn starts_whole(&self) -> bool {
        let manual = self.enabled.iter().rev().find(|(cap, _)| *cap == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        manual.is_some_and(|(_, arg)| arg & KVM_DIRTY_LOG_INITIALLY_SET != 0) && !self.has_rings()
    }

    /// A descriptor is a new guest_memfd file from here on, of which nothing is bound.
    pub(crate) fn guest_memfd_created(&mut self, file: u32) {
        self.files.0.retain(|bound| bound.0 != file);
    }

    pub(crate) fn vcpu_created(&mut self) {
        self.vcpus = true;
        self.dirty.vcpu_created();
    }

    /// Whether dirty rings are in use.
    pub(crate) fn has_rings(&self) -> bool {
        self.dirty.ring().is_some()
    }

    /// `KVM_GET_DIRTY_LOG`. What the guest wrote is not in a trace: so the bits that `recorded` has and we do not are
    /// taken for its writes, and marked before the call. What the other way round we have and `recorded` has not
    /// is a contradiction, and so is a bit of `recorded` that our answer then lacks. Where all bits are set when
    /// logging starts, the first call must report every page by itself: nothing is marked before it.
    pub(crate) fn get_dirty_log(&mut self, slot: u32, recorded: &Bits) -> Result<Got, &'static str> {
        let mut got = Got::default();
        let known = self.slot(slot >> 16, slot & 0xffff).filter(|slot| slot.flags & LOG_DIRTY_PAGES != 0);
        let mut words = Vec::new();
        if let Some(slot) = known {
            got.pages = slot.size >> PageSize::K4.shift();
            let space = AddressSpaceId::new(u8::try_from(slot.address_space).unwrap_or(u8::MAX));
            let gfn = slot.gpa >> PageSize::K4.shift();
            let gfns = GfnRange::with_len(Gfn::new(gfn), got.pages).unwrap_or_default();
            words = vec![0; usize::try_from(got.pages.div_ceil(64)).map_err(|_| "ENOMEM")?];
            self.dirty.consumer().peek(space, gfns, &mut words).map_err(|_| "EFAULT")?;
            let mut theirs = words_of(&Bits { pages: got.pages, runs: recorded.runs.clone() });
            for (ours, theirs) in words.iter().zip(&mut theirs) {
                *theirs &= !u64::from_le(*ours);
            }
            let last = theirs.len().checked_sub(1).filter(|_| got.pages % 64 != 0);
            if let Some(last) = last {
                theirs[last] &= (1 << (got.pages % 64)) - 1;
            }
            if !self.whole.contains(&(slot.address_space, slot.id)) {
                got.written = bits_of(&theirs);
                theirs.iter_mut().for_each(|word| *word = word.to_le());
                self.log.merge(space, gfns, &theirs).map_err(|_| "EFAULT")?;
            }
            words.fill(0);
        }
        self.dirty.get_dirty_log(slot, Some(&mut words), &mut SoftwareOnly).map_err(|errno| errno.name())?;
        let recorded = words_of(&Bits { pages: got.pages, runs: recorded.runs.clone() });
        let more: Vec<u64> =
            words.iter().zip(&recorded).map(|(ours, theirs)| u64::from_le(*ours) & !theirs).collect();
        got.contradicts = bits_of(&more);
        let fewer: Vec<u64> =
            words.iter().zip(&recorded).map(|(ours, theirs)| theirs & !u64::from_le(*ours)).collect();
        got.lacks = bits_of(&fewer);
        self.whole.remove(&(slot >> 16, slot & 0xffff));
        Ok(got)
    }

    /// `KVM_CLEAR_DIRTY_LOG`.
    pub(crate) fn clear_dirty_log(&mut self, slot: u32, first: u64, mask: &Bits) -> Result<(), &'static str> {
        let clear = ClearDirtyLog {
            slot,
            num_pages: u32::try_from(mask.pages).unwrap_or(u32::MAX),
            first_page: first,
        };
        let words: Vec<u64> = words_of(mask).into_iter().map(u64::to_le).collect();
        self.dirty.clear_dirty_log(&clear, Some(&words), &mut SoftwareOnly).map_err(|errno| errno.name())?;
        self.whole.remove(&(slot >> 16, slot & 0xffff));
        Ok(())
    }

    /// A call on the dirty log that succeeded and whose bitmap is not in the trace: nothing that it may have cleared is
    /// expected to be dirty afterwards.
    pub(crate) fn follow_unprinted(&mut self, slot: u32, cleared: Option<(u64, u64)>) {
        if let Some((first, pages)) = cleared {
            // Where the kernel's rules are broken, later calls will show it.
            _ = self.clear_dirty_log(slot, first, &Bits { pages, runs: vec![(0, pages)] });
            return;
        }
        let Some(known) = self.slot(slot >> 16, slot & 0xffff) else { return };
        let pages = known.size >> PageSize::K4.shift();
        let Ok(words) = usize::try_from(pages.div_ceil(64)) else { return };
        let mut words = vec![0; words];
        _ = self.dirty.get_dirty_log(slot, Some(&mut words), &mut SoftwareOnly);
        self.whole.remove(&(slot >> 16, slot & 0xffff));
    }

    /// Brings one slot back to what it was: the inverse of the change that was just accepted.
    pub(crate) fn restore(&mut self, region: &Region, before: Option<MapSlot>) {
        let inverse = match before {
            None => Region { size: 0, flags: 0, ..*region },
            Some(slot) => slot.region(region.second.is_some()),
        };
        // It undoes what these rules allowed a moment ago; where there is nothing to undo they change nothing.
        _ = self.set(&inverse);
    }

    /// A slot by its id.
    pub(crate) fn slot(&self, address_space: u32, id: u32) -> Option<MapSlot> {
        let space = AddressSpaceId::new(u8::try_from(address_space).ok()?);
        self.table.view().slot(space, SlotId::new(id)).map(plain)
    }

    /// Other slots on some of the same host memory, in every address space; not more than a few dozen.
    pub(crate) fn aliases_of(&self, slot: &MapSlot) -> Vec<MapSlot> {
        let Some(hvas) = HvaRange::new(memslot::Hva::new(slot.hva), memslot::Hva::new(slot.hva_end())) else {
            return Vec::new();
        };
        let view = self.table.view();
        let all = view.address_spaces().flat_map(|space| view.slots_at_hva(space, hvas));
        all.map(|hit| plain(hit.slot))
            .filter(|other| (other.address_space, other.id) != (slot.address_space, slot.id))
            .filter(|other| slot.aliases(other))
            .take(MOST_ALIASES)
            .collect()
    }
}

/// What a `KVM_GET_DIRTY_LOG` came to.
#[derive(Default)]
pub(crate) struct Got {
    /// The slot's pages.
    pub(crate) pages: u64,
    /// Those that the guest must have written since the last call.
    pub(crate) written: Vec<(u64, u64)>,
    /// Those that are dirty to us, and clean in the record.
    pub(crate) contradicts: Vec<(u64, u64)>,
    /// Those that are dirty in the record, and that our answer does not have.
    pub(crate) lacks: Vec<(u64, u64)>,
}

/// A bitmap's words. Runs that pass its end are cut there.
fn words_of(bits: &Bits) -> Vec<u64> {
    let mut words = vec![0_u64; usize::try_from(bits.pages.div_ceil(64)).unwrap_or(0)];
    for &(first, count) in &bits.runs {
        let (mut at, end) = (first, first.saturating_add(count).min(bits.pages));
        while at < end {
            let to = (at | 63).saturating_add(1).min(end);
            if let Some(word) = usize::try_from(at / 64).ok().and_then(|word| words.get_mut(word)) {
                *word |= (u64::MAX >> (64 - (to - at))) << (at % 64);
            }
            at = to;
        }
    }
    words
}

/// The runs of set bits.
fn bits_of(words: &[u64]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (first, &word) in (0_u64..).step_by(64).zip(words) {
        let mut left = word;
        while left != 0 {
            let start = u64::from(left.trailing_zeros());
            let ones = u64::from((left >> start).trailing_ones());
            match runs.last_mut() {
                Some(last) if last.0 + last.1 == first + start => last.1 += ones,
                _ => runs.push((first + start, ones)),
            }
            left &= (u64::MAX << (start + ones - 1)) << 1;
        }
    }
    runs
}

/// The core's slot as plain numbers of bytes.
fn plain(slot: &Slot) -> MapSlot {
    let shift = PageSize::K4.shift();
    let guest_memfd = match slot.backing() {
        Backing::GuestMemfd { file, offset, .. } => Some(GuestMemfd { file, offset }),
        _ => None,
    };
    MapSlot {
        address_space: u32::from(slot.address_space().get()),
        id: slot.id().get(),
        gpa: slot.base_gfn().get() << shift,
        size: slot.pages() << shift,
        hva: slot.hva().map_or(0, memslot::Hva::get),
        flags: slot.flags().bits() | if guest_memfd.is_some() { GUEST_MEMFD } else { 0 },
        guest_memfd,
    }
}

#[cfg(test)]
mod tests {
    use memslot::dirty::kvm::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;

    use super::*;

    fn logged_engine(log_starts_whole: bool) -> Engine {
        let mut engine = Engine::new(Capabilities::default()).expect("an engine");
        let all = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        assert_eq!(
            engine.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, all).map(|it| it.is_ok()),
            Some(true)
        );
        engine.log.set_initially_set(log_starts_whole);
        let region = Region {
            slot: 0,
            flags: LOG_DIRTY_PAGES,
            gpa: 0,
            size: 70 << 12,
            hva: 0x7f00_0000_0000,
            second: None,
        };
        assert!(engine.set(&region).is_ok());
        engine
    }

    #[test]
    fn the_first_answer_is_whole_by_itself() {
        let whole = Bits { pages: 70, runs: vec![(0, 70)] };
        let got = logged_engine(true).get_dirty_log(0, &whole).expect("the bits");
        assert!(got.written.is_empty() && got.contradicts.is_empty() && got.lacks.is_empty());
        // A log that starts clean cannot hide behind marks.
        let got = logged_engine(false).get_dirty_log(0, &whole).expect("the bits");
        assert_eq!((got.written, got.lacks), (vec![], vec![(0, 70)]));
    }

    #[test]
    fn after_the_first_answer_new_bits_are_writes() {
        let mut engine = logged_engine(true);
        let mask = Bits { pages: 70, runs: vec![(0, 70)] };
        assert!(engine.clear_dirty_log(0, 0, &mask).is_ok());
        let got =
            engine.get_dirty_log(0, &Bits { pages: 70, runs: vec![(3, 2), (69, 1)] }).expect("the bits");
        assert_eq!(got.written, [(3, 2), (69, 1)]);
        assert!(got.contradicts.is_empty() && got.lacks.is_empty());
    }
}
