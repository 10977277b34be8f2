//! The way to the entries, which lie in guest memory.

use memslot::Gpa;

use super::entry::EntrySize;

/// What became of a compare-exchange.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Exchange {
    /// The entry is the new one.
    Done,
    /// It was another one than expected, and is as it was.
    Changed,
    /// It lies in a read-only slot, or in none: nothing can be written.
    NotWritable,
}

/// Reaches the entries of a guest's page tables: through the slots of the address space that the virtual processor is in.
///
/// Other virtual processors, and devices, write guest memory meanwhile. An entry is read and exchanged whole; its address
/// is a multiple of its size.
pub trait GuestTables {
    /// What can go wrong with the host's memory, which is no fault of the guest.
    type Error;

    /// The entry at `gpa`, one of four bytes with zeros above; `None` where there is no slot.
    ///
    /// # Errors
    /// The walk ends with it.
    fn read(&self, gpa: Gpa, size: EntrySize) -> Result<Option<u64>, Self::Error>;

    /// Replaces the entry at `gpa`, if it is still `old`, by `new`: in the memory that the slot names *now*, in one
    /// atomic step; then marks the page in the dirty log, as with all writes: who marks first may be harvested before the write.
    ///
    /// # Errors
    /// The walk ends with it.
    fn exchange(&self, gpa: Gpa, size: EntrySize, old: u64, new: u64) -> Result<Exchange, Self::Error>;
}

impl<T: GuestTables + ?Sized> GuestTables for &T {
    type Error = T::Error;

    fn read(&self, gpa: Gpa, size: EntrySize) -> Result<Option<u64>, Self::Error> {
        (**self).read(gpa, size)
    }

    fn exchange(&self, gpa: Gpa, size: EntrySize, old: u64, new: u64) -> Result<Exchange, Self::Error> {
        (**self).exchange(gpa, size, old, new)
    }
}
