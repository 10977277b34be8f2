//! Bytes for each slot, everything included: slots, indexes, reserves, versions and lists.

use super::table_of;
use crate::layout::layout;
use crate::report::{Report, Row};

/// `struct kvm_memory_slot` of a 64-bit x86 kernel, without the arrays that grow with the slot.
const KERNEL_BYTES: f64 = 280.0;

pub(crate) fn run(sizes: &[usize], report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("bytes") {
        return Ok(());
    }
    for &n in sizes {
        let mut table = table_of(&layout(n))?;
        table.reclaim();
        #[expect(clippy::cast_precision_loss, reason = "a quotient for people")]
        let bytes = table.stats().bytes as f64 / n as f64;
        let row = Row {
            bench: "bytes per slot".to_owned(),
            at: n.to_string(),
            ours_ns: bytes,
            peer: "kernel: the slot alone".to_owned(),
            peer_ns: Some(KERNEL_BYTES),
            ratio: Some(KERNEL_BYTES / bytes),
            target: (n == 32764)
                .then_some(KERNEL_BYTES / 110.0)
                .map(|target| (target * 100.0).round() / 100.0),
        };
        report.add(row, &format!("{bytes:.1} B"), &format!("{KERNEL_BYTES} B"));
    }
    Ok(())
}
