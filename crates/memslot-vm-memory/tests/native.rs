//! The native mode: one version of a table as vm-memory's memory.

mod common;

use std::sync::{Arc, OnceLock, mpsc};

use common::{PAGE, RAM, fresh, harvested, logged, map, space, spec, table};
use memslot::dirty::{DirtyLog, SoftwareOnly};
use memslot::{Backing, Gfn, SlotFlags, SlotId, SlotSpec};
use memslot_vm_memory::{HostMemory, MemoryGuard, Native, SlotLog, Space};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, MemoryRegionAddress,
};

#[test]
fn a_version_is_read_and_written_through_its_regions() {
    let mut table = table(&[fresh(7, 0x10, 4), fresh(3, 0x20, 2), fresh(900, 0x14, 1)]);
    let space = space(&mut table);
    let memory = space.memory();
    let regions: Vec<_> = memory.iter().map(|r| (r.slot().id().get(), r.start_addr().0, r.len())).collect();
    assert_eq!(regions, [(7, 0x1_0000, 0x4000), (900, 0x1_4000, 0x1000), (3, 0x2_0000, 0x2000)]);
    assert_eq!(memory.num_regions(), 3);
    assert_eq!(memory.last_addr(), GuestAddress(0x2_1fff));

    // Across the border of two slots that lie anywhere in the host.
    let border = GuestAddress(0x1_3ffc);
    memory.write_obj(0x1122_3344_5566_7788u64, border).unwrap();
    assert_eq!(memory.read_obj::<u32>(border).unwrap(), 0x5566_7788);
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1_4000)).unwrap(), 0x1122_3344);
    assert!(matches!(
        memory.read_obj::<u64>(GuestAddress(0x1_4ffc)),
        Err(GuestMemoryError::PartialBuffer { expected: 8, completed: 4 })
    ));
    let slot = table.view().slot(RAM, SlotId::new(900)).unwrap();
    assert_eq!(
        memory.get_host_address(GuestAddress(0x1_4010)).unwrap() as u64,
        slot.hva().unwrap().get() + 16
    );
}

#[test]
fn every_change_is_followed() {
    let a = fresh(0, 0x100, 64);
    let mut table = table(&[a]);
    let space = space(&mut table);
    let at = |gfn: u64| GuestAddress(gfn * PAGE + 8);
    let read = |gfn| space.memory().read_obj::<u64>(at(gfn)).ok();
    for gfn in 0x100..0x140 {
        space.memory().write_obj(gfn, at(gfn)).unwrap();
    }
    let before = space.memory();

    table.transaction(|tx| tx.split(RAM, a.id, Gfn::new(0x120), SlotId::new(50))).unwrap();
    assert_eq!(space.memory().num_regions(), 2);
    assert_eq!((read(0x11f), read(0x120)), (Some(0x11f), Some(0x120)));

    table.move_to(RAM, SlotId::new(50), Gfn::new(0x200)).unwrap();
    assert_eq!((read(0x120), read(0x200)), (None, Some(0x120)));
    let region = |id: u32| {
        let memory = space.memory();
        memory
            .iter()
            .map(|r| (r.slot().id().get(), r.start_addr().0 / PAGE, r.len() / PAGE))
            .find(|r| r.0 == id)
    };
    assert_eq!(region(50), Some((50, 0x200, 32)));

    table.set_flags(RAM, a.id, SlotFlags::READONLY).unwrap();
    assert!(space.memory().find_region(at(0x100)).unwrap().slot().flags().contains(SlotFlags::READONLY));
    table.delete(RAM, a.id).unwrap();
    assert_eq!((read(0x100), region(0)), (None, None));
    table.delete(RAM, SlotId::new(50)).unwrap();
    assert_eq!(space.memory().num_regions(), 0);
    assert_eq!(space.memory().last_addr(), GuestAddress(0));

    // A guard is the past.
    assert_eq!(before.read_obj::<u64>(at(0x13f)).unwrap(), 0x13f);
    assert_eq!(before.num_regions(), 1);
}

#[test]
fn devices_are_holes_and_other_address_spaces_are_not_seen() {
    let device = SlotSpec { backing: Backing::Device { token: 5 }, ..fresh(1, 0x10, 1) };
    let elsewhere = SlotSpec { address_space: memslot::AddressSpaceId::SMM, ..fresh(0, 0x20, 1) };
    let memfd = fresh(2, 0x30, 1);
    let hva = memfd.backing.hva().unwrap();
    let memfd = SlotSpec { backing: Backing::GuestMemfd { hva, file: 3, offset: 0 }, ..memfd };
    let mut table = table(&[device, elsewhere, memfd]);
    let space = space(&mut table);
    let memory = space.memory();
    assert_eq!(memory.num_regions(), 1);
    assert!(memory.find_region(GuestAddress(0x10 * PAGE)).is_none());
    assert!(memory.find_region(GuestAddress(0x20 * PAGE)).is_none());
    memory.write_obj(1u8, GuestAddress(0x30 * PAGE)).unwrap();
    // SAFETY: in the tests every space is made of mapped memory.
    let smm: Space = unsafe { Native::new(memslot::AddressSpaceId::SMM).attach(&mut table) }.unwrap();
    assert!(smm.memory().find_region(GuestAddress(0x20 * PAGE)).is_some());
    assert!(smm.memory().find_region(GuestAddress(0x30 * PAGE)).is_none());
}

#[test]
fn guards_are_kept_shared_moved_and_outlive_the_table() {
    fn owned<T: Send + Sync + Clone + 'static>(_: &T) {}
    let mut table = table(&[fresh(0, 0, 16)]);
    let space = space(&mut table);
    owned(&space);
    owned(&space.memory());
    let mut guards: Vec<MemoryGuard<()>> = Vec::new();
    for turn in 0..500u64 {
        space.memory().write_obj(turn, GuestAddress(0)).unwrap();
        guards.push(space.memory());
        guards.push(guards[guards.len() / 2].clone());
        if turn % 3 == 0 {
            let flags = if turn % 2 == 0 { SlotFlags::READONLY } else { SlotFlags::empty() };
            table.set_flags(RAM, SlotId::new(0), flags).unwrap();
        }
    }
    let last = space.memory();
    drop(table);
    assert_eq!(space.memory().view().generation(), last.view().generation());
    drop(space);
    // Dropped on threads that never had a stock, in an order of their own.
    let shared = Arc::new(last);
    let threads: Vec<_> = guards
        .chunks(100)
        .map(|chunk| {
            let (chunk, shared) = (chunk.to_vec(), shared.clone());
            std::thread::spawn(move || {
                for guard in chunk {
                    assert_eq!(guard.read_obj::<u64>(GuestAddress(0)).unwrap(), 499);
                }
                shared.read_obj::<u64>(GuestAddress(0)).unwrap()
            })
        })
        .collect();
    drop(guards);
    assert!(threads.into_iter().all(|thread| thread.join().unwrap() == 499));
}

/// Something to notice when it goes.
struct Owner(Arc<std::sync::atomic::AtomicUsize>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

#[test]
fn what_keeps_the_memory_goes_with_the_last_version_that_has_it() {
    let gone = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let dropped = || gone.load(std::sync::atomic::Ordering::SeqCst);
    let mut table = table(&[]);
    let owners = gone.clone();
    let native = Native::new(RAM).describe(move |_| {
        Ok(HostMemory::new().keeping(Arc::new(Owner(owners.clone()))).with_hugetlbfs(true))
    });
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space = unsafe { native.attach(&mut table) }.unwrap();
    table.create(fresh(0, 0, 1)).unwrap();
    table.create(fresh(1, 1, 1)).unwrap();
    let guard = space.memory();
    assert_eq!(guard.find_region(GuestAddress(0)).unwrap().is_hugetlbfs(), Some(true));
    table.delete(RAM, SlotId::new(0)).unwrap();
    table.reclaim();
    assert_eq!(dropped(), 0, "a guard has it");
    let clone = guard.clone();
    drop(guard);
    table.reclaim();
    assert_eq!(dropped(), 0, "a clone has it");
    drop(clone);
    table.reclaim();
    assert_eq!(dropped(), 1);
    // Readers in the stocks of this thread must not keep the table.
    let many: Vec<_> = (0..100).map(|_| space.memory()).collect();
    drop(many);
    drop((space, table));
    assert_eq!(dropped(), 2, "the table is gone, and all it kept");
}

#[test]
fn a_stock_of_another_thread_lets_go_when_it_is_used_next() {
    let gone = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let owners = gone.clone();
    let mut first = table(&[fresh(0, 0, 1)]);
    let native =
        Native::new(RAM).describe(move |_| Ok(HostMemory::new().keeping(Arc::new(Owner(owners.clone())))));
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space = unsafe { native.attach(&mut first) }.unwrap();
    let (sender, receiver) = std::sync::mpsc::channel::<Space>();
    let (done, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        for space in receiver {
            drop((space.memory(), space.memory()));
            drop(space);
            done.send(()).unwrap();
        }
    });
    sender.send(space.clone()).unwrap();
    wait.recv().unwrap();
    drop((space, first));
    let mut second = table(&[fresh(0, 0, 1)]);
    sender.send(common::space(&mut second)).unwrap();
    wait.recv().unwrap();
    assert_eq!(gone.load(std::sync::atomic::Ordering::SeqCst), 1);
    drop(sender);
    thread.join().unwrap();
}

#[test]
fn a_kept_snapshot_becomes_memory_if_it_has_the_regions() {
    let mut table = table(&[fresh(0, 0, 1)]);
    let too_old = table.snapshot();
    let space = space(&mut table);
    space.memory().write_obj(5u8, GuestAddress(9)).unwrap();
    let kept = table.snapshot();
    table.delete(RAM, SlotId::new(0)).unwrap();
    assert!(space.memory_of(too_old).is_none());
    let memory = space.memory_of(kept.clone()).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(9)).unwrap(), 5);
    assert_eq!(memory.snapshot().generation(), kept.generation());

    // Another table's versions carry something of the same type at the same place.
    let mut other = common::table(&[fresh(0, 0, 1)]);
    let others = common::space(&mut other);
    assert!(space.memory_of(other.snapshot()).is_none());
    assert!(others.memory_of(other.snapshot()).is_some());
    assert!(others.memory_of(kept).is_none());
}

#[test]
fn a_slot_that_cannot_be_described_is_not_created() {
    let mut table = table(&[]);
    let file = Arc::new(std::fs::File::open("/dev/null").unwrap());
    let native = Native::new(RAM).describe(move |slot| {
        if slot.id() == SlotId::new(1) {
            return Err("no file for slot 1".into());
        }
        Ok(HostMemory::new().with_file_offset(FileOffset::from_arc(file.clone(), slot.hva().unwrap().get())))
    });
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space = unsafe { native.attach(&mut table) }.unwrap();
    let hva = map(4);
    table.create(spec(0, 0, 4, hva)).unwrap();
    let error = table.create(fresh(1, 8, 1)).unwrap_err().to_string();
    assert!(error.contains("no file for slot 1"), "{error}");
    assert_eq!(space.memory().num_regions(), 1);
    // The other half of a split has its own place in the file.
    table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(3), SlotId::new(2))).unwrap();
    let memory = space.memory();
    let region = memory.find_region(GuestAddress(3 * PAGE)).unwrap();
    assert_eq!(region.file_offset().unwrap().start(), hva.get() + 3 * PAGE);
}

#[test]
fn attaching_fails_where_it_cannot_be() {
    let mut table = table(&[]);
    // SAFETY: there are no slots.
    let space = unsafe { Native::new(memslot::AddressSpaceId::new(2)).attach(&mut table) };
    assert_eq!(space.unwrap_err().to_string(), "the table has no address space 2");
    for _ in 0..memslot::MAX_ATTACHMENTS {
        space_of(&mut table).unwrap();
    }
    let error = space_of(&mut table).unwrap_err();
    assert_eq!(error, "all 4 attachment keys of the table are given away");
}

fn space_of(table: &mut memslot::SlotTable) -> Result<Space, String> {
    // SAFETY: there are no slots.
    unsafe { Native::new(RAM).attach(table) }.map_err(|error| error.to_string())
}

#[test]
fn an_empty_address_space_has_no_memory() {
    let mut table = table(&[]);
    let memory = space(&mut table).memory();
    assert_eq!((memory.num_regions(), memory.last_addr()), (0, GuestAddress(0)));
    assert!(memory.read_obj::<u8>(GuestAddress(0)).is_err());
    assert!(memory.check_range(GuestAddress(77), 0));
    assert!(!memory.check_range(GuestAddress(77), 1));
}

#[test]
fn writes_mark_the_dirty_log() {
    let mut table = table(&[]);
    let log = DirtyLog::attach(&mut table).unwrap();
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space = unsafe { Native::new(RAM).with_log(&log).attach(&mut table) }.unwrap();
    table.create(logged(fresh(0, 0x100, 16))).unwrap();
    table.create(fresh(1, 0x110, 16)).unwrap();
    let consumer = log.consumer().unwrap();
    let memory = space.memory();
    let gpa = |gfn: u64, offset: u64| GuestAddress(gfn * PAGE + offset);
    memory.write_obj(1u64, gpa(0x102, 0xffc)).unwrap();
    memory.read_obj::<u64>(gpa(0x105, 0)).unwrap();
    memory.store(1u32, gpa(0x108, 8), std::sync::atomic::Ordering::Relaxed).unwrap();
    // The last page of the logged slot, and into the one that is not.
    memory.write_slice(&[7; 8192], gpa(0x10f, 0)).unwrap();
    let region = memory.find_region(gpa(0x100, 0)).unwrap();
    assert!(region.bitmap().dirty_at(0x2000) && !region.bitmap().dirty_at(0x1fff));
    assert!(region.bitmap().slice_at(0x1000).dirty_at(0x1000));
    assert_eq!(harvested(&consumer), [(0x102, 2), (0x108, 1), (0x10f, 1)]);
    assert!(!region.bitmap().dirty_at(0x2000), "somebody has harvested it");
    assert!(!memory.find_region(gpa(0x110, 0)).unwrap().bitmap().dirty_at(0));
    assert_eq!(harvested(&consumer), []);

    // Slices of the region, and beyond its end.
    let slice = region.get_slice(MemoryRegionAddress(0x3000), 0x2000).unwrap();
    slice.offset(0xfff).unwrap().write(&[1, 2], 0).unwrap();
    region.bitmap().mark_dirty(0xf_fff, 1 << 40);
    region.bitmap().mark_dirty(usize::MAX, 1);
    region.bitmap().mark_dirty(0x1000, 0);
    assert_eq!(harvested(&consumer), [(0x103, 2), (0x10f, 1)]);
}

#[test]
fn a_guard_from_before_marks_memory_where_it_is_now() {
    let mut table = table(&[]);
    let log = DirtyLog::attach(&mut table).unwrap();
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space = unsafe { Native::new(RAM).with_log(&log).attach(&mut table) }.unwrap();
    table.create(fresh(0, 0x100, 16)).unwrap();
    let consumer = log.consumer().unwrap();
    let old = space.memory();
    let write = |memory: &MemoryGuard<_>, gfn: u64| memory.write_obj(1u8, GuestAddress(gfn * PAGE)).unwrap();
    write(&old, 0x101);
    assert_eq!(harvested(&consumer), [], "nothing is logged");

    // Logging begins: the old guard's region was not logged.
    table.set_flags(RAM, SlotId::new(0), SlotFlags::LOG_DIRTY_PAGES).unwrap();
    write(&old, 0x102);
    assert_eq!(harvested(&consumer), [(0x102, 1)]);

    // The slot is split, its second half moves under an id that the old guard never saw.
    let logging = space.memory();
    table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(0x108), SlotId::new(9))).unwrap();
    table.move_to(RAM, SlotId::new(9), Gfn::new(0x200)).unwrap();
    for guard in [&old, &logging] {
        write(guard, 0x109);
        write(guard, 0x103);
        assert_eq!(harvested(&consumer), [(0x103, 1), (0x201, 1)]);
    }
    // Somebody else's memory comes to where it was; another change moves something unrelated.
    table.create(logged(fresh(1, 0x108, 8))).unwrap();
    table.create(logged(fresh(2, 0x300, 8))).unwrap();
    let (spare, now) = (space.memory(), space.memory());
    table.move_to(RAM, SlotId::new(2), Gfn::new(0x400)).unwrap();
    write(&now, 0x108);
    write(&spare, 0x302);
    assert_eq!(harvested(&consumer), [(0x108, 1), (0x402, 1)]);
    drop(table);
    write(&now, 0x10a);
    assert_eq!(harvested(&consumer), [(0x10a, 1)]);
    drop(space);
    write(&now, 0x10a);
    drop(log);
    write(&now, 0x10b);
    assert_eq!(harvested(&consumer), [(0x10a, 2)]);
}

#[test]
fn a_change_that_is_taken_back_is_followed_both_ways() {
    /// Takes a guard of the version that will be taken back.
    struct Fails {
        space: Arc<OnceLock<Space<SlotLog>>>,
        guards: mpsc::Sender<MemoryGuard<SlotLog>>,
    }
    impl memslot::Listener for Fails {
        fn name(&self) -> &str {
            "fails"
        }
        fn commit(&mut self, update: &memslot::Update<'_>) -> Result<(), memslot::ListenerError> {
            if update.after.slot_at(RAM, Gfn::new(0x200)).is_none() {
                return Ok(());
            }
            self.guards.send(self.space.get().unwrap().memory())?;
            Err("no".into())
        }
        fn undo(&mut self, _: &memslot::Update<'_>) {}
    }
    for fails_first in [true, false] {
        let mut table = table(&[]);
        let log = DirtyLog::attach(&mut table).unwrap();
        let known = Arc::new(OnceLock::new());
        let (guards, between) = mpsc::channel();
        let mut fails = Some(Box::new(Fails { space: known.clone(), guards }));
        if fails_first {
            table.add_listener(fails.take().unwrap()).unwrap();
        }
        // SAFETY: the tests' slots are made by `map`, which never unmaps.
        let space = unsafe { Native::new(RAM).with_log(&log).attach(&mut table) }.unwrap();
        known.set(space.clone()).unwrap();
        fails.into_iter().for_each(|fails| table.add_listener(fails).unwrap());
        let slot = logged(fresh(0, 0x100, 16));
        table.create(slot).unwrap();
        let before = space.memory();
        before.write_obj(3u8, GuestAddress(0x100 * PAGE)).unwrap();
        table.move_to(RAM, slot.id, Gfn::new(0x200)).unwrap_err();
        let consumer = log.consumer().unwrap();
        let memory = space.memory();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100 * PAGE)).unwrap(), 3);
        assert!(memory.find_region(GuestAddress(0x200 * PAGE)).is_none());
        let between = between.recv().unwrap();
        consumer.harvest(&mut SoftwareOnly).unwrap().commit();
        for (guard, gfn) in [(&before, 0x105), (&memory, 0x105), (&between, 0x205)] {
            guard.write_obj(4u8, GuestAddress(gfn * PAGE)).unwrap();
            let harvest = consumer.harvest(&mut SoftwareOnly).unwrap();
            let runs: Vec<_> = harvest.runs().map(|run| (run.gfns.start().get(), run.gfns.len())).collect();
            assert_eq!(runs, [(0x105, 1)]);
            harvest.commit();
        }
        table.set_flags(RAM, slot.id, SlotFlags::empty()).unwrap();
        space.memory().write_obj(4u8, GuestAddress(0x105 * PAGE)).unwrap();
        assert!(!log.is_marked(RAM, Gfn::new(0x105)), "nothing is logged any more");
    }
}

/// Writes through the version that is being taken back, when the log has taken it back already; or refuses it.
struct Between {
    space: Arc<OnceLock<Space<SlotLog>>>,
    refuses: bool,
}

impl memslot::Listener for Between {
    fn name(&self) -> &str {
        "between"
    }

    fn commit(&mut self, update: &memslot::Update<'_>) -> Result<(), memslot::ListenerError> {
        let is_moved = update.after.slot_at(RAM, Gfn::new(0x200)).is_some();
        if self.refuses && is_moved { Err("no".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &memslot::Update<'_>) {
        let memory = self.space.get().unwrap().memory();
        memory.write_obj(4u8, GuestAddress(0x205 * PAGE)).unwrap();
    }
}

#[test]
fn a_write_through_a_version_that_is_being_taken_back_is_not_lost() {
    let mut table = table(&[logged(fresh(0, 0x100, 16))]);
    let known = Arc::new(OnceLock::new());
    table.add_listener(Box::new(Between { space: known.clone(), refuses: false })).unwrap();
    let log = DirtyLog::attach(&mut table).unwrap();
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space = unsafe { Native::new(RAM).with_log(&log).attach(&mut table) }.unwrap();
    known.set(space.clone()).unwrap();
    table.add_listener(Box::new(Between { space: known, refuses: true })).unwrap();
    let consumer = log.consumer().unwrap();
    table.move_to(RAM, SlotId::new(0), Gfn::new(0x200)).unwrap_err();
    // Which page it is cannot be told any more.
    assert_eq!(harvested(&consumer), [(0x100, 16)]);
    space.memory().write_obj(4u8, GuestAddress(0x105 * PAGE)).unwrap();
    assert_eq!(harvested(&consumer), [(0x105, 1)]);
}

#[test]
fn the_end_of_the_address_space() {
    // KVM lets no slot have the very last page.
    let last = (1u64 << 52) - 2;
    let mut table = table(&[spec(0, last, 1, map(1)), spec(1, 0, 1, map(1))]);
    let memory = space(&mut table).memory();
    let end = u64::MAX - PAGE;
    assert_eq!(memory.last_addr(), GuestAddress(end));
    memory.write_obj(9u8, GuestAddress(end)).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(end)).unwrap(), 9);
    assert_eq!(memory.read(&mut [0; 8], GuestAddress(end - 3)).unwrap(), 4);
    assert!(!memory.check_range(GuestAddress(end), 2 * 4096), "it does not go on at 0");
}
