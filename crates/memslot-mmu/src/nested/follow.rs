//! The tables as a listener of the slot table: what becomes of mappings when slots change.
//!
//! | change | mappings |
//! |---|---|
//! | frames lose their backing (delete, move, shrink) | zapped, those frames and no others; what was written is marked |
//! | frames gain a backing | nothing was mapped, and nothing says "no memory here" |
//! | the slot becomes read-only | stay, without writing |
//! | it becomes writable again | stay; the next write faults |
//! | logging starts | stay; made to notice writes, unless the log says that all pages are dirty at first |
//! | logging stops | stay; small pages become large ones where all are there |
//! | split, merged, grown, another id | stay; a large page that a new border cuts is zapped |
//!
//! All in the order of the [protocol](super): the new version first, then the entries, then one flush for
//! the whole transaction, and when the transaction returns no processor has a translation to memory that was removed.
//!
//! Nothing of this can fail: the two versions that a commit and its undoing need are reserved before.

use alloc::boxed::Box;

use memslot::dirty::DirtyLog;
use memslot::{GfnRange, Listener, ListenerError, PieceKind, Slot, SlotFlags, Snapshot, Update, View};

use super::operation::{STEP, Task};
use super::protect::Take;
use super::rearm::collect_dirty_bits;
use super::shared::Published;
use super::{Mmu, Shared};
use crate::counted::try_box;
use crate::flush::Flush;
use crate::format::Format;
use crate::host::Host;
use crate::invalidate::{ends, moved_by, range};

/// See the [module documentation](self).
pub(crate) struct Follower<F: Format, H: Host> {
    mmu: Mmu<F, H>,
    /// For the commit, and for its undoing.
    reserved: [Option<Box<Published>>; 2],
    /// What the last commit replaced.
    previous: Option<Snapshot>,
}

/// What a piece is about, forwards or backwards.
enum Change {
    Removed(Slot),
    Changed(Slot, Slot),
    Added,
}

impl Change {
    fn of(kind: PieceKind, forwards: bool) -> Self {
        match (kind, forwards) {
            (PieceKind::Removed { old }, true) => Self::Removed(old),
            (PieceKind::Added { new }, false) => Self::Removed(new),
            (PieceKind::Changed { old, new }, true) => Self::Changed(old, new),
            (PieceKind::Changed { old, new }, false) => Self::Changed(new, old),
            (PieceKind::Removed { .. }, false) | (PieceKind::Added { .. }, true) => Self::Added,
        }
    }
}

impl<F: Format, H: Host> Follower<F, H> {
    pub(crate) fn new(mmu: Mmu<F, H>) -> Self {
        Self { mmu, reserved: [None, None], previous: None }
    }

    fn publish(&mut self, view: Snapshot) {
        let Some(mut next) = self.reserved.iter_mut().find_map(Option::take) else { return };
        next.view = view;
        self.mmu.shared.lock().publish(next);
    }

    /// Brings the tables after the version that was just published.
    fn follow(&self, update: &Update<'_>, forwards: bool) {
        let mmu = &self.mmu;
        let now = if forwards { update.after } else { update.before };
        let changes = || {
            let pieces = update.pieces.iter().filter(|piece| piece.address_space == mmu.address_space());
            pieces.map(|piece| (piece.gfns, Change::of(piece.kind, forwards)))
        };
        let mut flush = mmu.nothing_owed();
        for (gfns, change) in changes() {
            match change {
                Change::Removed(old) => {
                    let task = self.wanted_at(&old, now).map_or(Task::Zap, Task::ZapMoved);
                    flush.merge(mmu.start(task, gfns).run());
                }
                Change::Changed(old, new) => self.change(&mut flush, gfns, &old, &new),
                Change::Added => {}
            }
        }
        flush.discharge();
        if mmu.shared.uses_dirty_bits() {
            // Tables that others have taken out have been flushed by now as far as these frames go, but not searched.
            for (gfns, change) in changes() {
                if let Change::Removed(old) = change {
                    if let Some(further) = self.wanted_at(&old, now) {
                        mmu.shared.lock().for_each_owed(|pin, dirty| {
                            dirty
                                .intersect(&gfns)
                                .into_iter()
                                .for_each(|dirty| pin.shared.mark(moved_by(dirty, further)));
                        });
                    }
                }
            }
        }
    }

    /// Where what was written to a slot that loses frames is to be marked, if anywhere: so much further.
    fn wanted_at(&self, old: &Slot, now: &View) -> Option<u64> {
        let moved = now.slot(old.address_space(), old.id()).and_then(|new| self.moved(old, new));
        moved.or(self.is_wanted(old).then_some(0))
    }

    /// Where a logged slot takes the place of another, the log hears of what the processor wrote until now before the new
    /// version is published: afterwards the marks are the new slot's.
    fn collect_what_is_replaced(&self, update: &Update<'_>) {
        let shared = &*self.mmu.shared;
        if !shared.uses_dirty_bits() || !self.keeps_removed() {
            return;
        }
        let moves = |old: &Slot| {
            let new = update.after.slot(old.address_space(), old.id());
            new.is_some_and(|new| self.moved(old, new).is_some())
        };
        let here = |space| update.pieces.iter().filter(move |piece| piece.address_space == space);
        let gains = |gfns: GfnRange| {
            here(shared.space()).any(|piece| match piece.kind {
                PieceKind::Added { new } => piece.gfns == gfns && shared.is_logged(&new),
                _ => false,
            })
        };
        shared.lock().collect_owed();
        for piece in here(shared.space()) {
            if let PieceKind::Removed { old } = piece.kind {
                if shared.is_logged(&old) && gains(piece.gfns) && !moves(&old) {
                    let (mut at, end) = ends(piece.gfns);
                    while at < end.min(Shared::<F, H>::END) {
                        let mut locked = shared.lock();
                        at = collect_dirty_bits(&locked.pin().0, at, end, STEP);
                    }
                }
            }
        }
    }

    /// Whether somebody wants to know what was written to a slot that goes: a consumer of what was deleted; and, where
    /// nothing but the entries says so, the log, if the change is taken back.
    fn is_wanted(&self, old: &Slot) -> bool {
        let shared = &self.mmu.shared;
        shared.is_logged(old) && (shared.uses_dirty_bits() || self.keeps_removed())
    }

    fn keeps_removed(&self) -> bool {
        self.mmu.shared.config.log.as_ref().is_some_and(DirtyLog::keeps_removed)
    }

    /// How much further the memory of a logged slot is, if it has moved and is logged still.
    fn moved(&self, old: &Slot, new: &Slot) -> Option<u64> {
        let shared = &self.mmu.shared;
        let is_moved = old.backing() == new.backing() && old.base_gfn() != new.base_gfn();
        (is_moved && shared.is_logged(old) && shared.is_logged(new))
            .then(|| new.base_gfn().get().wrapping_sub(old.base_gfn().get()))
    }

    fn change<'m>(&'m self, flush: &mut Flush<'m, F, H>, gfns: GfnRange, old: &Slot, new: &Slot) {
        let mmu = &self.mmu;
        let shared = &mmu.shared;
        let (start, end) = ends(gfns);
        for border in [start, end] {
            flush.merge(mmu.start(Task::Cut, range(border, border.saturating_add(1))).run());
        }
        let is_read_only = |slot: &Slot| slot.flags().contains(SlotFlags::READONLY);
        if is_read_only(new) && !is_read_only(old) {
            flush.merge(mmu.start(Task::Protect(Take::WritingForGood), gfns).run());
        }
        let (was_logged, is_logged) = (shared.is_logged(old), shared.is_logged(new));
        let is_dirty_at_first = shared.config.log.as_ref().is_some_and(|log| log.initially_set());
        if is_logged && !was_logged && !is_dirty_at_first {
            let take = if shared.uses_dirty_bits() { Take::DirtyOrLarge } else { Take::Writing };
            flush.merge(mmu.start(Task::Protect(take), gfns).run());
        }
        if was_logged && !is_logged {
            flush.merge(mmu.collapse(gfns));
        }
    }
}

impl<F: Format, H: Host + Send + Sync + 'static> Listener for Follower<F, H> {
    fn name(&self) -> &str {
        "page tables"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        self.previous = None;
        let current = self.mmu.shared.current_view();
        for place in &mut self.reserved {
            if place.is_none() {
                *place = Some(try_box(Published::new(current.clone()))?);
            }
        }
        self.collect_what_is_replaced(update);
        Ok(())
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        if let Some(view) = update.snapshot() {
            self.previous = Some(self.mmu.shared.current_view());
            self.publish(view);
            self.follow(update, true);
        }
        Ok(())
    }

    fn undo(&mut self, update: &Update<'_>) {
        if let Some(view) = self.previous.take() {
            self.publish(view);
            self.follow(update, false);
        }
    }

    fn abort(&mut self, _: &Update<'_>) {
        self.reserved = [None, None];
    }
}
