//! Rows 34 to 41: tables that are shared, edited, unlinked, moved, given up.

use super::*;

pub(in crate::torture) fn one_table_two_permissions(m: &mut Machine) -> Verdict {
    const GIB: u64 = 1 << 30;
    m.set_efer(m.efer() | EFER_NO_EXECUTE);
    let pages: [(u64, Outcome); 6] = [0, 1, 2, 3, 4, 5].map(|page| m.data(page));
    // The first page of the table is large, the second a table of its own.
    let directory = m.table();
    let table = m.table();
    m.set(directory, DATA | ALL | LARGE);
    m.set(directory + 8, table | ALL);
    for (at, (gpa, _)) in (0..).zip(pages) {
        m.set(table + at * 8, gpa | ALL);
    }
    // Everything; no writing; no users; no execution.
    for (at, flags) in (0..).zip([ALL, PRESENT | USERS, PRESENT | WRITE, ALL | NO_EXECUTE]) {
        let entry = m.entry(AREA + at * GIB, 3);
        m.set(entry, directory | flags);
    }
    let looks: [fn(&Machine, u64, Outcome) -> Verdict; 4] = [
        |m, va, marked| {
            must!(m.read(va, User), marked);
            must!(m.write(va + 8, 1, User), Done(0));
            must!(m.execute(va, User), Done(0));
            Ok(())
        },
        |m, va, marked| {
            must!(m.read(va, User), marked);
            must!(m.write(va + 8, 2, User), Fault(REFUSED | BY_WRITE | BY_USER));
            must!(m.write(va + 8, 2, Kernel), Fault(REFUSED | BY_WRITE));
            must!(m.execute(va, User), Done(0));
            Ok(())
        },
        |m, va, marked| {
            must!(m.read(va, User), Fault(REFUSED | BY_USER));
            must!(m.write(va + 8, 3, User), Fault(REFUSED | BY_WRITE | BY_USER));
            must!(m.read(va, Kernel), marked);
            must!(m.write(va + 8, 3, Kernel), Done(0));
            Ok(())
        },
        |m, va, marked| {
            must!(m.execute(va, User), Fault(REFUSED | BY_FETCH | BY_USER));
            must!(m.read(va, User), marked);
            must!(m.write(va + 8, 4, User), Done(0));
            must!(m.execute(va, Kernel), Fault(REFUSED | BY_FETCH));
            Ok(())
        },
    ];
    // Each page is reached first by another path.
    for (at, page) in pages.iter().enumerate() {
        for turn in 0..8 {
            let path = (at + turn * 3) % 4;
            let va = AREA + path as u64 * GIB + at as u64 * PAGE;
            looks[path](m, va, page.1)?;
            looks[path](m, va + LARGE_PAGE, page.1)?;
        }
    }
    check();
    // The table changes for all paths at once.
    m.set(table, pages[5].0 | ALL);
    m.set(directory, (DATA + LARGE_PAGE) | PRESENT | LARGE);
    m.mark(DATA + LARGE_PAGE);
    m.flush_all();
    for (path, look) in (0..).zip(looks) {
        let va = AREA + path * GIB;
        look(m, va + LARGE_PAGE, pages[5].1)?;
        must!(m.read(va, User), Fault(REFUSED | BY_USER));
        must!(m.write(va, 1, Kernel), Fault(REFUSED | BY_WRITE));
        must!(m.read(va, Kernel), Done((DATA + LARGE_PAGE) << 8 | 0xc3));
    }
    Ok(())
}

pub(in crate::torture) fn more_tables_than_the_limit(m: &mut Machine) -> Verdict {
    const MANY: u64 = 400;
    let pages: [(u64, Outcome); 7] = [0, 1, 2, 3, 4, 5, 6].map(|page| m.data(page));
    let va = |table: u64| AREA + table * LARGE_PAGE + (table * 7 % 512) * PAGE;
    let page = |table: u64, round: u64| pages[index((table + round) % 7)];
    for round in 0..3 {
        for table in 0..MANY {
            let entry = m.entry(va(table), 1);
            m.set(entry, page(table, round).0 | ALL);
            m.flush(va(table));
            must!(m.write(va(table) + 8, table, User), Done(0));
            // A table of long ago, which may have been dropped meanwhile.
            let old = (table * 3 + 1) % MANY;
            let has = if old <= table { round } else { round.wrapping_sub(1) };
            let right = if has == u64::MAX { Fault(BY_USER) } else { page(old, has).1 };
            must!(m.read(va(old), User), right);
        }
        check();
        for table in (0..MANY).rev() {
            must!(m.read(va(table), User), page(table, round).1);
        }
        check();
    }
    Ok(())
}

pub(in crate::torture) fn zap_in_steps(m: &mut Machine) -> Verdict {
    const PAGES: u64 = 48;
    let pages: [Outcome; index(PAGES)] = core::array::from_fn(|page| m.data(page as u64).1);
    let large = m.entry(OTHER, 2);
    m.set(large, DATA | ALL | LARGE);
    for page in 0..PAGES {
        m.map(AREA + page * PAGE, DATA + page * PAGE);
        m.write(AREA + page * PAGE + 8, page, User);
    }
    for round in 0..6 {
        // Their old frames have something else from now on.
        move_pages(DATA + 2 * PAGE, PAGES - 5);
        for page in 0..PAGES {
            must!(m.read(AREA + page * PAGE, User), pages[index(page)]);
            must!(m.read(OTHER + page * PAGE, User), pages[index(page)]);
        }
        for page in (0..PAGES).step_by(8) {
            move_pages(DATA + page * PAGE, 1);
            host(call::ZAP, [(DATA >> 12) + page, PAGES - page, 1 + round, 0]);
        }
        check();
        for page in 0..PAGES {
            must!(m.read(AREA + page * PAGE, User), pages[index(page)]);
            must!(m.read(OTHER + page * PAGE, User), pages[index(page)]);
            must!(m.read(AREA + page * PAGE + 8, User), Done(page + round));
            must!(m.write(OTHER + page * PAGE + 8, page + round + 1, User), Done(0));
            must!(m.get(DATA + page * PAGE + 8), page + round + 1);
        }
        // All of it, tables included.
        host(call::ZAP, [0, 1 << 20, 1 + 7 * round, 0]);
        check();
    }
    Ok(())
}

pub(in crate::torture) fn table_edited_while_unlinked(m: &mut Machine) -> Verdict {
    let pages = [24, 25, 26].map(|page| m.data(page));
    let table = m.table();
    let (entry, other) = (m.entry(AREA, 2), m.entry(OTHER, 2));
    for round in 0..6 {
        let (old, new) = (pages[round % 3], pages[(round + 1) % 3]);
        m.set(table, old.0 | ALL);
        m.set(entry, table | ALL);
        must!(m.read(AREA, User), old.1);
        m.change(entry, 0, AREA);
        must!(m.read(AREA, User), Fault(BY_USER));
        // Linked nowhere, or at one place of two.
        if round % 2 == 0 {
            m.set(other, table | ALL);
            must!(m.read(OTHER, User), old.1);
        }
        m.set(table, new.0 | ALL);
        m.set(table + 8, old.0 | ALL);
        // Not present before, so there is nothing to flush.
        m.set(entry, table | ALL);
        must!(m.read(AREA, User), new.1);
        must!(m.read(AREA + PAGE, User), old.1);
        must!(m.write(AREA + 8, 3, User), Done(0));
        must!(m.get(new.0 + 8), 3);
        if round % 2 == 0 {
            m.flush(OTHER);
            must!(m.read(OTHER, User), new.1);
        }
        // The table's frame becomes data, and a table again.
        m.change(entry, 0, AREA);
        m.change(other, 0, OTHER);
        m.map(OTHER + LARGE_PAGE, table);
        must!(m.write(OTHER + LARGE_PAGE, old.0 | ALL, User), Done(0));
        m.set(entry, table | ALL);
        must!(m.read(AREA, User), old.1);
        must!(m.write(OTHER + LARGE_PAGE, new.0 | ALL, User), Done(0));
        m.flush_most();
        must!(m.read(AREA, User), new.1);
        m.set(table + 8, 0);
        m.change(entry, 0, AREA);
    }
    // A level further up: a directory is linked, edited and linked again.
    let directory = m.table();
    let above = m.entry(AREA, 3);
    for round in 0..4 {
        let (old, new) = (pages[round % 3], pages[(round + 1) % 3]);
        m.set(table, old.0 | ALL);
        m.set(directory, table | ALL);
        m.set(above, directory | ALL);
        must!(m.read(AREA, User), old.1);
        m.change(above, 0, AREA);
        m.set(directory, 0);
        m.set(directory + 8, table | ALL);
        m.set(table, new.0 | ALL);
        if round % 2 == 0 {
            // A load that reaches neither.
            m.flush_most();
        }
        m.set(above, directory | ALL);
        must!(m.read(AREA, User), Fault(BY_USER));
        must!(m.read(AREA + LARGE_PAGE, User), new.1);
        m.set(directory + 8, 0);
        m.change(above, 0, AREA);
        m.flush(AREA + LARGE_PAGE);
    }
    // Only the lowest table changes, while nothing leads to it.
    m.set(directory, table | ALL);
    for round in 0..6 {
        let (old, new) = (pages[round % 3], pages[(round + 1) % 3]);
        m.set(table, old.0 | ALL);
        m.set(above, directory | ALL);
        must!(m.read(AREA, User), old.1);
        m.set(table + 8, old.0 | ALL);
        m.change(above, 0, AREA);
        m.set(table, new.0 | ALL);
        m.flush_most();
        m.set(above, directory | ALL);
        must!(m.read(AREA, User), new.1);
        m.change(above, 0, AREA);
    }
    Ok(())
}

pub(in crate::torture) fn table_moves(m: &mut Machine) -> Verdict {
    let (gpa, marked) = m.data(27);
    let (other, other_marked) = m.data(28);
    let va = AREA + 11 * PAGE;
    let entry = m.map(va, gpa);
    let above = m.entry(va, 2);
    for round in 0..4 {
        must!(m.read(va, User), marked);
        // The frame behind the table, or behind the one above, is another one now.
        move_pages(if round % 2 == 0 { entry } else { above }, 1);
        must!(m.get(entry), gpa | ALL | ACCESSED);
        m.change(entry, gpa | ALL, va);
        must!(m.read(va, User), marked);
        must!(m.get(entry), gpa | ALL | ACCESSED);
        must!(host(call::READ, [entry, 0, 0, 0]), gpa | ALL | ACCESSED);
        must!(m.write(va + 8, round, User), Done(0));
        must!(host(call::READ, [entry, 0, 0, 0]), gpa | ALL | ACCESSED | DIRTY);
        must!(host(call::READ, [entry ^ 8, 0, 0, 0]), 0);
        m.change(entry, other | ALL, va);
        must!(m.read(va, User), other_marked);
        m.change(entry, gpa | ALL, va);
        check();
    }
    // A table in a slot of its own.
    create(PLACE, 2 * PAGE);
    m.set(PLACE, gpa | ALL | ACCESSED | DIRTY);
    m.change(above, PLACE | ALL | ACCESSED, AREA);
    must!(m.read(AREA, User), marked);
    move_pages(PLACE, 1);
    must!(m.read(AREA, User), marked);
    m.change(above, 0, AREA);
    delete(ID);
    Ok(())
}

pub(in crate::torture) fn device_goes(m: &mut Machine) -> Verdict {
    host(call::DEVICE, [ID, PLACE >> 12, 0, 0]);
    m.map(AREA, PLACE);
    m.map(AREA + PAGE, PLACE);
    let entry = m.entry(AREA, 2);
    must!(m.write(AREA, 0x1111, User), Done(0));
    must!(host(call::LOOK, [0; 4]), 0x1111);
    must!(m.read(AREA + PAGE, Kernel), Done(0x1111));
    delete(ID);
    must!(m.write(AREA, 0x2222, User), Nothing);
    must!(m.write(AREA + PAGE, 0x2222, Kernel), Nothing);
    must!(host(call::LOOK, [0; 4]), 0x1111);
    check();
    // It comes back, and goes while the table that maps it is linked nowhere.
    host(call::DEVICE, [ID, PLACE >> 12, 0, 0]);
    must!(m.write(AREA, 0x3333, User), Done(0));
    let table = m.get(entry);
    m.change(entry, 0, AREA);
    m.flush(AREA + PAGE);
    delete(ID);
    check();
    m.set(entry, table);
    must!(m.write(AREA, 0x4444, User), Nothing);
    must!(host(call::LOOK, [0; 4]), 0x3333);
    // Memory where it was.
    create(PLACE, PAGE);
    let marked = m.mark(PLACE);
    must!(m.read(AREA, User), marked);
    must!(m.write(AREA + 8, 5, User), Done(0));
    must!(host(call::LOOK, [0; 4]), 0x3333);
    delete(ID);
    Ok(())
}

pub(in crate::torture) fn two_address_spaces(m: &mut Machine) -> Verdict {
    /// Memory that each space has its own of: see the host's half.
    const OVERLAY: u64 = 80 << 20;
    let space = |number: u64| host(call::SPACE, [number, 0, 0, 0]);
    let pages = [29, 30, 31].map(|page| m.data(page));
    // A page, a table, and a large page that are different in each space.
    m.map(AREA, OVERLAY + PAGE);
    let (table, large) = (m.entry(AREA + LARGE_PAGE, 2), m.entry(OTHER, 2));
    m.set(table, OVERLAY | ALL);
    m.set(large, OVERLAY | ALL | LARGE);
    // And a table that both have.
    let common = m.map(AREA + 2 * LARGE_PAGE, pages[0].0);
    for number in 0..2 {
        space(number);
        m.set(OVERLAY, pages[index(number)].0 | ALL | ACCESSED | DIRTY);
        m.set(OVERLAY + PAGE, 0x1000 + number);
    }
    for round in 0..8 {
        let number = round % 2;
        space(number);
        let (gpa, marked) = pages[index(number)];
        must!(m.read(AREA, User), Done(0x1000 + number));
        must!(m.read(AREA + LARGE_PAGE, User), marked);
        must!(m.read(OTHER, User), Done(gpa | ALL | ACCESSED | DIRTY));
        must!(m.read(OTHER + PAGE, User), Done(0x1000 + number));
        must!(m.write(OTHER + 2 * PAGE, round, User), Done(0));
        // Edited in this space, seen in this space only.
        m.change(OVERLAY, pages[2].0 | ALL, AREA + LARGE_PAGE);
        must!(m.read(AREA + LARGE_PAGE, User), pages[2].1);
        m.change(OVERLAY, gpa | ALL | ACCESSED | DIRTY, AREA + LARGE_PAGE);
        must!(m.read(AREA + LARGE_PAGE, User), marked);
        // Edited in this space, seen in the other one as well.
        let (_, before) = pages[index(round % 3)];
        let (gpa, after) = pages[index((round + 1) % 3)];
        must!(m.read(AREA + 2 * LARGE_PAGE, User), before);
        m.set(common, gpa | ALL);
        space(1 - number);
        m.flush_most();
        must!(m.read(AREA + 2 * LARGE_PAGE, User), after);
    }
    space(0);
    check();
    Ok(())
}

pub(in crate::torture) fn logged_page_becomes_table(m: &mut Machine) -> Verdict {
    const DATA_SLOT: u64 = 1;
    let pages = [32, 33, 34].map(|page| m.data(page));
    let (table, _) = m.data(40);
    m.set(table, 0);
    m.map(AREA, table);
    let above = m.entry(OTHER, 2);
    must!(m.write(AREA, pages[0].0 | ALL, User), Done(0));
    set_flags(DATA_SLOT, LOG);
    is_dirty(0);
    must!(m.write(AREA, pages[0].0 | ALL, User), Done(0));
    must!(is_dirty(table), 1);
    // It is write-protected, but only for the log. Now it is a table.
    m.set(above, table | ALL);
    must!(m.read(OTHER, User), pages[0].1);
    is_dirty(0);
    for round in 1..7 {
        let (gpa, marked) = pages[round % 3];
        // It rests while it is write-protected for the log, so that it may be followed again.
        for _ in 0..3 {
            is_dirty(0);
            m.flush_most();
        }
        must!(m.write(AREA, gpa | ALL, User), Done(0));
        if round % 2 == 0 {
            m.flush(OTHER);
        } else {
            m.flush_most();
        }
        must!(m.read(OTHER, User), marked);
        must!(is_dirty(table), 1);
        if round > 3 {
            // The walk's own write of A is one, too.
            must!(m.write(AREA, gpa | ALL, User), Done(0));
            m.flush(OTHER);
            is_dirty(0);
            must!(m.read(OTHER, Kernel), marked);
            must!(m.get(table), gpa | ALL | ACCESSED);
            must!(is_dirty(table), 1);
            must!(is_dirty(table), 0);
        }
    }
    // As a table it goes, as memory it stays, and back.
    m.change(above, 0, OTHER);
    is_dirty(0);
    must!(m.write(AREA, pages[2].0 | ALL, User), Done(0));
    must!(is_dirty(table), 1);
    m.set(above, table | ALL);
    must!(m.read(OTHER, User), pages[2].1);
    must!(m.write(OTHER + 8, 1, User), Done(0));
    must!(is_dirty(pages[2].0), 1);
    set_flags(DATA_SLOT, 0);
    must!(m.write(AREA, pages[1].0 | ALL, User), Done(0));
    m.flush(OTHER);
    must!(m.read(OTHER, User), pages[1].1);
    check();
    Ok(())
}
