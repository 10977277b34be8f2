//! The guest's side of shadow paging: what the guest's own page tables say, as its processor would read them.
//!
//! Nothing in here knows of shadow pages. [`GuestPaging`] is what the control registers say about paging,
//! [`GuestTables`] the way to the entries in guest memory, and [`walk`] the processor's walk: it either finds the page,
//! having set the accessed and dirty bits, or says with which error code the processor would have raised its page
//! fault.
//!
//! The sources are the Intel manual, volume 3, chapter 4 ("Paging"), and the AMD manual, volume 2, chapter 5 ("Page
//! Translation and Protection"). Where the two differ, [`Processor`] says which one the guest believes to run on.
//!
//! # The order of things
//!
//! From the root downwards, at each level: the entry is read; if it is not present, or has a reserved bit set, the walk
//! ends with that fault, whatever the entries above allow. Only after the last entry is it asked whether all of them
//! together permit the access. A walk that ends with a fault sets no accessed bit anywhere: processors may do so, need
//! not, and differ.
//! Then the accessed bits are set from the root downwards, and with the last the dirty bit, each by a compare-exchange
//! against the entry as it was read. An entry that has changed meanwhile starts the walk again, so what a finished walk
//! has found was in the tables at some time after it began, entry by entry. It is *not* one moment's view of all
//! of them, nor is a processor's.
//!
//! # What the guest's memory slots mean for its tables
//!
//! * An entry that lies in no slot cannot be read. The walk ends there and says so ([`NoPage::NoTable`]), with the fault that KVM
//!   gives the guest then: that of an entry that is not present. (A processor would read what nobody drives on its bus.)
//! * An entry in a read-only slot keeps its accessed and dirty bits as they are: a processor's write to it would be
//!   lost. The walk succeeds.
//! * An entry's accessed and dirty bits are written through [`GuestTables::exchange`], which marks the page in the dirty
//!   log as any other write of the guest.
//!
//! # Addresses
//!
//! An address that is not canonical never gets to a walk: the processor raises a general-protection fault (a stack fault
//! for the stack) before, and `INVLPG` does nothing. [`GuestPaging::is_canonical`] tells; [`walk`] uses the bits
//! that the tables decide about and no others. Without long mode that is the lower 32 bits.
//!
//! # What there is not
//!
//! Protection keys (`CR4.PKE`, `CR4.PKS`), shadow stacks (`CR4.CET`) and linear-address masking: a guest must not be told
//! that it has them.

mod access;
mod entry;
mod paging;
mod tables;
mod walk;

pub use access::{ErrorCode, GuestAccess, NoPage, PageFault, Rights};
pub use entry::{Entry, EntrySize};
pub use paging::{BadPdpte, GuestPaging, Mode, Processor, Registers};
pub use tables::{Exchange, GuestTables};
pub use walk::{Step, Walk, WalkError, walk};
