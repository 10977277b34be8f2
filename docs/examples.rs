//! The guide's examples: `cargo test -p memslot-guide` compiles and runs every block of code in `docs/src`.
//!
//! The guide itself is an mdBook: `mdbook build docs`, then open `target/book/index.html`.
#![cfg(all(doctest, target_os = "linux"))]

#[doc = include_str!("src/vmm/bridge.md")]
struct Bridge;

#[doc = include_str!("src/vmm/native.md")]
struct Native;

#[doc = include_str!("src/vmm/kvm.md")]
struct Kvm;

#[doc = include_str!("src/vmm/backing.md")]
struct Backing;

#[doc = include_str!("src/vmm/dirty.md")]
struct Dirty;

#[doc = include_str!("src/hypervisor.md")]
struct Hypervisor;
