//! The walk.

use memslot::{Gfn, GfnRange, Gpa};

use super::access::{ErrorCode, GuestAccess, NoPage, Rights};
use super::entry::{ACCESSED, DIRTY, Entry, EntrySize, GLOBAL, PRESENT};
use super::paging::{GuestPaging, Mode};
use super::tables::{Exchange, GuestTables};
use crate::level::{Level, PAGE_SHIFT};

/// How often a walk starts again because an entry has changed.
const TRIES: usize = 8;

/// What a walk went through on one level.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Step {
    /// The level, of the guest's tables. A large page of 32-bit tables has level 2, although it is 4 MiB.
    pub level: Level,
    /// The frame of the table.
    pub table: Gfn,
    /// Where the entry is.
    pub gpa: Gpa,
    /// The entry, with accessed and dirty bits as the walk has set them.
    pub entry: u64,
    /// What all entries down to this one together permit, it included.
    pub rights: Rights,
}

impl Step {
    /// Which entry of its table it is.
    #[inline]
    #[must_use]
    pub const fn index(&self, size: EntrySize) -> u64 {
        (self.gpa.get() & 0xfff) / size.bytes()
    }

    const NONE: Self =
        Self { level: Level::K4, table: Gfn::new(0), gpa: Gpa::new(0), entry: 0, rights: Rights::empty() };
}

/// What a walk has found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Walk {
    steps: [Step; 5],
    count: u8,
    size: EntrySize,
    /// Where the address leads, to the byte.
    pub gpa: Gpa,
    /// The page that it is in, as large as the guest has it: 1, 512, 1024 or 2^18 frames. Without paging, the 2^18 frames
    /// around it.
    pub page: GfnRange,
    /// What all entries together permit. Without paging everything; no page is a user's there, and none is kept from
    /// one.
    pub rights: Rights,
    /// Whether writes need not be noticed for the guest's dirty bit any more: it is set, or cannot be (its entry is in
    /// a read-only slot, and this access was a write), or there is none (no paging).
    pub dirty: bool,
    /// A global page, and global pages are on.
    pub global: bool,
}

impl Walk {
    /// What was walked through, from the root downwards: the tables in memory. The PDPTEs of PAE paging are not
    /// among them, as the processor has them in registers. Without paging there is nothing.
    #[inline]
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps[..usize::from(self.count)]
    }

    /// The level of the entry that maps the page; `None` without paging.
    #[inline]
    #[must_use]
    pub fn level(&self) -> Option<Level> {
        self.steps().last().map(|step| step.level)
    }

    /// Whether all entries are still what the walk has left them as. To be asked where nobody can have been told of a
    /// change that comes after the answer: by shadow paging when it has write-protected the tables.
    ///
    /// # Errors
    /// That of the tables.
    pub fn is_current<T: GuestTables + ?Sized>(&self, tables: &T) -> Result<bool, T::Error> {
        for step in self.steps() {
            if tables.read(step.gpa, self.size)? != Some(step.entry) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Why a walk came to nothing, not even to a page fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError<E> {
    /// The guest's memory could not be reached.
    #[error(transparent)]
    Tables(#[from] E),
    /// An entry changed under the walk, again and again. Let the guest run on; it comes back.
    #[error("the entry at {gpa} changed during each of {TRIES} walks for address {address:#x}")]
    Busy {
        /// The address that was walked for.
        address: u64,
        /// The last entry that changed.
        gpa: Gpa,
    },
}

/// Walks the guest's tables for `address` as its processor does for this access.
///
/// The inner result is the guest's: the page, with accessed and dirty bits set, or why there is none.
///
/// # Errors
/// See [`WalkError`]; the guest notices nothing of it, except that accessed bits may be set.
pub fn walk<T: GuestTables + ?Sized>(
    tables: &T,
    paging: &GuestPaging,
    address: u64,
    access: GuestAccess,
) -> Result<Result<Walk, NoPage>, WalkError<T::Error>> {
    let mut changed = Gpa::new(0);
    for _ in 0..TRIES {
        let mut walk = match look(tables, paging, address, access)? {
            Ok(walk) => walk,
            Err(why) => return Ok(Err(why)),
        };
        match mark(tables, &mut walk, access)? {
            None => return Ok(Ok(walk)),
            Some(gpa) => changed = gpa,
        }
    }
    Err(WalkError::Busy { address, gpa: changed })
}

/// Reads the entries and decides; writes nothing.
fn look<T: GuestTables + ?Sized>(
    tables: &T,
    paging: &GuestPaging,
    address: u64,
    access: GuestAccess,
) -> Result<Result<Walk, NoPage>, T::Error> {
    let fault = |why| paging.page_fault(address, access, why);
    let forbids = |why| Ok(Err(NoPage::Fault(fault(why))));
    let long = matches!(paging.mode(), Mode::Level4 | Mode::Level5);
    let va = if long { address } else { address & 0xffff_ffff };
    let size = paging.entry_size();
    let mut walk = Walk {
        steps: [Step::NONE; 5],
        count: 0,
        size,
        gpa: Gpa::new(va),
        page: GfnRange::default(),
        rights: Rights::all(),
        dirty: true,
        global: false,
    };
    let Some(mut level) = paging.root_level() else {
        walk.page = Level::G1.block(Gfn::new(va >> PAGE_SHIFT)).unwrap_or_default();
        return Ok(Ok(walk));
    };
    let mut table = Gfn::new(paging.root().get() >> PAGE_SHIFT);
    if paging.mode() == Mode::Pae {
        let pdpte = paging.pdptes()[usize::try_from(va >> 30).unwrap_or(0) & 3];
        if pdpte & PRESENT == 0 {
            return forbids(ErrorCode::empty());
        }
        table = Gfn::new((pdpte & super::entry::ADDRESS) >> PAGE_SHIFT);
    }
    loop {
        let shift = PAGE_SHIFT + size.index_bits() * (u32::from(level.get()) - 1);
        let index = va >> shift & (size.entries() - 1);
        let gpa = Gpa::new((table.get() << PAGE_SHIFT) + index * size.bytes());
        let Some(entry) = tables.read(gpa, size)? else {
            return Ok(Err(NoPage::NoTable { entry: gpa, fault: fault(ErrorCode::empty()) }));
        };
        walk.rights &= paging.rights_of(entry);
        let step = Step { level, table, gpa, entry, rights: walk.rights };
        walk.steps[usize::from(walk.count)] = step;
        walk.count += 1;
        match paging.entry(level, entry) {
            Entry::NotPresent => return forbids(ErrorCode::empty()),
            Entry::Reserved => return forbids(ErrorCode::PRESENT | ErrorCode::RESERVED),
            Entry::Table(next) => (table, level) = (next, level.down()),
            Entry::Page(page) => {
                if !paging.permits(walk.rights, access) {
                    return forbids(ErrorCode::PRESENT);
                }
                let offset = va & ((page.len() << PAGE_SHIFT) - 1);
                walk.gpa = Gpa::new((page.start().get() << PAGE_SHIFT) + offset);
                walk.page = page;
                walk.dirty = entry & DIRTY != 0;
                walk.global = paging.global_pages() && entry & GLOBAL != 0;
                return Ok(Ok(walk));
            }
        }
    }
}

/// Sets the accessed bits, and for a write the dirty bit; returns where an entry had changed.
fn mark<T: GuestTables + ?Sized>(
    tables: &T,
    walk: &mut Walk,
    access: GuestAccess,
) -> Result<Option<Gpa>, T::Error> {
    let count = usize::from(walk.count);
    let is_write = access.contains(GuestAccess::WRITE);
    for (left, step) in (0..count).rev().zip(&mut walk.steps[..count]) {
        let sets_dirty = left == 0 && is_write;
        let new = step.entry | ACCESSED | if sets_dirty { DIRTY } else { 0 };
        if new != step.entry {
            match tables.exchange(step.gpa, walk.size, step.entry, new)? {
                Exchange::Done => step.entry = new,
                Exchange::Changed => return Ok(Some(step.gpa)),
                Exchange::NotWritable => {}
            }
        }
        walk.dirty |= sets_dirty;
    }
    Ok(None)
}
