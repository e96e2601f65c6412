//! Which frame may arrive when, as four tables. Those of guests are in their own module.

use super::{Channel, Kind, Phase};

use Channel::{Background, Demand, Images};
use Phase::{
    Active, Closed, Completed, Completing, Describing, Filling, Greeting, Listing, Storing,
};

/// A row: on these channels, in these phases, a frame of these kinds leads to that phase, or
/// (`None`) changes nothing.
pub(super) type Row = (&'static [Channel], &'static [Phase], &'static [Kind], Option<Phase>);

const BOTH: &[Channel] = &[Demand, Background];
const ONE: &[Channel] = &[Demand];
const OTHER: &[Channel] = &[Background];
const IMAGES: &[Channel] = &[Images];

/// Signs of life.
pub(super) const ALIVE: &[Kind] = &[Kind::Ping, Kind::Pong];
const ANSWERS: &[Kind] = &[Kind::Data, Kind::Zero, Kind::Poison];
const PAGES: &[Kind] = &[Kind::Data, Kind::Zero, Kind::Poison, Kind::Gone];
const DESCRIPTION: &[Kind] = &[Kind::ImageMetadata, Kind::ImageMappings];

/// What a destination may receive. Whatever has no row is refused.
const CLIENT: &[Row] = &[
    (ONE, &[Greeting], &[Kind::Hello], Some(Listing)),
    (OTHER, &[Greeting], &[Kind::Hello], Some(Active)),
    (ONE, &[Listing], &[Kind::Regions], Some(Active)),
    (BOTH, &[Active], ANSWERS, None),
    (ONE, &[Completing], &[Kind::CompleteAck], Some(Completed)),
    (BOTH, &[Active], ALIVE, None),
    (ONE, &[Completing, Completed], ALIVE, None),
    (BOTH, &[Active], &[Kind::Bye], Some(Closed)),
    (ONE, &[Completing, Completed], &[Kind::Bye], Some(Closed)),
    (BOTH, &[Greeting, Active], &[Kind::Error], Some(Closed)),
    (ONE, &[Listing, Completing, Completed], &[Kind::Error], Some(Closed)),
];

/// What a source may receive. Whatever has no row is refused.
const SERVER: &[Row] = &[
    (BOTH, &[Greeting], &[Kind::Hello], Some(Active)),
    (BOTH, &[Active], &[Kind::Request], None),
    (ONE, &[Active], &[Kind::Expedite], None),
    (ONE, &[Active], &[Kind::Complete], Some(Completed)),
    (BOTH, &[Active], ALIVE, None),
    (ONE, &[Completed], ALIVE, None),
    (BOTH, &[Active], &[Kind::Bye], Some(Closed)),
    (ONE, &[Completed], &[Kind::Bye], Some(Closed)),
    (BOTH, &[Greeting, Active], &[Kind::Error], Some(Closed)),
    (ONE, &[Completed], &[Kind::Error], Some(Closed)),
];

/// What an image receiver may receive, and therefore an image sender send. Whatever has no row is
/// refused.
const IMAGE_RECEIVER: &[Row] = &[
    (IMAGES, &[Greeting], &[Kind::Hello], Some(Active)),
    (IMAGES, &[Active], &[Kind::ImageBegin], Some(Describing)),
    (IMAGES, &[Describing], DESCRIPTION, None),
    (IMAGES, &[Describing, Filling], PAGES, Some(Filling)),
    (IMAGES, &[Describing, Filling], &[Kind::ImageEnd], Some(Storing)),
    (IMAGES, &[Describing, Filling], &[Kind::ImageAbort], Some(Active)),
    (IMAGES, &[Active], &[Kind::Complete], Some(Completed)),
    (IMAGES, &[Active, Describing, Filling, Storing, Completed], ALIVE, None),
    (IMAGES, &[Active, Completed], &[Kind::Bye], Some(Closed)),
    (
        IMAGES,
        &[Greeting, Active, Describing, Filling, Storing, Completed],
        &[Kind::Error],
        Some(Closed),
    ),
];

/// Where an image sender can be once the hellos have been said.
const SENDING: &[Phase] = &[Active, Describing, Filling, Storing, Completing, Completed];

/// What an image sender may receive. Whatever has no row is refused.
const IMAGE_SENDER: &[Row] = &[
    (IMAGES, &[Greeting], &[Kind::Hello], Some(Active)),
    (IMAGES, &[Storing], &[Kind::ImageStored], Some(Active)),
    (IMAGES, &[Completing], &[Kind::CompleteAck], Some(Completed)),
    (IMAGES, SENDING, ALIVE, None),
    (IMAGES, SENDING, &[Kind::Bye, Kind::Error], Some(Closed)),
    (IMAGES, &[Greeting], &[Kind::Error], Some(Closed)),
];

pub(super) fn next(table: &[Row], channel: Channel, phase: Phase, kind: Kind) -> Option<Phase> {
    table
        .iter()
        .find(|(channels, phases, kinds, _)| {
            phases.contains(&phase) && kinds.contains(&kind) && channels.contains(&channel)
        })
        .map(|row| row.3.unwrap_or(phase))
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

/// The phase an image receiver is in after a frame of `kind`; `None`: not allowed. An image sender
/// that has sent it is in the same phase, except that it awaits an answer to its counts.
#[must_use]
pub fn image_receiver_next(phase: Phase, kind: Kind) -> Option<Phase> {
    next(IMAGE_RECEIVER, Images, phase, kind)
}

/// The phase an image sender is in after a frame of `kind` came; `None`: not allowed.
#[must_use]
pub fn image_sender_next(phase: Phase, kind: Kind) -> Option<Phase> {
    next(IMAGE_SENDER, Images, phase, kind)
}
