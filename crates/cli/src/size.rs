//! Sizes as people write them.

/// Parses `512MiB`, `64k`, `1G`, `4096`: a number and an optional binary unit.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is no size: a number and a unit, 512MiB for example"))?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        other => return Err(format!("{other:?} is no unit: use KiB, MiB, GiB or TiB")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// `bytes` in the largest binary unit that leaves at least one of it.
pub(crate) fn display(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() as usize / 10).min(UNITS.len() - 1);
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let places = usize::from(value.fract() != 0.0);
    format!("{value:.places$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let cases = [
            ("4096", Ok(4096)),
            ("64KiB", Ok(64 << 10)),
            ("512MiB", Ok(512 << 20)),
            ("512m", Ok(512 << 20)),
            ("2 G", Ok(2 << 30)),
            ("99999999T", Err(())),
            ("", Err(())),
            ("MiB", Err(())),
            ("1MB", Err(())),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).map_err(|_| ()), expected, "{text}");
        }
        assert_eq!(display(512 << 20), "512 MiB");
        assert_eq!(display(1536), "1.5 KiB");
        assert_eq!(display(0), "0 B");
    }
}
