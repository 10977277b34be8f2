//! Entries that know their list, their records, and a naive model.

use std::cell::RefCell;
use std::collections::HashMap;
use std::num::NonZeroU64;

use memslot_mmu::rmap::{Cache, Filed, List, RmapEntry, RmapError, Under, Writer};

/// An entry as tests have it: a number, and the list that it is meant for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Entry {
    pub(crate) list: u32,
    pub(crate) number: u32,
}

impl RmapEntry for Entry {
    fn into_word(self) -> NonZeroU64 {
        NonZeroU64::new(u64::from(self.list) << 35 | u64::from(self.number) << 3 | 1 << 62).unwrap()
    }

    fn from_word(word: NonZeroU64) -> Self {
        let word = word.get() & !(1 << 62);
        assert_eq!(word & 7, 0);
        Self { list: (word >> 35) as u32, number: (word >> 3) as u32 }
    }
}

/// Records by entry, as a shadow page has them by the place of the entry.
#[derive(Default)]
pub(crate) struct Book(RefCell<HashMap<Entry, u64>>);

impl Book {
    pub(crate) fn keep(&self) -> impl FnMut(Entry, Filed) + '_ {
        |entry, filed| _ = self.0.borrow_mut().insert(entry, filed.into_bits())
    }

    /// The record, which stays in the book.
    pub(crate) fn look(&self, entry: Entry) -> Option<Filed> {
        self.0.borrow().get(&entry).and_then(|&bits| Filed::from_bits(bits))
    }

    pub(crate) fn take(&self, entry: Entry) -> Option<Filed> {
        self.0.borrow_mut().remove(&entry).and_then(Filed::from_bits)
    }

    pub(crate) fn add(
        &self,
        writer: &mut Writer<Entry>,
        list: List<'_, Entry>,
        entry: Entry,
        cache: &mut Cache,
    ) -> usize {
        writer.add(list, entry, cache, self.keep()).unwrap()
    }

    pub(crate) fn remove(&self, writer: &mut Writer<Entry>, entry: Entry) -> usize {
        writer.remove(self.take(entry).unwrap(), entry, self.keep()).unwrap()
    }

    /// A list is whole, and has exactly these entries.
    pub(crate) fn check(
        &self,
        writer: &Writer<Entry>,
        list: List<'_, Entry>,
        expected: &[Entry],
        under: Under,
    ) {
        writer.check(list, |entry| self.look(entry)).unwrap();
        let mut seen: Vec<Entry> = writer.entries(list).collect();
        // Step by step, and at once.
        let mut folded = Vec::new();
        writer.entries(list).for_each(|entry| folded.push(entry));
        assert_eq!(seen, folded);
        let mut expected = expected.to_vec();
        seen.sort_unstable();
        expected.sort_unstable();
        assert_eq!(seen, expected);
        assert_eq!(writer.count(list), expected.len());
        assert_eq!(list.is_empty(), expected.is_empty());
        for &entry in &expected {
            let filed = self.look(entry).unwrap();
            assert_eq!(writer.filed_under(&filed), Some(under));
            assert_eq!(writer.check_filed(&filed, entry), Ok(()));
        }
    }
}

pub(crate) fn not_filed(entry: Entry, under: Option<Under>) -> RmapError {
    RmapError::NotFiled { entry: entry.into_word().get(), under }
}
