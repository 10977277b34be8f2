//! Memory that moves to other frames, and what is written meanwhile.
//!
//! The dirty log hears of a change of the slots before the page tables do, and brings the marks of memory that moves to its new place.
//! Until the tables have followed, processors go on at the old place, and what is marked there is nobody's. So from before the
//! log hears of a change until the tables have followed, frames whose memory moves are marked where it goes, too.

use alloc::vec::Vec;

use memslot::{AddressSpaceId, GfnRange, OutOfMemory, PieceKind, Slot, SlotFlags, Update};

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
        let mut all = Vec::new();
        all.try_reserve_exact(moves(update).count()).map_err(|_| OutOfMemory)?;
        all.extend(moves(update));
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

fn moves(update: &Update<'_>) -> impl Iterator<Item = Move> {
    let is_logged = |slot: &Slot| slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES);
    let left = update.pieces.iter().filter_map(move |piece| match piece.kind {
        PieceKind::Removed { old } if is_logged(&old) => Some((piece.address_space, piece.gfns, old)),
        _ => None,
    });
    left.flat_map(move |(space, gfns, old)| {
        let new = update.slots.iter().filter_map(|slot| slot.new);
        let new = new.filter(move |new| new.address_space() == space && is_logged(new));
        new.filter_map(move |new| {
            let further = further(&old, &new).filter(|further| *further != 0)?;
            let (start, end) = ends(new.gfns());
            let from = range(start.wrapping_sub(further), end.wrapping_sub(further));
            let gfns = gfns.intersect(&from).filter(|gfns| !gfns.is_empty())?;
            Some(Move { space, gfns, further })
        })
    })
}

/// How much further a page of the old slot's memory is in the new one, if that has it.
fn further(old: &Slot, new: &Slot) -> Option<u64> {
    let bases = new.base_gfn().get().wrapping_sub(old.base_gfn().get());
    match (old.hva(), new.hva()) {
        (Some(before), Some(after)) => {
            let pages = (before.get() >> PAGE_SHIFT).wrapping_sub(after.get() >> PAGE_SHIFT);
            Some(bases.wrapping_add(pages))
        }
        _ => (old.backing() == new.backing()).then_some(bases),
    }
}
