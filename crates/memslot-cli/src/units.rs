//! How quantities are written: addresses as KVM's tools write them, sizes and times in units a person can read.

/// An address in lowercase hexadecimal, zero-padded to `digits` so that a column of them lines up.
pub(crate) fn address(value: u64, digits: usize) -> String {
    format!("0x{value:0digits$x}")
}

/// Digits that the largest of some addresses needs.
pub(crate) fn digits(largest: u64) -> usize {
    format!("{largest:x}").len()
}

/// A number of bytes: `4 KiB`, `511.25 MiB`. Exact, or rounded to two decimals.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) > 0 {
        unit += 1;
    }
    let scale = 1_u128 << (10 * unit);
    let hundredths = (u128::from(bytes) * 100 + scale / 2) / scale;
    let (whole, rest) = (hundredths / 100, hundredths % 100);
    match rest {
        0 => format!("{whole} {}", UNITS[unit]),
        rest if rest % 10 == 0 => format!("{whole}.{} {}", rest / 10, UNITS[unit]),
        rest => format!("{whole}.{rest:02} {}", UNITS[unit]),
    }
}

/// A length of time, to three digits.
pub(crate) fn duration(nanoseconds: u64) -> String {
    let (value, unit) = match nanoseconds {
        0 => return "0 s".to_owned(),
        1..1_000 => return format!("{nanoseconds} ns"),
        1_000..1_000_000 => (nanoseconds as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => (nanoseconds as f64 / 1e6, "ms"),
        1_000_000_000..120_000_000_000 => (nanoseconds as f64 / 1e9, "s"),
        _ => {
            let seconds = nanoseconds / 1_000_000_000;
            return match seconds / 3600 {
                0 => format!("{} min {} s", seconds / 60, seconds % 60),
                hours => format!("{hours} h {} min", seconds / 60 % 60),
            };
        }
    };
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {unit}")
}

/// `1 slot`, `2 slots`.
pub(crate) fn count(number: impl TryInto<u64>, noun: &str) -> String {
    match number.try_into().unwrap_or(u64::MAX) {
        1 => format!("1 {noun}"),
        number => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_or_rounded() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(4096), "4 KiB");
        assert_eq!(size(0x1ff4_0000), "511.25 MiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(u64::MAX), "16 EiB");
    }

    #[test]
    fn durations_keep_three_digits() {
        assert_eq!(duration(999), "999 ns");
        assert_eq!(duration(12_995_160), "13.0 ms");
        assert_eq!(duration(1_075_142_047), "1.08 s");
        assert_eq!(duration(125_000_000_000), "2 min 5 s");
        assert_eq!(duration(7_300_000_000_000), "2 h 1 min");
    }
}
