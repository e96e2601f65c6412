//! What is measured: one combination of delivery, threads and memory; and the result.

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use super::histogram::Histogram;

/// The size of the page that is fetched and installed, in bytes.
pub(crate) const PAGE: usize = 4096;

/// How a fault reaches the one who resolves it.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Delivery {
    /// One userfaultfd, one thread that reads it
    Queue,
    /// One userfaultfd, several threads that read it
    QueueN,
    /// One reader, workers chosen by the faulting thread's id
    ByThread,
    /// One reader, workers chosen by the CPU that the faulting thread last ran on
    ByCpu,
    /// One userfaultfd and reader for each part of the memory
    Sharded,
    /// SIGBUS in the faulting thread
    Signal,
}

/// What the memory is made of.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Backing {
    /// Private anonymous memory
    Anon,
    /// A memfd, mapped shared
    Memfd,
}

/// Which faults are served.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// No page is there: COPY installs one
    Missing,
    /// The page is in the page cache: it is filled through the alias, CONTINUE maps it
    Minor,
}

/// The order in which a guest thread touches the pages of its slice.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Every page once, in an order that depends only on the seed
    Random,
    /// Every page once, upwards
    Sequential,
}

/// What a guest thread does to a page.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Access {
    /// Reads its first 8 bytes
    Read,
    /// Writes its last byte
    Write,
}

macro_rules! display_as_value_name {
    ($($name:ty),*) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let value = clap::ValueEnum::to_possible_value(self);
                f.pad(value.as_ref().map_or("", |v| v.get_name()))
            }
        }
    )*};
}
display_as_value_name!(Delivery, Backing, Kind, Order, Access);
pub(crate) use display_as_value_name;

/// One measurement to make. Every contender gets the very same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Case {
    pub(crate) delivery: Delivery,
    pub(crate) backing: Backing,
    pub(crate) kind: Kind,
    /// Guest threads. At least 1, and at most `pages`.
    pub(crate) threads: usize,
    /// Pages of [`PAGE`] bytes in all, of which every guest thread touches its own slice.
    pub(crate) pages: usize,
    pub(crate) order: Order,
    pub(crate) access: Access,
    pub(crate) seed: u64,
    /// Readers (`queue-n`), workers (`by-thread`, `by-cpu`) or shards (`sharded`). At least 1.
    pub(crate) workers: usize,
    /// The most messages taken by one read(2) of a userfaultfd. At least 1.
    pub(crate) batch: usize,
}

impl Case {
    /// The size of the memory in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.pages * PAGE
    }

    /// The pages of guest thread `thread`: contiguous slices that differ by one page at most.
    pub(crate) fn slice(&self, thread: usize) -> std::ops::Range<usize> {
        split(self.pages, self.threads, thread)
    }
}

/// Part `index` of `parts` contiguous parts of `0..total`.
pub(crate) fn split(total: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    total * index / parts..total * (index + 1) / parts
}

/// What one run of one case took.
#[derive(Clone, Debug)]
pub(crate) struct Measurement {
    /// Pages that were touched, each exactly once.
    pub(crate) pages: usize,
    /// From the guest threads' common start to the last one's last touch.
    pub(crate) wall: Duration,
    /// User and system time of the whole process within that time.
    pub(crate) cpu: Duration,
    /// How long each touch took.
    pub(crate) latency: Box<Histogram>,
}

/// One who serves a guest's faults.
pub(crate) trait Contender {
    /// How the result names it.
    fn name(&self) -> &str;

    /// Serves `case` once, on memory of its own that no earlier run has touched, every page
    /// filled with [`page_contents`](super::guest::page_contents), and measures it with
    /// [`guest::run`](super::guest::run).
    ///
    /// For [`Kind::Minor`] the memory starts with every page in the page cache and mapped in the
    /// alias, and nothing mapped in the guest's view, as [`Memory`](super::memory::Memory) makes it.
    fn run(&mut self, case: &Case) -> anyhow::Result<Measurement>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for (total, parts) in [(1, 1), (7, 3), (32, 32), (100, 8), (5, 5)] {
            let mut next = 0;
            for index in 0..parts {
                let part = split(total, parts, index);
                assert_eq!(part.start, next);
                assert!(part.len() >= total / parts && part.len() <= total / parts + 1);
                next = part.end;
            }
            assert_eq!(next, total);
        }
    }
}
