//! The slot table: one writer, any number of readers, and nobody waits.
//!
//! [`SlotTable`] is the writer. It is not shared: whoever has it mutably may change the table, and the borrow
//! checker is the lock (put it into a mutex where several threads write). Every change publishes a new, complete
//! [`View`]; an old one lives for as long as somebody looks at it.
//!
//! Readers hold a version in one of three ways:
//!
//! | | taken by | costs | may be held | may move to another thread |
//! |---|---|---|---|---|
//! | [`Pinned`] | [`Reader::pin`] | an exchange in a private cache line | any time; meant for short | with its reader |
//! | [`Guard`] | [`Reader::into_guard`] | the same, and the reader until it comes back | for ever | yes, and be shared |
//! | [`Snapshot`] | [`Reader::snapshot`], [`Pinned::snapshot`], [`SlotTable::snapshot`] | an atomic increment of a shared word | for ever | yes, and be shared |
//!
//! All keep exactly the memory of their version alive and never delay the writer.
//!
//! What is where: `view.rs` answers questions, `reader.rs` holds versions, `attachment.rs` is what a version carries
//! besides slots, `transaction.rs` makes the next version, three indexes
//! (`gfn_index`, `hva_index`, `id_index.rs`) are made of nodes (`node.rs`), and `versions.rs` publishes
//! versions and decides when an old one can go.

mod attachment;
mod gfn_index;
mod hva_index;
mod id_index;
mod node;
mod pool;
mod radix;
mod reader;
mod search;
mod transaction;
mod versions;
mod view;

#[cfg(all(test, not(loom)))]
mod tests;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::cell::RefCell;
use core::ptr::NonNull;

pub(crate) use self::attachment::Attachments;
pub use self::attachment::{AttachmentKey, MAX_ATTACHMENTS};
pub use self::reader::{Guard, Handle, Holder, Pinned, Reader, Snapshot};
pub use self::transaction::Transaction;
pub use self::view::{HvaHit, SlotPiece, Translation, View};

use self::node::{AnyNode, Arena};
use self::transaction::{Lists, abandon};
use self::versions::{Held, Owner, Version, VersionList, share};
use crate::addr::{Gfn, PageSize};
use crate::error::{LimitsError, OutOfMemory, Reason, TransactionError};
use crate::listener::{Listener, ListenerError, Piece, Stage, Update, cut};
use crate::slot::{AddressSpaceId, MAX_PAGES_PER_SLOT, MAX_SLOTS, SlotFlags, SlotId, SlotSpec};

/// The most address spaces a table can have.
pub const MAX_ADDRESS_SPACES: usize = 4;

/// After this many generations the writer looks for versions that nobody holds any more …
const RECLAIM_EVERY: usize = 16;
/// … or sooner: this many nodes left behind count as a generation, so that a large transaction finds the memory of
/// the one before it, and not new memory.
const NODES_A_GENERATION: usize = 16;

/// What a table may hold. Nothing is allocated for a limit; the default is KVM's on x86-64.
///
/// ```
/// use memslot::{Limits, SlotTable};
/// let table = SlotTable::new(Limits { slots: 4_000_000, ..Limits::default() })?;
/// assert!(table.stats().bytes < 64 << 10);
/// # Ok::<(), memslot::LimitsError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// The size of a page; 4 KiB.
    pub page_size: PageSize,
    /// How many address spaces there are; 2 (normal and SMM), at most [`MAX_ADDRESS_SPACES`].
    pub address_spaces: u8,
    /// Slot ids of an address space are below this; 32764, at most [`MAX_SLOTS`].
    pub slots: u32,
    /// The most pages a slot can have; 2^31 - 1, at most [`MAX_PAGES_PER_SLOT`].
    pub pages_per_slot: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { page_size: PageSize::K4, address_spaces: 2, slots: 32764, pages_per_slot: MAX_PAGES_PER_SLOT }
    }
}

/// What a table costs at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes of heap memory held for indexes, slots, versions and lists, free reserves included.
    pub bytes: usize,
    /// Nodes of all indexes of all versions that are kept.
    pub nodes: usize,
    /// Versions that are kept: the current one, those somebody holds, and those not yet looked at.
    pub versions: usize,
    /// Nodes that the current version no longer has.
    pub dead_nodes: usize,
}

/// What only the writer uses. It lives with what is shared, because nodes outlive the table while somebody has
/// a snapshot.
struct Writer {
    versions: VersionList<View, AnyNode>,
    arena: Arena,
    lists: Lists,
    pieces: Vec<Piece>,
    until_reclaim: usize,
}

type Shared = Owner<View, Writer>;

/// The table of a guest's memory slots, and the only place where it changes. See the [module](self).
///
/// ```
/// use memslot::*;
///
/// let mut table = SlotTable::new(Limits::default())?;
/// let ram = SlotSpec {
///     address_space: AddressSpaceId::NORMAL,
///     id: SlotId::new(0),
///     gfns: GfnRange::with_len(Gfn::new(0), 256).unwrap(),
///     backing: Backing::Host { hva: Hva::new(0x7f00_0000_0000) },
///     flags: SlotFlags::empty(),
/// };
/// table.create(ram)?;
///
/// // The last 16 pages become read-only, in one step, and stay where they are in the host.
/// let before = table.snapshot();
/// table.transaction(|tx| {
///     tx.split(ram.address_space, ram.id, Gfn::new(240), SlotId::new(1))?;
///     tx.set_read_only(ram.address_space, SlotId::new(1), true)
/// })?;
/// let at = |view: &View| view.translate(ram.address_space, Gpa::new(0xf_0000)).unwrap();
/// assert_eq!(at(table.view()).hva, at(&before).hva);
/// assert_eq!(at(table.view()).flags, SlotFlags::READONLY);
/// assert_eq!(at(&before).flags, SlotFlags::empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SlotTable {
    shared: Shared,
    listeners: Vec<Box<dyn Listener + Send>>,
    attachment_keys: usize,
}

impl SlotTable {
    /// An empty table, at generation 0.
    ///
    /// # Errors
    /// [`LimitsError`] where the limits are beyond what a table can do.
    pub fn new(limits: Limits) -> Result<Self, LimitsError> {
        Self::starting_at(limits, 0)
    }

    /// An empty table at a generation of the caller's choice, so that tests can go through the wrap.
    pub(crate) fn starting_at(limits: Limits, generation: u64) -> Result<Self, LimitsError> {
        if !(1..=MAX_ADDRESS_SPACES).contains(&usize::from(limits.address_spaces)) {
            return Err(LimitsError::AddressSpaces { asked: limits.address_spaces, max: MAX_ADDRESS_SPACES });
        }
        if limits.slots > MAX_SLOTS {
            return Err(LimitsError::Slots { asked: limits.slots, max: MAX_SLOTS });
        }
        if !(1..=MAX_PAGES_PER_SLOT).contains(&limits.pages_per_slot) {
            let asked = limits.pages_per_slot;
            return Err(LimitsError::PagesPerSlot { asked, max: MAX_PAGES_PER_SLOT });
        }
        let mut versions = VersionList::new();
        versions.reserve(1)?;
        let mut shared = share(Writer {
            versions,
            arena: Arena::new(generation.wrapping_add(1)),
            lists: Lists::new(),
            pieces: Vec::new(),
            until_reclaim: RECLAIM_EVERY,
        })?;
        let (owner, writer) = split(&mut shared);
        let empty = || View::empty(limits, generation);
        writer.versions.publish(owner, empty, generation, &mut Vec::new());
        Ok(Self { shared, listeners: Vec::new(), attachment_keys: 0 })
    }

    /// The current version.
    #[inline]
    #[must_use]
    pub fn view(&self) -> &View {
        // SAFETY: publishing needs `&mut self`.
        unsafe { &self.shared.current().payload }
    }

    /// The current version, to be kept.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        // SAFETY: publishing needs `&mut self`, so the current version stays during the call.
        unsafe { Snapshot::new(Held::new(&self.shared, NonNull::from(self.shared.current()))) }
    }

    /// A handle for other threads to make readers from.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle::new(self.shared.clone())
    }

    /// A reader.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn reader(&self) -> Result<Reader, OutOfMemory> {
        self.handle().reader()
    }

    /// Adds a listener. It hears of every later change, after those added before it.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn add_listener(&mut self, listener: Box<dyn Listener + Send>) -> Result<(), OutOfMemory> {
        self.listeners.try_reserve(1).map_err(|_| OutOfMemory)?;
        self.listeners.push(listener);
        Ok(())
    }

    /// A key for something that versions of this table shall carry; `None` when all [`MAX_ATTACHMENTS`] are
    /// given away.
    pub fn attachment_key<T: Any + Send + Sync>(&mut self) -> Option<AttachmentKey<T>> {
        let key = AttachmentKey::numbered(self.attachment_keys)?;
        self.attachment_keys += 1;
        Some(key)
    }

    /// Publishes the current version once more, as a new generation, with `value` attached. Returns the new
    /// generation; listeners hear nothing, because no slot has changed.
    ///
    /// A listener that comes to a table that has slots already attaches what it knows of them this way.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn attach<T: Any + Send + Sync>(
        &mut self,
        key: AttachmentKey<T>,
        value: Arc<T>,
    ) -> Result<u64, OutOfMemory> {
        let (owner, writer) = split(&mut self.shared);
        writer.versions.reserve(1)?;
        // SAFETY: this is the one writer; the version is not used after the next one is published.
        let mut next = unsafe { &owner.current().payload }.fork(writer.arena.stamp);
        next.attachments.set(key, value);
        let generation = next.generation;
        writer.publish(owner, || next, generation);
        writer.reclaim_if_due(owner);
        Ok(generation)
    }

    /// What the table costs at the moment.
    #[must_use]
    pub fn stats(&self) -> Stats {
        // SAFETY: this is the one writer, and it has nothing mutably while `&self` lives.
        let writer = unsafe { self.shared.writer_ref() };
        let lists = writer.lists.bytes() + writer.pieces.capacity() * size_of::<Piece>();
        Stats {
            bytes: writer.arena.pool.bytes()
                + writer.versions.bytes()
                + lists
                + writer.arena.dead.capacity() * size_of::<AnyNode>(),
            nodes: writer.arena.pool.live_nodes(),
            versions: writer.versions.len(),
            dead_nodes: writer.versions.dead(),
        }
    }

    /// Lets go of every version that nobody holds any more. The table does so by itself every few generations.
    pub fn reclaim(&mut self) {
        let (owner, writer) = split(&mut self.shared);
        writer.reclaim(owner);
        writer.arena.pool.tidy();
    }

    /// Creates one slot. Returns the new generation.
    ///
    /// # Errors
    /// As [`Transaction::create`], and [`Reason::Overlap`], [`Reason::Listener`].
    pub fn create(&mut self, spec: SlotSpec) -> Result<u64, TransactionError> {
        single(self.transaction(|tx| tx.create(spec)))
    }

    /// Deletes one slot. Returns the new generation.
    ///
    /// # Errors
    /// As [`Transaction::delete`], and [`Reason::Listener`].
    pub fn delete(&mut self, space: AddressSpaceId, id: SlotId) -> Result<u64, TransactionError> {
        single(self.transaction(|tx| tx.delete(space, id)))
    }

    /// Moves one slot. Returns the new generation.
    ///
    /// # Errors
    /// As [`Transaction::move_to`], and [`Reason::Overlap`], [`Reason::Listener`].
    pub fn move_to(&mut self, space: AddressSpaceId, id: SlotId, to: Gfn) -> Result<u64, TransactionError> {
        single(self.transaction(|tx| tx.move_to(space, id, to)))
    }

    /// Gives one slot other flags. Returns the new generation.
    ///
    /// # Errors
    /// As [`Transaction::set_flags`], and [`Reason::Listener`].
    pub fn set_flags(
        &mut self,
        space: AddressSpaceId,
        id: SlotId,
        flags: SlotFlags,
    ) -> Result<u64, TransactionError> {
        single(self.transaction(|tx| tx.set_flags(space, id, flags)))
    }

    /// Runs `operations` and publishes what they did as one generation, or does nothing at all.
    ///
    /// Returns the generation of the table afterwards; a transaction that changes nothing publishes nothing.
    ///
    /// # Errors
    /// The error of the closure, or of the first operation that failed; [`Reason::Overlap`] where two slots
    /// would cover the same frame in the end; [`Reason::Listener`]; [`Reason::OutOfMemory`]. In every case all
    /// is as it was before.
    pub fn transaction(
        &mut self,
        operations: impl FnOnce(&mut Transaction<'_>) -> Result<(), TransactionError>,
    ) -> Result<u64, TransactionError> {
        let (owner, writer) = split(&mut self.shared);
        // SAFETY: this is the one writer; `base` is not used after the next version is published, except
        // while that version's successor cannot be reclaimed (below).
        let base = unsafe { &owner.current().payload };
        let Writer { versions, arena, lists, pieces, until_reclaim } = writer;
        arena.private = 0;
        let mut transaction = Transaction::new(base, arena, lists);
        operations(&mut transaction)?;
        if !transaction.finish()? {
            return Ok(base.generation);
        }
        prepare(&mut transaction, base, versions, pieces, &mut self.listeners)?;
        let (next, arena, _) = transaction.parts();
        let generation = next.generation;
        publish(owner, || next.fork(generation), generation, versions, arena, until_reclaim);
        transaction.published();
        let committed = if self.listeners.is_empty() {
            Ok(())
        } else {
            // SAFETY: as above; versions are reclaimed further down only.
            let after = Published { owner, version: unsafe { owner.current() } };
            let listeners = &mut self.listeners[..];
            Following { writer, listeners, before: base, after, reached: 0, followed: false }.commit()
        };
        writer.reclaim_if_due(owner);
        committed.map(|()| generation)
    }
}

/// The error of a transaction of one operation need not say which.
fn single(result: Result<u64, TransactionError>) -> Result<u64, TransactionError> {
    result.map_err(|error| TransactionError { operation: None, ..error })
}

/// The writer's part, and what it shares with the readers.
fn split(shared: &mut Shared) -> (&Shared, &mut Writer) {
    // SAFETY: only `SlotTable` has a `Shared` mutably (readers and handles never call this), and there is one.
    let writer = unsafe { shared.writer() };
    (shared, writer)
}

impl Writer {
    fn publish(&mut self, owner: &Shared, next: impl FnOnce() -> View, generation: u64) {
        let Self { versions, arena, until_reclaim, .. } = self;
        publish(owner, next, generation, versions, arena, until_reclaim);
    }

    /// Publishes what was before, as a new generation: `after` did not come to be.
    ///
    /// The nodes that the step to `after` left behind live again, so they are taken off the list of the dead;
    /// those that it made are dead now.
    fn take_back(&mut self, owner: &Shared, base: &View, after: &View) {
        self.versions.revive_last();
        self.arena.stamp = after.generation;
        self.arena.burying = true;
        abandon(after, &mut self.arena);
        self.arena.burying = false;
        core::mem::swap(&mut self.arena.dead, &mut self.arena.buried);
        let generation = after.generation.wrapping_add(1);
        self.publish(owner, || base.fork(generation), generation);
    }

    /// Reclaims every few generations.
    fn reclaim_if_due(&mut self, owner: &Shared) {
        if self.until_reclaim == 0 {
            self.reclaim(owner);
        }
    }

    fn reclaim(&mut self, owner: &Shared) {
        self.until_reclaim = RECLAIM_EVERY;
        let pool = &mut self.arena.pool;
        // SAFETY: nodes on a list of the dead are alive until they are freed here, and freed once nobody holds
        // a version that has them.
        self.versions.reclaim(owner, |node| unsafe { node.birth() }, |node| unsafe { pool.free(node) });
    }
}

/// Publishes the version that `next` makes, in the place that was reserved for it.
fn publish(
    owner: &Shared,
    next: impl FnOnce() -> View,
    generation: u64,
    versions: &mut VersionList<View, AnyNode>,
    arena: &mut Arena,
    until_reclaim: &mut usize,
) {
    let generations = 1 + arena.dead.len() / NODES_A_GENERATION;
    *until_reclaim = until_reclaim.saturating_sub(generations);
    versions.publish(owner, next, generation, &mut arena.dead);
    arena.stamp = generation.wrapping_add(1);
}

/// Reserves what publishing needs, and lets the listeners do so. Unless the version is published after that, it goes with
/// the transaction, also when a listener panics.
fn prepare(
    transaction: &mut Transaction<'_>,
    before: &View,
    versions: &mut VersionList<View, AnyNode>,
    pieces: &mut Vec<Piece>,
    listeners: &mut [Box<dyn Listener + Send>],
) -> Result<(), TransactionError> {
    if listeners.is_empty() {
        versions.reserve(1)?;
        return Ok(());
    }
    // One more, should the change be taken back. Its nodes go to the list of the dead, which must not fail then.
    versions.reserve(2)?;
    let (after, arena, lists) = transaction.parts();
    cut(&lists.changes, pieces)?;
    arena.reserve_burial()?;
    let attachments = RefCell::new(after.attachments.clone());
    let stage = Stage::Preparing(&attachments);
    let update = Update { before, after, slots: &lists.changes, pieces, stage };
    let mut prepared = Prepared { listeners, update: &update, done: 0 };
    while let Some(listener) = prepared.listeners.get_mut(prepared.done) {
        if let Err(error) = listener.prepare(&update) {
            return Err(refused(&**listener, error));
        }
        prepared.done += 1;
    }
    prepared.done = 0;
    drop(prepared);
    after.attachments = attachments.into_inner();
    Ok(())
}

/// Listeners that have prepared. Unless all do, they hear that it was for nothing, also when one panics.
struct Prepared<'u> {
    listeners: &'u mut [Box<dyn Listener + Send>],
    update: &'u Update<'u>,
    done: usize,
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        for prepared in self.listeners[..self.done].iter_mut().rev() {
            prepared.abort(self.update);
        }
    }
}

/// The error that names the listener; without its name where there is no memory for a copy.
#[cold]
fn refused(listener: &dyn Listener, error: ListenerError) -> TransactionError {
    let mut name = String::new();
    if name.try_reserve_exact(listener.name().len()).is_ok() {
        name.push_str(listener.name());
    }
    Reason::Listener { listener: name, error }.into()
}

/// The current version, while the writer waits for the listeners: nobody counts it until one of them keeps it.
#[derive(Clone, Copy)]
pub(crate) struct Published<'t> {
    owner: &'t Shared,
    version: &'t Version<View>,
}

impl Published<'_> {
    pub(crate) fn snapshot(&self) -> Snapshot {
        // SAFETY: the version is the owner's, and stays: the writer reclaims nothing as long as this borrows it.
        Snapshot::new(unsafe { Held::new(self.owner, NonNull::from(self.version)) })
    }
}

/// A published version on its way through the listeners. Unless all follow, it is taken back, also when one panics.
struct Following<'t> {
    writer: &'t mut Writer,
    listeners: &'t mut [Box<dyn Listener + Send>],
    before: &'t View,
    after: Published<'t>,
    /// Those before this one have followed.
    reached: usize,
    followed: bool,
}

impl Following<'_> {
    fn commit(mut self) -> Result<(), TransactionError> {
        let Self { writer, listeners, before, after, reached, followed } = &mut self;
        let (slots, pieces, stage) = (&writer.lists.changes, &writer.pieces, Stage::Published(*after));
        let update = Update { before, after: &after.version.payload, slots, pieces, stage };
        for listener in &mut **listeners {
            if let Err(error) = listener.commit(&update) {
                return Err(refused(&**listener, error));
            }
            *reached += 1;
        }
        *followed = true;
        Settling { waiting: listeners.iter_mut(), update: &update }.run();
        Ok(())
    }
}

/// Listeners that have not heard yet that all have followed. They do, also when one of them panics.
struct Settling<'u> {
    waiting: core::slice::IterMut<'u, Box<dyn Listener + Send>>,
    update: &'u Update<'u>,
}

impl Settling<'_> {
    fn run(&mut self) {
        for listener in &mut self.waiting {
            listener.settled(self.update);
        }
    }
}

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        self.run();
    }
}

impl Drop for Following<'_> {
    fn drop(&mut self) {
        if !self.followed {
            self.take_back();
        }
    }
}

impl Following<'_> {
    #[cold]
    fn take_back(&mut self) {
        let Self { writer, listeners, before, after, reached, .. } = self;
        let (slots, pieces, stage) = (&writer.lists.changes, &writer.pieces, Stage::Published(*after));
        let update = Update { before, after: &after.version.payload, slots, pieces, stage };
        // The one between has failed, and has undone its own part.
        for waiting in listeners.iter_mut().skip(*reached + 1).rev() {
            waiting.abort(&update);
        }
        for committed in listeners[..*reached].iter_mut().rev() {
            committed.undo(&update);
        }
        writer.take_back(after.owner, before, &after.version.payload);
    }
}

impl core::fmt::Debug for SlotTable {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.view().fmt(f)
    }
}
