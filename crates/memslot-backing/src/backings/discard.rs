//! Discarding what a guest gives up, by guest frames.

use std::ops::Range;
use std::sync::Arc;

use memslot::{AddressSpaceId, Backing, Gfn, GfnRange, SlotFlags, SlotPiece, View};

use super::Backings;
use crate::error::DiscardError;
use crate::guest_memfd::GuestMemfd;
use crate::memory::Memory;

/// A range of bytes of one memory (or file), and the first frame that stands on it.
struct Run<'v, T> {
    of: &'v Arc<T>,
    bytes: Range<u64>,
    at: Gfn,
}

impl Backings {
    /// Discards the host memory behind guest frames: what a balloon, free page reporting or virtio-mem asks for.
    /// Returns how many bytes were discarded.
    ///
    /// Frames without a slot, and those of devices, are passed over. Of slots with a guest_memfd this is the shared half;
    /// the other one is for [`discard_private`](Self::discard_private).
    ///
    /// * Other slots that stand on the same memory (aliases, [`View::slots_at_hva`] finds them) see zeroes as well.
    /// * Take a version that is current and stays so: while a change is under way, the frames may become others'.
    /// * The discard is a write that no dirty log sees: mark the frames in the log if a migration or a diff snapshot
    ///   must know.
    ///
    /// # Errors
    /// [`DiscardError`]. All frames are looked at first; only [`DiscardError::Stopped`] comes when some are discarded.
    pub fn discard(&self, view: &View, space: AddressSpaceId, gfns: GfnRange) -> Result<u64, DiscardError> {
        let mut runs: Vec<Run<'_, Memory>> = Vec::new();
        for piece in view.slots_in(space, gfns) {
            let Some(hva) = piece.slot.hva_of(piece.gfns.start()) else { continue };
            writable(&piece)?;
            let memory = self.memory_in(view, hva).ok_or(DiscardError::Unknown { slot: *piece.slot })?;
            let from = hva.get() - memory.hva().get();
            add(&mut runs, memory, from, &piece);
        }
        for run in &runs {
            // The frames are whole pages of the guest, but the memory's may be larger.
            let checked = run.of.part(&run.bytes, run.of.page_size());
            checked.map_err(|source| DiscardError::Pages { at: run.at, source })?;
        }
        discard_all(&runs, |memory, bytes| Ok(memory.discard(bytes)?))
    }

    /// Discards the private memory behind guest frames, of those slots that have some: what becomes of it when the guest
    /// turns the frames into shared ones. Returns how many bytes were discarded.
    ///
    /// # Errors
    /// As [`discard`](Self::discard).
    pub fn discard_private(
        &self,
        view: &View,
        space: AddressSpaceId,
        gfns: GfnRange,
    ) -> Result<u64, DiscardError> {
        let mut runs: Vec<Run<'_, GuestMemfd>> = Vec::new();
        for piece in view.slots_in(space, gfns) {
            let Backing::GuestMemfd { file, offset, .. } = piece.slot.backing() else { continue };
            writable(&piece)?;
            let known = self.file_in(view, file).ok_or(DiscardError::Unknown { slot: *piece.slot })?;
            let before = piece.gfns.start().offset_from(piece.slot.base_gfn()).unwrap_or(0);
            let before = piece.slot.page_size().bytes_of(before).unwrap_or(0);
            add(&mut runs, known, offset + before, &piece);
        }
        discard_all(&runs, |file, bytes| Ok(file.discard(bytes)?))
    }
}

fn writable(piece: &SlotPiece<'_>) -> Result<(), DiscardError> {
    if piece.slot.flags().contains(SlotFlags::READONLY) {
        return Err(DiscardError::ReadOnly { slot: *piece.slot });
    }
    Ok(())
}

/// Adds what is behind a piece; to the last run if it goes on there, so that one large page behind two slots is whole.
fn add<'v, T>(runs: &mut Vec<Run<'v, T>>, of: &'v Arc<T>, from: u64, piece: &SlotPiece<'_>) {
    // At most the size of something that is mapped, or of a file.
    let end = from + (piece.gfns.len() << piece.slot.page_size().shift());
    match runs.last_mut() {
        Some(run) if Arc::ptr_eq(run.of, of) && run.bytes.end == from => run.bytes.end = end,
        _ => runs.push(Run { of, bytes: from..end, at: piece.gfns.start() }),
    }
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn discard_all<T>(
    runs: &[Run<'_, T>],
    discard: impl Fn(&T, Range<u64>) -> Result<(), AnyError>,
) -> Result<u64, DiscardError> {
    let mut bytes = 0;
    for run in runs {
        discard(run.of, run.bytes.clone()).map_err(|source| DiscardError::Stopped {
            at: run.at,
            bytes,
            source,
        })?;
        bytes += run.bytes.end - run.bytes.start;
    }
    Ok(bytes)
}
