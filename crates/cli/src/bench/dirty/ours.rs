//! The library's trackers.

use std::sync::Arc;

use pageferry::{
    dirty::{self, Ability, DirtySet, OnlyThread, SoftDirty, Target, Tracked, Tracker},
    uffd::HostRange,
};

use pageferry_kvm::{dirty::RingCollector, probe};

use super::{
    case::{Contender, Found, Memory, Method},
    writer::Writer,
};
use crate::bench::case::PAGE;

/// Why a method cannot be measured here.
pub(super) fn obstacle(method: Method) -> Option<String> {
    let needed = match method {
        Method::KvmLog => probe::RUNS,
        Method::KvmRing => probe::DIRTY_RING,
        Method::SoftDirty | Method::WpBlocking | Method::WpAsync => return own_obstacle(method),
    };
    let host = probe::host();
    if host.works(needed) {
        return None;
    }
    // Without a device nothing else was tried.
    let why = host.find(needed).or(host.findings.first());
    Some(why.map_or_else(|| format!("{needed} was not looked for"), ToString::to_string))
}

fn own_obstacle(method: Method) -> Option<String> {
    match dirty::probe(Target::Own).find(method.into()) {
        // The benchmark has one thread.
        Some(Ability::Works | Ability::Needs(_)) => None,
        Some(Ability::Missing(why)) => Some(why.clone()),
        None => Some("the library does not know it".to_owned()),
    }
}

impl From<Method> for dirty::Method {
    fn from(method: Method) -> Self {
        match method {
            Method::SoftDirty => Self::SoftDirty,
            Method::WpBlocking => Self::WpBlocking,
            Method::WpAsync => Self::WpAsync,
            Method::KvmLog => Self::KvmLog,
            Method::KvmRing => Self::KvmRing,
        }
    }
}

pub(super) struct Ours {
    tracker: Box<dyn Tracker>,
    ranges: [Tracked; 1],
    set: DirtySet,
    runs: Vec<HostRange>,
    collector: Option<RingCollector>,
}

impl Ours {
    pub(super) fn new(
        method: Method,
        memory: &Memory,
        writer: &Writer<'_>,
    ) -> anyhow::Result<Self> {
        let mapping = Arc::clone(&memory.mapping);
        let ranges = [Tracked::base(mapping.range())];
        let mut collector = None;
        let tracker: Box<dyn Tracker> = match method {
            Method::SoftDirty => Box::new(SoftDirty::new(Target::Own, OnlyThread)?),
            Method::WpBlocking => Box::new(dirty::WpBlocking::own([mapping])?),
            Method::WpAsync => Box::new(dirty::WpAsync::own([mapping])?),
            Method::KvmLog => Box::new(writer.guest()?.log()?),
            Method::KvmRing => {
                let (tracker, empties) = writer.guest()?.ring()?;
                collector = Some(empties);
                Box::new(tracker)
            }
        };
        Ok(Self { tracker, ranges, set: DirtySet::new(&ranges)?, runs: Vec::new(), collector })
    }
}

impl Contender for Ours {
    fn arm(&mut self) -> anyhow::Result<()> {
        Ok(self.tracker.arm(&self.ranges)?)
    }

    fn harvest(&mut self, _found: &mut Found) -> anyhow::Result<()> {
        self.tracker.harvest(&self.set)?;
        Ok(())
    }

    fn report(&mut self, found: &mut Found) {
        self.runs.clear();
        self.set.take_into(&mut self.runs);
        let start = self.ranges[0].range.start();
        for run in &self.runs {
            let from = run.start().get() - start.get();
            found.mark(from / PAGE as u64, run.len() / PAGE as u64);
        }
    }

    fn collect(&mut self) -> anyhow::Result<()> {
        match &self.collector {
            Some(collector) => Ok(collector.collect()?),
            None => anyhow::bail!("a dirty ring is full, and none is used"),
        }
    }

    fn disarm(&mut self) -> anyhow::Result<()> {
        Ok(self.tracker.disarm()?)
    }
}
