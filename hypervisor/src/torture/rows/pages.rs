//! Rows 29 to 33: what an entry maps changes, and slots end inside large pages.

use super::*;

pub(in crate::torture) fn large_page_moves(m: &mut Machine) -> Verdict {
    const THERE: u64 = PLACE + LARGE_PAGE;
    create_in_pieces(ID, PLACE);
    create_in_pieces(ID + 1, THERE);
    let pages = [0, 5, 9].map(|page| page * PAGE);
    let here = pages.map(|at| m.mark(PLACE + at));
    let there = pages.map(|at| m.mark(THERE + at));
    let entry = m.map_large(AREA, PLACE);
    for (at, marked) in pages.iter().zip(here) {
        must!(m.read(AREA + at, User), marked);
    }
    m.change(entry, THERE | ALL | LARGE, AREA);
    for (at, marked) in pages.iter().zip(there) {
        m.flush(AREA + at);
        must!(m.read(AREA + at, User), marked);
        must!(m.write(AREA + at + 8, *at, User), Done(0));
        must!(m.get(THERE + at + 8), *at);
    }
    // Pages that were not touched before are mapped under an entry that has changed meanwhile.
    behind_our_back(entry, PLACE | ALL | LARGE);
    for page in 100..140 {
        m.write(AREA + page * PAGE + 8, page, User);
        m.read(AREA + page * PAGE, Kernel);
    }
    check_maps();
    delete(ID);
    check_maps();
    for page in 130..150 {
        m.read(AREA + page * PAGE, User);
    }
    check_maps();
    tell(entry);
    m.flush_most();
    must!(m.read(AREA + 5 * PAGE, User), Nothing);
    must!(m.read(AREA + 135 * PAGE, User), Nothing);
    m.change(entry, THERE | ALL | LARGE, AREA);
    m.flush_most();
    for (at, marked) in pages.iter().zip(there) {
        must!(m.read(AREA + at, User), marked);
    }
    // The slot is there again, with what it had.
    create_in_pieces(ID, PLACE);
    m.change(entry, PLACE | ALL | LARGE, AREA);
    m.flush_most();
    for (at, marked) in pages.iter().zip(here) {
        must!(m.read(AREA + at, User), marked);
    }
    delete(ID);
    must!(m.read(AREA, User), Nothing);
    delete(ID + 1);
    Ok(())
}

pub(in crate::torture) fn large_page_becomes_table(m: &mut Machine) -> Verdict {
    create(PLACE, LARGE_PAGE);
    let (first, first_marked) = m.data(20);
    let (second, second_marked) = m.data(21);
    // The large page's first frame is a table that maps pages 0 and 5.
    m.set(PLACE, first | ALL | ACCESSED | DIRTY);
    m.set(PLACE + 5 * 8, second | ALL | ACCESSED | DIRTY);
    let as_data = Done(first | ALL | ACCESSED | DIRTY);
    let page_5 = m.mark(PLACE + 5 * PAGE);
    let (large, table) = (PLACE | ALL | LARGE, PLACE | ALL);
    let entry = m.entry(AREA, 2);
    for round in 0..4 {
        m.set(entry, large);
        m.flush_most();
        must!(m.read(AREA, User), as_data);
        must!(m.read(AREA + 5 * PAGE, User), page_5);
        must!(m.write(AREA + 5 * PAGE + 8, round, User), Done(0));
        m.set(entry, table);
        m.flush_most();
        must!(m.read(AREA, User), first_marked);
        must!(m.read(AREA + 5 * PAGE, User), second_marked);
        must!(m.read(AREA + 6 * PAGE, User), Fault(BY_USER));
        must!(m.get(PLACE + 5 * PAGE + 8), round);
        // The same two by other paths at once, one of them without writing.
        let other = m.entry(OTHER, 2);
        m.set(other, large & !WRITE);
        must!(m.read(OTHER, User), as_data);
        must!(m.write(OTHER, 1, User), Fault(REFUSED | BY_WRITE | BY_USER));
        must!(m.read(AREA, User), first_marked);
        m.change(other, 0, OTHER);
    }
    // The table is written through the large page that it is the first frame of.
    let other = m.entry(OTHER, 2);
    m.set(other, large);
    must!(m.write(OTHER, second | ALL, User), Done(0));
    m.flush(AREA);
    must!(m.read(AREA, User), second_marked);
    must!(m.write(OTHER, first | ALL, User), Done(0));
    m.flush_most();
    must!(m.read(AREA, User), first_marked);
    m.change(other, 0, OTHER);
    // Behind our back, to and fro.
    for value in [large, table, large] {
        behind_our_back(entry, value);
        for page in [0, 5, 17, 200] {
            m.read(AREA + page * PAGE, User);
        }
        check_maps();
    }
    delete(ID);
    check_maps();
    tell(entry);
    m.flush_most();
    must!(m.read(AREA, User), Nothing);
    must!(m.read(AREA + 17 * PAGE, User), Nothing);
    Ok(())
}

pub(in crate::torture) fn memory_becomes_hole(m: &mut Machine) -> Verdict {
    let create_small = || host(call::CREATE, [ID, PLACE >> 12, 4, POOL + 1]);
    let (gpa, marked) = m.data(22);
    let (other, other_marked) = m.data(23);
    let entry = m.map(AREA, gpa);
    must!(m.read(AREA, User), marked);
    m.change(entry, HOLE | ALL, AREA);
    must!(m.read(AREA, User), Nothing);
    must!(m.write(AREA, 1, User), Nothing);
    m.change(entry, other | ALL, AREA);
    must!(m.read(AREA, User), other_marked);
    // An entry for nothing over one for memory, that nobody has taken down.
    behind_our_back(entry, HOLE | ALL);
    m.read(AREA, User);
    m.write(AREA + 8, 1, User);
    check_maps();
    tell(entry);
    m.flush(AREA);
    must!(m.read(AREA, User), Nothing);
    behind_our_back(entry, gpa | ALL);
    m.read(AREA, User);
    tell(entry);
    m.flush(AREA);
    must!(m.read(AREA, User), marked);
    // The memory itself goes and comes.
    create_small();
    let place = m.mark(PLACE + PAGE);
    m.change(entry, (PLACE + PAGE) | ALL, AREA);
    for _ in 0..3 {
        must!(m.read(AREA, User), place);
        must!(m.write(AREA + 8, 1, User), Done(0));
        delete(ID);
        must!(m.read(AREA, User), Nothing);
        must!(m.write(AREA + 8, 2, User), Nothing);
        check();
        create_small();
        must!(m.get(PLACE + PAGE + 8), 1);
    }
    // A table in a hole: the walk itself finds nothing.
    let above = m.entry(AREA, 2);
    let good = m.get(above);
    m.change(above, HOLE | ALL, AREA);
    must!(m.read(AREA, User), Nothing);
    m.change(above, good, AREA);
    must!(m.read(AREA, User), place);
    delete(ID);
    Ok(())
}

pub(in crate::torture) fn large_page_below_a_slot(m: &mut Machine) -> Verdict {
    // The pool's pages are contiguous around it, as the guest's are.
    host(call::CREATE, [ID, (PLACE >> 12) + 5, 512, POOL + 5]);
    let first = m.mark(PLACE + 5 * PAGE);
    let last = m.mark(PLACE + 511 * PAGE);
    let next = m.mark(PLACE + LARGE_PAGE);
    m.map_large(AREA, PLACE);
    m.map_large(AREA + LARGE_PAGE, PLACE + LARGE_PAGE);
    for _ in 0..2 {
        must!(m.read(AREA, User), Nothing);
        must!(m.read(AREA + 4 * PAGE, User), Nothing);
        must!(m.read(AREA + 5 * PAGE, User), first);
        must!(m.read(AREA + 511 * PAGE, User), last);
        must!(m.read(AREA + 512 * PAGE, User), next);
        must!(m.write(AREA + 516 * PAGE + 8, 1, User), Done(0));
        must!(m.read(AREA + 517 * PAGE, User), Nothing);
        set_flags(ID, LOG);
        is_dirty(0);
        must!(m.read(AREA + 5 * PAGE, User), first);
        must!(is_dirty(PLACE + 5 * PAGE), 0);
        must!(m.write(AREA + 5 * PAGE + 8, 2, User), Done(0));
        must!(is_dirty(PLACE + 5 * PAGE), 1);
        must!(m.write(AREA + 516 * PAGE + 8, 2, User), Done(0));
        must!(m.write(AREA + 4 * PAGE + 8, 2, User), Nothing);
        must!(is_dirty(PLACE + 516 * PAGE), 1);
        check();
        // Without the log pages may become large again; only what is inside the slot.
        set_flags(ID, 0);
        check();
        must!(m.read(AREA + 4 * PAGE, User), Nothing);
    }
    delete(ID);
    check();
    must!(m.read(AREA + 5 * PAGE, User), Nothing);
    must!(m.write(AREA + 516 * PAGE + 8, 3, User), Nothing);
    Ok(())
}

pub(in crate::torture) fn slots_with_odd_ends(m: &mut Machine) -> Verdict {
    create(PLACE + 3 * PAGE, 2 * LARGE_PAGE - 10 * PAGE);
    let (first, last) = (3, 2 * 512 - 8);
    m.map_large(AREA, PLACE);
    m.map_large(AREA + LARGE_PAGE, PLACE + LARGE_PAGE);
    let look = |m: &Machine, value: u64, is_ram: &dyn Fn(u64) -> bool| {
        for page in [0, 2, 3, 4, 99, 100, 101, 511, 512, 513, 699, 700, 701, last - 1, last, last + 1] {
            let is_there = (first..=last).contains(&page);
            let va = AREA + page * PAGE + 8;
            let right = if is_there && is_ram(page) { Done(0) } else { Nothing };
            must!(m.write(va, value + page, User), right);
            let right = match (is_there, is_ram(page)) {
                (true, true) => Done(value + page),
                (true, false) => Done(page),
                (false, _) => Nothing,
            };
            must!(m.read(va, Kernel), right);
        }
        Ok(())
    };
    look(m, 0, &|_| true)?;
    set_flags(ID, READ_ONLY);
    look(m, 1 << 20, &|_| false)?;
    set_flags(ID, 0);
    look(m, 0, &|_| true)?;
    // A piece from the middle of one large page to the middle of the next.
    host(call::SPLIT, [ID, (PLACE >> 12) + 100, ID + 1, 0]);
    host(call::SPLIT, [ID + 1, (PLACE >> 12) + 700, ID + 2, 0]);
    check();
    look(m, 0, &|_| true)?;
    set_flags(ID + 1, READ_ONLY);
    check();
    look(m, 0, &|page| !(100..700).contains(&page))?;
    set_flags(ID + 1, 0);
    set_flags(ID, READ_ONLY);
    set_flags(ID + 2, READ_ONLY);
    look(m, 0, &|page| (100..700).contains(&page))?;
    set_flags(ID, 0);
    set_flags(ID + 2, 0);
    host(call::MERGE, [ID, ID + 1, 0, 0]);
    host(call::MERGE, [ID, ID + 2, 0, 0]);
    check();
    look(m, 0, &|_| true)?;
    delete(ID);
    check();
    must!(m.read(AREA + 100 * PAGE, User), Nothing);
    Ok(())
}
