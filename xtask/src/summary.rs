//! The verdict on each step, and the summary at the end.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use crate::counts::Counts;
use crate::step::{Reads, Step};

/// What became of a step; failed and skipped say why.
pub(crate) enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

/// A step that has run.
pub(crate) struct Finished {
    pub(crate) name: String,
    pub(crate) verdict: Verdict,
    pub(crate) counts: Counts,
    pub(crate) took: Duration,
}

/// How a program ended: its exit status in words if that is a failure, and the tests it counted.
pub(crate) struct Outcome {
    pub(crate) failure: Option<String>,
    pub(crate) counts: Counts,
}

/// The verdict on a step that has ended.
pub(crate) fn judge(step: &Step, outcome: &Outcome) -> (Verdict, Counts) {
    let counts = outcome.counts;
    let verdict = match &outcome.failure {
        Some(_) if counts.failed > 0 => Verdict::Failed(counts.to_string()),
        Some(status) => Verdict::Failed(status.clone()),
        None if counts.failed > 0 => Verdict::Failed(format!("{counts}, yet it ended as if all were well")),
        None if step.reads != Reads::Nothing && counts.is_empty() => {
            Verdict::Failed("no test ran".to_owned())
        }
        None => Verdict::Passed,
    };
    (verdict, counts)
}

/// The totals and the text before them: a line for each step, then what was skipped and why.
///
/// A step that counts tests contributes its tests, any other step counts as one. A step that failed without a failed
/// test (it did not compile, say) adds one failure.
pub(crate) fn summarise(steps: &[Finished], said: &str, inherited: &[String]) -> (Counts, String) {
    let mut total = Counts::default();
    let mut text = String::from("== summary\n");
    let mut reasons = BTreeMap::<&str, u64>::new();
    for step in steps {
        total += step.counts;
        let one = u64::from(step.counts.is_empty());
        let outcome = match &step.verdict {
            Verdict::Passed => {
                total.passed += one;
                "passed".to_owned()
            }
            Verdict::Skipped(why) => {
                total.skipped += one;
                format!("skipped: {why}")
            }
            Verdict::Failed(why) => {
                total.failed += u64::from(step.counts.failed == 0);
                format!("FAILED: {why}")
            }
        };
        let _ = writeln!(text, "{:<28} {:>9}  {outcome}", step.name, seconds(step.took));
    }
    for line in said.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line.starts_with("skipped: ") {
            // The runner could not know that the test did nothing, and has counted it as passed.
            total.passed = total.passed.saturating_sub(1);
            total.skipped += 1;
        }
        *reasons.entry(line).or_default() += 1;
    }
    for (reason, times) in reasons {
        let _ = match times {
            1 => writeln!(text, "{reason}"),
            _ => writeln!(text, "{reason} ({times} times)"),
        };
    }
    for line in inherited {
        let _ = writeln!(text, "{line}");
    }
    (total, text)
}

/// A duration for people.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(verdict: Verdict, passed: u64, failed: u64) -> Finished {
        let counts = Counts { passed, failed, skipped: 0 };
        Finished { name: "step".to_owned(), verdict, counts, took: Duration::ZERO }
    }

    #[test]
    fn tests_that_skip_themselves_are_not_passed() {
        let steps = [finished(Verdict::Passed, 10, 0), finished(Verdict::Passed, 0, 0)];
        let said = "skipped: no /dev/kvm\nskipped: no /dev/kvm\npartly skipped: dirty log\n";
        let (total, text) = summarise(&steps, said, &[]);
        assert_eq!(total, Counts { passed: 9, failed: 0, skipped: 2 });
        assert!(text.contains("skipped: no /dev/kvm (2 times)\n"), "{text}");
        assert!(text.contains("partly skipped: dirty log\n"), "{text}");
    }

    #[test]
    fn a_failure_is_counted_once() {
        let steps = [
            finished(Verdict::Failed("2 tests".to_owned()), 8, 2),
            finished(Verdict::Failed("exit status: 101".to_owned()), 0, 0),
            finished(Verdict::Failed("exit status: 101".to_owned()), 3, 0),
            finished(Verdict::Skipped("no nightly".to_owned()), 0, 0),
        ];
        let (total, _) = summarise(&steps, "", &[]);
        assert_eq!(total, Counts { passed: 11, failed: 4, skipped: 1 });
    }

    #[test]
    fn a_test_step_without_tests_fails() {
        let outcome = Outcome { failure: None, counts: Counts::default() };
        assert!(matches!(judge(&Step::cargo("a", ["test"]).tests(), &outcome).0, Verdict::Failed(_)));
        assert!(matches!(judge(&Step::cargo("a", ["check"]), &outcome).0, Verdict::Passed));
    }
}
