//! Which units each vCPU touches, in which order: what the guest computes, computed by the host.

use pageferry_memory::{GuestAddress, PageSize};

use crate::{Operation, Order, Share, VmConfig};

/// Where the low part of the paged memory begins: above all boot memory, and on a page of any size.
pub(crate) const LOW_BASE: u64 = 1 << 30;
/// Where the low part ends at the latest: devices are above, as on every PC.
const LOW_END: u64 = 3 << 30;
/// Where the high part begins.
pub(crate) const HIGH_BASE: u64 = 4 << 30;

/// Words of each unit that are accessed at equal distances; one more is its last.
pub(crate) const SPREAD_WORDS: u64 = 8;

/// How the memory lies on both sides of the hole below 4 GiB.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Split {
    pub(crate) low: u64,
    pub(crate) high: u64,
}

impl Split {
    /// Half of it below the hole, as far as it fits; all of it when there is but one page (or
    /// unit).
    pub(crate) fn of(memory: u64, step: PageSize) -> Self {
        let low = match step.round_down(memory / 2) {
            0 => memory,
            half => half.min(LOW_END - LOW_BASE),
        };
        Self { low, high: memory - low }
    }
}

/// A permutation of the numbers below `count`, which a guest computes in a few instructions.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Permutation {
    pub(crate) count: u64,
    /// The generator's modulus, a power of two, less one.
    pub(crate) mask: u64,
    pub(crate) factor: u64,
    pub(crate) addend: u64,
    pub(crate) shift: u64,
    pub(crate) mixer: u64,
    pub(crate) start: u64,
}

impl Permutation {
    fn new(count: u64, seed: u64) -> Self {
        let random = |salt| mix(seed ^ mix(salt));
        let mask = count.next_power_of_two() - 1;
        Self {
            count,
            mask,
            // Hull and Dobell: the period is full if the factor is 1 modulo 4 and the addend odd.
            factor: random(1) & !3 | 1,
            addend: random(2) | 1,
            // An xor with itself shifted right and a product with an odd number are one to one.
            shift: u64::from(mask.count_ones().div_ceil(2).max(1)),
            mixer: random(3) | 1,
            start: random(4) & mask,
        }
    }

    fn iter(self) -> impl Iterator<Item = u64> {
        let mut x = self.start;
        (0..=self.mask).filter_map(move |_| {
            x = x.wrapping_mul(self.factor).wrapping_add(self.addend) & self.mask;
            let y = (x ^ (x >> self.shift)).wrapping_mul(self.mixer) & self.mask;
            (y < self.count).then_some(y)
        })
    }
}

/// The last step of splitmix64.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What one vCPU does.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct VcpuPlan {
    pub(crate) order: Order,
    /// The number of its first unit.
    pub(crate) first: u64,
    /// Touches of a round.
    pub(crate) touches: u64,
    pub(crate) permutation: Permutation,
}

/// How often a unit has been counted in.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Counted {
    pub(crate) rounds: u64,
    /// Some of its words may have been counted in once more.
    pub(crate) perhaps_more: bool,
}

/// What all vCPUs do.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) split: Split,
    pub(crate) unit: PageSize,
    vcpus: Vec<VcpuPlan>,
}

impl Plan {
    pub(crate) fn new(config: &VmConfig) -> Self {
        let payload = &config.payload;
        let unit = payload.unit;
        let split = Split::of(config.memory, unit.max(config.page_size));
        let units = config.memory / unit.bytes();
        let count = u64::from(config.vcpus);
        let vcpus = (0..config.vcpus)
            .map(|number| {
                let (vcpu, order) = (u64::from(number), payload.order_of(number));
                let (first, own) = match payload.share {
                    Share::All => (0, units),
                    Share::Own => {
                        let start = |vcpu| {
                            (u128::from(units) * u128::from(vcpu) / u128::from(count)) as u64
                        };
                        (start(vcpu), start(vcpu + 1) - start(vcpu))
                    }
                };
                let wanted = payload.units_per_vcpu.unwrap_or(own);
                VcpuPlan {
                    order,
                    first,
                    touches: match order {
                        Order::Zipf => wanted,
                        Order::Sequential | Order::Random => wanted.min(own),
                    },
                    permutation: Permutation::new(own, mix(payload.seed) ^ vcpu),
                }
            })
            .collect();
        Self { split, unit, vcpus }
    }

    pub(crate) fn vcpu(&self, vcpu: u16) -> &VcpuPlan {
        &self.vcpus[usize::from(vcpu)]
    }

    /// The units that the vCPU touches in a round, in its order.
    pub(crate) fn units(&self, vcpu: u16) -> Box<dyn Iterator<Item = u64>> {
        let VcpuPlan { order, first, touches, permutation } = *self.vcpu(vcpu);
        let own: Box<dyn Iterator<Item = u64>> = match order {
            Order::Sequential => Box::new(0..touches),
            Order::Random => Box::new(permutation.iter().take(touches as usize)),
            Order::Zipf => Box::new(zipf(permutation, touches)),
        };
        Box::new(own.map(move |unit| first + unit))
    }

    /// How many units the memory has.
    pub(crate) fn total_units(&self) -> u64 {
        (self.split.low + self.split.high) / self.unit.bytes()
    }

    /// Where the unit begins.
    pub(crate) fn address(&self, unit: u64) -> GuestAddress {
        let offset = unit * self.unit.bytes();
        GuestAddress::new(match offset.checked_sub(self.split.low) {
            None => LOW_BASE + offset,
            Some(offset) => HIGH_BASE + offset,
        })
    }

    /// Which units any vCPU touches, one flag for each.
    pub(crate) fn touched(&self) -> Vec<bool> {
        let mut touched = vec![false; self.total_units() as usize];
        for vcpu in 0..self.vcpus.len() as u16 {
            for unit in self.units(vcpu) {
                touched[unit as usize] = true;
            }
        }
        touched
    }

    /// How far a payload that counts has come in each unit, by the touches of each vCPU.
    pub(crate) fn counted(&self, touches: &[u64]) -> Vec<Counted> {
        let mut counted =
            vec![Counted { rounds: 0, perhaps_more: false }; self.total_units() as usize];
        for (number, touches) in (0..).zip(touches) {
            let a_round = self.vcpu(number).touches;
            let (rounds, done) = (touches / a_round, touches % a_round);
            for (position, unit) in (0..).zip(self.units(number)) {
                counted[unit as usize] = Counted {
                    rounds: rounds + u64::from(position < done),
                    // It may be in the middle of this one.
                    perhaps_more: position == done,
                };
            }
        }
        counted
    }

    /// Whether this offset in a unit is one that the payload accesses.
    pub(crate) fn is_accessed(&self, offset: u64) -> bool {
        let unit = self.unit.bytes();
        offset.is_multiple_of(unit / SPREAD_WORDS) || offset == unit - 8
    }
}

/// `draws` numbers below the permutation's count by Zipf's law with exponent 1, the often drawn
/// ones spread by the permutation. The law's distribution function is close to ln(rank) /
/// ln(count), whose inverse is an exponential.
fn zipf(spread: Permutation, draws: u64) -> impl Iterator<Item = u64> {
    let log = ((spread.count + 1) as f64).ln();
    (0..draws).map(move |draw| {
        let uniform = (mix(spread.start ^ mix(draw + 1)) >> 11) as f64 / (1_u64 << 53) as f64;
        let rank = ((uniform * log).exp() as u64 - 1).min(spread.count - 1);
        // Spread over all units: neighbouring ranks would share huge pages.
        ((u128::from(mix(rank ^ spread.addend)) * u128::from(spread.count)) >> 64) as u64
    })
}

/// Whether the payload's writes may meet words that have been written already.
pub(crate) fn revisits(config: &VmConfig) -> bool {
    let payload = &config.payload;
    payload.operation == Operation::ReadModifyWrite
        && (payload.rounds > 1
            || (0..config.vcpus).any(|vcpu| payload.order_of(vcpu) == Order::Zipf)
            || payload.share == Share::All && config.vcpus > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(order: Order, share: Share, vcpus: u16, pages: u64) -> VmConfig {
        let mut config = VmConfig::new(vcpus, pages << 12);
        (config.payload.order, config.payload.share) = (order, share);
        config
    }

    #[test]
    fn every_unit_is_touched_once() {
        for order in [Order::Sequential, Order::Random] {
            for (vcpus, pages) in [(1, 1), (1, 2), (2, 3), (3, 1000), (64, 64), (7, 4096)] {
                let plan = Plan::new(&config(order, Share::Own, vcpus, pages));
                let mut units: Vec<u64> = (0..vcpus).flat_map(|vcpu| plan.units(vcpu)).collect();
                units.sort_unstable();
                assert!(units.iter().copied().eq(0..pages), "{order:?} {vcpus} {pages}");
            }
        }
    }

    #[test]
    fn every_second_vcpu_may_have_another_order() {
        let mut config = config(Order::Random, Share::All, 3, 1000);
        config.payload.order_of_others = Some(Order::Sequential);
        let plan = Plan::new(&config);
        let ascends = |vcpu| plan.units(vcpu).is_sorted();
        assert_eq!([0, 1, 2].map(ascends), [false, true, false]);
        config.payload.operation = Operation::ReadModifyWrite;
        config.payload.share = Share::Own;
        assert!(!revisits(&config));
        config.payload.order_of_others = Some(Order::Zipf);
        assert!(revisits(&config));
    }

    #[test]
    fn orders_at_random_differ_and_are_not_ascending() {
        let plan = Plan::new(&config(Order::Random, Share::All, 2, 1000));
        let [first, second]: [Vec<u64>; 2] = [0, 1].map(|vcpu| plan.units(vcpu).collect());
        assert_ne!(first, second);
        let ascents = first.windows(2).filter(|pair| pair[0] < pair[1]).count();
        assert!((350..650).contains(&ascents), "{ascents} of 999 steps ascend");
    }

    #[test]
    fn zipf_draws_few_units_often() {
        let plan = Plan::new(&config(Order::Zipf, Share::All, 1, 1024));
        let mut often = vec![0_u64; 1024];
        for unit in plan.units(0) {
            often[unit as usize] += 1;
        }
        assert_eq!(often.iter().sum::<u64>(), 1024);
        often.sort_unstable();
        // Of 1024 draws the first rank has one in 10, the first 32 ranks half of all.
        assert!((60..180).contains(&often[1023]), "{}", often[1023]);
        assert!((420..650).contains(&often[1024 - 32..].iter().sum::<u64>()));
        assert!(often[..512].iter().all(|n| *n <= 1));
    }

    #[test]
    fn memory_lies_on_both_sides_of_the_hole() {
        let gib = 1 << 30;
        // memory, page: low, high
        let cases = [
            (4096, PageSize::SIZE_4K, 4096, 0),
            (3 * 4096, PageSize::SIZE_4K, 4096, 2 * 4096),
            (gib, PageSize::SIZE_1G, gib, 0),
            (2 * gib, PageSize::SIZE_1G, gib, gib),
            (16 * gib, PageSize::SIZE_2M, 2 * gib, 14 * gib),
        ];
        for (memory, page, low, high) in cases {
            assert_eq!(Split::of(memory, page), Split { low, high });
        }
        let plan = Plan::new(&config(Order::Sequential, Share::Own, 1, 4));
        let addresses: Vec<u64> = (0..4).map(|unit| plan.address(unit).get()).collect();
        assert_eq!(addresses, [LOW_BASE, LOW_BASE + 4096, HIGH_BASE, HIGH_BASE + 4096]);
    }
}
