//! After a round: copy once more, or stop the guest, or what else was asked for.

use std::time::Duration;

/// What to do when further rounds would not help.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum OnNoConvergence {
    /// Stop the guest and send the rest, however long that takes.
    Switch,
    /// Run the guest at the destination, and bring the rest on demand.
    PostCopy,
    /// Slow the vCPUs down until it converges; [`Switch`](Self::Switch) when they are as slow as
    /// can be.
    Throttle,
    /// Leave the guest where it is.
    GiveUp,
}

/// How far the policy lets rounds go.
#[derive(Copy, Clone, PartialEq, Debug)]
pub(crate) struct Limits {
    /// The downtime that is good enough.
    pub(crate) downtime: Duration,
    /// For all rounds.
    pub(crate) timeout: Duration,
    /// Most rounds.
    pub(crate) rounds: u32,
    pub(crate) otherwise: OnNoConvergence,
}

/// What is known after a round.
#[derive(Copy, Clone, PartialEq, Debug)]
pub(crate) struct Round {
    /// 1 and on.
    pub(crate) number: u32,
    /// Bytes of memory that the next round would have to look at.
    pub(crate) dirty: u64,
    /// The same after the round before; `None` after the first.
    pub(crate) dirty_before: Option<u64>,
    /// Bytes of memory dealt with in a second of this round.
    pub(crate) rate: f64,
    /// Since the first round began.
    pub(crate) elapsed: Duration,
    /// How much the vCPUs are slowed down, in percent.
    pub(crate) throttle: u8,
    /// What stopping and the devices' state are expected to take.
    pub(crate) fixed: Duration,
}

impl Round {
    /// What the guest would be stopped for if it were now.
    pub(crate) fn downtime(&self) -> Duration {
        if self.dirty == 0 {
            return self.fixed;
        }
        let seconds = self.dirty as f64 / self.rate.max(1.0);
        // A day is as good as for ever, and fits.
        self.fixed + Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0))
    }
}

/// What comes next.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    Round,
    Switch,
    PostCopy,
    /// One more round with the vCPUs this much slower.
    Throttle(u8),
    GiveUp,
}

/// A round that leaves more than this part of what the one before left has not helped.
const SHRINKS: f64 = 0.9;
/// Throttling begins with this, and goes on in steps of [`THROTTLE_STEP`] to [`THROTTLE_MOST`].
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 15;
const THROTTLE_MOST: u8 = 95;

/// Decides what comes after `round`.
pub(crate) fn decide(limits: &Limits, round: &Round) -> Next {
    if round.downtime() <= limits.downtime {
        return Next::Switch;
    }
    let late = round.elapsed >= limits.timeout || round.number >= limits.rounds;
    let shrinks =
        round.dirty_before.is_none_or(|before| (round.dirty as f64) < SHRINKS * before as f64);
    if shrinks && !late {
        return Next::Round;
    }
    match limits.otherwise {
        OnNoConvergence::Switch => Next::Switch,
        OnNoConvergence::PostCopy => Next::PostCopy,
        OnNoConvergence::GiveUp => Next::GiveUp,
        OnNoConvergence::Throttle if late || round.throttle >= THROTTLE_MOST => Next::Switch,
        OnNoConvergence::Throttle if round.throttle == 0 => Next::Throttle(THROTTLE_FIRST),
        OnNoConvergence::Throttle => {
            Next::Throttle(round.throttle.saturating_add(THROTTLE_STEP).min(THROTTLE_MOST))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_otherwise() -> impl Strategy<Value = OnNoConvergence> {
        prop_oneof![
            Just(OnNoConvergence::Switch),
            Just(OnNoConvergence::PostCopy),
            Just(OnNoConvergence::Throttle),
            Just(OnNoConvergence::GiveUp),
        ]
    }

    proptest! {
        /// Whatever the guest does, the rounds end, and as asked.
        #[test]
        fn it_ends_as_asked(
            otherwise in any_otherwise(),
            dirty in prop::collection::vec(0_u64..1 << 40, 64),
            rate in 1.0_f64..1e11,
            downtime in 0_u64..10_000,
        ) {
            let limits = Limits {
                downtime: Duration::from_millis(downtime),
                timeout: Duration::from_secs(60),
                rounds: 30,
                otherwise,
            };
            let (mut before, mut throttle, mut elapsed) = (None, 0, Duration::ZERO);
            let mut number = 0;
            let end = loop {
                number += 1;
                prop_assert!(number <= 30);
                let now = dirty[number as usize];
                elapsed += Duration::from_secs_f64(before.unwrap_or(now) as f64 / rate);
                let round = Round {
                    number, dirty: now, dirty_before: before, rate, elapsed, throttle,
                    fixed: Duration::from_millis(5),
                };
                match decide(&limits, &round) {
                    Next::Round => {}
                    Next::Throttle(percent) => {
                        prop_assert!(percent > throttle && percent < 100);
                        throttle = percent;
                    }
                    end => break (end, round),
                }
                before = Some(now);
            };
            match end {
                (Next::Switch, round) => prop_assert!(
                    round.downtime() <= limits.downtime
                        || matches!(otherwise, OnNoConvergence::Switch | OnNoConvergence::Throttle)
                ),
                (Next::PostCopy, _) => prop_assert_eq!(otherwise, OnNoConvergence::PostCopy),
                (Next::GiveUp, _) => prop_assert_eq!(otherwise, OnNoConvergence::GiveUp),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    #[test]
    fn a_table_of_cases() {
        let limits = |otherwise| Limits {
            downtime: Duration::from_millis(300),
            timeout: Duration::from_secs(10),
            rounds: 100,
            otherwise,
        };
        let round = Round {
            number: 3,
            dirty: 1 << 30,
            dirty_before: Some(2 << 30),
            rate: 1e9,
            elapsed: Duration::from_secs(4),
            throttle: 0,
            fixed: Duration::ZERO,
        };
        let switch = limits(OnNoConvergence::Switch);
        assert_eq!(decide(&switch, &round), Next::Round);
        assert_eq!(decide(&switch, &Round { dirty: 200 << 20, ..round }), Next::Switch);
        let stuck = Round { dirty_before: Some(1 << 30), ..round };
        assert_eq!(decide(&switch, &stuck), Next::Switch);
        assert_eq!(decide(&limits(OnNoConvergence::GiveUp), &stuck), Next::GiveUp);
        let throttle = limits(OnNoConvergence::Throttle);
        assert_eq!(decide(&throttle, &stuck), Next::Throttle(20));
        assert_eq!(decide(&throttle, &Round { throttle: 20, ..stuck }), Next::Throttle(35));
        assert_eq!(decide(&throttle, &Round { throttle: 95, ..stuck }), Next::Switch);
        let late = Round { elapsed: Duration::from_secs(10), ..round };
        assert_eq!(decide(&limits(OnNoConvergence::PostCopy), &late), Next::PostCopy);
        // The first round has nothing to be compared with.
        assert_eq!(decide(&switch, &Round { dirty_before: None, ..stuck }), Next::Round);
    }
}
