//! The bridge: a `GuestMemoryAtomic<GuestMemoryMmap>` that follows the table.

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{PAGE, RAM, fresh, harvested, logged, map, spec, table};
use memslot::dirty::DirtyLog;
use memslot::{Gfn, Listener, ListenerError, SlotFlags, SlotId, SlotTable, Update};
use memslot_vm_memory::{Bridge, BridgedLog, HostMemory};
use vm_memory::bitmap::{ArcSlice, AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

type Bridged<B = ()> = GuestMemoryAtomic<GuestMemoryMmap<B>>;

fn attach<B: Bitmap + Send + Sync + 'static>(bridge: Bridge<B>, table: &mut SlotTable) -> Bridged<B> {
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    unsafe { bridge.attach(table) }.unwrap()
}

fn regions<B: Bitmap>(bridge: &Bridged<B>) -> Vec<(u64, u64)> {
    bridge.memory().iter().map(|region| (region.start_addr().0 / PAGE, region.len() / PAGE)).collect()
}

/// Where each region's object is, to see which are shared between maps.
fn objects<B: Bitmap>(bridge: &Bridged<B>) -> Vec<*const GuestRegionMmap<B>> {
    bridge.memory().iter().map(std::ptr::from_ref).collect()
}

#[test]
fn the_map_follows_the_table() {
    let mut table = table(&[fresh(0, 0x10, 8), fresh(1, 0x40, 4)]);
    let bridge = attach(Bridge::new(RAM), &mut table);
    assert_eq!(regions(&bridge), [(0x10, 8), (0x40, 4)]);
    bridge.memory().write_obj(5u32, GuestAddress(0x14 * PAGE)).unwrap();
    let before = (bridge.memory(), objects(&bridge));

    table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(0x14), SlotId::new(7))).unwrap();
    assert_eq!(regions(&bridge), [(0x10, 4), (0x14, 4), (0x40, 4)]);
    assert_eq!(objects(&bridge)[2], before.1[1], "a slot that does not change keeps its region");
    assert_eq!(bridge.memory().read_obj::<u32>(GuestAddress(0x14 * PAGE)).unwrap(), 5);

    table.move_to(RAM, SlotId::new(7), Gfn::new(0x80)).unwrap();
    assert_eq!(bridge.memory().read_obj::<u32>(GuestAddress(0x80 * PAGE)).unwrap(), 5);
    table.move_to(RAM, SlotId::new(7), Gfn::new(0x14)).unwrap();
    table.transaction(|tx| tx.merge(RAM, SlotId::new(0), SlotId::new(7))).unwrap();
    assert_eq!(regions(&bridge), [(0x10, 8), (0x40, 4)]);
    table.delete(RAM, SlotId::new(0)).unwrap();
    table.delete(RAM, SlotId::new(1)).unwrap();
    assert_eq!(regions(&bridge), []);
    assert_eq!(bridge.memory().last_addr(), GuestAddress(0));
    table.create(fresh(3, 1, 1)).unwrap();
    assert_eq!(regions(&bridge), [(1, 1)]);
    assert_eq!(before.0.read_obj::<u32>(GuestAddress(0x14 * PAGE)).unwrap(), 5, "a guard is the past");
    drop(table);
    assert_eq!(regions(&bridge), [(1, 1)]);
}

#[test]
fn a_table_without_slots_has_an_empty_map() {
    let mut table = table(&[]);
    let bridge = attach(Bridge::new(RAM), &mut table);
    assert_eq!(bridge.memory().num_regions(), 0);
    assert!(bridge.memory().read_obj::<u8>(GuestAddress(0)).is_err());
}

/// Refuses frames from 0x200 on, when it is too late to say so.
struct Fails;

impl Listener for Fails {
    fn name(&self) -> &str {
        "fails"
    }
    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        if update.after.slot_at(RAM, Gfn::new(0x200)).is_some() { Err("no".into()) } else { Ok(()) }
    }
    fn undo(&mut self, _: &Update<'_>) {}
}

#[test]
fn what_is_taken_back_was_never_there() {
    let mut table = table(&[fresh(0, 0x10, 8), fresh(1, 0x40, 4)]);
    let bridge = attach(Bridge::new(RAM), &mut table);
    table.add_listener(Box::new(Fails)).unwrap();
    let before = objects(&bridge);
    let change = |table: &mut SlotTable| {
        table.transaction(|tx| {
            tx.split(RAM, SlotId::new(0), Gfn::new(0x12), SlotId::new(5))?;
            tx.move_to(RAM, SlotId::new(5), Gfn::new(0x200))?;
            tx.delete(RAM, SlotId::new(1))
        })
    };
    change(&mut table).unwrap_err();
    assert_eq!((regions(&bridge), objects(&bridge)), (vec![(0x10, 8), (0x40, 4)], before));
    table.set_flags(RAM, SlotId::new(1), SlotFlags::READONLY).unwrap();
    assert_eq!(regions(&bridge), [(0x10, 8), (0x40, 4)]);
    table.delete(RAM, SlotId::new(1)).unwrap();
    assert_eq!(regions(&bridge), [(0x10, 8)]);
}

#[test]
fn bitmaps_are_carried_through_splits_and_merges() {
    let mut table = table(&[fresh(0, 0x10, 8)]);
    // A region gets a slice of the bitmap that its memory had; two neighbours' bits are carried to a new one.
    let make = |slot: &memslot::Slot, origins: &[memslot_vm_memory::Origin<'_, ArcSlice<AtomicBitmap>>]| {
        let len = usize::try_from(slot.pages() * PAGE).unwrap();
        match origins {
            [one] if one.len == len => one.bitmap.slice_at(one.offset),
            _ => {
                let new =
                    ArcSlice::new(Arc::new(AtomicBitmap::new(len, NonZeroUsize::new(4096).unwrap())), 0);
                origins.iter().for_each(|origin| origin.carry_to(&new));
                new
            }
        }
    };
    let bridge = attach(Bridge::new(RAM).with_bitmaps(make), &mut table);
    let write =
        |memory: &GuestMemoryMmap<_>, gfn: u64| memory.write_obj(1u8, GuestAddress(gfn * PAGE)).unwrap();
    let dirty = |gfns: std::ops::Range<u64>| {
        let memory = bridge.memory();
        let is_dirty = |&gfn: &u64| {
            let (region, offset) = memory.to_region_addr(GuestAddress(gfn * PAGE)).unwrap();
            region.bitmap().dirty_at(usize::try_from(offset.0).unwrap())
        };
        gfns.filter(is_dirty).collect::<Vec<_>>()
    };
    let old = bridge.memory();
    write(&old, 0x11);
    write(&old, 0x16);
    table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(0x14), SlotId::new(7))).unwrap();
    assert_eq!(dirty(0x10..0x18), [0x11, 0x16]);
    write(&old, 0x15);
    write(&bridge.memory(), 0x13);
    assert_eq!(dirty(0x10..0x18), [0x11, 0x13, 0x15, 0x16], "a guard from before marks the same bits");
    table.transaction(|tx| tx.merge(RAM, SlotId::new(0), SlotId::new(7))).unwrap();
    assert_eq!(dirty(0x10..0x18), [0x11, 0x13, 0x15, 0x16]);
}

#[test]
fn writes_mark_the_dirty_log_wherever_the_memory_is_now() {
    let mut table = table(&[]);
    let log = DirtyLog::attach(&mut table).unwrap();
    let bridge: Bridged<BridgedLog> = attach(Bridge::new(RAM).with_log(&log), &mut table);
    table.create(logged(fresh(0, 0x10, 8))).unwrap();
    let consumer = log.consumer().unwrap();
    let old = bridge.memory();
    old.write_obj(1u64, GuestAddress(0x12 * PAGE - 4)).unwrap();
    let (region, offset) = old.to_region_addr(GuestAddress(0x12 * PAGE)).unwrap();
    assert!(region.bitmap().dirty_at(usize::try_from(offset.0).unwrap()));
    assert_eq!(harvested(&consumer), [(0x11, 2)]);
    table.transaction(|tx| tx.split(RAM, SlotId::new(0), Gfn::new(0x14), SlotId::new(7))).unwrap();
    table.move_to(RAM, SlotId::new(7), Gfn::new(0x80)).unwrap();
    old.write_obj(1u8, GuestAddress(0x16 * PAGE)).unwrap();
    assert_eq!(harvested(&consumer), [(0x82, 1)]);
    bridge.memory().write_obj(1u8, GuestAddress(0x10 * PAGE)).unwrap();
    assert_eq!(harvested(&consumer), [(0x10, 1)]);
}

struct Owner(Arc<AtomicUsize>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn what_keeps_the_memory_goes_when_no_map_has_the_region() {
    let gone = Arc::new(AtomicUsize::new(0));
    let owners = gone.clone();
    let file = Arc::new(std::fs::File::open("/dev/null").unwrap());
    let describe = move |slot: &memslot::Slot| {
        let file = FileOffset::from_arc(file.clone(), u64::from(slot.id().get()) << 20);
        Ok(HostMemory::new()
            .keeping(Arc::new(Owner(owners.clone())))
            .with_file_offset(file)
            .with_hugetlbfs(false))
    };
    let mut table = table(&[]);
    let bridge = attach(Bridge::new(RAM).describe(describe), &mut table);
    table.create(fresh(3, 0, 1)).unwrap();
    let guard = bridge.memory();
    let region = guard.find_region(GuestAddress(0)).unwrap();
    assert_eq!((region.file_offset().unwrap().start(), region.is_hugetlbfs()), (3 << 20, Some(false)));
    table.delete(RAM, SlotId::new(3)).unwrap();
    table.create(fresh(1, 8, 1)).unwrap();
    assert_eq!(gone.load(Ordering::SeqCst), 0, "a guard has it");
    drop(guard);
    table.create(fresh(2, 9, 1)).unwrap();
    assert_eq!(gone.load(Ordering::SeqCst), 1);
    // The map outlives the table, and so must what it stands on.
    drop(table);
    assert_eq!((gone.load(Ordering::SeqCst), bridge.memory().num_regions()), (1, 2));
}

#[test]
fn a_region_that_cannot_be_made_stops_the_transaction() {
    let mut table = table(&[fresh(0, 0, 1)]);
    let bridge = attach(
        Bridge::new(RAM).describe(|slot| match slot.id().get() {
            5 => Err("nobody knows slot 5".into()),
            _ => Ok(HostMemory::new()),
        }),
        &mut table,
    );
    let error = table.create(spec(5, 8, 1, map(1))).unwrap_err().to_string();
    assert!(error.contains("nobody knows slot 5"), "{error}");
    assert_eq!(regions(&bridge), [(0, 1)]);
}

#[cfg(feature = "vhost")]
#[test]
fn vhost_is_told_of_the_regions() {
    use memslot_vm_memory::{memory_table, region_info};
    let first = fresh(0, 0x10, 8);
    let mut table = table(&[first, fresh(1, 0x40, 4)]);
    let bridge = attach(Bridge::new(RAM), &mut table);
    let told = memory_table(&*bridge.memory()).unwrap();
    assert_eq!(told.len(), 2);
    let info = told[0];
    assert_eq!((info.guest_phys_addr, info.memory_size, info.mmap_handle), (0x10 * PAGE, 8 * PAGE, -1));
    assert_eq!(info.userspace_addr, first.backing.hva().unwrap().get());
    // As vhost itself makes it where there is a file.
    let file = std::sync::Arc::new(std::fs::File::open("/dev/null").unwrap());
    let native = memslot_vm_memory::Native::new(RAM).describe(move |_| {
        Ok(HostMemory::new().with_file_offset(FileOffset::from_arc(file.clone(), 0x3000)))
    });
    // SAFETY: the tests' slots are made by `map`, which never unmaps.
    let space = unsafe { native.attach(&mut table) }.unwrap();
    let memory = space.memory();
    let region = memory.find_region(GuestAddress(0x10 * PAGE)).unwrap();
    let info = region_info(region).unwrap();
    assert_eq!((info.mmap_offset, info.mmap_handle >= 0), (0x3000, true));
}
