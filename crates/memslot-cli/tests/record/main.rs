//! `memslot record`: what it writes is what was asked of the real KVM, and the VMM does not notice.
//!
//! The little VMM of the preload crate keeps its own account, which the trace must match; QEMU shows that the same holds
//! for a real one. Both need `/dev/kvm`, and say so where it is missing; what record refuses needs nothing.
#![cfg(target_os = "linux")]

mod common;
mod little;
mod parent;
mod qemu;
mod refusals;
