//! What a virtual processor has at hand, so that nothing fails under the lock.
//!
//! Topping up is the only step that may run out of memory; it happens without the lock and before anything is changed. Shadow pages that
//! were given up by others are used again first.

use alloc::boxed::Box;
use alloc::vec::Vec;

use memslot::{AddressSpaceId, Gfn};

use super::ShadowHost;
use super::guest::{GuestPaging, Processor, Registers, Rights};
use super::page::ShadowPage;
use super::role::{Key, Reading, Role};
use super::shared::Shared;
use super::slot_set::SlotSetCache;
use crate::level::Level;
use crate::nested::TableError;
use crate::rmap;

/// A fault makes a page for each level below the root at most.
pub(super) const PAGES: usize = 5;
/// A fault adds a parent for each of them, a leaf, and those beside it.
const DESCRIPTORS: usize = 16;

/// See the [module documentation](self).
pub(super) struct Reserve {
    pages: Vec<Box<ShadowPage>>,
    pub(super) descriptors: rmap::Cache,
    /// For the pages' sets of slots.
    pub(super) nodes: SlotSetCache,
}

impl Reserve {
    pub(super) fn new(descriptors: rmap::Cache) -> Self {
        Self { pages: Vec::new(), descriptors, nodes: SlotSetCache::default() }
    }

    /// A page. There are as many as were reserved.
    pub(super) fn take(&mut self) -> Option<Box<ShadowPage>> {
        self.pages.pop()
    }

    /// Makes sure that there is enough for one fault, or for loading a root.
    pub(super) fn top_up<H: ShadowHost>(&mut self, shared: &Shared<H>) -> Result<(), TableError> {
        self.descriptors.reserve(DESCRIPTORS).map_err(|_| TableError::OutOfMemory)?;
        // Of each leaf the slot, and its other id while it is getting one.
        self.nodes.top_up(2 * super::fault::GROUP)?;
        if self.pages.len() >= PAGES {
            return Ok(());
        }
        self.pages.try_reserve(PAGES).map_err(|_| TableError::OutOfMemory)?;
        while self.pages.len() < PAGES {
            let page = match shared.take_spare() {
                Some(page) => page,
                None => Self::allocate(shared)?,
            };
            self.pages.push(page);
        }
        Ok(())
    }

    #[cold]
    fn allocate<H: ShadowHost>(shared: &Shared<H>) -> Result<Box<ShadowPage>, TableError> {
        let paging = GuestPaging::new(Registers::default(), Processor::default());
        let role = Role {
            level: Level::K4,
            direct: true,
            rights: Rights::empty(),
            quadrant: 0,
            address_space: AddressSpaceId::NORMAL,
            reading: Reading::of(&paging),
        };
        let page = ShadowPage::allocate(&shared.host, &shared.rmap, Key { gfn: Gfn::new(0), role }, paging)?;
        shared.with(|locked| locked.state.tables += 1);
        Ok(page)
    }

    /// Gives the pages back.
    pub(super) fn drain<H: ShadowHost>(&mut self, shared: &Shared<H>) {
        for page in self.pages.drain(..) {
            shared.free_page(page);
        }
    }
}
