//! The peer: lists laid out and changed as KVM does it since Linux 6.15, written from its description.
//!
//! * The head is a word: 0, or an entry, or a descriptor with bit 0 set; bit 1 is a lock, which whoever changes the list and
//!   whoever walks it without the MMU's lock take by compare-exchange. An empty list is never locked.
//! * A descriptor is `more`, two counts and 14 entries, 128 bytes. Only the first may be partly full. Adding appends to the
//!   first, or puts a new one in front. Removing searches, and moves the last entry of the first descriptor into the hole. When
//!   one entry is left it stays in its descriptor.
//! * A slot has an array of heads for each level, all there from the start. Whoever adds knows the slot and computes the place; whoever
//!   removes has the gfn from the shadow page, and finds the slot that was used last, and then the place.
//! * Descriptors come from an array of 40, filled up from the allocator when a fault finds fewer than 14 there. (The kernel's
//!   allocator is replaced by a stack, which costs less.)
#![expect(unsafe_code, reason = "descriptors are behind pointers with tag bits")]

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

const MANY: u64 = 1;
const LOCKED: u64 = 2;
const ENTRIES: usize = 14;

#[repr(C, align(128))]
pub(super) struct Descriptor {
    more: AtomicPtr<Descriptor>,
    count: AtomicU32,
    tail_count: AtomicU32,
    entries: [AtomicU64; ENTRIES],
}

/// A processor's cache holds so many, and is filled up when it has fewer than the second.
pub(super) const FULL: usize = 40;
pub(super) const LOW: usize = 14;

/// A virtual processor's cache, and the allocator behind it. As long as it is there, every descriptor is.
pub(super) struct Cache {
    objects: Vec<*mut Descriptor>,
    allocator: Vec<*mut Descriptor>,
    memory: Vec<*mut Descriptor>,
}

// SAFETY: descriptors have atomics only, and are freed when the cache is dropped.
unsafe impl Send for Cache {}

impl Cache {
    pub(super) fn new(descriptors: usize) -> Self {
        let fresh = || Descriptor {
            more: AtomicPtr::new(ptr::null_mut()),
            count: AtomicU32::new(0),
            tail_count: AtomicU32::new(0),
            entries: [const { AtomicU64::new(0) }; ENTRIES],
        };
        let memory: Vec<_> = (0..descriptors).map(|_| Box::into_raw(Box::new(fresh()))).collect();
        Self { objects: Vec::with_capacity(FULL), allocator: memory.clone(), memory }
    }

    /// As a fault does before it takes the lock.
    #[inline(always)]
    pub(super) fn top_up(&mut self) {
        if self.objects.len() < LOW {
            self.fill();
        }
    }

    #[inline(never)]
    fn fill(&mut self) {
        while self.objects.len() < FULL {
            self.objects.push(self.allocator.pop().unwrap_or_else(|| panic!("enough descriptors")));
        }
    }

    #[inline(always)]
    fn allocate<'a>(&mut self) -> &'a Descriptor {
        let descriptor = self.objects.pop().unwrap_or_else(|| panic!("the cache was filled before"));
        // SAFETY: allocated, and freed with the cache, which outlives all lists.
        unsafe { &*descriptor }
    }

    fn free(&mut self, descriptor: &Descriptor) {
        self.allocator.push(ptr::from_ref(descriptor).cast_mut());
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        for &descriptor in &self.memory {
            // SAFETY: made from a box, freed once.
            drop(unsafe { Box::from_raw(descriptor) });
        }
    }
}

/// What of a slot is needed to find a list.
pub(super) struct Slot {
    base: u64,
    pages: u64,
    /// For each level, the heads.
    rmap: [Box<[Head]>; 3],
}

impl Slot {
    pub(super) fn new(base: u64, pages: u64) -> Self {
        let heads = |level: u32| {
            let len = (pages >> (9 * level)) + 2;
            (0..len).map(|_| Head::default()).collect()
        };
        Self { base, pages, rmap: [heads(0), heads(1), heads(2)] }
    }

    /// The list of a gfn. Level 0 is the lowest.
    #[inline(always)]
    pub(super) fn list(&self, level: usize, gfn: u64) -> &Head {
        let index = (gfn >> (9 * level)) - (self.base >> (9 * level));
        &self.rmap[level][usize::try_from(index).unwrap_or(0)]
    }
}

/// The slots, of which there is one here: that which was used last.
pub(super) struct Slots(pub(super) Slot);

impl Slots {
    #[inline(always)]
    pub(super) fn find(&self, gfn: u64) -> &Slot {
        let slot = &self.0;
        assert!(gfn >= slot.base && gfn < slot.base + slot.pages, "the slot used last");
        slot
    }
}

/// The head of a list.
#[derive(Default)]
pub(super) struct Head(AtomicU64);

fn descriptor<'a>(word: u64) -> &'a Descriptor {
    let address = usize::try_from(word & !(MANY | LOCKED)).unwrap_or(0);
    // SAFETY: a word with MANY was made from a descriptor, and these stay as long as the cache.
    unsafe { &*ptr::with_exposed_provenance(address) }
}

fn many(descriptor: &Descriptor) -> u64 {
    ptr::from_ref(descriptor).expose_provenance() as u64 | MANY
}

impl Head {
    /// Locks the list, unless it is empty; its word without the lock.
    #[inline]
    fn lock(&self) -> u64 {
        loop {
            let mut old = self.0.load(Ordering::Relaxed);
            if old == 0 {
                return 0;
            }
            while old & LOCKED != 0 {
                std::hint::spin_loop();
                old = self.0.load(Ordering::Relaxed);
            }
            if old == 0 {
                return 0;
            }
            if self.0.compare_exchange(old, old | LOCKED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return old;
            }
        }
    }

    #[inline]
    fn unlock(&self, word: u64) {
        self.0.store(word, Ordering::Release);
    }

    /// Adds an entry; how many there were before.
    #[inline]
    pub(super) fn add(&self, entry: u64, cache: &mut Cache) -> usize {
        let old = self.lock();
        let (word, count) = if old == 0 {
            (entry, 0)
        } else if old & MANY == 0 {
            let first = cache.allocate();
            first.entries[0].store(old, Ordering::Relaxed);
            first.entries[1].store(entry, Ordering::Relaxed);
            first.more.store(ptr::null_mut(), Ordering::Relaxed);
            first.count.store(2, Ordering::Relaxed);
            first.tail_count.store(0, Ordering::Relaxed);
            (many(first), 1)
        } else {
            let mut first = descriptor(old);
            let count = first.count.load(Ordering::Relaxed) + first.tail_count.load(Ordering::Relaxed);
            let mut word = old;
            if first.count.load(Ordering::Relaxed) as usize == ENTRIES {
                let more = ptr::from_ref(first).cast_mut();
                first = cache.allocate();
                first.more.store(more, Ordering::Relaxed);
                first.count.store(0, Ordering::Relaxed);
                first.tail_count.store(count, Ordering::Relaxed);
                word = many(first);
            }
            let place = first.count.load(Ordering::Relaxed);
            first.entries[place as usize].store(entry, Ordering::Relaxed);
            first.count.store(place + 1, Ordering::Relaxed);
            (word, count as usize)
        };
        self.unlock(word);
        count
    }

    /// Removes an entry; a bug if it is not there.
    #[inline]
    pub(super) fn remove(&self, entry: u64, cache: &mut Cache) {
        let old = self.lock();
        if old & MANY == 0 {
            assert!(old == entry && old != 0, "not there");
            return self.unlock(0);
        }
        let first = descriptor(old);
        let mut at = Some(first);
        while let Some(here) = at {
            for place in 0..here.count.load(Ordering::Relaxed) as usize {
                if here.entries[place].load(Ordering::Relaxed) == entry {
                    return self.unlock(remove_from(old, first, here, place, cache));
                }
            }
            at = more(here);
        }
        panic!("not there");
    }

    /// How many entries there are.
    #[inline]
    pub(super) fn count(&self) -> usize {
        let word = self.0.load(Ordering::Relaxed) & !LOCKED;
        if word == 0 {
            0
        } else if word & MANY == 0 {
            1
        } else {
            let first = descriptor(word);
            (first.count.load(Ordering::Relaxed) + first.tail_count.load(Ordering::Relaxed)) as usize
        }
    }

    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    /// Walks the list as the holder of the MMU's lock does.
    #[inline]
    pub(super) fn walk(&self, f: impl FnMut(u64)) {
        walk(self.0.load(Ordering::Relaxed), f);
    }

    /// Walks the list as aging does, which has the list's own lock only.
    #[inline]
    pub(super) fn walk_locked(&self, f: impl FnMut(u64)) {
        let word = self.lock();
        walk(word, f);
        if word != 0 {
            self.unlock(word);
        }
    }
}

fn more<'a>(descriptor: &Descriptor) -> Option<&'a Descriptor> {
    // SAFETY: null or a descriptor, which stays as long as the cache.
    unsafe { descriptor.more.load(Ordering::Relaxed).as_ref() }
}

/// The head's new word.
fn remove_from(word: u64, first: &Descriptor, at: &Descriptor, place: usize, cache: &mut Cache) -> u64 {
    let last = first.count.load(Ordering::Relaxed) as usize - 1;
    at.entries[place].store(first.entries[last].load(Ordering::Relaxed), Ordering::Relaxed);
    first.entries[last].store(0, Ordering::Relaxed);
    first.count.store(u32::try_from(last).unwrap_or(0), Ordering::Relaxed);
    if last > 0 {
        return word;
    }
    let word = more(first).map_or(0, many);
    cache.free(first);
    word
}

#[inline]
fn walk(word: u64, mut f: impl FnMut(u64)) {
    if word == 0 {
        return;
    }
    if word & MANY == 0 {
        return f(word);
    }
    // An unused place ends a descriptor; only the first has any.
    let mut at = Some(descriptor(word));
    while let Some(here) = at {
        for place in &here.entries {
            match place.load(Ordering::Relaxed) {
                0 => break,
                entry => f(entry),
            }
        }
        at = more(here);
    }
}

impl Head {
    /// Zaps all that is in the list, as is done when it has become too long; how many there were.
    pub(super) fn zap_all(&self, cache: &mut Cache, mut zap: impl FnMut(u64)) -> usize {
        let old = self.lock();
        let mut count = 0;
        walk(old, |entry| {
            zap(entry);
            count += 1;
        });
        if old & MANY != 0 {
            let mut at = Some(descriptor(old));
            while let Some(here) = at {
                at = more(here);
                // An unused place is empty.
                here.entries.iter().for_each(|entry| entry.store(0, Ordering::Relaxed));
                cache.free(here);
            }
        }
        self.unlock(0);
        count
    }
}
