//! What versions carry besides slots, and readers that become guards.

use std::sync::Arc;

use memslot::*;

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;

fn spec(id: u32) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(u64::from(id) << 8), 16).unwrap(),
        backing: Backing::Host { hva: Hva::new(0x7000_0000 + (u64::from(id) << 20)) },
        flags: SlotFlags::empty(),
    }
}

/// Attaches how many slots there are, and refuses changes on demand.
struct Counter {
    key: AttachmentKey<usize>,
    refuse_prepare: Arc<std::sync::atomic::AtomicBool>,
    refuse_commit: Arc<std::sync::atomic::AtomicBool>,
}

impl Listener for Counter {
    fn name(&self) -> &str {
        "counter"
    }

    fn prepare(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        update.attach(self.key, Arc::new(update.after.len(RAM)));
        if self.refuse_prepare.load(std::sync::atomic::Ordering::Relaxed) {
            return Err("not now".into());
        }
        Ok(())
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        // Published: too late, and without effect.
        update.attach(self.key, Arc::new(1000));
        assert_eq!(update.after.attachment(self.key), Some(&update.after.len(RAM)));
        if self.refuse_commit.load(std::sync::atomic::Ordering::Relaxed) {
            return Err("not now".into());
        }
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

#[test]
fn every_version_carries_its_own() {
    use std::sync::atomic::Ordering::Relaxed;
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let key = table.attachment_key().unwrap();
    let (refuse_prepare, refuse_commit) = (Arc::default(), Arc::default());
    let listener = Counter {
        key,
        refuse_prepare: Arc::clone(&refuse_prepare),
        refuse_commit: Arc::clone(&refuse_commit),
    };
    assert_eq!(table.attach(key, Arc::new(77)).unwrap(), 1);
    table.add_listener(Box::new(listener)).unwrap();
    let first = table.snapshot();
    let mut reader = table.reader().unwrap();

    table.create(spec(0)).unwrap();
    table.create(spec(1)).unwrap();
    let second = table.snapshot();
    table.create(spec(2)).unwrap();
    assert_eq!((first.attachment(key), second.attachment(key)), (Some(&77), Some(&2)));
    assert_eq!(reader.pin().attachment(key), Some(&3));

    refuse_prepare.store(true, Relaxed);
    table.create(spec(3)).unwrap_err();
    assert_eq!((table.view().len(RAM), table.view().attachment(key)), (3, Some(&3)));
    refuse_prepare.store(false, Relaxed);
    refuse_commit.store(true, Relaxed);
    table.create(spec(3)).unwrap_err();
    assert_eq!((table.view().len(RAM), table.view().attachment(key)), (3, Some(&3)));
}

#[test]
fn carried_on_until_replaced_and_dropped_with_the_last_version() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let key = table.attachment_key::<String>().unwrap();
    let (old, new) = (Arc::new("old".to_owned()), Arc::new("new".to_owned()));
    assert_eq!(table.view().attachment(key), None);
    table.attach(key, Arc::clone(&old)).unwrap();
    table.create(spec(0)).unwrap();
    assert_eq!(table.view().attachment(key), Some(&*old));

    let held = table.snapshot();
    table.attach(key, Arc::clone(&new)).unwrap();
    table.create(spec(1)).unwrap();
    table.reclaim();
    assert_eq!(Arc::strong_count(&old), 2, "the snapshot's version carries it, and no other one");
    assert_eq!(held.attachment(key).map(String::as_str), Some("old"));
    assert!(held.slot(RAM, SlotId::new(1)).is_none());
    drop(held);
    table.reclaim();
    assert_eq!(Arc::strong_count(&old), 1);
    assert!(Arc::strong_count(&new) >= 2);
    drop(table);
    assert_eq!(Arc::strong_count(&new), 1);
}

#[test]
fn a_key_of_another_type_finds_nothing() {
    let (mut one, mut other) =
        (SlotTable::new(Limits::default()).unwrap(), SlotTable::new(Limits::default()).unwrap());
    let text = one.attachment_key::<String>().unwrap();
    let number = other.attachment_key::<u32>().unwrap();
    other.attach(number, Arc::new(7)).unwrap();
    assert_eq!(other.view().attachment(text), None);
    for _ in 1..MAX_ATTACHMENTS {
        assert!(one.attachment_key::<u8>().is_some());
    }
    assert!(one.attachment_key::<u8>().is_none());
}

#[test]
fn a_guard_holds_its_version_and_gives_its_reader_back() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let handle = table.handle();
    table.create(spec(0)).unwrap();
    let guard = table.reader().unwrap().into_guard();
    assert!(guard.reads(&handle));
    let snapshot = guard.snapshot();
    for id in 1..100 {
        table.create(spec(id)).unwrap();
    }
    table.delete(RAM, SlotId::new(0)).unwrap();
    table.reclaim();
    assert_eq!(guard.len(RAM), 1);
    let seen = std::thread::scope(|scope| scope.spawn(|| guard.slot(RAM, SlotId::new(0)).copied()).join());
    assert_eq!(seen.unwrap().unwrap().spec(), spec(0));

    let mut reader = guard.into_reader();
    assert!(reader.reads(&handle) && !reader.reads(&SlotTable::new(Limits::default()).unwrap().handle()));
    assert_eq!(reader.pin().len(RAM), 99);
    assert_eq!(snapshot.len(RAM), 1);
    let before = table.stats().versions;
    drop(snapshot);
    table.reclaim();
    assert!(table.stats().versions < before);

    // Outlives the table.
    let guard = reader.into_guard();
    drop(table);
    assert_eq!(std::thread::spawn(move || guard.len(RAM)).join().unwrap(), 99);
}
