//! The peers: page tables of other crates, each owned by one thread, without slots.

use page_table_multiarch::{MappingFlags, PageSize, PagingHandler, x86_64::X64PageTable};
use x86_64::structures::paging::mapper::{CleanUp, MappedFrame, Mapper, TranslateResult};
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame, Size2MiB,
    Size4KiB, Translate,
};
use x86_64::{PhysAddr, VirtAddr};

use super::pool::Pool;

/// What is measured of a peer.
pub(crate) trait Peer {
    const NAME: &'static str;
    fn new() -> Self;
    /// Maps so many bytes from 0 on.
    fn map(&mut self, bytes: u64, large: bool);
    /// Maps a 4 KiB page.
    fn map_page(&mut self, page: u64);
    /// Makes them read-only.
    fn protect(&mut self, bytes: u64, large: bool);
    /// Unmaps them, and frees the tables that are empty then.
    fn unmap(&mut self, bytes: u64, large: bool);
}

/// Host memory that guest address 0 lies at.
const HOST: u64 = 0x10_0000_0000;

struct Frames;

// SAFETY: the pool hands out each frame once.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        Pool::get().take().map(|frame| PhysFrame::containing_address(PhysAddr::new(frame as u64)))
    }
}

impl FrameDeallocator<Size4KiB> for Frames {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        #[expect(clippy::cast_possible_truncation, reason = "made from an address of this process")]
        Pool::get().give_back(frame.start_address().as_u64() as usize);
    }
}

/// The `x86_64` crate's tables.
pub(crate) struct Offset(OffsetPageTable<'static>, u64);

const FLAGS: PageTableFlags =
    PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::USER_ACCESSIBLE);

impl Offset {
    /// Every page of the range.
    fn pages(bytes: u64, step: u64) -> impl Iterator<Item = VirtAddr> {
        (0..bytes / step).map(move |page| VirtAddr::new(page * step))
    }
}

impl Peer for Offset {
    const NAME: &'static str = "x86_64 OffsetPageTable";

    fn new() -> Self {
        let root = Pool::get().take().unwrap_or_else(|| panic!("the pool is empty"));
        // SAFETY: a cleared frame of its own is an empty table; physical addresses are virtual ones here.
        let table = unsafe {
            let root: *mut PageTable = std::ptr::with_exposed_provenance_mut(root);
            OffsetPageTable::new(&mut *root, VirtAddr::new(0))
        };
        Self(table, root as u64)
    }

    fn map(&mut self, bytes: u64, large: bool) {
        for at in Self::pages(bytes, if large { 2 << 20 } else { 4096 }) {
            let to = PhysAddr::new(HOST + at.as_u64());
            // SAFETY: nothing walks these tables.
            unsafe {
                if large {
                    let page = Page::<Size2MiB>::containing_address(at);
                    let _ = self
                        .0
                        .map_to(page, PhysFrame::containing_address(to), FLAGS, &mut Frames)
                        .map(|it| it.ignore());
                } else {
                    let page = Page::<Size4KiB>::containing_address(at);
                    let _ = self
                        .0
                        .map_to(page, PhysFrame::containing_address(to), FLAGS, &mut Frames)
                        .map(|it| it.ignore());
                }
            }
        }
        assert_eq!(self.0.translate_addr(VirtAddr::new(bytes - 1)), Some(PhysAddr::new(HOST + bytes - 1)));
    }

    fn map_page(&mut self, page: u64) {
        let at = VirtAddr::new(page * 4096);
        let frame = PhysFrame::containing_address(PhysAddr::new(HOST + at.as_u64()));
        // SAFETY: as above.
        unsafe {
            let page = Page::<Size4KiB>::containing_address(at);
            let _ = self.0.map_to(page, frame, FLAGS, &mut Frames).map(|it| it.ignore());
        }
    }

    fn protect(&mut self, bytes: u64, large: bool) {
        let flags = FLAGS.difference(PageTableFlags::WRITABLE);
        for at in Self::pages(bytes, if large { 2 << 20 } else { 4096 }) {
            // SAFETY: as above.
            unsafe {
                if large {
                    let _ = self
                        .0
                        .update_flags(Page::<Size2MiB>::containing_address(at), flags)
                        .map(|it| it.ignore());
                } else {
                    let _ = self
                        .0
                        .update_flags(Page::<Size4KiB>::containing_address(at), flags)
                        .map(|it| it.ignore());
                }
            }
        }
        let last = self.0.translate(VirtAddr::new(bytes - 1));
        assert!(
            matches!(last, TranslateResult::Mapped { flags, frame: MappedFrame::Size4KiB(_) | MappedFrame::Size2MiB(_), .. }
            if !flags.contains(PageTableFlags::WRITABLE))
        );
    }

    fn unmap(&mut self, bytes: u64, large: bool) {
        for at in Self::pages(bytes, if large { 2 << 20 } else { 4096 }) {
            if large {
                let _ = self.0.unmap(Page::<Size2MiB>::containing_address(at)).map(|(_, it)| it.ignore());
            } else {
                let _ = self.0.unmap(Page::<Size4KiB>::containing_address(at)).map(|(_, it)| it.ignore());
            }
        }
        // SAFETY: the tables are the pool's frames.
        unsafe { self.0.clean_up(&mut Frames) };
        assert_eq!(self.0.translate_addr(VirtAddr::new(bytes - 1)), None);
    }
}

impl Drop for Offset {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { self.0.clean_up(&mut Frames) };
        #[expect(clippy::cast_possible_truncation, reason = "made from an address of this process")]
        Pool::get().give_back(self.1 as usize);
    }
}

struct Handler;

impl PagingHandler for Handler {
    fn alloc_frames(_: usize, _: usize) -> Option<memory_addr::PhysAddr> {
        Pool::get().take().map(memory_addr::PhysAddr::from)
    }

    fn dealloc_frames(frame: memory_addr::PhysAddr, _: usize) {
        Pool::get().give_back(frame.as_usize());
    }

    fn phys_to_virt(frame: memory_addr::PhysAddr) -> memory_addr::VirtAddr {
        memory_addr::VirtAddr::from(frame.as_usize())
    }
}

/// The `page_table_multiarch` crate's tables.
pub(crate) struct Multiarch(X64PageTable<Handler>);

#[expect(clippy::cast_possible_truncation, reason = "64-bit processors only")]
impl Peer for Multiarch {
    const NAME: &'static str = "page_table_multiarch";

    fn new() -> Self {
        Self(X64PageTable::try_new().unwrap_or_else(|error| panic!("{error:?}")))
    }

    fn map(&mut self, bytes: u64, large: bool) {
        let to = |at: memory_addr::VirtAddr| memory_addr::PhysAddr::from(HOST as usize + at.as_usize());
        let flags = MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE | MappingFlags::USER;
        if large {
            // One by one: a region would become a page of 1 GiB.
            let mut cursor = self.0.cursor();
            for at in (0..bytes as usize).step_by(2 << 20) {
                assert!(cursor.map(at.into(), to(at.into()), PageSize::Size2M, flags).is_ok());
            }
        } else {
            assert!(self.0.cursor().map_region(0.into(), to, bytes as usize, flags, false).is_ok());
        }
        assert!(self.0.query(memory_addr::VirtAddr::from(bytes as usize - 1)).is_ok());
    }

    fn map_page(&mut self, page: u64) {
        let flags = MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE | MappingFlags::USER;
        let (at, to) = (page as usize * 4096, HOST as usize + page as usize * 4096);
        let _ = self.0.cursor().map(at.into(), to.into(), PageSize::Size4K, flags);
    }

    fn protect(&mut self, bytes: u64, _: bool) {
        let flags = MappingFlags::READ | MappingFlags::EXECUTE | MappingFlags::USER;
        assert!(self.0.cursor().protect_region(0.into(), bytes as usize, flags).is_ok());
    }

    fn unmap(&mut self, bytes: u64, _: bool) {
        assert!(self.0.cursor().unmap_region(0.into(), bytes as usize).is_ok());
        assert!(self.0.query(memory_addr::VirtAddr::from(bytes as usize - 1)).is_err());
    }
}
