//! Shadow tables as a listener of the slot table: what becomes of them when slots change.
//!
//! | change | entries | shadow pages |
//! |---|---|---|
//! | frames lose their backing (delete, move, shrink) | zapped, those frames and no others | those of tables in them |
//! | frames gain a backing | nothing was mapped; what says "no memory here" is of an older version, and not believed | |
//! | the slot becomes read-only | stay, without writing | |
//! | it becomes writable again | stay; the next write faults | |
//! | logging starts | stay; the next write faults, unless the log says that all pages are dirty at first | |
//! | logging stops | stay, but for those that a large page can take the place of ([`collapse`](super::collapse)) | |
//! | split, merged, grown, another id | stay; a large page that a new border cuts is zapped | are noted under the new ids ([`by_slot`](super::by_slot)) |
//!
//! What loses its backing is zapped *before* the new version is put in place: it is found through the version that has it. Meanwhile
//! those frames are *closed*: faults there try again, so that nothing is mapped. Large pages that reach over a border of what goes may be
//! made meanwhile, from frames that stay; so they are looked for once more in the moment in which the new version is put in place.
//! Access that is taken away is taken away *after* that, so that no fault gives it again. One flush for all of it. (Until then, an invalidation of
//! memory that has just lost its slot finds no slot, and flushes what is pending.)
//!
//! The dirty log hears of a change before: where memory moves, its bits are at the new place already. So from the preparation on, until the new
//! version is in place, what is granted writing is marked there as well.
//!
//! Entries that stay do so where they are filed: the lists are those of the address space, whatever slots it has. Nothing is filed
//! anew, so that nothing can be filed wrong.
//!
//! Nothing of this can fail: what a commit and its undoing need is reserved before.

use alloc::vec::Vec;
use core::convert::Infallible;

use memslot::{
    AddressSpaceId, Gfn, GfnRange, Listener, ListenerError, OutOfMemory, PieceKind, Slot, SlotFlags, Update,
};

use super::by_slot::Renamed;
use super::pass::Visit;
use super::shared::Shared;
use super::slot_set::SlotSetCache;
use super::slots::Slots;
use super::zap::Task;
use super::{Shadow, ShadowHost, spte};
use crate::counted::Counted;
use crate::level::ENTRIES;

/// So many chunks of lists are freed when a change has settled; the rest by and by.
const CHUNKS: usize = 512;

/// See the [module documentation](self).
pub(super) struct Follower<H: ShadowHost> {
    shadow: Shadow<H>,
    /// For the commit.
    next: Option<Counted<Slots>>,
    /// What the last commit replaced.
    previous: Option<Counted<Slots>>,
    /// For the pages' sets of slots.
    nodes: SlotSetCache,
}

/// What is done with a range, forwards or backwards.
struct Change {
    space: AddressSpaceId,
    gfns: GfnRange,
    old: Slot,
    /// The slot that has the frames afterwards with the same backing.
    new: Option<Slot>,
}

fn changes(update: &Update<'_>, forwards: bool) -> impl Iterator<Item = Change> + Clone {
    update.pieces.iter().filter_map(move |piece| {
        let (old, new) = match (piece.kind, forwards) {
            (PieceKind::Removed { old }, true) => (old, None),
            (PieceKind::Added { new }, false) => (new, None),
            (PieceKind::Changed { old, new }, true) => (old, Some(new)),
            (PieceKind::Changed { old, new }, false) => (new, Some(old)),
            (PieceKind::Removed { .. }, false) | (PieceKind::Added { .. }, true) => return None,
        };
        Some(Change { space: piece.address_space, gfns: piece.gfns, old, new })
    })
}

impl Change {
    /// Whether the entries have to go.
    fn zaps(&self) -> bool {
        self.new.is_none()
    }

    /// Where a slot begins or ends afterwards and did not before, if it is here.
    fn borders(&self) -> impl Iterator<Item = Gfn> {
        let is_cut = self.new.is_none_or(|new| new.gfns() != self.old.gfns());
        [self.gfns.start(), self.gfns.end()].into_iter().filter(move |_| is_cut)
    }

    /// Does it to the entries.
    fn work_on<H: ShadowHost>(&self, shared: &Shared<H>, task: Task) {
        if self.gfns == self.old.gfns() {
            shared.work_on_slot(task, &self.old);
        } else {
            shared.work_on(task, self.space, self.gfns);
        }
    }
}

impl<H: ShadowHost> Follower<H> {
    pub(super) fn new(shadow: Shadow<H>) -> Self {
        Self { shadow, next: None, previous: None, nodes: SlotSetCache::default() }
    }

    /// Puts `next` in place of the slots as they are. Returns those.
    fn follow(&mut self, update: &Update<'_>, next: Counted<Slots>, forwards: bool) -> Counted<Slots> {
        let shared = &*self.shadow.shared;
        shared.with(|locked| {
            let closed = &mut locked.state.closed;
            for change in changes(update, forwards).filter(Change::zaps) {
                debug_assert!(closed.len() < closed.capacity(), "`prepare` has made room");
                closed.push((change.space, change.gfns));
            }
        });
        for change in changes(update, forwards).filter(Change::zaps) {
            change.work_on(shared, Task::Zap);
        }
        for change in changes(update, forwards) {
            change.borders().for_each(|border| shared.cut(change.space, border));
        }
        let (old, comes_again) = shared.with(|locked| {
            for change in changes(update, forwards) {
                locked.state.changes.add(change.space, change.gfns);
                change.borders().for_each(|border| _ = locked.cut(change.space, border, usize::MAX));
            }
            let old = locked.replace_slots(next);
            let comes_again = locked.count_version();
            locked.state.closed.clear();
            locked.state.has_left = changes(update, forwards).any(|change| change.zaps());
            shared.moving.end();
            (old, comes_again)
        });
        if comes_again {
            self.shadow.zap_obsolete();
        }
        zap_tables(shared, &changes(update, forwards).filter(Change::zaps));
        for change in changes(update, forwards) {
            let Some(new) = change.new else { continue };
            let is_read_only = |slot: &Slot| slot.flags().contains(SlotFlags::READONLY);
            let starts_log = shared.is_logged(&new)
                && !shared.is_logged(&change.old)
                && !shared.config.log.as_ref().is_some_and(|log| log.initially_set());
            if is_read_only(&new) && !is_read_only(&change.old) {
                let all = spte::WRITE | spte::MMU_WRITABLE | spte::HOST_WRITABLE;
                change.work_on(shared, Task::Take(all));
            } else if starts_log {
                change.work_on(shared, Task::Take(spte::WRITE));
            }
            if shared.is_logged(&change.old) && !shared.is_logged(&new) {
                shared.collapse(change.space, change.gfns, &new);
            }
        }
        shared.with(|locked| {
            for change in changes(update, forwards) {
                locked.flush_later(change.gfns);
            }
            locked.state.has_left = false;
        });
        old
    }
}

impl<H: ShadowHost> Follower<H> {
    /// The change has settled, or was taken back: these slots are gone.
    fn end(&self, gone: impl Iterator<Item = Slot> + Clone) {
        let shared = &*self.shadow.shared;
        shared.end_renaming();
        shared.forget_slots(&gone.map(|slot| (slot.address_space(), slot.id())));
    }
}

/// The tables of the guest's in these frames are no more. Until they are found here, they are what processors may know still, as with a
/// translation that is not flushed yet. What that owes is left pending.
fn zap_tables<H: ShadowHost>(shared: &Shared<H>, gone: &(impl Iterator<Item = Change> + Clone)) {
    /// So many comparisons, or what costs as much, are made before others get the lock.
    const STEP: usize = 1 << 12;
    if gone.clone().next().is_none() {
        return;
    }
    let mut work = 0;
    let between = |_: &mut usize| Ok::<_, Infallible>(());
    let Ok(()) = shared.visit_all(&mut work, between, |work, locked, page| {
        let role = &page.key.role;
        let is_here = |change: Change| {
            *work += 1;
            change.space == role.address_space && change.gfns.contains(page.key.gfn)
        };
        if !role.direct && gone.clone().any(is_here) {
            locked.zap_page(page);
            // One flush, when all is done.
            locked.must_flush = false;
            *work += ENTRIES;
        }
        if *work < STEP {
            return Visit::Done;
        }
        *work = 0;
        Visit::DoneForNow
    });
}

impl<H: ShadowHost + Send + Sync + 'static> Listener for Follower<H> {
    fn name(&self) -> &str {
        "shadow page tables"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let shared = &*self.shadow.shared;
        let now = shared.with(|locked| locked.state.slots.clone());
        let next = Slots::new(&shared.rmap, update.after, now.view.clone(), Some(&now))?;
        let next = Counted::new(next)?;
        self.previous = None;
        let pieces = update.pieces.len();
        shared.with(|locked| locked.state.closed.try_reserve(pieces)).map_err(|_| OutOfMemory)?;
        let renamed = || {
            changes(update, true).filter_map(|Change { space, gfns, old, new }| {
                let (old, new) = (old.id(), new?.id());
                (old != new).then_some(Renamed { space, gfns, old, new })
            })
        };
        let mut all = Vec::new();
        all.try_reserve_exact(renamed().count()).map_err(|_| OutOfMemory)?;
        all.extend(renamed());
        shared.begin_renaming(all, &mut self.nodes)?;
        if let Err(error) = shared.moving.begin(update) {
            shared.end_renaming();
            return Err(error.into());
        }
        self.next = Some(next);
        Ok(())
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let (Some(view), Some(mut next)) = (update.snapshot(), self.next.take()) else { return Ok(()) };
        if let Some(next) = next.get_mut() {
            next.view = view;
        }
        self.previous = Some(self.follow(update, next, true));
        Ok(())
    }

    fn undo(&mut self, update: &Update<'_>) {
        if let Some(previous) = self.previous.take() {
            drop(self.follow(update, previous, false));
        }
        self.end(update.slots.iter().filter(|change| change.old.is_none()).filter_map(|change| change.new));
    }

    fn settled(&mut self, update: &Update<'_>) {
        self.end(update.slots.iter().filter(|change| change.new.is_none()).filter_map(|change| change.old));
        // The lists of slots that are gone.
        if self.previous.take().is_some() {
            /// So many before others get the lock.
            const STEP: usize = 16;
            let step = || self.shadow.shared.with_in_turn(|locked| locked.state.writer.reclaim(STEP));
            let _ = (0..CHUNKS / STEP).any(|_| step());
        }
    }

    fn abort(&mut self, _: &Update<'_>) {
        self.next = None;
        self.shadow.shared.moving.end();
        self.shadow.shared.end_renaming();
    }
}
