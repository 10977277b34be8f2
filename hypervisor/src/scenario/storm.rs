//! `storm`: while Linux works, its memory is pulled out from under it thousands of times a second, and comes back.
//!
//! At every timer interrupt a number of random changes happens: pages move to other frames (after an invalidation), invalidations
//! last until the next tick, ranges are zapped, slots are split, logged, merged. Some pieces stay away or become read-only while the
//! guest runs; when it needs one, the access comes out, the piece is put back, and the guest tries again.
//!
//! The guest checks every word of its memory. At the end all pieces are back, and nothing may be left over.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use memslot::{Gfn, GfnRange, Gpa, Hva, HvaRange, SlotFlags, SlotId, SlotSpec};
use memslot_mmu::Work;
use memslot_mmu::format::Access;

use super::{Scenario, Turn};
use crate::console::report;
use crate::cpu::index;
use crate::guest::{Guest, SPACE};
use crate::maps::{Held, Maps};

/// Changes at each tick.
const CHANGES: u64 = 24;
/// The most pieces that are away at a time.
const PIECES: usize = 6;

/// How often the guest tries in vain before an invalidation ends early.
const PATIENCE: u64 = 8;

/// A piece cut out of a slot: it lies between `left` and `right`.
struct Piece {
    left: SlotId,
    /// What it was.
    spec: SlotSpec,
    right: SlotId,
    is_gone: bool,
}

/// See the [module documentation](self).
pub(crate) struct Storm {
    maps: Maps,
    random: u64,
    /// Ids of slots are used in turn.
    next_id: u32,
    pieces: Vec<Piece>,
    held: Option<Held>,
    slots: usize,
    changes: u64,
    moves: u64,
    invalidations: u64,
    retries: u64,
    put_back_for_the_guest: u64,
}

impl Storm {
    /// For a guest that has its memory.
    pub(crate) fn new(guest: &Guest) -> Self {
        Self {
            maps: guest.maps,
            random: 0x9e37_79b9_7f4a_7c15,
            next_id: 100,
            pieces: Vec::new(),
            held: None,
            slots: guest.table.view().slots(SPACE).count(),
            changes: 0,
            moves: 0,
            invalidations: 0,
            retries: 0,
            put_back_for_the_guest: 0,
        }
    }

    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 16) % end
    }

    fn id(&mut self) -> SlotId {
        self.next_id = if self.next_id < 30_000 { self.next_id + 1 } else { 100 };
        SlotId::new(self.next_id)
    }

    /// Some frames of RAM.
    fn frames(&mut self, guest: &Guest) -> GfnRange {
        let ram = guest.ram[if self.below(4) == 0 { 2 } else { 1 }];
        let most = 1 << self.below(11);
        let len = 1 + self.below(most);
        let first = ram.gfns.start().get() + self.below(ram.gfns.len() - len);
        GfnRange::with_len(Gfn::new(first), len).unwrap_or_default()
    }

    /// Another frame behind a page, while nobody can have a translation to it.
    fn move_page(&mut self, guest: &Guest) -> Result<(), String> {
        let gfn = self.frames(guest).start();
        let Some(slot) = guest.table.view().slot_at(SPACE, gfn) else { return Ok(()) };
        let Some(hva) = slot.hva_of(gfn) else { return Ok(()) };
        let invalidation = self.maps.invalidate(page(hva)).map_err(|_| "no memory for an invalidation")?;
        let pool = guest.host.pool();
        // SAFETY: the page is invalidated until the end of this function.
        let is_moved = pool.page_at(hva).is_some_and(|page| unsafe { pool.move_page(page) });
        self.moves += u64::from(is_moved);
        self.invalidations += 1;
        drop(invalidation);
        Ok(())
    }

    /// An invalidation that lasts until the next tick.
    fn hold(&mut self, guest: &Guest) -> Result<(), String> {
        let gfns = self.frames(guest);
        let held = self.maps.invalidate_frames(guest, gfns);
        self.held = Some(held.map_err(|_| "no memory for an invalidation")?);
        self.invalidations += 1;
        Ok(())
    }

    /// Cuts a piece out of a slot, and takes it away or changes it.
    fn cut(&mut self, guest: &mut Guest) -> Result<(), String> {
        let gfns = self.frames(guest);
        let Some(slot) = guest.table.view().slot_at(SPACE, gfns.start()).copied() else { return Ok(()) };
        if gfns.start() == slot.base_gfn() || gfns.end() >= slot.gfns().end() {
            return Ok(());
        }
        let (left, middle, right) = (slot.id(), self.id(), self.id());
        let what = self.below(3);
        let flags = if what == 1 { SlotFlags::READONLY } else { SlotFlags::LOG_DIRTY_PAGES };
        let mut spec = None;
        let cut = guest.table.transaction(|tx| {
            tx.split(SPACE, left, gfns.start(), middle)?;
            tx.split(SPACE, middle, gfns.end(), right)?;
            spec = tx.slot(SPACE, middle).map(memslot::Slot::spec);
            if what == 0 { tx.delete(SPACE, middle) } else { tx.set_flags(SPACE, middle, flags) }
        });
        cut.map_err(|error| format!("a piece could not be cut out: {error}"))?;
        let spec = spec.ok_or("a piece was lost")?;
        self.pieces.push(Piece { left, spec, right, is_gone: what == 0 });
        Ok(())
    }

    /// Puts the last piece back. Whether there was one.
    fn put_back(&mut self, guest: &mut Guest) -> Result<bool, String> {
        let Some(piece) = self.pieces.pop() else { return Ok(false) };
        let middle = piece.spec.id;
        let put_back = guest.table.transaction(|tx| {
            if piece.is_gone {
                tx.create(piece.spec)?;
            } else {
                tx.set_flags(SPACE, middle, piece.spec.flags)?;
            }
            tx.merge(SPACE, piece.left, middle)?;
            tx.merge(SPACE, piece.left, piece.right)
        });
        put_back.map_err(|error| format!("a piece could not be put back: {error}"))?;
        Ok(true)
    }
}

/// The page of host memory that begins there.
fn page(hva: Hva) -> HvaRange {
    HvaRange::with_len(hva, 4096).unwrap_or_default()
}

impl Scenario for Storm {
    fn ticks(&self) -> u64 {
        1
    }

    fn round(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        let guest = &mut *turn.guest;
        self.held = None;
        for _ in 0..CHANGES {
            self.changes += 1;
            match self.below(8) {
                0..3 => self.move_page(guest)?,
                3 => {
                    let work = [Work::Zap, Work::WriteProtect, Work::Collapse][index(self.below(3))];
                    let gfns = self.frames(guest);
                    self.maps.change(work, gfns).map_err(|_| "no memory to change what is mapped")?;
                }
                4..6 if self.pieces.len() < PIECES => self.cut(guest)?,
                _ => drop(self.put_back(guest)?),
            }
        }
        if self.below(4) == 0 {
            self.hold(guest)?;
        }
        Ok(())
    }

    fn later(&mut self, _: &mut Turn<'_>) -> Result<(), String> {
        self.retries += 1;
        if self.retries % PATIENCE == 0 {
            self.held = None;
        }
        Ok(())
    }

    fn hole(&mut self, turn: &mut Turn<'_>, gpa: Gpa, access: Access) -> Result<(), String> {
        let gfn = Gfn::new(gpa.get() >> 12);
        if !turn.guest.ram.iter().any(|ram| ram.gfns.contains(gfn)) {
            return Err(format!("the guest accesses {gpa}, where nothing was"));
        }
        let is_right = |guest: &Guest| {
            let slot = guest.table.view().slot_at(SPACE, gfn);
            slot.is_some_and(|slot| {
                !(access.contains(Access::WRITE) && slot.flags().contains(SlotFlags::READONLY))
            })
        };
        self.put_back_for_the_guest += 1;
        while !is_right(turn.guest) {
            if !self.put_back(turn.guest)? {
                return Err(format!("all pieces are back, and {gpa} is still refused for {access:?}"));
            }
        }
        Ok(())
    }

    fn end(&mut self, turn: &mut Turn<'_>) -> Result<(), String> {
        self.held = None;
        while self.put_back(turn.guest)? {}
        report!("storm.changes {}", self.changes);
        report!("storm.pages_moved {}", self.moves);
        report!("storm.invalidations {}", self.invalidations);
        report!("storm.put_back_for_the_guest {}", self.put_back_for_the_guest);
        report!("storm.generation {}", turn.guest.table.view().generation());
        let slots = turn.guest.table.view().slots(SPACE).count();
        if slots == self.slots { Ok(()) } else { Err(format!("{slots} slots are left of {}", self.slots)) }
    }
}
