//! The table that a benchmark prints, and the same as JSON.

use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// One measurement. Rows whose unit is not time (bytes, per cent) use the same fields.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) bench: String,
    pub(crate) at: String,
    pub(crate) ours_ns: f64,
    pub(crate) peer: String,
    pub(crate) peer_ns: Option<f64>,
    pub(crate) ratio: Option<f64>,
    pub(crate) target: Option<f64>,
}

pub(crate) struct Report {
    rows: Vec<Row>,
    only: Option<String>,
    missed: usize,
}

impl Report {
    pub(crate) fn new(only: Option<String>) -> Self {
        println!(
            "{:<36} {:>8} {:>12}   {:<26} {:>12} {:>8} {:>8}",
            "bench", "at", "ours", "peer", "", "ratio", "target"
        );
        Self { rows: Vec::new(), only, missed: 0 }
    }

    /// Whether a row of this name is wanted.
    pub(crate) fn wants(&self, bench: &str) -> bool {
        self.only.as_ref().is_none_or(|only| bench.contains(only.as_str()))
    }

    /// Adds a row of times.
    pub(crate) fn times(&mut self, bench: &str, at: usize, peer: &str, ns: (f64, f64), target: Option<f64>) {
        self.text_row(bench, &at.to_string(), peer, ns, target);
    }

    /// Adds a row of times, measured at something that is no number.
    pub(crate) fn text_row(
        &mut self,
        bench: &str,
        at: &str,
        peer: &str,
        ns: (f64, f64),
        target: Option<f64>,
    ) {
        let row = Row {
            bench: bench.to_owned(),
            at: at.to_owned(),
            ours_ns: ns.0,
            peer: peer.to_owned(),
            peer_ns: Some(ns.1),
            ratio: Some(ns.1 / ns.0),
            target,
        };
        self.add(row, &nanoseconds(ns.0), &nanoseconds(ns.1));
    }

    /// Adds any row, with its figures as a person reads them.
    pub(crate) fn add(&mut self, row: Row, ours: &str, peer: &str) {
        let ratio = row.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
        let target = row.target.map(|target| format!("{target}")).unwrap_or_default();
        let missed = matches!((row.ratio, row.target), (Some(ratio), Some(target)) if ratio < target);
        println!(
            "{:<36} {:>8} {:>12}   {:<26} {:>12} {:>8} {:>8}{}",
            row.bench,
            row.at,
            ours,
            row.peer,
            peer,
            ratio,
            target,
            if missed { "  missed" } else { "" }
        );
        self.missed += usize::from(missed);
        self.rows.push(row);
    }

    /// Says that something was not measured.
    pub(crate) fn skipped(&self, what: &str) {
        println!("skipped: {what}");
    }

    pub(crate) fn finish(self, json: Option<&Path>) -> anyhow::Result<()> {
        let targets = self.rows.iter().filter(|row| row.target.is_some()).count();
        println!("{} rows; {} of {targets} targets reached", self.rows.len(), targets - self.missed);
        if let Some(path) = json {
            let text = serde_json::to_string_pretty(&self.rows)?;
            std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// A time as a person reads it.
pub(crate) fn nanoseconds(ns: f64) -> String {
    if ns < 1000.0 {
        format!("{ns:.1} ns")
    } else if ns < 1e6 {
        format!("{:.2} µs", ns / 1e3)
    } else {
        format!("{:.1} ms", ns / 1e6)
    }
}
