//! What the vCPUs of a KVM guest say of their faults.

use std::time::Duration;

use pageferry_kvm::VcpuStats;
use pageferry_vmm::{TouchTimes, VcpuReport};
use serde::Serialize;

use super::Micros;
use crate::output::{Align, Table};

/// Exits from KVM_RUN for paging, by kind.
#[derive(Serialize)]
struct Exits {
    total: u64,
    /// Stage 2 met a marker.
    poison: u64,
    /// KVM emulated an access and could not make it.
    mmio_reads: u64,
    mmio_writes: u64,
    /// KVM emulated an instruction and could not fetch it.
    fetches: u64,
    /// KVM said what it could not use, as newer kernels do.
    memory_faults: u64,
    /// Of all these, how many waited for somebody else to bring the page.
    waited: u64,
    /// From leaving KVM_RUN to entering it again, to within a factor of two.
    time: Micros,
}

impl Exits {
    fn of(stats: &VcpuStats) -> Self {
        let time = &stats.time;
        Self {
            total: stats.exits(),
            poison: stats.poison,
            mmio_reads: stats.mmio_reads,
            mmio_writes: stats.mmio_writes,
            fetches: stats.fetches,
            memory_faults: stats.memory_faults,
            waited: stats.waited,
            time: Micros::new(time.count(), |q| time.quantile(q), time.max()),
        }
    }
}

/// One vCPU.
#[derive(Serialize)]
struct Vcpu {
    accesses: u64,
    wrong_reads: u64,
    seconds: f64,
    exits: Exits,
}

/// All vCPUs.
#[derive(Serialize)]
pub(super) struct Vcpus {
    exits: Exits,
    vcpus: Vec<Vcpu>,
    /// First accesses to pages, present or not, as the guest timed them, to within a factor of two;
    /// nothing if KVM does not know how fast the guest's clock is.
    touch: Option<Micros>,
}

impl Vcpus {
    pub(super) fn of(reports: &[VcpuReport]) -> Self {
        let mut all = VcpuStats::default();
        let mut touch = TouchTimes::default();
        let mut vcpus = Vec::new();
        for report in reports {
            let stats = report.pager.clone().unwrap_or_default();
            all.add(&stats);
            add(&mut touch, &report.times);
            vcpus.push(Vcpu {
                accesses: report.touches,
                wrong_reads: report.mismatches,
                seconds: report.wall.as_secs_f64(),
                exits: Exits::of(&stats),
            });
        }
        Self { exits: Exits::of(&all), vcpus, touch: touch_micros(&touch) }
    }

    /// How many exits there were.
    pub(super) fn exits(&self) -> u64 {
        self.exits.total
    }

    /// The rows of the table of times.
    pub(super) fn times(&self) -> impl Iterator<Item = (&'static str, &Micros)> {
        let exits = (self.exits.total > 0).then_some(("exit, in vCPU's thread", &self.exits.time));
        self.touch.iter().map(|touch| ("any access, seen by guest", touch)).chain(exits)
    }

    /// Exits of each vCPU; nothing if there were none.
    pub(super) fn table(&self) -> Option<String> {
        if self.exits.total == 0 {
            return None;
        }
        let columns = ["vCPU", "accesses", "exits", "poison", "mmio", "fetch", "waited"];
        let mut table = Table::new(&columns.map(|column| (column, Align::Right)));
        for (number, vcpu) in self.vcpus.iter().enumerate() {
            let Exits { total, poison, mmio_reads, mmio_writes, fetches, waited, .. } = vcpu.exits;
            let counts = [vcpu.accesses, total, poison, mmio_reads + mmio_writes, fetches, waited];
            let cells = std::iter::once(number as u64).chain(counts);
            table.row(cells.map(|cell| cell.to_string()).collect());
        }
        Some(table.render())
    }
}

fn add(all: &mut TouchTimes, one: &TouchTimes) {
    all.count += one.count;
    all.max = all.max.max(one.max);
    all.ticks_per_ms = all.ticks_per_ms.or(one.ticks_per_ms);
    all.log2.resize(all.log2.len().max(one.log2.len()), 0);
    for (sum, count) in all.log2.iter_mut().zip(&one.log2) {
        *sum += count;
    }
}

fn touch_micros(times: &TouchTimes) -> Option<Micros> {
    let ticks_per_ms = times.ticks_per_ms.filter(|ticks| *ticks > 0)?;
    let time = |ticks: u64| Duration::from_secs_f64(ticks as f64 / f64::from(ticks_per_ms) / 1e3);
    let quantile = |q: f64| {
        let rank = ((times.count as f64 * q).ceil() as u64).max(1);
        let mut seen = 0;
        times.log2.iter().enumerate().find_map(|(bits, count)| {
            seen += count;
            // The most that a number of so many bits can be.
            let most = 1_u64.checked_shl(bits as u32).map_or(u64::MAX, |power| power - 1);
            (seen >= rank).then(|| time(most.min(times.max)))
        })
    };
    Some(Micros::new(times.count, quantile, time(times.max)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_ticks_become_microseconds() {
        let mut times = TouchTimes::default();
        assert!(touch_micros(&times).is_none(), "its clock is not known");
        // A tick is a nanosecond: 90 times up to 1023, 10 times up to 5000.
        let log2 = (0..65).map(|bits| match bits {
            10 => 90,
            13 => 10,
            _ => 0,
        });
        let one = TouchTimes {
            count: 100,
            min: 512,
            max: 5000,
            sum: 0,
            log2: log2.collect(),
            ticks_per_ms: Some(1_000_000),
        };
        add(&mut times, &one);
        add(&mut times, &one);
        let touch = touch_micros(&times).unwrap();
        assert_eq!(touch.count, 200);
        assert_eq!((touch.p50_us, touch.p99_us, touch.max_us), (1.023, 5.0, 5.0));
    }
}
