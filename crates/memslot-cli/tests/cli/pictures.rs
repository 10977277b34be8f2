//! What is drawn, in the terminal and as SVG.

use crate::common::{memslot, run, set, trace, traces};
use serde_json::Value;

#[test]
fn a_map_eighty_columns_wide() {
    let (status, out, _) = run(memslot().arg("map").arg(trace("qemu-boot.jsonl")));
    assert_eq!(status, 0);
    assert!(out.lines().skip(1).all(|line| line.chars().count() <= 80), "{out}");
    for words in [
        "9 slots, 528.13 MiB, after line 130",
        "0x000100000 [8 511 MiB\u{2588}",
        "0x020000000 \u{2508}",
        " hole 3.45 GiB ",
        "0x0fd000000 [3 16 MiB\u{2593}",
        "[1 256 KiB\u{2592}",
        "\u{2592}\u{2592} ROM",
    ] {
        assert!(out.contains(words), "{words} is not in\n{out}");
    }
    assert!(!out.contains('\u{1b}'), "colours although this is no terminal");
}

#[test]
fn every_slot_of_every_trace_is_drawn_at_every_width() {
    for file in std::fs::read_dir(traces()).expect("data/traces") {
        let path = file.expect("an entry").path();
        if !path.extension().is_some_and(|extension| extension == "jsonl" || extension == "strace") {
            continue;
        }
        let (_, json, _) = run(memslot().args(["map", "--json"]).arg(&path));
        let map: Value = serde_json::from_str(&json).expect("JSON");
        let slots = map["vms"][0]["slots"].as_array().expect("slots").len();
        for width in ["40", "79", "80", "132", "500"] {
            let (status, out, error) = run(memslot().env("COLUMNS", width).arg("map").arg(&path));
            assert_eq!((status, error.as_str()), (0, ""));
            assert!(out.contains(&format!("{slots} slot")), "{out}");
            let width: usize = width.parse().expect("a number");
            let drawn = |line: &&str| line.starts_with("0x");
            let widest = out.lines().filter(drawn).map(|line| line.chars().count()).max();
            assert!(widest.is_some_and(|widest| widest <= width), "{width}: {widest:?}\n{out}");
        }
    }
}

#[test]
fn at_and_aliases_in_the_map() {
    let (_, out, _) = run(memslot().arg("map").arg(trace("qemu-microvm.strace")));
    assert!(
        out.contains("slot 1 [0xf0000, +64 KiB) and slot 3 [0xffff0000, +64 KiB) share host memory"),
        "{out}"
    );
    let (_, out, _) = run(memslot().args(["map", "--at", "17"]).arg(trace("qemu-microvm.strace")));
    assert!(out.contains("1 slot, 256 MiB, after line 17") && !out.contains("share"), "{out}");
    let (_, out, _) = run(memslot().args(["map", "--at", "3"]).arg(trace("qemu-microvm.strace")));
    assert!(out.contains("no slots after line 3"), "{out}");
}

#[test]
fn colours_only_when_asked_for() {
    let (_, plain, _) = run(memslot().env("NO_COLOR", "1").arg("map").arg(trace("qemu-boot.jsonl")));
    let (_, coloured, _) = run(memslot().env("CLICOLOR_FORCE", "1").arg("map").arg(trace("qemu-boot.jsonl")));
    assert!(!plain.contains('\u{1b}') && coloured.contains('\u{1b}'));
}

/// Checks that tags nest and that the text between them holds no bare `<` or `&`: enough to catch what a writer of
/// SVG can get wrong.
fn assert_well_formed(xml: &str) {
    let mut open = Vec::new();
    let mut rest = xml;
    while let Some(at) = rest.find('<') {
        let text = &rest[..at];
        for (nth, _) in text.match_indices('&') {
            let entity = text[nth..].split(';').next().unwrap_or("");
            assert!(["&amp", "&lt", "&gt", "&quot", "&apos"].contains(&entity), "bare & in {text:?}");
        }
        let end = rest[at..].find('>').expect("a closed tag") + at;
        let tag = &rest[at + 1..end];
        assert!(!tag.contains('<'), "{tag}");
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name)),
            None if tag.ends_with('/') => {}
            None => open.push(tag.split_whitespace().next().expect("a name")),
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "never closed: {open:?}");
}

#[test]
fn the_picture_of_every_trace_is_well_formed() {
    let folder = tempfile::tempdir().expect("a folder");
    for file in std::fs::read_dir(traces()).expect("data/traces") {
        let path = file.expect("an entry").path();
        if !path.extension().is_some_and(|extension| extension == "jsonl" || extension == "strace") {
            continue;
        }
        let picture = folder.path().join("map.svg");
        let (status, ..) = run(memslot().arg("replay").arg(&path).arg("--svg").arg(&picture));
        assert_eq!(status, 0);
        let xml = std::fs::read_to_string(&picture).expect("written");
        assert_well_formed(&xml);
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        assert!(
            xml.contains(name) && xml.contains("guest address") && xml.contains("time since the first call")
        );
        assert!(!xml.contains("NaN") && !xml.contains("inf"), "{name}");
    }
}

#[test]
fn a_picture_without_slots_without_times_and_with_an_odd_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let (trace, picture) = (folder.path().join("a <b> & \"c\".jsonl"), folder.path().join("map.svg"));
    let vm = "{\"op\":\"create_vm\",\"fd\":3,\"ret\":5,\"errno\":0}\n".to_owned();
    let smm = set(0x1_0000, 2, 0, 4096, 0x7000_0000, 0);
    let wrong = set(1, 0, 0, 4096, 0x7000_0000, 0) + &set(2, 0, 0, 4096, 0x7000_0000, 0);
    for (text, status, words) in [
        (vm.clone(), 0, "No slot was ever created"),
        (vm + &smm + &wrong, 1, "address space 1 (SMM)"),
        (wrong, 1, "line of the trace"),
    ] {
        std::fs::write(&trace, text).expect("written");
        let (came, ..) = run(memslot().arg("replay").arg(&trace).arg("--svg").arg(&picture));
        assert_eq!(came, status);
        let xml = std::fs::read_to_string(&picture).expect("written");
        assert_well_formed(&xml);
        assert!(xml.contains(words), "{words} is not in\n{xml}");
    }
}

#[test]
fn a_picture_that_cannot_be_written() {
    let (status, _, error) =
        run(memslot().arg("replay").arg(trace("kvmtool-256.jsonl")).args(["--svg", "/nowhere/map.svg"]));
    assert_eq!(status, 2);
    assert!(error.starts_with("error: /nowhere/map.svg: "), "{error}");
}

/// One page of the host behind every slot, as tests of KVM itself do it: each pair of slots is an alias.
#[test]
fn thousands_of_aliases_stay_readable() {
    let text: String =
        (0..1500).map(|slot| set(slot, 0, u64::from(slot) * 8192, 4096, 0x7000_0000, 0)).collect();
    for command in ["replay", "map"] {
        let (status, out, _) = run(memslot().args([command, "-"]).write_stdin(text.clone()));
        assert_eq!(status, 0);
        assert!(out.lines().count() < 3_100, "{}", out.lines().count());
    }
    let (_, out, _) = run(memslot().args(["map", "--json", "-"]).write_stdin(text));
    let map: Value = serde_json::from_str(&out).expect("JSON");
    let slots = map["vms"][0]["slots"].as_array().expect("slots");
    assert!(slots.iter().all(|slot| slot["aliases"].as_array().is_some_and(|aliases| aliases.len() <= 64)));
}

#[test]
fn the_heat_map_shows_what_was_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("heat.svg");
    let mut command = memslot();
    let (status, _, _) = run(command.arg("dirty").arg("--svg").arg(&file).arg(trace("qemu-migrate.jsonl")));
    let picture = std::fs::read_to_string(&file).expect("a picture");
    assert_eq!(status, 0);
    for words in ["Pages written over time", "slot 2 \u{b7} 511.25 MiB", "not written", "0x0000c0000"] {
        assert!(picture.contains(words), "{words} is not in the picture");
    }
    // Three slots' frames, the legend, and a rectangle for every bucket that was written in a round.
    assert!(picture.matches("<rect").count() > 100);
}
