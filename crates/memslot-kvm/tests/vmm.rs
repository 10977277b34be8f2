//! The example VMM as a test: it fails where a write is lost or invented. Says `skipped` without /dev/kvm.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

#[path = "../examples/vmm/guest.rs"]
#[allow(unreachable_pub, reason = "an example's own module")]
mod guest;
#[path = "../examples/vmm/vcpu.rs"]
#[allow(unreachable_pub, reason = "an example's own module")]
mod vcpu;
#[path = "../examples/vmm/vmm.rs"]
mod vmm;

#[test]
fn the_guest_and_the_dirty_log_agree() {
    if let Err(error) = kvm_ioctls::Kvm::new() {
        return memslot_testing::skipped(&format!("the example VMM: no /dev/kvm ({error})"));
    }
    vmm::run().unwrap();
}
