//! What a run is shown as: for people and as JSON.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::machine::Ended;
use crate::summary::seconds;

/// A run, judged.
pub(crate) struct Run {
    /// Words such as `("scenario", "dirty")` that say what was run.
    pub(crate) what: Vec<(&'static str, String)>,
    pub(crate) ended: Ended,
    /// A second run, which should be just the same.
    pub(crate) again: Option<Ended>,
    /// The same kernel and workload without the hypervisor.
    pub(crate) plain: Option<Ended>,
}

impl Run {
    /// Passed, or the reason why not.
    pub(crate) fn verdict(&self) -> Result<(), String> {
        verdict(&self.ended)?;
        self.again.as_ref().map_or(Ok(()), |again| same(&self.ended, again))
    }

    /// How many ticks of the time stamp counter that is: the guest's first program and the hypervisor say what the counter was at
    /// two moments that can be told from outside.
    fn microsecond(&self) -> Option<f64> {
        // The counter of a machine whose time follows its instructions has nothing to do with time.
        if self.what.contains(&("icount", "true".to_owned())) {
            return None;
        }
        let figures = Figures(&self.ended.figures);
        let ticks = figures.number("ended").checked_sub(figures.number("ready"))?;
        let time = self.ended.wall.checked_sub(self.ended.userland?)?;
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        Some(ticks as f64 / time.as_secs_f64() / 1e6).filter(|ticks| *ticks >= 1.0)
    }

    /// How many times as long as without the hypervisor; and the same of the processor time, which says more on a machine that
    /// does something else as well.
    pub(crate) fn ratios(&self) -> Option<(f64, Option<f64>)> {
        let (ended, plain) = (&self.ended, self.plain.as_ref()?);
        let ratio = |one: Duration, other: Duration| one.as_secs_f64() / other.as_secs_f64();
        let processor = ended.processor.zip(plain.processor).map(|(one, other)| ratio(one, other));
        Some((ratio(ended.wall, plain.wall), processor))
    }

    /// The summary.
    pub(crate) fn text(&self) -> String {
        let figures = Figures(&self.ended.figures);
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            if !value.is_empty() {
                let _ = writeln!(text, "  {name:<13} {value}");
            }
        };
        let times = |ended: &Ended| {
            let userland = ended.userland.map(|time| format!(", user space after {}", seconds(time)));
            format!("{} in all{}", seconds(ended.wall), userland.unwrap_or_default())
        };
        line("time", times(&self.ended));
        if let (Some(plain), Some((wall, processor))) = (&self.plain, self.ratios()) {
            line("plain QEMU", times(plain));
            let processor = processor.map(|ratio| format!(", {ratio:.2} times the processor time"));
            line("ratio", format!("{wall:.2} times as long{}", processor.unwrap_or_default()));
        }
        line("hypervisor", figures.shares(self.microsecond()));
        line("exits", figures.list("exits."));
        let again = figures.number("events_delivered_again");
        if again > 0 {
            line("events", format!("{} delivered again, as a fault had cut them off", grouped(again)));
        }
        line("faults", figures.list("faults."));
        line("processors", figures.processors());
        let (linked, all) = (figures.number("tables.linked"), figures.number("tables.all"));
        if all > 0 {
            line("tables", format!("{linked} linked, {all} in all"));
        }
        line("pages", figures.list("pages."));
        line("flushes", figures.flushes());
        line("shadow", figures.list("shadow."));
        line("roles", figures.list("roles."));
        line("rmap", figures.lengths());
        line("dirty", figures.dirty());
        for part in ["hotplug", "storm"] {
            line(part, figures.list(&format!("{part}.")));
        }
        for part in ["without_flush", "with_flush"] {
            line(&part.replace('_', " "), figures.stale(part));
        }
        text
    }

    /// One JSON object.
    pub(crate) fn json(&self) -> String {
        let mut fields: Vec<String> =
            self.what.iter().map(|(name, value)| format!("{}: {}", quoted(name), word(value))).collect();
        let verdict = self.verdict().err().unwrap_or_else(|| "PASS".to_owned());
        fields.push(format!("\"verdict\": {}", quoted(&verdict)));
        let mut times = |name: &str, ended: &Ended| {
            fields.push(format!("\"{name}_seconds\": {:.3}", ended.wall.as_secs_f64()));
            if let Some(processor) = ended.processor {
                fields.push(format!("\"{name}_processor_seconds\": {:.3}", processor.as_secs_f64()));
            }
            if let Some(userland) = ended.userland {
                fields.push(format!("\"{name}_userland_seconds\": {:.3}", userland.as_secs_f64()));
            }
        };
        times("wall", &self.ended);
        if let Some(plain) = &self.plain {
            times("plain", plain);
        }
        if let Some((wall, processor)) = self.ratios() {
            fields.push(format!("\"ratio\": {wall:.3}"));
            fields.extend(processor.map(|ratio| format!("\"processor_ratio\": {ratio:.3}")));
        }
        for (name, value) in self.ended.figures.iter().filter(|(name, _)| *name != "result") {
            fields.push(format!("{}: {}", quoted(name), word(value)));
        }
        format!("{{{}}}", fields.join(", "))
    }
}

fn verdict(ended: &Ended) -> Result<(), String> {
    let result = ended.figures.get("result").map(String::as_str);
    match (ended.status, result) {
        (None, _) => Err(format!("no end after {}", seconds(ended.wall))),
        // The device that ends QEMU makes 2n + 1 of n; the hypervisor's n is 0x10 if all is well.
        (Some(33), Some("PASS")) => Ok(()),
        (_, Some(result)) if result != "PASS" => Err(result.to_owned()),
        (Some(status), _) => {
            Err(format!("QEMU ended with status {status}, the machine was reset or crashed"))
        }
    }
}

/// Whether two runs said the same.
fn same(one: &Ended, other: &Ended) -> Result<(), String> {
    let mut lines = one.console.lines().zip(other.console.lines());
    if let Some((line, other)) = lines.find(|(line, other)| line != other) {
        return Err(format!(
            "the second run's console differs: {:?} is {:?} there",
            line.trim(),
            other.trim()
        ));
    }
    if one.console.len() != other.console.len() {
        return Err("the second run's console has another length".to_owned());
    }
    let differs = |name: &&String| one.figures.get(*name) != other.figures.get(*name);
    match one.figures.keys().chain(other.figures.keys()).find(differs) {
        Some(name) => Err(format!("the second run's figure {name:?} differs")),
        None => Ok(()),
    }
}

/// Figures by name.
struct Figures<'a>(&'a BTreeMap<String, String>);

impl Figures<'_> {
    fn number(&self, name: &str) -> u64 {
        self.0.get(name).and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    /// The hypervisor's own share of the time, and for what.
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn shares(&self, microsecond: Option<f64>) -> String {
        let kinds = self.0.keys().filter_map(|name| name.strip_prefix("outside."));
        let mut outside: Vec<_> = kinds.map(|kind| (self.number(&format!("outside.{kind}")), kind)).collect();
        let sum = outside.iter().map(|(ticks, _)| ticks).sum::<u64>();
        let all = (sum + self.number("inside")) as f64;
        if sum == 0 {
            return String::new();
        }
        outside.sort_unstable();
        let percent = |ticks: u64| 100.0 * ticks as f64 / all;
        let mut text = format!("{:.1} % of the time", percent(sum));
        for &(ticks, kind) in outside.iter().rev().filter(|(ticks, _)| percent(*ticks) >= 0.1) {
            let _ = write!(text, ", {} {:.1} %", kind.replace('_', " "), percent(ticks));
            let count = self.number(&format!("exits.{kind}"));
            if let Some(microsecond) = microsecond.filter(|_| count > 0) {
                let _ = write!(text, " ({:.1} µs each)", ticks as f64 / count as f64 / microsecond);
            }
        }
        text
    }

    /// What each processor has done, where there are several.
    fn processors(&self) -> String {
        let faults = |number: usize| self.0.get(&format!("processor.{number}.faults"));
        let all: Vec<_> = (0..).map_while(|number| faults(number).map(|faults| (number, faults))).collect();
        if all.len() < 2 {
            return String::new();
        }
        let words = all.into_iter().map(|(number, faults)| {
            let kicks = self.number(&format!("processor.{number}.kicks"));
            let faults = faults.parse().map_or_else(|_| faults.clone(), grouped);
            format!("{number}: {faults} faults, brought out {} times", grouped(kicks))
        });
        words.collect::<Vec<_>>().join("; ")
    }

    /// How many frames have so many entries that map them.
    fn lengths(&self) -> String {
        let all = self.0.iter().filter_map(|(name, value)| {
            let length: u64 = name.strip_prefix("rmap.")?.parse().ok()?;
            Some((length, value.parse().ok()?))
        });
        let all: BTreeMap<u64, u64> = all.filter(|(_, frames)| *frames > 0).collect();
        let words = all.iter().map(|(length, frames)| match length {
            1 | 2 => format!("{length}: {}", grouped(*frames)),
            _ => format!("{}-{length}: {}", length / 2 + 1, grouped(*frames)),
        });
        words.collect::<Vec<_>>().join(", ")
    }

    /// Flushes, and what they cost other processors.
    fn flushes(&self) -> String {
        let [count, frames, kicks] =
            ["count", "frames", "kicks"].map(|name| self.number(&format!("flushes.{name}")));
        let mut text = if self.0.contains_key("flushes.count") { grouped(count) } else { String::new() };
        if let Some(mean) = frames.checked_div(count) {
            let _ = write!(text, ", of ranges of {} frames on average", grouped(mean));
        }
        if kicks > 0 {
            let _ = write!(text, "; processors were brought out {} times", grouped(kicks));
        }
        text
    }

    /// What the comparison of the two copies of RAM says.
    fn dirty(&self) -> String {
        let [differ, compared, rounds, copied] =
            ["differ", "compared", "rounds", "copied"].map(|name| self.number(&format!("dirty.{name}")));
        if compared == 0 {
            return String::new();
        }
        let (differ, compared, copied) = (grouped(differ), grouped(compared), grouped(copied));
        format!("{differ} of {compared} pages differ; {rounds} rounds, {copied} pages copied")
    }

    /// Writes of another processor that should not have been.
    fn stale(&self, part: &str) -> String {
        let number = |what| self.0.get(&format!("shootdown.{part}_after_{what}"));
        let words = ["protecting", "moving", "deleting"]
            .map(|what| number(what).map(|number| format!("{number} after {what}")));
        let words: Vec<_> = words.into_iter().flatten().collect();
        if words.is_empty() { String::new() } else { format!("stale writes: {}", words.join(", ")) }
    }

    /// Those whose names begin so, the largest first, without those that are 0.
    fn list(&self, prefix: &str) -> String {
        let all = self.0.iter().filter_map(|(name, value)| Some((name.strip_prefix(prefix)?, value)));
        let mut numbers: Vec<(u64, &str)> =
            all.filter_map(|(name, value)| Some((value.parse().ok()?, name))).collect();
        numbers.sort_by_key(|&(number, _)| Reverse(number));
        let shown = numbers.into_iter().filter(|(number, _)| *number > 0);
        let words = shown.map(|(number, name)| format!("{} {}", grouped(number), name.replace('_', " ")));
        words.collect::<Vec<_>>().join(", ")
    }
}

/// The smallest, the median and the largest of several runs' ratios.
pub(crate) fn spread(ratios: &[(f64, Option<f64>)]) -> String {
    let one = |mut all: Vec<f64>, what: &str| {
        all.sort_by(f64::total_cmp);
        let (Some(first), Some(last)) = (all.first(), all.last()) else { return String::new() };
        let median = f64::midpoint(all[(all.len() - 1) / 2], all[all.len() / 2]);
        format!("{first:.2} to {last:.2} times {what}, median {median:.2}")
    };
    let wall = one(ratios.iter().map(|(wall, _)| *wall).collect(), "as long");
    let processor =
        one(ratios.iter().filter_map(|(_, processor)| *processor).collect(), "the processor time");
    [wall, processor]
        .iter()
        .filter(|text| !text.is_empty())
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join("; ")
}

/// A word as JSON: numbers and truth values are themselves.
fn word(text: &str) -> String {
    let is_itself = text.parse::<u64>().is_ok() || matches!(text, "true" | "false");
    if is_itself { text.to_owned() } else { quoted(text) }
}

/// A number with its thousands set apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            character if character.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(character));
            }
            character => quoted.push(character),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: Option<i32>, figures: &[(&str, &str)]) -> Run {
        let figures = figures.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let wall = Duration::from_secs(3);
        let ended = Ended { wall, processor: None, userland: None, console: String::new(), figures, status };
        Run { what: vec![("scenario", "boot".to_owned())], ended, again: None, plain: None }
    }

    #[test]
    fn a_second_run_must_say_the_same() {
        let twice = |console: &str, faults: &str| {
            let run = |console: &str, faults: &str| {
                let mut run = ended(Some(33), &[("result", "PASS"), ("exits.faults", faults)]);
                console.clone_into(&mut run.ended.console);
                run
            };
            Run { again: Some(run(console, faults).ended), ..run("one\ntwo\n", "7") }.verdict()
        };
        assert_eq!(twice("one\ntwo\n", "7"), Ok(()));
        assert!(twice("one\ntwo!\n", "7").unwrap_err().contains("two!"));
        assert!(twice("one\ntwo\nthree\n", "7").is_err() && twice("one\n", "7").is_err());
        assert!(twice("one\ntwo\n", "8").unwrap_err().contains("exits.faults"));
    }

    #[test]
    fn only_the_hypervisors_own_word_and_status_together_pass() {
        assert_eq!(ended(Some(33), &[("result", "PASS")]).verdict(), Ok(()));
        assert!(ended(Some(0), &[("result", "PASS")]).verdict().is_err());
        assert!(ended(Some(33), &[]).verdict().is_err());
        assert!(ended(None, &[("result", "PASS")]).verdict().is_err());
        assert_eq!(
            ended(Some(35), &[("result", "2 pages differ")]).verdict(),
            Err("2 pages differ".to_owned())
        );
    }

    #[test]
    fn figures_are_shown_and_written() {
        let run = ended(
            Some(33),
            &[
                ("result", "a \"b\""),
                ("dirty.differ", "0"),
                ("dirty.compared", "65440"),
                ("shootdown.with_flush_after_moving", "0"),
                ("flushes.count", "0"),
                ("exits.ports", "6"),
                ("exits.kicks", "70"),
                ("exits.faults", "1234567"),
                ("rmap.1", "4000"),
                ("rmap.2", "0"),
                ("rmap.16", "5"),
                ("rmap.4", "6"),
                ("exits.calls", "0"),
            ],
        );
        let text = run.text();
        assert!(text.contains("exits         1 234 567 faults, 70 kicks, 6 ports\n"), "{text}");
        assert!(text.contains("0 of 65 440 pages differ; 0 rounds"), "{text}");
        assert!(text.contains("with flush    stale writes: 0 after moving\n"), "{text}");
        assert!(text.contains("flushes       0\n"), "{text}");
        assert!(text.contains("1: 4 000, 3-4: 6, 9-16: 5"), "{text}");
        let several = ended(
            Some(33),
            &[
                ("inside", "900"),
                ("outside.faults", "60"),
                ("outside.ticks", "40"),
                ("outside.calls", "0"),
                ("processor.0.faults", "12345"),
                ("processor.1.faults", "7"),
                ("processor.1.kicks", "1"),
            ],
        );
        let text = several.text();
        assert!(text.contains("10.0 % of the time, faults 6.0 %, ticks 4.0 %\n"), "{text}");
        let processors = "0: 12 345 faults, brought out 0 times; 1: 7 faults, brought out 1 times";
        assert!(text.contains(processors), "{text}");
        assert_eq!(
            spread(&[(2.0, Some(1.5)), (1.0, None), (1.5, Some(2.5))]),
            "1.00 to 2.00 times as long, median 1.50; 1.50 to 2.50 times the processor time, median 2.00"
        );
        assert_eq!((word("12"), word("true"), word("4k")), ("12".into(), "true".into(), "\"4k\"".into()));
        let json = run.json();
        assert!(
            json.contains("\"verdict\": \"a \\\"b\\\"\"") && json.contains("\"exits.faults\": 1234567"),
            "{json}"
        );
    }
}
