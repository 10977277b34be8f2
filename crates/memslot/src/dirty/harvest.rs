//! What a consumer has taken: to be looked at, and then committed or put back.

use super::consumer::Consumer;
use super::log::{BitmapError, check_length, logged};
use super::set::Set;
use crate::addr::{Gfn, GfnRange};
use crate::slot::{AddressSpaceId, SlotFlags, SlotId};
use crate::table::{MAX_ADDRESS_SPACES, Snapshot, View};

/// Dirty pages that a consumer has taken, and is not done with.
///
/// [`commit`](Self::commit) it when all is copied: then the pages are clean for this consumer. Dropping it, or
/// [`merge_back`](Self::merge_back), leaves them dirty: an error on the way loses nothing. Pages written since
/// the harvest are in the next one either way.
#[must_use = "a harvest that is dropped is put back"]
pub struct Harvest<'c> {
    consumer: &'c Consumer,
    /// The slots that the bits belong to.
    snapshot: Snapshot,
    gfns: GfnRange,
    pub(super) sets: [Set; MAX_ADDRESS_SPACES],
}

/// Neighbouring dirty pages of one slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The address space.
    pub address_space: AddressSpaceId,
    /// The slot.
    pub slot: SlotId,
    /// The pages, in guest frames; [`GfnRange::gpas`] makes bytes of them.
    pub gfns: GfnRange,
}

/// Neighbouring pages of one slot that are all dirty or all clean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// The pages.
    pub run: Run,
    /// Whether they are dirty.
    pub dirty: bool,
}

impl<'c> Harvest<'c> {
    pub(super) fn new(consumer: &'c Consumer, snapshot: Snapshot, gfns: GfnRange) -> Self {
        Self { consumer, snapshot, gfns, sets: Default::default() }
    }

    /// The version of the table that the pages belong to.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.snapshot
    }

    /// The dirty pages, as runs that are as long as their slot lets them be: in order of address space and gfn.
    /// Clean memory costs nothing to skip.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        self.snapshot.address_spaces().zip(&self.sets).flat_map(move |(space, set)| {
            // Chunks that lie side by side, and the slots there.
            let groups = set.chunks.chunk_by(|a, b| a.0 + 1 == b.0);
            groups.flat_map(move |chunks| {
                let first = chunks[0].0 * super::chunk::PAGES;
                let end = first + chunks.len() as u64 * super::chunk::PAGES;
                let gfns = GfnRange::new(Gfn::new(first), Gfn::new(end)).unwrap_or_default();
                let gfns = gfns.intersect(&self.gfns).unwrap_or_default();
                let pieces = self.snapshot.slots_in(space, gfns);
                let pieces = pieces.filter(|piece| piece.slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES));
                pieces.flat_map(move |piece| {
                    let slot = piece.slot.id();
                    let runs =
                        super::runs::Runs::new(chunks, piece.gfns.start().get(), piece.gfns.end().get());
                    runs.filter_map(move |(from, to)| {
                        let gfns = GfnRange::new(Gfn::new(from), Gfn::new(to))?;
                        Some(Run { address_space: space, slot, gfns })
                    })
                })
            })
        })
    }

    /// Every page of every logged slot in the harvest's range, dirty or clean, in order and without a gap; the
    /// clean tail of a slot is there, too.
    pub fn spans(&self) -> impl Iterator<Item = Span> {
        self.snapshot.address_spaces().zip(&self.sets).flat_map(move |(space, set)| {
            logged(&self.snapshot, space).flat_map(move |slot| {
                let gfns = slot.gfns().intersect(&self.gfns).unwrap_or_default();
                let (mut at, end) = (gfns.start().get(), gfns.end().get());
                let mut runs = set.runs(at, end).peekable();
                core::iter::from_fn(move || {
                    let (dirty, to) = match runs.peek() {
                        Some(&(from, _)) if from > at => (false, from),
                        Some(&(_, to)) => {
                            runs.next();
                            (true, to)
                        }
                        None => (false, end),
                    };
                    let gfns = GfnRange::new(Gfn::new(at), Gfn::new(to)).filter(|gfns| !gfns.is_empty())?;
                    at = to;
                    Some(Span { run: Run { address_space: space, slot: slot.id(), gfns }, dirty })
                })
            })
        })
    }

    /// How many pages are dirty.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs().map(|run| run.gfns.len()).sum()
    }

    /// Writes the bits of a range as KVM lays them out: bit `i` of word `w` is the page `64 * w + i` of `gfns`, in
    /// little-endian words; bits behind the range are 0. Nothing is allocated. Returns how many bits are set.
    ///
    /// # Errors
    /// [`BitmapError`] where `words` does not have exactly the range's length.
    pub fn words(
        &self,
        space: AddressSpaceId,
        gfns: GfnRange,
        words: &mut [u64],
    ) -> Result<u64, BitmapError> {
        check_length(gfns, words)?;
        words.fill(0);
        let Some(set) = self.sets.get(usize::from(space.get())) else { return Ok(0) };
        let start = gfns.start().get();
        let mut pages = 0;
        // A chunk may have bits of frames that no logged slot has.
        let pieces = self.snapshot.slots_in(space, gfns);
        for piece in pieces.filter(|piece| piece.slot.flags().contains(SlotFlags::LOG_DIRTY_PAGES)) {
            for (from, to) in set.runs(piece.gfns.start().get(), piece.gfns.end().get()) {
                pages += to - from;
                for (word, bits) in super::chunk::words_of(from - start, to - start) {
                    words[word] |= bits.to_le();
                }
            }
        }
        Ok(pages)
    }

    /// The pages are dealt with: they are clean for this consumer, but for what was written since.
    pub fn commit(mut self) {
        self.consumer.forget(&mut self.sets);
    }

    /// The pages stay dirty for this consumer, as when the harvest is dropped.
    pub fn merge_back(self) {}
}

impl Drop for Harvest<'_> {
    fn drop(&mut self) {
        if self.sets.iter().any(|set| !set.chunks.is_empty()) {
            let snapshot = self.snapshot.clone();
            self.consumer.keep(&mut self.sets, &snapshot);
        }
    }
}
