//! Splitting large pages before anybody writes to them.
//!
//! A split changes no translation, so it owes no flush. Tables are topped up outside of the lock.

use super::Shared;
use super::cursor::{At, Next, Visit};
use super::install::fill_split;
use crate::cache::Cache;
use crate::format::Format;
use crate::host::Host;
use crate::level::Level;

/// See the [module documentation](self).
pub(crate) struct Split<'a, F: Format, H: Host> {
    pub(crate) shared: &'a Shared<F, H>,
    pub(crate) cache: &'a mut Cache,
    /// Larger pages are split.
    pub(crate) target: Level,
    /// How many were split.
    pub(crate) pages: u64,
    /// It stopped for want of tables.
    pub(crate) wants_tables: bool,
}

impl<F: Format, H: Host> Visit for Split<'_, F, H> {
    fn leaf(&mut self, at: &At<'_>) -> Next {
        if at.level <= self.target {
            return Next::Done;
        }
        if self.cache.len() == 0 {
            self.wants_tables = true;
            return Next::Stop;
        }
        let frame = self.cache.peek(0);
        // Every entry is written, so it does not matter what another attempt has left there.
        fill_split::<F>(self.cache.table(self.shared, frame), at.seen, at.level);
        if at.replace(F::table(frame)) {
            self.cache.take(1);
            self.pages += 1;
        } else {
            self.cache.clean(self.shared, frame);
        }
        Next::Again
    }
}
