//! No page is lost, whatever becomes of the slots.

use super::*;

/// Page tables that follow the slots: for each mapped frame, whether it can be written without a fault.
#[derive(Clone, Default)]
struct PageTables(Arc<Mutex<BTreeMap<u64, bool>>>);

impl Listener for PageTables {
    fn name(&self) -> &str {
        "page tables"
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let mut tables = self.0.lock().unwrap();
        for piece in update.pieces {
            let gfns = piece.gfns.start().get()..piece.gfns.end().get();
            match piece.kind {
                PieceKind::Changed { old, new } => {
                    // Logging is turned on: all pages are armed.
                    if new.flags().contains(LOG) && !old.flags().contains(LOG) {
                        tables.range_mut(gfns).for_each(|(_, writable)| *writable = false);
                    }
                }
                PieceKind::Removed { .. } | PieceKind::Added { .. } => {
                    tables.retain(|gfn, _| !gfns.contains(gfn));
                }
            }
        }
        Ok(())
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

/// Write protection that is in force after the flush, and fails now and then.
struct Protection<'t> {
    tables: &'t PageTables,
    pending: Vec<u64>,
    random: &'t mut Random,
    fails: bool,
}

impl Rearm for Protection<'_> {
    type Error = Refused;

    fn rearm(&mut self, space: AddressSpaceId, gfns: GfnRange) -> Result<(), Refused> {
        assert_eq!(space, RAM);
        if self.fails && self.random.once_in(4) {
            return Err(Refused);
        }
        self.pending.extend(gfns.start().get()..gfns.end().get());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Refused> {
        if self.fails && self.random.once_in(2) {
            return Err(Refused);
        }
        let mut tables = self.tables.0.lock().unwrap();
        for gfn in self.pending.drain(..) {
            tables.entry(gfn).and_modify(|writable| *writable = false);
        }
        Ok(())
    }
}

/// What the dirty log is for: a page of a logged slot that can be written unseen is still in the ring.
#[test]
fn no_page_is_lost_whatever_becomes_of_the_slots() {
    for mut random in programs(if cfg!(miri) { 1 } else { 60 }) {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        let tables = PageTables::default();
        table.add_listener(Box::new(tables.clone())).unwrap();
        let (mut ring, mut reader) = ring();
        // The frames in the ring, in order.
        let mut listed = VecDeque::new();
        let mut stale = 0;
        for _ in 0..1000 {
            let id = SlotId::new(u32::try_from(random.below(6)).unwrap());
            let other = SlotId::new(u32::try_from(random.below(6)).unwrap());
            let gfn = random.below(256);
            match random.below(24) {
                0 => {
                    // Few host addresses, so that memory often comes back to where it was.
                    let hva = 0x7000_0000 + ((gfn & !15) << 12);
                    let new = spec(id.get(), gfn & !15, 16 + 16 * random.below(4), hva, LOG);
                    drop(table.transaction(|tx| match tx.slot(RAM, id) {
                        Some(_) => tx.delete(RAM, id),
                        None => tx.create(new),
                    }));
                }
                1 => drop(table.transaction(|tx| tx.split(RAM, id, Gfn::new(gfn), other))),
                2 => drop(table.transaction(|tx| tx.merge(RAM, id, other))),
                3 => drop(table.transaction(|tx| tx.resize(RAM, id, 1 + gfn / 4))),
                4 => drop(table.transaction(|tx| tx.move_to(RAM, id, Gfn::new(gfn)))),
                5 => {
                    let flags = if random.once_in(3) { SlotFlags::empty() } else { LOG };
                    drop(table.transaction(|tx| tx.set_flags(RAM, id, flags)));
                }
                6 => {
                    // The same memory under another id, and under the same one as a new slot.
                    drop(table.transaction(|tx| {
                        if let Some(&slot) = tx.slot(RAM, id) {
                            tx.delete(RAM, id)?;
                            tx.create(SlotSpec { id: other, ..slot.spec() })?;
                        }
                        Ok(())
                    }));
                }
                7 => drop(reader.collect().take(usize::try_from(gfn).unwrap()).count()),
                8 => {
                    let stop_after = if random.once_in(2) { random.below(20) } else { u64::MAX };
                    let fails = random.once_in(3);
                    let mut asked = 0;
                    let mut mmu =
                        Protection { tables: &tables, pending: Vec::new(), random: &mut random, fails };
                    let reset = ring.reset(table.view(), &mut mmu, || {
                        asked += 1;
                        asked > stop_after
                    });
                    assert!(reset.is_err() || mmu.pending.is_empty(), "re-armed and not flushed");
                    let done = reset.unwrap_or_else(|error| error.done);
                    listed.drain(..done.entries);
                    stale += done.stale;
                    assert_eq!(listed.len(), ring.used() as usize);
                }
                _ => {
                    // The guest writes some neighbours.
                    for gfn in gfn..gfn + random.below(8) {
                        let Some(slot) = table.view().slot_at(RAM, Gfn::new(gfn)) else { continue };
                        let writable = tables.0.lock().unwrap().get(&gfn).copied();
                        if writable == Some(true) || ring.is_soft_full() {
                            continue;
                        }
                        let pushed = ring.push(slot, gfn - slot.base_gfn().get()).unwrap();
                        if pushed != Pushed::NotLogged {
                            listed.push_back(gfn);
                        }
                        tables.0.lock().unwrap().insert(gfn, true);
                    }
                }
            }
            for (&gfn, &writable) in &*tables.0.lock().unwrap() {
                let slot = table.view().slot_at(RAM, Gfn::new(gfn)).expect("a mapped frame has a slot");
                let unseen = writable && slot.flags().contains(LOG) && !listed.contains(&gfn);
                assert!(!unseen, "the guest writes {gfn:#x} unseen");
            }
        }
        assert!(stale > 0 || cfg!(miri), "too tame");
    }
}
