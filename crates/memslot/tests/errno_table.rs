//! What a real kernel answered to 254 scripted cases, against the rules.
//!
//! Cases that are about the dirty log wait for the dirty engine; what they do to slots on the way is checked
//! already. A few operations are not the table's business: ioctls from another process, bad pointers.

mod common;

use std::collections::HashMap;

use memslot::rules::{Errno, GuestMemfdFiles, Rules, UserMemoryRegion, UserMemoryRegion2};
use memslot::{Limits, SlotTable};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    case: String,
    ops: Vec<Op>,
}

#[derive(Deserialize)]
struct Op {
    op: String,
    res: Option<String>,
    slot: Option<u32>,
    flags: Option<u64>,
    gpa: Option<String>,
    size: Option<String>,
    hva: Option<String>,
    gmem_fd: Option<i64>,
    gmem_off: Option<u64>,
    name: Option<String>,
}

/// Where the recording's 1 GiB of host memory lies here.
const HOST_MEMORY: u64 = 0x7f00_0000_0000;

fn number(text: &str) -> u64 {
    match text.strip_prefix("H+") {
        Some(offset) => HOST_MEMORY + number(offset),
        None => u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap(),
    }
}

fn region(op: &Op) -> UserMemoryRegion {
    let field = |text: &Option<String>| number(text.as_deref().unwrap_or("0x0"));
    UserMemoryRegion {
        slot: op.slot.unwrap(),
        flags: u32::try_from(op.flags.unwrap_or(0)).unwrap(),
        guest_phys_addr: field(&op.gpa),
        memory_size: field(&op.size),
        userspace_addr: field(&op.hva),
    }
}

/// The guest_memfd files of a case: number 1 is the one that the script has made last, of 1 MiB.
#[derive(Default)]
struct Files {
    made: bool,
    bound: HashMap<u64, u64>,
}

impl GuestMemfdFiles for Files {
    fn bind(&mut self, file: u32, offset: u64, size: u64) -> Result<(), Errno> {
        if file == u32::MAX {
            return Err(Errno::EBADF);
        }
        let overlaps = |(&from, &len): (&u64, &u64)| from < offset + size && offset < from + len;
        if !self.made || offset + size > 1 << 20 || self.bound.iter().any(overlaps) {
            return Err(Errno::EINVAL);
        }
        self.bound.insert(offset, size);
        Ok(())
    }

    fn unbind(&mut self, _: u32, offset: u64, size: u64) {
        assert_eq!(self.bound.remove(&offset), Some(size));
    }
}

#[test]
fn every_slot_call_of_the_table_is_answered_as_the_kernel_did() {
    let text = std::fs::read_to_string(common::data("kvm-errno-table.jsonl")).unwrap();
    let cases: Vec<Case> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(cases.len(), 254);

    // That kernel had one address space.
    let limits = Limits { address_spaces: 1, ..Limits::default() };
    let rules = Rules::default();
    let (mut compared, mut wrong, mut waiting, mut elsewhere) = (0, Vec::new(), Vec::new(), Vec::new());
    for case in &cases {
        let mut table = SlotTable::new(limits).unwrap();
        let mut files = Files::default();
        let mut slot_calls = 0;
        for op in &case.ops {
            let result = match op.op.as_str() {
                "set" => rules.set_user_memory_region(&mut table, &region(op)),
                "set2" => {
                    let guest_memfd = op.gmem_fd.unwrap_or(0);
                    let region = UserMemoryRegion2 {
                        region: region(op),
                        guest_memfd: u32::try_from(guest_memfd).unwrap_or(u32::MAX),
                        guest_memfd_offset: op.gmem_off.unwrap_or(0),
                    };
                    rules.set_user_memory_region2(&mut table, &region, &mut files)
                }
                "ioctl" => {
                    let name = op.name.as_deref().unwrap_or_default();
                    files.made |= name.starts_with("CREATE_GUEST_MEMFD") && op.res.as_deref() == Some("0");
                    continue;
                }
                _ => continue,
            };
            slot_calls += 1;
            let answer = result.as_ref().map_or_else(|refusal| refusal.errno.name(), |_| "0");
            let recorded = op.res.as_deref().unwrap();
            if answer == recorded {
                compared += 1;
            } else {
                wrong.push(format!("{}: the kernel answered {recorded}, the rules {result:?}", case.case));
            }
        }
        let is = |names: &[&str]| case.ops.iter().any(|op| names.contains(&op.op.as_str()));
        if is(&["get_dirty", "clear_dirty", "kvm_write", "enable_cap"]) {
            waiting.push(case.case.as_str());
        } else if slot_calls == 0 || is(&["child_set", "child_get"]) {
            elsewhere.push(case.case.as_str());
        }
    }
    println!("{compared} slot calls agree; wait for the dirty engine: {waiting:#?}");
    println!("not the table's business: {elsewhere:#?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!((compared, waiting.len(), elsewhere.len()), (320, 81, 11));
}
