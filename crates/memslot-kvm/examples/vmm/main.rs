//! A small VMM: memory is plugged, unplugged, split, made read-only and logged under a guest that runs.
//!
//! ```text
//! cargo run --release -p memslot-kvm --example vmm
//! ```
//!
//! The guest (`guest.rs`) writes pages all the time and keeps a journal of them. The VMM changes the memory map in
//! transactions and keeps a second copy of what is logged up to date, from harvests of the dirty log alone. In the
//! end two things must be true, or the program fails:
//!
//! * the pages that were harvested are exactly those in the guest's journal;
//! * the copy is the memory, byte for byte: no write was lost, whatever happened to the slots meanwhile.
//!
//! What a VMM needs from this crate is in `main.rs`; a vCPU that can be paused is in `vcpu.rs`.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[allow(missing_docs, unreachable_pub, reason = "an example's own modules")]
mod guest;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[allow(missing_docs, unreachable_pub, reason = "an example's own modules")]
mod vcpu;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod vmm;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    return vmm::run();
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    {
        println!("skipped: not Linux on x86-64");
        Ok(())
    }
}
