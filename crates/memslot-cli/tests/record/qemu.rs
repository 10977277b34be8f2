//! A real VMM: QEMU's boot with a DIMM plugged into it, recorded and replayed.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{has_kvm, lines, record, replay, skipped};
use serde_json::Value;

const QEMU: &str = "qemu-system-x86_64";
const LONG: Duration = Duration::from_secs(30);

/// QEMU's monitor, in its machine protocol.
struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(socket: &Path) -> Self {
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(began.elapsed() < LONG, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        let mut monitor = Monitor { stream: BufReader::new(stream) };
        assert!(monitor.read()["QMP"].is_object());
        monitor.execute("qmp_capabilities", "{}");
        monitor
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    fn execute(&mut self, command: &str, arguments: &str) -> Value {
        let text = format!("{{\"execute\":\"{command}\",\"arguments\":{arguments}}}\n");
        self.stream.get_mut().write_all(text.as_bytes()).expect("sent");
        loop {
            let answer = self.read();
            assert!(answer["error"].is_null(), "{command}: {answer}");
            if !answer["return"].is_null() {
                return answer["return"].clone();
            }
        }
    }
}

/// Waits until the trace says something about which the test asks.
fn wait_for(trace: &Path, what: &str, enough: impl Fn(&str) -> bool) {
    let began = Instant::now();
    while !std::fs::read_to_string(trace).is_ok_and(|text| enough(&text)) {
        assert!(began.elapsed() < LONG, "no {what} in the trace");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_boot_with_a_dimm_plugged_in() {
    if !has_kvm() {
        return;
    }
    if Command::new(QEMU).arg("--version").output().is_err() {
        return skipped("no qemu-system-x86_64 to record (cargo xtask setup installs it)");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (trace, socket) = (folder.path().join("qemu.jsonl"), folder.path().join("monitor"));
    let child = record(&trace)
        .args([QEMU, "-accel", "kvm", "-m", "256M,slots=4,maxmem=1G", "-nodefaults", "-vga", "std"])
        .args(["-display", "none", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut monitor = Monitor::connect(&socket);
    // The firmware makes RAM of what was ROM: that is when slots are cut into pieces.
    let sets = |text: &str| text.matches("\"op\":\"set\"").count();
    wait_for(&trace, "boot", |text| sets(text) >= 30);

    monitor.execute("object-add", "{\"qom-type\":\"memory-backend-ram\",\"id\":\"m0\",\"size\":134217728}");
    monitor.execute("device_add", "{\"driver\":\"pc-dimm\",\"id\":\"d0\",\"memdev\":\"m0\"}");
    let dimms = monitor.execute("query-memory-devices", "{}");
    let address = dimms[0]["data"]["addr"].as_u64().expect("an address");

    // A migration turns the dirty log on, with manual protection, and reads it.
    monitor.execute("migrate", "{\"uri\":\"exec:cat >/dev/null\"}");
    let began = Instant::now();
    while monitor.execute("query-migrate", "{}")["status"] != "completed" {
        assert!(began.elapsed() < LONG, "the migration does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
    monitor.execute("quit", "{}");
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("on 1 VM"), "{said}");

    let lines = lines(&trace);
    let dimm = |line: &&Value| {
        line["op"] == "set" && line["gpa"] == format!("{address:#x}") && line["size"] == "0x8000000"
    };
    assert!(lines.iter().find(dimm).is_some_and(|line| line["ret"] == 0), "no slot for the DIMM");
    let report = replay(&trace);
    assert!(report["compared"].as_u64().is_some_and(|compared| compared >= 35), "{report}");
    assert!(report["dirty_log"]["get"].as_u64().is_some_and(|gets| gets >= 4), "{}", report["dirty_log"]);
    assert!(
        report["dirty_log"]["clear"].as_u64().is_some_and(|clears| clears >= 1),
        "{}",
        report["dirty_log"]
    );
    assert_eq!(report["not_judged"], Value::Array(vec![]));
}
