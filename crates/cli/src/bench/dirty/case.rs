//! What is measured: one size of memory, one share of it written; and the results.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::ValueEnum;
use pageferry::{
    memory::{Advice, Mapping, MemoryFile, MemoryFileKind},
    uffd::{ClearRefs, clear_refs},
};
use serde::Serialize;

use crate::{bench::case::PAGE, room};

/// A way to notice writes.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Method {
    /// Write 4 to /proc/PID/clear_refs, read /proc/PID/pagemap
    SoftDirty,
    /// userfaultfd write protection: each first write waits for a thread that lifts it
    WpBlocking,
    /// userfaultfd write protection that the kernel lifts by itself, and PAGEMAP_SCAN
    WpAsync,
    /// KVM's dirty log, with a guest that writes
    KvmLog,
    /// KVM's dirty ring, with a guest that writes
    KvmRing,
}

impl Method {
    /// Whether a guest writes, and KVM tracks.
    pub(super) fn is_kvm(self) -> bool {
        matches!(self, Self::KvmLog | Self::KvmRing)
    }
}

/// What the memory is made of.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Backing {
    /// Private anonymous memory, of pages of 4 KiB
    Anon,
    /// Private anonymous memory, of transparent huge pages where the kernel has them
    Thp,
    /// A memfd, mapped shared
    Memfd,
}

macro_rules! display_as_value_name {
    ($($name:ty),*) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let value = self.to_possible_value().expect("no value is skipped");
                f.write_str(value.get_name())
            }
        }
    )*};
}

display_as_value_name!(Method, Backing);

/// Populated memory, and which of its pages are written.
pub(super) struct Memory {
    pub(super) mapping: Arc<Mapping>,
    pub(super) bytes: u64,
    /// Whether one write may make many pages written.
    pub(super) may_be_huge: bool,
}

impl Memory {
    /// Memory of this many bytes, all of it there.
    pub(super) fn new(bytes: u64, backing: Backing) -> anyhow::Result<Self> {
        let what = || format!("{bytes} bytes of {backing} memory for the benchmark");
        let mapping = match backing {
            Backing::Anon | Backing::Thp => Mapping::anonymous(bytes).with_context(what)?,
            Backing::Memfd => {
                let file = MemoryFile::create("pageferry-bench", bytes, MemoryFileKind::Normal)
                    .with_context(what)?;
                Mapping::shared(file.fd(), 0, bytes, None).with_context(what)?
            }
        };
        let advice = match backing {
            Backing::Thp => Advice::HugePage,
            Backing::Anon | Backing::Memfd => Advice::NoHugePage,
        };
        mapping.advise(mapping.range(), advice).with_context(what)?;
        mapping.advise(mapping.range(), Advice::PopulateWrite).with_context(what)?;
        Ok(Self { mapping: mapping.into(), bytes, may_be_huge: backing == Backing::Thp })
    }

    pub(super) fn pages(&self) -> u64 {
        self.bytes / PAGE as u64
    }

    /// Writes one word of each of these pages, and says how long that took.
    pub(super) fn write(&self, pages: &[u64], value: u64) -> anyhow::Result<Duration> {
        let bytes = value.to_ne_bytes();
        let start = std::time::Instant::now();
        for page in pages {
            self.mapping.write_at(page * PAGE as u64 + 8, &bytes)?;
        }
        Ok(start.elapsed())
    }
}

/// This share of `pages` pages, at least one, spread at random over all of them, in random order.
pub(super) fn written(pages: u64, share: f64, seed: u64) -> Vec<u64> {
    let count = ((pages as f64 * share).round() as u64).clamp(1, pages);
    // One of each stretch of equal length, so that a share of 10% is no run of neighbours.
    let mut random = SplitMix(seed);
    let mut chosen: Vec<u64> = (0..count)
        .map(|turn| {
            let (from, to) = (turn * pages / count, (turn + 1) * pages / count);
            from + random.next() % (to - from)
        })
        .collect();
    for last in (1..chosen.len()).rev() {
        chosen.swap(last, (random.next() % (last as u64 + 1)) as usize);
    }
    chosen
}

/// The generator of Steele, Lea and Flood, "Fast splittable pseudorandom number generators".
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// One way of tracking, over the memory of one case.
pub(super) trait Contender {
    /// From now on writes are noticed.
    fn arm(&mut self) -> anyhow::Result<()>;
    /// What was written since, as marks on a bitmap, which is `found` or one of its own; writes are
    /// noticed again.
    fn harvest(&mut self, found: &mut Found) -> anyhow::Result<()>;
    /// Copies a bitmap of its own to `found`. That is not part of the harvest.
    fn report(&mut self, _found: &mut Found) {}
    /// Empties a dirty ring that is full: what was in it is for the next harvest.
    fn collect(&mut self) -> anyhow::Result<()> {
        anyhow::bail!("a dirty ring is full that is not this method's")
    }
    /// Ends it.
    fn disarm(&mut self) -> anyhow::Result<()>;
}

/// Pages that a harvest reported.
pub(super) struct Found {
    bits: Vec<u64>,
}

impl Found {
    pub(super) fn new(pages: u64) -> Self {
        Self { bits: vec![0; pages.div_ceil(64) as usize] }
    }

    pub(super) fn mark(&mut self, first: u64, count: u64) {
        let (mut page, end) = (first, first + count);
        while page < end {
            let low = page % 64;
            let count = (end - page).min(64 - low);
            self.bits[(page / 64) as usize] |= (u64::MAX >> (64 - count)) << low;
            page += count;
        }
    }

    pub(super) fn clear(&mut self) {
        self.bits.fill(0);
    }

    pub(super) fn has(&self, page: u64) -> bool {
        self.bits[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    pub(super) fn count(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// What one round of one contender took.
#[derive(Copy, Clone, Debug)]
pub(super) struct Measurement {
    pub(super) arm: Duration,
    /// The writes, beyond what the same writes take untracked; never below zero.
    pub(super) writes: Duration,
    pub(super) harvest: Duration,
    /// A harvest with nothing written since the one before.
    pub(super) idle_harvest: Duration,
    /// The most memory taken meanwhile, page tables included.
    pub(super) peak_bytes: u64,
    pub(super) written: u64,
}

impl Measurement {
    /// One round of many: the writes and the harvest that makes writes noticed again.
    pub(super) fn cycle(&self) -> Duration {
        self.writes + self.harvest
    }
}

/// Memory of this process now, page tables included, in bytes; the peak begins anew.
pub(super) fn resident() -> anyhow::Result<u64> {
    clear_refs(std::process::id(), ClearRefs::PeakRss)?;
    status(&["VmRSS:", "VmPTE:"])
}

/// The most since [`resident`]. Page tables are counted as they are now.
pub(super) fn peak() -> anyhow::Result<u64> {
    status(&["VmHWM:", "VmPTE:"])
}

/// The sum of these fields of proc_pid_status(5).
fn status(fields: &[&str]) -> anyhow::Result<u64> {
    let path = "/proc/self/status";
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    fields
        .iter()
        .map(|field| {
            let kib = room::field_kib(&text, field);
            Ok(kib.with_context(|| format!("{path} has no {field}"))? << 10)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_written_once_each_and_everywhere() {
        for (pages, share) in [(4096, 0.001), (4096, 0.5), (65536, 0.1), (7, 1.0), (3, 0.0001)] {
            let mut chosen = written(pages, share, 1);
            chosen.sort_unstable();
            let count = chosen.len();
            chosen.dedup();
            assert_eq!(chosen.len(), count, "{pages} {share}: none twice");
            assert_eq!(count as u64, ((pages as f64 * share).round() as u64).max(1));
            assert!(*chosen.last().unwrap() < pages);
            // No half is without its share.
            let low = chosen.iter().filter(|page| **page < pages / 2).count();
            assert!(low.abs_diff(count - low) <= 2, "{pages} {share}: {low} of {count}");
        }
    }

    #[test]
    fn marks_are_counted_once() {
        let mut found = Found::new(130);
        found.mark(60, 10);
        found.mark(62, 2);
        found.mark(129, 1);
        assert_eq!(found.count(), 11);
        assert!(found.has(69) && !found.has(70) && found.has(129));
        found.clear();
        assert_eq!(found.count(), 0);
    }
}
