//! Where nodes come from.
//!
//! Memory comes from slabs, which the pool takes from the global allocator, and gives back when they are
//! empty. A failed allocation is a value, [`OutOfMemory`]; freeing never allocates.
//!
//! A table that changes all the time frees nodes of a few sizes and wants the same sizes again. So each size
//! keeps its last freed nodes in a list of its own, the *stock*, whose nodes still count as given out by their
//! slabs: from there and to there a node goes without a look at its slab. [`Pool::tidy`] returns the stock.

use alloc::alloc::{Layout, alloc, dealloc};
use alloc::vec::Vec;
use core::ptr::NonNull;

use super::node::{AnyNode, Head, LINE, NodePtr};
use crate::error::OutOfMemory;

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
