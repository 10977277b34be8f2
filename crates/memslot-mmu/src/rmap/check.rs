//! What must hold between any two changes, written down a second time.

use super::RmapEntry;
use super::descriptor::{CELLS, Head};
use super::heads::List;
use super::writer::Writer;
use crate::sync::Ordering;

impl<E: RmapEntry> Writer<E> {
    /// Looks whether a list is whole, and says what is not: for tests and debugging, in time proportional to its length.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn check(&self, list: List<'_, E>) -> Result<(), &'static str> {
        let Head::Many { first, count } = Head::new(list.head.load(Ordering::Relaxed)) else { return Ok(()) };
        let require = |holds: bool, rule: &'static str| if holds { Ok(()) } else { Err(rule) };
        let shared = &*self.shared;
        require(first != 0 && count >= 2, "a list of fewer than two entries has no descriptors")?;
        let (mut index, mut before, mut entries, mut with_holes) = (first, 0, 0, 0);
        let mut last = first;
        while index != 0 {
            let at = shared.at(index).ok_or("a descriptor has a number that was given out")?;
            let links = shared.links(index).map_err(|_| "a descriptor has links")?;
            let mask = at.descriptor.mask.load(Ordering::Relaxed);
            require(mask >> CELLS == 0, "a mask has no bits behind the cells")?;
            require(
                at.descriptor.owner.load(Ordering::Relaxed) == list.number,
                "a descriptor knows its list",
            )?;
            let words = (0..CELLS).filter_map(|cell| at.descriptor.entry(cell));
            require(
                words.clone().all(|word| word != 0 && word & 7 == 0),
                "a cell with its bit has an entry",
            )?;
            require(index == first || mask != 0, "no descriptor but the first is empty")?;
            if index != first {
                require(links.before.load(Ordering::Relaxed) == before, "before is the descriptor before")?;
                with_holes += usize::from(mask.count_ones() as usize != CELLS);
            }
            entries += words.count();
            (before, last) = (index, index);
            index = at.descriptor.next.load(Ordering::Relaxed);
        }
        require(entries == count as usize, "the head counts the entries")?;
        let links = shared.links(first).map_err(|_| "a descriptor has links")?;
        require(links.before.load(Ordering::Relaxed) == last, "before the first is the last")?;
        let (mut index, mut before) = (first, 0);
        loop {
            let at = shared.at(index).ok_or("a descriptor with holes exists")?;
            if index != first {
                let links = shared.links(index).map_err(|_| "a descriptor has links")?;
                require(
                    at.descriptor.owner.load(Ordering::Relaxed) == list.number,
                    "holes are the list's own",
                )?;
                require(links.holes_before.load(Ordering::Relaxed) == before, "holes are linked both ways")?;
                require((0..CELLS).any(|cell| at.descriptor.entry(cell).is_none()), "holes are holes")?;
                with_holes =
                    with_holes.checked_sub(1).ok_or("a descriptor is once among those with holes")?;
            }
            before = index;
            index = at.descriptor.holes.load(Ordering::Relaxed);
            if index == 0 {
                return require(with_holes == 0, "all descriptors with holes are linked");
            }
        }
    }
}
