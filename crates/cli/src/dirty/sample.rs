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
    /// Whether the method can tell what is written to it.
    pub(super) tracked: bool,
}

/// What one sample says of one mapping.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct MappingSample {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) permissions: String,
    pub(super) name: String,
    /// Whether what is written to it can be told; if not, the figures are of what could be, before.
    pub(super) tracked: bool,
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
    /// Of mappings of which it cannot be told what is written to them.
    pub(super) untracked_bytes: u64,
    pub(super) mappings: Vec<MappingSample>,
}

/// What is kept of a mapping from sample to sample.
#[derive(Debug)]
struct Kept {
    mapping: Mapping,
    ever: Pages,
    rates: VecDeque<u64>,
}

/// A set of pages of a mapping. It takes room for what is in it, however large the mapping is: some
/// programs reserve terabytes, of which they use a few pages.
#[derive(Debug, Default)]
struct Pages {
    /// 64 pages each.
    words: BTreeMap<u64, u64>,
    count: u64,
}

impl Pages {
    fn insert(&mut self, pages: Range<u64>) {
        let mut at = pages.start;
        while at < pages.end {
            let next = (at - at % 64 + 64).min(pages.end);
            let mask = (u64::MAX >> (64 - (next - at))) << (at % 64);
            let word = self.words.entry(at / 64).or_default();
            self.count += u64::from((mask & !*word).count_ones());
            *word |= mask;
            at = next;
        }
    }

    /// Forgets all pages from `end` on.
    fn truncate(&mut self, end: u64) {
        let mut gone = self.words.split_off(&(end / 64));
        if let Some(word) = gone.remove(&(end / 64)) {
            let left = word & !(u64::MAX << (end % 64));
            self.count -= u64::from((word ^ left).count_ones());
            self.words.insert(end / 64, left);
        }
        self.count -= gone.values().map(|word| u64::from(word.count_ones())).sum::<u64>();
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
    /// sample before, in ascending order. Runs outside of all mappings are of mappings that are gone.
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
            untracked_bytes: 0,
            mappings: Vec::with_capacity(self.kept.len()),
        };
        for kept in self.kept.values_mut() {
            let (pages, heat) = kept.mark(written);
            let bytes_per_s = rate(pages * PAGE as u64);
            push(&mut kept.rates, bytes_per_s as u64);
            let dirty_set_bytes = kept.ever.count * PAGE as u64;
            let Mapping { range, permissions, name, tracked } = kept.mapping.clone();
            sample.written_pages += pages;
            sample.dirty_set_bytes += dirty_set_bytes;
            sample.untracked_bytes += if tracked { 0 } else { range.end - range.start };
            sample.mappings.push(MappingSample {
                start: range.start,
                end: range.end,
                permissions,
                name,
                tracked,
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
            let pages = (mapping.range.end - start) / PAGE as u64;
            let mut now = Kept { mapping, ever: Pages::default(), rates: VecDeque::new() };
            if let Some(old) = before.remove(&start)
                && old.mapping.name == now.mapping.name
            {
                now.ever = old.ever;
                now.ever.truncate(pages);
                now.rates = old.rates;
            }
            self.kept.insert(start, now);
        }
    }
}

impl Kept {
    /// Marks what of `written`, which is ascending, lies in this mapping; how many pages that are,
    /// and where.
    fn mark(&mut self, written: &[Range<u64>]) -> (u64, Vec<u64>) {
        let (start, end) = (self.mapping.range.start, self.mapping.range.end);
        let pages = (end - start) / PAGE as u64;
        let cells = (CELLS as u64).min(pages);
        let mut heat = vec![0; cells as usize];
        // The first page of a cell, or of the one behind the last.
        let first =
            |cell: u64| (u128::from(cell) * u128::from(pages)).div_ceil(u128::from(cells)) as u64;
        let mut count = 0;
        let before = written.partition_point(|run| run.end <= start);
        for run in written[before..].iter().take_while(|run| run.start < end) {
            let page = |address: u64| (address.clamp(start, end) - start) / PAGE as u64;
            let (mut at, to) = (page(run.start), page(run.end));
            self.ever.insert(at..to);
            count += to - at;
            while at < to {
                let cell = u128::from(at) * u128::from(cells) / u128::from(pages);
                let next = first(cell as u64 + 1).min(to);
                heat[cell as usize] += next - at;
                at = next;
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
            tracked: true,
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

    /// What is kept is as large as what was written, not as what is mapped.
    #[test]
    fn mappings_of_which_little_is_used() {
        const HUGE: u64 = 1 << 34;
        let mut samples = Samples::default();
        let written = |turn: u64| [1 + turn, HUGE / 2, HUGE - 1].map(|page| pages(page, page + 1));
        for turn in 0..3 {
            let t = Duration::from_secs(turn + 1);
            let sample = samples.add(t, Duration::ZERO, vec![mapping(0, HUGE, "")], &written(turn));
            assert_eq!(sample.dirty_set_bytes, (3 + turn) * P);
            let heat = &sample.mappings[0].heat;
            assert_eq!((heat[0], heat[CELLS / 2], heat[CELLS - 1]), (1, 1, 1));
            assert_eq!(heat.iter().sum::<u64>(), 3);
        }
        assert!(samples.kept[&0].ever.words.len() <= 5);
        let all = [pages(0, 1 << 20)];
        let sample =
            samples.add(Duration::from_secs(9), Duration::ZERO, vec![mapping(0, HUGE, "")], &all);
        assert_eq!(sample.dirty_set_bytes, ((1 << 20) + 2) * P);
        assert_eq!(sample.mappings[0].heat[..2], [1 << 20, 0]);
    }

    /// Every page is in the cell that it would be in by itself.
    #[test]
    fn runs_and_pages_make_the_same_heat() {
        for size in [1, 7, 31, 32, 33, 100, 1000] {
            let heat = |written: &[Range<u64>]| {
                let t = Duration::from_secs(1);
                let mut samples = Samples::default();
                let mut sample = samples.add(t, t, vec![mapping(5, size, "")], written);
                (sample.mappings.remove(0).heat, samples.kept[&(5 * P)].ever.count)
            };
            let single: Vec<_> = (5..5 + size).map(|page| pages(page, page + 1)).collect();
            assert_eq!(heat(&[pages(0, 2000)]), heat(&single), "{size}");
            assert_eq!(heat(&[pages(3, 6), pages(6, 2000)]), heat(&single), "{size}");
        }
    }

    #[test]
    fn what_cannot_be_told_is_counted() {
        let mut samples = Samples::default();
        let untracked = Mapping { tracked: false, ..mapping(100, 3, "") };
        let all = vec![mapping(0, 10, ""), untracked];
        let sample = samples.add(Duration::from_secs(1), Duration::ZERO, all, &[pages(0, 1)]);
        assert_eq!((sample.untracked_bytes, sample.dirty_set_bytes), (3 * P, P));
        assert_eq!([0, 1].map(|index| sample.mappings[index].tracked), [true, false]);
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
