//! Guest memory for walks: some frames, some of them in read-only slots, and somebody who writes at the worst moment.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use memslot::Gpa;
use memslot_mmu::shadow::guest::{EntrySize, Exchange, GuestTables};

/// Guest memory by its words of four bytes; what was never written is 0.
#[derive(Clone, Default)]
pub struct Memory {
    words: RefCell<BTreeMap<u64, u32>>,
    /// Frames in no slot.
    pub holes: BTreeSet<u64>,
    pub read_only: BTreeSet<u64>,
    /// Somebody else changes these bits of an entry just before it is exchanged, so often.
    pub races: RefCell<BTreeMap<u64, (u64, usize)>>,
    pub exchanges: Cell<usize>,
}

impl Memory {
    pub fn with(entries: &[(u64, u64)], size: EntrySize) -> Self {
        let memory = Self::default();
        entries.iter().for_each(|&(gpa, value)| memory.set(gpa, size, value));
        memory
    }

    pub fn get(&self, gpa: u64, size: EntrySize) -> u64 {
        assert_eq!(gpa % size.bytes(), 0, "{gpa:#x} is not aligned");
        let words = self.words.borrow();
        let word = |at| u64::from(words.get(&at).copied().unwrap_or(0));
        word(gpa) | if size == EntrySize::Eight { word(gpa + 4) << 32 } else { 0 }
    }

    pub fn set(&self, gpa: u64, size: EntrySize, value: u64) {
        let mut words = self.words.borrow_mut();
        words.insert(gpa, u32::try_from(value & 0xffff_ffff).unwrap());
        let above = u32::try_from(value >> 32).unwrap();
        if size == EntrySize::Eight {
            words.insert(gpa + 4, above);
        } else {
            assert_eq!(above, 0, "{value:#x} has more than four bytes");
        }
    }

    /// All that is not 0.
    pub fn contents(&self) -> BTreeMap<u64, u32> {
        self.words.borrow().iter().filter(|(_, word)| **word != 0).map(|(a, b)| (*a, *b)).collect()
    }
}

impl crate::naive::Source for Memory {
    fn entry(&self, gpa: u64, size: EntrySize) -> Option<u64> {
        (!self.holes.contains(&(gpa >> 12))).then(|| self.get(gpa, size))
    }
}

impl GuestTables for Memory {
    type Error = Infallible;

    fn read(&self, gpa: Gpa, size: EntrySize) -> Result<Option<u64>, Infallible> {
        let gpa = gpa.get();
        Ok((!self.holes.contains(&(gpa >> 12))).then(|| self.get(gpa, size)))
    }

    fn exchange(&self, gpa: Gpa, size: EntrySize, old: u64, new: u64) -> Result<Exchange, Infallible> {
        let gpa = gpa.get();
        assert_ne!(old, new, "an exchange for nothing marks a page dirty");
        if self.read_only.contains(&(gpa >> 12)) || self.holes.contains(&(gpa >> 12)) {
            return Ok(Exchange::NotWritable);
        }
        self.exchanges.set(self.exchanges.get() + 1);
        if let Some((bits, left)) = self.races.borrow_mut().get_mut(&gpa) {
            if *left > 0 {
                *left -= 1;
                self.set(gpa, size, self.get(gpa, size) ^ *bits);
            }
        }
        if self.get(gpa, size) != old {
            return Ok(Exchange::Changed);
        }
        self.set(gpa, size, new);
        Ok(Exchange::Done)
    }
}
