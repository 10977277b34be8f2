//! Memory that moves to other frames, and what is written meanwhile.
//!
//! The dirty log hears of a change of the slots before the page tables do, and brings the marks of memory that moves to its new place.
//! Until the tables have followed, processors go on at the old place, and what is marked there is nobody's. So from before the
//! log hears of a change until the tables have followed, frames whose memory moves are marked where it goes, too.

use alloc::vec::Vec;

use memslot::{
    AddressSpaceId, Backing, GfnRange, HvaRange, OutOfMemory, PieceKind, Slot, SlotFlags, Update, View,
};

use crate::invalidate::{ends, moved_by, range};
use crate::level::PAGE_SHIFT;
use crate::sync::{AtomicUsize, Mutex, Ordering};

/// Frames of a logged slot, and how much further their memory is afterwards, in a slot that is logged, too.
struct Move {
    space: AddressSpaceId,
    gfns: GfnRange,
    further: u64,
}

/// The moves of the change that is under way.
pub(crate) struct Moving {
    /// How many there are: without any, that is all that who marks looks at.
    count: AtomicUsize,
    moves: Mutex<Vec<Move>>,
}

impl Moving {
    pub(crate) fn new() -> Self {
        Self { count: AtomicUsize::new(0), moves: Mutex::new(Vec::new()) }
    }

    /// Before anybody hears of the change.
    pub(crate) fn begin(&self, update: &Update<'_>) -> Result<(), OutOfMemory> {
        let (mut count, mut all) = (0, Vec::new());
        for_each_move(update, |_| count += 1);
        all.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
        for_each_move(update, |moving| all.push(moving));
        let mut moves = self.moves.lock();
        self.count.store(all.len(), Ordering::SeqCst);
        *moves = all;
        Ok(())
    }

    /// When the tables have followed, or nothing has changed.
    pub(crate) fn end(&self) {
        let mut moves = self.moves.lock();
        self.count.store(0, Ordering::SeqCst);
        moves.clear();
    }

    /// Calls `mark` with the frames to which memory of these moves, and returns whether any does. To be asked after they themselves
    /// were marked: a move that begins in between finds that mark, and takes it along.
    #[inline]
    pub(crate) fn marked(&self, space: AddressSpaceId, gfns: GfnRange, mark: impl FnMut(GfnRange)) -> bool {
        self.count.load(Ordering::SeqCst) > 0 && self.mark_where_it_goes(space, gfns, mark)
    }

    #[cold]
    fn mark_where_it_goes(
        &self,
        space: AddressSpaceId,
        gfns: GfnRange,
        mut mark: impl FnMut(GfnRange),
    ) -> bool {
        let mut moves = false;
        for moving in self.moves.lock().iter().filter(|moving| moving.space == space) {
            if let Some(gfns) = moving.gfns.intersect(&gfns).filter(|gfns| !gfns.is_empty()) {
                mark(moved_by(gfns, moving.further));
                moves = true;
            }
        }
        moves
    }
}

fn for_each_move(update: &Update<'_>, mut found: impl FnMut(Move)) {
    for piece in update.pieces {
        let PieceKind::Removed { old } = piece.kind else { continue };
        if !is_logged(&old) {
            continue;
        }
        let (space, gfns) = (piece.address_space, piece.gfns);
        let look = |new: &Slot| {
            // A slot that is what it was is an alias: nothing moves there.
            if is_logged(new) && update.before.slot(space, new.id()) != Some(new) {
                moved(&old, gfns, new).map(|(gfns, further)| Move { space, gfns, further })
            } else {
                None
            }
        };
        match hvas(&old, gfns) {
            Some(hvas) => {
                update.after.slots_at_hva(space, hvas).filter_map(|hit| look(hit.slot)).for_each(&mut found);
            }
            None => {
                let new = update.slots.iter().filter_map(|slot| slot.new);
                new.filter(|new| new.address_space() == space)
                    .filter_map(|new| look(&new))
                    .for_each(&mut found);
            }
        }
    }
}

/// Calls `found` with the frames of logged slots that have memory of `gfns`, frames of a slot of another version, elsewhere now.
pub(crate) fn for_each_home(old: &Slot, gfns: GfnRange, now: &View, found: impl FnMut(GfnRange)) {
    let space = old.address_space();
    let home = |new: &Slot| {
        let moved = if is_logged(new) { moved(old, gfns, new) } else { None };
        moved.map(|(gfns, further)| moved_by(gfns, further))
    };
    match hvas(old, gfns) {
        Some(hvas) => now.slots_at_hva(space, hvas).filter_map(|hit| home(hit.slot)).for_each(found),
        None => now.slots(space).filter_map(home).for_each(found),
    }
}

fn is_logged(slot: &Slot) -> bool {
    slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)
}

/// The host memory of some frames of the slot, if it has any.
fn hvas(slot: &Slot, gfns: GfnRange) -> Option<HvaRange> {
    slot.hva_of(gfns.start()).and_then(|hva| HvaRange::with_len(hva, gfns.len() << PAGE_SHIFT))
}

/// The part of `gfns`, frames of the old slot, whose memory is in the new one at other frames; and how much further.
fn moved(old: &Slot, gfns: GfnRange, new: &Slot) -> Option<(GfnRange, u64)> {
    let place = |slot: &Slot| match slot.backing() {
        Backing::Device { token } => Some((false, token)),
        other => other.hva().map(|hva| (true, hva.get())),
    };
    let ((is_host, before), (is_still_host, after)) = (place(old)?, place(new)?);
    // Tokens need not be aligned: pages that overlap in part are not the same.
    let page = 1 << PAGE_SHIFT;
    if is_host != is_still_host || before % page != after % page {
        return None;
    }
    let pages = (before / page).wrapping_sub(after / page);
    let further = pages.wrapping_add(new.base_gfn().get()).wrapping_sub(old.base_gfn().get());
    let (start, end) = ends(new.gfns());
    let from = range(start.wrapping_sub(further), end.wrapping_sub(further));
    let gfns = gfns.intersect(&from).filter(|gfns| !gfns.is_empty() && further != 0)?;
    Some((gfns, further))
}
