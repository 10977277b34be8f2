//! The guest memory that both sides are given: slots of 1 to 1023 pages with gaps between them, unaligned, the
//! host memory in another order than the guest's.

use memslot::{AddressSpaceId, Backing, Gfn, GfnRange, Hva, SlotFlags, SlotId, SlotSpec};

pub(crate) const SPACE: AddressSpaceId = AddressSpaceId::NORMAL;
pub(crate) const PAGE: u64 = 4096;

/// xorshift: the same numbers in every run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % n as u64).unwrap_or(0)
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// One slot's numbers, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) id: u32,
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) hva: u64,
}

impl Piece {
    pub(crate) fn spec(&self) -> SlotSpec {
        SlotSpec {
            address_space: SPACE,
            id: SlotId::new(self.id),
            gfns: GfnRange::with_len(Gfn::new(self.gpa / PAGE), self.size / PAGE).expect("fits"),
            backing: Backing::Host { hva: Hva::new(self.hva) },
            flags: SlotFlags::empty(),
        }
    }
}

/// `n` slots in order of gpa.
pub(crate) fn layout(n: usize) -> Vec<Piece> {
    let mut random = Random::new(88_172_645_463_325_252);
    let mut gpa = 16 * PAGE;
    let mut pieces: Vec<Piece> = (0..n)
        .map(|i| {
            let size = (1 + random.below(1023) as u64) * PAGE;
            let piece = Piece { id: u32::try_from(i).unwrap_or(u32::MAX), gpa, size, hva: 0 };
            gpa += size + random.below(512) as u64 * PAGE;
            piece
        })
        .collect();
    let mut order: Vec<usize> = (0..n).collect();
    random.shuffle(&mut order);
    let mut hva = 0x1000_0000_0000;
    for i in order {
        pieces[i].hva = hva;
        hva += pieces[i].size + random.below(4) as u64 * PAGE;
    }
    pieces
}

/// The pieces in the order in which they are created.
pub(crate) fn creation_order(pieces: &[Piece]) -> Vec<Piece> {
    let mut order = pieces.to_vec();
    Random::new(12345).shuffle(&mut order);
    order
}
