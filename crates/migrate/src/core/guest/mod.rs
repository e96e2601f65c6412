//! A guest as it moves: what both sides say, count and may do.
//!
//! * `parts`: the frames' payloads. `units`: sets of units of memory.
//! * `table`: which frame when.
//! * `memory`: what the connections of one side share. `lane`: those beside control.
//! * `source`, `destination`: the two ends of control, and who has the guest.

mod destination;
mod lane;
mod memory;
mod parts;
mod source;
mod table;
mod units;

#[cfg(test)]
pub(super) mod tests;

pub use destination::{DestinationEvent, GuestDestinationSession, GuestLimits};
pub use lane::{
    DestinationLane, DestinationLaneEvent, LaneEnd, Placement, SourceLane, SourceLaneEvent,
};
pub(super) use parts::{ACCEPT_LEN, RUN_LEN, STATE_BEGIN_LEN};
pub use parts::{
    AcceptedRegion, Belief, Codec, MAX_RUNS, PackedHeader, STATE_NAME_LEN, StateInfo, StateName,
    UnitRun,
};
pub use source::{AfterLoss, GuestSourceSession, Hold, SourceEvent};
pub use table::{
    guest_destination_next, guest_destination_sends, guest_source_next, guest_source_sends,
};
pub use units::UnitSet;
