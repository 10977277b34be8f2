//! The guest: a flat 32-bit program that writes pages for as long as it is let, and keeps a journal of which.
//!
//! It and the VMM talk through a *mailbox* in low memory, which is not logged. Two *windows* are written: one at
//! [`RAM`], always, and one where the mailbox says, if it does. For each page it writes the guest sets a byte in the
//! window's journal: what the dirty log has to agree with in the end.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

/// Where the program starts.
pub const CODE: u64 = 0x1000;
/// Where its first window is.
pub const RAM: u64 = 0x10_0000;
/// Pages of the first window.
pub const RAM_PAGES: u64 = 256;
/// Pages of the second one.
pub const DIMM_PAGES: u64 = 512;

const MAILBOX: u64 = 0x2000;
const RAM_JOURNAL: u64 = 0x8000;
const DIMM_JOURNAL: u64 = 0x9000;

/// What the program writes through a probe.
pub const PROBED: u32 = 0x1234_5678;

/// The program. `esi` points to the mailbox, `eax` is a random number, `ecx` and `edx` are pages, `ebx` an address.
#[rustfmt::skip]
pub const PROGRAM: &[u8] = &[
    0xbe, 0x00, 0x20, 0x00, 0x00,                   //        mov esi, 0x2000
    0xb8, 0x01, 0x00, 0x00, 0x00,                   //        mov eax, 1
    // loop: another random number
    0x69, 0xc0, 0x6d, 0x4e, 0xc6, 0x41,             // loop:  imul eax, eax, 1103515245
    0x05, 0x39, 0x30, 0x00, 0x00,                   //        add eax, 12345
    0x89, 0xc1,                                     //        mov ecx, eax
    0xc1, 0xe9, 0x10,                               //        shr ecx, 16
    // a page of the first window: its first word, and its byte in the journal
    0x0f, 0xb6, 0xd1,                               //        movzx edx, cl
    0x89, 0xd3,                                     //        mov ebx, edx
    0xc1, 0xe3, 0x0c,                               //        shl ebx, 12
    0x89, 0x83, 0x00, 0x00, 0x10, 0x00,             //        mov [ebx + 0x100000], eax
    0xc6, 0x82, 0x00, 0x80, 0x00, 0x00, 0x01,       //        mov byte [edx + 0x8000], 1
    // a page of the second window, if there is one; the VMM sees which one we go by
    0x8b, 0x5e, 0x08,                               //        mov ebx, [esi + 8]
    0x89, 0x5e, 0x0c,                               //        mov [esi + 12], ebx
    0x85, 0xdb,                                     //        test ebx, ebx
    0x74, 0x16,                                     //        jz probe
    0x81, 0xe1, 0xff, 0x01, 0x00, 0x00,             //        and ecx, 511
    0x89, 0xca,                                     //        mov edx, ecx
    0xc1, 0xe2, 0x0c,                               //        shl edx, 12
    0x01, 0xd3,                                     //        add ebx, edx
    0x89, 0x03,                                     //        mov [ebx], eax
    0xc6, 0x81, 0x00, 0x90, 0x00, 0x00, 0x01,       //        mov byte [ecx + 0x9000], 1
    // an address that the VMM wants to have read and written
    0x8b, 0x56, 0x10,                               // probe: mov edx, [esi + 16]
    0x85, 0xd2,                                     //        test edx, edx
    0x74, 0x12,                                     //        jz next
    0x8b, 0x0a,                                     //        mov ecx, [edx]
    0x89, 0x4e, 0x14,                               //        mov [esi + 20], ecx
    0xc7, 0x02, 0x78, 0x56, 0x34, 0x12,             //        mov dword [edx], 0x12345678
    0xc7, 0x46, 0x10, 0x00, 0x00, 0x00, 0x00,       //        mov dword [esi + 16], 0
    // once more, unless it is enough
    0xff, 0x46, 0x04,                               // next:  inc dword [esi + 4]
    0x83, 0x3e, 0x00,                               //        cmp dword [esi], 0
    0x74, 0x9a,                                     //        je loop
    0xf4,                                           //        hlt
];

/// The VMM's side of the mailbox and the journals, in the host's mapping of low memory.
#[derive(Clone, Copy)]
pub struct Mailbox<'m> {
    low: &'m [AtomicU32],
}

impl<'m> Mailbox<'m> {
    /// `low` is the memory at guest address 0.
    pub fn new(low: &'m [AtomicU32]) -> Self {
        Self { low }
    }

    fn word(&self, at: u64) -> &'m AtomicU32 {
        &self.low[usize::try_from((MAILBOX + at) / 4).unwrap()]
    }

    /// How often the program went round.
    pub fn rounds(&self) -> u32 {
        self.word(4).load(Ordering::Acquire)
    }

    /// Ends the program.
    pub fn stop(&self) {
        self.word(0).store(1, Ordering::Release);
    }

    /// Names the second window; 0 for none. Returns when the program goes by it.
    pub fn set_window(&self, gpa: u32) {
        self.word(8).store(gpa, Ordering::Release);
        while self.word(12).load(Ordering::Acquire) != gpa {
            std::thread::yield_now();
        }
        // The write that belongs to it may still be under way in this round.
        let round = self.rounds();
        while self.rounds() == round {
            std::thread::yield_now();
        }
    }

    /// Has an address read and then written with [`PROBED`]. Returns what was read.
    pub fn probe(&self, gpa: u32) -> u32 {
        self.word(16).store(gpa, Ordering::Release);
        while self.word(16).load(Ordering::Acquire) != 0 {
            std::thread::yield_now();
        }
        self.word(20).load(Ordering::Acquire)
    }

    fn journal(&self, from: u64, pages: u64) -> impl Iterator<Item = u64> + use<'_> {
        (0..pages).filter(move |page| {
            let word = &self.low[usize::try_from((from + page) / 4).unwrap()];
            let bytes = word.load(Ordering::Acquire).to_le_bytes();
            bytes[usize::try_from((from + page) % 4).unwrap()] != 0
        })
    }

    /// Pages of the first window that were written.
    pub fn ram_journal(&self) -> impl Iterator<Item = u64> + use<'_> {
        self.journal(RAM_JOURNAL, RAM_PAGES)
    }

    /// Pages of the second window that were written.
    pub fn dimm_journal(&self) -> impl Iterator<Item = u64> + use<'_> {
        self.journal(DIMM_JOURNAL, DIMM_PAGES)
    }

    /// Starts the journal of the second window anew, for another module in the same place.
    pub fn forget_dimm(&self) {
        for word in DIMM_JOURNAL / 4..(DIMM_JOURNAL + DIMM_PAGES) / 4 {
            self.low[usize::try_from(word).unwrap()].store(0, Ordering::Release);
        }
    }
}

/// Puts the program into low memory.
pub fn load(low: &[AtomicU8]) {
    let code = &low[usize::try_from(CODE).unwrap()..];
    code.iter().zip(PROGRAM).for_each(|(to, &from)| to.store(from, Ordering::Relaxed));
}

/// Protected mode without paging: all segments cover 4 GiB.
pub fn set_registers(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x08, type_: 11, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() })
}
