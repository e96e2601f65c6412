//! Which frame may arrive when, as four tables.

use super::{Channel, Kind, Phase};

use Channel::{Background, Demand, Images};
use Phase::{
    Active, Closed, Completed, Completing, Describing, Filling, Greeting, Listing, Storing,
};

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

const IMAGES: &[Channel] = &[Images];

/// What an image receiver may receive, and therefore an image sender send. Whatever has no row is
/// refused.
const IMAGE_RECEIVER: &[Row] = &[
    (IMAGES, Greeting, Kind::Hello, Active),
    (IMAGES, Active, Kind::ImageBegin, Describing),
    (IMAGES, Describing, Kind::ImageMetadata, Describing),
    (IMAGES, Describing, Kind::ImageMappings, Describing),
    (IMAGES, Describing, Kind::Data, Filling),
    (IMAGES, Describing, Kind::Zero, Filling),
    (IMAGES, Describing, Kind::Poison, Filling),
    (IMAGES, Describing, Kind::Gone, Filling),
    (IMAGES, Describing, Kind::ImageEnd, Storing),
    (IMAGES, Describing, Kind::ImageAbort, Active),
    (IMAGES, Filling, Kind::Data, Filling),
    (IMAGES, Filling, Kind::Zero, Filling),
    (IMAGES, Filling, Kind::Poison, Filling),
    (IMAGES, Filling, Kind::Gone, Filling),
    (IMAGES, Filling, Kind::ImageEnd, Storing),
    (IMAGES, Filling, Kind::ImageAbort, Active),
    (IMAGES, Active, Kind::Complete, Completed),
    (IMAGES, Active, Kind::Ping, Active),
    (IMAGES, Active, Kind::Pong, Active),
    (IMAGES, Describing, Kind::Ping, Describing),
    (IMAGES, Describing, Kind::Pong, Describing),
    (IMAGES, Filling, Kind::Ping, Filling),
    (IMAGES, Filling, Kind::Pong, Filling),
    (IMAGES, Storing, Kind::Ping, Storing),
    (IMAGES, Storing, Kind::Pong, Storing),
    (IMAGES, Completed, Kind::Ping, Completed),
    (IMAGES, Completed, Kind::Pong, Completed),
    (IMAGES, Active, Kind::Bye, Closed),
    (IMAGES, Completed, Kind::Bye, Closed),
    (IMAGES, Greeting, Kind::Error, Closed),
    (IMAGES, Active, Kind::Error, Closed),
    (IMAGES, Describing, Kind::Error, Closed),
    (IMAGES, Filling, Kind::Error, Closed),
    (IMAGES, Storing, Kind::Error, Closed),
    (IMAGES, Completed, Kind::Error, Closed),
];

/// What an image sender may receive. Whatever has no row is refused.
const IMAGE_SENDER: &[Row] = &[
    (IMAGES, Greeting, Kind::Hello, Active),
    (IMAGES, Storing, Kind::ImageStored, Active),
    (IMAGES, Completing, Kind::CompleteAck, Completed),
    (IMAGES, Active, Kind::Ping, Active),
    (IMAGES, Active, Kind::Pong, Active),
    (IMAGES, Describing, Kind::Ping, Describing),
    (IMAGES, Describing, Kind::Pong, Describing),
    (IMAGES, Filling, Kind::Ping, Filling),
    (IMAGES, Filling, Kind::Pong, Filling),
    (IMAGES, Storing, Kind::Ping, Storing),
    (IMAGES, Storing, Kind::Pong, Storing),
    (IMAGES, Completing, Kind::Ping, Completing),
    (IMAGES, Completing, Kind::Pong, Completing),
    (IMAGES, Completed, Kind::Ping, Completed),
    (IMAGES, Completed, Kind::Pong, Completed),
    (IMAGES, Active, Kind::Bye, Closed),
    (IMAGES, Describing, Kind::Bye, Closed),
    (IMAGES, Filling, Kind::Bye, Closed),
    (IMAGES, Storing, Kind::Bye, Closed),
    (IMAGES, Completing, Kind::Bye, Closed),
    (IMAGES, Completed, Kind::Bye, Closed),
    (IMAGES, Greeting, Kind::Error, Closed),
    (IMAGES, Active, Kind::Error, Closed),
    (IMAGES, Describing, Kind::Error, Closed),
    (IMAGES, Filling, Kind::Error, Closed),
    (IMAGES, Storing, Kind::Error, Closed),
    (IMAGES, Completing, Kind::Error, Closed),
    (IMAGES, Completed, Kind::Error, Closed),
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
