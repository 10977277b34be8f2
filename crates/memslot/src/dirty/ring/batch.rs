//! Pages that are re-armed together.

use crate::addr::{Gfn, GfnRange};
use crate::dirty::Rearm;
use crate::slot::{AddressSpaceId, Slot, SlotId};

/// A call of [`Rearm::rearm`] stays within one chunk of this many frames.
const CHUNK: u64 = 32768;

/// Pages of a slot that lie within 64 frames.
#[derive(Default)]
pub(super) struct Batch {
    space: AddressSpaceId,
    slot: SlotId,
    first: u64,
    /// Bit n is page `first + n`; bit 0 is set unless the batch is empty.
    mask: u64,
}

impl Batch {
    /// Adds a page, or returns false where it is too far away.
    pub(super) fn add(&mut self, slot: &Slot, gfn: u64) -> bool {
        if self.mask == 0 {
            *self = Self { space: slot.address_space(), slot: slot.id(), first: gfn, mask: 1 };
            return true;
        }
        if (self.space, self.slot) != (slot.address_space(), slot.id()) {
            return false;
        }
        if gfn >= self.first {
            let ahead = gfn - self.first;
            if ahead < 64 {
                self.mask |= 1 << ahead;
            }
            return ahead < 64;
        }
        let behind = self.first - gfn;
        // The pages that are there already must stay in the window.
        let fits = behind <= u64::from(self.mask.leading_zeros());
        if fits {
            *self = Self { first: gfn, mask: self.mask << behind | 1, ..*self };
        }
        fits
    }

    /// Re-arms exactly these pages, as few ranges as possible; none of an empty batch.
    /// Sets `armed` as soon as a flush is needed.
    pub(super) fn rearm<A: Rearm>(&self, rearm: &mut A, armed: &mut bool) -> Result<(), A::Error> {
        let (mut at, mut mask) = (self.first, self.mask);
        while mask != 0 {
            let clean = mask.trailing_zeros();
            at += u64::from(clean);
            mask >>= clean;
            let run = u64::from(mask.trailing_ones()).min(CHUNK - at % CHUNK);
            if let Some(gfns) = GfnRange::with_len(Gfn::new(at), run) {
                rearm.rearm(self.space, gfns)?;
                *armed = true;
            }
            at += run;
            mask = if run < 64 { mask >> run } else { 0 };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_22_an_empty_mask_is_nothing_to_do() {
        let mut armed = false;
        assert_eq!(Batch::default().rearm(&mut Never, &mut armed), Ok(()));
        assert!(!armed);
    }

    struct Never;

    impl Rearm for Never {
        type Error = ();

        fn rearm(&mut self, _: AddressSpaceId, _: GfnRange) -> Result<(), ()> {
            Err(())
        }

        fn flush(&mut self) -> Result<(), ()> {
            Err(())
        }
    }
}
