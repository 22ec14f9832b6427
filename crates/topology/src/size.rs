//! Sizes as people write them: `256MiB`, `1.5GiB`, `512M`, `1048576`.
//!
//! `K`, `M`, `G`, `T` and `KiB`, … are powers of 1024, as QEMU reads them; `KB`, … are powers of 1000, as disk makers do.

use crate::problem::Excerpt;

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number followed by a unit.
    #[error("{} is not a size", Excerpt(text))]
    Syntax {
        /// The text.
        text: String,
    },
    /// A number followed by something that is no unit.
    #[error("{} is not a size: {} is not a unit", Excerpt(text), Excerpt(unit))]
    Unit {
        /// The text.
        text: String,
        /// What stands after the number.
        unit: String,
    },
    /// Not a whole number of bytes.
    #[error("{} is not a whole number of bytes", Excerpt(text))]
    Fraction {
        /// The text.
        text: String,
    },
    /// More than 2^64 - 1 bytes.
    #[error("{} is more than any size", Excerpt(text))]
    TooLarge {
        /// The text.
        text: String,
    },
}

/// Reads a size, in bytes. The unit may be in any case and stand after a space; no unit means bytes.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number_end);
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return Err(SizeError::Syntax { text: text.to_owned() }),
        Some((whole, fraction)) => (whole, fraction),
        None => (number, ""),
    };
    if whole.is_empty() || fraction.contains('.') {
        return Err(SizeError::Syntax { text: text.to_owned() });
    }
    let too_large = || SizeError::TooLarge { text: text.to_owned() };
    let unit_bytes = unit_bytes(unit.trim_start())
        .ok_or_else(|| SizeError::Unit { text: text.to_owned(), unit: unit.trim_start().to_owned() })?;
    let whole_bytes =
        whole.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_bytes)).ok_or_else(too_large)?;
    let fraction = fraction.trim_end_matches('0');
    // Twelve digits: no finer fraction of a unit up to a terabyte can be a whole number of bytes and be meant.
    if fraction.len() > 12 {
        return Err(SizeError::Fraction { text: text.to_owned() });
    }
    let scale = 10u128.pow(fraction.len() as u32);
    let scaled = u128::from(fraction.parse::<u64>().unwrap_or(0)) * u128::from(unit_bytes);
    if scaled % scale != 0 {
        return Err(SizeError::Fraction { text: text.to_owned() });
    }
    u64::try_from(scaled / scale).ok().and_then(|rest| whole_bytes.checked_add(rest)).ok_or_else(too_large)
}

/// Writes a size in the largest unit that divides it, so that [`parse_size`] reads the same number back.
pub(crate) fn size_text(bytes: u64) -> String {
    for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

fn unit_bytes(unit: &str) -> Option<u64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("512B", 512),
            ("256MiB", 256 << 20),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            (" 1 GiB ", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("0.5K", 512),
            ("1.50T", 3 << 39),
            ("512MB", 512_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn not_sizes() {
        for (text, message) in [
            ("", "`` is not a size"),
            ("MiB", "`MiB` is not a size"),
            ("-1", "`-1` is not a size"),
            ("+1", "`+1` is not a size"),
            (".5G", "`.5G` is not a size"),
            ("1.G", "`1.G` is not a size"),
            ("1.2.3G", "`1.2.3G` is not a size"),
            ("12XiB", "`12XiB` is not a size: `XiB` is not a unit"),
            ("1e9", "`1e9` is not a size: `e9` is not a unit"),
            ("1_000", "`1_000` is not a size: `_000` is not a unit"),
            ("0.3K", "`0.3K` is not a whole number of bytes"),
            ("0.0000000000001T", "`0.0000000000001T` is not a whole number of bytes"),
            ("18446744073709551616", "`18446744073709551616` is more than any size"),
            ("16777216TiB", "`16777216TiB` is more than any size"),
        ] {
            assert_eq!(parse_size(text).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn written_sizes_read_back() {
        for bytes in [0, 1, 1023, 1024, 256 << 20, 3 << 29, 1 << 40, u64::MAX] {
            assert_eq!(parse_size(&size_text(bytes)), Ok(bytes));
        }
        assert_eq!(size_text(256 << 20), "256MiB");
    }
}
