//! Any bytes as a trace.
#![no_main]

#[path = "../../crates/memslot-cli/src/trace/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub, reason = "the program uses all of it")]
mod trace;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut reader = trace::TraceReader::new(bytes);
    let mut records = 0;
    loop {
        match reader.next_record() {
            Ok(Some(_)) => records += 1,
            Ok(None) => break,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                break;
            }
        }
        assert!(records <= bytes.len(), "a record takes at least a byte");
    }
});
