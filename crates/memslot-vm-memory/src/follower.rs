//! The listener that gives each version its regions.

use std::sync::Arc;

use memslot::{AttachmentKey, Listener, ListenerError, Slot, Update, View};

use crate::host::Describe;
use crate::log::MarksFollower;
use crate::map::Map;
use crate::region::Region;
use crate::space::{NativeError, Tracking};
use crate::stock::Common;

/// Makes the regions of slots that change, and attaches the map of all to the version that has them.
pub(crate) struct Follower<B: Tracking> {
    common: Arc<Common>,
    describe: Describe,
    key: Option<AttachmentKey<Map<B>>>,
    marks: Option<MarksFollower>,
}

impl<B: Tracking> Follower<B> {
    /// # Safety
    /// The bitmaps of the regions that it makes are used only while somebody keeps `common`.
    pub(crate) unsafe fn new(common: Arc<Common>, describe: Describe, view: &View) -> Self {
        let marks = common.marks.as_ref().map(|marks| MarksFollower::new(marks.clone(), view));
        Self { common, describe, key: None, marks }
    }

    pub(crate) fn set_key(&mut self, key: AttachmentKey<Map<B>>) {
        self.key = Some(key);
    }

    /// The regions of a version.
    pub(crate) fn map_of(&mut self, view: &View) -> Result<Map<B>, NativeError> {
        let mut map = Map::empty(self.common.number, self.common.space);
        for slot in view.slots(self.common.space) {
            let region = self.region(slot, view.generation());
            let region = region.map_err(|error| NativeError::Describe { slot: *slot, error })?;
            map.set(slot.id(), region);
        }
        Ok(map.seal())
    }

    fn region(&mut self, slot: &Slot, generation: u64) -> Result<Option<Region<B>>, ListenerError> {
        if slot.hva().is_none() {
            return Ok(None);
        }
        let memory = (self.describe)(slot)?;
        // SAFETY: the promise of `new`, and a space with a tracking that needs marks has some.
        let bitmap = unsafe { B::make(slot, generation, self.common.marks.as_ref()) };
        Ok(Region::new(slot, memory, bitmap))
    }
}

impl<B: Tracking> Listener for Follower<B> {
    fn name(&self) -> &str {
        "vm-memory"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let Some(key) = self.key else { return Ok(()) };
        let space = self.common.space;
        let is_here = |slot: &Slot| slot.address_space() == space;
        let mut next: Option<Map<B>> = None;
        for change in update.slots {
            let Some(slot) = change.new.or(change.old).filter(is_here) else { continue };
            let region = match change.new {
                Some(new) => self.region(&new, update.after.generation())?,
                None => None,
            };
            let map = match &mut next {
                Some(map) => map,
                None => {
                    next.insert(update.before.attachment(key).ok_or("the table lost its regions")?.clone())
                }
            };
            map.set(slot.id(), region);
        }
        if let Some(map) = next {
            update.attach(key, Arc::new(map.seal()));
        }
        if let Some(marks) = &mut self.marks {
            marks.prepare(update);
        }
        Ok(())
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if let Some(marks) = &self.marks {
            marks.commit();
        }
        Ok(())
    }

    fn undo(&mut self, update: &Update<'_>) {
        // What the version before carried is published again by the table.
        if let Some(marks) = &mut self.marks {
            marks.take_back(update);
        }
    }

    fn abort(&mut self, update: &Update<'_>) {
        if let Some(marks) = &mut self.marks {
            marks.take_back(update);
        }
    }
}

impl<B: Tracking> Drop for Follower<B> {
    fn drop(&mut self) {
        self.common.table_goes();
    }
}
