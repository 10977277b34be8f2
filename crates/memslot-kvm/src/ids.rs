//! Which slot ids are free.

use std::ops::Range;

/// Gives out slot ids: the lowest free one, or as many in a row as are asked for.
///
/// The kernel refuses ids from `KVM_CAP_NR_MEMSLOTS` on, and an id that is never given back is lost for the life of
/// the VM; both are easily forgotten with a counter.
///
/// ```
/// use memslot_kvm::SlotIds;
/// let mut ids = SlotIds::new(0..4);
/// assert_eq!((ids.allocate(), ids.allocate()), (Some(0), Some(1)));
/// assert_eq!(ids.allocate_range(2), Some(2..4));
/// assert_eq!(ids.allocate(), None);
/// assert!(ids.free(1));
/// assert_eq!(ids.allocate(), Some(1));
/// ```
#[derive(Clone, Debug)]
pub struct SlotIds {
    range: Range<u32>,
    /// A bit for each id from `range.start` on: taken.
    taken: Vec<u64>,
    /// No id in a word before this one is free.
    first_free_word: usize,
    free: u32,
}

impl SlotIds {
    /// All ids of `range` are free. Memory is allocated for ids that are used, not for the range.
    #[must_use]
    pub fn new(range: Range<u32>) -> Self {
        let free = range.end.saturating_sub(range.start);
        Self { range, taken: Vec::new(), first_free_word: 0, free }
    }

    /// The ids it gives out.
    #[must_use]
    pub fn range(&self) -> Range<u32> {
        self.range.clone()
    }

    /// How many ids are free.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.free
    }

    /// The lowest free id, which is then taken.
    pub fn allocate(&mut self) -> Option<u32> {
        let word = (self.first_free_word..self.taken.len())
            .find(|&word| self.taken[word] != u64::MAX)
            .unwrap_or(self.taken.len());
        self.first_free_word = word;
        let bit = self.taken.get(word).map_or(0, |taken| taken.trailing_ones());
        let id =
            self.range.start.checked_add(u32::try_from(word).ok()?.checked_mul(64)?)?.checked_add(bit)?;
        self.take(id).then_some(id)
    }

    /// The lowest `count` free ids in a row, which are then taken. `None` where there are not so many in a row, and
    /// for 0.
    pub fn allocate_range(&mut self, count: u32) -> Option<Range<u32>> {
        let mut run = 0;
        let mut id =
            self.range.start.checked_add(u32::try_from(self.first_free_word).ok()?.checked_mul(64)?)?;
        while count > 0 && id < self.range.end {
            run = if self.is_taken(id) { 0 } else { run + 1 };
            id += 1;
            if run == count {
                (id - count..id).for_each(|id| {
                    self.take(id);
                });
                return Some(id - count..id);
            }
        }
        None
    }

    /// Takes this id. Returns whether it was free, and one of the range.
    pub fn take(&mut self, id: u32) -> bool {
        if !self.range.contains(&id) || self.is_taken(id) {
            return false;
        }
        let (word, bit) = self.place(id);
        if word >= self.taken.len() {
            self.taken.resize(word + 1, 0);
        }
        self.taken[word] |= bit;
        self.free -= 1;
        true
    }

    /// Gives an id back. Returns whether it was taken.
    pub fn free(&mut self, id: u32) -> bool {
        let was_taken = self.is_taken(id);
        if was_taken {
            let (word, bit) = self.place(id);
            self.taken[word] &= !bit;
            self.free += 1;
            self.first_free_word = self.first_free_word.min(word);
        }
        was_taken
    }

    /// Whether an id of the range is taken.
    #[must_use]
    pub fn is_taken(&self, id: u32) -> bool {
        let (word, bit) = self.place(id);
        self.range.contains(&id) && self.taken.get(word).is_some_and(|taken| taken & bit != 0)
    }

    fn place(&self, id: u32) -> (usize, u64) {
        let at = id.wrapping_sub(self.range.start);
        ((at / 64) as usize, 1 << (at % 64))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_of_a_range_that_starts_anywhere() {
        let mut ids = SlotIds::new(u32::MAX - 3..u32::MAX);
        assert_eq!(ids.allocate_range(3), Some(u32::MAX - 3..u32::MAX));
        assert_eq!((ids.allocate(), ids.available()), (None, 0));
        assert!(!ids.take(5) && !ids.free(5) && ids.free(u32::MAX - 2));
        assert_eq!(ids.allocate_range(2), None);
        assert_eq!(ids.allocate_range(0), None);
        assert_eq!(ids.allocate(), Some(u32::MAX - 2));
        assert_eq!(SlotIds::new(7..7).allocate(), None);
    }

    proptest! {
        #![proptest_config(memslot_testing::proptest_config(256))]

        #[test]
        fn as_a_set_of_free_ids(start in 0u32..100, len in 0u32..300, ops in prop::collection::vec((0u8..4, 0u32..400), 1..200)) {
            let mut ids = SlotIds::new(start..start + len);
            let mut free: BTreeSet<u32> = (start..start + len).collect();
            for (op, argument) in ops {
                match op {
                    0 => prop_assert_eq!(ids.allocate(), free.pop_first()),
                    1 => prop_assert_eq!(ids.take(argument), free.remove(&argument)),
                    2 => {
                        let taken = (start..start + len).contains(&argument) && !free.contains(&argument);
                        prop_assert_eq!(ids.free(argument), taken);
                        if taken {
                            free.insert(argument);
                        }
                    }
                    _ => {
                        let count = argument % 70 + 1;
                        let wanted = free.iter().copied().find(|&id| (id..id + count).all(|id| free.contains(&id)));
                        let found = ids.allocate_range(count);
                        prop_assert_eq!(found.clone().map(|range| range.start), wanted);
                        free.retain(|id| !found.as_ref().is_some_and(|found| found.contains(id)));
                    }
                }
                prop_assert_eq!(ids.available() as usize, free.len());
            }
        }
    }
}
