//! Steps about what every processor does with page tables: error codes, A and D bits, protections, flushes.

use core::arch::asm;

use super::guest::{
    ACCESSED, ALL, BY_FETCH, BY_USER, BY_WRITE, CR0_WRITE_PROTECT, CR4_ACCESS, CR4_EXECUTION, CR4_GLOBAL,
    DIRTY, EFER_NO_EXECUTE, Failure, GLOBAL, LARGE, Machine, NO_EXECUTE, Outcome, PRESENT, REFUSED, RESERVED,
    USERS, WRITE, Who, must,
};
use super::{AREA, DATA, OTHER, ROOT};
use Outcome::{Done, Fault};
use Who::{Kernel, User};

type Verdict = Result<(), Failure>;

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;

pub(super) fn error_codes(m: &mut Machine) -> Verdict {
    m.set_efer(m.efer() | EFER_NO_EXECUTE);
    let (gpa, marked) = m.data(0);
    // Nothing is mapped, first in the root, then in each level below.
    for level in (1..=4).rev() {
        let entry = m.entry(AREA + 5 * PAGE, level);
        m.set(entry, 0);
        must!(m.read(AREA + 5 * PAGE, Kernel), Fault(0));
        must!(m.write(AREA + 5 * PAGE + 8, 1, Kernel), Fault(BY_WRITE));
        must!(m.execute(AREA + 5 * PAGE, Kernel), Fault(BY_FETCH));
        must!(m.read(AREA + 5 * PAGE + 16, User), Fault(BY_USER));
        must!(m.write(AREA + 5 * PAGE, 1, User), Fault(BY_USER | BY_WRITE));
        must!(m.execute(AREA + 5 * PAGE, User), Fault(BY_USER | BY_FETCH));
    }
    // From nothing to something needs no flush.
    let entry = m.map(AREA + 5 * PAGE, gpa);
    must!(m.read(AREA + 5 * PAGE, User), marked);
    must!(m.write(AREA + 5 * PAGE + 8, 7, User), Done(0));
    must!(m.get(gpa + 8), 7);
    must!(m.execute(AREA + 5 * PAGE, User), Done(0));

    m.change(entry, gpa | PRESENT | USERS, AREA + 5 * PAGE);
    must!(m.write(AREA + 5 * PAGE + 8, 8, Kernel), Fault(REFUSED | BY_WRITE));
    must!(m.write(AREA + 5 * PAGE + 8, 8, User), Fault(REFUSED | BY_WRITE | BY_USER));
    must!(m.read(AREA + 5 * PAGE, User), marked);
    m.change(entry, gpa | PRESENT | WRITE, AREA + 5 * PAGE);
    must!(m.read(AREA + 5 * PAGE, User), Fault(REFUSED | BY_USER));
    must!(m.write(AREA + 5 * PAGE, 8, User), Fault(REFUSED | BY_USER | BY_WRITE));
    must!(m.execute(AREA + 5 * PAGE, User), Fault(REFUSED | BY_USER | BY_FETCH));
    must!(m.write(AREA + 5 * PAGE + 8, 9, Kernel), Done(0));
    must!(m.get(gpa + 8), 9);

    // Bits that must be 0: physical addresses do not go that far; a large page is aligned.
    for level in 1..=4 {
        let entry = m.entry(AREA + 5 * PAGE, level);
        let good = m.get(entry);
        m.change(entry, good | 1 << 51, AREA + 5 * PAGE);
        must!(m.read(AREA + 5 * PAGE, Kernel), Fault(REFUSED | RESERVED));
        must!(m.write(AREA + 5 * PAGE, 1, User), Fault(REFUSED | RESERVED | BY_USER | BY_WRITE));
        m.change(entry, good, AREA + 5 * PAGE);
        must!(m.read(AREA + 5 * PAGE, Kernel), marked);
    }
    let entry = m.map_large(OTHER, DATA);
    must!(m.read(OTHER, User), marked);
    m.change(entry, (DATA + 3 * PAGE) | ALL | LARGE, OTHER);
    must!(m.read(OTHER, Kernel), Fault(REFUSED | RESERVED));
    Ok(())
}

pub(super) fn accessed_and_dirty(m: &mut Machine) -> Verdict {
    let (gpa, marked) = m.data(1);
    let va = AREA + 7 * PAGE;
    m.map(va, gpa);
    let entries = [4, 3, 2, 1].map(|level| m.entry(va, level));
    let seen = |m: &Machine| entries.map(|entry| m.get(entry) & (ACCESSED | DIRTY));
    must!(seen(m).iter().sum::<u64>(), 0);
    must!(m.read(va, User), marked);
    for (entry, seen) in entries.iter().zip(seen(m)) {
        must!(seen, ACCESSED);
        must!(m.get(entry ^ 8), 0);
    }
    must!(m.write(va + 8, 5, User), Done(0));
    must!(m.get(entries[3]), gpa | ALL | ACCESSED | DIRTY);
    must!(m.get(entries[2]) & DIRTY, 0);
    // Cleared bits are set again.
    for (level, entry) in entries.into_iter().enumerate() {
        m.change(entry, m.get(entry) & !(ACCESSED | DIRTY), va);
        must!(m.write(va + 8, 6, User), Done(0));
        must!(m.get(entry) & ACCESSED, ACCESSED);
        must!(m.get(entry) & DIRTY, if level == 3 { DIRTY } else { 0 });
    }
    // Dirty, but only read since.
    m.change(entries[3], gpa | ALL, va);
    must!(m.read(va, User), marked);
    must!(m.get(entries[3]), gpa | ALL | ACCESSED);
    // A write that is refused makes nothing dirty.
    m.change(entries[3], gpa | PRESENT | USERS, va);
    must!(m.write(va, 1, User), Fault(REFUSED | BY_WRITE | BY_USER));
    must!(m.get(entries[3]) & DIRTY, 0);
    // Large pages have theirs one level up.
    let entry = m.map_large(OTHER, DATA);
    must!(m.read(OTHER + PAGE, User), marked);
    must!(m.get(entry), DATA | ALL | LARGE | ACCESSED);
    must!(m.write(OTHER + 9 * PAGE + 8, 1, User), Done(0));
    must!(m.get(entry), DATA | ALL | LARGE | ACCESSED | DIRTY);
    Ok(())
}

pub(super) fn write_protect_off(m: &mut Machine) -> Verdict {
    let (gpa, marked) = m.data(2);
    let users = m.map(AREA, gpa);
    let kernels = m.map(AREA + PAGE, gpa);
    m.set(users, gpa | PRESENT | USERS);
    m.set(kernels, gpa | PRESENT);
    must!(m.write(AREA + 8, 1, Kernel), Fault(REFUSED | BY_WRITE));
    must!(m.write(AREA + PAGE + 8, 1, Kernel), Fault(REFUSED | BY_WRITE));
    must!(m.read(AREA, User), marked);

    m.set_cr0(m.cr0() & !CR0_WRITE_PROTECT);
    must!(m.read_cr0(), m.cr0() & !CR0_WRITE_PROTECT);
    m.flush_all();
    must!(m.write(AREA + 8, 2, Kernel), Done(0));
    must!(m.get(gpa + 8), 2);
    must!(m.get(users) & DIRTY, DIRTY);
    must!(m.write(AREA + PAGE + 8, 3, Kernel), Done(0));
    must!(m.write(AREA + 8, 4, User), Fault(REFUSED | BY_WRITE | BY_USER));
    must!(m.read(AREA, User), marked);
    must!(m.write(AREA + 8, 5, Kernel), Done(0));
    must!(m.read(AREA + PAGE, User), Fault(REFUSED | BY_USER));
    must!(m.execute(AREA, Kernel), Done(0));
    // The same with SMEP: what the kernel may write now it may not execute.
    m.set_cr4(m.cr4() | CR4_EXECUTION);
    m.flush_all_with(m.cr4() | CR4_EXECUTION);
    must!(m.write(AREA + 8, 6, Kernel), Done(0));
    must!(m.execute(AREA, Kernel), Fault(REFUSED | BY_FETCH));
    must!(m.execute(AREA, User), Done(0));
    m.set_cr4(m.cr4());

    m.set_cr0(m.cr0());
    m.flush_all();
    must!(m.read_cr0(), m.cr0());
    must!(m.write(AREA + 8, 7, Kernel), Fault(REFUSED | BY_WRITE));
    must!(m.write(AREA + PAGE + 8, 7, Kernel), Fault(REFUSED | BY_WRITE));
    must!(m.get(gpa + 8), 6);
    Ok(())
}

pub(super) fn execution_and_access_prevention(m: &mut Machine) -> Verdict {
    let (gpa, marked) = m.data(3);
    let kernels = m.entry(AREA + PAGE, 1);
    m.map(AREA, gpa);
    m.set(kernels, gpa | PRESENT | WRITE);
    must!(m.execute(AREA, Kernel), Done(0));
    m.set_cr4(m.cr4() | CR4_EXECUTION | CR4_ACCESS);
    must!(m.execute(AREA, Kernel), Fault(REFUSED | BY_FETCH));
    must!(m.read(AREA, Kernel), Fault(REFUSED));
    must!(m.write(AREA + 8, 1, Kernel), Fault(REFUSED | BY_WRITE));
    must!(m.execute(AREA, User), Done(0));
    must!(m.read(AREA, User), marked);
    must!(m.write(AREA + 8, 2, User), Done(0));
    must!(m.execute(AREA + PAGE, Kernel), Done(0));
    must!(m.read(AREA + PAGE, Kernel), marked);
    // RFLAGS.AC lets the kernel in.
    // SAFETY: the flag means nothing else here.
    unsafe { asm!("stac", options(nostack)) };
    let (read, written) = (m.read(AREA, Kernel), m.write(AREA + 8, 3, Kernel));
    // SAFETY: as above.
    unsafe { asm!("clac", options(nostack)) };
    must!(read, marked);
    must!(written, Done(0));
    must!(m.get(gpa + 8), 3);
    must!(m.read(AREA, Kernel), Fault(REFUSED));
    // Tables that are the kernel's above make the page the kernel's.
    let above = m.entry(AREA, 2);
    m.change(above, m.get(above) & !USERS, AREA);
    must!(m.read(AREA, Kernel), marked);
    must!(m.execute(AREA, Kernel), Done(0));
    must!(m.read(AREA, User), Fault(REFUSED | BY_USER));
    m.set_cr4(m.cr4());
    must!(m.read(AREA, Kernel), marked);
    Ok(())
}

pub(super) fn no_execute(m: &mut Machine) -> Verdict {
    let (gpa, marked) = m.data(4);
    m.set_efer(m.efer() | EFER_NO_EXECUTE);
    let entry = m.map(AREA, gpa);
    m.set(entry, gpa | ALL | NO_EXECUTE);
    must!(m.execute(AREA, Kernel), Fault(REFUSED | BY_FETCH));
    must!(m.execute(AREA, User), Fault(REFUSED | BY_FETCH | BY_USER));
    must!(m.read(AREA, User), marked);
    must!(m.write(AREA + 8, 1, Kernel), Done(0));
    // In a table it counts for everything below.
    m.change(entry, gpa | ALL, AREA);
    must!(m.execute(AREA, User), Done(0));
    let above = m.entry(AREA, 3);
    m.change(above, m.get(above) | NO_EXECUTE, AREA);
    must!(m.execute(AREA, User), Fault(REFUSED | BY_FETCH | BY_USER));
    must!(m.read(AREA, User), marked);
    // Without NXE the bit must be 0.
    m.set_efer(m.efer() & !EFER_NO_EXECUTE);
    m.flush_all();
    must!(m.read(AREA, Kernel), Fault(REFUSED | RESERVED));
    m.change(above, m.get(above) & !NO_EXECUTE, AREA);
    must!(m.execute(AREA, Kernel), Done(0));
    m.change(entry, gpa | ALL | NO_EXECUTE, AREA);
    must!(m.read(AREA, User), Fault(REFUSED | RESERVED | BY_USER));
    m.set_efer(m.efer());
    m.flush_all();
    must!(m.read(AREA, User), marked);
    Ok(())
}

pub(super) fn flushes(m: &mut Machine) -> Verdict {
    let pages = [5, 6, 7, 8].map(|page| m.data(page));
    let entry = m.map(AREA, pages[0].0);
    must!(m.read(AREA, User), pages[0].1);
    for round in 1..13 {
        let (gpa, marked) = pages[round % 4];
        m.set(entry, gpa | ALL | if round > 6 { GLOBAL } else { 0 });
        match round % 3 {
            0 => m.flush(AREA + 0x123),
            // Global pages outlive it.
            1 if round < 6 => m.flush_most(),
            _ => m.flush_all(),
        }
        must!(m.read(AREA, User), marked);
    }
    // What was not present, or not allowed, is there at once: the processor looks again before it faults.
    for level in (1..=4).rev() {
        let entry = m.entry(AREA, level);
        let good = m.get(entry);
        m.change(entry, 0, AREA);
        must!(m.read(AREA, User), Fault(BY_USER));
        m.set(entry, good);
        must!(m.read(AREA, User), pages[0].1);
        m.change(entry, good & !WRITE, AREA);
        must!(m.write(AREA + 8, 1, User), Fault(REFUSED | BY_USER | BY_WRITE));
        m.set(entry, good);
        must!(m.write(AREA + 8, 1, User), Done(0));
    }
    // Only one of the pages of a table changes.
    let entries = [0, 1, 2, 3].map(|page| m.map(AREA + page * PAGE, pages[0].0));
    for (page, va) in (0..4).map(|page| (page, AREA + page as u64 * PAGE)) {
        must!(m.read(va, User), pages[0].1);
        m.change(entries[page], pages[3].0 | ALL, va);
        must!(m.read(va, User), pages[3].1);
        must!(m.write(va + 16, 77 + page as u64, User), Done(0));
        must!(m.get(pages[3].0 + 16), 77 + page as u64);
    }
    Ok(())
}

pub(super) fn tables_shared_by_roots(m: &mut Machine) -> Verdict {
    let pages = [9, 10, 11].map(|page| m.data(page));
    let other = m.table();
    let shared = m.map(AREA, pages[0].0);
    for entry in [0, 1, AREA >> 39] {
        m.set(other + entry * 8, m.get(ROOT + entry * 8));
    }
    // The same address in the two roots, from tables of their own.
    m.map(OTHER, pages[0].0);
    let others = m.entry_from(other, OTHER, 1);
    m.set(others, pages[1].0 | ALL);
    for round in 0..6 {
        m.load(ROOT);
        must!(m.read(OTHER, User), pages[0].1);
        must!(m.read(AREA, User), pages[round % 3].1);
        m.load(other);
        must!(m.read_cr3(), other);
        must!(m.read(OTHER, User), pages[1].1);
        m.change(shared, pages[(round + 1) % 3].0 | ALL, AREA);
        must!(m.read(AREA, User), pages[(round + 1) % 3].1);
    }
    // A root that is loaded no longer is memory like any other.
    m.load(ROOT);
    m.set(other + (AREA >> 39) * 8, 0);
    must!(m.read(AREA, User), pages[0].1);
    m.load(other);
    must!(m.read(AREA, User), Fault(BY_USER));
    m.load(ROOT);
    m.map(AREA, other);
    m.flush_all();
    must!(m.write(AREA + 8 * 300, 0x1234, User), Done(0));
    must!(m.get(other + 8 * 300), 0x1234);
    Ok(())
}

pub(super) fn recursive(m: &mut Machine) -> Verdict {
    let pages = [12, 13, 14].map(|page| m.data(page));
    let va = AREA + 3 * LARGE_PAGE + 5 * PAGE;
    m.map(va, pages[0].0);
    m.set(ROOT + (OTHER >> 39) * 8, ROOT | PRESENT | WRITE);
    // Through the root's entry for itself each table is a page.
    let index = OTHER >> 39;
    let leaf = OTHER | (va >> 9 & 0x7f_ffff_fff8);
    let above = OTHER | index << 30 | (va >> 18 & 0x3fff_fff8);
    let root = OTHER | index << 30 | index << 21 | index << 12;
    must!(m.read(va, User), pages[0].1);
    for round in 1..7 {
        let (gpa, marked) = pages[round % 3];
        m.change(leaf, gpa | ALL, va);
        must!(m.read(va, User), marked);
        must!(m.get(leaf) & !DIRTY, gpa | ALL | ACCESSED);
        must!(m.write(va + 8, round as u64, User), Done(0));
        must!(m.get(leaf) & DIRTY, DIRTY);
    }
    // Another table below, through the recursive address of its entry.
    let table = m.table();
    m.set(table + (va >> 12 & 0x1ff) * 8, pages[2].0 | ALL);
    let old = m.get(above);
    m.change(above, table | ALL, va);
    m.flush(leaf);
    must!(m.read(va, User), pages[2].1);
    must!(m.get(leaf) & !(ACCESSED | DIRTY), pages[2].0 | ALL);
    m.change(above, old, va);
    must!(m.read(va, User), pages[0].1);
    // And the root itself.
    let entry = m.get(root + (AREA >> 39) * 8);
    m.set(root + (AREA >> 39) * 8, 0);
    m.flush(va);
    must!(m.read(va, User), Fault(BY_USER));
    m.set(root + (AREA >> 39) * 8, entry);
    must!(m.read(va, User), pages[0].1);
    Ok(())
}

pub(super) fn many_tables_at_once(m: &mut Machine) -> Verdict {
    const MANY: u64 = 100;
    let pages = [15, 16, 17].map(|page| m.data(page));
    let va = |table: u64| AREA + table * LARGE_PAGE + table * PAGE;
    for table in 0..MANY {
        m.map(va(table), pages[0].0);
        must!(m.read(va(table), User), pages[0].1);
    }
    for round in 1..4 {
        let (gpa, marked) = pages[round % 3];
        for table in 0..MANY {
            let entry = m.entry(va(table), 1);
            m.set(entry, gpa | ALL);
            if round == 2 {
                m.flush(va(table));
            }
        }
        match round {
            1 => m.flush_most(),
            3 => m.flush_all(),
            _ => {}
        }
        for table in 0..MANY {
            must!(m.read(va(table), User), marked);
        }
    }
    // Tables change places.
    for table in 0..MANY / 2 {
        let (low, high) = (m.entry(va(table), 2), m.entry(va(MANY - 1 - table), 2));
        let (first, second) = (m.get(low), m.get(high));
        m.set(low, second);
        m.set(high, first);
    }
    m.flush_most();
    for table in 0..MANY {
        let there = AREA + table * LARGE_PAGE + (MANY - 1 - table) * PAGE;
        must!(m.read(there, User), pages[0].1);
        must!(m.read(va(table), Kernel), Fault(0));
    }
    must!(m.read_cr3(), ROOT);
    must!(m.cr4() & CR4_GLOBAL, CR4_GLOBAL);
    Ok(())
}
