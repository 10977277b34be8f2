//! What several test programs share.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test program uses a part of it")]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use memslot::{Listener, ListenerError, Update};
use memslot_backing::Memory;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

/// A byte of a memory.
pub fn get(memory: &Memory, offset: u64) -> u8 {
    assert!(offset < memory.bytes());
    // SAFETY: the byte lies in the memory, which the caller holds.
    unsafe { memory.as_ptr().add(usize::try_from(offset).unwrap()).read_volatile() }
}

/// Sets a byte of a memory.
pub fn set(memory: &Memory, offset: u64, value: u8) {
    assert!(offset < memory.bytes());
    // SAFETY: as above.
    unsafe { memory.as_ptr().add(usize::try_from(offset).unwrap()).write_volatile(value) }
}

/// Sets every byte of a range.
pub fn fill(memory: &Memory, range: std::ops::Range<u64>, value: u8) {
    for offset in range {
        set(memory, offset, value);
    }
}

/// The one value that all bytes of a range have.
pub fn all(memory: &Memory, range: std::ops::Range<u64>) -> Option<u8> {
    let first = get(memory, range.start);
    range.into_iter().all(|offset| get(memory, offset) == first).then_some(first)
}

/// How many bytes a file takes where it is stored.
pub fn stored(file: impl AsFd) -> u64 {
    u64::try_from(rustix::fs::fstat(file).unwrap().st_blocks).unwrap() * 512
}

/// Whether the process has a mapping of a memfd with this name (no other test may have one of that name).
pub fn is_mapped(name: &str) -> bool {
    let path = format!("/memfd:{name} ");
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().any(|line| format!("{line} ").contains(&path))
}

/// The `VmFlags` of the mapping that has this address.
pub fn vm_flags(address: u64) -> Vec<String> {
    smaps_line(address, "VmFlags:").split_whitespace().map(str::to_owned).collect()
}

/// One of the sizes in smaps of the mapping that has this address, in bytes.
pub fn smaps(address: u64, name: &str) -> u64 {
    let line = smaps_line(address, name);
    line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

fn smaps_line(address: u64, name: &str) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut here = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = range.map(|(start, end)| (number(start), number(end))) {
            here = (start..end).contains(&address);
        }
        if let Some(rest) = line.strip_prefix(name).filter(|_| here) {
            return rest.to_owned();
        }
    }
    panic!("nothing is mapped at {address:#x}");
}

/// A file with these bytes, which no folder names.
pub fn file(bytes: &[u8]) -> std::fs::File {
    use std::io::Write;
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("memslot-backing-{}-{number}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// The signal that kills a child which writes to this address; 0 if it lives.
pub fn signal_of_write(address: u64) -> i32 {
    let pointer: *mut u8 = std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap());
    // SAFETY: the child calls nothing that needs a lock somebody else may hold: it sets two limits, touches one byte and
    // leaves. The write goes to a copy of this process's memory, or to shared memory that only the test looks at.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &none);
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            pointer.write_volatile(1);
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 }
    }
}

/// A listener that refuses on demand: 1 while it prepares, 2 while it commits; 3 is a panic there.
pub struct Refuser(pub Arc<AtomicU8>);

impl Listener for Refuser {
    fn name(&self) -> &str {
        "refuser"
    }

    fn prepare(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        if self.0.load(Relaxed) == 1 { Err("not now".into()) } else { Ok(()) }
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        match self.0.load(Relaxed) {
            2 => Err("not now".into()),
            3 => panic!("a listener's panic"),
            _ => Ok(()),
        }
    }

    fn undo(&mut self, _: &Update<'_>) {}
}
