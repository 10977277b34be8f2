//! What a real kernel answered to 254 scripted cases, against the rules and the dirty log.
//!
//! A few operations are nobody's business here: ioctls from another process, capabilities of other parts of KVM.

mod common;

use std::collections::HashMap;

use memslot::dirty::kvm::{ClearDirtyLog, KvmDirtyLog};
use memslot::dirty::ring::DirtyRing;
use memslot::dirty::{DirtyLog, SoftwareOnly};
use memslot::rules::{Errno, GuestMemfdFiles, Rules, UserMemoryRegion, UserMemoryRegion2};
use memslot::{AddressSpaceId, Gpa, Limits, PageSize, SlotFlags, SlotTable};
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
    /// What a dirty-log call got for its bitmap: good memory, or a bad pointer.
    buf: Option<String>,
    /// What was in the first two words afterwards; the script had filled them with 0xaa.
    words: Option<String>,
    first: Option<u64>,
    num: Option<u32>,
    w0: Option<String>,
    cap: Option<u32>,
    arg0: Option<u64>,
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

/// A VM of our own: a table, its log, and KVM's calls on both.
struct Vm {
    table: SlotTable,
    log: DirtyLog,
    dirty: KvmDirtyLog,
    files: Files,
}

impl Vm {
    fn new() -> Self {
        // That kernel had one address space.
        let mut table = SlotTable::new(Limits { address_spaces: 1, ..Limits::default() }).unwrap();
        let log = DirtyLog::attach(&mut table).unwrap();
        let dirty = KvmDirtyLog::new(log.consumer().unwrap());
        Self { table, log, dirty, files: Files::default() }
    }

    /// The answer to an operation; `None` where it is not the table's or the log's business.
    fn run(&mut self, op: &Op) -> Option<Result<(), Errno>> {
        let rules = Rules::default();
        let done = |result: Result<_, memslot::rules::Refusal>| result.map(|_| ()).map_err(|it| it.errno);
        let flags = u32::try_from(op.flags.unwrap_or(0)).unwrap();
        Some(match op.op.as_str() {
            "set" => done(rules.set_user_memory_region(&mut self.table, &region(op))),
            "set2" => {
                let guest_memfd = op.gmem_fd.unwrap_or(0);
                let region = UserMemoryRegion2 {
                    region: region(op),
                    guest_memfd: u32::try_from(guest_memfd).unwrap_or(u32::MAX),
                    guest_memfd_offset: op.gmem_off.unwrap_or(0),
                };
                done(rules.set_user_memory_region2(&mut self.table, &region, &mut self.files))
            }
            "get_dirty" => {
                let mut words = [0xaaaa_aaaa_aaaa_aaaa; 2];
                let good = (op.buf.as_deref() == Some("ok")).then_some(&mut words[..]);
                let result = self.dirty.get_dirty_log(op.slot.unwrap(), good, &mut SoftwareOnly);
                if result.is_ok() {
                    let text = words.iter().enumerate().map(|(at, word)| match word {
                        0 => format!(" w{at}=0"),
                        word => format!(" w{at}={word:#x}"),
                    });
                    assert_eq!(text.collect::<String>(), op.words.clone().unwrap_or_default());
                }
                result
            }
            "clear_dirty" => {
                let mask = [number(op.w0.as_deref().unwrap()), 0, 0, 0, 0];
                let good = (op.buf.as_deref() == Some("ok")).then_some(&mask[..]);
                let (slot, num_pages, first_page) = (op.slot.unwrap(), op.num.unwrap(), op.first.unwrap());
                let clear = ClearDirtyLog { slot, num_pages, first_page };
                self.dirty.clear_dirty_log(&clear, good, &mut SoftwareOnly)
            }
            // The kernel writes 12 bytes to guest memory; it marks what it could write.
            "kvm_write" => {
                let gpa = number(op.gpa.as_deref().unwrap());
                for gpa in [gpa, gpa + 11].map(Gpa::new) {
                    let found = self.table.view().translate(AddressSpaceId::NORMAL, gpa);
                    let mapped = |at: u64| (HOST_MEMORY..HOST_MEMORY + (1 << 30)).contains(&at);
                    let flags = found.filter(|found| mapped(found.hva.get())).map(|found| found.flags);
                    match flags {
                        Some(SlotFlags::LOG_DIRTY_PAGES) => {
                            self.log.mark(AddressSpaceId::NORMAL, gpa.gfn(PageSize::K4));
                        }
                        Some(_) => {}
                        // What lies behind the first failure is not written.
                        None => break,
                    }
                }
                return None;
            }
            "enable_cap" if [168, 192, 223].contains(&op.cap.unwrap()) => {
                self.dirty.enable_cap(op.cap.unwrap(), flags, op.arg0.unwrap())
            }
            "ioctl" => {
                let name = op.name.as_deref().unwrap_or_default();
                self.files.made |= name.starts_with("CREATE_GUEST_MEMFD") && op.res.as_deref() == Some("0");
                if name.starts_with("CREATE_VCPU") {
                    self.dirty.vcpu_created();
                }
                if name != "RESET_DIRTY_RINGS" {
                    return None;
                }
                let mut rings: [Box<DirtyRing>; 0] = [];
                self.dirty.reset_dirty_rings(&mut rings, &mut SoftwareOnly, || false).map(|entries| {
                    assert_eq!(entries, 0);
                })
            }
            _ => return None,
        })
    }
}

#[test]
fn every_call_of_the_table_is_answered_as_the_kernel_did() {
    let text = std::fs::read_to_string(common::data("kvm-errno-table.jsonl")).unwrap();
    let cases: Vec<Case> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(cases.len(), 254);

    let (mut slots, mut dirty, mut wrong, mut elsewhere) = (0, 0, Vec::new(), Vec::new());
    for case in &cases {
        let mut vm = Vm::new();
        let mut answered = false;
        for op in &case.ops {
            let Some(result) = vm.run(op) else { continue };
            let answer = result.map_or_else(Errno::name, |()| "0");
            let recorded = op.res.as_deref().unwrap();
            answered = true;
            if answer == recorded {
                *if op.op.starts_with("set") { &mut slots } else { &mut dirty } += 1;
            } else {
                wrong.push(format!("{}: {} is {recorded} to the kernel, {answer} to us", case.case, op.op));
            }
        }
        if !answered || case.ops.iter().any(|op| op.op.starts_with("child")) {
            elsewhere.push(case.case.as_str());
        }
    }
    println!("{slots} slot calls and {dirty} dirty-log calls agree; not our business: {elsewhere:#?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!((slots, dirty, elsewhere.len()), (320, 112, 14));
}
