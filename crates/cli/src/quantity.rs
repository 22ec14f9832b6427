//! Sizes, durations, times and counts as people read them.

/// Bytes in the largest binary unit that leaves a number of at least one.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = format!("{value:.1}");
    format!("{} {}", text.strip_suffix(".0").unwrap_or(&text), UNITS[unit])
}

/// Microseconds in a unit that fits.
pub fn microseconds(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with one or two decimals")]
    let value = count as f64;
    match count {
        0..1_000 => format!("{count} µs"),
        1_000..1_000_000 => format!("{:.1} ms", value / 1e3),
        _ => format!("{:.2} s", value / 1e6),
    }
}

/// Milliseconds in a unit that fits.
pub fn milliseconds(count: u64) -> String {
    if count < 1_000 { format!("{count} ms") } else { microseconds(count.saturating_mul(1_000)) }
}

/// `1 machine`, `2 machines`.
pub fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// The beginning of an id that people read; any unique beginning is understood.
pub fn short_id(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// A timestamp to the second: `2026-11-22 12:42:46Z`. What is no timestamp stays as it is.
pub fn timestamp(text: &str) -> String {
    match (text.get(..10), text.get(10..11), text.get(11..19)) {
        (Some(date), Some("T"), Some(time)) if text.ends_with('Z') => format!("{date} {time}Z"),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1 MiB"),
            (256 << 20, "256 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(count), text, "{count}");
        }
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(microseconds(999), "999 µs");
        assert_eq!(microseconds(2_100), "2.1 ms");
        assert_eq!(microseconds(1_500_000), "1.50 s");
        assert_eq!(milliseconds(180), "180 ms");
        assert_eq!(milliseconds(2_640), "2.64 s");
    }

    #[test]
    fn timestamps_lose_their_fractions_only() {
        assert_eq!(timestamp("2026-11-22T12:42:46.123456Z"), "2026-11-22 12:42:46Z");
        assert_eq!(timestamp("yesterday"), "yesterday");
        assert_eq!(timestamp("é"), "é");
    }
}
