//! A reader beside a writer that never stops.
//!
//! Both threads have a processor of their own. So that the writer's mere presence (shared caches, clock speed)
//! does not count, the peer figure is the reader beside a writer that changes *another* table just as fast.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memslot::{Gpa, SlotId, SlotTable};

use super::table_of;
use crate::Effort;
use crate::layout::{Piece, Random, SPACE, layout};
use crate::measure::median;
use crate::report::{Report, Row, nanoseconds};

/// Lookups for each time the reader enters.
const PER_PIN: usize = 16;

pub(crate) fn run(sizes: &[usize], effort: Effort, report: &mut Report) -> anyhow::Result<()> {
    let (rounds, length) = match effort {
        Effort::Smoke => (1, Duration::from_millis(10)),
        Effort::Normal => (5, Duration::from_millis(60)),
        Effort::Long => (21, Duration::from_millis(200)),
    };
    if !report.wants("reader beside a writer") {
        return Ok(());
    }
    if std::thread::available_parallelism().is_ok_and(|n| n.get() < 2) {
        report.skipped("reader beside a writer: one processor only");
        return Ok(());
    }
    let processors = Processors::of_this_thread();
    for &n in sizes {
        let pieces = layout(n);
        let (mut table, mut other) = (table_of(&pieces)?, table_of(&pieces)?);
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        let mut per_update = Vec::new();
        for _ in 0..rounds {
            times[0].push(read(&table, None, &pieces, length, &processors)?.0);
            let reader = table.reader()?;
            times[1].push(read_with(reader, Some(&mut other), &pieces, length, &processors).0);
            let reader = table.reader()?;
            let (with, update) = read_with(reader, Some(&mut table), &pieces, length, &processors);
            times[2].push(with);
            per_update.push(update);
        }
        let [alone, unrelated, beside] = times.map(|mut times| median(&mut times));
        for (peer, base, target) in
            [("alone", alone, None), ("beside a writer elsewhere", unrelated, Some(0.9))]
        {
            let row = Row {
                bench: "reader beside a writer".to_owned(),
                at: n.to_string(),
                ours_ns: beside,
                peer: peer.to_owned(),
                peer_ns: Some(base),
                ratio: Some(base / beside),
                target,
            };
            report.add(row, &nanoseconds(beside), &nanoseconds(base));
        }
        let row = Row {
            bench: "… and the writer's update".to_owned(),
            at: n.to_string(),
            ours_ns: median(&mut per_update),
            peer: String::new(),
            peer_ns: None,
            ratio: None,
            target: None,
        };
        let ours = nanoseconds(row.ours_ns);
        report.add(row, &ours, "");
    }
    Ok(())
}

fn read(
    table: &SlotTable,
    writer: Option<&mut SlotTable>,
    pieces: &[Piece],
    length: Duration,
    processors: &Processors,
) -> anyhow::Result<(f64, f64)> {
    Ok(read_with(table.reader()?, writer, pieces, length, processors))
}

/// Nanoseconds per lookup, and per update of the writer.
fn read_with(
    mut reader: memslot::Reader,
    writer: Option<&mut SlotTable>,
    pieces: &[Piece],
    length: Duration,
    processors: &Processors,
) -> (f64, f64) {
    let stop = AtomicBool::new(false);
    let updates = AtomicU64::new(0);
    std::thread::scope(|scope| {
        if let Some(table) = writer {
            let (stop, updates) = (&stop, &updates);
            scope.spawn(move || {
                processors.stay_on(1);
                let mut random = Random::new(31);
                while !stop.load(Ordering::Relaxed) {
                    let piece = &pieces[random.below(pieces.len())];
                    let done = table.delete(SPACE, SlotId::new(piece.id)).is_ok();
                    black_box(done && table.create(piece.spec()).is_ok());
                    updates.fetch_add(2, Ordering::Relaxed);
                }
            });
        }
        processors.stay_on(0);
        let mut random = Random::new(17);
        let addresses: Vec<u64> = (0..1 << 14).map(|_| pieces[random.below(pieces.len())].gpa).collect();
        let mut lookups = 0u64;
        let start = Instant::now();
        let before = updates.load(Ordering::Relaxed);
        while start.elapsed() < length {
            for group in addresses.chunks(PER_PIN).take(256) {
                let pinned = reader.pin();
                let view: &memslot::View = &pinned;
                for &gpa in group {
                    black_box(view.translate(SPACE, Gpa::new(gpa)));
                }
                lookups += group.len() as u64;
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "a time is not that exact")]
        let (elapsed, lookups, done) = (
            start.elapsed().as_nanos() as f64,
            lookups as f64,
            (updates.load(Ordering::Relaxed) - before) as f64,
        );
        stop.store(true, Ordering::Relaxed);
        processors.leave();
        (elapsed / lookups, elapsed / done)
    })
}

/// The processors that this thread may run on, of which reader and writer take one each: on a machine with other work
/// the system may otherwise put both on the same one.
struct Processors {
    #[cfg(target_os = "linux")]
    all: libc::cpu_set_t,
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the affinity calls of libc")]
impl Processors {
    fn of_this_thread() -> Self {
        // SAFETY: a set of bits may be all 0; the call fills as much as it is told.
        let all = unsafe {
            let mut all: libc::cpu_set_t = std::mem::zeroed();
            libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut all);
            all
        };
        Self { all }
    }

    /// Keeps this thread on the one with this number among them, if there are so many.
    fn stay_on(&self, number: usize) {
        // SAFETY: the numbers are below the size of a set; the call reads as much as it is told.
        unsafe {
            let mut may = (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &self.all));
            if let Some(cpu) = may.nth(number) {
                let mut one: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(cpu, &mut one);
                libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const one);
            }
        }
    }

    /// Lets this thread run on all of them again.
    fn leave(&self) {
        // SAFETY: as above.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const self.all) };
    }
}

#[cfg(not(target_os = "linux"))]
impl Processors {
    fn of_this_thread() -> Self {
        Self {}
    }

    fn stay_on(&self, _: usize) {}

    fn leave(&self) {}
}
