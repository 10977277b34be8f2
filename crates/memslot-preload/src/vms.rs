//! Which descriptors are VMs, and how many pages their slots have.
//!
//! A VM gets a number that no other VM of the recording has, because descriptors are used again, duplicated, and the
//! same in many processes. The pages are needed for `KVM_GET_DIRTY_LOG`: how long the bitmap is that the kernel wrote stands
//! nowhere in the call. A slot's size follows from the calls that set it; where one was under way during the GET, the
//! size is not certain, and the bitmap is not touched.
//!
//! A VM's record is never given back, so references to it stay valid; one whose descriptor becomes a new VM is used
//! again. Everything is atomic, and no operation waits for another.

use std::ffi::{CStr, c_int};
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::control::Control;
use crate::mapping::Mapping;
use crate::threads;

/// Descriptors from here on are looked up anew with each call, and their slots are not followed.
const DESCRIPTORS: usize = 1 << 16;
/// Ids of one address space: the kernel has fewer.
const IDS: usize = 1 << 15;
const ADDRESS_SPACES: usize = 2;

/// A VM of this process. All zeroes is a valid one.
#[repr(C)]
pub(crate) struct Vm {
    number: AtomicU64,
    /// Calls that set a slot and have not returned.
    setting: AtomicU32,
    /// Calls that set a slot and have returned.
    set: AtomicU32,
    /// By address space and id; 0 where there is no slot, or none that was seen.
    pages: [AtomicU32; ADDRESS_SPACES * IDS],
}

static BY_DESCRIPTOR: [AtomicPtr<Vm>; DESCRIPTORS] = [const { AtomicPtr::new(ptr::null_mut()) }; DESCRIPTORS];

/// What a descriptor is.
pub(crate) enum Found {
    Vm(&'static Vm),
    /// A VM, or it cannot be found out; which one, is not known either.
    Perhaps,
    /// Something other than a VM.
    Other,
}

/// The VM behind a descriptor that was seen before.
pub(crate) fn known(fd: c_int) -> Option<&'static Vm> {
    let record = BY_DESCRIPTOR.get(usize::try_from(fd).ok()?)?.load(Ordering::Acquire);
    // SAFETY: null, or a record that is never given back.
    unsafe { record.as_ref() }
}

/// The VM behind a descriptor; one that was not seen before may be a duplicate, or come from elsewhere.
pub(crate) fn find(control: &Control, fd: c_int) -> Found {
    if let Some(vm) = known(fd) {
        return Found::Vm(vm);
    }
    match link(fd) {
        Some(true) => {}
        Some(false) => return Found::Other,
        None => return Found::Perhaps,
    }
    let Some(entry) = usize::try_from(fd).ok().and_then(|fd| BY_DESCRIPTOR.get(fd)) else {
        return Found::Perhaps;
    };
    let original = (0_i32..)
        .zip(&BY_DESCRIPTOR)
        .find(|(other, entry)| !entry.load(Ordering::Relaxed).is_null() && same_file(fd, *other));
    let record = match original {
        Some((_, entry)) => entry.load(Ordering::Acquire),
        None => new_record(control),
    };
    if record.is_null() {
        return Found::Perhaps;
    }
    entry.store(record, Ordering::Release);
    known(fd).map_or(Found::Perhaps, Found::Vm)
}

/// Notes a VM just created. `None` if there is no memory to note it in.
pub(crate) fn created(control: &Control, fd: c_int) -> Option<&'static Vm> {
    let entry = BY_DESCRIPTOR.get(usize::try_from(fd).ok()?)?;
    let old = entry.load(Ordering::Acquire);
    let shared = || BY_DESCRIPTOR.iter().filter(|entry| entry.load(Ordering::Relaxed) == old).count() > 1;
    if !old.is_null() && !shared() {
        // SAFETY: a whole mapping, made by new_record and never given back; the kernel makes it zeroes again, which is a
        // valid record. Its VM is gone: this number was free when the kernel gave it out.
        let emptied = unsafe { libc::madvise(old.cast(), size_of::<Vm>(), libc::MADV_DONTNEED) } == 0;
        if emptied {
            let vm = known(fd)?;
            vm.number.store(control.next_vm(), Ordering::Release);
            return Some(vm);
        }
    }
    let record = new_record(control);
    if record.is_null() {
        return None;
    }
    entry.store(record, Ordering::Release);
    known(fd)
}

fn new_record(control: &Control) -> *mut Vm {
    const { assert!(mem::align_of::<Vm>() <= 4096) };
    let Some(pages) = Mapping::new(size_of::<Vm>()) else { return ptr::null_mut() };
    let record = pages.leak().cast::<Vm>();
    // SAFETY: pages of that size, aligned to a page and zeroed, that stay for good.
    unsafe { &*record }.number.store(control.next_vm(), Ordering::Release);
    record
}

/// Whether a descriptor's link says that it is a VM; `None` if it cannot be read.
fn link(fd: c_int) -> Option<bool> {
    const VM: &[u8] = b"anon_inode:kvm-vm";
    let mut path = [0; 32];
    name_of(fd, &mut path)?;
    let path = CStr::from_bytes_until_nul(&path).ok()?;
    let mut target = [0_u8; 64];
    // SAFETY: a NUL-terminated path and our bytes.
    let length = unsafe { libc::readlink(path.as_ptr(), target.as_mut_ptr().cast(), target.len()) };
    let target = target.get(..usize::try_from(length).ok()?)?;
    Some(target == VM)
}

/// `/proc/self/fd/N`, without the heap. The bytes were zero, so a NUL ends it.
fn name_of(fd: c_int, path: &mut [u8; 32]) -> Option<()> {
    use std::io::Write;
    write!(&mut path[..31], "/proc/self/fd/{}", u32::try_from(fd).ok()?).ok()
}

/// Whether two descriptors of this process are the same open file. Kernels without `kcmp` say no.
fn same_file(one: c_int, other: c_int) -> bool {
    const KCMP_FILE: c_int = 0;
    let process = threads::process();
    // SAFETY: takes numbers only.
    unsafe { libc::syscall(libc::SYS_kcmp, process, process, KCMP_FILE, one, other) == 0 }
}

/// How many calls had set a slot when this was taken, and that none was under way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quiet(u32);

impl Vm {
    pub(crate) fn number(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    /// A call begins that sets a slot. [`end_set`](Self::end_set) must follow.
    pub(crate) fn begin_set(&self) {
        self.setting.fetch_add(1, Ordering::SeqCst);
    }

    /// It ends; `slot` (address space in the high half) and its new size in pages, if the kernel accepted it.
    pub(crate) fn end_set(&self, slot: Option<(u32, u64)>) {
        if let Some((slot, pages)) = slot {
            if let Some(entry) = self.entry(slot) {
                entry.store(u32::try_from(pages).unwrap_or(0), Ordering::SeqCst);
            }
        }
        self.set.fetch_add(1, Ordering::SeqCst);
        self.setting.fetch_sub(1, Ordering::SeqCst);
    }

    /// The state, if no slot is being set.
    pub(crate) fn quiet(&self) -> Option<Quiet> {
        let set = self.set.load(Ordering::SeqCst);
        (self.setting.load(Ordering::SeqCst) == 0).then_some(Quiet(set))
    }

    /// A slot's size, which held all the time since `before` was taken; `None` if that is not certain.
    pub(crate) fn pages_since(&self, before: Option<Quiet>, slot: u32) -> Option<u64> {
        let pages = self.entry(slot)?.load(Ordering::SeqCst);
        (pages != 0 && before.is_some() && self.quiet() == before).then_some(u64::from(pages))
    }

    fn entry(&self, slot: u32) -> Option<&AtomicU32> {
        let space = usize::try_from(slot >> 16).ok()?;
        let id = usize::try_from(slot & 0xffff).ok()?;
        (space < ADDRESS_SPACES && id < IDS).then(|| self.pages.get(space * IDS + id))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> &'static Vm {
        let pages = Mapping::new(size_of::<Vm>()).expect("memory");
        // SAFETY: pages of that size, aligned and zeroed, that stay for good.
        unsafe { &*pages.leak().cast::<Vm>() }
    }

    #[test]
    fn a_size_is_known_while_nobody_sets_slots() {
        let vm = vm();
        let set = |slot, pages| {
            vm.begin_set();
            vm.end_set(Some((slot, pages)));
        };
        set(3, 70);
        set(0x1_0003, 9);
        assert_eq!(vm.pages_since(vm.quiet(), 3), Some(70));
        assert_eq!(vm.pages_since(vm.quiet(), 0x1_0003), Some(9));
        assert_eq!(vm.pages_since(vm.quiet(), 4), None);
        let before = vm.quiet();
        set(3, 71);
        assert_eq!(vm.pages_since(before, 3), None, "set meanwhile");
        let before = vm.quiet();
        vm.begin_set();
        assert_eq!(vm.pages_since(before, 3), None, "being set");
        assert!(vm.quiet().is_none());
        vm.end_set(None);
        assert_eq!(vm.pages_since(vm.quiet(), 3), Some(71), "a refused call changes nothing");
        set(3, 0);
        assert_eq!(vm.pages_since(vm.quiet(), 3), None, "deleted");
    }

    #[test]
    fn slots_beyond_the_kernels_are_nobodys() {
        let vm = vm();
        for slot in [0x8000, 0xffff, 0x2_0000, u32::MAX] {
            vm.begin_set();
            vm.end_set(Some((slot, 5)));
            assert_eq!(vm.pages_since(vm.quiet(), slot), None);
        }
        assert_eq!(vm.pages_since(vm.quiet(), 0x1_0000), None);
    }

    #[test]
    fn descriptors_that_are_no_vms() {
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        assert_eq!(link(fd), Some(false));
        assert_eq!(link(-1), None);
        assert!(same_file(fd, fd) && !same_file(fd, 0));
    }
}
