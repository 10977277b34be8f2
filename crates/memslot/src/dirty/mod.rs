//! The dirty log: which pages were written, for many consumers, at the speed of memory.
//!
//! ```text
//!  vCPUs, devices ── mark ──►  bitmap of the address space ── harvest ──►  consumer: migration
//!                              (lock-free, by gfn)              │ └──────►  consumer: display
//!                                                               └► re-arm write protection, one flush
//! ```
//!
//! * **Marking** ([`DirtyLog::mark`], [`mark_range`](DirtyLog::mark_range)) is for any thread, takes no lock and
//!   cannot fail. A bit belongs to a guest frame, not to a slot, so slots may be split, merged, grown or shrunk
//!   around it.
//! * **Harvesting** ([`Consumer::harvest`]) takes bits, has their pages re-armed, asks for one flush, in this order,
//!   and yields a [`Harvest`]: a value that is iterated as runs or copied as words, and then committed. One that
//!   is dropped puts its bits back. Each [`Consumer`] has its own epoch: what one has taken, the others still see.
//! * **Marks of what is dirty already only look**, with [`DirtyLog::attach_with_fence`]: on Linux `membarrier` makes that
//!   sound. Without it every mark is an atomic exchange.
//! * **Clean memory costs nothing**: bits are made when they are first set, in chunks of 32768 pages, and two
//!   levels of summaries tell which chunks and words have any.
//! * **Too much, never too little**: without memory for bits, all pages of a chunk, or of all slots, count as
//!   dirty. A page that is written while it is harvested may be reported twice.
//! * [`kvm`] has KVM's calls with their errnos, [`ring`] the dirty ring.
//!
//! What this module does not do: notice writes. A page-table backend marks a page when it grants write access
//! and implements [`Rearm`]; software that writes guest memory marks what it wrote.

mod bitmap;
mod chunk;
mod consumer;
mod fence;
mod follow;
mod harvest;
pub mod kvm;
mod log;
mod place;
mod rearm;
pub mod ring;
mod runs;
mod set;

pub use self::consumer::{Consumer, HarvestError, Removed};
#[cfg(all(feature = "membarrier", target_os = "linux"))]
pub use self::fence::Membarrier;
pub use self::fence::{FenceRefused, HeavyFence};
pub use self::harvest::{Harvest, Run, Span};
pub use self::log::{BitmapError, DirtyLog};
pub use self::rearm::{Rearm, SoftwareOnly};
