//! What became of each slot: from which line to which it lived, and with what.
//!
//! A [`Lifetime`] is one unchanging slot. A move or a change of flags ends one and begins the next, as it does in
//! KVM, where an installed slot is never written to. The warnings and the picture over time are both made from
//! this list.

use std::collections::HashMap;

use serde::Serialize;

use crate::trace::{GuestMemfd, Region};
use crate::units;

/// `KVM_MEM_LOG_DIRTY_PAGES`.
pub(crate) const LOG_DIRTY_PAGES: u32 = 1;
/// `KVM_MEM_READONLY`.
pub(crate) const READONLY: u32 = 2;
/// `KVM_MEM_GUEST_MEMFD`.
pub(crate) const GUEST_MEMFD: u32 = 4;

/// Aliases of one slot that are kept. Tests map one page at thousands of addresses; each pair would be millions.
pub(crate) const MOST_ALIASES: usize = 64;

/// A slot as the program shows it: plain numbers, bytes throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapSlot {
    pub(crate) address_space: u32,
    pub(crate) id: u32,
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) hva: u64,
    pub(crate) flags: u32,
    pub(crate) guest_memfd: Option<GuestMemfd>,
}

/// What a slot is for, as far as its flags tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// Guest memory.
    Ram,
    /// Guest memory whose writes are logged.
    RamLogged,
    /// Read-only to the guest: its writes come out as MMIO.
    Rom,
    /// Read-only and logged.
    RomLogged,
    /// Private memory in a guest_memfd.
    GuestMemfd,
}

impl Kind {
    pub(crate) const ALL: [Kind; 5] =
        [Kind::Ram, Kind::RamLogged, Kind::Rom, Kind::RomLogged, Kind::GuestMemfd];

    /// In words, for tables.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Kind::Ram => "RAM",
            Kind::RamLogged => "RAM, logged",
            Kind::Rom => "ROM",
            Kind::RomLogged => "ROM, logged",
            Kind::GuestMemfd => "guest_memfd",
        }
    }
}

impl MapSlot {
    /// The region that would bring the slot back to what it is, in the second form of the call if asked.
    pub(crate) fn region(&self, second: bool) -> Region {
        let memfd = self.guest_memfd.unwrap_or(GuestMemfd { file: 0, offset: 0 });
        Region {
            slot: self.address_space << 16 | self.id,
            flags: self.flags,
            gpa: self.gpa,
            size: self.size,
            hva: self.hva,
            second: (second || self.flags & GUEST_MEMFD != 0).then_some(memfd),
        }
    }

    pub(crate) fn end(&self) -> u64 {
        self.gpa.saturating_add(self.size)
    }

    pub(crate) fn hva_end(&self) -> u64 {
        self.hva.saturating_add(self.size)
    }

    pub(crate) fn kind(&self) -> Kind {
        match (self.flags & GUEST_MEMFD != 0, self.flags & READONLY != 0, self.flags & LOG_DIRTY_PAGES != 0) {
            (true, ..) => Kind::GuestMemfd,
            (_, false, false) => Kind::Ram,
            (_, false, true) => Kind::RamLogged,
            (_, true, false) => Kind::Rom,
            (_, true, true) => Kind::RomLogged,
        }
    }

    /// Whether both are backed by some of the same host memory. The same memory at the same guest address in two
    /// address spaces is how address spaces are used, not an alias.
    pub(crate) fn aliases(&self, other: &MapSlot) -> bool {
        let offset = |slot: &MapSlot| slot.gpa.wrapping_sub(slot.hva);
        let overlap = self.hva < other.hva_end() && other.hva < self.hva_end();
        overlap && (self.address_space == other.address_space || offset(self) != offset(other))
    }

    /// `3`, or `1:3` in an address space other than the normal one.
    pub(crate) fn name(&self) -> String {
        match self.address_space {
            0 => self.id.to_string(),
            space => format!("{space}:{}", self.id),
        }
    }

    /// `slot 3 [0xc0000, +128 KiB)`.
    pub(crate) fn describe(&self) -> String {
        format!("slot {} {}", self.name(), range(self.gpa, self.size))
    }
}

/// `[0xc0000, +128 KiB)`.
pub(crate) fn range(start: u64, bytes: u64) -> String {
    format!("[{start:#x}, +{})", units::size(bytes))
}

/// `LOG_DIRTY_PAGES|READONLY`, bits without a name in hexadecimal, `-` for none.
pub(crate) fn flag_names(flags: u32) -> String {
    let known = [(LOG_DIRTY_PAGES, "LOG_DIRTY_PAGES"), (READONLY, "READONLY"), (GUEST_MEMFD, "GUEST_MEMFD")];
    let mut names: Vec<String> =
        known.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| (*name).to_owned()).collect();
    let rest = flags & !(LOG_DIRTY_PAGES | READONLY | GUEST_MEMFD);
    if rest != 0 {
        names.push(format!("{rest:#x}"));
    }
    match names.is_empty() {
        true => "-".to_owned(),
        false => names.join("|"),
    }
}

/// A point of the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) line: u64,
    /// Since the trace's first call; never runs backwards.
    pub(crate) ns: u64,
}

/// One slot, unchanged from one moment to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lifetime {
    pub(crate) slot: MapSlot,
    pub(crate) from: Moment,
    /// `None`: alive at the end.
    pub(crate) until: Option<Moment>,
    /// Begun by a create, not by a move or a change of flags.
    pub(crate) created: bool,
}

/// All lifetimes of one VM, in the order of their beginning.
#[derive(Debug, Default)]
pub(crate) struct History {
    lifetimes: Vec<Lifetime>,
    open: HashMap<(u32, u32), usize>,
    most: Option<(usize, Moment)>,
}

impl History {
    /// Slot `id` is now `slot` (or gone).
    pub(crate) fn record(&mut self, key: (u32, u32), slot: Option<MapSlot>, now: Moment) {
        let before = self.open.remove(&key);
        if let Some(lifetime) = before.and_then(|at| self.lifetimes.get_mut(at)) {
            lifetime.until = Some(now);
        }
        if let Some(slot) = slot {
            self.open.insert(key, self.lifetimes.len());
            self.lifetimes.push(Lifetime { slot, from: now, until: None, created: before.is_none() });
        }
        if self.open.len() > self.most.map_or(0, |(most, _)| most) {
            self.most = Some((self.open.len(), now));
        }
    }

    pub(crate) fn lifetimes(&self) -> &[Lifetime] {
        &self.lifetimes
    }

    /// Slots alive now, by address space and gpa.
    pub(crate) fn alive(&self) -> Vec<MapSlot> {
        let mut alive: Vec<MapSlot> =
            self.lifetimes.iter().filter(|lifetime| lifetime.until.is_none()).map(|l| l.slot).collect();
        alive.sort_by_key(|slot| (slot.address_space, slot.gpa));
        alive
    }

    /// The largest number of slots alive at once, and when that was first reached.
    pub(crate) fn most(&self) -> Option<(usize, Moment)> {
        self.most
    }
}
