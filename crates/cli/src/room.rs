//! Whether the host has memory for what was asked.

use std::fs;

use anyhow::Context as _;

use crate::{exit::Failure, size};

/// Refuses what would bring the host down, or be killed for it.
///
/// # Errors
/// [`Failure::missing`], which says how much there is.
pub(crate) fn check(bytes: u64, what: &str) -> anyhow::Result<()> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let Some(available) = field_kib(&text, "MemAvailable:").map(|kib| kib << 10) else {
        return Ok(());
    };
    if bytes <= available {
        return Ok(());
    }
    let (needed, available) = (size::display(bytes), size::display(available));
    Err(Failure::missing(format!("{what} takes {needed}, and this host has {available} available"))
        .into())
}

/// A field of /proc/meminfo (proc_meminfo(5)).
pub(crate) fn field_kib(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_is_is_refused_with_both_numbers() {
        check(4096, "a page").unwrap();
        let refused = check(1 << 60, "a large guest").unwrap_err().to_string();
        assert!(refused.starts_with("a large guest takes 1"), "{refused}");
        assert!(refused.ends_with("available"), "{refused}");
    }
}
