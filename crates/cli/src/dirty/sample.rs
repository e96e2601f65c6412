//! What was written where, sample by sample.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    time::Duration,
};

use serde::Serialize;

use crate::bench::case::PAGE;

/// Cells of a heat strip.
const CELLS: usize = 32;
/// Samples kept of each mapping.
const HISTORY: usize = 60;

/// A mapping of the process, as it was when the sample was taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mapping {
    /// Addresses.
    pub(super) range: Range<u64>,
    /// As in /proc/PID/maps: `rw-p`.
    pub(super) permissions: String,
    /// The file, or `[heap]` and the like; empty for anonymous memory.
    pub(super) name: String,
}

/// What one sample says of one mapping.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct MappingSample {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) permissions: String,
    pub(super) name: String,
    /// In this interval.
    pub(super) written_pages: u64,
    pub(super) bytes_per_s: f64,
    /// Different pages written since the beginning, in bytes.
    pub(super) dirty_set_bytes: u64,
    /// Pages written in this interval in each of equal parts of the mapping.
    pub(super) heat: Vec<u64>,
}

/// One sample of the whole process.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Sample {
    /// Since tracking began.
    pub(super) t_s: f64,
    /// Since the sample before.
    pub(super) interval_s: f64,
    /// For how long the process stood still for this sample.
    pub(super) stopped_ms: f64,
    pub(super) written_pages: u64,
    pub(super) bytes_per_s: f64,
    pub(super) dirty_set_bytes: u64,
    pub(super) mappings: Vec<MappingSample>,
}

/// What is kept of a mapping from sample to sample.
#[derive(Debug)]
struct Kept {
    mapping: Mapping,
    ever: Vec<u64>,
    rates: VecDeque<u64>,
}

impl Kept {
    fn new(mapping: Mapping) -> Self {
        let pages = (mapping.range.end - mapping.range.start) / PAGE as u64;
        Self { mapping, ever: vec![0; pages.div_ceil(64) as usize], rates: VecDeque::new() }
    }

    fn dirty_set(&self) -> u64 {
        self.ever.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() * PAGE as u64
    }
}

/// All samples so far.
#[derive(Debug, Default)]
pub(super) struct Samples {
    kept: BTreeMap<u64, Kept>,
    last: Duration,
    rates: VecDeque<u64>,
}

impl Samples {
    /// Adds a sample: the mappings there are, and which pages of them were written since the
    /// sample before. Runs outside of all mappings are of mappings that are gone.
    pub(super) fn add(
        &mut self,
        t: Duration,
        stopped: Duration,
        mappings: Vec<Mapping>,
        written: &[Range<u64>],
    ) -> Sample {
        let interval = t.saturating_sub(self.last).as_secs_f64();
        self.last = t;
        let rate = |bytes: u64| if interval > 0.0 { bytes as f64 / interval } else { 0.0 };
        self.keep(mappings);
        let mut sample = Sample {
            t_s: t.as_secs_f64(),
            interval_s: interval,
            stopped_ms: stopped.as_secs_f64() * 1e3,
            written_pages: 0,
            bytes_per_s: 0.0,
            dirty_set_bytes: 0,
            mappings: Vec::with_capacity(self.kept.len()),
        };
        for kept in self.kept.values_mut() {
            let (pages, heat) = kept.mark(written);
            let bytes_per_s = rate(pages * PAGE as u64);
            push(&mut kept.rates, bytes_per_s as u64);
            let dirty_set_bytes = kept.dirty_set();
            sample.written_pages += pages;
            sample.dirty_set_bytes += dirty_set_bytes;
            sample.mappings.push(MappingSample {
                start: kept.mapping.range.start,
                end: kept.mapping.range.end,
                permissions: kept.mapping.permissions.clone(),
                name: kept.mapping.name.clone(),
                written_pages: pages,
                bytes_per_s,
                dirty_set_bytes,
                heat,
            });
        }
        sample.bytes_per_s = rate(sample.written_pages * PAGE as u64);
        push(&mut self.rates, sample.bytes_per_s as u64);
        sample
    }

    /// Bytes per second of the last samples of the mapping that begins at `start`, oldest first.
    pub(super) fn rates(&self, start: u64) -> Vec<u64> {
        self.kept.get(&start).map(|kept| kept.rates.iter().copied().collect()).unwrap_or_default()
    }

    /// The same of all mappings together.
    pub(super) fn total_rates(&self) -> Vec<u64> {
        self.rates.iter().copied().collect()
    }

    /// Forgets mappings that are gone. One that grew or shrank at its end keeps its past.
    fn keep(&mut self, mappings: Vec<Mapping>) {
        let mut before = std::mem::take(&mut self.kept);
        for mapping in mappings {
            let start = mapping.range.start;
            let mut now = Kept::new(mapping);
            if let Some(old) = before.remove(&start)
                && old.mapping.name == now.mapping.name
            {
                let words = now.ever.len().min(old.ever.len());
                now.ever[..words].copy_from_slice(&old.ever[..words]);
                let pages = (now.mapping.range.end - start) / PAGE as u64;
                if let Some(last) = now.ever.last_mut()
                    && !pages.is_multiple_of(64)
                {
                    *last &= (1 << (pages % 64)) - 1;
                }
                now.rates = old.rates;
            }
            self.kept.insert(start, now);
        }
    }
}

impl Kept {
    /// Marks what of `written` lies in this mapping; how many pages that are, and where.
    fn mark(&mut self, written: &[Range<u64>]) -> (u64, Vec<u64>) {
        let (start, end) = (self.mapping.range.start, self.mapping.range.end);
        let pages = (end - start) / PAGE as u64;
        let mut heat = vec![0; CELLS.min(pages as usize)];
        let cells = heat.len() as u64;
        let mut count = 0;
        for run in written {
            let (from, to) = (run.start.max(start), run.end.min(end));
            if from >= to {
                continue;
            }
            for page in (from - start) / PAGE as u64..(to - start) / PAGE as u64 {
                self.ever[(page / 64) as usize] |= 1 << (page % 64);
                heat[(u128::from(page) * u128::from(cells) / u128::from(pages)) as usize] += 1;
                count += 1;
            }
        }
        (count, heat)
    }
}

fn push(rates: &mut VecDeque<u64>, rate: u64) {
    if rates.len() == HISTORY {
        rates.pop_front();
    }
    rates.push_back(rate);
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE as u64;

    fn mapping(start: u64, pages: u64, name: &str) -> Mapping {
        Mapping {
            range: start * P..(start + pages) * P,
            permissions: "rw-p".into(),
            name: name.into(),
        }
    }

    fn pages(from: u64, to: u64) -> Range<u64> {
        from * P..to * P
    }

    #[test]
    fn rates_sets_and_heat() {
        let mut samples = Samples::default();
        let both = || vec![mapping(100, 64, "[heap]"), mapping(300, 8, "")];
        let second = Duration::from_secs(1);
        let zero = Duration::ZERO;
        let one = samples.add(second, zero, both(), &[pages(100, 104), pages(307, 310)]);
        assert_eq!(one.written_pages, 5, "two pages are of no mapping");
        assert_eq!(one.mappings[0].heat[..3], [2, 2, 0]);
        assert_eq!(one.mappings[1].heat, [0, 0, 0, 0, 0, 0, 0, 1], "a cell is no less than a page");
        let two = samples.add(3 * second, zero, both(), &[pages(102, 106)]);
        assert_eq!((two.written_pages, two.interval_s), (4, 2.0));
        assert_eq!(two.mappings[0].dirty_set_bytes, 6 * P, "the same page counts once");
        assert_eq!(two.bytes_per_s, 2.0 * PAGE as f64);
        assert_eq!(samples.rates(100 * P), [4 * P, 2 * P]);
        assert_eq!(samples.total_rates(), [5 * P, 2 * P]);
    }

    #[test]
    fn mappings_come_grow_shrink_and_go() {
        let mut samples = Samples::default();
        let t = Duration::from_secs;
        let zero = Duration::ZERO;
        samples.add(t(1), zero, vec![mapping(0, 100, "[heap]")], &[pages(0, 100)]);
        let grown = samples.add(t(2), zero, vec![mapping(0, 200, "[heap]")], &[pages(150, 151)]);
        assert_eq!(grown.dirty_set_bytes, 101 * P);
        let shrunk = samples.add(t(3), zero, vec![mapping(0, 10, "[heap]")], &[]);
        assert_eq!(shrunk.dirty_set_bytes, 10 * P);
        let other = samples.add(t(4), zero, vec![mapping(0, 10, "a file")], &[]);
        assert_eq!(other.dirty_set_bytes, 0, "another mapping in the same place has no past");
        assert_eq!(samples.add(t(5), zero, vec![], &[]).mappings, []);
    }

    #[test]
    fn old_samples_are_forgotten() {
        let mut samples = Samples::default();
        for turn in 1..200 {
            let written = [pages(0, turn % 7)];
            samples.add(
                Duration::from_secs(turn),
                Duration::ZERO,
                vec![mapping(0, 9, "")],
                &written,
            );
        }
        assert_eq!(samples.rates(0).len(), HISTORY);
        assert_eq!(samples.total_rates().last(), Some(&(199 % 7 * P)));
    }
}
