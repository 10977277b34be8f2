//! What guest memory was, and when: a processor may use what a table said at any time since it was told to forget.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use memslot_mmu::shadow::guest::{EntrySize, Processor, Registers};

use super::host::TestHost;
use crate::naive::{Found, Source, Want, naive_walk};

/// A value that changes, with the time of each change.
type Changes<T> = Vec<(u64, T)>;

#[derive(Default)]
pub struct History {
    /// Words of frames that are not 0 or were not always.
    words: BTreeMap<(u64, usize), Changes<u64>>,
    last: BTreeMap<u64, Vec<u64>>,
    /// The frames of the host behind those of the guest, by address space, as far as tables may lie there.
    backing: BTreeMap<(u8, u64), Changes<Option<u64>>>,
}

fn since<T: Copy + Ord>(changes: Option<&Changes<T>>, nothing: T, horizon: u64) -> BTreeSet<T> {
    let Some(changes) = changes else { return [nothing].into() };
    let at_horizon =
        changes.iter().rev().find(|(time, _)| *time <= horizon).map_or(nothing, |(_, value)| *value);
    let after = changes.iter().filter(|(time, _)| *time > horizon).map(|(_, value)| *value);
    after.chain([at_horizon]).collect()
}

impl History {
    /// Takes down what is different; returns the frames that were written.
    pub fn note_memory(&mut self, host: &TestHost, now: u64) -> BTreeSet<u64> {
        let mut written = BTreeSet::new();
        for (pfn, frame) in host.frames() {
            let last = self.last.entry(pfn).or_insert_with(|| vec![0; 512]);
            for (word, (last, cell)) in last.iter_mut().zip(&frame.0).enumerate() {
                let value = cell.load(std::sync::atomic::Ordering::SeqCst);
                // What is left behind in a frame that has moved is nobody's memory.
                if value != *last && value != super::host::POISON {
                    *last = value;
                    self.words.entry((pfn, word)).or_default().push((now, value));
                    written.insert(pfn);
                }
            }
        }
        written
    }

    pub fn note_backing(&mut self, space: u8, gfn: u64, pfn: Option<u64>, now: u64) {
        let changes = self.backing.entry((space, gfn)).or_default();
        if changes.last().and_then(|(_, last)| *last) != pfn {
            changes.push((now, pfn));
        }
    }

    /// What the entry may have been since `horizon`; `None` in it: there was no memory.
    fn values(&self, space: u8, gpa: u64, size: EntrySize, horizon: u64) -> BTreeSet<Option<u64>> {
        let mut values = BTreeSet::new();
        for pfn in since(self.backing.get(&(space, gpa >> 12)), None, horizon) {
            let Some(pfn) = pfn else {
                values.insert(None);
                continue;
            };
            let word = usize::try_from(gpa % 4096 / 8).unwrap();
            for value in since(self.words.get(&(pfn, word)), 0, horizon) {
                values.insert(Some(match size {
                    EntrySize::Eight => value,
                    EntrySize::Four => value >> (gpa % 8 * 8) & 0xffff_ffff,
                }));
            }
        }
        values
    }
}

/// Reads entries as one of the possible pasts: the choices are made in order of the reads.
struct Past<'a> {
    history: &'a History,
    space: u8,
    horizon: u64,
    /// Which one was chosen at each read so far, and of how many.
    choices: RefCell<(Vec<(usize, usize)>, usize)>,
}

impl Source for Past<'_> {
    fn entry(&self, gpa: u64, size: EntrySize) -> Option<u64> {
        let values = self.history.values(self.space, gpa, size, self.horizon);
        let mut choices = self.choices.borrow_mut();
        let (made, at) = &mut *choices;
        if made.len() == *at {
            made.push((0, values.len()));
        }
        *at += 1;
        values.into_iter().nth(made[*at - 1].0).unwrap()
    }
}

/// All pages that the guest's tables have mapped at this address since `horizon`, whatever they permit.
pub fn all_pasts(
    history: &History,
    (space, horizon): (u8, u64),
    registers: Registers,
    processor: Processor,
    pdptes: [u64; 4],
    address: u64,
) -> Vec<Found> {
    // Nothing is forbidden to a supervisor who reads, without SMAP.
    let anything = Want { write: false, user: false, fetch: false, ac: true };
    let past = Past { history, space, horizon, choices: RefCell::default() };
    let mut found = Vec::new();
    loop {
        past.choices.borrow_mut().1 = 0;
        if let Ok(page) = naive_walk(&past, registers, processor, pdptes, address, anything) {
            found.push(page);
        }
        // The next combination: the last choice that has another one left.
        let made = &mut past.choices.borrow_mut().0;
        while made.last().is_some_and(|(choice, of)| choice + 1 == *of) {
            made.pop();
        }
        match made.last_mut() {
            Some((choice, _)) => *choice += 1,
            None => return found,
        }
    }
}
