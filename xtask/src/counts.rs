//! Reads how many tests passed from what the test runners print.
//!
//! Three forms are known: libtest's `test result:` (one for each test program, so they add up), nextest's `Summary`,
//! and our own last line, which a step that calls `cargo xtask` again ends with.

use std::fmt;
use std::ops::AddAssign;

/// How many passed, failed and were skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Counts {
    /// Whether nothing at all was counted.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// The counts in a line of libtest, if it is the result of a test program.
pub(crate) fn of_libtest(line: &str) -> Option<Counts> {
    let (_, numbers) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
    Some(of_parts(numbers.split(';')))
}

/// The counts in a line of nextest, if it is the summary.
///
/// Nextest repeats what a failed test printed, libtest's result included, so only one of the two may be read.
pub(crate) fn of_nextest(line: &str) -> Option<Counts> {
    let (_, numbers) = line.trim().strip_prefix("Summary [")?.split_once("run: ")?;
    Some(of_parts(split_outside_parentheses(numbers)))
}

/// The counts in the last line of an `xtask` command, if this is that line.
pub(crate) fn of_summary(line: &str) -> Option<Counts> {
    let counts = of_parts(line.split(','));
    (counts.to_string() == line.trim()).then_some(counts)
}

/// Sums parts such as `12 passed (1 slow)`, `1 failed`, `1 timed out`, `3 ignored`.
///
/// `filtered out` and `measured` are no verdicts. An unknown word is: whatever is neither passed nor skipped failed.
fn of_parts<'a>(parts: impl Iterator<Item = &'a str>) -> Counts {
    let mut counts = Counts::default();
    for part in parts {
        let Some((number, what)) = part.trim().split_once(' ') else { continue };
        let Ok(number) = number.parse::<u64>() else { continue };
        match what.split(" (").next().unwrap_or(what) {
            "passed" => counts.passed += number,
            "skipped" | "ignored" => counts.skipped += number,
            "filtered out" | "measured" => {}
            _ => counts.failed += number,
        }
    }
    counts
}

/// Splits at commas, but not inside `(1 slow, 2 flaky)`.
fn split_outside_parentheses(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_u32;
    text.split(move |c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
}

/// The line without terminal colours (`ESC [ … m`).
pub(crate) fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        plain.push_str(before);
        rest = after.split_once('m').map_or("", |(_, tail)| tail);
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(passed: u64, failed: u64, skipped: u64) -> Option<Counts> {
        Some(Counts { passed, failed, skipped })
    }

    #[test]
    fn libtest_lines() {
        let ok =
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s";
        assert_eq!(of_libtest(ok), counts(3, 0, 1));
        let bad = "test result: FAILED. 2 passed; 5 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s";
        assert_eq!(of_libtest(bad), counts(2, 5, 0));
        assert_eq!(of_libtest("test addr::tests::edges ... ok"), None);
    }

    #[test]
    fn nextest_lines() {
        assert_eq!(of_nextest("     Summary [   0.005s] 3 tests run: 3 passed, 0 skipped"), counts(3, 0, 0));
        assert_eq!(
            of_nextest(
                "Summary [  12.1s] 10/20 tests run: 6 passed (1 slow, 2 flaky), 2 failed, 1 timed out, 1 exec failed, 2 skipped"
            ),
            counts(6, 4, 2)
        );
        assert_eq!(of_nextest("    Starting 3 tests across 2 binaries (1 test skipped)"), None);
    }

    #[test]
    fn own_last_line() {
        assert_eq!(of_summary("200 passed, 1 failed, 3 skipped"), counts(200, 1, 3));
        assert_eq!(of_summary("workspace tests: 200 passed, 1 failed, 3 skipped"), None);
        assert_eq!(of_summary("200 passed, 3 skipped"), None);
    }

    #[test]
    fn colours_are_removed() {
        assert_eq!(without_colours("\u{1b}[32;1m     Summary\u{1b}[0m [ 1s]"), "     Summary [ 1s]");
        assert_eq!(without_colours("plain"), "plain");
        assert_eq!(without_colours("cut\u{1b}[3"), "cut");
    }
}
