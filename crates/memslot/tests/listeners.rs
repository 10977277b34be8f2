//! What listeners hear: the exact pieces, in an order that never overlaps, and every failure taken back.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use memslot::{
    AddressSpaceId, Backing, Gfn, GfnRange, Hva, Limits, Listener, ListenerError, PieceKind, Reason, Slot,
    SlotFlags, SlotId, SlotSpec, SlotTable, Update, View,
};
use memslot_testing::{Random, programs};

const RAM: AddressSpaceId = AddressSpaceId::NORMAL;

fn spec(id: u32, base: u64, pages: u64, hva_page: u64) -> SlotSpec {
    SlotSpec {
        address_space: RAM,
        id: SlotId::new(id),
        gfns: GfnRange::with_len(Gfn::new(base), pages).unwrap(),
        backing: Backing::Host { hva: Hva::new(hva_page << 12) },
        flags: SlotFlags::empty(),
    }
}

/// What is behind a frame: the host page, the slot and its flags.
type Frames = BTreeMap<(AddressSpaceId, u64), (u64, Slot)>;

fn frames(view: &View) -> Frames {
    let mut frames = Frames::new();
    for space in view.address_spaces() {
        for slot in view.slots(space) {
            for gfn in slot.base_gfn().get()..slot.gfns().end().get() {
                frames.insert((space, gfn), (slot.hva_of(Gfn::new(gfn)).unwrap().get(), *slot));
            }
        }
    }
    frames
}

/// Applies an update piece by piece, and checks each.
fn follow(frames: &mut Frames, update: &Update<'_>) {
    for piece in update.pieces {
        assert!(!piece.gfns.is_empty());
        for gfn in piece.gfns.start().get()..piece.gfns.end().get() {
            let key = (piece.address_space, gfn);
            let hva = |slot: &Slot| slot.hva_of(Gfn::new(gfn)).expect("the piece lies in its slot").get();
            match piece.kind {
                PieceKind::Removed { old } => assert_eq!(frames.remove(&key), Some((hva(&old), old))),
                PieceKind::Added { new } => assert_eq!(frames.insert(key, (hva(&new), new)), None),
                PieceKind::Changed { old, new } => {
                    assert_eq!(hva(&old), hva(&new), "the backing stays");
                    assert_eq!(frames.insert(key, (hva(&new), new)), Some((hva(&old), old)));
                }
            }
        }
    }
}

#[derive(Clone, Default)]
struct Follower(Arc<Mutex<Frames>>);

impl Listener for Follower {
    fn name(&self) -> &str {
        "follower"
    }

    fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
        let mut all = self.0.lock().unwrap();
        assert_eq!(*all, frames(update.before));
        follow(&mut all, update);
        assert_eq!(*all, frames(update.after));
        for change in update.slots {
            let of = |view: &View, slot: Option<Slot>| {
                slot.is_none_or(|slot| view.slot(slot.address_space(), slot.id()) == Some(&slot))
            };
            assert!(
                change.old != change.new && of(update.before, change.old) && of(update.after, change.new)
            );
        }
        Ok(())
    }

    fn undo(&mut self, update: &Update<'_>) {
        *self.0.lock().unwrap() = frames(update.before);
    }
}

fn random_transaction(table: &mut SlotTable, random: &mut Random) -> bool {
    let ids: Vec<SlotId> = table.view().slots(RAM).map(Slot::id).collect();
    table
        .transaction(|tx| {
            for _ in 0..1 + random.below(6) {
                let id = SlotId::new(u32::try_from(random.below(12)).unwrap());
                let known = if ids.is_empty() { id } else { random.pick(&ids) };
                let known = tx.slot(RAM, known).copied();
                let base = random.below(70);
                // Operations that would be refused are left out, so that most transactions come to be.
                match (random.below(8), known) {
                    (0..2, _) if tx.slot(RAM, id).is_none() => {
                        // Few host pages, so that a slot often comes back with the same backing.
                        let hva_page = 1000 + base + random.below(2) * 8;
                        tx.create(spec(id.get(), base, 1 + random.below(14), hva_page))?;
                    }
                    (2, Some(slot)) => tx.delete(RAM, slot.id())?,
                    (3, Some(slot)) => tx.move_to(RAM, slot.id(), Gfn::new(base))?,
                    (4, Some(slot)) => tx.set_read_only(RAM, slot.id(), random.once_in(2))?,
                    (5, Some(slot)) => tx.resize(RAM, slot.id(), 1 + random.below(20))?,
                    (6, Some(slot)) if slot.pages() > 1 && tx.slot(RAM, id).is_none() => {
                        let at = slot.base_gfn().get() + 1 + random.below(slot.pages() - 1);
                        tx.split(RAM, slot.id(), Gfn::new(at), id)?;
                    }
                    (7, Some(slot)) => {
                        let high = ids.iter().filter_map(|&id| tx.slot(RAM, id).copied()).find(|high| {
                            high.base_gfn() == slot.gfns().end()
                                && high.flags() == slot.flags()
                                && slot.backing().advanced(slot.pages() << 12) == Some(high.backing())
                        });
                        if let Some(high) = high {
                            tx.merge(RAM, slot.id(), high.id())?;
                        }
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .is_ok()
}

#[test]
fn pieces_lead_from_one_version_to_the_next() {
    let rounds = if cfg!(miri) { 20 } else { 3000 };
    let programs = programs(4);
    let (mut done, count) = (0, programs.len());
    for mut random in programs {
        let mut table = SlotTable::new(Limits::default()).unwrap();
        table.add_listener(Box::new(Follower::default())).unwrap();
        for _ in 0..rounds {
            done += usize::from(random_transaction(&mut table, &mut random));
        }
    }
    assert!(done > count * rounds / 4, "many transactions come to be: {done}");
}

type Calls = Arc<Mutex<Vec<String>>>;

/// Writes down its calls, and fails where it is told to.
struct Recorder {
    name: String,
    calls: Calls,
    fails_in: &'static str,
    panics: bool,
}

impl Recorder {
    fn call(&self, what: &'static str) -> Result<(), ListenerError> {
        self.calls.lock().unwrap().push(format!("{what} {}", self.name));
        assert!(!self.panics || self.fails_in != what, "on purpose");
        if self.fails_in == what { Err("on purpose".into()) } else { Ok(()) }
    }
}

impl Listener for Recorder {
    fn name(&self) -> &str {
        &self.name
    }

    fn prepare(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        self.call("prepare")
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        self.call("commit")
    }

    fn undo(&mut self, _: &Update<'_>) {
        let _ = self.call("undo");
    }

    fn abort(&mut self, _: &Update<'_>) {
        let _ = self.call("abort");
    }

    fn settled(&mut self, _: &Update<'_>) {
        let _ = self.call("settled");
    }
}

/// A table with three listeners a, b, c of which one fails.
fn recorded(failing: &str, fails_in: &'static str) -> (SlotTable, Calls) {
    recorded_until(failing, fails_in, false)
}

fn recorded_until(failing: &str, fails_in: &'static str, panics: bool) -> (SlotTable, Calls) {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    table.create(spec(0, 0, 16, 1000)).unwrap();
    let calls = Calls::default();
    for name in ["a", "b", "c"] {
        let fails_in = if name == failing { fails_in } else { "" };
        let recorder = Recorder { name: name.to_owned(), calls: calls.clone(), fails_in, panics };
        table.add_listener(Box::new(recorder)).unwrap();
    }
    (table, calls)
}

fn said(calls: &Calls) -> String {
    std::mem::take(&mut *calls.lock().unwrap()).join(", ")
}

#[test]
fn listeners_are_called_in_order() {
    let (mut table, calls) = recorded("", "");
    table.create(spec(1, 100, 1, 2000)).unwrap();
    assert_eq!(
        said(&calls),
        "prepare a, prepare b, prepare c, commit a, commit b, commit c, settled a, settled b, settled c"
    );
    table.transaction(|_| Ok(())).unwrap();
    table.set_flags(RAM, SlotId::new(1), SlotFlags::empty()).unwrap();
    table
        .transaction(|tx| {
            tx.create(spec(2, 200, 1, 3000))?;
            tx.delete(RAM, SlotId::new(2))
        })
        .unwrap();
    assert_eq!(said(&calls), "", "nothing has changed");
    table.create(spec(3, 100, 1, 2000)).unwrap_err();
    assert_eq!(said(&calls), "", "an invalid transaction is nobody's business");
}

/// A version keeps what it carries alive, so a log that is attached must not hold one longer than it has to.
#[test]
fn a_dirty_log_holds_no_version_but_the_current_one() {
    let mut table = SlotTable::new(Limits::default()).unwrap();
    let log = memslot::dirty::DirtyLog::attach(&mut table).unwrap();
    table.create(SlotSpec { flags: SlotFlags::LOG_DIRTY_PAGES, ..spec(0, 0, 16, 1000) }).unwrap();
    log.mark(RAM, Gfn::new(3));
    table.delete(RAM, SlotId::new(0)).unwrap();
    table.reclaim();
    assert_eq!(table.stats().versions, 1);
}

#[test]
fn whoever_has_prepared_aborts_when_a_later_one_refuses() {
    for (failing, expected) in [
        ("a", "prepare a"),
        ("b", "prepare a, prepare b, abort a"),
        ("c", "prepare a, prepare b, prepare c, abort b, abort a"),
    ] {
        let (mut table, calls) = recorded(failing, "prepare");
        let (before, generation) = (frames(table.view()), table.view().generation());
        let error = table.delete(RAM, SlotId::new(0)).unwrap_err();
        assert!(matches!(&error.reason, Reason::Listener { listener, .. } if &**listener == failing));
        assert_eq!(said(&calls), expected);
        assert_eq!((frames(table.view()), table.view().generation()), (before, generation));
    }
}

#[test]
fn whoever_has_committed_is_undone_when_a_later_one_fails() {
    let prepared = "prepare a, prepare b, prepare c, ";
    for (failing, expected) in [
        ("a", "commit a, abort c, abort b"),
        ("b", "commit a, commit b, abort c, undo a"),
        ("c", "commit a, commit b, commit c, undo b, undo a"),
    ] {
        let (mut table, calls) = recorded(failing, "commit");
        let (before, generation) = (frames(table.view()), table.view().generation());
        let held = table.snapshot();
        let error = table.delete(RAM, SlotId::new(0)).unwrap_err();
        assert_eq!(error.to_string(), format!("listener {failing} refused: on purpose"));
        assert_eq!(said(&calls), format!("{prepared}{expected}"));
        assert_eq!(frames(table.view()), before);
        assert_eq!(frames(&held), before);
        assert_eq!(
            table.view().generation(),
            generation + 2,
            "the change and its taking back were published"
        );
    }
}

/// Nobody is left with half a change: readers that act on a version nobody follows would act on memory that goes.
#[test]
fn a_panic_is_taken_back_like_an_error() {
    let prepared = "prepare a, prepare b, prepare c, ";
    for (failing, fails_in, expected, published) in [
        ("a", "prepare", "prepare a".to_owned(), 0),
        ("c", "prepare", format!("{prepared}abort b, abort a"), 0),
        ("a", "commit", format!("{prepared}commit a, abort c, abort b"), 2),
        ("b", "commit", format!("{prepared}commit a, commit b, abort c, undo a"), 2),
        ("c", "commit", format!("{prepared}commit a, commit b, commit c, undo b, undo a"), 2),
    ] {
        let (mut table, calls) = recorded_until(failing, fails_in, true);
        let (before, generation) = (frames(table.view()), table.view().generation());
        let nodes = table.stats().nodes;
        let held = table.snapshot();
        catch_unwind(AssertUnwindSafe(|| table.delete(RAM, SlotId::new(0)))).unwrap_err();
        assert_eq!(said(&calls), expected);
        assert_eq!(frames(table.view()), before);
        assert_eq!(frames(&held), before);
        assert_eq!(table.view().generation(), generation + published);
        drop(held);
        table.reclaim();
        assert_eq!((table.stats().nodes, table.stats().versions), (nodes, 1));
    }
    // All have followed: the change stays.
    let (mut table, calls) = recorded_until("b", "settled", true);
    catch_unwind(AssertUnwindSafe(|| table.delete(RAM, SlotId::new(0)))).unwrap_err();
    assert_eq!(
        said(&calls),
        format!("{prepared}commit a, commit b, commit c, settled a, settled b, settled c")
    );
    assert!(table.view().is_empty());
}

/// Fails every third time, in the middle of a long life.
struct Sometimes(u32);

impl Listener for Sometimes {
    fn name(&self) -> &str {
        "sometimes"
    }

    fn commit(&mut self, _: &Update<'_>) -> Result<(), ListenerError> {
        self.0 += 1;
        if self.0 % 3 == 0 { Err("on purpose".into()) } else { Ok(()) }
    }

    fn undo(&mut self, _: &Update<'_>) {}
}

#[test]
fn a_table_survives_many_failed_commits() {
    let (mut table, mut random) = (SlotTable::new(Limits::default()).unwrap(), Random::new(99));
    let follower = Follower::default();
    table.add_listener(Box::new(follower.clone())).unwrap();
    table.add_listener(Box::new(Sometimes(0))).unwrap();
    let mut held = Vec::new();
    for _ in 0..if cfg!(miri) { 20 } else { 2000 } {
        let before = frames(table.view());
        if !random_transaction(&mut table, &mut random) {
            assert_eq!(frames(table.view()), before);
            assert_eq!(*follower.0.lock().unwrap(), before);
        }
        if random.once_in(50) {
            held.push((table.snapshot(), frames(table.view())));
        }
    }
    for (snapshot, frames_then) in &held {
        assert_eq!(&frames(snapshot), frames_then);
    }
    drop(held);
    loop {
        let first = table.view().slots(RAM).next().map(Slot::id);
        let Some(id) = first else { break };
        let _ = table.delete(RAM, id);
    }
    table.reclaim();
    assert_eq!((table.stats().nodes, table.stats().versions), (0, 1));
}

#[test]
fn what_keeps_its_backing_is_changed_and_not_removed() {
    let (mut table, _) = recorded("", "");
    let heard = Arc::new(Mutex::new(String::new()));
    struct Kinds(Arc<Mutex<String>>);
    impl Listener for Kinds {
        fn name(&self) -> &str {
            "kinds"
        }
        fn commit(&mut self, update: &Update<'_>) -> Result<(), ListenerError> {
            let kinds = update.pieces.iter().map(|piece| match piece.kind {
                PieceKind::Removed { .. } => format!("-{} ", piece.gfns),
                PieceKind::Changed { .. } => format!("~{} ", piece.gfns),
                PieceKind::Added { .. } => format!("+{} ", piece.gfns),
            });
            *self.0.lock().unwrap() = kinds.collect();
            Ok(())
        }
        fn undo(&mut self, _: &Update<'_>) {}
    }
    table.add_listener(Box::new(Kinds(heard.clone()))).unwrap();
    let said = || std::mem::take(&mut *heard.lock().unwrap());
    let (low, high) = (SlotId::new(0), SlotId::new(1));
    table.transaction(|tx| tx.split(RAM, low, Gfn::new(6), high)).unwrap();
    assert_eq!(said(), "~[0x0, 0x6) ~[0x6, 0x10) ");
    table.transaction(|tx| tx.set_read_only(RAM, high, true)).unwrap();
    assert_eq!(said(), "~[0x6, 0x10) ");
    table.transaction(|tx| tx.set_read_only(RAM, high, false)).unwrap();
    said();
    table.transaction(|tx| tx.merge(RAM, low, high)).unwrap();
    assert_eq!(said(), "~[0x0, 0x6) ~[0x6, 0x10) ");
    table.transaction(|tx| tx.resize(RAM, low, 20)).unwrap();
    assert_eq!(said(), "~[0x0, 0x10) +[0x10, 0x14) ");
    table.transaction(|tx| tx.resize(RAM, low, 4)).unwrap();
    assert_eq!(said(), "-[0x4, 0x14) ~[0x0, 0x4) ");
    table.move_to(RAM, low, Gfn::new(2)).unwrap();
    assert_eq!(said(), "-[0x0, 0x2) -[0x2, 0x4) +[0x2, 0x4) +[0x4, 0x6) ");
}
