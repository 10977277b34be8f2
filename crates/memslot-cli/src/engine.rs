//! The slot engine behind a VM of the trace. The one module that knows the core's types.
//!
//! A call goes through [`memslot::rules`], KVM's own order of checks; what came of it is then asked of the
//! table's view, so that what the program shows is what the engine holds.

use memslot::rules::{GuestMemfdFiles, HostLimits, Rules, UserMemoryRegion, UserMemoryRegion2};
use memslot::{AddressSpaceId, Backing, HvaRange, Limits, PageSize, Slot, SlotId, SlotTable};

pub(crate) use memslot::rules::Change;

use crate::history::{GUEST_MEMFD, MOST_ALIASES, MapSlot};
use crate::trace::{GuestMemfd, Region};

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
        let table = SlotTable::new(limits).map_err(|error| error.to_string())?;
        Ok(Engine { table, rules: Rules::new(host), files: Bindings::default() })
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
        result.map_err(|refusal| Refusal { errno: refusal.errno.name(), why: refusal.why.to_string() })
    }

    /// Brings one slot back to what it was: the inverse of the change that was just accepted.
    pub(crate) fn restore(&mut self, region: &Region, before: Option<MapSlot>) {
        let inverse = match before {
            None => Region { size: 0, flags: 0, ..*region },
            Some(slot) => crate::replay::region_of(&slot, region.second.is_some()),
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
