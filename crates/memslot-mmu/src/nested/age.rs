//! Aging: which pages the guest has used lately.
//!
//! Clears accessed bits, one compare-exchange each, beside everything else and without the lock. A bit that is lost
//! to a race belongs to a page that is just being zapped or used. No flush is owed, as in KVM: until its translation
//! goes by itself a processor may use a page without setting the bit again, and the page looks a little older than it
//! is.

use memslot::GfnRange;

use super::cursor::{At, Cursor, Next, Visit};
use super::walker::Walker;
use crate::format::Format;
use crate::host::Host;
use crate::invalidate::ends;
use core::marker::PhantomData;

struct Age<F: Format> {
    clear: bool,
    young: u64,
    format: PhantomData<F>,
}

impl<F: Format> Visit for Age<F> {
    fn leaf(&mut self, at: &At<'_>) -> Next {
        if at.seen & F::ACCESSED == 0 {
            return Next::Done;
        }
        self.young += 1;
        if !self.clear {
            return Next::Stop;
        }
        at.replace(at.seen & !F::ACCESSED);
        Next::Done
    }
}

impl<F: Format, H: Host> Walker<F, H> {
    /// How many of the pages that map these frames were used since they were aged last. Large pages count once.
    ///
    /// Always 0 for a format without accessed bits.
    pub fn age(&mut self, gfns: GfnRange) -> u64 {
        self.look_for_young(gfns, true)
    }

    /// Whether any of these pages was used since they were aged last. Changes nothing.
    #[must_use]
    pub fn is_young(&mut self, gfns: GfnRange) -> bool {
        self.look_for_young(gfns, false) > 0
    }

    fn look_for_young(&mut self, gfns: GfnRange, clear: bool) -> u64 {
        let pin = self.mmu.shared.pin(&self.cell);
        let (start, end) = ends(gfns);
        let mut age = Age::<F> { clear, young: 0, format: PhantomData };
        Cursor::new(&pin, start, end, usize::MAX).run(start, &mut age);
        age.young
    }
}
