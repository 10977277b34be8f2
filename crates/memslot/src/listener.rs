//! Who hears of a change: page tables, `/dev/kvm`, VFIO, vhost …
//!
//! A [`Listener`] follows the table. For every transaction it is called in this order:
//!
//! ```text
//! prepare   all operations are valid; reserve what you need. May fail: nothing happened, those prepared abort
//!   │
//!   ├─ publish: readers see the new version
//!   │
//! commit    act. Should not fail; if it does, what was committed is undone in reverse order and
//!   │       the table publishes what it had before, as a new generation
//!   │
//! settled   all have committed: nothing will be undone
//! ```
//!
//! A listener that panics has failed, as with an error: the others hear the same, the table publishes what it had before,
//! and then the panic goes on. Only a panic in `settled` takes nothing back; the others hear `settled` all the same. (One while the others are told, in `abort` or
//! `undo`, is a second panic, and ends the process.)
//!
//! What it hears is an [`Update`]: the version before and the one after, the slots that changed, and the same
//! change cut into [`Piece`]s: ranges of frames that lost their backing, keep it under another slot or other
//! flags, or gained one. A listener that keeps something per page (mappings, dirty bits) wants the pieces: a
//! split slot is one `Changed` piece for each half, and nothing needs to be unmapped.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::cell::RefCell;

use crate::addr::{Gfn, GfnRange};
use crate::error::OutOfMemory;
use crate::slot::{AddressSpaceId, Slot};
use crate::table::{AttachmentKey, Attachments, Published, Snapshot, View};

/// An error of a listener; any error type will do.
pub type ListenerError = Box<dyn core::error::Error + Send + Sync>;

/// Somebody who follows the table. See the [module documentation](self).
pub trait Listener {
    /// A name for error messages.
    fn name(&self) -> &str;

    /// The change is valid and about to be published: reserve what [`commit`](Self::commit) will need.
    ///
    /// # Errors
    /// Any error stops the transaction; nothing has changed.
    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let _ = update;
        Ok(())
    }

    /// The change is published: follow it.
    ///
    /// # Errors
    /// Only for interfaces that cannot promise in `prepare` what they do here. A listener that fails has undone
    /// its own part; the listeners before it are undone, and the table publishes what it had before.
    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError>;

    /// A later listener failed to commit: take back what `commit` did.
    fn undo(&mut self, update: &Update<'_>);

    /// All listeners have committed, so the change stays: let go of what `undo` would have needed.
    fn settled(&mut self, update: &Update<'_>) {
        let _ = update;
    }

    /// The change was prepared and did not come to be: let go of what `prepare` reserved.
    fn abort(&mut self, update: &Update<'_>) {
        let _ = update;
    }
}

/// One slot that changed: created (`old` is `None`), deleted (`new` is `None`) or replaced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotChange {
    /// The slot before.
    pub old: Option<Slot>,
    /// The slot after.
    pub new: Option<Slot>,
}

/// What became of a range of frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PieceKind {
    /// The frames lost the backing that `old` gave them.
    Removed {
        /// The slot before.
        old: Slot,
    },
    /// The frames keep their backing; the slot, its id or its flags are others.
    Changed {
        /// The slot before.
        old: Slot,
        /// The slot after.
        new: Slot,
    },
    /// The frames gained the backing that `new` gives them.
    Added {
        /// The slot after.
        new: Slot,
    },
}

/// A range of frames and what became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The address space.
    pub address_space: AddressSpaceId,
    /// The frames.
    pub gfns: GfnRange,
    /// What became of them.
    pub kind: PieceKind,
}

/// One generation's change, as listeners hear it.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    /// The version before.
    pub before: &'a View,
    /// The version after.
    pub after: &'a View,
    /// The slots that changed, ordered by address space and id.
    pub slots: &'a [SlotChange],
    /// The same as pieces: first all removed, then all changed, then all added ones, each in order of gfn.
    /// In this order they can be applied one by one without ever overlapping.
    pub pieces: &'a [Piece],
    pub(crate) stage: Stage<'a>,
}

/// How far the update is.
#[derive(Clone, Copy)]
pub(crate) enum Stage<'a> {
    /// What is attached here becomes part of the version after.
    Preparing(&'a RefCell<Attachments>),
    Published(Published<'a>),
}

impl Update<'_> {
    /// The version after, to be kept; `None` in [`prepare`](Listener::prepare), where it is not published yet.
    #[must_use]
    pub fn snapshot(&self) -> Option<Snapshot> {
        match self.stage {
            Stage::Preparing(_) => None,
            Stage::Published(version) => Some(version.snapshot()),
        }
    }

    /// Gives the version after something to carry: readers find it with [`View::attachment`], in this version and
    /// in those after it until it is replaced. It is dropped when the last version that carries it goes, so it
    /// is also a way to keep something alive for exactly as long as a reader can get to a slot.
    ///
    /// Only in [`prepare`](Listener::prepare); later the version is published, and this does nothing. A change that
    /// is taken back publishes what the version before carried.
    pub fn attach<T: Any + Send + Sync>(&self, key: AttachmentKey<T>, value: Arc<T>) {
        if let Stage::Preparing(attachments) = self.stage {
            attachments.borrow_mut().set(key, value);
        }
    }
}

/// Cuts changed slots into pieces.
pub(crate) fn cut(changes: &[SlotChange], pieces: &mut Vec<Piece>) -> Result<(), OutOfMemory> {
    if let &[change] = changes {
        if let Some(piece) = whole(change) {
            pieces.clear();
            pieces.try_reserve(1).map_err(|_| OutOfMemory)?;
            pieces.push(piece);
            return Ok(());
        }
        if let Some(moved) = moved(change) {
            pieces.clear();
            pieces.try_reserve(2).map_err(|_| OutOfMemory)?;
            pieces.extend(moved);
            return Ok(());
        }
    }
    let mut old = sorted(changes, |change| change.old)?;
    let mut new = sorted(changes, |change| change.new)?;
    pieces.clear();
    // Every slot starts and ends at most one piece of each kind.
    pieces.try_reserve(4 * changes.len() + 4).map_err(|_| OutOfMemory)?;
    // From the end, so that what is left of a slot can be pushed back after a piece was cut off.
    old.reverse();
    new.reverse();
    loop {
        let (space, at) = match (old.last(), new.last()) {
            (None, None) => break,
            (Some(slot), None) | (None, Some(slot)) => slot.place(),
            (Some(a), Some(b)) => a.place().min(b.place()),
        };
        let here = |rest: &Option<&Rest>| rest.is_some_and(|rest| rest.place() == (space, at));
        let (a, b) = (old.last().filter(|a| here(&Some(a))), new.last().filter(|b| here(&Some(b))));
        // Up to the next border of either.
        let border = [old.last(), new.last()]
            .into_iter()
            .flatten()
            .filter(|rest| rest.slot.address_space() == space)
            .map(|rest| if rest.from == at { rest.slot.gfns().end() } else { rest.from })
            .min()
            .unwrap_or(at);
        let Some(gfns) = GfnRange::new(at, border) else { break };
        let mut push = |kind| pieces.push(Piece { address_space: space, gfns, kind });
        match (a, b) {
            (Some(a), Some(b)) if a.slot.same_backing_at_same_gfn(&b.slot) => {
                push(PieceKind::Changed { old: a.slot, new: b.slot });
            }
            (a, b) => {
                if let Some(a) = a {
                    push(PieceKind::Removed { old: a.slot });
                }
                if let Some(b) = b {
                    push(PieceKind::Added { new: b.slot });
                }
            }
        }
        let (a, b) = (a.is_some(), b.is_some());
        if a {
            advance(&mut old, border);
        }
        if b {
            advance(&mut new, border);
        }
    }
    pieces.sort_unstable_by_key(|piece| {
        let order = match piece.kind {
            PieceKind::Removed { .. } => 0,
            PieceKind::Changed { .. } => 1,
            PieceKind::Added { .. } => 2,
        };
        (order, piece.address_space, piece.gfns.start())
    });
    Ok(())
}

/// The pieces of a slot that moves to where it was not at all.
fn moved(change: SlotChange) -> Option<[Piece; 2]> {
    let (old, new) = change.old.zip(change.new)?;
    let piece = |slot: Slot, kind| Piece { address_space: slot.address_space(), gfns: slot.gfns(), kind };
    let pieces = [piece(old, PieceKind::Removed { old }), piece(new, PieceKind::Added { new })];
    (!old.gfns().overlaps(&new.gfns())).then_some(pieces)
}

/// The one piece of a change that concerns all frames of one slot alike: the most frequent changes are.
fn whole(change: SlotChange) -> Option<Piece> {
    let (slot, kind) = match (change.old, change.new) {
        (Some(old), None) => (old, PieceKind::Removed { old }),
        (None, Some(new)) => (new, PieceKind::Added { new }),
        (Some(old), Some(new)) if old.gfns() == new.gfns() && old.same_backing_at_same_gfn(&new) => {
            (old, PieceKind::Changed { old, new })
        }
        _ => return None,
    };
    Some(Piece { address_space: slot.address_space(), gfns: slot.gfns(), kind })
}

/// What is left of a slot from `from` on.
struct Rest {
    slot: Slot,
    from: Gfn,
}

impl Rest {
    fn place(&self) -> (AddressSpaceId, Gfn) {
        (self.slot.address_space(), self.from)
    }
}

fn advance(rests: &mut Vec<Rest>, border: Gfn) {
    if let Some(rest) = rests.last_mut() {
        rest.from = border;
        if border >= rest.slot.gfns().end() {
            rests.pop();
        }
    }
}

fn sorted(
    changes: &[SlotChange],
    pick: impl Fn(&SlotChange) -> Option<Slot>,
) -> Result<Vec<Rest>, OutOfMemory> {
    let mut slots = Vec::new();
    slots.try_reserve(changes.len()).map_err(|_| OutOfMemory)?;
    slots.extend(changes.iter().filter_map(pick).map(|slot| Rest { slot, from: slot.base_gfn() }));
    slots.sort_unstable_by_key(Rest::place);
    Ok(slots)
}
