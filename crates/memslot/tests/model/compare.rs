//! Every lookup of a version against the model.

use memslot::{
    AddressSpaceId, Gfn, GfnRange, Gpa, Hva, HvaRange, Limits, Reader, Slot, SlotId, Translation, View,
};
use memslot_testing::Random;

use crate::naive::{Known, Slots, range};

pub fn known(slot: &Slot) -> Known {
    Known { spec: slot.spec(), generation: slot.generation() }
}

/// The slots of an address space in order of gfn.
fn sorted(slots: &Slots, space: AddressSpaceId) -> Vec<Known> {
    let all = slots.range((space.get(), 0)..=(space.get(), u32::MAX));
    let mut slots: Vec<Known> = all.map(|(_, slot)| *slot).collect();
    slots.sort_unstable_by_key(Known::start);
    slots
}

/// What a translation of byte `gpa` should say.
fn translated(slots: &[Known], limits: &Limits, gpa: Gpa) -> Option<Translation> {
    let page = limits.page_size;
    let gfn = gpa.gfn(page);
    let slot = slots.iter().find(|slot| slot.spec.gfns.contains(gfn))?;
    let before = (gfn.get() - slot.start()) * page.bytes() + gpa.offset_in_page(page);
    Some(Translation {
        hva: Hva::new(slot.spec.backing.hva()?.get() + before),
        bytes_left: slot.pages() * page.bytes() - before,
        slot: slot.spec.id,
        flags: slot.spec.flags,
    })
}

/// All lookups; those that there are too many of, at random.
pub fn compare(view: &View, slots: &Slots, random: &mut Random) {
    assert_eq!(view.pages(), slots.values().map(Known::pages).sum::<u64>());
    assert_eq!(view.is_empty(), slots.is_empty());
    for space in view.address_spaces() {
        let slots = sorted(slots, space);
        assert_eq!(view.len(space), slots.len());
        assert!(view.slots(space).map(known).eq(slots.iter().copied()), "all slots in order of gfn");
        for slot in &slots {
            assert_eq!(view.slot(space, slot.spec.id).map(known), Some(*slot));
        }
        for id in (0..4).map(|_| SlotId::new(u32::try_from(random.below(5_000_000)).unwrap())) {
            let wanted = slots.iter().find(|slot| slot.spec.id == id).copied();
            assert_eq!(view.slot(space, id).map(known), wanted);
        }
        for gfn in probes(&slots, random) {
            check_frame(view, &slots, space, gfn);
        }
        check_range(view, &slots, space, range(random.below(1 << 11), random.below(1 << 11)).unwrap());
        check_range(view, &slots, space, GfnRange::new(Gfn::new(0), Gfn::new(u64::MAX)).unwrap());
        for _ in 0..2.min(slots.len()) {
            let of = random.pick(&slots);
            let from = of.start().saturating_sub(random.below(9)) + random.below(5);
            let to = from + of.pages() + random.below(90);
            check_range(view, &slots, space, GfnRange::new(Gfn::new(from), Gfn::new(to)).unwrap());
            check_hva(view, &slots, space, of.spec.backing.hva(), random);
        }
        check_hva(view, &slots, space, Some(Hva::new(random.next() & !0xffff)), random);
        check_hva(view, &slots, space, Some(Hva::new(u64::MAX - 0xf_ffff)), random);
    }
    let nowhere = AddressSpaceId::new(view.limits().address_spaces);
    assert!(view.slots(nowhere).next().is_none() && view.len(nowhere) == 0);
    assert!(view.slot_at(nowhere, Gfn::new(0)).is_none() && view.slot(nowhere, SlotId::new(0)).is_none());
}

/// The frames around every border of every slot (of some slots, where there are many), and the ends of the world.
fn probes(slots: &[Known], random: &mut Random) -> Vec<u64> {
    let mut probes = vec![0, random.below(1 << 12), random.below(1 << 52), (1 << 52) - 1, 1 << 52, u64::MAX];
    for slot in slots {
        if slots.len() < 40 || random.once_in(slots.len() as u64 / 20) {
            let (start, pages) = (slot.start(), slot.pages());
            let end = start + pages;
            probes.extend([start.saturating_sub(1), start, start + random.below(pages), end - 1, end]);
        }
    }
    probes
}

fn check_frame(view: &View, slots: &[Known], space: AddressSpaceId, gfn: u64) {
    let wanted = slots.iter().find(|slot| slot.spec.gfns.contains(Gfn::new(gfn)));
    assert_eq!(view.slot_at(space, Gfn::new(gfn)).map(known).as_ref(), wanted, "gfn {gfn:#x}");
    let page = view.page_size();
    let Some(first) = Gfn::new(gfn).gpa(page) else { return };
    for offset in [0, 5, page.bytes() - 1] {
        let gpa = first.checked_add(offset).unwrap();
        assert_eq!(view.translate(space, gpa), translated(slots, view.limits(), gpa), "{gpa}");
    }
}

fn check_range(view: &View, slots: &[Known], space: AddressSpaceId, gfns: GfnRange) {
    let wanted: Vec<_> =
        slots.iter().filter_map(|slot| Some((slot.spec.gfns.intersect(&gfns)?, *slot))).collect();
    let found: Vec<_> = view.slots_in(space, gfns).map(|piece| (piece.gfns, known(piece.slot))).collect();
    assert_eq!(found, wanted, "{gfns}");
    let (mut from, mut holes) = (gfns.start(), Vec::new());
    for piece in wanted.iter().map(|(piece, _)| *piece).chain(GfnRange::new(gfns.end(), gfns.end())) {
        holes.extend(GfnRange::new(from, piece.start()).filter(|hole| !hole.is_empty()));
        from = piece.end();
    }
    assert_eq!(view.holes_in(space, gfns).collect::<Vec<_>>(), holes, "{gfns}");
}

fn check_hva(view: &View, slots: &[Known], space: AddressSpaceId, hva: Option<Hva>, random: &mut Random) {
    let Some(hva) = hva else { return };
    let page = view.page_size().bytes();
    let start = hva.get().saturating_sub(random.below(3) * page) + random.below(page);
    let most = random.pick(&[1, 2, page, 40 * page, 1 << 43]);
    let len = 1 + random.below(most);
    let Some(asked) = HvaRange::with_len(Hva::new(start), len) else { return };
    let found: Vec<_> =
        view.slots_at_hva(space, asked).map(|hit| (known(hit.slot), hit.hvas, hit.gfns)).collect();
    assert_eq!(found, at_hva(slots, page, asked), "{asked}");
    let ids: Vec<_> = view.slot_ids_at_hva(space, hva).collect();
    let one = HvaRange::with_len(hva, 1).unwrap();
    let wanted: Vec<_> = at_hva(slots, page, one).iter().map(|(slot, _, _)| slot.spec.id).collect();
    assert_eq!(ids, wanted, "{hva}");
}

/// The slots on the host pages of `asked`, in order of host address and id.
fn at_hva(slots: &[Known], page: u64, asked: HvaRange) -> Vec<(Known, HvaRange, GfnRange)> {
    let (first, end) = (asked.start().get() / page, u128::from(asked.end().get().div_ceil(page)));
    let end = if asked.is_empty() { 0 } else { u64::try_from(end * u128::from(page)).unwrap_or(u64::MAX) };
    let Some(pages) = HvaRange::new(Hva::new(first * page), Hva::new(end)) else { return Vec::new() };
    let hit = |slot: &Known| {
        let all = HvaRange::with_len(slot.spec.backing.hva()?, slot.pages() * page)?;
        let hvas = all.intersect(&pages)?;
        let before = (hvas.start().get() - all.start().get()) / page;
        Some((*slot, hvas, range(slot.start() + before, hvas.len() / page)?))
    };
    let mut hits: Vec<_> = slots.iter().filter_map(hit).collect();
    hits.sort_unstable_by_key(|(slot, _, _)| (slot.spec.backing.hva(), slot.spec.id));
    hits
}

/// The same reader again and again: what it remembers must never be seen.
pub fn check_reader(reader: &mut Reader, slots: &Slots, limits: &Limits, random: &mut Random) {
    let Some((&(space, _), hot)) = slots.range((0, u32::try_from(random.below(9)).unwrap())..).next() else {
        return;
    };
    let space = AddressSpaceId::new(space);
    let all = sorted(slots, space);
    for gfn in [hot.start(), hot.start() + hot.pages() - 1, hot.start() + hot.pages(), hot.start(), 0] {
        let Some(gpa) = Gfn::new(gfn).gpa(limits.page_size) else { continue };
        let wanted = translated(&all, limits, gpa);
        assert_eq!(reader.translate(space, gpa), wanted, "{gpa}");
        let pinned = reader.pin();
        assert_eq!((pinned.translate(space, gpa), pinned.translate(space, gpa)), (wanted, wanted), "{gpa}");
        // The same frame of the other address space is another one.
        let other = AddressSpaceId::new(1 - space.get());
        let wanted = translated(&sorted(slots, other), limits, gpa);
        assert_eq!(pinned.translate(other, gpa), wanted, "{gpa}");
    }
}
