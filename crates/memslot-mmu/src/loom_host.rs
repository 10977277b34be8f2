//! The host of the models that loom runs: memory that moves, with one page whose contents count, and a processor that a
//! flush waits for.

use core::convert::Infallible;
use core::ptr::NonNull;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use memslot::{Gfn, GfnRange, Slot};

use crate::format::{Access, MemoryType};
use crate::host::{Answer, Context, Frame, Frames, Pfn, TableMemory, TlbFlush};
use crate::level::Table;
use crate::shadow::GuestMemory;
use crate::user::UserHost;

/// Which frame is behind a guest's before anything moves, and the frames around that are contiguous with it.
pub(crate) type Home = fn(&Slot, Gfn) -> (u64, GfnRange);

/// See the module's documentation. A handle.
#[derive(Clone)]
pub(crate) struct LoomHost(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) user: UserHost,
    home: Home,
    /// Added to every frame number behind guest memory.
    pub(crate) offset: AtomicUsize,
    /// Held by a processor while it uses what it has found in the tables; a flush waits for that.
    pub(crate) processor: loom::sync::Mutex<()>,
    /// What is in the guest's page.
    pub(crate) contents: AtomicUsize,
    keeps: bool,
}

impl LoomHost {
    pub(crate) fn new(user: UserHost, home: Home) -> Self {
        Self::keeping(user, home, false)
    }

    /// Whether tables that are freed stay in memory: for models in which somebody is inside, which loom is to notice.
    pub(crate) fn keeping(user: UserHost, home: Home, keeps: bool) -> Self {
        Self(Arc::new(Inner {
            user,
            home,
            offset: AtomicUsize::new(0),
            processor: loom::sync::Mutex::new(()),
            contents: AtomicUsize::new(0),
            keeps,
        }))
    }
}

// SAFETY: passed on.
unsafe impl TableMemory for LoomHost {
    fn allocate(&self, tables: usize) -> Option<Pfn> {
        self.0.user.allocate(tables)
    }

    unsafe fn free(&self, first: Pfn, tables: usize) {
        if self.0.keeps {
            // SAFETY: it is never freed; whoever uses it still makes loom panic.
            let table = unsafe { &mut *self.reach(first).as_ptr() };
            return table.0.iter_mut().for_each(|entry| entry.with_mut(|_| ()));
        }
        // SAFETY: passed on.
        unsafe { self.0.user.free(first, tables) }
    }

    fn reach(&self, table: Pfn) -> NonNull<Table> {
        self.0.user.reach(table)
    }
}

impl Frames for LoomHost {
    type Error = Infallible;

    fn frame(&self, slot: &Slot, gfn: Gfn, _: Access) -> Result<Answer, Infallible> {
        let (home, run) = (self.0.home)(slot, gfn);
        let pfn = Pfn::new(home + self.0.offset.load(Ordering::Relaxed) as u64);
        Ok(Answer::Frame(Frame { pfn, run, access: Access::all(), memory: MemoryType::WriteBack }))
    }
}

impl TlbFlush for LoomHost {
    fn flush(&self, _: Context, _: GfnRange) {
        drop(self.0.processor.lock().unwrap());
    }
}

impl GuestMemory for LoomHost {
    fn with_page<R>(&self, slot: &Slot, gfn: Gfn, work: impl FnOnce(&Table) -> R) -> Option<R> {
        self.0.user.with_page(slot, gfn, work)
    }
}
