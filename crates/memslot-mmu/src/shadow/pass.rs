//! Passes over all shadow pages in bounded steps, between which others get the lock.
//!
//! A pass goes from the oldest page to the newest. Where it is, is known to whoever gives up pages: so it goes on where it was, looks at
//! every page that is there all the while once, and at those that are made meanwhile. There is one at a time: the [follower](super::follow)'s,
//! which follows one change of the slots after the other.

use super::ShadowHost;
use super::page::ShadowPage;
use super::shared::{Locked, Shared};
use crate::sync::Ordering;

/// So many pages are looked at before others get the lock.
const STEP: usize = if cfg!(loom) { 2 } else { 256 };

/// Whether a page was dealt with.
pub(super) enum Visit {
    /// And the next is to follow.
    Done,
    /// And that was much work.
    DoneForNow,
    /// Not all of it: the page is visited again, after others had the lock.
    Again,
}

impl<'g, H: ShadowHost> Locked<'g, H> {
    fn next_in_pass(&mut self) -> Option<&'g ShadowPage> {
        // SAFETY: null or a page that can be found, and so is not freed for 'g.
        let page: &'g ShadowPage = unsafe { self.state.pass.as_ref() }?;
        self.state.pass = page.links.newer.load(Ordering::Relaxed);
        Some(page)
    }

    /// The page is about to be found no more.
    pub(super) fn leave_pass(&mut self, page: &'g ShadowPage) {
        if core::ptr::eq(self.state.pass, page) {
            self.state.pass = page.links.newer.load(Ordering::Relaxed);
        }
    }
}

impl<H: ShadowHost> Shared<H> {
    /// Visits all pages. `between` runs without the lock before each step, and ends the pass with an error.
    pub(super) fn visit_all<C, E>(
        &self,
        context: &mut C,
        mut between: impl FnMut(&mut C) -> Result<(), E>,
        mut visit: impl for<'g> FnMut(&mut C, &mut Locked<'g, H>, &'g ShadowPage) -> Visit,
    ) -> Result<(), E> {
        self.with(|locked| locked.state.pass = locked.shared.directory.oldest());
        loop {
            between(context)?;
            let step = self.config.hold.clamp(1, STEP);
            let is_done = self.with_in_turn(|locked| {
                for _ in 0..step {
                    let Some(page) = locked.next_in_pass() else { return true };
                    locked.worked(1);
                    match visit(context, locked, page) {
                        Visit::Done => {}
                        Visit::DoneForNow => return false,
                        Visit::Again => {
                            locked.state.pass = core::ptr::from_ref(page).cast_mut();
                            return false;
                        }
                    }
                }
                false
            });
            if is_done {
                return Ok(());
            }
        }
    }
}
