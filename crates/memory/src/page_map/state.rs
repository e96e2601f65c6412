//! What a granule can be, and what an attempt to claim it answers.

/// The state of one granule.
///
/// | from | to | by |
/// |---|---|---|
/// | absent | requested | `claim`, `claim_run` |
/// | absent | present | `set_present` |
/// | requested | present | `publish` |
/// | requested | absent | `release` |
/// | absent, requested | poisoned | `poison` |
/// | every state | discarded | `discard` |
/// | discarded | present | `publish_discarded` |
///
/// What has left absent and requested for another state never returns to them.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug, Default)]
#[repr(u8)]
pub enum State {
    /// Still at its source only.
    #[default]
    Absent = 0,
    /// Exactly one party has undertaken to bring it, and will publish, release or poison it.
    Requested = 1,
    /// Installed: what the kernel has is the truth.
    Present = 2,
    /// It can never come.
    Poisoned = 3,
    /// The guest has given it up: it reads as zero from now on, and nothing of its source may be
    /// installed any more.
    Discarded = 4,
}

impl State {
    pub(super) const COUNT: usize = 5;

    /// All states.
    pub const ALL: [Self; Self::COUNT] =
        [Self::Absent, Self::Requested, Self::Present, Self::Poisoned, Self::Discarded];

    #[inline]
    pub(super) fn from_digit(digit: u64) -> Self {
        Self::ALL[digit as usize]
    }

    /// Whether the granule has still to come.
    #[inline]
    pub const fn is_outstanding(self) -> bool {
        matches!(self, Self::Absent | Self::Requested)
    }
}

/// What [`PageMap::claim`](super::PageMap::claim) answers.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
#[must_use = "whoever has won a granule must bring it"]
pub enum Claim {
    /// It was absent, and is the caller's now, who must publish, release or poison it.
    Won,
    /// Somebody else brings it.
    Requested,
    /// It is there.
    Present,
    /// It can never come.
    Poisoned,
    /// It reads as zero.
    Discarded,
}
