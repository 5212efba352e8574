//! Numbers of bytes, as the command line has them.

use std::str::FromStr;

/// A number of bytes, at least one, with a unit. K, M, G, T (and KiB...) are powers of 1024; KB,
/// MB, GB, TB are powers of 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("a size is a number of bytes like 64M or 1GiB, and not '{text}'");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let unit: u64 = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => 1,
            "K" | "KIB" => 1 << 10,
            "M" | "MIB" => 1 << 20,
            "G" | "GIB" => 1 << 30,
            "T" | "TIB" => 1 << 40,
            "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(wrong()),
        };
        match number.checked_mul(unit) {
            Some(0) => Err("there must be at least one byte".to_owned()),
            Some(bytes) => Ok(Size(bytes)),
            None => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("1", 1),
            ("4096B", 4096),
            ("64M", 64 << 20),
            ("64m", 64 << 20),
            ("1GiB", 1 << 30),
            ("500MB", 500_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "1X", "0", "0M", "99999999T", "1 M"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
