//! A machine's configuration as a part of its state: as much of it as the guest can tell. How its
//! memory is mapped and tracked is everybody's own affair.
//!
//! Words of 64 bits, little-endian, in the order of [`VmConfig::words`].

use pageferry_memory::{GuestAddress, PageSize};

use super::{Operation, Order, Payload, Ring, Share, VmConfig};
use crate::{
    VmError,
    plan::Plan,
    state::{MachineState, StateError},
    vm::device,
};

/// The name of the device that this is to a machine's state.
pub(crate) const CONFIG: &str = "config";

const WORDS: usize = 16;
const ORDERS: [Order; 3] = [Order::Sequential, Order::Random, Order::Zipf];
const OPERATIONS: [Operation; 4] =
    [Operation::ReadVerify, Operation::Write, Operation::ReadModifyWrite, Operation::Count];
const RINGS: [Ring; 2] = [Ring::Zero, Ring::Three];
const SHARES: [Share; 2] = [Share::Own, Share::All];

fn index<T: PartialEq>(all: &[T], one: &T) -> u64 {
    all.iter().position(|other| other == one).expect("one of all") as u64
}

impl VmConfig {
    fn words(&self) -> [u64; WORDS] {
        let payload = &self.payload;
        [
            self.vcpus.into(),
            self.memory,
            // Where the memory is split depends on the size of its pages.
            Plan::new(self).split.low,
            index(&ORDERS, &payload.order),
            payload.order_of_others.map_or(u64::MAX, |order| index(&ORDERS, &order)),
            index(&OPERATIONS, &payload.operation),
            index(&RINGS, &payload.ring),
            index(&SHARES, &payload.share),
            payload.unit.bytes(),
            payload.units_per_vcpu.unwrap_or(0),
            payload.rounds,
            payload.seed,
            payload.pattern.zero_every,
            payload.progress_every,
            payload.stray.map_or(0, GuestAddress::get),
            payload.rate.unwrap_or(0),
        ]
    }

    /// For a state.
    pub(crate) fn encode(&self) -> Vec<u8> {
        self.words().into_iter().flat_map(u64::to_le_bytes).collect()
    }

    /// What a machine has to be made from that is to take this state. How its memory is mapped is
    /// free, as long as its page size leaves the regions as they were: here it is as in
    /// [`new`](Self::new).
    ///
    /// # Errors
    /// When the state is not of such a machine.
    pub fn of_state(state: &MachineState) -> Result<Self, VmError> {
        let refused = |why: String| StateError::device(CONFIG, why);
        let bytes = device(state, CONFIG)?;
        let mut words = [0; WORDS];
        if bytes.len() != 8 * WORDS {
            return Err(refused(format!("{} bytes", bytes.len())).into());
        }
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        }
        let config = Self::of_words(&words).ok_or_else(|| refused(format!("{words:x?}")))?;
        config.check()?;
        let low = Plan::new(&config).split.low;
        // A machine with huge pages.
        let sizes = [PageSize::SIZE_2M, PageSize::SIZE_1G];
        let of_size = |page_size| Self { page_size, ..config.clone() };
        let mut others = sizes.map(of_size).into_iter().filter(|config| config.check().is_ok());
        if low == words[2] {
            return Ok(config);
        }
        others
            .find(|config| Plan::new(config).split.low == words[2])
            .ok_or_else(|| refused(format!("its memory is split at {:#x}", words[2])).into())
    }

    fn of_words(words: &[u64; WORDS]) -> Option<Self> {
        let [vcpus, memory, _, order, others, operation, ring, share, unit, rest @ ..] = *words;
        let [units, rounds, seed, zero_every, progress_every, stray, rate] = rest;
        fn of<T: Copy>(all: &[T], index: u64) -> Option<T> {
            all.get(usize::try_from(index).ok()?).copied()
        }
        let some = |word: u64| (word != 0).then_some(word);
        let payload = Payload {
            order: of(&ORDERS, order)?,
            order_of_others: match others {
                u64::MAX => None,
                others => Some(of(&ORDERS, others)?),
            },
            operation: of(&OPERATIONS, operation)?,
            ring: of(&RINGS, ring)?,
            share: of(&SHARES, share)?,
            unit: PageSize::try_new(unit)?,
            units_per_vcpu: some(units),
            rounds,
            seed,
            pattern: crate::Pattern { zero_every },
            progress_every,
            stray: some(stray).map(GuestAddress::new),
            rate: some(rate),
        };
        Some(Self { payload, ..Self::new(vcpus.try_into().ok()?, memory) })
    }
}
