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
//! Their memory comes from the [pool](super::pool).
//!
//! This file, `pool.rs`, `radix.rs` and `versions.rs` are where the crate's `unsafe` has its roots. The contract is the
//! same everywhere: *a node pointer may be read by whoever holds the version it is reachable from (a pin, a
//! snapshot, or the writer's own current version), and written by the writer while it is private.*

use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr::NonNull;

use super::pool::Pool;
use crate::error::OutOfMemory;

/// Nodes start at, and are a multiple of, a cache line; the low bits of a node pointer are free for a tag.
pub(super) const LINE: usize = 64;

/// What every node begins with.
#[repr(C)]
pub(super) struct Head {
    /// Stamp of the transaction that made the node.
    pub(super) birth: u64,
    pub(super) slab: u32,
    pub(super) len: u16,
    pub(super) class: u8,
    /// The index's own; the hva index keeps a node's level here.
    pub(super) level: u8,
}

/// A pointer to a node with header `H` and items `T`.
pub(super) struct NodePtr<H, T> {
    pub(super) raw: NonNull<u8>,
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
    pub(super) const HEADER_AT: usize = size_of::<Head>().next_multiple_of(align_of::<H>());
    const ITEMS_AT: usize = (Self::HEADER_AT + size_of::<H>()).next_multiple_of(align_of::<T>());

    /// Where in a node the item at `index` is.
    #[inline]
    pub(super) const fn item_at(index: usize) -> usize {
        Self::ITEMS_AT + index * size_of::<T>()
    }

    /// The bytes of a node of `capacity` items.
    pub(super) const fn bytes(capacity: usize) -> usize {
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
    pub(super) fn items_ptr(self) -> *mut T {
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
pub(super) struct AnyNode(pub(super) NonNull<u8>);

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
