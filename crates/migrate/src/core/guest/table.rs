//! Which frame of a guest's migration may be received and sent when, as tables.
//!
//! The further connections of a session are in its phase, once their own hellos have been said.
//! Where the session has none, control carries what they would, by the tables of their own.

use crate::core::{
    Channel, Kind, Lane, Phase,
    table::{ALIVE, Row, next},
};

use Channel::{Control, Faults, Pages};
use Phase::{
    Active, Allocating, Cancelling, Closed, Committing, Comparing, Completed, Completing, Copying,
    Deciding, Dropping, Greeting, Listing, Loading, Offering, Prepared, Receiving, Rejoining,
    Restoring, Returning, Running, Serving, Settling, Starting, Stopping, Switching,
};

const ALL: &[Channel] = &[Control, Pages, Faults];
const CONTROL: &[Channel] = &[Control];
const PAGES: &[Channel] = &[Pages];
const FAULTS: &[Channel] = &[Faults];
const LANES: &[Channel] = &[Pages, Faults];
const ROUNDS: &[Channel] = &[Control, Pages];

const ENDS: &[Kind] = &[Kind::Bye, Kind::Error];
const COPIES: &[Kind] = &[Kind::Data, Kind::Packed, Kind::Zero];
const ANSWERS: &[Kind] = &[Kind::Data, Kind::Packed, Kind::Zero, Kind::Poison];
const ASKS: &[Kind] = &[Kind::Request, Kind::Expedite];
const HAVES: &[Kind] = &[Kind::Have, Kind::HaveEnd];

/// Where a source is once the hellos have been said, and nothing but control is there.
const SOURCE_ALONE: &[Phase] = &[Listing, Offering];

/// Where a source is later.
const SOURCE: &[Phase] = &[
    Copying, Stopping, Switching, Deciding, Committing, Serving, Completed, Cancelling, Rejoining,
    Comparing,
];

/// Where a destination is once the hellos have been said, and nothing but control is there.
const DESTINATION_ALONE: &[Phase] = &[Listing, Allocating];

/// Where a destination is later.
const DESTINATION: &[Phase] = &[
    Receiving, Loading, Settling, Restoring, Prepared, Starting, Running, Completing, Completed,
    Dropping, Rejoining, Comparing,
];

/// What a source may send and receive about being there.
const SOURCE_LIFE: &[Row] = &[
    (CONTROL, SOURCE_ALONE, ALIVE, None),
    (CONTROL, SOURCE_ALONE, ENDS, Some(Closed)),
    (ALL, SOURCE, ALIVE, None),
    (ALL, SOURCE, ENDS, Some(Closed)),
    (ALL, &[Greeting], &[Kind::Error], Some(Closed)),
    (CONTROL, &[Returning], &[Kind::Error], Some(Closed)),
];

/// What a source may receive. Whatever has no row is refused.
const SOURCE_RECEIVES: &[Row] = &[
    (CONTROL, &[Greeting], &[Kind::Hello], Some(Listing)),
    (CONTROL, &[Returning], &[Kind::Hello], Some(Rejoining)),
    (LANES, &[Greeting], &[Kind::Hello], Some(Active)),
    (CONTROL, &[Offering], &[Kind::Accept], Some(Copying)),
    (CONTROL, &[Copying, Stopping, Switching], &[Kind::RoundAck], None),
    (FAULTS, &[Switching], &[Kind::Request], None),
    (CONTROL, &[Switching], &[Kind::Ready], Some(Deciding)),
    (CONTROL, &[Committing], &[Kind::Running], Some(Serving)),
    (CONTROL, &[Deciding, Committing], &[Kind::Dropped], Some(Closed)),
    // What was asked for may have come otherwise: once completed, it is ignored.
    (FAULTS, &[Committing, Serving, Completed], ASKS, None),
    (CONTROL, &[Serving], &[Kind::Complete], Some(Completed)),
    (CONTROL, &[Comparing], HAVES, None),
    (CONTROL, &[Comparing], &[Kind::Ready], Some(Deciding)),
    (CONTROL, &[Comparing], &[Kind::Running], Some(Serving)),
    (CONTROL, &[Comparing], &[Kind::Dropped], Some(Closed)),
    // What was on its way when the source gave up.
    (CONTROL, &[Cancelling], &[Kind::Accept, Kind::RoundAck, Kind::Ready, Kind::Dropped], None),
    (FAULTS, &[Cancelling], &[Kind::Request], None),
    (CONTROL, &[Cancelling], &[Kind::Cancelled], Some(Closed)),
];

const SOURCE_RECEIVES_FOR_FAULTS: &[Row] = &[
    (CONTROL, &[Switching, Cancelling], &[Kind::Request], None),
    (CONTROL, &[Committing, Serving, Completed], ASKS, None),
];

/// What a source may send.
const SOURCE_SENDS: &[Row] = &[
    (CONTROL, &[Listing], &[Kind::Regions], Some(Offering)),
    (CONTROL, &[Copying], &[Kind::RoundBegin], None),
    (PAGES, &[Copying], COPIES, None),
    (ROUNDS, &[Copying], &[Kind::RoundEnd], None),
    (CONTROL, &[Copying], &[Kind::StateBegin], Some(Stopping)),
    (CONTROL, &[Stopping], &[Kind::State, Kind::Missing], None),
    (CONTROL, &[Stopping], &[Kind::Switch], Some(Switching)),
    (FAULTS, &[Switching, Committing, Serving], ANSWERS, None),
    (PAGES, &[Serving], ANSWERS, None),
    (CONTROL, &[Deciding], &[Kind::Run], Some(Committing)),
    (CONTROL, &[Completed], &[Kind::CompleteAck], None),
    (CONTROL, &[Rejoining], &[Kind::Resume], Some(Comparing)),
    (
        CONTROL,
        &[Listing, Offering, Copying, Stopping, Switching, Deciding, Rejoining],
        &[Kind::Cancel],
        Some(Cancelling),
    ),
];

const SOURCE_SENDS_FOR_PAGES: &[Row] =
    &[(CONTROL, &[Copying], COPIES, None), (CONTROL, &[Serving], ANSWERS, None)];

const SOURCE_SENDS_FOR_FAULTS: &[Row] =
    &[(CONTROL, &[Switching, Committing, Serving], ANSWERS, None)];

/// What a destination may send and receive about being there.
const DESTINATION_LIFE: &[Row] = &[
    (CONTROL, DESTINATION_ALONE, ALIVE, None),
    (CONTROL, DESTINATION_ALONE, ENDS, Some(Closed)),
    (ALL, DESTINATION, ALIVE, None),
    (ALL, DESTINATION, ENDS, Some(Closed)),
    (CONTROL, &[Greeting, Returning], &[Kind::Error], Some(Closed)),
];

/// What a destination may receive. Whatever has no row is refused.
const DESTINATION_RECEIVES: &[Row] = &[
    (CONTROL, &[Greeting], &[Kind::Hello], Some(Listing)),
    (CONTROL, &[Returning], &[Kind::Hello], Some(Rejoining)),
    (CONTROL, &[Listing], &[Kind::Regions], Some(Allocating)),
    (CONTROL, &[Receiving], &[Kind::RoundBegin], None),
    (CONTROL, &[Receiving], &[Kind::RoundEnd], None),
    // Pages of the last round may be behind what control says.
    (PAGES, &[Receiving, Loading, Settling], COPIES, None),
    (PAGES, &[Receiving, Loading, Settling], &[Kind::RoundEnd], None),
    (CONTROL, &[Receiving], &[Kind::StateBegin], Some(Loading)),
    (CONTROL, &[Loading], &[Kind::State, Kind::Missing], None),
    (CONTROL, &[Loading], &[Kind::Switch], Some(Settling)),
    (FAULTS, &[Restoring, Starting, Running], ANSWERS, None),
    (PAGES, &[Running], ANSWERS, None),
    (CONTROL, &[Prepared], &[Kind::Run], Some(Starting)),
    (CONTROL, &[Completing], &[Kind::CompleteAck], Some(Completed)),
    (CONTROL, &[Rejoining], &[Kind::Resume], Some(Comparing)),
    (
        CONTROL,
        &[Listing, Allocating, Receiving, Loading, Settling, Restoring, Prepared, Rejoining],
        &[Kind::Cancel],
        Some(Dropping),
    ),
];

const DESTINATION_RECEIVES_FOR_PAGES: &[Row] =
    &[(CONTROL, &[Receiving], COPIES, None), (CONTROL, &[Running], ANSWERS, None)];

const DESTINATION_RECEIVES_FOR_FAULTS: &[Row] =
    &[(CONTROL, &[Restoring, Starting, Running], ANSWERS, None)];

/// What a destination may send.
const DESTINATION_SENDS: &[Row] = &[
    (CONTROL, &[Allocating], &[Kind::Accept], Some(Receiving)),
    (CONTROL, &[Receiving, Loading], &[Kind::RoundAck], None),
    (FAULTS, &[Restoring], &[Kind::Request], None),
    (CONTROL, &[Restoring], &[Kind::Ready], Some(Prepared)),
    (CONTROL, &[Starting], &[Kind::Running], Some(Running)),
    (CONTROL, &[Prepared, Starting], &[Kind::Dropped], Some(Closed)),
    (FAULTS, &[Starting, Running], ASKS, None),
    (CONTROL, &[Running], &[Kind::Complete], Some(Completing)),
    (CONTROL, &[Comparing], HAVES, None),
    (CONTROL, &[Comparing], &[Kind::Ready], Some(Prepared)),
    (CONTROL, &[Comparing], &[Kind::Running], Some(Running)),
    (CONTROL, &[Comparing], &[Kind::Dropped], Some(Closed)),
    (CONTROL, &[Dropping], &[Kind::Cancelled], Some(Closed)),
];

const DESTINATION_SENDS_FOR_FAULTS: &[Row] =
    &[(CONTROL, &[Restoring], &[Kind::Request], None), (CONTROL, &[Starting, Running], ASKS, None)];

/// Looks into the table of a channel, and on control into those of the channels that the session
/// does not have.
fn find(
    [own, life, pages, faults]: [&[Row]; 4],
    lanes: Lane,
    (channel, phase, kind): (Channel, Phase, Kind),
) -> Option<Phase> {
    let carried = |table: &[Row], connections: u16| {
        (connections == 0).then(|| next(table, channel, phase, kind)).flatten()
    };
    next(own, channel, phase, kind)
        .or_else(|| next(life, channel, phase, kind))
        .or_else(|| carried(pages, lanes.index))
        .or_else(|| carried(faults, lanes.of))
}

/// The phase a guest's source is in after a frame of `kind` came, in a session with these numbers
/// of pages and faults connections; `None`: not allowed. A further connection whose hello has come
/// is [`Phase::Active`] by the table, and in the session's phase from then on.
#[must_use]
pub fn guest_source_next(lanes: Lane, channel: Channel, phase: Phase, kind: Kind) -> Option<Phase> {
    let tables = [SOURCE_RECEIVES, SOURCE_LIFE, &[], SOURCE_RECEIVES_FOR_FAULTS];
    find(tables, lanes, (channel, phase, kind))
}

/// The phase a guest's source is in after it has sent a frame of `kind`; `None`: not allowed.
#[must_use]
pub fn guest_source_sends(
    lanes: Lane,
    channel: Channel,
    phase: Phase,
    kind: Kind,
) -> Option<Phase> {
    let tables = [SOURCE_SENDS, SOURCE_LIFE, SOURCE_SENDS_FOR_PAGES, SOURCE_SENDS_FOR_FAULTS];
    find(tables, lanes, (channel, phase, kind))
}

/// The phase a guest's destination is in after a frame of `kind` came; `None`: not allowed. From
/// [`Phase::Settling`] it moves on to [`Phase::Restoring`] by itself, when the pages connections
/// have ended the last round.
#[must_use]
pub fn guest_destination_next(
    lanes: Lane,
    channel: Channel,
    phase: Phase,
    kind: Kind,
) -> Option<Phase> {
    let tables = [
        DESTINATION_RECEIVES,
        DESTINATION_LIFE,
        DESTINATION_RECEIVES_FOR_PAGES,
        DESTINATION_RECEIVES_FOR_FAULTS,
    ];
    find(tables, lanes, (channel, phase, kind))
}

/// The phase a guest's destination is in after it has sent a frame of `kind`; `None`: not allowed.
#[must_use]
pub fn guest_destination_sends(
    lanes: Lane,
    channel: Channel,
    phase: Phase,
    kind: Kind,
) -> Option<Phase> {
    find(
        [DESTINATION_SENDS, DESTINATION_LIFE, &[], DESTINATION_SENDS_FOR_FAULTS],
        lanes,
        (channel, phase, kind),
    )
}
