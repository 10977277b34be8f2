//! Nodes: the memory all three indexes are made of.
//!
//! A node is a [`Head`], a header `H` of the index's own and some items `T`, in one piece of memory that is a
//! multiple of a cache line. It has two lives:
//!
//! * *private*: born in the transaction that is running. Only the writer knows it and may change it.
//! * *published*: reachable from a version. Nobody writes to it any more; readers share it without a lock.
//!
//! Which of the two follows from [`Head::birth`], the stamp of the transaction that made it: a private node's
//! birth is the running transaction's stamp. When a transaction replaces a published node, the node is put on
//! the list of the dead, and the version list (`versions.rs`) decides when no reader can reach it any more.
//!
//! Memory comes from slabs, which the pool takes from the global allocator, and gives back when they are
//! empty. A failed allocation is a value, [`OutOfMemory`]; freeing never allocates.
//!
//! A table that changes all the time frees nodes of a few sizes and wants the same sizes again. So each size
//! keeps its last freed nodes in a list of its own, the *stock*, whose nodes still count as given out by their
//! slabs: from there and to there a node goes without a look at its slab. [`Pool::tidy`] returns the stock.
//!
//! This file, `radix.rs` and `versions.rs` are where the crate's `unsafe` has its roots. The contract is the
//! same everywhere: *a node pointer may be read by whoever holds the version it is reachable from (a pin, a
//! snapshot, or the writer's own current version), and written by the writer while it is private.*

use alloc::alloc::{Layout, alloc, dealloc};
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr::NonNull;

use crate::error::OutOfMemory;

/// Nodes start at, and are a multiple of, a cache line; the low bits of a node pointer are free for a tag.
pub(super) const LINE: usize = 64;
const CLASSES: usize = 18;
/// Slabs grow with their class up to this size, so that a small table stays small.
const SLAB_BYTES: usize = 8 << 10;
const NONE: u32 = u32::MAX;
/// Free nodes of one size that stay in the stock: about what the versions between two reclaims leave behind.
const STOCK: usize = 64;
/// Where slabs have more free nodes of a size than so many and one in so many, freed ones go to their slabs and not to the
/// stock. What is taken then comes from the slabs that were full last, and the others become empty: so a size that has
/// had its time (the leaves of a table that grows all get larger at the same time) gives its memory back.
const SLACK: usize = 64;
const SLACK_PART: usize = 8;

/// What every node begins with.
#[repr(C)]
pub(super) struct Head {
    /// Stamp of the transaction that made the node.
    pub(super) birth: u64,
    slab: u32,
    len: u16,
    class: u8,
    /// The index's own; the hva index keeps a node's level here.
    pub(super) level: u8,
}

/// A pointer to a node with header `H` and items `T`.
pub(super) struct NodePtr<H, T> {
    raw: NonNull<u8>,
    shape: PhantomData<(*const H, *const T)>,
}

impl<H, T> Clone for NodePtr<H, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H, T> Copy for NodePtr<H, T> {}

impl<H, T> PartialEq for NodePtr<H, T> {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
    }
}

impl<H: Copy, T: Copy> NodePtr<H, T> {
    const HEADER_AT: usize = size_of::<Head>().next_multiple_of(align_of::<H>());
    const ITEMS_AT: usize = (Self::HEADER_AT + size_of::<H>()).next_multiple_of(align_of::<T>());

    /// Where in a node the item at `index` is.
    #[inline]
    pub(super) const fn item_at(index: usize) -> usize {
        Self::ITEMS_AT + index * size_of::<T>()
    }

    /// The bytes of a node of `capacity` items.
    const fn bytes(capacity: usize) -> usize {
        Self::item_at(capacity)
    }

    #[inline]
    pub(super) const fn from_raw(raw: NonNull<u8>) -> Self {
        Self { raw, shape: PhantomData }
    }

    #[inline]
    pub(super) const fn raw(self) -> NonNull<u8> {
        self.raw
    }

    /// # Safety
    /// The node is alive, and not written, for `'a`.
    #[inline]
    pub(super) unsafe fn head<'a>(self) -> &'a Head {
        // SAFETY: a node begins with its head; the caller keeps it alive and unwritten.
        unsafe { self.raw.cast().as_ref() }
    }

    /// # Safety
    /// The node is alive, and not written, for `'a`.
    #[inline]
    pub(super) unsafe fn header<'a>(self) -> &'a H {
        // SAFETY: the header was written when the node was made; the caller keeps it alive and unwritten.
        unsafe { self.raw.add(Self::HEADER_AT).cast().as_ref() }
    }

    /// # Safety
    /// The node is alive, and not written, for `'a`.
    #[inline]
    pub(super) unsafe fn items<'a>(self) -> &'a [T] {
        // SAFETY: `len` items have been written behind the header; the caller keeps them alive and unwritten.
        unsafe {
            let len = usize::from(self.head().len);
            core::slice::from_raw_parts(self.items_ptr(), len)
        }
    }

    /// The item at `index` without a bounds check.
    ///
    /// # Safety
    /// As [`items`](Self::items), and `index` is below the node's length.
    #[inline]
    pub(super) unsafe fn item<'a>(self, index: usize) -> &'a T {
        // SAFETY: the caller vouches for the index and for the node.
        unsafe { &*self.items_ptr().add(index) }
    }

    #[inline]
    fn items_ptr(self) -> *mut T {
        // SAFETY: every node is at least ITEMS_AT bytes long.
        unsafe { self.raw.add(Self::ITEMS_AT).cast().as_ptr() }
    }

    /// # Safety
    /// The node is alive and private, and nothing else refers to its items during `'a`.
    pub(super) unsafe fn items_mut<'a>(self) -> &'a mut [T] {
        // SAFETY: the caller is the writer and the node is private to it.
        unsafe { core::slice::from_raw_parts_mut(self.items_ptr(), usize::from(self.head().len)) }
    }

    /// # Safety
    /// The node is alive and private, and nothing else refers to its header during `'a`.
    pub(super) unsafe fn header_mut<'a>(self) -> &'a mut H {
        // SAFETY: the caller is the writer and the node is private to it.
        unsafe { self.raw.add(Self::HEADER_AT).cast().as_mut() }
    }

    /// How many items fit.
    ///
    /// # Safety
    /// The node is alive.
    pub(super) unsafe fn capacity(self) -> usize {
        // SAFETY: the caller keeps the node alive.
        let class = unsafe { self.head().class };
        (usize::from(class) * LINE - Self::ITEMS_AT) / size_of::<T>()
    }

    /// Puts an item before the one at `at`. There is room for it.
    ///
    /// # Safety
    /// The node is alive and private, and nothing else refers to it.
    pub(super) unsafe fn insert_item(self, at: usize, item: T) {
        // SAFETY: the node is private; the checks keep the copy inside of it.
        unsafe {
            let head: &mut Head = self.raw.cast().as_mut();
            let len = usize::from(head.len);
            assert!(at <= len && len < self.capacity(), "the item fits into the node");
            head.len += 1;
            let place = self.items_ptr().add(at);
            core::ptr::copy(place, place.add(1), len - at);
            place.write(item);
        }
    }

    /// Appends items. There is room for them.
    ///
    /// # Safety
    /// The node is alive and private, and nothing else refers to it; `items` lies outside of it.
    pub(super) unsafe fn append_items(self, items: &[T]) {
        // SAFETY: the node is private; the check keeps the copy inside of it.
        unsafe {
            let head: &mut Head = self.raw.cast().as_mut();
            let len = usize::from(head.len);
            assert!(len + items.len() <= self.capacity(), "the items fit into the node");
            core::ptr::copy_nonoverlapping(items.as_ptr(), self.items_ptr().add(len), items.len());
            #[expect(clippy::cast_possible_truncation, reason = "a node's items fit into 16 bits")]
            let more = items.len() as u16;
            head.len += more;
        }
    }

    /// Takes the item at `at` out.
    ///
    /// # Safety
    /// The node is alive and private, and nothing else refers to it.
    pub(super) unsafe fn remove_item(self, at: usize) {
        // SAFETY: the node is private; the checks keep the copy inside of it.
        unsafe {
            let head: &mut Head = self.raw.cast().as_mut();
            let len = usize::from(head.len);
            assert!(at < len, "the item is in the node");
            head.len -= 1;
            let place = self.items_ptr().add(at);
            core::ptr::copy(place.add(1), place, len - at - 1);
        }
    }

    /// Replaces the items by `items`, which must fit.
    ///
    /// # Safety
    /// The node is alive and private, and nothing else refers to it.
    pub(super) unsafe fn set_items(self, items: &[T]) {
        // SAFETY: the node is private; the capacity was checked; `items` lies outside of it.
        unsafe {
            assert!(items.len() <= self.capacity(), "items fit into the node");
            core::ptr::copy_nonoverlapping(items.as_ptr(), self.items_ptr(), items.len());
            let head: &mut Head = self.raw.cast().as_mut();
            head.len = u16::try_from(items.len()).unwrap_or(u16::MAX);
        }
    }
}

/// A node whose shape does not matter: what the lists of the dead hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct AnyNode(NonNull<u8>);

// SAFETY: the pointer is only followed by the writer (who frees the node) and by the drop of the shared state;
// both have exclusive access, whichever thread they are on.
unsafe impl Send for AnyNode {}

impl AnyNode {
    /// # Safety
    /// The node is alive.
    pub(super) unsafe fn birth(self) -> u64 {
        // SAFETY: a node begins with its head, whose birth is never written after the node was made.
        unsafe { self.0.cast::<Head>().as_ref().birth }
    }
}

struct Slab {
    memory: Option<NonNull<u8>>,
    class: u8,
    nodes: u32,
    live: u32,
    /// Nodes given out at least once; those behind have never been touched.
    used: u32,
    /// First free node, linked through the nodes' own memory.
    free: Option<NonNull<u8>>,
    previous: u32,
    next: u32,
}

const _: () = assert!(size_of::<Slab>() == 40, "there is one for every few KiB");

impl Slab {
    fn class(&self) -> usize {
        usize::from(self.class)
    }

    fn layout(&self) -> Layout {
        // SAFETY: it was a valid layout when the slab was made, see `grow`.
        unsafe { Layout::from_size_align_unchecked(self.nodes as usize * self.class() * LINE, LINE) }
    }
}

#[derive(Clone, Copy)]
struct Class {
    /// First slab with a free node.
    partial: u32,
    nodes: usize,
    /// Free nodes in slabs.
    free: usize,
    /// First node of the stock, linked as in a slab; and how many there are.
    stock: Option<NonNull<u8>>,
    stocked: usize,
}

impl Class {
    const EMPTY: Self = Self { partial: NONE, nodes: 0, free: 0, stock: None, stocked: 0 };
}

/// Where nodes come from.
pub(super) struct Pool {
    slabs: Vec<Slab>,
    /// Numbers in `slabs` that stand for no memory.
    vacant: Vec<u32>,
    classes: [Class; CLASSES],
    bytes: usize,
    /// For tests: how many node allocations succeed before one fails.
    #[cfg(test)]
    pub(super) fail_after: Option<usize>,
}

// SAFETY: a pool owns its slabs; nothing in it belongs to a thread.
unsafe impl Send for Pool {}

impl Pool {
    pub(super) const fn new() -> Self {
        Self {
            slabs: Vec::new(),
            vacant: Vec::new(),
            classes: [Class::EMPTY; CLASSES],
            bytes: 0,
            #[cfg(test)]
            fail_after: None,
        }
    }

    /// Bytes taken from the global allocator and not given back.
    pub(super) fn bytes(&self) -> usize {
        self.bytes + self.slabs.capacity() * size_of::<Slab>() + self.vacant.capacity() * size_of::<u32>()
    }

    /// Nodes that are alive: published, private or dead and not yet freed.
    pub(super) fn live_nodes(&self) -> usize {
        self.classes.iter().map(|class| class.nodes - class.free - class.stocked).sum()
    }

    /// Makes a node with room for at least `capacity` items.
    pub(super) fn alloc<H: Copy, T: Copy>(
        &mut self,
        birth: u64,
        header: H,
        items: &[T],
        capacity: usize,
    ) -> Result<NodePtr<H, T>, OutOfMemory> {
        const { assert!(align_of::<H>() <= LINE && align_of::<T>() <= LINE) };
        let class = NodePtr::<H, T>::bytes(capacity.max(items.len())).div_ceil(LINE);
        let (raw, slab) = self.take(class)?;
        let node = NodePtr::<H, T>::from_raw(raw);
        // SAFETY: `raw` points to `class * LINE` bytes of our own, aligned to a line, which hold the head, the
        // header and the items, as computed above.
        unsafe {
            let class = u8::try_from(class).unwrap_or(0);
            let len = u16::try_from(items.len()).unwrap_or(0);
            raw.cast().write(Head { birth, slab, len, class, level: 0 });
            raw.add(NodePtr::<H, T>::HEADER_AT).cast().write(header);
            core::ptr::copy_nonoverlapping(items.as_ptr(), node.items_ptr(), items.len());
        }
        Ok(node)
    }

    /// Makes a private copy of a node.
    ///
    /// # Safety
    /// The node is alive.
    pub(super) unsafe fn copy<H: Copy, T: Copy>(
        &mut self,
        birth: u64,
        node: NodePtr<H, T>,
    ) -> Result<NodePtr<H, T>, OutOfMemory> {
        // SAFETY: the caller keeps the node alive; a published node is not written.
        let (header, items, capacity, level) =
            unsafe { (*node.header(), node.items(), node.capacity(), node.head().level) };
        let copy = self.alloc(birth, header, items, capacity)?;
        // SAFETY: the copy is private.
        unsafe { copy.raw.cast::<Head>().as_mut().level = level };
        Ok(copy)
    }

    /// Sets the level of a private node.
    ///
    /// # Safety
    /// The node is alive and private.
    pub(super) unsafe fn set_level<H, T>(node: NodePtr<H, T>, level: u8) {
        // SAFETY: the node is private to the writer.
        unsafe { node.raw.cast::<Head>().as_mut().level = level };
    }

    /// Frees a node.
    ///
    /// # Safety
    /// The node came from this pool, is alive, and nobody can reach it any more.
    #[inline]
    pub(super) unsafe fn free(&mut self, node: AnyNode) {
        // SAFETY: the node is alive until the end of this function.
        let class = usize::from(unsafe { node.0.cast::<Head>().as_ref().class });
        let class = &mut self.classes[class];
        if class.stocked < STOCK && class.free <= SLACK + class.nodes / SLACK_PART {
            // SAFETY: the node's memory is ours again. The link takes the place of the birth; the head's other
            // fields stay, and say which slab the node is from when it is taken again.
            unsafe { node.0.cast::<Option<NonNull<u8>>>().write(class.stock) };
            class.stock = Some(node.0);
            class.stocked += 1;
        } else {
            // SAFETY: passed on.
            unsafe { self.free_to_slab(node) };
        }
    }

    /// Returns the stock to the slabs, and the slabs that are then empty to the allocator.
    pub(super) fn tidy(&mut self) {
        for class in 0..CLASSES {
            while let Some(node) = self.classes[class].stock {
                // SAFETY: a node in the stock links to the next one; nobody can reach it any more.
                unsafe {
                    self.classes[class].stock = node.cast::<Option<NonNull<u8>>>().read();
                    self.classes[class].stocked -= 1;
                    self.free_to_slab(AnyNode(node));
                }
            }
        }
    }

    /// # Safety
    /// As [`free`](Self::free); only the node's first word has been written since.
    #[inline(never)]
    unsafe fn free_to_slab(&mut self, node: AnyNode) {
        // SAFETY: the head is there but for its first word.
        let number = unsafe { (&raw const (*node.0.cast::<Head>().as_ptr()).slab).read() };
        let slab = &mut self.slabs[number as usize];
        let class = slab.class();
        // SAFETY: the node's memory is ours again and at least a line long.
        unsafe { node.0.cast::<Option<NonNull<u8>>>().write(slab.free) };
        let was_full = slab.free.is_none() && slab.used == slab.nodes;
        slab.free = Some(node.0);
        slab.live -= 1;
        let empty = slab.live == 0;
        let nodes = slab.nodes as usize;
        self.classes[class].free += 1;
        if was_full {
            self.link(number);
        }
        // One slab's worth of free nodes stays, so that a table that breathes does not call the allocator.
        if empty && self.classes[class].free > nodes + nodes.min(64) {
            self.release(number);
        }
    }

    #[inline]
    fn take(&mut self, class: usize) -> Result<(NonNull<u8>, u32), OutOfMemory> {
        assert!(class < CLASSES, "a node is at most {} bytes", (CLASSES - 1) * LINE);
        #[cfg(test)]
        if let Some(left) = &mut self.fail_after {
            *left = left.checked_sub(1).ok_or(OutOfMemory)?;
        }
        if let Some(node) = self.classes[class].stock {
            // SAFETY: a node in the stock links to the next one; the rest of its head is as it was.
            let slab = unsafe {
                self.classes[class].stock = node.cast::<Option<NonNull<u8>>>().read();
                (&raw const (*node.cast::<Head>().as_ptr()).slab).read()
            };
            self.classes[class].stocked -= 1;
            return Ok((node, slab));
        }
        self.take_from_slab(class)
    }

    #[inline(never)]
    fn take_from_slab(&mut self, class: usize) -> Result<(NonNull<u8>, u32), OutOfMemory> {
        if self.classes[class].partial == NONE {
            self.grow(class)?;
        }
        let number = self.classes[class].partial;
        let slab = &mut self.slabs[number as usize];
        let node = if let Some(node) = slab.free {
            // SAFETY: a free node's first word links to the next free one.
            slab.free = unsafe { node.cast::<Option<NonNull<u8>>>().read() };
            node
        } else {
            let memory = slab.memory.expect("a slab with free nodes has memory");
            let offset = slab.used as usize * class * LINE;
            slab.used += 1;
            // SAFETY: `used` was below `nodes`, so the node lies within the slab.
            unsafe { memory.add(offset) }
        };
        slab.live += 1;
        self.classes[class].free -= 1;
        if slab.free.is_none() && slab.used == slab.nodes {
            self.unlink(number);
        }
        Ok((node, number))
    }

    /// Adds a slab: as many nodes as the class has now, at least four, within [`SLAB_BYTES`].
    fn grow(&mut self, class: usize) -> Result<(), OutOfMemory> {
        let most = SLAB_BYTES / (class * LINE);
        let nodes = self.classes[class].nodes.clamp(4, most);
        let layout = Layout::from_size_align(nodes * class * LINE, LINE).map_err(|_| OutOfMemory)?;
        let number = match self.vacant.last() {
            Some(&number) => number,
            None => {
                // Room in `vacant` for every slab, so that giving one back cannot fail.
                self.slabs.try_reserve(1).map_err(|_| OutOfMemory)?;
                self.vacant.try_reserve(self.slabs.len() + 1).map_err(|_| OutOfMemory)?;
                u32::try_from(self.slabs.len()).map_err(|_| OutOfMemory)?
            }
        };
        let (Ok(class_in_slab), Ok(nodes_in_slab)) = (u8::try_from(class), u32::try_from(nodes)) else {
            return Err(OutOfMemory);
        };
        // SAFETY: the layout's size is not zero.
        let memory = NonNull::new(unsafe { alloc(layout) }).ok_or(OutOfMemory)?;
        let slab = Slab {
            memory: Some(memory),
            class: class_in_slab,
            nodes: nodes_in_slab,
            live: 0,
            used: 0,
            free: None,
            previous: NONE,
            next: NONE,
        };
        if self.vacant.pop().is_some() {
            self.slabs[number as usize] = slab;
        } else {
            self.slabs.push(slab);
        }
        self.bytes += layout.size();
        self.classes[class].nodes += nodes;
        self.classes[class].free += nodes;
        self.link(number);
        Ok(())
    }

    fn release(&mut self, number: u32) {
        self.unlink(number);
        let slab = &mut self.slabs[number as usize];
        let memory = slab.memory.take().expect("an empty slab still has its memory");
        let (layout, class, nodes) = (slab.layout(), slab.class(), slab.nodes as usize);
        // SAFETY: the memory was allocated with this layout, and none of its nodes is alive.
        unsafe { dealloc(memory.as_ptr(), layout) };
        self.bytes -= layout.size();
        self.classes[class].nodes -= nodes;
        self.classes[class].free -= nodes;
        self.vacant.push(number);
    }

    fn link(&mut self, number: u32) {
        let class = self.slabs[number as usize].class();
        let first = self.classes[class].partial;
        self.slabs[number as usize].previous = NONE;
        self.slabs[number as usize].next = first;
        if first != NONE {
            self.slabs[first as usize].previous = number;
        }
        self.classes[class].partial = number;
    }

    fn unlink(&mut self, number: u32) {
        let slab = &self.slabs[number as usize];
        let (previous, next, class) = (slab.previous, slab.next, slab.class());
        match previous {
            NONE => self.classes[class].partial = next,
            _ => self.slabs[previous as usize].next = next,
        }
        if next != NONE {
            self.slabs[next as usize].previous = previous;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for slab in &self.slabs {
            if let Some(memory) = slab.memory {
                // SAFETY: the pool is dropped when nobody can reach a node any more; the layout is the slab's.
                unsafe { dealloc(memory.as_ptr(), slab.layout()) };
            }
        }
    }
}

/// What the indexes write with: the pool, the running transaction's stamp, and the nodes it has replaced.
pub(super) struct Arena {
    pub(super) pool: Pool,
    /// The running transaction's stamp; nodes with this birth are private.
    pub(super) stamp: u64,
    /// Published nodes that the running transaction has replaced.
    pub(super) dead: Vec<AnyNode>,
    /// Where private nodes go that turn out to have been published for nothing.
    pub(super) buried: Vec<AnyNode>,
    /// How many private nodes there are.
    pub(super) private: usize,
    /// Private nodes that are let go were published after all: they are dead, not free.
    pub(super) burying: bool,
}

impl Arena {
    pub(super) const fn new(stamp: u64) -> Self {
        Self { pool: Pool::new(), stamp, dead: Vec::new(), buried: Vec::new(), private: 0, burying: false }
    }

    pub(super) fn alloc<H: Copy, T: Copy>(
        &mut self,
        header: H,
        items: &[T],
        capacity: usize,
    ) -> Result<NodePtr<H, T>, OutOfMemory> {
        let node = self.pool.alloc(self.stamp, header, items, capacity)?;
        self.private += 1;
        Ok(node)
    }

    /// # Safety
    /// The node is alive.
    pub(super) unsafe fn is_private<H: Copy, T: Copy>(&self, node: NodePtr<H, T>) -> bool {
        // SAFETY: passed on.
        unsafe { node.head().birth == self.stamp }
    }

    /// The node itself if it is private, else a private copy; the original is then among the dead.
    /// The caller links the result in the original's place at once.
    ///
    /// # Safety
    /// The node is alive and reachable from the working version.
    pub(super) unsafe fn privately<H: Copy, T: Copy>(
        &mut self,
        node: NodePtr<H, T>,
    ) -> Result<NodePtr<H, T>, OutOfMemory> {
        // SAFETY: passed on.
        if unsafe { self.is_private(node) } {
            return Ok(node);
        }
        self.dead.try_reserve(1).map_err(|_| OutOfMemory)?;
        // SAFETY: passed on.
        let copy = unsafe { self.pool.copy(self.stamp, node)? };
        self.private += 1;
        self.dead.push(AnyNode(node.raw()));
        Ok(copy)
    }

    /// Makes sure that the next `n` calls of [`discard`](Self::discard) cannot fail.
    pub(super) fn reserve_dead(&mut self, n: usize) -> Result<(), OutOfMemory> {
        self.dead.try_reserve(n).map_err(|_| OutOfMemory)
    }

    /// The working version no longer needs the node: frees it if it is private, else notes it as dead.
    /// Room for it has been reserved with [`reserve_dead`](Self::reserve_dead).
    ///
    /// # Safety
    /// The node is alive and was reachable from the working version until now.
    pub(super) unsafe fn discard<H: Copy, T: Copy>(&mut self, node: NodePtr<H, T>) {
        // SAFETY: passed on; a private node is known to nobody else.
        unsafe {
            if self.is_private(node) {
                self.free_private(node);
            } else {
                debug_assert!(self.dead.len() < self.dead.capacity(), "room for the dead is reserved");
                self.dead.push(AnyNode(node.raw()));
            }
        }
    }

    /// Frees a private node at once, on the way out of a failed or abandoned change.
    ///
    /// # Safety
    /// The node is alive, private, and nothing refers to it any more.
    pub(super) unsafe fn free_private<H: Copy, T: Copy>(&mut self, node: NodePtr<H, T>) {
        if self.burying {
            self.buried.push(AnyNode(node.raw()));
            return;
        }
        self.private -= 1;
        // SAFETY: passed on.
        unsafe { self.pool.free(AnyNode(node.raw())) };
    }

    /// Whether a private node has room for one more item.
    ///
    /// # Safety
    /// The node is alive.
    pub(super) unsafe fn has_room<H: Copy, T: Copy>(&self, node: NodePtr<H, T>) -> bool {
        // SAFETY: passed on.
        unsafe { self.is_private(node) && node.items().len() < node.capacity() }
    }

    /// Puts an item before the one at `at`: in the node itself if it is private and has room, else in a copy
    /// that has, in whose favour the node is discarded. The caller links the result at once.
    ///
    /// # Safety
    /// The node is alive and belongs to the working version.
    pub(super) unsafe fn with_item<H: Copy, T: Copy>(
        &mut self,
        node: NodePtr<H, T>,
        at: usize,
        item: T,
    ) -> Result<NodePtr<H, T>, OutOfMemory> {
        // SAFETY: passed on; a node is written only if it is private; the copy is another node.
        unsafe {
            if self.has_room(node) {
                node.insert_item(at, item);
                return Ok(node);
            }
            self.reserve_dead(1)?;
            let items = node.items();
            let copy = self.alloc(*node.header(), &items[..at], items.len() + 1)?;
            copy.append_items(&[item]);
            copy.append_items(&items[at..]);
            self.discard(node);
            Ok(copy)
        }
    }

    /// Takes the item at `at` out, of the node itself if it is private, else of a copy, in whose favour the node
    /// is discarded. The caller links the result at once.
    ///
    /// # Safety
    /// The node is alive and belongs to the working version.
    pub(super) unsafe fn without_item<H: Copy, T: Copy>(
        &mut self,
        node: NodePtr<H, T>,
        at: usize,
    ) -> Result<NodePtr<H, T>, OutOfMemory> {
        // SAFETY: passed on; a node is written only if it is private; the copy is another node.
        unsafe {
            if self.is_private(node) {
                node.remove_item(at);
                return Ok(node);
            }
            self.reserve_dead(1)?;
            let items = node.items();
            let copy = self.alloc(*node.header(), &items[..at], items.len() - 1)?;
            copy.append_items(&items[at + 1..]);
            self.discard(node);
            Ok(copy)
        }
    }

    /// Makes sure that every private node could be put on the list of the dead.
    pub(super) fn reserve_burial(&mut self) -> Result<(), OutOfMemory> {
        let private = self.private;
        self.buried.try_reserve(private).map_err(|_| OutOfMemory)
    }
}
