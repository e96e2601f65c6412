//! Which frame may arrive when, as two tables.

use super::{Channel, Kind, Phase};

use Channel::{Background, Demand};
use Phase::{Active, Closed, Completed, Completing, Greeting, Listing};

/// A row: on these channels, in this phase, a frame of this kind leads to that phase.
type Row = (&'static [Channel], Phase, Kind, Phase);

const BOTH: &[Channel] = &[Demand, Background];
const ONE: &[Channel] = &[Demand];
const OTHER: &[Channel] = &[Background];

/// What a destination may receive. Whatever has no row is refused.
const CLIENT: &[Row] = &[
    (ONE, Greeting, Kind::Hello, Listing),
    (OTHER, Greeting, Kind::Hello, Active),
    (ONE, Listing, Kind::Regions, Active),
    (BOTH, Active, Kind::Data, Active),
    (BOTH, Active, Kind::Zero, Active),
    (BOTH, Active, Kind::Poison, Active),
    (ONE, Completing, Kind::CompleteAck, Completed),
    (BOTH, Active, Kind::Ping, Active),
    (BOTH, Active, Kind::Pong, Active),
    (ONE, Completing, Kind::Ping, Completing),
    (ONE, Completing, Kind::Pong, Completing),
    (ONE, Completed, Kind::Ping, Completed),
    (ONE, Completed, Kind::Pong, Completed),
    (BOTH, Active, Kind::Bye, Closed),
    (ONE, Completing, Kind::Bye, Closed),
    (ONE, Completed, Kind::Bye, Closed),
    (BOTH, Greeting, Kind::Error, Closed),
    (ONE, Listing, Kind::Error, Closed),
    (BOTH, Active, Kind::Error, Closed),
    (ONE, Completing, Kind::Error, Closed),
    (ONE, Completed, Kind::Error, Closed),
];

/// What a source may receive. Whatever has no row is refused.
const SERVER: &[Row] = &[
    (BOTH, Greeting, Kind::Hello, Active),
    (BOTH, Active, Kind::Request, Active),
    (ONE, Active, Kind::Expedite, Active),
    (ONE, Active, Kind::Complete, Completed),
    (BOTH, Active, Kind::Ping, Active),
    (BOTH, Active, Kind::Pong, Active),
    (ONE, Completed, Kind::Ping, Completed),
    (ONE, Completed, Kind::Pong, Completed),
    (BOTH, Active, Kind::Bye, Closed),
    (ONE, Completed, Kind::Bye, Closed),
    (BOTH, Greeting, Kind::Error, Closed),
    (BOTH, Active, Kind::Error, Closed),
    (ONE, Completed, Kind::Error, Closed),
];

fn next(table: &[Row], channel: Channel, phase: Phase, kind: Kind) -> Option<Phase> {
    table
        .iter()
        .find(|(channels, from, of, _)| {
            *from == phase && *of == kind && channels.contains(&channel)
        })
        .map(|row| row.3)
}

/// The phase a destination's connection is in after a frame of `kind`; `None`: not allowed.
#[must_use]
pub fn client_next(channel: Channel, phase: Phase, kind: Kind) -> Option<Phase> {
    next(CLIENT, channel, phase, kind)
}

/// The phase a source's connection is in after a frame of `kind`; `None`: not allowed.
#[must_use]
pub fn server_next(channel: Channel, phase: Phase, kind: Kind) -> Option<Phase> {
    next(SERVER, channel, phase, kind)
}
