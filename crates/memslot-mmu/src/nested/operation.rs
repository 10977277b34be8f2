//! Range operations: in steps, or at once.

use memslot::{Gfn, GfnRange, View};

use super::collapse::Collapse;
use super::cursor::Cursor;
use super::protect::{Protect, ProtectByCopy, Take};
use super::shared::{State, hull};
use super::split::Split;
use super::zap::{Cut, Zap};
use super::{Mmu, Pin, Shared, TableError};
use crate::cache::Cache;
use crate::flush::Flush;
use crate::format::Format;
use crate::host::Host;
use crate::invalidate::{ends, range};
use crate::level::Level;

/// What is done with a range of frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Work {
    /// Nothing is mapped there any more. A large page that is there in part goes as a whole.
    Zap,
    /// Pages are not writable until the next write faults. So are all frames of a large page that is there in part.
    WriteProtect,
    /// Dirty bits of pages are cleared, where the format has some.
    ClearDirty,
    /// Small pages become large ones, where their slots are not logged.
    Collapse,
}

/// What is done with each entry, also on behalf of the slot table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Task {
    Zap,
    /// Zap, of frames that a logged slot has lost, where the entries' dirty bits are the only ones to say what was written.
    ZapLeft,
    /// The range is the first frame behind a border that no page may cross.
    Cut,
    Collapse,
    Protect(Take),
}

impl From<Work> for Task {
    fn from(work: Work) -> Self {
        match work {
            Work::Zap => Self::Zap,
            Work::WriteProtect => Self::Protect(Take::Writing),
            Work::ClearDirty => Self::Protect(Take::Dirty),
            Work::Collapse => Self::Collapse,
        }
    }
}

/// An operation under way: it goes over its frames in steps of so many entries, and owes one flush for all of them.
///
/// Between two steps nothing is locked, and whatever happens meanwhile, the result is that of one step.
///
/// ```
/// # use memslot::*;
/// # use memslot_mmu::{format::Npt, *};
/// # let mut table = SlotTable::new(Limits::default())?;
/// # let mmu = Mmu::<Npt, _>::attach(&mut table, user::UserHost::default(), Config::default())?;
/// # let range = GfnRange::with_len(Gfn::new(0), 1 << 20).unwrap();
/// let mut zap = mmu.begin(Work::Zap, range);
/// while zap.step(1000) {
///     // Let others have their turn.
/// }
/// zap.finish().discharge();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "an operation does nothing until it is run, and then owes a flush"]
pub struct Operation<'m, F: Format, H: Host> {
    mmu: &'m Mmu<F, H>,
    task: Task,
    start: u64,
    end: u64,
    at: u64,
    nonce: u64,
    flush: Flush<'m, F, H>,
    /// For copies of tables.
    spare: Drained<'m, F, H>,
    /// How many more copies may be made.
    copies: usize,
}

/// How many tables an operation copies at most (4 MiB, for 2 GiB of guest memory): the old ones exist until its flush.
const COPIES: usize = 1024;

/// How many entries an operation looks at while it holds the lock, if nobody says otherwise.
pub(crate) const STEP: usize = 1 << 14;

impl<F: Format, H: Host> Mmu<F, H> {
    /// Begins an operation; nothing is done yet.
    pub fn begin(&self, work: Work, gfns: GfnRange) -> Operation<'_, F, H> {
        self.start(work.into(), gfns)
    }

    pub(crate) fn start(&self, task: Task, gfns: GfnRange) -> Operation<'_, F, H> {
        let (start, end) = ends(gfns);
        let end = end.min(Shared::<F, H>::END);
        let start = start.min(end);
        Operation {
            mmu: self,
            task,
            start,
            end,
            at: start,
            nonce: self.shared.nonce(),
            flush: self.nothing_owed(),
            spare: Drained { mmu: self, cache: Cache::new() },
            copies: if self.shared.uses_dirty_bits() { 0 } else { COPIES },
        }
    }

    /// Unmaps frames.
    pub fn zap(&self, gfns: GfnRange) -> Flush<'_, F, H> {
        self.begin(Work::Zap, gfns).run()
    }

    /// Write-protects what is mapped at these frames.
    pub fn write_protect(&self, gfns: GfnRange) -> Flush<'_, F, H> {
        self.begin(Work::WriteProtect, gfns).run()
    }

    /// Clears dirty bits.
    pub fn clear_dirty(&self, gfns: GfnRange) -> Flush<'_, F, H> {
        self.begin(Work::ClearDirty, gfns).run()
    }

    /// Makes large pages of small ones, where slots and backing allow.
    pub fn collapse(&self, gfns: GfnRange) -> Flush<'_, F, H> {
        self.begin(Work::Collapse, gfns).run()
    }

    /// Splits pages that are larger than `target` and map any of these frames. Returns how many. No flush is owed: no
    /// translation changes.
    ///
    /// # Errors
    /// [`TableError`]; what was split until then stays so.
    pub fn split(&self, gfns: GfnRange, target: Level) -> Result<u64, TableError> {
        let (start, end) = ends(gfns);
        let end = end.min(Shared::<F, H>::END);
        let mut cache = Drained { mmu: self, cache: Cache::new() };
        let (mut at, mut pages) = (start, 0);
        while at < end {
            let mut split = Split {
                shared: &self.shared,
                cache: &mut cache.cache,
                target,
                pages: 0,
                wants_tables: false,
            };
            {
                let mut locked = self.shared.lock();
                let (pin, _) = locked.pin();
                at = Cursor::new(&pin, start, end, STEP).run(at, &mut split);
            }
            pages += split.pages;
            if split.wants_tables {
                cache.cache.top_up(&self.shared, 1)?;
            }
        }
        Ok(pages)
    }
}

/// A cache that gives its tables back.
struct Drained<'m, F: Format, H: Host> {
    mmu: &'m Mmu<F, H>,
    cache: Cache,
}

impl<F: Format, H: Host> Drop for Drained<'_, F, H> {
    fn drop(&mut self) {
        self.cache.drain(&self.mmu.shared);
    }
}

impl<'m, F: Format, H: Host> Operation<'m, F, H> {
    /// Looks at up to `entries` entries, at least one. Returns whether there is more to do.
    pub fn step(&mut self, entries: usize) -> bool {
        if self.at >= self.end {
            return false;
        }
        if self.task == Task::Protect(Take::Writing) && self.copies > 0 && self.spare.cache.len() == 0 {
            // Without tables it works, too.
            let tables = self.copies_ahead();
            let _ = self.spare.cache.fill(&self.mmu.shared, 0, tables);
            self.copies = if self.spare.cache.len() == 0 {
                0
            } else {
                self.copies.saturating_sub(self.spare.cache.len())
            };
        }
        let mut locked = self.mmu.shared.lock();
        let (pin, state) = locked.pin();
        let changed = self.visit(&pin, state, entries.max(1));
        let owed = &mut self.flush.owed;
        if let Some(gfns) = changed {
            state.owe(gfns, owed.count == 0);
            owed.count = 1;
            owed.gfns = Some(hull(owed.gfns, gfns));
        }
        let is_done = self.at >= self.end;
        if is_done {
            self.pay_for_others(state);
        }
        !is_done
    }

    /// Owes a flush of all that it has passed, if somebody else has changed entries there, and processors use them still.
    fn pay_for_others(&mut self, state: &mut State) {
        let gfns = range(self.start, self.at.min(self.end));
        let owed = &mut self.flush.owed;
        if state.is_owed_beside(owed.count, gfns) && owed.gfns.is_none_or(|owed| !owed.contains_range(&gfns))
        {
            state.owe(gfns, owed.count == 0);
            owed.count = 1;
            owed.gfns = Some(hull(owed.gfns, gfns));
        }
    }

    /// How many tables there are to copy, if what comes next is like all of the rest.
    fn copies_ahead(&self) -> usize {
        let mut locked = self.mmu.shared.lock();
        let (pin, _) = locked.pin();
        let next = pin.place_down_to(self.at, Level::M2);
        let level = if F::is_table(next.seen, next.level) { next.level } else { next.level.up() };
        usize::try_from((self.end - self.at).div_ceil(level.pages())).unwrap_or(usize::MAX)
    }

    /// Does all that is left.
    pub fn run(mut self) -> Flush<'m, F, H> {
        while self.step(STEP) {}
        self.flush
    }

    /// What the steps until now owe.
    pub fn finish(mut self) -> Flush<'m, F, H> {
        if self.start < self.at && self.at < self.end {
            let shared = &self.mmu.shared;
            self.pay_for_others(&mut shared.lock());
        }
        self.flush
    }

    /// The frames that are left.
    #[must_use]
    pub fn rest(&self) -> GfnRange {
        GfnRange::new(Gfn::new(self.at), Gfn::new(self.end)).unwrap_or_default()
    }

    fn visit(&mut self, pin: &Pin<'_, F, H>, state: &mut State, budget: usize) -> Option<GfnRange> {
        let shared = pin.shared;
        let graves = &mut state.graves;
        let tables = &mut self.flush.owed.tables;
        let (nonce, start, end) = (self.nonce, self.start, self.end);
        let view: &View = &pin.published().view;
        let mut cursor = Cursor::new(pin, start, end, budget);
        let take = match self.task {
            Task::Zap | Task::ZapLeft => {
                let left = (self.task == Task::ZapLeft).then(|| range(start, end));
                let mut zap = Zap { shared, view, graves, tables, nonce, left, changed: None };
                self.at = cursor.run(self.at, &mut zap);
                return zap.changed;
            }
            Task::Cut => {
                let zap = Zap { shared, view, graves, tables, nonce, left: None, changed: None };
                let mut cut = Cut { zap, border: start };
                self.at = cursor.run(self.at, &mut cut);
                return cut.zap.changed;
            }
            Task::Collapse => {
                let mut collapse = Collapse { shared, graves, tables, view, nonce, changed: None };
                self.at = cursor.run(self.at, &mut collapse);
                return collapse.changed;
            }
            Task::Protect(take) => take,
        };
        let cache = &mut self.spare.cache;
        if take == Take::Writing && cache.len() > 0 {
            let entries = Protect::new(take, nonce);
            let mut protect = ProtectByCopy::<F, H> { entries, shared, graves, tables, cache };
            self.at = cursor.run(self.at, &mut protect);
            protect.entries.changed
        } else if take == Take::WritingForGood {
            let mut protect = Protect::<F, true>::new(take, nonce);
            self.at = cursor.run(self.at, &mut protect);
            protect.changed
        } else {
            let mut protect = Protect::<F, false>::new(take, nonce);
            self.at = cursor.run(self.at, &mut protect);
            protect.changed
        }
    }
}
