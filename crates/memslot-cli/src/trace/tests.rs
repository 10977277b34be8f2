//! Both parsers: what they must read, what they must refuse, and that no bytes make them panic.

use super::*;

fn all(bytes: impl AsRef<[u8]>) -> Result<(Vec<Record>, Ignored), TraceError> {
    let mut reader = TraceReader::new(bytes.as_ref());
    let mut records = Vec::new();
    while let Some(record) = reader.next_record()? {
        records.push(record);
    }
    Ok((records, reader.ignored()))
}

fn one(text: &str) -> Record {
    let (mut records, _) = all(text).expect("a readable trace");
    assert_eq!(records.len(), 1, "{records:?}");
    records.remove(0)
}

fn refusal(text: &str) -> String {
    all(text).expect_err("an unreadable trace").to_string()
}

fn region(record: &Record) -> Region {
    match record.call {
        Call::SetRegion(region) => region,
        ref other => panic!("no region: {other:?}"),
    }
}

const REGION: &str = "{slot=3, flags=KVM_MEM_READONLY, guest_phys_addr=0xc0000, memory_size=131072, userspace_addr=0x7f00000c0000}";

#[test]
fn strace_with_everything_and_with_nothing_around_the_call() {
    let bare = format!("ioctl(12, KVM_SET_USER_MEMORY_REGION, {REGION}) = 0");
    let expected =
        Region { slot: 3, flags: 2, gpa: 0xc_0000, size: 131_072, hva: 0x7f00_000c_0000, second: None };
    for (line, start_ns) in [
        (bare.clone(), None),
        (format!("{bare} <0.000040>"), None),
        (format!("32016 {bare}"), None),
        (format!("[pid 32016] {bare}"), None),
        (format!("32016 1795218500.170791 {bare} <0.000034>"), Some(1_795_218_500_170_791_000)),
        (format!("[pid 1] 00:01:02.5 {bare}"), Some(62_500_000_000)),
        (format!("00:01:02 {bare}"), Some(62_000_000_000)),
        (bare.replace("(12,", "(12<anon_inode:kvm-vm>,"), None),
        (bare.replace(") = 0", ")    = 0"), None),
        (bare.replace("KVM_SET_USER_MEMORY_REGION", "0x4020ae46"), None),
    ] {
        let record = one(&line);
        assert_eq!(region(&record), expected, "{line}");
        assert_eq!((record.fd, record.start_ns, &record.answer), (12, start_ns, &Answer::Value(0)), "{line}");
        assert_eq!(record.name, "KVM_SET_USER_MEMORY_REGION");
    }
}

#[test]
fn strace_flags_by_name_by_number_and_mixed() {
    for (text, flags) in [
        ("0", 0),
        ("KVM_MEM_LOG_DIRTY_PAGES|KVM_MEM_READONLY", 3),
        ("KVM_MEM_LOG_DIRTY_PAGES|0x8", 9),
        ("0x4 /* KVM_MEM_??? */", 4),
    ] {
        let line =
            format!("ioctl(12, KVM_SET_USER_MEMORY_REGION, {REGION}) = 0").replace("KVM_MEM_READONLY", text);
        assert_eq!(region(&one(&line)).flags, flags, "{text}");
    }
}

#[test]
fn strace_results() {
    for (text, answer) in [
        ("-1 EINVAL (Invalid argument) <0.000010>", Answer::Errno("EINVAL".into())),
        ("-1 EEXIST (File exists)", Answer::Errno("EEXIST".into())),
        ("? ERESTARTSYS (To be restarted if SA_RESTART is set)", Answer::Unknown),
        ("?", Answer::Unknown),
        ("0x10", Answer::Value(16)),
    ] {
        assert_eq!(one(&format!("ioctl(12, KVM_RUN, 0) = {text}")).answer, answer);
    }
}

#[test]
fn strace_region2_and_regions_shown_as_a_pointer() {
    let second =
        REGION.replace('}', ", guest_memfd_offset=0x1000, guest_memfd=7}").replace("READONLY", "GUEST_MEMFD");
    let record = one(&format!("ioctl(12, KVM_SET_USER_MEMORY_REGION2, {second}) = 0"));
    assert_eq!(region(&record).second, Some(GuestMemfd { file: 7, offset: 0x1000 }));
    assert_eq!(region(&record).flags, 4);
    let record = one("ioctl(12, _IOC(_IOC_WRITE, 0xae, 0x49, 0xa0), 0x7ffc00001000) = 0");
    assert_eq!(
        (record.name.as_ref(), &record.call),
        ("KVM_SET_USER_MEMORY_REGION2", &Call::SetRegionUnprinted)
    );
    let record = one("ioctl(12, KVM_SET_USER_MEMORY_REGION, 0x1) = -1 EFAULT (Bad address)");
    assert_eq!(record.call, Call::SetRegionUnprinted);
}

#[test]
fn strace_halves_are_joined_by_thread() {
    let text = format!(
        "10 1.000001 ioctl(12, KVM_SET_USER_MEMORY_REGION, {REGION} <unfinished ...>\n\
         11 1.000002 ioctl(13, KVM_RUN <unfinished ...>\n\
         10 1.000003 <... ioctl resumed>) = 0 <0.000002>\n\
         12 1.000004 ioctl(14, KVM_RUN, 0 <unfinished ...>\n\
         11 1.000005 <... ioctl resumed>, 0) = -1 EINTR (Interrupted system call)\n\
         13 1.000006 <... futex resumed>) = 0\n"
    );
    let (records, ignored) = all(text).expect("readable");
    let seen: Vec<_> = records.iter().map(|r| (r.line, r.fd, r.start_ns)).collect();
    assert_eq!(seen, [(3, 12, Some(1_000_001_000)), (5, 13, Some(1_000_002_000))]);
    assert_eq!(ignored, Ignored { unfinished: 1, other_calls: 1, ..Ignored::default() });
}

#[test]
fn strace_lines_that_are_no_kvm_ioctl_are_counted() {
    let text = "openat(AT_FDCWD, \"/dev/kvm) = 1\", O_RDWR) = 11\n\
                ioctl(1, TCGETS, {c_iflag=ICRNL, ...}) = 0\n\
                --- SIGALRM {si_signo=SIGALRM} ---\n\
                qemu: warning: something\n\
                ioctl(11, KVM_CREATE_VM, 0) = 12\n\
                strace: Process 4 attached\n\
                +++ exited with 0 +++\n";
    let (records, ignored) = all(text).expect("readable");
    assert_eq!(records.len(), 1);
    assert_eq!(ignored, Ignored { other_calls: 2, events: 3, foreign: 1, unfinished: 0 });
}

#[test]
fn strace_that_would_mislead_is_refused() {
    let whole = format!("ioctl(12, KVM_SET_USER_MEMORY_REGION, {REGION}) = 0");
    for (line, word) in [
        (whole[..70].to_owned(), "cut short"),
        (whole.replace(") = 0", ""), "cut short"),
        (whole.replace(" = 0", ""), "result"),
        (whole.replace(" = 0", " = -1"), "result"),
        (whole.replace("slot=3", "slot=4294967296"), "out of range"),
        (whole.replace("131072", "99999999999999999999999"), "out of range"),
        (whole.replace("memory_size=131072, ", ""), "memory_size"),
        (whole.replace("KVM_MEM_READONLY", "KVM_MEM_SHINY"), "KVM_MEM_SHINY"),
        ("ioctl(12, KVM_SET_USER_MEMORY_REGION, {slot=3, ...}) = 0".to_owned(), "strace -v"),
    ] {
        let message = refusal(&format!("{line}\n"));
        assert!(message.starts_with("line 1: ") && message.contains(word), "{line}: {message}");
    }
}

#[test]
fn jsonl_numbers_in_every_spelling() {
    for (gpa, size) in [("\"0xc0000\"", "131072"), ("786432", "\"131072\""), ("\"786432\"", "\"0x20000\"")] {
        let line =
            format!(r#"{{"op":"set","fd":12,"slot":3,"flags":2,"gpa":{gpa},"size":{size},"hva":0,"ret":0}}"#);
        let region = region(&one(&line));
        assert_eq!((region.gpa, region.size, region.slot, region.flags), (0xc_0000, 0x2_0000, 3, 2));
    }
}

#[test]
fn jsonl_answers_as_the_library_and_as_the_kernel_give_them() {
    for (answer, name) in
        [(r#""ret":-1,"errno":17"#, "EEXIST"), (r#""ret":-22,"errno":0"#, "EINVAL"), (r#""ret":-4"#, "EINTR")]
    {
        let line = format!(r#"{{"op":"req_80","fd":12,{answer}}}"#);
        let record = one(&line);
        assert_eq!(record.answer, Answer::Errno(name.to_owned().into()));
        assert_eq!(record.name, "KVM_RUN");
    }
}

#[test]
fn jsonl_of_several_processes_and_vms() {
    let set = r#""op":"set","fd":12,"slot":3,"flags":2,"gpa":0,"size":4096,"hva":0,"ret":0"#;
    let key = |before: &str| one(&format!("{{{before}{set}}}")).key();
    assert_eq!(key(""), VmKey::Descriptor { process: None, fd: 12 });
    assert_eq!(key(r#""pid":77,"#), VmKey::Descriptor { process: Some(77), fd: 12 });
    assert_eq!(key(r#""pid":77,"vm":4,"#), VmKey::Numbered(4));
    let created = one(
        r#"{"pid":77,"vm":4,"fd":3,"op":"create_vm","type":0,"nr_memslots":32764,"guest_memfd":1,"ret":12,"errno":0}"#,
    );
    assert_eq!(created.call, Call::CreateVm(vec![(CAP_NR_MEMSLOTS, 32764), (CAP_GUEST_MEMFD, 1)]));
    assert_eq!(created.key_of(12), VmKey::Numbered(4));
    let file = one(r#"{"op":"create_guest_memfd","fd":12,"size":"0x1000","flags":0,"ret":9,"errno":0}"#);
    assert_eq!((file.call, file.name.as_ref()), (Call::CreateGuestMemfd, "KVM_CREATE_GUEST_MEMFD"));
    let cap = one(r#"{"op":"enable_cap","fd":12,"cap":168,"flags":1,"arg0":"0x3","ret":-1,"errno":22}"#);
    assert_eq!(cap.call, Call::EnableCap { cap: 168, flags: 1, arg: 3 });
}

#[test]
fn jsonl_bitmaps_that_could_not_be_recorded() {
    for (line, call) in [
        (
            r#"{"op":"get_dirty","fd":12,"slot":2,"ret":0,"errno":0}"#,
            Call::DirtyLogUnprinted { slot: Some(2), cleared: None },
        ),
        (
            r#"{"op":"clear_dirty","fd":12,"slot":2,"first":64,"num":128,"ret":0,"errno":0}"#,
            Call::DirtyLogUnprinted { slot: Some(2), cleared: Some((64, 128)) },
        ),
        (
            r#"{"op":"get_dirty","fd":12,"slot":2,"ret":-1,"errno":2}"#,
            Call::GetDirtyLog { slot: 2, bits: Bits::default() },
        ),
    ] {
        assert_eq!(one(line).call, call, "{line}");
    }
}

#[test]
fn jsonl_that_would_mislead_is_refused() {
    let set = r#"{"op":"set","fd":12,"slot":3,"flags":2,"gpa":0,"size":4096,"hva":0,"ret":0}"#;
    for (line, word) in [
        (&set[..40], "cut short"),
        (r#"{"op":"frobnicate","fd":1,"ret":0}"#, "unknown op \"frobnicate\""),
        (r#"{"op":"create_vm","fd":1}"#, "`ret` is missing"),
        (r#"{"fd":1,"ret":0}"#, "missing field `op`"),
        (r#"{"op":"set","fd":1,"ret":0}"#, "`slot` is missing"),
        (&set.replace("4096", "1e30"), "out of range"),
        (&set.replace("4096", "-4096"), "out of range"),
        (&set.replace("\"slot\":3", "\"slot\":4294967296"), "`slot` is 4294967296"),
        (&set.replace("4096", "\"0x1ffffffffffffffff\""), "out of range"),
        (&set.replace("4096", "[]"), "whole number"),
        ("{]", "not a JSON object"),
    ] {
        let message = refusal(&format!("{line}\n"));
        assert!(message.starts_with("line 1: ") && message.contains(word), "{line}: {message}");
    }
}

#[test]
fn what_is_no_trace_says_what_it_is() {
    assert!(refusal("").contains("empty"));
    assert!(refusal("\n \n").contains("empty"));
    assert!(refusal("\u{7f}ELF\0\0").contains("ELF"));
    assert!(refusal("a\0b").contains("binary"));
    assert!(refusal("\n\nDear Sir,\n").contains("line 3"));
    assert!(all([0x1f, 0x8b, 8, 0]).expect_err("gzip").to_string().contains("gzip"));
}

/// Every trace in the repository, with a byte or two changed, cut or doubled, many times over: any answer will do,
/// but there must be one.
#[test]
fn no_bytes_make_it_panic() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/traces");
    let Ok(folder) = std::fs::read_dir(folder) else {
        eprintln!("skipped: the traces are not in this package");
        return;
    };
    for file in folder.flatten() {
        let bytes = std::fs::read(file.path()).expect("a readable trace");
        // The interesting lines are those that set regions; a window around some of them is enough.
        let lines: Vec<&[u8]> =
            bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.len() < 600).collect();
        for mut numbers in memslot_testing::programs(2000) {
            let mut random = |below: usize| usize::try_from(numbers.below(below as u64)).unwrap_or(0);
            let from = random(lines.len());
            let mut piece = lines[from..lines.len().min(from + 3)].concat();
            for _ in 0..=random(3) {
                let at = random(piece.len());
                match random(5) {
                    0 => piece[at] = u8::try_from(random(256)).unwrap_or(0),
                    1 => piece.truncate(at + 1),
                    2 => _ = piece.remove(at),
                    3 => piece.insert(at, b"{}()[]\",=<>0x|.-?/*"[random(19)]),
                    _ => piece.extend_from_within(at..),
                }
                if piece.is_empty() {
                    piece.push(b'{');
                }
            }
            _ = all(&piece);
        }
    }
}
